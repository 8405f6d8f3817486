"""Llama and its relatives (Mistral, Qwen 2 and 3, SmolLM 2 and 3): configs and names.

They are `toolmem.models.Transformer` with options: biases on query, key and value (Qwen 2), normalised heads
(Qwen 3), layers without positions (SmolLM 3), windows (Mistral, Qwen). Theirs keep query, key and value
apart, and the feed-forward's gate and value; ours has one matrix of each.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from toolmem.errors import ToolmemError
from toolmem.models.interop.rules import Rule
from toolmem.models.rope_scaling import KEYS, check_rope_scaling

# What a config that does not say means, as transformers has it.
DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {
        "max_position_embeddings": 32768, "num_key_value_heads": 32, "head_dim": 128,
        "sliding_window": 4096,
    },
    "smollm3": {
        "max_position_embeddings": 32768, "num_key_value_heads": 4, "rope_theta": 2_000_000.0,
        "tie_word_embeddings": True,
    },
}  # fmt: skip


def reader(name: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Reads configs of a ``model_type``."""
    return lambda config: _read(name, {"rms_norm_eps": 1e-6, **DEFAULTS[name], **config})


def _read(name: str, config: Mapping[str, Any]) -> dict[str, Any]:
    dim, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    layers = int(config["num_hidden_layers"])
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise ToolmemError(f"hidden_act {config['hidden_act']!r} is not supported: silu is")
    attention_bias = bool(config.get("attention_bias", False))
    bias = attention_bias and bool(config.get("mlp_bias", False))
    if attention_bias != bool(config.get("mlp_bias", False)) and name != "qwen3":
        raise ToolmemError("attention_bias and mlp_bias go together or not at all")
    if name == "qwen3" and attention_bias:
        raise ToolmemError("attention_bias of qwen3 is not supported")
    theta, scaling = _rope(config)
    return {
        "vocab_size": int(config["vocab_size"]),
        "dim": dim,
        "n_layers": layers,
        "n_heads": heads,
        "n_kv_heads": int(config.get("num_key_value_heads") or heads),
        "hidden_dim": int(config["intermediate_size"]),
        "head_dim": int(config.get("head_dim") or dim // heads),
        "max_seq_len": int(config["max_position_embeddings"]),
        "rope_base": theta,
        "rope_scaling": scaling,
        "nope_every": _nope_every(name, config, layers),
        "qk_norm": name == "qwen3",
        "qkv_bias": name == "qwen2",
        "window": _window(name, config, layers),
        "tie_embeddings": bool(config.get("tie_word_embeddings", False)),
        "norm_eps": float(config["rms_norm_eps"]),
        "bias": bias,
        "feed_forward": "swiglu",
    }


def _rope(config: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """RoPE's base and scaling, from where configs of either age say them."""
    newer = dict(config.get("rope_parameters") or {})
    theta = float(newer.get("rope_theta", config.get("rope_theta") or 10_000.0))
    scaling = dict(config.get("rope_scaling") or newer)
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    fraction = scaling.get("partial_rotary_factor", config.get("partial_rotary_factor", 1.0))
    if fraction not in (None, 1, 1.0):
        raise ToolmemError(
            f"partial_rotary_factor {fraction} is not supported by this architecture"
        )
    if kind == "default":
        return theta, None
    if kind not in KEYS:
        raise ToolmemError(f"rope_scaling of type {kind!r} is not supported: {', '.join(KEYS)} are")
    found = {"rope_type": kind, **{key: scaling[key] for key in KEYS[kind]}}
    check_rope_scaling(found)
    return theta, found


def _nope_every(name: str, config: Mapping[str, Any], layers: int) -> int:
    if name != "smollm3":
        return 0
    every = int(config.get("no_rope_layer_interval") or 4)
    says = config.get("no_rope_layers")
    if says is None:
        return every
    for each in (0, every, *range(1, layers + 1)):
        if list(map(bool, says)) == [not each or (i + 1) % each != 0 for i in range(layers)]:
            return each
    raise ToolmemError(
        f"no_rope_layers {list(says)} is not supported: every so-manieth layer without positions is"
    )


def _window(name: str, config: Mapping[str, Any], layers: int) -> int | list[int]:
    size = int(config.get("sliding_window") or 0)
    if name == "llama" or not size:
        return 0
    if name == "mistral":
        return size
    if not config.get("use_sliding_window", False):
        return 0
    kinds = config.get("layer_types")
    if kinds is None:
        if name == "smollm3":
            raise ToolmemError("use_sliding_window needs layer_types")
        first = int(config.get("max_window_layers", 28))
        kinds = ["sliding_attention" if i >= first else "full_attention" for i in range(layers)]
    if unknown := set(kinds) - {"sliding_attention", "full_attention"}:
        raise ToolmemError(f"layer_types has {sorted(unknown)[0]!r}, which is not supported")
    windows = [size if kind == "sliding_attention" else 0 for kind in kinds]
    return windows[0] if len(set(windows)) == 1 else windows


def complete(options: Mapping[str, Any]) -> dict[str, Any]:
    """A Transformer's options with what None stands for, and windows by layer."""
    from toolmem.models.transformer import window_pattern

    found = dict(options)
    dim, heads, layers = found["dim"], found["n_heads"], found["n_layers"]
    found["n_kv_heads"] = found["n_kv_heads"] or heads
    found["head_dim"] = found["head_dim"] or dim // heads
    found["hidden_dim"] = found["hidden_dim"] or 4 * dim
    found["window"] = window_pattern(found["window"], layers)
    found["rope_base"] = float(found["rope_base"])
    found["qkv_bias"] = found["qkv_bias"] and not found["bias"]
    return found


def writer(name: str) -> Callable[[Mapping[str, Any]], dict[str, Any]]:
    """Writes configs of a ``model_type``."""
    return lambda options: _write(name, options)


def _write(name: str, options: Mapping[str, Any]) -> dict[str, Any]:
    windows, layers = options["window"], options["n_layers"]
    size = max(windows)
    config = {
        "vocab_size": options["vocab_size"],
        "hidden_size": options["dim"],
        "intermediate_size": options["hidden_dim"],
        "num_hidden_layers": layers,
        "num_attention_heads": options["n_heads"],
        "num_key_value_heads": options["n_kv_heads"],
        "head_dim": options["head_dim"],
        "hidden_act": "silu",
        "max_position_embeddings": options["max_seq_len"],
        "rms_norm_eps": options["norm_eps"],
        "rope_theta": options["rope_base"],
        "rope_scaling": options["rope_scaling"],
        "tie_word_embeddings": options["tie_embeddings"],
        "attention_dropout": 0.0,
    }
    if name in ("llama", "smollm3"):
        config |= {"attention_bias": options["bias"], "mlp_bias": options["bias"]}
    if name == "qwen3":
        config["attention_bias"] = False
    if name == "mistral":
        config["sliding_window"] = size or None
    if name in ("qwen2", "qwen3", "smollm3"):
        config |= {"use_sliding_window": size > 0, "sliding_window": size or None}
        kinds = ["sliding_attention" if window else "full_attention" for window in windows]
        config["layer_types"] = kinds
    if name in ("qwen2", "qwen3"):
        config["max_window_layers"] = layers
    if name == "smollm3":
        every = options["nope_every"]
        config["no_rope_layers"] = [int(not every or (i + 1) % every != 0) for i in range(layers)]
        config["no_rope_layer_interval"] = every or 4
    return config


def rules(options: Mapping[str, Any]) -> list[Rule]:
    """Which of Llama's tensors are which of a Transformer's.

    Args:
        options: of our model.
    """
    left_open = dict.fromkeys(("n_kv_heads", "head_dim", "hidden_dim"))
    full = complete(
        {"window": 0, "qkv_bias": False, "bias": False, "rope_base": 1, **left_open, **options}
    )
    width = full["head_dim"]
    heads = (full["n_heads"] * width, full["n_kv_heads"] * width, full["n_kv_heads"] * width)
    hidden = (full["hidden_dim"],) * 2
    found = [
        Rule("embedding.weight", ("model.embed_tokens.weight",)),
        Rule("norm.weight", ("model.norm.weight",)),
    ]
    if not full.get("tie_embeddings", False):
        found.append(Rule("head.weight", ("lm_head.weight",)))
    for i in range(full["n_layers"]):
        ours, theirs = f"blocks.{i}.", f"model.layers.{i}."
        attention, mlp = theirs + "self_attn.", theirs + "mlp."
        found += [
            Rule(ours + "mixer_norm.weight", (theirs + "input_layernorm.weight",)),
            Rule(ours + "feed_forward_norm.weight", (theirs + "post_attention_layernorm.weight",)),
        ]
        for part in ("weight", "bias"):
            if part == "weight" or full["bias"] or full["qkv_bias"]:
                names = tuple(f"{attention}{one}_proj.{part}" for one in "qkv")
                found.append(Rule(f"{ours}mixer.qkv.{part}", names, heads))
            if part == "weight" or full["bias"]:
                gates = (f"{mlp}gate_proj.{part}", f"{mlp}up_proj.{part}")
                found += [
                    Rule(f"{ours}mixer.out.{part}", (f"{attention}o_proj.{part}",)),
                    Rule(f"{ours}feed_forward.up.{part}", gates, hidden),
                    Rule(f"{ours}feed_forward.down.{part}", (f"{mlp}down_proj.{part}",)),
                ]
        if full.get("qk_norm", False):
            found += [
                Rule(f"{ours}mixer.{one}_norm.weight", (f"{attention}{one}_norm.weight",))
                for one in "qk"
            ]
    return found
