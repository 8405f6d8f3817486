"""Tasks and texts of ``toolmem evaluate``: asked, told, and written beside the results."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import toolmem
from toolmem.console import progress, stdout
from toolmem.errors import ToolmemError

if TYPE_CHECKING:
    from toolmem.data.tokenizers import Tokenizer
    from toolmem.evaluation.answers import Answers
    from toolmem.evaluation.divergence import Base
    from toolmem.evaluation.examples import Examples
    from toolmem.evaluation.suite import Asking, PartResult, TaskSpec
    from toolmem.models import LanguageModel


class Parts:
    """What is asked of one checkpoint beside recall, read before anything is run.

    Args:
        model: in evaluation mode.
        tokenizer: the model's.
        step: optimizer steps that it had behind it.
        specs: which parts.
        asking: how.
        base: of divergence: a checkpoint, or what ``store_base`` wrote.

    Raises:
        ToolmemError: for files that are empty or malformed, naming row and field.
    """

    def __init__(
        self,
        model: LanguageModel,
        tokenizer: Tokenizer,
        step: int,
        specs: Sequence[TaskSpec],
        asking: Asking,
        base: str | None = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.step = step
        self.specs = list(specs)
        self.asking = asking
        self._base = base
        diverging = [spec for spec in specs if spec.kind == "divergence"]
        if base is not None and not diverging:
            raise ToolmemError("--base is of divergence: add divergence=TEXT to --tasks")

    @cached_property
    def base(self) -> Base | None:
        """What divergence is from."""
        if self._base is None:
            return None
        from toolmem import checkpoints
        from toolmem.data.tokenizers import same_ids
        from toolmem.evaluation.divergence import BaseFile, BaseModel

        if self._base.endswith(".safetensors"):
            return BaseFile(self._base)
        loaded = checkpoints.load(self._base, self.model.embedding.weight.device)
        if not same_ids(loaded.tokenizer.spec(), self.tokenizer.spec()):
            raise ToolmemError(
                f"--base: {loaded.path} has another tokenizer than the checkpoint: next tokens of two "
                "vocabularies cannot be compared"
            )
        loaded.model.use_attention(self.model.attention_kernel)
        return BaseModel(loaded.model, invariant=self.asking.invariant)

    def store_base(self, path: str, top_k: int) -> None:
        """Keep this model's likeliest tokens over the text of divergence.

        Raises:
            ToolmemError: when there is none.
        """
        from toolmem.evaluation.divergence import write_base
        from toolmem.evaluation.suite import text_of

        spec = next((spec for spec in self.specs if spec.kind == "divergence"), None)
        if spec is None:
            raise ToolmemError("--store_base: of which text? Add divergence=TEXT to --tasks")
        text = text_of(spec, self.model, self.tokenizer, self.asking)
        write_base(path, text, self.model, min(top_k, self.model.vocab_size))

    def examples(self, spec: TaskSpec) -> Examples:
        """What a part asks."""
        from toolmem.evaluation.suite import make_examples

        return make_examples(spec, self.model, self.tokenizer, self.asking, self.base)

    def measure(
        self, specs: Sequence[TaskSpec], out: Path | None, how: Mapping[str, Any], show: bool = True
    ) -> dict[str, Any]:
        """Ask parts one after the other.

        Args:
            specs: which.
            out: the file of results, beside which answers are kept; None keeps none.
            how: circumstances that decide the answers, beside those of ``asking``.
            show: print a table.

        Returns:
            plain data by name.
        """
        found: dict[str, Any] = {}
        prepared = [(spec, self.examples(spec)) for spec in specs]
        for spec, examples in prepared:
            with contextlib.ExitStack() as stack:
                answers = None
                if out is not None:
                    answers = stack.enter_context(self.answers(out, spec, examples, how))
                result = self.ask(spec, examples, answers)
            if show:
                show_part(result)
            found[spec.name] = result.as_dict()
            if answers is not None:
                found[spec.name]["answers"] = answers.path.name
        return found

    def ask(self, spec: TaskSpec, examples: Examples, answers: Answers | None) -> PartResult:
        """Ask one part, with a bar."""
        from toolmem.evaluation.suite import measure_part

        with progress() as bar:
            task = bar.add_task(spec.name, total=len(examples))
            return measure_part(
                spec,
                examples,
                self.asking,
                answers=answers,
                advance=lambda n: bar.advance(task, n),
            )

    @cached_property
    def _weights(self) -> str:
        from toolmem.evaluation.answers import weights_digest

        return weights_digest(self.model)

    def answers(
        self, out: Path, spec: TaskSpec, examples: Examples, how: Mapping[str, Any]
    ) -> Answers:
        """The file of a part's answers beside a file of results, taken up where there are no results yet."""
        path = out.with_name(f"{out.stem}.{spec.name}.answers.jsonl")
        if out.exists():  # a call that came to its end wrote it: this is another
            path.unlink(missing_ok=True)
        return self.answers_at(path, spec, examples, how)

    def answers_at(
        self, path: Path, spec: TaskSpec, examples: Examples, how: Mapping[str, Any]
    ) -> Answers:
        """A file of a part's answers, taken up where it is about the same."""
        from toolmem.evaluation.answers import Answers

        about = {
            "step": self.step,
            "weights": self._weights,
            "part": spec.name,
            "asked": examples.digest(),
            "base": self._base,
            "toolmem": toolmem.__version__,
            "batch_size": self.asking.batch_size,
            "invariant": self.asking.invariant,
        }
        return Answers(path, about | dict(how))


def show_part(result: PartResult) -> None:
    """Print a part's measures."""
    from rich.table import Table

    of = f"{len(result.rows)} {'windows' if 'document' in result.rows[0] else 'questions'}"
    table = Table(title=f"{result.name} ({of}, 95 % interval)")
    table.add_column("measure")
    table.add_column("value", justify="right")
    table.add_column("interval", justify="right")
    for number, (name, one) in enumerate(result.estimates.items()):
        style = "bold" if number == 0 else ""
        table.add_row(name, f"{one.value:.4g}", f"{one.low:.4g}–{one.high:.4g}", style=style)
    stdout().print(table)
