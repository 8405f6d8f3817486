"""What every test shares: one thread a process, no network, no colour."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("WANDB_MODE", "offline")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("NO_COLOR", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parent.parent.parent / "shared"


@pytest.fixture
def shared_data() -> Path:
    """The folder of real data beside the checkout; tests that want it skip by name without it."""
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("shared data folder is not beside this checkout: real-data test passed over")
    return folder


@pytest.fixture(autouse=True)
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as GGUF; tests that want it skip, with the reason, where it cannot be had."""
    import smollm2

    try:
        return smollm2.gguf()
    except RuntimeError as error:
        pytest.skip(f"SmolLM2 is not at hand: {error}")


@pytest.fixture(scope="session")
def smollm2_checkpoint(smollm2_gguf: Path) -> Path:
    """It as a checkpoint, converted once."""
    import smollm2

    return smollm2.checkpoint()
