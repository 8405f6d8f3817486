"""Memory that is logged."""

import pytest
import torch
from training_toys import ToyData, make_batch, make_module, make_trainer

from toolmem.models.activation_memory import kept_for_backward
from toolmem.models.recompute import ActivationCheckpointing
from toolmem.training.callbacks import MemoryUse


def growing(index: int):
    return make_batch(index, rows=2 + min(index, 3), seq=5)


def logged(folder, **options):
    module = make_module(fused=False, **options)
    make_trainer(folder, 6, callbacks=[MemoryUse()], log_every_n_steps=3).fit(
        module, ToyData(growing)
    )
    return module


def test_what_the_largest_batch_keeps_is_logged(tmp_path):
    module = logged(tmp_path)
    step, found = module.reported["memory/activation_bytes"]
    tokens = torch.zeros(5, 5, dtype=torch.int64)
    with kept_for_backward(*module.model.parameters(), *module.model.buffers(), tokens) as kept:
        kept.note(module.model.train().hidden(tokens))
    assert (step, found) == (6, kept.n_bytes)
    less = logged(tmp_path, activation_checkpointing=ActivationCheckpointing("blocks"))
    assert less.reported["memory/activation_bytes"][1] < found / 2


def test_the_peak_is_the_process_s(tmp_path):
    resource = pytest.importorskip("resource", reason="a process's peak is Unix's to tell")
    module = logged(tmp_path)
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found = module.reported["memory/peak_bytes"][1]
    assert 0.5 * highest < found <= 1.02 * highest  # the two counts lag behind each other
