"""Saved under one layout, gone on with under another: the run is the same."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from parallel_cases import ROWS, SEQ
from sharded_cases import Run, fit, in_processes

from toolmem import ToolmemError, checkpoints
from toolmem.checkpoints import convert
from toolmem.checkpoints.stored import Stored, is_sharded

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def largest(first, second):
    assert first.keys() == second.keys()
    return max(float((first[name] - second[name]).abs().max()) for name in first)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Four processes save in the middle, two others of another layout go on; and all in one process."""
    root = tmp_path_factory.mktemp("sharded")
    found = {}

    def at(name):
        return str(root / name)

    last = root / "four" / "checkpoints" / "last.ckpt"
    dropout = {"dropout": 0.2, "data": 2}
    found["four"], found["grid"] = in_processes(
        4,
        [Run(at("four"), 4, stop=4), Run(at("grid"), 2, 2, stop=4)],
        str(root),
    )
    convert.convert(last, root / "one.ckpt", "file")
    convert.convert(root / "one.ckpt", root / "three.ckpt", "folder", 3)
    names = ["tp", "tp_of_one", "tp_of_grid", "drop", "drop_half", "drop_rest", "sync", "whole"]
    names += ["moe", "moe_rest"]
    moe = {"model": "moe", "ddp": 2, "accumulate": 3}
    in_two = in_processes(
        2,
        [
            Run(at("tp"), 1, 2, resume=str(last)),
            Run(at("tp_of_one"), 1, 2, resume=at("three.ckpt")),
            Run(at("tp_of_grid"), 1, 2, resume=at("grid/checkpoints/last.ckpt")),
            Run(at("drop"), **dropout),
            Run(at("drop_half"), **dropout, stop=4),
            Run(at("drop_rest"), **dropout, resume=at("drop_half/checkpoints/last.ckpt")),
            Run(at("sync"), **dropout, options={"background": False}),
            Run(at("whole"), 1, 2, stop=4, whole=True),
            Run(at("moe"), **moe, cut=8),
            Run(at("moe_rest"), **moe, resume=at("moe/cut.ckpt")),
        ],
        str(root),
    )
    found |= dict(zip(names, in_two, strict=True))
    found["one"] = fit(Run(at("one")))
    found["of_four"] = fit(Run(at("of_four"), resume=at("one.ckpt")))
    found["of_whole"] = fit(Run(at("of_whole"), resume=at("whole/checkpoints/last.ckpt")))
    return root, found


def test_saved_by_four_of_fsdp_and_resumed_by_two_of_tensor_parallelism(runs):
    root, found = runs
    assert is_sharded(root / "four" / "checkpoints" / "last.ckpt")
    assert largest(found["tp"], found["one"]) < 1e-5
    assert largest(found["four"], found["one"]) > 1e-4  # it did go on


def test_consolidated_and_cut_otherwise(runs):
    _, found = runs
    assert largest(found["of_four"], found["one"]) < 1e-5
    assert largest(found["tp_of_one"], found["one"]) < 1e-5
    assert all(torch.equal(found["tp_of_one"][name], found["tp"][name]) for name in found["tp"])


def test_saved_under_both_at_once(runs):
    _, found = runs
    assert largest(found["tp_of_grid"], found["one"]) < 1e-5


def test_one_file_written_by_tensor_parallelism(runs):
    root, found = runs
    assert (root / "whole" / "checkpoints" / "last.ckpt").is_file()
    assert largest(found["of_whole"], found["one"]) < 1e-5


def test_of_the_same_layout_to_the_bit_with_dropout(runs):
    """Random numbers of each rank are put back."""
    root, found = runs
    for name, expected in found["drop"].items():
        assert torch.equal(found["drop_rest"][name], expected), name
    states = checkpoints.read(root / "drop" / "checkpoints" / "last.ckpt")["random"]
    assert len(states) == 2
    assert not torch.equal(states[0]["torch"], states[1]["torch"])  # each rank drops its own


def test_within_a_step_what_every_rank_gathered_is_kept(runs):
    """Gradients, and how many tokens chose each expert: two batches of three, of both ranks."""
    root, found = runs
    cut = checkpoints.read(root / "moe" / "cut.ckpt")
    assert cut["global_step"] == 2 and cut["pending_gradients"]
    loads = [v for k, v in cut["state_dict"].items() if k.endswith(".load")]
    biases = [name for name in found["moe"] if name.endswith(".bias") and "router" in name]
    assert loads and biases
    for load in loads:  # two batches, of both ranks' rows; two experts a token
        assert load.sum() == 2 * ROWS * SEQ * 2
    for name in biases:
        assert torch.equal(found["moe_rest"][name], found["moe"][name]), name
    assert largest(found["moe_rest"], found["moe"]) < 1e-6


def test_in_the_background_the_same_files(runs):
    root, _ = runs
    files = sorted(p.relative_to(root / "sync") for p in (root / "sync").rglob("*.safetensors"))
    assert [str(file) for file in files] == [
        f"checkpoints/{name}.ckpt/rank_{rank}.safetensors"
        for name in ("last-1", "last")
        for rank in range(2)
    ]
    for file in files:
        first, second = (
            checkpoints.tensor_files.TensorFile(root / name / file) for name in ("sync", "drop")
        )
        assert first.entries == second.entries  # checksums, too


def test_weights_are_there_once(runs):
    """Each element is in one rank's file, and together they are the whole."""
    root, found = runs
    for name in ("four", "grid"):
        with Stored(root / name / "checkpoints" / "last.ckpt") as stored:
            assert len(stored.files) == 4
            for tensor in stored.tensors.values():
                total = sum(torch.Size(chunk.entry.shape).numel() for chunk in tensor.chunks)
                assert total == torch.Size(tensor.shape).numel(), tensor.name
            for weight, value in found[name].items():
                assert torch.equal(stored.read(f"state_dict.model.{weight}"), value)


def test_the_model_is_rebuilt_from_shards(runs):
    """As every command does it."""
    root, found = runs
    folder = root / "four" / "checkpoints" / "last.ckpt"
    about = checkpoints.about_of(checkpoints.read_state(folder), folder)
    model = checkpoints.build_model(about["model"], folder)
    model.load_state_dict(checkpoints.weights_of(checkpoints.read(folder, parts=["state_dict"])))
    assert all(torch.equal(v, found["four"][k]) for k, v in model.state_dict().items())
    assert checkpoints.run_folder(folder) == root / "four"
    assert checkpoints.resolve(root / "four") == folder


def test_damaged_shards_are_named(runs, tmp_path):
    root, _ = runs
    import shutil

    copy = tmp_path / "last.ckpt"
    shutil.copytree(root / "four" / "checkpoints" / "last.ckpt", copy)
    file = copy / "rank_2.safetensors"
    data = bytearray(file.read_bytes())
    data[-5] ^= 1
    file.write_bytes(data)
    with pytest.raises(ToolmemError, match=r"rank_2\.safetensors: the tensor \S+ is damaged"):
        checkpoints.check(copy)
    file.unlink()
    with pytest.raises(ToolmemError, match=r"cannot be read"):
        checkpoints.check(copy)
    shutil.copy(root / "grid" / "checkpoints" / "last.ckpt" / file.name, file)
    with pytest.raises(ToolmemError, match="of several saves"):
        checkpoints.check(Path(copy))
