"""Ranks that share every layer write what one process writes, each with its heads' share of the cache."""

import random
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_engine import ROLES, TOKENIZER, Count, assert_equal, ragged_prompts, random_model

from toolmem.errors import ToolmemError
from toolmem.generation import (
    Engine,
    Request,
    Sampling,
    SharedToolbox,
    generate_in_lockstep,
)
from toolmem.models import RNN, Hybrid, LinearAttention, Mamba2, MoETransformer, Transformer

PROMPTS = ragged_prompts(12)
SIZES = {"vocab_size": 260, "dim": 32, "n_layers": 2, "max_seq_len": 120}
MODELS = {
    "gqa": lambda: random_model(0, n_kv_heads=2, conv_width=3),
    "mla": lambda: Transformer(**SIZES, n_heads=4, attention="mla"),
    "window": lambda: Transformer(**SIZES, n_heads=4, window=[9, 0], qk_norm=True),
    "moe": lambda: MoETransformer(**SIZES, n_heads=4, n_experts=4, top_k=2),
    "mamba2": lambda: Mamba2(**SIZES, head_dim=16),
    "mingru": lambda: RNN(**SIZES, cell="mingru"),
    "gated": lambda: LinearAttention(**SIZES, n_heads=4),
    "hybrid": lambda: Hybrid(
        **SIZES,
        pattern=["mamba2", "attention"],
        mixers={"attention": {"n_heads": 4}, "mamba2": {"head_dim": 16}},
    ),
}
# what has a cache of heads, and how little room makes the engine page out
PAGED = {"gqa", "window", "hybrid"}


class Slow(Count):
    """Answers after a while that differs from call to call, and from rank to rank."""

    def call_many(self, texts):
        time.sleep(random.random() / 50)
        return super().call_many(texts)


def made(kind):
    torch.manual_seed(0)
    model = MODELS[kind]().eval()
    if kind != "gqa":
        with torch.no_grad():  # it likes to call and to end
            model.head.weight[ROLES["database"]] *= 2.5
            model.head.weight[ROLES["end"]] *= 2
    return model


def requests():
    samplers = [None, Sampling(), Sampling(0.7, top_k=20)]
    return [
        Request(prompt, max_new_tokens=16, seed=i, **({"sampler": s} if s else {}))
        for i, (prompt, s) in enumerate(zip(PROMPTS, samplers * 4, strict=True))
    ]


def results_of(model, kind, toolbox):
    """Every dialogue; with room for few pages too, where there are pages."""
    found = []
    with Engine(model, TOKENIZER, toolbox, max_lanes=5, page_size=4) as engine:
        found += (
            generate_in_lockstep(engine, requests())
            if dist.is_initialized()
            else engine.run(requests())
        )
        each = engine.pager.bytes_each
    if kind in PAGED:
        room = 40 * each["page"] + 6 * each["slot"]
        with Engine(
            model, TOKENIZER, toolbox, max_lanes=5, page_size=4, memory_limit=room
        ) as engine:
            run = generate_in_lockstep if dist.is_initialized() else Engine.run
            found += run(engine, requests())
            assert engine.pager.bytes_used() == 0
    return found


def sharing(rank, folder):
    from torch.distributed.device_mesh import init_device_mesh

    from toolmem.training.parallel import parallelize

    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(f"{folder}/group", 2), rank=rank, world_size=2
    )
    mesh = init_device_mesh("cpu", (1, 2), mesh_dim_names=("data_parallel", "tensor_parallel"))
    found = {}
    for kind in MODELS:
        model = made(kind)
        parallelize(model, mesh)
        toolbox = SharedToolbox(Slow() if rank == 0 else None)
        found[kind] = results_of(model, kind, toolbox)
        found[kind, "cache"] = model.new_cache(2, 64).size_in_bytes()
    try:
        with Engine(
            made("gqa"), TOKENIZER, SharedToolbox(Broken() if rank == 0 else None)
        ) as engine:
            generate_in_lockstep(engine, requests())
    except Exception as error:
        found["broken"] = f"{type(error).__name__}: {error}"
    torch.save(found, f"{folder}/found-{rank}.pt")
    dist.destroy_process_group()


class Broken(Count):
    def call_many(self, texts):
        raise OSError("the database is gone")


@pytest.mark.slow
def test_two_ranks_write_what_one_process_writes(tmp_path):
    mp.spawn(sharing, (str(tmp_path),), nprocs=2)
    by_rank = [torch.load(tmp_path / f"found-{rank}.pt", weights_only=False) for rank in range(2)]
    calls = 0
    for kind in MODELS:
        model = made(kind)
        wanted = results_of(model, kind, Count())
        calls += sum(len(one.tool_calls) for one in wanted)
        for found in by_rank:
            assert len(found[kind]) == len(wanted)
            for ours, theirs in zip(found[kind], wanted, strict=True):
                assert_equal(ours, theirs)
        whole = model.new_cache(2, 64).size_in_bytes()
        sizes = [found[kind, "cache"] for found in by_rank]
        # latents of MLA, and what is as long as a token's B and C, are on every rank
        assert sizes[0] == sizes[1] and (
            sizes[0] == whole if kind == "mla" else sizes[0] < 0.8 * whole
        )
    assert calls > 10
    assert all("the database is gone" in found["broken"] for found in by_rank)


def test_what_would_part_the_ranks_is_refused(monkeypatch):
    request = Request(PROMPTS[0], max_new_tokens=2)
    with (
        Engine(random_model(0), TOKENIZER, Count()) as engine,
        pytest.raises(ToolmemError, match="give it a SharedToolbox"),
    ):
        generate_in_lockstep(engine, [request])
    with (
        Engine(random_model(0), TOKENIZER) as engine,
        pytest.raises(ToolmemError, match="request 1 has max_seconds 5"),
    ):
        generate_in_lockstep(engine, [request, Request(PROMPTS[0], max_seconds=5.0)])
    group = SimpleNamespace(WORLD="world")
    monkeypatch.setattr(dist, "group", group)
    monkeypatch.setattr(dist, "get_process_group_ranks", lambda _: [0])
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    with pytest.raises(ToolmemError, match="has no toolbox"):
        SharedToolbox(None)
