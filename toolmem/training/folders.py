"""A run's folder: what lies in it, and how a run finds its own checkpoint again.

runs/NAME/
  config.yaml        complete, reruns as it is
  environment.json   versions and hardware (an allow-list: nothing of the user's environment)
  metrics.csv        every metric by step
  checkpoints/       last.ckpt, best.ckpt; each rebuilds its model alone
  samples/           dialogues that the model had while it was trained
  evaluations/       each question's outcome, a file a round
  facts.duckdb       the facts it was trained on, for the tool
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from lightning.pytorch.utilities import rank_zero_only

from toolmem import checkpoints
from toolmem.errors import ToolmemError
from toolmem.files import explain_os_error, remove_unfinished, write_json

PACKAGES = (
    "toolmem",
    "torch",
    "lightning",
    "torchmetrics",
    "jsonargparse",
    "tokenizers",
    "duckdb",
    "jinja2",
    "numpy",
    "pyarrow",
)

OWN_FILES = ["config.yaml", "environment.json", "facts.duckdb"]  # written before the first step


def environment() -> dict[str, Any]:
    """Versions and hardware that a result depends on."""
    import torch

    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processor": processor_name(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "gpus": gpus,
        "packages": versions,
    }


def processor_name() -> str:
    """The processor's own name where Linux tells it."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@dataclass(frozen=True)
class RunFolder:
    """One run's folder.

    Args:
        path: ``runs/NAME``.
    """

    path: Path

    @classmethod
    def of(cls, runs: str | Path, name: str) -> RunFolder:
        """The folder of a run.

        Args:
            runs: the folder of all runs.
            name: the run's name; slashes make folders within ``runs``.

        Raises:
            ToolmemError: for a name that is empty, or leads out of ``runs``.
        """
        parts = Path(name).parts
        if not parts or ".." in parts or Path(name).is_absolute() or "\0" in name:
            raise ToolmemError(
                f"name: {name!r} is not the name of a folder within {runs}: choose another --name; "
                "--runs says where all runs are kept"
            )
        return cls(Path(runs) / name)

    def checkpoint_to_resume(
        self, ckpt_path: str | None, resume: Literal["auto", "never"]
    ) -> str | None:
        """The checkpoint that training starts from; None starts anew.

        Of the run's own it is the newest that is whole: a damaged one is put aside, with a warning.

        Args:
            ckpt_path: what the user named: a file, a run's folder, ``last``, or nothing.
            resume: ``auto`` goes on where the run stopped; ``never`` refuses to touch a run that exists.

        Raises:
            ToolmemError: when the named file is missing, the run exists and was not to be resumed, or all
                its checkpoints are damaged.
        """
        if ckpt_path not in (None, "last"):
            return str(checkpoints.resolve(str(ckpt_path)))
        if ckpt_path == "last" or resume == "auto":
            found = checkpoints.newest_intact(self.path)
            return None if found is None else str(found)
        if not any((self.path / "checkpoints").glob("*.ckpt")):
            return None
        raise ToolmemError(
            f"the run {self.path} exists already: go on with it by --resume auto, or give this one "
            "another --name"
        )

    def contents(self) -> set[Path]:
        """Everything in the folder, itself included; nothing when it does not exist."""
        return {self.path, *self.path.rglob("*")} if self.path.is_dir() else set()

    def take_back(self, before: set[Path]) -> None:
        """Remove what a run that never trained has written; one that trained keeps everything.

        Args:
            before: the folder's `contents` when the run began.
        """
        new = sorted(
            self.contents() - before, reverse=True
        )  # what lies within a folder comes first
        if any(path.suffix == ".ckpt" or path.name == "metrics.csv" for path in new):
            return
        for path in new:
            if path.is_dir():
                with contextlib.suppress(OSError):  # not empty: something of another's
                    path.rmdir()
            elif path.name in OWN_FILES:
                path.unlink()

    def prepare(self) -> None:
        """Make the folder, and find out now whether it can be written.

        Raises:
            ToolmemError: when it cannot.
        """
        try:
            (self.path / "checkpoints").mkdir(parents=True, exist_ok=True)
        except FileExistsError as error:
            raise ToolmemError(
                f"{self.path} is a file, not a run's folder: choose another --name or --runs"
            ) from error
        except OSError as error:
            raise explain_os_error(error, self.path) from error
        if getattr(rank_zero_only, "rank", 0) == 0:  # of all processes, whoever started them
            remove_unfinished(self.path / "checkpoints")
            write_json(self.path / "environment.json", environment())
