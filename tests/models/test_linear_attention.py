"""The memory's chunks equal its steps, and transformers' gated delta rule."""

import pytest
import torch

from toolmem.errors import ToolmemError
from toolmem.models import LinearAttention
from toolmem.models.linear_attention import chunked_memory, sequential_memory


def inputs(seq, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    b, h, k, v = 2, 3, 4, 5
    return (
        torch.randn(b, seq, h, k, dtype=dtype),
        torch.nn.functional.normalize(torch.randn(b, seq, h, k, dtype=dtype), dim=-1),
        torch.randn(b, seq, h, v, dtype=dtype),
        -(torch.rand(b, seq, h, dtype=dtype) ** 3) * 4,
        torch.rand(b, seq, h, dtype=dtype),
    )


@pytest.mark.parametrize("delta", [False, True])
@pytest.mark.parametrize(("seq", "chunk"), [(1, 8), (7, 8), (8, 8), (29, 8), (40, 64)])
@pytest.mark.parametrize("packed", [False, True])
def test_chunks_equal_steps_forward_and_backward(delta, seq, chunk, packed):
    given = [t.requires_grad_() for t in inputs(seq)]
    initial = torch.randn(2, 3, 4, 5, dtype=torch.float64, requires_grad=True)
    starts = None
    if packed:
        starts = torch.rand(2, seq, generator=torch.Generator().manual_seed(1)) < 0.2
    weights = torch.randn(2, seq, 3, 5, dtype=torch.float64)
    results = []
    for function, options in ((chunked_memory, {"chunk_size": chunk}), (sequential_memory, {})):
        y, memory = function(*given, delta=delta, starts=starts, initial=initial, **options)
        grads = torch.autograd.grad((y * weights).sum() + memory.sum(), [*given, initial])
        results.append((y, memory, *grads))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-9, rtol=1e-9)


def test_float32_is_as_good_as_its_steps():
    given = inputs(300, dtype=torch.float32)
    ours, _ = chunked_memory(*given, delta=True, chunk_size=64)
    theirs, _ = sequential_memory(*(t.double() for t in given), delta=True)
    torch.testing.assert_close(ours, theirs.float(), atol=1e-4, rtol=1e-4)


def test_the_delta_rule_is_transformers():
    from transformers.models.qwen3_next.modeling_qwen3_next import (
        torch_chunk_gated_delta_rule,
        torch_recurrent_gated_delta_rule,
    )

    queries, keys, values, log_decay, strength = inputs(37, dtype=torch.float32)
    for theirs in (torch_chunk_gated_delta_rule, torch_recurrent_gated_delta_rule):
        expected, memory = theirs(
            queries, keys, values, g=log_decay, beta=strength, initial_state=None,
            output_final_state=True,
        )  # fmt: skip
        # theirs divides queries by the root of the head's width
        ours, ours_memory = chunked_memory(
            queries / queries.shape[-1] ** 0.5, keys, values, log_decay, strength, delta=True
        )
        torch.testing.assert_close(ours, expected, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(ours_memory, memory, atol=1e-4, rtol=1e-3)


def test_the_delta_rule_overwrites_what_a_key_had():
    key = torch.tensor([1.0, 0, 0]).expand(1, 2, 1, 3)
    values = torch.tensor([[[[5.0, 0]], [[0, 7.0]]]])
    nothing, all_of_it = torch.zeros(1, 2, 1), torch.ones(1, 2, 1)
    for delta, expected in ((True, [0.0, 7.0]), (False, [5.0, 7.0])):
        y, _ = chunked_memory(key, key, values, nothing, all_of_it, delta=delta)
        assert y[0, 1, 0].tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["gated", "gated_delta"])
def test_compiled_equals_eager(rule):
    torch.manual_seed(0)
    model = LinearAttention(20, 8, 1, 2, rule=rule, hidden_dim=8, chunk_size=8)
    compiled = torch.compile(model.hidden, dynamic=True)
    for seq in (9, 17):
        row = torch.randint(20, (2, seq))
        torch.testing.assert_close(compiled(row), model.hidden(row), atol=1e-5, rtol=0)


def test_refusals():
    with pytest.raises(ToolmemError, match="rule: unknown 'dleta'"):
        LinearAttention(20, 8, 1, 2, rule="dleta")
    with pytest.raises(ToolmemError, match="dim 8 is not divisible by n_heads 3"):
        LinearAttention(20, 8, 1, 3)
    with pytest.raises(ToolmemError, match="chunk_size is 0"):
        LinearAttention(20, 8, 1, 2, chunk_size=0)
