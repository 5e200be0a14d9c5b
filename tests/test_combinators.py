"""Layers made of layers: what they compute, written by hand; keys, errors, memory, and that what is
not asked for is not computed. The tests across all layers cover the rest."""

import dataclasses
import pickle
from dataclasses import dataclass
from itertools import product
from typing import ClassVar

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from registry import make
from test_properties import Operations, close, same
from users_layers import Noise

import funcnet as fn
from funcnet.fields import Size
from funcnet.ops.need import Need
from funcnet.ops.stacking import stack
from funcnet.testing import check_vjp

DOUBLE = {"dtype": torch.float64}
CONV = fn.Conv2d(2, 3, padding=1)


@dataclass(frozen=True)
class Scale(fn.Layer):
    """y = w · x, by the public four and without `param_grad`."""

    asked: ClassVar[list[bool]] = []

    def init(self, key, shape, *, dtype=None, device=None):
        return {"w": fn.normal(key, (), mean=1.0, dtype=dtype, device=device)}

    def out_shape(self, shape):
        return tuple(shape)

    def fwd(self, params, x, *, key=None):
        return params["w"] * x, x

    def bwd(self, params, x, grad, *, input_grad=True):
        self.asked.append(input_grad)
        return {"w": (x * grad).sum()}, params["w"] * grad if input_grad else None


@dataclass(frozen=True)
class Blend(fn.Layer):
    """A user's combinator: y = p · left(x) + q · right(x)."""

    left: fn.Layer
    right: fn.Layer
    p: float = 0.25

    def init(self, key, shape, *, dtype=None, device=None):
        children = zip(self._children(), fn.split(key), strict=True)
        return tuple(c.init(k, shape, dtype=dtype, device=device) for (_, c), k in children)

    def out_shape(self, shape):
        return self.left.out_shape(shape)

    def fwd(self, params, x, *, key=None):
        a, kept_a = self.left.fwd(params[0], x, key=key)
        b, kept_b = self.right.fwd(params[1], x, key=key)
        return self.p * a + b, (kept_a, kept_b)

    def bwd(self, params, residuals, grad, *, input_grad=True):
        da, dx = self.left.bwd(params[0], residuals[0], self.p * grad, input_grad=input_grad)
        db, more = self.right.bwd(params[1], residuals[1], grad, input_grad=input_grad)
        return (da, db), dx + more if input_grad else None


# --- What they compute


def by_hand(layer, params, x, key):
    """y, by nothing but the formulas; autograd gives its gradient."""
    fold = lambda i: None if key is None else fn.fold_in(key, i)  # noqa: E731

    def child(i, x):
        name, inner = layer._children()[i]
        return by_hand(inner, params[name if layer.names else i], x, fold(i))

    match type(layer).__name__:
        case "Sequential":
            for i in range(len(layer)):
                x = child(i, x)
            return x
        case "Residual":
            return x + by_hand(layer.layer, params, x, key)
        case "Sum":
            return sum(child(i, x) for i in range(len(layer)))
        case "Product":
            y = child(0, x)
            for i in range(1, len(layer)):
                y = y * child(i, x)
            return y
        case "Concat":
            return torch.cat([child(i, x) for i in range(len(layer))], layer.dim)
        case "Recompute":
            return by_hand(layer.layer, params, x, key)
        case "Frozen":
            return by_hand(layer.layer, optree.tree_map(torch.Tensor.detach, params), x, key)
        case "Cast":
            low, dtype = layer.dtype, x.dtype
            params = optree.tree_map(lambda leaf: leaf.to(low), params)
            return by_hand(layer.layer, params, x.to(low), key).to(dtype)
        case "Reversible":
            x1, x2 = x[:, : x.shape[1] // 2], x[:, x.shape[1] // 2 :]
            for i in range(0, len(layer), 2):
                x1 = x1 + child(i, x2)
                x2 = x2 + child(i + 1, x1)
            return torch.cat([x1, x2], 1)
        case "Repeat":
            for i in range(layer.n):
                own = optree.tree_map(lambda leaf, i=i: leaf[i], params)
                x = by_hand(layer.layer, own, x, fold(i))
            return x
        case "Loop":
            for i in range(layer.n):
                x = by_hand(layer.layer, params, x, fold(i))
            return x
        case _:
            return layer.fwd(params, x, key=key)[0]


@st.composite
def nestings(draw, channels=4, depth=3):
    """Any combinators in any, which keep the shape of an example with so many channels."""
    inner = lambda: draw(nestings(channels, depth - 1))  # noqa: E731
    leaves = [fn.Sigmoid(), fn.Conv2d(channels, 3, padding=1), Noise(), Scale()]
    kinds = [
        "Sequential",
        "Named",
        "Residual",
        "Sum",
        "Product",
        "Concat",
        "Recompute",
        "Repeat",
        "Loop",
        "Frozen",
        "Cast",
    ]
    if not channels % 2:
        kinds.append("Reversible")
    kind = draw(st.sampled_from(["leaf", *kinds])) if depth else "leaf"
    match kind:
        case "leaf":
            return draw(st.sampled_from(leaves))
        case "Sequential":
            return fn.Sequential(*(inner() for _ in range(draw(st.integers(0, 3)))))
        case "Named":
            return fn.Sequential(stem=inner(), head=inner())
        case "Sum" | "Product":
            cls = getattr(fn, kind)
            if draw(st.booleans()):
                return cls(b=inner(), a=inner())
            return cls(*(inner() for _ in range(draw(st.integers(1, 3)))))
        case "Concat":
            return fn.Sequential(fn.Concat(inner(), inner()), fn.Conv2d(channels, 1))
        case "Reversible":
            count = draw(st.sampled_from([2, 4]))
            halves = (draw(nestings(channels // 2, depth - 1)) for _ in range(count))
            return fn.Reversible(*halves)
        case "Repeat" | "Loop":
            return getattr(fn, kind)(inner(), draw(st.integers(1, 3)))
        case "Cast":
            return fn.Cast(inner(), torch.float64)
        case _:
            return getattr(fn, kind)(inner())


def drawn(net, shape=(4, 2, 3), batch=2):
    params = net.init(fn.key(0), shape, **DOUBLE)
    x = fn.normal(fn.key(1), (batch, *shape), **DOUBLE)
    return params, x, fn.normal(fn.key(2), (batch, *net.out_shape(shape)), **DOUBLE)


def expected(net, params, x, grad, key):
    """(y, (dparams, dx)) by hand and by autograd."""
    leaves, structure = optree.tree_flatten((params, x))
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    y = by_hand(net, *structure.unflatten(leaves), key)
    found = torch.autograd.grad(y, leaves, grad, materialize_grads=True)
    return y.detach(), structure.unflatten(found)


@given(nestings(), st.sampled_from([None, fn.key(3)]))
def test_nestings_are_what_is_written_by_hand(net, key):
    params, x, grad = drawn(net)
    y, gradients = expected(net, params, x, grad, key)
    tolerances = {"rtol": 1e-8, "atol": 1e-8}
    close(net.apply(params, x, key=key), y, **tolerances)
    close(net.vjp(params, x, grad, key=key), gradients, **tolerances)
    mse = fn.MSE("sum")
    value, grads = fn.value_and_grad(net, mse)(params, x, y - grad / 2, key=key)
    close(grads, gradients[0], **tolerances)
    close(value, (grad / 2).square().sum())
    assert optree.tree_structure(grads) == optree.tree_structure(params)


@given(nestings(), st.sampled_from([None, fn.key(3)]))
def test_nestings_compute_what_is_asked_for(net, key):
    params, x, grad = drawn(net)
    kept = optree.tree_map(torch.clone, (params, x, grad))
    dparams, dx = net.vjp(params, x, grad, key=key)
    close(net.vjp(params, x, grad, key=key, input_grad=False)[0], dparams)
    assert net.vjp(params, x, grad, key=key, input_grad=False)[1] is None
    nothing, alone = net.vjp(params, x, grad, key=key, param_grad=False)
    assert nothing is None
    close(alone, dx)
    assert same((params, x, grad), kept)


@given(nestings())
def test_nestings_under_vmap(net):
    params, x, grad = drawn(net)
    many = optree.tree_map(lambda leaf: torch.stack([leaf, 1.25 * leaf]), params)
    xs, grads = torch.stack([x, -x]), torch.stack([grad, 2 * grad])

    def one(params, x, grad):
        return net.apply(params, x), *net.vjp(params, x, grad)

    each = [one(optree.tree_map(lambda p, i=i: p[i], many), xs[i], grads[i]) for i in range(2)]
    stacked = optree.tree_map(lambda *leaves: torch.stack(leaves), *each)
    close(torch.func.vmap(one)(many, xs, grads), stacked, rtol=1e-8, atol=1e-8)


fn.register_node(Noise)
fn.register_node(Scale)


@given(nestings())
def test_nestings_are_values(tmp_path_factory, net):
    for again in (
        eval(repr(net), {**vars(fn), "Noise": Noise, "Scale": Scale}),
        pickle.loads(pickle.dumps(net)),
        dataclasses.replace(net),
        net._with_children([child for _, child in net._children()]) if net._children() else net,
    ):
        assert again == net
        assert hash(again) == hash(net)
    params, x, _ = drawn(net)
    path = tmp_path_factory.mktemp("nestings") / "net"
    fn.save_model(path, net, params)
    found, loaded = fn.load_model(path)
    assert found == net
    assert same(found.apply(loaded, x), net.apply(params, x))
    assert len(fn.summary(net, (4, 2, 3)).splitlines()) == 2 + count(net)


def count(net):
    return 1 + sum(count(child) for _, child in net._children())


@settings(max_examples=max(1, settings().max_examples // 6))
@given(nestings(depth=2), st.sampled_from([None, fn.key(3)]))
def test_gradients_of_nestings(net, key):
    check_vjp(net, *drawn(net)[:2], key=key)


ALL_IN_ALL = fn.Sequential(
    stem=fn.Concat(fn.Sigmoid(), fn.Conv2d(2, 3, padding=1)),
    body=fn.Residual(
        fn.Repeat(
            fn.Recompute(
                fn.Reversible(
                    fn.Loop(fn.Sequential(fn.Conv2d(2, 1), fn.Sigmoid()), 2),
                    fn.Sum(a=fn.Frozen(fn.Conv2d(2, 1)), b=fn.Product(fn.ReLU(), Scale())),
                )
            ),
            2,
        )
    ),
    head=fn.Cast(fn.Sequential(Noise(), fn.Conv2d(1, 1)), torch.float64),
)


def test_all_in_all():
    params, x, grad = drawn(ALL_IN_ALL, (2, 3, 3))
    for key in (None, fn.key(5)):
        check_vjp(ALL_IN_ALL, params, x, key=key)
        y, gradients = expected(ALL_IN_ALL, params, x, grad, key)
        close(ALL_IN_ALL.apply(params, x, key=key), y)
        close(ALL_IN_ALL.vjp(params, x, grad, key=key), gradients)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_with_a_key():
    """The registry's examples are compiled without one."""
    inner = fn.Reversible(fn.Loop(fn.Sigmoid(), 2), fn.Sum(a=fn.Frozen(Scale()), b=fn.ReLU()))
    net = fn.Sequential(fn.Repeat(fn.Recompute(inner), 2), fn.Cast(Scale(), torch.float64))
    params, x, grad = drawn(net, (2, 3))
    wanted = net.vjp(params, x, grad)
    torch._dynamo.reset()
    compiled = torch.compile(net.vjp, fullgraph=True, backend="aot_eager")
    close(compiled(params, x, grad, key=fn.key(5)), wanted)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_an_error_may_be_caught_in_compiled_code():
    @dataclass(frozen=True)
    class Failing(Noise):
        def fwd(self, params, x, *, key=None):
            raise ValueError("out of luck")

    net = fn.Sequential(fn.ReLU(), Failing())

    def doubled(x):
        try:
            return net.apply(((), ()), x)
        except ValueError:
            return 2 * x

    torch._dynamo.reset()
    compiled = torch.compile(doubled, fullgraph=True, backend="eager")
    assert torch.equal(compiled(torch.ones(2, 3)), torch.full((2, 3), 2.0))


def test_a_user_s_combinator_among_others():
    net = fn.Residual(Blend(fn.Repeat(CONV, 2), fn.Sequential(Scale(), fn.Sigmoid())))
    params, x, _ = drawn(net, (2, 3, 3))
    check_vjp(net, params, x)
    blend = net.layer
    assert blend._children() == (("0", blend.left), ("1", blend.right))
    assert blend._child_params(params) == params
    other = blend._with_children([fn.ReLU(), fn.Sigmoid()])
    assert other == Blend(fn.ReLU(), fn.Sigmoid())
    lines = [line.split()[:4] for line in fn.summary(net, (2, 3, 3)).splitlines()]
    assert ["Blend", "of", "2", "layers"] in lines
    assert ["1.0", "Scale()", "(2,", "3,"] in lines


def test_a_subclass_may_hold_a_second_layer():
    @dataclass(frozen=True)
    class Gated(fn.Residual):
        gate: fn.Layer

    assert Gated(fn.ReLU(), fn.Sigmoid()) == Gated(fn.ReLU(), gate=fn.Sigmoid())
    with pytest.raises(TypeError, match=r"Residual: expected one layer, .* got 2"):
        fn.Residual(fn.ReLU(), fn.Sigmoid())


# --- Joining


def test_a_factor_with_sizes_of_1():
    """Squeeze and excitation: one weight for each channel."""
    squeeze = fn.Sequential(fn.Conv2d(2, (3, 4)), fn.Sigmoid())
    net = fn.Product(CONV, squeeze, fn.Conv2d(2, (1, 4)))
    assert net.out_shape((2, 3, 4)) == (2, 3, 4)
    params, x, grad = drawn(net, (2, 3, 4))
    y, gradients = expected(net, params, x, grad, None)
    close(net.apply(params, x), y)
    close(net.vjp(params, x, grad), gradients)
    both = fn.Product(fn.Conv2d(1, (3, 1)), fn.Conv2d(1, (1, 4)))
    assert both.out_shape((2, 3, 4)) == (1, 3, 4)


def test_a_product_with_zeros():
    """No gradient is got by dividing."""
    net = fn.Product(fn.ReLU(), fn.ReLU(), fn.Sigmoid())
    x = torch.tensor([[-1.0, 0.0, 2.0]], **DOUBLE)
    _, gradients = expected(net, ((),) * 3, x, torch.ones_like(x), None)
    close(net.vjp(((),) * 3, x, torch.ones_like(x)), gradients)


@pytest.mark.parametrize("cls", [fn.Sum, fn.Product, fn.Concat])
def test_whether_what_branches_make_is_new(cls):
    """Of one branch alone, it is as the layer has made it, which may have kept it."""
    for layer in (fn.Sigmoid(), CONV):
        assert cls(layer, fn.Sigmoid())._fresh
        assert cls(layer)._fresh == layer._fresh
        net = fn.Sequential(cls(layer), fn.Sigmoid())
        params, x, grad = drawn(net, (2, 3, 4))
        close(net.vjp(params, x, grad), expected(net, params, x, grad, None)[1])


@pytest.mark.parametrize("dim", [1, 2, 3, -1, -2, -3])
def test_concat_along_any_axis(dim):
    parts = [fn.Sigmoid(), CONV, fn.ReLU()]
    net = fn.Concat(*parts, dim=dim)
    params, x, grad = drawn(net, (2, 3, 4))
    assert net.out_shape((2, 3, 4)) == net.apply(params, x).shape[1:]
    close(net.apply(params, x), expected(net, params, x, grad, None)[0])
    close(net.vjp(params, x, grad), expected(net, params, x, grad, None)[1])


@pytest.mark.parametrize(("dim", "kernel"), [(2, (2, 1)), (-2, (2, 1)), (3, (1, 2)), (-1, (1, 2))])
def test_concat_of_other_sizes_along_its_axis(dim, kernel):
    net = fn.Concat(fn.Sigmoid(), fn.MaxPool2d(kernel), dim=dim)
    params, x, grad = drawn(net, (2, 4, 6))
    assert net.out_shape((2, 4, 6)) == net.apply(params, x).shape[1:]
    close(net.apply(params, x), expected(net, params, x, grad, None)[0])
    close(net.vjp(params, x, grad), expected(net, params, x, grad, None)[1])


def test_a_u_net():
    down, up = fn.Conv2d(4, 2, stride=2), fn.UpsampleConv2d(2)
    level = lambda inner: fn.Concat(fn.Sequential(), fn.Sequential(down, inner, up))  # noqa: E731
    net = level(level(fn.ReLU()))
    assert net.out_shape((2, 8, 8)) == (4, 8, 8)
    params, x, grad = drawn(net, (2, 8, 8))
    close(net.vjp(params, x, grad), expected(net, params, x, grad, None)[1])


@dataclass(frozen=True)
class Overwriting(fn.Identity):
    """An identity that doubles and halves, in place where it may."""

    def _fwd(self, params, x, key):
        return x * 2, None

    def _bwd(self, params, residuals, dy, need):
        return (), dy * 2

    def _fwd_(self, params, x, key):
        return x.mul_(2), None

    def _bwd_(self, params, residuals, dy, need):
        return (), dy.mul_(2)


@dataclass(frozen=True)
class SaysSo(Overwriting):
    _views = False


@pytest.mark.parametrize("cls", [fn.Sum, fn.Product, fn.Concat])
@pytest.mark.parametrize(
    "view", [fn.Identity(), fn.Permute(0, 1), Overwriting(), SaysSo()], ids=str
)
def test_branches_copy_no_view(cls, view):
    """What they join is copied anyway; a layer that writes in place is not taken for a view."""
    tanh = fn.Tanh()
    for net in (cls(view, tanh), cls(tanh, view), cls(view, view), cls(tanh, view, view)):
        params, x, grad = drawn(net, (3,))
        with Operations() as operations:
            net.apply(params, x)
            net.vjp(params, x, grad)
        assert not [name for name, _ in operations.ran if "clone" in name]
    check_vjp(fn.Sequential(tanh, cls(view, tanh), tanh), ((), ((), ()), ()), x)
    check_vjp(cls(view), ((),), x)


def test_an_apply_of_its_own_is_called_for_a_view():
    class Doubling(fn.Identity):
        def apply(self, params, x, *, key=None):
            return 2 * x

    x = torch.tensor([[1.0, 2.0]])
    assert same(fn.Sum(Doubling(), fn.Identity()).apply(((), ()), x), 3 * x)


# --- Parameters and keys


def test_params_and_their_keys():
    key, shape = fn.key(0), (2, 4, 4)

    def conv(i):
        return CONV.init(fn.fold_in(key, i), shape)

    own = CONV.init(key, shape)
    for cls in (fn.Residual, fn.Recompute, fn.Frozen):
        assert same(cls(CONV).init(key, shape), own)
    assert same(fn.Cast(CONV, torch.bfloat16).init(key, shape), own)
    for cls in (fn.Sequential, fn.Sum, fn.Product, fn.Concat):
        assert same(cls(CONV, CONV).init(key, shape), (conv(0), conv(1)))
        named = cls(b=CONV, a=CONV).init(key, shape)
        assert list(named) == ["b", "a"]
        assert same(named, {"b": conv(0), "a": conv(1)})
    assert same(fn.Reversible(CONV, CONV).init(key, (4, 4, 4)), (conv(0), conv(1)))
    stacked = optree.tree_map(lambda *leaves: torch.stack(leaves), conv(0), conv(1))
    assert same(fn.Repeat(CONV, 2).init(key, shape), stacked)
    assert same(fn.Loop(CONV, 2).init(key, shape), conv(0))
    assert fn.Repeat(fn.ReLU(), 2).init(key, shape) == ()


def test_copies_keep_the_memory_format_of_their_weights():
    layer = fn.UpsampleConv2d(4, 3, scale=1)
    weight = layer.init(fn.key(0), (4, 5, 5))["weight"]
    net = fn.Repeat(layer, 2)
    params = net.init(fn.key(0), (4, 5, 5))
    assert not weight.is_contiguous()
    assert params["weight"][1].stride() == weight.stride()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_copies_are_stacked_where_sizes_are_open():
    """No order of axes is found by their strides there, which are numbers only later."""
    torch._dynamo.reset()
    compiled = torch.compile(stack, fullgraph=True, backend="eager", dynamic=True)
    x = fn.normal(fn.key(0), (2, 3, 4, 5)).to(memory_format=torch.channels_last)
    assert torch.equal(compiled([x, 2 * x]), torch.stack([x, 2 * x]))


@pytest.mark.parametrize("cls", [fn.Repeat, fn.Loop])
def test_turns_draw_from_keys_of_their_own(cls):
    x, key = torch.zeros(2, 3, **DOUBLE), fn.key(0)
    noise = [fn.normal(fn.fold_in(key, i), x.shape, **DOUBLE) for i in range(3)]
    close(cls(Noise(), 3).apply((), x, key=key), noise[0] + noise[1] + noise[2])
    close(cls(Noise(), 3).apply((), x), x)


def test_a_repeat_is_a_sequential_and_a_loop_ties_its_parameters():
    params, x, grad = drawn(fn.Repeat(CONV, 3), (2, 3, 3))
    each = tuple(optree.tree_map(lambda leaf, i=i: leaf[i], params) for i in range(3))
    chain = fn.Sequential(CONV, CONV, CONV)
    close(fn.Repeat(CONV, 3).apply(params, x), chain.apply(each, x))
    dparams, dx = chain.vjp(each, x, grad)
    stacked = optree.tree_map(lambda *leaves: torch.stack(leaves), *dparams)
    close(fn.Repeat(CONV, 3).vjp(params, x, grad), (stacked, dx))
    tied = each[0]
    dparams, dx = chain.vjp((tied,) * 3, x, grad)
    sums = optree.tree_map(lambda *leaves: sum(leaves), *dparams)
    close(fn.Loop(CONV, 3).vjp(tied, x, grad), (sums, dx))


# --- Memory


def kept_bytes(net, x, *, besides=()):
    """The bytes that fwd keeps, each storage once."""
    params = net.init(fn.key(0), x.shape[1:], dtype=x.dtype)
    _, residuals = net.fwd(params, x)
    leaves = [leaf for leaf in optree.tree_leaves(residuals) if isinstance(leaf, torch.Tensor)]
    storages = {leaf.untyped_storage().data_ptr(): leaf.untyped_storage() for leaf in leaves}
    shared = {leaf.untyped_storage().data_ptr() for leaf in besides}
    return sum(s.nbytes() for address, s in storages.items() if address not in shared)


def test_recompute_keeps_x_alone():
    x = fn.normal(fn.key(0), (2, 2, 8, 8))
    deep = fn.Sequential(*[CONV, fn.Sigmoid()] * 8)
    assert kept_bytes(deep, x, besides=[x]) >= 8 * x.nbytes
    assert kept_bytes(fn.Recompute(deep), x, besides=[x]) == 0
    segments = fn.Sequential(*[fn.Recompute(fn.Sequential(*deep[:4]))] * 4)
    assert kept_bytes(segments, x) == 4 * x.nbytes


def test_what_is_computed_again_draws_the_same_masks():
    drops = fn.Sequential(fn.Dropout(), fn.Sigmoid(), fn.Dropout())
    x, grad = fn.normal(fn.key(0), (2, 3, 8)), fn.normal(fn.key(1), (2, 3, 8))
    found = fn.Recompute(drops).vjp(((),) * 3, x, grad, key=fn.key(2))
    assert same(found, drops.vjp(((),) * 3, x, grad, key=fn.key(2)))


def test_reversible_keeps_one_y():
    x = fn.normal(fn.key(0), (2, 4, 8, 8))
    for pairs in (1, 4):
        net = fn.Reversible(*[fn.Sequential(CONV, fn.Sigmoid())] * (2 * pairs))
        assert kept_bytes(net, x) == x.nbytes


def test_residuals_are_let_go_of_as_they_are_used():
    inner = fn.Sequential(CONV, fn.Sigmoid())
    for net in (fn.Residual(inner), fn.Repeat(inner, 2), fn.Loop(inner, 2), fn.Sum(inner, inner)):
        params, x, grad = drawn(net, (2, 3, 3))
        _, residuals = net._fwd(params, x, None)
        wanted = net._bwd(params, residuals, grad, Need())
        close(net._bwd(params, residuals, grad, Need(consume=True)), wanted)
        left = [leaf for leaf in optree.tree_leaves(residuals) if isinstance(leaf, torch.Tensor)]
        assert not left


# --- What is not needed is not computed


def test_nothing_is_asked_of_what_is_frozen():
    net = fn.Sequential(fn.Frozen(fn.Sequential(Scale(), Scale())), fn.Sigmoid(), CONV)
    params, x, grad = drawn(net, (2, 3, 3))
    Scale.asked.clear()
    dparams, dx = net.vjp(params, x, grad, input_grad=False)
    assert Scale.asked == []
    assert dx is None
    assert not any(leaf.any() for leaf in optree.tree_leaves(dparams[0]))
    assert net.vjp(params, x, grad)[1] is not None
    assert Scale.asked == [True, True]


def test_frozen_layers_are_asked_for_dx_alone():
    @dataclass(frozen=True)
    class Spy(fn.Layer):
        needs: ClassVar[list[Need]] = []

        def _params(self, shape):
            return {"w": fn.Param((), fn.initializers.Normal())}

        def _fwd(self, params, x, key):
            return params["w"] * x, x

        def _bwd(self, params, x, dy, need):
            self.needs.append(need)
            return {"w": (x * dy).sum()}, params["w"] * dy

    net = fn.Sequential(Scale(), fn.Frozen(Spy()), fn.Sigmoid())
    params, x, grad = drawn(net, (3,))
    net.vjp(params, x, grad, input_grad=False)
    assert [(need.params, need.input) for need in Spy.needs] == [(False, True)]
    # In every combinator, at the beginning of a network that has more to learn behind it
    for first in (fn.Frozen(Spy()), fn.Sum(fn.Frozen(Spy())), fn.Repeat(fn.Frozen(Spy()), 2)):
        net = fn.Sequential(fn.Residual(first), Scale())
        params, x, grad = drawn(net, (3,))
        Spy.needs.clear()
        net.vjp(params, x, grad, input_grad=False)
        assert not Spy.needs


def test_the_first_layer_of_a_reversible_is_not_asked_for_dx():
    net = fn.Reversible(Scale(), Scale())
    params, x, grad = drawn(net, (2, 3))
    Scale.asked.clear()
    net.vjp(params, x, grad, input_grad=False)
    assert Scale.asked == [True, False]


def test_a_branch_without_parameters_rests():
    net = fn.Product(fn.Sequential(Noise(), fn.Sigmoid()), Scale())
    params, x, grad = drawn(net, (3,))
    with_dx, _ = net.vjp(params, x, grad)
    close(net.vjp(params, x, grad, input_grad=False), (with_dx, None))


def test_what_is_frozen_stays_under_an_optimizer_and_autograd():
    net = fn.Sequential(a=fn.Frozen(CONV), b=CONV)
    params, x, target = drawn(net, (2, 3, 3))
    sgd = fn.SGD(0.1, momentum=0.9)
    state, start = sgd.init(params), params
    for _ in range(2):
        _, grads = fn.value_and_grad(net, fn.MSE())(params, x, target)
        params, state = sgd.step(params, grads, state)
    assert same(params["a"], start["a"])
    assert not same(params["b"], start["b"])
    grads = torch.func.grad(lambda params: net.apply(params, x).sum())(params)
    assert not grads["a"]["weight"].any()
    assert grads["b"]["weight"].any()


def test_check_vjp_refuses_a_frozen_layer_that_learns():
    @dataclass(frozen=True)
    class Thawed(fn.Frozen):
        def _learns(self, params):
            return True

        def _bwd(self, params, residuals, dy, need):
            return self.layer._bwd(params, residuals, dy, need)

    params, x, _ = drawn(CONV, (2, 3, 3))
    with pytest.raises(AssertionError, match=r"for what is frozen in .* is not 0"):
        check_vjp(Thawed(CONV), params, x)


# --- Mixed precision


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_cast_computes_in_its_dtype(dtype):
    inner = fn.Sequential(CONV, fn.Sigmoid(), Scale())
    net = fn.Cast(inner, dtype)
    params = net.init(fn.key(0), (2, 4, 4))
    x = fn.normal(fn.key(1), (2, 2, 4, 4))
    y = net.apply(params, x)
    grad = fn.normal(fn.key(2), y.shape)
    low = optree.tree_map(lambda leaf: leaf.to(dtype), params)
    assert torch.equal(y, inner.apply(low, x.to(dtype)).float())
    expected = inner.vjp(low, x.to(dtype), grad.to(dtype))
    assert same(net.vjp(params, x, grad), optree.tree_map(torch.Tensor.float, expected))
    _, grads = fn.value_and_grad(net, fn.MSE())(params, x, grad)
    assert {leaf.dtype for leaf in optree.tree_leaves(grads)} == {torch.float32}


@dataclass(frozen=True)
class Renumbered(fn.Embedding):
    """y = weight[number[x]], with integers among the parameters."""

    def init(self, key, shape, *, dtype=None, device=None):
        numbers = torch.arange(self.num_embeddings).flip(0)
        weight = super().init(key, shape, dtype=dtype, device=device)["weight"]
        return {"number": numbers, "weight": weight}

    def fwd(self, params, x, *, key=None):
        return params["weight"][params["number"][x]], None


@pytest.mark.parametrize("cls", [fn.Embedding, Renumbered])
def test_cast_of_integers_has_the_dtype_of_the_floating_point_parameters(cls):
    net = fn.Cast(cls(3, 2), torch.bfloat16)
    for dtype in (torch.float32, torch.float64):
        params = net.init(fn.key(0), (), dtype=dtype)
        assert net.apply(params, torch.tensor([0, 2])).dtype == dtype


def test_cast_by_name_and_in_files(tmp_path):
    net = fn.Cast(CONV, torch.bfloat16)
    assert fn.Cast(CONV, "bfloat16") == net
    assert repr(net) == f"Cast({CONV}, dtype=torch.bfloat16)"
    fn.save_model(tmp_path / "net", net, net.init(fn.key(0), (2, 4, 4)))
    assert fn.load_model(tmp_path / "net")[0] == net
    for dtype in (torch.int64, "int8", "bfloat", None):
        with pytest.raises(TypeError, match="Cast: expected dtype to be a floating-point dtype"):
            fn.Cast(CONV, dtype)


# --- Subclasses


@pytest.mark.parametrize("cls", [fn.Sequential, fn.Sum, fn.Concat, fn.Reversible])
def test_fields_of_a_subclass_convert(cls):
    @dataclass(frozen=True, init=False)
    class Wide(cls):
        width: Size = 1

        def __init__(self, *layers, width):
            object.__setattr__(self, "width", width)
            super().__init__(*layers)

    assert Wide(CONV, CONV, width=3).width == 3
    with pytest.raises(ValueError, match="Wide: expected width >= 1, got 0"):
        Wide(CONV, CONV, width=0)


def test_a_combinator_shows_and_stores_its_options(tmp_path):
    branches = fn.Identity(), fn.ReLU()
    assert repr(fn.Concat(*branches, dim=1)) == "Concat(Identity(), ReLU())"
    assert repr(fn.Concat(*branches, dim=2)) == "Concat(Identity(), ReLU(), dim=2)"
    named = fn.Concat(skip=branches[0], inner=branches[1], dim=2)
    assert repr(named) == "Concat(skip=Identity(), inner=ReLU(), dim=2)"
    fn.save_model(tmp_path / "net", named, named.init(fn.key(0), (2, 3)))
    assert fn.load_model(tmp_path / "net")[0] == named
    assert b"names" not in (tmp_path / "net").read_bytes()  # they stand beside the layers


def test_fields_may_be_added_to_a_combinator():
    @dataclass(frozen=True)
    class Wide(fn.Sequential):
        width: Size = 1

    assert Wide((fn.ReLU(),)) == Wide((fn.ReLU(),), (), 1)
    assert repr(Wide((fn.ReLU(),), width=2)) == "Wide(ReLU(), width=2)"


# --- What couples examples


def test_who_couples_examples():
    @dataclass(frozen=True)
    class Coupled(Noise):
        couples_examples = True

    assert not fn.Conv2d.couples_examples
    assert not CONV.couples_examples
    coupled = Coupled()
    for net in (
        coupled,
        fn.Sequential(fn.ReLU(), fn.Residual(coupled)),
        fn.Sum(a=coupled, b=fn.ReLU()),
        fn.Repeat(coupled, 2),
        fn.Reversible(fn.ReLU(), coupled),
        Blend(fn.ReLU(), fn.Frozen(coupled)),
    ):
        assert net.couples_examples
    assert not Blend(fn.ReLU(), CONV).couples_examples


# --- Errors


X = torch.zeros(2, 2, 4, 4)
WRONG = fn.Conv2d(3, 3, padding=1)


def init(net, shape=(2, 4, 4)):
    return lambda: net.init(fn.key(0), shape)


def applied(net, params, x=X):
    return lambda: net.apply(params, x)


REFUSED = {
    "layer": (lambda: fn.Residual("relu"), "Residual: expected layer to be a Layer, got 'relu'"),
    "branch": (lambda: fn.Sum(CONV, 3), "Sum: expected layer 1 to be a Layer, got 3"),
    "a list": (
        lambda: fn.Sequential([CONV]),
        f"Sequential: expected layer 0 to be a Layer, got [{CONV}]: Sequential(*layers) takes all",
    ),
    "a dict": (
        lambda: fn.Concat({"a": CONV}),
        f"Concat: expected layer 0 to be a Layer, got {{'a': {CONV}}}: Concat(**layers) takes all",
    ),
    "named branch": (lambda: fn.Sum(a=3), "Sum: expected a to be a Layer, got 3"),
    "mixed": (
        lambda: fn.Sequential(CONV, head=CONV),
        "Sequential: expected layers by position or by name, got both: 1 layer and 'head'",
    ),
    "a tuple by name": (
        lambda: fn.Sequential(layers=(CONV,), head=CONV),
        "Sequential: expected layers to be a Layer, got (Conv2d(",
    ),
    "a tuple besides": (
        lambda: fn.Sequential(CONV, layers=(CONV,)),
        "Sequential: expected layers by position or by name, got both: 1 layer and 'layers'",
    ),
    "no name": (
        lambda: fn.Sequential(**{"": CONV}),
        "Sequential: expected names of one character or more, got ''",
    ),
    "no branch": (fn.Product, "Product: expected at least 1 layer, got none"),
    "dim": (lambda: fn.Concat(CONV, dim=0), "Concat: expected dim not to be 0, the batch, got 0"),
    "dim twice": (
        lambda: fn.Concat(a=CONV, dim=CONV),
        f"Concat: expected dim to be an int, got {CONV}: a layer cannot have the name dim",
    ),
    "n": (lambda: fn.Repeat(CONV, 0), "Repeat: expected n >= 1, got 0"),
    "no pairs": (lambda: fn.Reversible(), "Reversible: expected an even number of layers, at"),
    "pairs": (lambda: fn.Reversible(CONV), "Reversible: expected an even number of layers, at"),
    "three": (
        lambda: fn.Reversible(CONV, CONV, CONV),
        "Reversible: expected an even number of lay",
    ),
    "pairs by name": (lambda: fn.Reversible(f=CONV, g=CONV), "Reversible: expected layers by pos"),
    "kept shape": (
        init(fn.Residual(WRONG)),
        f"Residual({WRONG}): expected a layer that keeps the shape of an example, "
        "got (2, 4, 4) before it and (3, 4, 4) after it",
    ),
    "kept shape of a loop": (init(fn.Loop(WRONG, 2)), f"Loop({WRONG}, 2): expected a layer that k"),
    "one shape": (
        init(fn.Sum(CONV, WRONG)),
        "Sum of 2 layers: expected results of one shape, got (2, 4, 4), (3, 4, 4)",
    ),
    "factors": (init(fn.Product(CONV, WRONG)), "Product of 2 layers: expected results of one sha"),
    "factors of another rank": (
        init(fn.Product(CONV, fn.Sequential(CONV, fn.Select(dim=2, index=0)))),
        "Product of 2 layers: expected results of one shape, up to sizes of 1, got (2, 4, 4), (2",
    ),
    "ranks": (
        init(fn.Concat(CONV, WRONG, dim=2)),
        "Concat of 2 layers: expected results that differ along dim=2 alone, got (2, 4, 4), (3,",
    ),
    "no axis": (lambda: fn.Concat(CONV, dim=1.5), "Concat: expected dim to be an int, got 1.5"),
    "no layer": (lambda: fn.Frozen(None), "Frozen: expected layer to be a Layer, got None"),
    "no such axis": (
        init(fn.Concat(CONV, dim=4)),
        "Concat of 1 layer: expected results with ",
    ),
    "behind all": (init(fn.Concat(CONV, dim=5)), "Concat of 1 layer: expected results with an"),
    "before all": (init(fn.Concat(CONV, dim=-5)), "Concat of 1 layer: expected results with an"),
    "other ranks": (
        init(fn.Concat(fn.Identity(), fn.Select(2, 0), dim=2), (3, 4)),
        "Concat of 2 layers: expected results that differ along dim=2 alone, got (3, 4), (3,)",
    ),
    "the batch": (init(fn.Concat(CONV, dim=-4)), "Concat of 1 layer: expected results with "),
    "odd": (
        init(fn.Reversible(CONV, CONV), (3, 4, 4)),
        "Reversible of 2 layers: expected an even number of channels, got an example of shape (3,",
    ),
    "half at last": (
        applied(
            fn.Reversible(CONV, WRONG),
            tuple(conv.init(fn.key(0), (2, 4, 4)) for conv in (CONV, WRONG)),
            torch.zeros(2, 4, 4, 4),
        ),
        f"layer 1: {WRONG}: expected a layer that keeps the shape",
    ),
    "integers in halves": (
        applied(fn.Reversible(fn.ReLU(), fn.ReLU()), ((), ()), X.long()),
        "Reversible of 2 layers: expected x to be floating-point, got torch.int64",
    ),
    "no channels": (
        init(fn.Reversible(fn.ReLU(), fn.ReLU()), ()),
        "Reversible of 2 layers: expected an even number of channels, got an example of shape ()",
    ),
    "a connection at last": (
        applied(fn.Residual(fn.Conv2d(2, 3)), fn.Conv2d(2, 3).init(fn.key(0), (2, 4, 4))),
        "Residual(Conv2d(2, kernel_size=3)): expected a layer that keeps the shape of an example",
    ),
    "half": (init(fn.Reversible(CONV, WRONG), (4, 4, 4)), f"layer 1: {WRONG}: expected a layer th"),
    "way": (
        init(fn.Sequential(fn.ReLU(), fn.Residual(fn.Sum(a=fn.Sequential(CONV, WRONG), b=CONV)))),
        "layer 1: Sum of 2 layers: expected results of one shape",
    ),
    "way in params": (
        applied(fn.Sum(a=fn.Recompute(fn.Sequential(fn.ReLU(), CONV))), {"a": ((), ())}),
        f"a: layer 1: {CONV}: expected params to be a dict",
    ),
    "copies": (
        applied(fn.Repeat(CONV, 3), fn.Repeat(CONV, 2).init(fn.key(0), (2, 4, 4))),
        f"Repeat({CONV}, 3): expected bias to have a leading axis of 3, got shape (2, 2)",
    ),
    "copies of a number": (
        applied(fn.Repeat(fn.Linear(2), 2), {"weight": torch.ones(2, 2, 2), "bias": 1.0}),
        "Linear(2): expected bias to be a tensor, got float",
    ),
    "copies that are a tensor": (
        applied(fn.Repeat(CONV, 2), torch.zeros(3, 2)),
        f"Repeat({CONV}, 2): expected params to have a leading axis of 2, got shape (3, 2)",
    ),
    "dtypes": (
        applied(
            fn.Sum(fn.Embedding(2, 3), fn.Embedding(2, 3)),
            tuple({"weight": torch.zeros(2, 3, dtype=t)} for t in (torch.float64, torch.float32)),
            torch.zeros(2, 4, dtype=torch.int64),
        ),
        "Sum of 2 layers: expected results of one dtype, got torch.float32, torch.float64",
    ),
    "params of pairs": (
        applied(fn.Reversible(fn.ReLU(), fn.ReLU()), ((),)),
        "Reversible of 2 layers: expected params of 2 layers, got 1",
    ),
    "names": (
        applied(fn.Sum(a=CONV, b=CONV), {"a": (), "c": ()}),
        "Sum of 2 layers: expected params with keys 'a', 'b', got keys 'a', 'c'",
    ),
    "no names": (
        applied(fn.Sum(a=CONV), {}),
        "Sum of 1 layer: expected params with keys 'a', got keys none",
    ),
    "tree": (
        applied(fn.Sum(a=CONV, b=CONV), ((), ())),
        "Sum of 2 layers: expected params to be a dict with keys 'a', 'b', got tuple",
    ),
    "kinds": (
        applied(fn.Residual(fn.Sequential()), (), X.long()),
        "Residual(Sequential of 0 layers): expected x to be floating-point, got torch.int64",
    ),
    "grad": (
        lambda: fn.Sequential(fn.Recompute(fn.Sequential(a=fn.ReLU()))).vjp(
            ({"a": ()},), X, torch.zeros(3)
        ),
        "layer 0: a: ReLU(): expected grad of shape (2, 2, 4, 4), got (3,)",
    ),
}


@pytest.mark.parametrize(("call", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_refused(call, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert str(caught.value).startswith(message)


def test_a_layer_that_breaks_its_own_promise():
    """A sum would broadcast."""

    @dataclass(frozen=True)
    class Narrow(Noise):
        def fwd(self, params, x, *, key=None):
            return x[:, :1].clone(), None

    for net in (fn.Residual(Narrow()), fn.Sum(Narrow(), fn.ReLU()), fn.Loop(Narrow(), 2)):
        with pytest.raises(ValueError, match=r"as out_shape says, got \(2, 1, 4, 4\)"):
            net.apply(net.init(fn.key(0), (2, 4, 4)), X)


def test_a_layer_of_ours_with_a_forward_pass_of_its_own():
    @dataclass(frozen=True)
    class Twice(fn.ReLU):
        def fwd(self, params, x, *, key=None):
            y, kept = super().fwd(params, x, key=key)
            return 2 * y, kept

    for net in (fn.Recompute(Twice()), fn.Sum(Twice()), fn.Sequential(Twice())):
        params = net.init(fn.key(0), X.shape[1:])
        assert net.apply(params, X).equal(2 * X.relu())


# --- Integers


def test_branches_of_integers():
    @dataclass(frozen=True)
    class Table(fn.Layer):
        """y = weight[x]."""

        def init(self, key, shape, *, dtype=None, device=None):
            return {"weight": fn.normal(key, (5, 3), dtype=dtype, device=device)}

        def out_shape(self, shape):
            return (*shape, 3)

        def fwd(self, params, x, *, key=None):
            return params["weight"][x], x

        def bwd(self, params, x, grad, *, input_grad=True):
            zeros = torch.zeros_like(params["weight"])
            return {"weight": zeros.index_add(0, x.flatten(), grad.flatten(0, -2))}, None

    x = torch.tensor([[0, 1], [4, 1]])
    tables = {"a": Table(), "b": fn.Sequential(Table(), fn.Sigmoid())}
    for net in (fn.Sum(**tables), fn.Product(**tables), fn.Concat(**tables, dim=-1)):
        for outer in (net, fn.Recompute(net), fn.Cast(net, torch.float64), fn.Frozen(net)):
            params = outer.init(fn.key(0), (2,))
            y = outer.apply(params, x)
            assert y.dtype == torch.float32
            dparams, dx = outer.vjp(params, x, torch.ones_like(y))
            assert dx is None
            assert optree.tree_structure(dparams) == optree.tree_structure(params)
            frozen = isinstance(outer, fn.Frozen)
            assert bool(dparams["a"]["weight"].any()) != frozen


def test_what_shares_memory_with_gradients_of_parameters_is_not_written_to():
    """A layer that does not promise fresh results may give out dx and a view of it."""

    @dataclass(frozen=True)
    class Shift(fn.Layer):
        def _params(self, shape):
            return {"shift": fn.Param(shape, fn.initializers.Ones())}

        def _fwd(self, params, x, key):
            return x + params["shift"], None

        def _bwd(self, params, residuals, dy, need):
            dx = dy.clone()
            return {"shift": dx[0]}, dx  # of a batch of one

    x, grad = torch.tensor([[1.0, -1.0, 2.0, -2.0]]), torch.tensor([[1.0, 2.0, 3.0, 4.0]])
    nets = [fn.Reversible(Shift(), Shift()), fn.Residual(Shift()), fn.Sum(Shift(), Shift())]
    nets += [fn.Residual(fn.Recompute(Shift())), fn.Sequential(fn.ReLU(), fn.Recompute(Shift()))]
    for net in nets:
        params = net.init(fn.key(0), (4,))
        leaves, structure = optree.tree_flatten(params)
        leaves = [leaf.clone().requires_grad_() for leaf in leaves]
        y = net.apply(structure.unflatten(leaves), x)
        expected = torch.autograd.grad(y, leaves, grad)
        dparams, _ = net.vjp(params, x, grad)
        assert same(optree.tree_leaves(dparams), list(expected)), net


def test_gradients_of_a_layer_that_checks_for_itself_are_not_written_over():
    @dataclass(frozen=True)
    class Shift(fn.Layer):
        def init(self, key, shape, *, dtype=None, device=None):
            return {"shift": torch.ones(shape, dtype=dtype, device=device)}

        def fwd(self, params, x, *, key=None):
            return x + params["shift"], None

        def bwd(self, params, residuals, grad, *, input_grad=True):
            return {"shift": grad[0]}, grad.clone()  # of a batch of one

    net = fn.Loop(Shift(), 3)
    params, x, grad = net.init(fn.key(0), (4,)), torch.zeros(1, 4), torch.ones(1, 4)
    dparams, _ = net.vjp(params, x, grad)
    assert torch.equal(dparams["shift"], torch.full((4,), 3.0))
    assert torch.equal(grad, torch.ones(1, 4))


@dataclass(frozen=True)
class OnlyForDx(fn.Layer):
    """Halves x; refuses to be asked for nothing."""

    def _fwd(self, params, x, key):
        return x / 2, None

    def _bwd(self, params, residuals, dy, need):
        assert need.input
        return (), dy / 2


@pytest.mark.parametrize(
    "net",
    [
        OnlyForDx(),
        *(fn.Sequential(OnlyForDx(), fn.Linear(4)), fn.Sequential(fn.Linear(4), OnlyForDx())),
        *(fn.Sum(OnlyForDx(), fn.Linear(4)), fn.Product(fn.Linear(4), OnlyForDx())),
        *(fn.Concat(OnlyForDx(), fn.Linear(4)), fn.Concat(OnlyForDx(), fn.Identity())),
        *(fn.Residual(OnlyForDx()), fn.Recompute(OnlyForDx()), fn.Cast(OnlyForDx(), torch.float64)),
        *(fn.Loop(OnlyForDx(), 2), fn.Repeat(OnlyForDx(), 2)),
        fn.Loop(fn.Sequential(OnlyForDx(), fn.Linear(4)), 2),
        fn.Repeat(fn.Sequential(OnlyForDx(), fn.Linear(4)), 2),
        fn.Recompute(fn.Sum(OnlyForDx(), fn.Sequential(OnlyForDx(), fn.Linear(4)))),
        *(fn.Reversible(OnlyForDx(), fn.Linear(2)), fn.Reversible(fn.Linear(2), OnlyForDx())),
        fn.Reversible(OnlyForDx(), OnlyForDx()),
        fn.Sequential(OnlyForDx(), fn.Frozen(fn.Linear(4)), OnlyForDx(), fn.Linear(4)),
        fn.Sequential(fn.Frozen(fn.Sum(OnlyForDx(), fn.Linear(4))), OnlyForDx()),
    ],
    ids=str,
)
def test_a_layer_without_parameters_is_asked_for_dx_or_not_at_all(net):
    params, x, grad = make(net, (4,))
    for needs in product((True, False), repeat=2):
        _, residuals = net.fwd(params, x)
        net.bwd(params, residuals, grad, input_grad=needs[0], param_grad=needs[1])
    target = torch.zeros_like(grad)
    fn.value_and_grad(net, fn.MSE())(params, x, target)
    fn.value_and_grad(net, fn.MSE(), micro_batch=1)(params, x, target)
    fn.per_example(net, fn.MSE())(params, x, target)
    fn.gradient_norms(net, fn.MSE())(params, x, target)
    fn.clipped_value_and_grad(net, fn.MSE(), 1.0)(params, x, target)
    for _ in fn.gradients_by_layer(net, fn.MSE())(params, x, target):
        pass
    fn.trace(net, params, x, grad)


class Generous(fn.Linear):
    """Gives dx whether it is asked for it or not."""

    def _bwd(self, params, x, dy, need):
        return super()._bwd(params, x, dy, need._replace(input=True))


@pytest.mark.parametrize("cls", [fn.Sequential, fn.Sum, fn.Product, fn.Concat, fn.Reversible])
def test_dx_that_nobody_asked_for_does_no_harm(cls):
    for layers in ((Generous(4), fn.Linear(4)), (fn.Linear(4), Generous(4))):
        net = cls(*layers)
        params, x = net.init(fn.key(0), (8, 4)), fn.normal(fn.key(1), (2, 8, 4))
        grad = torch.ones(2, *net.out_shape((8, 4)))
        dparams, dx = net.vjp(params, x, grad, input_grad=False)
        assert dx is None
        assert same(dparams, net.vjp(params, x, grad)[0])
