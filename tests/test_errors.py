"""Bad input is refused where it enters: who refuses, what was expected, what came."""

import re
from functools import partial

import numpy as np
import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from registry import EVERY_LAYER
from test_properties import make, same

import funcnet as fn
from funcnet.checks import shown
from funcnet.testing import check_function, check_vjp, strategies

CONV = fn.Conv2d(256, 2, stride=2)


def refused(error, message):
    return pytest.raises(error, match=re.escape(message))


def test_settings():
    """All that the strategy draws from."""
    for invalid in strategies._invalid():
        with refused(invalid.error, invalid.message):
            invalid.make()


class Long:
    def __init__(self, length):
        self.length = length

    def __repr__(self):
        return "x" * self.length


class LongAndSized(Long):
    def __len__(self):
        return 7


def test_how_a_message_shows_a_value():
    assert shown("a") == "'a'"
    assert shown(LongAndSized(80)) == "x" * 80
    assert shown(LongAndSized(81)) == "a LongAndSized of 7"
    assert shown(Long(81)) == "x" * 81
    assert shown(torch.zeros(2)) == "tensor([0., 0.])"
    assert shown(torch.zeros(2, 3, 4)) == "a Tensor of shape (2, 3, 4)"
    assert shown([torch.zeros(2, 2)]) == "a list of 1"  # in two lines
    assert shown(fn.ReLU) == "the class ReLU; did you mean ReLU(…)?"
    assert shown(torch.nn.ReLU()) == "ReLU, a torch.nn.Module"
    assert shown(fn.Sequential(*[fn.ReLU()] * 20)) == "Sequential of 20 layers"


NET = fn.Sequential(fn.Linear(30), fn.ReLU(), fn.Linear(10))
PARAMS = NET.init(fn.key(0), (20,))
X = torch.ones(1, 20)


@pytest.mark.parametrize(
    "refuse",
    [
        lambda: fn.Adam().step(PARAMS, PARAMS, PARAMS),
        lambda: fn.Adam().step(PARAMS, PARAMS, fn.SGD(0.1, momentum=0.9).init(PARAMS)),
        lambda: fn.Partition(lambda *_: "a", {"a": fn.Adam()}).step(PARAMS, PARAMS, PARAMS),
        lambda: fn.Partition(lambda *_: "a", {"a": fn.Adam()}).step(
            PARAMS, PARAMS, fn.Partition(lambda *_: "b", {"b": fn.Adam()}).init(PARAMS)
        ),
        lambda: fn.Partition(lambda _, leaf: leaf, {"a": fn.Adam()}).init(PARAMS),
        lambda: fn.Checkpoints(PARAMS),
        lambda: fn.Cast(NET, PARAMS),
        lambda: fn.for_inference(NET, PARAMS, (), PARAMS),
        lambda: fn.load_model("file", dtype=PARAMS),
        lambda: fn.register_node(fn.SGD(0.1, momentum=0.9).init(PARAMS)),
        lambda: fn.schedules.piecewise(list(PARAMS)),
        lambda: fn.uniform(fn.key(0), (2,), dtype=PARAMS),
    ],
)
def test_a_message_never_prints_a_tree(refuse):
    with pytest.raises((TypeError, ValueError)) as caught:
        refuse()
    message = str(caught.value)
    assert "tensor(" not in message
    assert "\n" not in message
    assert len(message) < 150


def test_shapes():
    for shape in (3, None, "ab", {3: 4}):
        with refused(TypeError, f"ReLU(): expected shape to be a tuple of ints, got {shape!r}"):
            fn.ReLU().out_shape(shape)
    with refused(TypeError, "ReLU(): expected every size in shape to be an int, got 1.5"):
        fn.ReLU().out_shape((2, 1.5))
    with refused(ValueError, "ReLU(): expected every size in shape >= 0, got -1"):
        fn.ReLU().out_shape((2, -1))


def test_the_message_of_the_contract():
    params = CONV.init(fn.key(0), (128, 16, 16))
    expected = (
        "Conv2d(256, kernel_size=2, stride=2): expected x of shape (N, 128, H, W), "
        "got (64, 3, 16, 16)"
    )
    x = torch.zeros(64, 3, 16, 16)
    with pytest.raises(ValueError, match=f"^{re.escape(expected)}$"):
        CONV.apply(params, x)
    net = fn.Sequential(fn.ReLU(), fn.Sigmoid(), CONV)
    with pytest.raises(ValueError, match=f"^layer 2: {re.escape(expected)}$"):
        net.apply(((), (), params), x)
    with pytest.raises(ValueError, match=f"^layer 0: layer 2: {re.escape(expected)}$"):
        fn.Sequential(net).vjp((((), (), params),), x, x)


@given(strategies.cases(EVERY_LAYER), st.data())
def test_another_dtype_of_grad(case, data):
    layer, params, x = case
    y = layer.apply(params, x)
    other = torch.float32 if x.dtype == torch.float64 else torch.float64
    if isinstance(layer, fn.Sequential) and not any(True for _ in _flat(layer)):
        return
    with pytest.raises(TypeError, match="expected grad to have the dtype and device of y"):
        layer.vjp(params, x, torch.zeros(y.shape, dtype=other))


@given(strategies.cases(EVERY_LAYER))
def test_another_shape_of_grad(case):
    layer, params, x = case
    y = layer.apply(params, x)
    if isinstance(layer, fn.Sequential) and not any(True for _ in _flat(layer)):
        return
    with pytest.raises(ValueError, match="expected grad of shape"):
        layer.vjp(params, x, y.new_zeros((len(y) + 1, *y.shape[1:])))


def _flat(net):
    for layer in net:
        if isinstance(layer, fn.Sequential):
            yield from _flat(layer)
        else:
            yield layer


def test_another_dtype_beside_integers():
    """y has the dtype of the first parameter."""
    layer = fn.Embedding(4, 2)
    params, x = layer.init(fn.key(0), (3,)), torch.zeros(1, 3, dtype=torch.int64)
    y, residuals = layer.fwd(params, x)
    with refused(TypeError, "expected grad to have the dtype and device of y, torch.float32"):
        layer.bwd(params, residuals, y.double())

    class Shifted(fn.Embedding):
        def _params(self, shape):
            return {**super()._params(shape), "shift": fn.Param((2,), fn.initializers.Zeros())}

    layer = Shifted(4, 2)
    params = layer.init(fn.key(0), (3,))
    params["shift"] = params["shift"].double()
    with refused(TypeError, "expected weight to have the dtype and device of params, torch.f"):
        layer.apply(params, x)


@given(strategies.cases(strategies.layers(fn.Conv2d) | strategies.layers(fn.UpsampleConv2d)))
def test_another_dtype_of_x(case):
    layer, params, x = case
    other = torch.float32 if x.dtype == torch.float64 else torch.float64
    with pytest.raises(TypeError, match="expected weight to have the dtype and device of x"):
        layer.apply(params, x.to(other))


@given(strategies.cases(strategies.layers(fn.Conv2d) | strategies.layers(fn.UpsampleConv2d)))
def test_another_number_of_channels(case):
    layer, params, x = case
    channels = x.shape[1]
    wrong = x.new_zeros((len(x), channels + 1, *x.shape[2:]))
    message = f"{layer}: expected x of shape (N, {channels}, H, W), got {tuple(wrong.shape)}"
    with refused(ValueError, message):
        layer.apply(params, wrong)
    with refused(ValueError, message):
        layer.vjp(params, wrong, wrong)


@pytest.mark.parametrize(
    "layer",
    [CONV, fn.UpsampleConv2d(2), fn.Upsample2d(2), fn.ReLU()],
    ids=lambda x: type(x).__name__,
)
def test_x_that_is_no_picture(layer):
    params = layer.init(fn.key(0), (3, 4, 4))
    with refused(TypeError, f"{layer}: expected x to be a tensor, got list"):
        layer.apply(params, [1.0])
    with refused(TypeError, f"{layer}: expected x to be floating-point, got torch.int64"):
        layer.apply(params, torch.zeros(1, 3, 4, 4, dtype=torch.int64))
    if layer != fn.ReLU():
        with refused(ValueError, f"{layer}: expected x of shape (N, "):
            layer.apply(params, torch.zeros(3, 4, 4))


@pytest.mark.parametrize("layer", [CONV, fn.UpsampleConv2d(256, 2)], ids=lambda x: type(x).__name__)
def test_parameters_that_do_not_fit(layer):
    params, x, _ = make(layer, (3, 4, 4))
    weight, bias = params["weight"], params["bias"]
    y, residuals = layer.fwd(params, x)
    for wrong, error, message in [
        ((), TypeError, "expected params to be a dict with keys 'bias', 'weight', got tuple"),
        ({"weight": weight}, ValueError, "expected params with keys 'bias', 'weight', got keys 'w"),
        ({}, ValueError, "expected params with keys 'bias', 'weight', got no keys"),
        ({"weight": weight, "bias": 1.0}, TypeError, "expected bias to be a tensor, got float"),
        (
            {"weight": weight, "bias": bias[1:]},
            ValueError,
            "expected bias of shape (256,), got (255",
        ),
        (
            {"weight": weight[1:], "bias": bias},
            ValueError,
            "expected weight of shape (256, ",
        ),
        ({"weight": weight.double(), "bias": bias}, TypeError, "expected weight to have the dtype"),
    ]:
        with refused(error, f"{layer}: {message}"):
            layer.apply(wrong, x)
        with refused(error, f"{layer}: {message}"):
            layer.bwd(wrong, residuals, torch.zeros_like(y))


@pytest.mark.parametrize("layer", [fn.ReLU(), fn.Sigmoid(), fn.Upsample2d(2)], ids=repr)
def test_parameters_where_there_are_none(layer):
    x = torch.ones(1, 1, 1, 1)
    y, residuals = layer.fwd((), x)
    for wrong, got in (({"weight": torch.ones(1)}, "dict"), (((),), "a tuple of 1")):
        with refused(ValueError, f"{layer}: expected no parameters, (), got {got}"):
            layer.apply(wrong, x)
        with refused(ValueError, f"{layer}: expected no parameters, (), got {got}"):
            layer.bwd(wrong, residuals, y)


def test_pictures_too_small():
    layer = fn.Conv2d(1, 5, dilation=2)
    message = (
        f"{layer}: expected images at least as large as the kernel's reach (9, 9), "
        "got size (8, 20), (8, 20) with padding"
    )
    with refused(ValueError, message):
        layer.out_shape((1, 8, 20))
    params = layer.init(fn.key(0), (1, 9, 9))
    with refused(ValueError, message):
        layer.apply(params, torch.zeros(2, 1, 8, 20))
    layer = fn.UpsampleConv2d(1, 9, padding=0)
    with refused(ValueError, f"{layer}, after upsampling: expected images at least as large as"):
        layer.out_shape((1, 4, 4))
    layer = fn.Conv2d(1, 3, padding=3)
    for size in [(0, 5), (5, 0)]:
        with refused(ValueError, f"{layer}: expected images of at least 1×1, got size {size}"):
            layer.out_shape((1, *size))


@pytest.mark.parametrize("wrong", [np.array([3, 3]), torch.tensor(1.5), "3"], ids=repr)
def test_what_is_no_int(wrong):
    with refused(TypeError, f"Conv2d: expected kernel_size to be an int, got {wrong!r}"):
        fn.Conv2d(1, wrong)
    with refused(TypeError, f"split: expected num to be an int, got {wrong!r}"):
        fn.split(fn.key(0), wrong)


@pytest.mark.parametrize("wrong", ["float32", np.float32, torch.int64], ids=repr)
def test_what_is_no_floating_dtype(wrong):
    with refused(
        TypeError,
        f"uniform: expected a floating-point dtype of torch, of 16 bits or more, got {wrong!r}",
    ):
        fn.uniform(fn.key(0), (1,), dtype=wrong)
    for layer in (fn.Conv2d(1, 1), fn.UpsampleConv2d(1)):
        with refused(
            TypeError,
            f"{layer}: expected a floating-point dtype of torch, of 16 bits or more, got {wrong!r}",
        ):
            layer.init(fn.key(0), (1, 2, 2), dtype=wrong)
        with refused(TypeError, f"{layer}: expected a key made by funcnet.key(seed), got 0"):
            layer.init(0, (1, 2, 2))
    with refused(
        TypeError, "Sequential of 1 layer: expected a key made by funcnet.key(seed), got 0"
    ):
        fn.Sequential(fn.ReLU()).init(0, (1, 2, 2))


@pytest.mark.parametrize(
    ("wrong", "error"), [("nonsense", ValueError), ("", ValueError), (1.5, TypeError)]
)
def test_what_is_no_device(wrong, error, tmp_path):
    net, key, path = fn.Sequential(fn.ReLU()), fn.key(0), tmp_path / "net"
    fn.save_model(path, net, ((),))
    for who, call in (
        ("uniform", partial(fn.uniform, key, (1,))),
        ("normal", partial(fn.normal, key, (1,))),
        ("bernoulli", partial(fn.bernoulli, key, 0.5, (1,))),
        ("initializers.Ones()", partial(fn.initializers.Ones(), key, (1,))),
        ("ReLU()", partial(fn.ReLU().init, key, (1,))),
        ("Sequential of 1 layer", partial(net.init, key, (1,))),
        ("load", partial(fn.load, path)),
        ("load_model", partial(fn.load_model, path)),
    ):
        with refused(error, f"{who}: expected a device of torch, such as 'cpu', got {wrong!r}"):
            call(device=wrong)


def test_device_0_is_not_the_cpu():
    init = partial(fn.Linear(1).init, fn.key(0), (1,), device=0)
    if torch.accelerator.is_available():
        assert init()["weight"].device.type != "cpu"
    else:  # a build for accelerators knows the device all the same, and misses a driver
        with pytest.raises((ValueError, RuntimeError), match=r"Linear\(1\): expected|driver"):
            init()


def test_what_is_no_layer():
    with refused(TypeError, "summary: expected net to be a Layer, got [ReLU()]"):
        fn.summary([fn.ReLU()], (1, 2, 2))
    with refused(TypeError, "value_and_grad: expected a loss, such as MSE(), got Sigmoid()"):
        fn.value_and_grad(fn.ReLU(), fn.Sigmoid())
    own = "got <built-in function abs>: a loss of one's own derives from funcnet.Loss"
    with refused(TypeError, own):
        fn.value_and_grad(fn.ReLU(), abs)
    with refused(TypeError, "check_vjp: expected a layer or a loss, got the class ReLU"):
        check_vjp(fn.ReLU, (), torch.ones(1))


def test_shapes_of_examples():
    with refused(
        ValueError, f"{CONV}: expected the shape of one example, (C, H, W), got (1, 3, 8, 8)"
    ):
        CONV.init(fn.key(0), (1, 3, 8, 8))
    message = f"{fn.Upsample2d(2)}: expected the shape of one example, (C, H, W), got (3, 8)"
    with refused(ValueError, message):
        fn.Upsample2d(2).out_shape((3, 8))
    with refused(TypeError, "expected shape to be a tuple of ints, got 3"):
        fn.ReLU().out_shape(3)
    for size in (1.5, torch.zeros(2)):
        with refused(TypeError, f"expected every size in shape to be an int, got {shown(size)}"):
            fn.ReLU().out_shape((size,))
    for layer in (fn.Upsample2d(2), fn.ReLU(), CONV):
        with refused(ValueError, f"{layer}: expected every size in shape >= 0, got -1"):
            layer.init(fn.key(0), (1, -1, 2))
    for batch in (-1, None):
        message = f"expected the shape of one example, without the batch, got ({batch}, 8, 8)"
        with refused(ValueError, f"Sequential of 1 layer: {message}"):
            fn.Sequential(fn.Linear(2)).init(fn.key(0), (batch, 8, 8))
    with refused(ValueError, "layer 1: Conv2d(1, kernel_size=9): expected images at least"):
        fn.Sequential(fn.Upsample2d(2), fn.Conv2d(1, 9)).init(fn.key(0), (1, 4, 4))


def test_networks():
    with refused(TypeError, "Sequential: expected layer 1 to be a Layer, got 'relu'"):
        fn.Sequential(fn.ReLU(), "relu")
    with refused(TypeError, "Sequential of 0 layers: expected x to be floating-point, got torch.i"):
        fn.Sequential().apply((), torch.ones(1, dtype=torch.int64))
    net = fn.Sequential(fn.ReLU(), fn.Sigmoid())
    with refused(TypeError, "Sequential of 2 layers: expected params to be a tuple of 2, got list"):
        net.apply([(), ()], torch.ones(1))
    with refused(ValueError, "Sequential of 2 layers: expected params of 2 layers, got 1"):
        net.apply(((),), torch.ones(1))
    with refused(TypeError, "Sequential of 2 layers: expected residuals as fwd returns them, got"):
        net.bwd(((), ()), [torch.ones(1)], torch.ones(1))
    _, residuals = net[:1].fwd(((),), torch.ones(1))
    with refused(ValueError, "Sequential of 2 layers: expected residuals of 2 layers, got 1"):
        net.bwd(((), ()), residuals, torch.ones(1))
    for call in (net.apply, net.fwd):
        with refused(
            TypeError, "Sequential of 2 layers: expected a key made by funcnet.key(seed), got 5"
        ):
            call(((), ()), torch.ones(1), key=5)


@pytest.mark.parametrize("layer", [fn.ReLU(), fn.Residual(fn.Linear(2)), fn.MSE()], ids=repr)
def test_all_that_fwd_returns_in_the_place_of_residuals(layer):
    x = torch.ones(3, 2)
    inputs = (x, x) if isinstance(layer, fn.Loss) else (layer.init(fn.key(0), (2,)), x)
    made = layer.fwd(*inputs)
    before = inputs[:-1] if isinstance(layer, fn.Layer) else ()
    for value in (made, (made[0].view(-1), made[1])):
        with refused(TypeError, "expected residuals, the second of what fwd returns, got both"):
            layer.bwd(*before, value, torch.ones_like(made[0]))
    layer.bwd(*before, made[1], torch.ones_like(made[0]))


def test_errors_of_bwd_and_of_other_kinds_name_the_position():
    net = fn.Sequential(fn.ReLU(), fn.Sigmoid())
    with pytest.raises(TypeError, match=r"^layer 1: Sigmoid\(\): expected grad to be a tensor"):
        net.bwd(((), ()), net.fwd(((), ()), torch.ones(1))[1], None)
    with pytest.raises(RuntimeError, match=r"^layer 1: out of order$"):
        fn.Sequential(fn.ReLU(), OutOfOrder()).apply(((), ()), torch.ones(1))


@pytest.mark.parametrize("position", [0, 1, 2])
def test_each_position(position):
    layers = [fn.ReLU(), fn.ReLU()]
    layers.insert(position, fn.Conv2d(1, 9))
    net, message = (
        fn.Sequential(*layers),
        rf"^layer {position}: Conv2d\(1, kernel_size=9\): expected",
    )
    params = net.init(fn.key(0), (1, 9, 9))
    y, residuals = net.fwd(params, torch.ones(1, 1, 9, 9))
    broken = [*params[:position], {"weight": torch.ones(1)}, *params[position + 1 :]]
    for call in (
        lambda: net.init(fn.key(0), (1, 4, 4)),
        lambda: net.out_shape((1, 4, 4)),
        lambda: net.apply(params, torch.ones(1, 1, 4, 4)),
        lambda: net.bwd(tuple(broken), residuals, torch.ones_like(y)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


class OutOfOrder(fn.ReLU):
    """A layer that fails for a reason of its own."""

    def fwd(self, params, x, *, key=None):
        raise RuntimeError("out of order")


def test_losses():
    with refused(ValueError, "MSE(): expected target of shape (3, 1), x's shape, got (3,)"):
        fn.MSE().apply(torch.zeros(3, 1), torch.zeros(3))
    with refused(TypeError, "MSE(): expected target to have the dtype and device of x"):
        fn.MSE().apply(torch.zeros(3), torch.zeros(3).double())
    with refused(TypeError, "MSE(): expected x to be floating-point, got torch.int64"):
        fn.MSE().apply(torch.zeros(3).long(), torch.zeros(3).long())
    with refused(TypeError, "MSE(): expected target to be a tensor, got int"):
        fn.MSE().apply(torch.zeros(3), 0)
    with refused(ValueError, "MSE(): expected grad to be a scalar, got shape (3,)"):
        fn.MSE().vjp(torch.zeros(3), torch.zeros(3), torch.ones(3))
    with refused(TypeError, "MSE(): expected grad to be a tensor, got NoneType"):
        fn.MSE().vjp(torch.zeros(3), torch.zeros(3), None)
    with refused(TypeError, "MSE(): expected grad to have the dtype and device of x"):
        fn.MSE().vjp(torch.zeros(3), torch.zeros(3), torch.ones(()).double())
    with refused(ValueError, 'MSE: expected reduction to be "mean" or "sum", got \'none\''):
        fn.MSE("none")


def test_nothing_is_half_done_when_a_layer_refuses():
    """The second convolution refuses after the first has run: nothing of the user's has changed."""
    net = fn.Sequential(fn.Conv2d(2, 1), fn.ReLU(), fn.Conv2d(1, 1))
    params, x, _ = make(net, (3, 4, 4))
    broken = (params[0], (), {**params[2], "bias": torch.ones(7)})
    kept = optree.tree_map(torch.clone, (broken, x))
    for call in (net.apply, net.fwd):
        with refused(ValueError, "layer 2: Conv2d(1, kernel_size=1): expected bias of shape (1,)"):
            call(broken, x)
    assert same((broken, x), kept)


TREE = ({"weight": torch.zeros(8, 3, 3, 3)}, ())


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: fn.Adam(TREE),
            "Adam: expected lr to be a number or a function of the step count, got a tuple of 2: "
            "params belong to init and step",
        ),
        (lambda: fn.Linear(TREE), "Linear: expected out_features to be an int, got a tuple of 2"),
        (lambda: fn.split(TREE[0]), "funcnet.key(seed), got a dict of 1"),
        (lambda: fn.MaxPool2d(torch.zeros(9, 9)), "to be an int, got a Tensor of shape (9, 9)"),
        (lambda: fn.summary(TREE, (3,)), "expected net to be a Layer, got a tuple of 2"),
        (
            lambda: fn.Sequential(torch.nn.ReLU()),
            "layer 0 to be a Layer, got ReLU, a torch.nn.Module",
        ),
        (lambda: fn.Residual(torch.nn.ReLU()), "layer to be a Layer, got ReLU, a torch.nn.Module"),
        (
            lambda: fn.value_and_grad(fn.ReLU(), torch.nn.MSELoss()),
            "value_and_grad: expected a loss, such as MSE(), got MSELoss, a torch.nn.Module",
        ),
    ],
)
def test_what_came_is_named_by_kind_and_size_where_its_code_is_long(call, message):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert str(caught.value).endswith(message)


OF_IMAGES = [
    fn.Conv2d(2, 1),
    fn.ConvTranspose2d(2, 1),
    fn.UpsampleConv2d(2),
    fn.MaxPool2d(1),
    fn.AvgPool2d(1),
    fn.AdaptiveAvgPool2d(1),
    fn.AdaptiveMaxPool2d(1),
]


@pytest.mark.parametrize("layer", OF_IMAGES, ids=repr)
@pytest.mark.parametrize("shape", [(0, 4, 4), (3, 0, 4), (3, 4, 0)], ids=str)
def test_images_without_channels_or_pixels_are_refused(layer, shape):
    got = r"images of at least 1×1, got size \(.*0" if shape[0] else "channel.* got 0"
    with pytest.raises(ValueError, match=re.escape(f"{layer}: expected ") + f".*{got}"):
        layer.out_shape(shape)


# --- What newcomers from torch.nn write


class Rate(fn.Optimizer):
    """An optimiser whose author took `step` for what one writes."""

    def init(self, params):
        return ()

    def step(self, params, grads, state):
        return params, state


class Wrapper(fn.Layer):
    """A layer whose author took `_params` for what a layer made of layers writes."""

    def __init__(self, params):
        object.__setattr__(self, "params", params)

    def __repr__(self):
        return "Wrapper()"

    def _params(self, shape):
        return self.params


class Shrunk(fn.Loss):
    def _fwd(self, x, target):
        return (x - target).sum(), x

    def _bwd(self, x, grad):
        return torch.ones_like(x) * grad


SIZES = ": sizes of x are read off the shape that init is given"
CHANNELS = ": the input's channels are read off the shape; did you mean "
KIND = "expected weight_init to be an initialiser or None, got "
MADE_OF_LAYERS = "; a layer made of layers writes init, out_shape, fwd and bwd"
OWN_LOSS = "got Shrunk(): a loss of one's own has a field named reduction"


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: Rate().step_((), (), ()),
            NotImplementedError,
            "Rate writes no _prepare, which step and step_ call",
        ),
        (
            lambda: fn.Adam({"weight": torch.ones(1)}, lr=0.1),
            TypeError,
            "Adam: expected lr once, got it twice: params belong to init and step",
        ),
        (
            lambda: fn.Residual(fn.Linear(2), fn.ReLU()),
            TypeError,
            "Residual: expected one layer, such as Sequential(…), got 2",
        ),
        (
            lambda: NET.apply(torch.nn.Sequential(torch.nn.Linear(2, 2)).state_dict(), X),
            TypeError,
            "params to be a tuple of 3, got OrderedDict"
            "; fn.interop.load_state_dict makes params of a state_dict",
        ),
        (
            lambda: fn.Sequential(a=fn.Linear(2)).apply({"a.weight": torch.ones(2, 2)}, X),
            ValueError,
            "expected params with keys 'a', got keys 'a.weight'"
            "; fn.interop.load_state_dict makes params of a state_dict",
        ),
        (
            lambda: fn.interop.from_torch(fn.Sequential(fn.ReLU()), (2,)),
            TypeError,
            "from_torch: expected module to be a torch.nn.Module, got Sequential(ReLU())",
        ),
        (
            lambda: fn.Optimizer().init(()),
            NotImplementedError,
            "Optimizer writes no init",
        ),
        (
            lambda: fn.SGD(torch.zeros(3)),
            TypeError,
            "SGD: expected lr to be a number or a function of the step count, "
            "got tensor([0., 0., 0.])",
        ),
        (
            lambda: fn.SGD(fn.schedules.cosine),
            TypeError,
            "SGD: expected lr to be a number or a function of the step count, "
            "got the class cosine; did you mean cosine(…)?",
        ),
        (
            lambda: fn.MultiheadAttention(32, 4),
            TypeError,
            f"MultiheadAttention: expected bias to be True or False, got 4{SIZES}",
        ),
        (
            lambda: fn.Linear(784, 10),
            TypeError,
            f"Linear: expected bias to be True or False, got 10{SIZES}",
        ),
        (
            lambda: fn.Linear(784, 1),
            TypeError,
            f"Linear: expected bias to be True or False, got 1{SIZES}",
        ),
        (
            lambda: fn.Linear(784, None),
            TypeError,
            "Linear: expected bias to be True or False, got None",
        ),
        (
            lambda: fn.Adam(amsgrad=2),
            TypeError,
            "Adam: expected amsgrad to be True or False, got 2",
        ),
        (
            lambda: fn.MaxPool2d(2, ceil_mode=2),
            TypeError,
            "MaxPool2d: expected ceil_mode to be True or False, got 2",
        ),
        (
            lambda: fn.Conv2d(3, 8, kernel_size=3),
            TypeError,
            "Conv2d: expected out_channels, then kernel_size, "
            f"got Conv2d(3, 8, kernel_size=3){CHANNELS}Conv2d(8, 3)?",
        ),
        (
            lambda: fn.Conv1d(in_channels=3, out_channels=8, kernel_size=5, padding=2),
            TypeError,
            "Conv1d: expected out_channels, then kernel_size, got Conv1d(in_channels=3, "
            f"out_channels=8, kernel_size=5, padding=2){CHANNELS}Conv1d(8, 5, padding=2)?",
        ),
        (
            lambda: fn.Conv2d(in_channels=4, out_channels=8),
            TypeError,
            "Conv2d: expected out_channels, then kernel_size, "
            f"got Conv2d(in_channels=4, out_channels=8){CHANNELS}Conv2d(8)?",
        ),
        (
            lambda: fn.Conv2d(8, 3, in_channels=4),
            TypeError,
            "Conv2d: expected out_channels, then kernel_size, "
            f"got Conv2d(8, 3, in_channels=4){CHANNELS}Conv2d(8, 3)?",
        ),
        (
            lambda: fn.ConvTranspose2d(3, out_channels=8, kernel_size=2, stride=2),
            TypeError,
            "ConvTranspose2d: expected out_channels, then kernel_size, got ConvTranspose2d(3, "
            f"out_channels=8, kernel_size=2, stride=2){CHANNELS}ConvTranspose2d(8, 2, stride=2)?",
        ),
        *(
            (
                partial(cls, **{name: 8}, **rest),
                TypeError,
                f"{cls.__name__}: expected no {name}{SIZES}",
            )
            for cls, name, rest in (
                (fn.Linear, "in_features", {"out_features": 4}),
                (fn.LayerNorm, "normalized_shape", {}),
                (fn.BatchNorm, "num_features", {"eps": 0.1}),
                (fn.GroupNorm, "num_channels", {"num_groups": 2}),
                (fn.LSTM, "input_size", {"hidden_size": 4}),
                (fn.MultiheadAttention, "embed_dim", {"num_heads": 2}),
            )
        ),
        *(
            (partial(cls, *sizes, **{name: True}), TypeError, f"{cls.__name__}: expected no {text}")
            for cls, sizes, name, text in (
                (fn.LSTM, (4,), "batch_first", "batch_first: sequences are (N, T, C)"),
                (fn.Linear, (4,), "device", "device: init takes device and dtype"),
                (fn.Conv2d, (4, 3), "padding_mode", "padding_mode: padding is zeros"),
                (fn.Upsample2d, (), "scale_factor", "scale_factor: it is called scale"),
                (fn.Linear, (4,), "use_bias", "use_bias: it is called bias"),
                (fn.Linear, (4,), "key", "key: init, apply, vjp and fwd take the key"),
                (fn.Conv2d, (4, 3), "activation", "activation: it is a layer of its own, as in "
                 "Sequential(Linear(8), ReLU())"),
            )
        ),
        (
            lambda: fn.ReLU(inplace=True),
            TypeError,
            "ReLU: expected no inplace: a Sequential works in place by itself, where nobody else "
            "holds the tensor",
        ),
        (
            lambda: fn.BatchNorm(track_running_stats=True),
            TypeError,
            "BatchNorm: expected no track_running_stats: fn.moments measures statistics, for "
            "fn.for_inference",
        ),
        (
            lambda: fn.Linear(in_features=4, out_features=2, dtype=torch.float32),
            TypeError,
            f"Linear: expected no in_features{SIZES}",
        ),
        (
            lambda: fn.Linear(2, weight_init=fn.initializers.Zeros),
            TypeError,
            f"Linear: {KIND}the class Zeros; did you mean Zeros(…)?",
        ),
        (
            lambda: fn.Linear(2, weight_init=torch.ones),
            TypeError,
            f"Linear: {KIND}{torch.ones!r}; "
            "one of your own is a subclass of fn.initializers.Initializer",
        ),
        (
            lambda: fn.Linear(2, weight_init=dict),
            TypeError,
            f"Linear: {KIND}{dict!r}; one of your own is a subclass of fn.initializers.Initializer",
        ),
        (
            lambda: fn.Linear(2, weight_init=0.5),
            TypeError,
            f"Linear: {KIND}0.5",
        ),
        (
            lambda: Wrapper({"body": {"weight": torch.ones(1)}}).init(fn.key(0), (1,)),
            TypeError,
            "Wrapper(): expected _params to return fn.Param(shape, initializer) for body.weight, "
            f"got tensor([1.]){MADE_OF_LAYERS}",
        ),
        (
            lambda: Wrapper({"body": ({}, {"weight": torch.ones(1)})}).init(fn.key(0), (1,)),
            TypeError,
            f"for body, got ({{}}, {{'weight': tensor([1.])}}){MADE_OF_LAYERS}",
        ),
        (
            lambda: Wrapper(({}, {"weight": torch.ones(1)})).init(fn.key(0), (1,)),
            TypeError,
            "Wrapper(): expected _params to return a dict of fn.Param by name, "
            f"got ({{}}, {{'weight': tensor([1.])}}){MADE_OF_LAYERS}",
        ),
        (
            lambda: Wrapper({"weight": ((1,), fn.initializers.Ones())}).init(fn.key(0), (1,)),
            TypeError,
            "for weight, got ((1,), initializers.Ones())",
        ),
        (
            lambda: Wrapper({"weight": torch.ones(1)}).init(fn.key(0), (1,)),
            TypeError,
            "for weight, got tensor([1.])",
        ),
        (
            lambda: Wrapper(torch.ones(1)).init(fn.key(0), (1,)),
            TypeError,
            "by name, got tensor([1.])",
        ),
        (
            lambda: fn.value_and_grad(fn.ReLU(), Shrunk(), micro_batch=2),
            ValueError,
            "value_and_grad: expected a loss with reduction \"mean\" or \"sum\", for micro_batch, "
            + OWN_LOSS,
        ),
        (
            lambda: fn.distributed.value_and_grad(fn.ReLU(), Shrunk()),
            ValueError,
            "distributed.value_and_grad: expected a loss with reduction \"mean\" or \"sum\", "
            + OWN_LOSS,
        ),
        (
            lambda: check_vjp(torch.relu, (), torch.ones(1)),
            TypeError,
            "check_vjp: expected a layer or a loss, got builtin_function_or_method; "
            "check_function checks functions and modules",
        ),
        (
            lambda: check_function(fn.Linear(3), torch.ones(1, 2)),
            TypeError,
            "check_function: expected a function, got Linear(3); "
            "check_vjp checks layers and losses",
        ),
    ],
)  # fmt: skip
def test_what_newcomers_write_is_refused_with_the_remedy(call, error, message):
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value).endswith(message)


def test_a_subclass_may_name_the_channels_of_x():
    class Named(fn.Conv2d):
        def __init__(self, in_channels, out_channels=8):
            super().__init__(out_channels, in_channels)

    assert Named(in_channels=4).kernel_size == (4, 4)
    assert Named(4, out_channels=2).out_channels == 2


def test_a_state_dict_with_running_statistics():
    module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    net = fn.Sequential(fn.Linear(2), fn.BatchNorm())
    state = module.state_dict()
    with pytest.raises(ValueError, match="unexpected") as caught:
        fn.interop.load_state_dict(net, (3,), state)
    assert str(caught.value) == (
        "load_state_dict: expected the 4 tensors of Sequential of 2 layers, got\n"
        "  1.running_mean: unexpected, of shape (2,)\n"
        "  1.running_var: unexpected, of shape (2,)\n"
        "  1.num_batches_tracked: unexpected, of shape ()\n"
        "BatchNorm keeps no running statistics: leave them out to train on, "
        "or evaluate by from_torch(module.eval(), shape)"
    )
    with pytest.raises(ValueError, match="unexpected") as caught:
        fn.interop.load_state_dict(net, (3,), {"mean": torch.ones(1)})
    assert "running" not in str(caught.value)
