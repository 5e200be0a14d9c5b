"""A numeric example worked by hand for each formula of the source report."""

import math

import pytest
import torch

import funcnet as fn

METHODS = pytest.mark.parametrize("method", ["auto", "unfold"])

# One picture of 3×3, one kernel of 2×2, bias 10:
#
#     x = 1 2 3    kernel = 1 2    grad = 1 0
#         4 5 6             3 4           0 2
#         7 8 9
X = torch.arange(1.0, 10.0, dtype=torch.float64).reshape(1, 1, 3, 3)
PARAMS = {
    "weight": torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]]], dtype=torch.float64),
    "bias": torch.tensor([10.0], dtype=torch.float64),
}
GRAD = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]], dtype=torch.float64)


@METHODS
def test_convolution_forward(method):
    """The patches (1 2 4 5), (2 3 5 6), (4 5 7 8), (5 6 8 9), each times the kernel (1 2 3 4):
    1 + 4 + 12 + 20 = 37, 2 + 6 + 15 + 24 = 47, 4 + 10 + 21 + 32 = 67, 5 + 12 + 24 + 36 = 77."""
    y = fn.Conv2d(1, 2, method=method).apply(PARAMS, X)
    assert y.tolist() == [[[[47, 57], [77, 87]]]]


@METHODS
def test_convolution_gradients(method):
    """dbias is the sum of grad. dweight is grad times the patches: (1 2 4 5) + 2·(5 6 8 9).
    dx puts the kernel at the first place, and twice the kernel at the last."""
    dparams, dx = fn.Conv2d(1, 2, method=method).vjp(PARAMS, X, GRAD)
    assert dparams["bias"].tolist() == [3]
    assert dparams["weight"].tolist() == [[[[11, 14], [20, 23]]]]
    assert dx.tolist() == [[[[1, 2, 0], [3, 6, 4], [0, 6, 8]]]]


@METHODS
def test_convolution_sums_over_the_batch(method):
    layer = fn.Conv2d(1, 2, method=method)
    dparams, dx = layer.vjp(PARAMS, torch.cat([X, 2 * X]), torch.cat([GRAD, GRAD]))
    assert dparams["bias"].tolist() == [6]
    assert dparams["weight"].tolist() == [[[[33, 42], [60, 69]]]]
    assert torch.equal(dx[0], dx[1])


@METHODS
def test_convolution_with_stride_padding_and_dilation(method):
    """Taps 2 apart on the picture padded by 1, every second window: each corner of y sees one
    pixel, through the tap that looks inwards, and the middle of y sees none but 1 3 7 9."""
    layer = fn.Conv2d(1, 2, stride=2, padding=1, dilation=2, bias=False, method=method)
    weight = {"weight": PARAMS["weight"]}
    assert layer.apply(weight, X).tolist() == [[[[4 * 5, 3 * 5], [2 * 5, 1 * 5]]]]
    grad = torch.tensor([[[[1.0, 10.0], [100.0, 1000.0]]]], dtype=torch.float64)
    dparams, dx = layer.vjp(weight, X, grad)
    assert dparams["weight"].tolist() == [[[[5000, 500], [50, 5]]]]
    assert dx.tolist() == [[[[0, 0, 0], [0, 4 + 30 + 200 + 1000, 0], [0, 0, 0]]]]


def test_upsampling():
    """Each pixel four times; the gradient sums over the four."""
    x = torch.tensor([[[[1.0, 2.0]]]])
    y = fn.Upsample2d(2).apply((), x)
    assert y.tolist() == [[[[1, 1, 2, 2], [1, 1, 2, 2]]]]
    grad = torch.tensor([[[[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]]]])
    assert fn.Upsample2d(2).vjp((), x, grad)[1].tolist() == [[[[14, 22]]]]


@METHODS
def test_upsampling_and_convolution(method):
    """The row 1 10 becomes 1 1 10 10, and with a zero on each side, under the kernel 1 2 3:
    2 + 3 = 5, 1 + 2 + 30 = 33, 1 + 20 + 30 = 51, 10 + 20 = 30."""
    layer = fn.UpsampleConv2d(1, (1, 3), scale=(1, 2), bias=False, method=method)
    weight = {"weight": torch.tensor([[[[1.0, 2.0, 3.0]]]])}
    x = torch.tensor([[[[1.0, 10.0]]]])
    assert layer.apply(weight, x).tolist() == [[[[5, 33, 51, 30]]]]
    # With grad 1 0 0 100: the taps of the first output see 0 1 1, those of the last 10 10 0.
    dparams, dx = layer.vjp(weight, x, torch.tensor([[[[1.0, 0.0, 0.0, 100.0]]]]))
    assert dparams["weight"].tolist() == [[[[1000, 1001, 1]]]]
    assert dx.tolist() == [[[[5, 300]]]]


def test_relu():
    x = torch.tensor([-2.0, 0.0, 3.0])
    assert fn.ReLU().apply((), x).tolist() == [0, 0, 3]
    assert fn.ReLU().vjp((), x, torch.tensor([5.0, 6.0, 7.0]))[1].tolist() == [0, 0, 7]


def test_sigmoid():
    """σ(ln 3) = 3/4, with the derivative 3/4 · 1/4; σ(−ln 3) = 1/4, with the same."""
    x = torch.tensor([math.log(3), 0.0, -math.log(3)], dtype=torch.float64)
    y = fn.Sigmoid().apply((), x)
    assert y.tolist() == pytest.approx([0.75, 0.5, 0.25])
    _, dx = fn.Sigmoid().vjp((), x, torch.tensor([16.0, 4.0, -16.0], dtype=torch.float64))
    assert dx.tolist() == pytest.approx([3, 1, -3])


def test_mse():
    """((1 − 2)² + (5 − 2)²) / 2 = 5; the gradient is 2 · (−1, 3) / 2, times grad."""
    x, target = torch.tensor([1.0, 5.0]), torch.tensor([2.0, 2.0])
    assert fn.MSE().apply(x, target) == 5
    assert fn.MSE().vjp(x, target).tolist() == [-1, 3]
    assert fn.MSE().vjp(x, target, 10.0).tolist() == [-10, 30]
    assert fn.MSE("sum").apply(x, target) == 10
    assert fn.MSE("sum").vjp(x, target).tolist() == [-2, 6]


def test_sgd():
    """1 − 0.5 · 4 = −1."""
    sgd, params = fn.SGD(0.5), {"weight": torch.tensor([1.0])}
    params, state = sgd.step(params, {"weight": torch.tensor([4.0])}, sgd.init(params))
    assert params["weight"].tolist() == [-1]
    assert state.step == 1


def test_a_whole_step_of_a_network():
    """One weight w = 2 on one pixel x = 3 and a rectifier, towards 0: the loss is (w·x)² = 36, its
    gradient 2 · w·x · x = 36, and a step of 1/36 leads to w = 1."""
    net = fn.Sequential(fn.Conv2d(1, 1, bias=False), fn.ReLU())
    params = ({"weight": torch.full((1, 1, 1, 1), 2.0, dtype=torch.float64)}, ())
    x = torch.full((1, 1, 1, 1), 3.0, dtype=torch.float64)
    value, grads = fn.value_and_grad(net, fn.MSE())(params, x, torch.zeros_like(x))
    assert (value.item(), grads[0]["weight"].item()) == (36, 36)
    sgd = fn.SGD(1 / 36)
    params, _ = sgd.step(params, grads, sgd.init(params))
    assert params[0]["weight"].item() == pytest.approx(1)
