"""RoPE turned more slowly: the papers' rules written plainly, and what is refused."""

import math

import pytest
import torch

from toolmem import ToolmemError
from toolmem.models import Transformer
from toolmem.models.attention import rotary_tables

LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


def plainly(frequency, scaling):
    """What a pair's frequency becomes, in Python's floats."""
    if scaling["rope_type"] == "linear":
        return frequency / scaling["factor"]
    wavelength = 2 * math.pi / frequency
    long = scaling["original_max_position_embeddings"] / scaling["low_freq_factor"]
    short = scaling["original_max_position_embeddings"] / scaling["high_freq_factor"]
    if wavelength < short:
        return frequency
    if wavelength > long:
        return frequency / scaling["factor"]
    share = (8192 / wavelength - scaling["low_freq_factor"]) / (
        scaling["high_freq_factor"] - scaling["low_freq_factor"]
    )
    return (1 - share) * frequency / scaling["factor"] + share * frequency


@pytest.mark.parametrize("scaling", [LLAMA3, {"rope_type": "linear", "factor": 3.0}])
def test_tables(scaling):
    width, n, base = 128, 40, 500000.0
    cos, sin = rotary_tables(width, n, base, scaling)
    for pair in range(width // 2):
        frequency = plainly(base ** (-2 * pair / width), scaling)
        for position in (0, 1, 7, n - 1):
            angle = position * frequency
            for column, sign in ((pair, -1), (pair + width // 2, 1)):
                assert float(cos[position, 0, column]) == pytest.approx(math.cos(angle), abs=1e-6)
                assert float(sin[position, 0, column]) == pytest.approx(
                    sign * math.sin(angle), abs=1e-6
                )


def test_all_three_kinds_of_pairs_are_there():
    """So that the test above has looked at each branch."""
    kinds = {
        (plainly(f, LLAMA3) == f, plainly(f, LLAMA3) == f / 32)
        for f in (500000.0 ** (-2 * pair / 128) for pair in range(64))
    }
    assert kinds == {(True, False), (False, True), (False, False)}


@pytest.mark.parametrize(
    ("scaling", "says"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "yarn"),
        ({"factor": 2.0}, "rope_type None"),
        ({"rope_type": "linear"}, "factor is None"),
        ({"rope_type": "linear", "factor": -1.0}, "factor is -1.0"),
        ({"rope_type": "linear", "factor": True}, "factor is True"),
        ({"rope_type": "linear", "factor": 2.0, "beta": 1}, "no beta"),
        ({**LLAMA3, "high_freq_factor": 1.0}, "above low_freq_factor"),
    ],
)
def test_what_is_refused(scaling, says):
    with pytest.raises(ToolmemError, match=says):
        Transformer(20, dim=8, n_layers=1, n_heads=2, rope_scaling=scaling)


def test_an_option_of_the_model():
    torch.manual_seed(0)
    sizes = {"vocab_size": 20, "dim": 8, "n_layers": 1, "n_heads": 2}
    plain = Transformer(**sizes).eval()
    found = {}
    for factor in (1.0, 4.0):
        model = Transformer(**sizes, rope_scaling={"rope_type": "linear", "factor": factor}).eval()
        model.load_state_dict(plain.state_dict())
        found[factor] = model(torch.arange(12)[None])
    wanted = plain(torch.arange(12)[None])
    assert torch.equal(found[1.0], wanted) and not torch.allclose(found[4.0], wanted)
