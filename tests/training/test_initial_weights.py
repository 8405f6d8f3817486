"""Starting from a run's weights: what is taken, what is left, what is refused."""

import csv

import pytest
import torch
from training_toys import VOCAB, ToyData, make_batch, make_module, make_trainer, tiny

from toolmem import checkpoints
from toolmem.errors import ToolmemError
from toolmem.models import Eagle, Medusa
from toolmem.models.model_flops import ModelFlops
from toolmem.training import EMA, AdamW, Checkpointing, Constant, CSVLogger
from toolmem.training.callbacks.flops import step_flops
from toolmem.training.initial_weights import base_for, load_initial_weights

KINDS = {"medusa": Medusa, "eagle": Eagle}


def fit(folder, module, steps=4, data=None, resume=None, callbacks=()):
    trainer = make_trainer(
        folder,
        steps,
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        enable_checkpointing=True,
        callbacks=[Checkpointing(every_n_steps=2), *callbacks],
    )
    trainer.fit(module, data or ToyData(), ckpt_path=resume)
    return module


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A trained run's folder."""
    folder = tmp_path_factory.mktemp("base")
    fit(folder, make_module(tiny()))
    return folder


def weights(folder):
    return checkpoints.weights_of(checkpoints.read(checkpoints.resolve(folder)))


def wrapped(kind, folder, **options):
    torch.manual_seed(1)
    spec = base_for(f"toolmem.models.{KINDS[kind].__name__}", {}, folder)
    return KINDS[kind](VOCAB, spec, **options)


def of_base(state):
    return {name: value for name, value in state.items() if not name.startswith("multi_token.")}


def test_a_plain_model_takes_all(base):
    model = tiny()
    torch.nn.init.zeros_(model.embedding.weight)
    load_initial_weights(model, base, {})
    for name, value in weights(base).items():
        assert torch.equal(model.state_dict()[name], value)


def test_training_starts_there(base, tmp_path):
    """With a rate of nearly nothing a run ends where it began: at the other's weights."""
    still = {"optimizer": AdamW(lr=1e-12, weight_decay=0.0)}
    fit(tmp_path, make_module(tiny(), init_from=str(base), **still))
    for name, value in weights(base).items():
        torch.testing.assert_close(weights(tmp_path)[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_on_a_frozen_base(kind, base, tmp_path):
    model = wrapped(kind, base)
    fit(tmp_path, make_module(model, init_from=str(base)), steps=60)
    kept = weights(tmp_path)
    assert set(of_base(kept)) == set(weights(base))
    for name, value in weights(base).items():
        assert torch.equal(kept[name], value), name
    with open(tmp_path / "metrics.csv") as file:
        losses = [float(row[f"{kind}/loss_2"]) for row in csv.DictReader(file)]
    assert losses[-1] < 0.7 * losses[0]
    # the checkpoint alone rebuilds base and heads
    spec = checkpoints.read(tmp_path / "checkpoints" / "last.ckpt")["toolmem"]["model"]
    again = checkpoints.build_model(spec, tmp_path).eval()
    again.load_state_dict(kept)
    model.eval()
    batch = make_batch(50)
    assert torch.equal(again(batch.tokens), model(batch.tokens))


@pytest.mark.parametrize("kind", KINDS)
def test_averaged_weights_of_a_frozen_base_are_its_own(kind, base, tmp_path):
    module = make_module(wrapped(kind, base), init_from=str(base))
    fit(tmp_path, module, callbacks=[EMA(decay=0.5)])
    for name, value in weights(base).items():
        torch.testing.assert_close(weights(tmp_path)[name], value, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_goes_on_has_its_own_weights(kind, base, tmp_path):
    options = {"noise": 0.0} if kind == "eagle" else {}

    def module(init_from):
        model = wrapped(kind, base, **options)
        return make_module(model, init_from=str(init_from), schedule=Constant())

    whole = fit(tmp_path / "whole", module(base), 6)
    part = tmp_path / "part"
    fit(part, module(base), 4)
    last = part / "checkpoints" / "last.ckpt"
    # the run that it started from is not needed any more
    resumed = fit(part, module(tmp_path / "gone"), 6, resume=last)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_heads_go_on_from_heads_of_their_kind_and_else_start_anew(base, tmp_path):
    fit(tmp_path, make_module(wrapped("medusa", base), init_from=str(base)))
    before = weights(tmp_path)
    same, other = wrapped("medusa", tmp_path), wrapped("eagle", tmp_path)
    assert "base" not in same.init_args["base"]["init_args"]  # the base's base, not the wrapper
    drawn = {name: value.clone() for name, value in other.multi_token.state_dict().items()}
    for model in (same, other):
        load_initial_weights(model, tmp_path, {})
        for name, value in of_base(before).items():
            assert torch.equal(model.state_dict()[name], value)
    assert torch.equal(same.multi_token.heads, before["multi_token.heads"])
    for name, value in other.multi_token.state_dict().items():
        assert torch.equal(value, drawn[name])


def test_medusas_heads_start_as_the_loaded_head(base):
    model = wrapped("medusa", base)
    load_initial_weights(model, base, {})
    for head in model.multi_token.heads:
        assert torch.equal(head, weights(base)["head.weight"])


def test_a_base_with_modules_of_its_own_ahead(tmp_path):
    """What only its training used is left out."""
    fit(tmp_path, make_module(tiny(multi_token=1)))
    model = wrapped("medusa", tmp_path)
    load_initial_weights(model, tmp_path, {})
    assert torch.equal(model.embedding.weight, weights(tmp_path)["embedding.weight"])


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"n_layers": 3}, ["it has no", "blocks.2.", "more"]),
        ({"n_layers": 1}, ["this model has no", "blocks.1."]),
        ({"dim": 12}, ["of another shape", "embedding.weight [11, 8], here [11, 12]"]),
        ({"vocab_size": 13}, ["of another shape", "embedding.weight [11, 8], here [13, 8]"]),
    ],
)
def test_what_does_not_fit_is_named(changes, words, base):
    model = tiny(**changes)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ToolmemError) as error:
        load_initial_weights(model, base, {})
    assert all(word in str(error.value) for word in ["model.init_from", *words])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])


def test_another_tokenizer_and_a_run_that_is_not_there(base, tmp_path):
    class Other(ToyData):
        def checkpoint_info(self):
            return super().checkpoint_info() | {"tokenizer": {"kind": "other"}}

    with pytest.raises(ToolmemError, match="another tokenizer"):
        fit(tmp_path / "a", make_module(tiny(), init_from=str(base)), data=Other())
    for call in (
        lambda: load_initial_weights(tiny(), tmp_path / "none", {}),
        lambda: base_for("toolmem.models.Medusa", {}, tmp_path / "none"),
    ):
        with pytest.raises(ToolmemError, match=r"model.init_from.*none"):
            call()


def test_a_base_is_filled_in_only_where_it_is_left_open(base):
    assert base_for("toolmem.models.Transformer", {}, base) is None
    assert base_for("toolmem.models.Medusa", {}, None) is None
    assert base_for("toolmem.models.Medusa", {"base": {"class_path": "x"}}, base) is None
    found = base_for("toolmem.models.Medusa", {}, base)
    assert found["class_path"] == "toolmem.models.Transformer"
    assert found["init_args"]["dim"] == 8


def paper(kind, model, batch):
    """FLOPs of a step on whole rows of n tokens, on paper, and those of the base alone.

    The base is frozen: forward alone. Its two layers, V = 11, dim 8, two heads of 4, a gated
    feed-forward of 32, have 2 (8 x 24 + 8 x 8 + 3 x 8 x 32) multiply-adds a token, and 2 x 2 x 8 for each
    pair that sees each other.
    """
    rows, n = batch.tokens.shape
    head = 2 * 8 * VOCAB
    token = 2 * 2 * (8 * 24 + 8 * 8 + 3 * 8 * 32)
    base = rows * (n * token + 2 * 2 * 2 * 8 * n * (n + 1) // 2)
    base += int(batch.loss_mask.sum()) * head
    extra = 0
    for ahead in range(1, len(model.multi_token.blocks) + 1):
        length = n - ahead
        bears = int(model.multi_token.bearing(batch.loss_mask, None, ahead).sum())
        if kind == "medusa":
            # a square map: forward, and the gradient of its weight alone; a head of its own: all three
            extra += rows * length * 2 * (2 * 8 * 8) + bears * 3 * head
        else:
            layer = 2 * (8 * 24 + 8 * 8 + 3 * 8 * 32)
            seen = length * (length + 1) // 2  # the window is longer than the rows
            extra += rows * (length * (3 * layer + 2 * (2 * 16 * 8)) + 3 * 2 * 2 * 8 * seen)
            # the base's head, forward and the gradient of what it reads; and once on the true feature
            extra += bears * (2 * head + head)
    return base + extra


@pytest.mark.parametrize("kind", KINDS)
def test_flops_on_paper(kind, base):
    model = wrapped(kind, base)
    batch = make_batch(3)
    assert step_flops(ModelFlops(model), batch)[0] == paper(kind, model, batch)
