"""Models in GGUF files: llama.cpp's names and metadata as Hugging Face's, and the other way round.

llama.cpp turns neighbouring numbers of a head, and Hugging Face the first half against the second; so of
Llama and Mistral (not of Qwen) the rows of query and key stand in another order in such files.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from toolmem.errors import ToolmemError
from toolmem.models.interop.gguf import FLOAT32, STRING, UINT32, GGUFFile
from toolmem.models.interop.rules import Lazy

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# general.architecture -> model_type; llama.cpp has Mistral's models as Llama's.
ARCHITECTURES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
WRITTEN_AS = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
TURNED = ("llama",)  # whose query and key have their rows in llama.cpp's order
SCALING = "rope_freqs.weight"
BLOCK = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}  # fmt: skip
ENDS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_OURS = re.compile(r"(?:blk\.(\d+)\.)?([a-z_]+)\.(weight|bias)")
_THEIRS = re.compile(r"(?:model\.layers\.(\d+)\.)?([a-z_.]+)\.(weight|bias)")
_FROM_BLOCK = {theirs: ours for ours, theirs in BLOCK.items()}
_FROM_ENDS = {theirs: ours for ours, theirs in ENDS.items()}
# What Llama 3.1 and 3.2 have; files hold its effect, a divisor for each pair, and not the numbers.
LLAMA3 = {
    "rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip


@dataclass(frozen=True)
class Reordered:
    """A tensor whose rows are put into another order when it is read.

    Args:
        source: as it is stored.
        order: makes the new one of it.
    """

    source: Lazy
    order: Callable[[Tensor], Tensor]

    @property
    def shape(self) -> Sequence[int]:
        """Its shape."""
        return self.source.shape

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype."""
        return self.source.torch_dtype

    def read(self) -> Tensor:
        """Its elements."""
        return self.order(self.source.read())


def halves(rows: Tensor, n_heads: int) -> Tensor:
    """Rows of heads from pairs of neighbours to halves."""
    return rows.unflatten(0, (n_heads, -1, 2)).transpose(1, 2).reshape(rows.shape)


def neighbours(rows: Tensor, n_heads: int) -> Tensor:
    """The inverse of ``halves``."""
    return rows.unflatten(0, (n_heads, 2, -1)).transpose(1, 2).reshape(rows.shape)


def config_of(file: GGUFFile) -> dict[str, Any]:
    """A file's model as a Hugging Face config.

    Raises:
        ToolmemError: for an architecture that is not read here, or metadata that are missing.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ToolmemError(
            f"{file.path}: GGUF files of architecture {name!r:.40} are not read here; there are "
            f"{', '.join(ARCHITECTURES)}"
        )

    def get(key: str, *default: Any) -> Any:
        value = file.metadata.get(f"{name}.{key}", *default)
        if value is None and not default:
            raise ToolmemError(f"{file.path}: it does not say {name}.{key}: it is incomplete")
        if not isinstance(value, int | float | None) or isinstance(value, bool):
            raise ToolmemError(f"{file.path}: {name}.{key} is {value!r:.60}, which is no number")
        return value

    heads, dim = get("attention.head_count"), get("embedding_length")
    if not heads:
        raise ToolmemError(f"{file.path}: {name}.attention.head_count is 0")
    width = get("attention.key_length", dim // heads)
    if get("attention.value_length", width) != width or get("rope.dimension_count", width) != width:
        raise ToolmemError(
            f"{file.path}: heads whose values or turned parts have a width of their own are not supported"
        )
    if name == "llama" and get("expert_count", 0):
        raise ToolmemError(f"{file.path}: GGUF files of mixtures of experts are not read here")
    if "token_embd.weight" not in file.tensors:
        raise ToolmemError(f"{file.path}: the tensor token_embd.weight is missing")
    biased = "blk.0.ffn_down.bias" in file.tensors
    return {
        "model_type": ARCHITECTURES[name],
        "vocab_size": file.tensors["token_embd.weight"].shape[0],
        "hidden_size": dim,
        "num_hidden_layers": get("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": get("attention.head_count_kv", heads),
        "head_dim": width,
        "intermediate_size": get("feed_forward_length"),
        "max_position_embeddings": get("context_length"),
        "rms_norm_eps": _plain(get("attention.layer_norm_rms_epsilon")),
        "rope_theta": get("rope.freq_base", 10_000.0),
        "rope_scaling": _scaling(file, name, width, get("rope.freq_base", 10_000.0)),
        "attention_bias": biased,
        "mlp_bias": biased,
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }


def _plain(value: float) -> float:
    """What was meant by a number that was kept in float32: 1e-05 for 9.999999747e-06."""
    return float(f"{value:.6g}")


def _scaling(file: GGUFFile, name: str, width: int, base: float) -> dict[str, Any] | None:
    import torch

    from toolmem.models.rope_scaling import frequency_divisors

    kind = file.metadata.get(f"{name}.rope.scaling.type", "none")
    if kind == "linear":
        return {"rope_type": "linear", "factor": file.metadata.get(f"{name}.rope.scaling.factor")}
    if kind != "none":
        raise ToolmemError(f"{file.path}: RoPE scaled by {kind!r:.40} is not supported")
    if SCALING not in file.tensors:
        return None
    divisors = file.tensors[SCALING].read().double().flatten()
    frequencies = base ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    # Of the slowest pair: how much of it is left as it was (0 for one that is slow enough), hence the factor.
    left = 1 / float(frequency_divisors(frequencies, {**LLAMA3, "factor": math.inf})[-1])
    scaled = 1 / float(divisors[-1]) - left if len(divisors) == width // 2 else 0.0
    found = {**LLAMA3, "factor": round((1 - left) / scaled, 3) if scaled > 0 else 1.0}
    if len(divisors) != len(frequencies) or not torch.allclose(
        frequency_divisors(frequencies, found), divisors, rtol=1e-5
    ):
        raise ToolmemError(
            f"{file.path}: {SCALING} scales RoPE in a way that is not Llama 3's, which is not supported"
        )
    return found


def tensors_of(file: GGUFFile, config: Mapping[str, Any]) -> dict[str, Lazy]:
    """A file's tensors by Hugging Face's names, rows in their order.

    Args:
        file: open until they are read.
        config: ``config_of`` it.

    Raises:
        ToolmemError: for a tensor that has no name there.
    """
    found: dict[str, Lazy] = {}
    turned = file.metadata["general.architecture"] in TURNED
    for name, tensor in file.tensors.items():
        if name == SCALING:
            continue
        match = _OURS.fullmatch(name)
        layer, part, kind = match.groups() if match else (None, "", "")
        theirs = (BLOCK if layer else ENDS).get(part)
        if theirs is None:
            raise ToolmemError(
                f"{file.path}: the tensor {name:.80} has no place in our model: an option of its "
                "architecture is not supported"
            )
        prefix = f"model.layers.{layer}." if layer else ""
        lazy: Lazy = tensor
        if turned and part in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if part == "attn_q" else "num_key_value_heads"]
            if not heads or tensor.shape[0] % (2 * heads):
                raise ToolmemError(
                    f"{file.path}: the tensor {name} of shape {list(tensor.shape)} is not of {heads} heads"
                )
            lazy = Reordered(tensor, functools.partial(halves, n_heads=heads))
        found[f"{prefix}{theirs}.{kind}"] = lazy
    return found


def give_names(config: Mapping[str, Any], theirs: Mapping[str, Lazy]) -> dict[str, Lazy]:
    """The inverse of `tensors_of`: by llama.cpp's names, rows in its order.

    Args:
        config: Hugging Face's.
        theirs: by Hugging Face's names.
    """
    turned = written_as(config) in TURNED
    found: dict[str, Lazy] = {}
    scaling = config.get("rope_scaling")
    if scaling and scaling["rope_type"] == "llama3":
        found[SCALING] = _Divisors(
            int(config["head_dim"]), float(config["rope_theta"]), dict(scaling)
        )
    for name, lazy in theirs.items():
        match = _THEIRS.fullmatch(name)
        assert match is not None
        layer, part, kind = match.groups()
        ours = (_FROM_BLOCK if layer else _FROM_ENDS)[part]
        if turned and ours in ("attn_q", "attn_k"):
            heads = config["num_attention_heads" if ours == "attn_q" else "num_key_value_heads"]
            lazy = Reordered(lazy, functools.partial(neighbours, n_heads=heads))
        found[f"blk.{layer}.{ours}.{kind}" if layer else f"{ours}.{kind}"] = lazy
    return found


@dataclass(frozen=True)
class _Divisors:
    width: int
    base: float
    scaling: dict[str, Any]

    @property
    def shape(self) -> tuple[int]:
        return (self.width // 2,)

    @property
    def torch_dtype(self) -> torch.dtype:
        import torch

        return torch.float32

    def read(self) -> Tensor:
        import torch

        from toolmem.models.rope_scaling import frequency_divisors

        exponents = -torch.arange(0, self.width, 2, dtype=torch.float64) / self.width
        return frequency_divisors(self.base**exponents, self.scaling).float()


def written_as(config: Mapping[str, Any]) -> str:
    """llama.cpp's name of a config's architecture.

    Raises:
        ToolmemError: for one that is not written here, or with an option that it has no word for.
    """
    name = config["model_type"]
    if name not in WRITTEN_AS:
        raise ToolmemError(
            f"a model of architecture {name} is not written as GGUF here; {', '.join(WRITTEN_AS)} are"
        )
    if config.get("sliding_window"):
        raise ToolmemError(
            "GGUF has no word for this architecture's sliding window: write a folder instead"
        )
    return WRITTEN_AS[name]


def metadata_of(config: Mapping[str, Any], name: str) -> dict[str, tuple[int, Any]]:
    """A config as a GGUF file's metadata, in the form that `write_gguf` takes.

    Args:
        config: Hugging Face's.
        name: of the model.

    Raises:
        ToolmemError: for an architecture that is not written here.
    """
    architecture = written_as(config)
    numbers = {
        "context_length": config["max_position_embeddings"],
        "embedding_length": config["hidden_size"],
        "block_count": config["num_hidden_layers"],
        "feed_forward_length": config["intermediate_size"],
        "attention.head_count": config["num_attention_heads"],
        "attention.head_count_kv": config["num_key_value_heads"],
        "attention.key_length": config["head_dim"],
        "attention.value_length": config["head_dim"],
        "rope.dimension_count": config["head_dim"],
        "vocab_size": config["vocab_size"],
    }
    found: dict[str, tuple[int, Any]] = {
        "general.architecture": (STRING, architecture),
        "general.name": (STRING, name),
        **{f"{architecture}.{key}": (UINT32, int(value)) for key, value in numbers.items()},
        f"{architecture}.attention.layer_norm_rms_epsilon": (FLOAT32, config["rms_norm_eps"]),
        f"{architecture}.rope.freq_base": (FLOAT32, config["rope_theta"]),
    }
    scaling = config.get("rope_scaling")
    if scaling and scaling["rope_type"] == "linear":
        found[f"{architecture}.rope.scaling.type"] = (STRING, "linear")
        found[f"{architecture}.rope.scaling.factor"] = (FLOAT32, float(scaling["factor"]))
    return found
