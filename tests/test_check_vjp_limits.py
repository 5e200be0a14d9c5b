"""check_vjp at extreme numbers, at the edge of a layer's domain, at kinks, and on odd trees."""

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from registry import budget
from users_layers import Dense, Plain

import funcnet as fn
from funcnet.testing import GradientMismatch, check_function, check_vjp


def draw(shape, dtype=torch.float64, key=0):
    return fn.normal(fn.key(key), shape, dtype=dtype)


@dataclass(frozen=True)
class Function(Plain):
    """y = f(x) entry by entry, with slope f′(x); both are named in `FUNCTIONS`."""

    name: str
    opaque: bool = False
    factor: float = 1.0

    def fwd(self, params, x, *, key=None):
        with torch.set_grad_enabled(not self.opaque and torch.is_grad_enabled()):
            return FUNCTIONS[self.name][0](x), x

    def bwd(self, params, x, grad, *, input_grad=True):
        return (), self.factor * grad * FUNCTIONS[self.name][1](x) if input_grad else None


def within(x, low, high):
    if not ((x >= low) & (x <= high)).all():
        raise ValueError(f"expected numbers between {low} and {high}")
    return x


def normal_cdf(x):
    return 0.5 * (1 + torch.erf(x * 0.5**0.5))


FUNCTIONS = {
    "gelu": (
        F.gelu,
        lambda x: normal_cdf(x) + x * torch.exp(-x * x / 2) / math.sqrt(2 * math.pi),
    ),
    "cdf": (normal_cdf, lambda x: torch.exp(-x * x / 2) / math.sqrt(2 * math.pi)),
    "slope of tanh": (
        lambda x: 1 - torch.tanh(x) ** 2,
        lambda x: -2 * torch.tanh(x) * (1 - torch.tanh(x) ** 2),
    ),
    "square": (torch.square, lambda x: 2 * x),
    "cube": (lambda x: x**3, lambda x: 3 * x**2),
    "reciprocal": (torch.reciprocal, lambda x: -1 / x / x),
    "acos": (lambda x: torch.acos(within(x, -1, 1)), lambda x: -1 / torch.sqrt(1 - x * x)),
    "entropy": (
        lambda x: -torch.xlogy(within(x, 0, 1), x) - torch.xlogy(1 - x, 1 - x),
        lambda x: torch.log(1 - x) - torch.log(x),
    ),
    "log": (lambda x: torch.log(within(x, 0, math.inf)), torch.reciprocal),
    "sigmoid": (torch.sigmoid, lambda x: torch.sigmoid(x) * torch.sigmoid(-x)),
    "softplus": (F.softplus, torch.sigmoid),
    "exp": (torch.exp, torch.exp),
    "1 - cos": (lambda x: 1 - torch.cos(x), torch.sin),
    "pseudo-Huber": (lambda x: torch.sqrt(1 + x * x) - 1, lambda x: x / torch.sqrt(1 + x * x)),
    "log cosh": (lambda x: torch.log(torch.cosh(x)), torch.tanh),
    "sign": (
        lambda x: x / torch.sqrt(x * x + torch.finfo(x.dtype).eps),
        lambda x: torch.finfo(x.dtype).eps * (x * x + torch.finfo(x.dtype).eps) ** -1.5,
    ),
}
TAILS = ["gelu", "cdf", "slope of tanh", "sigmoid", "softplus", "exp"]


# --- What drowns in rounding is not refuted


@pytest.mark.parametrize("opaque", [False, True], ids=["autograd", "opaque"])
@pytest.mark.parametrize("name", TAILS)
@budget(8)
@given(x=st.lists(st.floats(-40, 40), min_size=1, max_size=3))
def test_right_slopes_in_tails(name, opaque, x):
    for dtype in (torch.float64, torch.float32):
        check_vjp(Function(name, opaque), (), torch.tensor([x], dtype=dtype))


@pytest.mark.parametrize("opaque", [False, True], ids=["autograd", "opaque"])
def test_gelu_is_a_staircase_far_from_zero(opaque):
    check_vjp(Function("gelu", opaque), (), torch.tensor([[7.0, -8.0]], dtype=torch.float64))
    check_vjp(Function("gelu", opaque), (), torch.tensor([[-5.5, -6.0]]))


@pytest.mark.parametrize("opaque", [False, True], ids=["autograd", "opaque"])
@pytest.mark.parametrize("name", ["1 - cos", "pseudo-Huber", "log cosh"])
@budget(8)
@given(exponent=st.floats(-12, 0), factors=st.lists(st.floats(-3, 3), max_size=2))
def test_functions_whose_terms_cancel_near_zero(name, opaque, exponent, factors):
    x = [10**exponent * factor for factor in (1.0, *factors)]
    for dtype in (torch.float64, torch.float32):
        check_vjp(Function(name, opaque), (), torch.tensor([x], dtype=dtype))


def test_autograd_does_not_decide_where_its_own_terms_cancel():
    x = torch.linspace(0.1, 2, 7, dtype=torch.float64)
    check_vjp(Function("sign"), (), x)  # slopes of 1e-13 to 1e-17, between terms of 1 / x
    with pytest.raises(GradientMismatch):
        check_vjp(Function("sign", factor=1.01), (), x * 1e-7)


DEEP = {
    "sigmoids": (fn.Sequential(*(fn.Conv2d(2, 3, padding=1), fn.Sigmoid()) * 20), (2, 4, 4)),
    "relus": (fn.Sequential(*(fn.Linear(6), fn.ReLU()) * 30), (6,)),
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_networks_in_which_the_first_layers_hardly_matter(name):
    net, shape = DEEP[name]
    params = net.init(fn.key(0), shape, dtype=torch.float64)
    check_vjp(net, params, draw((2, *shape)))


@pytest.mark.parametrize("exponent", [-300, -200, -18, 18, 200, 300])
@pytest.mark.parametrize(
    "layer", [fn.Linear(4), fn.LayerNorm(), fn.Sequential(fn.Linear(4), fn.Tanh())], ids=str
)
def test_right_layers_at_extreme_scales(layer, exponent):
    params = layer.init(fn.key(0), (5,), dtype=torch.float64)
    check_vjp(layer, params, 10.0**exponent * draw((3, 5)))
    if abs(exponent) < 30:
        params = layer.init(fn.key(0), (5,))
        check_vjp(layer, params, 10.0**exponent * draw((3, 5), torch.float32))


@pytest.mark.parametrize("factor", [1e4, 1e-3])
@pytest.mark.parametrize(
    "layer", [fn.LSTM(3), fn.MultiheadAttention(2), fn.GELU(), fn.Linear(4)], ids=str
)
def test_right_layers_of_large_and_small_weights(layer, factor):
    shape = (4, 4)
    params = layer.init(fn.key(0), shape, dtype=torch.float64)
    params = optree.tree_map(lambda leaf: factor * leaf, params)
    check_vjp(layer, params, draw((2, *shape)))


@pytest.mark.parametrize("size", [5e-324, 1e-310, 1e-200, 1e200, torch.finfo().max])
@pytest.mark.parametrize("name", ["relu", "square", "cube", "reciprocal", "gelu"])
def test_the_smallest_and_the_largest_numbers(name, size):
    layer = fn.ReLU() if name == "relu" else Function(name)
    x = torch.tensor([size, 1.0], dtype=torch.float64)
    check_vjp(layer, (), x)
    check_vjp(layer, (), torch.stack([x, -x]), grad=torch.stack([x, x]))


@dataclass(frozen=True)
class Added(fn.Layer):
    """y = x + b, which autograd cannot follow."""

    def _params(self, shape):
        return {"b": fn.Param(shape, fn.initializers.Zeros())}

    def _fwd(self, params, x, key):
        with torch.no_grad():
            return x + params["b"], None

    def _bwd(self, params, residuals, dy, need):
        return {"b": dy.sum(0)}, dy.clone()


@pytest.mark.parametrize("sign", [1, -1])
def test_derivatives_whose_sum_is_beyond_all_numbers(sign):
    """Along a direction that moves each entry of x and b by about its size."""
    largest = torch.finfo(torch.float64).max
    for seed in range(10):
        b = torch.tensor([0.9 * largest, 1.0], dtype=torch.float64)
        x = torch.stack([-0.9 * sign * b, 0.5 * b])
        check_vjp(Added(), {"b": b}, x, draw((2, 2), key=seed))


def test_what_cancels_whatever_x_is_rounds_all_the_same():
    """The mean of two centred numbers is 0 at every x, but for rounding."""
    net = fn.Sequential(fn.LayerNorm(elementwise_affine=False, bias=False), fn.AvgPool2d((1, 2)))
    for seed in range(20):
        x = fn.normal(fn.key(seed), (3, 2, 2, 2))
        check_vjp(net, net.init(fn.key(0), (2, 2, 2)), x)
        check_vjp(net, net.init(fn.key(0), (2, 2, 2)), torch.sigmoid((3 * x).round()))
    net = fn.Sequential(fn.Softmax(1), fn.Softplus(), fn.InstanceNorm(affine=True))
    check_vjp(net, net.init(fn.key(0), (1, 1, 2)), torch.tensor([[[[1.0, 0.0]]]]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_what_oscillates_faster_than_steps_follow(dtype):
    """Long steps skip many periods, and differences by chance agree."""

    @dataclass(frozen=True)
    class Waves(fn.Layer):
        factor: float = 1.0

        def init(self, key, shape, *, dtype=None, device=None):
            return fn.normal(key, (shape[0], 8), dtype=dtype, device=device)

        def out_shape(self, shape):
            return (8,)

        def fwd(self, params, x, *, key=None):
            return (x @ params).sin(), x

        def bwd(self, params, x, grad, *, input_grad=True):
            dz = self.factor * grad * (x @ params).cos()
            return x.T @ dz, dz @ params.T if input_grad else None

    x = 1e6 * draw((3, 2), dtype)
    params = Waves().init(fn.key(1), (2,), dtype=dtype)
    check_vjp(Waves(), params, x)
    with pytest.raises(GradientMismatch, match=r"a factor of 1\.01 is wrong"):
        check_vjp(Waves(1.01), params, x)


def test_saturated_attention_is_linear_in_grad():
    """Where softmax saturates, its gradient is nothing but the rounding of larger terms."""
    layer = fn.MultiheadAttention(2)
    params = layer.init(fn.key(26), (4, 4), dtype=torch.float64)
    check_vjp(layer, params, 30 * draw((2, 4, 4), key=1026))


@dataclass(frozen=True)
class Single(Dense):
    """A Dense that computes in float32, whatever x is in."""

    factor: float = 1.0

    def fwd(self, params, x, *, key=None):
        y, residuals = super().fwd(optree.tree_map(torch.Tensor.float, params), x.float())
        return y.to(x.dtype), residuals

    def bwd(self, params, residuals, grad, *, input_grad=True):
        single = optree.tree_map(torch.Tensor.float, params)
        dparams, dx = super().bwd(single, residuals, self.factor * grad.float())
        dparams = optree.tree_map(lambda leaf: leaf.to(grad.dtype), dparams)
        return dparams, dx.to(grad.dtype) if input_grad else None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_in_a_layer_that_computes_in_float32(dtype):
    """Small steps are lost in half precision, though not in what it computes in."""
    for seed in range(3):
        params = Single().init(fn.key(seed), (3,), dtype=dtype)
        x = draw((2, 3), dtype, key=seed + 10)
        check_vjp(Single(), params, x)
        with pytest.raises(GradientMismatch, match=r"in torch\.float32, the gradient is wrong"):
            check_vjp(Single(factor=1.02), params, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_layer_that_computes_in_float32_at_zeros(dtype):
    """0 is in every dtype: it does not tell in which one it has been computed."""
    params = Single().init(fn.key(0), (3,), dtype=dtype)
    nothing = optree.tree_map(torch.zeros_like, params)
    check_vjp(Single(), {**params, "bias": nothing["bias"]}, torch.zeros(2, 3, dtype=dtype))
    check_vjp(Single(), nothing, draw((2, 3), dtype))


def test_a_single_subnormal_number():
    check_vjp(fn.ReLU(), (), torch.tensor([5e-324], dtype=torch.float64))


@pytest.mark.parametrize("opaque", [False, True], ids=["autograd", "opaque"])
@pytest.mark.parametrize("name", ["gelu", "softplus", "square", "log"])
@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e6])
def test_wrong_slopes_are_still_refuted(name, opaque, scale):
    if name in ("gelu", "softplus") and scale != 1:
        return  # steps of 1e-12 drown in softplus(0), and the slope of gelu is 0 or 1 at 1e6
    x = scale * fn.uniform(fn.key(1), (2, 3), 0.1, 2.0, dtype=torch.float64)
    with pytest.raises(GradientMismatch, match="is wrong"):
        check_vjp(Function(name, opaque, factor=1 + 1e-4), (), x)


def test_autograd_decides_what_no_step_resolves():
    x = torch.tensor([[1e-3, -7.5]], dtype=torch.float64)
    check_vjp(Function("cdf"), (), x)

    @dataclass(frozen=True)
    class Flat(Function):
        def bwd(self, params, x, grad, *, input_grad=True):
            _, dx = super().bwd(params, x, grad)
            return (), torch.where(x < -7, 1.5 * dx, dx) if input_grad else None

    with pytest.raises(GradientMismatch, match=r"x\[0, 1\] is wrong"):
        check_vjp(Flat("cdf"), (), x)


# --- A layer may be undefined beside x


@pytest.mark.parametrize(
    ("name", "x"),
    [("acos", [0.999, -0.9999]), ("entropy", [0.99, 0.01]), ("log", [1e-300, 1e-3])],
)
def test_layers_that_refuse_what_lies_beside_x(name, x):
    for opaque in (False, True):
        check_vjp(Function(name, opaque), (), torch.tensor([x, x], dtype=torch.float64))
    check_vjp(Function(name), (), torch.tensor([x, x]))


def test_a_layer_that_refuses_one_example():
    @dataclass(frozen=True)
    class Centred(Plain):
        def fwd(self, params, x, *, key=None):
            if len(x) == 1:
                raise ValueError("expected two examples")
            return x - x.mean(0) if len(x) else x.clone(), ()

        def bwd(self, params, residuals, grad, *, input_grad=True):
            return (), (grad - grad.mean(0) if len(grad) else grad.clone()) if input_grad else None

    check_vjp(Centred(), (), draw((3, 4)))


# --- Kinks


@dataclass(frozen=True)
class RowMax(Plain):
    """The largest entry of each row. At ties, `share` says what each of them gets."""

    share: str

    def out_shape(self, shape):
        return tuple(shape[:-1])

    def fwd(self, params, x, *, key=None):
        return x.amax(-1), x

    def bwd(self, params, x, grad, *, input_grad=True):
        top = (x == x.amax(-1, keepdim=True)).to(x.dtype)
        if self.share == "equal":
            top = top / top.sum(-1, keepdim=True)
        if self.share == "first":
            top = top * (top.cumsum(-1) == 1)
        return (), grad[..., None] * top if input_grad else None


@pytest.mark.parametrize("x", [[[1.0, 1.0, 0.5], [0.2, 0.7, 0.7]], [[0.0] * 3] * 2])
def test_ties_are_shared_but_not_doubled(x):
    x = torch.tensor(x, dtype=torch.float64)
    for share in ("equal", "first"):
        check_vjp(RowMax(share), (), x)
    with pytest.raises(GradientMismatch, match="moves equal entries alike"):
        check_vjp(RowMax("all of it to each"), (), x)


@dataclass(frozen=True)
class Larger(fn.Layer):
    """max(a, x) with a learned a. Where both are equal, `share` says what each of them gets."""

    share: str
    opaque: bool = False

    def init(self, key, shape, *, dtype=None, device=None):
        return {"a": torch.zeros(shape, dtype=dtype, device=device)}

    def out_shape(self, shape):
        return tuple(shape)

    def fwd(self, params, x, *, key=None):
        a = params["a"].expand_as(x)
        y = torch.maximum(a.detach(), x.detach()) if self.opaque else torch.maximum(a, x)
        return y, x >= a if self.share == "x" else (x > a) + 0.5 * (x == a)

    def bwd(self, params, share, grad, *, input_grad=True):
        rest = 1.0 - share.to(grad)
        if self.share == "x to both":
            share, rest = share.ceil(), rest.ceil()
        if self.share == "to none":
            share, rest = share.floor(), rest.floor()
        return {"a": (grad * rest).sum(0)}, grad * share if input_grad else None


@pytest.mark.parametrize("opaque", [False, True], ids=["followed", "opaque"])
@pytest.mark.parametrize("a", [[0.0, 0.0, 0.0], [1.0, -2.0, 0.5]])
def test_ties_between_leaves_are_shared_but_not_doubled(a, opaque):
    params = {"a": torch.tensor(a)}
    x = torch.stack([params["a"], draw((3,), torch.float32), params["a"]])
    for share in ("equal", "x"):
        check_vjp(Larger(share, opaque), params, x)
    for share in ("x to both", "to none"):
        message = r"for params\['a'\] and x are wrong together along a direction that moves equal"
        with pytest.raises(GradientMismatch, match=message):
            check_vjp(Larger(share, opaque), params, x)


@pytest.mark.parametrize("opaque", [False, True], ids=["followed", "opaque"])
def test_kinks_of_two_leaves_that_meet_by_chance(opaque):
    """relu(u) − relu(−v) = u where u = v, and each slope may be 0 at 0, as PyTorch's is."""

    @dataclass(frozen=True)
    class Kinks(fn.Layer):
        at_kink: float

        def init(self, key, shape, *, dtype=None, device=None):
            return ()

        def out_shape(self, shape):
            return tuple(shape[0])

        def fwd(self, params, x, *, key=None):
            u, v = (leaf.detach() for leaf in x) if opaque else x
            return u.relu() - (-v).relu(), x

        def bwd(self, params, x, grad, *, input_grad=True):
            u, v = x
            du, dv = (u > 0) + self.at_kink * (u == 0), (v < 0) + self.at_kink * (v == 0)
            return (), (grad * du, grad * dv) if input_grad else None

    for at_kink in (0.0, 1.0):
        check_vjp(Kinks(at_kink), (), tuple(torch.tensor([[0.0, 1.0, -1.0]] * 2) for _ in range(2)))


@dataclass(frozen=True)
class Sort(Plain):
    """Each row, sorted. `place` moves the places that gradients come from."""

    place: int = 0

    def fwd(self, params, x, *, key=None):
        y, order = x.detach().sort(dim=-1, stable=True)
        return y, order

    def bwd(self, params, order, grad, *, input_grad=True):
        places = grad.roll(self.place, -1)
        return (), torch.empty_like(grad).scatter_(-1, order, places) if input_grad else None


@pytest.mark.parametrize("seed", range(6))
def test_of_three_equal_numbers_one_goes_to_the_middle(seed):
    x = fn.uniform(fn.key(seed), (3, 5), -3, 3, dtype=torch.float64).round()
    check_vjp(Sort(), (), x)
    with pytest.raises(GradientMismatch):
        check_vjp(Sort(1), (), x)


def test_nan_is_wrong_where_y_is_finite():
    @dataclass(frozen=True)
    class Norm(Plain):
        safe: bool

        def out_shape(self, shape):
            return tuple(shape[:-1])

        def fwd(self, params, x, *, key=None):
            return x.norm(dim=-1), x

        def bwd(self, params, x, grad, *, input_grad=True):
            size = x.norm(dim=-1, keepdim=True)
            unit = x / size
            unit = torch.where(size > 0, unit, 0.0) if self.safe else unit
            return (), grad[..., None] * unit if input_grad else None

    x = torch.tensor([[1.0, 2.0], [0.0, 0.0]], dtype=torch.float64)
    check_vjp(Norm(True), (), x)
    with pytest.raises(GradientMismatch, match=r"x\[1, 0\] is wrong"):
        check_vjp(Norm(False), (), x)


@dataclass(frozen=True)
class Log(Plain):
    """log x, whose gradient where x < 0 anybody may choose; `factor` is right if it is 1."""

    factor: float
    beyond: float

    def fwd(self, params, x, *, key=None):
        return x.log(), x

    def bwd(self, params, x, grad, *, input_grad=True):
        dx = self.factor * grad * torch.where(x > 0, 1 / x, self.beyond)
        return (), dx if input_grad else None


@pytest.mark.parametrize("beyond", [math.nan, math.inf, 0.0, 7.0])
@pytest.mark.parametrize("outside", [-1.0, math.nan, -math.inf])
def test_entries_of_y_that_are_not_finite_are_left_out(beyond, outside):
    x = torch.tensor([[outside, 2.0, 3.0]], dtype=torch.float64)
    check_vjp(Log(1.0, beyond), (), x)
    with pytest.raises(GradientMismatch, match=r"x\[0, [12]\] is wrong"):
        check_vjp(Log(5.0, beyond), (), x)


def test_kinks_beside_what_is_not_finite():
    @dataclass(frozen=True)
    class Both(Plain):
        slope: float

        def fwd(self, params, x, *, key=None):
            return torch.cat([1 / x[:, :1], x[:, 1:].abs()], 1), x

        def bwd(self, params, x, grad, *, input_grad=True):
            sign = torch.where(x[:, 1:] >= 0, self.slope, -self.slope)
            dx = grad * torch.cat([-(x[:, :1] ** -2), sign], 1)
            return (), dx if input_grad else None

    x = torch.tensor([[0.0, 0.0, 2.0]], dtype=torch.float64)
    check_vjp(Both(1.0), (), x)
    with pytest.raises(GradientMismatch, match=r"x\[0, 2\] is wrong"):
        check_vjp(Both(1.5), (), x)


def test_nan_is_wrong_where_a_step_shows_in_what_is_finite():
    @dataclass(frozen=True)
    class Sums(Plain):
        of_5: float

        def out_shape(self, shape):
            return (2,)

        def fwd(self, params, x, *, key=None):
            return torch.stack([x.sum(1), x.log().sum(1)], 1), x

        def bwd(self, params, x, grad, *, input_grad=True):
            dx = grad[:, :1] + torch.where(x > 0, grad[:, 1:] / x, 0.0)
            dx = torch.where(x == 5, self.of_5, 1.0) * dx
            return (), dx if input_grad else None

    x = torch.tensor([[-1.0, 5.0], [2.0, 3.0]], dtype=torch.float64)
    check_vjp(Sums(1.0), (), x)
    with pytest.raises(GradientMismatch, match=r"x\[0, 1\] is wrong"):
        check_vjp(Sums(math.nan), (), x)


# --- Keys


@dataclass(frozen=True)
class Mask(Plain):
    """Dropout with a fault."""

    fault: str = ""

    def mask(self, x, key):
        key = fn.key(7) if self.fault == "one mask for all keys" else key
        kept = fn.bernoulli(key, 0.5, tuple(x.shape), device=x.device)
        return kept.to(x.dtype) / 0.5

    def fwd(self, params, x, *, key=None):
        if key is None:
            return (x.clone() if self.fault != "wrong without a key" else x**2), None
        mask = self.mask(x, key)
        return x * mask, (key, mask)

    def bwd(self, params, residuals, grad, *, input_grad=True):
        if residuals is None or not input_grad:
            return (), grad.clone() if input_grad else None
        key, mask = residuals
        if self.fault == "drawn again in bwd":
            mask = self.mask(grad, fn.fold_in(key, 1))
        return (), grad * mask


@pytest.mark.parametrize("key", [None, fn.key(3)], ids=["no key", "key"])
def test_layers_that_draw_are_tried_with_and_without_a_key(key):
    x = draw((4, 6))
    check_vjp(Mask(), (), x, key=key)
    for fault in ("one mask for all keys", "drawn again in bwd", "wrong without a key"):
        with pytest.raises(GradientMismatch):
            check_vjp(Mask(fault), (), x, key=key)


@dataclass(frozen=True)
class Kept(Plain):
    """y = 2·x, of which the forward pass keeps something else with a key than without."""

    wrong: bool | None = None  # whether the gradient is wrong with a key, or without; None: never

    def fwd(self, params, x, *, key=None):
        return 2 * x, key is not None

    def bwd(self, params, trains, grad, *, input_grad=True):
        return (), (3 if trains == self.wrong else 2) * grad if input_grad else None


@pytest.mark.parametrize("key", [None, fn.key(3)], ids=["no key", "key"])
def test_a_gradient_that_depends_on_the_key_alone(key):
    x = draw((4, 6))
    check_vjp(Kept(), (), x, key=key)
    for wrong in (False, True):
        with pytest.raises(GradientMismatch, match="a factor of 1"):
            check_vjp(Kept(wrong), (), x, key=key)


@dataclass(frozen=True)
class Trained(Plain):
    """y = a∘x + b with a key, and x without: numbers drawn, or a function of x and the batch."""

    kind: str
    drawn_with: fn.Key | None = None

    def numbers(self, x, key):
        key = self.drawn_with or key
        shape = tuple(x.shape)
        if self.kind == "noise":
            return 1.0, fn.normal(key, shape, dtype=x.dtype)
        if self.kind == "scale":
            return fn.uniform(key, (len(x), 1), 0.5, 1.5, dtype=x.dtype), 0.0
        if self.kind == "seldom":
            return fn.bernoulli(key, 1 - 1e-6, shape).to(x) / (1 - 1e-6), 0.0
        if self.kind == "nothing":  # p = 0
            return fn.bernoulli(key, 1.0, shape).to(x), 0.0
        return {"all dropped": (0.0, 0.0), "training": (1.5, 0.25)}[self.kind]

    def fwd(self, params, x, *, key=None):
        scale, shift = (1.0, 0.0) if key is None else self.numbers(x, key)
        return x * scale + shift, scale

    def bwd(self, params, scale, grad, *, input_grad=True):
        return (), grad * scale if input_grad else None


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kind", ["noise", "scale"])
def test_numbers_that_do_not_depend_on_the_key(kind, batch):
    x = draw((batch, 3), torch.float32)
    check_vjp(Trained(kind), (), x)
    for key in (None, fn.key(3)):
        with pytest.raises(GradientMismatch, match="8 different keys tell equal examples apart"):
            check_vjp(Trained(kind, drawn_with=fn.key(9)), (), x, key=key)
        net = fn.Sequential(fn.Tanh(), Trained(kind, drawn_with=fn.key(9)))
        with pytest.raises(GradientMismatch, match="8 different keys tell equal examples apart"):
            check_vjp(net, ((), ()), x, key=key)


@pytest.mark.parametrize("kind", ["seldom", "nothing", "all dropped", "training"])
def test_keys_that_all_give_the_same_y(kind):
    """A key may stand for training alone, and what is seldom drawn shows in none of a few."""
    for x in (draw((4, 3)), draw((2, 3, 2), torch.float32)):
        check_vjp(Trained(kind), (), x)


def test_keys_that_stand_for_training_in_a_layer_that_couples_examples():
    @dataclass(frozen=True)
    class Centred(Plain):
        couples_examples = True

        def fwd(self, params, x, *, key=None):
            return (x.clone() if key is None or not len(x) else x - x.mean(0)), key

        def bwd(self, params, key, grad, *, input_grad=True):
            plain = key is None or not len(grad)
            return (), (grad.clone() if plain else grad - grad.mean(0)) if input_grad else None

    check_vjp(Centred(), (), draw((4, 3)))


@dataclass(frozen=True)
class DropPath(Plain):
    """Drop whole examples."""

    again: bool

    def mask(self, key, x):
        return 1.0 if key is None else 2 * fn.bernoulli(key, 0.5, (len(x), 1)).to(x.dtype)

    def fwd(self, params, x, *, key=None):
        return x * self.mask(key, x), key

    def bwd(self, params, key, grad, *, input_grad=True):
        key = None if key is None else fn.fold_in(key, 9) if self.again else key
        return (), grad * self.mask(key, grad) if input_grad else None


@pytest.mark.parametrize("seed", range(8))
def test_a_mask_of_few_entries_that_is_drawn_again_in_bwd(seed):
    x = draw((2, 3), key=seed)
    check_vjp(DropPath(False), (), x, key=fn.key(seed))
    with pytest.raises(GradientMismatch):
        check_vjp(DropPath(True), (), x, key=fn.key(seed))


# --- Precision


@pytest.mark.parametrize(
    ("dtype", "factor"),
    [(torch.float32, 1 + 1e-5), (torch.bfloat16, 1.05), (torch.float16, 1.01)],
)
def test_the_resolution_of_each_dtype(dtype, factor):
    @dataclass(frozen=True)
    class Off(Dense):
        def bwd(self, params, residuals, grad, *, input_grad=True):
            dparams, dx = super().bwd(params, residuals, grad)
            return dparams, (dx * (factor if dx.dtype == dtype else 1)) if input_grad else None

    params = optree.tree_map(lambda leaf: leaf / 4, Off().init(fn.key(0), (6,), dtype=dtype))
    check_vjp(Dense(), params, draw((3, 6), dtype))
    with pytest.raises(GradientMismatch, match="in torch"):
        check_vjp(Off(), params, draw((3, 6), dtype))


@pytest.mark.parametrize(
    ("of_weights", "of_x"), [(1.0, 1.0), (0.01, 1.0), (1.0, 60.0), (60.0, 0.01)]
)
def test_float16_is_checked_where_products_of_three_numbers_overflow(of_weights, of_x):
    @dataclass(frozen=True)
    class Off(Dense):
        def bwd(self, params, residuals, grad, *, input_grad=True):
            dparams, dx = super().bwd(params, residuals, grad)
            return dparams, (dx * (2 if dx.dtype == torch.float16 else 1)) if input_grad else None

    params = Off().init(fn.key(0), (6,), dtype=torch.float16)
    params = optree.tree_map(lambda leaf: leaf * of_weights, params)
    x = of_x * draw((3, 6), torch.float16)
    check_vjp(Dense(), params, x)
    with pytest.raises(GradientMismatch, match=r"in torch\.float16"):
        check_vjp(Off(), params, x)


@pytest.mark.parametrize("factor", [1.0, 1.1])
def test_float16_is_checked_where_y_is_large(factor):
    class Squares(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square().sum(-1)

        @staticmethod
        def backward(ctx, grad):
            (x,) = ctx.saved_tensors
            return 2 * (factor if x.dtype == torch.float16 else 1) * x * grad[:, None]

    x = draw((8, 60), torch.float16)
    if factor == 1:
        check_function(Squares, x)
        return
    with pytest.raises(GradientMismatch, match=r"in torch\.float16"):
        check_function(Squares, x)


@pytest.mark.parametrize("scale", [1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_a_layer_whose_epsilon_is_that_of_the_dtype(scale):
    layer = fn.RMSNorm()
    check_vjp(layer, layer.init(fn.key(0), (5,)), scale * draw((3, 5), torch.float32))


def test_a_gradient_that_is_wrong_in_the_dtype_whose_epsilon_a_layer_takes():
    @dataclass(frozen=True)
    class Off(Function):
        def bwd(self, params, x, grad, *, input_grad=True):
            _, dx = super().bwd(params, x, grad, input_grad=input_grad)
            return (), dx if dx is None else dx * (1.001 if x.dtype == torch.float32 else 1)

    for scale in (1e-3, 1e-5):
        x = scale * torch.linspace(0.1, 1, 5)
        check_vjp(Function("sign"), (), x)
        with pytest.raises(GradientMismatch, match=r"in torch\.float32"):
            check_vjp(Off("sign"), (), x)


@dataclass(frozen=True)
class Few(Plain):
    """tanh(x), or 1.7·x, whose gradient in half precision is off by a factor."""

    name: str
    factor: float = 1.0

    def fwd(self, params, x, *, key=None):
        y = torch.tanh(x) if self.name == "tanh" else 1.7 * x
        return y, y

    def bwd(self, params, y, grad, *, input_grad=True):
        dx = grad * (1 - y * y) if self.name == "tanh" else 1.7 * grad
        return (), dx * (self.factor if grad.dtype == torch.bfloat16 else 1) if input_grad else None


@pytest.mark.parametrize("name", ["tanh", "linear"])
@pytest.mark.parametrize("entries", [1, 2, 4])
def test_a_gradient_of_few_entries_that_is_off_by_5_percent_in_bfloat16(entries, name):
    for seed in range(4):
        x = draw((1, entries), torch.bfloat16, key=seed)
        for scale in (1, 3):  # where tanh saturates, y is rounded to the same few numbers
            check_vjp(Few(name), (), scale * x)
        with pytest.raises(GradientMismatch, match=r"is (on average )?about"):
            check_vjp(Few(name, 1.05), (), x)


@pytest.mark.parametrize("scale", [1e-2, 3e-3, 2e-3, 1e-3, 3e-4])
def test_an_epsilon_of_the_dtypes_own_that_shows_in_few_entries(scale):
    layer = fn.RMSNorm(elementwise_affine=False)
    for seed in range(3):
        check_vjp(layer, (), scale * draw((1, 3), torch.bfloat16, key=seed))


@pytest.mark.parametrize("layer", [fn.RMSNorm, fn.LayerNorm])
@pytest.mark.parametrize("eps", [1e-8, 1e-6, 1e-5])
def test_a_factor_on_what_is_normalised_in_bfloat16(layer, eps):
    """The gradient grows to 0 as 1/|x|, as far as eps lets it, and no term cancels in it."""

    @dataclass(frozen=True)
    class Off(layer):
        factor: float = 1.0

        def _bwd(self, params, residuals, dy, need):
            dparams, dx = super()._bwd(params, residuals, dy, need)
            return dparams, dx * self.factor if dy.dtype == torch.bfloat16 else dx

    for seed in range(4):
        x = draw((3, 6), torch.bfloat16, key=seed)
        check_vjp(Off(eps=eps, elementwise_affine=False), (), x)
        with pytest.raises(GradientMismatch, match="about 1\\.1"):
            check_vjp(Off(eps=eps, elementwise_affine=False, factor=1.15), (), x)


ZEROS = {
    "all": torch.zeros(2, 4),
    "one example": torch.zeros(1, 3),
    "beside others": torch.cat([torch.zeros(1, 4), draw((1, 4))]),
    "some": torch.tensor([[0.0, 0.0, 1.0, 0.0]]),
    "image": torch.zeros(2, 3, 2),
}


@pytest.mark.parametrize("affine", [True, False], ids=["affine", "not affine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("zeros", ZEROS)
def test_an_epsilon_of_the_dtypes_own_at_zero(zeros, dtype, affine):
    """y is 0 in every dtype, and the gradient is 1/√ε."""
    layer, x = fn.RMSNorm(elementwise_affine=affine), ZEROS[zeros].to(dtype)
    check_vjp(layer, layer.init(fn.key(0), x.shape[1:], dtype=dtype), x)


@pytest.mark.parametrize("zeros", ["all", "one example", "beside others"])
def test_a_wrong_gradient_at_zero_beside_an_epsilon_of_the_dtypes_own(zeros):
    @dataclass(frozen=True)
    class Wrong(fn.RMSNorm):
        factor: float = 1.0

        def _bwd(self, params, residuals, dy, need):
            dparams, dx = super()._bwd(params, residuals, dy, need)
            return dparams, dx * self.factor if dy.dtype == torch.float32 else dx

    x = ZEROS[zeros].float()
    check_vjp(Wrong(elementwise_affine=False), (), x)
    with pytest.raises(GradientMismatch, match="derivative of apply is about"):
        check_vjp(Wrong(elementwise_affine=False, factor=1.5), (), x)


def test_a_gradient_that_is_wrong_in_one_dtype_at_zero_alone():
    @dataclass(frozen=True)
    class Wrong(Plain):
        def fwd(self, params, x, *, key=None):
            return x.sin(), x

        def bwd(self, params, x, grad, *, input_grad=True):
            factor = 1 + (x == 0) * (x.dtype == torch.float32)
            return (), grad * x.cos() * factor if input_grad else None

    with pytest.raises(GradientMismatch, match=r"in torch\.float32, the gradient for x is further"):
        check_vjp(Wrong(), (), torch.zeros(2, 3))


@dataclass(frozen=True)
class LearnedNoise(fn.Layer):
    """y = x + std ∘ noise with a key, drawn in the dtype of x: float32's is not float64's."""

    def _params(self, shape):
        return {"std": fn.Param(shape, fn.initializers.Constant(0.01))}

    def _fwd(self, params, x, key):
        if key is None:
            return x.clone(), torch.zeros_like(x)
        noise = fn.normal(key, x.shape, dtype=x.dtype)
        return x + params["std"] * noise, noise

    def _bwd(self, params, noise, dy, need):
        return {"std": (dy * noise).sum(0)}, dy.clone()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_noise_that_a_large_x_hides(dtype):
    """y is as in float64, up to rounding, and the gradient for std is not."""
    for batch in (1, 3):
        x = draw((batch, 3), dtype) * (1e6 if dtype == torch.float32 else 10)
        params = LearnedNoise().init(fn.key(0), (3,), dtype=dtype)
        check_vjp(LearnedNoise(), params, x, key=fn.key(3))


@pytest.mark.parametrize("seed", range(3))
def test_equal_terms_all_round_to_one_side(seed):
    layer = fn.UpsampleConv2d(2)
    params = layer.init(fn.key(seed + 3), (4, 6, 6))
    check_vjp(layer, params, torch.full((2, 4, 6, 6), 100.1))


def test_a_gradient_that_is_wrong_in_the_dtype_in_which_the_layer_draws():
    @dataclass(frozen=True)
    class Noisy(Plain):
        factor: float

        def fwd(self, params, x, *, key=None):
            scale = 1 if key is None else fn.normal(key, tuple(x.shape), dtype=x.dtype)
            return x * scale, scale

        def bwd(self, params, scale, grad, *, input_grad=True):
            off = self.factor if grad.dtype == torch.float32 else 1
            return (), off * grad * scale if input_grad else None

    x = draw((3, 4), torch.float32)
    check_vjp(Noisy(1.0), (), x, key=fn.key(1))
    with pytest.raises(GradientMismatch):
        check_vjp(Noisy(1.5), (), x, key=fn.key(1))


@dataclass(frozen=True)
class OwnEps(Plain):
    """y = c / √(mean(c²) + ε) with the ε of x's dtype; c is x, or x less its mean."""

    centred: bool
    factor: float = 1.0  # in half precision alone

    def _scaled(self, x):
        c = x - x.mean(-1, keepdim=True) if self.centred else x
        scale = torch.rsqrt(c.square().mean(-1, keepdim=True) + torch.finfo(x.dtype).eps)
        return c * scale, scale

    def fwd(self, params, x, *, key=None):
        return self._scaled(x)[0], x

    def bwd(self, params, x, grad, *, input_grad=True):
        y, scale = self._scaled(x)
        dx = grad - y * (grad * y).mean(-1, keepdim=True)
        dx = dx - grad.mean(-1, keepdim=True) if self.centred else dx
        off = 1 if x.dtype == torch.float64 else self.factor
        return (), off * scale * dx if input_grad else None


@pytest.mark.parametrize(
    ("centred", "size", "key", "dtype"),
    [
        (False, 0.03, 1, torch.float16),
        (True, 0.1, 11, torch.float16),
        (True, 0.3, 0, torch.float16),
        (False, 0.1, 1, torch.bfloat16),
    ],
)
def test_an_entry_that_stays_where_it_is_by_chance(centred, size, key, dtype):
    """Beside x, an entry of what depends smoothly on the dtype may be rounded to the same."""
    x = size * draw((3, 4), torch.float32, key).to(dtype)
    check_vjp(OwnEps(centred), (), x)
    with pytest.raises(GradientMismatch):
        check_vjp(OwnEps(centred, factor=-3.0), (), x)


@pytest.mark.parametrize("nothing", ["grad", "x", "y"])
def test_a_check_that_could_check_nothing_is_refused(nothing):
    x = draw((2, 3))
    grad = torch.zeros_like(x) if nothing == "grad" else None
    x = {"grad": x, "x": x * math.nan, "y": torch.zeros_like(x)}[nothing]
    with pytest.raises(ValueError, match="expected a gradient that can be checked"):
        check_vjp(Function("reciprocal"), (), x, grad=grad)


def chaotic(x):
    y = torch.sigmoid(x)
    for _ in range(200):
        y = 3.99 * y * (1 - y)
    return y


NOISES = {
    "oscillation": lambda x: x + torch.sin(1e20 * x),
    "fine oscillation": lambda x: x + torch.sin(1e9 * x),
    "hash": lambda x: ((1e17 * x).to(torch.int64) * -7046029254386353131).to(x) / 2.0**63,
    "chaos": chaotic,
}


@dataclass(frozen=True)
class Noisy(Plain):
    """Noise, which autograd follows if it is not opaque, and a gradient of any size."""

    kind: str
    slope: float
    opaque: bool = True

    def fwd(self, params, x, *, key=None):
        with torch.set_grad_enabled(not self.opaque and torch.is_grad_enabled()):
            return NOISES[self.kind](x), x

    def bwd(self, params, x, grad, *, input_grad=True):
        return (), self.slope * grad if input_grad else None


@pytest.mark.parametrize("slope", [0.0, 1.0, 1.5])
@pytest.mark.parametrize("shape", [(3, 4), (1, 1)])
@pytest.mark.parametrize("kind", NOISES)
def test_noise_that_autograd_cannot_follow_is_refused(kind, shape, slope):
    """No step tells one slope from another."""
    with pytest.raises(ValueError, match="no two steps of a numeric derivative agree"):
        check_vjp(Noisy(kind, slope), (), draw(shape))


def test_autograd_decides_about_noise():
    with pytest.raises(GradientMismatch):
        check_vjp(Noisy("fine oscillation", 1.0, opaque=False), (), draw((3, 4)))


@dataclass(frozen=True)
class Opaque(Plain):
    """y = f(x) entry by entry, which autograd cannot follow, with a gradient of one slope."""

    kind: str
    slope: float

    def fwd(self, params, x, *, key=None):
        with torch.no_grad():
            return STAIRCASES[self.kind](x), x

    def bwd(self, params, x, grad, *, input_grad=True):
        return (), self.slope * grad if input_grad else None


STAIRCASES = {
    "round": torch.round,
    "sign": torch.sign,
    "zero": torch.zeros_like,
    "fine": lambda x: torch.round(1e8 * x) / 1e8,
    "and noise": lambda x: x + 1e-3 * torch.sin(1e20 * x),
}


@pytest.mark.parametrize("shape", [(3, 4), (1, 1)])
@pytest.mark.parametrize("kind", STAIRCASES)
def test_what_some_step_resolves_is_checked(kind, shape):
    slope = 0.0 if kind in ("round", "sign", "zero") else 1.0
    check_vjp(Opaque(kind, slope), (), draw(shape))
    with pytest.raises(GradientMismatch):
        check_vjp(Opaque(kind, 30.0), (), draw(shape))


@dataclass(frozen=True)
class Clamp(Plain):
    """y = max(x, 0), whose slope at 0 is 1 to autograd."""

    at_zero: float = 0.0
    factor: float = 1.0

    def fwd(self, params, x, *, key=None):
        return x.clamp(min=0), x

    def bwd(self, params, x, grad, *, input_grad=True):
        slope = self.factor * (x > 0) + self.at_zero * (x == 0)
        return (), slope.to(grad) * grad if input_grad else None


@pytest.mark.parametrize(
    ("sizes", "key"), [((1, 2, 1), 0), ((2, 16, 1), 1), ((2, 4, 3), 0), ((8, 16, 1), 0)]
)
def test_kinks_inside_a_network(sizes, key):
    """Slopes of its layers, each between the one-sided ones, need not be between the network's."""
    x = torch.zeros(2, sizes[0], dtype=torch.float64)

    def check(clamp):
        net = fn.Sequential(fn.Linear(sizes[1], bias=False), clamp, fn.Linear(sizes[2]))
        check_vjp(net, net.init(fn.key(key), sizes[:1], dtype=torch.float64), x)

    check(Clamp())
    check(Clamp(at_zero=0.5))
    check(Clamp(at_zero=1.0))
    for wrong in (Clamp(at_zero=2.0), Clamp(at_zero=-1.0), Clamp(factor=1.1)):
        with pytest.raises(GradientMismatch):
            check(wrong)


# --- Any tree


@dataclass(frozen=True)
class Masked(Plain):
    """y = w · x where a mask is set; the mask and a count are params that are not learned."""

    grad_of_mask: Any = None

    def init(self, key, shape, *, dtype=None, device=None):
        return {
            "mask": torch.arange(shape[0], device=device) % 2 == 0,
            "times": torch.tensor(2, device=device),
            "w": fn.normal(key, tuple(shape), dtype=dtype, device=device),
        }

    def fwd(self, params, x, *, key=None):
        scale = params["w"] * params["mask"] * params["times"]
        return scale * x, (scale, x)

    def bwd(self, params, residuals, grad, *, input_grad=True):
        scale, x = residuals
        dw = (grad * x).sum(0) * params["mask"] * params["times"]
        dparams = {"mask": self.grad_of_mask, "times": None, "w": dw}
        return dparams, grad * scale if input_grad else None


def test_integers_and_bools_among_params():
    params = Masked().init(fn.key(0), (4,), dtype=torch.float64)
    for right in (None, torch.zeros(4), torch.zeros(4, dtype=torch.bool)):
        check_vjp(Masked(right), params, draw((3, 4)))
    for wrong in (torch.ones(4), torch.zeros(3, 4)):
        with pytest.raises(GradientMismatch, match=r"to be None, as torch.bool has no gradient"):
            check_vjp(Masked(wrong), params, draw((3, 4)))


@dataclass(frozen=True)
class Attend(fn.Layer):
    """softmax(q·kᵀ)·v of x = (q, k, v)."""

    factor: float = 1.0

    def init(self, key, shape, *, dtype=None, device=None):
        return ()

    def out_shape(self, shape):
        return shape[0]

    def fwd(self, params, x, *, key=None):
        q, k, v = x
        p = torch.softmax(q @ k.mT, -1)
        return p @ v, (q, k, v, p)

    def bwd(self, params, residuals, grad, *, input_grad=True):
        if not input_grad:
            return (), None
        q, k, v, p = residuals
        dp = grad @ v.mT
        ds = p * (dp - (dp * p).sum(-1, keepdim=True))
        return (), (ds @ k, self.factor * ds.mT @ q, p.mT @ grad)

    def vjp(self, params, x, grad, *, key=None, input_grad=True):
        return self.bwd(params, self.fwd(params, x)[1], grad, input_grad=input_grad)


def test_leaves_of_x_that_are_as_long_need_not_be_a_batch():
    @dataclass(frozen=True)
    class SegmentMean(Plain):
        """The mean of x's rows in each of 3 segments, as of a graph's nodes."""

        def out_shape(self, shape):
            raise ValueError("expected a graph")

        def fwd(self, params, x, *, key=None):
            segment, values = x
            share = 1 / segment.bincount(minlength=3).to(values)[segment][:, None]
            return values.new_zeros(3, 2).index_add(0, segment, share * values), (segment, share)

        def bwd(self, params, residuals, grad, *, input_grad=True):
            segment, share = residuals
            return (), (None, share * grad[segment]) if input_grad else None

    check_vjp(SegmentMean(), (), (torch.tensor([0, 1, 0, 2, 1]), draw((5, 2))))


def test_x_may_be_a_tuple():
    x = tuple(draw((2, 3, 4), key=i) for i in range(3))
    check_vjp(Attend(), (), x)
    with pytest.raises(GradientMismatch, match=r"x\[1\]\["):
        check_vjp(Attend(1.01), (), x)


@dataclass(frozen=True)
class Gather(fn.Layer):
    """Rows of a table by integer x."""

    factor: float = 1.0

    def init(self, key, shape, *, dtype=None, device=None):
        return {"table": fn.normal(key, (5, 2), dtype=dtype, device=device)}

    def out_shape(self, shape):
        return (*shape, 2)

    def fwd(self, params, x, *, key=None):
        return params["table"][x], x

    def bwd(self, params, x, grad, *, input_grad=True):
        table = torch.zeros_like(params["table"])
        rows = self.factor * grad.reshape(-1, 2)
        return {"table": table.index_add(0, x.reshape(-1), rows)}, None


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_x_of_integers(dtype):
    params = Gather().init(fn.key(0), (3,), dtype=torch.float64)
    x = torch.tensor([[0, 1, 1], [4, 2, 1]], dtype=dtype)
    check_vjp(Gather(), params, x)
    with pytest.raises(GradientMismatch, match="table"):
        check_vjp(Gather(1.01), params, x)
    embedding = fn.Embedding(5, 2)
    check_vjp(embedding, embedding.init(fn.key(0), (3,)), x.long())


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_a_loss_whose_target_is_a_tree(dtype):
    @dataclass(frozen=True)
    class Weighted(fn.Loss):
        factor: float = 1.0

        def fwd(self, x, target):
            picked = x.gather(1, target["classes"][:, None].long())[:, 0]
            return (picked * target["weights"][0]).sum(), (x, target)

        def bwd(self, residuals, grad=1.0):
            x, target = residuals
            rows = torch.arange(len(x))
            dx = torch.zeros_like(x)
            dx[rows, target["classes"].long()] = self.factor * grad * target["weights"][0]
            return dx

    target = {"classes": torch.tensor([0, 2, 1], dtype=dtype), "weights": (draw((3,)), "log")}
    check_vjp(Weighted(), draw((3, 4)), target)
    with pytest.raises(GradientMismatch, match=r"a factor of 1\.5"):
        check_vjp(Weighted(1.5), draw((3, 4)), target)


@pytest.mark.parametrize("wrong", [torch.int32, torch.int64])
@pytest.mark.parametrize("given", [torch.int32, torch.int64])
def test_a_loss_that_is_wrong_for_one_dtype_of_classes(wrong, given):
    @dataclass(frozen=True)
    class Picked(fn.Loss):
        of_y: float = 1.0
        of_dx: float = 1.0

        def fwd(self, x, target):
            y = x.gather(1, target[:, None].long()).sum()
            return (self.of_y * y if target.dtype == wrong else y), (x, target)

        def bwd(self, residuals, grad=1.0):
            x, target = residuals
            dx = torch.zeros_like(x)
            dx[torch.arange(len(x)), target.long()] = grad
            return self.of_dx * dx if target.dtype == wrong else dx

    target = torch.tensor([0, 2, 1], dtype=given)
    check_vjp(Picked(), draw((3, 4)), target)
    for factors in ((1.0, 1.5), (1.5, 1.5), (1.5, 1.0)):
        with pytest.raises(GradientMismatch):
            check_vjp(Picked(*factors), draw((3, 4)), target)


@pytest.mark.parametrize("fault", ["none", "factor", "shape"])
def test_a_loss_that_is_wrong_for_one_example(fault):
    class Margin(fn.Loss):
        def fwd(self, x, target):
            picked = x[torch.arange(len(x)), target.long()]
            return picked.exp().sum(), (x, target.long())

        def bwd(self, residuals, grad=1.0):
            x, target = residuals
            dx = torch.zeros_like(x)
            dx[torch.arange(len(x)), target] = grad * x[torch.arange(len(x)), target].exp()
            if fault == "factor" and len(x) == 1:
                return dx * 1.01
            return dx.squeeze() if fault == "shape" else dx

    case = Margin(), draw((3, 4)), torch.tensor([0, 2, 1])
    if fault == "none":
        check_vjp(*case)
    else:
        wrong = {"factor": "the gradient for x.* is wrong", "shape": r"dx of shape \(1, 4\)"}
        with pytest.raises(GradientMismatch, match=wrong[fault]):
            check_vjp(*case)


def test_a_target_is_left_alone_that_no_other_dtype_can_hold():
    class Scaled(fn.Loss):
        def fwd(self, x, target):
            return (x * target).sum(), (x, target)

        def bwd(self, residuals, grad=1.0):
            x, target = residuals
            return (grad * target).to(x.dtype)

    check_vjp(Scaled(), draw((3,)), torch.tensor([2**40, 1, -(2**40)]))


def test_complex_numbers_are_refused():
    with pytest.raises(TypeError, match=r"params of real numbers, got torch.complex64"):
        check_vjp(Dense(), {"w": torch.ones(2, dtype=torch.complex64)}, draw((2, 2)))


def test_sparse_tensors_are_refused():
    x, params = draw((3, 3)), {"w": draw((2, 3)), "b": draw((2,))}
    sparse, message = x.to_sparse(), r"of dense tensors, got torch\.sparse_coo"
    with pytest.raises(TypeError, match="check_vjp: expected x " + message):
        check_vjp(Dense(), params, sparse)
    with pytest.raises(TypeError, match="check_vjp: expected params " + message):
        check_vjp(Dense(), {**params, "w": params["w"].to_sparse()}, x)
    with pytest.raises(TypeError, match="check_vjp: expected gradients " + message):
        check_vjp(Dense(), params, x, grad=draw((3, 2)).to_sparse())
    with pytest.raises(TypeError, match="check_vjp: expected inputs " + message):
        check_vjp(fn.MSE(), sparse, x)
    with pytest.raises(TypeError, match="check_vjp: expected targets " + message):
        check_vjp(fn.MSE(), x, sparse)


# --- The contract


@dataclass(frozen=True)
class Faulty(Dense):
    """A Dense that breaks its contract in a way that only one call shows."""

    fault: str = ""

    def init(self, key, shape, *, dtype=None, device=None):
        if self.fault == "init ignores dtype":
            dtype = torch.float32
        if self.fault == "init of another shape":
            shape = (shape[0] + 1,)
        params = super().init(key, shape, dtype=dtype, device=device)
        if self.fault == "init ignores device":
            params = {k: torch.zeros(v.shape, dtype=v.dtype) for k, v in params.items()}
        return params

    def out_shape(self, shape):
        sizes = {"out_shape is a list": [self.size], "out_shape is an int": self.size}
        return sizes.get(self.fault, (self.size,))

    def apply(self, params, x, *, key=None):
        if self.fault == "apply reads a number":
            return super().apply(params, x) + 0 * float(x.detach().flatten()[:1].sum().item())
        y = super().apply(params, x)
        return (y, y) if self.fault == "y is a tuple" else y

    def fwd(self, params, x, *, key=None):
        if self.fault == "empty batch with a key" and key is not None and not len(x):
            raise IndexError("no examples")
        y, residuals = super().fwd(params, x)
        if self.fault == "state by params":
            STATE[id(params["weight"])] = residuals
        if self.fault == "state by x":
            self.__dict__[f"kept {x.sum()}"] = residuals
            residuals = x
        return y, residuals

    def bwd(self, params, residuals, grad, *, input_grad=True):
        if self.fault == "state by params":
            residuals = STATE[id(params["weight"])]
        if self.fault == "state by x":
            residuals = self.__dict__[f"kept {residuals.sum()}"]
        dparams, dx = super().bwd(params, residuals, grad)
        if self.fault == "squeezed":
            dx = dx.squeeze()
        return dparams, dx if input_grad else None


STATE: dict[int, Any] = {}
FAULTS = {
    "init ignores dtype": "in the dtype asked for, torch.float64, got torch.float32",
    "init of another shape": r"init: expected params\['weight'\] of shape \(4, 6\), got \(4, 7\)",
    "init ignores device": "on the device asked for, meta",
    "out_shape is a list": r"out_shape: expected a tuple of ints, got \[4\]",
    "out_shape is an int": "out_shape: expected a tuple of ints, got 4",
    "apply reads a number": "apply does not work under torch.func.vmap",
    "y is a tuple": r"^Faulty\(.*\): apply: expected y to be a tensor, got a tuple of 2",
    "empty batch with a key": "a batch of 0 should work",
    "state by params": "state is kept between fwd and bwd",
    "state by x": "on a copy that has run no fwd, it raises KeyError",
    "squeezed": r"batch of 1: expected the gradient for x of shape \(1, 6\), got \(6,\)",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_that_only_one_call_shows(fault):
    layer = Faulty(fault=fault)
    params = Dense().init(fn.key(0), (6,), dtype=torch.float64)
    key = fn.key(1) if "key" in fault else None
    with pytest.raises(GradientMismatch, match=FAULTS[fault]):
        check_vjp(layer, params, draw((3, 6)), key=key)


@dataclass(frozen=True)
class Odd(Dense):
    """A Dense, one of whose methods returns what `spoil` makes of its result.

    `spoil` gets the result, params, the last tensor that the method takes, and whether x's gradient
    is asked for.
    """

    method: str = ""
    spoil: Callable[..., Any] | None = None

    def spoilt(self, method, *given):
        return self.spoil(*given) if method == self.method else given[0]

    def apply(self, params, x, *, key=None):
        return self.spoilt("apply", super().fwd(params, x)[0], params, x, False)

    def bwd(self, params, residuals, grad, *, input_grad=True):
        dparams, dx = super().bwd(params, residuals, grad, input_grad=input_grad)
        return self.spoilt("bwd", (dparams, dx), params, grad, input_grad)

    def vjp(self, params, x, grad, *, key=None, input_grad=True):
        found = self.bwd(params, self.fwd(params, x)[1], grad, input_grad=input_grad)
        return self.spoilt("vjp", found, params, grad, input_grad)


def of_bias(found, change=lambda leaf: 2 * leaf):
    dparams, dx = found
    return {**dparams, "bias": change(dparams["bias"])}, dx


def of_x(found, change):
    dparams, dx = found
    return dparams, None if dx is None else change(dx)


COUNT = itertools.count()
ODD = [
    # Every call is looked at in several ways.
    ("apply", lambda y, *_: y[None], r"apply: expected y of shape \(3, 4\), got \(1, 3, 4\)"),
    ("apply", lambda y, *_: y.float(), "apply: expected y to be torch.float64 on cpu, got"),
    ("apply", lambda y, *_: y + 0 * torch.rand(()), "apply: draws from the global random state"),
    ("apply", lambda y, *_: y * (1 + 1e-15 * next(COUNT)), "apply: called twice, gives two"),
    ("apply", lambda y, params, *_: y + 0 * params["bias"].mul_(1.0), "apply: writes to params"),
    ("apply", lambda y, params, *_: params["bias"].expand(y.shape), "y of apply shares memory"),
    ("bwd", lambda g, *_: of_bias(g, lambda b: b * (1 + 1e-15 * next(COUNT))), "bwd: called twice"),
    ("vjp", lambda g, *_: of_bias(g, lambda b: b + 0 * torch.rand(())), "vjp: draws from the"),
    # Where x's gradient is not asked for.
    ("bwd", lambda g, p, dy, need: g if need else of_bias(g), "bwd: input_grad=False changes"),
    ("vjp", lambda g, p, dy, need: g if need else of_bias(g), "vjp: input_grad=False changes"),
    # In a batch of 0 or 1.
    ("apply", lambda y, p, x, _: y if len(x) else y[:, :1], "apply: expected y of a batch of 0"),
    ("vjp", lambda g, p, dy, _: of_x(g, lambda dx: dx if len(dx) else dx[:, :1]), "a batch of 0"),
    ("bwd", lambda g, p, dy, _: of_bias(g) if len(dy) == 1 else g, "not the sum of its examples'"),
    ("bwd", lambda g, p, dy, _: of_x(g, lambda dx: dx * len(dy) / 3), "not each example's"),
    # In other memory layouts, and under vmap.
    ("bwd", lambda g, p, dy, _: of_x(g, lambda dx: dx if dy.is_contiguous() else dy), "with grad"),
    (
        "vjp",
        lambda g, p, *_: of_bias(g, lambda b: b if p["bias"].stride(0) == 1 else p["bias"]),
        "the gradient for params\\['bias'\\] shares memory with params",
    ),
    ("apply", lambda y, p, *_: y * p["bias"].stride(0), "params that are not contiguous change y"),
    (
        "vjp",
        lambda g, p, *_: g if p["bias"].stride(0) == 1 else of_bias(g),
        "not contiguous change",
    ),
    ("apply", lambda y, p, x, _: 2 * y if "Batched" in repr(x) else y, "vmap changes y"),
    ("apply", lambda y, p, x, _: y[None] if "Batched" in repr(x) else y, "vmap: expected y of sh"),
    # For a grad with some zeros, and very large and small ones.
    ("bwd", lambda g, p, dy, _: of_bias(g) if 0 < dy.count_nonzero() < 12 else g, "some of its"),
    (
        "bwd",
        lambda g, *_: of_bias(g, lambda b: b.clamp(-1e6, 1e6)),
        "'bias'] is not linear in grad",
    ),
    (
        "bwd",  # in a way that shows for 2^10, and that rounding excuses for 2^40
        lambda g, p, dy, _: of_bias(g, lambda b: b * (1 + 1e-5 * (dy.abs().max() > 100))),
        "'bias'] is not linear in grad",
    ),
    ("bwd", lambda g, *_: of_bias(g, lambda b: F.hardshrink(b, 1e-9)), "is not linear in grad"),
]


@pytest.mark.parametrize(("method", "spoil", "message"), ODD)
def test_what_only_one_check_of_one_method_shows(method, spoil, message):
    params = Dense().init(fn.key(0), (6,), dtype=torch.float64)
    with pytest.raises(GradientMismatch, match=message):
        check_vjp(Odd(method=method, spoil=spoil), params, draw((3, 6)))


@pytest.mark.parametrize("stale", [True, False])
def test_what_is_kept_of_a_tensor_that_is_written_over(stale):
    """`step_` writes into params: the tensor is the same, its numbers are not."""
    kept: dict[Any, Any] = {}

    @dataclass(frozen=True)
    class Normalised(Dense):
        def fwd(self, params, x, *, key=None):
            weight = params["weight"]
            name = id(weight) if stale else (id(weight), weight._version)
            if name not in kept:  # the tensor too, so that no other one has its id
                kept[name] = (weight, weight.clone())
            return super().fwd({**params, "weight": kept[name][1]}, x)

    layer, x = Normalised(), draw((3, 6))
    params = layer.init(fn.key(0), (6,), dtype=torch.float64)
    if not stale:
        check_vjp(layer, params, x)
        return
    with pytest.raises(GradientMismatch, match="numbers that are written into params or x do not"):
        check_vjp(layer, params, x)


SCALES = {
    "one": lambda grad: grad.abs().amax(),
    "one an example": lambda grad: grad.abs().amax(1, keepdim=True),
    "guarded": lambda grad: grad.abs().amax(1, keepdim=True) if grad.any() else 1.0,
    "none": lambda grad: 1.0,
}


@pytest.mark.parametrize("scale", SCALES)
def test_a_gradient_that_is_undefined_where_grad_is_0(scale):
    """ReLU hands on a grad of zeros for a whole example, which a scale must not divide by."""

    @dataclass(frozen=True)
    class Scaled(Plain):
        def fwd(self, params, x, *, key=None):
            return x.sin(), x

        def bwd(self, params, x, grad, *, input_grad=True):
            size = SCALES[scale](grad) if grad.numel() else 1.0
            return (), (grad / size) * x.cos() * size if input_grad else None

    if scale == "none":
        check_vjp(Scaled(), (), draw((3, 4)))
        return
    with pytest.raises(GradientMismatch, match="for x is not linear in grad: at a grad of 0"):
        check_vjp(Scaled(), (), draw((3, 4)))


def test_a_gradient_that_is_wrong_where_all_of_grad_is_positive():
    """So it is of a sum. Drawn ones have both signs."""

    @dataclass(frozen=True)
    class Positive(Plain):
        def fwd(self, params, x, *, key=None):
            return x.sin(), x

        def bwd(self, params, x, grad, *, input_grad=True):
            factor = 1.01 if (grad > 0).all() else 1.0
            return (), factor * grad * x.cos() if input_grad else None

    with pytest.raises(GradientMismatch, match="for x is not linear in grad"):
        check_vjp(Positive(), (), draw((3, 4)))


def test_residuals_that_are_a_graph_of_autograd():
    @dataclass(frozen=True)
    class Recorded(Plain):
        factor: float = 1.0

        def fwd(self, params, x, *, key=None):
            with torch.enable_grad():
                x = x.detach().clone().requires_grad_()
                y = x.sin().cumsum(-1)
            return y.detach().clone(), (x, y)

        def bwd(self, params, residuals, grad, *, input_grad=True):
            x, y = residuals
            (dx,) = torch.autograd.grad(y, x, self.factor * grad, retain_graph=True)
            return (), dx if input_grad else None

    check_vjp(Recorded(), (), draw((3, 4)))
    with pytest.raises(GradientMismatch, match="the gradient for x"):
        check_vjp(Recorded(1.01), (), draw((3, 4)))


def test_layers_that_numpy_computes_are_not_asked_for_vmap():
    @dataclass(frozen=True)
    class ByNumpy(Plain):
        def fwd(self, params, x, *, key=None):
            return torch.from_numpy(np.sin(x.detach().numpy())), x

        def bwd(self, params, x, grad, *, input_grad=True):
            return (), grad * x.cos() if input_grad else None

    check_vjp(ByNumpy(), (), draw((3, 4)))


# --- Positions


@dataclass(frozen=True)
class Interpolate(fn.Layer):
    """Each row of x at a learned position, between its two neighbours."""

    fault: str = ""

    def init(self, key, shape, *, dtype=None, device=None):
        return {"at": 1.5 + fn.uniform(key, (1,), dtype=dtype, device=device)}

    def out_shape(self, shape):
        return (*shape[:-1], 1)

    def fwd(self, params, x, *, key=None):
        left = params["at"].floor()
        right, i = params["at"] - left, left.long()
        y = (1 - right) * x.index_select(-1, i) + right * x.index_select(-1, i + 1)
        return y, (x, right, i)

    def bwd(self, params, residuals, grad, *, input_grad=True):
        x, right, i = residuals
        if self.fault == "float32" and grad.dtype == torch.float32:
            grad = 1.01 * grad
        if self.fault == "strides" and not grad.is_contiguous():
            grad = 1.01 * grad
        slope = x.index_select(-1, i + 1) - x.index_select(-1, i)
        dx = torch.zeros_like(x).index_add(-1, i, (1 - right) * grad)
        dx = dx.index_add(-1, i + 1, right * grad)
        return {"at": (grad * slope).sum().reshape(1)}, dx if input_grad else None


@dataclass(frozen=True)
class Shift(Plain):
    """A ramp's square between whole numbers, read at positions moved by x."""

    def fwd(self, params, x, *, key=None):
        at = torch.arange(x.shape[-1]).to(x) + x
        left = at.floor()
        return left.square() + (at - left) * (2 * left + 1), left

    def bwd(self, params, left, grad, *, input_grad=True):
        return (), grad * (2 * left + 1) if input_grad else None


def test_y_of_another_shape_beside_x_is_left_out():
    @dataclass(frozen=True)
    class Prefix(Plain):
        """As many rows of x as its largest entry says."""

        def out_shape(self, shape):
            raise ValueError("expected a tuple")

        def fwd(self, params, x, *, key=None):
            count = int(x[0].max())
            return x[0][:count].square(), (x[0], count)

        def bwd(self, params, residuals, grad, *, input_grad=True):
            x, count = residuals
            dx = torch.zeros_like(x)
            dx[:count] = 2 * x[:count] * grad
            return (), (dx,) if input_grad else None

    check_vjp(Prefix(), (), (torch.tensor([0.5, 2.01, 1.5, -3.0], dtype=torch.float64),))


def test_a_mistake_where_no_leaf_of_x_is_contiguous():
    @dataclass(frozen=True)
    class Product(Plain):
        def out_shape(self, shape):
            return shape[0]

        def fwd(self, params, x, *, key=None):
            return x[0] * x[1], x

        def bwd(self, params, x, grad, *, input_grad=True):
            factor = 1 if any(leaf.is_contiguous() for leaf in x) else 2
            return (), (factor * grad * x[1], factor * grad * x[0]) if input_grad else None

    with pytest.raises(GradientMismatch, match="leaves of x that are not contiguous change the"):
        check_vjp(Product(), (), (draw((3, 4)), draw((3, 4))))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rounding_does_not_move_positions(dtype):
    """One less is another index: such a jump would excuse any difference."""
    layer, x = Interpolate(), draw((3, 4, 5), dtype)
    params = layer.init(fn.key(0), (4, 5), dtype=dtype)
    check_vjp(layer, params, x)
    with pytest.raises(GradientMismatch, match="grad in the memory layout"):
        check_vjp(Interpolate("strides"), params, x)
    if dtype == torch.float32:
        with pytest.raises(GradientMismatch, match=r"in torch\.float32"):
            check_vjp(Interpolate("float32"), params, x)


def test_half_precision_may_round_to_a_position():
    layer = Shift()
    check_vjp(layer, (), 1e-3 * draw((3, 5), torch.bfloat16))


# --- Time


def test_a_budget_in_seconds():
    net = fn.Sequential(fn.LSTM(3), fn.Linear(2))
    params = net.init(fn.key(0), (4, 3), dtype=torch.float64)
    check_vjp(net, params, draw((2, 4, 3)), budget=0.5)
    with pytest.raises(ValueError, match="expected a budget of more than 0 seconds, got 0"):
        check_vjp(net, params, draw((2, 4, 3)), budget=0)


def test_a_kink_in_one_entry_does_not_excuse_the_others():
    """Residuals at a bound of the clamp move across it by any nudge."""

    @dataclass(frozen=True)
    class Off(Plain):
        def fwd(self, params, x, *, key=None):
            y = x.clamp(-1, 1)
            return y, y

        def bwd(self, params, y, grad, *, input_grad=True):
            return (), 1.001 * grad * (y.abs() < 1) if input_grad else None

    with pytest.raises(GradientMismatch, match=r"a factor of 1\.001 is wrong"):
        check_vjp(Off(), (), draw((4, 6)))


@dataclass(frozen=True)
class Middle(Plain):
    """The median, computed by numpy: one of equal entries is in the middle, and has the slope."""

    every: bool = False

    def out_shape(self, shape):
        return shape[:-1]

    def fwd(self, params, x, *, key=None):
        order = torch.from_numpy(np.argsort(x.detach().numpy(), -1, kind="stable"))
        middle = order[..., [x.shape[-1] // 2]]
        y = x.detach().gather(-1, middle)
        return y[..., 0].clone(), x == y if self.every else torch.zeros_like(x).scatter(
            -1, middle, 1
        )

    def bwd(self, params, mask, grad, *, input_grad=True):
        return (), mask * grad[..., None] if input_grad else None


@pytest.mark.parametrize("number", [0.0, 1.0])
def test_steps_of_the_middle_one_of_equal_entries_show_no_slope(number):
    """Its neighbours take its place on either side, so that both one-sided slopes are 0."""
    x = torch.full((2, 5), number, dtype=torch.float64)
    check_vjp(Middle(), (), x)
    with pytest.raises(GradientMismatch, match="a direction that moves equal entries alike"):
        check_vjp(Middle(every=True), (), x)


@dataclass(frozen=True)
class Switched(Plain):
    """tanh x; with a key, which draws nothing, x normalised by its batch, or relu, or masked."""

    kind: str

    def apply(self, params, x, *, key=None):
        if key is None:
            return x.tanh()
        if self.kind == "relu":
            return x.relu()
        if self.kind == "masked":
            return 2 * x.tanh() * (torch.arange(x.shape[-1]) % 2).to(x)
        centred = x - x.mean(0)
        return centred / (centred.square().mean(0) + 1e-5).sqrt()

    def fwd(self, params, x, *, key=None):
        return self.apply(params, x, key=key), (x, key)

    def bwd(self, params, residuals, grad, *, input_grad=True):
        x, key = residuals
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (dx,) = torch.autograd.grad(self.apply(params, x, key=key), x, grad)
        return (), dx if input_grad else None


@pytest.mark.parametrize("kind", ["normalised", "relu"])
def test_zeros_that_follow_from_x_are_not_dropped_by_a_key(kind):
    x = torch.tensor([[1.0, 2.0, -1.0], [1.0, 3.0, -1.0]], dtype=torch.float64)
    check_vjp(Switched(kind), (), x)


def test_zeros_at_the_same_places_whatever_x_is_are_dropped_by_every_key():
    with pytest.raises(GradientMismatch, match="8 different keys drop the same entries"):
        check_vjp(Switched("masked"), (), draw((2, 4)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_of_the_first_call_in_its_dtype_alone(dtype):
    kept = []

    @dataclass(frozen=True)
    class Keeping(Plain):
        def fwd(self, params, x, *, key=None):
            return x.sin(), x

        def bwd(self, params, x, grad, *, input_grad=True):
            kept.append(x.cos())
            serves = kept[0].dtype == x.dtype and kept[0].shape == x.shape
            return (), grad * kept[0 if serves else -1] if input_grad else None

    with pytest.raises(GradientMismatch, match=r"is wrong|further from float64"):
        check_vjp(Keeping(), (), draw((4, 4), dtype))


@pytest.mark.parametrize("zeros", [False, True])
def test_state_that_depends_on_signs_alone(zeros):
    kept = {}

    @dataclass(frozen=True)
    class Rectifier(Plain):
        def fwd(self, params, x, *, key=None):
            kept["mask"] = x > 0
            return x.relu(), None

        def bwd(self, params, residuals, grad, *, input_grad=True):
            mask = kept["mask"]
            dx = grad * mask if mask.shape == grad.shape else grad.clone()
            return (), dx if input_grad else None

    with pytest.raises(GradientMismatch, match="state is kept between fwd and bwd"):
        check_vjp(Rectifier(), (), (0 if zeros else 1) * draw((4, 4)))


def test_state_that_depends_on_integers_alone():
    kept = {}

    @dataclass(frozen=True)
    class Rows(fn.Embedding):
        def _fwd(self, params, x, key):
            kept["rows"] = x
            return params["weight"][x], ()

        def _bwd(self, params, residuals, dy, need):
            dweight = torch.zeros_like(params["weight"])
            rows = kept["rows"].flatten().long()
            return {"weight": dweight.index_add(0, rows, dy.reshape(len(rows), -1))}, None

    layer = Rows(6, 3)
    params = layer.init(fn.key(0), (2,))
    with pytest.raises(GradientMismatch, match="state is kept between fwd and bwd"):
        check_vjp(layer, params, torch.tensor([[0, 1], [2, 2], [5, 4]]))


@pytest.mark.parametrize("of_classes", [False, True])
def test_state_that_depends_on_the_target_alone(of_classes):
    kept = {}

    @dataclass(frozen=True)
    class Likelihood(fn.Loss):
        def _check(self, x, target):
            pass

        def _fwd(self, x, target):
            if of_classes:
                target = F.one_hot(target.long(), x.shape[1]).to(x.dtype)
            kept["target"] = target
            return -(target * x.log_softmax(1)).sum(), x.softmax(1)

        def _bwd(self, p, grad):
            return (p * kept["target"].sum(1, keepdim=True) - kept["target"]) * grad

    target = torch.tensor([0, 2, 1, 1]) if of_classes else draw((4, 3), key=1)
    with pytest.raises(GradientMismatch, match="state is kept between fwd and bwd"):
        check_vjp(Likelihood(), draw((4, 3)), target)


@dataclass(frozen=True)
class Rows(Plain):
    """A function of each row, which is undefined where its entries are equal."""

    name: str
    fault: bool = False

    def out_shape(self, shape):
        return tuple(ROWS[self.name](torch.arange(float(shape[0]))[None]).shape[1:])

    def fwd(self, params, x, *, key=None):
        y = ROWS[self.name](x)
        return (y * math.nan if self.fault and 0 in x.stride() else y), x

    def bwd(self, params, x, grad, *, input_grad=True):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            (dx,) = torch.autograd.grad(ROWS[self.name](x), x, grad)
        return (), dx if input_grad else None


def variance(x):
    return (x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True)


def moments(x):
    m, s = x.mean(-1, keepdim=True), variance(x).sqrt()
    return torch.cat([m, s, ((x - m) ** 3).mean(-1, keepdim=True) / s**3], -1)


def careless(x):
    m, square = x.mean(-1, keepdim=True), x.square().mean(-1, keepdim=True)
    return (x - m) / (square - m * m + 1e-3).sqrt()


ROWS = {
    "moments": moments,
    "normalised": lambda x: (x - x.mean(-1, keepdim=True)) / variance(x).sqrt(),
    "weights": lambda x: 1 / variance(x),
    "softmax": lambda x: x.softmax(-1),
    "careless": careless,
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("name", ["moments", "normalised", "weights", "softmax"])
def test_what_is_undefined_for_equal_numbers_in_expanded_memory(name, dtype):
    """Their mean is rounded in one memory layout, and not in another: 0/0, 1/0 or 1."""
    for key in range(3):
        check_vjp(Rows(name), (), draw((4, 12), dtype, key))


@pytest.mark.parametrize("key", [1, 2, 4])
def test_a_root_of_what_cancels_in_expanded_memory(key):
    """E[x²] − E[x]² of equal numbers may be rounded below −1e-3, where all is defined."""
    with pytest.raises(GradientMismatch, match="in the memory layout 'expanded"):
        check_vjp(Rows("careless"), (), 1000 + draw((3, 8), torch.float32, key))


@pytest.mark.parametrize("name", ["moments", "softmax"])
def test_not_a_number_in_expanded_memory_alone(name):
    with pytest.raises(GradientMismatch, match="in the memory layout 'expanded'"):
        check_vjp(Rows(name, fault=True), (), draw((4, 12)))


@dataclass(frozen=True)
class OffScale(Plain):
    """y = s·x for a parameter s without axes, whose gradient is off by a factor."""

    factor: float

    def fwd(self, params, x, *, key=None):
        return params * x, x

    def bwd(self, params, x, grad, *, input_grad=True):
        return self.factor * (x * grad).sum(), params * grad if input_grad else None


@pytest.mark.parametrize(
    ("factor", "expected"),
    [
        (0.727633, None),
        (1.1731, None),
        (-1.0, "the sign is wrong"),
        (0.5, "a factor of 0.5 is wrong"),
        (3.0, "a factor of 3 is wrong"),
        (-1.5, "a factor of -1.5 is wrong"),
        (1 / 7, "it is too small by a factor of 7: a mean over the batch instead of a sum"),
    ],
)
def test_a_factor_on_a_single_number_is_guessed_if_it_is_simple(factor, expected):
    with pytest.raises(GradientMismatch) as caught:
        check_vjp(OffScale(factor), torch.tensor(0.7, dtype=torch.float64), draw((7, 5)))
    assert caught.value.guess == expected
