"""Models rebuilt on parameters without memory: every architecture, tied tables, other dtypes."""

import pytest
import torch

from toolmem import ToolmemError, checkpoints
from toolmem.checkpoints.models import meta_model, tied_names
from toolmem.data import ByteTokenizer
from toolmem.models import (
    RNN,
    Eagle,
    Hybrid,
    LinearAttention,
    Mamba,
    Mamba2,
    Medusa,
    MoETransformer,
    Transformer,
)

SMALL = {"dim": 16, "n_layers": 2}
BASE = {
    "class_path": "toolmem.models.Transformer",
    "init_args": {"vocab_size": 260, "n_heads": 2, "max_seq_len": 32, **SMALL},
}
MIXERS = {"attention": {"n_heads": 2}, "mamba2": {"state_dim": 8, "head_dim": 8}}
MODELS = {
    "transformer": lambda: Transformer(260, n_heads=2, **SMALL),
    "tied": lambda: Transformer(260, n_heads=2, tie_embeddings=True, qk_norm=True, **SMALL),
    "learned positions": lambda: Transformer(
        260, n_heads=2, position="learned", norm="layer", bias=True, **SMALL
    ),
    "mup": lambda: Transformer(260, n_heads=2, initialization="mup", mup_base_dim=8, **SMALL),
    "orthogonal": lambda: Transformer(260, n_heads=2, initialization="orthogonal", **SMALL),
    "small": lambda: Transformer(
        260, n_heads=2, initialization="llama", value_residual=True, **SMALL
    ),
    "mla": lambda: Transformer(260, n_heads=2, attention="mla", **SMALL),
    "multi-token": lambda: Transformer(260, n_heads=2, multi_token=2, **SMALL),
    "moe": lambda: MoETransformer(260, n_heads=2, **SMALL),
    "mamba": lambda: Mamba(260, state_dim=4, **SMALL),
    "mamba2": lambda: Mamba2(260, state_dim=8, head_dim=8, **SMALL),
    "rnn": lambda: RNN(260, **SMALL),
    "linear": lambda: LinearAttention(260, n_heads=2, **SMALL),
    "hybrid": lambda: Hybrid(260, pattern=["attention", "mamba2"], mixers=MIXERS, **SMALL),
    "medusa": lambda: Medusa(260, BASE),
    "eagle": lambda: Eagle(260, BASE),
}


def stored(model, path, dtype=None):
    """A checkpoint of a model, all its numbers changed, so that none is what it starts with."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.01 * torch.randn_like(parameter))
    state = {
        f"model.{name}": value.to(dtype) if dtype and value.is_floating_point() else value
        for name, value in model.state_dict().items()
    }
    about = checkpoints.describe(model, {"tokenizer": ByteTokenizer().spec(), "factbase": None})
    checkpoints.write({"state_dict": state, checkpoints.KEY: about, "global_step": 1}, path)
    return path


@pytest.mark.parametrize("kind", MODELS)
@torch.no_grad()
def test_every_architecture(kind, tmp_path):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    path = stored(model, tmp_path / "a.ckpt")
    loaded = checkpoints.load(path).model
    assert not any(tensor.is_meta for tensor in [*loaded.parameters(), *loaded.buffers()])
    assert loaded.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert tied_names(loaded) == tied_names(model)
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    tokens = torch.arange(20).reshape(2, 10)
    assert torch.equal(loaded(tokens), model(tokens))


@pytest.mark.parametrize("kind", ["tied", "moe", "mamba2"])
def test_other_dtypes_become_the_models_own(kind, tmp_path):
    torch.manual_seed(0)
    model = MODELS[kind]()
    loaded = checkpoints.load(stored(model, tmp_path / "a.ckpt", torch.bfloat16)).model
    for name, tensor in model.state_dict().items():
        found = loaded.state_dict()[name]
        assert found.dtype == tensor.dtype
        rounded = tensor.bfloat16().to(tensor.dtype) if tensor.is_floating_point() else tensor
        assert torch.equal(found, rounded), name
    assert tied_names(loaded) == tied_names(model)


def test_what_is_loaded_trains(tmp_path):
    torch.manual_seed(0)
    loaded = checkpoints.load(stored(MODELS["tied"](), tmp_path / "a.ckpt")).model.train()
    loaded(torch.arange(8)[None]).square().mean().backward()
    assert loaded.head.weight.grad is loaded.embedding.weight.grad is not None


def test_parameters_have_no_memory_and_buffers_are_right():
    spec = {**BASE, "init_args": {**BASE["init_args"], "tie_embeddings": True}}
    whole = Transformer(**spec["init_args"])
    empty = meta_model(spec, list(whole.state_dict().values()), "here")
    assert all(parameter.is_meta for parameter in empty.parameters())
    assert torch.equal(empty.rotary_cos, whole.rotary_cos)
    assert empty.head.weight is empty.embedding.weight
    with pytest.raises(ToolmemError, match="has more parameters"):
        meta_model(
            {**BASE, "init_args": {**BASE["init_args"], "dim": 4096}}, [torch.zeros(3)], "here"
        )
