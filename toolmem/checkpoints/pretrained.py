"""Other programs' models as checkpoints of ours: GGUF files, and Hugging Face's folders and ids.

Whatever it came from, a model is then a `Portable`: what it is, and tensors by our names that are read when
they are written somewhere (``exports.py``), so that no model is ever in memory as a whole.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import toolmem
from toolmem.checkpoints.adapters import merged
from toolmem.checkpoints.formats import KEY, explained, is_torch_file, read
from toolmem.checkpoints.models import (
    WEIGHTS_PREFIX,
    about_of,
    meta_model,
    tied_names,
)
from toolmem.checkpoints.places import resolve
from toolmem.checkpoints.state import Flat, flatten, unflatten
from toolmem.checkpoints.stored import FORMAT, Stored
from toolmem.checkpoints.tensor_files import Entry, TensorFile, dtypes
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from toolmem.data.tokenizers import Tokenizer
    from toolmem.models.interop.architectures import Architecture
    from toolmem.models.interop.rules import Lazy

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"
WEIGHTS = "model.safetensors"
LONGEST_CONTEXT = 1 << 22  # tokens: tables of positions take memory


@dataclass(frozen=True)
class Portable:
    """A model on its way from one form to another.

    Args:
        name: what messages call it.
        spec: ``class_path`` and ``init_args``.
        data: of a checkpoint's ``toolmem`` part; ``tokenizer`` at least.
        tensors: by our names, tied ones once.
        ties: further name -> the name that its tensor has in ``tensors``.
    """

    name: str
    spec: dict[str, Any]
    data: dict[str, Any]
    tensors: Mapping[str, Lazy]
    ties: Mapping[str, str]

    def tokenizer(self) -> Tokenizer:
        """The model's."""
        from toolmem.data.tokenizers import tokenizer_from_spec

        return tokenizer_from_spec(self.data["tokenizer"])

    def flat(self) -> Flat:
        """As a checkpoint to generate from, evaluate, or start from (``model.init_from``)."""
        about = {
            "format": FORMAT, "version": toolmem.__version__, "model": self.spec, "data": self.data,
        }  # fmt: skip
        state = {"state_dict": {}, "global_step": 0, "epoch": 0, KEY: about}
        tree = flatten(state).tree
        places = {name: f"state_dict.{WEIGHTS_PREFIX}{name}" for name in self.tensors}
        names = {**places, **{name: places[of] for name, of in self.ties.items()}}
        tree["state_dict"] = {
            WEIGHTS_PREFIX + name: {"$tensor": place} for name, place in names.items()
        }
        return Flat(tree, {places[name]: lazy for name, lazy in self.tensors.items()})


def is_gguf(source: str | Path) -> bool:
    """Whether a source is a GGUF file, by its name."""
    return Path(source).suffix.lower() == ".gguf"


def is_huggingface(source: str | Path) -> bool:
    """Whether a source is a Hugging Face folder, or can only be an id on its hub."""
    path = Path(source)
    if path.is_dir():
        return (path / CONFIG).is_file()
    parts = str(source).split("/")
    return not path.exists() and len(parts) == 2 and all(parts) and path.suffix != ".ckpt"


@contextmanager
def open_model(source: str | Path) -> Iterator[Portable]:
    """A model of whatever form, open until the end of the block.

    Args:
        source: a GGUF file, a Hugging Face folder or id, a run's folder, or a checkpoint.

    Raises:
        ToolmemError: when it is missing, damaged, or not supported, naming what.
    """
    with ExitStack() as stack:
        if is_gguf(source):
            found = _from_gguf(Path(source), stack)
        elif is_huggingface(source):
            found = _from_huggingface(fetched(str(source)), stack)
        else:
            found = _from_checkpoint(resolve(source), stack)
        yield found


def _from_gguf(path: Path, stack: ExitStack) -> Portable:
    from toolmem.data.pretrained_tokenizers import GGML, tokenizer_from_gguf
    from toolmem.models.interop.gguf import GGUFFile
    from toolmem.models.interop.gguf_models import config_of, tensors_of

    try:
        file = stack.enter_context(GGUFFile(path))
    except FileNotFoundError as error:
        raise ToolmemError(f"there is no file {path}") from error
    except ToolmemError:
        raise
    except (OSError, ValueError) as error:
        raise ToolmemError(f"cannot read {path}: {error}") from error
    config = config_of(file)
    tokenizer = tokenizer_from_gguf(file.metadata, config["vocab_size"], str(path))
    about = {"gguf_split": file.metadata.get(GGML + "pre")}
    name = file.metadata.get("general.name")
    name = name if isinstance(name, str) else path.stem
    return _portable(path, name, config, tensors_of(file, config), tokenizer.spec(), about)


@dataclass(frozen=True)
class Stowed:
    """A tensor in a safetensors file.

    Args:
        file: open.
        name: its name there.
    """

    file: TensorFile
    name: str

    @property
    def entry(self) -> Entry:
        """Where it lies."""
        return self.file.entries[self.name]

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.entry.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype."""
        found = dtypes().get(self.entry.dtype)
        if found is None or not found.is_floating_point:
            raise ToolmemError(
                f"{self.file.path}: the tensor {self.name} is of {self.entry.dtype}: quantised weights of "
                "other programs are not read here"
            )
        return found

    def read(self) -> Tensor:
        """Its elements."""
        return self.file.read(self.name)


def _from_huggingface(folder: Path, stack: ExitStack) -> Portable:
    from toolmem.data.pretrained_tokenizers import read_json, tokenizer_from_folder

    config = read_json(folder / CONFIG)
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, dict) else quantised
        raise ToolmemError(
            f"{folder}: its weights are quantised ({method}), which is not read here"
        )
    places = read_json(folder / INDEX).get("weight_map") or {WEIGHTS: WEIGHTS}
    if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
        raise ToolmemError(f"{folder / INDEX}: its weight_map does not name files")
    names = sorted(set(places.values()))
    tensors: dict[str, Lazy] = {}
    for name in names:
        path = folder / Path(name).name
        if not path.is_file():
            raise ToolmemError(
                f"{folder} has no {name}: weights are read from safetensors files ({WEIGHTS}, or those that "
                f"{INDEX} names)"
            )
        with explained(path):
            file = stack.enter_context(TensorFile(path))
        tensors |= {name: Stowed(file, name) for name in file.entries}
    vocab_size = _architecture(folder, config, tensors)[1]["vocab_size"]
    tokenizer = tokenizer_from_folder(folder, vocab_size)
    spec = {"type": "symbols", "vocab_size": vocab_size}
    if tokenizer is not None:
        spec = tokenizer.spec()
    about = {"generation": read_json(folder / "generation_config.json")}
    return _portable(folder, folder.name, config, tensors, spec, about)


def _architecture(
    path: Path, config: Mapping[str, Any], theirs: Collection[str]
) -> tuple[Architecture, dict[str, Any]]:
    """The architecture of a config, and options of ours, none of them beyond all measure."""
    from toolmem.models.interop.architectures import architecture_of

    architecture = architecture_of(config, str(path))
    limits = {"num_hidden_layers": len(theirs), "max_position_embeddings": LONGEST_CONTEXT}
    for key, most in limits.items():
        if isinstance(config.get(key), int | float) and config[key] > most:
            raise ToolmemError(f"{path}: its {key} is {config[key]:,}, and {most:,} are the most")
    return architecture, architecture.options(config, str(path))


def _portable(
    path: Path,
    name: str,
    config: dict[str, Any],
    theirs: Mapping[str, Lazy],
    tokenizer: dict[str, Any],
    about: dict[str, Any],
) -> Portable:
    from toolmem.models.interop.rules import take

    architecture, options = _architecture(path, config, theirs)
    spec: dict[str, Any] = {"class_path": architecture.class_path, "init_args": options}
    model = meta_model(spec, theirs.values(), path)
    shapes = {key: value.shape for key, value in model.state_dict().items()}
    tied = bool(spec["init_args"]["tie_embeddings"])

    def ignored(name: str) -> bool:
        return name.endswith("rotary_emb.inv_freq") or (tied and name == "lm_head.weight")

    rules = architecture.rules(model.init_args)
    tensors = take(rules, theirs, shapes, str(path), ignored)
    return Portable(
        name,
        {**spec, "init_args": dict(model.init_args)},
        {
            "tokenizer": tokenizer,
            "factbase": None,
            "setting": None,
            "pretrained": {"name": name, "model_type": config["model_type"], **about},
        },
        tensors,
        tied_names(model),
    )


@dataclass(frozen=True)
class _Held:
    """A tensor in memory."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def torch_dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> Tensor:
        return self.tensor


def _from_checkpoint(path: Path, stack: ExitStack) -> Portable:
    with explained(path):
        plain = merged(path)
        if plain is not None or (path.is_file() and is_torch_file(path)):  # in memory
            flat = flatten(plain or read(path, parts=("state_dict", KEY)))
            tensors: Mapping[str, Any] = {name: _Held(one) for name, one in flat.tensors.items()}
        else:
            stored = stack.enter_context(Stored(path))
            flat, tensors = Flat(stored.tree, stored.tensors), stored.tensors
        parts = {key: value for key, value in flat.tree.items() if key == KEY}
        about = about_of(unflatten(parts, lambda name: None), path)  # type: ignore[arg-type, return-value]
        places = {
            name.removeprefix(WEIGHTS_PREFIX): node["$tensor"]
            for name, node in flat.tree["state_dict"].items()
            if name.startswith(WEIGHTS_PREFIX)
        }
    first: dict[str, str] = {}
    ties = {}
    for name, place in places.items():
        if first.setdefault(place, name) != name:
            ties[name] = first[place]
    found = {name: tensors[place] for place, name in first.items()}
    known = about["data"].get("pretrained") or {}
    return Portable(str(known.get("name") or path.stem), about["model"], about["data"], found, ties)


def fetched(source: str) -> Path:
    """A folder, or one of the hub's models brought here.

    Raises:
        ToolmemError: when there is neither.
    """
    path = Path(source)
    if path.is_dir():
        return path
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ToolmemError(
            f"there is no folder {source}, and to fetch a model of that name the library huggingface_hub is "
            "needed: pip install 'toolmem[hub]'"
        ) from error
    try:
        return Path(
            snapshot_download(source, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
        )
    except Exception as error:  # of a dozen kinds: no such id, no network, no permission
        reason = (
            str(error).strip().splitlines()[0][:200] if str(error).strip() else type(error).__name__
        )
        raise ToolmemError(
            f"there is no folder {source}, and the hub gives no model of that name: {reason}"
        ) from error
