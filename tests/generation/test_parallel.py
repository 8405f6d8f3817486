"""Two ranks generate what one does; one that dies costs only its own."""

import os
import signal

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from test_engine import TOKENIZER, Count, assert_equal, ragged_prompts, random_model

from toolmem.errors import ToolmemError
from toolmem.generation import Engine, Request, Sampling
from toolmem.generation.parallel import generate_over_ranks

PROMPTS = ragged_prompts(9)


def requests():
    return [
        Request(prompt, max_new_tokens=10, sampler=Sampling(), seed=i)
        for i, prompt in enumerate(PROMPTS)
    ]


class Deadly(Count):
    """A toolbox that kills its process."""

    def call_many(self, texts):
        os.kill(os.getpid(), signal.SIGKILL)


def by_gloo(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/group", 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    with Engine(random_model(0), TOKENIZER, Count()) as engine:
        first = generate_over_ranks(engine, requests())
        second = generate_over_ranks(engine, requests()[:3])
    torch.save([first, second], f"{folder}/results-{rank}.pt")
    dist.destroy_process_group()


def one_dies(rank, folder):
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", 2)
    toolbox = Deadly() if rank else Count()
    with Engine(random_model(0), TOKENIZER, toolbox) as engine:
        results = generate_over_ranks(
            engine, requests(), store=store, rank=rank, world_size=2, patience_s=1.0, name="x"
        )
    torch.save(results, f"{folder}/results-{rank}.pt")


def alone():
    with Engine(random_model(0), TOKENIZER, Count()) as engine:
        return engine.run(requests())


def test_two_gloo_ranks_equal_one_process(tmp_path):
    mp.spawn(by_gloo, (str(tmp_path),), nprocs=2)
    wanted = alone()
    for rank in range(2):
        first, second = torch.load(tmp_path / f"results-{rank}.pt", weights_only=False)
        assert len(first) == 9 and len(second) == 3
        for ours, theirs in zip([*first, *second], [*wanted, *wanted[:3]], strict=True):
            assert_equal(ours, theirs)


def test_a_rank_that_dies_costs_only_its_own(tmp_path):
    with pytest.raises(mp.ProcessExitedException, match="SIGKILL"):
        # join ends the others when one dies: so it waits for them itself
        context = mp.spawn(one_dies, (str(tmp_path),), nprocs=2, join=False)
        context.processes[0].join(60)
        context.join()
    results = torch.load(tmp_path / "results-0.pt", weights_only=False)
    for index, (ours, theirs) in enumerate(zip(results, alone(), strict=True)):
        if index % 2 == 0:
            assert_equal(ours, theirs)
        else:
            assert ours is None


def test_without_a_process_group():
    with (
        Engine(random_model(0), TOKENIZER) as engine,
        pytest.raises(ToolmemError, match="process group"),
    ):
        generate_over_ranks(engine, requests())
