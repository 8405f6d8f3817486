"""Trees of plain data and tensors, taken apart and put together."""

import enum
import json
import math
from collections import OrderedDict

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from toolmem import ToolmemError
from toolmem.checkpoints.state import flatten, unflatten


def there_and_back(state):
    flat = flatten(state)
    return unflatten(json.loads(json.dumps(flat.tree, allow_nan=False)), flat.tensors.__getitem__)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(
            st.text(max_size=3) | st.integers() | st.sampled_from(["$tensor", "$tuple"]),
            inner,
            max_size=3,
        )
    ),
    max_leaves=12,
)


@hypothesis.given(st.dictionaries(st.text(max_size=3), plain, max_size=3))
@hypothesis.settings(max_examples=60, deadline=None)
def test_plain_data_comes_back(state):
    assert repr(there_and_back(state)) == repr(
        state
    )  # repr tells 1 from 1.0 and True, and nan is nan


def test_tensors_and_arrays():
    tensor = torch.arange(3)
    state = {
        "a": {"b": tensor, 0: [tensor]},
        "a.b": torch.zeros(2),
        "n": np.arange(2),
        "f": np.float32(2),
    }
    flat = flatten(state)
    assert list(flat.tensors) == ["a.b", "a.b#2", "n"]  # one that is met twice is kept once
    assert flat.tensors["a.b"].data_ptr() == tensor.data_ptr()
    found = there_and_back(state)
    assert torch.equal(found["a"]["b"], tensor)
    assert found["a"]["b"] is found["a"][0][0]
    assert torch.equal(found["a.b"], torch.zeros(2))
    assert isinstance(found["n"], np.ndarray)
    assert found["f"] == 2.0


class Kind(str, enum.Enum):  # noqa: UP042 (of which str() is not the value)
    ONE = "one"


def test_what_is_nearly_plain_becomes_so():
    found = there_and_back(
        {"k": {Kind.ONE: 1}, "o": OrderedDict(a=math.inf), "s": torch.Size([2, 3])}
    )
    assert found == {"k": {"one": 1}, "o": {"a": math.inf}, "s": (2, 3)}
    assert [type(key) for key in found["k"]] == [str]


@pytest.mark.parametrize("value", [{1, 2}, object(), torch.float32, print, b"bytes"])
def test_anything_else_is_refused_by_name(value):
    with pytest.raises(ToolmemError, match=r"callbacks\.Mine\.0 is a "):
        flatten({"callbacks": {"Mine": [value]}})
