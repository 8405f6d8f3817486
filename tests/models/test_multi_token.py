"""Multi-token prediction against its formula, and what it must not see."""

import pytest
import torch
import torch.nn.functional as F

from toolmem.errors import ToolmemError
from toolmem.models import Transformer
from toolmem.models.context import Extras

FORMS = ("sequential", "parallel")


def make(form="sequential", n=2, **options):
    torch.manual_seed(0)
    keys = {"n_heads": 2, "max_seq_len": 32, "multi_token": n, "multi_token_form": form} | options
    model = Transformer(20, 16, 2, **keys)
    for parameter in model.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.eval()


def rows(batch=2, seq=11, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randint(20, (batch, seq + 1), generator=generator)
    mask = torch.rand((batch, seq), generator=generator) < 0.6
    return x[:, :-1], x[:, 1:], mask


def norm(x, module):
    return x / (x.square().mean(-1, keepdim=True) + module.eps).sqrt() * module.weight


def block_forward(block, x, base):
    """A Llama block on one row, written plainly."""
    n, width = x.shape
    attention = block.mixer
    h, d = attention.n_heads, attention.head_dim
    qkv = (norm(x, block.mixer_norm) @ attention.qkv.weight.T).view(n, 3 * h, d)
    half = torch.arange(d // 2, dtype=x.dtype)
    angle = torch.arange(n, dtype=x.dtype)[:, None, None] * base ** (-2 * half / d)

    def turn(y):
        a, b = y[..., : d // 2], y[..., d // 2 :]
        return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), -1)

    q, k, v = turn(qkv[:, :h]), turn(qkv[:, h : 2 * h]), qkv[:, 2 * h :]
    scores = torch.einsum("ihd,jhd->hij", q, k) / d**0.5
    scores = scores.masked_fill(torch.ones(n, n).triu(1).bool(), float("-inf"))
    mixed = torch.einsum("hij,jhd->ihd", scores.softmax(-1), v).reshape(n, width)
    x = x + mixed @ attention.out.weight.T
    gate, value = (norm(x, block.feed_forward_norm) @ block.feed_forward.up.weight.T).chunk(2, -1)
    return x + (F.silu(gate) * value) @ block.feed_forward.down.weight.T


def plain_loss(model, form, row, targets, mask, n):
    """The papers' sums, one row, (nats summed over each module's tokens)."""
    extra = model.multi_token
    states = model.hidden(row[None])[0]
    sums = []
    for k in range(1, n + 1):
        length = len(row) - k
        x = states[:length]
        if form == "sequential":
            ahead = norm(model.embedding.weight[row[k:]], extra.token_norms[k - 1])
            joined = torch.cat((norm(x, extra.state_norms[k - 1]), ahead), -1)
            x = states = block_forward(
                extra.blocks[k - 1], joined @ extra.joins[k - 1].weight.T, 10_000.0
            )
        else:
            x = block_forward(extra.blocks[k - 1], x, 10_000.0)
        log_probs = (norm(x, extra.norms[k - 1]) @ model.head.weight.T).log_softmax(-1)
        total = torch.zeros((), dtype=x.dtype)
        for i in range(length):
            own = all(mask[i : i + k]) or form == "sequential"
            if mask[i + k] and own:
                total = total - log_probs[i, targets[i + k]]
        sums.append(total)
    return sums


@pytest.mark.parametrize("form", FORMS)
def test_loss_in_plain_float64(form):
    model = make(form, n=3).double()
    d = 8
    angles = torch.arange(32.0).double()[:, None] * 10_000.0 ** (
        -torch.arange(0, d, 2).double() / d
    )
    cos, sin = angles.cos(), angles.sin()
    model.rotary_cos = torch.cat((cos, cos), -1)[:, None]
    model.rotary_sin = torch.cat((-sin, sin), -1)[:, None]
    x, targets, mask = rows()
    extras = Extras()
    states = model.hidden(x)
    model.multi_token.add_losses(model, extras, states, x, targets, mask)
    sums = [plain_loss(model, form, *row, 3) for row in zip(x, targets, mask, strict=True)]
    each = [sum(one) / mask.sum() for one in zip(*sums, strict=True)]
    for k, expected in enumerate(each, start=2):
        torch.testing.assert_close(extras.metrics[f"multi_token/loss_{k}"], expected.detach())
    loss = extras.losses["multi_token/loss"]
    torch.testing.assert_close(loss.double(), 0.3 / 3 * sum(each), rtol=1e-6, atol=0)
    loss.backward()
    assert all(p.grad is not None for p in model.multi_token.parameters())
    assert model.blocks[0].mixer.qkv.weight.grad.abs().max() > 0


@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_packed_documents_lose_what_rows_of_their_own_lose(form):
    model = make(form, conv_width=3)
    x, targets, mask = rows(batch=1, seq=20)
    lengths = [7, 1, 12]
    documents = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))[None]

    def total(*parts, documents=None):
        extras = Extras()
        states = model.hidden(parts[0], documents=documents)
        model.multi_token.add_losses(model, extras, states, *parts, documents)
        return extras.losses["multi_token/loss"] * parts[2].sum()

    packed = total(x, targets, mask, documents=documents)
    parts = [t.split(lengths, dim=1) for t in (x, targets, mask)]
    apart = sum(total(*part) for part in zip(*parts, strict=True))
    torch.testing.assert_close(packed, apart, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("mask", ["causal", "prefix"])
@pytest.mark.parametrize("form", FORMS)
@torch.no_grad()
def test_no_position_sees_the_token_that_it_predicts(form, mask):
    """Change one token: what predicts it, or what comes before it, stays as it was."""
    model = make(form, attention_mask=mask)
    x, _, _ = rows(batch=1)
    spans = torch.tensor([[0] * 4 + [-1] * 7])
    changed = x.clone()
    for place in range(4, 11):  # within a span nothing is predicted
        changed[0, place] = (x[0, place] + 1) % 20
        both = [
            model.multi_token.hidden(model, model.hidden(one, spans=spans), one)
            for one in (x, changed)
        ]
        for k, (before, after) in enumerate(zip(*both, strict=True), start=1):
            last = place - k - 1  # predicts the token at last + k + 1
            if last >= 0:
                torch.testing.assert_close(
                    after[:, : last + 1], before[:, : last + 1], atol=1e-5, rtol=0
                )
            if form == "sequential" and place < x.shape[1]:
                assert not torch.allclose(after[:, last + 1], before[:, last + 1], atol=1e-5)
        changed[0, place] = x[0, place]


def test_the_parallel_form_does_not_guess_what_others_say():
    mask = torch.tensor([[True, True, False, True, True]])
    found = make("parallel").multi_token.bearing(mask, None, 2)
    assert found.tolist() == [[False, False, False]]
    found = make("parallel").multi_token.bearing(mask, None, 1)
    assert found.tolist() == [[True, False, False, True]]
    found = make("sequential").multi_token.bearing(mask, None, 1)
    assert found.tolist() == [[True, False, True, True]]


def test_generation_uses_none_of_it():
    model, without = make(), make(n=0)
    without.load_state_dict(model.state_dict(), strict=False)
    x, _, _ = rows()
    assert torch.equal(model(x), without(x))
    assert model.new_cache(2, 8).size_in_bytes() == without.new_cache(2, 8).size_in_bytes()


def test_parameters_on_paper():
    model = make(n=2, tie_embeddings=True)
    block = 4 * 16 * 16 + 3 * 16 * 64 + 2 * 16
    each = block + 16 + (2 * 16 * 16 + 2 * 16)
    assert model.parameter_counts()["multi_token"] == 2 * each
    assert make("parallel").parameter_counts()["multi_token"] == 2 * (block + 16)
    plain = make(n=0, tie_embeddings=True)
    assert "multi_token" not in plain.parameter_counts()
    assert model.active_parameters() == sum(p.numel() for p in plain.parameters())


def test_short_rows_and_rows_without_loss():
    model = make(n=3)
    for seq in (1, 2, 3):
        x, targets, mask = rows(seq=seq)
        for bears in (mask, torch.zeros_like(mask)):
            extras = Extras()
            model.multi_token.add_losses(model, extras, model.hidden(x), x, targets, bears)
            assert torch.isfinite(extras.losses["multi_token/loss"])
            assert len(extras.metrics) == min(3, seq - 1)


def test_with_latents_shared_values_and_a_pattern():
    for options in ({"attention": "mla"}, {"value_residual": True}, {"window": [3, 0]}):
        model = make(**options)
        x, targets, mask = rows()
        extras = Extras()
        model.multi_token.add_losses(model, extras, model.hidden(x), x, targets, mask)
        extras.losses["multi_token/loss"].backward()
        assert all(p.grad is not None for p in model.multi_token.parameters())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"form": "tree"}, ["multi_token_form", "parallel"]),
        ({"multi_token_weight": 0.0}, ["multi_token_weight"]),
        ({"n": -1}, ["multi_token"]),
    ],
)
def test_refusals(change, words):
    with pytest.raises(ToolmemError) as error:
        make(**change)
    assert all(word in str(error.value) for word in words)
