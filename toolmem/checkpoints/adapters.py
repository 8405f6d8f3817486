"""Checkpoints with adapters (``toolmem.models.lora``): merged, and in the format of the library ``peft``.

``peft`` has a folder: ``adapter_config.json``, and ``adapter_model.safetensors`` whose names are those of the
model in Hugging Face's form. What is one projection here may be several there (query, key and value); they
share our A, and each has its rows of B. What others wrote has an A of each, and is read as one adapter of a
larger rank, zero where a part has none.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem.checkpoints.formats import KEY, read, read_state
from toolmem.checkpoints.models import WEIGHTS_PREFIX, about_of, weights_of
from toolmem.checkpoints.places import part_of, remove, replace, resolve
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from torch import Tensor

    from toolmem.models import LanguageModel
    from toolmem.models.interop.rules import Rule
    from toolmem.models.lora import LoRA

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
THEIRS = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "lora_m": "lora_magnitude_vector"}
# What a config may say that we have nothing for, and the value that asks for nothing.
WITHOUT: dict[str, tuple[Any, ...]] = {
    "peft_type": ("LORA",), "bias": ("none",), "rank_pattern": ({}, None), "alpha_pattern": ({}, None),
    "modules_to_save": ([], None), "fan_in_fan_out": (False,), "megatron_config": (None,),
    "layer_replication": (None,), "trainable_token_indices": (None,), "target_parameters": ([], None),
}  # fmt: skip


def adapters_of(path: Path) -> dict[str, Any] | None:
    """What adapters a checkpoint has (``LoRA.plain``); None where it has none, whatever it is of."""
    found: Any = read_state(path)
    for key in (KEY, "model", "lora"):
        found = found.get(key) if isinstance(found, Mapping) else None
    return dict(found) if isinstance(found, Mapping) else None


def merged(path: Path) -> dict[str, Any] | None:
    """A checkpoint to generate from, evaluate or start from, its adapters merged; None where it has none.

    Args:
        path: the checkpoint.
    """
    if adapters_of(path) is None:
        return None
    state = read(path, parts=("state_dict", "global_step", KEY))
    about = about_of(state, path)
    model = {key: value for key, value in about["model"].items() if key != "lora"}
    return {
        "state_dict": {WEIGHTS_PREFIX + name: value for name, value in weights_of(state).items()},
        "global_step": state.get("global_step", 0),
        "epoch": 0,
        KEY: {**{key: about[key] for key in ("format", "version", "data")}, "model": model},
    }


def write_peft(source: str | Path, folder: str | Path, base: str | None = None) -> None:
    """Write a checkpoint's adapters as ``peft`` has them.

    Args:
        source: a run's folder, or a checkpoint.
        folder: replaced, if it is there.
        base: the model that they belong to, a folder or an id of the hub; where it came from when None.

    Raises:
        ToolmemError: for a checkpoint without adapters, or a model that Hugging Face has no form of.
    """
    from safetensors.torch import save_file

    from toolmem.models.lora import A, LoRA

    path, folder = resolve(source), Path(folder)
    spec = adapters_of(path)
    if spec is None:
        raise ToolmemError(f"{path} has no adapters: it was not trained with model.lora")
    how = LoRA(**{**spec, "targets": tuple(spec["targets"])})
    state = read(path, parts=("state_dict", KEY))
    about = about_of(state, path)
    stored = {
        name.removeprefix(WEIGHTS_PREFIX): value for name, value in state["state_dict"].items()
    }
    rules = _rules(about["model"], about["data"])
    tensors: dict[str, Tensor] = {}
    layers: list[str] = []
    for name in stored:
        layer, _, part = name.rpartition(".")
        if part == A:
            layers += _give(layer, stored, rules, tensors)
    known = about["data"].get("pretrained") or {}
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True, "bias": "none",
        "base_model_name_or_path": base or known.get("name"), "r": how.rank, "lora_alpha": how.alpha,
        "lora_dropout": how.dropout, "use_rslora": how.rank_stabilized, "use_dora": how.dora,
        "target_modules": layers, "fan_in_fan_out": False, "init_lora_weights": True,
    }  # fmt: skip
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = part_of(folder)
    try:
        temporary.mkdir()
        (temporary / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        replace(temporary, folder)
    finally:
        remove(temporary)


def read_peft(folder: str | Path, model: LanguageModel, model_type: str | None = None) -> LoRA:
    """Give a model the adapters that ``peft``, or ``write_peft``, wrote.

    Args:
        folder: of ``adapter_config.json`` and ``adapter_model.safetensors``.
        model: of the base's weights; it gets adapters.
        model_type: what Hugging Face calls its architecture, where several have its form.

    Returns:
        what adapters they are.

    Raises:
        ToolmemError: for what adapters of ours cannot be, or what does not fit the model, naming it.
    """
    import torch

    from toolmem import checkpoints
    from toolmem.models.lora import LoRA, adapted, add_adapters

    folder = Path(folder)
    config, tensors = _read(folder)
    data = {"pretrained": {"model_type": model_type}}
    rules = _rules(checkpoints.describe(model, {})["model"], data)
    found = {layer: parts for layer, rule in rules.items() if (parts := _parts(rule, tensors))}
    left = set(tensors) - {
        name for parts in found.values() for one in parts for name in one.values()
    }
    if left or not found:
        what = f"{min(left)} has no place in it" if left else f"it has no layer of {folder}"
        raise ToolmemError(f"{folder / WEIGHTS} does not fit the model: {what}")
    blocks = {
        layer: _block(rules[layer], parts, tensors, int(config["r"]))
        for layer, parts in found.items()
    }
    rank = max(len(a) for a, _, _ in blocks.values())
    scale = config["lora_alpha"] / (
        math.sqrt(config["r"]) if config.get("use_rslora") else config["r"]
    )
    rooted = bool(config.get("use_rslora"))
    how = LoRA(
        rank,
        scale * (math.sqrt(rank) if rooted else rank),
        tuple(f"^{re.escape(layer)}$" for layer in blocks),
        rooted,
        bool(config.get("use_dora")),
        float(config.get("lora_dropout") or 0),
    )
    add_adapters(model, how)
    layers = adapted(model)
    with torch.no_grad():
        for name, (a, b, m) in blocks.items():
            layer = layers[name]
            if (a.shape[1], len(b)) != (layer.in_features, layer.out_features):
                raise ToolmemError(
                    f"{folder / WEIGHTS}: the adapter of {name} is of a map from {a.shape[1]} to {len(b)}, "
                    f"which here is from {layer.in_features} to {layer.out_features}: it is another model's"
                )
            layer.lora_a.zero_()[: len(a)] = a
            layer.lora_b.zero_()[:, : b.shape[1]] = b
            if layer.lora_m is not None and m is not None:
                layer.lora_m.copy_(torch.where(m.isnan(), layer.lora_m, m))
    return how


def _rules(spec: Mapping[str, Any], data: Mapping[str, Any]) -> dict[str, Rule]:
    """Which of Hugging Face's tensors are which weight of ours, by our layer's name."""
    from toolmem.models.interop.architectures import architecture_for

    known = data.get("pretrained") or {}
    architecture = architecture_for(spec["class_path"], spec["init_args"], known.get("model_type"))
    return {
        rule.ours.removesuffix(".weight"): rule
        for rule in architecture.rules(spec["init_args"])
        if rule.ours.endswith(".weight") and rule.shape is None
    }


def _rows(rule: Rule, whole: int) -> list[int]:
    return list(rule.rows) if len(rule.theirs) > 1 else [whole]


def _give(
    layer: str, stored: Mapping[str, Tensor], rules: Mapping[str, Rule], tensors: dict[str, Tensor]
) -> list[str]:
    """A layer's adapter as theirs, into ``tensors``; names of their layers."""
    if layer not in rules:
        raise ToolmemError(f"{layer} has no place in Hugging Face's form of the model")
    rule = rules[layer]
    b, m = stored[f"{layer}.lora_b"], stored.get(f"{layer}.lora_m")
    begin = 0
    names = [name.removesuffix(".weight") for name in rule.theirs]
    for name, rows in zip(names, _rows(rule, len(b)), strict=True):
        part = slice(begin, begin + rows)
        begin += rows
        # Copies: a file of safetensors wants no two names for one memory.
        tensors[f"{PREFIX}{name}.{THEIRS['lora_a']}"] = stored[f"{layer}.lora_a"].clone()
        tensors[f"{PREFIX}{name}.{THEIRS['lora_b']}"] = b[part].clone()
        if m is not None:
            tensors[f"{PREFIX}{name}.{THEIRS['lora_m']}"] = m[part].clone()
    return names


def _parts(rule: Rule, tensors: Mapping[str, Tensor]) -> list[dict[str, str]]:
    """Names of the tensors of each of a rule's layers, {} where it has none; [] where none has."""
    parts = []
    for theirs in rule.theirs:
        name = PREFIX + theirs.removesuffix(".weight")
        kinds = {kind: f"{name}.{suffix}" for kind, suffix in THEIRS.items()}
        parts.append({kind: full for kind, full in kinds.items() if full in tensors})
    return parts if any(parts) else []


def _block(
    rule: Rule, parts: list[dict[str, str]], tensors: Mapping[str, Tensor], rank: int
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One adapter of those of a rule's layers: A, B, and lengths, nan where a layer has no adapter."""
    import torch

    there = [one for one in parts if one]
    if any("lora_a" not in one or "lora_b" not in one for one in there):
        raise ToolmemError(f"the adapter of {rule.theirs[0]} lacks a part: the file was edited")
    first = tensors[there[0]["lora_a"]]
    shared = all(torch.equal(tensors[one["lora_a"]], first) for one in there)
    whole = sum(len(tensors[one["lora_b"]]) for one in there)
    rows = _rows(rule, whole)
    a = first if shared else torch.cat([tensors[one["lora_a"]] for one in there])
    b = first.new_zeros(sum(rows), len(a))
    m = first.new_full((sum(rows),), torch.nan) if "lora_m" in there[0] else None
    begin, column = 0, 0
    for one, count in zip(parts, rows, strict=True):
        if one:
            if len(tensors[one["lora_b"]]) != count:
                raise ToolmemError(
                    f"{one['lora_b']} has {len(tensors[one['lora_b']])} rows, not {count}: it is another "
                    "model's"
                )
            b[begin : begin + count, column : column + rank] = tensors[one["lora_b"]]
            if m is not None:
                m[begin : begin + count] = tensors[one["lora_m"]].flatten()
            column += 0 if shared else rank
        begin += count
    return a, b, m


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError as error:
        raise ToolmemError(
            f"{folder} is no folder of peft's: it has no {Path(error.filename or WEIGHTS).name}"
        ) from error
    except (ValueError, SafetensorError) as error:
        raise ToolmemError(f"{folder} is damaged: {error}") from error
    for key, allowed in WITHOUT.items():
        if key in config and config[key] not in allowed:
            raise ToolmemError(
                f"{folder / CONFIG}: {key} is {config[key]!r}, which is not read here"
            )
    if not isinstance(config.get("r"), int) or not isinstance(
        config.get("lora_alpha"), int | float
    ):
        raise ToolmemError(f"{folder / CONFIG} does not say r and lora_alpha: the file was edited")
    return config, tensors
