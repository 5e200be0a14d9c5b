"""Pooling at its corners; the registry holds every class to torch.nn in float64."""

import itertools
import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from registry import budget

import funcnet as fn
from funcnet.testing import check_vjp, strategies
from funcnet.testing.registry import REGISTRY

MAX = [fn.MaxPool1d, fn.MaxPool2d, fn.MaxPool3d]
AVG = [fn.AvgPool1d, fn.AvgPool2d, fn.AvgPool3d]
ADAPTIVE_MAX = [fn.AdaptiveMaxPool1d, fn.AdaptiveMaxPool2d, fn.AdaptiveMaxPool3d]
ADAPTIVE_AVG = [fn.AdaptiveAvgPool1d, fn.AdaptiveAvgPool2d, fn.AdaptiveAvgPool3d]
POOLS = [*MAX, *AVG, *ADAPTIVE_MAX, *ADAPTIVE_AVG]


def every(classes):
    return pytest.mark.parametrize("cls", classes, ids=lambda cls: cls.__name__)


def axes(cls):
    return len(cls._axes) - 1


# --- Numbers


@every([*AVG, *ADAPTIVE_AVG])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sums_in_half_precision_go_on_growing(cls, dtype):
    """Ones that are added one by one to a bfloat16 stop at 256, and to a float16 at 2048."""
    side = {1: 4096, 2: 64, 3: 16}[axes(cls)]
    x = torch.ones(1, 1, *(2 * side,) * axes(cls), dtype=dtype)
    y = cls(2 if cls in ADAPTIVE_AVG else side).apply((), x)
    assert torch.equal(y, torch.ones_like(y))


@every(ADAPTIVE_AVG)
def test_the_mean_of_a_sum_that_float16_cannot_hold(cls):
    x = torch.full((1, 1, *(16,) * axes(cls)), 60000.0, dtype=torch.float16)
    assert cls(1).apply((), x).flatten().tolist() == [60000.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_of_volumes_in_half_precision_go_on_growing(dtype):
    dy = torch.ones(1, 1, 16, 16, 16, dtype=dtype)
    _, dx = fn.AdaptiveAvgPool3d(16).vjp((), dy[..., :1, :1, :2], dy)
    assert torch.equal(dx, torch.full_like(dx, 2048))


@every(POOLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@budget(10)
@given(st.data())
def test_other_dtypes_are_close_to_float64(cls, dtype, data):
    """Averages of volumes have no kernel in half precision on the CPU."""
    batches = st.sampled_from([0, 1, 3])
    layer, _, x = data.draw(
        strategies.cases(strategies.layers(cls), dtypes=st.just(dtype), batches=batches)
    )
    y = layer.apply((), x)
    grad = fn.normal(fn.key(1), y.shape, dtype=dtype)
    dx = layer.vjp((), x, grad)[1]
    assert y.dtype == dx.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 0.05
    expected = layer.apply((), x.double()), layer.vjp((), x.double(), grad.double())[1]
    torch.testing.assert_close((y.double(), dx.double()), expected, rtol=tolerance, atol=tolerance)


@every([fn.MaxPool2d, fn.AvgPool2d, fn.AdaptiveMaxPool2d, fn.AdaptiveAvgPool2d])
@budget(10)
@given(st.data())
def test_images_keep_their_memory_format(cls, data):
    """y, and dx for a dy of that format, so that nothing is laid out anew between layers."""
    layer, _, x = data.draw(
        strategies.cases(
            strategies.layers(cls),
            shapes=st.just((3, 11, 12)),
            layouts=["channels_last"],
            batches=st.just(2),
            dtypes=st.just(torch.float32),
        )
    )
    y = layer.apply((), x)
    assert y.is_contiguous(memory_format=torch.channels_last)
    dx = layer.vjp((), x, y)[1]
    torch.testing.assert_close(dx, layer.vjp((), x.contiguous(), y.contiguous())[1])
    assert dx.is_contiguous(memory_format=torch.channels_last)


@every([*ADAPTIVE_MAX[:2], *ADAPTIVE_AVG])  # PyTorch's kernel for volumes' maxima is row-major
def test_dx_of_a_single_window_lies_as_convolutions_put_x(cls):
    """dy has one position then, which has no memory format. Layers below run through dx and x."""
    layer, shape = cls(1), (2, 3, *[4] * axes(cls))
    convolution = getattr(fn, f"Conv{axes(cls)}d")(3, 3, padding=1)
    x = convolution.apply(convolution.init(fn.key(0), shape[1:]), fn.normal(fn.key(1), shape))
    assert not x.is_contiguous()
    dy = layer.apply((), x).contiguous()
    dx = layer.vjp((), x, dy)[1]
    assert dx.stride() == x.stride()
    leaf = x.clone().requires_grad_()
    (expected,) = torch.autograd.grad(layer.apply((), leaf), leaf, dy)
    torch.testing.assert_close(dx, expected)


@every(POOLS)
def test_many_channels(cls):
    """Enough of them to come last, also under the transforms, which know no memory formats."""
    layer = cls(2)
    x = fn.normal(fn.key(0), (2, 17, *[5] * axes(cls)), dtype=torch.float64)
    leaf = x.clone().requires_grad_()
    y = REGISTRY[cls].twin(layer, tuple(x.shape[1:]))(leaf)
    grad = fn.normal(fn.key(1), y.shape, dtype=torch.float64)
    expected = y.detach(), torch.autograd.grad(y, leaf, grad)[0]

    def step(x, grad):
        return layer.apply((), x), layer.vjp((), x, grad)[1]

    torch.testing.assert_close(step(x, grad), expected)
    mapped = torch.func.vmap(step)(x[None], grad[None])
    torch.testing.assert_close(tuple(leaf[0] for leaf in mapped), expected)
    torch._dynamo.reset()  # which refuses to compile one function for so many classes
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x, grad), expected)


@every(MAX)
def test_the_first_of_equal_entries_gets_the_gradient(cls):
    layer = cls(2)
    x = torch.zeros(1, 1, *[2] * axes(cls), dtype=torch.float64)
    x.flatten()[1:] = 5
    y = layer.apply((), x)
    dx = layer.vjp((), x, torch.full_like(y, 3))[1]
    assert dx.flatten().tolist() == [0, 3, *[0] * (x.numel() - 2)]


@every([*MAX, *ADAPTIVE_MAX])
def test_nan_is_the_largest(cls):
    layer = cls(2)
    x = torch.zeros(1, 2, *[4] * axes(cls), dtype=torch.float64)
    x.flatten()[1] = torch.nan
    y = layer.apply((), x)
    assert y.flatten()[0].isnan()
    assert y.isnan().sum() == 1
    assert layer.vjp((), x, torch.ones_like(y))[1].flatten()[1] == 1


@given(strategies.cases(strategies.layers(fn.MaxPool1d)))
def test_apply_of_signals_is_fwd_without_indices(case):
    layer, params, x = case
    torch.testing.assert_close(
        layer.apply(params, x), layer.fwd(params, x)[0], rtol=0, atol=0, equal_nan=True
    )


def test_infinities_are_entries_as_others():
    x = torch.full((1, 1, 4), -torch.inf)
    y = fn.MaxPool1d(3, 2, 1).apply((), x)
    assert y.tolist() == [[[-torch.inf] * 2]]
    dx = fn.MaxPool1d(3, 2, 1).vjp((), x, torch.tensor([[[1.0, 10.0]]]))[1]
    assert dx.sum() == 11


SMALL = [
    (kernel, stride, padding, n)
    for kernel, stride, n in itertools.product([1, 2, 3, 4], [1, 2, 3], [1, 2, 3, 5, 6])
    for padding in range(kernel // 2 + 1)
]


@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("count_include_pad", [False, True])
def test_every_small_average(ceil_mode, count_include_pad):
    """Value, gradient and size against a loop over windows, taps and the rule for the last one."""
    for kernel, stride, padding, n in SMALL:
        layer = fn.AvgPool1d(kernel, stride, padding, ceil_mode, count_include_pad)
        over = stride - 1 if ceil_mode else 0  # entries by which the last window may hang over
        starts = [s for s in range(-padding, n, stride) if s + kernel <= n + padding + over]
        if not starts:
            with pytest.raises(ValueError, match="at least the kernel's reach"):
                layer.out_shape((1, n))
            continue
        matrix = torch.zeros(len(starts), n, dtype=torch.float64)
        for row, start in zip(matrix, starts, strict=True):
            end = min(start + kernel, n + padding)
            seen = slice(max(start, 0), min(end, n))
            row[seen] = 1 / (end - start if count_include_pad else seen.stop - seen.start)
        x = fn.normal(fn.key(n), (2, 1, n), dtype=torch.float64)
        y = layer.apply((), x)
        assert layer.out_shape((1, n)) == (1, len(starts)), layer
        torch.testing.assert_close(y, x @ matrix.T)
        grad = fn.normal(fn.key(1), y.shape, dtype=torch.float64)
        torch.testing.assert_close(layer.vjp((), x, grad)[1], grad @ matrix)


@every([*ADAPTIVE_AVG, *ADAPTIVE_MAX])
@pytest.mark.parametrize("size", [1, 2, 3, 5, 7])
def test_windows_that_cut_an_axis(cls, size):
    """⌊i·n/m⌋ up to ⌈(i+1)·n/m⌉: they overlap for 2 and 3, and of 5 there are 7."""
    x = fn.normal(fn.key(0), (2, 3, *[5] * axes(cls)), dtype=torch.float64)
    layer = cls((size, *[None] * (axes(cls) - 1)))
    y = layer.apply((), x)
    assert y.shape == (2, 3, size, *[5] * (axes(cls) - 1))
    for i in range(size):
        part = x[:, :, i * 5 // size : -(-(i + 1) * 5 // size)]
        expected = part.mean(2) if cls in ADAPTIVE_AVG else part.amax(2)
        torch.testing.assert_close(y[:, :, i], expected)
    check_vjp(layer, (), x)


@every([*ADAPTIVE_AVG, *ADAPTIVE_MAX])
def test_an_axis_that_is_kept(cls):
    x = fn.normal(fn.key(0), (2, 3, *[4] * axes(cls)))
    for layer in (cls(None), cls((None,) * axes(cls)), cls(4)):
        y = layer.apply((), x)
        assert torch.equal(y, x)
        assert y.data_ptr() != x.data_ptr()
    assert cls(None) == cls((None,) * axes(cls))
    assert repr(cls(None)) == f"{cls.__name__}(None)"


def test_residuals_of_averages_have_no_entries():
    x = torch.zeros(2, 3, 8, 8)
    for layer in (fn.AvgPool2d(2), fn.AdaptiveAvgPool2d(2)):
        assert layer._fwd((), x, None)[1].numel() == 0
    indices, like = fn.MaxPool2d(2)._fwd((), x, None)[1]
    assert like.numel() == 0
    assert indices.shape == (2, 3, 4, 4)


# --- Arguments and refusals


@every([*MAX, *AVG])
def test_arguments_are_torchs(cls):
    """By position too, and the stride is the kernel's size unless it is given."""
    layer = cls(3, 2, 1)
    assert (layer.kernel_size, layer.stride, layer.padding) == tuple(
        (n,) * axes(cls) for n in (3, 2, 1)
    )
    assert cls(3).out_shape((2, *[7] * axes(cls))) == (2, *[2] * axes(cls))
    assert repr(layer) == f"{cls.__name__}(3, stride=2, padding=1)"
    assert repr(cls(3)) == f"{cls.__name__}(3)"
    last = {"ceil_mode": True, "dilation": 2} if cls in MAX else {"count_include_pad": False}
    assert eval(repr(cls(3, **last)), dict(vars(fn))) == cls(3, **last)


def refused(message):
    return pytest.raises(ValueError, match=f"^{re.escape(message)}")


@every([*MAX, *AVG])
def test_what_does_not_fit_is_refused_with_sizes(cls):
    rank = axes(cls)
    kernel, padding = (3,) * rank, (*[0] * (rank - 1), 2)
    with refused(
        f"{cls.__name__}: expected padding of at most half of kernel_size={kernel}, got {padding}"
    ):
        cls(3, padding=padding)
    with refused(f"{cls.__name__}: expected stride >= 1, got 0"):
        cls(3, 0)
    layer = cls(3)
    with refused(f"{layer}: expected "):
        layer.out_shape((2, *[2] * rank))
    size = (*[3] * (rank - 1), 2)
    with pytest.raises(ValueError, match=re.escape(f"got size {size}")):
        layer.out_shape((2, *size))
    assert layer.out_shape((2, *[3] * rank)) == (2, *[1] * rank)
    with refused(f"{layer}: expected at least 1 channel, got 0"):
        layer.out_shape((0, *[5] * rank))
    with refused(f"{layer}: expected x of shape (N, {', '.join(cls._axes)}), got (1, 2)"):
        layer.apply((), torch.zeros(1, 2))
    with pytest.raises(TypeError, match=r"expected x to be floating-point, got torch\.int64"):
        layer.apply((), torch.zeros(1, 2, *[5] * rank, dtype=torch.int64))


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (fn.MaxPool1d(2, 1, 1, dilation=3), (1, 2)),
        (fn.MaxPool2d((1, 2), (1, 1), (0, 1), dilation=(1, 3)), (1, 4, 2)),
        (fn.MaxPool3d(2, 1, 1, dilation=(1, 1, 3)), (1, 2, 2, 2)),
    ],
    ids=repr,
)
def test_windows_that_see_nothing_but_padding_are_refused(layer, shape):
    """There torch answers −∞, with an index beyond x for its backward pass to write to."""
    with refused(f"{layer}: expected a size of which every window sees an entry, got {shape[1:]}"):
        layer.out_shape(shape)
    more = (*shape[:-1], shape[-1] + 1)
    assert layer.apply((), torch.zeros(1, *more)).isfinite().all()


@pytest.mark.parametrize("dilation", [1, 2, 3, 4])
def test_no_other_window_is_refused(dilation):
    """Every small setting: refused for its padding if and only if torch's y has −∞ in it."""
    for kernel, stride, padding, n in SMALL:
        for ceil_mode in (False, True):
            layer = fn.MaxPool1d(kernel, stride, padding, dilation, ceil_mode)
            try:
                y = F.max_pool1d(torch.zeros(1, 1, n), kernel, stride, padding, dilation, ceil_mode)
            except RuntimeError:
                y = None
            if y is not None and y.isfinite().all():
                assert layer.out_shape((1, n)) == tuple(y.shape[1:])
            else:
                with pytest.raises(ValueError, match="expected a size"):
                    layer.out_shape((1, n))


@every([*ADAPTIVE_AVG, *ADAPTIVE_MAX])
def test_sizes_that_are_none(cls):
    with refused(f"{cls.__name__}: expected output_size >= 1, got 0"):
        cls(0)
    with pytest.raises(TypeError, match=r"expected output_size to be an int, got 1\.5"):
        cls(1.5)
    with refused(f"{cls.__name__}(2): expected "):
        cls(2).out_shape((2, *[0] * axes(cls)))
