"""Architectures that other programs and ours have in common: Hugging Face's configs, our options, and names.

An `Architecture` reads a ``config.json`` as options of one of our classes, writes one of such options, and
knows which tensors are which (``rules.py``). What a config asks for and our model cannot do is refused by
name; so is an option of ours that a config has no word for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from toolmem.errors import ToolmemError
from toolmem.models.interop import llama, mamba
from toolmem.models.interop.rules import Rule

Options = dict[str, Any]
# Options that change nothing of what a trained model computes.
IMMATERIAL = frozenset({
    "initialization", "dropout", "max_seq_len", "dt_min", "dt_max", "kernel", "chunk_size",
    "multi_token_form", "multi_token_weight",
})  # fmt: skip


@dataclass(frozen=True)
class Architecture:
    """An architecture, by the name that a config's ``model_type`` gives it.

    Args:
        name: ``model_type``.
        theirs: the class of ``transformers`` that has the weights.
        class_path: of our model.
        read: a config as options of ours.
        write: the other way round; options are complete.
        rules: which tensors are which, by options.
    """

    name: str
    theirs: str
    class_path: str
    read: Callable[[Mapping[str, Any]], Options]
    write: Callable[[Mapping[str, Any]], dict[str, Any]]
    rules: Callable[[Mapping[str, Any]], list[Rule]]

    def options(self, config: Mapping[str, Any], where: str) -> Options:
        """A config as options of our class.

        Raises:
            ToolmemError: naming what our class cannot do, or what is missing.
        """
        try:
            return self.read(config)
        except ToolmemError as error:
            raise ToolmemError(f"{where}: {error}") from error
        except KeyError as error:
            raise ToolmemError(f"{where}: a config of {self.name} needs {error.args[0]}") from error
        except (TypeError, ValueError, ArithmeticError, AttributeError) as error:
            raise ToolmemError(f"{where}: a value of its config is of no use ({error})") from error

    def config(self, init_args: Mapping[str, Any]) -> dict[str, Any]:
        """Options of our class as a config.

        Raises:
            ToolmemError: naming an option that a config has no word for.
        """
        options = self._complete(init_args)
        config = {"model_type": self.name, "architectures": [self.theirs], **self.write(options)}
        back = self._complete(self.read(config))
        for key, value in options.items():
            if key not in IMMATERIAL and back[key] != value:
                raise ToolmemError(
                    f"a model of {key}: {value!r} cannot be written as {self.theirs}, which has no such "
                    "option"
                )
        return config

    def _complete(self, init_args: Mapping[str, Any]) -> Options:
        """All options, those left out or None as the class takes them."""
        import inspect

        from toolmem.class_path import import_class
        from toolmem.models.language_model import LanguageModel

        cls = import_class(self.class_path, "the model class", LanguageModel)
        options = {
            name: parameter.default
            for name, parameter in inspect.signature(cls.__init__).parameters.items()
            if name != "self"
        } | dict(init_args)
        return (mamba if "state_dim" in options else llama).complete(options)


TRANSFORMER = "toolmem.models.Transformer"
ARCHITECTURES: dict[str, Architecture] = {
    **{
        name: Architecture(name, cls, TRANSFORMER, llama.reader(name), llama.writer(name), llama.rules)
        for name, cls in {
            "llama": "LlamaForCausalLM",
            "mistral": "MistralForCausalLM",
            "qwen2": "Qwen2ForCausalLM",
            "qwen3": "Qwen3ForCausalLM",
            "smollm3": "SmolLM3ForCausalLM",
        }.items()
    },
    "mamba": Architecture(
        "mamba", "MambaForCausalLM", "toolmem.models.Mamba",
        mamba.read_mamba, mamba.write_mamba, mamba.mamba_rules,
    ),
    "mamba2": Architecture(
        "mamba2", "Mamba2ForCausalLM", "toolmem.models.Mamba2",
        mamba.read_mamba2, mamba.write_mamba2, mamba.mamba2_rules,
    ),
}  # fmt: skip


def architecture_of(config: Mapping[str, Any], where: str) -> Architecture:
    """The architecture of a config.

    Args:
        config: a ``config.json``.
        where: the file, for messages.

    Raises:
        ToolmemError: for one that there is not, naming it.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ToolmemError(
            f"{where}: models of architecture {name!r:.60} are not read here; there are "
            f"{', '.join(ARCHITECTURES)}. Any causal model of transformers generates by "
            "toolmem.models.interop.Adapter"
        )
    return ARCHITECTURES[name]


def architecture_for(
    class_path: str, init_args: Mapping[str, Any], like: str | None = None
) -> Architecture:
    """The architecture that a model of ours is written as.

    Args:
        class_path: of our model.
        init_args: its options.
        like: the ``model_type`` that it came as, which is tried first.

    Raises:
        ToolmemError: for a class or an option that no architecture has, naming it.
    """
    likely = [like] if like in ARCHITECTURES else []
    names = [*likely, *ARCHITECTURES]
    names = [name for name in names if ARCHITECTURES[name].class_path == class_path]
    if not names:
        raise ToolmemError(
            f"a {class_path} cannot be written in another program's form; a "
            f"{', '.join(sorted({one.class_path for one in ARCHITECTURES.values()}))} can"
        )
    first: ToolmemError | None = None
    for name in names:
        try:
            ARCHITECTURES[name].config(init_args)
        except ToolmemError as error:
            first = first or error
        else:
            return ARCHITECTURES[name]
    assert first is not None
    raise first
