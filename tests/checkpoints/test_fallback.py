"""The newest checkpoint that is whole."""

import shutil
from pathlib import Path

import pytest
import torch

from toolmem import ToolmemError, checkpoints
from toolmem.checkpoints import places
from toolmem.checkpoints.convert import convert
from toolmem.training.folders import RunFolder

OLD = Path(__file__).with_name("format_1.ckpt")


def write(path, step):
    checkpoints.write({"global_step": step, "weights": torch.arange(100.0) + step}, path)
    return path


def damage(path):
    data = bytearray(path.read_bytes())
    data[-7] ^= 8
    path.write_bytes(data)


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    for name, step in (("last", 40), ("last-1", 30), ("step_20", 20), ("best", 35)):
        write(folder / f"{name}.ckpt", step)
    return RunFolder(tmp_path / "run")


@pytest.mark.parametrize(("named", "resume"), [("last", "never"), (None, "auto"), ("last", "auto")])
def test_a_whole_one_is_taken(run, named, resume):
    last = run.path / "checkpoints" / "last.ckpt"
    assert run.checkpoint_to_resume(named, resume) == str(last)


def test_a_damaged_one_is_put_aside_and_told(run):
    folder = run.path / "checkpoints"
    damage(folder / "last.ckpt")
    damage(folder / "best.ckpt")
    with pytest.warns(RuntimeWarning) as warned:
        found = run.checkpoint_to_resume(None, "auto")
    assert found == str(folder / "last-1.ckpt")
    messages = [str(w.message) for w in warned]
    assert len(messages) == 2
    assert "last.ckpt cannot be read" in messages[0]
    assert "the tensor weights is damaged" in messages[0]
    assert (
        "goes on from last-1.ckpt, step 30, and last.ckpt is now last.ckpt.damaged" in messages[0]
    )
    assert sorted(p.name for p in folder.iterdir()) == [
        "best.ckpt.damaged", "last-1.ckpt", "last.ckpt.damaged", "step_20.ckpt",
    ]  # fmt: skip


def test_all_of_them_damaged(run):
    for path in (run.path / "checkpoints").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(ToolmemError, match=r"no checkpoint in .* is whole"):
        run.checkpoint_to_resume("last", "never")


def test_a_first_start(tmp_path):
    assert RunFolder(tmp_path).checkpoint_to_resume("last", "never") is None
    assert RunFolder(tmp_path / "none").checkpoint_to_resume(None, "auto") is None


def test_one_of_a_newer_version_is_no_reason_to_go_back(run):
    last = run.path / "checkpoints" / "last.ckpt"
    data = last.read_bytes().replace(b'"toolmem.format":"2"', b'"toolmem.format":"9"')
    last.write_bytes(data)
    with pytest.raises(ToolmemError):
        checkpoints.read(last)  # its header's checksum differs
    from toolmem.checkpoints import stored, tensor_files

    flat = checkpoints.formats.flatten({"global_step": 1})
    tensor_files.write(last, {}, stored.metadata(flat.tree) | {"toolmem.format": "9"})
    with pytest.raises(ToolmemError, match=r"format 9, written by .* use a newer toolmem"):
        run.checkpoint_to_resume(None, "auto")


def test_killed_while_a_folder_took_anothers_place(run, tmp_path):
    """Where names cannot be exchanged there is a moment without: the old one has a name of its own then."""
    last = run.path / "checkpoints" / "last.ckpt"
    last.rename(places.part_of(last, "old"))
    assert run.checkpoint_to_resume(None, "auto") == str(last)
    assert checkpoints.read(last)["global_step"] == 40


@pytest.mark.parametrize("exchange", [True, False])
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0), (2, 3), (0, 0)])
def test_one_takes_anothers_place(tmp_path, monkeypatch, exchange, before, after):
    """Files and folders, whatever was there."""
    if not exchange:
        monkeypatch.setattr(places, "_exchange", lambda first, second: False)
    target = tmp_path / "last.ckpt"
    for step, ranks in ((1, before), (2, after)):
        source = write(tmp_path / "source.ckpt", step)
        convert(source, target, "folder" if ranks else "file", ranks or 1)
        source.unlink()
        assert checkpoints.read(target)["global_step"] == step
        assert torch.equal(checkpoints.read(target)["weights"], torch.arange(100.0) + step)
    assert [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]


@pytest.mark.parametrize("ranks", [0, 2])
@pytest.mark.parametrize("links", [True, False])
def test_earlier_ones_are_kept(tmp_path, monkeypatch, ranks, links):
    if not links:

        def refuse(*_):
            raise OSError(1, "Operation not permitted")

        monkeypatch.setattr("os.link", refuse)
    last = tmp_path / "last.ckpt"
    for step in range(1, 6):
        source = write(tmp_path / "source.ckpt", step)
        places.keep_earlier(last, 3)
        convert(source, last, "folder" if ranks else "file", ranks or 1)
        source.unlink()
    found = {p.name: checkpoints.read_state(p)["global_step"] for p in tmp_path.iterdir()}
    assert found == {"last.ckpt": 5, "last-1.ckpt": 4, "last-2.ckpt": 3}


def test_an_old_one_that_is_damaged(tmp_path):
    path = tmp_path / "last.ckpt"
    shutil.copy(OLD, path)
    checkpoints.check(path)
    weight = checkpoints.read(path)["state_dict"]["model.embedding.weight"]
    data = bytearray(path.read_bytes())
    data[data.index(weight.numpy().tobytes()) + 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ToolmemError, match=r"last\.ckpt cannot be read"):
        checkpoints.check(path)
