import copy
import math
import os
import socket
import sys
from pathlib import Path

import lightning.pytorch as pl
import pyarrow.parquet as pq
import pytest
import torch
import torch.nn.functional as F
from training_toys import SEQ, VOCAB, ToyData, make_batch, make_module, make_trainer, tiny

from toolmem.data.batch import Batch
from toolmem.errors import ToolmemError
from toolmem.models import MoETransformer
from toolmem.training import AdamW, Constant, CSVLogger, NormProbe
from toolmem.training.callbacks.norm_activations import DEAD_BELOW, measure_activations
from toolmem.training.callbacks.norm_files import NormFile
from toolmem.training.callbacks.norm_measures import Parameters, Row, layer_of, sum_of_squares
from toolmem.training.loggers import read_rows

sys.path.insert(0, str(Path(__file__).parents[2] / "models"))
from test_architectures import ARCHITECTURES


def fit(folder, probe, max_steps=4, model=None, data=None, callbacks=(), trainer=None, **changes):
    torch.manual_seed(0)
    module = make_module(model, **({"optimizer": AdamW(lr=1e-2), "schedule": Constant()} | changes))
    callbacks = [*callbacks, *([] if probe is None else [probe])]
    options = {"limit_val_batches": 0, "callbacks": callbacks} | (trainer or {})
    runner = make_trainer(folder, max_steps, **options)
    runner.fit(module, data or ToyData(), ckpt_path=options.pop("ckpt_path", None))
    return module


def read(folder):
    rows = pq.read_table(Path(folder) / "norms.parquet").to_pylist()
    found = {(r["step"], r["measure"], r["layer"], r["kind"]): r["value"] for r in rows}
    assert len(found) == len(rows)
    return found


def of_layer(found, step, measure):
    return {k[2]: v for k, v in found.items() if k[:2] == (step, measure) and k[2] != "all"}


class Weights(pl.Callback):
    """The weights before and after each step."""

    def __init__(self):
        self.seen = []

    def on_train_start(self, trainer, pl_module):
        self.seen.append(copy.deepcopy(pl_module.model).double())

    def on_train_batch_end(self, trainer, pl_module, *rest):
        if trainer.global_step == len(self.seen):
            self.seen.append(copy.deepcopy(pl_module.model).double())


def mean_loss(model, batches):
    total = count = 0
    for batch in batches:
        logits = model(batch.tokens)[batch.loss_mask]
        total = total + F.cross_entropy(logits, batch.targets[batch.loss_mask], reduction="sum")
        count += int(batch.loss_mask.sum())
    return total / count


@pytest.mark.parametrize("micro_batches", [1, 3])
def test_parameters_by_hand(tmp_path, micro_batches):
    weights = Weights()
    options = {"accumulate_grad_batches": micro_batches, "gradient_clip_val": 1e-3}
    fit(tmp_path, NormProbe(2), model=tiny(qk_norm=True), callbacks=[weights], trainer=options)
    found = read(tmp_path)
    assert {key[0] for key in found} == {2, 4}
    before, after = weights.seen[3], weights.seen[4]
    batches = [make_batch(3 * micro_batches + i) for i in range(micro_batches)]
    mean_loss(before, batches).backward()
    sums = {}
    old, new = dict(before.named_parameters()), dict(after.named_parameters())
    for name, parameter in new.items():
        in_block = name.split(".")[:3] if name.startswith("blocks") else name.split(".")[:1]
        norms = {"norm", "mixer_norm", "feed_forward_norm", "q_norm", "k_norm"}
        kind = {"mixer": "attention"}.get(in_block[-1], in_block[-1])
        kind = "norm" if norms & set(name.split(".")) else kind
        squares = torch.stack(
            [
                parameter.square().sum(),
                old[name].grad.square().sum(),
                (parameter - old[name]).square().sum(),
                old[name].square().sum(),
            ]
        ).detach()
        for place in (("all", "all"), ("all", kind), (".".join(in_block), None)):
            sums[place] = sums.get(place, 0) + squares
    assert len(sums) == 1 + 5 + 3 + 2 * 4  # all; kinds; embedding, norm, head; each block's parts
    got = {(k[2], k[3] if k[2] == "all" else None, k[1]): v for k, v in found.items() if k[0] == 4}
    for (layer, kind), (weight, gradient, change, base) in sums.items():
        assert got[layer, kind, "weight"] == pytest.approx(math.sqrt(weight), rel=1e-6)
        assert got[layer, kind, "gradient"] == pytest.approx(math.sqrt(gradient), rel=1e-4)
        ratio = math.sqrt(change / base)
        assert got[layer, kind, "update_ratio"] == pytest.approx(ratio, rel=1e-5)
    kinds = {k[3] for k in found if k[1] == "weight" and k[2] != "all"}
    assert kinds == {"embedding", "attention", "feed_forward", "norm", "head"}


def test_a_long_sum_is_exact():
    x = torch.randn(1_000_003, generator=torch.Generator().manual_seed(0)) + 3
    exact = x.double().square().sum()
    assert float(sum_of_squares(x)) == pytest.approx(float(exact), rel=1e-7)
    assert float(sum_of_squares(x.bfloat16())) == pytest.approx(
        float(x.bfloat16().double().square().sum()), rel=1e-7
    )
    assert float(sum_of_squares(torch.empty(0))) == 0


def plain_activations(model, batch, real):
    """Every layer's output, every unit, every score, by the model's parts and loops."""
    outputs, units, entropy, scores = {}, {}, {}, {}
    context = model.context(batch.tokens, batch.documents, None)
    x = outputs["embedding"] = model.embed(batch.tokens)
    for index, block in enumerate(model.blocks):
        name = f"blocks.{index}"
        mixed = block.mixer_norm(x)
        q, k, _ = block.mixer.project(mixed, context)
        entropies, largest = [], []
        for b, s in real.nonzero().tolist():
            ids = batch.documents
            keys = [
                j
                for j in range(s + 1)
                if (ids is None or ids[b, j] == ids[b, s])
                and (not block.mixer.window or s - j < block.mixer.window)
            ]
            for h in range(q.shape[2]):
                share = q.shape[2] // k.shape[2]
                row = [float(q[b, s, h] @ k[b, j, h // share]) * block.mixer.scale for j in keys]
                whole = sum(math.exp(value) for value in row)
                weights = [math.exp(value) / whole for value in row]
                entropies.append(-sum(w * math.log(w) for w in weights))
                largest.append(max(row))
        entropy[f"{name}.mixer"] = sum(entropies) / len(entropies)
        scores[f"{name}.mixer"] = max(largest)
        outputs[f"{name}.mixer"] = y = block.mixer(mixed, context)
        x = x + y
        forward = block.feed_forward
        inside = F.relu(forward.up(block.feed_forward_norm(x))).square()
        units[f"{name}.feed_forward"] = inside
        outputs[f"{name}.feed_forward"] = y = forward.down(inside)
        x = outputs[name] = x + y
    outputs["norm"] = model.norm(x)
    outputs["head"] = model.head(outputs["norm"])
    return outputs, units, entropy, scores


def some_batch(packed):
    batch = make_batch(3)
    lengths = torch.tensor([SEQ, 4, 6, 1])
    real = torch.arange(SEQ) < lengths[:, None]
    documents = None
    if packed:
        documents = torch.where(real, (torch.arange(SEQ) >= 3).int(), -1)
        lengths = torch.tensor([3, 6, 3, 1, 3, 3, 1])
    mask = batch.loss_mask & real
    return Batch(batch.tokens, batch.targets, mask, documents, None, 20, lengths), real


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("options", [{}, {"window": 3}, {"n_kv_heads": 1}])
@torch.no_grad()
def test_activations_by_hand(packed, options):
    model = tiny(feed_forward="relu2", **options).double().eval()
    for block in model.blocks:
        block.feed_forward.up.weight[:5] = 0
        block.feed_forward.up.weight[5] *= 1e-3  # alive where the next norm gives it nothing
    batch, real = some_batch(packed)
    outputs, units, entropy, scores = plain_activations(model, batch, real)
    rows = measure_activations(model, batch, 99).rows(Parameters(model).layer_kinds)
    got = {(row.measure, row.layer): row for row in rows if row.layer != "all"}
    kinds = {"embedding", "norm", "head", "attention", "feed_forward", "stream"}
    assert {row.kind for row in got.values()} == kinds
    assert len(got) == 2 * (3 + 2 * 3) + 3 * 2
    for layer, x in outputs.items():
        chosen = x[batch.loss_mask if layer == "head" else real]
        rms = float(chosen.square().mean().sqrt())
        assert got["activation_rms", layer].value == pytest.approx(rms, rel=1e-12)
        assert got["activation_max", layer].value == float(chosen.abs().max())
    for layer, x in units.items():
        rms = x[real].square().mean().sqrt()
        dead = (x[real].abs().amax(0) <= DEAD_BELOW * rms).double().mean()
        assert 5 / x.shape[-1] <= float(dead) < 1
        assert got["dead_units", layer].value == float(dead)
    for layer in entropy:
        value = got["attention_entropy", layer].value
        assert value == pytest.approx(entropy[layer], rel=1e-9)
        value = got["attention_logit_max", layer].value
        assert value == pytest.approx(scores[layer], rel=1e-9)
    total = next(r for r in rows if r[:3] == ("all", "all", "attention_entropy")).value
    assert total == pytest.approx(sum(entropy.values()) / len(entropy))


def test_only_the_first_rows_are_measured():
    model = tiny().eval()
    batch, _ = some_batch(packed=False)
    few = Batch(*(x[:2] for x in (batch.tokens, batch.targets, batch.loss_mask)))
    few.lengths = batch.lengths[:2]
    with torch.no_grad():
        some, alone = (measure_activations(model, b, n) for b, n in ((batch, 2), (few, 9)))
    assert some.rows({}) == alone.rows({})


def test_dead_units_of_experts_are_each_experts_own():
    torch.manual_seed(0)
    options = {"n_experts": 4, "top_k": 2, "hidden_dim": 8, "feed_forward": "relu2"}
    model = MoETransformer(VOCAB, 8, 1, 2, max_seq_len=SEQ, **options).eval()
    experts = model.blocks[0].feed_forward
    seen = {}
    experts.router.register_forward_hook(lambda m, a, y: seen.update(x=a[0], chosen=y.experts))
    with torch.no_grad():
        experts.up.weight[1, :4] = 0
        experts.router.bias[3] = -99  # never asked
        batch = make_batch(0)
        rows = measure_activations(model, batch, 9).rows({})
        inside = F.relu(torch.einsum("ni,ehi->enh", seen["x"], experts.up.weight)).square()
    asked = F.one_hot(seen["chosen"], 4).any(1)
    assert not asked[:, 3].any() and asked[:, :3].any(0).all()
    given = torch.cat([inside[e, asked[:, e]] for e in range(4)])
    limit = DEAD_BELOW * given.double().square().mean().sqrt()
    dead = sum(int((inside[e, asked[:, e]].amax(0) <= limit).sum()) for e in range(3))
    assert dead >= 4
    found = {(r.layer, r.measure): r.value for r in rows}
    assert found["blocks.0.feed_forward", "dead_units"] == dead / (3 * 8)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_every_architecture_and_nothing_changes(tmp_path, name):
    def run(folder, probe):
        torch.manual_seed(0)
        cls, options = ARCHITECTURES[name]
        options = {"n_layers": 2, "max_seq_len": SEQ, "dropout": 0.1} | options
        module = fit(tmp_path / folder, probe, 3, cls(VOCAB, 16, **options))
        return module, torch.get_rng_state()

    (probed, state), (plain, untouched) = run("a", NormProbe(1)), run("b", None)
    for (key, a), b in zip(probed.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), key
    assert torch.equal(state, untouched)
    model = probed.model
    assert all(module.training for module in model.modules())
    for module in model.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks
        assert "attend" not in vars(module)
    found = read(tmp_path / "a")
    assert {key[0] for key in found} == {1, 2, 3}
    assert all(math.isfinite(value) for value in found.values())
    branches = {f"blocks.{i}.mixer" for i in range(len(model.blocks))}
    for measure in ("weight", "gradient", "activation_rms", "activation_max"):
        assert branches | {"embedding", "head", "norm"} <= set(of_layer(found, 3, measure))
    attends = {layer_of(n) for n, m in model.named_modules() if hasattr(m, "attend")}
    assert set(of_layer(found, 3, "attention_entropy")) == attends
    downs = {layer_of(n) for n, _ in model.named_modules() if n.endswith(".down")}
    assert set(of_layer(found, 3, "dead_units")) == downs
    kinds = {k[3] for k in found if k[1:3] == ("weight", "all")} - {"all"}
    assert kinds == {kind for kind, count in model.parameter_counts().items() if count}


def test_off_is_off(tmp_path, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError

    module = "toolmem.training.callbacks.norms."
    for name in ("sums_of_squares", "measure_activations", "Parameters"):
        monkeypatch.setattr(module + name, never)
    fit(tmp_path, NormProbe())
    assert not list(tmp_path.iterdir())
    for probe in (NormProbe(10), NormProbe(2)):
        with pytest.raises(AssertionError):
            fit(tmp_path, probe)
    monkeypatch.undo()
    probe = NormProbe(3, rows=0)
    fit(tmp_path, probe, 3)
    assert probe._before is None  # the weights' copy is let go
    measures = {key[1] for key in read(tmp_path)}
    assert measures == {"weight", "gradient", "update_ratio"}


def test_names_in_the_log(tmp_path):
    logger = {"logger": CSVLogger(tmp_path), "log_every_n_steps": 100}
    module = fit(tmp_path, NormProbe(2, per_layer=True), trainer=logger)
    found, rows = read(tmp_path), read_rows(tmp_path / "metrics.csv")
    assert [row["step"] for row in rows] == ["2", "4"]
    for (step, measure, layer, kind), value in found.items():
        name = f"norms/{measure}"
        if layer != "all":
            name += f"/{layer}"
        elif kind != "all":
            name += f"/kind/{kind}"
        assert float(rows[step // 2 - 1][name]) == pytest.approx(value, rel=1e-6)
    assert len([name for name in rows[0] if name.startswith("norms/")]) == len(found) // 2
    assert "norms/weight/blocks.0.mixer" in rows[0] and "norms/weight/kind/norm" in rows[0]
    totals = fit(tmp_path / "b", NormProbe(2)).reported
    assert set(totals) < set(module.reported)
    assert not [name for name in totals if "blocks" in name]


def test_resumed_is_what_was_not_stopped(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(whole, NormProbe(2), 8)

    class Crash(pl.Callback):
        def on_train_batch_end(self, trainer, *rest):
            if trainer.global_step == 5:
                trainer.save_checkpoint(parts / "last.ckpt")
            if trainer.global_step == 7:
                raise KeyError

    with pytest.raises(KeyError):
        fit(parts, NormProbe(2), 8, callbacks=[Crash()])
    names = [path.name for path in NormFile(parts).parts()]
    assert names == ["step_2.parquet", "step_4.parquet", "step_6.parquet"]
    assert not (parts / "norms.parquet").exists()
    left = {"step": 6}
    assert left["step"] in NormFile(parts).read()["step"].to_pylist()
    torch.manual_seed(0)
    module = make_module(optimizer=AdamW(lr=1e-2), schedule=Constant())
    seen = []

    class Look(pl.Callback):
        def on_train_batch_start(self, trainer, *rest):
            seen.append(set(NormFile(parts).read()["step"].to_pylist()))

    options = {"limit_val_batches": 0, "callbacks": [NormProbe(2), Look()]}
    make_trainer(parts, 8, **options).fit(module, ToyData(), ckpt_path=str(parts / "last.ckpt"))
    assert seen[0] == {2, 4}
    assert read(parts) == read(whole)
    assert not (parts / "norms").exists()


def test_parts_are_merged_once(tmp_path, monkeypatch):
    monkeypatch.setattr("toolmem.training.callbacks.norm_files.MOST_PARTS", 3)
    file = NormFile(tmp_path)
    for step in range(1, 6):
        file.add(step, [Row("all", "all", "weight", float(step))])
    assert len(file.parts()) == 2
    # killed after the file was merged, before its part was gone
    file.add(2, [Row("all", "all", "weight", 2.0)])
    assert file.read()["step"].to_pylist() == [1, 2, 3, 4, 5]
    file.merge()
    assert file.read()["value"].to_pylist() == [1.0, 2.0, 3.0, 4.0, 5.0]
    file.rewind(3)
    assert file.read()["step"].to_pylist() == [1, 2, 3]
    file.rewind(0)
    assert file.read() is None and not list(tmp_path.iterdir())
    (tmp_path / "norms.parquet").write_text("no")
    with pytest.raises(ToolmemError, match="no file of norms"):
        file.read()


def test_numbers_below_0_are_refused():
    for options in ({"every_n_steps": -1}, {"rows": -1}):
        with pytest.raises(ToolmemError, match="must be 0"):
            NormProbe(**options)


def rank_batch(index, ranks=(0, 1)):
    """The rows that ranks have of one global batch; ranks bear loss at different counts of tokens."""
    parts = [make_batch(10 * index + rank, mask=0.2 + 0.5 * rank) for rank in ranks]
    fields = (torch.cat([getattr(p, n) for p in parts]) for n in ("tokens", "targets", "loss_mask"))
    return Batch(*fields, n_tokens=36 * len(ranks), state={"batch": index + 1})


def of_rank(index):
    return rank_batch(index, (int(os.environ["LOCAL_RANK"]),))


def _rank(rank, port, folder):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "NODE_RANK": "0"}
    torch.set_num_threads(1)
    model = tiny(feed_forward="relu2")
    options = {"devices": 2, "strategy": "ddp"}
    module = fit(folder, NormProbe(2, rows=4), 4, model, ToyData(of_rank), trainer=options)
    torch.save(module.reported, f"{folder}/reported_{rank}.pt")


@pytest.mark.slow
def test_two_ranks_are_one_large_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    both, one = tmp_path / "both", tmp_path / "one"
    both.mkdir()
    torch.multiprocessing.spawn(_rank, (port, str(both)), nprocs=2)
    fit(one, NormProbe(2, rows=8), 4, tiny(feed_forward="relu2"), ToyData(rank_batch))
    got, expected = read(both), read(one)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=1e-4), key
    first, second = (torch.load(both / f"reported_{rank}.pt") for rank in range(2))
    names = {name for name in first if name.startswith("norms/")}
    assert names and all(first[name] == second[name] for name in names)


@pytest.mark.slow
def test_a_compiled_model_gives_the_same(tmp_path):
    compiled, plain = tmp_path / "compiled", tmp_path / "plain"
    fit(compiled, NormProbe(2), compile=True)
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    assert graphs
    fit(plain, NormProbe(2))
    got, expected = read(compiled), read(plain)
    assert got.keys() == expected.keys()
    for key, value in expected.items():
        assert got[key] == pytest.approx(value, rel=2e-3), key


@pytest.mark.slow
def test_probing_compiles_nothing_again(tmp_path):
    def graphs(folder, probe):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        fit(folder, probe, compile=True)
        return torch._dynamo.utils.counters["stats"]["unique_graphs"]

    assert graphs(tmp_path / "a", NormProbe(1)) == graphs(tmp_path / "b", None) > 0
