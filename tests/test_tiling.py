"""Networks over large images, tile by tile: the same numbers, in little memory."""

from contextlib import contextmanager
from unittest import mock

import optree
import pytest
import torch
from hypothesis import HealthCheck, assume, example, given
from hypothesis import strategies as st
from registry import budget, cases_of
from torch.utils._python_dispatch import TorchDispatchMode

import funcnet as fn
from funcnet.combinators import tiling
from funcnet.combinators.cropped import placed
from funcnet.layer import writes
from funcnet.ops.need import Need
from funcnet.running import run_bwd, run_fwd, tile_of
from funcnet.testing import strategies
from funcnet.testing.registry import REGISTRY

LOCAL = strategies.layers(
    fn.Conv2d,
    fn.UpsampleConv2d,
    fn.MaxPool2d,
    fn.AvgPool2d,
    fn.ReLU,
    fn.GELU,
    fn.PReLU,
    fn.ChannelAffine,
    fn.Identity,
)
JOINED = st.one_of(
    st.builds(fn.Residual, LOCAL),
    st.builds(fn.Concat, LOCAL, LOCAL),
    st.builds(fn.Sum, LOCAL, LOCAL),
)
NETWORKS = strategies.networks(parts=st.one_of(LOCAL, LOCAL, JOINED))


@contextmanager
def small_tiles(most, step=1):
    """Images of more than `most` bytes are cut."""
    with mock.patch.multiple(tiling, _MOST=most, _LARGE=0, _STEP=step):
        yield


def whole(net, params, x):
    """y of all of x at once."""
    with mock.patch.object(tiling, "is_large", return_value=False):
        return net.apply(params, x)


def count(net, params, x):
    """How many tiles there are."""
    with mock.patch.object(tiling, "cropped", wraps=tiling.cropped) as cropped:
        net.apply(params, x)
    return cropped.call_count // 2


CASES = strategies.cases(NETWORKS, dtypes=st.just(torch.float64), values=["normal"])


@given(CASES, st.integers(1, 4000), st.integers(1, 4))
def test_tiles_make_the_whole(case, most, step):
    net, params, x = case
    with small_tiles(most, step):
        y = net.apply(params, x)
    torch.testing.assert_close(y, whole(net, params, x), rtol=1e-10, atol=1e-10)


@given(CASES, st.integers(1, 4000), st.integers(1, 4), st.booleans(), st.booleans())
def test_tiles_make_the_gradients_of_the_whole(case, most, step, param_grad, input_grad):
    net, params, x = case
    needed = {"param_grad": param_grad, "input_grad": input_grad}
    grad = fn.normal(fn.key(1), whole(net, params, x).shape, dtype=x.dtype)
    expected = net.vjp(params, x, grad, **needed)
    with small_tiles(most, step):
        y, residuals = net.fwd(params, x)
        first = net.bwd(params, residuals, grad, **needed)
        again = net.bwd(params, residuals, grad, **needed)
        at_once = net.vjp(params, x, grad, **needed)
    torch.testing.assert_close(y, whole(net, params, x), rtol=1e-10, atol=1e-10)
    for found in (first, again, at_once):
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "block",
    [
        fn.Residual(fn.Conv2d(2, 3, padding=1)),
        fn.Sum(fn.Identity(), fn.Conv2d(2, 3, padding=1)),
        fn.Concat(fn.Conv2d(2, 3, padding=1), fn.Identity()),
    ],
    ids=lambda block: type(block).__name__,
)
def test_tiles_at_the_input_are_asked_for_no_dx(block):
    net = fn.Sequential(block)
    params = net.init(fn.key(0), (2, 12, 12), dtype=torch.float64)
    x = fn.normal(fn.key(1), (1, 2, 12, 12), dtype=torch.float64)
    y = net.apply(params, x)
    expected, _ = net.vjp(params, x, y)
    with small_tiles(800):
        assert count(net, params, x) > 2
        dparams, dx = net.vjp(params, x, y, input_grad=False)
    assert dx is None
    torch.testing.assert_close(dparams, expected, rtol=1e-10, atol=1e-10)


# A layer that writes `_fwd` alone has not said how it is cut.
TILED = [
    cls
    for cls, row in REGISTRY.items()
    if cls._tile is not fn.Layer._tile and writes(row.examples[0][0], "_tile")
]


@pytest.mark.parametrize("cls", TILED, ids=lambda cls: cls.__name__)
# Most windows of AvgPool3d reach beyond x, where it is not cut.
@budget(10, suppress_health_check=[HealthCheck.filter_too_much])
@given(st.data())
def test_a_part_is_made_of_its_source(cls, data):
    layer, params, x = data.draw(cases_of(cls, dtypes=st.just(torch.float64), values=["normal"]))
    y = layer.apply(params, x)
    assume(y.ndim > 2 and y.numel())
    sides = [
        sorted((data.draw(st.integers(1, n)), data.draw(st.integers(0, n)))) for n in y.shape[2:]
    ]
    part = tuple(slice(min(a, b - 1), b) for a, b in sides)
    found = tile_of(layer, tuple(x.shape[1:]), part)
    assume(found is not None)
    source, tile = found
    every = (slice(None), slice(None))
    made, residuals = run_fwd(tile, params, x[(*every, *source)], None)
    torch.testing.assert_close(made, y[(*every, *part)], rtol=1e-10, atol=1e-10)
    grad = fn.normal(fn.key(1), made.shape, dtype=x.dtype)
    dparams, dsource = run_bwd(tile, params, residuals, grad, Need())
    around = torch.zeros_like(y)
    around[(*every, *part)] = grad
    expected, dx = layer.vjp(params, x, around)
    torch.testing.assert_close(dparams, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(placed(dsource, source, x.shape[2:]), dx, rtol=1e-10, atol=1e-10)


def unet():
    down, up = fn.Conv2d(8, 2, stride=2), fn.UpsampleConv2d(8)
    level = fn.Concat(fn.Identity(), fn.Sequential(down, fn.ReLU(), up, fn.ReLU()))
    return fn.Sequential(
        fn.Conv2d(8, 3, padding=1), level, fn.Residual(fn.Conv2d(16, 3, padding=1)), fn.Conv2d(3, 1)
    )


class Generous(fn.PReLU):
    _tile = fn.PReLU._tile

    def _bwd(self, params, x, dy, need):
        return super()._bwd(params, x, dy, need._replace(input=True))


NETS = {
    "convolutions": fn.Sequential(fn.Conv2d(8, 2, stride=2), fn.ReLU(), fn.UpsampleConv2d(3)),
    "by name": fn.Sequential(first=fn.Conv2d(8, 3, padding=1), last=fn.Conv2d(3, 3, padding=1)),
    "nested": fn.Sequential(
        fn.Sequential(fn.Conv2d(8, 4, padding="same"), fn.ReLU()), fn.Conv2d(3, 3)
    ),
    "U-Net": unet(),
    "dx that nobody asked for": fn.Sequential(Generous(), fn.Conv2d(3, 3, padding=1)),
}


@pytest.mark.parametrize("net", NETS.values(), ids=NETS)
@pytest.mark.parametrize("batch", [1, 3])
def test_what_is_cut(net, batch):
    x = fn.normal(fn.key(0), (batch, 3, 48, 32), dtype=torch.float64)
    params = net.init(fn.key(1), x.shape[1:], dtype=x.dtype)
    y = whole(net, params, x)
    expected = net.vjp(params, x, y)
    with small_tiles(20_000):
        assert tiling._tiles(net, x) is not None  # the whole, and not only networks in it
        assert count(net, params, x) > batch
        torch.testing.assert_close(net.apply(params, x), y)
        torch.testing.assert_close(net.vjp(params, x, y), expected)
        dx = net.vjp(params, x, y, param_grad=False)[1]
        torch.testing.assert_close(dx, expected[1])
        dparams, dx = net.vjp(params, x, y, input_grad=False)
        torch.testing.assert_close(dparams, expected[0])
        assert dx is None


def test_small_images_are_cut_along_the_batch():
    net = NETS["convolutions"]
    x = fn.normal(fn.key(0), (8, 3, 16, 16))
    params = net.init(fn.key(1), x.shape[1:])
    with small_tiles(2 * 4 * 8 * 8 * 8):  # what the first layer makes of two
        assert count(net, params, x) == 4
        torch.testing.assert_close(net.apply(params, x), whole(net, params, x))


@given(st.integers(1, 500), st.integers(0, 600))
@example(33, 17)
def test_an_axis_is_cut_into_few_parts_that_are_alike(n, most):
    parts = tiling._cut(n, most)
    assert [x for part in parts for x in range(n)[part]] == list(range(n))
    assert all(part.stop - part.start == parts[0].stop for part in parts[:-1])
    assert all(part.start % 16 == 0 for part in parts)
    assert len(parts) <= -(-n // max(most, 16))
    assert parts[0].stop < max(most, 1) + 16


def test_from_which_size_on_images_are_cut():
    """The limits by default are 1 MiB of x, and of what a layer makes 32 MiB less a page."""
    assert tiling.is_large(torch.empty(1, 1, 512, 512))
    for shape in ((1, 1, 512, 511), (1, 512, 512), (1, 1, 1, 512, 512)):
        assert not tiling.is_large(torch.empty(shape))
    assert not tiling.is_large(torch.empty(1, 1, 512, 512, device="meta"))
    large = torch.zeros(1, 1, 1, 512, 512)
    assert not torch.func.vmap(lambda x: x + tiling.is_large(x))(large).any()
    net = fn.Sequential(fn.ReLU())
    most = 8191 * 2**10  # of four bytes each
    assert tiling._tiles(net, torch.empty(most, 1, 1, 1)) is None
    two = tiling._tiles(net, torch.empty(most + 1, 1, 1, 1))
    half = most // 2 + 1
    assert [tile.examples for tile in two] == [slice(0, half), slice(half, 2 * half)]
    whole = (slice(0, 8191), slice(0, 1024))
    assert [t.part for t in tiling._tiles(net, torch.empty(2, 1, 8191, 1024))] == [whole] * 2
    assert len(tiling._tiles(net, torch.empty(1, 8, 2016, 2016))) == 2 * 2


class Largest(TorchDispatchMode):
    """The entries of the largest tensor that is made."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for x in filter(torch.is_tensor, optree.tree_leaves(made)):
            self.entries = max(self.entries, x.untyped_storage().nbytes() // x.element_size())
        return made


def test_nothing_large_is_made_but_y():
    net = fn.Sequential(fn.Conv2d(32, 3, padding=1), fn.ReLU(), fn.Conv2d(1, 3, padding=1))
    x = fn.normal(fn.key(0), (1, 1, 128, 128))
    params = net.init(fn.key(1), x.shape[1:])
    with Largest() as at_once:
        net.apply(params, x)
    with small_tiles(4 * 32 * 32 * 32), Largest() as in_tiles:
        net.apply(params, x)
        fn.value_and_grad(net, fn.MSE())(params, x, x)
    assert at_once.entries >= 32 * x.numel()
    assert in_tiles.entries <= 3 * x.numel()


@pytest.mark.parametrize(
    "layer",
    [
        fn.GroupNorm(1),
        fn.InstanceNorm(),
        fn.Softmax(3),
        fn.Conv2d(3, 3, padding=1, method="unfold"),
        fn.MaxPool2d(3, 2, 1),
        fn.Concat(fn.Identity(), fn.Identity(), dim=2),
        fn.Dropout(0.5),
    ],
    ids=str,
)
def test_what_has_to_be_done_at_once(layer):
    net = fn.Sequential(fn.Conv2d(3, 1), layer)
    x = fn.normal(fn.key(0), (2, 3, 16, 16))
    params = net.init(fn.key(1), x.shape[1:])
    with small_tiles(500):
        assert count(net, params, x) == 0
        assert torch.equal(net.apply(params, x), whole(net, params, x))


def test_a_subclass_that_changes_the_formula_says_so():
    class Centred(fn.Conv2d):
        def _fwd(self, params, x, key):
            return super()._fwd(params, x - x.mean(), key)

    net = fn.Sequential(Centred(3, 1))
    x = fn.normal(fn.key(0), (2, 3, 16, 16))
    params = net.init(fn.key(1), x.shape[1:])
    with small_tiles(500):
        assert torch.equal(net.apply(params, x), whole(net, params, x))


def test_gradients_of_many_tiles_are_added_in_float32():
    net = NETS["convolutions"]
    x = fn.normal(fn.key(0), (4, 3, 48, 48))
    params, grad = net.init(fn.key(1), x.shape[1:]), torch.ones_like(x)
    exact = net.vjp(params, x, grad)[0]
    params, x, grad = optree.tree_map(torch.Tensor.bfloat16, (params, x, grad))
    at_once = net.vjp(params, x, grad)[0]
    with small_tiles(500):
        in_tiles = net.vjp(params, x, grad)[0]

    def errors(dparams):
        pairs = zip(optree.tree_leaves(dparams), optree.tree_leaves(exact), strict=True)
        return [(d.float() - e).norm() / e.norm() for d, e in pairs]

    for error, bound in zip(errors(in_tiles), errors(at_once), strict=True):
        assert error <= 1.5 * bound + 2**-9


def test_what_looks_at_single_layers_sees_the_whole():
    net, loss = NETS["U-Net"], fn.MSE()
    x = fn.normal(fn.key(0), (2, 3, 32, 32), dtype=torch.float64)
    params = net.init(fn.key(1), x.shape[1:], dtype=x.dtype)

    def found():
        each = fn.per_example(net, loss)(params, x, x)
        by_layer = dict(fn.gradients_by_layer(net, loss)(params, x, x))
        shapes = [tuple(record.y.shape) for record in fn.trace(net, params, x)]
        return each, by_layer, shapes

    expected = found()
    with small_tiles(5000):
        torch.testing.assert_close(found(), expected)


def test_autograd_and_transforms_see_the_whole():
    net = NETS["convolutions"]
    x = fn.normal(fn.key(0), (2, 3, 16, 16), dtype=torch.float64)
    params = net.init(fn.key(1), x.shape[1:], dtype=x.dtype)
    expected = net.vjp(params, x, torch.ones(2, 3, 16, 16, dtype=x.dtype))[1]
    with small_tiles(500):
        (dx,) = torch.autograd.grad(net.apply(params, x.requires_grad_()).sum(), x)
        torch.testing.assert_close(dx, expected)
        mapped = torch.func.vmap(lambda one: net.apply(params, one[None])[0])(x.detach())
    torch.testing.assert_close(mapped, whole(net, params, x.detach()))
