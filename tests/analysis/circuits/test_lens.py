"""The logit lens: the answer is there after the layer that finds it, and not before."""

from __future__ import annotations

import pytest
import torch
from circuits_toys import SAYS, VOCAB, induction, repeats

from toolmem.analysis.circuits import lens_readings, logit_lens
from toolmem.models import RNN, Transformer


def test_the_answer_is_there_after_the_second_layer_alone():
    tokens = repeats()
    readings = lens_readings(induction(), tokens)
    assert list(readings) == ["embedding", "blocks.0.output", "blocks.1.output"]
    again = slice(10, 19)  # the second telling, whose next tokens can be known
    for name in ("embedding", "blocks.0.output"):
        assert readings[name].log_probs[:, again].exp().max() < 2 / VOCAB
    assert readings["blocks.1.output"].log_probs[:, again].exp().min() > 0.99
    assert (readings["blocks.1.output"].ranks[:, again] == 0).all()
    assert (readings["blocks.0.output"].ranks[:, again] > 0).float().mean() > 0.5
    # in the first telling nobody can know what comes
    assert readings["blocks.1.output"].log_probs[:, :9].exp().mean() < 0.1


def test_the_lens_reads_by_the_last_norm_and_the_head():
    model, tokens = induction(), repeats(2)
    lens = logit_lens(model, tokens)
    torch.testing.assert_close(lens["blocks.1.output"], model(tokens), rtol=0, atol=1e-12)
    with torch.no_grad():
        x = model.embedding.weight[tokens] + model.position_embedding.weight[:20]
        model.head.weight[:, SAYS].zero_()
        y = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * model.norm.weight
    torch.testing.assert_close(logit_lens(model, tokens)["embedding"], y @ model.head.weight.T)


@pytest.mark.parametrize("capped", [False, True])
def test_log_probabilities_and_ranks(capped):
    torch.manual_seed(0)
    if capped:
        model = Transformer(11, 8, 2, 2, max_seq_len=16, logit_softcap=3.0, tie_embeddings=True)
    else:
        model = RNN(11, 8, 2, cell="mingru")
    model = model.double().eval()
    tokens, targets = torch.randint(11, (2, 6)), torch.randint(11, (2, 6))
    readings = lens_readings(model, tokens, targets)["blocks.1.output"]
    logits = model(tokens)
    for row in range(2):
        for at in range(6):
            probs = logits[row, at].softmax(-1)
            right = probs[targets[row, at]]
            assert readings.log_probs[row, at].exp().item() == pytest.approx(right.item(), rel=1e-5)
            assert readings.ranks[row, at] == (probs > right).sum()
