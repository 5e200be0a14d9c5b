"""Properties of the corners that random cases reach too seldom.

Windows side by side, "same" with an odd side, activations in a row, steps of many states at once,
gradients of another tree, keys on their way to the layers, other devices.
"""

from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_properties import close, same
from users_layers import Plain

import funcnet as fn
from funcnet.ops import low_resolution, transposed
from funcnet.ops.need import Need
from funcnet.testing import strategies

PAIRS = st.tuples(st.integers(1, 3), st.integers(1, 3))


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


DEPARTURES = [
    {},
    {"groups": 2},
    *({name: pair} for name in ("padding", "dilation") for pair in [(1, 2), (2, 1)]),
    *({"padding": pair} for pair in [(0, 1), (1, 0)]),
]


@pytest.mark.parametrize("departure", DEPARTURES, ids=str)
@pytest.mark.parametrize("method", ["auto", "unfold"])
@given(kernel=PAIRS, remainder=PAIRS | st.just((0, 0)), seed=st.integers(0, 99))
def test_windows_side_by_side_but_for_one_thing(method, departure, kernel, remainder, seed):
    layer = fn.Conv2d(2, kernel, stride=kernel, bias=False, method=method, **departure)
    height, width = (4 * k + r for k, r in zip(kernel, remainder, strict=True))
    assert_is_torchs(layer, (4, height, width), seed)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # torch says that it makes a copy
@pytest.mark.parametrize("method", ["auto", "unfold"])
@pytest.mark.parametrize("kernel", [(1, 2), (2, 1), (4, 3), (3, 4), (2, 4)])
@pytest.mark.parametrize("dilation", [(1, 1), (3, 1), (1, 2)])
def test_same_is_torchs_same(kernel, dilation, method):
    layer = fn.Conv2d(2, kernel, padding="same", dilation=dilation, bias=False, method=method)
    assert_is_torchs(layer, (2, 4, 5), seed=0)


@pytest.mark.parametrize("way", [low_resolution, transposed], ids=lambda way: way.__name__)
@pytest.mark.parametrize("kernel", [(1, 2), (2, 1), (4, 3), (3, 4)])
@pytest.mark.parametrize("scale", [(1, 2), (2, 1), (3, 2)])
def test_same_is_same_after_upsampling(way, kernel, scale):
    layer = fn.UpsampleConv2d(2, kernel, scale=scale, bias=False)
    steps = fn.Sequential(fn.Upsample2d(scale), fn.Conv2d(2, kernel, padding="same", bias=False))
    params = layer.init(fn.key(0), (2, 3, 2), dtype=torch.float64)
    x = fn.normal(fn.key(1), (2, 2, 3, 2), dtype=torch.float64)
    y = steps.apply(((), params), x)
    close(way.convolve(x, params["weight"], None, scale, layer._window), y)
    grad = fn.normal(fn.key(2), y.shape, dtype=torch.float64)
    (_, dparams), dx = steps.vjp(((), params), x, grad)
    gradients = way.gradients(x, params["weight"], grad, scale, layer._window, Need())
    close(gradients, (dparams["weight"], dx))


# --- What works in place, and on what


PIECES = st.sampled_from(
    [fn.ReLU(), fn.Sigmoid(), fn.Upsample2d(1), fn.Upsample2d(2), fn.Conv2d(2, 1)]
)
CHAINS = st.lists(PIECES, max_size=5).map(lambda layers: fn.Sequential(*layers))


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
    assert y.data_ptr() != x.data_ptr()
    for _ in range(2):  # on the same residuals
        close(net.bwd(params, residuals, grad), (tuple(dparams), dx))
    assert torch.equal(y, net.apply(params, x))
    assert same((x, grad), kept)


# --- Steps


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


@given(st.lists(st.integers(0, 3), min_size=1, max_size=4), st.sampled_from([0.0, 0.5, 1.0]))
def test_a_step_of_many_states_is_the_step_of_each(counts, dampening):
    sgd = fn.SGD(lambda step: 0.1 / (step + 1), momentum=0.9, dampening=dampening)
    p, g, v = (fn.normal(key, (len(counts), 3)) for key in fn.split(fn.key(0), 3))
    states = fn.SGDState(torch.tensor(counts), v)
    params, after = torch.func.vmap(sgd.step)(p, g, states)
    for i, count in enumerate(counts):
        own = fn.SGDState(torch.tensor(count), v[i])
        close((params[i], after.step[i], after.momentum[i]), _flat(sgd.step(p[i], g[i], own)))


def _flat(result):
    params, state = result
    return params, state.step, state.momentum


ONE = torch.ones(1)


@pytest.mark.parametrize("grads", [{"a": ONE, "c": ONE}, [ONE, ONE], (ONE, ONE), {"a": [ONE, ONE]}])
@pytest.mark.parametrize("method", ["step", "step_"])
def test_gradients_are_never_matched_by_position(grads, method):
    params, sgd = {"a": torch.zeros(1), "b": torch.zeros(1)}, fn.SGD(0.1)
    with pytest.raises(ValueError, match="expected grads with the structure of params"):
        getattr(sgd, method)(params, grads, sgd.init(params))
    assert same(params, {"a": torch.zeros(1), "b": torch.zeros(1)})


# --- Layers that draw numbers


@dataclass(frozen=True)
class Noisy(Plain):
    """y = n ∘ x with numbers n drawn from the key, or 1 without one."""

    def fwd(self, params, x, *, key=None):
        noise = torch.ones_like(x) if key is None else fn.normal(key, x.shape, dtype=x.dtype)
        return noise * x, noise

    def bwd(self, params, residuals, grad, *, input_grad=True):
        return (), residuals * grad if input_grad else None


NOISY = st.recursive(
    st.just(Noisy()),
    lambda layers: st.lists(layers, min_size=1, max_size=3).map(lambda ls: fn.Sequential(*ls)),
    max_leaves=4,
)


def no_params(layer):
    return tuple(map(no_params, layer)) if isinstance(layer, fn.Sequential) else ()


@given(NOISY, st.integers(0, 99))
def test_the_key_reaches_every_layer_by_every_way(layer, seed):
    key, params = fn.key(seed), no_params(layer)
    x, grad = fn.normal(fn.key(1), (2, 3)), fn.normal(fn.key(2), (2, 3))
    y, residuals = layer.fwd(params, x, key=key)
    close(layer.apply(params, x, key=key), y)
    close(layer.vjp(params, x, grad, key=key), layer.bwd(params, residuals, grad))
    assert not torch.equal(y, x)
    assert torch.equal(layer.apply(params, x), x)


# --- Devices


@pytest.mark.parametrize(
    "layer", [fn.ReLU(), fn.Upsample2d(2), fn.Conv2d(2, 1), fn.UpsampleConv2d(2)], ids=repr
)
def test_tensors_on_another_device_are_refused(layer):
    params = layer.init(fn.key(0), (1, 2, 2))
    x = torch.zeros(1, 1, 2, 2)
    grad = torch.zeros(1, *layer.out_shape((1, 2, 2)))
    with pytest.raises(TypeError, match="expected grad to have the dtype and device of y"):
        layer.vjp(params, x, grad.to("meta"))
    with pytest.raises(TypeError, match="expected target to have the dtype and device of x"):
        fn.MSE().apply(x, x.to("meta"))
    if params:
        elsewhere = {name: leaf.to("meta") for name, leaf in params.items()}
        for own, at in ((params, x.to("meta")), (elsewhere, x)):
            with pytest.raises(TypeError, match="expected weight to have the dtype and device of"):
                layer.apply(own, at)
