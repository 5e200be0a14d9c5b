"""Keys: values, all different, the same everywhere, and blind to global randomness."""

import copy
import math
import pickle
import random
import tracemalloc
from dataclasses import FrozenInstanceError
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

import funcnet as fn
from funcnet import keys
from funcnet.testing import strategies

SEEDS = st.integers(0, 2**64 - 1)
EDGES = [0, 1, 2**31, 2**32 - 1, 2**32, 2**32 + 1, 2**63, 2**64 - 2, 2**64 - 1]


@given(SEEDS, SEEDS)
def test_different_seeds_are_different_keys(a, b):
    assert (fn.key(a) == fn.key(b)) == (a == b)
    draws = torch.equal(fn.uniform(fn.key(a), (4,)), fn.uniform(fn.key(b), (4,)))
    assert draws == (a == b)


def test_seeds_that_are_alike_in_some_bits_differ():
    assert len({fn.key(seed) for seed in EDGES}) == len(EDGES)
    assert len({tuple(fn.normal(fn.key(seed), (3,)).tolist()) for seed in EDGES}) == len(EDGES)


@given(SEEDS, st.integers(1, 40), SEEDS)
def test_derived_keys_are_all_different(seed, count, data):
    key = fn.key(seed)
    children = fn.split(key, count)
    assert isinstance(children, tuple)
    grandchildren = [grandchild for child in children[:5] for grandchild in fn.split(child, 5)]
    folded = {fn.fold_in(key, i) for i in {*range(count), data}}
    everything = {key, *children, *grandchildren, *folded}
    assert len(everything) == 1 + count + 5 * min(count, 5) + len({*range(count), data})


@given(SEEDS, st.integers(1, 20), st.integers(1, 20))
def test_split_starts_alike(seed, a, b):
    few, many = sorted([a, b])
    assert fn.split(fn.key(seed), many)[:few] == fn.split(fn.key(seed), few)


@given(SEEDS, st.lists(st.integers(0, 5), max_size=4), strategies.dtypes())
def test_drawing_twice_gives_the_same_and_asks_no_global_state(seed, shape, dtype):
    key, states, generator = fn.key(seed), _states(), torch.get_rng_state()
    for draw in (fn.uniform, fn.normal):
        x = draw(key, shape, dtype=dtype)
        assert x.shape == tuple(shape)
        assert x.dtype == dtype
        assert _states() == states
        torch.manual_seed(0)
        assert torch.equal(x, draw(key, shape, dtype=dtype))
        torch.set_rng_state(generator)
    assert torch.equal(fn.bernoulli(key, 0.5, shape), fn.bernoulli(key, 0.5, shape))
    fn.split(key)
    assert _states() == states


def _states():
    """The states of the global generators. str() would leave out most of a tensor's bytes."""
    return torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate()


def test_every_device_draws_the_same(device):
    for draw in (fn.uniform, fn.normal):
        x = draw(fn.key(0), (3, 4), device=device)
        assert x.device.type == device
        assert torch.equal(x.cpu(), draw(fn.key(0), (3, 4)))
    assert torch.equal(
        fn.bernoulli(fn.key(0), 0.5, (9,), device=device).cpu(), fn.bernoulli(fn.key(0), 0.5, (9,))
    )


def test_numbers_are_drawn_on_the_cpu_unless_told_otherwise():
    def draw_all(**where):
        yield fn.uniform(fn.key(0), (3,), 0.1, 0.7, **where)
        yield fn.normal(fn.key(0), (3,), **where)
        yield fn.bernoulli(fn.key(0), 0.5, (3,), **where)

    expected = [*draw_all(), fn.permutation(fn.key(0), 3)]
    with torch.device("meta"):
        found = [*draw_all(), fn.permutation(fn.key(0), 3)]
    for x, y in zip(found, expected, strict=True):
        assert torch.equal(x, y)
    assert [x.device.type for x in draw_all(device="meta")] == ["meta"] * 3


@given(
    SEEDS,
    st.floats(-1e6, 1e6),
    st.floats(0, 1e6),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_uniform_stays_within_its_interval(seed, low, width, dtype):
    low, high = (float(torch.tensor(end, dtype=dtype)) for end in (low / 100, (low + width) / 100))
    x = fn.uniform(fn.key(seed), (50,), low, high, dtype=dtype)
    assert (x >= low).all()
    assert (x < high).all() or low == high


@given(
    SEEDS,
    st.floats(-1e3, 1e3),
    st.floats(1e-3, 1e3),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16]),
)
def test_uniform_stays_within_ends_that_the_dtype_does_not_hold(seed, low, width, dtype):
    high = low + width
    assume(width > 4 * torch.finfo(dtype).eps * max(abs(low), abs(high)))
    x = fn.uniform(fn.key(seed), (200,), low, high, dtype=dtype).double()
    assert low <= float(x.min()) <= float(x.max()) < high


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_uniform_where_the_dtype_has_no_number(dtype):
    for value in (0.7, 0.1):
        expected = torch.full((2,), value, dtype=dtype)
        assert torch.equal(fn.uniform(fn.key(0), (2,), value, value, dtype=dtype), expected)
    x = fn.uniform(fn.key(0), (2,), 1 + 1e-17, 1 + 2e-17, dtype=dtype)
    assert torch.equal(x, torch.ones(2, dtype=dtype))


@pytest.mark.parametrize("p", [[0.5], "x", True, np.array([0.5, 0.5]), torch.tensor(0.5)], ids=str)
def test_probabilities_are_numbers(p):
    with pytest.raises(TypeError, match="bernoulli: expected a probability p in"):
        fn.bernoulli(fn.key(0), p, (3,))


def test_uniform_of_a_range_that_no_number_spans():
    with pytest.raises(ValueError, match=r"uniform: expected a range within torch\.float32"):
        fn.uniform(fn.key(0), (3,), -3e38, 3e38)
    with pytest.raises(ValueError, match=r"uniform: expected a range within torch\.float16"):
        fn.uniform(fn.key(0), (3,), 0.0, 1e5, dtype=torch.float16)
    assert fn.uniform(fn.key(0), (9,), -3e38, 3e38, torch.float64).isfinite().all()


def test_distributions():
    n = 100_000
    x = fn.uniform(fn.key(0), (n,), -1.0, 3.0, dtype=torch.float64)
    assert float(x.mean()) == pytest.approx(1, abs=0.02)
    assert float(x.var()) == pytest.approx(16 / 12, rel=0.02)
    z = fn.normal(fn.key(1), (n,), mean=2.0, std=0.5, dtype=torch.float64)
    assert float(z.mean()) == pytest.approx(2, abs=0.01)
    assert float(z.std()) == pytest.approx(0.5, rel=0.02)
    assert float(fn.bernoulli(fn.key(2), 0.3, (n,)).double().mean()) == pytest.approx(0.3, abs=0.01)
    children = torch.stack([fn.normal(key, (1000,)) for key in fn.split(fn.key(3), 8)])
    correlations = torch.corrcoef(children) - torch.eye(8)
    assert correlations.abs().max() < 0.15


def test_bernoulli_at_its_ends():
    assert not fn.bernoulli(fn.key(0), 0.0, (1000,)).any()
    assert fn.bernoulli(fn.key(0), 1.0, (1000,)).all()
    assert fn.bernoulli(fn.key(0), 0.5, (2, 3)).dtype == torch.bool


def test_bernoulli_is_drawn_in_parts_with_the_numbers_of_the_whole(monkeypatch):
    sizes = ((), (1,), (3, 7), (5, 0), (40, 5))
    whole = [fn.bernoulli(fn.key(3), 0.4, size) for size in sizes]
    monkeypatch.setattr(keys, "_AT_ONCE", 7)
    for size, drawn in zip(sizes, whole, strict=True):
        assert torch.equal(fn.bernoulli(fn.key(3), 0.4, size), drawn)
        unit = np.random.Generator(np.random.Philox(key=fn.key(3).data)).random(size)
        assert np.array_equal(drawn.numpy(), unit < 0.4)
    tracemalloc.start()
    fn.bernoulli(fn.key(3), 0.4, (2**21,))
    assert tracemalloc.get_traced_memory()[1] < 2 * 2**21
    tracemalloc.stop()


@given(SEEDS, st.integers(0, 50))
def test_permutations(seed, n):
    states = _states()
    order = fn.permutation(fn.key(seed), n)
    assert order.dtype == torch.int64
    assert sorted(order.tolist()) == list(range(n))
    assert torch.equal(order, fn.permutation(fn.key(seed), n))
    assert _states() == states


def test_every_order_is_equally_probable():
    orders = [tuple(fn.permutation(key, 3).tolist()) for key in fn.split(fn.key(0), 6000)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert max(abs(count - 1000) for count in counts) < 150


def test_keys_are_values():
    key = fn.key(7)
    for copied in (copy.deepcopy(key), pickle.loads(pickle.dumps(key)), eval(repr(key), vars(fn))):
        assert copied == key
        assert hash(copied) == hash(key)
    for name in ("data", "seed"):
        with pytest.raises(FrozenInstanceError):
            setattr(key, name, 1)
        with pytest.raises(FrozenInstanceError):
            delattr(key, name)


def test_numbers_may_be_large_ints():
    assert fn.normal(fn.key(0), (3,), mean=10**30).sub(1e30).abs().max() < 1e24
    assert fn.uniform(fn.key(0), (3,), 0, 10**30, torch.float64).max() < 1e30


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fn.key(-1), ValueError, r"key: expected seed in \[0, 2\*\*64\), got -1"),
        (lambda: fn.key(2**64), ValueError, r"key: expected seed in"),
        (lambda: fn.key(1.0), TypeError, "key: expected seed to be an int, got 1.0"),
        (lambda: fn.key(True), TypeError, "key: expected seed to be an int, got True"),
        (lambda: fn.split(fn.key(0), -1), ValueError, "split: expected num >= 1, got -1"),
        (lambda: fn.split(fn.key(0), 0), ValueError, "split: expected num >= 1, got 0"),
        (lambda: fn.split(fn.key(0), 2.0), TypeError, "split: expected num to be an int"),
        (lambda: fn.permutation(0, 3), TypeError, "permutation: expected a key"),
        (lambda: fn.permutation(fn.key(0), -1), ValueError, "permutation: expected n >= 0, got -1"),
        (
            lambda: fn.permutation(fn.key(0), 2**63),
            ValueError,
            r"permutation: expected n < 2\*\*63",
        ),
        (lambda: fn.permutation(fn.key(0), 3.0), TypeError, "permutation: expected n to be an int"),
        (lambda: fn.split(0), TypeError, "split: expected a key made by funcnet.key"),
        (lambda: fn.fold_in(fn.key(0), -1), ValueError, "fold_in: expected data in"),
        (lambda: fn.fold_in(None, 1), TypeError, "fold_in: expected a key"),
        (
            lambda: torch.func.vmap(partial(fn.fold_in, fn.key(0)))(torch.arange(2)),
            TypeError,
            "fold_in: expected data to be an int, got a Tensor",
        ),
        (lambda: fn.uniform(0, (1,)), TypeError, "uniform: expected a key"),
        (lambda: fn.uniform(fn.key(0), 3), TypeError, "uniform: expected shape to be a sequence"),
        (lambda: fn.uniform(fn.key(0), (-1,)), ValueError, "uniform: expected every size in shape"),
        (lambda: fn.uniform(fn.key(0), (1,), 1.0, 0.0), ValueError, "expected low <= high"),
        (lambda: fn.uniform(fn.key(0), (1,), math.nan), ValueError, "expected low to be finite"),
        (lambda: fn.uniform(fn.key(0), (1,), 0, math.inf), ValueError, "expected high to be fini"),
        (lambda: fn.uniform(fn.key(0), (1,), "0.5"), TypeError, "expected low to be a number, got"),
        (lambda: fn.uniform(fn.key(0), (1,), False), TypeError, "expected low to be a number, got"),
        (lambda: fn.uniform(fn.key(0), (1,), dtype=torch.int64), TypeError, "floating-point dtype"),
        (
            lambda: fn.uniform(fn.key(0), (1,), dtype=torch.float8_e5m2),
            TypeError,
            r"uniform: expected a floating-point dtype of torch, of 16 bits or more, got .*e5m2",
        ),
        (lambda: fn.uniform(fn.key(0), (1,), 0, 10**400), ValueError, "expected high to fit"),
        (lambda: fn.normal(fn.key(0), (1,), mean=10**400), ValueError, "expected mean to fit"),
        (lambda: fn.normal(fn.key(0), (1,), mean=None), TypeError, "expected mean to be a number"),
        (lambda: fn.normal(fn.key(0), (1,), std=-1.0), ValueError, "normal: expected std >= 0"),
        (
            lambda: fn.normal(fn.key(0), (1,), std=math.nan),
            ValueError,
            "normal: expected std to be",
        ),
        (
            lambda: fn.normal(fn.key(0), (1,), std=math.inf),
            ValueError,
            "normal: expected std to be",
        ),
        (
            lambda: fn.normal(fn.key(0), (1,), math.nan),
            ValueError,
            "normal: expected mean to be fi",
        ),
        (lambda: fn.bernoulli(fn.key(0), 1.5, (1,)), ValueError, r"probability p in \[0, 1\]"),
        (lambda: fn.bernoulli(fn.key(0), math.nan, (1,)), ValueError, "probability p in"),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()


# --- Under torch.compile


def _draws(key):
    first, second, third, last = fn.split(fn.fold_in(key, 3), 4)
    return (
        fn.normal(key, (3,)),
        fn.normal(first, (2, 3), 1.0, 2.0, torch.float64),
        fn.uniform(second, (4,), -1.0),
        fn.bernoulli(third, 0.4, (9,)),
        fn.permutation(last, 6),
    )


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_draws_in_a_compiled_function_are_the_eager_ones(backend):
    torch.compiler.reset()
    compiled = torch.compile(lambda x, key: (x + 1, *_draws(key)), backend=backend, fullgraph=True)
    for seed in (0, 7):
        found = compiled(torch.zeros(2), fn.key(seed))[1:]
        for got, expected in zip(found, _draws(fn.key(seed)), strict=True):
            assert got.dtype == expected.dtype
            assert torch.equal(got, expected)


def test_a_key_in_compiled_inference():
    layer, x = fn.Dropout(0.5), torch.ones(9)
    compiled = torch.compile(lambda x, key: layer.apply((), x, key=key), backend="eager")
    for key in (fn.key(0), fn.key(1)):
        expected = layer.apply((), x, key=key)
        assert torch.equal(compiled(x, key), expected)
        with torch.inference_mode():
            assert torch.equal(compiled(x, key), expected)
            assert torch.equal(compiled(x, fn.fold_in(key, 1)), compiled(x, fn.fold_in(key, 1)))


def test_a_key_in_a_compiled_gradient():
    """PyTorch does not compile a function that meets an array inside of torch.func.grad."""

    def gradient(x, key):
        return torch.func.grad(lambda x: (x * fn.normal(key, x.shape)).sum())(x)

    compiled = torch.compile(gradient, backend="eager", fullgraph=True)
    for key in (fn.key(0), fn.key(1)):
        assert torch.equal(compiled(torch.ones(3), key), fn.normal(key, (3,)))


def test_draws_in_a_compiled_function_for_x_of_any_size():
    def noisy(x, key):
        return x + fn.normal(key, x.shape)

    compiled = torch.compile(noisy, backend="aot_eager", fullgraph=True, dynamic=True)
    for size in (2, 5, 9):
        x = torch.zeros(size, 3)
        assert torch.equal(compiled(x, fn.key(size)), noisy(x, fn.key(size)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_number_of_a_step_in_a_compiled_function_is_any(backend):
    """An int is held open from the second step on, as PyTorch does with ints."""

    def noisy(x, step):
        return x + fn.normal(fn.fold_in(fn.key(3), step), (2,))

    torch.compiler.reset()
    counter = CompileCounterWithBackend(backend)
    compiled, x = torch.compile(noisy, backend=counter, fullgraph=True), torch.zeros(2)
    for step in (0, 1, 2, 3, 2**62):
        assert torch.equal(compiled(x, step), noisy(x, step))
    assert counter.frame_count <= 3  # PyTorch takes 0 and 1 apart


def test_draws_in_a_compiled_function_that_breaks_its_graph():
    def noisy(x, key):
        first, second = fn.split(key)
        torch._dynamo.graph_break()
        return x + fn.normal(first, (2,)), fn.fold_in(second, 1)

    compiled = torch.compile(noisy, backend="eager")
    x, key = torch.zeros(2), fn.key(3)
    (found, last), (expected, also) = compiled(x, key), noisy(x, key)
    assert torch.equal(found, expected)
    assert last == also


def test_a_key_that_a_compiled_function_returns():
    compiled = torch.compile(
        lambda x, key: (x + 1, fn.split(key)[1]), backend="eager", fullgraph=True
    )
    expected = fn.split(fn.key(5))[1]
    key = compiled(torch.zeros(2), fn.key(5))[1]
    assert key == expected
    assert expected == key
    assert key != fn.key(5)
    assert key != expected.data
    assert hash(key) == hash(expected)
    assert repr(key) == repr(expected)
    assert key.data == expected.data
    assert fn.fold_in(key, 1) == fn.fold_in(expected, 1)
    assert torch.equal(fn.normal(key, (3,)), fn.normal(expected, (3,)))
    assert type(pickle.loads(pickle.dumps(key))) is type(copy.deepcopy(key)) is fn.Key
    with pytest.raises(FrozenInstanceError):
        key.data = 1
