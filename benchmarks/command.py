"""What the benchmark scripts share: their options, what is said of the machine, the file of figures."""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

from toolmem.training.folders import processor_name


def arguments(
    doc: str | None, quick: str = "rough figures within 40 seconds"
) -> argparse.ArgumentParser:
    """A parser with ``--quick`` and ``--json``.

    Args:
        doc: the script's docstring; its first line is the description.
        quick: what ``--quick`` does.
    """
    parser = argparse.ArgumentParser(description=(doc or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--json", metavar="FILE", help="write the figures there")
    return parser


def about(quick: bool) -> dict[str, Any]:
    """Where figures were measured."""
    return {
        "processor": processor_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "quick": quick,
    }


def write(result: Any, options: argparse.Namespace) -> None:
    """Write the figures to ``--json``, if that was asked for."""
    if options.json:
        Path(options.json).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
