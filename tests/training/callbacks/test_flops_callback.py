import time
from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from training_toys import VOCAB, Stream, ToyData, loader, make_module, make_trainer, tiny

from toolmem.data.batch import Batch
from toolmem.models import Hybrid, Mamba2, Transformer
from toolmem.models.model_flops import ModelFlops
from toolmem.training import Flops, Muon
from toolmem.training.callbacks import flops as callback
from toolmem.training.callbacks.flops import step_flops
from toolmem.training.flops import matmul_rate, optimizer_flops

# The toy model: dim 8, 2 layers, 2 heads of 4, swiglu of 32, 11 tokens. A layer's matrices
# 2 x 8 (24 + 8 + 3 x 32) = 2,048 a token, its attention 2 heads x 4 x 4 = 32 a pair, the head 176.
TOKEN, PAIR, HEAD = 2 * 2048, 2 * 32, 176
SHAPES = [(4, 9), (3, 6), (2, 9), (4, 5)]


def ragged(lengths, width=None, seed=0):
    """Rows of these lengths, padded; some of their tokens bear loss."""
    generator = torch.Generator().manual_seed(seed)
    width = width or max(lengths)
    tokens = torch.randint(VOCAB, (len(lengths), width + 1), generator=generator)
    real = torch.arange(width) < torch.tensor(lengths)[:, None]
    chosen = (torch.rand(real.shape, generator=generator) < 0.5) & real
    return Batch(
        tokens[:, :-1],
        tokens[:, 1:],
        chosen,
        n_tokens=sum(lengths),
        lengths=torch.tensor(lengths),
        state={"batch": seed + 1},
    )


def ragged_stream(index):
    rows, width = SHAPES[index % len(SHAPES)]
    generator = torch.Generator().manual_seed(index)
    lengths = torch.randint(1, width + 1, (rows,), generator=generator).tolist()
    lengths[index % rows] = width
    return ragged(lengths, seed=index)


def paper(batch):
    """A training step's exact FLOPs, row by row and pair by pair."""
    flops = batch.n_tokens * TOKEN + int(batch.loss_mask.sum()) * HEAD
    for length in batch.lengths.tolist():
        flops += PAIR * sum(1 for query in range(length) for key in range(query + 1))
    return 3 * flops


def fit(folder, max_steps=8, make=ragged_stream, model=None, options=None, **changes):
    counter = Flops(**({"utilisation": False} | (options or {})))
    trainer = make_trainer(
        folder, max_steps, callbacks=[counter], log_every_n_steps=4, limit_val_batches=0, **changes
    )
    module, reports = make_module(model), []
    report = module.report
    module.report = lambda m: (reports.append((trainer.global_step, dict(m))), report(m))
    data = ToyData(make)
    return counter, trainer, module, data, reports


def logged(reports):
    return [(step, m) for step, m in reports if "flops/total" in m]


def test_the_total_of_ragged_batches_is_exact(tmp_path):
    _, trainer, module, data, reports = fit(tmp_path, 10)
    trainer.fit(module, data)
    batches = [ragged_stream(index) for index in range(10)]
    found = logged(reports)
    assert [step for step, _ in found] == [4, 8, 10]
    for step, metrics in found:
        assert metrics["flops/total"] == sum(paper(batch) for batch in batches[:step])
    since = batches[4:8]
    expected = sum(paper(batch) for batch in since) / sum(batch.n_tokens for batch in since)
    assert found[1][1]["flops/per_token"] == pytest.approx(expected, rel=1e-12)
    of_step = optimizer_flops(trainer.optimizers[0]).total
    assert found[-1][1]["flops/optimizer"] == 10 * of_step > 0
    # Executed: padding too, whole squares, and in the backward pass the scores once more.
    executed = 0
    for batch in batches:
        rows, width = batch.tokens.shape
        executed += 3 * (rows * width * TOKEN + int(batch.loss_mask.sum()) * HEAD)
        executed += rows * width * width * PAIR * 7 // 2
    assert found[-1][1]["flops/executed_total"] == executed
    assert not any("utilisation" in name for _, metrics in found for name in metrics)


def test_counting_is_done_once_a_shape(tmp_path, monkeypatch):
    """A hundred steps cost a few passes: the head's, and those by which a rule is found."""
    passes = Counter()
    real = ModelFlops._pass

    def counted(self, call):
        passes["n"] += 1
        return real(self, call)

    monkeypatch.setattr(ModelFlops, "_pass", counted)
    _, trainer, module, data, _ = fit(tmp_path, 100)
    trainer.fit(module, data)
    assert passes["n"] <= 6


def test_it_goes_on_after_a_resume(tmp_path):
    _, trainer, module, data, reports = fit(tmp_path, 6, accumulate_grad_batches=2)
    trainer.fit(module, data)
    trainer.save_checkpoint(tmp_path / "six.ckpt")
    _, trainer, module, data, reports = fit(tmp_path, 9, accumulate_grad_batches=2)
    trainer.fit(module, data, ckpt_path=str(tmp_path / "six.ckpt"))
    _, whole, other, rest, straight = fit(tmp_path, 9, accumulate_grad_batches=2)
    whole.fit(other, rest)
    assert logged(reports)[-1][1] == logged(straight)[-1][1] | {
        "flops/per_token": logged(reports)[-1][1]["flops/per_token"]
    }
    assert logged(reports)[-1][1]["flops/total"] == sum(paper(ragged_stream(i)) for i in range(18))


class Clock:
    """A second a call."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1.0
        return self.now


def test_utilisation_is_the_rate_reached_over_the_rate_measured(tmp_path, monkeypatch):
    import lightning.pytorch as pl

    class Second(pl.Callback):
        def on_train_batch_start(self, *args):
            clock.now += 1

    clock = Clock()
    monkeypatch.setattr(Clock, "__call__", lambda self: self.now)
    monkeypatch.setattr(time, "perf_counter", clock)
    monkeypatch.setattr(callback, "matmul_rate", lambda device, dtype: 1e6)
    _, trainer, module, data, reports = fit(tmp_path, 8, options={"utilisation": True})
    trainer.callbacks.insert(0, Second())
    trainer.fit(module, data)
    (_, first), (_, second) = logged(reports)[:2]
    assert first["flops/matmul_rate"] == 1e6 and "flops/matmul_rate" not in second
    exact = sum(paper(ragged_stream(index)) for index in range(4, 8))  # in four seconds
    assert second["flops/utilisation"] == pytest.approx(exact / 4 / 1e6)
    done = sum(second[name] - first[name] for name in ("flops/executed_total", "flops/optimizer"))
    assert second["flops/hardware_utilisation"] == pytest.approx(done / 4 / 1e6)


def test_a_matmul_of_known_length_gives_the_rate(monkeypatch):
    monkeypatch.setattr(time, "perf_counter", Clock())
    assert matmul_rate(torch.device("cpu"), torch.float32) == 2 * 1024**3
    state = torch.get_rng_state()
    monkeypatch.undo()
    assert matmul_rate(torch.device("cpu"), torch.float32, 0.0) > 1e8
    assert torch.equal(torch.get_rng_state(), state)


def test_an_optimizer_costs_what_is_counted_of_its_products():
    model = tiny(dim=8, hidden_dim=12, n_kv_heads=1)
    optimizer = Muon(lr=1e-2).build(model)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    with FlopCounterMode(display=False) as counter:
        optimizer.step()
    found = optimizer_flops(optimizer)
    assert found.matmul == counter.get_total_flops() > 0


def test_adamw_costs_fourteen_a_number():
    parameter = torch.nn.Parameter(torch.zeros(3, 5))
    decayed = torch.optim.AdamW([parameter], weight_decay=0.1)
    assert optimizer_flops(decayed).total == 14 * 15
    assert optimizer_flops(torch.optim.AdamW([parameter], weight_decay=0.0)).total == 13 * 15
    other = optimizer_flops(torch.optim.Rprop([parameter]))
    assert (other.total, other.unknown) == (0, ("Rprop",))


def test_documents_of_a_row_see_themselves_alone():
    """Rows of 5 + 3 and 4 + 2 tokens, the last two padding."""
    documents = torch.tensor([[0] * 5 + [1] * 3, [0] * 4 + [1] * 2 + [-1] * 2])
    batch = replace(ragged([8, 6]), documents=documents.int(), lengths=torch.tensor([5, 3, 4, 2]))
    flops = ModelFlops(tiny())
    assert step_flops(flops, batch)[0] == paper(batch)
    assert step_flops(flops, replace(batch, lengths=None))[0] == paper(batch)


def test_spans_are_seen_both_ways():
    """A span of 4 adds 6 pairs, one of 3 adds 3."""
    spans = torch.full((2, 9), -1)
    spans[0, 1:5], spans[1, 2:5] = 0, 1
    batch = replace(ragged([9, 6]), spans=spans)
    assert step_flops(ModelFlops(tiny()), batch)[0] == paper(batch)  # a causal model looks at none
    model = tiny(attention_mask="prefix")
    assert step_flops(ModelFlops(model), batch)[0] == paper(batch) + 3 * 9 * PAIR


@pytest.mark.parametrize("form", ["sequential", "parallel"])
@pytest.mark.parametrize("packed", [False, True])
def test_modules_that_predict_more_tokens(form, packed):
    """Module k runs on all but a row's last k tokens, a block and in sequence a join of 2 x 16 x 8 = 256
    a token; the head is asked where the token k places on bears loss.
    """
    lengths = [9, 6, 2, 1]
    batch = ragged(lengths)
    if packed:  # each row is one document: the same, told otherwise
        documents = torch.where(torch.arange(9) < batch.lengths[:, None], 0, -1).int()
        batch = replace(batch, documents=documents)
    model = tiny(multi_token=2, multi_token_form=form)
    expected = paper(batch)
    for ahead in (1, 2):
        for left in (max(0, length - ahead) for length in lengths):
            join = 256 if form == "sequential" else 0
            expected += 3 * (left * (TOKEN // 2 + join) + PAIR // 2 * left * (left + 1) // 2)
        bears = batch.loss_mask[:, ahead:].clone()
        if form == "parallel":
            for between in range(ahead):
                bears &= batch.loss_mask[:, between : between + 9 - ahead]
        expected += 3 * HEAD * int(bears.sum())
    assert step_flops(ModelFlops(model), batch)[0] == expected


def test_a_ragged_batch_costs_what_its_rows_cost_apart():
    """Whatever the architecture, padding costs nothing."""
    sizes = {"vocab_size": VOCAB, "dim": 8, "max_seq_len": 16}
    mixers = {"attention": {"n_heads": 2, "window": 3}, "gated_delta": {"n_heads": 2}}
    pattern = ["attention", "gated_delta", "rglru", "lstm", "mamba1"]
    for model in (
        Hybrid(**sizes, n_layers=5, pattern=pattern, mixers=mixers, feed_forward="moe",
               feed_forwards={"moe": {"n_experts": 4, "hidden_dim": 8, "capacity_factor": 1.0}}),
        Mamba2(**sizes, n_layers=2, state_dim=4, head_dim=4, chunk_size=4),
        Transformer(**sizes, n_layers=2, n_heads=2, attention="mla"),
    ):  # fmt: skip
        flops, lengths = ModelFlops(model), [11, 7, 2, 5]
        batch = ragged(lengths)
        apart = 0
        for row, length in enumerate(lengths):
            one = Batch(
                batch.tokens[row : row + 1, :length],
                batch.targets[row : row + 1, :length],
                batch.loss_mask[row : row + 1, :length],
                n_tokens=length,
            )
            apart += step_flops(ModelFlops(model, run=True), one)[0]
        assert step_flops(flops, batch)[0] == apart
        assert not flops.unknown


def test_what_has_no_formula_is_named_in_a_warning(tmp_path):
    class Fourier(torch.nn.Module):
        def forward(self, x, context):
            return torch.fft.fft(x).real

    model = tiny()
    model.blocks[0].feed_forward = Fourier()
    _, trainer, module, data, _ = fit(tmp_path, 4, model=model)
    with pytest.warns(UserWarning, match=r"no formula for .*aten::_fft_r2c"):
        trainer.fit(module, data)


@pytest.mark.slow
def test_totals_are_over_all_ranks(tmp_path):
    """Two ranks train on different batches of different shapes."""
    import lightning.pytorch as pl

    class Ranks(ToyData):
        def train_dataloader(self):
            rank = self.trainer.global_rank
            return loader(Stream(0, None, lambda step: ragged_stream(2 * step + rank)))

    class Written(pl.Callback):
        def on_fit_end(self, trainer, pl_module):
            (tmp_path / f"{trainer.global_rank}").write_text(str(counter.totals["exact"]))

    counter, trainer, module, _, _ = fit(
        tmp_path, 4, devices=2, strategy="ddp_fork", use_distributed_sampler=False
    )
    trainer.callbacks.append(Written())
    trainer.fit(module, Ranks())
    expected = sum(paper(ragged_stream(2 * step + rank)) for step in range(4) for rank in (0, 1))
    for rank in (0, 1):
        assert int((tmp_path / f"{rank}").read_text()) == expected
