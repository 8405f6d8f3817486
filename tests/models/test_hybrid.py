"""Patterns of mixers: which class stands where, and what a recipe may not say."""

import pytest
import torch
from torch import nn

from toolmem.errors import ToolmemError
from toolmem.models import Hybrid, Transformer
from toolmem.models.attention import Attention
from toolmem.models.cache import LaneState
from toolmem.models.mamba2 import Mamba2Mixer


class Twice(nn.Module):
    """A mixer of somebody else: mixes nothing."""

    parameter_group = "mine"

    def __init__(self, dim: int, factor: float = 2.0):
        super().__init__()
        self.gain = nn.Parameter(torch.ones(dim))
        self.factor = factor

    def new_cache(self, batch_size, max_len, device=None, dtype=None):
        return LaneState()

    def forward(self, x, context, cache=None):
        return self.factor * self.gain * x


def test_the_pattern_repeats_and_names_stand_for_classes():
    model = Hybrid(
        30,
        16,
        5,
        pattern=["mamba2", "local", "mine"],
        mixers={
            "mamba2": {"state_dim": 4, "head_dim": 8},
            "local": {"class_path": "attention", "n_heads": 2, "window": 7},
            "mine": {"class_path": f"{__name__}.Twice", "factor": 3.0},
        },
        feed_forward=["none", "gelu"],
        hidden_dim=20,
    )
    kinds = [type(block.mixer) for block in model.blocks]
    assert kinds == [Mamba2Mixer, Attention, Twice, Mamba2Mixer, Attention]
    assert model.blocks[1].mixer.window == 7 and model.blocks[2].mixer.factor == 3.0
    assert [block.feed_forward is None for block in model.blocks] == [True, False] * 2 + [True]
    assert model.blocks[1].feed_forward.down.in_features == 20
    assert model.parameter_counts()["mine"] == 16
    assert model.rotary and model.rotary_cos.shape[-1] == 8
    with torch.no_grad():
        cache = model.eval().new_cache(1, 9)
        row = torch.arange(9)[None]
        pieces = [model(row[:, a:b], cache=cache) for a, b in ((0, 4), (4, 9))]
        torch.testing.assert_close(torch.cat(pieces, 1), model(row), atol=1e-5, rtol=0)


def test_attention_alone_is_the_transformer():
    torch.manual_seed(0)
    options = {"hidden_dim": 24, "max_seq_len": 32, "tie_embeddings": True, "embedding_scale": True}
    mixers = {"attention": {"n_heads": 2, "conv_width": 3}}
    hybrid = Hybrid(30, 16, 2, pattern=["attention"], mixers=mixers, **options)
    plain = Transformer(30, 16, 2, 2, conv_width=3, **options)
    plain.load_state_dict(hybrid.state_dict())
    row = torch.arange(20)[None]
    torch.testing.assert_close(hybrid(row), plain(row), atol=0, rtol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pattern": []}, "pattern is empty"),
        ({"pattern": ["atention"]}, "mixers: 'atention' is unknown; choose one of attention"),
        ({"pattern": ["attention"]}, "mixers.attention.n_heads is missing"),
        (
            {"pattern": ["mamba2"], "mixers": {"mamba2": {"states": 3}}},
            "mixers.mamba2.states: Mamba2Mixer takes no such option; it takes state_dim",
        ),
        (
            {"pattern": ["mamba2"], "mixers": {"attention": {"n_heads": 2}}},
            "mixers.attention: no layer is called so",
        ),
        (
            {"pattern": ["a"], "mixers": {"a": {"class_path": "nowhere.Mixer"}}},
            "mixers.a: nowhere.Mixer is not imported",
        ),
        ({"pattern": ["mamba2"], "mixers": {"mamba2": 3}}, "mixers.mamba2 is 3"),
        ({"pattern": ["mamba1"], "feed_forward": "gulu"}, "feed_forwards: 'gulu' is unknown"),
        ({"pattern": ["mamba1"], "dropout": 1.0}, "dropout is 1.0"),
        ({"pattern": ["mamba1"], "n_layers": 0}, "n_layers is 0"),
        (
            {
                "pattern": ["attention", "wide"],
                "mixers": {
                    "attention": {"n_heads": 2},
                    "wide": {"class_path": "attention", "n_heads": 1},
                },
            },
            r"different widths, \[8, 16\]",
        ),
    ],
)
def test_refusals(options, message):
    arguments = {"vocab_size": 30, "dim": 16, "n_layers": 2} | options
    with pytest.raises(ToolmemError, match=message):
        Hybrid(**arguments)
