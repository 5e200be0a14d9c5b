"""`interop.as_module` among the tools of torch.nn: they change a module's submodules and its y."""

import copy
import pickle
import sys
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from registry import EXAMPLE_IDS, EXAMPLES, key_for, make
from torch import nn
from torch.nn.utils import prune

import funcnet as fn
from funcnet.interop import as_module, state_dict, to_torch

KEY = fn.key(7)
examples = pytest.mark.parametrize(("layer", "shape"), EXAMPLES, ids=EXAMPLE_IDS)


def twins():
    """A module of ours and one of torch.nn's, with the same parameters, and x."""
    net = fn.Sequential(fn.Linear(4), fn.Tanh(), fn.Sequential(fn.Linear(2)))
    params = net.init(fn.key(0), (3,))
    return as_module(net, params), to_torch(net, params), fn.normal(KEY, (5, 3))


# --- Submodules


def test_a_submodule_may_be_replaced():
    module, _, x = twins()
    zeros = nn.Module()
    zeros.weight, zeros.bias = nn.Parameter(torch.zeros(2, 4)), nn.Parameter(torch.zeros(2))
    module.get_submodule("2").add_module("0", zeros)
    assert not module.state_dict()["2.0.weight"].any()
    assert not module(x).any()


def test_a_replica_computes_with_its_own_parameters(monkeypatch):
    """As torch.nn.DataParallel makes one for each device."""
    replicate = sys.modules["torch.nn.parallel.replicate"]

    def doubled(tensors, devices, detach=False):
        return [[2 * tensor for tensor in tensors] for _ in devices]

    monkeypatch.setattr(replicate, "_broadcast_coalesced_reshape", doubled)
    ours, theirs, x = twins()
    found, expected = (replicate.replicate(module, [0])[0](x) for module in (ours, theirs))
    torch.testing.assert_close(found, expected)


def pruned(module):
    for name in ("0", "2.0"):
        prune.l1_unstructured(module.get_submodule(name), "weight", 0.5)


@pytest.mark.filterwarnings("ignore:.*weight_norm.*")
@pytest.mark.parametrize(
    "change",
    [
        pruned,
        lambda module: nn.utils.weight_norm(module.get_submodule("0")),
        lambda module: nn.utils.parametrizations.weight_norm(module.get_submodule("0")),
    ],
    ids=["pruned", "by a hook", "parametrised"],
)
def test_parameters_made_of_others(change):
    ours, theirs, x = twins()
    for module in (ours, theirs):
        change(module)
        optimizer = torch.optim.SGD(module.parameters(), 0.5)
        for _ in range(2):
            optimizer.zero_grad()
            module(x).square().sum().backward()
            optimizer.step()
    torch.testing.assert_close(ours(x), theirs(x))
    assert sorted(ours.state_dict()) == sorted(theirs.state_dict())
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            torch.testing.assert_close(ours.get_parameter(name), parameter)


def convolutions():
    """A module whose kernels want channels_last, x, and the parameters."""
    net = fn.Sequential(fn.Conv2d(4, 3), fn.ReLU(), fn.ConvTranspose2d(2, 3), fn.Conv2d(2, 2))
    params = net.init(KEY, (3, 6, 6))
    return as_module(net, params), fn.normal(KEY, (2, 3, 6, 6)), params


def test_convolutions_are_pruned():
    module, x, _ = convolutions()
    for name in ("0", "2", "3"):
        prune.l1_unstructured(module.get_submodule(name), "weight", 1.0)
        prune.remove(module.get_submodule(name), "weight")
    assert len(module(x).unique()) == 2  # the last bias


def test_what_takes_parameters_for_vectors():
    module, x, params = convolutions()
    vector = nn.utils.parameters_to_vector(module.parameters())
    flat = [leaf.reshape(-1) for leaf in state_dict(params).values()]
    assert torch.equal(vector, torch.cat(flat))
    optimizer = torch.optim.LBFGS(module.parameters(), max_iter=3)

    def loss():
        optimizer.zero_grad()
        value = module(x).square().mean()
        value.backward()
        return value

    assert loss() > 2 * (optimizer.step(loss), loss())[1]


def test_copies_prune_themselves():
    module, _, x = twins()
    with torch.no_grad():  # torch copies leaves of autograd's graph alone
        pruned(module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        with torch.no_grad():
            for name in ("0.weight_orig", "0.bias", "2.0.bias"):
                other.get_parameter(name).zero_()
        assert not other(x).any()
        assert module(x).any()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_pruned_module_is_compiled():
    module, _, x = twins()
    pruned(module)
    compiled = torch.compile(module, fullgraph=True, backend="eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(x), module(x))
        with torch.no_grad():
            module.get_parameter("0.weight_orig").mul_(2)


def test_the_only_layer_is_pruned():
    params = fn.Linear(4).init(KEY, (3,))
    module, x = as_module(fn.Linear(4), params), torch.ones(1, 3)
    prune.l1_unstructured(module, "weight", 1.0)
    assert torch.equal(module(x)[0], params["bias"])
    assert list(state_dict(params)) == ["weight", "bias"]


# --- y and its gradients


@examples
def test_y_may_be_written_to(layer, shape):
    """Unless the backward pass needs it, as it is with torch.nn's modules."""
    params, x, _ = make(layer, shape)
    x.requires_grad_(x.is_floating_point())
    module, key = as_module(layer, params), key_for(layer)
    y = module(x, key)
    if not y.requires_grad:
        return
    starts = [*module.parameters(), *([x] if x.requires_grad else [])]
    grad = fn.normal(KEY, y.shape)
    expected = torch.autograd.grad(module(x, key), starts, 2 * grad, allow_unused=True)
    y.mul_(2)
    try:
        found = torch.autograd.grad(y, starts, grad, allow_unused=True)
    except RuntimeError as error:
        assert "modified by an inplace operation" in str(error)  # noqa: PT017
        return
    torch.testing.assert_close(found, expected)


def test_a_convolution_behind_which_dropout_writes():
    net = fn.Sequential(fn.Conv2d(4, 3), fn.ReLU(), fn.Flatten())
    inner = as_module(net, net.init(fn.key(0), (3, 5, 5)))
    module = nn.Sequential(inner, nn.Dropout(0.5, inplace=True))
    module(fn.normal(KEY, (2, 3, 5, 5))).sum().backward()
    assert all(p.grad.any() for p in module.parameters())


@dataclass(frozen=True)
class Same(fn.Layer):
    """Returns x itself, or a view of it."""

    is_view: bool

    def _fwd(self, params, x, key):
        return x[:] if self.is_view else x, None

    def _bwd(self, params, residuals, dy, need):
        return (), dy if need.input else None


@pytest.mark.parametrize("is_view", [False, True])
def test_writing_to_y_that_is_x_is_seen_in_x(is_view):
    module, start = as_module(Same(is_view), ()), torch.ones(3, requires_grad=True)
    x = 3 * start
    y = module(x)
    with suppress(RuntimeError):  # PyTorch may refuse to write to it
        y.mul_(2)
    z = x + y
    z.sum().backward()
    assert torch.equal(start.grad, z)  # z is start times a number, which is its gradient


@examples
def test_gradients_of_several_grads_at_once(layer, shape):
    """As torch.autograd.functional.jacobian asks for with vectorize=True."""
    params, x, _ = make(layer, shape, dtype=torch.float64)
    x.requires_grad_(x.is_floating_point())
    module = as_module(layer, params)
    y = module(x, key_for(layer))
    if not y.requires_grad:
        return
    starts = [*module.parameters(), *([x] if x.requires_grad else [])]
    grads = fn.normal(KEY, (3, *y.shape), dtype=torch.float64)
    find = partial(torch.autograd.grad, y, starts, retain_graph=True)
    found = find(grads, is_grads_batched=True)
    each = zip(*(find(grad) for grad in grads), strict=True)
    torch.testing.assert_close(found, tuple(map(torch.stack, each)), rtol=1e-9, atol=1e-9)


def test_a_vectorised_jacobian_of_a_part():
    module, _, x = twins()
    module.get_submodule("0").requires_grad_(False)
    jacobian = torch.autograd.functional.jacobian
    torch.testing.assert_close(jacobian(module, x, vectorize=True), jacobian(module, x))
