"""Activations: PyTorch's values and slopes, at kinks, infinities and NaN too; softmax; PReLU."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import funcnet as fn
from funcnet.initializers import Constant, Uniform
from funcnet.ops.need import Need
from funcnet.testing import check_vjp, strategies
from funcnet.testing.registry import REGISTRY
from funcnet.testing.registry.activations import ROWS

INF, NAN = math.inf, math.nan
ANY_SHAPE = st.lists(st.integers(0, 4), max_size=5)
FLOATS = st.floats(width=32)

FUNCTIONS = {
    fn.ReLU(): F.relu,
    fn.Sigmoid(): torch.sigmoid,
    fn.Tanh(): torch.tanh,
    fn.LeakyReLU(): F.leaky_relu,
    fn.LeakyReLU(0.0): lambda x: F.leaky_relu(x, 0.0),
    fn.LeakyReLU(-0.5): lambda x: F.leaky_relu(x, -0.5),
    fn.Hardtanh(): F.hardtanh,
    fn.Hardtanh(-0.25, 2.0): lambda x: F.hardtanh(x, -0.25, 2.0),
    fn.ReLU6(): F.relu6,
    fn.GELU(): F.gelu,
    fn.GELU("tanh"): lambda x: F.gelu(x, approximate="tanh"),
    fn.SiLU(): F.silu,
    fn.Mish(): F.mish,
    fn.Softplus(): F.softplus,
    fn.Softplus(-2.0, 3.0): lambda x: F.softplus(x, -2.0, 3.0),
    fn.ELU(): F.elu,
    fn.ELU(-1.5): lambda x: F.elu(x, -1.5),
    fn.SELU(): F.selu,
    fn.Hardswish(): F.hardswish,
    fn.Hardsigmoid(): REGISTRY[fn.Hardsigmoid].twin(None, None),
    fn.LogSigmoid(): F.logsigmoid,
    fn.Softsign(): F.softsign,
}
IN_PLACE = [layer for layer in FUNCTIONS if hasattr(layer, "_fwd_")]
functions = pytest.mark.parametrize(
    ("layer", "function"), FUNCTIONS.items(), ids=[*map(repr, FUNCTIONS)]
)

SPECIAL = [0.0, -0.0, 1.0, -1.0, 3.0, -3.0, 6.0, -6.0, 2.0, -2.0, -0.25, 20.0, -20.0]
SPECIAL += [1e-30, -1e-30, 50.0, -50.0, 1e4, -1e4]


def gradient(layer, x, grad=None):
    grad = torch.ones_like(x) if grad is None else grad
    return layer.vjp((), x, grad)[1]


def by_autograd(function, x, grad):
    leaf = x.clone().requires_grad_()
    y = function(leaf)
    return y.detach(), torch.autograd.grad(y, leaf, grad)[0]


def test_every_activation_is_here():
    named = {type(layer) for layer in FUNCTIONS}
    assert named == {row.layer for row in ROWS} - {fn.Softmax, fn.LogSoftmax, fn.PReLU}


@functions
@given(ANY_SHAPE, st.data())
def test_any_rank_and_layout(layer, function, shape, data):
    x = data.draw(strategies.tensors(shape, data.draw(strategies.dtypes())))
    grad = data.draw(strategies.tensors(shape, x.dtype))
    y, dx = layer.apply((), x), gradient(layer, x, grad)
    assert y.shape == dx.shape == x.shape
    expected_y, expected_dx = by_autograd(function, x, grad)
    torch.testing.assert_close(y, expected_y)
    torch.testing.assert_close(dx, expected_dx)


@functions
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_kinks_and_far_out(layer, function, dtype):
    """PyTorch's choice at each kink, and no digit lost where PyTorch keeps it."""
    if layer == fn.Softsign():
        return  # of which autograd's gradient cancels far out
    x = torch.tensor(SPECIAL, dtype=dtype)
    y, dx = by_autograd(function, x, torch.ones_like(x))
    tolerance = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close(layer.apply((), x), y, rtol=tolerance, atol=0)
    torch.testing.assert_close(gradient(layer, x), dx, rtol=tolerance, atol=0)


@functions
def test_slopes_that_transforms_can_follow_are_the_kernels(layer, function):
    """Under autograd and torch.func.vmap, which do not take every kernel."""
    x = torch.tensor(SPECIAL, dtype=torch.float64)
    grad = torch.linspace(-1.0, 2.0, len(x), dtype=torch.float64)
    dx = gradient(layer, x, grad)
    followed = gradient(layer, x.clone().requires_grad_(), grad)
    torch.testing.assert_close(followed.detach(), dx)
    mapped = torch.func.vmap(lambda x, grad: gradient(layer, x, grad))(x, grad)
    torch.testing.assert_close(mapped, dx)


@functions
def test_infinities_and_nan(layer, function):
    """Finite wherever PyTorch is."""
    x = torch.tensor([INF, -INF, NAN])
    y, dx = by_autograd(function, x, torch.ones_like(x))
    for ours, theirs in [(layer.apply((), x), y), (gradient(layer, x), dx)]:
        known = ~theirs.isnan()
        assert torch.equal(ours[known], theirs[known])


@functions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_further_from_the_truth_than_torch(layer, function, dtype):
    x = torch.cat([torch.linspace(-12, 12, 4001), torch.linspace(-300, 300, 2001)]).to(dtype)
    y, dx = by_autograd(function, x.double(), torch.ones_like(x, dtype=torch.float64))
    their_y, their_dx = by_autograd(function, x, torch.ones_like(x))
    for ours, theirs, truth in [
        (layer.apply((), x), their_y, y),
        (gradient(layer, x), their_dx, dx),
    ]:
        known = truth.abs() > torch.finfo(dtype).tiny
        worst, allowed = (
            ((got.double() - truth)[known] / truth[known]).abs().max() for got in (ours, theirs)
        )
        assert worst <= allowed + torch.finfo(dtype).eps


@pytest.mark.parametrize("layer", IN_PLACE, ids=repr)
@given(st.data())
def test_in_place_is_the_same(layer, data):
    wide = ["normal", "integers", "saturated"]
    x = data.draw(strategies.tensors((2, 3), layouts=["contiguous", "transposed"], values=wide))
    grad = data.draw(strategies.tensors((2, 3), layouts=["contiguous", "transposed"]))
    net = fn.Sequential(fn.Upsample2d(1), layer, fn.Upsample2d(1))  # which own what they return
    x, grad = x[:, :, None, None], grad[:, :, None, None]
    params = net.init(fn.key(0), x.shape[1:])
    assert torch.equal(net.apply(params, x), layer.apply((), x))
    assert torch.equal(net.vjp(params, x, grad)[1], gradient(layer, x, grad))


@pytest.mark.parametrize("layer", IN_PLACE, ids=repr)
def test_in_place_makes_no_tensor(layer):
    x, grad = torch.randn(2, 3), torch.randn(2, 3)
    y, kept = layer._fwd_((), x, None)
    dx = layer._bwd_((), kept, grad, Need())[1]
    assert (y.data_ptr() == x.data_ptr()) == (layer != fn.LeakyReLU(-0.5))
    assert (dx.data_ptr() == grad.data_ptr()) == (layer not in (fn.Sigmoid(), fn.Tanh()))


def test_what_each_keeps():
    """Those with y's slope keep y, which the layer behind keeps anyway; the others x."""
    x = torch.randn(3)
    for layer in FUNCTIONS:
        y, (_, kept) = layer.fwd((), x)
        assert kept is (y if layer in IN_PLACE and layer != fn.LeakyReLU(-0.5) else x)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.layer.__name__)
def test_differentiable_twice(row):
    """Autograd and torch.func see through the gradient."""
    layer, shape = row.examples[0]
    x = fn.normal(fn.key(0), (2, *shape), dtype=torch.float64).requires_grad_()
    params = layer.init(fn.key(1), shape, dtype=torch.float64)
    grad = fn.normal(fn.key(2), x.shape, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x: layer.vjp(params, x, grad)[1], x)
    dx = torch.func.grad(lambda x: (layer.apply(params, x) * grad).sum())(x.detach())
    torch.testing.assert_close(dx, layer.vjp(params, x.detach(), grad)[1])
    torch.autograd.gradgradcheck(lambda x: layer.apply(params, x), x)


# --- ReLU and Sigmoid


def test_relu_at_its_kink_and_beyond():
    x = torch.tensor([-INF, -1.0, -0.0, 0.0, 1e-38, 2.0, INF])
    assert fn.ReLU().apply((), x).tolist() == [0, 0, 0, 0, pytest.approx(1e-38), 2, INF]
    assert gradient(fn.ReLU(), x).tolist() == [0, 0, 0, 0, 1, 1, 1]


def test_relu_keeps_nan():
    assert fn.ReLU().apply((), torch.tensor([NAN])).isnan().all()


@given(st.lists(FLOATS, min_size=1), st.lists(FLOATS, min_size=1))
def test_relu_lets_grad_pass_where_x_is_positive(xs, grads):
    size = min(len(xs), len(grads))
    x, grad = torch.tensor(xs[:size]), torch.tensor(grads[:size])
    known = ~x.isnan()
    expected = torch.where(x > 0, grad, torch.zeros_like(grad))
    dx = gradient(fn.ReLU(), x, grad)
    assert torch.equal(dx[known].nan_to_num(7), expected[known].nan_to_num(7))


def test_sigmoid_far_out():
    x = torch.tensor([-INF, -1000.0, -80.0, 0.0, 80.0, 1000.0, INF])
    for dtype in (torch.float32, torch.float64):
        y = fn.Sigmoid().apply((), x.to(dtype))
        assert y[[0, 1, 3, 5, 6]].tolist() == [0, 0, 0.5, 1, 1]
        assert float(y[2]) == pytest.approx(math.exp(-80), rel=1e-5)
        dx = gradient(fn.Sigmoid(), x.to(dtype))
        assert dx.isfinite().all()
        assert dx[[0, 1, 3, 5, 6]].tolist() == [0, 0, 0.25, 0, 0]


@given(st.floats(-700, 700))
def test_sigmoid_to_the_last_places(x):
    y = fn.Sigmoid().apply((), torch.tensor(x, dtype=torch.float64))
    expected = 1 / (1 + math.exp(-x)) if x >= 0 else math.exp(x) / (1 + math.exp(x))
    assert float(y) == pytest.approx(expected, rel=1e-14)
    dx = gradient(fn.Sigmoid(), torch.tensor(x, dtype=torch.float64))
    assert float(dx) == pytest.approx(expected * (1 - float(y)), rel=1e-14, abs=1e-300)


@given(st.floats(-50, 50))
def test_sigmoid_is_odd_about_a_half(x):
    x = torch.tensor(x, dtype=torch.float64)
    layer = fn.Sigmoid()
    torch.testing.assert_close(layer.apply((), x) + layer.apply((), -x), torch.ones_like(x))
    torch.testing.assert_close(gradient(layer, x), gradient(layer, -x), rtol=1e-9, atol=1e-15)


def test_log_sigmoid_is_minus_softplus_of_minus_x():
    x = torch.linspace(-100, 100, 2001, dtype=torch.float64)
    y = -torch.log1p((-x).exp())
    torch.testing.assert_close(fn.LogSigmoid().apply((), x), y, rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient(fn.LogSigmoid(), x), y.exp().neg() + 1, atol=1e-15, rtol=0)


def test_softsign_far_out():
    x = torch.tensor([1e4, -1e4, 1e30, 0.0, INF], dtype=torch.float64)
    expected = [1 / 10001**2, 1 / 10001**2, 1e-60, 1.0, 0.0]
    assert gradient(fn.Softsign(), x).tolist() == pytest.approx(expected, rel=1e-14)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_softsign_s_slope_is_0_nowhere_that_the_dtype_holds_it(dtype):
    x = torch.tensor([300.0, -1000.0, 3000.0], dtype=dtype)
    exact = (1 + x.double().abs()) ** -2
    torch.testing.assert_close(gradient(fn.Softsign(), x).double(), exact, rtol=0.02, atol=6e-8)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@given(st.floats(0.001, 1e4), st.booleans())
def test_bounds_that_a_dtype_rounds(dtype, bound, far):
    """Rounded inward, a bound itself is within the bounds."""
    layer = fn.Hardtanh(-bound, 6e4 if far else bound)
    x = torch.tensor([-3 * bound, -bound, -bound / 2, 0.0, bound / 2, bound, 3 * bound]).to(dtype)
    for net, params in ((layer, ()), (fn.Sequential(fn.Tanh(), layer), ((), ()))):
        dx = net.vjp(params, x, torch.ones_like(x))[1]
        leaf = x.clone().requires_grad_()
        before = leaf if net is layer else leaf.tanh()
        y = F.hardtanh(before, layer.min_val, layer.max_val)
        torch.testing.assert_close(dx, torch.autograd.grad(y.sum(), leaf)[0])


# --- Softmax


@given(st.data())
def test_softmax_of_large_numbers_and_any_axis(data):
    rank = data.draw(st.integers(1, 3))
    shape = (2, *data.draw(st.lists(st.integers(1, 4), min_size=rank, max_size=rank)))
    dim = data.draw(st.sampled_from([*range(1, rank + 1), *range(-rank, 0)]))
    x = 1e4 * data.draw(strategies.tensors(shape, torch.float64, integers=True))
    grad = data.draw(strategies.tensors(shape, torch.float64))
    for layer, function in [(fn.Softmax(dim), F.softmax), (fn.LogSoftmax(dim), F.log_softmax)]:
        y, dx = by_autograd(lambda x, f=function: f(x, dim), x, grad)
        torch.testing.assert_close(layer.apply((), x), y, rtol=1e-12, atol=0)
        torch.testing.assert_close(gradient(layer, x, grad), dx, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("cls", [fn.Softmax, fn.LogSoftmax])
def test_softmax_refuses_the_batch(cls):
    with pytest.raises(ValueError, match=f"{cls.__name__}: expected dim not to be 0, the batch"):
        cls(0)
    message = "expected dim to be an axis after the batch of x of shape \\(N, 4\\), got -2"
    with pytest.raises(ValueError, match=message):
        cls(-2).apply((), torch.zeros(3, 4))
    with pytest.raises(ValueError, match="expected dim to be an axis after the batch"):
        cls(2).out_shape((4,))
    with pytest.raises(ValueError, match="expected dim to be an axis after the batch"):
        cls(-1).apply((), torch.zeros(3))
    with pytest.raises(ValueError, match="expected dim to be an axis after the batch"):
        cls(-1).apply((), torch.tensor(0.0))
    with pytest.raises(TypeError, match="expected dim to be an int"):
        cls(1.0)


# --- PReLU


@given(st.data())
def test_prelu_is_torchs(data):
    shape = data.draw(st.sampled_from([(2, 3), (2, 3, 4), (1, 3, 2, 2), (0, 3), (3, 3, 1)]))
    x = data.draw(strategies.tensors(shape, torch.float64))
    grad = data.draw(strategies.tensors(shape, torch.float64))
    layer = fn.PReLU(data.draw(st.sampled_from([1, 3])))
    weight = data.draw(strategies.tensors((layer.num_parameters,), torch.float64))
    leaves = [x.contiguous().requires_grad_(), weight.clone().requires_grad_()]
    y = F.prelu(*leaves)
    dx, dweight = torch.autograd.grad(y, leaves, grad)
    torch.testing.assert_close(layer.apply({"weight": weight}, x), y)
    dparams, own_dx = layer.vjp({"weight": weight}, x, grad)
    torch.testing.assert_close(own_dx, dx)
    torch.testing.assert_close(dparams["weight"], dweight)


def test_prelu_of_any_rank():
    params = {"weight": torch.tensor([0.5])}
    for shape in [(), (3,), (2, 3)]:
        x = -torch.ones(shape)
        assert torch.equal(fn.PReLU().apply(params, x), 0.5 * x)
        dparams, dx = fn.PReLU().vjp(params, x, torch.ones(shape))
        assert torch.equal(dx, torch.full(shape, 0.5))
        assert torch.equal(dparams["weight"], -torch.tensor([float(x.numel())]))


@pytest.mark.parametrize("channels", [1, 5])
def test_prelu_mapped_over_weights_and_examples_apart(channels):
    layer = fn.PReLU(channels)
    params = {"weight": fn.normal(fn.key(0), (2, channels))}
    xs, grad = fn.normal(fn.key(1), (3, 4, 5)), fn.normal(fn.key(2), (4, 5))

    def of_each(params):
        return torch.func.vmap(lambda x: layer.vjp(params, x, grad))(xs)

    dparams, dxs = torch.func.vmap(of_each)(params)
    for i, weight in enumerate(params["weight"]):
        for j, x in enumerate(xs):
            own, dx = layer.vjp({"weight": weight}, x, grad)
            torch.testing.assert_close(dxs[i, j], dx)
            torch.testing.assert_close(dparams["weight"][i, j], own["weight"])


def test_prelu_at_its_kink_takes_the_left_slope():
    params = {"weight": torch.tensor([0.5])}
    assert fn.PReLU().vjp(params, torch.zeros(1), torch.ones(1))[1].tolist() == [0.5]


def test_prelu_starts_from_a_quarter_or_as_it_is_told():
    assert fn.PReLU(3).init(fn.key(0), (3, 2))["weight"].tolist() == [0.25] * 3
    layer = fn.PReLU(3, weight_init=Uniform(1.0, 2.0))
    weight = layer.init(fn.key(0), (3, 2))["weight"]
    assert bool(((weight >= 1) & (weight < 2)).all())
    assert fn.PReLU(weight_init=Constant(0.5)) != fn.PReLU(weight_init=Constant(0.25))
    with pytest.raises(TypeError, match="PReLU: expected weight_init to be an initialiser or None"):
        fn.PReLU(weight_init=0.5)


def test_prelu_refuses_other_channels():
    for shape, got in [((4,), "4"), ((4, 2), "4"), ((2, 3), "2"), ((), "none")]:
        with pytest.raises(ValueError, match=f"expected 3 channels, got {got}"):
            fn.PReLU(3).out_shape(shape)


# --- Hyperparameters


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fn.GELU("erf"), ValueError, 'GELU: expected approximate to be "none" or "tanh"'),
        (lambda: fn.Softplus(0.0), ValueError, "Softplus: expected beta not to be 0, got 0.0"),
        (lambda: fn.Softplus(NAN), ValueError, "Softplus: expected beta to be finite"),
        (lambda: fn.ELU(INF), ValueError, "ELU: expected alpha to be finite"),
        (lambda: fn.LeakyReLU("0.1"), TypeError, "expected negative_slope to be a number"),
        (lambda: fn.Hardtanh(1.0, 1.0), ValueError, "Hardtanh: expected min_val < max_val, got 1"),
        (lambda: fn.PReLU(0), ValueError, "PReLU: expected num_parameters >= 1, got 0"),
    ],
)
def test_refused_settings(make, error, message):
    with pytest.raises(error, match=message):
        make()


def test_activations_are_values():
    assert fn.ReLU() == fn.ReLU() != fn.Sigmoid()
    assert repr(fn.ReLU()) == "ReLU()"
    assert repr(fn.GELU("tanh")) == "GELU(approximate='tanh')"
    assert repr(fn.Softmax(-1)) == "Softmax(-1)"
    assert fn.ReLU().init(fn.key(0), (3, 4)) == ()
    assert fn.Sigmoid().out_shape((3, 4)) == (3, 4)


@given(strategies.cases(strategies.layers(*(row.layer for row in ROWS))))
def test_gradients(case):
    check_vjp(*case)
