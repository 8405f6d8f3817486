"""What parallelism says of a model before any process trains it; ``test_parallel_runs.py`` trains."""

import numpy as np
import pytest
import torch
import torch.distributed as dist
from parallel_cases import MODELS, SIZES, transformer
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from toolmem.errors import ToolmemError
from toolmem.models import RNN, Eagle, Hybrid, Mamba, Mamba2, Medusa, MoETransformer
from toolmem.models.rnn import GRU, LSTM
from toolmem.training.parallel import parallelize
from toolmem.training.parallel.layout import row_order
from toolmem.training.parallel.plans import Sharing
from toolmem.training.parallel.tensor import check_sequence_parallel, plans


@pytest.fixture
def mesh_of():
    """Meshes of processes that are not there: nothing that is sent arrives."""

    def make(data: int, tensor: int):
        dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=data * tensor)
        return init_device_mesh(
            "cpu", (data, tensor), mesh_dim_names=("data_parallel", "tensor_parallel")
        )

    yield make
    dist.destroy_process_group()


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_a_split_branch_has_its_place(name):
    """One that was left out would be taken for whole, and its gradient not be summed over ranks."""
    model = MODELS[name]()
    names = {module: path for path, module in model.named_modules()}
    chosen = plans(model, Sharing(1, 2))
    assert {names[branch].rpartition(".")[2] for branch in chosen} >= {"mixer"}
    for branch, plan in chosen.items():
        parameters = {path for path, _ in branch.named_parameters()}
        if not plan.split:
            assert isinstance(branch, LSTM | GRU)
            assert not plan.cuts and not plan.sizes
            continue
        assert parameters - plan.cuts.keys() <= {"router.weight"}, names[branch]
        for path in parameters & plan.cuts.keys():
            cut, parameter = plan.cuts[path], branch.get_parameter(path)
            if cut.dim is not None:
                assert parameter.shape[cut.dim] % 2 == 0
            if cut.order is not None:
                assert cut.dim == 0
                assert sorted(cut.order.tolist()) == list(range(len(parameter)))
            if cut.rows is not None:
                assert cut.dim is None and int(cut.rows.max()) < len(parameter)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("data", "tensor"), [(1, 2), (2, 1), (2, 2)])
def test_every_parameter_becomes_a_dtensor_under_its_name(mesh_of, name, data, tensor):
    model = MODELS[name]()
    before = {path: p.shape for path, p in model.named_parameters()}
    parallelize(model, mesh_of(data, tensor))
    after = dict(model.named_parameters())
    assert {path: p.shape for path, p in after.items()} == before
    assert all(isinstance(p, DTensor) for p in after.values())
    assert model.parameter_counts() == MODELS[name]().parameter_counts()
    assert model.active_parameters() == MODELS[name]().active_parameters()
    held = sum(p.to_local().numel() for p in after.values())
    whole = sum(p.numel() for p in after.values())
    assert held < whole * (0.9 if data == 1 else 0.6)
    if model.tie_embeddings:
        assert model.head.weight is model.embedding.weight


@pytest.mark.parametrize(("segments", "size"), [((4,), 2), ((8, 4, 4), 2), ((6, 3, 3, 9), 3)])
def test_rows_in_order_give_each_rank_its_share_of_every_segment(segments, size):
    order = row_order(segments, size)
    rows = np.arange(sum(segments))
    kept = rows if order is None else rows[order.numpy()]
    parts = np.split(rows, np.cumsum(segments)[:-1])
    for rank, own in enumerate(np.split(kept, size)):
        assert own.tolist() == np.concatenate([np.split(p, size)[rank] for p in parts]).tolist()


def hybrid(**options):
    return Hybrid(**SIZES, pattern=["one"], mixers={"one": options})


@pytest.mark.parametrize(
    ("model", "key"),
    [
        (lambda: transformer(dim=18, n_heads=3, n_kv_heads=3), "n_heads, 3"),
        (lambda: transformer(n_kv_heads=1), "n_kv_heads, 1"),
        (lambda: transformer(hidden_dim=33), "hidden_dim, 33"),
        (lambda: MoETransformer(**SIZES, n_heads=2, n_experts=3), "n_experts, 3"),
        (lambda: Mamba(**SIZES | {"dim": 15}, expand=1), r"expand \* dim, 15"),
        (lambda: Mamba2(**SIZES, head_dim=32), r"expand \* dim / head_dim, its heads, 1"),
        (lambda: Mamba2(**SIZES | {"dim": 24}, head_dim=8, n_groups=3), "n_groups, 3"),
        (lambda: RNN(**SIZES, cell="mingru", width=9), "width, 9"),
        (lambda: hybrid(class_path="rglru", width=18, n_blocks=9), "n_blocks, 9"),
        (lambda: hybrid(class_path="gated_linear", n_heads=1), "n_heads, 1"),
        (lambda: hybrid(class_path="latent_attention", n_heads=1), "n_heads, 1"),
    ],
)
def test_what_cannot_be_shared_evenly_is_refused_by_its_key(model, key):
    with pytest.raises(ToolmemError, match=f"tensor_parallel_size 2 does not divide {key}: change"):
        plans(model(), Sharing(0, 2))


@pytest.mark.parametrize("kind", [Medusa, Eagle])
def test_models_that_draft_are_refused(mesh_of, kind):
    base = {"class_path": "toolmem.models.Transformer", "init_args": {**SIZES, "n_heads": 4}}
    with pytest.raises(ToolmemError, match="drafts for another model"):
        parallelize(kind(vocab_size=SIZES["vocab_size"], base=base), mesh_of(2, 1))


@pytest.mark.parametrize("option", [{"residual_conv": 2}, {"dropout": 0.1}])
def test_what_mixes_tokens_between_branches_does_not_go_with_sequence_parallelism(option):
    with pytest.raises(ToolmemError, match=next(iter(option))):
        check_sequence_parallel(transformer(**option))
    check_sequence_parallel(transformer())


def test_sequence_parallelism_needs_ranks_that_share_layers(mesh_of):
    with pytest.raises(ToolmemError, match="tensor_parallel_size above 1"):
        parallelize(transformer(), mesh_of(2, 1), sequence_parallel=True)


def test_a_refused_model_is_left_as_it_was(mesh_of):
    model = transformer(dim=18, n_heads=3, n_kv_heads=3)
    before = {path: p.clone() for path, p in model.named_parameters()}
    with pytest.raises(ToolmemError):
        parallelize(model, mesh_of(1, 2))
    after = dict(model.named_parameters())
    assert not any(isinstance(p, DTensor) for p in after.values())
    assert all(torch.equal(p, before[path]) for path, p in after.items())
