"""Mamba 1 and 2: configs and names.

Theirs keep the convolution as torch's, oldest token first; ours as flat taps, the token's own first, and by
default 1 + the weight; models that come from elsewhere have ``conv_residual: false``, so that nothing is
rounded. Mamba 1's decay rates are laid out with channels first there, last here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from toolmem.errors import ToolmemError
from toolmem.models.interop.rules import Rule

NO_LIMIT = 8192  # for max_seq_len, which nothing in these models depends on
HIDDEN = "hidden_size"


def _common(config: Mapping[str, Any]) -> dict[str, Any]:
    for key, wanted in {"hidden_act": "silu", "use_conv_bias": True, "rms_norm": True}.items():
        if config.get(key, wanted) != wanted:
            raise ToolmemError(f"{key} {config[key]!r} is not supported: {wanted!r} is")
    return {
        "vocab_size": int(config["vocab_size"]),
        "dim": int(config[HIDDEN]),
        "n_layers": int(config["num_hidden_layers"]),
        "conv_width": int(config.get("conv_kernel", 4)),
        "expand": int(config.get("expand", 2)),
        "max_seq_len": int(config.get("max_position_embeddings") or NO_LIMIT),
        "norm_eps": float(config.get("layer_norm_epsilon", 1e-5)),
        "bias": bool(config.get("use_bias", False)),
        "conv_residual": False,
    }


def read_mamba(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Mamba-1 config as options."""
    options = _common(config)
    rank = config.get("time_step_rank", "auto")
    inner = config.get("intermediate_size", options["expand"] * options["dim"])
    if inner != options["expand"] * options["dim"]:
        raise ToolmemError(f"intermediate_size {inner} is not expand * hidden_size")
    return {
        **options,
        "state_dim": int(config.get("state_size", 16)),
        "dt_rank": math.ceil(options["dim"] / 16) if rank == "auto" else int(rank),
        "tie_embeddings": bool(config.get("tie_word_embeddings", True)),
    }


def read_mamba2(config: Mapping[str, Any]) -> dict[str, Any]:
    """A Mamba-2 config as options."""
    options = _common(config)
    heads, width = int(config.get("num_heads", 128)), int(config.get("head_dim", 64))
    if heads * width != options["expand"] * options["dim"]:
        raise ToolmemError(f"num_heads {heads} times head_dim {width} is not expand * hidden_size")
    low, high = map(_number, config.get("time_step_limit") or (0.0, math.inf))
    if low > 0 or high < math.inf:
        raise ToolmemError(f"time_step_limit ({low}, {high}) is not supported: (0, inf) is")
    return {
        **options,
        "state_dim": int(config.get("state_size", 128)),
        "head_dim": width,
        "n_groups": int(config.get("n_groups", 8)),
        "chunk_size": int(config.get("chunk_size", 256)),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
    }


def _number(value: Any) -> float:
    """A number as transformers writes it: infinity as an object, which JSON has no number for."""
    return float(value["__float__"] if isinstance(value, Mapping) else value)


def complete(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options with what None stands for. How a tap is kept is no matter: rules undo it."""
    found = dict(options)
    if "dt_rank" in found:
        found["dt_rank"] = found["dt_rank"] or math.ceil(found["dim"] / 16)
    del found["conv_residual"]
    return found


def _written(options: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "vocab_size": options["vocab_size"],
        HIDDEN: options["dim"],
        "num_hidden_layers": options["n_layers"],
        "state_size": options["state_dim"],
        "conv_kernel": options["conv_width"],
        "expand": options["expand"],
        "layer_norm_epsilon": options["norm_eps"],
        "use_bias": options["bias"],
        "use_conv_bias": True,
        "hidden_act": "silu",
        "tie_word_embeddings": options["tie_embeddings"],
        "max_position_embeddings": options["max_seq_len"],
    }


def write_mamba(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a Mamba-1 config."""
    inner = options["expand"] * options["dim"]
    return _written(options) | {
        "time_step_rank": options["dt_rank"],
        "intermediate_size": inner,
    }


def write_mamba2(options: Mapping[str, Any]) -> dict[str, Any]:
    """Options as a Mamba-2 config."""
    return _written(options) | {
        "num_heads": options["expand"] * options["dim"] // options["head_dim"],
        "head_dim": options["head_dim"],
        "n_groups": options["n_groups"],
        "chunk_size": options["chunk_size"],
    }


def _ends(options: Mapping[str, Any]) -> list[Rule]:
    found = [
        Rule("embedding.weight", ("backbone.embeddings.weight",)),
        Rule("norm.weight", ("backbone.norm_f.weight",)),
    ]
    if not options.get("tie_embeddings", False):
        found.append(Rule("head.weight", ("lm_head.weight",)))
    return found


def _mixer(options: Mapping[str, Any], i: int, channels: int) -> list[Rule]:
    """What both have alike."""
    ours, theirs, width = f"blocks.{i}.mixer.", f"backbone.layers.{i}.mixer.", options["conv_width"]
    residual = options.get("conv_residual", True)

    def take(weight: Tensor) -> Tensor:
        taps = weight[:, 0].flip(-1).T.clone()
        if residual:
            taps[0] -= 1
        return taps.reshape(-1)

    def give(taps: Tensor) -> Tensor:
        weight = taps.reshape(width, channels).T.flip(-1).clone()
        if residual:
            weight[:, -1] += 1
        return weight[:, None]

    found = [
        Rule(f"blocks.{i}.mixer_norm.weight", (f"backbone.layers.{i}.norm.weight",)),
        Rule(ours + "conv.taps", (theirs + "conv1d.weight",), (), take, give, (channels, 1, width)),
        Rule(ours + "conv_bias", (theirs + "conv1d.bias",)),
        Rule(ours + "D", (theirs + "D",)),
    ]
    for part in ("weight", "bias") if options.get("bias", False) else ("weight",):
        found += [
            Rule(f"{ours}in_proj.{part}", (f"{theirs}in_proj.{part}",)),
            Rule(f"{ours}out.{part}", (f"{theirs}out_proj.{part}",)),
        ]
    return found


def mamba_rules(options: Mapping[str, Any]) -> list[Rule]:
    """Which of a Mamba-1's tensors are which."""
    inner = options.get("expand", 2) * options["dim"]
    state, found = options.get("state_dim", 16), _ends(options)

    def turned(rows: int, columns: int) -> Any:
        return lambda rates: rates.reshape(rows, columns).T.contiguous()

    for i in range(options["n_layers"]):
        ours, theirs = f"blocks.{i}.mixer.", f"backbone.layers.{i}.mixer."
        found += _mixer({"conv_width": 4, **options}, i, inner)
        found += [
            Rule(ours + "x_proj.weight", (theirs + "x_proj.weight",)),
            Rule(ours + "dt_proj.weight", (theirs + "dt_proj.weight",)),
            Rule(ours + "dt_bias", (theirs + "dt_proj.bias",)),
            Rule(
                ours + "A_log", (theirs + "A_log",), (),
                turned(inner, state), turned(state, inner), (inner, state),
            ),
        ]  # fmt: skip
    return found


def mamba2_rules(options: Mapping[str, Any]) -> list[Rule]:
    """Which of a Mamba-2's tensors are which."""
    inner = options.get("expand", 2) * options["dim"]
    channels = inner + 2 * options.get("n_groups", 1) * options.get("state_dim", 128)
    found = _ends(options)
    for i in range(options["n_layers"]):
        ours, theirs = f"blocks.{i}.mixer.", f"backbone.layers.{i}.mixer."
        found += _mixer({"conv_width": 4, **options}, i, channels)
        found += [
            Rule(ours + name, (theirs + name,)) for name in ("A_log", "dt_bias", "norm.weight")
        ]
    return found
