"""`interop.as_module` among the tools of torch.nn: they change a module's submodules and its y."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

import funcnet as fn
from funcnet.interop import as_module, state_dict, to_torch

KEY = fn.key(7)


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
