"""UpsampleConv2d: every way of doing it against the two steps that it stands for."""

import dataclasses
from types import SimpleNamespace
from unittest import mock

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import funcnet as fn
from funcnet.ops import (
    low_resolution,
    native,
    phases,
    pixelwise,
    processor,
    transposed,
    upsampling,
)
from funcnet.ops import two_steps as two_steps_of
from funcnet.ops.need import Need
from funcnet.ops.window import Window, padding_sides
from funcnet.testing import strategies

LAYERS = strategies.layers(fn.UpsampleConv2d)
CASES = strategies.cases(LAYERS)
BY_PHASES = SimpleNamespace(convolve=phases.convolve, gradients=low_resolution.gradients)
WAYS = pytest.mark.parametrize(
    "way",
    [low_resolution, BY_PHASES, transposed, two_steps_of],
    ids=["low", "phases", "transposed", "two_steps"],
)


def two_steps(layer):
    conv = fn.Conv2d(
        layer.out_channels,
        layer.kernel_size,
        padding=layer.padding,
        bias=layer.bias,
        method="unfold",
    )
    return fn.Sequential(fn.Upsample2d(layer.scale), conv)


def arguments(layer, params, x):
    """What the two modules behind the layer take, which do not add a padding of their own."""
    window = Window(layer.kernel_size, sides=padding_sides(layer.padding, layer.kernel_size))
    return x, params["weight"], layer.scale, window


def reference(layer, params, x):
    (top, bottom), (left, right) = padding_sides(layer.padding, layer.kernel_size)
    up = x.repeat_interleave(layer.scale[0], 2).repeat_interleave(layer.scale[1], 3)
    return F.conv2d(F.pad(up, (left, right, top, bottom)), params["weight"], params.get("bias"))


@given(CASES)
def test_value_is_that_of_torch(case):
    layer, params, x = case
    torch.testing.assert_close(layer.apply(params, x), reference(layer, params, x))


@given(strategies.cases(LAYERS, dtypes=st.just(torch.float64)))
def test_gradient_is_that_of_autograd(case):
    layer, params, x = case
    leaves = [leaf.clone().requires_grad_() for leaf in (*params.values(), x)]
    y = reference(layer, dict(zip(params, leaves[:-1], strict=True)), leaves[-1])
    grad = fn.normal(fn.key(1), y.shape, dtype=x.dtype)
    expected = torch.autograd.grad(y, leaves, grad)
    dparams, dx = layer.vjp(params, x, grad)
    for ours, theirs in zip((*dparams.values(), dx), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("out_channels", [1, 32])
@pytest.mark.parametrize("taps", [1, 2, 3])
@pytest.mark.parametrize("scale", [(2, 1), (4, 1), (1, 2), (2, 3)], ids=str)
def test_autograd_of_apply_is_the_gradient(scale, taps, out_channels):
    layer = fn.UpsampleConv2d(out_channels, taps, scale=scale)
    params = layer.init(fn.key(0), (2, 4, 3), dtype=torch.float64)
    x = fn.normal(fn.key(1), (2, 2, 4, 3), dtype=torch.float64)
    inputs = optree.tree_map(lambda leaf: leaf.clone().requires_grad_(), (params, x))
    y = layer.apply(*inputs)
    grad = fn.normal(fn.key(2), y.shape, dtype=x.dtype)
    found = torch.autograd.grad(y, optree.tree_leaves(inputs), grad)
    for ours, theirs in zip(optree.tree_leaves(layer.vjp(params, x, grad)), found, strict=True):
        torch.testing.assert_close(ours, theirs)


@WAYS
@given(case=strategies.cases(LAYERS, dtypes=st.just(torch.float64)))
def test_each_way_is_the_two_steps(way, case):
    layer, params, x = case
    steps = two_steps(layer)
    x, weight, scale, window = arguments(layer, params, x)
    y = way.convolve(x, weight, params.get("bias"), scale, window)
    torch.testing.assert_close(y, steps.apply(((), params), x), rtol=1e-11, atol=1e-11)
    grad = fn.normal(fn.key(1), y.shape, dtype=x.dtype)
    (_, expected), expected_dx = steps.vjp(((), params), x, grad)
    dweight, dx = way.gradients(x, weight, grad, scale, window, Need())
    torch.testing.assert_close(dweight, expected["weight"], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dx, expected_dx, rtol=1e-10, atol=1e-10)
    without, nothing = way.gradients(x, weight, grad, scale, window, Need(input=False))
    assert nothing is None
    torch.testing.assert_close(without, dweight)


def assert_exact_on_integers(way, case, seed):
    """Value and adjoints, ⟨f(x), g⟩ = ⟨x, dx(g)⟩ = ⟨w, dw(x, g)⟩: bit for bit."""
    layer, params, x = case
    x, weight, scale, window = arguments(layer, params, x)
    y = way.convolve(x, weight, None, scale, window)
    assert torch.equal(y, reference(layer, {"weight": weight}, x))
    generator = torch.Generator().manual_seed(seed)
    grad = torch.randint(-3, 4, y.shape, generator=generator).to(x.dtype)
    dweight, dx = way.gradients(x, weight, grad, scale, window, Need())
    product = (y * grad).sum()
    assert (x * dx).sum() == product
    assert (weight * dweight).sum() == product


@WAYS
@given(case=strategies.cases(LAYERS, integers=True), seed=st.integers(0, 99))
def test_each_way_is_exact_on_integers(way, case, seed):
    assert_exact_on_integers(way, case, seed)


@WAYS
@pytest.mark.parametrize("scale", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 6])
def test_every_phase_and_tap(way, scale, taps):
    """Kernels of one tap after another, over every padding up to beyond the kernel's reach."""
    x = torch.tensor([1.0, 10.0, 100.0], dtype=torch.float64).reshape(1, 1, 1, 3)
    for padding in range(taps + 2):
        window = Window((1, taps), sides=((0, 0), (padding, padding)))
        if 3 * scale + 2 * padding < taps:
            continue
        for tap in range(taps):
            weight = torch.zeros(1, 1, 1, taps, dtype=torch.float64)
            weight[..., tap] = 1
            up = F.pad(x.repeat_interleave(scale, 3), (padding, padding))
            y = way.convolve(x, weight, None, (1, scale), window)
            assert torch.equal(y, up[..., tap : up.shape[-1] - taps + 1 + tap])


@given(CASES)
def test_both_methods_give_the_same_numbers(case):
    layer, params, x = case
    auto = dataclasses.replace(layer, method="auto")
    steps = dataclasses.replace(layer, method="unfold")
    y = auto.apply(params, x)
    torch.testing.assert_close(y, steps.apply(params, x))
    grad = fn.normal(fn.key(1), y.shape, dtype=x.dtype)
    tolerance = 1e-4 if x.dtype == torch.float32 else 1e-10
    torch.testing.assert_close(
        auto.vjp(params, x, grad), steps.vjp(params, x, grad), rtol=tolerance, atol=tolerance
    )


def test_many_channels_and_pictures(monkeypatch):
    """Enough of both for the batch to be done in parts, in either memory order."""
    monkeypatch.setattr(upsampling, "_fastest", lambda *_: low_resolution)
    for out_channels in (3, 20):
        layer = fn.UpsampleConv2d(out_channels)
        params = layer.init(fn.key(0), (5, 40, 40), dtype=torch.float64)
        x = fn.normal(fn.key(1), (9, 5, 40, 40), dtype=torch.float64)
        y, residuals = layer.fwd(params, x)
        torch.testing.assert_close(y, two_steps(layer).apply(((), params), x))
        grad = fn.normal(fn.key(2), y.shape, dtype=torch.float64)
        (_, expected), dx = two_steps(layer).vjp(((), params), x, grad)
        torch.testing.assert_close(layer.bwd(params, residuals, grad), (expected, dx))


@pytest.mark.parametrize("out_channels", [3, 17])  # planes, and pixels
@pytest.mark.parametrize(
    ("module", "limit", "value"),
    [
        (low_resolution, "_CHUNK_ENTRIES", 900),
        (low_resolution, "_CHUNK_ENTRIES", 100),
        (pixelwise, "_FEW", 0),
    ],
)
def test_in_parts_and_by_large_products(monkeypatch, out_channels, module, limit, value):
    layer = fn.UpsampleConv2d(out_channels)
    params = layer.init(fn.key(0), (2, 4, 4), dtype=torch.float64)
    x = fn.normal(fn.key(1), (7, 2, 4, 4), dtype=torch.float64)
    grad = fn.normal(fn.key(2), (7, out_channels, 8, 8), dtype=torch.float64)
    monkeypatch.setattr(upsampling, "_fastest", lambda *_: low_resolution)
    whole = layer.apply(params, x), layer.vjp(params, x, grad)
    monkeypatch.setattr(module, limit, value)
    torch.testing.assert_close((layer.apply(params, x), layer.vjp(params, x, grad)), whole)


def test_the_weight_is_laid_out_tap_by_tap():
    """As the products at the low resolution read it; row by row for those of the two steps."""
    auto, unfold = (fn.UpsampleConv2d(4, 3, method=m) for m in ("auto", "unfold"))
    weights = [layer.init(fn.key(0), (5, 4, 4))["weight"] for layer in (auto, unfold)]
    assert weights[0].permute(2, 3, 0, 1).is_contiguous()
    assert weights[1].is_contiguous()
    assert torch.equal(*weights)


def test_an_unknown_method_is_refused():
    expected = 'expected method to be "auto" or "unfold" or "karatsuba", got \'fold\''
    with pytest.raises(ValueError, match=expected):
        fn.UpsampleConv2d(4, method="fold")


def test_pictures_without_channels_are_refused():
    with pytest.raises(
        ValueError, match=r"UpsampleConv2d\(4\): expected at least 1 channel, got 0"
    ):
        fn.UpsampleConv2d(4).out_shape((0, 4, 4))


@pytest.mark.parametrize(
    ("layer", "shape", "forward", "backward"),
    [
        (fn.UpsampleConv2d(128), (64, 256, 8, 8), low_resolution, low_resolution),
        (fn.UpsampleConv2d(3), (64, 128, 16, 16), low_resolution, low_resolution),
        (fn.UpsampleConv2d(32), (1, 64, 128, 128), phases, low_resolution),
        (fn.UpsampleConv2d(32, 5), (8, 32, 16, 16), phases, low_resolution),
        (fn.UpsampleConv2d(3, 9), (4, 16, 16, 16), phases, low_resolution),
        (fn.UpsampleConv2d(32, 9), (4, 32, 16, 16), phases, low_resolution),
        (fn.UpsampleConv2d(32, 9, scale=3), (4, 32, 16, 16), phases, low_resolution),
        (fn.UpsampleConv2d(16), (8, 3, 32, 32), two_steps_of, two_steps_of),
        (fn.UpsampleConv2d(32), (8, 1, 32, 32), two_steps_of, two_steps_of),
        (fn.UpsampleConv2d(32, scale=(1, 2)), (8, 4, 32, 32), two_steps_of, two_steps_of),
        (fn.UpsampleConv2d(32, 1), (1, 4, 8, 8), low_resolution, low_resolution),
        (fn.UpsampleConv2d(128, scale=1), (1, 128, 8, 8), two_steps_of, two_steps_of),
        (fn.UpsampleConv2d(128, 1, scale=1), (1, 128, 8, 8), two_steps_of, two_steps_of),
    ],
    ids=str,
)
def test_the_way_that_was_fastest(layer, shape, forward, backward):
    assert ways(layer, torch.empty(shape)) == (forward, backward)


@pytest.mark.parametrize(
    ("layer", "shape", "forward", "backward"),
    [
        (fn.UpsampleConv2d(3), (64, 128, 16, 16), phases, low_resolution),
        (fn.UpsampleConv2d(32, 5), (8, 32, 16, 16), two_steps_of, two_steps_of),
        (fn.UpsampleConv2d(16), (8, 16, 32, 32), two_steps_of, two_steps_of),
    ],
    ids=str,
)
def test_the_way_that_was_fastest_in_tiles(layer, shape, forward, backward):
    x = torch.empty(shape, dtype=torch.bfloat16)
    with mock.patch.multiple(processor, HAS_BFLOAT16=True, HAS_AMX=True):
        assert ways(layer, x) == (forward, backward)
    with mock.patch.multiple(processor, HAS_BFLOAT16=True, HAS_AMX=False):
        assert ways(layer, x) == ways(layer, x.float())


def ways(layer, x):
    weight = torch.empty(layer.out_channels, x.shape[1], *layer.kernel_size)
    arguments = x, weight, layer.scale, layer._window, "auto"
    return tuple(upsampling.implementation(*arguments, backward=way) for way in (False, True))


def test_gradients_of_parameters_are_those_of_tensors():
    """Where sums of the kernel overflow, the sums that do not are taken for both."""
    layer = fn.UpsampleConv2d(16)
    params, x = layer.init(fn.key(0), (64, 8, 8)), fn.normal(fn.key(1), (2, 64, 8, 8))
    y, residuals = layer.fwd(params, x)
    grad = torch.full_like(y, 1e38)
    _, dx = layer.bwd(params, residuals, grad)
    _, residuals = layer.fwd(params, torch.nn.Parameter(x))
    with torch.no_grad():
        _, other = layer.bwd(params, residuals, grad)
    assert dx.isfinite().all()
    assert torch.equal(other, dx)


def test_sums_of_taps_that_overflow():
    weight, x = torch.full((4, 3, 3, 3), 3e38), torch.full((1, 3, 4, 4), 1e-20)
    window = fn.UpsampleConv2d(4)._window
    y = phases.convolve(x, weight, None, (2, 2), window)
    torch.testing.assert_close(y, two_steps_of.convolve(x, weight, None, (2, 2), window))
    assert y.isfinite().all()


def test_sums_of_grad_that_overflow_are_found_in_dweight_alone():
    weight, x = torch.ones(16, 64, 3, 3), torch.full((1, 64, 4, 4), 1e-20)
    grad, window = torch.full((1, 16, 8, 8), 3e38), fn.UpsampleConv2d(16)._window
    assert upsampling.implementation(x, weight, (2, 2), window, "auto", True) is low_resolution
    need = Need(params=True, input=False)
    dweight, _ = upsampling.gradients(x, weight, grad, (2, 2), window, "auto", need)
    assert dweight.isfinite().all()


def test_unfold_is_the_derivations_products_alone(monkeypatch):
    """By no way that "auto" would choose, nor by PyTorch's convolutions."""
    layer = fn.UpsampleConv2d(3, method="unfold")
    params, x = layer.init(fn.key(0), (2, 4, 5)), fn.normal(fn.key(1), (2, 2, 4, 5))
    grad = fn.normal(fn.key(2), (2, *layer.out_shape((2, 4, 5))))
    expected = layer.apply(params, x), layer.vjp(params, x, grad)

    def forbidden(*_, **__):
        raise AssertionError

    for module in (upsampling, native):
        monkeypatch.setattr(module, "convolve", forbidden)
        monkeypatch.setattr(module, "gradients", forbidden)
    found = layer.apply(params, x), layer.vjp(params, x, grad)
    assert all(map(torch.equal, optree.tree_leaves(found), optree.tree_leaves(expected)))


def test_sizes_are_told_by_height_and_width():
    with pytest.raises(ValueError, match=r"images of at least 1×1, got size \(0, 3\)"):
        fn.UpsampleConv2d(2).out_shape((1, 0, 3))


@pytest.mark.parametrize("options", [{"scale": 3}, {"kernel_size": 5}, {"padding": 0}], ids=str)
def test_what_karatsuba_takes(options):
    with pytest.raises(ValueError, match="expected scale 2, kernel_size 3 and padding 1"):
        fn.UpsampleConv2d(2, **options, method="karatsuba")
    assert fn.UpsampleConv2d(2, **options).method == "auto"
