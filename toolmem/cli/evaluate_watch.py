"""``toolmem evaluate --watch RUN``: a run's checkpoints evaluated as they come, by a process of its own."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from toolmem.cli.evaluate_parts import Parts
from toolmem.console import stderr, stdout
from toolmem.errors import ToolmemError
from toolmem.files import explain_os_error, write_json
from toolmem.models.kernel_choice import KernelChoice


def watch_run(
    watch: str,
    tasks: str = "recall",
    base: str | None = None,
    limit: int | None = None,
    n_shots: int | None = None,
    chat: bool | None = None,
    window: int | None = None,
    stride: int | None = None,
    n_questions: int = 1024,
    batch_size: int = 128,
    invariant: bool = False,
    every: float = 10.0,
    patience: float | None = None,
    once: bool = False,
    attention: KernelChoice = "auto",
    device: str = "cpu",
) -> None:
    """Evaluate a run's checkpoints as they come, beside training, which does not wait.

    Each step is evaluated once: what was found is in evaluations/ of the run's folder, STEP.csv with the
    numbers, STEP.json with intervals, STEP.TASK.answers.jsonl with every example. A call that was killed goes
    on from there; one with more tasks asks those alone. It ends when the run's last step is evaluated.

    Args:
        watch: the run's folder; it may not be there yet.
        tasks: as without --watch.
        base: as without --watch.
        limit: as without --watch.
        n_shots: as without --watch.
        chat: as without --watch.
        window: as without --watch.
        stride: as without --watch.
        n_questions: as without --watch.
        batch_size: as without --watch.
        invariant: as without --watch.
        every: seconds between two looks.
        patience: end after so many seconds without a new checkpoint; never by default.
        once: evaluate what is there, and end.
        attention: as without --watch.
        device: where the model runs.
    """
    from toolmem.evaluation.suite import Asking, parse_tasks

    if every <= 0 or min(n_questions, batch_size) < 1 or (limit is not None and limit < 1):
        raise ToolmemError(
            "--every must be above 0, --limit, --n_questions and --batch_size 1 or more"
        )
    asking = Asking(
        batch_size=batch_size,
        invariant=invariant,
        limit=limit,
        n_shots=n_shots,
        chat=chat,
        window=window,
        stride=stride,
    )
    watcher = Watcher(Path(watch), parse_tasks(tasks), asking, base, n_questions, attention, device)
    with watcher.alone():
        news = time.monotonic()
        while True:
            if watcher.look():
                news = time.monotonic()
                continue
            waited = time.monotonic() - news
            if once or watcher.ended() or (patience is not None and waited >= patience):
                return
            time.sleep(every)


class Watcher:
    """Evaluates what a run's folder has and was not evaluated yet.

    Args:
        run: its folder.
        specs: what is asked.
        asking: how.
        base: of divergence.
        n_questions: of recall.
        attention: what runs attention.
        device: where the model runs.
    """

    def __init__(
        self,
        run: Path,
        specs: Sequence[Any],
        asking: Any,
        base: str | None,
        n_questions: int,
        attention: KernelChoice,
        device: str,
    ) -> None:
        self.run = run
        self.folder = run / "evaluations"
        self.specs = list(specs)
        self.asking = asking
        self.base = base
        self.n_questions = n_questions
        self.attention = attention
        self.device = device
        self.keys = {spec.name: self._key(spec) for spec in self.specs}
        self._refused: dict[Path, tuple[int, int]] = {}  # what could not be read, as it then was

    def _key(self, spec: Any) -> str:
        """Of what a part asks, to know whether a step was asked it."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((spec, self.asking, self.base, self.n_questions)).encode())
        if spec.path is not None:
            try:
                digest.update(Path(spec.path).read_bytes())
            except OSError as error:
                raise ToolmemError(f"{spec.path} cannot be read: {error.strerror}") from error
        return digest.hexdigest()

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep a second process from watching the same run.

        Raises:
            ToolmemError: when there is one.
        """
        path = self.folder / ".watched"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "w") as stream:
                try:
                    fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise ToolmemError(
                        f"{self.run} is watched by another process: one is enough"
                    ) from None
                yield
        except OSError as error:
            raise explain_os_error(error, path) from error

    def look(self) -> bool:
        """Evaluate the first checkpoint that was not; whether there was one."""
        for path in self._checkpoints():
            mark = _mark(path)
            if mark is None or self._refused.get(path) == mark:
                continue
            try:
                step = _step(path)
                if step is not None and self._missing(step) and self._evaluate(path):
                    return True
            except ToolmemError as error:
                if _mark(path) == mark:  # else it was replaced meanwhile, or is gone
                    self._refused[path] = mark
                    stderr().print(f"passed over: {error}", highlight=False, soft_wrap=True)
        return False

    def _checkpoints(self) -> list[Path]:
        """What a run keeps by step, and the last; not the best, which training changes its mind about."""
        from toolmem.checkpoints import places

        try:
            return places.kept(self.run)
        except ToolmemError:  # there is none yet
            return []

    def _results(self, step: int) -> dict[str, Any]:
        path = self.folder / f"{step}.json"
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return found if isinstance(found.get("done"), dict) else {}
        except (OSError, ValueError, AttributeError):
            return {}

    def _missing(self, step: int) -> list[Any]:
        done = self._results(step).get("done", {})
        return [spec for spec in self.specs if done.get(spec.name) != self.keys[spec.name]]

    def _evaluate(self, path: Path) -> bool:
        from toolmem.evaluation.curves import write_point
        from toolmem.run import load

        run = load(path, attention=self.attention, device=self.device)
        step = run.checkpoint.step  # what was loaded: a newer one may have taken the name
        missing = self._missing(step)
        if not missing:
            return False
        others = [spec for spec in missing if spec.kind != "recall"]
        parts = Parts(
            run.model, run.tokenizer, step, others, self.asking,
            base=self.base if any(spec.kind == "divergence" for spec in others) else None,
        )  # fmt: skip
        stdout().print(f"step {step} ({path.name})", highlight=False)
        for spec in missing:
            ask: Callable[..., tuple[dict[str, Any], dict[str, float]]] = self._task
            found, metrics = (
                self._recall(run, step) if spec.kind == "recall" else ask(parts, spec, step)
            )
            results = self._results(step) or {"step": step, "done": {}, "tasks": {}}
            results["tasks"][spec.name] = found
            results["done"][spec.name] = self.keys[spec.name]
            write_point(self.run, step, metrics)
            write_json(self.folder / f"{step}.json", results)
        return True

    def _task(self, parts: Parts, spec: Any, step: int) -> tuple[dict[str, Any], dict[str, float]]:
        from toolmem.cli.evaluate_parts import show_part

        examples = parts.examples(spec)
        path = self.folder / f"{step}.{spec.name}.answers.jsonl"
        how = {"attention": self.attention, "device": self.device}
        with parts.answers_at(path, spec, examples, how) as answers:
            result = parts.ask(spec, examples, answers)
        show_part(result)
        return result.as_dict() | {"answers": path.name}, result.metrics()

    def _recall(self, run: Any, step: int) -> tuple[dict[str, Any], dict[str, float]]:
        from toolmem.cli.evaluate import measure, questions_of, recall_answers, show

        asked = questions_of(run, self.n_questions)
        how = {"batch_size": self.asking.batch_size, "invariant": self.asking.invariant}
        how |= {"attention": self.attention, "device": self.device}
        with recall_answers(self.folder / f"{step}.answers.jsonl", run, asked, how) as answers:
            results = measure(
                run, asked, self.asking.batch_size, self.asking.invariant, None, answers
            )
        show(results)
        metrics: dict[str, float] = {}
        for split, result in results.items():
            low, high = result.overall.interval
            name = f"recall_{split}/exact_match"
            metrics |= {name: result.exact_match, f"{name}/low": low, f"{name}/high": high}
        return {split: result.as_dict() for split, result in results.items()}, metrics

    def ended(self) -> bool:
        """Whether the run's last step is there and evaluated, as far as its config tells."""
        from toolmem.checkpoints import places
        from toolmem.recipe_files import get_key, read_mapping

        last = places.folder_of(self.run) / places.LAST
        config = self.run / "config.yaml"
        if not places.exists(last) or not config.is_file():
            return False
        total = get_key(read_mapping(config), "trainer.max_steps")
        step = _step(last)
        return isinstance(total, int) and step is not None and 0 < total <= step


def _mark(path: Path) -> tuple[int, int] | None:
    """What tells one file of a name from the next; None where there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_ino, stat.st_mtime_ns


def _step(path: Path) -> int | None:
    """The step of a checkpoint; None where it cannot be read, or is gone."""
    from toolmem import checkpoints

    try:
        step = checkpoints.read_state(path).get("global_step")
    except (ToolmemError, OSError):
        return None
    return step if isinstance(step, int) else None
