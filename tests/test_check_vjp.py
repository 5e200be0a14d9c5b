"""check_vjp passes right layers, and says where a wrong one is off, how much and why."""

import itertools
import math
import random
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from users_layers import (
    RIGHT,
    BatchNorm,
    Dense,
    Dropout,
    Elementwise,
    Flatten,
    MaxPool,
    Passing,
    Plain,
)

import funcnet as fn
from funcnet.testing import GradientMismatch, check_function, check_vjp, strategies


def case(layer, shape=(3, 6), dtype=torch.float64, key=0):
    a, b = fn.split(fn.key(key))
    return layer.init(a, shape[1:], dtype=dtype), fn.normal(b, shape, dtype=dtype)


def mismatch(layer, shape=(3, 6), dtype=torch.float64, **kwargs):
    params, x = case(layer, shape, dtype)
    with pytest.raises(GradientMismatch) as caught:
        check_vjp(layer, params, x, **kwargs)
    return caught.value


# --- Right layers pass


@given(
    st.sampled_from(RIGHT),
    st.sampled_from([1, 2, 3, 0]),
    st.sampled_from([torch.float64, torch.float32, torch.bfloat16]),
    st.booleans(),
    st.integers(0, 99),
)
def test_right_layers_pass(layer, batch, dtype, ties, key):
    params, x = case(layer, (batch, 6), dtype, key)
    check_vjp(layer, params, (2 * x).round() if ties else x)


@given(st.sampled_from(RIGHT), st.sampled_from([1e-12, 1e-6, 1e6]), st.floats(-15, 15))
def test_right_layers_pass_at_any_scale(layer, scale, exponent):
    if layer == Elementwise("steps"):
        return
    params, x = case(layer)
    y = layer.apply(params, x)
    grad = 10.0**exponent * fn.normal(fn.key(5), y.shape, dtype=torch.float64)
    check_vjp(layer, params, x, grad=grad)
    grad = fn.normal(fn.key(5), layer.apply(params, scale * x).shape, dtype=torch.float64)
    check_vjp(layer, params, scale * x, grad=grad)


@pytest.mark.parametrize("name", ["log", "sqrt", "reciprocal"])
def test_no_step_leaves_the_domain_of_a_function(name):
    for x in (torch.tensor([[1e-9, 1.0, 1e3]]), torch.tensor([[1e-300, 2e-5]])):
        check_vjp(Elementwise(name), (), x.double())


@pytest.mark.parametrize("name", ["abs", "leaky", "clip"])
def test_any_subgradient_at_a_kink(name):
    x = torch.tensor([[0.0, -0.0, 0.5, -0.5, 1e-9, -1e-12, 3.0]], dtype=torch.float64)
    check_vjp(Elementwise(name), (), x)
    check_vjp(fn.ReLU(), (), torch.zeros(2, 3))
    check_vjp(MaxPool(), (), torch.ones(2, 4))


@given(strategies.cases(strategies.networks(), integers=True, layouts=["contiguous"]))
def test_networks_on_integers_have_ties_everywhere(case):
    check_vjp(*case)


@pytest.mark.parametrize("x", [torch.tensor([math.inf, -math.inf, 1e3, -1e3, 0.0])])
def test_infinite_numbers(x):
    check_vjp(fn.Sigmoid(), (), x)
    check_vjp(fn.ReLU(), (), x.double())


def test_random_layers_with_and_without_their_key():
    params, x = case(Dropout())
    check_vjp(Dropout(), params, x, key=fn.key(3))
    check_vjp(
        fn.Sequential(Dropout(), Dense(), Dropout()),
        *case(fn.Sequential(Dropout(), Dense(), Dropout())),
        key=fn.key(3),
    )


def test_an_ordinary_layer_takes_few_forward_passes(monkeypatch):
    layer = fn.Conv2d(8, 3, padding=1)
    params, x = case(layer, (4, 3, 16, 16), torch.float32)
    passes = []
    forward = fn.Conv2d.fwd
    monkeypatch.setattr(
        fn.Conv2d, "fwd", lambda *args, **kwargs: passes.append(1) or forward(*args, **kwargs)
    )
    check_vjp(layer, params, x)
    assert 0 < len(passes) < 1000


@pytest.mark.parametrize("generator", [np.random.MT19937, np.random.PCG64, np.random.Philox])
def test_any_generator_of_numpy_may_be_the_global_one(generator):
    @dataclass(frozen=True)
    class Drawing(Plain):
        def fwd(self, params, x, *, key=None):
            return x * np.random.rand(), None

        def bwd(self, params, residuals, grad, *, input_grad=True):
            return (), grad

    before = np.random.get_bit_generator()
    np.random.set_bit_generator(generator(1))
    try:
        check_vjp(fn.ReLU(), (), torch.tensor([[1.0, -2.0]]))
        with pytest.raises(GradientMismatch, match="draws from the global random state of numpy"):
            check_vjp(Drawing(), (), torch.tensor([[1.0, -2.0]]))
    finally:
        np.random.set_bit_generator(before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_grad_gets_the_dtype_of_y(dtype):
    x = torch.tensor([[1.0, -2.0]], dtype=dtype)
    check_vjp(fn.ReLU(), (), x, torch.tensor([[1.0, 2.0]], dtype=torch.float64))
    check_vjp(fn.ReLU(), (), x, [[1, 2]])
    with pytest.raises(ValueError, match=r"expected grad of y's shape, \(1, 2\), got \(\)"):
        check_vjp(fn.ReLU(), (), x, 2)


def test_global_randomness_is_left_alone():
    torch.manual_seed(5), np.random.seed(5), random.seed(5)
    before = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    check_vjp(Dense(), *case(Dense()))
    after = torch.get_rng_state(), np.random.get_state()[1].tolist(), random.getstate()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_two_threads_may_check_at_once():
    """One seeds the global generators, while the other sees to it that nobody draws from them."""
    seeded, watched = threading.Event(), threading.Event()

    @dataclass(frozen=True)
    class Seeded(Dense):
        def init(self, *arguments, **named):
            seeded.set()
            watched.wait(0.05)
            return super().init(*arguments, **named)

    @dataclass(frozen=True)
    class Watched(Dense):
        def bwd(self, params, residuals, grad, *, input_grad=True):
            if not watched.is_set():
                watched.set()
                time.sleep(0.05)
            return super().bwd(params, residuals, grad, input_grad=input_grad)

    given = case(Dense())
    with ThreadPoolExecutor() as pool:
        first = pool.submit(check_vjp, Seeded(), *given)
        assert seeded.wait(10)
        second = pool.submit(check_vjp, Watched(), *given)
        assert (first.result(), second.result()) == (None, None)


COUNT = itertools.count()


@dataclass(frozen=True)
class Each(fn.Linear):
    """y = W x + b, with dWₙ = gₙ·xₙᵀ written out, or `spoil` done to (dWₙ, dbₙ, dx)."""

    spoil: Callable[..., Any] = lambda dw, db, dx: (dw, db, dx)

    def _bwd_each(self, params, x, dy, need):
        dw, db, dx = self.spoil(dy[:, :, None] * x[:, None], dy.clone(), dy @ params["weight"])
        return {"weight": dw, "bias": db}, dx if need.input else None


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("batch", [0, 1, 2, 5])
def test_right_gradients_of_each_example_pass(batch, dtype):
    for layer in (Each(3), fn.Sequential(Dense(6), fn.Residual(Each(6)))):
        check_vjp(layer, *case(layer, (batch, 6), dtype))


def test_gradients_of_each_example_where_x_has_no_axes():
    for layer in (fn.PReLU(), fn.Sequential(fn.PReLU(), fn.Tanh())):
        params = layer.init(fn.key(0), (), dtype=torch.float64)
        check_vjp(layer, params, torch.tensor(-0.3, dtype=torch.float64))


def test_gradients_of_each_example_with_a_mask():
    attention = fn.MultiheadAttention(2, dropout=0.5)
    check_vjp(attention, *case(attention, (3, 4, 6)), key=fn.key(0))


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda dw, db, dx: (dw.roll(1, 0), db, dx), "weight'] of example 0 is not what bwd finds"),
        (lambda dw, db, dx: (dw, db / len(db), dx), "bias'] of example 0 is not"),
        (lambda dw, db, dx: (dw, db, 2 * dx), "x of example 0 is not"),
        (
            lambda dw, db, dx: (torch.cat([dw[:-1], dw[:1]]), db, dx),
            "weight'] of example 2 is not",
        ),
        (
            lambda dw, db, dx: (dw.sum(0), db, dx),
            "expected the gradient for params['weight'] of shape (3, 3, 6), got (3, 6)",
        ),
        (lambda dw, db, dx: (dw, None, dx), "for params['bias'] of shape (3, 3), got None"),
        (lambda dw, db, dx: (dw, db * torch.rand(()), dx), "draws from the global random state"),
        (lambda dw, db, dx: (dw, db * (1 + 1e-15 * next(COUNT)), dx), "twice gives different bits"),
    ],
    ids=["of another example", "of a mean", "dx", "the last", "the sum", "none", "random", "count"],
)
def test_wrong_gradients_of_each_example_are_found(spoil, complaint):
    message = str(mismatch(Each(3, spoil=spoil)))
    assert ": _bwd_each: " in message.splitlines()[0]
    assert complaint in message.splitlines()[0]
    message = str(mismatch(fn.Sequential(Dense(5), Each(3, spoil=spoil)), (3, 6)))
    assert ": _bwd_each: " in message.splitlines()[0]
    assert "layer 1 is wrong: Each(" in message


def test_what_else_is_asked_of_gradients_of_each_example():
    class Writes(Each):
        def _bwd_each(self, params, x, dy, need):
            found = super()._bwd_each(params, x, dy, need)
            x.zero_()
            return found

    class Lacks(Each):
        def _bwd_each(self, params, x, dy, need):
            each, dx = super()._bwd_each(params, x, dy, need)
            return {"weight": each["weight"]}, dx

    assert "_bwd_each: writes to x" in str(mismatch(Writes(3)))
    assert "_bwd_each: expected gradients with the tree of params" in str(mismatch(Lacks(3)))


# --- Wrong gradients


@dataclass(frozen=True)
class Spoilt(Dense):
    """A Dense whose gradients pass through `spoil(dweight, dbias, dx, x, grad)`."""

    spoil: Callable[..., Any] = lambda dw, db, dx, x, g: (dw, db, dx)
    opaque: bool = False

    def fwd(self, params, x, *, key=None):
        with torch.set_grad_enabled(not self.opaque and torch.is_grad_enabled()):
            return super().fwd(params, x)

    def bwd(self, params, residuals, grad, *, input_grad=True):
        dparams, dx = super().bwd(params, residuals, grad)
        weight, bias, dx = self.spoil(dparams["weight"], dparams["bias"], dx, residuals[0], grad)
        return {"weight": weight, "bias": bias}, dx if input_grad else None


def off(tensor, index, factor=1 + 1e-4):
    tensor = tensor.clone()
    tensor[index] *= factor
    return tensor


SPOILS = {
    "sign": (lambda dw, db, dx, x, g: (-dw, db, dx), "weight", "the sign is wrong"),
    "mean": (lambda dw, db, dx, x, g: (dw, db / max(len(x), 1), dx), "bias", "over the batch"),
    "factor": (lambda dw, db, dx, x, g: (dw, db, dx * 1.5), "x", "a factor of 1.5 is wrong"),
    "zero": (lambda dw, db, dx, x, g: (dw, db, 0 * dx), "x", "it is zero"),
    "transpose": (lambda dw, db, dx, x, g: (dw.T.contiguous(), db, dx), "weight", "axes 0 and 1"),
    "flip": (lambda dw, db, dx, x, g: (dw, db, dx.flip(1)), "x", "flipped along axis 1"),
    "shift": (lambda dw, db, dx, x, g: (dw.roll(1, 1), db, dx), "weight", "shifted by 1 along"),
    "one entry": (lambda dw, db, dx, x, g: (off(dw, (2, 1)), db, dx), "weight", None),
    "ignores grad": (lambda dw, db, dx, x, g: (dw, db, x.clone()), "x", "not depend on grad"),
    "last row": (lambda dw, db, dx, x, g: (off(dw, -1, 0), db, dx), "weight", "all zero: a part"),
    "twice": (lambda dw, db, dx, x, g: (dw, off(db, 0, 2), dx), "bias", None),
    "clipped": (lambda dw, db, dx, x, g: (dw, db, dx.clamp(-0.5, 0.5)), "x", None),
}  # fmt: skip


@pytest.mark.parametrize("opaque", [False, True], ids=["autograd", "opaque"])
@pytest.mark.parametrize("name", SPOILS)
def test_wrong_gradients_are_named(name, opaque):
    spoil, leaf, guess = SPOILS[name]
    size = 6 if name == "transpose" else 4
    error = mismatch(Spoilt(size, spoil, opaque))
    named = "x" if leaf == "x" else f"params['{leaf}']"
    assert error.leaf.startswith(f"{named}[")
    assert f"the gradient for {error.leaf} is wrong" in str(error)
    assert error.relative_error == pytest.approx(
        abs(error.analytic - error.numeric) / max(abs(error.analytic), abs(error.numeric)), rel=1e-6
    )
    if not opaque:
        assert 0 < error.wrong_fraction <= 1
        assert (guess or "") in (error.guess or "")


@given(st.integers(0, 3), st.integers(0, 5), st.integers(0, 99), st.booleans(), st.floats(-12, 12))
def test_one_entry_off_by_a_ten_thousandth_at_any_scale(i, j, key, opaque, exponent):
    layer = Spoilt(4, lambda dw, db, dx, x, g: (off(dw, (i, j)), db, dx), opaque)
    params, x = case(layer, key=key)
    grad = 10.0**exponent * fn.normal(fn.key(key), (3, 4), dtype=torch.float64)
    dweight = layer.vjp(params, x, grad)[0]["weight"].abs()
    assume(dweight[i, j] > 1e-3 * dweight.max())  # differences of y resolve no less
    with pytest.raises(GradientMismatch) as caught:
        check_vjp(layer, params, x, grad=grad)
    assert caught.value.leaf == f"params['weight'][{i}, {j}]"
    assert caught.value.relative_error == pytest.approx(1e-4, rel=1e-3)
    if not opaque:
        assert caught.value.wrong_fraction == 1 / 24


@settings(max_examples=5)
@given(st.integers(0, 7), st.integers(0, 99))
def test_one_entry_of_one_of_many_leaves(place, key):
    """Leaves are moved together: right ones do not hide a wrong one."""

    def spoil(dw, db, dx, x, g):
        return off(dw, divmod(int(dw.abs().argmax()), len(dw.T))), db, dx

    layers = [Spoilt(4, lambda dw, db, dx, x, g: (dw, db, dx), opaque=True) for _ in range(8)]
    layers[place] = Spoilt(4, spoil, opaque=True)
    net = fn.Sequential(*[part for layer in layers for part in (layer, fn.SiLU())])
    with pytest.raises(GradientMismatch) as caught:
        check_vjp(net, *case(net, key=key))
    assert caught.value.leaf.startswith(f"params[{2 * place}]['weight']")


def test_rtol_and_atol_decide_what_is_wrong():
    layer = Spoilt(4, lambda dw, db, dx, x, g: (off(dw, (2, 1), 1 + 1e-8), db, dx))
    check_vjp(layer, *case(layer))
    mismatch(layer, rtol=1e-9)
    layer = Spoilt(4, SPOILS["one entry"][0])
    check_vjp(layer, *case(layer), rtol=1e-3)
    check_vjp(layer, *case(layer), atol=1e-2)


def test_the_message_in_full():
    """A leaf deep in a network, and the code that replays the case."""
    spoilt = Spoilt(4, SPOILS["sign"][0])
    error = mismatch(fn.Sequential(Dense(5), fn.Sequential(spoilt, Elementwise("exp"))))
    assert error.leaf.startswith("params[1][0]['weight'][")
    for part in (
        "analytic",
        "numeric",
        "relative error  2",
        "20 of 20",
        "the sign is wrong",
        "params[0]['bias'] (5,)",
        "torch.float64",
        "To replay it:",
        "check_vjp(layer, params",
    ):
        assert part in str(error)  # fmt: skip


@pytest.mark.parametrize("shape", [(3, 6), (1, 6)])
@pytest.mark.parametrize("name", ["sign", "one entry", "shift"])
def test_the_snippet_replays_the_case(shape, name):
    names = {"Spoilt": lambda size, spoil: Spoilt(size, SPOILS[name][0])}
    params, x = case(Spoilt(4, SPOILS[name][0]), shape, torch.float32)
    with pytest.raises(GradientMismatch) as caught:
        check_vjp(Spoilt(4, SPOILS[name][0]), params, x)
    code = re.sub(r"layer = .*", "layer = Spoilt(4, None)", caught.value.snippet)
    code = re.sub(r"from test_check_vjp import .*\n", "", code)
    with pytest.raises(GradientMismatch) as again:
        exec(code, names)
    assert again.value.leaf.split("[")[1] == caught.value.leaf.split("[")[1]


def test_a_snippet_with_numbers_that_no_key_draws():
    """The gradient is wrong only for large x, which a normal distribution does not draw."""

    @dataclass(frozen=True)
    class Clipped(Plain):
        def fwd(self, params, x, *, key=None):
            return x.square(), x

        def bwd(self, params, x, grad, *, input_grad=True):
            return (), 2 * x.clamp(max=9) * grad if input_grad else None

    with pytest.raises(GradientMismatch) as caught:
        check_vjp(Clipped(), (), torch.tensor([[1.0, 20.0, math.inf]]))
    assert "x = torch.tensor([[1.0, 20.0, torch.inf]], dtype=torch.float32)" in caught.value.snippet
    assert "layer = Clipped()" in caught.value.snippet
    with pytest.raises(GradientMismatch):
        exec(caught.value.snippet, {"Clipped": Clipped})
    with pytest.raises(GradientMismatch) as caught:
        check_vjp(Clipped(), (), torch.full((30, 30), 20.0))
    assert "layer, params, x, grad = error.layer" in caught.value.snippet
    with pytest.raises(GradientMismatch):
        exec(caught.value.snippet, {"error": caught.value})


def test_a_snippet_has_the_tolerances():
    """Off by 1e-8: no entry is wrong clearly, so there are none to count, or to guess from."""
    layer = Spoilt(4, lambda dweight, dbias, dx, x, grad: (dweight, dbias, dx * (1 + 1e-8)))
    params, x = case(Spoilt(4, None), (3, 6))
    with pytest.raises(GradientMismatch) as caught:
        check_vjp(layer, params, x, rtol=1e-10, atol=1e-300)
    assert "rtol=1e-10, atol=1e-300)" in caught.value.snippet
    assert "wrong entries" not in str(caught.value)
    assert caught.value.guess is None
    check_vjp(layer, params, x)


def test_a_class_without_code_is_taken_from_the_error():
    class Bare(fn.Layer):
        __repr__ = object.__repr__

        def _fwd(self, params, x, key):
            return x.square(), x

        def _bwd(self, params, x, dy, need):
            return (), x * dy

    with pytest.raises(GradientMismatch) as caught:
        check_vjp(Bare(), (), torch.ones(2, 3))
    compile(caught.value.snippet, "snippet", "exec")
    with pytest.raises(GradientMismatch, match="is wrong"):
        exec(caught.value.snippet, {"error": caught.value})


def test_a_network_is_named_by_its_kind_and_size():
    net = fn.Sequential(*[fn.Linear(3), fn.ReLU()] * 20, Spoilt(4, SPOILS["sign"][0]))
    message = str(mismatch(net))
    assert message.startswith("Sequential of 41 layers: the gradient for")
    assert len(message.partition("To replay")[0].splitlines()) < 12


def test_a_snippet_imports_every_layer_of_a_network():
    layer = fn.Sequential(fn.ReLU(), Spoilt(4, SPOILS["sign"][0]))
    with pytest.raises(GradientMismatch) as caught:
        check_vjp(layer, *case(layer))
    for line in (f"from {__name__} import Spoilt", "from funcnet import ReLU, Sequential"):
        assert line in caught.value.snippet.splitlines()


def test_a_snippet_of_params_in_containers_that_are_not_builtin():
    @dataclass(frozen=True)
    class Odd(Plain):
        def init(self, key, shape, *, dtype=None, device=None):
            raise NotImplementedError

        def fwd(self, params, x, *, key=None):
            return params[0]["w"] * x, x

        def bwd(self, params, x, grad, *, input_grad=True):
            dw = 2 * (x * grad).sum()
            return (OrderedDict(w=dw),), params[0]["w"] * grad if input_grad else None

    params = (OrderedDict(w=torch.tensor(2.0)),)
    with pytest.raises(GradientMismatch) as caught:
        check_vjp(Odd(), params, torch.tensor([1.0, 2.0]))
    with pytest.raises(GradientMismatch):
        exec(caught.value.snippet, {"error": caught.value})


def test_a_gradient_that_shares_its_mistake_with_autograd():
    """Both vjp and the autograd.Function in apply are wrong: only differences show it."""

    class Cubed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @staticmethod
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] ** 2 * grad

    @dataclass(frozen=True)
    class Cube(Plain):
        def fwd(self, params, x, *, key=None):
            return Cubed.apply(x), x

        def bwd(self, params, x, grad, *, input_grad=True):
            return (), 2 * x**2 * grad if input_grad else None

    assert mismatch(Cube()).relative_error == pytest.approx(1 / 3, rel=1e-6)


def test_one_entry_that_is_wrong_in_an_autograd_function_too():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return torch.tanh(x @ weight.T)

        @staticmethod
        def backward(ctx, grad):
            return wrong(*ctx.saved_tensors, grad)

    def wrong(x, weight, grad):
        dz = grad / torch.cosh(x @ weight.T) ** 2
        dweight = dz.T @ x
        dweight[2, 3] *= 1 + 1e-4
        return dz @ weight, dweight

    @dataclass(frozen=True)
    class Wrong(Dense):
        def init(self, key, shape, *, dtype=None, device=None):
            return (fn.normal(key, (self.size, shape[0]), dtype=dtype, device=device) / 3,)

        def fwd(self, params, x, *, key=None):
            return Product.apply(x, *params), x

        def bwd(self, params, x, grad, *, input_grad=True):
            dx, dweight = wrong(x, *params, grad)
            return (dweight,), dx if input_grad else None

    assert mismatch(Wrong(9)).leaf == "params[0][2, 3]"


@pytest.mark.parametrize("name", ["log", "inverse"])
def test_layers_that_refuse_x_outside_their_domain(name):
    """An exception at a point that the check has chosen is not a fault of the layer."""

    @dataclass(frozen=True)
    class Refusing(Plain):
        def fwd(self, params, x, *, key=None):
            if name == "log" and not (x > 0).all():
                raise ValueError("expected numbers > 0")
            y = x.log() if name == "log" else torch.linalg.inv(x)
            return y, (x if name == "log" else y)

        def bwd(self, params, kept, grad, *, input_grad=True):
            dx = grad / kept if name == "log" else -(kept.mT @ grad @ kept.mT)
            return (), dx if input_grad else None

    x = fn.uniform(fn.key(0), (2, 3, 3), 0.1, 1.0, dtype=torch.float64)
    check_vjp(Refusing(), (), x + (0 if name == "log" else 2 * torch.eye(3)))


@pytest.mark.parametrize("low", [True, False])
def test_faults_of_extreme_gradients_only(low):
    """Clipping of very large gradients, or flushing of very small ones."""

    def spoil(dw, db, dx, x, g):
        return dw, db, torch.where(dx.abs() < 1e-9, 0.0, dx) if low else dx.clamp(-1e6, 1e6)

    error = mismatch(Spoilt(4, spoil))
    assert "the gradient for x is not linear in grad" in str(error)


def test_coupled_examples():
    """Batch normalisation without the terms that go through the mean."""

    @dataclass(frozen=True)
    class Forgetful(BatchNorm):
        def bwd(self, params, residuals, grad, *, input_grad=True):
            dparams, _ = super().bwd(params, residuals, grad)
            return dparams, grad * params["scale"] * residuals[1] if input_grad else None

    assert mismatch(Forgetful()).leaf.startswith("x[")


# --- Losses


@dataclass(frozen=True)
class Huber(fn.Loss):
    """Half a square up to 1, linear beyond."""

    slope: float = 1.0

    def fwd(self, x, target):
        difference = x - target
        size = difference.abs()
        return torch.where(size < 1, size.square() / 2, size - 0.5).sum(), difference

    def bwd(self, residuals, grad=1.0):
        return residuals.clamp(-1, 1) * grad * self.slope


def test_a_loss_that_computes_in_float32_inside():
    """Its target is in the dtype of x, whatever that is tried in."""

    @dataclass(frozen=True)
    class Inside(fn.Loss):
        factor: float = 2.0

        def _fwd(self, x, target):
            difference = x.float() - target.float()
            return difference.square().sum().to(x.dtype), (difference, x)

        def _bwd(self, residuals, grad):
            difference, x = residuals
            return (self.factor * grad * difference).to(x.dtype)

    for dtype in (torch.bfloat16, torch.float32):
        x, target = (fn.normal(fn.key(i), (3, 4), dtype=dtype) for i in range(2))
        check_vjp(Inside(), x, target)
        with pytest.raises(GradientMismatch):
            check_vjp(Inside(2.2), x, target)


class AsNumber(Huber):
    """A Huber whose gradient is wrong where grad is a float."""

    def bwd(self, residuals, grad=1.0):
        return super().bwd(residuals, 2 * grad if isinstance(grad, float) else grad)


def test_losses():
    x, target = fn.normal(fn.key(0), (3, 4)), fn.normal(fn.key(1), (3, 4))
    for grad in (None, 2.5, torch.tensor(-0.5)):
        check_vjp(Huber(), x, target, grad=grad)
        with pytest.raises(GradientMismatch, match=r"the gradient for x\[\d, \d\] is wrong"):
            check_vjp(Huber(1.001), x, target, grad=grad)
    with pytest.raises(GradientMismatch, match="a grad that is a float changes the gradient"):
        check_vjp(AsNumber(), x, target)
    with pytest.raises(GradientMismatch) as caught:
        check_vjp(Huber(-1.0), x, target)
    with pytest.raises(GradientMismatch):
        exec(caught.value.snippet, {"Huber": Huber})


# --- Broken contracts


@dataclass(frozen=True)
class Broken(Elementwise):
    """The square of x, with a fault that is not a wrong number."""

    name: str = "square"
    fault: str = ""
    memory: ClassVar[dict[str, Any]] = {}

    def __call__(self, fault):
        return fault == self.fault

    def init(self, key, shape, *, dtype=None, device=None):
        if self("init draws"):
            return (torch.rand(1),)
        if self("init reads"):
            return (torch.tensor([float(torch.initial_seed())]),)
        if self("init reads numpy"):
            return (torch.tensor([float(np.random.get_state()[1][0])]),)
        if self("init reads random"):
            return (torch.tensor([float(random.getstate()[1][1])]),)
        return ()

    def out_shape(self, shape):
        return (*shape, 1) if self("out_shape") else tuple(shape)

    def apply(self, params, x, *, key=None):
        y = super().apply(params, x)
        return y * (1 + 1e-5) if self("apply") else y

    def vjp(self, params, x, grad, *, key=None, input_grad=True):
        if self("vjp writes to strided x") and not x.is_contiguous() and 0 not in x.stride():
            x.mul_(1.0)
        dparams, dx = super().vjp(params, x, grad, input_grad=input_grad)
        return dparams, dx * (1 + 1e-5) if self("vjp") and dx is not None else dx

    def fwd(self, params, x, *, key=None):
        self.memory["x"] = x
        self.memory["count"] = self.memory.get("count", 0) + 1
        y, residuals = super().fwd(params, x)
        if self("fwd writes"):
            x.mul_(1.0)
        if self("torch draws"):
            torch.rand(1)
        if self("numpy draws"):
            np.random.rand()
        if self("random draws"):
            random.random()
        if self("fwd differs"):
            y = y * (1 + 1e-16 * self.memory["count"]) + 1e-12 * self.memory["count"]
        if self("y dtype"):
            y = y.float()
        if self("y is x") or (self("y is strided x") and not x.is_contiguous()):
            y = x
        if self("offset of x"):
            y = x.as_strided(x.shape, x.stride(), 0) ** 2
        if self("y is a view of x"):
            y = x[...]
        return (y, residuals, None) if self("three results") else (y, residuals)

    def bwd(self, params, residuals, grad, *, input_grad=True):
        x = self.memory["x"] if self("hidden state") else residuals
        dparams, dx = super().bwd(params, x, grad, input_grad=input_grad)
        if self("bwd writes grad"):
            grad.mul_(1.0)
        if self("bwd writes residuals"):
            residuals.add_(0.0)
        if self("bwd marks x"):
            residuals.requires_grad_()
        if self("dx despite input_grad") and dx is None:
            dx = torch.zeros_like(x)
        if dx is None:
            return dparams, dx
        if self("dx shape"):
            dx = dx[None]
        if self("dx dtype"):
            dx = dx.float()
        if self("dx is grad"):
            dx = grad
        if self("no dx"):
            dx = None
        if self("layout") and grad.stride() != torch.empty(grad.shape).stride():
            dx = dx * (1 + 1e-3)
        if self("expanded") and 0 in grad.stride():
            dx = dx * (1 + 1e-3)
        dparams = ({},) if self("tree of dparams") else dparams
        if self("dx, dparams"):
            return dx, dparams
        return dparams, () if self("tree") else dx


FAULTS = {
    "init draws": "init: draws from the global random state of torch",
    "init reads": "init: the same key gives different parameters",
    "init reads numpy": "init: the same key gives different parameters",
    "init reads random": "init: the same key gives different parameters",
    "out_shape": r"fwd: expected y of shape \(3, 6, 1\), as out_shape says, got \(3, 6\)",
    "apply": "apply and fwd differ in y",
    "vjp": r"vjp and fwd \+ bwd differ for x",
    "fwd writes": "fwd: writes to x",
    "torch draws": "fwd: draws from the global random state of torch",
    "numpy draws": "fwd: draws from the global random state of numpy",
    "random draws": "fwd: draws from the global random state of random",
    "fwd differs": "fwd: called twice, gives two different answers for y",
    "y dtype": "fwd: expected y to be torch.float64 on cpu, got torch.float32",
    "y is x": "y shares memory with x",
    "y is strided x": "y shares memory with x",
    "vjp writes to strided x": "vjp: writes to x",
    "offset of x": "x in the memory layout 'offset' changes y",
    "y is a view of x": "y shares memory with x",
    "three results": r"fwd: expected a pair \(y, residuals\), got a tuple of 3",
    "hidden state": "state is kept between fwd and bwd",
    "bwd writes grad": "bwd: writes to grad",
    "bwd writes residuals": "bwd: writes to (residuals|x)",
    "bwd marks x": "bwd: writes to (residuals|x)",
    "dx despite input_grad": "expected dx to be None with input_grad=False, got Tensor",
    "dx shape": r"bwd: expected dx of shape \(3, 6\), got \(1, 3, 6\)",
    "dx dtype": "bwd: expected dx to be torch.float64 on cpu, got torch.float32",
    "dx is grad": "the gradient for x shares memory with grad",
    "no dx": "bwd: expected dx to be a tensor, got None",
    "layout": "grad in the memory layout 'strided' changes the gradient for x",
    "expanded": "grad in the memory layout 'expanded.*' changes the gradient for x",
    "tree": "bwd: expected dx to be a tensor, got a tuple of 0",
    "tree of dparams": "bwd: expected dparams with the tree of params",
    "dx, dparams": "bwd: expected dparams with the tree of params, .*, got a tensor: the order is",
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("limit", [3, 10, 30, 50])
@pytest.mark.parametrize("who", ["fwd", "bwd"])
def test_layers_that_count_their_calls(who, limit, dtype):
    calls = {"fwd": 0, "bwd": 0}

    def factor(method):
        calls[method] += 1
        return 1 + (who == method and calls[method] > limit)

    class Counting(fn.Layer):
        def _fwd(self, params, x, key):
            twice = factor("fwd")
            return twice * x**2, twice * x

        def _bwd(self, params, x, dy, need):
            return (), factor("bwd") * 2 * x * dy

    with pytest.raises(GradientMismatch):
        check_vjp(Counting(), (), fn.normal(fn.key(0), (4, 3), dtype=dtype))


def test_gradients_that_share_memory():
    @dataclass(frozen=True)
    class Twice(Plain):
        def init(self, key, shape, *, dtype=None, device=None):
            return {"a": torch.ones((), dtype=dtype), "b": torch.ones((), dtype=dtype)}

        def fwd(self, params, x, *, key=None):
            return (params["a"] + params["b"]) * x, x

        def bwd(self, params, x, grad, *, input_grad=True):
            both = (x * grad).sum()
            dx = (params["a"] + params["b"]) * grad if input_grad else None
            return {"a": both, "b": both}, dx

    x = fn.normal(fn.key(0), (3, 6), dtype=torch.float64)
    params = Twice().init(fn.key(0), (6,), dtype=torch.float64)
    with pytest.raises(GradientMismatch, match=r"for params\['a'\] and params\['b'\] share memory"):
        check_vjp(Twice(), params, x)


def test_a_tree_of_params_that_is_changed():
    @dataclass(frozen=True)
    class Casting(Dense):
        def fwd(self, params, x, *, key=None):
            params["weight"] = params["weight"].contiguous().clone()
            return super().fwd(params, x)

    @dataclass(frozen=True)
    class Caching(Dense):
        def fwd(self, params, x, *, key=None):
            y, residuals = super().fwd(params, x)
            params[f"z{len(params)}"] = y
            return y, residuals

    for layer in (Casting(), Caching()):
        with pytest.raises(GradientMismatch, match="fwd: changes the tree of params that it was"):
            check_vjp(layer, *case(layer))


def test_strides_that_are_changed():
    @dataclass(frozen=True)
    class Turning(Elementwise):
        def fwd(self, params, x, *, key=None):
            y, residuals = super().fwd(params, x.clone())
            x.t_()
            return y, residuals

    x = torch.full((3, 3), 2.0, dtype=torch.float64)
    with torch.inference_mode():  # its tensors have no version counter
        x = x.clone()
    with pytest.raises(GradientMismatch, match="fwd: writes to x"):
        check_vjp(Turning("square"), (), x)


def test_tensors_that_were_made_in_inference_mode():
    layer, loss = fn.Linear(2), fn.MSE()
    with torch.inference_mode():
        x = fn.normal(fn.key(0), (3, 4), dtype=torch.float64)
        params = layer.init(fn.key(1), (4,), dtype=torch.float64)
    check_vjp(layer, params, x)
    check_vjp(loss, x, 2 * x)
    check_function(torch.sin, x)


@pytest.mark.parametrize("batch", [1, 3])
def test_a_mask_that_is_kept_from_the_first_call(batch):
    """It is right for the first x that a check calls the layer with."""
    kept = {}

    class Masked:
        def mask(self, x):
            if x.shape[0] != batch:
                return x > 0
            return kept.setdefault(x.shape, x > 0)

    @dataclass(frozen=True)
    class Relu(Masked, fn.Layer):
        def _fwd(self, params, x, key):
            return x.clamp(min=0), self.mask(x)

        def _bwd(self, params, mask, dy, need):
            return (), dy * mask

    @dataclass(frozen=True)
    class Hinge(Masked, fn.Loss):
        def _fwd(self, x, target):
            return (x * target).clamp(min=0).sum(), (self.mask(x * target), target)

        def _bwd(self, residuals, grad):
            mask, target = residuals
            return grad * mask * target

    x, ones = fn.normal(fn.key(0), (batch, 5), dtype=torch.float64), torch.ones(batch, 5).double()
    with pytest.raises(GradientMismatch, match="the gradient for x"):
        check_vjp(Relu(), (), x)
    kept.clear()
    with pytest.raises(GradientMismatch, match="the gradient for x"):
        check_vjp(Hinge(), x, ones)


@pytest.mark.parametrize("fault", ["input_grad", "vjp"])
def test_faults_that_rounding_in_half_precision_hides(fault):
    @dataclass(frozen=True)
    class Half(Dense):
        def vjp(self, params, x, grad, *, key=None, input_grad=True):
            dparams, dx = super().vjp(params, x, grad, input_grad=input_grad)
            if fault == "vjp" or not input_grad:
                dparams["weight"][1, 1] *= 1 + 1e-4
            return dparams, dx

    x = fn.normal(fn.key(0), (3, 6), dtype=torch.bfloat16)
    params = Half().init(fn.key(1), (6,), dtype=torch.bfloat16)
    with pytest.raises(GradientMismatch, match=r"vjp.*params\['weight'\], at \[1, 1\]"):
        check_vjp(Half(), params, x)


@dataclass(frozen=True)
class Choosy(Dense):
    """A Dense whose bwd takes `param_grad`, with a fault where it is False."""

    fault: str = ""

    def bwd(self, params, residuals, grad, *, input_grad=True, param_grad=True):
        dparams, dx = super().bwd(params, residuals, grad, input_grad=input_grad)
        if param_grad:
            return dparams, dx
        if self.fault == "dx" and dx is not None:
            dx[1, 2] *= 1 + 1e-5
        return dparams if self.fault == "dparams" else None, dx

    def vjp(self, params, x, grad, *, key=None, **need):
        dparams, dx = self.bwd(params, self.fwd(params, x)[1], grad, **need)
        return () if self.fault == "vjp" and dparams is None else dparams, dx


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("dparams", "bwd: expected dparams to be None with param_grad=False, got dict"),
        ("dx", r"bwd: param_grad=False changes the gradient for x, at \[1, 2\]"),
        ("vjp", "vjp: expected dparams to be None with param_grad=False, got a tuple of 0"),
    ],
)
def test_param_grad_where_the_layer_takes_it(fault, message):
    check_vjp(Choosy(), *case(Choosy()))
    with pytest.raises(GradientMismatch, match=message):
        check_vjp(Choosy(fault=fault), *case(Choosy()))


@dataclass(frozen=True)
class Marked(Dense):
    """A Dense whose residuals hold a tensor without entries, in memory of its own or of x."""

    view: bool = False
    _fresh = True

    def fwd(self, params, x, *, key=None):
        y, (x, _) = super().fwd(params, x)
        return y, (x[None][:0] if self.view else x.new_empty(0, *x.shape), (x, y.clone()))

    def bwd(self, params, residuals, grad, *, input_grad=True):
        return super().bwd(params, residuals[1], grad, input_grad=input_grad)


@pytest.mark.parametrize("view", [False, True])
def test_residuals_without_entries(view):
    for dtype in (torch.float64, torch.float32):
        check_vjp(Marked(view=view), *case(Marked(), dtype=dtype))
        check_vjp(Marked(view=view), *case(Marked(), (0, 6), dtype))


@dataclass(frozen=True)
class Fresh(Plain):
    """⌊x⌋ + b, which promises that y and dx are memory of their own, and may lie."""

    lie: str = ""
    _fresh: ClassVar[bool] = True

    def init(self, key, shape, *, dtype=None, device=None):
        return {"bias": fn.normal(key, shape, dtype=dtype, device=device)}

    def fwd(self, params, x, *, key=None):
        if self.lie == "an expanded y":
            y = params["bias"].clone().expand(x.shape)
        else:
            y = x.floor() + params["bias"]
        if self.lie == "y of an expanded x" and x.stride() == (0, 0):
            y = y[:1].clone().expand(x.shape)
        kept = {"y": y[:1], "a transposed y": y.T.contiguous()}.get(self.lie, y.clone())
        return y, {"kept": kept, "zeros": torch.zeros_like(x)}

    def bwd(self, params, residuals, grad, *, input_grad=True):
        both = torch.cat([residuals["zeros"], grad.sum(0)[None]])
        dbias, dx = both[-1], residuals["zeros"] if self.lie == "dx" else both[:-1]
        dbias = dbias if self.lie == "dparams" else dbias.clone()
        is_expanded = self.lie == "dx of an expanded grad" and 0 in grad.stride()
        if is_expanded or self.lie == "an expanded dx":
            dx = dx[:1].clone().expand(dx.shape)
        return {"bias": dbias}, dx if input_grad else None


@dataclass(frozen=True)
class Modest(Fresh):
    """The same without the promise."""

    _fresh: ClassVar[bool] = False


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ("y", r"y of fwd shares memory with residuals\['kept'\] \(Fresh declares _fresh\)"),
        ("a transposed y", r"y of fwd shares memory with residuals\['kept'\]"),
        ("dx", r"dx of bwd shares memory with residuals\['zeros'\] \(Fresh declares _fresh\)"),
        ("dparams", r"dx of bwd shares memory with dparams\['bias'\] \(Fresh declares _fresh\)"),
        (
            "an expanded y",
            r"y of fwd has several entries in one place in memory \(Fresh declares _fresh\)",
        ),
        ("an expanded dx", r"dx of bwd has several entries in one place in memory"),
        ("y of an expanded x", r"y of fwd has several entries in one place in memory"),
        ("dx of an expanded grad", r"dx of bwd has several entries in one place in memory"),
    ],
)
def test_the_promise_that_results_are_fresh(lie, message):
    params, x = case(Fresh())
    check_vjp(Fresh(), params, x)
    check_vjp(Modest(lie), params, x)
    with pytest.raises(GradientMismatch, match=message):
        check_vjp(Fresh(lie), params, x)


@dataclass(frozen=True)
class Windows(Plain):
    """y = e^x in pairs of neighbours, kept where no tree of tensors shows it."""

    lie: str = ""
    _fresh = True

    def out_shape(self, shape):
        return (shape[0] - 1, 2)

    def fwd(self, params, x, *, key=None):
        pairs = x.exp().unfold(1, 2, 1)
        y = pairs if self.lie == "overlap" else pairs.clone()
        kept = y if self.lie == "y" else y.clone()
        return y, SimpleNamespace(y=kept, dx=torch.empty_like(x))

    def bwd(self, params, kept, grad, *, input_grad=True):
        terms = kept.y * grad
        dx = kept.dx if self.lie == "dx" else torch.empty_like(kept.dx)
        torch.add(F.pad(terms[..., 0], (0, 1)), F.pad(terms[..., 1], (1, 0)), out=dx)
        return (), dx if input_grad else None


@dataclass(frozen=True)
class Constant(Plain):
    """y = 0, dx = 0, one of which may be kept from call to call."""

    lie: str = ""
    _fresh = True

    def fwd(self, params, x, *, key=None):
        return kept_zeros(x) if self.lie == "y" else torch.zeros_like(x), None

    def bwd(self, params, residuals, grad, *, input_grad=True):
        dx = kept_zeros(grad) if self.lie == "dx" else torch.zeros_like(grad)
        return (), dx if input_grad else None


def kept_zeros(like, kept={}):  # noqa: B006
    return kept.setdefault((like.shape, like.dtype), torch.zeros_like(like))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        (Windows("overlap"), "y of fwd has several entries in one place in memory"),
        (Windows("y"), "y of fwd is kept"),
        (Windows("dx"), "dx of bwd shares memory with dx of bwd of another call"),
        (Constant("y"), "y of fwd shares memory with y of fwd of another call"),
        (Constant("dx"), "dx of bwd shares memory with dx of bwd of another call"),
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_the_promise_where_no_tree_shows_what_is_kept(layer, message, dtype):
    params, x = case(layer, dtype=dtype)
    check_vjp(type(layer)(), params, x)
    with pytest.raises(
        GradientMismatch, match=rf"{message} \({type(layer).__name__} declares _fresh\)"
    ):
        check_vjp(layer, params, x)


@dataclass(frozen=True)
class InPlace(fn.Layer):
    """y = |x| + b, also in place, with a fault in place."""

    fault: str = ""

    def _params(self, shape):
        return {"bias": fn.Param((), fn.initializers.Zeros())}

    def _fwd(self, params, x, key):
        return x.abs() + params["bias"], x.sign()

    def _bwd(self, params, sign, grad, need):
        return {"bias": grad.sum()}, sign * grad

    def _fwd_(self, params, x, key):
        sign = x.sign()
        y = (x if self.fault == "_fwd_" else x.abs_()).add_(params["bias"])
        return y, y.sign() if self.fault == "signs" else sign

    def _bwd_(self, params, sign, grad, need):
        if self.fault == "raises":
            raise RuntimeError("no")
        dparams = {"bias": grad.sum()}
        dx = grad.mul_(-sign if self.fault == "_bwd_" else sign)
        if self.fault == "kept":
            sign.mul_(2)
        if self.fault == "params":
            params["bias"].add_(1)
        return dparams, dx


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("_fwd_", "_fwd_ and fwd differ in y"),
        ("_bwd_", "_bwd_ and bwd differ"),
        ("signs", "_fwd_ with bwd and fwd with bwd differ"),
        ("kept", "called twice, _bwd_ and bwd differ"),
        ("params", "_fwd_ or _bwd_: writes to params"),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_twins_that_work_in_place(fault, message, dtype):
    x = fn.normal(fn.key(0), (3, 4), dtype=dtype)
    params = InPlace().init(fn.key(1), (4,), dtype=dtype)
    check_vjp(InPlace(), params, x)
    with pytest.raises(GradientMismatch, match=message) as caught:
        check_vjp(InPlace(fault), params, x)
    assert caught.value.layer == InPlace(fault)


def test_a_twin_that_raises():
    with pytest.raises(RuntimeError, match="no") as caught:
        check_vjp(InPlace("raises"), InPlace().init(fn.key(1), (3,)), torch.ones(2, 3))
    if hasattr(caught.value, "add_note"):  # from Python 3.11 on
        assert "raised by _fwd_ or _bwd_" in caught.value.__notes__[0]


def test_broken_is_right_without_a_fault():
    check_vjp(Broken(), *case(Broken()))


@pytest.mark.parametrize("fault", FAULTS)
def test_broken_contracts_are_named(fault):
    layer = Broken(fault=fault)
    x = fn.normal(fn.key(0), (3, 6), dtype=torch.float64)
    with pytest.raises(GradientMismatch, match=FAULTS[fault]) as caught:
        check_vjp(layer, (), x)
    assert caught.value.layer == layer
    assert "To replay it:" in str(caught.value)


def test_a_batch_of_0_should_work():
    @dataclass(frozen=True)
    class Reshaping(Flatten):
        def fwd(self, params, x, *, key=None):
            return x.clone().reshape(len(x), -1), x.shape

    check_vjp(Flatten(), (), torch.ones(2, 3, 4))
    with pytest.raises(GradientMismatch, match="a batch of 0 should work, and raises RuntimeError"):
        check_vjp(Reshaping(), (), torch.ones(2, 3, 4))


def test_a_warning_about_a_batch_of_0_is_no_error():
    """torch warns of the variances of no rows; the caller may have asked for no empty batch."""

    @dataclass(frozen=True)
    class Standardised(fn.Layer):
        def _fwd(self, params, x, key):
            scale = (x.var(1, unbiased=False, keepdim=True) + 0.1).rsqrt()
            y = (x - x.mean(1, keepdim=True)) * scale
            return y, (y, scale)

        def _bwd(self, params, residuals, dy, need):
            y, scale = residuals
            return (), scale * (dy - dy.mean(1, keepdim=True) - y * (dy * y).mean(1, keepdim=True))

    check_vjp(Standardised(), (), fn.normal(fn.key(0), (3, 4)))


def test_what_is_wrong_in_a_batch_of_0_is_shown():
    @dataclass(frozen=True)
    class Averaging(fn.Layer):
        def _params(self, shape):
            return {"weight": fn.Param((2,), fn.initializers.Ones())}

        def _fwd(self, params, x, key):
            return params["weight"] * x, x

        def _bwd(self, params, x, dy, need):
            dweight = (x * dy).sum(0)
            if not len(x):
                dweight = torch.tensor([0.0, math.nan]).to(dweight)
            return {"weight": dweight}, params["weight"] * dy

    layer = Averaging()
    with pytest.raises(GradientMismatch, match="batch of 0 should be 0, got nan"):
        check_vjp(layer, layer.init(fn.key(0), (2,)), torch.ones(3, 2))


@pytest.mark.parametrize("way", ["no_grad", "requires_grad"])
def test_y_does_not_depend_on_whether_autograd_records(way):
    @dataclass(frozen=True)
    class Hurried(fn.Layer):
        def _fwd(self, params, x, key):
            hurries = x.requires_grad if way == "requires_grad" else not torch.is_grad_enabled()
            return x * (1.01 if hurries else 1), ()

        def _bwd(self, params, residuals, dy, need):
            return (), dy.clone()

    with pytest.raises(GradientMismatch, match="autograd records") as caught:
        check_vjp(Hurried(), (), torch.ones(3, 2))
    assert way in str(caught.value)


def test_the_working_dtype_is_held_to_float64():
    """A float32 layer rounds to half precision on its way, a float64 one does not."""

    @dataclass(frozen=True)
    class Coarse(Dense):
        def bwd(self, params, residuals, grad, *, input_grad=True):
            dparams, dx = super().bwd(params, residuals, grad, input_grad=input_grad)
            if grad.dtype == torch.float32:
                dparams["weight"] = dparams["weight"].bfloat16().float()
            return dparams, dx

    check_vjp(Coarse(), *case(Coarse()))
    error = mismatch(Coarse(), dtype=torch.float32)
    assert "in torch.float32, the gradient for params['weight'] is further" in str(error)
    assert "x = fn.normal(fn.key(1), (1, 6), dtype=torch.float32)" in error.snippet


# --- Other exceptions


def test_exceptions_of_the_layer_pass_unchanged():
    class OwnError(Exception):
        pass

    for method in ("fwd", "bwd", "out_shape", "init"):
        error = OwnError(method)

        def fail(self, *args, error=error, **kwargs):
            raise error

        failing = type("Failing", (Dense,), {method: fail})()
        params, x = case(Dense())
        with pytest.raises(OwnError) as caught:
            check_vjp(failing, params, x)
        assert caught.value is error


@dataclass(frozen=True)
class Picky(Dense):
    """A layer that raises where its name says so."""

    name: str = ""

    def apply(self, params, x, *, key=None):
        if self.name == "x" and not x.is_contiguous():
            raise OSError("no strides")
        if self.name == "float64" and x.dtype == torch.float64:
            raise OSError("float32 alone")
        return super().apply(params, x)

    def bwd(self, params, residuals, grad, *, input_grad=True):
        if self.name == "grad" and 0 in grad.stride():
            raise OSError("no strides of 0")
        if self.name == "bwd" and grad.dtype == torch.float64:
            raise OSError("float32 alone")
        return super().bwd(params, residuals, grad, input_grad=input_grad)


@pytest.mark.skipif(not hasattr(Exception, "add_note"), reason="notes came with Python 3.11")
@pytest.mark.parametrize(
    ("name", "note"),
    [
        ("x", "x in the memory layout 'strided' changes the result to this exception"),
        ("grad", "grad in the memory layout 'expanded' changes the result to this exception"),
        ("float64", "raised in float64, in which gradients are checked"),
        ("bwd", "raised in float64, in which gradients are checked"),
    ],
)
def test_an_exception_where_the_check_leaves_the_case_says_where(name, note):
    with pytest.raises(OSError, match=r"no strides|float32 alone") as caught:
        check_vjp(Picky(name=name), *case(Dense(), dtype=torch.float32))
    (found,) = caught.value.__notes__
    assert found.startswith(f"check_vjp: {note}")


def test_bad_arguments():
    params, x = case(Dense())
    with pytest.raises(
        TypeError, match=r"expected x to be a floating-point tensor, got torch\.int64"
    ):
        check_vjp(fn.MSE(), x.long(), x)
    with pytest.raises(TypeError, match="expected a layer or a loss, got int"):
        check_vjp(3, params, x)
    with pytest.raises(TypeError, match="expected params of tensors, got float"):
        check_vjp(Dense(), {**params, "bias": 1.0}, x)
    with pytest.raises(ValueError, match=r"expected grad of y's shape, \(3, 4\), got \(4, 3\)"):
        check_vjp(Dense(), params, x, grad=torch.ones(4, 3, dtype=x.dtype))


# --- Gradients that jump where a nudge by a rounding moves x or the residuals


@dataclass(frozen=True, eq=False)
class Jumping(fn.Layer):
    """y = f(x), whose gradient is `factor` times too large where `is_special`."""

    f: Any
    slope: Any
    is_special: Any = lambda x, y: torch.ones_like(x, dtype=torch.bool)
    factor: float = 1.0

    def _out_shape(self, shape):
        return tuple(self.f(torch.zeros(1, *shape)).shape[1:])

    def _fwd(self, params, x, key):
        y = self.f(x)
        return y, (x, y.clone())

    def _bwd(self, params, residuals, dy, need):
        x, y = residuals
        slope = self.slope(x, y)
        dy = dy.reshape(*dy.shape, *(1,) * (x.ndim - dy.ndim))
        return (), dy * torch.where(self.is_special(x, y), self.factor * slope, slope)


DRAWN = fn.normal(fn.key(1), (3, 8))
JUMPS = {
    "a maximum found by ==": (
        lambda x: x.amax(-1),
        lambda x, y: (x == y.unsqueeze(-1)).to(x),
        Jumping.is_special,
        DRAWN,
    ),
    "a clamp found by ==": (
        lambda x: x.clamp(-0.5, 0.5),
        lambda x, y: (x == y).to(x),
        Jumping.is_special,
        DRAWN,
    ),
    "whole numbers": (
        torch.sin,
        lambda x, y: x.cos(),
        lambda x, y: x == x.round(),
        torch.arange(1.0, 7.0).reshape(2, 3),
    ),
}


@pytest.mark.parametrize("factor", [1.0, 1.01, 3.0, -1e6])
@pytest.mark.parametrize("name", JUMPS)
def test_what_jumps_is_no_rounding(name, factor):
    *functions, x = JUMPS[name]
    layer = Jumping(*functions, factor)
    if factor == 1:
        check_vjp(layer, (), x)
        return
    with pytest.raises(GradientMismatch, match="is wrong"):
        check_vjp(layer, (), x)


@pytest.mark.parametrize("slope", [0.0, 0.5, 1.0, 5.0, -0.5, 1e9])
def test_a_slope_at_a_kink_lies_between_its_sides(slope):
    layer = Jumping(
        lambda x: (x - 1).relu(), lambda x, y: torch.where(x == 1, slope, (x > 1).to(x))
    )
    x = torch.tensor([[1.0, 0.3, 2.0]])
    if 0 <= slope <= 1:
        check_vjp(layer, (), x)
        return
    with pytest.raises(GradientMismatch, match="is wrong"):
        check_vjp(layer, (), x)


def test_writes_to_x_are_seen_without_a_grad():
    class Clipped(fn.Layer):
        def _fwd(self, params, x, key):
            numbers = x.detach().numpy()
            np.maximum(numbers, 0, out=numbers)
            return torch.from_numpy(2 * numbers), x.clone()

        def _bwd(self, params, x, dy, need):
            return (), 2 * dy * (x > 0)

    with pytest.raises(GradientMismatch, match="fwd: writes to x"):
        check_vjp(Clipped(), (), DRAWN.clone())


def test_writes_to_a_target_are_seen_and_put_back():
    class Clipping(fn.Loss):
        def _fwd(self, x, target):
            numbers = target["of"].numpy()
            np.maximum(numbers, 0, out=numbers)
            return (x * target["of"]).sum(), target["of"].clone()

        def _bwd(self, target, grad):
            return grad * target

        def _check(self, x, target):
            pass

    target = {"of": DRAWN.clone()}
    with pytest.raises(GradientMismatch, match=r"fwd: writes to target\['of'\]"):
        check_vjp(Clipping(), DRAWN, target)
    assert target["of"].equal(DRAWN)


def test_what_a_refused_layer_has_written_is_put_back():
    class Writes(Elementwise):
        def bwd(self, params, residuals, grad, *, input_grad=True):
            result = super().bwd(params, residuals, grad.clone(), input_grad=input_grad)
            residuals.zero_()
            grad.zero_()
            return result

    x, grad = DRAWN.clone(), DRAWN.clone() + 1
    with pytest.raises(GradientMismatch, match="bwd: writes to x"):
        check_vjp(Writes("square"), (), x, grad)
    assert x.equal(DRAWN)
    assert grad.equal(DRAWN + 1)

    def writes(x):
        return x.zero_().sin()

    with pytest.raises(GradientMismatch, match="writes to"):
        check_function(writes, x)
    assert x.equal(DRAWN)


def test_a_layer_that_adds_to_its_params_is_told_so():
    class Counting(fn.Layer):
        def _fwd(self, params, x, key):
            params["calls"] = params.get("calls", 0) + 1
            return x * params["weight"], x

        def _bwd(self, params, x, dy, need):
            return {"weight": (dy * x).sum()}, dy * params["weight"]

        def _params(self, shape):
            return {"weight": fn.Param((), fn.initializers.Ones())}

    with pytest.raises(GradientMismatch, match="fwd: changes the tree of params"):
        check_vjp(Counting(), {"weight": torch.tensor(2.0)}, DRAWN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_search_for_a_case_to_replay_is_short(dtype):
    """A gradient that is wrong for 3 examples alone is right in the smaller batches tried."""
    counts = []

    def counted(x):
        counts.append(len(x))
        return x.tanh()

    def is_three(x, y):
        return torch.full_like(x, len(x) == 3, dtype=torch.bool)

    x = DRAWN.to(dtype)
    check_vjp(Jumping(counted, lambda x, y: 1 - y * y, is_three), (), x)
    right = len(counts)
    with pytest.raises(GradientMismatch, match="the gradient for x"):
        check_vjp(Jumping(counted, lambda x, y: 1 - y * y, is_three, 1.01), (), x)
    assert len(counts) - right <= 2 * right


@pytest.mark.parametrize(("dtype", "factor"), [(torch.float32, 1.001), (torch.bfloat16, 3.0)])
def test_what_is_cast_is_held_to_the_dtype_inside(dtype, factor):
    net = fn.Cast(fn.Sequential(fn.Linear(5), fn.Tanh(), fn.Linear(4)), dtype)
    check_vjp(net, net.init(fn.key(0), (8,)), DRAWN)
    wrong = fn.Cast(Jumping(lambda x: 2 * x, lambda x, y: torch.full_like(x, 2 * factor)), dtype)
    with pytest.raises(GradientMismatch, match=f"in {dtype}, the gradient is wrong"):
        check_vjp(wrong, (), DRAWN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wrong", [lambda dy: dy.sum() < 0, lambda dy: not dy.any()])
def test_what_is_cast_and_not_linear_in_grad(dtype, wrong):
    """At the grad that is given, it is right."""

    @dataclass(frozen=True)
    class Clipping(Passing):
        def bwd(self, params, residuals, grad, **need):
            dparams, dx = super().bwd(params, residuals, grad, **need)
            return dparams, None if dx is None else dx + 1 if wrong(grad) else dx

    layer = Clipping(fn.Cast(fn.Tanh(), dtype))
    with pytest.raises(GradientMismatch, match="the gradient for x is not linear in grad"):
        check_vjp(layer, (), DRAWN, grad=torch.ones_like(DRAWN))


def test_a_gradient_with_a_part_in_float32_is_told_so():
    """A bool over an int is float32, which a number that is multiplied by it does not widen."""

    @dataclass(frozen=True)
    class MeanOfPositive(fn.Loss):
        def _fwd(self, x, target):
            return x.clamp(min=0).square().mean(), (x, x > 0)

        def _bwd(self, residuals, grad):
            x, is_positive = residuals
            return 2 * x * (is_positive / x.numel() * grad)

    with pytest.raises(GradientMismatch, match=r"not linear in grad, by \de-\d+ .* in float32\?"):
        check_vjp(MeanOfPositive(), fn.normal(fn.key(0), (3, 5)), torch.zeros(3, 5))


def test_a_smaller_error_is_not_taken_for_float32():
    class Squared(fn.Layer):
        def _fwd(self, params, x, key):
            return 3 * x, ()

        def _bwd(self, params, residuals, dy, need):
            return (), 3 * dy + 1e-9 * dy * dy.abs()

    with pytest.raises(GradientMismatch, match=r"the gradient for x is not linear in grad\n"):
        check_vjp(Squared(), (), DRAWN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [fn.ReLU(), fn.Tanh()])
def test_the_gradient_of_each_leaf_of_what_is_cast(dtype, activation):
    """Kinks and rounding leave no step that finds the derivative well."""

    @dataclass(frozen=True)
    class Scaled(Passing):
        factor: float = 1.0

        def bwd(self, params, residuals, grad, **need):
            dparams, dx = super().bwd(params, residuals, grad, **need)
            return dparams, None if dx is None else self.factor * dx

    cast = fn.Cast(fn.Sequential(fn.Conv2d(4, 3, padding=1), activation), dtype)
    for seed in range(2):
        x, params = fn.normal(fn.key(100 + seed), (2, 4, 6, 6)), cast.init(fn.key(seed), (4, 6, 6))
        check_vjp(Scaled(cast), params, x)
        for factor in (-1.0, 0.0, 2.0):
            with pytest.raises(GradientMismatch, match=f"in {dtype}, the gradient is wrong.* of x"):
                check_vjp(Scaled(cast, factor), params, x)


@pytest.mark.parametrize("seed", [12, 25, 54])
def test_kinks_between_the_steps_of_what_is_cast(seed):
    """Long steps cross them, and agree by chance."""
    net = fn.Cast(fn.Sequential(fn.Conv2d(4, 3, padding=1), fn.ReLU()), torch.float32)
    x = fn.normal(fn.key(100 + seed), (2, 4, 6, 6))
    check_vjp(net, net.init(fn.key(seed % 7), (4, 6, 6)), x)


def test_frozen_layers_of_what_is_cast():
    net = fn.Cast(fn.Sequential(fn.Frozen(fn.Linear(4)), fn.Tanh()), torch.bfloat16)
    check_vjp(net, net.init(fn.key(0), (8,)), DRAWN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("head", [fn.Linear(2), fn.Identity()])
def test_a_part_of_a_network_that_is_cast(dtype, head):
    """Its head computes in x's dtype."""
    body = fn.Cast(fn.Sequential(fn.Linear(5), fn.Tanh()), dtype)
    for net in (fn.Sequential(body, head), fn.Sum(body, fn.Linear(5))):
        check_vjp(net, net.init(fn.key(0), (8,)), DRAWN)
    wrong = fn.Sequential(Jumping(torch.tanh, lambda x, y: -1 - y * y), body, head)
    with pytest.raises(GradientMismatch, match=f"in {dtype}, the gradient is wrong"):
        check_vjp(wrong, wrong.init(fn.key(0), (8,)), DRAWN)


@pytest.mark.parametrize("eps", [1e-6, 1e-12])
@pytest.mark.parametrize("factor", [1.0, 2.0])
def test_a_steep_layer_before_a_part_that_is_cast(eps, factor):
    """At zeros, x / sqrt(x² + eps) bends within far less than the steps for bfloat16."""
    norm = Jumping(lambda x: x / (x * x + eps).sqrt(), lambda x, y: factor * (1 - y * y) / eps**0.5)
    net = fn.Sequential(norm, fn.Cast(fn.Linear(3), torch.bfloat16))
    params, x = net.init(fn.key(0), (8,)), torch.zeros_like(DRAWN)
    if factor == 1:
        check_vjp(net, params, x)
    else:
        with pytest.raises(GradientMismatch, match="the gradient is wrong"):
            check_vjp(net, params, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_a_cast_of_what_is_flat_at_zero_alone(dtype, factor):
    """Steps that agree cross the bend of x³ / (x² + eps) at 0, and shorter ones do not agree."""

    @dataclass(frozen=True)
    class Squash(Passing):
        def bwd(self, params, residuals, grad, **need):
            dparams, dx = super().bwd(params, residuals, grad, **need)
            return dparams, None if dx is None else dx + (factor - 1) * grad

    bent = Jumping(
        lambda x: x**3 / (x * x + 1e-3), lambda x, y: x * x * (x * x + 3e-3) / (x * x + 1e-3) ** 2
    )
    check_vjp(fn.Cast(bent, dtype), (), DRAWN)
    if factor == 1:
        check_vjp(Squash(fn.Cast(bent, dtype)), (), torch.zeros_like(DRAWN))
    else:
        with pytest.raises(GradientMismatch, match="the gradient is wrong"):
            check_vjp(Squash(fn.Cast(bent, dtype)), (), torch.zeros_like(DRAWN))


def test_a_cast_of_what_underflows():
    """y is 0 in float32, and so is every step."""
    cube = Jumping(lambda x: x**3, lambda x, y: 3 * x * x)
    check_vjp(fn.Cast(cube, torch.float32), (), 1e-18 * DRAWN)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_is_cast_and_flat(dtype):
    flat = fn.Sequential(fn.LeakyReLU(0.0), fn.Hardtanh())
    for layer, x in (
        (fn.Softmax(1), DRAWN[:, :1]),
        (flat, -DRAWN.abs()),
        (fn.Sigmoid(), DRAWN - 900),
    ):
        cast = fn.Cast(layer, dtype)
        check_vjp(cast, cast.init(fn.key(0), x.shape[1:]), x)
    wrong = fn.Cast(Jumping(torch.ones_like, lambda x, y: torch.ones_like(x)), dtype)
    with pytest.raises(GradientMismatch, match=f"in {dtype}, the gradient is wrong"):
        check_vjp(wrong, (), DRAWN)


def test_a_cast_of_what_does_not_depend_on_the_inputs():
    """Noise may be drawn in float64 and cast: the rest is held to float64."""

    @dataclass(frozen=True)
    class Noisy(fn.Layer):
        factor: float = 1.0

        def _fwd(self, params, x, key):
            noise = torch.linspace(0, 1, x.shape[1], dtype=torch.float64).float()
            return torch.tanh(x + noise), x + noise

        def _bwd(self, params, x, dy, need):
            return (), self.factor * dy * (1 - x.tanh() ** 2)

    check_vjp(Noisy(), (), DRAWN)
    with pytest.raises(GradientMismatch, match="is wrong"):
        check_vjp(Noisy(1 + 1e-5), (), DRAWN.double())


@pytest.mark.parametrize("limit", [{"rtol": -1.0}, {"atol": -1e-9}, {"budget": 0.0}], ids=str)
def test_limits_that_nothing_can_keep(limit):
    (name,) = limit
    with pytest.raises(ValueError, match=f"check_vjp: expected .*{name}"):
        check_vjp(fn.ReLU(), (), DRAWN, **limit)
    with pytest.raises(ValueError, match=f"check_function: expected .*{name}"):
        check_function(torch.relu, DRAWN, **limit)


def test_nothing_that_is_infinite_can_be_checked():
    with pytest.raises(ValueError, match="check_function: expected a gradient that can be checked"):
        check_function(lambda x: x * math.inf, torch.ones(2))


def test_arguments_by_position():
    check_vjp(fn.ReLU(), (), DRAWN, torch.ones_like(DRAWN))
    with pytest.raises(ValueError, match="budget"):
        check_vjp(fn.ReLU(), (), DRAWN, None, fn.key(0), -1.0)
