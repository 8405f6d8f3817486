"""Half precision: which steps are left out, and that all ranks leave out the same."""

import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.plugins.precision import MixedPrecision as LightningMixedPrecision
from training_toys import ToyData, make_module, make_trainer

from toolmem.training import Checkpointing
from toolmem.training.mixed_precision import GradScaler, MixedPrecision, precision_plugin


class Overflows(pl.Callback):
    """Makes one gradient infinite in some steps, and keeps weights and scales after each."""

    def __init__(self, at: set[int]) -> None:
        self.at = at
        self.weights: list[torch.Tensor] = []
        self.scales: list[float] = []

    def on_after_backward(self, trainer, module) -> None:
        if trainer.global_step in self.at:
            next(iter(module.parameters())).grad[0, 0] = float("inf")

    def on_train_batch_end(self, trainer, module, *_) -> None:
        self.weights.append(torch.cat([p.detach().flatten() for p in module.parameters()]))
        self.scales.append(trainer.precision_plugin.scaler.get_scale())


def fit(folder, steps, overflows, scale=2.0**10, ckpt_path=None, **changes):
    plugin = MixedPrecision("16-mixed", "cpu", init_scale=scale)
    trainer = make_trainer(
        folder,
        steps,
        plugins=[plugin],
        callbacks=[overflows, Checkpointing(monitor=None, keep_every_n_steps=3)],
        enable_checkpointing=True,
        log_every_n_steps=1,
        **changes,
    )
    module = make_module(fused=False)
    trainer.fit(module, ToyData(), ckpt_path=ckpt_path)
    return module


def test_a_step_with_infinite_gradients_is_left_out_and_counted(tmp_path):
    seen = Overflows(at={2, 4})
    module = fit(tmp_path, 6, seen, gradient_clip_val=1.0)
    changed = [
        not torch.equal(after, before)
        for before, after in zip(seen.weights, seen.weights[1:], strict=False)
    ]
    assert changed == [True, False, True, False, True]
    assert seen.scales == [1024, 1024, 512, 512, 256, 256]
    assert module.reported["precision/skipped_steps"] == (6, 2)
    assert module.reported["precision/loss_scale"] == (6, 256)


def test_a_run_goes_on_with_its_scale_and_count(tmp_path):
    whole, rest = (Overflows(at={1, 4}) for _ in range(2))
    module = fit(tmp_path, 6, whole)
    third = tmp_path / "checkpoints" / "step_3.ckpt"
    resumed = fit(tmp_path, 6, rest, scale=8.0, ckpt_path=str(third))
    assert rest.scales == whole.scales[3:]
    assert resumed.reported["precision/skipped_steps"] == (6, 2)
    for one, other in zip(resumed.parameters(), module.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_state_of_torchs_own_scaler_is_taken_up():
    theirs = torch.amp.GradScaler("cpu", init_scale=32.0)
    theirs.scale(torch.zeros(()))
    ours = GradScaler("cpu")
    ours.load_state_dict(theirs.state_dict())
    ours.scale(torch.zeros(()))
    assert (ours.get_scale(), ours.skipped_steps) == (32.0, 0)


def test_bfloat16_is_lightnings(tmp_path):
    found = []
    for kind in (MixedPrecision, LightningMixedPrecision):
        module = make_module(fused=False)
        make_trainer(tmp_path, 5, plugins=[kind("bf16-mixed", "cpu")]).fit(module, ToyData())
        found.append([p.detach() for p in module.parameters()])
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_which_precisions_are_ours(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert precision_plugin("32-true", "cpu") is None
    assert precision_plugin("bf16-true", "auto") is None
    half = precision_plugin("16-mixed", "cpu")
    assert (half.precision, half.device) == ("16-mixed", "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert precision_plugin("bf16-mixed", "auto").device == "cuda"
    assert precision_plugin("bf16-mixed", "cpu").device == "cpu"


TWO_PROCESSES = """
import sys
sys.path[:0] = {paths!r}
import torch
torch.set_num_threads(1)
from lightning.pytorch.strategies import ModelParallelStrategy
from test_mixed_precision import Overflows
from training_toys import ToyData, make_module, make_trainer, tiny
from toolmem.models.recompute import ActivationCheckpointing
from toolmem.training.mixed_precision import MixedPrecision

def local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor

class Sharded(Overflows):
    # only this rank's piece, and only of the second rank
    def on_after_backward(self, trainer, module):
        if trainer.global_step in self.at and trainer.global_rank == 1:
            local(module.model.blocks[0].feed_forward.down.weight.grad)[0, 0] = float("inf")

    def on_train_batch_end(self, trainer, module, *_):
        self.weights.append(torch.cat([local(p.detach()).flatten() for p in module.parameters()]))
        self.scales.append(trainer.precision_plugin.scaler.get_scale())

found = {{}}
for name, sizes in {{"fsdp": (2, 1), "tensor": (1, 2)}}.items():
    seen = Sharded(at={{1}})
    strategy = ModelParallelStrategy(*sizes, save_distributed_checkpoint=False)
    strategy._process_group_backend = "gloo"
    module = make_module(tiny(), fused=False)
    plugin = MixedPrecision("16-mixed", "cpu", init_scale=1024.0)
    trainer = make_trainer(
        {folder!r}, 4, devices=2, strategy=strategy, plugins=[plugin], callbacks=[seen],
        log_every_n_steps=1, gradient_clip_val=1.0,
    )
    trainer.fit(module, ToyData())
    pairs = zip(seen.weights, seen.weights[1:])
    found[name] = {{
        "scales": seen.scales,
        "changed": [not torch.equal(after, before) for before, after in pairs],
        "skipped": module.reported["precision/skipped_steps"][1],
    }}
for dtype in (None, "bfloat16"):
    strategy = ModelParallelStrategy(2, 1, save_distributed_checkpoint=False)
    strategy._process_group_backend = "gloo"
    module = make_module(tiny(), fused=False, fsdp_param_dtype=dtype)
    precision = "32-true" if dtype is None else "bf16-mixed"
    trainer = make_trainer(
        {folder!r}, 20, devices=2, strategy=strategy, precision=precision, log_every_n_steps=20
    )
    trainer.fit(module, ToyData())
    found[str(dtype)] = module.reported["train/loss"][1]
    found[str(dtype) + " weights"] = str({{p.dtype for p in module.parameters()}})
for name, sizes in {{"fsdp": (2, 1), "tensor": (1, 2)}}.items():
    for mode in ("none", "blocks", "selective"):
        strategy = ModelParallelStrategy(*sizes, save_distributed_checkpoint=False)
        strategy._process_group_backend = "gloo"
        how = ActivationCheckpointing(mode)
        module = make_module(tiny(dim=16), fused=False, activation_checkpointing=how)
        trainer = make_trainer({folder!r}, 6, devices=2, strategy=strategy, log_every_n_steps=6)
        trainer.fit(module, ToyData())
        found[name + " " + mode] = module.reported["train/loss"][1]
torch.save(found, {folder!r} + f"/found{{trainer.global_rank}}.pt")
"""


@pytest.mark.slow
def test_two_processes_leave_out_the_same_steps(tmp_path):
    here = Path(__file__).parent
    paths = [str(here), str(here.parent.parent)]
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES.format(paths=paths, folder=str(tmp_path)))
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for rank in (0, 1):
        found = torch.load(tmp_path / f"found{rank}.pt", weights_only=True)
        for way in ("fsdp", "tensor"):
            assert found[way]["scales"] == [1024, 512, 512, 512]
            assert found[way]["changed"] == [False, True, True]
            assert found[way]["skipped"] == 1
        assert found["bfloat16"] == pytest.approx(found["None"], rel=0.02)
        assert found["bfloat16"] != found["None"]
        assert found["bfloat16 weights"] == "{torch.float32}"
        for way in ("fsdp", "tensor"):  # recomputed over ranks
            for mode in ("blocks", "selective"):
                plain = found[f"{way} none"]
                assert found[f"{way} {mode}"] == pytest.approx(plain, rel=1e-6), (way, mode)
