"""Single-file checkpoints into a model that is split over ranks."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from toolmem import checkpoints
from toolmem.training import compatibility

if TYPE_CHECKING:
    from toolmem.training.module import LanguageModelModule


def read_single_files(module: LanguageModelModule, strategy: Any) -> None:
    """Let a strategy go on from files that any run wrote, in one process or many.

    Lightning's own way takes optimizer states by the order of the model's parameters, which in a file of
    one process is that of the optimizer's groups.

    Args:
        module: split over ranks.
        strategy: Lightning's ``ModelParallelStrategy``.
    """
    if "load_checkpoint" not in vars(strategy):
        strategy.load_checkpoint = partial(_load, module, strategy, strategy.load_checkpoint)


def _load(
    module: LanguageModelModule,
    strategy: Any,
    distributed: Callable[..., dict[str, Any]],
    checkpoint_path: str | Path,
    weights_only: bool | None = None,
) -> dict[str, Any]:
    """Load a file on every rank, each of which keeps its pieces; a folder as Lightning does.

    Raises:
        ToolmemError: for a file that cannot be read, or is of another model.
    """
    path = Path(strategy.broadcast(str(checkpoint_path)))
    if path.is_dir():
        return distributed(path, weights_only=weights_only)
    checkpoint = checkpoints.read(path)
    about = checkpoints.about_of(checkpoint, path)
    compatibility.check(about, module._about(), path, training=False)
    module.load_state_dict(checkpoint["state_dict"], strict=module.strict_loading)
    for optimizer, state in zip(
        strategy.optimizers, checkpoint.get("optimizer_states", ()), strict=False
    ):
        optimizer.load_state_dict(state)
    return checkpoint
