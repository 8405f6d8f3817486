"""Searches against enumeration of every continuation, transformers, and plain loops."""

import itertools
import math

import pytest
import torch
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from toolmem.errors import ToolmemError
from toolmem.generation import Sampling
from toolmem.generation.beam import beam_search, n_best
from toolmem.generation.contrastive import contrastive_search
from toolmem.generation.reference import ASSISTANT, USER, Generated
from toolmem.models import RNN, Mamba, Transformer

PROMPT = [1, 2, 3, 1]


def tiny(kind=Transformer, vocab=5, seed=0, sharpness=6.0, **options):
    torch.manual_seed(seed)
    args = (vocab, 16, 2, 2) if kind is Transformer else (vocab, 16, 2)
    model = kind(*args, max_seq_len=40, **options)
    with torch.no_grad():
        model.head.weight.normal_().mul_(sharpness / 4)
    return model


@torch.no_grad()
def log_prob(model, prompt, new):
    log_probs = model(torch.tensor([[*prompt, *new]]))[0].double().log_softmax(-1)
    return sum(float(log_probs[len(prompt) - 1 + i, token]) for i, token in enumerate(new))


def enumerated(model, longest, stop, length_penalty):
    """Every continuation, best first, by its definition."""
    found = []
    vocab = range(model.vocab_size)
    for length in range(1, longest + 1):
        for new in itertools.product(vocab, repeat=length):
            if stop in new[:-1] or (new[-1] != stop and length < longest):
                continue
            found.append((log_prob(model, PROMPT, new) / length**length_penalty, new))
    return sorted(found, reverse=True)


@pytest.mark.parametrize("kind", [Transformer, Mamba, RNN])
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0, -1.0])
def test_a_wide_beam_finds_the_best_of_all(kind, length_penalty):
    model = tiny(kind)
    found = beam_search(
        model, PROMPT, n_beams=125, max_new_tokens=3, stop_tokens=[4], n_best=20,
        length_penalty=length_penalty,
    )  # fmt: skip
    expected = enumerated(model, 3, 4, length_penalty)[:20]
    assert [x.tokens for x in found] == [new for _, new in expected]
    for ours, (score, new) in zip(found, expected, strict=True):
        assert ours.score == pytest.approx(score, abs=1e-4)
        assert ours.log_prob == pytest.approx(log_prob(model, PROMPT, new), abs=1e-4)
        assert ours.stopped == (new[-1] == 4)


class Wrapped(PreTrainedModel, GenerationMixin):
    """Our model as transformers knows one; no cache."""

    config_class = PretrainedConfig

    def __init__(self, config, model):
        super().__init__(config)
        self.inner = model
        self.post_init()

    def _init_weights(self, module):
        pass

    def forward(self, input_ids, **_):
        return CausalLMOutput(logits=self.inner(input_ids))

    def prepare_inputs_for_generation(self, input_ids, **_):
        return {"input_ids": input_ids}


def theirs(model, **options):
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    config = PretrainedConfig(
        vocab_size=model.vocab_size, is_encoder_decoder=False, num_hidden_layers=2,
        hidden_size=16, num_attention_heads=2,
    )  # fmt: skip
    wrapped = Wrapped(config, model).eval()
    model.load_state_dict(weights)
    return wrapped.generate(
        torch.tensor([PROMPT]), use_cache=False, do_sample=False, pad_token_id=0,
        return_dict_in_generate=True, output_scores=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("length_penalty", [0.0, 1.0])
def test_beam_search_equals_transformers(seed, length_penalty):
    model = tiny(vocab=12, seed=seed)
    out = theirs(
        model, num_beams=4, num_return_sequences=4, max_new_tokens=9, eos_token_id=11,
        length_penalty=length_penalty, early_stopping="never",
    )  # fmt: skip
    ours = beam_search(
        model, PROMPT, n_beams=4, max_new_tokens=9, stop_tokens=[11], length_penalty=length_penalty
    )
    expected = []
    for row in out.sequences[:, len(PROMPT) :].tolist():
        expected.append(tuple(row[: row.index(11) + 1] if 11 in row else row))
    assert [x.tokens for x in ours] == expected
    torch.testing.assert_close(
        torch.tensor([x.score for x in ours]), out.sequences_scores, atol=1e-4, rtol=0
    )


def test_one_beam_is_greedy():
    model = tiny(vocab=12)
    [found] = beam_search(model, PROMPT, n_beams=1, max_new_tokens=10)
    tokens = list(PROMPT)
    for _ in range(10):
        tokens.append(int(model(torch.tensor([tokens]))[0, -1].argmax()))
    assert list(found.tokens) == tokens[len(PROMPT) :]
    assert not found.stopped


def diverse_plainly(model, n_groups, width, steps, diversity):
    """Diverse beam search over whole sequences, written as in the paper; no stop token."""
    groups = [[((), 0.0)] for _ in range(n_groups)]
    for _ in range(steps):
        used = [0] * model.vocab_size
        for index, group in enumerate(groups):
            candidates = []
            for new, total in group:
                row = model(torch.tensor([[*PROMPT, *new]]))[0, -1].double().log_softmax(-1)
                for token, step in enumerate(row.tolist()):
                    rank = total + step - diversity * used[token]
                    candidates.append((rank, (*new, token), total + step))
            best = sorted(candidates, reverse=True)[:width]
            groups[index] = [(new, total) for _, new, total in best]
            for _, new, _ in best:
                used[new[-1]] += 1
    return groups


@pytest.mark.parametrize("diversity", [0.0, 0.7, 5.0])
@torch.no_grad()
def test_diverse_beam_search_equals_a_plain_loop(diversity):
    model = tiny(vocab=9, seed=3)
    plain = diverse_plainly(model, 3, 2, 5, diversity)
    found = beam_search(
        model, PROMPT, n_beams=6, n_groups=3, diversity=diversity, max_new_tokens=5,
        length_penalty=0.0,
    )  # fmt: skip
    expected = {new: total for group in plain for new, total in group}
    assert {x.tokens for x in found} == set(expected)
    for x in found:
        assert x.log_prob == pytest.approx(expected[x.tokens], abs=1e-4)
    if diversity == 0:
        assert len(found) == 2  # the groups found the same


def test_groups_that_pay_enough_part_at_once():
    model = tiny(vocab=9, seed=3)
    found = beam_search(model, PROMPT, n_beams=6, n_groups=3, diversity=99.0, max_new_tokens=1)
    assert len({x.tokens for x in found}) == 6
    assert [x.group for x in found[:3]] == [0, 1, 2]  # the first group chose freely


def test_options_act_on_beams():
    model = tiny(vocab=9, seed=1)
    options = Sampling(no_repeat_ngram_size=2, logit_bias={7: -math.inf})
    for x in beam_search(model, PROMPT, n_beams=3, max_new_tokens=12, options=options):
        whole = [*PROMPT, *x.tokens]
        pairs = list(itertools.pairwise(whole))
        assert len(set(pairs)) == len(pairs) and 7 not in x.tokens
        assert x.log_prob == pytest.approx(log_prob(model, PROMPT, x.tokens), abs=1e-4)


def test_a_rising_score_is_not_cut_off():
    model = tiny(vocab=6, seed=2)
    options = Sampling(logit_bias={1: 9.0, 5: 4.0})
    best = beam_search(
        model, PROMPT, n_beams=2, max_new_tokens=8, stop_tokens=[5], length_penalty=0,
        options=options,
    )[0]  # fmt: skip
    assert best.tokens[:7] == (1,) * 7


@torch.no_grad()
def contrastive_plainly(model, k, alpha, steps):
    tokens = list(PROMPT)
    for _ in range(steps):
        logits = model(torch.tensor([tokens]))[0, -1].double()
        p = logits.softmax(-1)
        before = model.hidden(torch.tensor([tokens]))[0].double()
        scored = []
        for token in p.topk(k).indices.tolist():
            last = model.hidden(torch.tensor([[*tokens, token]]))[0, -1].double()
            like = max(float(last @ h / (last.norm() * h.norm())) for h in before)
            scored.append(((1 - alpha) * float(p[token]) - alpha * like, token))
        tokens.append(max(scored)[1])
    return tokens[len(PROMPT) :]


@pytest.mark.parametrize("kind", [Transformer, RNN])
@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.6, 1.0])
def test_contrastive_search_equals_a_plain_loop(kind, alpha):
    model = tiny(kind, vocab=12, seed=5, sharpness=3.0)
    found = contrastive_search(model, PROMPT, k=4, alpha=alpha, max_new_tokens=15)
    assert list(found.tokens) == contrastive_plainly(model, 4, alpha, 15)
    assert found.log_prob == pytest.approx(log_prob(model, PROMPT, found.tokens), abs=1e-4)


def test_contrastive_search_stops():
    model = tiny(vocab=12, seed=5)
    free = contrastive_search(model, PROMPT, max_new_tokens=15)
    stop = free.tokens[6]
    found = contrastive_search(model, PROMPT, max_new_tokens=15, stop_tokens=[stop])
    assert found.tokens == free.tokens[: free.tokens.index(stop) + 1] and found.stopped


def test_prefix_models_want_roles():
    model = tiny(attention_mask="prefix")
    with pytest.raises(ToolmemError, match="roles"):
        beam_search(model, PROMPT, max_new_tokens=2)
    roles = [USER, USER, USER, ASSISTANT]
    [found] = beam_search(model, PROMPT, n_beams=1, max_new_tokens=1, roles=roles)
    spans = torch.tensor([[0, 0, 0, -1]])
    assert found.tokens == (int(model(torch.tensor([PROMPT]), spans=spans)[0, -1].argmax()),)


def test_the_model_bounds_the_length_and_gets_its_mode_back():
    model = tiny().train()
    [found] = beam_search(model, [1] * 37, n_beams=1, max_new_tokens=50)
    assert len(found.tokens) == 3 and model.training
    assert beam_search(model, [1] * 40, n_beams=2) == []
    assert contrastive_search(model, [1] * 40).tokens == ()


def test_n_best_ranks_what_the_model_wrote():
    def dialogue(tokens, log_probs):
        return Generated(tokens, [USER] + [ASSISTANT] * 3, [math.nan, *log_probs], "end")

    a = dialogue([1, 2, 3, 4], [-1.0, -1.0, -1.0])
    b = dialogue([1, 2, 3, 5], [-0.5, math.nan, -1.5])
    assert [(x.tokens[-1], s) for x, s in n_best([a, b, a], 3)] == [(5, -2.0), (4, -3.0)]
    ranked = n_best([b, a], 5, length_penalty=1.0)
    assert [s for _, s in ranked] == [-1.0, -1.0]
    assert n_best([a, b], 1)[0][0] is b


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"n_beams": 0}, "n_beams"),
        ({"n_best": 9}, "n_best"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"n_groups": 3}, "n_groups"),
        ({"n_groups": 2, "diversity": -1.0}, "diversity"),
        ({"diversity": 1.0}, "diversity"),
    ],
)
def test_refusals(options, key):
    with pytest.raises(ToolmemError, match=key):
        beam_search(tiny(), PROMPT, **options)


@pytest.mark.parametrize("options", [{"k": 0}, {"alpha": 1.5}, {"max_new_tokens": 0}])
def test_contrastive_refusals(options):
    with pytest.raises(ToolmemError, match=next(iter(options))):
        contrastive_search(tiny(), PROMPT, **options)


@pytest.mark.parametrize("prompt", [[], [99]])
def test_bad_prompts(prompt):
    with pytest.raises(ToolmemError, match="prompt"):
        beam_search(tiny(), prompt)
