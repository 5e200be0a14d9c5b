"""Convolutions in bfloat16 on the CPU: right on processors that multiply in it, and on others."""

from unittest import mock

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcnet as fn
from funcnet.ops import bfloat16, native, patches, processor
from funcnet.testing import strategies


def both(multiplied):
    """As on a processor that multiplies in bfloat16, or on another."""
    return mock.patch.object(processor, "HAS_BFLOAT16", multiplied)


STRIDES = [False, bfloat16._IS_ANY_STRIDE_RIGHT]
"""Whether PyTorch's kernels may be used with any stride: no, and as on this processor."""


def from_the_first_channel(chunk=2**20, large=2**20, any_stride=False):
    """Our own ways for all images that are not large, so many entries at a time."""
    numbers = {"_MANY": 1, "_MUCH": 0, "_MUCH_STRIDED": 0, "_CHUNK_ENTRIES": chunk, "_LARGE": large}
    return mock.patch.multiple(bfloat16, **numbers, _IS_ANY_STRIDE_RIGHT=any_stride)


def cases(cls):
    shapes = st.tuples(st.sampled_from([2, 4]), st.integers(3, 12), st.integers(3, 12))
    return strategies.cases(
        strategies.layers(cls).filter(lambda layer: layer.method == "auto"),
        shapes=lambda layer: shapes.filter(lambda shape: strategies.takes(layer, shape)),
        dtypes=st.just(torch.bfloat16),
        values=["normal"],
    )


def wide(tree):
    return optree.tree_map(torch.Tensor.double, tree)


def magnitudes(tree):
    return optree.tree_map(lambda x: x.double().abs(), tree)


@pytest.mark.parametrize("multiplied", [True, False])
@pytest.mark.parametrize("cls", [fn.Conv2d, fn.UpsampleConv2d])
@given(
    data=st.data(),
    chunk=st.sampled_from([1, 2**9, 2**20]),
    large=st.sampled_from([bfloat16._LARGE, 2**20]),
    any_stride=st.sampled_from(STRIDES),
)
def test_results_are_a_few_roundings_off(cls, multiplied, data, chunk, large, any_stride):
    """Relative to the sum of the magnitudes of what is added up."""
    layer, params, x = data.draw(cases(cls))
    grad = fn.normal(fn.key(1), (len(x), *layer.out_shape(x.shape[1:])), dtype=x.dtype)
    with both(multiplied), from_the_first_channel(chunk, large, any_stride):
        found = layer.apply(params, x), *layer.vjp(params, x, grad)
    everything = params, x, grad
    exact = layer.apply(*wide(everything[:2])), *layer.vjp(*wide(everything))
    sizes = layer.apply(*magnitudes(everything[:2])), *layer.vjp(*magnitudes(everything))
    leaves = map(optree.tree_leaves, (found, exact, sizes))
    for ours, theirs, size in zip(*leaves, strict=True):
        assert ours.dtype == x.dtype
        off = (ours.double() - theirs).abs()
        assert (off <= 2 * torch.finfo(x.dtype).eps * size).all()


LAYERS = [
    fn.Conv2d(32, 3, padding=1),
    fn.Conv2d(48, 3, padding="same"),
    fn.Conv2d(32, 3, stride=2, padding=1),
    fn.Conv2d(32, (2, 5), stride=(3, 2), padding=(1, 4)),
    fn.Conv2d(32, 1, stride=2),
    fn.Conv2d(32, 1, stride=3, padding=1),
    fn.Conv2d(32, 4, padding=3),
]


@pytest.mark.parametrize("layer", LAYERS, ids=str)
@pytest.mark.parametrize("size", [(12, 12), (11, 7), (2, 2)])
def test_many_channels(layer, size):
    params = layer.init(fn.key(0), (32, *size), dtype=torch.bfloat16)
    x = fn.normal(fn.key(1), (5, 32, *size), dtype=torch.bfloat16)
    grad = fn.normal(fn.key(2), (5, *layer.out_shape((32, *size))), dtype=torch.bfloat16)
    exact = layer.apply(*wide((params, x))), layer.vjp(*wide((params, x, grad)))
    large = bfloat16._LARGE
    for sizes in (
        {"chunk": 1},
        {"chunk": 2**14},
        {},
        {"large": large},
        {"large": large, "any_stride": STRIDES[-1]},
    ):
        with both(True), from_the_first_channel(**sizes):
            assert bfloat16.serves(x, layer._window)
            found = layer.apply(params, x), layer.vjp(params, x, grad)
        for ours, theirs in zip(optree.tree_leaves(found), optree.tree_leaves(exact), strict=True):
            assert (ours.double() - theirs).norm() <= 3e-3 * theirs.norm()


@pytest.mark.parametrize(
    ("layer", "shape", "is_right"),
    [
        (fn.Conv2d(4, 3, padding=1), (2, 8, 8), True),
        (fn.Conv2d(4, (3, 1), padding=(1, 0)), (3, 9, 20), True),
        (fn.Conv2d(4, (1, 3), padding=(0, 1)), (3, 9, 20), True),
        (fn.Conv2d(4, 3, padding=1), (2, 8, 7), False),
        (fn.Conv2d(4, 3, padding=1), (2, 7, 8), False),
        (fn.Conv2d(4, 3), (2, 9, 10), False),
        (fn.Conv2d(4, 3), (2, 10, 9), False),
        (fn.Conv2d(4, 1, padding=1), (2, 8, 8), False),
        (fn.Conv2d(4, 3, stride=(2, 1)), (2, 32, 32), "without AMX"),
        (fn.Conv2d(4, 2, stride=3), (2, 32, 32), "without AMX"),
        (fn.Conv2d(4, 3, stride=2, padding=1), (2, 15, 16), True),
        (fn.Conv2d(4, 3, stride=2, padding=1), (2, 32, 14), False),
        (fn.Conv2d(4, 3, stride=2, padding=3), (2, 32, 32), False),
        (fn.Conv2d(4, 3, dilation=(1, 2)), (2, 32, 32), False),
        (fn.Conv2d(4, 3, groups=2), (2, 32, 32), False),
        (fn.Conv2d(4, 2, padding="same"), (2, 32, 32), False),
        (fn.Conv2d(1, 3, padding=1), (2, 8, 8), False),
        (fn.Conv2d(4, 3, padding=1), (1, 32, 32), False),
        (fn.Conv1d(4, 3, padding=1), (2, 32), False),
    ],
    ids=str,
)
@pytest.mark.parametrize("has_amx", [False, True])
def test_torchs_gradients_in_bfloat16_serve_where_they_are_right(has_amx, layer, shape, is_right):
    params = layer.init(fn.key(0), shape, dtype=torch.bfloat16)
    x = fn.normal(fn.key(1), (2, *shape), dtype=torch.bfloat16)
    y, residuals = layer.fwd(params, x)
    spy = mock.patch.object(native, "run_backward", wraps=native.run_backward)
    any_stride = mock.patch.object(bfloat16, "_IS_ANY_STRIDE_RIGHT", not has_amx)
    with both(True), any_stride, spy as run_backward:
        layer.bwd(params, residuals, y)
    dtypes = [call.args[0].dtype for call in run_backward.call_args_list]
    assert (torch.bfloat16 in dtypes) == (not has_amx if is_right == "without AMX" else is_right)


@pytest.mark.parametrize("has_amx", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape", "is_right"),
    [
        (fn.Conv2d(4, 3, stride=2), (3, 17, 17), True),
        (fn.Conv2d(4, 3, stride=2), (3, 9, 5), "without AMX"),
        (fn.Conv2d(4, 3, stride=2), (3, 17, 16), "without AMX"),
        (fn.Conv2d(4, 3, stride=2), (3, 16, 17), "without AMX"),
        (fn.Conv2d(4, 1, stride=2, padding=1), (3, 20, 20), "without AMX"),
        (fn.Conv2d(4, 8, padding=7), (8, 12, 12), "without AMX"),
        (fn.Conv2d(4, 8, stride=2), (8, 40, 40), "without AMX"),
        (fn.Conv2d(4, (8, 7)), (8, 12, 12), True),
        (fn.Conv2d(4, (3, 4)), (8, 12, 12), True),
        (fn.Conv2d(4, (3, 6)), (16, 12, 12), True),
        (fn.Conv2d(4, (8, 1), padding=(7, 0)), (8, 12, 12), "without AMX"),
        (fn.Conv2d(4, (7, 1)), (8, 12, 12), True),
        (fn.Conv2d(4, 5, stride=4), (16, 40, 40), True),
        (fn.Conv2d(4, 4, stride=4, padding=1), (16, 40, 40), "without AMX"),
        (fn.Conv2d(4, (4, 5), stride=4), (16, 40, 40), True),
        (fn.Conv2d(4, 4, stride=(4, 2)), (32, 40, 40), "without AMX"),
        (fn.Conv2d(4, (4, 3), stride=4), (32, 40, 40), "without AMX"),
        (fn.Conv2d(4, (3, 4), stride=4), (32, 40, 40), "without AMX"),
        (fn.Conv2d(4, 1, stride=2), (32, 40, 40), "without AMX"),
        (fn.Conv2d(4, 8, groups=2), (16, 12, 12), "without AMX"),
        (fn.Conv1d(4, 8), (8, 40), "without AMX"),
        (fn.ConvTranspose2d(8, 8), (8, 9, 9), False),
    ],
    ids=str,
)
def test_torchs_kernels_in_bfloat16_serve_where_they_are_right(has_amx, layer, shape, is_right):
    params = layer.init(fn.key(0), shape, dtype=torch.bfloat16)
    x = fn.normal(fn.key(1), (2, *shape), dtype=torch.bfloat16)
    amx = mock.patch.object(processor, "HAS_AMX", has_amx)
    any_stride = mock.patch.object(bfloat16, "_IS_ANY_STRIDE_RIGHT", not has_amx)
    spy = mock.patch.object(native, "run_forward", wraps=native.run_forward)
    with both(True), amx, any_stride, spy as run_forward:
        layer.apply(params, x)
    dtypes = [call.args[0].dtype for call in run_forward.call_args_list]
    expected = not has_amx if is_right == "without AMX" else is_right
    assert (torch.bfloat16 in dtypes) == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("layer", "shape", "returns"),
    [
        (fn.Conv2d(4, (2, 14), groups=4), (4, 3, 60), True),
        (fn.Conv2d(4, (2, 15), groups=4), (4, 3, 60), False),
        (fn.Conv2d(4, (15, 2), groups=4), (4, 60, 3), True),
        (fn.Conv2d(4, (1, 15), groups=2), (4, 3, 60), True),
        (fn.Conv2d(4, (1, 15)), (1, 3, 60), True),
        (fn.Conv1d(4, 31, groups=4, padding="same"), (4, 60), False),
    ],
    ids=str,
)
def test_depthwise_kernels_that_never_return(layer, shape, returns, dtype):
    """PyTorch's kernel is not run: where it does not return, this test would not either."""
    params = layer.init(fn.key(0), shape, dtype=dtype)
    x = fn.normal(fn.key(1), (2, *shape), dtype=dtype)

    def convolve(x, weight, bias, window):
        size = len(x), len(weight), *window.count(x.shape[2:])
        return x.new_zeros(size)

    with mock.patch.object(native, "run_forward", side_effect=convolve) as run_forward:
        layer.apply(params, x)
    (call,) = run_forward.call_args_list
    assert call.args[0].dtype == (dtype if returns else torch.float32)


@pytest.mark.parametrize("has_amx", [False, True])
@pytest.mark.parametrize(
    ("layer", "shape", "forward", "backward"),
    [
        (fn.Conv2d(16, 2, stride=2), (16, 32, 32), "without AMX", "without AMX"),
        (fn.Conv2d(16, 2, stride=2), (16, 32, 14), True, True),
        (fn.Conv2d(16, 2, stride=2), (129, 32, 32), True, "without AMX"),
        (fn.Conv2d(255, 2, stride=2), (128, 16, 16), "without AMX", "without AMX"),
        (fn.Conv2d(256, 2, stride=2), (128, 16, 16), "without AMX", True),
        (fn.Conv2d(16, 4, stride=4), (8, 32, 32), "without AMX", True),
        (fn.Conv2d(16, 4, stride=4), (9, 32, 32), "without AMX", "without AMX"),
        (fn.Conv2d(16, 1), (16, 32, 32), True, True),
    ],
    ids=str,
)
def test_patches_serve_in_bfloat16_where_kernels_are_slower(
    has_amx, layer, shape, forward, backward
):
    params = layer.init(fn.key(0), shape, dtype=torch.bfloat16)
    x = fn.normal(fn.key(1), (2, *shape), dtype=torch.bfloat16)
    amx = mock.patch.object(processor, "HAS_AMX", has_amx)
    convolve = mock.patch.object(patches, "convolve", wraps=patches.convolve)
    gradients = mock.patch.object(patches, "gradients", wraps=patches.gradients)
    with both(True), amx, convolve as in_forward, gradients as in_backward:
        y, residuals = layer.fwd(params, x)
        layer.bwd(params, residuals, y)
    for expected, called in ((forward, in_forward), (backward, in_backward)):
        expected = not has_amx if expected == "without AMX" else expected
        assert called.called == expected


@given(
    channels=st.integers(1, 33),
    taps=st.tuples(st.integers(1, 2), st.integers(1, 34)),
    stride=st.integers(1, 9),
    groups=st.sampled_from([1, 1, 2]),
    turned=st.booleans(),
)
def test_rows_of_taps_that_fill_tiles(channels, taps, stride, groups, turned):
    """On processors with AMX, PyTorch's y is wrong by as much as y for some of these."""
    strides, size = (1, stride), (60, taps[1] + 8 * stride)
    if turned:
        taps, strides, size = taps[::-1], strides[::-1], size[::-1]
    layer = fn.Conv2d(2 * groups, taps, stride=strides, groups=groups)
    shape = groups * channels, *size
    params = layer.init(fn.key(0), shape, dtype=torch.bfloat16)
    x = fn.normal(fn.key(1), (1, *shape), dtype=torch.bfloat16)
    exact, size = layer.apply(*wide((params, x))), layer.apply(*magnitudes((params, x)))
    off = (layer.apply(params, x).double() - exact).abs()
    assert (off <= 2 * torch.finfo(x.dtype).eps * size).all()


def test_sums_of_many_parts_go_on_growing():
    layer = fn.Conv2d(32, 3, padding=1)
    params = layer.init(fn.key(0), (32, 1, 1), dtype=torch.bfloat16)
    x = torch.ones(600, 32, 1, 1, dtype=torch.bfloat16)
    with both(True), from_the_first_channel(chunk=1):
        dparams, _ = layer.vjp(params, x, x)
    assert (dparams["weight"][:, :, 1, 1] == torch.tensor(600).bfloat16()).all()


def test_parts_lie_in_memory_as_the_whole_does():
    layer = fn.Conv2d(32, 3, stride=2)
    params = layer.init(fn.key(0), (32, 7, 7), dtype=torch.bfloat16)
    params["weight"] = params["weight"].contiguous()
    x = fn.normal(fn.key(1), (3, 32, 7, 7), dtype=torch.bfloat16)
    with both(True), from_the_first_channel(chunk=1):
        y = layer.apply(params, x)
        dparams, _ = layer.vjp(params, x, y)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert dparams["weight"].is_contiguous()


MANY_ROWS = [
    (fn.Linear(4), (4,)),
    (fn.Conv2d(4, 1), (4, 8, 8)),
    (fn.PReLU(4), (4, 8, 8)),
    (fn.LayerNorm(), (4,)),
    (fn.LayerNorm(), (8, 8, 4)),
    (fn.LayerNorm(2, bias=False), (8, 8, 4)),
    (fn.RMSNorm(), (8, 8, 4)),
    (fn.GroupNorm(2), (4, 8, 8)),
    (fn.InstanceNorm(affine=True), (4, 8, 8)),
    (fn.BatchNorm(), (4, 8, 8)),
    (fn.ChannelAffine(), (4, 8, 8)),
    (fn.PositionalEmbedding(8), (8, 4)),
]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("layer", "shape"), MANY_ROWS, ids=repr)
def test_gradients_of_many_rows_are_rounded_once(layer, shape, dtype):
    """Added up row after row in bfloat16, 16,000 terms were off by a sixth of their sum."""
    params = layer.init(fn.key(0), shape, dtype=dtype)
    x = fn.normal(fn.key(1), (1500, *shape), dtype=dtype)
    grad = fn.normal(fn.key(2), (1500, *layer.out_shape(shape)), dtype=dtype) + x.sign() / 4
    found, _ = layer.vjp(params, x, grad, key=fn.key(3))
    exact, _ = layer.vjp(*wide((params, x, grad)), key=fn.key(3))
    for ours, theirs in zip(*map(optree.tree_leaves, (found, exact)), strict=True):
        off = (ours.double() - theirs).abs().max()
        assert off <= torch.finfo(dtype).eps * theirs.abs().max()


@pytest.mark.parametrize(
    "layer", [fn.Linear(4), fn.Conv2d(4, 1), fn.ChannelAffine(), fn.PReLU(4)], ids=repr
)
def test_terms_that_float16_cannot_hold_cancel(layer):
    shape = (4, 1, 1) if isinstance(layer, fn.Conv2d) else (4,)
    params = layer.init(fn.key(0), shape, dtype=torch.float16)
    x = torch.full((2, *shape), -256.0, dtype=torch.float16)
    grad = x * torch.tensor([1.0, -1.0]).half().reshape(2, *(1,) * len(shape))
    dparams, dx = layer.vjp(params, x, grad)
    assert dparams["weight"].dtype == dx.dtype == torch.float16
    assert not dparams["weight"].any()


def test_as_exact_as_autocast():
    net = fn.Sequential(
        fn.Conv2d(64, 2, stride=2),
        fn.ReLU(),
        fn.Conv2d(128, 2, stride=2),
        fn.ReLU(),
        fn.UpsampleConv2d(64),
        fn.ReLU(),
        fn.UpsampleConv2d(3),
        fn.Sigmoid(),
    )
    params = net.init(fn.key(0), (3, 32, 32))
    x, grad = fn.normal(fn.key(1), (4, 3, 32, 32)), fn.normal(fn.key(2), (4, 3, 32, 32))
    exact = net.apply(*wide((params, x))), *net.vjp(*wide((params, x, grad)))
    cast = fn.Cast(net, torch.bfloat16)
    with both(True):
        ours = cast.apply(params, x), *cast.vjp(params, x, grad)

    leaves, structure = optree.tree_flatten(params)
    inputs = [leaf.clone().requires_grad_() for leaf in (*leaves, x)]
    with torch.autocast("cpu", torch.bfloat16):
        y = as_torch_does(structure.unflatten(inputs[:-1]), inputs[-1])
    theirs = y, *torch.autograd.grad(y.float(), inputs, grad)
    found = zip(optree.tree_leaves(ours), theirs, optree.tree_leaves(exact), strict=True)
    for mine, other, right in found:
        assert (mine - right).norm() <= 1.25 * (other - right).norm()


def as_torch_does(params, x):
    """That network by torch.nn.functional."""
    first, second, third, last = params[0], params[2], params[4], params[6]
    x = torch.conv2d(x, first["weight"], first["bias"], 2).relu()
    x = torch.conv2d(x, second["weight"], second["bias"], 2).relu()
    for layer, end in ((third, torch.relu), (last, torch.sigmoid)):
        x = torch.nn.functional.interpolate(x, scale_factor=2.0)
        x = end(torch.conv2d(x, layer["weight"], layer["bias"], 1, 1))
    return x
