"""A checkpoint rebuilds its model alone, is plain data, and is refused with a reason."""

from __future__ import annotations

import errno

import pytest
import torch

from toolmem import ToolmemError, checkpoints
from toolmem.checkpoints import tensor_files
from toolmem.data import ByteTokenizer
from toolmem.models import LanguageModel, Transformer


def make(**changes) -> Transformer:
    torch.manual_seed(3)
    arguments = {"vocab_size": 260, "dim": 8, "n_layers": 2, "n_heads": 2, "max_seq_len": 32}
    return Transformer(**(arguments | changes))


def save(model: LanguageModel, path, **changes):
    data = {"tokenizer": ByteTokenizer().spec(), "factbase": None, "setting": None}
    weights = {checkpoints.WEIGHTS_PREFIX + key: value for key, value in model.state_dict().items()}
    checkpoint = {"state_dict": weights, "global_step": 5}
    checkpoint[checkpoints.KEY] = checkpoints.describe(model, data)
    checkpoints.write(checkpoint | changes, path)
    return path


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tie_embeddings": True, "embedding_scale": True, "conv_width": 4, "feed_forward": "relu2"},
        {"n_kv_heads": 1, "qk_norm": True, "norm": "layer", "position": "learned", "bias": True},
    ],
)
def test_round_trip(changes, tmp_path):
    model = make(dropout=0.3, **changes).eval()
    loaded = checkpoints.load(save(model, tmp_path / "x.ckpt"))
    tokens = torch.arange(20)[None]
    assert torch.equal(loaded.model(tokens), model(tokens))  # and so in evaluation mode
    assert loaded.model.init_args == model.init_args
    assert (loaded.step, loaded.path) == (5, tmp_path / "x.ckpt")
    assert loaded.tokenizer.encode("é") == list("é".encode())


def test_a_model_of_the_user_s_own(tmp_path, monkeypatch):
    """Found again by its import path, as long as that is there."""
    (tmp_path / "their_models.py").write_text(
        "from toolmem.models import Transformer\n"
        "class Deep(Transformer):\n"
        "    def __init__(self, vocab_size, n_layers=3):\n"
        "        super().__init__(vocab_size, dim=8, n_layers=n_layers, n_heads=1, max_seq_len=32)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    import their_models

    model = their_models.Deep(260, n_layers=1)
    path = save(model, tmp_path / "x.ckpt")
    about = checkpoints.read(path)[checkpoints.KEY]
    assert about["model"]["class_path"] == "their_models.Deep"
    assert about["model"]["init_args"] == {"vocab_size": 260, "n_layers": 1}
    assert type(checkpoints.load(path).model) is their_models.Deep


def test_class_paths_are_the_short_ones():
    assert checkpoints.class_path(make()) == "toolmem.models.Transformer"
    assert checkpoints.class_path(ByteTokenizer()) == "toolmem.data.ByteTokenizer"


def test_it_is_plain_data(tmp_path):
    path = save(make(), tmp_path / "x.ckpt")
    checkpoint = checkpoints.read(path)
    assert checkpoint["toolmem"]["format"] == checkpoints.FORMAT
    assert checkpoint["toolmem"]["data"]["tokenizer"] == ByteTokenizer().spec()


def test_what_a_path_may_be(tmp_path):
    last = save(make(), tmp_path / "run" / "checkpoints" / "last.ckpt")
    best = save(make(), tmp_path / "run" / "checkpoints" / "best.ckpt")
    for path in (tmp_path / "run", str(tmp_path / "run"), last.parent, last):
        assert checkpoints.resolve(path) == last
        assert checkpoints.run_folder(path) == tmp_path / "run"
    assert checkpoints.resolve(best) == best


def test_what_is_missing_is_told_with_what_is_there(tmp_path):
    save(make(), tmp_path / "run" / "checkpoints" / "best.ckpt")
    with pytest.raises(ToolmemError, match=r"no checkpoint in .*run: .*holds best\.ckpt"):
        checkpoints.resolve(tmp_path / "run")
    with pytest.raises(ToolmemError, match=r"no such checkpoint or run folder: .*gone"):
        checkpoints.resolve(tmp_path / "gone")
    with pytest.raises(ToolmemError, match=r"holds best\.ckpt"):
        checkpoints.read(tmp_path / "run" / "checkpoints" / "last.ckpt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ToolmemError, match=r"holds no \*\.ckpt"):
        checkpoints.resolve(tmp_path / "empty")


@pytest.mark.parametrize("share", [0, 0.01, 0.5, 0.99])
def test_cut_off_anywhere(share, tmp_path):
    path = save(make(), tmp_path / "x.ckpt")
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(ToolmemError, match=r"x\.ckpt cannot be read as a checkpoint .*truncated"):
        checkpoints.load(path)


def test_weights_that_do_not_fit(tmp_path):
    path = save(make(), tmp_path / "x.ckpt")
    checkpoint = checkpoints.read(path)
    checkpoint["state_dict"].popitem()
    checkpoints.write(checkpoint, path)
    with pytest.raises(ToolmemError, match="do not fit its own model"):
        checkpoints.load(path)


def test_a_full_disk_leaves_the_old_one(tmp_path, monkeypatch):
    path = save(make(), tmp_path / "x.ckpt")
    before = path.read_bytes()

    def half(target, tensors, metadata):
        target.write_bytes(before[:100])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tensor_files, "write", half)
    with pytest.raises(ToolmemError, match=r"cannot write .*x\.ckpt: the disk is full"):
        save(make(), path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("spec", ["no.such.Model", "Model", "", "toolmem.models.Missing"])
def test_classes_that_are_not_there(spec):
    with pytest.raises(
        ToolmemError,
        match=r"here: the model class: (cannot import|no\.such\.Model is not imported)",
    ):
        checkpoints.build_model({"class_path": spec, "init_args": {}}, "here")


@pytest.mark.parametrize(
    ("option", "value", "words"),
    [
        ("n_layers", 10**15, "whose n_layers is 1,000,000,000,000,000"),
        ("multi_token", 10**6, "which has more (modules|parameters)"),
        ("hidden_dim", 10**8, "which has more parameters"),
        ("hidden_dim", 10**13, "whose hidden_dim is 10,000,000,000,000"),
    ],
)
def test_models_that_are_larger_than_their_weights_are_not_made(option, value, words, tmp_path):
    """Else a file of a kilobyte costs hours or all memory."""
    path = tmp_path / "a.ckpt"
    save(make(), path)
    checkpoint = checkpoints.read(path)
    checkpoint["toolmem"]["model"]["init_args"][option] = value
    checkpoints.write(checkpoint, path)
    with pytest.raises(ToolmemError, match=rf"do not fit its own model, {words}"):
        checkpoints.load(path)
    assert not torch.nn.modules.module._global_parameter_registration_hooks


def test_classes_of_something_else():
    with pytest.raises(ToolmemError, match=r"here: .*is not a toolmem\.models\.LanguageModel"):
        checkpoints.build_model({"class_path": "subprocess.Popen", "init_args": {}}, "here")


def test_checkpoints_of_a_run_in_the_order_of_training(tmp_path):
    folder = tmp_path / "run" / "checkpoints"
    folder.mkdir(parents=True)
    with pytest.raises(ToolmemError, match="no checkpoint"):
        checkpoints.kept(tmp_path / "run")
    for name in (
        "step_100.ckpt",
        "step_20.ckpt",
        "best.ckpt",
        "last.ckpt",
        "step_x.ckpt",
        "step_3.part",
    ):
        (folder / name).touch()
    names = ["step_20.ckpt", "step_100.ckpt", "last.ckpt"]
    assert [path.name for path in checkpoints.kept(tmp_path / "run")] == names
    assert [path.name for path in checkpoints.kept(folder)] == names
    assert checkpoints.kept(folder / "best.ckpt") == [folder / "best.ckpt"]
    (folder / "last.ckpt").unlink()
    assert [path.name for path in checkpoints.kept(folder)] == names[:2]
