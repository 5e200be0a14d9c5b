"""value_and_grad: loss and gradient, memory freed on the way, training in several precisions."""

import gc
import weakref
from dataclasses import dataclass

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from registry import EVERY_LAYER
from test_properties import close, make, same

import funcnet as fn
from funcnet.testing import check_vjp, strategies

DENOISER = fn.Sequential(
    fn.Conv2d(8, 2, stride=2),
    fn.ReLU(),
    fn.Conv2d(12, 2, stride=2),
    fn.ReLU(),
    fn.UpsampleConv2d(8),
    fn.ReLU(),
    fn.UpsampleConv2d(3),
    fn.Sigmoid(),
)


@given(strategies.cases(EVERY_LAYER), st.sampled_from([fn.MSE(), fn.MSE("sum"), fn.Huber()]))
def test_it_is_the_chain_rule(case, loss):
    net, params, x = case
    y = net.apply(params, x)
    target = fn.normal(fn.key(0), y.shape, dtype=x.dtype)
    value, grads = fn.value_and_grad(net, loss)(params, x, target)
    close(value, loss.apply(y, target), equal_nan=True)
    close(grads, net.vjp(params, x, loss.vjp(y, target))[0])
    assert optree.tree_structure(grads) == optree.tree_structure(params)


@given(strategies.cases(EVERY_LAYER, dtypes=st.just(torch.float64), batches=st.just(2)))
def test_it_is_autograds(case):
    net, params, x = case
    target = fn.normal(fn.key(0), net.apply(params, x).shape, dtype=x.dtype)
    leaves, structure = optree.tree_flatten(params)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    value = fn.MSE().apply(net.apply(structure.unflatten(leaves), x), target)
    ours, grads = fn.value_and_grad(net, fn.MSE())(params, x, target)
    close(ours, value.detach())
    if leaves:
        expected = torch.autograd.grad(value, leaves)
        close(optree.tree_leaves(grads), list(expected), rtol=1e-9, atol=1e-11)


def test_nothing_is_written_to():
    params, x, _ = make(DENOISER, (3, 8, 8))
    target = fn.normal(fn.key(9), x.shape)
    kept = optree.tree_map(torch.clone, (params, x, target))
    step = fn.value_and_grad(DENOISER, fn.MSE())
    first = step(params, x, target)
    assert same((params, x, target), kept)
    assert same(step(params, x, target), first)


@dataclass(frozen=True)
class Watcher(fn.Layer):
    """Keeps a residual of its own, and notes in bwd which residuals of the others are alive."""

    name: str
    alive: dict[str, weakref.ref]

    def __hash__(self):
        return hash(self.name)

    def init(self, key, shape, *, dtype=None, device=None):
        return {"scale": torch.ones(())}

    def out_shape(self, shape):
        return tuple(shape)

    def fwd(self, params, x, *, key=None):
        residual = x.clone()
        self.alive[self.name] = weakref.ref(residual)
        return x * params["scale"], residual

    def bwd(self, params, residuals, grad, *, input_grad=True):
        gc.collect()
        self.alive[f"at {self.name}"] = [n for n in "abc" if self.alive[n]() is not None]
        scale = (residuals * grad).sum()
        return {"scale": scale}, grad * params["scale"] if input_grad else None


def test_residuals_are_freed_as_they_are_used():
    alive = {}
    net = fn.Sequential(
        Watcher("a", alive), fn.Sequential(Watcher("b", alive)), Watcher("c", alive)
    )
    x = torch.ones(2, 3)
    params = net.init(fn.key(0), (3,))
    fn.value_and_grad(net, fn.MSE())(params, x, torch.zeros(2, 3))
    assert (alive["at b"], alive["at a"]) == (["a", "b"], ["a"])
    y, residuals = net.fwd(params, x)
    first = net.bwd(params, residuals, torch.ones_like(y))
    assert same(net.bwd(params, residuals, torch.ones_like(y)), first)  # whose residuals are kept


def test_the_key_reaches_the_layers():
    from test_sequential import Noise

    x = torch.zeros(2, 3)
    step = fn.value_and_grad(fn.Sequential(Noise()), fn.MSE("sum"))
    noise = fn.normal(fn.fold_in(fn.key(0), 0), x.shape)
    assert step(((),), x, x, key=fn.key(0))[0] == noise.square().sum()
    assert step(((),), x, x)[0] == 0


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_training_lowers_the_loss(dtype, device):
    params = DENOISER.init(fn.key(0), (3, 8, 8), dtype=dtype, device=device)
    x = fn.uniform(fn.key(1), (16, 3, 8, 8), dtype=dtype, device=device)
    target = torch.tensor([0.1, 0.5, 0.9], dtype=dtype, device=device)[:, None, None].expand_as(x)
    step, sgd = fn.value_and_grad(DENOISER, fn.MSE()), fn.SGD(1.0, momentum=0.9)
    state, values = sgd.init(params), []
    for _ in range(40):
        value, grads = step(params, x, target)
        params, state = sgd.step(params, grads, state)
        values.append(float(value))
    assert values[-1] < 0.8 * values[0]
    assert all(leaf.dtype == dtype for leaf in optree.tree_leaves(params))


def test_the_denoiser_of_the_report():
    params, x, grad = make(DENOISER, (3, 8, 8))
    check_vjp(DENOISER, params, x, grad=grad)


def test_what_is_no_loss_is_refused():
    for wrong in (fn.MSE, None, len):
        with pytest.raises(TypeError, match="value_and_grad: expected a loss, such as MSE"):
            fn.value_and_grad(fn.ReLU(), wrong)


@pytest.mark.parametrize("layer", [fn.Conv2d(2, 1), fn.UpsampleConv2d(2), fn.ReLU()], ids=str)
def test_a_bwd_that_is_put_in_later_is_used(layer, monkeypatch):
    """A class decorator, say, or a profiler."""
    own, calls = type(layer).bwd, []

    def bwd(self, *args, **kwargs):
        calls.append(self)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(type(layer), "bwd", bwd)
    net = fn.Sequential(fn.Conv2d(2, 1), layer, layer)  # one that has gradients to compute
    x = torch.ones(1, 2, 3, 3)
    params = net.init(fn.key(0), (2, 3, 3))
    fn.value_and_grad(net, fn.MSE())(params, x, torch.zeros_like(net.apply(params, x)))
    assert layer in calls


@pytest.mark.parametrize("loss", [fn.MSE(), fn.MSE("sum"), fn.CrossEntropy(ignore_index=1)])
@given(batch=st.integers(0, 5), size=st.integers(1, 6))
def test_micro_batches_give_the_same_numbers(loss, batch, size):
    net = fn.Sequential(fn.Flatten(), fn.Linear(4), fn.Tanh(), fn.Linear(3))
    params = net.init(fn.key(0), (2, 2), dtype=torch.float64)
    x = fn.normal(fn.key(1), (batch, 2, 2), dtype=torch.float64)
    target = fn.normal(fn.key(2), (batch, 3), dtype=torch.float64)
    if isinstance(loss, fn.CrossEntropy):
        target = torch.arange(batch) // 2 % 3  # so that some parts are ignored as a whole
    expected = fn.value_and_grad(net, loss)(params, x, target)
    got = fn.value_and_grad(net, loss, micro_batch=size)(params, x, target)
    close(got, expected, equal_nan=True)


def test_micro_batch_j_draws_from_key_j():
    net = fn.Sequential(fn.Linear(3), fn.Dropout(0.5))
    params = net.init(fn.key(0), (2,))
    x, key = torch.ones(4, 2), fn.key(3)
    step = fn.value_and_grad(net, fn.MSE("sum"), micro_batch=2)
    value, _ = step(params, x, torch.zeros(4, 3), key)
    parts = [net.apply(params, x[:2], key=fn.fold_in(key, j)).square().sum() for j in range(2)]
    close(value, sum(parts))


def test_what_micro_batches_refuse():
    net = fn.Sequential(fn.Linear(3), fn.BatchNorm())
    with pytest.raises(
        ValueError, match="treat every example alone, for micro_batch, got layer 1: Batch"
    ):
        fn.value_and_grad(net, fn.MSE(), micro_batch=2)
    with pytest.raises(ValueError, match="expected micro_batch >= 1, got 0"):
        fn.value_and_grad(fn.ReLU(), fn.MSE(), micro_batch=0)
