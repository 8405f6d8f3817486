"""Trees of dialogues: each branch is what it would be alone, and each token is held once."""

import pytest
import torch
from test_engine import (
    ARCHITECTURES,
    ROLES,
    TOKENIZER,
    Count,
    assert_equal,
    check_nothing_left,
    random_model,
    talkative,
)

from toolmem.errors import ToolmemError
from toolmem.generation import Engine, Sampling, fork_all, generate_naive

PROMPT = [ROLES["user"], *b"a question", ROLES["assistant"]]
MODELS = {
    "transformer": lambda: random_model(0, n_kv_heads=1),
    "convolution": lambda: random_model(0, conv_width=4),
    "griffin": lambda: talkative(*ARCHITECTURES["griffin"]),
    "jamba": lambda: talkative(*ARCHITECTURES["jamba"]),
}


def grow(engine, turns, fan_out):
    """A tree of several turns; all nodes, parents first."""
    root = engine.root(PROMPT)
    level = root.fork(fan_out, seed=0, sampler=Sampling(), max_new_tokens=4)
    for turn in range(1, turns):
        asked = [node.say(f"and {turn}?") for node in level]
        pairs = fork_all(
            [node for node in asked for _ in range(fan_out)],
            seed=100 * turn,
            sampler=Sampling(),
            max_new_tokens=4,
        )
        level = [child for _, child in pairs]
    return root


@pytest.mark.parametrize("name", MODELS)
def test_branches_are_what_they_would_be_alone(name):
    model = MODELS[name]()
    with Engine(model, TOKENIZER, Count()) as engine:
        root = engine.root(PROMPT)
        children = root.fork(3, seed=0, sampler=Sampling(), max_new_tokens=12)
        for seed, child in enumerate(children):
            naive = generate_naive(
                model,
                TOKENIZER,
                PROMPT,
                toolbox=Count(),
                seed=seed,
                sampler=Sampling(),
                max_new_tokens=12,
            )
            assert_equal(child.dialogue, naive)
        asked = children[0].say("sure?")
        opened = [ROLES["user"], *b"sure?", ROLES["assistant"]]
        assert asked.tokens[-len(opened) - 1 :] == [ROLES["end"], *opened]
        [again] = asked.fork(1, seed=9, max_new_tokens=5)
        naive = generate_naive(model, TOKENIZER, asked.tokens, toolbox=Count(), max_new_tokens=5)
        assert again.tokens == naive.tokens
        assert again.turns()[0] == ("user", "a question")
        assert again.depth == 3
        # what the model wrote on the whole way counts
        logits = model(torch.tensor([again.tokens[:-1]])).log_softmax(-1)[0]
        picked = logits.gather(1, torch.tensor(again.tokens[1:])[:, None])[:, 0]
        own = [i for i, x in enumerate(again.dialogue.log_probs[1:]) if x == x]
        assert again.log_prob == pytest.approx(float(picked[own].sum().detach()), abs=1e-3)
        with pytest.raises(ToolmemError, match="pruned"):
            again.prune()
            again.fork()
        root.prune()
        assert list(root) == [root]
        check_nothing_left(engine)


@pytest.mark.parametrize("name", MODELS)
def test_a_tree_under_a_tenth_of_its_memory(name, tmp_path):
    model = MODELS[name]()
    turns, fan_out = (3, 3) if name != "transformer" else (3, 4)
    with Engine(model, TOKENIZER, Count(), prefix_sharing=False, page_size=4) as engine:
        roomy = [node.dialogue for node in grow(engine, turns, fan_out)]
        whole = engine.stats().bytes_used
        unit = engine.pager.bytes_each
    least = 30 * unit["page"] + 2 * unit["slot"]  # one dialogue of 120 tokens
    limit = max(whole // 10, least)
    assert limit < whole / 2
    with Engine(
        model,
        TOKENIZER,
        Count(),
        prefix_sharing=False,
        page_size=4,
        memory_limit=limit,
        host_limit=limit,
        spill_folder=tmp_path,
    ) as engine:
        root = grow(engine, turns, fan_out)
        stats = engine.stats()
        assert stats.bytes_peak <= limit
        assert stats.pieces_paged_out > 0 and stats.pieces_paged_in > 0
        assert engine.pager.spilled_bytes() > 0
        for node, other in zip(root, roomy, strict=True):
            assert_equal(node.dialogue, other)
        root.prune()
        check_nothing_left(engine)


def test_pruning_keeps_what_others_share():
    with Engine(random_model(0), TOKENIZER, prefix_sharing=False) as engine:
        root = engine.root(PROMPT)
        first, second = root.fork(2, seed=3, sampler=Sampling(), max_new_tokens=30)
        before = engine.stats().pages_used
        first.prune()
        assert root.children == [second]
        assert engine.stats().pages_used < before
        assert second.fork(1, max_new_tokens=3)[0].tokens[: len(second.tokens)] == second.tokens
        assert [node.depth for node in root] == [0, 1, 2]
        assert list(root.leaves()) == second.children


def test_new_weights_read_a_node_again():
    first, second = random_model(0), random_model(1)
    with Engine(first, TOKENIZER) as engine:
        root = engine.root(PROMPT)
        [child] = root.fork(1, max_new_tokens=4)
        asked = child.say("and?")
        engine.update_weights(second)
        for node in (child, asked):
            [new] = node.fork(1, max_new_tokens=5)
            naive = generate_naive(second, TOKENIZER, node.tokens, max_new_tokens=5)
            assert new.tokens == naive.tokens
