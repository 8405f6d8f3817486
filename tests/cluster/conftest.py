"""A real Slurm of one node, where it is installed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "sweeps"))

SCRIPT = Path(__file__).parent / "slurm.sh"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun")


@pytest.fixture(scope="session")
def real_slurm():
    """The environment of a Slurm of one node."""
    missing = [name for name in PROGRAMS if shutil.which(name) is None]
    if missing:
        pytest.skip(
            f"no {', '.join(missing)} here: a real Slurm (apt-get install slurmctld slurmd munge)"
        )
    if os.getuid() != 0:
        pytest.skip("a real Slurm: only root can start slurmd")
    folder = Path(tempfile.mkdtemp(prefix="toolmem-slurm-"))
    try:
        folder.chmod(0o755)  # munged is another user
        subprocess.run([SCRIPT, "start", folder], check=True, timeout=120)
        yield {"SLURM_CONF": str(folder / "slurm.conf")}
    finally:
        subprocess.run([SCRIPT, "stop", folder], check=True, timeout=120)
        shutil.rmtree(folder)
