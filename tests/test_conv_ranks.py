"""Conv1d and Conv3d, and what all convolutions share: arguments, initialisers, refusals."""

import dataclasses
import functools
import re

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from registry import budget

import funcnet as fn
from funcnet.fields import Hyperparameters
from funcnet.testing import strategies
from funcnet.testing.layouts import laid_out

RANKS = [fn.Conv1d, fn.Conv3d]
LEARNING = [
    *(fn.Conv1d, fn.Conv2d, fn.Conv3d),
    *(fn.ConvTranspose1d, fn.ConvTranspose2d, fn.ConvTranspose3d),
    fn.UpsampleConv2d,
]
ranks = pytest.mark.parametrize("cls", RANKS, ids=lambda cls: cls.__name__)
learning = pytest.mark.parametrize("cls", LEARNING, ids=lambda cls: cls.__name__)


def results(layer, params, x, grad):
    return optree.tree_leaves((layer.apply(params, x), layer.vjp(params, x, grad)))


def small(layer):
    """The shape of a small example: channels that groups divides."""
    return (6, *[9, 8, 7][: len(layer._axes) - 1])


@learning
@budget(20)
@given(st.data())
def test_ensembles_are_their_networks(cls, data):
    """The images of each, or of all; and tensors in any layout, an axis for the networks in it."""
    layer, params, x = data.draw(
        strategies.cases(strategies.layers(cls), dtypes=st.just(torch.float64))
    )
    layouts = st.sampled_from(["contiguous", "strided", "transposed", "offset"])

    def several(leaf):
        return laid_out(torch.stack([leaf, 2 * leaf + 1]), data.draw(layouts))

    ensemble = optree.tree_map(several, params)
    xs, axis = (several(x), 0) if data.draw(st.booleans()) else (x, None)
    grad = fn.normal(fn.key(1), layer.apply(params, x).shape, dtype=x.dtype)
    found = torch.func.vmap(functools.partial(results, layer), (0, axis, None))(ensemble, xs, grad)
    for i in range(2):
        own = optree.tree_map(lambda leaf, i=i: leaf[i], ensemble)
        expected = results(layer, own, x if axis is None else xs[i], grad)
        for each, alone in zip(found, expected, strict=True):
            torch.testing.assert_close(each[i], alone)


# --- The numbers: float64 is held to torch.nn by the registry


@pytest.mark.parametrize(
    "cls", [*RANKS, fn.ConvTranspose1d, fn.ConvTranspose2d, fn.ConvTranspose3d], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@budget(20)
@given(st.data())
def test_other_dtypes_are_close_to_float64(cls, dtype, data):
    """PyTorch's kernels have returned anything for dilated, strided and narrow ones."""
    case = strategies.cases(
        strategies.layers(cls), dtypes=st.just(dtype), batches=st.sampled_from([1, 8])
    )
    layer, params, x = data.draw(case)
    grad = fn.normal(fn.key(1), layer.apply(params, x).shape, dtype=dtype)
    wide = optree.tree_map(torch.Tensor.double, params)
    tolerance = 1e-4 if dtype == torch.float32 else 0.02
    expected = results(layer, wide, x.double(), grad.double())
    for ours, exact in zip(results(layer, params, x, grad), expected, strict=True):
        assert ours.dtype == dtype
        off = (ours.double() - exact).abs().max()
        assert off <= tolerance * exact.abs().max() + tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_volumes_with_one_channel_a_group(dtype):
    """Here F.conv3d returns numbers up to 1e28 in torch 2.13, in one case of a hundred."""
    for i, kernel in enumerate([(3, 1, 2), (2, 1, 3), (2, 2, 3), (3, 2, 2), (3, 2, 3)] * 4):
        layer = fn.Conv3d(4, kernel, padding=1, groups=2)
        x = fn.normal(fn.key(i), (5, 2, 1, 5, 3 + i % 3), dtype=dtype)
        params = layer.init(fn.key(i + 1), x.shape[1:], dtype=dtype)
        exact = layer.apply(optree.tree_map(torch.Tensor.double, params), x.double())
        torch.testing.assert_close(layer.apply(params, x).double(), exact, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (fn.Conv3d(2, 4, stride=(2, 2, 3), padding=(3, 0, 3), groups=2), (4, 2, 14, 10)),
        (fn.Conv3d(2, (5, 4, 4), stride=3, padding=(4, 0, 3), groups=2), (4, 5, 8, 10)),
        (fn.ConvTranspose3d(4, 4, stride=(2, 2, 3), padding=(3, 0, 3), groups=2), (2, 3, 6, 5)),
    ],
    ids=repr,
)
def test_windows_that_start_far_before_a_shallow_volume(layer, shape, dtype):
    """oneDNN's gradient of their weight reads past the end of x, in float32."""
    x = fn.normal(fn.key(0), (2, *shape), dtype=dtype)
    params = layer.init(fn.key(1), shape, dtype=dtype)
    grad = fn.normal(fn.key(2), (2, *layer.out_shape(shape)), dtype=dtype)
    wide = optree.tree_map(torch.Tensor.double, (params, x, grad))
    expected = optree.tree_map(lambda leaf: leaf.to(dtype), layer.vjp(*wide))
    tolerance = 1e-4 if dtype is torch.float32 else 0.05
    torch.testing.assert_close(layer.vjp(params, x, grad), expected, rtol=tolerance, atol=tolerance)


@ranks
@budget(20)
@given(st.data())
def test_integers_are_convolved_exactly(cls, data):
    """⟨conv(x), g⟩ = ⟨x, dx⟩ = ⟨w, dw⟩, to the bit, and y is torch's."""
    layer, params, x = data.draw(strategies.cases(strategies.layers(cls), integers=True))
    layer, params = dataclasses.replace(layer, bias=False), {"weight": params["weight"]}
    y = layer.apply(params, x)
    grad = torch.randint(-3, 4, y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
    dparams, dx = layer.vjp(params, x, grad)
    product = (y * grad).sum()
    assert (x * dx).sum() == product
    assert (params["weight"] * dparams["weight"]).sum() == product


@given(strategies.cases(strategies.layers(fn.Conv1d), dtypes=st.just(torch.float64)))
def test_a_signal_is_an_image_of_height_1(case):
    layer, params, x = case
    padding = layer.padding if isinstance(layer.padding, str) else (0, *layer.padding)
    image = fn.Conv2d(
        layer.out_channels,
        (1, *layer.kernel_size),
        stride=(1, *layer.stride),
        padding=padding,
        dilation=(1, *layer.dilation),
        groups=layer.groups,
        bias=layer.bias,
    )
    kernels = {**params, "weight": params["weight"][:, :, None]}
    y = image.apply(kernels, x[:, :, None])
    torch.testing.assert_close(layer.apply(params, x), y[:, :, 0])
    dparams, dx = layer.vjp(params, x, y[:, :, 0])
    dimage, expected = image.vjp(kernels, x[:, :, None], y)
    torch.testing.assert_close(dx, expected[:, :, 0])
    torch.testing.assert_close(dparams["weight"], dimage["weight"][:, :, 0])


def test_taps_of_a_signal_and_of_a_volume():
    """The signal 1 2 3 under the kernel 1 10, then a volume of one row along its depth."""
    signal = torch.tensor([[[1.0, 2.0, 3.0]]])
    kernel = {"weight": torch.tensor([[[1.0, 10.0]]])}
    layer = fn.Conv1d(1, 2, bias=False)
    assert layer.apply(kernel, signal).tolist() == [[[21, 32]]]
    dparams, dx = layer.vjp(kernel, signal, torch.tensor([[[1.0, 100.0]]]))
    assert dparams["weight"].tolist() == [[[201, 302]]]
    assert dx.tolist() == [[[1, 110, 1000]]]

    layer = fn.Conv3d(1, (2, 1, 1), padding="same", bias=False)  # a zero after the end
    kernel, volume = (
        {"weight": torch.tensor([1.0, 10.0]).reshape(1, 1, 2, 1, 1)},
        signal.reshape(1, 1, 3, 1, 1),
    )
    assert layer.apply(kernel, volume).flatten().tolist() == [21, 32, 3]
    dx = layer.vjp(kernel, volume, torch.ones(1, 1, 3, 1, 1))[1]
    assert dx.flatten().tolist() == [1, 11, 11]


@ranks
@pytest.mark.parametrize("padding", ["same", "valid"])
def test_padding_by_word(cls, padding):
    layer = cls(4, 4, padding=padding, dilation=2)
    x = fn.normal(fn.key(0), (2, 3, *[8] * (len(layer._axes) - 1)), dtype=torch.float64)
    params = layer.init(fn.key(1), x.shape[1:], dtype=torch.float64)
    conv = {fn.Conv1d: F.conv1d, fn.Conv3d: F.conv3d}[cls]
    after = 6 if padding == "same" else 0
    padded = F.pad(x, [after // 2, after - after // 2] * (x.ndim - 2))
    expected = conv(padded, params["weight"], params["bias"], dilation=2)
    torch.testing.assert_close(layer.apply(params, x), expected)
    if padding == "same":
        assert layer.out_shape(x.shape[1:]) == (4, *x.shape[2:])


@ranks
def test_one_channel_with_the_strides_of_channels_last(cls):
    """PyTorch's kernels take the strides of axes of size 1 at their word, and read past the end."""
    layer = cls(1, 3, stride=2, padding=1, bias=False)
    shape = (2, 1, 4, 3, 5)[: len(layer._axes) + 1]
    x = fn.normal(fn.key(0), shape)
    params = layer.init(fn.key(1), shape[1:])
    y = layer.apply(params, x)
    expected = results(layer, params, x, y)
    params, x, grad = optree.tree_map(
        lambda leaf: leaf.movedim(1, -1).contiguous().as_strided(leaf.shape, as_last(leaf)),
        (params, x, y),
    )
    torch.testing.assert_close(results(layer, params, x, grad), expected)


def test_large_volumes_of_one_channel():
    """Images of so many pixels are given a second channel."""
    layer, x = fn.Conv3d(8, 3), fn.normal(fn.key(0), (1, 1, 11, 10, 11))
    params = layer.init(fn.key(1), x.shape[1:])
    y = layer.apply(params, x)
    exact = results(layer, optree.tree_map(torch.Tensor.double, params), x.double(), y.double())
    for ours, expected in zip(results(layer, params, x, y), exact, strict=True):
        torch.testing.assert_close(ours.double(), expected, rtol=1e-4, atol=1e-4)


def as_last(x):
    """The strides of a new tensor of x's shape whose channels come last."""
    return torch.empty(x.movedim(1, -1).shape).movedim(-1, 1).stride()


def test_volumes_keep_their_memory_format():
    """Nothing is laid out anew between layers, and an update runs through weight and gradient."""
    layer = fn.Conv3d(4, 3, padding=1)
    params = layer.init(fn.key(0), (2, 5, 6, 7))
    assert params["weight"].is_contiguous(memory_format=torch.channels_last_3d)
    x = fn.normal(fn.key(1), (2, 2, 5, 6, 7))
    y = layer.apply(params, x)
    assert y.is_contiguous(memory_format=torch.channels_last_3d)
    dparams, dx = layer.vjp(params, x, y)
    assert dparams["weight"].stride() == params["weight"].stride()
    assert dx.shape == x.shape


# --- Arguments


@learning
def test_the_order_of_torch_nn_is_refused_with_advice(cls):
    name = cls.__name__
    third = "scale" if cls is fn.UpsampleConv2d else "stride"
    with pytest.raises(TypeError) as error:
        cls(3, 8, 3)
    assert str(error.value) == (
        f"{name}: expected out_channels and kernel_size by position, the rest by keyword, got 3 "
        "positional arguments: the input's channels are read off the shape; did you mean "
        f"{name}(8, 3)? {third.capitalize()} is given by name, as in {third}=3"
    )
    with pytest.raises(TypeError, match=rf"{name}\(8, 3, {third}=2, padding=1\)\?"):
        cls(3, 8, 3, 2, 1)


@learning
def test_the_initialisers_come_last_and_by_name(cls):
    names = [field.name for field in dataclasses.fields(cls) if field.init]
    assert names[:2] == ["out_channels", "kernel_size"]
    assert names[-2:] == ["weight_init", "bias_init"]
    assert all(field.kw_only for field in dataclasses.fields(cls)[2:] if field.init)
    layer = cls(
        4, 3, weight_init=fn.initializers.Normal(2.0, 0.5), bias_init=fn.initializers.Ones()
    )
    assert eval(repr(layer), {**vars(fn), **vars(fn.initializers)}) == layer
    assert issubclass(cls, Hyperparameters)
    params = layer.init(fn.key(0), small(layer))
    assert (params["bias"] == 1).all()
    assert abs(float(params["weight"].mean()) - 2) < 0.2
    with pytest.raises(TypeError, match="expected weight_init to be an initialiser or None, got 1"):
        cls(4, 3, weight_init=1)


@learning
def test_parameters_start_within_torchs_bound(cls):
    layer = cls(6, 2) if cls is fn.UpsampleConv2d else cls(6, 2, groups=2)
    shape = small(layer)
    params = layer.init(fn.key(0), shape)
    weight = params["weight"]
    bound = weight[0].numel() ** -0.5
    module = getattr(torch.nn, cls.__name__, None)
    if module is not None:  # as torch.nn computes it
        twin = module(shape[0], 6, 2, groups=2)
        assert twin.weight.shape == weight.shape
        fan_in, _ = torch.nn.init._calculate_fan_in_and_fan_out(twin.weight)
        assert bound == fan_in**-0.5
    for leaf in params.values():
        assert leaf.abs().max() <= bound * (1 + 1e-6)
    assert weight.max() > 0.8 * bound
    assert weight.min() < -0.8 * bound


# --- Refusals


def refused(error, message):
    return pytest.raises(error, match=f"^{re.escape(message)}")


@ranks
def test_what_does_not_fit_is_refused_with_sizes(cls):
    layer = cls(8, 2, stride=2)
    name, axes = repr(layer), "L" if cls is fn.Conv1d else "D, H, W"
    size = (6,) if cls is fn.Conv1d else (6, 6, 6)
    params = layer.init(fn.key(0), (12, *size))
    with refused(ValueError, f"{name}: expected x of shape (N, 12, {axes}), got {(4, 3, *size)}"):
        layer.apply(params, torch.zeros(4, 3, *size))
    with refused(ValueError, f"{name}: expected x of shape (N, C, {axes}), got (3, 6)"):
        layer.apply(params, torch.zeros(3, 6))
    kind = "signals" if cls is fn.Conv1d else "volumes"
    few = (1,) * len(size)
    with refused(ValueError, f"{name}: expected {kind} at least as large as the kernel's reach"):
        layer.out_shape((3, *few))
    with refused(ValueError, f"{name}: expected {kind} of at least {'×'.join('1' * len(size))}"):
        layer.out_shape((3, *[0] * len(size)))
    with refused(ValueError, f"{cls.__name__}: expected groups to divide out_channels=4"):
        cls(4, 2, groups=3)
    with refused(ValueError, f'{cls.__name__}: expected stride 1 with padding="same"'):
        cls(4, 2, stride=2, padding="same")
    with refused(ValueError, f'{cls.__name__}: expected method to be "auto", got'):
        cls(4, 2, method="unfold")
    with refused(ValueError, f"{cls.__name__}: expected kernel_size to be an int or a t"):
        cls(4, (2, 2))
