"""ConvTranspose1d, 2d, 3d: the adjoints of convolutions. The registry holds them to torch.nn."""

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from registry import budget

import funcnet as fn
from funcnet.testing import strategies

CLASSES = [fn.ConvTranspose1d, fn.ConvTranspose2d, fn.ConvTranspose3d]
classes = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
CONVS = {
    fn.ConvTranspose1d: (fn.Conv1d, F.conv_transpose1d),
    fn.ConvTranspose2d: (fn.Conv2d, F.conv_transpose2d),
    fn.ConvTranspose3d: (fn.Conv3d, F.conv_transpose3d),
}


def integers(shape, dtype):
    return torch.randint(-3, 4, shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@classes
@budget(20)
@given(st.data())
def test_it_is_the_adjoint_of_the_convolution(cls, data):
    """⟨x, conv(v)⟩ = ⟨transposed(x), v⟩ with one weight, in integers, so bit for bit."""
    layer, params, x = data.draw(strategies.cases(strategies.layers(cls), integers=True))
    conv = CONVS[cls][0](
        x.shape[1],
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.groups,
        bias=False,
    )
    weight = {"weight": params["weight"]}
    y = layer.apply(params, x)
    if layer.bias:
        y = y - params["bias"].reshape(-1, *[1] * (x.ndim - 2))
    v = integers(y.shape, x.dtype)
    seen = conv.apply(weight, v)[tuple(slice(n) for n in x.shape)]
    assert (x * seen).sum() == (y * v).sum()


@classes
@budget(20)
@given(st.data())
def test_gradients_on_integers_are_exact(cls, data):
    layer, params, x = data.draw(strategies.cases(strategies.layers(cls), integers=True))
    y = layer.apply(params, x)
    without = layer.apply({**params, "bias": params["bias"] * 0} if layer.bias else params, x)
    grad = integers(y.shape, x.dtype)
    dparams, dx = layer.vjp(params, x, grad)
    product = (without * grad).sum()
    assert (x * dx).sum() == product
    assert (params["weight"] * dparams["weight"]).sum() == product
    if layer.bias:
        assert (params["bias"] * dparams["bias"]).sum() == ((y - without) * grad).sum()


def test_by_hand():
    """x = 1 10 under the kernel 1 2 3 with stride 2: 1 2 3+10 20 30; padding 1 cuts both ends."""
    x, kernel = torch.tensor([[[1.0, 10.0]]]), {"weight": torch.tensor([[[1.0, 2.0, 3.0]]])}
    layer = fn.ConvTranspose1d(1, 3, stride=2, bias=False)
    assert layer.apply(kernel, x).tolist() == [[[1, 2, 13, 20, 30]]]
    layer = fn.ConvTranspose1d(1, 3, stride=2, padding=1, output_padding=1, bias=False)
    assert layer.apply(kernel, x).tolist() == [[[2, 13, 20, 30]]]
    dparams, dx = layer.vjp(kernel, x, torch.tensor([[[1.0, 0.0, 0.0, 100.0]]]))
    assert dx.tolist() == [[[2, 300]]]
    assert dparams["weight"].tolist() == [[[0, 1, 1000]]]


@classes
@pytest.mark.parametrize(("output_padding", "padding"), [(2, 0), (2, 1), (1, 2), (3, 1)])
def test_more_entries_than_a_stride(cls, output_padding, padding):
    """A dilation may allow them; the convolution from y to x then has more windows than x."""
    layer = cls(
        2, 2, stride=2, padding=padding, output_padding=output_padding, dilation=4, groups=2
    )
    x = fn.normal(fn.key(0), (2, 4, *[3] * (len(layer._axes) - 1)), dtype=torch.float64)
    params = layer.init(fn.key(1), x.shape[1:], dtype=torch.float64)
    leaves = [leaf.clone().requires_grad_() for leaf in (*params.values(), x)]
    options = (2, padding, output_padding, 2, 4)
    y = CONVS[cls][1](leaves[-1], leaves[0], leaves[1], *options)
    assert layer.out_shape(x.shape[1:]) == tuple(y.shape[1:])
    grad = fn.normal(fn.key(2), y.shape, dtype=torch.float64)
    expected = torch.autograd.grad(y, leaves, grad)
    dparams, dx = layer.vjp(params, x, grad)
    torch.testing.assert_close(layer.apply(params, x), y.detach())
    torch.testing.assert_close((*dparams.values(), dx), expected)


def test_without_dx_the_strides_of_grad_may_be_anything():
    """PyTorch's kernels get float64 images of a batch of 1 wrong, by the stride of that axis."""
    layer = fn.ConvTranspose2d(4, 3, padding=1, groups=2, bias=False)
    params = layer.init(fn.key(0), (4, 5, 4), dtype=torch.float64)
    x, grad = fn.normal(fn.key(1), (2, 1, 4, 5, 4), dtype=torch.float64)
    odd = torch.empty_strided(grad.shape, (1, 1, 16, 4), dtype=torch.float64).copy_(grad)
    dparams, _ = layer.vjp(params, x, odd, input_grad=False)
    torch.testing.assert_close(dparams, layer.vjp(params, x, grad)[0])


@classes
def test_half_precision_stays_so(cls):
    """Though it is computed in float32."""
    layer, shape = cls(2, 3), (2, *[4] * (len(cls._axes) - 1))
    params = layer.init(fn.key(0), shape, dtype=torch.bfloat16)
    assert layer.apply(params, torch.ones(1, *shape, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_init_lays_the_weight_out_in_channels_last():
    images, volumes = torch.channels_last, torch.channels_last_3d
    for layer, rank, layout in (
        (fn.ConvTranspose2d(4, 3), 2, images),
        (fn.ConvTranspose3d(4, 3), 3, volumes),
    ):
        weight = layer.init(fn.key(0), (2, *[5] * rank))["weight"]
        assert weight.is_contiguous(memory_format=layout)
        assert not weight.is_contiguous()


def test_an_ensemble_learns_from_one_example():
    """torch.func.vmap hands the kernels such strides where params and x have an axis for it."""
    layer = fn.ConvTranspose2d(4, 3, padding=1)
    step = fn.value_and_grad(layer, fn.MSE())
    params = layer.init(fn.key(0), (4, 5, 4), dtype=torch.float64)
    ensemble = {name: torch.stack([leaf, 2 * leaf]) for name, leaf in params.items()}
    x = fn.normal(fn.key(1), (2, 1, 4, 5, 4), dtype=torch.float64)
    target = fn.normal(fn.key(2), (1, 4, 5, 4), dtype=torch.float64)
    values, grads = torch.func.vmap(step, in_dims=(0, 0, None))(ensemble, x, target)
    for i in range(2):
        value, own = step({name: leaf[i] for name, leaf in ensemble.items()}, x[i], target)
        torch.testing.assert_close(values[i], value)
        torch.testing.assert_close({name: leaf[i] for name, leaf in grads.items()}, own)


def refused(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}")


@classes
def test_what_does_not_fit_is_refused_with_sizes(cls):
    axes = ", ".join(cls._axes[1:])
    rank = len(cls._axes) - 1
    layer = cls(6, 2, stride=2, groups=2)
    params = layer.init(fn.key(0), (8, *[3] * rank))
    got = (2, 4, *[3] * rank)
    with refused(f"{layer}: expected x of shape (N, 8, {axes}), got {got}"):
        layer.apply(params, torch.zeros(got))
    with refused(f"{layer}: expected channels that groups=2 divides, got 3"):
        layer.out_shape((3, *[3] * rank))
    with refused(f"{layer}: expected weight of shape"):
        layer.apply({**params, "weight": params["weight"][:, :1]}, torch.zeros(2, 8, *[3] * rank))
    with refused(f"{cls.__name__}: expected groups to divide out_channels=4, got groups=3"):
        cls(4, 2, groups=3)
    with refused(f"{cls.__name__}: expected output_padding smaller than stride or dilation, got"):
        cls(4, 2, stride=2, output_padding=(*[0] * (rank - 1), 2))
    layer = cls(4, 2, padding=1)
    with refused(f"{layer}: expected a size that leaves y at least one entry on each axis, got"):
        layer.out_shape((4, *[3] * (rank - 1), 1))
    assert cls(4, 1).out_shape((4, *[1] * rank)) == (4, *[1] * rank)
    with refused(f"{layer}: expected"):
        layer.out_shape((4, *[0] * rank))
    with pytest.raises(TypeError, match="expected padding to be an int, got 'same'"):
        cls(4, 2, padding="same")
