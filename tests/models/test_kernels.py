"""The kernels in C: against float64 written plainly, the same bits whatever else is computed, and torch
in their place where there are none."""

import copy
import logging
import math
import multiprocessing
import shutil
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from toolmem.models import Transformer, kernels
from toolmem.models.kernels import build, functions

SHAPES = [(7, 5), (64, 32), (61, 47), (1, 33), (130, 1), (3, 576), (96, 200), (8, 16)]
HEADS = [  # heads, key/value heads, head_dim, page size
    (9, 3, 64, 16),
    (8, 8, 16, 4),
    (14, 2, 40, 5),
    (7, 1, 128, 16),
    (4, 2, 72, 1),
    (1, 1, 8, 16),
]

compiled = pytest.mark.skipif(
    shutil.which("cc") is None, reason="no C compiler: the kernels cannot be built"
)


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """As if nothing had been built or loaded yet; the cache is empty."""
    monkeypatch.setenv("TOOLMEM_CACHE", str(tmp_path))
    monkeypatch.delenv("TOOLMEM_KERNELS", raising=False)
    monkeypatch.delenv("CC", raising=False)
    build.library.cache_clear()
    yield tmp_path / "kernels"
    build.library.cache_clear()


@pytest.fixture
def without(monkeypatch):
    """Kernels switched off."""
    monkeypatch.setenv("TOOLMEM_KERNELS", "0")
    build.library.cache_clear()
    yield
    build.library.cache_clear()


def product(shape, rows, bias=True, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    outputs, inputs = shape
    x = torch.randn(rows, inputs, generator=generator)
    weight = torch.randn(outputs, inputs, generator=generator).to(dtype)
    return x, weight, torch.randn(outputs, generator=generator) if bias else None


@compiled
def test_there_are_kernels_where_there_is_a_compiler():
    assert kernels.available()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("function", "dtype"),
    [
        (kernels.linear, torch.float32),
        (kernels.linear, torch.bfloat16),
        (kernels.fast_linear, torch.float32),
    ],
)
def test_products_equal_float64(function, shape, dtype):
    for rows in (1, 2, 6, 7, 13, 70, functions.MANY_ROWS):
        x, weight, bias = product(shape, rows, rows % 2 == 0, dtype)
        want = x.double() @ weight.double().T + (0 if bias is None else bias.double())
        # sums of n products, each at most this large: a bound that holds in any order
        largest = x.abs().double() @ weight.abs().double().T
        assert ((function(x, weight, bias) - want).abs() <= 1e-6 * (largest + 1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_row_has_the_same_bits_whatever_rows_stand_beside_it(shape, dtype):
    x, weight, bias = product(shape, 300, dtype=dtype)
    whole = kernels.linear(x, weight, bias)
    for rows in [*range(1, 28), 64, 97, 299]:
        first = (rows * 7) % (301 - rows)
        part = kernels.linear(x[first : first + rows], weight, bias)
        assert torch.equal(part, whole[first : first + rows]), rows
    torch.set_num_threads(2)
    assert torch.equal(kernels.linear(x[:11], weight, bias), whole[:11])


def test_batch_dimensions_strides_and_no_rows():
    x, weight, bias = product((12, 20), 6)
    want = kernels.linear(x, weight, bias)
    assert torch.equal(kernels.linear(x.view(2, 3, 20), weight, bias), want.view(2, 3, 12))
    assert torch.equal(kernels.linear(x[0], weight, bias), want[0])
    strided = torch.randn(6, 40)[:, ::2]
    strided.copy_(x)
    assert torch.equal(kernels.linear(strided, weight, bias), want)
    assert kernels.linear(x[:0], weight, bias).shape == (0, 12)
    # a weight that is a view is no kernel's affair, and right all the same
    view = torch.randn(20, 12).T
    torch.testing.assert_close(kernels.fast_linear(x, view), F.linear(x, view))


def test_not_a_number_stays_one():
    x, weight, _ = product((9, 30), 5)
    x[2, 3] = float("nan")
    x[4, 0] = float("inf")
    y = kernels.linear(x, weight)
    assert y[2].isnan().all() and y[4].isinf().all()
    assert y[[0, 1, 3]].isfinite().all()


def lanes(heads, n_kv, width, size, seed=0):
    """A batch of ragged lanes: queries, new keys, new values, pages of both, tables, lengths."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    lengths = torch.tensor([0, 3 * size - 1, 3 * size, 6 * size + size // 2, -1, 1])
    b, n = len(lengths), 8
    tables = (torch.randperm(b * n, generator=generator) + 1).view(b, n)
    pages = [draw(b * n + 1, n_kv, size, width) for _ in range(2)]
    new = [draw(b, heads, width), draw(b, n_kv, width), draw(b, n_kv, width)]
    return [*new, *pages, tables.int(), lengths.int()]


def attended(queries, keys, values, key_pages, value_pages, tables, lengths, scale, softcap):
    """In float64: each lane's tokens laid in a row one by one, then attention."""
    size, share = key_pages.shape[2], queries.shape[1] // keys.shape[1]
    y = torch.zeros(queries.shape, dtype=torch.float64)
    for lane, length in enumerate(lengths.tolist()):
        if length < 0:
            continue
        places = [(int(tables[lane, t // size]), t % size) for t in range(length)]
        for head in range(queries.shape[1]):
            k = head // share
            all_keys = torch.stack([*(key_pages[p, k, i] for p, i in places), keys[lane, k]])
            all_values = torch.stack([*(value_pages[p, k, i] for p, i in places), values[lane, k]])
            scores = all_keys.double() @ queries[lane, head].double() * scale
            if softcap:
                scores = softcap * torch.tanh(scores / softcap)
            y[lane, head] = scores.softmax(0) @ all_values.double()
    return y


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("sizes", HEADS)
def test_paged_attention_equals_a_plain_gather(sizes, softcap):
    batch = lanes(*sizes)
    scale = 2 / sizes[2] ** 0.5
    want = attended(*batch, scale, softcap)
    before = [pages.clone() for pages in batch[3:5]]
    torch.testing.assert_close(
        kernels.paged_attention(*batch, scale, softcap).double(), want, rtol=1e-5, atol=2e-6
    )
    # the new token is where it belongs, and nothing else has changed
    tables, lengths, size = batch[5], batch[6], sizes[3]
    for pages, was, new in zip(batch[3:5], before, batch[1:3], strict=True):
        for lane, length in enumerate(lengths.tolist()):
            if length >= 0:
                was[tables[lane, length // size], :, length % size] = new[lane]
        assert torch.equal(pages, was)


@pytest.mark.parametrize("sizes", HEADS[:3])
def test_a_lane_has_the_same_bits_alone(sizes):
    batch = lanes(*sizes)
    whole = kernels.paged_attention(*batch, 0.3)
    torch.set_num_threads(2)
    assert torch.equal(kernels.paged_attention(*batch, 0.3), whole)
    for lane in range(len(batch[6])):
        one = [t if i in (3, 4) else t[lane : lane + 1] for i, t in enumerate(batch)]
        assert torch.equal(kernels.paged_attention(*one, 0.3), whole[lane : lane + 1])


def test_paged_attention_takes_views_of_one_projection():
    h, k, d = 6, 2, 16
    batch = lanes(h, k, d, 4)
    want = kernels.paged_attention(*[t.clone() for t in batch], 0.25)
    together = torch.cat(batch[:3], dim=1)
    views = [together[:, :h], together[:, h : h + k], together[:, h + k :]]
    assert torch.equal(kernels.paged_attention(*views, *batch[3:], 0.25), want)


@pytest.mark.parametrize("vocab", [1, 3, 16, 260, 5000])
def test_the_likeliest_token_and_its_log_probability(vocab):
    generator = torch.Generator().manual_seed(0)
    logits = 10 * torch.randn(33, vocab, generator=generator)
    logits[1] = -math.inf
    logits[1, vocab // 2] = 3.0
    logits[2] = 0.0  # all alike: the first
    logits[3] *= 1e4
    tokens, log_probs = functions.likeliest(logits)
    exact = logits.double().log_softmax(-1)
    assert tokens.tolist() == exact.argmax(-1).tolist() and tokens[2] == 0
    wanted = exact.gather(1, torch.from_numpy(tokens)[:, None])[:, 0]
    torch.testing.assert_close(torch.from_numpy(log_probs).double(), wanted, atol=2e-6, rtol=1e-6)
    strided = torch.randn(4, 2 * vocab, generator=generator)[:, ::2]
    assert functions.likeliest(strided)[0].tolist() == strided.argmax(-1).tolist()
    logits[5, 0] = math.nan
    assert math.isnan(functions.likeliest(logits)[1][5]), "not a number stays one"


def test_scores_far_apart_and_not_a_number():
    batch = lanes(2, 1, 8, 4)
    batch[0] *= 300
    want = attended(*batch, 1.0, 0.0)
    torch.testing.assert_close(
        kernels.paged_attention(*batch, 1.0).double(), want, rtol=1e-4, atol=1e-4
    )
    batch[0][1, 0, 0] = float("nan")
    y = kernels.paged_attention(*batch, 1.0)
    assert y[1, 0].isnan().all() and y[1, 1].isfinite().all()


@compiled
def test_a_table_that_is_too_short_is_refused():
    batch = lanes(2, 1, 8, 4)
    batch[5] = batch[5][:, :2].contiguous()
    with pytest.raises(AssertionError, match="table"):
        kernels.paged_attention(*batch, 1.0)
    batch = lanes(2, 1, 8, 4)
    batch[5][1, 0] = 10_000
    with pytest.raises(AssertionError, match="table"):
        kernels.paged_attention(*batch, 1.0)


@compiled
def test_what_the_kernel_takes():
    queries, keys = torch.zeros(2, 4, 16), torch.zeros(3, 2, 4, 16)
    assert kernels.usable(queries, keys)
    assert not kernels.usable(queries.double(), keys.double())
    assert not kernels.usable(queries.bfloat16(), keys)
    assert kernels.usable(queries[..., :12], keys[..., :12].contiguous())  # any width of heads
    assert not kernels.usable(queries, keys.transpose(1, 2))
    assert not kernels.usable(queries.to("meta"), keys.to("meta"))
    wanted = queries.clone().requires_grad_()
    assert not kernels.usable(wanted, keys)
    with torch.no_grad():
        assert kernels.usable(wanted, keys)


def test_without_kernels_the_same(without):
    assert not kernels.available()
    assert not kernels.usable(torch.zeros(2, 4, 16), torch.zeros(3, 2, 4, 16))
    x, weight, bias = product((61, 47), 9)
    whole = kernels.linear(x, weight, bias)
    torch.testing.assert_close(whole, F.linear(x, weight, bias))
    for rows in (1, 2, 5):
        assert torch.equal(kernels.linear(x[3 : 3 + rows], weight, bias), whole[3 : 3 + rows])
    batch = lanes(4, 2, 16, 4)
    want = attended(*batch, 0.25, 0.0)
    torch.testing.assert_close(
        kernels.paged_attention(*batch, 0.25).double(), want, rtol=1e-5, atol=2e-6
    )


def test_no_compiler_says_why_once_and_torch_serves(fresh, monkeypatch, caplog):
    monkeypatch.setenv("CC", "no-such-compiler-anywhere")
    with caplog.at_level(logging.INFO, logger=build.__name__):
        assert not kernels.available() and not kernels.available()
    assert len(caplog.records) == 1 and "no-such-compiler-anywhere" in caplog.text
    x, weight, bias = product((5, 4), 3)
    torch.testing.assert_close(kernels.fast_linear(x, weight, bias), F.linear(x, weight, bias))


@compiled
def test_a_build_that_fails_leaves_nothing_behind(fresh, monkeypatch, tmp_path, caplog):
    broken = tmp_path / "broken.c"
    broken.write_text("this is not C\n")
    monkeypatch.setattr(build, "SOURCE", broken)
    with caplog.at_level(logging.INFO, logger=build.__name__):
        assert not kernels.available()
    assert "error" in caplog.text
    assert list(fresh.iterdir()) == []


@compiled
def test_a_cache_that_cannot_be_written_is_no_error(fresh, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TOOLMEM_CACHE", str(tmp_path / "file"))
    assert not kernels.available()


@compiled
def test_without_openmp_it_is_built_for_one_thread(fresh, monkeypatch):
    monkeypatch.setattr(build, "VARIANTS", (("-fno-such-option",), ()))
    assert kernels.available()
    x, weight, bias = product((61, 47), 9)
    torch.set_num_threads(2)
    torch.testing.assert_close(kernels.linear(x, weight, bias), F.linear(x, weight, bias))


BUILD = """
import sys
from toolmem.models import kernels
print("ready", flush=True)
sys.stdin.readline()
assert kernels.available()
"""


@compiled
def test_two_processes_that_build_at_once_and_one_that_finds_it_built(fresh):
    both = [
        subprocess.Popen(
            [sys.executable, "-c", BUILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        for _ in range(2)
    ]
    for process in both:
        assert process.stdout.readline() == b"ready\n"
    for process in both:  # imports done, now together
        process.stdin.write(b"go\n")
        process.stdin.flush()
    for process in both:
        process.communicate(timeout=250)
    assert [process.returncode for process in both] == [0, 0]
    (built,) = fresh.iterdir()
    made = built.stat().st_mtime_ns
    assert kernels.available()
    assert [built.stat().st_mtime_ns] == [path.stat().st_mtime_ns for path in fresh.iterdir()]
    assert built.stat().st_mtime_ns == made


def models():
    return {
        "tied, muP": Transformer(
            40, 32, 2, 2, tie_embeddings=True, initialization="mup", mup_base_dim=16, bias=True
        ),
        "plain": Transformer(40, 32, 2, 4, n_kv_heads=2, feed_forward="gelu"),
    }


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("name", models())
def test_an_accelerated_model_equals_itself(name, invariant):
    torch.manual_seed(0)
    model = models()[name].eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    tokens = torch.randint(40, (2, 9))
    with torch.no_grad():
        want = model(tokens)
        with kernels.accelerate(model, invariant):
            got = model(tokens)
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
            # the weights are read anew at each call
            model.blocks[0].mixer.out.weight.mul_(2)
            model.embedding.weight.mul_(1.5)
            changed = model(tokens)
        torch.testing.assert_close(changed, model(tokens), rtol=1e-4, atol=1e-5)
        assert not torch.allclose(changed, want, rtol=1e-3, atol=1e-3)
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))


@compiled
def test_an_accelerated_layer_runs_the_kernel():
    layer = nn.Linear(47, 61)
    x = torch.randn(3, 47)
    with torch.no_grad(), kernels.accelerate(layer):
        assert torch.equal(layer(x), kernels.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("invariant", [False, True])
def test_gradients_are_as_ever(invariant):
    layer = nn.Linear(6, 5)
    x = torch.randn(3, 6, requires_grad=True)
    F.linear(x, layer.weight, layer.bias).square().sum().backward()
    want = [x.grad.clone(), layer.weight.grad.clone(), layer.bias.grad.clone()]
    x.grad = None
    layer.zero_grad()
    with kernels.accelerate(layer, invariant):
        layer(x).square().sum().backward()
    torch.testing.assert_close([x.grad, layer.weight.grad, layer.bias.grad], want)
    # weights that are frozen, inputs that are not
    x.grad = None
    layer.requires_grad_(False)
    with kernels.accelerate(layer, invariant):
        layer(x).square().sum().backward()
    torch.testing.assert_close(x.grad, want[0])


def test_other_linear_layers_stay_as_they_are():
    class Own(nn.Linear):
        def forward(self, input):
            return 7 * super().forward(input)

    model = nn.Sequential(Own(4, 4), nn.Linear(4, 4), nn.Conv1d(4, 4, 1))
    x = torch.randn(4, 4)
    with torch.no_grad():
        want = model(x)
        with kernels.accelerate(model):
            assert type(model[0]) is Own
            torch.testing.assert_close(model(x), want)


def test_two_users_of_one_model_and_a_copy():
    layer = nn.Linear(6, 5)
    one, two = kernels.accelerate(layer), kernels.accelerate(layer, invariant=True)
    one.close()
    one.close()
    x = torch.randn(4, 6)
    with torch.no_grad():
        assert torch.equal(layer(x)[:1], layer(x[:1]))
        clone = copy.deepcopy(layer)
        clone.weight.zero_()
        assert torch.equal(clone(x), clone.bias.expand(4, -1))
        assert layer.weight.any()
    three = kernels.accelerate(layer)
    two.close()
    assert type(layer) is not nn.Linear
    three.close()
    assert type(layer) is nn.Linear


def test_a_compiled_model_is_traced_through():
    layer = nn.Linear(6, 5)
    x = torch.randn(3, 6)
    with torch.no_grad(), kernels.accelerate(layer):
        compiled_layer = torch.compile(layer, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled_layer(x), F.linear(x, layer.weight, layer.bias))


def test_operations_can_still_be_counted():
    from torch.utils.flop_counter import FlopCounterMode

    layer = nn.Linear(6, 5)
    with torch.no_grad(), kernels.accelerate(layer), FlopCounterMode(display=False) as counter:
        layer(torch.randn(3, 6))
    assert counter.get_total_flops() == 2 * 3 * 6 * 5


def test_the_source_is_part_of_the_package():
    assert build.SOURCE.is_file()
    assert functions.MANY_ROWS > 16


def _child(queue):
    x, weight, bias = product((61, 47), 9)
    queue.put(kernels.linear(x, weight, bias).sum().item())


@compiled
def test_a_forked_process_computes_too():
    x, weight, bias = product((61, 47), 9)
    want = kernels.linear(x, weight, bias).sum().item()
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    process = context.Process(target=_child, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == want
    process.join(60)
