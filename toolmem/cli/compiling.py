"""``--compile``: an engine that is compiled before it is asked, with a bar, its seconds told apart."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from toolmem.console import progress, stderr

if TYPE_CHECKING:
    from toolmem.generation import Engine
    from toolmem.run import Run


@contextmanager
def compiled_engine(run: Run, wanted: bool, **options: Any) -> Iterator[Engine | None]:
    """An engine over a run, compiled; None when that is not wanted.

    Args:
        run: whose model and tools.
        wanted: what the user said.
        options: of ``Engine``.

    Raises:
        ToolmemError: for a model that cannot be compiled.
    """
    if not wanted:
        yield None
        return
    from toolmem.generation import Engine

    with Engine(run.model, run.tokenizer, run.toolbox, compile=True, **options) as engine:
        with progress() as bar:
            task = bar.add_task("compiling", total=None)
            engine.warm_up(lambda done, total: bar.update(task, completed=done, total=total))
        stats = engine.stats()
        stderr().print(
            f"{stats.compilations} graphs compiled in {stats.compile_seconds:.1f} s",
            highlight=False,
        )
        yield engine
