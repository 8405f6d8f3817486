"""Memory and communication on paper, against what a process really takes and sends."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from training_toys import tiny

from toolmem.models import Transformer
from toolmem.training import AdamW, Muon
from toolmem.training.memory_plan import Layout, MemoryPlan, Step, cache_bytes, layouts

# So that a process holds what it uses: glibc would keep freed memory for later.
GIVE_BACK = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "OMP_NUM_THREADS": "1",
}
CASES = ["adamw", "blocks", "selective", "muon, large weights", "bfloat16", "mamba2", "experts"]


def model(**changes):
    options = {"dim": 32, "n_layers": 4, "n_heads": 4, "hidden_dim": 64, "max_seq_len": 64}
    return Transformer(64, **(options | changes)).train()


def plan(made=None, optimizer=None, **step):
    options = {"rows": 4, "seq": 32, "loss_tokens": 128} | step
    return MemoryPlan(made or model(), optimizer or AdamW(), Step(**options))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="a process's peak is read from Linux's /proc")
@pytest.mark.parametrize("case", CASES)
def test_a_process_takes_what_the_plan_says(case):
    script = Path(__file__).parent / "measured_memory.py"
    done = subprocess.run(
        [sys.executable, str(script), case],
        env=os.environ | GIVE_BACK, capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["planned"] == pytest.approx(found["measured"], rel=0.15), found


def test_what_lasts_is_arithmetic():
    made = model()
    n = sum(p.numel() for p in made.parameters())
    memory = plan(made).memory(Layout())
    assert (memory.parameters, memory.gradients, memory.optimizer) == (4 * n, 4 * n, 8 * n)
    matrices = sum(p.numel() for p in made.blocks.parameters() if p.ndim == 2)
    assert plan(made, Muon()).memory(Layout()).optimizer == 8 * n - 4 * matrices


def test_ddp_copies_and_fsdp_shares():
    made = model()
    n = sum(p.numel() for p in made.parameters())
    copied = plan(made).memory(Layout(8))
    assert (copied.parameters, copied.gradients, copied.gathered) == (4 * n, 8 * n, 0)
    spread = plan(made).memory(Layout(8, sharded=True))
    assert (spread.parameters, spread.gradients, spread.optimizer) == (n / 2, n / 2, n)
    block = sum(p.numel() for p in made.blocks[0].parameters())
    outside = n - 4 * block
    assert spread.gathered == 4 * (outside + 2 * block) + 4 * max(outside, block)


def test_tensor_parallelism_splits_the_inside_of_branches():
    made = model()
    whole, halved = (plan(made).memory(Layout(tensor=size)) for size in (1, 2))
    norms = sum(p.numel() for name, p in made.named_parameters() if p.ndim == 1)
    n = sum(p.numel() for p in made.parameters())
    assert halved.parameters == 4 * (norms + (n - norms) / 2)
    assert whole.activations / 2 < halved.activations < whole.activations
    by_tokens = plan(made).memory(Layout(tensor=2, sequence_parallel=True))
    assert by_tokens.activations == whole.activations / 2


def test_communication_is_that_of_rings():
    made = model()
    n = sum(p.numel() for p in made.parameters())
    block = sum(p.numel() for p in made.blocks[0].parameters())
    assert plan(made).communication(Layout()) == 0
    # an all-reduce sends each number twice, but for a device's own share
    assert plan(made, micro_batches=3).communication(Layout(8)) == 2 * 4 * n * 7 / 8
    sent = plan(made, micro_batches=3).communication(Layout(8, sharded=True))
    assert sent == 3 * 4 * (n + 4 * block + n) * 7 / 8
    narrow = plan(made, dtype=torch.bfloat16, param_dtype=torch.bfloat16)
    assert narrow.communication(Layout(8, sharded=True)) == (2 * (n + 4 * block) + 4 * n) * 7 / 8
    stream, logits = 4 * 4 * 32 * 32, 4 * 128 * 64
    sent = plan(made).communication(Layout(tensor=2))
    assert sent == (2 * (2 * 8 + 2) * stream + 2 * logits) / 2


def test_the_most_rows_fit_and_more_do_not():
    made = model()
    for layout in (Layout(), Layout(8), Layout(4, 2, sharded=True), Layout(checkpointing="blocks")):
        memory = 4e6
        rows = plan(made).most_rows(layout, memory)
        assert rows > 0 and rows % layout.data == 0
        for more, fits in ((0, True), (layout.data, False)):
            step = plan(made, rows=rows + more, loss_tokens=32 * (rows + more))
            assert (step.memory(layout).total <= memory) == fits
    assert plan(made).most_rows(Layout(), 1000) == 0


def test_rows_are_over_all_devices():
    made = model()
    whole = plan(made, rows=8, loss_tokens=256).memory(Layout(1))
    split = plan(made, rows=8, loss_tokens=256).memory(Layout(4))
    assert split.activations == whole.activations / 4 and split.logits == whole.logits / 4
    uneven = plan(made, rows=9, loss_tokens=288).memory(Layout(4))
    assert uneven.logits == 3 * 32 * 64 * 4 * 3  # one device has three of the nine
    sharing = plan(made, rows=8, loss_tokens=256).memory(Layout(1, 4))
    assert sharing.logits == whole.logits


def test_layouts_are_those_that_the_model_can_have():
    found, refused = layouts(model(n_heads=6, dim=48, hidden_dim=96), 8)
    assert [layout.name for layout in found] == ["DDP 8", "FSDP2 8", "TP 2 x FSDP2 4"]
    assert "n_heads" in refused[4] and "n_heads" in refused[8]
    assert [layout.name for layout in layouts(tiny(), 1)[0]] == ["1 device"]


def test_the_cache_of_lanes():
    assert (
        cache_bytes(model(), 3, 10) >= 3 * 10 * 4 * 2 * 32 * 4
    )  # layers, keys and values, dim, bytes


def test_the_model_is_left_as_it_was():
    made = model()
    before = {name: p.clone() for name, p in made.state_dict().items()}
    plan(made).memory(Layout(checkpointing="selective"))
    assert all("forward" not in vars(block) for block in made.blocks)
    assert all(torch.equal(made.state_dict()[name], value) for name, value in before.items())


def test_of_many_logits_a_chunk_s_are_held():
    made = Transformer(49152, 8, n_layers=1, n_heads=2, max_seq_len=512)
    few, many = (
        plan(made, rows=rows, seq=512, loss_tokens=512 * rows).memory(Layout()).logits
        for rows in (2, 8)
    )
    assert few == 3 * 4 * 2 * 512 * 49152
    assert many == 2 * 4 * (2**24 // 49152) * 49152 < few
    split = plan(made, rows=8, seq=512, loss_tokens=512 * 8).memory(Layout(tensor=2))
    assert split.logits > many  # a head that is split has all of them
