"""The shell: recorded arguments, and an architecture made outside the package."""

import copy
import importlib
import pickle

import torch
from torch import nn

from toolmem.models import LanguageModel, Transformer
from toolmem.models.layers import RMSNorm


class AverageCache:
    def __init__(self, batch, dim):
        self.total = torch.zeros(batch, 1, dim)
        self.count = torch.zeros(batch, 1, 1)

    def gather(self, lanes):
        self.total, self.count = self.total[lanes], self.count[lanes]

    def reserve(self, max_len):
        pass

    def size_in_bytes(self):
        return 4 * (self.total.numel() + self.count.numel())


class Average(nn.Module):
    """A recurrent mixer: the mean of what has been seen."""

    parameter_group = "recurrence"

    def __init__(self, dim):
        super().__init__()
        self.dim = dim
        self.project = nn.Linear(dim, dim, bias=False)

    def forward(self, x, context, cache=None):
        steps = torch.arange(1.0, x.shape[1] + 1)[None, :, None]
        total = x.cumsum(1)
        if cache is not None:
            total, steps = total + cache.total, steps + cache.count
            last = torch.full((len(x),), x.shape[1]) if context.counts is None else context.counts
            index = (last - 1).clamp(min=0)[:, None, None]
            new = total.gather(1, index.expand(-1, 1, self.dim))
            cache.total = torch.where(last[:, None, None] > 0, new, cache.total)
            cache.count = cache.count + last[:, None, None]
        return x + self.project(total / steps)

    def new_cache(self, batch_size, max_len, device=None, dtype=None):
        return AverageCache(batch_size, self.dim)


class AverageModel(LanguageModel):
    def __init__(self, vocab_size, dim=8, *, n_layers=2, **more):
        super().__init__(
            [Average(dim) for _ in range(n_layers)],
            RMSNorm(dim),
            vocab_size=vocab_size,
            dim=dim,
            max_seq_len=64,
            **more,
        )


class Narrow(Transformer):
    """A subclass that fixes some of its parent's arguments."""

    def __init__(self, vocab_size, n_layers=2):
        super().__init__(vocab_size, 16, n_layers, 2)


def test_another_architecture_is_one_file():
    torch.manual_seed(0)
    model = AverageModel(20).eval()
    assert model.parameter_counts()["recurrence"] == 2 * 64
    x = torch.randint(0, 20, (3, 9))
    full = model(x)
    cache = model.new_cache(3, 9)
    first = model(x[:, :5], cache=cache, counts=torch.tensor([5, 2, 0]))
    torch.testing.assert_close(first[0], full[0, :5])
    torch.testing.assert_close(first[1, :2], full[1, :2])
    rest = torch.stack((x[0, 5:9], x[1, 2:6], x[2, :4]))
    second = model(rest, cache=cache)
    for lane, start in enumerate((5, 2, 0)):
        torch.testing.assert_close(second[lane], full[lane, start : start + 4])


def rebuild(model):
    kind = type(model)
    found = getattr(importlib.import_module(kind.__module__), kind.__qualname__)
    again = found(**model.init_args)
    again.load_state_dict(model.state_dict())
    return again


def test_recorded_arguments_rebuild_the_model():
    models = [
        Transformer(30, 16, n_layers=1, n_heads=2, conv_width=3),
        Narrow(30),
        AverageModel(30, initialization="gpt2"),
    ]
    x = torch.randint(0, 30, (2, 7))
    for model in models:
        assert torch.equal(rebuild(model)(x), model(x))
    assert models[0].init_args["vocab_size"] == 30
    assert models[0].init_args["norm"] == "rms"
    assert models[1].init_args == {"vocab_size": 30, "n_layers": 2}
    assert models[2].init_args == {
        "vocab_size": 30,
        "dim": 8,
        "n_layers": 2,
        "initialization": "gpt2",
    }


def test_copies_keep_the_arguments():
    model = Transformer(30, 16, 1, 2)
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied.init_args == model.init_args


def test_signature_is_the_command_line():
    """jsonargparse sees the real parameters through the recording wrapper."""
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LanguageModel, "model")
    config = parser.parse_args(
        [
            "--model=toolmem.models.Transformer",
            "--model.vocab_size=30",
            "--model.dim=16",
            "--model.n_layers=1",
            "--model.n_heads=2",
            "--model.norm=layer",
        ]
    )
    model = parser.instantiate_classes(config).model
    assert isinstance(model, Transformer)
    assert model.init_args["norm"] == "layer"
