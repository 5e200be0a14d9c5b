"""Gradients of each example: themselves, their norms, and their sum clipped one by one."""

import pickle
from dataclasses import dataclass

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from registry import EVERY_LAYER, EXAMPLE_IDS, EXAMPLES, budget, make
from test_gradients import draw_loss
from test_properties import close
from users_layers import Dense

import funcnet as fn
from funcnet.ops import products
from funcnet.testing import strategies

FLOAT64 = st.just(torch.float64)
ALONE = [
    pytest.param(layer, shape, id=name)
    for (layer, shape), name in zip(EXAMPLES, EXAMPLE_IDS, strict=True)
    if not layer.couples_examples
]
_CONV = fn.Conv2d(2, 3, padding=1)
TIED = fn.Loop(fn.Sequential(_CONV, fn.Tanh()), 3)
NETWORKS = [
    TIED,
    fn.Loop(fn.Repeat(fn.Residual(_CONV), 2), 2),
    fn.Repeat(fn.Loop(fn.Residual(_CONV), 2), 2),
    fn.Sequential(fn.Cast(TIED, torch.float64), fn.Cast(_CONV, torch.float64)),
    fn.Sequential(fn.Frozen(_CONV), fn.Recompute(TIED), fn.Sum(_CONV, fn.Frozen(_CONV))),
    fn.Reversible(*[fn.Conv2d(1, 3, padding=1)] * 4),
    fn.Recompute(fn.Concat(a=_CONV, b=fn.Sequential(_CONV, fn.Recompute(_CONV)))),
]


def one_by_one(net, loss, params, x, target, key=None):
    """What `per_example` gives, by its definition."""
    each = [
        fn.value_and_grad(net, loss)(params, x[i : i + 1], target[i : i + 1], key)
        for i in range(len(x))
    ]
    return optree.tree_map(lambda *leaves: torch.stack(leaves), *each)


def norms_of(grads, count):
    """The norm of each example's gradient."""
    leaves = [leaf.flatten(1) for leaf in optree.tree_leaves(grads)]
    return torch.cat([torch.zeros(count, 1, dtype=torch.float64), *leaves], 1).norm(dim=1)


def check_laws(net, loss, params, x, target, key=None):
    """Hold all three functions to each other; returns what `per_example` gives."""
    arguments = params, x, target, key
    values, grads = fn.per_example(net, loss)(*arguments)
    assert optree.tree_structure(grads) == optree.tree_structure(params)
    expected = norms_of(grads, len(x))
    assert torch.equal(fn.gradient_norms(net, loss)(*arguments)[0].isnan(), values.isnan())
    norms = fn.gradient_norms(net, loss)(*arguments)[1]
    # Gram matrices are exact to √ε of their factors.
    size = float(expected.max()) if len(expected) else 0.0
    close(norms, expected, rtol=1e-9, atol=1e-7 * max(1.0, size))
    if len(x):
        max_norm = float(expected.median())
        found, total = fn.clipped_value_and_grad(net, loss, max_norm)(*arguments)
        close(found, values, equal_nan=True)
        shares = (max_norm / expected.clamp(min=1e-30)).clamp(max=1.0)
        close(total, weighted(grads, shares), rtol=1e-7, atol=1e-7 * max(1.0, size))
    return values, grads


def weighted(grads, weights):
    return optree.tree_map(lambda leaf: torch.tensordot(weights, leaf, dims=1), grads)


@given(strategies.cases(EVERY_LAYER, dtypes=FLOAT64), st.data())
def test_they_are_the_gradients_of_each_example_alone(case, data):
    net, params, x = case
    loss, target = draw_loss(data, net.apply(params, x))
    found = check_laws(net, loss, params, x, target)
    if len(x):
        expected = one_by_one(net, loss, params, x, target)
        close(found, expected, rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize(("layer", "shape"), ALONE)
def test_every_layer(layer, shape):
    params, x, target = make(layer, shape, batch=3, dtype=torch.float64)
    found = check_laws(layer, fn.MSE("sum"), params, x, target)
    close(found, one_by_one(layer, fn.MSE("sum"), params, x, target), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("net", NETWORKS, ids=str)
def test_combinators(net):
    params, x, target = make(net, (2, 4, 3), batch=3, dtype=torch.float64)
    found = check_laws(net, fn.MSE(), params, x, target)
    close(found, one_by_one(net, fn.MSE(), params, x, target), rtol=1e-9, atol=1e-11)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jvp, of PyTorch's own
@pytest.mark.parametrize(("layer", "shape"), ALONE)
def test_they_can_be_differentiated(layer, shape):
    """Along a direction, added up over the examples: as the gradients of the batch change."""
    loss, (params, x, target) = fn.MSE("sum"), make(layer, shape, batch=3, dtype=torch.float64)
    leaves, structure = optree.tree_flatten((params, x))
    inputs = tuple(leaf for leaf in leaves if leaf.is_floating_point())

    def along(function):
        def change(*inputs):
            rest = iter(inputs)
            leaf_or_next = (next(rest) if leaf.is_floating_point() else leaf for leaf in leaves)
            return function(*structure.unflatten(leaf_or_next), target)

        draws = (fn.normal(fn.key(6), leaf.shape, dtype=leaf.dtype) for leaf in inputs)
        return torch.func.jvp(change, inputs, tuple(draws))[1]

    each = along(fn.per_example(layer, loss))
    close(optree.tree_map(lambda leaf: leaf.sum(0), each), along(fn.value_and_grad(layer, loss)))


@pytest.mark.parametrize(("layer", "shape"), ALONE)
def test_a_layer_with_parameters_knows_how(layer, shape):
    """No layer of the vocabulary is left to the examples one by one."""
    inner = [child for _, child in layer._children()]
    if not inner and layer.init(fn.key(0), shape):
        assert type(layer)._bwd_each is not fn.Layer._bwd_each


# --- Masks, layers and combinators of one's own


def within_the_batch(net, params, x, target, key):
    """The gradients of each example within its batch, by autograd."""
    leaves, structure = optree.tree_flatten(params)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    y = net.apply(structure.unflatten(leaves), x, key=key)
    values = (y - target).square().flatten(1).sum(1)
    each = [torch.autograd.grad(value, leaves, retain_graph=True) for value in values]
    return values.detach(), structure.unflatten(map(torch.stack, zip(*each, strict=True)))


@dataclass(frozen=True)
class Masked(Dense):
    """A layer of one's own that draws numbers."""

    def fwd(self, params, x, *, key=None):
        keep = 1.0 if key is None else fn.bernoulli(key, 0.5, x.shape)
        y, (x, y) = super().fwd(params, x * keep)
        return y, (x, y, keep)

    def bwd(self, params, residuals, grad, *, input_grad=True):
        *rest, keep = residuals
        dparams, dx = super().bwd(params, rest, grad, input_grad=input_grad)
        return dparams, dx * keep if input_grad else None


@pytest.mark.parametrize(
    ("net", "shape"),
    [
        (fn.Sequential(fn.Linear(5), fn.Dropout(0.5), fn.Linear(2)), (3,)),
        (fn.Sequential(fn.Linear(5), Masked(3)), (3,)),
        (fn.Recompute(fn.Sequential(_CONV, fn.Dropout2d(0.5), _CONV)), (2, 3, 3)),
        (fn.Loop(fn.Sequential(fn.Linear(3), fn.Dropout(0.5)), 3), (3,)),
        (fn.MultiheadAttention(2, dropout=0.5), (3, 4)),
        (fn.Sequential(fn.Dropout(0.5), Dense(3)), (3,)),
    ],
    ids=str,
)
def test_masks_are_those_of_the_batch(net, shape):
    params, x, target = make(net, shape, batch=4, dtype=torch.float64)
    found = check_laws(net, fn.MSE("sum"), params, x, target, fn.key(7))
    close(found, within_the_batch(net, params, x, target, fn.key(7)), rtol=1e-9, atol=1e-11)
    _, grads = fn.value_and_grad(net, fn.MSE("sum"))(params, x, target, fn.key(7))
    close(weighted(found[1], torch.ones(4, dtype=torch.float64)), grads, rtol=1e-9, atol=1e-11)


@dataclass(frozen=True)
class Stubborn(Dense):
    """A layer that torch.func.vmap cannot follow."""

    def fwd(self, params, x, *, key=None):
        float(x.sum())
        return super().fwd(params, x, key=key)


@dataclass(frozen=True)
class Doubled(fn.Linear):
    """A subclass with formulas of its own: it does not know of the other's `_bwd_each`."""

    def _fwd(self, params, x, key):
        y, x = super()._fwd(params, x, key)
        return 2 * y, x

    def _bwd(self, params, x, dy, need):
        return super()._bwd(params, x, 2 * dy, need)


@dataclass(frozen=True)
class Siamese(fn.Layer):
    """y = f(f(x)) − f(x), a combinator that says nothing of how it joins gradients."""

    layer: fn.Layer

    def _init(self, key, shape, dtype, device):
        return self.layer.init(key, shape, dtype=dtype, device=device)

    def _check(self, params, x):
        return x

    def _fwd(self, params, x, key):
        once, first = self.layer.fwd(params, x, key=key)
        twice, second = self.layer.fwd(params, once, key=key)
        return twice - once, (first, second)

    def _bwd(self, params, residuals, dy, need):
        first, second = residuals
        dparams, donce = self.layer.bwd(params, second, dy)
        more, dx = self.layer.bwd(params, first, donce - dy)
        return optree.tree_map(torch.add, dparams, more), dx


@pytest.mark.parametrize("key", [None, fn.key(7)])
@pytest.mark.parametrize(
    "net", [Dense(3), Stubborn(3), Doubled(3), Siamese(fn.Linear(3))], ids=lambda net: repr(net)
)
def test_layers_of_ones_own(net, key):
    net = fn.Sequential(fn.Linear(3), net, fn.Loop(net, 2))
    params, x, target = make(net, (3,), batch=3, dtype=torch.float64)
    found = check_laws(net, fn.MSE(), params, x, target, key)
    close(found, one_by_one(net, fn.MSE(), params, x, target), rtol=1e-9, atol=1e-11)
    nothing = fn.per_example(net, fn.MSE())(params, x[:0], target[:0], key)
    assert [leaf.shape[0] for leaf in optree.tree_leaves(nothing)] == [0] * (1 + 6)


def test_a_loss_of_ones_own():
    class Cubic:
        def fwd(self, x, target):
            return float(x.sum()) * 0 + (x - target["of"]).pow(3).sum(), (x, target["of"])

        def bwd(self, residuals, grad=1.0):
            x, target = residuals
            return 3 * (x - target).square() * grad

    net = fn.Linear(2)
    params, x, target = make(net, (3,), batch=3, dtype=torch.float64)
    values, grads = fn.per_example(net, Cubic())(params, x, {"of": target})
    for i in range(3):
        alone = {"of": target[i : i + 1]}
        expected = fn.value_and_grad(net, Cubic())(params, x[i : i + 1], alone)
        close((values[i], optree.tree_map(lambda leaf, i=i: leaf[i], grads)), expected)


def test_a_mean_is_over_the_places_of_an_example_that_count():
    net, loss = fn.Conv1d(3, 1), fn.CrossEntropy()
    params, x, _ = make(net, (2, 4), batch=3, dtype=torch.float64)
    target = torch.tensor([[0, 1, 2, 0], [1, -100, -100, -100], [-100] * 4])
    values, grads = check_laws(net, loss, params, x, target)
    close((values, grads), one_by_one(net, loss, params, x, target), equal_nan=True)
    assert values.isnan().tolist() == [False, False, True]
    assert not grads["weight"][2].any()
    assert fn.gradient_norms(net, loss)(params, x, target)[1][2] == 0


# --- Norms without gradients


@budget(60)
@given(
    st.lists(st.integers(0, 5), min_size=3, max_size=3),
    st.integers(1, 30),
    st.integers(1, 30),
    st.integers(0, 2**16),
)
def test_norms_of_products(batch, a, b, seed):
    n, groups, rows = batch
    left, right = (
        fn.normal(fn.key(seed + i), (n, groups + 1, rows, size), dtype=torch.float64)
        for i, size in enumerate((a, b))
    )
    found = products.Products(left, right)
    close(found.squares(), products.squares(found.formed()), rtol=1e-9, atol=1e-9)


@budget(60)
@given(st.integers(0, 3), st.integers(0, 12), st.integers(1, 24), st.integers(0, 2**16))
def test_norms_of_a_table(examples, tokens, count, seed):
    generator = torch.Generator().manual_seed(seed)
    index = torch.randint(count, (count,), generator=generator)[:5]  # few, so that they repeat
    index = index[torch.randint(len(index), (examples, tokens), generator=generator)]
    rows = torch.randn(examples, tokens, 2, generator=generator, dtype=torch.float64)
    found = products.Rows(index, rows, count)
    expected = torch.stack(
        [
            torch.stack([rows[n][index[n] == i].sum(0) for i in range(count)])
            for n in range(examples)
        ]
        or [torch.zeros(count, 2, dtype=torch.float64)]
    )[:examples]
    close(found.formed(), expected)
    close(found.squares(), expected.square().flatten(1).sum(1))


def test_no_gradients_of_a_batch_are_formed(monkeypatch):
    """Not where norms are asked for, nor where they are clipped; only in a Loop."""
    block = fn.Sequential(fn.Conv2d(8, 3, padding=1), fn.GroupNorm(2), fn.ReLU())
    net = fn.Sequential(
        block, fn.Repeat(block, 2), fn.UpsampleConv2d(4), fn.Flatten(2), fn.LSTM(4), fn.Linear(3)
    )
    params, x, target = make(net, (8, 4, 4), batch=2)

    def refuse(each):
        raise AssertionError("a gradient was formed")

    monkeypatch.setattr(products, "formed", refuse)
    fn.gradient_norms(net, fn.MSE())(params, x, target)
    fn.clipped_value_and_grad(net, fn.MSE(), 1.0)(params, x, target)
    with pytest.raises(AssertionError, match="was formed"):
        fn.gradient_norms(fn.Loop(block, 2), fn.MSE())(params[0], x, x)


def test_memory_is_not_that_of_the_gradients():
    """A weight of 4 MB, 64 examples: the gradients of each would take 256 MB."""
    net = fn.Linear(1024, bias=False)
    params, x, target = make(net, (1024,), batch=64)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            out = function(*args, **(kwargs or {}))
            for leaf in optree.tree_leaves(out):
                if isinstance(leaf, torch.Tensor):
                    largest = max(largest, leaf.untyped_storage().nbytes())
            return out

    with Watch():
        fn.gradient_norms(net, fn.MSE())(params, x, target)
    assert largest <= 4 * 1024 * 1024


# --- The rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_precision(dtype):
    net = fn.Sequential(
        fn.Conv2d(4, 3, stride=2), fn.GroupNorm(2), fn.SiLU(), fn.Flatten(), fn.Linear(3)
    )
    params, x, _ = make(net, (2, 9, 9), batch=3, dtype=dtype)
    loss, target = fn.CrossEntropy(), torch.tensor([0, 2, 1])
    values, grads = fn.per_example(net, loss)(params, x, target)
    wide = optree.tree_map(torch.Tensor.double, (params, x))
    expected = fn.gradient_norms(net, loss)(*wide, target)
    found = fn.gradient_norms(net, loss)(params, x, target)
    assert values.dtype == found[0].dtype == dtype
    assert {leaf.dtype for leaf in optree.tree_leaves(grads)} == {dtype}
    assert found[1].dtype == torch.float32  # squares of half precision overflow
    close(found[1].double(), expected[1], rtol=0.05 if dtype == torch.bfloat16 else 1e-4, atol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_and_squares_of_half_precision_are_taken_in_float32(dtype):
    net, params = fn.Embedding(2, 1), {"weight": torch.ones(2, 1, dtype=dtype)}
    case = params, torch.zeros(1, 2049, dtype=torch.int64), torch.zeros(1, 2049, 1, dtype=dtype)
    assert fn.per_example(net, fn.L1("sum"))(*case)[1]["weight"].tolist() == [[[2048.0], [0.0]]]
    assert fn.gradient_norms(net, fn.L1("sum"))(*case)[1].tolist() == [2049.0]
    params, x = {"bias": torch.full((1,), 512.0, dtype=dtype)}, torch.zeros(1, 1, dtype=dtype)
    params["weight"] = torch.zeros(1, 1, dtype=dtype)
    assert fn.gradient_norms(fn.Linear(1), fn.MSE("sum"))(params, x, x)[1].tolist() == [1024.0]


@pytest.mark.parametrize("layer", [fn.ChannelAffine(), fn.PReLU()], ids=repr)
def test_terms_that_float16_cannot_hold_cancel(layer):
    params = layer.init(fn.key(0), (1, 2), dtype=torch.float16)
    x = torch.full((1, 1, 2), -256.0, dtype=torch.float16)
    target = layer.apply(params, x) + torch.tensor([128.0, -128.0]).half()  # dy is ∓256
    assert fn.gradient_norms(layer, fn.MSE("sum"))(params, x, target)[1].tolist() == [0.0]


@pytest.mark.parametrize("batch", [0, 1])
def test_small_batches(batch):
    net = fn.Sequential(fn.Embedding(5, 4), fn.LSTM(3), fn.Select(1, -1), fn.Linear(2))
    params = net.init(fn.key(0), (3,))
    x, target = torch.ones(batch, 3, dtype=torch.int64), torch.zeros(batch, 2)
    values, grads = fn.per_example(net, fn.MSE())(params, x, target)
    assert values.shape == (batch,)
    for leaf, grad in zip(*map(optree.tree_leaves, (params, grads)), strict=True):
        assert grad.shape == (batch, *leaf.shape)
    assert fn.gradient_norms(net, fn.MSE())(params, x, target)[1].shape == (batch,)
    _, total = fn.clipped_value_and_grad(net, fn.MSE(), 1e9)(params, x, target)
    summed = optree.tree_map(lambda grad: grad.sum(0), grads)
    close(total, summed)


def test_nothing_is_written_to():
    net, loss = fn.Sequential(TIED, fn.ReLU(), _CONV), fn.MSE()
    params, x, target = make(net, (2, 3, 3))
    kept = optree.tree_map(torch.clone, (params, x, target))
    functions = (
        fn.per_example(net, loss),
        fn.gradient_norms(net, loss),
        fn.clipped_value_and_grad(net, loss, 0.1),
    )
    for function in functions:
        first = function(params, x, target)
        close(function(params, x, target), first, rtol=0, atol=0)
        close((params, x, target), kept, rtol=0, atol=0)


def test_clipping_to_nothing_and_not_at_all():
    net = fn.Linear(2)
    params, x, target = make(net, (3,))
    _, nothing = fn.clipped_value_and_grad(net, fn.MSE("sum"), 0.0)(params, x, target)
    assert not any(leaf.any() for leaf in optree.tree_leaves(nothing))
    _, everything = fn.clipped_value_and_grad(net, fn.MSE("sum"), float("inf"))(params, x, target)
    close(everything, fn.value_and_grad(net, fn.MSE("sum"))(params, x, target)[1])
    fitting = net.apply(params, x)  # gradients of 0
    _, zeros = fn.clipped_value_and_grad(net, fn.MSE(), 0.0)(params, x, fitting)
    assert not any(leaf.any() for leaf in optree.tree_leaves(zeros))


def test_vmap_over_networks():
    net = fn.Sequential(fn.Conv2d(2, 3), fn.ReLU(), fn.Flatten(), fn.Linear(3))
    members = [make(net, (1, 5, 5), dtype=torch.float64)[0] for _ in range(2)]
    stacked = optree.tree_map(lambda *leaves: torch.stack(leaves), *members)
    _, x, target = make(net, (1, 5, 5), dtype=torch.float64)
    for function in (fn.per_example, fn.gradient_norms):
        mapped = torch.func.vmap(function(net, fn.MSE()), (0, None, None))(stacked, x, target)
        for i, params in enumerate(members):
            found = optree.tree_map(lambda leaf, i=i: leaf[i], mapped)
            close(found, function(net, fn.MSE())(params, x, target))


FUNCTIONS = [
    fn.per_example,
    fn.gradient_norms,
    lambda net, loss: fn.clipped_value_and_grad(net, loss, 1.0),
]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_refusals(function):
    name = function(fn.ReLU(), fn.MSE())._name
    deep = fn.Sequential(fn.ReLU(), fn.Sequential(a=fn.Residual(fn.BatchNorm())))
    with pytest.raises(ValueError, match=rf"{name}: .* alone, got layer 1: a: BatchNorm\(\)"):
        function(deep, fn.MSE())
    with pytest.raises(TypeError, match=f"{name}: expected net to be a Layer, got <function make"):
        function(make, fn.MSE())
    with pytest.raises(TypeError, match=f"{name}: expected a loss, such as MSE"):
        function(fn.ReLU(), fn.MSE)
    net = fn.Linear(2)
    params, x, target = make(net, (3,))
    with pytest.raises(ValueError, match=f"{name}: expected target of 2 examples, as x, got 1"):
        function(net, fn.MSE())(params, x, target[:1])
    with pytest.raises(TypeError, match=f"{name}: expected x to be a batch, got shape"):
        function(net, fn.MSE())(params, x[0, 0], target)
    with pytest.raises(ValueError, match=r"MSE\(\): expected target of shape \(2, 2\)"):
        function(net, fn.MSE())(params, x, target[:, :1])
    with pytest.raises(ValueError, match=r"layer 0: Linear\(2\): expected x of shape \(N, …, 3\)"):
        function(fn.Sequential(net), fn.MSE())((params,), x[:, :2], target)
    with pytest.raises(ValueError, match=r"CrossEntropy\(\): expected classes in \[0, 2\), got 2"):
        function(net, fn.CrossEntropy())(params, x, torch.tensor([0, 2]))


def test_max_norm_is_refused():
    for wrong, error in ((-1.0, ValueError), (float("nan"), ValueError), ("1", TypeError)):
        with pytest.raises(error, match="clipped_value_and_grad: expected max_norm"):
            fn.clipped_value_and_grad(fn.Linear(2), fn.MSE(), wrong)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_they_are_values(function):
    net = fn.Sequential(fn.Linear(2))
    made = function(net, fn.MSE())
    assert made == function(net, fn.MSE())
    assert pickle.loads(pickle.dumps(made)) == made
    assert repr(made).startswith(f"{made._name}(Sequential(Linear(2)), MSE()")
