"""What holds for every layer, driven by the registry, a budget for each class."""

import copy
import inspect
import pickle

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from registry import (
    EVERY_LAYER,
    EXAMPLE_IDS,
    EXAMPLES,
    LAYERS,
    budget,
    cases_of,
    key_for,
    make,
)
from torch.utils._python_dispatch import TorchDispatchMode

import funcnet as fn
from funcnet.ops.need import Need
from funcnet.running import is_fresh
from funcnet.testing import check_vjp, strategies
from funcnet.testing.registry import LOSSES, REGISTRY

examples = pytest.mark.parametrize(("layer", "shape"), EXAMPLES, ids=EXAMPLE_IDS)
classes = pytest.mark.parametrize("cls", LAYERS, ids=lambda cls: cls.__name__)


def same(a, b):
    """Equal trees of tensors, bit for bit."""
    return optree.tree_structure(a) == optree.tree_structure(b) and all(
        torch.equal(p, q) for p, q in zip(optree.tree_leaves(a), optree.tree_leaves(b), strict=True)
    )


def close(a, b, **tolerances):
    for p, q in zip(optree.tree_leaves(a), optree.tree_leaves(b), strict=True):
        torch.testing.assert_close(p, q, **tolerances)


def test_every_layer_has_a_row():
    public = {getattr(fn, name) for name in fn.__all__}
    layers = {cls for cls in public if inspect.isclass(cls) and issubclass(cls, fn.Layer)}
    assert layers - {fn.Layer} == set(REGISTRY)


# --- The gradient, by check_vjp: every oracle and the whole contract


# check_vjp takes floating-point x; layers of integers are held to their twins below.
of_floats = [cls for cls in LAYERS if REGISTRY[cls].classes is None]


@pytest.mark.parametrize("cls", of_floats, ids=lambda cls: cls.__name__)
@budget(5)
@given(st.data())
def test_gradient(cls, data):
    case = data.draw(cases_of(cls))
    check_vjp(*case, key=key_for(case.layer))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [example for cls in of_floats for example in REGISTRY[cls].examples],
    ids=str,
)
def test_gradient_of_examples(layer, shape, device):
    """In float32, and in float64 within."""
    params, x, grad = make(layer, shape, device=device)
    check_vjp(layer, params, x, grad=grad, key=key_for(layer))


@pytest.mark.parametrize("cls", of_floats, ids=lambda cls: cls.__name__)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_gradient_in_other_dtypes(cls, dtype, device):
    layer, shape = REGISTRY[cls].examples[0]
    params, x, grad = make(layer, shape, dtype=dtype, device=device)
    check_vjp(layer, params, x, grad=grad, key=key_for(layer))


# --- The twin in torch.nn


@pytest.mark.parametrize(
    "cls", [cls for cls in LAYERS if REGISTRY[cls].twin], ids=lambda cls: cls.__name__
)
@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch says that it makes a copy
@budget(12)
@given(st.data())
def test_value_and_gradients_are_torchs(cls, data):
    batches = st.sampled_from([2, 1, 3])
    layer, params, x = data.draw(cases_of(cls, dtypes=st.just(torch.float64), batches=batches))
    twin = REGISTRY[cls].twin(layer, tuple(x.shape[1:])).double()
    twin.load_state_dict(flat(params), strict=bool(params))
    x = x.clone(memory_format=torch.contiguous_format)  # in others, torch's may be wrong
    x = x.requires_grad_() if x.is_floating_point() else x
    y = twin(x)
    key = key_for(layer)
    ours = layer.apply(params, x.detach(), key=key)
    close(ours, y.detach(), rtol=1e-9, atol=1e-9)
    grad = fn.normal(fn.key(1), y.shape, dtype=torch.float64)
    leaves = [*twin.parameters(), *([x] if x.requires_grad else [])]
    if not leaves or not y.requires_grad:
        return
    expected = torch.autograd.grad(y, leaves, grad, allow_unused=True)
    expected = [
        torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, expected, strict=True)
    ]
    dparams, dx = layer.vjp(params, x.detach(), grad, key=key)
    named = dict(zip(dict(twin.named_parameters()), expected, strict=False))
    close(flat(dparams), {name: named[name] for name in flat(dparams)}, rtol=1e-9, atol=1e-9)
    if dx is not None:
        close(dx, expected[-1], rtol=1e-9, atol=1e-9)


def flat(params, prefix=""):
    """Nested dicts of tensors under torch's names."""
    if not isinstance(params, dict):
        return {}
    found = {}
    for name, value in params.items():
        inner = isinstance(value, dict)
        found |= flat(value, f"{prefix}{name}.") if inner else {f"{prefix}{name}": value}
    return found


# --- Metamorphic laws


@classes
@budget(4)
@given(st.data())
def test_a_network_is_the_composition_of_its_layers(cls, data):
    case = data.draw(cases_of(cls, integers=True, dtypes=st.just(torch.float64)))
    layer, params, x = case
    key = key_for(layer)
    y = layer.apply(params, x, key=None if key is None else fn.fold_in(key, 0))
    after = data.draw(strategies.networks(max_layers=2))
    if not strategies.takes(after, tuple(y.shape[1:])) or key_for(after) is not None:
        after = fn.Sigmoid()
    after_params = after.init(fn.key(1), y.shape[1:], dtype=y.dtype)
    net, both = fn.Sequential(layer, after), (params, after_params)
    grad = fn.normal(fn.key(2), after.apply(after_params, y).shape, dtype=y.dtype)
    dafter, dy = after.vjp(after_params, y, grad)
    dparams, dx = layer.vjp(params, x, dy, key=None if key is None else fn.fold_in(key, 0))
    close(net.apply(both, x, key=key), after.apply(after_params, y))
    close(net.vjp(both, x, grad, key=key), ((dparams, dafter), dx))


@classes
@budget(4)
@given(st.data())
def test_a_batch_is_the_sum_of_its_examples(cls, data):
    case = data.draw(cases_of(cls, dtypes=st.just(torch.float64), batches=st.just(3)))
    layer, params, x = case
    if getattr(layer, "couples_examples", False):
        return
    y = layer.apply(params, x)
    grad = fn.normal(fn.key(0), y.shape, dtype=y.dtype)
    each = [layer.vjp(params, x[i : i + 1], grad[i : i + 1]) for i in range(3)]
    sums = optree.tree_map(lambda *leaves: sum(leaves), *(dparams for dparams, _ in each))
    dparams, dx = layer.vjp(params, x, grad)
    close(dparams, sums, rtol=1e-9, atol=1e-9)
    if dx is not None:
        close(dx, torch.cat([dx for _, dx in each]), rtol=1e-9, atol=1e-9)
    close(y, torch.cat([layer.apply(params, x[i : i + 1]) for i in range(3)]))


@classes
@budget(4)
@given(st.data())
def test_vjp_is_linear_in_grad(cls, data):
    layer, params, x = data.draw(cases_of(cls, dtypes=st.just(torch.float64)))
    key = key_for(layer)
    shape = layer.apply(params, x, key=key).shape
    a, b = (fn.normal(k, shape, dtype=torch.float64) for k in fn.split(fn.key(0)))
    combined, of_a, of_b = (layer.vjp(params, x, g, key=key) for g in (3 * a - b, a, b))
    parts = optree.tree_map(lambda p, q: 3 * p - q, of_a, of_b)
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


@classes
@budget(4)
@given(st.data())
def test_strides_do_not_matter(cls, data):
    """PyTorch's convolutions return wrong numbers for some strides along axes of size 1."""
    layer, params, x = data.draw(cases_of(cls))
    key = key_for(layer)
    params, x = optree.tree_map(torch.Tensor.contiguous, (params, x.clone()))
    y = layer.apply(params, x, key=key)
    grad = fn.normal(fn.key(0), y.shape, dtype=y.dtype)
    gradients = layer.vjp(params, x, grad, key=key)
    params, x, grad = optree.tree_map(lambda leaf: data.draw(restrided(leaf)), (params, x, grad))
    close(layer.apply(params, x, key=key), y)
    close(layer.vjp(params, x, grad, key=key), gradients, rtol=1e-4, atol=1e-4)


# --- Purity


@classes
@budget(4)
@given(st.data())
def test_the_same_answer_twice_in_memory_of_its_own(cls, data):
    layer, params, x = data.draw(cases_of(cls))
    key = key_for(layer)
    y = layer.apply(params, x, key=key)
    grad = fn.normal(fn.key(0), y.shape, dtype=y.dtype)
    kept = copy.deepcopy((params, x, grad))
    dparams, dx = layer.vjp(params, x, grad, key=key)
    assert same((params, x, grad), kept)
    again = layer.apply(params, x, key=key), *layer.vjp(params, x, grad, key=key)
    assert same((y, dparams, dx), again)
    inputs = {leaf.untyped_storage().data_ptr() for leaf in optree.tree_leaves((params, x, grad))}
    for result in optree.tree_leaves((y, dparams, dx)):
        assert not result.numel() or result.untyped_storage().data_ptr() not in inputs


@classes
def test_what_may_be_written_over_is_promised(cls):
    """Where no example of a layer keeps its results, what follows it may work in place."""

    def memory(tree):
        leaves = [leaf for leaf in optree.tree_leaves(tree) if isinstance(leaf, torch.Tensor)]
        return {leaf.untyped_storage().data_ptr() for leaf in leaves if leaf.numel()}

    def keeps_nothing(layer, shape):
        params, x, dy = make(layer, shape)
        y, residuals = layer._fwd(params, x, key_for(layer))
        dparams, dx = layer._bwd(params, residuals, dy, Need())
        kept = memory((x, params, residuals, dy, dparams))
        return memory(y).isdisjoint(kept) and memory(() if dx is None else dx).isdisjoint(kept)

    examples = REGISTRY[cls].examples
    if all(keeps_nothing(*example) for example in examples):
        assert any(is_fresh(layer) for layer, _ in examples)


@classes
@budget(4)
@given(st.data())
def test_out_shape_is_true(cls, data):
    layer, params, x = data.draw(cases_of(cls))
    y = layer.apply(params, x, key=key_for(layer))
    assert y.shape == (len(x), *layer.out_shape(x.shape[1:]))


@classes
@budget(4)
@given(st.data())
def test_what_is_not_asked_for_is_none(cls, data):
    """And bwd may be called twice on the same residuals."""
    layer, params, x = data.draw(cases_of(cls))
    y, residuals = layer.fwd(params, x, key=key_for(layer))
    grad = fn.normal(fn.key(0), y.shape, dtype=y.dtype)
    dparams, dx = layer.bwd(params, residuals, grad)
    assert same(layer.bwd(params, residuals, grad), (dparams, dx))
    without, nothing = layer.bwd(params, residuals, grad, input_grad=False)
    assert nothing is None
    close(without, dparams)
    nothing, alone = layer.bwd(params, residuals, grad, param_grad=False)
    assert nothing is None
    close(alone, dx)
    assert layer.bwd(params, residuals, grad, input_grad=False, param_grad=False) == (None, None)


class Operations(TorchDispatchMode):
    """Notes the operations that run, and which results they are asked for."""

    def __init__(self):
        super().__init__()
        self.ran = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        masks = [arg for arg in args if isinstance(arg, list) and all(type(b) is bool for b in arg)]
        self.ran.append((str(function), masks))
        return function(*args, **(kwargs or {}))


KERNELS_OF_BOTH = (fn.PReLU, fn.LSTM)
"""Layers whose kernel computes the gradients of x and of the parameters at once."""


@examples
def test_apply_is_that_of_a_subclass(layer, shape):
    """Who writes `_fwd` anew need not know how the class computes y alone."""

    class Twice(type(layer)):
        def _fwd(self, params, x, key):
            y, residuals = super()._fwd(params, x, key)
            return 2 * y, residuals

    twice = object.__new__(Twice)
    twice.__setstate__(layer.__getstate__())
    params, x, _ = make(layer, shape)
    key = key_for(layer)
    assert same(twice.apply(params, x, key=key), twice.fwd(params, x, key=key)[0])


@examples
def test_what_is_not_asked_for_is_not_computed(layer, shape):
    params, x, grad = make(layer, shape)
    _, residuals = layer.fwd(params, x, key=key_for(layer))

    def operations(**needs):
        with Operations() as operations:
            layer.bwd(params, residuals, grad, **needs)
        return operations.ran

    both, of_params = operations(), operations(input_grad=False)
    assert operations(input_grad=False, param_grad=False) == []
    if not optree.tree_leaves(params):
        assert of_params == []
    elif not x.is_floating_point():
        assert operations(param_grad=False) == []
    elif not isinstance(layer, KERNELS_OF_BOTH):
        assert of_params != both != operations(param_grad=False)


# --- Arguments

TWINS = [(cls, getattr(torch.nn, cls.__name__, None)) for cls in REGISTRY]
TWINS += [(fn.BatchNorm, torch.nn.BatchNorm2d), (fn.InstanceNorm, torch.nn.InstanceNorm2d)]
TWINS += [(loss, getattr(torch.nn, f"{loss.__name__}Loss")) for loss in LOSSES]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(ours, theirs) for ours, theirs in TWINS if theirs is not None],
    ids=lambda cls: cls.__name__,
)
def test_arguments_have_torchs_order_and_defaults(ours, theirs):
    arguments = inspect.signature(ours).parameters
    torchs = inspect.signature(theirs).parameters
    both = [name for name in arguments if name in torchs]
    if not issubclass(ours, (fn.Loss, fn.MultiheadAttention)):  # whose order is the design's
        by_position = [n for n in both if arguments[n].kind is not inspect.Parameter.KEYWORD_ONLY]
        assert by_position == sorted(by_position, key=list(torchs).index)
    for name in both:
        assert arguments[name].default in (torchs[name].default, inspect.Parameter.empty)


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


@classes
@given(st.data())
def test_what_a_layer_remembers_is_no_part_of_it(cls, data):
    layer, params, x = data.draw(cases_of(cls, batches=st.just(2)))
    before = repr(layer), hash(layer), pickle.dumps(layer)
    layer.apply(params, x, key=key_for(layer))
    assert (repr(layer), hash(layer), pickle.dumps(layer)) == before
    assert pickle.loads(before[2]) == layer


@examples
def test_init_follows_its_key_alone(layer, shape, device):
    first = layer.init(fn.key(7), shape, device=device)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    assert same(layer.init(fn.key(7), shape, device=device), first)
    assert torch.equal(torch.get_rng_state(), state)
    on_cpu = layer.init(fn.key(7), shape)
    assert same(optree.tree_map(lambda leaf: leaf.cpu(), first), on_cpu)


@examples
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_init_in_a_dtype(layer, shape, dtype, device):
    for leaf in optree.tree_leaves(layer.init(fn.key(0), shape, dtype=dtype, device=device)):
        assert leaf.dtype == dtype
        assert leaf.device.type == device


# --- Batches


@examples
def test_a_batch_of_nothing(layer, shape, device):
    key = key_for(layer)
    params, x, grad = make(layer, shape, batch=0, device=device)
    y = layer.apply(params, x, key=key)
    assert y.shape == (0, *layer.out_shape(shape))
    dparams, dx = layer.vjp(params, x, grad, key=key)
    assert dx is None or dx.shape == x.shape
    assert all(not leaf.any() for leaf in optree.tree_leaves(dparams))


# --- Transforms


@examples
def test_a_map_over_examples_and_parameters(layer, shape):
    """torch.func.vmap of apply and vjp is each alone."""
    key = key_for(layer)
    params, x, grad = make(layer, shape, batch=6, dtype=torch.float64)
    xs, grads = x.unflatten(0, (2, 3)), grad.unflatten(0, (2, 3))
    many = optree.tree_map(lambda leaf: torch.stack([leaf, 1.5 * leaf]), params)

    def one(params, x, grad):
        y = layer.apply(params, x, key=key)
        dparams, dx = layer.vjp(params, x, grad, key=key, input_grad=x.is_floating_point())
        return (y, dparams) if dx is None else (y, dparams, dx)

    mapped = torch.func.vmap(one)(many, xs, grads)
    each = [
        one(optree.tree_map(lambda leaf, i=i: leaf[i], many), xs[i], grads[i]) for i in range(2)
    ]
    close(mapped, optree.tree_map(lambda *leaves: torch.stack(leaves), *each))
