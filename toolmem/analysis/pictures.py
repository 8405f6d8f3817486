"""Where pictures go: their files' endings, and writing one whole or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from toolmem.errors import ToolmemError
from toolmem.files import atomic_path, explain_os_error

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FORMATS = (".png", ".svg", ".pdf")


def picture_file(out: str | Path) -> Path:
    """The file that a picture is to be.

    Raises:
        ToolmemError: for an ending that no picture has.
    """
    path = Path(out)
    if path.suffix not in FORMATS:
        raise ToolmemError(f"out: {path} must end in {', '.join(FORMATS)}")
    return path


def save(figure: Figure, target: Path) -> Path:
    """Write a figure; return its file.

    Raises:
        ToolmemError: for a file that cannot be written.
    """
    try:
        with atomic_path(target) as temporary:
            figure.savefig(temporary, format=target.suffix[1:], dpi=130)
    except OSError as error:
        raise explain_os_error(error, target) from error
    return target
