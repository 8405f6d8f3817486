"""A run that was killed and goes on must be the run that was not."""

import contextlib
import csv
import random
import secrets
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from training_toys import ToyData, make_batch, make_module, make_trainer, tiny

from toolmem import checkpoints
from toolmem.errors import ToolmemError
from toolmem.training import WSD, AdamW, Checkpointing, Cosine, CSVLogger, Linear, Muon

FORMAT_1 = Path(__file__).parents[1] / "checkpoints" / "format_1.ckpt"


def uneven(index: int):
    return make_batch(index, rows=2 + index % 3, seq=4 + index % 5, mask=(0.9, 0.1, 0.4)[index % 3])


def run(
    folder,
    max_steps=12,
    resume=None,
    accumulate=1,
    every=4,
    module=None,
    data=None,
    kill=None,
    **options,
):
    """Train, the schedule planned for 12 steps whatever ``max_steps`` is."""
    module = module or make_module(tiny(dropout=0.1), schedule=Linear(warmup_steps=3))
    data = data or ToyData(uneven)
    callbacks = options.pop("callbacks", [])
    keep = Checkpointing(every_n_steps=every, keep_every_n_steps=every)
    trainer = make_trainer(
        folder,
        12,
        logger=CSVLogger(folder),
        log_every_n_steps=3,
        accumulate_grad_batches=accumulate,
        enable_checkpointing=True,
        callbacks=[*callbacks, keep],
        **({"val_check_interval": 5} | options),
    )
    if max_steps < 12:
        kill = Kill(max_steps)
    if kill is not None:
        trainer.callbacks.append(kill)  # after Checkpointing
    torch.manual_seed(5)
    with contextlib.suppress(Killed):
        trainer.fit(module, data, ckpt_path=resume)
    return module, data


class Killed(Exception):
    pass


def Kill(step):
    class KillAfter(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            if trainer.global_step >= step:
                raise Killed

    return KillAfter()


def KillIn(hook, step):
    def kill(self, trainer, *args):
        if trainer.global_step >= step:
            raise Killed

    return type("KillIn", (pl.Callback,), {hook: kill})()


def rows(folder):
    return list(csv.DictReader(open(folder / "metrics.csv")))


def test_a_killed_run_goes_on_as_if_nothing_had_been(tmp_path):
    whole, _ = run(tmp_path / "whole", module=make_module(schedule=Linear(warmup_steps=3)))
    part = tmp_path / "part"
    run(part, 10, module=make_module(schedule=Linear(warmup_steps=3)))
    assert rows(part)[-1]["step"] == "9"
    resumed, data = run(
        part,
        resume=part / "checkpoints" / "last.ckpt",
        module=make_module(schedule=Linear(warmup_steps=3)),
    )
    assert data.log == list(range(8, 12))
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True)
    )
    assert rows(part) == rows(tmp_path / "whole")


def test_random_numbers_go_on(tmp_path):
    """Units are dropped, and callbacks draw, as if the run had not been stopped."""

    def go(folder, max_steps=12, resume=None):
        drawn = []
        module = make_module(tiny(dropout=0.3), schedule=Linear(warmup_steps=3))

        def draw(trainer, *_):
            drawn.append((random.random(), np.random.rand(), torch.rand(()).item()))

        random.seed(5 if resume is None else 99)
        np.random.seed(5 if resume is None else 99)
        callback = LambdaCallback(on_train_batch_end=draw)
        module, _ = run(folder, max_steps, resume, module=module, callbacks=[callback])
        return module, drawn

    whole, expected = go(tmp_path / "whole")
    part = tmp_path / "part"
    go(part, 9)
    resumed, drawn = go(part, resume=part / "checkpoints" / "last.ckpt")
    assert drawn == expected[8:]
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_checkpoint_of_format_1_goes_on(tmp_path):
    """As version 0.1 wrote it: by torch.save, optimizer states by number."""
    whole, _ = run(tmp_path / "whole", every=8, data=Real(), module=of_format_1())
    resumed, data = run(tmp_path / "new", resume=FORMAT_1, data=Real(), module=of_format_1())
    assert data.log == list(range(8, 12))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)


class Real(ToyData):
    """The name of the class is that of its state in the file."""


def of_format_1():
    return make_module(tiny(), schedule=Linear(warmup_steps=3))


def test_optimizer_states_go_by_name(tmp_path):
    module, _ = run(tmp_path)
    state = checkpoints.read(tmp_path / "checkpoints" / "last.ckpt")["optimizer_states"][0]
    names = {f"model.{name}" for name, _ in module.model.named_parameters()}
    assert set(state["state"]) == names
    assert {name for group in state["param_groups"] for name in group["params"]} == names
    optimizer = module.optimizers().optimizer
    shuffled = {**state, "param_groups": [
        {**group, "params": group["params"][::-1]} for group in state["param_groups"]
    ]}  # fmt: skip
    optimizer.load_state_dict(shuffled)  # found by name, whatever their order
    for name, parameter in module.named_parameters():
        for key, value in state["state"][name].items():
            assert torch.equal(optimizer.state[parameter][key], value), (name, key)
    del state["state"]["model.embedding.weight"]
    state["param_groups"] = [
        {**group, "params": [name for name in group["params"] if "embedding" not in name]}
        for group in state["param_groups"]
    ]
    with pytest.raises(ToolmemError, match=r"model\.embedding\.weight in another group"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("step", [8, 12])
@pytest.mark.parametrize(
    "hook", ["on_validation_start", "on_validation_batch_end", "on_validation_end"]
)
def test_a_run_killed_in_a_validation_makes_it_again(tmp_path, step, hook):
    """Where a checkpoint is due at the step that validates, it must not count the validation as done."""

    def go(folder, resume=None, kill=None):
        module = make_module(schedule=Linear(warmup_steps=3))
        return run(folder, resume=resume, module=module, kill=kill, val_check_interval=4)

    whole, _ = go(tmp_path / "whole")
    part = tmp_path / "part"
    go(part, kill=KillIn(hook, step))
    last = part / "checkpoints" / "last.ckpt"
    assert checkpoints.read(last)["global_step"] == step - (0 if hook == "on_validation_end" else 4)
    resumed, _ = go(part, resume=last)
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert rows(part) == rows(tmp_path / "whole")
    assert [row["step"] for row in rows(part) if row["val/loss"]] == ["4", "8", "12"]


@pytest.mark.parametrize("step", [1, 2, 3])
def test_in_the_middle_of_accumulation(tmp_path, step):
    """Validation, and with it a checkpoint of the best, comes after any number of micro-batches."""

    def go(folder, max_steps=12, resume=None):
        module = make_module(schedule=Linear(warmup_steps=3))
        # A random number makes each validation the best so far: best.ckpt is of the last one.
        options = {"val_check_interval": 4 * 2 + step, "accumulate": 4, "every": 100}
        return run(folder, max_steps, resume, module=module, **options)

    whole, _ = go(tmp_path / "whole")
    part = tmp_path / "part"
    go(part, 4)
    best = part / "checkpoints" / "best.ckpt"
    about = checkpoints.read(best)["toolmem"]
    counts = [int(uneven(i).loss_mask.sum()) for i in range(4 * 2 + step)]
    assert about["pending_tokens"] == sum(counts[8:])
    assert about["metrics"]["train_loss"]["count"] == sum(counts)
    resumed, data = go(part, resume=best)
    assert data.log == list(range(8 + step, 48))
    for a, b in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(a, b)
    assert rows(part) == rows(tmp_path / "whole")


def test_a_checkpoint_holds_plain_data_and_rebuilds_its_model(tmp_path):
    module, _ = run(tmp_path)
    file = tmp_path / "checkpoints" / "last.ckpt"
    checkpoint = checkpoints.read(file)
    about = checkpoint["toolmem"]
    assert about["format"] == checkpoints.FORMAT
    assert about["data"]["factbase"]["fingerprint"] == "aaaa"
    assert about["optimizer"]["class_path"] == "toolmem.training.Muon"
    model = checkpoints.build_model(about["model"], file)
    weights = {
        k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items() if "model." in k
    }
    model.load_state_dict(weights)
    tokens = uneven(0).tokens
    module.eval()
    assert torch.equal(model.eval()(tokens), module.model(tokens))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    run(folder, 5)
    return folder / "checkpoints" / "last.ckpt"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": lambda: tiny(dim=16)}, r"model\.model\.init_args\.dim is 16 .* 8 in"),
        (
            {"optimizer": lambda: Muon(lr=0.5)},
            r"model\.optimizer\.init_args\.lr is 0\.5 .* 0\.01 in",
        ),
        ({"optimizer": lambda: AdamW(lr=1e-2)}, r"model\.optimizer\.class_path"),
        ({"schedule": lambda: Cosine(warmup_steps=3)}, r"model\.schedule\.class_path"),
    ],
)
def test_another_model_or_optimizer_is_refused_by_name(tmp_path, checkpoint, change, message):
    options = {"schedule": Linear(warmup_steps=3), "model": tiny(dropout=0.1)}
    module = make_module(**(options | {key: make() for key, make in change.items()}))
    with pytest.raises(ToolmemError, match=message):
        run(tmp_path, resume=checkpoint, module=module)


def test_other_facts_are_refused_in_training_and_in_validation(tmp_path, checkpoint):
    data = ToyData(uneven, fingerprint="bbbb")
    with pytest.raises(ToolmemError, match=r"fingerprint aaaa, not bbbb.*data\.init_args\.people"):
        run(tmp_path, resume=checkpoint, data=data)
    module = make_module(tiny(dropout=0.1))
    with pytest.raises(ToolmemError, match="other facts"):
        make_trainer(tmp_path).validate(module, data, ckpt_path=checkpoint, weights_only=True)


def test_another_tokenizer_is_refused(tmp_path, checkpoint, monkeypatch):
    info = ToyData().checkpoint_info() | {"tokenizer": {"kind": "toy", "vocab_size": 12}}
    monkeypatch.setattr(ToyData, "checkpoint_info", lambda self: info)
    with pytest.raises(ToolmemError, match=r"tokenizer \(vocab_size 11, not 12\).*data\.init_args"):
        run(tmp_path, resume=checkpoint)


def test_validation_cares_not_how_the_model_was_trained(tmp_path, checkpoint):
    module = make_module(tiny(dropout=0.1), optimizer=AdamW(), schedule=WSD())
    results = make_trainer(tmp_path).validate(
        module, ToyData(uneven), ckpt_path=checkpoint, weights_only=True, verbose=False
    )
    assert results[0]["val/loss"] > 0


@pytest.mark.parametrize("damage", ["truncated", "garbage"])
def test_a_damaged_checkpoint_is_a_plain_message(tmp_path, checkpoint, damage):
    content = checkpoint.read_bytes()
    file = tmp_path / "last.ckpt"
    file.write_bytes(
        content[: len(content) // 2] if damage == "truncated" else secrets.token_bytes(99)
    )
    with pytest.raises(ToolmemError, match=r"last\.ckpt cannot be read"):
        run(tmp_path, resume=file)
