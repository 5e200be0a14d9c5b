"""Conv2d, both methods: against torch.nn.functional, autograd, exact adjoints and one another."""

import dataclasses
from collections import OrderedDict, defaultdict

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import funcnet as fn
from funcnet.ops import native, patches, pixelwise, unfold
from funcnet.ops.window import Window
from funcnet.testing import strategies

CASES = strategies.cases(strategies.layers(fn.Conv2d))
EXACT = strategies.cases(strategies.layers(fn.Conv2d), integers=True)


def reference(layer, params, x):
    weight, bias = params["weight"], params.get("bias")
    y = F.conv2d(x, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    # Apart: torch's kernel may end the process where dilated windows see nothing but padding.
    return y if bias is None else y + bias[:, None, None]


def with_method(layer, method):
    return dataclasses.replace(layer, method=method)


def integers(shape, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-3, 4, shape, generator=generator).to(dtype)


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@given(CASES)
def test_value_is_that_of_torch(case):
    layer, params, x = case
    torch.testing.assert_close(layer.apply(params, x), reference(layer, params, x))


@pytest.mark.filterwarnings("ignore:Using padding='same':UserWarning")
@given(strategies.cases(strategies.layers(fn.Conv2d), dtypes=st.just(torch.float64)))
def test_gradient_is_that_of_autograd(case):
    layer, params, x = case
    # For x laid out otherwise, autograd's weight gradient of grouped convolutions may be wrong.
    contiguous = [
        leaf.clone(memory_format=torch.contiguous_format) for leaf in (*params.values(), x)
    ]
    leaves = [leaf.requires_grad_() for leaf in contiguous]
    y = reference(layer, dict(zip(params, leaves[:-1], strict=True)), leaves[-1])
    grad = fn.normal(fn.key(1), y.shape, dtype=x.dtype)
    expected = torch.autograd.grad(y, leaves, grad)
    dparams, dx = layer.vjp(params, x, grad)
    for ours, theirs in zip((*dparams.values(), dx), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


@given(strategies.cases(strategies.layers(fn.Conv2d), dtypes=st.just(torch.float64)))
def test_both_methods_give_the_same_numbers(case):
    layer, params, x = case
    auto, derivation = with_method(layer, "auto"), with_method(layer, "unfold")
    y = auto.apply(params, x)
    torch.testing.assert_close(y, derivation.apply(params, x))
    grad = fn.normal(fn.key(1), y.shape, dtype=x.dtype)
    torch.testing.assert_close(auto.vjp(params, x, grad), derivation.vjp(params, x, grad))


@given(EXACT)
def test_integers_are_convolved_exactly_by_both_methods(case):
    layer, params, x = case
    auto, derivation = with_method(layer, "auto"), with_method(layer, "unfold")
    y = auto.apply(params, x)
    assert torch.equal(y, derivation.apply(params, x))
    grad = integers(y.shape, x.dtype)
    (da, dxa), (du, dxu) = auto.vjp(params, x, grad), derivation.vjp(params, x, grad)
    assert torch.equal(dxa, dxu)
    assert all(torch.equal(da[name], du[name]) for name in params)


@st.composite
def cut_into_patches(draw):
    """Convolutions of which most have the stride of their kernel, and nothing else."""
    kernel = draw(st.tuples(st.integers(1, 3), st.integers(1, 3)))
    rarely = st.sampled_from([(0, 0)] * 4 + [(0, 1), (1, 0)])
    padding, more = draw(rarely), draw(rarely)
    dilation = tuple(1 + entry for entry in more)
    return fn.Conv2d(
        draw(st.integers(1, 3)),
        kernel,
        stride=kernel,
        padding=padding,
        dilation=dilation,
        bias=draw(st.booleans()),
    )


@given(strategies.cases(cut_into_patches(), integers=True))
def test_products_over_patches_are_exact(case):
    layer, params, x = case
    derivation = with_method(layer, "unfold")
    with pytest.MonkeyPatch.context() as patch:  # worth it or not
        patch.setattr(patches, "_TINY", 0)
        y = layer.apply(params, x)
        grad = integers(y.shape, x.dtype)
        dparams, dx = layer.vjp(params, x, grad)
    assert torch.equal(y, derivation.apply(params, x))
    expected, expected_dx = derivation.vjp(params, x, grad)
    assert torch.equal(dx, expected_dx)
    assert all(torch.equal(dparams[name], expected[name]) for name in params)


@given(strategies.cases(cut_into_patches(), integers=True, dtypes=st.just(torch.float32)))
def test_each_gradient_over_patches_is_exact(case):
    layer, params, x = case
    for_weight = {"_LARGE": -1, "_WIDE": 0}
    for_x = {"_MANY_TAPS": 1, "_TINY": 0}
    with pytest.MonkeyPatch.context() as patch:
        for name, bound in {"_FEW_BACKWARD": -1, **for_weight, **for_x}.items():
            patch.setattr(patches, name, bound)
        grad = integers(layer.apply(params, x).shape, x.dtype)
        dparams, dx = layer.vjp(params, x, grad)
    expected, expected_dx = with_method(layer, "unfold").vjp(params, x, grad)
    assert torch.equal(dx, expected_dx)
    assert all(torch.equal(dparams[name], expected[name]) for name in params)


@pytest.mark.parametrize(
    ("shape", "out_channels", "dtype", "faster"),
    [
        ((64, 160, 160), 128, torch.float32, True),
        ((64, 128, 128), 128, torch.float32, False),
        ((64, 160, 160), 64, torch.float32, False),
        ((64, 160, 160), 128, torch.float64, False),
    ],
)
def test_dweight_of_large_images_is_faster_over_patches(shape, out_channels, dtype, faster):
    layer = fn.Conv2d(out_channels, 2, stride=2)
    x, weight = (
        torch.empty((2, *shape), dtype=dtype),
        torch.empty(layer._params(shape)["weight"].shape),
    )
    assert patches.dweight_is_faster(x, weight) == faster


@pytest.mark.parametrize(
    ("shape", "kernel_size", "dtype", "faster"),
    [
        ((2, 3, 64, 64), 4, torch.float32, True),
        ((2, 8, 64, 64), 4, torch.float32, True),
        ((2, 9, 64, 64), 4, torch.float32, False),
        ((2, 3, 64, 64), (2, 4), torch.float32, False),
        ((1, 3, 64, 64), 4, torch.float32, False),
        ((2, 3, 64, 64), 4, torch.float64, False),
    ],
)
def test_dx_of_few_channels_is_faster_over_patches(shape, kernel_size, dtype, faster):
    layer = fn.Conv2d(4, kernel_size, stride=kernel_size)
    x = torch.empty(shape, dtype=dtype)
    weight = torch.empty(layer._params(shape[1:])["weight"].shape)
    assert patches.dx_is_faster(x, weight) == faster


@pytest.mark.parametrize(
    ("batch", "out_channels", "forward", "backward"),
    [(2, 3, True, True), (14, 3, False, True), (22, 3, False, False), (5, 2000, False, False)],
)
def test_few_patches_are_faster(monkeypatch, batch, out_channels, forward, backward):
    monkeypatch.setattr(pixelwise, "_FEW", 20_000_000)
    layer = fn.Conv2d(out_channels, 2, stride=2)
    x = fn.normal(fn.key(1), (batch, 16, 11, 21), dtype=torch.float64)
    params = layer.init(fn.key(0), x.shape[1:], dtype=torch.float64)
    ways = [
        patches.are_faster(x, params["weight"], layer._window, backward=way)
        for way in (False, True)
    ]
    assert ways == [forward, backward]
    y, residuals = layer.fwd(params, x)
    torch.testing.assert_close(y, reference(layer, params, x))
    derivation = with_method(layer, "unfold")
    expected = derivation.vjp(params, x, y)
    torch.testing.assert_close(layer.bwd(params, residuals, y), expected)


@given(EXACT)
def test_adjoints_are_exact(case):
    """⟨conv(x), g⟩ = ⟨x, dx(g)⟩ = ⟨w, dw(x, g)⟩, and ⟨bias, dbias⟩ what the bias adds: all in
    integers, so bit for bit."""
    layer, params, x = case
    linear = dataclasses.replace(layer, bias=False)
    weight = {"weight": params["weight"]}
    y = linear.apply(weight, x)
    grad = integers(y.shape, x.dtype)
    dparams, dx = layer.vjp(params, x, grad)
    product = (y * grad).sum()
    assert (x * dx).sum() == product
    assert (params["weight"] * dparams["weight"]).sum() == product
    if layer.bias:
        added = layer.apply(params, x) - y
        assert (params["bias"] * dparams["bias"]).sum() == (added * grad).sum()


@given(strategies.cases(strategies.layers(fn.Conv2d), dtypes=st.just(torch.float64)), st.data())
def test_any_layout_of_grad(case, data):
    layer, params, x = case
    shape = layer.apply(params, x).shape
    grad = data.draw(strategies.tensors(shape, x.dtype))
    torch.testing.assert_close(
        layer.vjp(params, x, grad),
        layer.vjp(params, x, grad.clone(memory_format=torch.contiguous_format)),
    )


@given(
    st.integers(1, 12), st.integers(1, 5), st.integers(1, 4), st.integers(0, 6), st.integers(1, 3)
)
def test_out_shape_is_the_formula(height, kernel, stride, padding, dilation):
    layer = fn.Conv2d(2, kernel, stride=stride, padding=padding, dilation=dilation)
    rows = (height + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1
    if rows >= 1:
        assert layer.out_shape((1, height, height)) == (2, rows, rows)
    else:
        with pytest.raises(ValueError, match="at least as large as the kernel's reach"):
            layer.out_shape((1, height, height))


@given(strategies.layers(fn.Conv2d), st.data())
def test_weights_start_within_the_bound(layer, data):
    shape = data.draw(strategies.shapes(layer))
    bound = (shape[0] // layer.groups * layer.kernel_size[0] * layer.kernel_size[1]) ** -0.5
    params = layer.init(fn.key(data.draw(st.integers(0, 99))), shape)
    assert params["weight"].shape == (
        layer.out_channels,
        shape[0] // layer.groups,
        *layer.kernel_size,
    )
    assert params.keys() == ({"weight", "bias"} if layer.bias else {"weight"})
    assert all((leaf.abs() <= bound * (1 + 1e-6)).all() for leaf in params.values())


def test_weights_fill_the_bound():
    params = fn.Conv2d(64, 3).init(fn.key(0), (16, 8, 8))
    bound = (16 * 9) ** -0.5
    for leaf in params.values():
        assert leaf.max() > 0.9 * bound
        assert leaf.min() < -0.9 * bound
    assert abs(float(params["weight"].mean())) < 0.02 * bound
    assert not torch.equal(params["weight"].flatten()[:64], params["bias"])
    least = fn.Conv2d(64, 1).init(fn.key(0), (1, 8, 8))  # of one entry: the bound is 1
    assert all(0.9 < leaf.abs().max() <= 1 for leaf in least.values())


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match='expected method to be "auto" or "unfold", got \'fold\''):
        fn.Conv2d(2, 3, method="fold")


def test_a_number_means_both_sides():
    assert fn.Conv2d(8, 3) == fn.Conv2d(8, (3, 3))
    assert hash(fn.Conv2d(8, 3)) == hash(fn.Conv2d(8, [3, 3]))
    assert fn.Conv2d(8, 3) != fn.Conv2d(8, (3, 2))
    assert repr(fn.Conv2d(8, (3, 3), padding=(1, 2))) == "Conv2d(8, kernel_size=3, padding=(1, 2))"


def test_same_pads_an_odd_remainder_after():
    """A kernel of two taps, padded by 1 in all, sees a zero after the end and none before."""
    layer = fn.Conv2d(1, (1, 2), padding="same", bias=False)
    params = {"weight": torch.tensor([[[[1.0, 10.0]]]])}
    x = torch.tensor([[[[1.0, 2.0, 3.0]]]])
    assert layer.apply(params, x).tolist() == [[[[21.0, 32.0, 3.0]]]]
    assert layer.vjp(params, x, torch.ones(1, 1, 1, 3))[1].tolist() == [[[[1.0, 11.0, 11.0]]]]


def test_what_a_stride_leaves_over_gets_no_gradient():
    layer = fn.Conv2d(1, 2, stride=2, bias=False)
    params, x = {"weight": torch.ones(1, 1, 2, 2)}, torch.ones(1, 1, 3, 5)
    _, dx = layer.vjp(params, x, torch.ones(1, 1, 1, 2))
    assert dx.tolist() == [[[[1, 1, 1, 1, 0], [1, 1, 1, 1, 0], [0, 0, 0, 0, 0]]]]


@pytest.mark.parametrize("module", [native, unfold])
def test_the_modules_convolve_with_uneven_sides(module):
    """Padding may differ on the two sides of an axis, which "same" makes use of."""
    window = Window((2, 3), sides=((0, 1), (1, 1)))
    x, weight = fn.normal(fn.key(0), (2, 2, 4, 3)), fn.normal(fn.key(1), (3, 2, 2, 3))
    expected = F.conv2d(F.pad(x, (1, 1, 0, 1)), weight)
    torch.testing.assert_close(module.convolve(x, weight, None, window), expected)


def test_strides_of_axes_of_size_1_may_be_anything():
    """What F.conv2d and its backward pass get wrong in torch 2.13: both found by properties."""
    layer = fn.Conv2d(2, 2, padding=1, groups=2, bias=False)
    params = layer.init(fn.key(0), (4, 1, 2), dtype=torch.float64)
    x = fn.normal(fn.key(1), (1, 4, 1, 2), dtype=torch.float64)
    odd = x.permute(3, 2, 0, 1).contiguous().permute(2, 3, 1, 0).as_strided(x.shape, (1, 1, 4, 4))
    grad = fn.normal(fn.key(2), (1, 2, 2, 3), dtype=torch.float64)
    torch.testing.assert_close(layer.vjp(params, odd, grad), layer.vjp(params, x, grad))

    layer = fn.Conv2d(6, (2, 1), stride=2, groups=2, bias=False)
    params = layer.init(fn.key(0), (6, 5, 5))
    odd = params["weight"].as_strided((6, 3, 2, 1), (6, 1, 3, 36))
    x = fn.normal(fn.key(1), (1, 6, 5, 5)).contiguous(memory_format=torch.channels_last)
    assert torch.equal(odd, params["weight"])
    torch.testing.assert_close(layer.apply({"weight": odd}, x), layer.apply(params, x))

    layer = fn.Conv2d(1, 3, bias=False)
    params = layer.init(fn.key(0), (2, 4, 4), dtype=torch.float64)
    odd = as_channels_last(params["weight"]).as_strided((1, 2, 3, 3), (7, 1, 6, 2))
    assert torch.equal(odd, params["weight"])
    x = fn.normal(fn.key(1), (2, 2, 4, 4), dtype=torch.float64)
    grad = layer.apply(params, x)
    torch.testing.assert_close(layer.vjp({"weight": odd}, x, grad), layer.vjp(params, x, grad))


@pytest.mark.parametrize(
    "layer", [fn.Conv2d(4, 3), fn.Conv2d(4, 2, stride=2), fn.Conv2d(4, 1)], ids=str
)
def test_the_gradient_of_a_row_major_weight_is_row_major(layer, monkeypatch):
    """An update runs through both alike."""
    monkeypatch.setattr(patches, "_TINY", 0)
    params, x = layer.init(fn.key(0), (3, 8, 8)), fn.normal(fn.key(1), (2, 3, 8, 8))
    params["weight"] = params["weight"].contiguous()
    dparams, _ = layer.vjp(params, x, layer.apply(params, x))
    assert dparams["weight"].is_contiguous()


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (fn.Conv2d(2, 1, stride=2, padding=1, dilation=2, groups=2), (1, 4, 4, 1)),
        (fn.Conv2d(4, (1, 2), stride=(2, 3), padding=4, dilation=3), (3, 3, 4, 2)),
        (fn.Conv2d(4, (3, 2), stride=(2, 3), padding=(3, 4), dilation=(3, 2)), (2, 6, 2, 1)),
        (fn.Conv2d(6, (1, 2), stride=(1, 2), padding=(0, 3), dilation=(1, 2)), (1, 3, 3, 1)),
        (fn.Conv2d(24, 1, stride=(3, 4), padding=(7, 1), dilation=4, groups=3), (3, 6, 4, 3)),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_windows_that_see_nothing_but_padding(layer, shape, dtype):
    """On these torch 2.13's own kernels end the process; found by random cases of check_vjp."""
    params = layer.init(fn.key(0), shape[1:], dtype=dtype)
    x = fn.normal(fn.key(1), shape, dtype=dtype).contiguous(memory_format=torch.channels_last)
    derivation = with_method(layer, "unfold")
    y = layer.apply(params, x)
    rounding = 1e-5 if dtype == torch.float32 else 0.02
    for ours, theirs in [
        (y, derivation.apply(params, x)),
        (layer.vjp(params, x, y), derivation.vjp(params, x, y)),
    ]:
        torch.testing.assert_close(ours, theirs, rtol=rounding, atol=rounding)


@given(
    strategies.cases(
        st.one_of(strategies.layers(fn.Conv2d), strategies.layers(fn.UpsampleConv2d)),
        dtypes=st.sampled_from([torch.bfloat16, torch.float16]),
        batches=st.sampled_from([1, 8]),
    )
)
def test_half_precision_is_close_to_float64(case):
    """PyTorch's gradients in bfloat16 can be anything where pictures have few columns."""
    layer, params, x = case
    grad = fn.normal(fn.key(1), layer.apply(params, x).shape, dtype=x.dtype)
    exact = with_method(layer, "unfold")
    wide = {name: leaf.double() for name, leaf in params.items()}
    results = layer.apply(params, x), layer.vjp(params, x, grad)
    expected = exact.apply(wide, x.double()), exact.vjp(wide, x.double(), grad.double())
    for ours, theirs in zip(optree.tree_leaves(results), optree.tree_leaves(expected), strict=True):
        assert ours.dtype == x.dtype
        if theirs.numel():
            off = (ours.double() - theirs).abs().max()
            assert off <= 0.02 * theirs.abs().max() + 0.02


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (fn.Conv2d(1, (1, 2), stride=(1, 2)), (16, 15, 5, 3)),
        (fn.Conv2d(16, 4, stride=4, padding=(2, 0), bias=False), (16, 16, 11, 32)),
        (fn.Conv2d(17, (1, 4), stride=(1, 4), bias=False), (1, 130, 6, 5)),
    ],
    ids=str,
)
def test_bfloat16_with_a_stride(layer, shape):
    """PyTorch's convolution returns anything, up to NaN, on processors with tiles (AMX)."""
    params = layer.init(fn.key(0), shape[1:], dtype=torch.bfloat16)
    x = fn.normal(fn.key(1), shape, dtype=torch.bfloat16)
    expected = reference(layer, {name: leaf.double() for name, leaf in params.items()}, x.double())
    torch.testing.assert_close(layer.apply(params, x).double(), expected, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (fn.Conv2d(8, 2, stride=2, padding=1), (8, 3, 3, 1)),
        (fn.UpsampleConv2d(16, 1, scale=4, padding=0), (3, 12, 6, 1)),
    ],
    ids=str,
)
def test_bfloat16_gradients_of_narrow_pictures(layer, shape):
    params = layer.init(fn.key(0), shape[1:], dtype=torch.bfloat16)
    x = fn.normal(fn.key(1), shape, dtype=torch.bfloat16)
    grad = fn.normal(fn.key(2), layer.apply(params, x).shape, dtype=torch.bfloat16)
    wide = {name: leaf.double() for name, leaf in params.items()}
    expected = layer.vjp(wide, x.double(), grad.double())
    for ours, theirs in zip(
        optree.tree_leaves(layer.vjp(params, x, grad)), optree.tree_leaves(expected), strict=True
    ):
        torch.testing.assert_close(ours.double(), theirs, rtol=0.02, atol=0.1)


@pytest.mark.parametrize(
    "change",
    [
        {"padding": (0, 1)},
        {"padding": (1, 0)},
        {"dilation": (1, 2)},
        {"dilation": (2, 1)},
        {"groups": 2},
        {"stride": (2, 3)},
        {"stride": (3, 2)},
    ],
    ids=str,
)
def test_patches_are_for_kernels_with_nothing_else_to_heed(change):
    layer = fn.Conv2d(4, 2, **{"stride": 2, **change})
    params = layer.init(fn.key(0), (2, 5, 6), dtype=torch.float64)
    x = fn.normal(fn.key(1), (2, 2, 5, 6), dtype=torch.float64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patches, "_TINY", 0)
        y = layer.apply(params, x)
    torch.testing.assert_close(y, with_method(layer, "unfold").apply(params, x))


@pytest.mark.parametrize("layer", [fn.Conv2d(2, 3), fn.UpsampleConv2d(2)], ids=str)
def test_gradients_keep_the_order_of_params(layer):
    params = layer.init(fn.key(0), (3, 4, 4))
    ordered = OrderedDict((name, params[name]) for name in ("bias", "weight"))
    x = fn.normal(fn.key(1), (2, 3, 4, 4))
    dparams, _ = layer.vjp(ordered, x, layer.apply(ordered, x))
    assert type(dparams) is OrderedDict
    assert list(dparams) == ["bias", "weight"]
    dparams, _ = layer.vjp(defaultdict(list, params), x, layer.apply(params, x))
    assert type(dparams) is defaultdict


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (fn.Conv2d(1, 4, stride=(1, 2), padding=1, bias=False), (1, 1, 3, 3)),
        (fn.Conv2d(1, 3, stride=(1, 2), bias=False), (2, 1, 4, 3)),
    ],
    ids=str,
)
@pytest.mark.parametrize("turned", ["x", "weight", "both"])
def test_one_channel_with_the_strides_of_channels_last(layer, shape, turned):
    """PyTorch's kernel steps by 2 through the rows, and beyond the picture."""
    x = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    weight = layer.init(fn.key(0), shape[1:])["weight"]
    expected = reference(layer, {"weight": weight}, x)
    x = x if turned == "weight" else as_channels_last(x)
    params = {"weight": weight if turned == "x" else as_channels_last(weight)}
    compiled = torch.compile(layer.apply, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(layer.apply(params, x), expected)
    torch.testing.assert_close(compiled(params, x), expected)
    mapped = torch.func.vmap(layer.apply, (None, 0))(params, x[None])
    torch.testing.assert_close(mapped, expected[None])


def test_images_of_one_pixel_mapped_by_vmap():
    """PyTorch's kernel for float64 asks for a contiguous gradient of the weight."""
    layer = fn.Conv2d(1, 3, padding=1)
    params = layer.init(fn.key(0), (2, 1, 1), dtype=torch.float64)
    xs, grads = (fn.normal(fn.key(n), (4, 1, n, 1, 1), dtype=torch.float64) for n in (2, 1))
    xs = torch.stack([as_channels_last(x) for x in xs])
    found = torch.func.vmap(layer.vjp, (None, 0, 0))(params, xs, grads)
    for i, (x, grad) in enumerate(zip(xs, grads, strict=True)):
        dparams, dx = layer.vjp(params, x, grad)
        torch.testing.assert_close(found[0]["weight"][i], dparams["weight"])
        torch.testing.assert_close(found[1][i], dx)


def test_ensembles_of_convolutions_from_one_channel():
    """y of all networks is as the kernel makes it at once: the next layer takes it as it lies."""
    layer, x = fn.Conv2d(8, 3), fn.normal(fn.key(1), (32, 1, 8, 8))
    each = [layer.init(key, (1, 8, 8)) for key in fn.split(fn.key(0))]
    stacked = optree.tree_map(lambda *leaves: torch.stack(leaves), *each)
    y = torch.func.vmap(layer.apply, (0, None))(stacked, x)
    torch.testing.assert_close(y, torch.stack([layer.apply(params, x) for params in each]))
    assert y.movedim(0, 1).flatten(1, 2).is_contiguous(memory_format=torch.channels_last)


def as_channels_last(x):
    """The numbers of x at the strides that channels_last has, one channel or more."""
    _, channels, height, width = x.shape
    strides = (channels * height * width, 1, width * channels, channels)
    return x.new_empty_strided(x.shape, strides).copy_(x)


@pytest.mark.parametrize("stride", [1, (1, 2)])
@pytest.mark.parametrize("out_channels", [1, 5, 20])
def test_images_of_one_channel_are_given_a_second(out_channels, stride, monkeypatch):
    monkeypatch.setattr(native, "_MANY_PIXELS", 0)
    layer = fn.Conv2d(out_channels, (3, 4), stride=stride, padding=(2, 1), dilation=(1, 2))
    params = layer.init(fn.key(0), (1, 7, 9))
    x = fn.normal(fn.key(1), (2, 1, 7, 9))
    wide = {name: leaf.double() for name, leaf in params.items()}
    y = layer.apply(params, x)
    grad = fn.normal(fn.key(2), y.shape)
    torch.testing.assert_close(y.double(), layer.apply(wide, x.double()), rtol=1e-5, atol=1e-5)
    dparams, dx = layer.vjp(params, x, grad)
    exact, exact_dx = layer.vjp(wide, x.double(), grad.double())
    torch.testing.assert_close(dx.double(), exact_dx, rtol=1e-5, atol=1e-5)
    for name, leaf in dparams.items():
        torch.testing.assert_close(leaf.double(), exact[name], rtol=1e-5, atol=1e-5)
    assert dx.stride() == x.stride()
    assert dparams["weight"].stride() == params["weight"].stride()
    # Layers behind are faster in channels_last.
    assert out_channels == 1 or y.is_contiguous(memory_format=torch.channels_last)
