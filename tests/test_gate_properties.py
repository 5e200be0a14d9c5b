"""Properties of the corners that random cases reach too seldom.

Windows side by side, "same" with an odd side, activations in a row, what is written to and what
is not, other devices.
"""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_properties import close, same

import funcnet as fn
from funcnet.testing import strategies

ONE_OR_TWO = st.integers(1, 2)
PAIRS = st.tuples(ONE_OR_TWO, ONE_OR_TWO)
METHODS = st.sampled_from(["auto", "unfold"])


def assert_is_torchs(layer, shape, seed):
    """Value and gradients of a convolution without bias are torch's and autograd's."""
    params = layer.init(fn.key(seed), shape, dtype=torch.float64)
    x = fn.normal(fn.key(seed + 1), (2, *shape), dtype=torch.float64)
    leaves = [leaf.clone().requires_grad_() for leaf in (params["weight"], x)]
    weight, pictures = leaves
    y = F.conv2d(pictures, weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    grad = fn.normal(fn.key(seed + 2), y.shape, dtype=torch.float64)
    dweight, dx = torch.autograd.grad(y, leaves, grad)
    close(layer.apply(params, x), y.detach())
    close(layer.vjp(params, x, grad), ({"weight": dweight}, dx))


# --- Windows


@given(
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 1), st.integers(0, 1)) | st.just((0, 0)),
    dilation=PAIRS | st.just((1, 1)),
    groups=ONE_OR_TWO,
    remainder=PAIRS | st.just((0, 0)),
    method=METHODS,
    seed=st.integers(0, 99),
)
def test_windows_side_by_side(kernel, padding, dilation, groups, remainder, method, seed):
    layer = fn.Conv2d(
        2 * groups,
        kernel,
        stride=kernel,
        padding=padding,
        dilation=dilation,
        groups=groups,
        bias=False,
        method=method,
    )
    height, width = (2 * k * d + r for k, d, r in zip(kernel, dilation, remainder, strict=True))
    assert_is_torchs(layer, (3 * groups, height, width), seed)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch says that it makes a copy
@pytest.mark.parametrize("method", ["auto", "unfold"])
@pytest.mark.parametrize("kernel", [(1, 2), (2, 1), (4, 3), (3, 4), (2, 4)])
@pytest.mark.parametrize("dilation", [(1, 1), (3, 1), (1, 2)])
def test_same_is_torchs_same(kernel, dilation, method):
    layer = fn.Conv2d(2, kernel, padding="same", dilation=dilation, bias=False, method=method)
    assert_is_torchs(layer, (2, 4, 5), seed=0)


# --- What works in place, and on what


PIECES = st.sampled_from(
    [fn.ReLU(), fn.Sigmoid(), fn.Upsample2d(1), fn.Upsample2d(2), fn.Conv2d(2, 1)]
)
CHAINS = st.lists(PIECES, min_size=2, max_size=5).map(lambda layers: fn.Sequential(*layers))


@given(CHAINS, st.integers(0, 99))
def test_writing_in_place_is_never_seen(net, seed):
    shape = (2, 2, 2)
    params = net.init(fn.key(seed), shape, dtype=torch.float64)
    x = fn.normal(fn.key(seed + 1), (2, *shape), dtype=torch.float64)
    grad = fn.normal(fn.key(seed + 2), (2, *net.out_shape(shape)), dtype=torch.float64)
    steps, dx = [x], grad
    for layer, own in zip(net, params, strict=True):
        steps.append(layer.apply(own, steps[-1]))
    dparams = []
    for layer, own, before in reversed(list(zip(net, params, steps, strict=False))):
        down, dx = layer.vjp(own, before, dx)
        dparams.insert(0, down)
    kept = x.clone(), grad.clone()
    y, residuals = net.fwd(params, x)
    close(y, steps[-1])
    for _ in range(2):  # on the same residuals
        close(net.bwd(params, residuals, grad), (tuple(dparams), dx))
    assert torch.equal(y, net.apply(params, x))
    assert same((x, grad), kept)


@given(strategies.tensors((2, 3)), st.sampled_from([0.0, 0.5]), st.booleans())
def test_step_underscore_writes_into_what_it_was_given(p, dampening, nesterov):
    sgd = fn.SGD(0.1, momentum=0.9, dampening=0.0 if nesterov else dampening, nesterov=nesterov)
    params, grads = {"w": p.clone().contiguous()}, {"w": torch.ones_like(p)}
    state = sgd.init(params)
    expected, expected_state = sgd.step(params, grads, state)
    again, new_state = sgd.step_(params, grads, state)
    assert again is params
    assert new_state.momentum["w"] is state.momentum["w"]
    close((params, state.momentum), (expected, expected_state.momentum))


# --- Devices


@pytest.mark.parametrize(
    "layer", [fn.ReLU(), fn.Upsample2d(2), fn.Conv2d(2, 1), fn.UpsampleConv2d(2)], ids=repr
)
def test_tensors_on_another_device_are_refused(layer):
    params = layer.init(fn.key(0), (1, 2, 2))
    x = torch.zeros(1, 1, 2, 2)
    grad = torch.zeros(1, *layer.out_shape((1, 2, 2)))
    with pytest.raises(TypeError, match="expected grad to have the dtype and device of x"):
        layer.vjp(params, x, grad.to("meta"))
    with pytest.raises(TypeError, match="expected target to have the dtype and device of x"):
        fn.MSE().apply(x, x.to("meta"))
    if params:
        with pytest.raises(TypeError, match="expected weight to have the dtype and device of x"):
            layer.apply(params, x.to("meta"))
