"""One form from another: what is in it stays the same."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from toolmem import ToolmemError, checkpoints
from toolmem.checkpoints.convert import convert
from toolmem.checkpoints.stored import Stored, is_sharded
from toolmem.cli.convert import convert as command
from toolmem.data import ByteTokenizer
from toolmem.models import Transformer

OLD = Path(__file__).with_name("format_1.ckpt")


@pytest.fixture
def model():
    torch.manual_seed(3)
    return Transformer(260, dim=8, n_layers=2, n_heads=2, max_seq_len=32, tie_embeddings=True)


@pytest.fixture
def run(tmp_path, model):
    """A run's folder whose checkpoint holds what training keeps."""
    weights = {f"model.{name}": value for name, value in model.state_dict().items()}
    names = list(weights)
    checkpoint = {
        "state_dict": weights,
        "global_step": 5,
        "optimizer_states": [
            {
                "state": {
                    name: {"step": torch.tensor(5.0), "exp_avg": torch.randn_like(weights[name])}
                    for name in names
                },
                "param_groups": [{"lr": 0.1, "betas": (0.9, 0.99), "params": names}],
            }
        ],
        checkpoints.KEY: checkpoints.describe(
            model, {"tokenizer": ByteTokenizer().spec(), "factbase": None, "setting": None}
        ),
    }
    checkpoints.write(checkpoint, tmp_path / "run" / "checkpoints" / "last.ckpt")
    return tmp_path / "run"


def assert_same(first, second):
    if isinstance(first, dict):
        assert isinstance(second, dict)
        assert first.keys() == second.keys()
        for key in first:
            assert_same(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert type(first) is type(second)
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same(one, other)
    elif isinstance(first, torch.Tensor):
        assert first.dtype == second.dtype
        assert torch.equal(first, second)
    else:
        assert first == second


def test_shards_and_back(run, tmp_path, capsys):
    original = checkpoints.read(checkpoints.resolve(run))
    command(str(run), str(tmp_path / "cut.ckpt"), ranks=3)
    assert is_sharded(tmp_path / "cut.ckpt")
    with Stored(tmp_path / "cut.ckpt") as stored:
        assert [len(file.entries) > 0 for file in stored.files] == [True] * 3
        assert len(stored.tensors["state_dict.model.embedding.weight"].chunks) == 3
    assert_same(checkpoints.read(tmp_path / "cut.ckpt"), original)
    command(str(tmp_path / "cut.ckpt"), str(tmp_path / "again.ckpt"), ranks=2)
    command(str(tmp_path / "again.ckpt"), str(tmp_path / "one.ckpt"))
    assert_same(checkpoints.read(tmp_path / "one.ckpt"), original)
    first = checkpoints.resolve(run).read_bytes()
    assert (tmp_path / "one.ckpt").read_bytes() == first
    out = capsys.readouterr().out
    assert "cut.ckpt: a folder of 3 files, from one file" in out
    assert "one.ckpt: one file, from a folder of 2 files" in out


def test_a_model_is_loaded_from_shards(run, tmp_path, model):
    command(str(run), str(tmp_path / "cut.ckpt"), ranks=2)
    loaded = checkpoints.load(tmp_path / "cut.ckpt")
    tokens = torch.arange(20)[None]
    assert torch.equal(loaded.model(tokens), model.eval()(tokens))
    assert loaded.step == 5


def test_weights_out_and_in(run, tmp_path, model):
    file = tmp_path / "weights.safetensors"
    command(str(run), str(file))
    weights = load_file(file)  # the library's own reader
    assert weights.keys() == model.state_dict().keys()
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    command(str(file), str(tmp_path / "in.ckpt"))
    loaded = checkpoints.load(tmp_path / "in.ckpt")
    assert_same(dict(loaded.model.state_dict()), dict(model.state_dict()))
    assert loaded.tokenizer.vocab_size == 260


def test_weights_of_another_program(run, tmp_path, model):
    file = tmp_path / "theirs.safetensors"
    changed = {name: value + 1 for name, value in model.state_dict().items()}
    save_file({name: value.clone() for name, value in changed.items()}, file)
    with pytest.raises(ToolmemError, match="name a run of the same model by --like"):
        command(str(file), str(tmp_path / "in.ckpt"))
    command(str(file), str(tmp_path / "in.ckpt"), like=str(run))
    assert_same(dict(checkpoints.load(tmp_path / "in.ckpt").model.state_dict()), changed)
    save_file({"x": torch.zeros(1)}, file)
    with pytest.raises(ToolmemError, match="do not fit their model"):
        command(str(file), str(tmp_path / "other.ckpt"), like=str(run))
    assert not (tmp_path / "other.ckpt").exists()


def test_an_old_format_becomes_the_newest(tmp_path):
    before = checkpoints.read(OLD)
    assert torch.load(OLD, weights_only=True)["toolmem"]["format"] == 1
    assert before["toolmem"]["format"] == checkpoints.FORMAT == 2
    command(str(OLD), str(tmp_path / "new.ckpt"))
    assert_same(checkpoints.read(tmp_path / "new.ckpt"), before)
    with Stored(tmp_path / "new.ckpt") as stored:
        stored.check()


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("x.bin", {}, r"told by its name: NAME\.ckpt"),
        ("x.ckpt", {"ranks": 0}, "ranks is 0"),
        ("x.safetensors", {"ranks": 2}, "is for checkpoints"),
        ("run/checkpoints/last.ckpt", {}, "exists already: .*--overwrite true"),
        ("x.ckpt", {"like": "run"}, "like is for files of weights"),
    ],
)
def test_what_cannot_be(run, tmp_path, target, options, message):
    with pytest.raises(ToolmemError, match=message):
        command(str(run), str(tmp_path / target), **options)


def test_a_damaged_source_leaves_nothing(run, tmp_path):
    last = checkpoints.resolve(run)
    with Stored(last) as stored:
        place = stored.tensors["state_dict.model.embedding.weight"].chunks[0].entry.begin
    data = bytearray(last.read_bytes())
    data[place] ^= 1
    last.write_bytes(data)
    for target, form in (("a.ckpt", "file"), ("b.ckpt", "folder"), ("c.safetensors", "weights")):
        with pytest.raises(ToolmemError, match="damaged"):
            convert(run, tmp_path / target, form, 2)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_populations_is_converted_whole(run, tmp_path):
    state = checkpoints.read(checkpoints.resolve(run))
    state[checkpoints.KEY]["population"] = {"members": [{}, {}]}
    checkpoints.write(state, tmp_path / "population.ckpt")
    convert(tmp_path / "population.ckpt", tmp_path / "folder.ckpt", "folder", 2)
    convert(tmp_path / "folder.ckpt", tmp_path / "back.ckpt", "file")
    assert_same(checkpoints.read(tmp_path / "back.ckpt"), state)
