"""What all models that draft share: the base within them, frozen or not."""

import copy

import pytest
import torch
from drafting_toys import BASES, KINDS, VOCAB, make, rows

from toolmem import checkpoints
from toolmem.class_path import construct
from toolmem.errors import ToolmemError
from toolmem.models.context import Extras
from toolmem.models.draft_trees import Topology

TREE = [[0], [1], [2], [0, 0], [0, 1], [2, 1], [0, 1, 0]]


def base_of(model, name):
    """The base by itself, with the same weights."""
    spec = BASES[name]
    base = construct(spec["class_path"], spec["init_args"], {"vocab_size": VOCAB}, "base")
    own = {k: v for k, v in model.state_dict().items() if not k.startswith("multi_token.")}
    base.load_state_dict(own)
    return base.eval()


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_it_is_its_base(kind, name):
    """Forward, cached or not, cache, FLOPs of a token, mode, embeddings: the base's own."""
    model = make(kind, name)
    base = base_of(model, name)
    x, _, _ = rows()
    assert torch.equal(model(x), base(x))
    cache, other = model.new_cache(2, 16), base.new_cache(2, 16)
    for a, b in ((0, 6), (6, 7), (7, 11)):
        assert torch.equal(model(x[:, a:b], cache=cache), base(x[:, a:b], cache=other))
    assert cache.size_in_bytes() == other.size_in_bytes()
    assert model.active_parameters() == base.active_parameters()
    counts = model.parameter_counts()
    assert counts.pop(kind) == sum(p.numel() for p in model.multi_token.parameters())
    assert counts == base.parameter_counts()


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_frozen_base_gets_no_gradient_and_stays_as_it_is(kind, name):
    model = make(kind, name)
    before = copy.deepcopy(model.state_dict())
    model.train()
    assert not model.blocks.training and model.multi_token.training
    x, targets, mask = rows(share=0.95)
    extras = Extras()
    states = model.hidden(x, extras=extras)
    model.multi_token.add_losses(model, extras, states, x, targets, mask)
    extras.losses[f"{kind}/loss"].backward()
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.startswith("multi_token."):
            assert parameter.grad is not None and parameter.grad.abs().max() > 0, parameter_name
        else:
            assert parameter.grad is None and not parameter.requires_grad, parameter_name
    model.after_optimizer_step(lambda tensor: tensor)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key]), key
    model.eval()
    assert not model.multi_token.training


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_that_learns_on_does(kind):
    model = make(kind, freeze_base=False).train()
    assert model.blocks.training
    x, targets, mask = rows(share=0.95)
    extras = Extras()
    states = model.hidden(x)
    model.multi_token.add_losses(model, extras, states, x, targets, mask)
    extras.losses[f"{kind}/loss"].backward()
    assert model.blocks[0].mixer.qkv.weight.grad.abs().max() > 0


@pytest.mark.parametrize("name", BASES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_rebuilds_base_and_heads_alone(kind, name, tmp_path):
    model = make(kind, name, tree=TREE)
    about = checkpoints.describe(
        model, {"tokenizer": {"kind": "byte"}, "factbase": None, "setting": None}
    )
    spec = about["model"]
    assert spec["class_path"] == f"toolmem.models.{KINDS[kind].__name__}"
    file = tmp_path / "x.ckpt"
    checkpoints.write({"toolmem": about, "weights": model.state_dict()}, file)
    read = checkpoints.read(file)
    again = checkpoints.build_model(read["toolmem"]["model"], file).eval()
    again.load_state_dict(read["weights"])
    x, _, _ = rows()
    with torch.no_grad():
        assert torch.equal(again(x), model(x))
    features, tokens = model.hidden(x[:, :-1])[:, -again.window :], x[:, 1:][:, -again.window :]
    for mine, theirs in zip(
        again.draft(features, tokens), model.draft(features, tokens), strict=True
    ):
        assert torch.equal(mine, theirs)
    assert again.topology == model.topology == Topology.of(TREE)


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_a_tree_of_drafts(kind):
    model = make(kind, tree=TREE)
    x, _, _ = rows(batch=3)
    features, tokens = model.hidden(x)[:, -model.window :], x.roll(-1, 1)[:, -model.window :]
    tree = model.draft(features, tokens)
    assert tree.tokens.shape == tree.log_probs.shape == (3, len(TREE))
    assert tree.tokens.dtype == torch.int64 and tree.log_probs.dtype == torch.float32
    assert tree.parents.tolist() == [-1, -1, -1, 0, 0, 2, 4]
    # siblings differ, the likelier first
    for a, b in ((0, 1), (1, 2), (3, 4)):
        assert (tree.tokens[:, a] != tree.tokens[:, b]).all()
        assert (tree.log_probs[:, a] >= tree.log_probs[:, b]).all()
    # each lane's tree is what it is by itself, and one asked for another way
    for lane in range(3):
        alone = model.draft(features[lane : lane + 1], tokens[lane : lane + 1])
        assert torch.equal(alone.tokens[0], tree.tokens[lane])
        torch.testing.assert_close(alone.log_probs[0], tree.log_probs[lane])
    chain = model.draft(features, tokens, topology=Topology.chain(2))
    assert torch.equal(chain.tokens, tree.tokens[:, [0, 3]])


@pytest.mark.parametrize("kind", KINDS)
def test_a_base_with_modules_of_its_own_ahead_drafts_with_the_new_ones(kind):
    base = copy.deepcopy(BASES["transformer"])
    base["init_args"]["multi_token"] = 1
    model = KINDS[kind](VOCAB, base)
    assert set(model.parameter_counts()) >= {kind} and "multi_token" not in model.parameter_counts()


@pytest.mark.parametrize("kind", KINDS)
def test_refusals(kind):
    def refused(words, base=BASES["transformer"], **options):
        with pytest.raises(ToolmemError, match=words):
            KINDS[kind](VOCAB, base, **options)

    refused("init_from", base=None)
    refused("not a toolmem.models.LanguageModel", base={"class_path": "drafting_toys.NoModel"})
    refused("cannot import", base={"class_path": "toolmem.models.Nothing"})
    wrapped = {
        "class_path": f"toolmem.models.{KINDS[kind].__name__}",
        "init_args": {"base": BASES["transformer"]},
    }
    refused("drafts already", base=wrapped)
    other = copy.deepcopy(BASES["transformer"])
    other["init_args"]["vocab_size"] = 7
    refused("vocab_size 7", base=other)
    refused("shorten", tree=[[0] * n for n in range(1, 6)])
    refused("hangs on nothing", tree=[[0, 0]])
    with pytest.raises(ToolmemError, match="shorten"):
        make(kind).tree_shape(Topology.chain(9))
    bad = [{"n_heads": 0}]
    bad += [{"decay": 0.0}] if kind == "medusa" else [{"window": 0}, {"depth": 40}, {"noise": -1.0}]
    for options in bad:
        refused(next(iter(options)), **options)
