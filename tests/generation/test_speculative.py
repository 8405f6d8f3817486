"""Speculation changes how many passes there are, and nothing else."""

import copy
import math
from collections import Counter

import numpy as np
import pytest
import torch
from test_engine import (
    ARCHITECTURES,
    TOKENIZER,
    Count,
    assert_equal,
    check_nothing_left,
    ragged_prompts,
    random_model,
    talkative,
)

from toolmem.errors import ToolmemError
from toolmem.generation import Engine, Request, Sampling, generate_naive
from toolmem.generation.acceptance import Acceptance
from toolmem.generation.lookup import PromptLookup
from toolmem.generation.planning import DraftCosts, draft_costs, model_seconds
from toolmem.generation.speculative import (
    Draft,
    DraftHeads,
    DraftModel,
    ancestors,
    chain,
    depths,
    follow,
    trunk,
)
from toolmem.models import Eagle, Medusa, Transformer

OPTIONS = {
    "plain": {},
    "gqa": {"n_kv_heads": 1, "qk_norm": True, "tie_embeddings": True},
    "conv": {"conv_width": 4},
    "window": {"window": [9, 0]},
    "prefix": {"attention_mask": "prefix"},
    "learned": {"position": "learned", "norm": "layer", "feed_forward": "gelu"},
}
MODELS = {
    name: lambda options=options: random_model(0, **options) for name, options in OPTIONS.items()
}
MODELS |= {
    name: lambda arguments=arguments: talkative(*arguments)
    for name, arguments in ARCHITECTURES.items()
}


class Guess:
    """Knows what is coming for some of the way, then does not; branches between the two."""

    window = 0
    width = 1.0
    max_tokens = 5

    def __init__(self, dialogues, tree):
        self.dialogues = {tuple(d.tokens[: d.prompt_length]): d.tokens for d in dialogues}
        self.tree = tree
        self.calls = 0

    def propose(self, lanes, columns, limits):
        drafts = []
        for lane, limit in zip(lanes, limits, strict=True):
            self.calls += 1
            whole = self.dialogues.get(tuple(lane.request.prompt), [])
            n = int(columns.length[lane.index])
            right = whole[n : n + min(limit, self.calls % 6)]
            wrong = [(token + 1) % 260 for token in right]
            if not self.tree:
                drafts.append(chain([*right, 7][:limit]))
                continue
            # at each place the right token, which the rest hangs on, and a wrong one
            tokens, parents, parent = [], [], -1
            for good, bad in zip(right, wrong, strict=True):
                tokens += [good, bad]
                parents += [parent, parent]
                parent = len(tokens) - 2
            drafts.append(Draft(tokens, parents))
        return drafts

    def seconds(self, lanes):
        return -1.0, -1.0  # it always pays

    def prefer_chains(self):
        pass

    def forget(self, lane, tokens=()):
        pass


def check(model, drafter, sampler, prompts, **settings):
    limits = {"max_new_tokens": 24, "max_tool_calls": 2}
    if sampler is not None:
        limits["sampler"] = sampler
    wanted = [
        generate_naive(model, TOKENIZER, prompt, toolbox=Count(), seed=5 + i, **limits)
        for i, prompt in enumerate(prompts)
    ]
    if callable(drafter):
        drafter = drafter(model, wanted)
    with Engine(model, TOKENIZER, Count(), drafter=drafter, **settings) as engine:
        results = engine.generate(prompts, seed=5, **limits)
        check_nothing_left(engine)
        histogram = engine.acceptance()
        steps = engine.stats().steps
    for ours, theirs in zip(results, wanted, strict=True):
        assert_equal(ours, theirs)
    return histogram, steps


@pytest.mark.parametrize("sampler", [None, Sampling(1.5, top_k=30)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("tree", [False, True], ids=["chain", "tree"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_plain_decoding(name, tree, sampler):
    histogram, _ = check(
        MODELS[name](),
        lambda model, wanted: Guess(wanted, tree),
        sampler,
        ragged_prompts(6, longest=25),
        max_lanes=4,
    )
    accepted = {int(right) for row in histogram["by_length"].values() for right in row}
    assert len(accepted) > 1, "acceptance is not ragged"


@pytest.mark.parametrize("sampler", [None, Sampling(0.7)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("name", ["plain", "mamba2"])
def test_prompt_lookup(name, sampler):
    histogram, _ = check(MODELS[name](), PromptLookup(), sampler, ragged_prompts(6))
    if (
        sampler is None and name == "plain"
    ):  # what a random model says likeliest goes round in circles
        assert histogram["tokens_per_pass"] > 1.2


def test_prompt_lookup_finds_the_longest_and_latest_match():
    class Columns:
        length = np.array([9, 4, 3])
        tokens = np.array(
            [
                [1, 2, 3, 9, 2, 3, 8, 2, 3, 0, 0],
                [5, 6, 7, 8, 0, 0, 0, 0, 0, 0, 0],
                [4, 4, 4, 0, 0, 0, 0, 0, 0, 0, 0],
            ]
        )

    class Row:
        def __init__(self, index):
            self.index = index

    lanes = [Row(i) for i in range(3)]
    found = PromptLookup(8, max_ngram=3, min_ngram=1).propose(lanes, Columns, [3, 3, 3])
    assert [draft.tokens for draft in found] == [[8, 2, 3], [], [4]]
    found = PromptLookup(8, max_ngram=3, min_ngram=3).propose(lanes, Columns, [3, 0, 3])
    assert [draft.tokens for draft in found] == [[], [], []]


def test_prompt_lookup_equals_a_search_of_the_whole_text():
    """As it grows a text's matches are those that are found by looking everywhere."""
    generator = np.random.default_rng(0)

    class Row:
        index = 0

    class Columns:
        tokens = generator.integers(0, 3, (1, 300))
        length = np.array([0])

    lookup, lane, text = (
        PromptLookup(5, max_ngram=8, min_ngram=2),
        Row(),
        Columns.tokens[0].tolist(),
    )
    for n in [1, 2, 3, 7, 8, *range(20, 300, 7)]:
        Columns.length = np.array([n])
        wanted: list[int] = []
        for length in (8, 4, 2):
            ends = [e for e in range(length, n) if text[e - length : e] == text[n - length : n]]
            if ends and n >= length:
                wanted = text[ends[-1] : min(ends[-1] + 5, n)]
                break
        assert lookup.propose([lane], Columns, [5])[0].tokens == wanted


def test_prompt_lookup_copies_from_dialogues_that_have_ended():
    class Row:
        index = 0

    def propose(lookup, tokens):
        class Columns:
            length = np.array([len(tokens)])

        Columns.tokens = np.array([tokens])
        return lookup.propose([Row()], Columns, [3])[0].tokens

    lookup = PromptLookup(8, max_ngram=4, min_ngram=1, pool_tokens=12)
    ended = Row()
    lookup.propose(
        [ended], type("Columns", (), {"length": [1], "tokens": np.zeros((1, 1), int)}), [1]
    )
    assert propose(lookup, [9, 1, 2]) == []
    lookup.forget(ended, [7, 1, 2, 3, 4, 5])
    assert propose(lookup, [9, 1, 2]) == [3, 4, 5]
    assert propose(lookup, [9, 9, 2]) == [], "one token is too little to copy from another dialogue"
    assert propose(lookup, [1, 2, 8, 0, 1, 2]) == [8, 0, 1], "its own goes before one as long"
    assert propose(lookup, [2, 8, 0, 1, 2]) == [3, 4, 5], "the longer one goes before its own"
    lookup.forget(Row(), [6, 6, 6, 6, 6, 6])
    assert propose(lookup, [9, 1, 2]) == [3, 4, 5], "the older half"
    lookup.forget(Row(), [6, 6, 6, 6, 6, 6])
    assert propose(lookup, [9, 1, 2]) == [], "as many tokens as were asked for"
    alone = PromptLookup(8, min_ngram=1, pool_tokens=0)
    alone.forget(ended, [7, 1, 2, 3, 4, 5])
    assert propose(alone, [9, 1, 2]) == []


def test_the_pool_lets_later_dialogues_copy():
    model = MODELS["plain"]()
    prompts = [ragged_prompts(1)[0]] * 4
    with Engine(model, TOKENIZER, max_lanes=1, drafter=PromptLookup()) as engine:
        steps = []
        for prompt in prompts:
            before = engine.stats().steps
            engine.generate([prompt], max_new_tokens=40)
            steps.append(engine.stats().steps - before)
    assert steps[1] < steps[0], "the same again, by copies of sixteen"


class Cheap(DraftModel):
    """A draft model that counts as if it cost nothing, as it does beside a large model."""

    def seconds(self, lanes):
        return -1.0, -1.0  # it always pays


class CheapHeads(DraftHeads):
    """The same of heads."""

    seconds = Cheap.seconds


@pytest.mark.parametrize("name", ["plain", "conv", "mamba2", "jamba"])
def test_draft_model(name):
    model = MODELS[name]()
    worse = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in worse.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=generator)
    for draft, least in ((model, 1.9), (worse, 1.0)):
        drafter = Cheap(draft, 3, max_lanes=4)
        histogram, _ = check(model, drafter, None, ragged_prompts(7, longest=20), max_lanes=4)
        assert histogram["tokens_per_pass"] > least
        assert drafter.pager.live == {"page": 0, "slot": 0}
    small = Cheap(model, 3, max_lanes=4, memory_limit=draft_memory(model))
    check(model, small, Sampling(), ragged_prompts(7, longest=20), max_lanes=4)


def test_a_drafter_that_cannot_pay_says_so_and_does_not_draft(caplog):
    model = MODELS["plain"]()

    class Slow(DraftModel):
        def seconds(self, lanes):
            return 0.0, 1.0

    histogram, _ = check(model, Slow(model, 3), None, ragged_prompts(3))
    assert histogram["passes"] == 0
    [record] = caplog.records
    assert "Slow" in record.getMessage() and "nothing is drafted" in record.getMessage()


def draft_memory(model):
    """As little as a draft model's state can live in."""
    each = DraftModel(model, 3, max_lanes=1).pager.bytes_each
    return 3 * each["page"] + each["slot"]


@pytest.mark.parametrize("cls", [Medusa, Eagle])
@pytest.mark.parametrize("name", ["plain", "conv"])
@pytest.mark.parametrize("sampler", [None, Sampling(0.8)], ids=["greedy", "sampled"])
@pytest.mark.parametrize("tree", [None, True], ids=["any", "tree"])
def test_heads(cls, name, sampler, tree):
    base = {
        "class_path": "toolmem.models.Transformer",
        "init_args": {"dim": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 120, **OPTIONS[name]},
    }
    torch.manual_seed(0)
    model = cls(260, base).eval()
    model.start_heads()
    histogram, _ = check(
        model, lambda model, _: CheapHeads(model, tree), sampler, ragged_prompts(6), max_lanes=4
    )
    assert histogram["passes"] > 0


def test_sampled_dialogues_have_the_exact_distribution():
    """Chi-square of the first two tokens over many seeds, drafts half right, against the softmax."""
    model = random_model(0)
    with torch.no_grad():
        model.head.weight *= 4  # few likely tokens
    prompt = ragged_prompts(1)[0]
    n = 3000

    class Likeliest:
        window, width, max_tokens = 0, 1.0, 2

        def propose(self, lanes, columns, limits):
            return [chain([17, 17][:limit]) if limit else Draft([], []) for limit in limits]

        def seconds(self, lanes):
            return -1.0, -1.0

        def prefer_chains(self):
            pass

        def forget(self, lane, tokens=()):
            pass

    with Engine(model, TOKENIZER, drafter=Likeliest(), max_lanes=256) as engine:
        results = engine.generate(
            [prompt] * n, max_new_tokens=2, sampler=Sampling(), use_tools=False
        )
    pairs = Counter(tuple(result.tokens[len(prompt) :]) for result in results)
    first = model(torch.tensor([prompt]))[0, -1].detach().double().softmax(-1)
    likely = first.topk(4).indices.tolist()
    expected = {}
    for token in likely:
        second = model(torch.tensor([[*prompt, token]]))[0, -1].detach().double().softmax(-1)
        for other in second.topk(6).indices.tolist():
            expected[token, other] = n * float(first[token] * second[other])
    expected = {pair: count for pair, count in expected.items() if count >= 8 and pair[0] < 258}
    assert len(expected) >= 5
    rest = n - sum(expected.values())
    observed_rest = n - sum(pairs[pair] for pair in expected)
    statistic = sum((pairs[pair] - count) ** 2 / count for pair, count in expected.items())
    statistic += (observed_rest - rest) ** 2 / rest
    freedom = len(expected)
    # Wilson-Hilferty: the cube root of chi-square is about normal; 4 sigma
    z = ((statistic / freedom) ** (1 / 3) - 1 + 2 / (9 * freedom)) / math.sqrt(2 / (9 * freedom))
    assert z < 4


def test_stops_within_a_draft():
    model = random_model(3)
    [prompt] = ragged_prompts(1)
    plain = generate_naive(model, TOKENIZER, prompt, max_new_tokens=40, sampler=Sampling(), seed=1)
    new = plain.tokens[len(prompt) :]
    at = next(i for i in range(4, len(new)) if new[i] not in new[:i])
    with Engine(model, TOKENIZER, drafter=Guess([plain], True)) as engine:
        request = Request(
            prompt, max_new_tokens=40, sampler=Sampling(), seed=1, stop_tokens=(new[at],)
        )
        [result] = engine.run([request])
        assert result.tokens == [*prompt, *new[: at + 1]]
        assert result.finish_reason == "stop"
        # what the tree of prefixes remembers of it is right
        again = Request(result.tokens, max_new_tokens=10, sampler=Sampling(), seed=2)
        [more] = engine.run([again])
        check_nothing_left(engine)
    naive = generate_naive(
        model, TOKENIZER, result.tokens, max_new_tokens=10, sampler=Sampling(), seed=2
    )
    assert_equal(more, naive)


def test_trees():
    draft = Draft([5, 6, 7, 8, 9], [-1, -1, 1, 1, 3])
    assert depths(draft) == [1, 1, 2, 2, 3]
    assert not draft.is_chain and chain([1, 2]).is_chain
    assert follow(draft, [6, 0, 8, 0, 9, 0]) == [1, 3, 4]
    assert follow(draft, [4, 0, 0, 0, 0, 0]) == []
    assert trunk(draft).tokens == [5]
    sees = ancestors(draft)
    assert [np.flatnonzero(row).tolist() for row in sees] == [
        [0], [0, 1], [0, 2], [0, 2, 3], [0, 2, 4], [0, 2, 4, 5],
    ]  # fmt: skip


class Drafting:
    """A lane, as far as acceptance looks at it."""

    def __init__(self):
        self.drafted, self.draft_pause = None, 0


def test_drafts_get_as_long_as_they_pay():
    acceptance, lane = Acceptance(8), Drafting()
    assert acceptance.limit(lane, DraftCosts(0.69, 0)) == 1, (
        "0.7 is more than it costs, 0.7 ** 2 less"
    )
    assert acceptance.limit(lane, DraftCosts(0.2, 0)) == 4, "0.7 ** 4 is more, 0.7 ** 5 less"
    assert acceptance.limit(lane, DraftCosts(1e-9, 0)) == 8
    assert acceptance.limit(lane, DraftCosts(1e-9, 2.0)) == 8, "0.7 + 0.7 ** 2 + ... is 2.2"
    assert acceptance.limit(lane, DraftCosts(1e-9, 2.3)) == 0
    for _ in range(4):
        acceptance.note(lane, 4, 4)
    assert acceptance.limit(lane, DraftCosts(0.7, 0)) >= 4
    for _ in range(40):
        acceptance.note(lane, 4, 0)
    lane.draft_pause = 0
    tries = [acceptance.limit(lane, DraftCosts(0.7, 0)) for _ in range(Acceptance.PATIENCE)]
    assert tries == [0] * (Acceptance.PATIENCE - 1) + [1]
    assert acceptance.histogram()["by_length"] == {"4": {"0": 40, "4": 4}}
    fresh = acceptance.limit(Drafting(), DraftCosts(0.7, 0))
    assert fresh == 0, "a new lane begins with what others have shown"


def test_whether_drafts_can_pay_at_all():
    acceptance = Acceptance(8)
    assert acceptance.may_pay(DraftCosts(0.5, 0.5))
    assert not acceptance.may_pay(DraftCosts(0.96, 0)), (
        "the next token, at best, is right 0.95 times"
    )
    assert not acceptance.may_pay(DraftCosts(0.5, 4.0))


def test_what_drafts_cost():
    model, small = Transformer(260, 64, 4, 2), MODELS["plain"]()
    for drafter in (PromptLookup(), DraftModel(small, 3)):
        costs = [draft_costs(model, drafter, n) for n in (1, 8, 64)]
        assert costs == sorted(costs), "the more lanes share a pass the less a draft saves"
    lookup, draft = (
        draft_costs(model, each, 8).token for each in (PromptLookup(), DraftModel(small, 3))
    )
    assert draft > lookup + model_seconds(small, 8) / (1e-3 + model_seconds(model, 8))
    torch.manual_seed(0)
    base = {
        "class_path": "toolmem.models.Transformer",
        "init_args": {"dim": 16, "n_layers": 2, "n_heads": 2},
    }
    medusa = Medusa(260, base, tree=[[0], [1], [2], [0, 0]])
    tree, chain_ = DraftHeads(medusa), DraftHeads(medusa, tree=False)
    assert tree.width == 2.0 and chain_.width == 1.0
    assert draft_costs(model, tree, 1).token > draft_costs(model, chain_, 1).token


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ToolmemError, match="invariant"):
        Engine(random_model(0), TOKENIZER, drafter=PromptLookup(), invariant=True)
    with pytest.raises(ToolmemError, match="min_ngram"):
        PromptLookup(min_ngram=0)
    with pytest.raises(ToolmemError, match="prefix"):
        DraftModel(random_model(0, attention_mask="prefix"))
