"""A trained run in three lines: load it, ask it, look at what it said.

run = toolmem.load("runs/demo/in_tool")
reply = run.ask("When was Ann Smith born?")
print(reply.answer)
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from toolmem import checkpoints
from toolmem.checkpoints import LoadedCheckpoint
from toolmem.data.dialogues import Dialogue, TemplateSet
from toolmem.data.factbase import Factbase
from toolmem.data.text.token_table import prompt_tokens
from toolmem.data.turn_format import turn_format
from toolmem.errors import ToolmemError
from toolmem.generation import Engine, Generated, Greedy, Ranks, Request, Sampler, generate, stream
from toolmem.generation.reference import check_all
from toolmem.generation.turns import split_turns
from toolmem.tools import Toolbox, open_toolbox

if TYPE_CHECKING:
    import torch

    from toolmem.generation import Event
    from toolmem.models.kernel_choice import KernelChoice

FACTBASE = "facts.duckdb"


class Reply(NamedTuple):
    """What a model said to a question.

    Args:
        answer: its last turn.
        dialogue: (role, text) of every turn, the question, queries and tool answers among them.
    """

    answer: str
    dialogue: list[tuple[str, str]]


class Run:
    """A trained model with its tokenizer and, when it asks a database, its tools.

    Args:
        checkpoint: the model, rebuilt.
        factbase: the DuckDB file that its queries go to; None when there is none.
    """

    def __init__(self, checkpoint: LoadedCheckpoint, factbase: Path | None) -> None:
        self.checkpoint = checkpoint
        self.model = checkpoint.model
        self.tokenizer = checkpoint.tokenizer
        self.factbase = factbase
        self._toolbox: Toolbox | None = None

    @property
    def toolbox(self) -> Toolbox | None:
        """The tools that the model was trained with: None for an in-weight model.

        Raises:
            ToolmemError: when it needs a factbase and there is none.
        """
        if self.checkpoint.data.get("setting") != "in_tool":
            return None
        if self._toolbox is None:
            if self.factbase is None:
                raise ToolmemError(
                    f"{self.checkpoint.path} asks a database, and its run's folder has no {FACTBASE}: "
                    "name one by --factbase FILE, or build it with `toolmem facts build`"
                )
            self._toolbox = open_toolbox(self.checkpoint.data.get("tools"), self.factbase)
        return self._toolbox

    def questions(self, split: str, n: int, seed: int = 0) -> list[Dialogue]:
        """Up to ``n`` questions about people of the factbase, as it is now.

        Args:
            split: ``known`` (in training) or ``unseen``.
            n: how many.
            seed: which.

        Raises:
            ToolmemError: when the run was not trained on facts, or there is no factbase.
        """
        templates = self.checkpoint.data.get("templates")
        if templates is None:
            raise ToolmemError(
                f"{self.checkpoint.path} was not trained on facts: it has no questions"
            )
        if self.factbase is None:
            raise ToolmemError(
                f"the run of {self.checkpoint.path} has no {FACTBASE}: name one by --factbase FILE"
            )
        with Factbase.open(self.factbase) as factbase:
            people = factbase.population() if split == "known" else factbase.unseen_population()
        if people is None:
            return []
        first = templates[0]  # recall is asked by the first set's questions
        table = TemplateSet.load(first["name"], first["query"]).questions(people)
        return [table.dialogue(int(index)) for index in table.sample(n, seed=seed)]

    def prompt(self, question: str) -> list[int]:
        """A question's tokens, up to where the assistant begins to speak."""
        try:
            turn_format(self.tokenizer)
        except ToolmemError as error:
            raise ToolmemError(
                f"{self.checkpoint.path} was not trained on dialogues: it takes no question ({error})"
            ) from error
        return prompt_tokens(question, self.tokenizer)

    def ask(
        self,
        question: str,
        *,
        sampler: Sampler | None = None,
        max_new_tokens: int = 256,
        seed: int = 0,
    ) -> Reply:
        """Ask one question.

        Args:
            question: what the user says.
            sampler: how tokens are chosen; greedily when None.
            max_new_tokens: tokens that the model may write.
            seed: of its samples.

        Returns:
            the answer and the whole dialogue.
        """
        [generated] = self.ask_many(
            [question], sampler=sampler, max_new_tokens=max_new_tokens, seed=seed
        )
        check_all([generated])
        return self.reply(generated)

    def ask_many(
        self,
        questions: Sequence[str],
        *,
        sampler: Sampler | None = None,
        max_new_tokens: int = 256,
        seed: int | Sequence[int] = 0,
    ) -> list[Generated]:
        """Ask many questions at once; arguments as `ask`. `reply` makes each readable."""
        return generate(
            self.model,
            self.tokenizer,
            [self.prompt(question) for question in questions],
            toolbox=self.toolbox,
            max_new_tokens=max_new_tokens,
            sampler=sampler,
            seed=seed,
        )

    def ask_each(
        self,
        questions: Sequence[str],
        *,
        sampler: Sampler | None = None,
        max_new_tokens: int = 256,
        seed: int | Sequence[int] = 0,
        ahead: int = 1024,
        ranks: Ranks | None = None,
        engine: Engine | None = None,
    ) -> Iterator[Generated]:
        """Ask many questions, and yield each dialogue, in order, when all before it are at their end.

        One that fails comes with ``error`` as its reason to finish.

        Args:
            questions: what the user says in each.
            sampler: how tokens are chosen; greedily when None.
            max_new_tokens: tokens that the model may write in each.
            seed: question i samples by seed + i; or one seed a question.
            ahead: questions under way or waiting to be yielded.
            ranks: processes (``Run.ranks``) that answer in this one's stead, all asked at once.
            engine: over this run's model and tools, asked in the place of one of its own.
        """
        seeds = range(seed, seed + len(questions)) if isinstance(seed, int) else seed
        requests = (
            Request(
                self.prompt(question),
                max_new_tokens=max_new_tokens,
                sampler=sampler or Greedy(),
                seed=own,
            )
            for own, question in zip(seeds, questions, strict=True)
        )
        if ranks is not None:
            yield from ranks.each(list(requests))
            return
        if engine is not None:
            yield from engine.each(requests, ahead=ahead)
            return
        with Engine(self.model, self.tokenizer, self.toolbox) as own_engine:
            yield from own_engine.each(requests, ahead=ahead)

    def ranks(self, n: int, **options: Any) -> Ranks:
        """Start processes that load this run's checkpoint and generate together; close them after use.

        Args:
            n: processes; torch's threads are shared out among them.
            options: of each one's ``Engine``.
        """
        kernel, device = self.model.attention_kernel, str(self.model.embedding.weight.device)
        opened = partial(_open_engine, self.checkpoint.path, self.factbase, kernel, device, options)
        return Ranks(opened, n)

    def reply(self, generated: Generated) -> Reply:
        """A generated dialogue as text."""
        turns = split_turns(generated.tokens, self.tokenizer)
        return Reply(turns[-1][1] if turns else "", turns)

    def stream(
        self,
        question: str,
        *,
        sampler: Sampler | None = None,
        max_new_tokens: int = 256,
        seed: int = 0,
        engine: Engine | None = None,
    ) -> Iterator[tuple[int, int]]:
        """(token, role code) as they come, after the prompt; arguments as `ask` and `ask_each`."""
        prompt = self.prompt(question)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
        if engine is not None:
            events: Iterable[Event] = engine.submit(
                Request(prompt, sampler=sampler or Greedy(), **options)
            )
        else:
            options |= {"toolbox": self.toolbox, "sampler": sampler}
            events = stream(self.model, self.tokenizer, prompt, **options)
        for event in events:
            yield event.token, event.role


def _open_engine(
    path: Path,
    factbase: Path | None,
    attention: KernelChoice,
    device: str,
    options: dict[str, Any],
    rank: int,
) -> Engine:
    """A rank's engine over a run."""
    if device.startswith("cuda"):
        import torch

        device = f"cuda:{rank % torch.cuda.device_count()}"
    run = load(
        path, factbase=factbase, allow_other_factbase=True, attention=attention, device=device
    )
    return Engine(run.model, run.tokenizer, run.toolbox, **options)


def load(
    path: str | Path,
    *,
    factbase: str | Path | None = None,
    allow_other_factbase: bool = False,
    attention: KernelChoice = "auto",
    device: torch.device | str = "cpu",
) -> Run:
    """Load a trained run.

    Args:
        path: a run's folder, or a checkpoint file.
        factbase: where queries go; ``facts.duckdb`` in the run's folder when None.
        allow_other_factbase: accept one whose facts are not those of training.
        attention: what runs it, as ``LanguageModel.use_attention``.
        device: where to put the model.

    Raises:
        ToolmemError: no or a damaged checkpoint, or a factbase that is missing or another one.
    """
    checkpoint = checkpoints.load(path, device)
    checkpoint.model.use_attention(attention)
    if factbase is None:
        beside = checkpoints.run_folder(path) / FACTBASE
        return Run(checkpoint, beside if _matches(checkpoint, beside) else None)
    file = Path(factbase)
    trained = (checkpoint.data.get("factbase") or {}).get("fingerprint")
    with Factbase.open(file) as opened:
        found = opened.fingerprint
    if trained is not None and found != trained and not allow_other_factbase:
        raise ToolmemError(
            f"{file} holds other facts (fingerprint {found[:12]}) than {checkpoint.path} was trained on "
            f"({trained[:12]}): use the run's own {FACTBASE}, or pass --allow_other_factbase true"
        )
    return Run(checkpoint, file)


def _matches(checkpoint: LoadedCheckpoint, file: Path) -> bool:
    if not file.is_file():
        return False
    trained = (checkpoint.data.get("factbase") or {}).get("fingerprint")
    with Factbase.open(file) as opened:
        found = opened.fingerprint
    if trained is not None and found != trained:
        raise ToolmemError(
            f"{file} holds other facts (fingerprint {found[:12]}) than {checkpoint.path} was trained on "
            f"({trained[:12]}): build it again as it was, or name another by --factbase FILE"
        )
    return True
