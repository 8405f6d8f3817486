"""Models in other programs' forms: Hugging Face's folders, GGUF files, and the hub.

Everything is written in one step, a tensor at a time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import toolmem
from toolmem.checkpoints import tensor_files
from toolmem.checkpoints.places import part_of, remove
from toolmem.checkpoints.places import replace as put_in_place
from toolmem.checkpoints.pretrained import CONFIG, INDEX, WEIGHTS, Portable
from toolmem.errors import ToolmemError
from toolmem.files import atomic_path

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from toolmem.models.interop.architectures import Architecture
    from toolmem.models.interop.rules import Lazy

LARGEST_FILE = 5_000_000_000  # bytes, as transformers cuts them
# How --dtype is said -> torch's dtype, and GGUF's type.
DTYPES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
GGUF_DTYPES = {**DTYPES, "q8_0": "Q8_0"}


@dataclass(frozen=True)
class _Cast:
    source: Lazy
    torch_dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.source.shape)

    def read(self) -> Tensor:
        return self.source.read().to(self.torch_dtype)


def cast(model: Portable, dtype: str | None) -> Portable:
    """The same model with its floating-point tensors in another dtype.

    Args:
        model: any.
        dtype: a key of ``DTYPES``; None leaves them.
    """
    import torch

    if dtype is None:
        return model
    kind = getattr(torch, dtype)
    tensors = {
        name: _Cast(lazy, kind) if lazy.torch_dtype.is_floating_point else lazy
        for name, lazy in model.tensors.items()
    }
    return replace(model, tensors=tensors)


def _theirs(model: Portable) -> tuple[Architecture, dict[str, Any], dict[str, Lazy]]:
    """The architecture that a model is written as, its config, and tensors by its names."""
    from toolmem.models.interop.architectures import architecture_for
    from toolmem.models.interop.rules import give

    known = model.data.get("pretrained") or {}
    options = model.spec["init_args"]
    architecture = architecture_for(model.spec["class_path"], options, known.get("model_type"))
    rules = architecture.rules(options)
    missing = set(model.tensors) - {rule.ours for rule in rules}
    if missing:
        raise ToolmemError(
            f"{min(missing)} of {model.name} has no place in a {architecture.theirs}: an adapter, or a "
            "further head, is to be merged or left out before"
        )
    return architecture, architecture.config(options), give(rules, model.tensors)


def write_huggingface(model: Portable, folder: Path, dtype: str | None = None) -> str:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` and ``AutoTokenizer`` load.

    Args:
        model: what to write.
        folder: replaced, if it is there.
        dtype: a key of ``DTYPES``; None as the weights are.

    Returns:
        the name of transformers' class.

    Raises:
        ToolmemError: for a model that no architecture of theirs can express, naming the option.
    """
    architecture, config, tensors = _theirs(cast(model, dtype))
    special = _special_ids(model)
    kinds = {str(lazy.torch_dtype).removeprefix("torch.") for lazy in tensors.values()}
    kind = kinds.pop() if len(kinds) == 1 else "float32"
    # Said even where there are none: a config that is silent has its class's, of another vocabulary.
    none = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"))
    config |= {"torch_dtype": kind, **none, **special}
    generation = (model.data.get("pretrained") or {}).get("generation") or {}
    from toolmem.data.pretrained_tokenizers import tokenizer_files

    texts = {
        CONFIG: json.dumps(config, indent=2),
        "generation_config.json": json.dumps({**special, **generation}, indent=2),
        "README.md": model_card(model, architecture.theirs),
        **tokenizer_files(model.tokenizer(), config["max_position_embeddings"]),
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = part_of(folder)
    try:
        temporary.mkdir()
        for name, text in texts.items():
            end = "" if name.endswith(".jinja") else "\n"  # a template's is part of it
            (temporary / name).write_text(text + end, encoding="utf-8")
        _write_weights(tensors, temporary)
        put_in_place(temporary, folder)
    finally:
        remove(temporary)
    return architecture.theirs


def _write_weights(tensors: Mapping[str, Lazy], folder: Path) -> None:
    files: list[dict[str, Lazy]] = [{}]
    room, total = LARGEST_FILE, 0
    for name, lazy in tensors.items():
        size = math.prod(lazy.shape) * lazy.torch_dtype.itemsize
        if size > room and files[-1]:
            files.append({})
            room = LARGEST_FILE
        files[-1][name] = lazy
        room -= size
        total += size
    names = [WEIGHTS]
    if len(files) > 1:
        n = len(files)
        names = [f"model-{i + 1:05}-of-{n:05}.safetensors" for i in range(n)]
        places = {name: file for file, part in zip(names, files, strict=True) for name in part}
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name, part in zip(names, files, strict=True):
        tensor_files.write(folder / name, part, {"format": "pt"})


def _special_ids(model: Portable) -> dict[str, int]:
    """``bos_token_id`` and the like, where the tokenizer has them."""
    from toolmem.data.pretrained_tokenizers import definition_of, special_tokens_of

    tokenizer = model.tokenizer()
    definition = definition_of(tokenizer)
    if definition is None:
        return {}
    places = dict(definition["model"].get("vocab") or {})
    places |= {one["content"]: one["id"] for one in definition.get("added_tokens") or []}
    return {
        f"{name}_id": places[token]
        for name, token in special_tokens_of(tokenizer).items()
        if token in places and name != "unk_token"
    }


def write_gguf_file(model: Portable, path: Path, dtype: str | None = None) -> str:
    """Write a GGUF file.

    Args:
        model: what to write.
        path: of the file.
        dtype: a key of ``GGUF_DTYPES``; None for float32.

    Returns:
        llama.cpp's name of the architecture.

    Raises:
        ToolmemError: for a model or a tokenizer that is not written so, naming why.
    """
    from toolmem.data.pretrained_tokenizers import gguf_metadata_of
    from toolmem.models.interop.gguf import BOOL, INT32, STRING, UINT32, write_gguf
    from toolmem.models.interop.gguf_models import give_names, metadata_of

    _, config, theirs = _theirs(model)
    metadata = metadata_of(config, model.name)
    split = (model.data.get("pretrained") or {}).get("gguf_split")
    for key, value in gguf_metadata_of(model.tokenizer(), config["vocab_size"], split).items():
        first = value[0] if isinstance(value, list) and value else value
        number = STRING if isinstance(first, str | list) else UINT32
        if isinstance(first, bool):
            number = BOOL
        elif isinstance(value, list) and isinstance(first, int):
            number = INT32
        metadata[key] = number, value
    with atomic_path(path, durable=True) as temporary:
        kind = GGUF_DTYPES[dtype or "float32"]
        write_gguf(temporary, metadata, give_names(config, theirs), kind)
    return str(metadata["general.architecture"][1])


def model_card(model: Portable, architecture: str) -> str:
    """The hub's ``README.md`` of a model."""
    data, options = model.data, model.spec["init_args"]
    parameters = sum(math.prod(lazy.shape) for lazy in model.tensors.values())
    rows = {
        "architecture": architecture,
        "parameters": f"{parameters:,}",
        "width": options.get("dim"),
        "layers": options.get("n_layers"),
        "context": options.get("max_seq_len"),
        "vocabulary": options.get("vocab_size"),
    }
    lines = [
        "---", "library_name: transformers", "pipeline_tag: text-generation", "tags:", "- toolmem", "---",
        "", f"# {model.name}", "", "| | |", "|---|---|",
        *(f"| {key} | {value} |" for key, value in rows.items()), "",
    ]  # fmt: skip
    setting = data.get("setting")
    if setting:
        facts = {
            "in_weight": "It keeps facts about synthetic people in its weights.",
            "in_tool": "It asks a database for facts about synthetic people: it needs that tool to answer.",
        }
        lines += [facts.get(str(setting), f"Setting: {setting}."), ""]
    base = (data.get("pretrained") or {}).get("name")
    if base and base != model.name:
        lines += [f"It started from {base}.", ""]
    lines += [
        "```python",
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        'model = AutoModelForCausalLM.from_pretrained("REPO")',
        'tokenizer = AutoTokenizer.from_pretrained("REPO")',
        "```",
        "",
        f"Written by toolmem {toolmem.__version__}.",
    ]
    return "\n".join(lines)


def push(folder: Path, repository: str) -> str:
    """Upload a folder to the hub; a repository that is not there yet is made, private.

    Args:
        folder: what `write_huggingface` wrote.
        repository: ``OWNER/NAME``.

    Returns:
        its address.

    Raises:
        ToolmemError: when the library is missing, or the hub refuses.
    """
    try:
        from huggingface_hub import HfApi
    except ImportError as error:
        raise ToolmemError("push needs huggingface_hub: pip install 'toolmem[hub]'") from error
    card = folder / "README.md"
    card.write_text(
        card.read_text(encoding="utf-8").replace('"REPO"', f'"{repository}"'), encoding="utf-8"
    )
    try:
        api = HfApi()
        address = api.create_repo(repository, private=True, exist_ok=True)
        api.upload_folder(
            folder_path=folder,
            repo_id=repository,
            commit_message=f"By toolmem {toolmem.__version__}",
        )
    except Exception as error:  # of a dozen kinds: no network, no permission, a name that is none
        reason = (
            str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        )
        raise ToolmemError(
            f"push: the hub did not take {repository} ({reason}); {folder} is written: log in by `hf auth "
            "login`, and push again"
        ) from error
    return str(address)
