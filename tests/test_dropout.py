"""Dropout: what follows from the key and what does not; the statistics of its masks."""

import math
import re
import subprocess
import sys
from itertools import pairwise

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from test_transforms import needs_a_compiler
from torch._subclasses.fake_tensor import FakeTensorMode

import funcnet as fn
from funcnet.ops import counter
from funcnet.testing import check_vjp, strategies

CPU = torch.device("cpu")
LAYERS = [fn.Dropout(), fn.Dropout(0.1), fn.Dropout2d(0.3), fn.Dropout(0.0), fn.Dropout(1.0)]


def mask(p, shape, seed=0):
    return counter.bernoulli(fn.key(seed), p, shape, CPU)


def deviations(count, p, size):
    """How many standard deviations a count of hits is off."""
    return abs(count - p * size) / math.sqrt(p * (1 - p) * size)


# --- The layers


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_evaluation_copies(layer):
    x = torch.randn(2, 3, 4, 5)
    grad = torch.randn(2, 3, 4, 5)
    y = layer.apply((), x)
    assert torch.equal(y, x)
    assert y.data_ptr() != x.data_ptr()
    dparams, dx = layer.vjp((), x, grad)
    assert dparams == ()
    assert torch.equal(dx, grad)
    assert dx.data_ptr() != grad.data_ptr()


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_what_stays_is_scaled_and_dx_goes_the_same_way(layer):
    x, grad = torch.randn(2, 3, 4, 5), torch.randn(2, 3, 4, 5)
    y = layer.apply((), x, key=fn.key(1))
    dx = layer.vjp((), x, grad, key=fn.key(1))[1]
    kept = y != 0
    scale = 1 / (1 - layer.p) if layer.p < 1 else 0.0
    torch.testing.assert_close(y, x * kept * scale)
    torch.testing.assert_close(dx, grad * kept * scale)
    assert torch.equal(layer.apply((), x, key=fn.key(1)), y)
    if 0 < layer.p < 1:
        assert not torch.equal(layer.apply((), x, key=fn.key(2)), y)
        assert not torch.equal(kept[0], kept[1])  # every example has its own


def test_all_is_dropped_whatever_it_is():
    x = torch.tensor([math.inf, math.nan, 1.0])
    assert fn.Dropout(1.0).apply((), x, key=fn.key(0)).tolist() == [0, 0, 0]


@given(st.sampled_from(LAYERS), st.data())
def test_the_mask_follows_from_the_key_alone(layer, data):
    x = data.draw(strategies.tensors((2, 3, 4, 5), torch.float64, integers=False))
    ones = torch.ones(2, 3, 4, 5)
    expected = layer.apply((), ones, key=fn.key(5)) != 0
    for other in (x, x.float(), x.bfloat16(), x.half()):
        assert torch.equal(layer.apply((), other, key=fn.key(5)) != 0, expected & (other != 0))


def test_an_example_keeps_its_mask_in_a_larger_batch():
    x = torch.ones(5, 7, 3, 3)
    for layer in LAYERS:
        y = layer.apply((), x, key=fn.key(0))
        assert torch.equal(layer.apply((), x[:2], key=fn.key(0)), y[:2])


def test_whole_channels_are_dropped():
    y = fn.Dropout2d().apply((), torch.ones(50, 20, 3, 4), key=fn.key(0))
    assert set(y.sum((2, 3)).unique().tolist()) == {0, 24}
    with pytest.raises(ValueError, match=re.escape("expected x of shape (N, C, H, W), got (2, 3)")):
        fn.Dropout2d().apply((), torch.zeros(2, 3))


@pytest.mark.parametrize("layer", LAYERS, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_gradients(layer, dtype):
    x = fn.normal(fn.key(0), (3, 2, 3, 2), dtype=dtype)
    check_vjp(layer, (), x, key=fn.key(1))


@pytest.mark.parametrize("layer", [fn.Dropout(0.4), fn.Dropout2d(0.4), fn.Dropout2d(1)], ids=repr)
def test_in_place_is_the_same(layer):
    key = fn.key(0)
    x, grad = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    net = fn.Sequential(fn.Upsample2d(1), layer, fn.Upsample2d(1))  # which own what they return
    own = fn.fold_in(key, 1)
    assert torch.equal(net.apply(((),) * 3, x, key=key), layer.apply((), x, key=own))
    dx = net.vjp(((),) * 3, x, grad, key=key)[1]
    assert torch.equal(dx, layer.vjp((), x, grad, key=own)[1])


def test_residuals_are_a_bool_an_entry():
    _, (_, kept) = fn.Dropout().fwd((), torch.ones(4, 6), key=fn.key(0))
    assert (kept.dtype, kept.shape) == (torch.bool, (4, 6))
    _, (_, kept) = fn.Dropout2d().fwd((), torch.ones(4, 6, 2, 2), key=fn.key(0))
    assert kept.shape == (4, 6, 1, 1)
    assert fn.Dropout().fwd((), torch.ones(4, 6))[1][1] is None


def test_refusals():
    for wrong in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="Dropout: expected p"):
            fn.Dropout(wrong)
    with pytest.raises(TypeError, match="expected a key made by"):
        fn.Dropout().apply((), torch.ones(2), key=0)


# --- Under torch.func, torch.compile and on other devices


def test_every_slice_of_a_map_has_the_same_mask():
    x, grad = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    layer, key = fn.Dropout(), fn.key(0)
    y = torch.func.vmap(lambda x: layer.apply((), x, key=key))(x)
    dx = torch.func.vmap(lambda x, g: layer.vjp((), x, g, key=key)[1])(x, grad)
    for i in range(3):
        assert torch.equal(y[i], layer.apply((), x[i], key=key))
        assert torch.equal(dx[i], layer.vjp((), x[i], grad[i], key=key)[1])


# PyTorch's own use: a DeprecationWarning, and from 2.15 on a FutureWarning.
@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("layer", LAYERS, ids=repr)
def test_differentiated_forward_twice(layer):
    x = torch.randn(2, 3, 2, 1, dtype=torch.float64)

    def total(x):
        return layer.apply((), x, key=fn.key(1)).pow(2).sum()

    scale = layer.apply((), torch.ones_like(x), key=fn.key(1)).flatten()
    found = torch.func.jacfwd(torch.func.jacfwd(total))(x).reshape(x.numel(), x.numel())
    torch.testing.assert_close(found, torch.diag(2 * scale**2))


def test_a_compiled_training_step_takes_any_key_without_another_compilation():
    net = fn.Sequential(fn.Linear(6), fn.Dropout(0.4), fn.Sequential(fn.Linear(4), fn.Dropout()))
    params, x, target = net.init(fn.key(0), (5,)), torch.randn(3, 5), torch.randn(3, 4)
    value_and_grad = fn.value_and_grad(net, fn.MSE())

    adam = fn.Adam()
    state = adam.init(params)

    def step(params, x, key):
        first, second = fn.split(fn.fold_in(key, 2**63 + 1))
        y = net.apply(params, x, key=first)
        value, grads = value_and_grad(params, x, target, key=second)
        return y, value, adam.step(params, grads, state)

    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, backend=counted)
    for seed in (0, 1, 2, 2**64 - 1):
        found, expected = compiled(params, x, fn.key(seed)), step(params, x, fn.key(seed))
        torch.testing.assert_close(found, expected)
    assert counted.frame_count == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_once_for_batches_of_any_size(monkeypatch):
    """No loop over chunks is compiled, which would hold for one size alone."""
    monkeypatch.setattr(counter, "_CHUNK", 16)
    layer, key = fn.Dropout(0.3), fn.key(5)
    counted = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x: layer.apply((), x, key=key), fullgraph=True, backend=counted, dynamic=True
    )
    counts = set()
    for size in (3, 4, 9):
        x = torch.ones(size, 5)
        assert torch.equal(compiled(x), layer.apply((), x, key=key))
        counts.add(counted.frame_count)
    # PyTorch 2.15 asks the backend twice at the first size.
    assert counts == {2 if torch.__version__ >= (2, 15) else 1}


_COMPILED = """
import torch, funcnet as fn
layer, x = fn.Dropout(0.3), torch.ones(4, 36)
compiled = torch.compile(lambda x: layer.apply((), x, key=fn.key(5)), fullgraph=True)
for _ in range(60):
    assert torch.equal(compiled(x), layer.apply((), x, key=fn.key(5)))
"""


@needs_a_compiler
def test_compiled_it_writes_to_no_other_memory():
    """For sizes that are no multiple of a vector. It ended the process, so it runs in another."""
    done = subprocess.run(
        [sys.executable, "-c", _COMPILED], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0])
def test_drawn_on_a_gpu_without_asking_it(p):
    with FakeTensorMode():
        x = torch.empty(4, 6, device="cuda")
        y, residuals = fn.Dropout(p).fwd((), x, key=fn.key(0))
        assert y.device == residuals[1].device == x.device


def test_the_same_mask_on_every_device(device):
    x = torch.ones(3, 1001)
    y = fn.Dropout().apply((), x.to(device), key=fn.key(0))
    assert torch.equal(y.cpu(), fn.Dropout().apply((), x, key=fn.key(0)))


def test_the_generator_stays_as_it_is():
    """Masks of a released version can be drawn again by a later one."""
    found = mask(0.5, (32,)).int().tolist()
    assert found == MASK_OF_KEY_0


MASK_OF_KEY_0 = [int(bit) for bit in "01011100101001111001101011100110"]


# --- Masks


@pytest.mark.parametrize("p", [0.001, 0.01, 0.1, 0.3, 0.5, 0.9, 0.99, 0.999])
def test_the_rate(p):
    size = 2**21 + 3
    for seed in range(3):
        hits = mask(p, (size,), seed)
        assert deviations(int(hits.sum()), p, size) < 4.5
        for part in (hits[::2], hits[1::2], hits[: size // 8]):
            assert deviations(int(part.sum()), p, len(part)) < 4.5


@pytest.mark.parametrize("p", [0.5, 0.1])
def test_neighbours_examples_and_keys_are_independent(p):
    """Two entries are both hit with probability p², whatever leads from one to the other."""
    hits = mask(p, (1024, 1024))
    flat = hits.flatten()
    pairs = {f"{lag} apart": (flat[:-lag], flat[lag:]) for lag in (*range(1, 17), 63, 64, 1000)}
    pairs |= {f"{lag} examples apart": (hits[:-lag], hits[lag:]) for lag in (1, 2, 3, 64, 512)}
    derived = [counter.bernoulli(k, p, hits.shape, CPU) for k in fn.split(fn.key(0), 3)]
    pairs |= {f"key {i}": (a, b) for i, (a, b) in enumerate(pairwise([hits, *derived]))}
    for bit in (0, 63, 64, 96, 127):  # keys that differ in one bit
        other = fn.Key(fn.key(0).data ^ (1 << bit))
        pairs[f"bit {bit}"] = hits, counter.bernoulli(other, p, hits.shape, CPU)
    for name, (a, b) in pairs.items():
        assert deviations(int((a & b).sum()), p * p, a.numel()) < 4.5, name


def test_counts_in_blocks_vary_as_they_should():
    """The counts of hits in blocks of 64 entries are binomial: neither clumped nor too even."""
    counts = mask(0.3, (2**14, 64), 7).sum(1).double()
    n = len(counts)
    variance = 64 * 0.3 * 0.7
    assert abs(counts.var() / variance - 1) < 4.5 * math.sqrt(2 / n)


def test_chunks_are_one_sequence(monkeypatch):
    assert counter._CHUNK % 2 == 0  # two entries are the halves of one number
    whole = mask(0.4, (1001, 7))
    monkeypatch.setattr(counter, "_CHUNK", 64)
    assert torch.equal(mask(0.4, (1001, 7)), whole)
    for size in (1, 63, 64, 65, 128):
        assert torch.equal(mask(0.4, (size,)), whole.flatten()[:size])
    assert mask(0.4, (0, 3)).shape == (0, 3)
    assert mask(0.4, ()).shape == ()


def test_probabilities_at_the_ends():
    assert not mask(0.0, (1000,)).any()
    assert mask(1.0, (1000,)).all()
    assert mask(1.0, (1000,)).dtype == torch.bool
    assert mask(1 - 1e-15, (1000,)).all()
    assert not mask(1e-15, (1000,)).any()


@pytest.mark.parametrize("chunk", [8, 64])
def test_an_entry_is_hit_where_its_number_is_below_p(chunk, monkeypatch):
    """To the last of the 2³² numbers."""
    monkeypatch.setattr(counter, "_CHUNK", chunk)
    numbers = counter._random(fn.key(0), 0, 33, CPU)
    for i, number in enumerate(numbers.tolist()):
        p = (number + 2**31) / 2**32
        assert not mask(p, (33,))[i]
        assert mask(p + 2**-32, (33,))[i]
