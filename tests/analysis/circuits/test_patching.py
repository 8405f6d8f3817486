"""Patching on the hand-built circuit: effect 1 along it, 0 off it."""

from __future__ import annotations

import pytest
import torch
from circuits_toys import VOCAB, induction

from toolmem.analysis.circuits import (
    Contrast,
    Node,
    branches,
    contrast_copies,
    head,
    hook_points,
    neuron,
    patch_effects,
    path_effect,
    tell,
)
from toolmem.data.dialogues import Dialogue, Turn
from toolmem.data.tokenizers import ByteTokenizer
from toolmem.errors import ToolmemError
from toolmem.models import RNN, Hybrid, Mamba, MoETransformer, Transformer

SMALL = 0.01
# x x A B x x A -> B; corrupted: the first A is another token, or B is
CLEAN = [17, 18, 1, 2, 19, 16, 1]
EMBEDDING, LAST = Node("embedding"), Node("blocks.1.output")


def contrast(place: int) -> Contrast:
    """Rows whose corrupted one has another token at a place; what is wrong is what it leads to."""
    clean = torch.tensor([CLEAN, [t + 2 if t < 3 else t for t in CLEAN]])
    corrupted = clean.clone()
    corrupted[:, place] = torch.tensor([7, 9])
    wrong = torch.tensor([7, 9]) if place == 3 else torch.tensor([11, 12])
    return Contrast(clean, corrupted, torch.tensor([6, 6]), clean[:, 3], wrong)


def where(*places: int) -> torch.Tensor:
    mask = torch.zeros(2, 7, dtype=torch.bool)
    mask[:, list(places)] = True
    return mask


def test_what_says_the_token_restores_all_of_it():
    model = induction()
    nodes = [*branches(model), EMBEDDING, Node("blocks.0.output"), LAST]
    for place in (2, 3):
        effects = patch_effects(model, contrast(place), nodes)
        # the token itself is all that differs; and head 1.0 is all that the output reads
        whole = {head(1, 0), EMBEDDING, Node("blocks.0.output"), LAST}
        # with A corrupted, what fails is that B's token is not known to follow A: head 0.0's work
        if place == 2:
            whole.add(head(0, 0))
        for node in nodes:
            assert effects[node] == pytest.approx(1.0 if node in whole else 0.0, abs=SMALL), node


def test_positions_narrow_it_down():
    model, made = induction(), contrast(2)
    # head 0.0 must tell position 3 what stands at 2
    assert patch_effects(model, made, [head(0, 0)], where(3))[head(0, 0)] == pytest.approx(
        1, abs=SMALL
    )
    others = where(0, 1, 2, 4, 5, 6)
    assert patch_effects(model, made, [head(0, 0)], others)[head(0, 0)] == pytest.approx(
        0, abs=SMALL
    )
    assert patch_effects(model, made, [head(1, 0)], where(6))[head(1, 0)] == pytest.approx(
        1, abs=SMALL
    )
    assert patch_effects(model, made, [EMBEDDING], made.differ)[EMBEDDING] == pytest.approx(
        1, abs=SMALL
    )


def receiver(part: str, index: int = 0, layer: int = 1) -> Node:
    return Node(f"blocks.{layer}.mixer.{part}", index)


def test_the_path_goes_by_the_keys_when_the_one_before_is_corrupted():
    model, made = induction(), contrast(2)
    assert path_effect(model, made, head(0, 0), [receiver("keys")]) == pytest.approx(1, abs=SMALL)
    off = [
        (head(0, 0), [receiver("queries")]),
        (head(0, 0), [receiver("values")]),
        (head(0, 0), [receiver("keys", 1)]),
        (head(0, 0), [Node("blocks.0.feed_forward.input")]),
        (head(0, 0), None),
        (head(0, 1), [receiver("keys")]),
        (head(0, 1), None),
        (Node("blocks.0.feed_forward.output"), [receiver("keys")]),
        (EMBEDDING, [receiver("keys")]),
        (EMBEDDING, None),
        (head(1, 0), [receiver("keys")]),
    ]
    for sender, receivers in off:
        assert path_effect(model, made, sender, receivers) == pytest.approx(0, abs=SMALL), (
            sender,
            receivers,
        )
    # what head 1.0 says goes straight to the logits, and the embedding to head 0.0
    assert path_effect(model, made, head(1, 0)) == pytest.approx(1, abs=SMALL)
    assert path_effect(model, made, EMBEDDING, [receiver("values", 0, 0)]) == pytest.approx(
        1, abs=SMALL
    )
    assert path_effect(model, made, EMBEDDING, [receiver("keys", 0, 0)]) == pytest.approx(
        0, abs=SMALL
    )


def test_the_path_goes_by_the_values_when_the_copied_one_is_corrupted():
    model, made = induction(), contrast(3)
    for part, effect in (("values", 1), ("keys", 0), ("queries", 0)):
        assert path_effect(model, made, EMBEDDING, [receiver(part)]) == pytest.approx(
            effect, abs=SMALL
        )
    assert path_effect(model, made, head(0, 0), [receiver("values")]) == pytest.approx(0, abs=SMALL)
    every = [receiver(part) for part in ("queries", "keys", "values")]
    assert path_effect(model, made, EMBEDDING, every) == pytest.approx(1, abs=SMALL)
    both = [receiver("values", 1), receiver("values", 0)]  # two places of one point
    assert path_effect(model, made, EMBEDDING, both) == pytest.approx(1, abs=SMALL)
    where_else = path_effect(model, made, EMBEDDING, [receiver("values")], where=~made.differ)
    assert where_else == pytest.approx(0, abs=SMALL)


def test_paths_through_feed_forwards_count_when_they_may_work():
    """A feed-forward after layer 1 that says what head 1.0 found, and an output that reads it alone."""
    model = induction()
    with torch.no_grad():
        up, down = model.blocks[1].feed_forward.up, model.blocks[1].feed_forward.down
        model.head.weight.zero_()
        # neuron 0: head 1.0 says 2 rather than 7
        up.weight.zero_()
        down.weight.zero_()
        says = 2 * VOCAB + 24
        up.weight[0, says + 2], up.weight[0, says + 7] = 1.0, -1.0
        down.weight[says + 2, 0] = 1.0
        model.head.weight[2, says + 2] = 1.0
        first = contrast(3)
        one = Contrast(
            first.clean[:1], first.corrupted[:1], first.at[:1], first.right[:1], first.wrong[:1]
        )
    held = path_effect(model, one, head(1, 0))
    free = path_effect(model, one, head(1, 0), feed_forwards=True)
    assert free == pytest.approx(1, abs=SMALL)
    assert 0 < held < 0.9
    straight = path_effect(model, one, Node("blocks.1.feed_forward.output"))
    assert 0.1 < straight < 1
    effects = patch_effects(model, one, [neuron(1, 0), neuron(1, 3)])
    assert effects[neuron(1, 0)] == pytest.approx(straight, abs=SMALL)
    assert effects[neuron(1, 3)] == pytest.approx(0, abs=SMALL)


def test_a_model_that_tells_them_alike_is_told():
    model, made = induction(), contrast(3)
    with torch.no_grad():
        model.head.weight.zero_()
    with pytest.raises(ToolmemError, match="alike"):
        patch_effects(model, made, [EMBEDDING])
    with pytest.raises(ToolmemError, match="alike"):
        path_effect(model, made, EMBEDDING)


def test_what_is_no_place_is_named():
    model, made = induction(), contrast(3)
    with pytest.raises(ToolmemError, match=r"blocks\.0\.mixer\.heads has no number 2.*0 to 1"):
        patch_effects(model, made, [head(0, 2)])
    with pytest.raises(ToolmemError, match=r"no number 9.*there are 6"):
        patch_effects(model, made, [neuron(1, 9)])
    with pytest.raises(ToolmemError, match="hook point"):
        path_effect(model, made, EMBEDDING, [Node("blocks.2.mixer.keys", 0)])


@pytest.mark.parametrize(
    "model",
    [
        Transformer(11, 8, 2, 4, n_kv_heads=2, max_seq_len=16, conv_width=3, sandwich_norm=True),
        Transformer(11, 8, 2, 2, max_seq_len=16, attention="mla"),
        MoETransformer(11, 8, 2, 2, n_experts=4, max_seq_len=16),
        Mamba(11, 8, 2, max_seq_len=16),
        RNN(11, 8, 2, cell="mingru", max_seq_len=16),
        Hybrid(
            11, 8, 2, ["mamba2", "attention"],
            {"attention": {"n_heads": 2}, "mamba2": {"head_dim": 4}}, max_seq_len=16,
        ),
    ],
    ids=lambda model: type(model).__name__,
)  # fmt: skip
def test_every_architecture(model):
    """All that enters restores all; the row's own activations restore nothing, exactly."""
    torch.manual_seed(0)
    model = model.double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    clean = torch.randint(11, (3, 8))
    corrupted = clean.clone()
    corrupted[:, 4] = (corrupted[:, 4] + 3) % 11
    at = torch.tensor([6, 7, 5])
    pairs = Contrast(clean, corrupted, at, torch.tensor([1, 2, 3]), torch.tensor([4, 5, 6]))
    nodes = [*branches(model), EMBEDDING, LAST]
    effects = patch_effects(model, pairs, nodes)
    assert effects[EMBEDDING] == pytest.approx(1, abs=1e-9)
    assert effects[LAST] == pytest.approx(1, abs=1e-9)
    assert all(abs(effects[node]) > 1e-12 for node in branches(model))
    nowhere = torch.zeros_like(clean, dtype=torch.bool)
    points = [Node(point) for point in hook_points(model)]
    still = patch_effects(model, pairs, points, nowhere)
    assert all(abs(effect) < 1e-12 for effect in still.values())
    # straight from the embedding to the logits is not all, but with all that stands between it is
    assert path_effect(model, pairs, EMBEDDING) != pytest.approx(1, abs=1e-3)
    assert path_effect(model, pairs, EMBEDDING, [Node("blocks.0.input")]) == pytest.approx(
        1, abs=1e-9
    )
    assert path_effect(model, pairs, EMBEDDING, where=nowhere) == 0


def said(name: str, age: str) -> Dialogue:
    texts = (f"Age of {name}?", name, age, f"{name} {age}")
    roles = ("user", "assistant", "database", "assistant")
    return Dialogue(tuple(map(Turn, roles, texts)), age, "age", name)


def test_dialogues_are_set_beside_others_where_they_copy_from():
    told = [
        tell(said(*who), ByteTokenizer())
        for who in (("Ann", "37"), ("Bob", "5"), ("Zoe", "39"), ("Eve", "61"))
    ]
    made = contrast_copies(told, "answer")
    # Ann's 37 cannot stand beside 39, which begins alike, nor beside 5, which is shorter
    rows = [bytes(t if t < 256 else ord("|") for t in row) for row in made.corrupted.tolist()]
    assert [row.rstrip(b"\0") for row in rows] == [
        b"|Age of Ann?|Ann|61|Ann ", b"|Age of Zoe?|Zoe|61|Zoe ", b"|Age of Eve?|Eve|37|Eve ",
    ]  # fmt: skip
    assert made.right.tolist() == [ord("3"), ord("3"), ord("6")]
    assert made.wrong.tolist() == [ord("6"), ord("6"), ord("3")]
    assert made.at.tolist() == [23, 23, 23] and made.spans.shape == made.clean.shape
    made = contrast_copies(told, "name in query")
    assert bytes(made.corrupted[0, 1:12].tolist()) == b"Age of Bob?"
    assert made.differ[0].nonzero().flatten().tolist() == [8, 9, 10]
    with pytest.raises(ToolmemError, match="same length"):
        contrast_copies(told[:2], "answer")
    with pytest.raises(ToolmemError, match="'nothing'"):
        contrast_copies(told, "nothing")
