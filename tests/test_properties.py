"""What holds for every layer, driven by the registry."""

import copy
import inspect
import pickle

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from registry import EVERY_LAYER, EXAMPLE_IDS, EXAMPLES, REGISTRY

import funcnet as fn
from funcnet.testing import check_vjp, strategies

examples = pytest.mark.parametrize(("layer", "shape"), EXAMPLES, ids=EXAMPLE_IDS)


def make(layer, shape, batch=2, dtype=torch.float32, device="cpu"):
    params = layer.init(fn.key(3), shape, dtype=dtype, device=device)
    x = fn.normal(fn.key(4), (batch, *shape), dtype=dtype, device=device)
    grad = fn.normal(fn.key(5), layer.apply(params, x).shape, dtype=dtype, device=device)
    return params, x, grad


def same(a, b):
    """Equal trees of tensors, bit for bit."""
    return optree.tree_structure(a) == optree.tree_structure(b) and all(
        torch.equal(p, q) for p, q in zip(optree.tree_leaves(a), optree.tree_leaves(b), strict=True)
    )


def close(a, b, **tolerances):
    leaves = zip(optree.tree_leaves(a), optree.tree_leaves(b), strict=True)
    for p, q in leaves:
        torch.testing.assert_close(p, q, **tolerances)


def test_every_layer_has_a_row():
    public = {getattr(fn, name) for name in fn.__all__}
    layers = {cls for cls in public if inspect.isclass(cls) and issubclass(cls, fn.Layer)}
    assert layers - {fn.Layer} == set(REGISTRY)


# --- The gradient, by check_vjp: every oracle and the whole contract


@given(st.data())
@pytest.mark.parametrize("cls", REGISTRY, ids=lambda cls: cls.__name__)
def test_gradient(cls, data):
    check_vjp(*data.draw(strategies.cases(REGISTRY[cls].strategy)))


@examples
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_gradient_of_examples(layer, shape, dtype, device):
    params, x, grad = make(layer, shape, dtype=dtype, device=device)
    check_vjp(layer, params, x, grad=grad)


# --- Metamorphic laws


@given(strategies.cases(EVERY_LAYER, integers=True, dtypes=st.just(torch.float64)), st.data())
def test_a_network_is_the_composition_of_its_layers(case, data):
    layer, params, x = case
    y = layer.apply(params, x)
    shape = tuple(y.shape[1:])
    after = data.draw(strategies.networks())
    if not strategies.takes(after, shape):
        after = fn.Sigmoid()
    after_params = after.init(fn.key(1), shape, dtype=x.dtype)
    net, both = fn.Sequential(layer, after), (params, after_params)
    grad = fn.normal(fn.key(2), after.apply(after_params, y).shape, dtype=x.dtype)
    dafter, dy = after.vjp(after_params, y, grad)
    dparams, dx = layer.vjp(params, x, dy)
    close(net.apply(both, x), after.apply(after_params, y))
    close(net.vjp(both, x, grad), ((dparams, dafter), dx))


@given(strategies.cases(EVERY_LAYER, dtypes=st.just(torch.float64), batches=st.just(3)))
def test_a_batch_is_the_sum_of_its_examples(case):
    layer, params, x = case
    y = layer.apply(params, x)
    grad = fn.normal(fn.key(0), y.shape, dtype=x.dtype)
    each = [layer.vjp(params, x[i : i + 1], grad[i : i + 1]) for i in range(3)]
    sums = optree.tree_map(lambda *leaves: sum(leaves), *(dparams for dparams, _ in each))
    dparams, dx = layer.vjp(params, x, grad)
    close(dparams, sums, rtol=1e-9, atol=1e-9)
    close(dx, torch.cat([dx for _, dx in each]), rtol=1e-9, atol=1e-9)
    close(y, torch.cat([layer.apply(params, x[i : i + 1]) for i in range(3)]))


@given(strategies.cases(EVERY_LAYER, dtypes=st.just(torch.float64)))
def test_vjp_is_linear_in_grad(case):
    layer, params, x = case
    shape = layer.apply(params, x).shape
    a, b = (fn.normal(key, shape, dtype=x.dtype) for key in fn.split(fn.key(0)))
    combined = layer.vjp(params, x, 3 * a - b)
    parts = optree.tree_map(
        lambda p, q: 3 * p - q, layer.vjp(params, x, a), layer.vjp(params, x, b)
    )
    close(combined, parts, rtol=1e-9, atol=1e-9)


@st.composite
def restrided(draw, x):
    """x with its axes in any order in memory, and with any strides along those of size 1."""
    order = draw(st.permutations(range(x.ndim)))
    x = x.permute(order).contiguous().permute([order.index(axis) for axis in range(x.ndim)])
    strides = [
        draw(st.sampled_from([stride, 1, 77])) if size == 1 else stride
        for size, stride in zip(x.shape, x.stride(), strict=True)
    ]
    return x.as_strided(x.shape, strides)


@given(strategies.cases(EVERY_LAYER), st.data())
def test_strides_do_not_matter(case, data):
    """PyTorch's convolutions return wrong numbers for some strides along axes of size 1."""
    layer, params, x = case
    params, x = optree.tree_map(torch.Tensor.contiguous, (params, x.clone()))
    grad = fn.normal(fn.key(0), layer.apply(params, x).shape, dtype=x.dtype)
    y, gradients = layer.apply(params, x), layer.vjp(params, x, grad)
    params, x, grad = optree.tree_map(lambda leaf: data.draw(restrided(leaf)), (params, x, grad))
    close(layer.apply(params, x), y)
    close(layer.vjp(params, x, grad), gradients, rtol=1e-4, atol=1e-4)


# --- Purity


@given(strategies.cases(EVERY_LAYER))
def test_the_same_answer_twice_in_memory_of_its_own(case):
    layer, params, x = case
    grad = fn.normal(fn.key(0), layer.apply(params, x).shape, dtype=x.dtype)
    kept = copy.deepcopy((params, x, grad))
    y, (dparams, dx) = layer.apply(params, x), layer.vjp(params, x, grad)
    assert same((params, x, grad), kept)
    assert same((y, dparams, dx), (layer.apply(params, x), *layer.vjp(params, x, grad)))
    inputs = {leaf.untyped_storage().data_ptr() for leaf in optree.tree_leaves((params, x, grad))}
    for result in optree.tree_leaves((y, dparams, dx)):
        assert not result.numel() or result.untyped_storage().data_ptr() not in inputs


@given(strategies.cases(EVERY_LAYER))
def test_out_shape_is_true(case):
    layer, params, x = case
    assert layer.apply(params, x).shape == (len(x), *layer.out_shape(x.shape[1:]))


@given(strategies.cases(EVERY_LAYER))
def test_bwd_may_be_called_twice_and_without_dx(case):
    layer, params, x = case
    y, residuals = layer.fwd(params, x)
    grad = fn.normal(fn.key(0), y.shape, dtype=x.dtype)
    dparams, dx = layer.bwd(params, residuals, grad)
    assert same(layer.bwd(params, residuals, grad), (dparams, dx))
    without, nothing = layer.bwd(params, residuals, grad, input_grad=False)
    assert nothing is None
    close(without, dparams)


# --- Layers are values


@given(EVERY_LAYER)
def test_repr_is_the_code_that_builds_the_layer(layer):
    rebuilt = eval(repr(layer), dict(vars(fn)))
    assert rebuilt == layer
    assert repr(rebuilt) == repr(layer)


@given(EVERY_LAYER, EVERY_LAYER)
def test_equality_hash_and_pickle(one, other):
    for copied in (pickle.loads(pickle.dumps(one)), copy.deepcopy(one)):
        assert copied == one
        assert hash(copied) == hash(one)
    assert (one == other) == (repr(one) == repr(other))


@examples
def test_init_follows_its_key_alone(layer, shape, device):
    first = layer.init(fn.key(7), shape, device=device)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert same(layer.init(fn.key(7), shape, device=device), first)
    assert torch.equal(torch.get_rng_state(), state)
    on_cpu = layer.init(fn.key(7), shape)
    assert same(optree.tree_map(lambda leaf: leaf.cpu(), first), on_cpu)
    other = layer.init(fn.key(8), shape, device=device)
    assert not optree.tree_leaves(first) or not same(first, other)


@examples
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_init_in_a_dtype(layer, shape, dtype, device):
    for leaf in optree.tree_leaves(layer.init(fn.key(0), shape, dtype=dtype, device=device)):
        assert leaf.dtype == dtype
        assert leaf.device.type == device


# --- Batches


@examples
def test_a_batch_of_nothing(layer, shape, device):
    params, x, grad = make(layer, shape, batch=0, device=device)
    y = layer.apply(params, x)
    assert y.shape == (0, *layer.out_shape(shape))
    dparams, dx = layer.vjp(params, x, grad)
    assert dx.shape == x.shape
    assert all(not leaf.any() for leaf in optree.tree_leaves(dparams))
