"""What one operation of torch costs in FLOPs: the tables that ``flops.py`` looks things up in.

The convention, which is the field's (arXiv 2001.08361, 2204.02311): a multiply-add is two FLOPs; what
multiplies matrices (matmuls, convolutions, attention, recurrent layers) counts, whatever its dtype;
elementwise work, reductions, norms, softmax, losses, copies and look-ups count 0. An operation of
neither kind is not taken for free: the counter reports it by name.

Torch has such a table (``torch.utils.flop_counter.flop_registry``), which is used where it is right.
Added here is what it misses on torch 2.13: attention's kernel for CPUs, ``nn.LSTM`` and its kin, matmuls
of small integers, products with vectors, triangular systems. Corrected is the gradient of a grouped
convolution's filter, where torch counts every channel with every other.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

Formula = Callable[..., int]


def causal_flash_pairs(queries: int, keys: int) -> int:
    """Pairs of query and key that torch's causal attention kernel for CPUs computes in a head.

    It goes by blocks of queries (32 of them, 64 from 192 on, 256 from 768 on) and of 512 keys, and
    passes over blocks of keys that lie wholly after the block of queries. Rows of up to 512 tokens are
    therefore computed in full (measured: at 512, 1,024, 2,048 and 4,096 tokens causal attention took
    1.04, 0.78, 0.60 and 0.58 times as long as full attention; the formula says 1, 0.75, 0.63, 0.56).
    """
    block = 256 if queries >= 768 else 64 if queries >= 192 else 32
    pairs = 0
    for first in range(0, queries, block):
        rows = min(block, queries - first)
        seen = min(first + rows, keys)
        pairs += rows * min(-(-seen // 512) * 512, keys)
    return pairs


def attention_flops(
    queries: Tensor, keys: Tensor, values: Tensor, causal_kernel: bool, scores: int, means: int
) -> int:
    """Of an attention kernel.

    Args:
        queries: (b, h, s, d).
        keys: (b, k, n, d).
        values: (b, k, n, v).
        causal_kernel: it passes over blocks that lie after the diagonal.
        scores: products over d a pair: 1 forward, 3 backward (the scores again, and the gradients of
            queries and keys).
        means: products over v a pair: 1 forward, 2 backward (the gradients of values and weights).
    """
    b, h, s, d = queries.shape
    n = keys.shape[2]
    pairs = causal_flash_pairs(s, n) if causal_kernel else s * n
    return 2 * b * h * pairs * (scores * d + means * values.shape[3])


def _cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **_: Any,
) -> int:
    return attention_flops(query, key, value, is_causal, 1, 1)


def _cpu_attention_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    dropout_p: float,
    is_causal: bool,
    **_: Any,
) -> int:
    return attention_flops(query, key, value, is_causal, 3, 2)


def _product(x: Tensor, *_: Any, out_val: Tensor, **__: Any) -> int:
    """A product of ``x`` with matrices, however those are packed: each number of ``x`` meets each
    column.
    """
    return 2 * x.numel() * out_val.shape[-1]


def _added_product(self: Tensor, a: Tensor, b: Tensor, **_: Any) -> int:
    return 2 * a.numel() * b.shape[-1]


def _matrix_vector(matrix: Tensor, vector: Tensor, **_: Any) -> int:
    return 2 * matrix.numel()


def _added_matrix_vector(self: Tensor, matrix: Tensor, vector: Tensor, **_: Any) -> int:
    return 2 * matrix.numel()


def _outer(self: Tensor, a: Tensor, b: Tensor, **_: Any) -> int:
    return 2 * a.numel() * b.numel()


def _grouped(x: Tensor, weight: Tensor, *args: Any, **_: Any) -> int:
    """``torch._grouped_mm``: stacks, or rows of one matrix told apart by where groups end."""
    groups = x.shape[0] if x.ndim == 3 and weight.ndim == 2 else 1  # a column is of one group alone
    return 2 * x.numel() * weight.shape[-1] // groups


def _convolution_backward(
    grad_out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias_sizes: Any,
    stride: Any,
    padding: Any,
    dilation: Any,
    transposed: bool,
    output_padding: Any,
    groups: int,
    output_mask: Sequence[bool],
    **_: Any,
) -> int:
    """Each wanted gradient pairs the numbers that the convolution paired, once more."""
    places = (x if transposed else grad_out).shape
    once = 2 * weight.numel() * places[0] * math.prod(places[2:])
    return once * (int(output_mask[0]) + int(output_mask[1]))


def _triangular(a: Tensor, b: Tensor, *, upper: bool, left: bool = True, **kwargs: Any) -> int:
    """Substitution: row i takes i earlier ones, and is divided by the diagonal unless that is 1."""
    n = a.shape[-1]
    return b.numel() * (n - 1 if kwargs.get("unitriangular") else n)


def _rnn(tokens: int, weights: Sequence[Tensor]) -> int:
    return 2 * tokens * sum(weight.numel() for weight in weights if weight.ndim == 2)


def _mkldnn_rnn(x: Tensor, weight0: Tensor, weight1: Tensor, *_: Any, **__: Any) -> int:
    return _rnn(x.shape[0] * x.shape[1], (weight0, weight1))


def _mkldnn_rnn_backward(x: Tensor, weight0: Tensor, weight1: Tensor, *_: Any, **__: Any) -> int:
    return 2 * _rnn(x.shape[0] * x.shape[1], (weight0, weight1))


def _cudnn_rnn(x: Tensor, weights: Sequence[Tensor], *_: Any, **__: Any) -> int:
    return _rnn(x.shape[0] * x.shape[1], weights)


def _cudnn_rnn_backward(x: Tensor, weights: Sequence[Tensor], *_: Any, **__: Any) -> int:
    return 2 * _rnn(x.shape[0] * x.shape[1], weights)


def _existing(formulas: dict[str, Formula]) -> dict[Any, Formula]:
    """By operation, leaving out those that this torch does not have."""
    found = {}
    for name, formula in formulas.items():
        namespace, _, operation = name.rpartition(".")
        home = getattr(torch.ops, namespace or "aten")
        if hasattr(home, operation):
            found[getattr(home, operation)] = formula
    return found


# Operation -> FLOPs of one call, given its arguments and ``out_val``. These go before torch's own.
FORMULAS: dict[Any, Formula] = _existing(
    {
        "_scaled_dot_product_flash_attention_for_cpu": _cpu_attention,
        "_scaled_dot_product_flash_attention_for_cpu_backward": _cpu_attention_backward,
        "convolution_backward": _convolution_backward,
        "mkldnn_rnn_layer": _mkldnn_rnn,
        "mkldnn_rnn_layer_backward": _mkldnn_rnn_backward,
        "_cudnn_rnn": _cudnn_rnn,
        "_cudnn_rnn_backward": _cudnn_rnn_backward,
        "_int_mm": _product,
        "_weight_int8pack_mm": _product,
        "_weight_int4pack_mm": _product,
        "_weight_int4pack_mm_for_cpu": _product,
        "_weight_int4pack_mm_with_scales_and_zeros": _product,
        "_dyn_quant_matmul_4bit": _product,
        "_mixed_dtypes_linear": _product,
        "_scaled_mm_v2": _product,
        "mkldnn_linear": _product,
        "quantized.linear": _product,
        "quantized.linear_relu": _product,
        "quantized.linear_dynamic": _product,
        "quantized.linear_relu_dynamic": _product,
        "onednn.qlinear_pointwise": _product,
        "_addmm_activation": _added_product,
        "addmm_": _added_product,
        "baddbmm_": _added_product,
        "addbmm": _added_product,
        "addbmm_": _added_product,
        "linalg_solve_triangular": _triangular,
        "mv": _matrix_vector,
        "addmv": _added_matrix_vector,
        "addmv_": _added_matrix_vector,
        "dot": _matrix_vector,
        "vdot": _matrix_vector,
        "addr": _outer,
        "addr_": _outer,
        "_grouped_mm": _grouped,
        "_scaled_grouped_mm": _grouped,
    }
)


def _packets(*names: str) -> frozenset[Any]:
    return frozenset(getattr(aten, name) for name in names if hasattr(aten, name))


_KERNELS = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")
# Attention of whole rows as one operation, and its gradient.
ATTENTION = _packets(*(f"_scaled_dot_product_{kernel}" for kernel in _KERNELS))
ATTENTION_BACKWARD = _packets(*(f"_scaled_dot_product_{kernel}_backward" for kernel in _KERNELS))


@dataclass(frozen=True)
class AttentionCall:
    """What a call of an attention kernel was given.

    Args:
        queries: (b, h, s, d).
        keys: (b, k, n, d).
        values: (b, k, n, v).
        masked: a mask says who sees whom, beside causality.
        skips: the kernel passes over blocks that lie after the diagonal.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    masked: bool
    skips: bool


def attention_call(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> AttentionCall:
    """Read the arguments of an operation (an ``OpOverload``) of ``ATTENTION`` or its backward."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    masked = given.get("attn_mask") is not None or given.get("attn_bias") is not None
    skips = bool(given.get("is_causal")) and "for_cpu" in func._schema.name
    return AttentionCall(given["query"], given["key"], given["value"], masked, skips)


# Operations of aten that count 0, by kind. Elementwise ones and views are known to torch (``is_free``).
_FREE = {
    "made of nothing": (
        "_efficientzerotensor arange empty empty_like empty_permuted empty_strided eye fill "
        "fill_ full full_like linspace logspace new_empty new_empty_strided new_full new_ones "
        "new_zeros ones ones_like rand rand_like randint randint_like randn randn_like "
        "randperm range scalar_tensor tril_indices triu_indices zero zero_ zeros zeros_like"
    ),
    "random numbers": (
        "_fused_dropout _masked_scale bernoulli bernoulli_ exponential exponential_ geometric "
        "geometric_ multinomial native_dropout native_dropout_backward normal normal_ random "
        "random_ uniform uniform_"
    ),
    "copies and changes of shape": (
        "_chunk_cat _reshape_alias _reshape_copy _stack _to_copy _unsafe_view alias "
        "alias_copy as_strided_ as_strided_copy as_strided_scatter block_diag cat "
        "constant_pad_nd contiguous copy copy_ detach_ detach_copy diag_embed "
        "diagonal_backward diagonal_copy diagonal_scatter expand_copy flip lift lift_fresh "
        "lift_fresh_copy narrow_copy permute_copy pixel_shuffle reflection_pad1d "
        "reflection_pad1d_backward repeat repeat_interleave replication_pad1d "
        "replication_pad1d_backward resize_ resize_as_ roll rot90 select_backward select_copy "
        "select_scatter set_ slice_backward slice_copy slice_scatter split_copy "
        "split_with_sizes_copy squeeze_ squeeze_copy stack t_ t_copy transpose_ "
        "transpose_copy tril tril_ triu triu_ unbind_copy unfold_backward unfold_copy "
        "unsafe_split unsafe_split_with_sizes unsqueeze_ unsqueeze_copy values_copy view_copy"
    ),
    "looking up": (
        "_embedding_bag _embedding_bag_dense_backward _index_put_impl_ _unsafe_index "
        "_unsafe_index_put _unsafe_masked_index _unsafe_masked_index_put_accumulate bucketize "
        "embedding embedding_dense_backward gather index index_add index_add_ index_copy "
        "index_copy_ index_fill index_fill_ index_put index_put_ index_reduce index_reduce_ "
        "index_select masked_scatter masked_scatter_ masked_scatter_backward masked_select "
        "nonzero nonzero_static one_hot put put_ scatter scatter_ scatter_add scatter_add_ "
        "scatter_reduce scatter_reduce_ searchsorted segment_reduce take take_along_dim"
    ),
    "reductions and running sums": (
        "_aminmax _cummax_helper _cummin_helper _is_all_true _is_any_true _local_scalar_dense "
        "_logcumsumexp _unique _unique2 all allclose amax amin aminmax any argmax argmin "
        "argsort bincount count_nonzero cummax cummin cumprod cumprod_ cumsum cumsum_ "
        "cumulative_trapezoid diff dist equal histc is_nonzero item kthvalue "
        "linalg_vector_norm logcumsumexp logsumexp max mean median min mode nanmedian nansum "
        "norm prod sort std std_mean sum topk trace unique_consecutive unique_dim "
        "unique_dim_consecutive var var_mean"
    ),
    "norms, softmax, losses": (
        "_fused_rms_norm _fused_rms_norm_backward _log_softmax _log_softmax_backward_data "
        "_masked_softmax _masked_softmax_backward _native_batch_norm_legit "
        "_native_batch_norm_legit_functional _native_batch_norm_legit_no_training "
        "_safe_softmax _softmax _softmax_backward_data _weight_norm_interface "
        "_weight_norm_interface_backward binary_cross_entropy binary_cross_entropy_backward "
        "binary_cross_entropy_with_logits huber_loss huber_loss_backward mse_loss "
        "mse_loss_backward native_batch_norm native_batch_norm_backward native_group_norm "
        "native_group_norm_backward native_layer_norm native_layer_norm_backward "
        "nll_loss_backward nll_loss_forward renorm renorm_ smooth_l1_loss "
        "smooth_l1_loss_backward"
    ),
    "elementwise, but without torch's mark": (
        "_add_relu _amp_foreach_non_finite_check_and_unscale_ _amp_update_scale_ "
        "_assert_async _assert_scalar _assert_tensor_metadata _conj _conj_physical "
        "_convert_weight_to_int4pack_for_cpu _dyn_quant_pack_4bit_weight "
        "_fake_quantize_per_tensor_affine_cachemask_tensor_qparams "
        "_functional_sym_constrain_range _fused_adam _fused_adam_ _fused_adamw _fused_adamw_ "
        "_fused_sgd _fused_sgd_ _make_per_channel_quantized_tensor "
        "_make_per_tensor_quantized_tensor _pin_memory _prelu_kernel _prelu_kernel_backward "
        "_thnn_fused_gru_cell _thnn_fused_gru_cell_backward _thnn_fused_lstm_cell "
        "_thnn_fused_lstm_cell_backward_impl abs_ avg_pool1d clamp_ complex copysign_ "
        "dequantize elu_backward eq_ floor_divide floor_divide_ ge_ gelu_ glu glu_backward "
        "gt_ hardshrink_backward hardsigmoid_backward hardswish hardswish_ hardswish_backward "
        "hardtanh_backward heaviside_ imag is_pinned is_same_size isfinite isin le_ "
        "leaky_relu_backward log_sigmoid_backward log_sigmoid_forward lt_ masked_fill_ "
        "max_pool1d mish_ native_channel_shuffle ne_ polar quantize_per_tensor real "
        "record_stream rrelu_with_noise rsub softplus_backward softshrink_backward "
        "sym_constrain_range sym_numel sym_size sym_storage_offset sym_stride threshold_ "
        "view_as_complex view_as_real"
    ),
}
FREE_OPERATIONS = frozenset(name for names in _FREE.values() for name in names.split())


@functools.cache
def is_free(operation: Any) -> bool:
    """Is this operation (an ``OpOverload``) known to cost no FLOPs by the convention above?"""
    namespace, _, name = operation._schema.name.partition("::")
    if namespace == "prim":
        return True
    if namespace != "aten":
        return False  # nothing is known of it, whatever it is marked as
    if name in FREE_OPERATIONS or name.startswith("_foreach_"):
        return True
    return bool(operation.is_view) or torch.Tag.pointwise in operation.tags


def formula_of(packet: Any) -> Formula | None:
    """The formula of an operation (an ``OpOverloadPacket``), ours or torch's; None without one."""
    return FORMULAS.get(packet) or flop_registry.get(packet)
