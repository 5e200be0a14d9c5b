"""Normalisations: the formulas at their corners, and where PyTorch's kernels are wrong."""

import math

import numpy as np
import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from registry import budget, key_for
from test_properties import close
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad

import funcnet as fn
from funcnet.ops import normalization
from funcnet.testing import check_vjp, strategies

KEY = fn.key(0)
NORMALISATIONS = [fn.LayerNorm, fn.RMSNorm, fn.GroupNorm, fn.InstanceNorm, fn.BatchNorm]
every = pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (fn.LayerNorm(2), (6, 4, 3)),
        (fn.LayerNorm(elementwise_affine=False), (6, 5)),
        (fn.RMSNorm(2), (6, 4, 3)),
        (fn.GroupNorm(3), (6, 4, 3)),
        (fn.GroupNorm(3), (6,)),
        (fn.GroupNorm(2), (16, 4, 3)),  # many channels a group
        (fn.GroupNorm(2, affine=False), (6, 2, 4, 3)),
        (fn.InstanceNorm(affine=True), (6, 4, 3)),
        (fn.InstanceNorm(), (6, 2, 4, 3)),
        (fn.BatchNorm(), (6, 4, 3)),
        (fn.BatchNorm(affine=False), (6, 2, 4, 3)),
        (fn.BatchNorm(), (6,)),
        (fn.ChannelAffine(), (6, 4, 3)),
    ],
    ids=repr,
)


def formula(layer, params, x):
    """y as the head of the module writes it."""
    weight, bias = (params["weight"], params.get("bias", 0)) if params else (1, 0)
    channels = (-1, *(1,) * (x.ndim - 2))
    if not isinstance(layer, fn.LayerNorm | fn.RMSNorm) and params:
        weight, bias = weight.reshape(channels), bias.reshape(channels)
    if isinstance(layer, fn.ChannelAffine):
        return weight * x + bias
    if isinstance(layer, fn.RMSNorm):
        axes = tuple(range(-layer.num_dims, 0))
        eps = torch.finfo(x.dtype).eps if layer.eps is None else layer.eps
        return weight * x * torch.rsqrt(x.square().mean(axes, keepdim=True) + eps)
    parted = x
    if isinstance(layer, fn.LayerNorm):
        axes = tuple(range(-layer.num_dims, 0))
    elif isinstance(layer, fn.BatchNorm):
        axes = (0, *range(2, x.ndim))
    else:
        groups = layer.num_groups if isinstance(layer, fn.GroupNorm) else x.shape[1]
        parted = x.unflatten(1, (groups, -1))
        axes = tuple(range(2, parted.ndim))
    variance, mean = torch.var_mean(parted, axes, correction=0, keepdim=True)
    return weight * ((parted - mean) * torch.rsqrt(variance + layer.eps)).reshape(x.shape) + bias


def by_autograd(layer, params, x, grad):
    """(y, dparams, dx) of the formula."""
    params, x = optree.tree_map(lambda leaf: leaf.detach().clone().requires_grad_(), (params, x))
    y = formula(layer, params, x)
    leaves = [*optree.tree_leaves(params), x]
    *dparams, dx = torch.autograd.grad(y, leaves, grad)
    return y.detach(), optree.tree_structure(params).unflatten(dparams), dx


def ours(layer, params, x, grad):
    return layer.apply(params, x, key=KEY), *layer.vjp(params, x, grad, key=KEY)


def random_params(layer, shape, dtype=torch.float64):
    """Parameters with different weights for each channel."""
    params = layer.init(KEY, shape, dtype=dtype)
    names = iter(range(10))
    return optree.tree_map(
        lambda leaf: fn.uniform(fn.key(next(names)), leaf.shape, 0.5, 2.0, dtype=dtype), params
    )


# --- The formulas


@pytest.mark.parametrize("cls", [*NORMALISATIONS, fn.ChannelAffine])
@budget(20)
@given(st.data())
def test_formula_in_any_layout(cls, data):
    case = data.draw(
        strategies.cases(
            strategies.layers(cls),
            batches=st.sampled_from([1, 2, 3]),
            dtypes=st.just(torch.float64),
            integers=False,
        )
    )
    layer, _, x = case
    params = random_params(layer, x.shape[1:])
    grad = data.draw(strategies.tensors(x.shape, torch.float64))
    close(ours(layer, params, x, grad), by_autograd(layer, params, x, grad), rtol=1e-7, atol=1e-8)


def test_no_eps():
    x = fn.normal(KEY, (4, 6, 5), dtype=torch.float64)
    for layer in [fn.LayerNorm(eps=0), fn.RMSNorm(eps=0), fn.GroupNorm(2, eps=0)]:
        params = random_params(layer, (6, 5))
        close(ours(layer, params, x, x), by_autograd(layer, params, x, x), rtol=1e-10, atol=1e-12)
    for layer in [fn.InstanceNorm(eps=0), fn.BatchNorm(eps=0, affine=False)]:
        close(ours(layer, (), x, x), by_autograd(layer, (), x, x), rtol=1e-10, atol=1e-12)
    check_vjp(fn.BatchNorm(eps=0, affine=False), (), x[:, :3, :2], key=KEY)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_rms_norms_eps_is_torchs(dtype):
    x = (fn.normal(KEY, (4, 8), dtype=torch.float64) * 1e-4).to(dtype)
    y = fn.RMSNorm(elementwise_affine=False).apply((), x)
    torch.testing.assert_close(y, F.rms_norm(x, (8,)))


# --- Corners


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("size", [16, 32])
@pytest.mark.parametrize("offset", [1e2, 1e4])
@pytest.mark.parametrize(
    "layer", [fn.LayerNorm(3), fn.GroupNorm(4), fn.GroupNorm(8), fn.InstanceNorm()], ids=repr
)
def test_large_means(layer, offset, size, layout):
    """In channels_last, torch's group_norm is off by 1000 here; a rounding of x moves y by 1e-3."""
    x = fn.normal(KEY, (8, 32, size, size)) + offset
    params = layer.init(KEY, x.shape[1:])
    double = optree.tree_map(torch.Tensor.double, params)
    grad = fn.normal(fn.key(1), x.shape)
    y, _, dx = by_autograd(layer, double, x.double(), grad.double())
    if layout == "channels_last":
        x, grad = (t.contiguous(memory_format=torch.channels_last) for t in (x, grad))
    found, _, found_dx = ours(layer, params, x, grad)
    rounding = offset * torch.finfo(torch.float32).eps
    assert (found - y).abs().max() < 3 * rounding
    assert (found_dx - dx).abs().max() < 6 * rounding


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("offset", [8.0, 15.0, 30.0, 200.0])
@pytest.mark.parametrize("layer", [fn.GroupNorm(2), fn.InstanceNorm()], ids=repr)
def test_means_in_half_precision_cost_no_digit(layer, offset, dtype):
    """In channels_last, torch's group_norm of 16 bits is off by 2 for a mean of 200."""
    x = (fn.normal(KEY, (4, 64, 16, 16)) + offset).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    params = layer.init(KEY, x.shape[1:], dtype=dtype)
    exact = layer.apply(optree.tree_map(torch.Tensor.double, params), x.double())
    error = (layer.apply(params, x).double() - exact).abs().max()
    assert error <= exact.abs().max() * torch.finfo(dtype).eps
    mapped = torch.func.vmap(lambda one: layer.apply(params, one[None])[0])(x)
    assert (mapped.double() - exact).abs().max() <= exact.abs().max() * torch.finfo(dtype).eps


@pytest.mark.parametrize(
    ("means", "deviation"), [([-1e3] * 4, 1.0), ([0, 1e3, 0, 0], 1.0), ([0.9], 1e-3), ([1e4], 8.0)]
)
def test_means_are_large_beside_the_deviation_whatever_their_sign(means, deviation):
    """One group's is enough."""
    of_groups = torch.tensor(means).expand(4).repeat_interleave(8)[:, None, None]
    x = fn.normal(KEY, (8, 32, 16, 16)) * deviation + of_groups
    x = x.contiguous(memory_format=torch.channels_last)
    y = fn.GroupNorm(4, eps=0.0, affine=False).apply((), x)
    exact = F.group_norm(x.double(), 4, eps=0.0)
    rounding = of_groups.abs().max() / deviation * torch.finfo(torch.float32).eps
    assert (y - exact).abs().max() < 3 * rounding


def test_a_nan_costs_other_examples_no_digit():
    x = fn.normal(KEY, (2, 32, 8, 8))
    x[0, 0, 0, 0], x[1] = torch.nan, x[1] + 1e3
    x = x.contiguous(memory_format=torch.channels_last)
    y = fn.GroupNorm(2, affine=False).apply((), x)
    exact = F.group_norm(x[1:].double(), 2)
    assert (y[1:] - exact).abs().max() < 3e3 * torch.finfo(torch.float32).eps


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_sums_that_float16_cannot_hold_under_vmap_and_in_a_trace():
    layer, x = fn.GroupNorm(1), fn.normal(KEY, (2, 2, 32, 32), dtype=torch.float16)
    params, grad = layer.init(KEY, (2, 32, 32), dtype=torch.float16), x.flip(0) + 100
    mapped = torch.func.vmap(layer.vjp, (None, 0, 0))(params, x[:, None], grad[:, None])[1]
    expected = layer.vjp(params, x, grad)[1]
    torch.testing.assert_close(mapped[:, 0], expected, rtol=1e-3, atol=4e-3)
    traced = torch.jit.trace(lambda x: layer.apply(params, x), grad)
    torch.testing.assert_close(traced(grad), layer.apply(params, grad), rtol=1e-3, atol=4e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [fn.LayerNorm(), fn.BatchNorm()], ids=repr)
def test_in_half_precision_dx_is_rounded_once_under_vmap(layer, dtype):
    x = fn.normal(KEY, (3, 16, 40), dtype=dtype)
    grad = fn.normal(fn.key(1), x.shape, 4.0, dtype=dtype)
    params = random_params(layer, (40,), dtype)

    def dx_of(params, x, grad):
        return torch.func.vmap(lambda x, grad: layer.vjp(params, x, grad, key=KEY)[1])(x, grad)

    wide = optree.tree_map(torch.Tensor.double, (params, x, grad))
    found, expected = dx_of(params, x, grad), dx_of(*wide)
    off = (found.double() - expected).abs().max()
    assert off <= 0.51 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("offset", [(0.5,), (3.0,), (20.0,), (100.0,), (100.0, 0.2)])
def test_in_half_precision_y_is_rounded_once(dtype, offset):
    """Beside a mean of 1000 standard deviations, too."""
    of_examples = torch.tensor(offset)[:, None, None, None]
    x = (fn.normal(KEY, (2, 64, 9, 9)) / 10 + of_examples).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    y, exact = fn.GroupNorm(2, affine=False).apply((), x), F.group_norm(x.double(), 2)
    assert y.dtype == dtype
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert ((y - exact).abs() <= 0.6 * torch.finfo(dtype).eps * exact.abs().clamp(min=1)).all()


@pytest.mark.parametrize("layer", [fn.GroupNorm(1), fn.InstanceNorm()], ids=repr)
def test_a_million_positions_cost_no_digit(layer):
    """Torch's group_norm in channels_last adds up one after another, and is off by 2·10⁻⁴."""
    x = fn.normal(KEY, (1, 2, 1024, 1024)).contiguous(memory_format=torch.channels_last)
    params = layer.init(KEY, x.shape[1:])
    y = layer.apply(params, x)
    exact = F.group_norm(x.double().contiguous(), 1 if layer == fn.GroupNorm(1) else 2)
    assert (y - exact).abs().max() < 1e-6


def test_gradient_of_rms_norm_of_many_rows():
    """A single product adds up row after row, and was off by 8·10⁻⁶."""
    x, grad = fn.uniform(KEY, (10**5 + 3, 8), 0.5, 1.5), fn.uniform(KEY, (10**5 + 3, 8))
    params = {"weight": torch.ones(8)}
    dweight = fn.RMSNorm().vjp(params, x, grad)[0]["weight"]
    double = {"weight": torch.ones(8).double()}
    exact = fn.RMSNorm(eps=1e-7).vjp(double, x.double(), grad.double())[0]["weight"]
    assert (dweight / exact - 1).abs().max() < 1e-6


def test_of_a_fake_tensor_no_mean_is_read():
    with FakeTensorMode():
        x = torch.zeros(2, 32, 4, 4).contiguous(memory_format=torch.channels_last)
        assert fn.GroupNorm(2, affine=False).apply((), x).shape == x.shape


@pytest.mark.parametrize("size", [3, 8])
@pytest.mark.parametrize("examples", [1, 5, 80])
@pytest.mark.parametrize("layer", [fn.GroupNorm(8), fn.InstanceNorm(affine=True)], ids=repr)
def test_groups_of_few_channels_of_few_and_many_numbers(layer, examples, size):
    """The ways differ: by PyTorch's kernels on a row-major copy, or by sums of rows."""
    x, grad = (
        fn.normal(key, (examples, 32, size, size)).contiguous(memory_format=torch.channels_last)
        for key in fn.split(KEY)
    )
    params = random_params(layer, x.shape[1:])
    params = optree.tree_map(torch.Tensor.float, params)
    double = optree.tree_map(torch.Tensor.double, params)
    found, expected = (
        ours(layer, params, x, grad),
        by_autograd(layer, double, x.double(), grad.double()),
    )
    close(found, optree.tree_map(torch.Tensor.float, expected), rtol=1e-4, atol=2e-5)
    for made in found[0], found[2]:
        assert made.is_contiguous(memory_format=torch.channels_last)


@pytest.mark.parametrize("offset", [0.0, 0.7, 1.5, 5.0])
def test_small_means_cost_no_digit(offset):
    x = (fn.normal(KEY, (4, 32, 32, 32)) + offset).contiguous(memory_format=torch.channels_last)
    layer = fn.GroupNorm(2, affine=False)
    error = (layer.apply((), x) - layer.apply((), x.double())).abs().max()
    assert error < 4e-6


def test_constant_sets():
    x = torch.full((2, 4, 6), 3.0, dtype=torch.float64)
    for layer in [fn.LayerNorm(), fn.GroupNorm(2), fn.InstanceNorm(), fn.BatchNorm()]:
        params = layer.init(KEY, (4, 6), dtype=x.dtype)
        assert layer.apply(params, x, key=KEY).abs().max() < 1e-10
    without = {
        fn.LayerNorm(eps=0): F.layer_norm(x, (6,), eps=0),
        fn.GroupNorm(2, eps=0): F.group_norm(x, 2, eps=0),
        fn.BatchNorm(eps=0): torch.zeros_like(x),  # F.batch_norm refuses; the kernel says so
        fn.RMSNorm(eps=0): F.rms_norm(x, (6,), eps=0),
    }
    for layer, expected in without.items():
        params = layer.init(KEY, (4, 6), dtype=x.dtype)
        torch.testing.assert_close(layer.apply(params, x, key=KEY), expected, equal_nan=True)


@pytest.mark.parametrize(
    ("layer", "shape"), [(fn.LayerNorm(), (4, 1)), (fn.GroupNorm(4), (4,))], ids=repr
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_of_a_set_of_one_entry_the_bias_is_left(layer, shape, dtype):
    params = random_params(layer, shape, dtype)
    x, grad = fn.normal(KEY, (2, 3, *shape), dtype=dtype)
    y, dparams, dx = ours(layer, params, x, grad)
    assert torch.equal(y, params["bias"].expand_as(y))
    assert not dx.any()
    assert not dparams["weight"].any()
    torch.testing.assert_close(dparams["bias"], grad.sum_to_size(dparams["bias"].shape))


MODES = {
    "autograd": lambda step, params, x, grad: step(
        optree.tree_map(lambda leaf: leaf.clone().requires_grad_(), params), x, grad
    ),
    "vmap": lambda step, params, x, grad: optree.tree_map(
        lambda leaf: leaf[0], torch.func.vmap(step, (None, 0, 0))(params, x[None], grad[None])
    ),
    "compile": lambda step, *inputs: torch.compile(step, backend="eager", fullgraph=True)(*inputs),
}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("layer", "shape"), [(fn.GroupNorm(4), (4,)), (fn.GroupNorm(4), (4, 1, 1))], ids=repr
)
def test_of_a_set_of_one_entry_the_bias_is_left_in_every_mode(mode, layer, shape):
    params = random_params(layer, shape, torch.float32)
    x, grad = fn.normal(KEY, (2, 3, *shape))

    def step(params, x, grad):
        return ours(layer, params, x, grad)

    found = MODES[mode](step, params, x, grad)
    close(found, step(params, x, grad), rtol=0, atol=0)


@pytest.mark.parametrize("examples", [3, 1024])
def test_gradients_of_each_example_of_sets_of_one_entry(examples):
    layer, size = fn.GroupNorm(64), (examples, 64, 1, 1)
    x, target = (fn.normal(key, size).as_strided(size, (64, 1, 64, 64)) for key in fn.split(KEY))
    params = layer.init(KEY, size[1:])
    _, each = fn.per_example(layer, fn.MSE())(params, x, target)
    _, norms = fn.gradient_norms(layer, fn.MSE())(params, x, target)
    assert not each["weight"].any()
    torch.testing.assert_close(norms, each["bias"].norm(dim=1))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layer", [fn.GroupNorm(4), fn.GroupNorm(8), fn.GroupNorm(1)], ids=repr)
def test_images_of_one_pixel_have_more_than_one_layout(layer, dtype):
    """torch counts those of channels_last as contiguous: a copy is to be asked for."""
    size = (3, 8, 1, 1)
    x, grad = fn.normal(KEY, (2, *size), dtype=dtype)
    params = random_params(layer, size[1:], dtype)
    strided = (t.as_strided(size, (8, 1, 8, 8)) for t in (x, grad))
    close(ours(layer, params, *strided), ours(layer, params, x, grad), rtol=1e-2, atol=1e-2)
    net = fn.Sequential(fn.Conv2d(8, 3), fn.ReLU(), layer)
    whole = net.init(KEY, (3, 3, 3), dtype=dtype)
    x = fn.normal(KEY, (2, 3, 3, 3), dtype=dtype)
    assert net.apply(whole, x).shape == (2, 8, 1, 1)
    fn.value_and_grad(net, fn.MSE())(whole, x, torch.zeros(2, 8, 1, 1, dtype=dtype))


def test_what_is_not_finite_stays_so():
    x = torch.tensor([[1.0, 2.0, math.nan, 4.0], [1.0, 2.0, 3.0, math.inf]])
    for layer in [fn.LayerNorm(elementwise_affine=False), fn.GroupNorm(4, affine=False)]:
        assert layer.apply((), x)[0, 2].isnan()
        assert layer.apply((), x)[1, 3].isnan()


@every
def test_empty_examples_and_batches(layer, shape):
    if isinstance(layer, fn.InstanceNorm | fn.BatchNorm):
        return
    for batch, sizes in ((0, shape), (2, (*shape[:-1], 0)) if len(shape) > 1 else (0, shape)):
        params = layer.init(KEY, sizes)
        x = torch.zeros(batch, *sizes)
        y, dparams, dx = ours(layer, params, x, x)
        assert y.shape == dx.shape == x.shape
        for leaf, gradient in zip(*map(optree.tree_leaves, (params, dparams)), strict=True):
            assert torch.equal(gradient, torch.zeros_like(leaf))


@every
def test_half_precision_keeps_statistics_in_float32(layer, shape):
    """Around 100, a mean in bfloat16 would be off by a quarter of the standard deviation."""
    x = fn.normal(KEY, (4, *shape)).bfloat16() + 100
    grad = fn.normal(fn.key(1), x.shape).bfloat16()
    params = random_params(layer, shape, torch.bfloat16)
    double = optree.tree_map(torch.Tensor.double, (params, x, grad))
    for memory_format in (torch.contiguous_format, torch.channels_last):
        if memory_format == torch.channels_last and x.ndim != 4:
            continue
        found = ours(
            layer,
            params,
            x.contiguous(memory_format=memory_format),
            grad.contiguous(memory_format=memory_format),
        )
        assert all(leaf.dtype == torch.bfloat16 for leaf in optree.tree_leaves(found))
        found = optree.tree_map(torch.Tensor.double, found)
        close(found, by_autograd(layer, *double), rtol=0.02, atol=0.05)
    if not isinstance(layer, fn.ChannelAffine):  # which has no statistics
        kept = optree.tree_leaves(layer.fwd(params, x, key=KEY)[1])
        assert {leaf.dtype for leaf in kept[2:]} == {torch.float32}


@every
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_without_dx(layer, shape, memory_format):
    """Without dx, torch's gradient of group_norm crashes in channels_last."""
    params, x = random_params(layer, shape), fn.normal(KEY, (2, *shape), dtype=torch.float64)
    if x.ndim == 4:
        x = x.contiguous(memory_format=memory_format)
    dparams, dx = layer.vjp(params, x, x, key=KEY)
    alone, nothing = layer.vjp(params, x, x, key=KEY, input_grad=False)
    assert nothing is None
    close(alone, dparams)
    nothing, alone = layer.vjp(params, x, x, key=KEY, param_grad=False)
    assert nothing is None
    close(alone, dx)


# --- Where PyTorch's are wrong


def test_instance_norm_of_one_example_with_a_channels_last_gradient():
    x, grad = fn.normal(KEY, (2, 1, 4, 3, 5), dtype=torch.float64)
    grad = grad.contiguous(memory_format=torch.channels_last)
    layer = fn.InstanceNorm()
    close(ours(layer, (), x, grad), by_autograd(layer, (), x, grad), rtol=1e-10, atol=1e-12)


def test_batch_norm_with_a_strided_weight():
    x, grad = fn.normal(KEY, (2, 5, 4), dtype=torch.float64)
    numbers = fn.normal(fn.key(1), (4, 2), dtype=torch.float64)
    layer, params = fn.BatchNorm(), {"weight": numbers[:, 0], "bias": numbers[:, 1]}
    close(ours(layer, params, x, grad), by_autograd(layer, params, x, grad), rtol=1e-10, atol=1e-12)


def test_instance_norm_of_a_batch_of_nothing():
    x = torch.zeros(0, 3, 4, 4)
    layer = fn.InstanceNorm(affine=True)
    y, dparams, dx = ours(layer, layer.init(KEY, (3, 4, 4)), x, x)
    assert y.shape == dx.shape == x.shape
    assert not any(leaf.any() for leaf in dparams.values())


# --- Batch normalisation's conditions


def test_batch_norm_wants_a_key_but_not_its_value():
    net = fn.Sequential(fn.Conv2d(2, 1), fn.Sequential(fn.BatchNorm()))
    params, x = net.init(KEY, (3, 2, 2)), fn.normal(KEY, (4, 3, 2, 2))
    assert net.out_shape((3, 2, 2)) == (2, 2, 2)
    y = net.apply(params, x, key=KEY)
    assert torch.equal(net.apply(params, x, key=fn.key(7)), y)
    message = r"layer 1: layer 0: BatchNorm\(\): expected a key.*fn\.moments.*fn\.for_inference"
    for call in (
        lambda: net.apply(params, x),
        lambda: net.fwd(params, x),
        lambda: net.vjp(params, x, y),
        lambda: fn.value_and_grad(net, fn.MSE())(params, x, y),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    fn.value_and_grad(net, fn.MSE())(params, x, y, key=KEY)


def test_a_single_value_per_channel_is_refused():
    net = fn.Sequential(fn.ReLU(), fn.BatchNorm())
    params = net.init(KEY, (3,))
    net.apply(params, torch.zeros(2, 3), key=KEY)  # another batch of this has been accepted
    with pytest.raises(ValueError, match=r"layer 1: BatchNorm\(\): expected at least 2 values"):
        net.apply(params, torch.zeros(1, 3), key=KEY)
    layer = fn.BatchNorm(affine=False)
    assert layer.apply((), torch.zeros(1, 3, 2), key=KEY).shape == (1, 3, 2)
    with pytest.raises(ValueError, match="expected at least 2 values per channel"):
        layer.apply((), torch.zeros(1, 3, 1, 1), key=KEY)
    for shape in ((3,), (3, 1, 1)):
        for call in (fn.InstanceNorm().out_shape, lambda shape: fn.InstanceNorm().init(KEY, shape)):
            with pytest.raises(ValueError, match=r"InstanceNorm\(\): expected at least 2 values"):
                call(shape)
        with pytest.raises(ValueError, match=r"InstanceNorm\(\): expected at least 2 values"):
            fn.InstanceNorm().apply((), torch.zeros(5, *shape))


@pytest.mark.parametrize("shape", [(0,), (0, 3), (0, 2, 4)])
@pytest.mark.parametrize("affine", [True, False])
def test_batch_norm_without_channels(shape, affine):
    layer = fn.BatchNorm(affine=affine)
    params, x = layer.init(KEY, shape), torch.zeros(3, *shape)
    assert layer.apply(params, x, key=KEY).shape == x.shape
    dparams, dx = layer.vjp(params, x, x, key=KEY)
    assert dx.shape == x.shape
    assert {name: tuple(leaf.shape) for name, leaf in dict(dparams).items()} == (
        {"weight": (0,), "bias": (0,)} if affine else {}
    )


def test_who_couples_examples():
    assert fn.BatchNorm().couples_examples
    assert fn.Sequential(fn.ReLU(), fn.Sequential(fn.BatchNorm())).couples_examples
    for layer in (fn.InstanceNorm(), fn.UpsampleConv2d(2), fn.Sequential(fn.ReLU())):
        assert not layer.couples_examples


# --- Derivatives of derivatives, where PyTorch's rules count the mean and rstd as constants

twice = pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (fn.LayerNorm(), (4,)),
        (fn.LayerNorm(2, bias=False), (3, 2)),
        (fn.LayerNorm(elementwise_affine=False), (4,)),
        (fn.RMSNorm(), (4,)),
        (fn.RMSNorm(elementwise_affine=False), (4,)),
        (fn.GroupNorm(2), (4, 2)),
        (fn.GroupNorm(2, affine=False), (4, 2)),
        (fn.InstanceNorm(affine=True), (2, 3)),
        (fn.InstanceNorm(), (2, 3)),
        (fn.BatchNorm(), (2, 2)),
        (fn.BatchNorm(), (3,)),
        (fn.BatchNorm(affine=False), (2, 2)),
        (fn.ChannelAffine(), (2, 2)),
    ],
    ids=repr,
)


def both(layer, shape):
    """(params, x), Σ w ∘ y² by the layer, and the same by the formula."""
    inputs = random_params(layer, shape), fn.normal(KEY, (3, *shape), dtype=torch.float64)
    w = fn.normal(fn.key(5), (3, *shape), dtype=torch.float64)
    return (
        inputs,
        lambda params, x: (w * layer.apply(params, x, key=KEY).square()).sum(),
        lambda params, x: (w * formula(layer, params, x).square()).sum(),
    )


JACOBIANS = (torch.func.jacrev, torch.func.jacfwd)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@twice
@pytest.mark.parametrize("inner", JACOBIANS, ids=["rev", "fwd"])
@pytest.mark.parametrize("outer", JACOBIANS, ids=["rev", "fwd"])
def test_second_derivatives(layer, shape, outer, inner):
    inputs, ours, plain = both(layer, shape)
    each = (0, 1) if inputs[0] else 1
    close(outer(inner(ours, each), each)(*inputs), torch.func.hessian(plain, each)(*inputs))


@twice
def test_third_derivatives(layer, shape):
    inputs, ours, plain = both(layer, shape)
    slope, exact = (
        torch.func.grad(torch.func.grad(lambda t, f=f: f(inputs[0], t * inputs[1])))
        for f in (ours, plain)
    )
    t = torch.tensor(0.7, dtype=torch.float64)
    close(torch.func.grad(slope)(t), torch.func.grad(exact)(t))


@twice
def test_derivatives_through_a_mapped_step(layer, shape):
    """By params that all examples share, of what follows a step along the layer's gradients."""
    (params, x), *functions = both(layer, shape)
    xs = torch.stack([x, 2 * x + 1, x.flip(0).square()])
    each = (0, 1) if params else 1

    def total(function, gradients):
        def after(params, x):
            grads, dx = gradients(params, x)
            moved = optree.tree_map(lambda p, d: p - 0.1 * d, params, grads)
            return function(moved, x - 0.1 * dx)

        return lambda params, xs: torch.func.vmap(after, in_dims=(None, 0))(params, xs).sum()

    def by_formula(params, x):
        return torch.func.vjp(lambda params, x: formula(layer, params, x), params, x)[1](x)

    found, exact = (
        torch.func.grad(total(function, gradients), each)(params, xs)
        for function, gradients in zip(
            functions, (lambda params, x: layer.vjp(params, x, x, key=KEY), by_formula), strict=True
        )
    )
    close(found, exact)


@twice
def test_mapped_gradients(layer, shape):
    (params, x), ours, plain = both(layer, shape)
    xs, each = torch.stack([x, 2 * x + 1]), (0, 1) if params else 1
    found, exact = (
        torch.func.vmap(torch.func.grad(f, each), in_dims=(None, 0))(params, xs)
        for f in (ours, plain)
    )
    close(found, exact)


@twice
def test_second_derivatives_by_autograd(layer, shape):
    inputs, ours, plain = both(layer, shape)
    leaves, structure = optree.tree_flatten(inputs)

    def hessian(function):
        return torch.autograd.functional.hessian(
            lambda *leaves: function(*structure.unflatten(leaves)), tuple(leaves)
        )

    close(hessian(ours), hessian(plain))


@twice
def test_second_derivatives_by_autograd_around_vmap(layer, shape):
    (params, x), ours, plain = both(layer, shape)
    xs = torch.stack([x, 2 * x + 1])

    def hessian(function):
        mapped = torch.func.vmap(function, in_dims=(None, 0))
        return torch.autograd.functional.hessian(lambda xs: mapped(params, xs).sum(), xs)

    close(hessian(ours), hessian(plain))


def of_dual_numbers(function, x):
    with forward_ad.dual_level():
        function(forward_ad.make_dual(x, x))


MAPS = {
    "vmap": lambda step, x: torch.func.vmap(step)(x),
    "vmap of vmap": lambda step, x: torch.func.vmap(torch.func.vmap(step))(x.unsqueeze(0)),
    "vmap of grad": lambda step, x: torch.func.vmap(torch.func.grad(step))(x),
    "grad of vmap": lambda step, x: torch.func.grad(lambda x: torch.func.vmap(step)(x).sum())(x),
    "jvp of vmap": lambda step, x: torch.func.jvp(torch.func.vmap(step), (x,), (x,)),
    "vmap of dual numbers": lambda step, x: of_dual_numbers(torch.func.vmap(step), x),
}


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("name", MAPS)
def test_layer_norm_is_by_kernels_under_vmap_alone(name, monkeypatch):
    calls = []

    def watched(kernel):
        return lambda *arguments: calls.append(kernel) or kernel(*arguments)

    for kernel in ("_layer_norm", "_layer_norm_backward"):
        monkeypatch.setattr(normalization, kernel, watched(getattr(normalization, kernel)))
    layer = fn.LayerNorm()
    params = layer.init(KEY, (4,))
    MAPS[name](lambda x: layer.vjp(params, x, x)[1].sum(), fn.normal(KEY, (2, 3, 4)))
    assert len(calls) == (2 if name in ("vmap", "vmap of vmap") else 0)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("layer", [fn.LayerNorm(), fn.BatchNorm()], ids=repr)
def test_compiled_second_derivatives(layer):
    inputs, ours, plain = both(layer, (4,))
    compiled = torch.compile(torch.func.hessian(ours, (0, 1)), backend="aot_eager", fullgraph=True)
    close(compiled(*inputs), torch.func.hessian(plain, (0, 1))(*inputs))


# --- Settings and shapes


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: fn.LayerNorm(0), "LayerNorm: expected num_dims >= 1, got 0"),
        (lambda: fn.GroupNorm(2, eps=-1e-5), "GroupNorm: expected eps to be finite and >= 0"),
        (lambda: fn.RMSNorm(eps=math.nan), "RMSNorm: expected eps to be finite and >= 0, got nan"),
        (lambda: fn.BatchNorm(eps=math.inf), "BatchNorm: expected eps to be finite"),
        (
            lambda: fn.LayerNorm(2).out_shape((4,)),
            r"LayerNorm\(num_dims=2\): expected the shape of one example to have at least 2 axes, "
            r"got \(4,\)$",
        ),
        (
            lambda: fn.RMSNorm(64).init(KEY, (5, 64)),
            r"at least 64 axes, got \(5, 64\): sizes of x are read off the shape",
        ),
        (lambda: fn.LayerNorm(2).apply((), torch.zeros(2, 4)), "to have at least 2 axes"),
        (
            lambda: fn.GroupNorm(3).init(KEY, (4, 2)),
            r"GroupNorm\(3\): expected channels that num_groups=3 divides, got 4",
        ),
        (lambda: fn.GroupNorm(3).init(KEY, (0, 2)), "expected at least 1 channel, got 0"),
        (lambda: fn.GroupNorm(3).out_shape(()), r"expected the shape of one example, \(C, …\)"),
        (
            lambda: fn.GroupNorm(2).apply(
                fn.GroupNorm(2).init(KEY, (4, 3, 3)), torch.zeros(1, 6, 2)
            ),
            r"GroupNorm\(2\): expected x of shape \(N, 4, …\), got \(1, 6, 2\)",
        ),
        (
            lambda: fn.LayerNorm().apply(fn.LayerNorm().init(KEY, (4,)), torch.zeros(1, 3, 5)),
            r"LayerNorm\(\): expected x of shape \(N, \*, 4\), got \(1, 3, 5\)",
        ),
        (
            lambda: fn.BatchNorm(affine=False).apply({}, torch.zeros(2, 3), key=KEY),
            r"expected no parameters, \(\), got dict",
        ),
    ],
)
def test_refusals(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "call",
    [
        lambda: fn.BatchNorm(64),
        lambda: fn.InstanceNorm(64),
        lambda: fn.GroupNorm(4, 16),
        lambda: fn.LayerNorm(1, np.int64(64)),
        lambda: fn.RMSNorm(1, 64),
        lambda: fn.InstanceNorm(2),
    ],
)
def test_torchs_order_of_arguments_is_refused(call):
    with pytest.raises(
        ValueError, match=r"Norm: expected eps to be a float, or at most 1, got .*read off"
    ):
        call()


@pytest.mark.parametrize(
    "layer",
    [fn.LayerNorm(), fn.RMSNorm(), fn.GroupNorm(2), fn.InstanceNorm(), fn.BatchNorm()],
    ids=repr,
)
def test_integers_are_refused(layer):
    params = layer.init(KEY, (4, 3))
    with pytest.raises(TypeError, match=f"{type(layer).__name__}.*to be floating-point, got"):
        layer.apply(params, torch.ones(2, 4, 3, dtype=torch.int64), key=KEY)


@pytest.mark.parametrize("eps", [0, 1])
def test_a_small_eps_may_be_an_int(eps):
    assert fn.GroupNorm(4, eps) == fn.GroupNorm(4, float(eps))


def test_parameters_start_from_ones_and_zeros():
    for layer, names, size in (
        (fn.LayerNorm(2), {"weight", "bias"}, (4, 3)),
        (fn.LayerNorm(bias=False), {"weight"}, (3,)),
        (fn.RMSNorm(2), {"weight"}, (4, 3)),
        (fn.GroupNorm(3), {"weight", "bias"}, (6,)),
        (fn.InstanceNorm(affine=True), {"weight", "bias"}, (6,)),
        (fn.BatchNorm(), {"weight", "bias"}, (6,)),
        (fn.ChannelAffine(), {"weight", "bias"}, (6,)),
    ):
        params = layer.init(KEY, (6, 4, 3))
        assert set(params) == names
        assert torch.equal(params["weight"], torch.ones(size))
        assert not params.get("bias", torch.zeros(size)).any()
    for layer in (
        fn.LayerNorm(elementwise_affine=False),
        fn.RMSNorm(elementwise_affine=False),
        fn.GroupNorm(3, affine=False),
        fn.InstanceNorm(),
        fn.BatchNorm(affine=False),
    ):
        assert layer.init(KEY, (6, 4, 3)) == ()


# --- Compiled, and traced for another device


@pytest.mark.parametrize("cls", [*NORMALISATIONS, fn.ChannelAffine])
def test_compiled(cls):
    layer = cls(3) if cls is fn.GroupNorm else cls()
    x = fn.normal(KEY, (2, 6, 4, 3)).contiguous(memory_format=torch.channels_last)
    params = random_params(layer, x.shape[1:], torch.float32)
    key = key_for(layer)

    def step(params, x):
        return layer.apply(params, x, key=key), *layer.vjp(params, x, x, key=key)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    close(compiled(params, x), step(params, x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(4, 6), (4, 1)], ids=str)
@pytest.mark.parametrize("layer", [fn.LayerNorm(), fn.BatchNorm()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_what_is_kept_under_vmap_is_what_is_kept_eagerly(dtype, layer, shape):
    params = random_params(layer, shape, dtype)
    x = (fn.normal(KEY, (5, *shape)) * 2 + 100).to(dtype)
    found = torch.func.vmap(lambda x: layer.fwd(params, x, key=KEY))(x[None])
    kept = optree.tree_map(lambda leaf: leaf[None], layer.fwd(params, x, key=KEY))
    close(found, kept, **({"rtol": 0.01, "atol": 0.02} if dtype == torch.bfloat16 else {}))


@pytest.mark.parametrize("layer", [fn.InstanceNorm(), fn.GroupNorm(1), fn.LayerNorm()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_vmap_over_expanded_inputs(layer, dtype):
    """vmap hides an axis of stride 0 from contiguous(), and the dtype of y from the kernel."""
    for batch, *shape in ((2, 1, 1, 2), (2, 3, 2, 4), (1, 3, 2, 4)):
        x = fn.normal(KEY, (batch, *shape), dtype=dtype)
        params = layer.init(KEY, tuple(shape), dtype=dtype)
        y = layer.apply(params, x)
        found = torch.func.vmap(layer.apply, in_dims=(None, 0))(params, x.expand(3, *x.shape))
        assert found.dtype == dtype
        torch.testing.assert_close(found[1], y)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("order", [(0, 2, 3, 1), (3, 2, 1, 0)])
def test_other_memory_layouts_under_transforms(order):
    """There, kernels take contiguous tensors alone."""
    layer = fn.GroupNorm(2, affine=False)
    x, grad = fn.normal(KEY, (2, 2, 6, 4, 3), dtype=torch.float64)
    laid_out = x.permute(order).contiguous().permute([order.index(axis) for axis in range(4)])
    y, dx = layer.apply((), x), layer.vjp((), x, grad)[1]
    found, tangent = torch.func.jvp(lambda x: layer.apply((), x), (laid_out,), (grad,))
    close(found, y)
    torch.testing.assert_close((tangent * grad).sum(), (dx * grad).sum())
    mapped = torch.func.vmap(lambda grad: layer.vjp((), laid_out, grad)[1])(grad[None])
    close(mapped[0], dx)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [(5, 7), (24, 24), (32, 32), (2, 16, 32)], ids=str)
@pytest.mark.parametrize("groups", [1, 2, 4, 8, 16, 32])
def test_few_channels_a_group(groups, size, dtype):
    """By rows or by groups, results are off the formula in float64 by rounding alone."""
    layer, shape = fn.GroupNorm(groups), (2, 32, *size)
    params = random_params(layer, shape[1:], dtype)
    x, grad = (fn.normal(key, shape).to(dtype) for key in fn.split(KEY))
    last = torch.channels_last if x.ndim == 4 else torch.channels_last_3d
    want = by_autograd(layer, *optree.tree_map(torch.Tensor.double, (params, x, grad)))
    found = ours(layer, params, *(t.contiguous(memory_format=last) for t in (x, grad)))
    tolerance = 30 * torch.finfo(dtype).eps
    for got, exact in zip(optree.tree_leaves(found), optree.tree_leaves(want), strict=True):
        assert got.dtype == dtype
        assert (got - exact).abs().max() <= tolerance * exact.abs().max().clamp(min=1)


@pytest.mark.parametrize("stride", [1, 77])
def test_channels_last_with_any_stride_along_an_axis_of_size_1(stride):
    layer, shape = fn.GroupNorm(2), (2, 8, 1, 4)
    params = random_params(layer, shape[1:], torch.float64)
    x, grad = (fn.normal(key, shape, dtype=torch.float64) for key in fn.split(KEY))
    odd_x, odd_grad = (
        t.contiguous(memory_format=torch.channels_last).as_strided(shape, (32, 1, stride, 8))
        for t in (x, grad)
    )
    close(layer.apply(params, odd_x), layer.apply(params, x))
    close(layer.vjp(params, odd_x, odd_grad), layer.vjp(params, x, grad))


@pytest.mark.parametrize("groups", [1, 2, 8])
def test_a_gradient_that_is_the_same_everywhere_moves_nothing(groups):
    """Sums of more entries than bfloat16 can count are not rounded on the way."""
    layer = fn.GroupNorm(groups, affine=False)
    x = fn.normal(KEY, (2, 8, 17, 19)).bfloat16().contiguous(memory_format=torch.channels_last)
    _, dx = layer.vjp((), x, torch.ones_like(x))
    assert dx.abs().max() <= 1e-4
