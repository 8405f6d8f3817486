"""Settings of Lightning's Trainer that suit small models and endless streams of batches."""

from __future__ import annotations

from typing import Any

TRAINER_DEFAULTS: dict[str, Any] = {
    "max_epochs": -1,  # the stream has no end: max_steps is what ends a run
    "check_val_every_n_epoch": None,  # so val_check_interval counts batches
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 20,  # each logged step waits for the device and writes a row
    "use_distributed_sampler": False,  # loaders shard by themselves
    "enable_model_summary": False,
}
