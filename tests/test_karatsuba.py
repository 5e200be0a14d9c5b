"""Upsampling by 2 before 3×3 taps by Karatsuba's method, against the two steps it stands for."""

import dataclasses
import re
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from registry import budget
from test_properties import close, same
from test_transforms import compile_whole
from test_upsample_conv import assert_exact_on_integers, two_steps

import funcnet as fn
from funcnet.ops import karatsuba, low_resolution, phases, pixelwise, transposed, upsampling
from funcnet.testing import check_vjp, strategies

LAYERS = st.builds(
    fn.UpsampleConv2d,
    st.sampled_from([1, 2, 16, 17]),
    bias=st.booleans(),
    method=st.just("karatsuba"),
)
EVEN = st.sampled_from([2, 4, 6, 8])
SHAPES = st.tuples(st.integers(1, 3), EVEN, EVEN)
FLOAT64 = st.just(torch.float64)
MANY = {name: getattr(karatsuba, name) for name in ("_MANY_PIXELS", "_MANY_PRODUCTS")}


def chosen(layer, x, weight):
    """The implementation that the layer takes."""
    return upsampling.implementation(x, weight, layer.scale, layer._window, layer.method)


def cases(**kwargs):
    return strategies.cases(LAYERS, shapes=SHAPES, batches=st.integers(1, 3), **kwargs)


@pytest.fixture(scope="module", autouse=True)
def everything():
    """Have even the smallest pictures done this way."""
    with mock.patch.multiple(karatsuba, **dict.fromkeys(MANY, 0)):
        yield


@given(cases(dtypes=FLOAT64), st.sampled_from([pixelwise._FEW, 0]), st.data())
def test_value_and_gradients_are_those_of_the_two_steps(case, few, data):
    layer, params, x = case
    assert chosen(layer, x, params["weight"]) is karatsuba
    with mock.patch.object(pixelwise, "_FEW", few):
        y, residuals = layer.fwd(params, x)
        grad = data.draw(strategies.tensors(y.shape, torch.float64))
        dparams, dx = layer.bwd(params, residuals, grad)
        without, nothing = layer.bwd(params, residuals, grad, input_grad=False)
    close(y, two_steps(layer).apply(((), params), x))
    (_, expected), expected_dx = two_steps(layer).vjp(((), params), x, grad)
    close((dparams, dx), (expected, expected_dx))
    assert nothing is None
    assert same(without, dparams)


@given(cases(integers=True), st.integers(0, 99))
def test_exact_on_integers(case, seed):
    assert_exact_on_integers(karatsuba, case, seed)


@budget(8)
@given(
    strategies.cases(
        LAYERS,
        shapes=st.tuples(st.integers(1, 2), st.sampled_from([2, 4]), st.sampled_from([2, 4])),
        batches=st.integers(1, 2),
        dtypes=strategies.dtypes() | st.sampled_from([torch.bfloat16, torch.float16]),
    )
)
def test_the_contract_holds(case):
    """In images of both ends and, with four rows, of a pair of odd i between them."""
    check_vjp(*case)


def test_errors_are_those_of_rounding():
    layer = fn.UpsampleConv2d(128, bias=False, method="karatsuba")
    params, x = layer.init(fn.key(0), (128, 16, 16)), fn.normal(fn.key(1), (8, 128, 16, 16))
    grad = fn.normal(fn.key(2), (8, 128, 32, 32))
    y, (dparams, dx) = layer.apply(params, x), layer.vjp(params, x, grad)
    net, double = two_steps(layer), ((), {"weight": params["weight"].double()})
    exact_y = net.apply(double, x.double())
    (_, exact), exact_dx = net.vjp(double, x.double(), grad.double())
    pairs = [(y, exact_y), (dparams["weight"], exact["weight"]), (dx, exact_dx)]
    for ours, theirs in pairs:
        assert (ours - theirs).norm() < 2e-6 * theirs.norm()


@pytest.mark.parametrize("out_channels", [2, 17])
def test_transforms(out_channels):
    layer = fn.UpsampleConv2d(out_channels, method="karatsuba")
    key = fn.key(0)
    each = [layer.init(fn.fold_in(key, i), (3, 4, 2), dtype=torch.float64) for i in range(2)]
    stacked = {name: torch.stack([params[name] for params in each]) for name in each[0]}
    x = fn.normal(key, (2, 2, 3, 4, 2), dtype=torch.float64)
    grad = fn.normal(key, (2, 2, out_channels, 8, 4), dtype=torch.float64)
    apply, vjp = torch.func.vmap(layer.apply), torch.func.vmap(layer.vjp)
    for i, params in enumerate(each):
        close(apply(stacked, x)[i], layer.apply(params, x[i]))
        (dparams, dx), expected = vjp(stacked, x, grad), layer.vjp(params, x[i], grad[i])
        close(({name: leaf[i] for name, leaf in dparams.items()}, dx[i]), expected)
        over_params = torch.func.vmap(layer.apply, in_dims=(0, None))(stacked, x[0])
        close(over_params[i], layer.apply(params, x[0]))
        over_x = torch.func.vmap(layer.apply, in_dims=(None, 0))(each[0], x)
        close(over_x[i], layer.apply(each[0], x[i]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("out_channels", [2, 17])
def test_autograd_goes_through(out_channels):
    layer = fn.UpsampleConv2d(out_channels, bias=False, method="karatsuba")
    weight = layer.init(fn.key(0), (2, 4, 2), dtype=torch.float64)["weight"].requires_grad_()
    x = fn.normal(fn.key(1), (2, 2, 4, 2), dtype=torch.float64).requires_grad_()
    grad = fn.normal(fn.key(2), (2, out_channels, 8, 4), dtype=torch.float64).requires_grad_()

    def apply(weight, x):
        return layer.apply({"weight": weight}, x)

    def vjp(weight, x, grad):
        dparams, dx = layer.vjp({"weight": weight}, x, grad)
        return dparams["weight"], dx

    assert torch.autograd.gradcheck(apply, (weight, x), fast_mode=True, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(apply, (weight, x), fast_mode=True)
    assert torch.autograd.gradcheck(vjp, (weight, x, grad), fast_mode=True)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled():
    layer = fn.UpsampleConv2d(17, method="karatsuba")
    params, x = layer.init(fn.key(0), (3, 4, 4)), fn.normal(fn.key(1), (2, 3, 4, 4))
    grad = fn.normal(fn.key(2), (2, 17, 8, 8))
    close(compile_whole(layer.apply)(params, x), layer.apply(params, x))
    close(compile_whole(layer.vjp)(params, x, grad), layer.vjp(params, x, grad))


@pytest.mark.parametrize(
    ("out_channels", "shape", "implementation"),
    [
        (64, (8, 64, 32, 32), karatsuba),
        (64, (4, 128, 32, 32), karatsuba),
        (64, (4, 127, 32, 32), phases),
        (1024, (3, 1024, 32, 32), low_resolution),
        (64, (8, 64, 33, 32), phases),
        (64, (8, 64, 32, 33), phases),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_for_many_pixels_and_channels_alone(out_channels, shape, implementation):
    layer = fn.UpsampleConv2d(out_channels, padding=1, method="karatsuba")
    x = torch.zeros(1).expand(shape)
    weight = torch.zeros(1).expand(out_channels, shape[1], 3, 3)
    with mock.patch.multiple(karatsuba, **MANY):
        assert chosen(layer, x, weight) is implementation
        assert chosen(dataclasses.replace(layer, method="auto"), x, weight) is not karatsuba
    assert chosen(layer, x.to("meta"), weight) is transposed


@pytest.mark.parametrize(
    "settings",
    [
        {"scale": 3},
        {"scale": (2, 1)},
        {"kernel_size": 5},
        {"padding": 0},
        {"padding": (1, 0)},
        {"padding": "valid"},
    ],
    ids=str,
)
def test_refused_where_it_does_not_apply(settings):
    message = 'UpsampleConv2d: expected scale 2, kernel_size 3 and padding 1 or "same"'
    with pytest.raises(ValueError, match=re.escape(message)):
        fn.UpsampleConv2d(4, **settings, method="karatsuba")
