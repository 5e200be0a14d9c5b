"""The base class: what it derives from what authors write, what it remembers, who checks what."""

import copy
import pickle
import re
import threading
from dataclasses import dataclass
from fractions import Fraction
from itertools import product
from typing import Any

import numpy as np
import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from registry import make
from test_properties import close, same
from test_transforms import compile_whole

import funcnet as fn
from funcnet.fields import Flag, Sizes
from funcnet.initializers import Normal, Ones, Uniform
from funcnet.layer import Spec, public_bwd, spec_of_y
from funcnet.ops.need import Need
from funcnet.testing import GradientMismatch, check_vjp, strategies

NET = fn.Sequential(fn.Conv2d(4, 3, padding=1), fn.ReLU(), fn.UpsampleConv2d(2))


@dataclass(frozen=True)
class Affine(fn.Layer):
    """y = a ∘ x + b, written as an author writes a layer."""

    bias: Flag = True

    _axes = "CHW"
    _fresh = True

    def _params(self, shape):
        params = {"scale": {"weight": fn.Param((shape[0], 1, 1), Ones())}}
        return params | ({"bias": fn.Param((shape[0], 1, 1), Uniform(-1, 1))} if self.bias else {})

    def _fwd(self, params, x, key):
        y = params["scale"]["weight"] * x
        return y + params["bias"] if self.bias else y, x

    def _bwd(self, params, x, dy, need):
        dparams = None
        if need.params:
            dparams = {"scale": {"weight": (x * dy).sum((0, 2, 3))[:, None, None]}}
            if self.bias:
                dparams["bias"] = dy.sum((0, 2, 3))[:, None, None]
        return dparams, params["scale"]["weight"] * dy if need.input else None


@dataclass(frozen=True)
class Public(fn.Layer):
    """y = w · x, written by the public four, with a `bwd` that knows nothing of `param_grad`."""

    promise: int = 0
    calls: Any = None

    def init(self, key, shape, *, dtype=None, device=None):
        return {"w": torch.full((), 2.0, dtype=dtype, device=device)}

    def out_shape(self, shape):
        return (*shape[:-1], shape[-1] + self.promise)

    def fwd(self, params, x, *, key=None):
        return params["w"] * x, x

    def bwd(self, params, x, grad, *, input_grad=True):
        if self.calls is not None:
            self.calls.append("bwd")
        return {"w": (x * grad).sum()}, params["w"] * grad if input_grad else None


@dataclass(frozen=True)
class Two(fn.Layer):
    """Layers in two fields."""

    left: fn.Layer
    right: fn.Layer
    factor: float = 1.0

    def _fwd(self, params, x, key):
        raise NotImplementedError


@dataclass(frozen=True)
class Many(fn.Layer):
    """Layers in a tuple."""

    layers: tuple[fn.Layer, ...]

    def _fwd(self, params, x, key):
        raise NotImplementedError


@dataclass(frozen=True)
class Careless(fn.Layer):
    """y = w · x, with all gradients whatever is needed."""

    def _check_x(self, x):
        pass

    def _params(self, shape):
        return {"w": fn.Param((), Ones())}

    def _fwd(self, params, x, key):
        return params["w"] * x, (x, x.is_floating_point())

    def _bwd(self, params, residuals, dy, need):
        x, is_floating_point = residuals
        assert need.params or need.input
        assert need.input <= is_floating_point
        return {"w": (x * dy).sum()}, params["w"] * dy


# --- What is derived


@pytest.mark.parametrize("layer", [Affine(), Affine(bias=False)], ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_layer_that_writes_mathematics_alone(layer, dtype):
    params, x, grad = make(layer, (3, 4, 5), dtype=dtype)
    check_vjp(layer, params, x, grad=grad)
    check_vjp(fn.Sequential(fn.Conv2d(2, 1), layer, fn.ReLU()), *_made((3, 4, 5), layer, dtype))
    assert repr(layer) == ("Affine()" if layer.bias else "Affine(bias=False)")
    assert "3" in fn.summary(layer, (3, 4, 5))


def _made(shape, layer, dtype):
    net = fn.Sequential(fn.Conv2d(2, 1), layer, fn.ReLU())
    params, x, _ = make(net, shape, dtype=dtype)
    return params, x


def test_parameters_are_drawn_in_the_order_they_are_declared():
    weight_key, bias_key = fn.split(fn.key(0))
    params = fn.Conv2d(2, 3).init(fn.key(0), (4, 8, 8))
    bound = (4 * 9) ** -0.5
    assert torch.equal(params["weight"], fn.uniform(weight_key, (2, 4, 3, 3), -bound, bound))
    assert torch.equal(params["bias"], fn.uniform(bias_key, (2,), -bound, bound))


def test_gradients_are_in_the_order_of_params():
    """Whatever order the author writes."""

    @dataclass(frozen=True)
    class Backwards(Affine):
        def _bwd(self, params, x, dy, need):
            dparams, dx = super()._bwd(params, x, dy, need)
            return dict(reversed(dparams.items())), dx

    for net in (Backwards(), fn.Sequential(Backwards(), fn.ReLU())):
        params, x, grad = make(net, (3, 4, 5))
        dparams, _ = net.vjp(params, x, grad)
        own, of_own = (params, dparams) if net == Backwards() else (params[0], dparams[0])
        assert list(of_own) == list(own) == ["scale", "bias"]


def test_nested_parameters_are_named_in_messages():
    layer = Affine()
    params, x, _ = make(layer, (3, 4, 5))
    wrong = {**params, "scale": {"weight": torch.ones(1, 3, 1)}}
    with pytest.raises(ValueError, match=r"expected scale.weight of shape \(3, 1, 1\), got \(1, 3"):
        layer.apply(wrong, x)
    with pytest.raises(TypeError, match=r"expected scale\.weight to have the dtype and dev"):
        layer.apply({**params, "scale": {"weight": torch.ones(3, 1, 1, dtype=torch.int64)}}, x)
    with pytest.raises(TypeError, match="expected scale to be a dict with keys 'weight', got tup"):
        layer.apply({**params, "scale": ()}, x)
    with pytest.raises(ValueError, match=r"expected x of shape \(N, 3, H, W\), got \(2, 5, 4, 5\)"):
        layer.apply(params, torch.ones(2, 5, 4, 5))


def test_the_first_of_several_wrong_parameters_is_named():
    params, x, _ = make(Affine(), (3, 4, 5))
    wrong = {"scale": {"weight": torch.ones(1, 3, 1)}, "bias": torch.ones(7)}
    assert list(wrong) == list(params)
    with pytest.raises(ValueError, match=r"expected scale.weight of shape"):
        Affine().apply(wrong, x)

    @dataclass(frozen=True)
    class BiasFirst(Affine):
        def _params(self, shape):
            return dict(reversed(super()._params(shape).items()))

    with pytest.raises(ValueError, match=r"expected bias of shape"):
        BiasFirst().apply({"bias": torch.ones(7), "scale": params["scale"]}, x)
    conv = fn.Conv2d(2, 3)
    with pytest.raises(ValueError, match=r"expected weight of shape"):
        conv.apply({"weight": torch.ones(2, 3, 5, 4), "bias": torch.ones(7)}, x)


def test_a_memory_format_is_asked_for_by_the_whole_name():
    asked = []

    class Asking(Affine):
        def _layout(self, name):
            asked.append(name)

    Asking().init(fn.key(0), (3, 4, 5))
    assert asked == ["scale.weight", "bias"]


ZEROS = fn.initializers.Zeros


def declaring(declared):
    @dataclass(frozen=True)
    class Declaring(fn.Layer):
        def _params(self, shape):
            return declared

        def _fwd(self, params, x, key):
            return x, ()

    return Declaring()


@pytest.mark.parametrize(
    ("declared", "got"),
    [
        ([fn.Param((2,), ZEROS())], "dict of fn.Param by name, got [Param("),
        ({"weight": ((2,), ZEROS())}, "for weight, got ((2,), initializers.Zeros())"),
        ({"weight": fn.Param((2,), ZEROS)}, "got Param(shape=(2,), initializer=<class"),
        ({"weight": fn.Param((2,), 0.5)}, "for weight, got Param(shape=(2,), initializer=0.5)"),
        ({"inner": {"weight": torch.zeros(2)}}, "for inner.weight, got tensor([0., 0.])"),
        ({"weight": ZEROS}, "for weight, got the class Zeros"),
        ({0: fn.Param((2,), ZEROS())}, "for 0, got Param"),
        ({0: {"weight": fn.Param((2,), ZEROS())}}, "for 0, got {'weight': Param"),
    ],
)
def test_what_is_not_declared_by_param_is_refused(declared, got):
    with pytest.raises(
        TypeError, match=r"^layer 0: Declaring\(\): expected _params to return "
    ) as caught:
        fn.Sequential(declaring(declared)).init(fn.key(0), (2,))
    assert got in str(caught.value)


@pytest.mark.parametrize(
    ("initializer", "error", "message"),
    [
        (torch.ones, TypeError, "a function (key, shape, dtype, device) -> tensor, got <built-in "),
        (lambda key, shape: torch.ones(shape), TypeError, "takes 2 positional arguments but 4 "),
        (lambda key, shape, dtype, device: 0.5, ValueError, "a tensor of shape (2,), got 0.5"),
        (lambda *arguments: torch.ones(3), ValueError, "a tensor of shape (2,), got (3,)"),
    ],
)
def test_an_initializer_that_is_another_function_is_refused(initializer, error, message):
    layer = declaring({"inner": {"weight": fn.Param((2,), initializer)}})
    with pytest.raises(error, match=re.escape(message)) as caught:
        fn.Sequential(layer).init(fn.key(0), (2,))
    assert str(caught.value).startswith(
        "layer 0: Declaring(): expected the initializer of inner.weight to "
    )


def test_an_initializer_s_own_type_error_passes():
    def initializer(key, shape, dtype, device):
        raise TypeError("mine")

    with pytest.raises(TypeError, match=r"^mine$"):
        declaring({"weight": fn.Param((2,), initializer)}).init(fn.key(0), (2,))


def test_the_shape_of_a_param_is_a_tuple():
    assert fn.Param([2, 3], ZEROS()) == fn.Param((2, 3), ZEROS())
    with pytest.raises(TypeError, match="Param: expected shape to be a tuple of ints, got 3"):
        fn.Param(3, ZEROS())


def test_a_layer_whose_y_has_another_dtype_says_so():
    @dataclass(frozen=True)
    class Doubling(fn.Layer):
        def _fwd(self, params, x, key):
            return x.double() * 2, ()

    for call in (Doubling().apply, Doubling().fwd, Doubling().apply):
        with pytest.raises(ValueError, match=r"^Doubling\(\): expected y to be torch.float32"):
            call((), torch.ones(2, 3))
    assert Doubling().apply((), torch.ones(2, 3).double()).dtype == torch.float64

    class Counting(Doubling):
        def _check_x(self, x):
            pass

    assert Counting().apply((), torch.ones(2, 3).long()).dtype == torch.float64


def test_a_layer_without_a_gradient_says_so():
    @dataclass(frozen=True)
    class Valued(fn.Layer):
        def _fwd(self, params, x, key):
            return 2 * x, ()

    x = torch.ones(3, 2)
    assert torch.equal(Valued().apply((), x), 2 * x)
    with pytest.raises(NotImplementedError, match=r"^Valued\(\) writes neither _bwd nor bwd$"):
        Valued().vjp((), x, x)


def test_a_layer_may_declare_an_empty_dict():
    class Empty(fn.ReLU):
        def _params(self, shape):
            return {"nothing": {}}

    params, x, _ = make(Empty(), (3,))
    assert params == {"nothing": {}}
    assert same(Empty().apply(params, x), fn.ReLU().apply((), x))


@pytest.mark.parametrize(("got", "fitting"), [((7, 5), r"7, \*"), ((3, 7), r"\*, 7")])
def test_x_is_blamed_at_any_axis(got, fitting):
    """For the one size by which all parameters would fit."""

    @dataclass(frozen=True)
    class OfEachEntry(fn.ReLU):
        def _params(self, shape):
            return {"weight": fn.Param(shape, Ones())}

    layer = OfEachEntry()
    with pytest.raises(ValueError, match=rf"expected x of shape \(N, {fitting}\), got \(2, 3, 5\)"):
        layer.apply(layer.init(fn.key(0), got), torch.ones(2, 3, 5))
    norm = fn.GroupNorm(2)
    with pytest.raises(ValueError, match=r"expected x of shape \(N, 6, …\), got \(2, 8, 4, 3\)"):
        norm.apply(norm.init(fn.key(0), (6, 4, 3)), torch.ones(2, 8, 4, 3))
    linear = fn.Linear(2)
    with pytest.raises(ValueError, match=r"expected x of shape \(N, …, 0\), got \(2, 3\)"):
        linear.apply(linear.init(fn.key(0), (0,)), torch.ones(2, 3))


@pytest.mark.parametrize("layer", [NET, Affine(), Public(), fn.Sequential(Public(), Affine())])
def test_what_is_not_asked_for_is_not_given(layer):
    params, x, grad = make(layer, (3, 4, 5))
    dparams, dx = layer.vjp(params, x, grad)
    assert layer.vjp(params, x, grad, param_grad=False)[0] is None
    close(layer.vjp(params, x, grad, param_grad=False)[1], dx)
    close(layer.vjp(params, x, grad, input_grad=False), (dparams, None))


@pytest.mark.parametrize("input_grad", [True, False])
@pytest.mark.parametrize("param_grad", [True, False])
def test_what_a_layer_gives_without_being_asked_is_left_out(param_grad, input_grad):
    layer = Careless()
    params, x, grad = make(layer, (3,))
    asked = {"param_grad": param_grad, "input_grad": input_grad}
    _, residuals = layer.fwd(params, x)
    for dparams, dx in (
        layer.vjp(params, x, grad, **asked),
        layer.bwd(params, residuals, grad, **asked),
    ):
        assert (dparams is not None, dx is not None) == (param_grad, input_grad)
    integers = torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"expected params with keys 'w', got no keys"):
        layer.apply({}, integers)
    with pytest.raises(TypeError, match="expected x on the device of params, cpu, got meta"):
        layer.apply(params, integers.to("meta"))
    with pytest.raises(TypeError, match=r"expected params to be floating-point, got torch\.int64"):
        layer.apply({"w": integers[0, 0]}, integers)
    dparams, dx = layer.vjp(params, integers, grad[:2], **asked)
    assert (dparams is not None, dx is not None) == (param_grad, False)


class Counted(fn.ReLU):
    """Counts how often it checks what it is handed."""

    checks = 0

    def _check(self, params, x):
        Counted.checks += 1
        return super()._check(params, x)


@pytest.mark.parametrize(
    "step",
    [lambda net, x: net.vjp((), x, x), lambda net, x: fn.value_and_grad(net, fn.MSE())((), x, x)],
)
def test_a_pass_checks_once(step):
    """Inside torch.func nothing is remembered."""
    Counted.checks = 0
    torch.func.vmap(lambda x: step(Counted(), x))(torch.ones(2, 3, 4))
    assert Counted.checks == 1


def test_the_spec_of_what_a_layer_gives_out():
    spec = spec_of_y(torch.ones(2, 3, 4, dtype=torch.float64))
    assert spec == Spec((2,), (3, 4), torch.float64, torch.device("cpu"))
    assert type(spec.batch) is type(spec.shape) is tuple
    assert spec_of_y((torch.ones(2),)) is None


@pytest.mark.parametrize(
    "pick", [lambda x: None, lambda x: [x, x], lambda x: (x,), lambda x: (x,) * 3, lambda x: (3, x)]
)
def test_residuals_of_somebody_else_are_refused(pick):
    layer = Careless()
    params, x, grad = make(layer, (3,))
    with pytest.raises(
        TypeError, match=r"Careless\(\): expected residuals as fwd returns them, got"
    ):
        layer.bwd(params, pick(x), grad)


@dataclass(frozen=True)
class WithParamGrad(Public):
    """Its `bwd` knows of `param_grad`."""

    def bwd(self, params, x, grad, *, input_grad=True, param_grad=True):
        self.calls.append((input_grad, param_grad))
        dparams, dx = super().bwd(params, x, grad, input_grad=input_grad)
        return dparams if param_grad else None, dx


@dataclass(frozen=True)
class WithOptions(Public):
    """Its `bwd` takes any option."""

    def bwd(self, params, x, grad, **options):
        param_grad = options.get("param_grad", True)
        self.calls.append((options["input_grad"], param_grad))
        dparams, dx = super().bwd(params, x, grad, input_grad=options["input_grad"])
        return dparams if param_grad else None, dx


@pytest.mark.parametrize("cls", [Public, WithParamGrad, WithOptions])
def test_a_layer_that_checks_for_itself_is_told_what_is_needed(cls):
    layer = cls(calls=[])
    params, x, grad = make(layer, (3,))
    for wanted in product([True, False], repeat=2):
        dparams, dx = public_bwd(layer, params, x, grad, Need(*wanted))
        assert (dparams is not None, dx is not None) == wanted
        assert layer.calls == [*([] if cls is Public else [wanted[::-1]]), "bwd"]
        layer.calls.clear()


def test_children_of_a_combinator_of_ones_own():
    one, other, more = fn.ReLU(), fn.Linear(2), fn.Tanh()
    two, many = Two(one, other, 0.5), Many((one, other))
    for net in (two, many):
        assert net._children() == (("0", one), ("1", other))
        for params in (("p", "q"), ["p", "q"], {"0": "p", "1": "q"}, {"1": "q", "0": "p"}):
            assert net._child_params(params) == ("p", "q")
    assert two._child_params({"right": "q", "left": "p", "own": "r"}) == ("p", "q")
    assert many._child_params({"layers": ("p", "q"), "own": "r"}) == ("p", "q")
    assert Many((one,))._child_params(("p",)) == ("p",)
    assert Many((one,))._child_params({"layers": ("p",), "own": "r"}) == ("p",)
    assert fn.Residual(one)._child_params({"0": "p"}) == ({"0": "p"},)
    assert two._with_children([other, more]) == Two(other, more, 0.5)
    assert many._with_children([other, more]) == Many((other, more))
    assert fn.Residual(one)._with_children([more]) == fn.Residual(more)
    assert Many((one, 3))._children() == Many(())._children() == ()


def test_what_a_combinator_of_ones_own_freezes():
    """It may have parameters besides those of its children."""
    weight, own = torch.ones(2), torch.ones(3)
    net = Two(fn.Frozen(fn.Linear(2, bias=False)), fn.ReLU())
    ((leaf, index),) = net._frozen_params(({"weight": weight}, (), own))
    assert leaf is weight
    assert index is ...


AROUND = {
    "Sequential": lambda layer: fn.Sequential(fn.Tanh(), layer, fn.ReLU()),
    "Residual": fn.Residual,
    "Recompute": fn.Recompute,
    "Sum": lambda layer: fn.Sum(layer, fn.Tanh()),
    "Product": lambda layer: fn.Product(layer, fn.Tanh()),
    "Reversible": lambda layer: fn.Reversible(fn.Tanh(), layer),
    "Loop": lambda layer: fn.Loop(layer, 2),
    "Repeat": lambda layer: fn.Repeat(layer, 2),
    "Cast": lambda layer: fn.Cast(layer, torch.float32),
}
around_it = pytest.mark.parametrize("around", AROUND.values(), ids=[*AROUND])


@around_it
@pytest.mark.parametrize("name", ["fwd", "bwd", "apply"])
def test_what_a_subclass_overrides_is_called(around, name):
    """Also where it overrides one of the three alone, and hands on to the others."""
    called = []

    def noted(self, *args, **kwargs):
        called.append(name)
        return getattr(fn.PReLU, name)(self, *args, **kwargs)

    overridden = type("Noted", (fn.PReLU,), {name: noted})
    net, plain = around(overridden()), around(fn.PReLU())
    params, x, grad = make(plain, (4, 5))
    if name == "apply":
        assert same(net.apply(params, x), plain.apply(params, x))
    assert same(net.vjp(params, x, grad), plain.vjp(params, x, grad))
    assert set(called) == {name}


@pytest.mark.parametrize("join", [fn.Sum, fn.Product, fn.Concat])
def test_a_layer_whose_gradient_nobody_needs_does_not_run(join):
    class Refusing(fn.Softsign):
        def _bwd(self, params, residuals, dy, need):
            raise AssertionError

    net, plain = join(Refusing(), fn.PReLU()), join(fn.Softsign(), fn.PReLU())
    params, x, grad = make(net, (4, 5))
    dparams, dx = net.vjp(params, x, grad, input_grad=False)
    assert same(dparams, plain.vjp(params, x, grad)[0])
    assert dx is None


def test_the_dtype_of_a_users_layer_is_that_of_its_x():
    """Whatever its parameters are in, which it checks for itself."""
    net = fn.Sequential(Public(), fn.Linear(2))
    params, x, _ = make(net, (3,))
    mixed = ({"w": params[0]["w"].double()}, params[1])
    assert x.dtype == torch.float32
    assert same(net.apply(mixed, x), net.apply(params, x))


@pytest.mark.parametrize("params", [{}, [], ({},)])
def test_a_layer_without_parameters_refuses_what_is_not_an_empty_tuple(params):
    with pytest.raises(ValueError, match="ReLU\\(\\): expected no parameters, \\(\\), got"):
        fn.ReLU().apply(params, torch.ones(2, 3))


def test_what_writes_nothing_is_refused():
    with pytest.raises(TypeError, match="Layer: expected a layer that writes _fwd, or fwd"):
        fn.Layer()


# --- Fields


def test_fields_convert_and_refuse():
    assert fn.Conv2d(8, 3) == fn.Conv2d(8, (3, 3)) == fn.Conv2d(8, [3, 3])
    assert fn.Conv2d(8, 3).kernel_size == (3, 3)
    with pytest.raises(ValueError, match="Conv2d: expected kernel_size to be an int or a pair of"):
        fn.Conv2d(8, (3, 3, 3))


@pytest.mark.parametrize(
    ("make", "same"),
    [
        (lambda: fn.Dropout(np.float64(0.25)), fn.Dropout(0.25)),
        (lambda: fn.LayerNorm(np.int64(2), eps=np.float32(0.5)), fn.LayerNorm(2, eps=0.5)),
        (lambda: fn.Softplus(threshold=np.uint8(3)), fn.Softplus(threshold=3)),
        (lambda: fn.ELU(Fraction(1, 2)), fn.ELU(0.5)),
        (lambda: fn.Conv2d(2, 3, padding=np.str_("same")), fn.Conv2d(2, 3, padding="same")),
        (
            lambda: fn.Linear(2, weight_init=Normal(std=np.float16(2))),
            fn.Linear(2, True, Normal(std=2.0)),
        ),
    ],
)
def test_numbers_of_numpy_are_kept_as_pythons(make, same, tmp_path):
    net = fn.Sequential(make())
    assert repr(net) == repr(fn.Sequential(same))
    fn.save_model(tmp_path / "net", net, ())
    assert fn.load_model(tmp_path / "net") == (fn.Sequential(same), ())


def test_fields_of_a_users_layer():
    @dataclass(frozen=True)
    class Blur(fn.Layer):
        size: Sizes
        name: "Unknown" = "b"  # noqa: F821 (what exists for the type checker alone)
        shape: tuple = (2, 2)

        _axes = "CL"

        def _fwd(self, params, x, key):
            return x.clone(), None

    assert Blur(3).size == (3,)
    assert repr(Blur(3, shape=(1, 1))) == "Blur(3, shape=(1, 1))"
    with pytest.raises(ValueError, match=r"Blur: expected size to be an int or a tuple of one"):
        Blur((3, 3))


@dataclass(frozen=True)
class Slotted(fn.Layer):
    __slots__ = ("gain",)
    gain: float

    def _fwd(self, params, x, key):
        return self.gain * x, None


def test_fields_in_slots_are_pickled():
    layer = Slotted(1.5)
    assert pickle.loads(pickle.dumps(layer)).gain == copy.deepcopy(layer).gain == 1.5


# --- What a network remembers


def wrong_calls(params, x):
    """Calls that must be refused, whatever has been accepted before."""
    first = params[0]
    yield params, x.double()
    yield params, x[:, :2]
    yield params, x[0]
    yield (first, (), {**params[2], "bias": torch.ones(7)}), x
    yield ({**first, "weight": first["weight"].double()}, *params[1:]), x
    yield ({"weight": first["weight"]}, *params[1:]), x
    yield list(params), x
    yield params[:2], x
    yield (first, (torch.ones(1),), params[2]), x
    yield ({**first, "bias": 1.0}, *params[1:]), x
    yield params, x.numpy()


@given(st.lists(st.tuples(st.integers(1, 3), st.integers(3, 5)), min_size=1, max_size=6))
def test_what_was_accepted_lets_nothing_else_in(sizes):
    net = fn.Sequential(*NET)
    params = net.init(fn.key(0), (3, 4, 4))
    for batch, size in sizes:
        x = fn.normal(fn.key(1), (batch, 3, size, size))
        y, residuals = net.fwd(params, x)
        assert same(y, fn.Sequential(*NET).apply(params, x))
        for wrong, at in wrong_calls(params, x):
            for call in (net.apply, net.fwd):
                with pytest.raises((TypeError, ValueError)):
                    call(wrong, at)
        for grad in (y[:, :1], torch.cat([y, y]), y.double(), y[0], None):
            with pytest.raises((TypeError, ValueError), match=r"layer 2: UpsampleConv2d.*grad"):
                net.bwd(params, residuals, grad)


def test_parameters_that_are_not_tensors_are_checked_each_time():
    """A layer that checks for itself may take numbers for parameters; others are still checked."""
    net = fn.Sequential(Public(), fn.Conv2d(2, 1))
    params = ({"w": 2.0}, fn.Conv2d(2, 1).init(fn.key(0), (3, 4, 4)))
    for size in (4, 5, 3):
        x = torch.ones(1, 3, size, size)
        y, residuals = net.fwd(params, x)
        assert y.shape == (1, 2, size, size)
        assert net.bwd(params, residuals, y, param_grad=False)[1].shape == x.shape
        with pytest.raises(ValueError, match=r"layer 1: Conv2d.*expected x of shape"):
            net.apply(params, x[:, :2])


def test_what_was_accepted_is_not_checked_again():
    checked = []

    class Noted(fn.ReLU):
        def _check(self, params, x):
            checked.append(x.shape)
            return super()._check(params, x)

    layer, sizes = Noted(), [2, 3, 4, 5]
    for size in sizes * 3:
        x = torch.ones(1, size)
        y, residuals = layer.fwd((), x)
        layer.bwd((), residuals, y)
        layer.apply((), x)
    assert checked == [(size,) for size in sizes]


def test_what_is_remembered_holds_no_tensor_and_does_not_grow():
    net = fn.Sequential(*NET)
    params = net.init(fn.key(0), (3, 4, 4))
    for size in range(3, 40):
        net.apply(params, torch.zeros(1, 3, size, size))
    leaves = optree.tree_leaves(net.__dict__["_accepted"])
    assert len(net.__dict__["_accepted"]) < 20
    assert not any(isinstance(leaf, torch.Tensor) for leaf in leaves)


@pytest.mark.parametrize("layer", [fn.Upsample2d(2), fn.Dropout(), fn.Identity()], ids=repr)
def test_residuals_tell_the_shape_of_x_without_its_memory(layer):
    x = torch.ones(2, 3, 4, 4)
    _, residuals = layer.fwd((), x)
    assert all(leaf.untyped_storage().nbytes() == 0 for leaf in optree.tree_leaves(residuals))


def test_what_is_remembered_is_no_part_of_the_value():
    fresh, used = fn.Sequential(*NET), fn.Sequential(*NET)
    params = used.init(fn.key(0), (3, 4, 4))
    used.apply(params, torch.zeros(1, 3, 4, 4))
    assert "_accepted" in used.__dict__
    assert (fresh, hash(fresh), repr(fresh)) == (used, hash(used), repr(used))
    assert pickle.dumps(fresh) == pickle.dumps(used)
    assert "_accepted" not in copy.deepcopy(used).__dict__


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_nothing_is_remembered_under_transforms():
    net = fn.Sequential(*NET)
    params = net.init(fn.key(0), (3, 4, 4))
    x = torch.zeros(2, 1, 3, 4, 4)
    torch.func.vmap(net.apply, in_dims=(None, 0))(params, x)
    compile_whole(net.apply)(params, x[0])
    assert "_accepted" not in net.__dict__


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("error::torch.jit.TracerWarning")
def test_a_trace_holds_nothing_of_the_checks():
    layer = Affine()
    params, x, _ = make(layer, (3, 4, 5))
    graph = torch.jit.trace(lambda x: layer.apply(params, x), x)
    other = torch.ones(5, 3, 4, 5)
    assert same(graph(other), layer.apply(params, other))
    with pytest.raises(ValueError, match=r"shape \(N, 3, H, W\), got \(2, 4, 4, 5\)"):
        torch.jit.trace(lambda x: layer.apply(params, x), torch.ones(2, 4, 4, 5))


def test_threads_may_share_a_network():
    net = fn.Sequential(*NET)
    params = net.init(fn.key(0), (3, 4, 4))
    failures = []

    def run(size):
        for _ in range(30):
            y = net.apply(params, torch.zeros(1, 3, size, size))
            if y.shape != (1, 2, 2 * size, 2 * size):
                failures.append(y.shape)

    threads = [threading.Thread(target=run, args=(size,)) for size in range(3, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# --- Layers that check for themselves


def test_a_layer_by_the_public_four_inside_a_network():
    calls = []
    net = fn.Sequential(fn.Conv2d(2, 1), Public(calls=calls), fn.ReLU(), Affine())
    params, x, grad = make(net, (3, 4, 4), dtype=torch.float64)
    check_vjp(net, params, x)
    calls.clear()
    dparams, _ = net.vjp(params, x, grad, param_grad=False)
    assert dparams is None
    assert calls == ["bwd"]


@pytest.mark.parametrize("behind", [fn.Conv2d(2, 1), fn.Upsample2d(2), fn.Sequential(fn.ReLU())])
def test_what_a_users_layer_promises_and_does_not_keep(behind):
    """The layers behind are held to what came, not to what `out_shape` said."""
    liar = fn.Sequential(Public(promise=1), behind)
    params = liar.init(fn.key(0), (3, 4, 4))
    x = torch.ones(1, 3, 4, 4)
    honest = fn.Sequential(Public(), behind)
    assert same(liar.apply(params, x), honest.apply(params, x))
    if behind == fn.Conv2d(2, 1):
        with pytest.raises(TypeError, match=r"layer 1: Conv2d.*expected weight to have the dtype"):
            liar.apply(({"w": torch.ones((), dtype=torch.float64)}, params[1]), x.double())


def test_strategies_draw_such_layers():
    @given(strategies.cases(st.just(fn.Sequential(Public(), fn.ReLU()))))
    def check(case):
        check_vjp(*case)

    check()


# --- What a layer has made


@dataclass(frozen=True)
class WithoutResiduals(fn.Layer):
    def _fwd(self, params, x, key):
        return torch.sin(x)

    def _bwd(self, params, x, dy, need):
        return dy * torch.cos(x)


@dataclass(frozen=True)
class WithoutDparams(WithoutResiduals):
    def _fwd(self, params, x, key):
        return torch.sin(x), x


@dataclass(frozen=True)
class WithoutOutShape(fn.Linear):
    def _out_shape(self, shape):
        return shape


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_a_layer_that_returns_less_than_it_should(batch):
    """A tensor would be unpacked: its first example is no y, nor its second a gradient."""
    x = torch.ones(batch, 3)
    layer = WithoutResiduals()
    for call in (layer.apply, layer.fwd) * 2:
        with pytest.raises(
            ValueError, match=r"WithoutResiduals\(\): expected _fwd to return \(y, res"
        ):
            call((), x)
    layer = WithoutDparams()
    with pytest.raises(
        ValueError, match=r"WithoutDparams\(\): expected _bwd to return \(dparams, "
    ):
        layer.vjp((), x, x)


@dataclass(frozen=True)
class Returns(fn.Layer):
    """What its `_fwd` and `_bwd` return; None is for a forgotten `return`."""

    of_fwd: object = ("x", "residuals")
    of_bwd: object = None

    def _fwd(self, params, x, key):
        return (x.clone(), ()) if self.of_fwd == ("x", "residuals") else self.of_fwd

    def _bwd(self, params, residuals, dy, need):
        return self.of_bwd


@pytest.mark.parametrize("made", [None, (), (1, 2, 3), "ab"])
def test_a_layer_that_returns_no_pair(made):
    x = torch.ones(2, 3)
    calls = [Returns(made).fwd] if made == () else [Returns(made).fwd, Returns(made).apply]
    for call in calls * 2:
        with pytest.raises(ValueError, match=r"expected _fwd to return \(y, residuals\), got"):
            call((), x)
    with pytest.raises(ValueError, match=r"Returns.* expected _fwd to return \(y, res"):
        fn.Frozen(Returns(made)).fwd((), x)
    with pytest.raises(ValueError, match=r"expected _bwd to return \(dparams, dx\), got"):
        Returns(of_bwd=made).vjp((), x, x)


@dataclass(frozen=True)
class OfPositiveNumbers(Returns):
    def _fwd(self, params, x, key):
        return (x.clone(), ()) if x.sum() > 0 else None


def test_a_return_that_is_forgotten_in_one_branch():
    layer, x = OfPositiveNumbers(), torch.ones(2, 3)
    for call in (layer.apply, layer.fwd):
        call((), x)
        with pytest.raises(ValueError, match=r"expected _fwd to return .* got None"):
            call((), -x)


def test_without_examples_or_under_vmap_too():
    with pytest.raises(ValueError, match=r"expected _fwd to return \(y, residuals\)"):
        WithoutResiduals().fwd((), torch.ones(0, 3))
    with pytest.raises(ValueError, match=r"expected _fwd to return \(y, residuals\)"):
        torch.func.vmap(lambda x: WithoutResiduals().fwd((), x)[0])(torch.ones(4, 2, 3))


@dataclass(frozen=True)
class OfNoTensor(fn.Layer):
    def _fwd(self, params, x, key):
        return "y", x


@pytest.mark.parametrize("net", [OfNoTensor(), fn.Sequential(OfNoTensor())])
def test_y_is_a_tensor(net):
    with pytest.raises(ValueError, match=r"of shape \(5, 3\), as out_shape says, got 'y'"):
        net.apply(net.init(fn.key(0), (3,)), torch.ones(5, 3))


def test_in_a_network_examples_are_not_lost():
    net = fn.Sequential(fn.Linear(3), WithoutResiduals(), fn.Linear(1))
    params = net.init(fn.key(0), (4,))
    for _ in range(2):
        with pytest.raises(ValueError, match=r"^layer 1: Without.*return \(y, residuals\), got a"):
            net.apply(params, torch.ones(5, 4))


def test_y_has_the_shape_that_out_shape_says():
    layer = WithoutOutShape(3)
    params = layer.init(fn.key(0), (4,))
    for call in (layer.apply, layer.fwd) * 2:
        with pytest.raises(ValueError, match=r"shape \(5, 4\), as out_shape says, got \(5, 3\)"):
            call(params, torch.ones(5, 4))


@dataclass(frozen=True)
class OutShapeOf(fn.Linear):
    made: Any = None

    def _out_shape(self, shape):
        return self.made


@pytest.mark.parametrize("made", [3, None, "ab", torch.tensor(3)])
def test_out_shape_is_a_tuple(made):
    """Said of the layer that made it, not of the next."""
    said = r"OutShapeOf\(3.*\): expected _out_shape to return a tuple of ints, got"
    layer, x = OutShapeOf(3, made=made), torch.ones(5, 4)
    params = fn.Linear(3).init(fn.key(0), (4,))
    net = fn.Sequential(fn.ReLU(), layer, fn.ReLU())
    for call in (
        lambda: layer.out_shape((4,)),
        lambda: layer.init(fn.key(0), (4,)),
        lambda: layer.apply(params, x),
        lambda: fn.summary(layer, (4,)),
    ):
        with pytest.raises(ValueError, match=f"^{said}"):
            call()
    for call in (
        lambda: net.init(fn.key(0), (4,)),
        lambda: net.apply(((), params, ()), x),
        lambda: fn.summary(net, (4,)),
    ):
        with pytest.raises(ValueError, match=f"^layer 1: {said}"):
            call()
    with pytest.raises(GradientMismatch, match="expected _out_shape to return a tuple"):
        check_vjp(layer, params, x)


def test_out_shape_may_be_a_list():
    layer = OutShapeOf(4, made=[4])
    net = fn.Residual(layer)
    assert layer.out_shape((4,)) == net.out_shape((4,)) == (4,)
    check_vjp(net, net.init(fn.key(0), (4,)), fn.normal(fn.key(1), (3, 4)))


@pytest.mark.parametrize("batch", [2, 5])
@pytest.mark.parametrize("layer", [WithoutResiduals(), WithoutDparams(), WithoutOutShape(4)])
def test_check_vjp_says_what_a_layer_does_not_keep(layer, batch):
    params = layer.init(fn.key(0), (3,))
    with pytest.raises(GradientMismatch, match=r"expected (y of|_fwd|_bwd)") as caught:
        check_vjp(layer, params, torch.ones(batch, 3))
    assert "To replay it" in str(caught.value)


@dataclass(frozen=True)
class Forgetful(fn.Layer):
    """A layer whose functions return what they are told to, of y and residuals or of gradients."""

    fwd_returns: str = "y, x"
    bwd_returns: str = "(), dy"

    def _fwd(self, params, x, key):
        return eval(self.fwd_returns, {"y": 2 * x, "x": x})

    def _bwd(self, params, x, dy, need):
        return eval(self.bwd_returns, {"dy": 2 * dy})


@dataclass(frozen=True)
class ForgetfulOfPublicOnes(Forgetful):
    def fwd(self, params, x, *, key=None):
        return self._fwd(params, x, key)

    def bwd(self, params, residuals, grad, *, input_grad=True, param_grad=True):
        return self._bwd(params, residuals, grad, None)


AROUND = {
    "layer 1: ": lambda layer: fn.Sequential(fn.Sigmoid(), layer, fn.Sigmoid()),
    "second: ": lambda layer: fn.Sum(first=fn.ReLU(), second=layer),
    "layer 0: ": lambda layer: fn.Reversible(layer, fn.ReLU()),
}
ALONE = [fn.Residual, fn.Frozen, fn.Recompute, lambda f: fn.Repeat(f, 2), lambda f: f]


def _start(message):
    return "^" + re.escape(message)


@pytest.mark.parametrize("cls", [Forgetful, ForgetfulOfPublicOnes])
@pytest.mark.parametrize("batch", [1, 2, 5])  # two examples look like a pair
def test_a_layer_in_a_network_that_returns_something_else_than_a_pair(cls, batch):
    mark = "_" if cls is Forgetful else ""
    x = torch.ones(batch, 4)
    for where, around in [*AROUND.items(), *(("", each) for each in ALONE)]:
        for made in ("None", "y", "(y,)", "(y, x, x)"):
            layer = cls(fwd_returns=made)
            net = around(layer)
            message = f"{where}{layer}: expected {mark}fwd to return (y, residuals), got"
            params = net.init(fn.key(0), (4,))
            if not made.startswith("("):  # check_vjp finds these, which cost apply no entry of y
                with pytest.raises(ValueError, match=_start(message)):
                    net.apply(params, x)
            with pytest.raises(ValueError, match=_start(message)):
                net.vjp(params, x, x)
        for made in ("None", "dy", "(dy,)", "((), dy, dy)"):
            layer = cls(bwd_returns=made)
            net = around(layer)
            params = net.init(fn.key(0), (4,))
            message = f"{where}{layer}: expected {mark}bwd to return (dparams, dx), got"
            with pytest.raises(ValueError, match=_start(message)):
                net.vjp(params, x, x)


def test_an_error_of_the_layers_own_keeps_its_words():
    class Unpacks(fn.ReLU):
        def _fwd(self, params, x, key):
            one, other = x, key, params
            return one, other

    net = fn.Sequential(fn.Sigmoid(), Unpacks())
    for run in (net.apply, net.fwd):
        with pytest.raises(ValueError, match=r"^layer 1: too many values to unpack"):
            run(((), ()), torch.ones(1, 2))
