"""Gradients of each example: themselves, their norms, and their sum clipped one by one."""

import pickle
from dataclasses import dataclass

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from registry import EVERY_LAYER, EXAMPLE_IDS, EXAMPLES, budget, make
from test_gradients import draw_loss
from test_properties import close
from users_layers import Dense

import funcnet as fn
from funcnet.layer import is_private
from funcnet.ops import products
from funcnet.testing import strategies

FLOAT64 = st.just(torch.float64)
ALONE = [
    pytest.param(layer, shape, id=name)
    for (layer, shape), name in zip(EXAMPLES, EXAMPLE_IDS, strict=True)
    if not layer.couples_examples
]
_CONV = fn.Conv2d(2, 3, padding=1)
TIED = fn.Loop(fn.Sequential(_CONV, fn.Tanh()), 3)
NETWORKS = [
    TIED,
    fn.Loop(fn.Repeat(fn.Residual(_CONV), 2), 2),
    fn.Repeat(fn.Loop(fn.Residual(_CONV), 2), 2),
    fn.Sequential(fn.Cast(TIED, torch.float64), fn.Cast(_CONV, torch.float64)),
    fn.Sequential(fn.Frozen(_CONV), fn.Recompute(TIED), fn.Sum(_CONV, fn.Frozen(_CONV))),
    fn.Reversible(*[fn.Conv2d(1, 3, padding=1)] * 4),
    fn.Recompute(fn.Concat(a=_CONV, b=fn.Sequential(_CONV, fn.Recompute(_CONV)))),
]


def one_by_one(net, loss, params, x, target, key=None):
    """What `per_example` gives, by its definition."""
    each = [
        fn.value_and_grad(net, loss)(params, x[i : i + 1], target[i : i + 1], key)
        for i in range(len(x))
    ]
    return optree.tree_map(lambda *leaves: torch.stack(leaves), *each)


def norms_of(grads, count):
    """The norm of each example's gradient."""
    leaves = [leaf.flatten(1) for leaf in optree.tree_leaves(grads)]
    return torch.cat([torch.zeros(count, 1, dtype=torch.float64), *leaves], 1).norm(dim=1)


def check_laws(net, loss, params, x, target, key=None):
    """Hold all three functions to each other; returns what `per_example` gives."""
    arguments = params, x, target, key
    values, grads = fn.per_example(net, loss)(*arguments)
    assert optree.tree_structure(grads) == optree.tree_structure(params)
    expected = norms_of(grads, len(x))
    assert torch.equal(fn.gradient_norms(net, loss)(*arguments)[0].isnan(), values.isnan())
    norms = fn.gradient_norms(net, loss)(*arguments)[1]
    # Gram matrices are exact to √ε of their factors.
    size = float(expected.max()) if len(expected) else 0.0
    close(norms, expected, rtol=1e-9, atol=1e-7 * max(1.0, size))
    if len(x):
        max_norm = float(expected.median())
        found, total = fn.clipped_value_and_grad(net, loss, max_norm)(*arguments)
        close(found, values, equal_nan=True)
        shares = (max_norm / expected.clamp(min=1e-30)).clamp(max=1.0)
        close(total, weighted(grads, shares), rtol=1e-7, atol=1e-7 * max(1.0, size))
    return values, grads


def weighted(grads, weights):
    return optree.tree_map(lambda leaf: torch.tensordot(weights, leaf, dims=1), grads)


@given(strategies.cases(EVERY_LAYER, dtypes=FLOAT64), st.data())
def test_they_are_the_gradients_of_each_example_alone(case, data):
    net, params, x = case
    loss, target = draw_loss(data, net.apply(params, x))
    found = check_laws(net, loss, params, x, target)
    if len(x):
        expected = one_by_one(net, loss, params, x, target)
        close(found, expected, rtol=1e-9, atol=1e-11, equal_nan=True)


@pytest.mark.parametrize(("layer", "shape"), ALONE)
def test_every_layer(layer, shape):
    params, x, target = make(layer, shape, batch=3, dtype=torch.float64)
    found = check_laws(layer, fn.MSE("sum"), params, x, target)
    close(found, one_by_one(layer, fn.MSE("sum"), params, x, target), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("net", NETWORKS, ids=str)
def test_combinators(net):
    params, x, target = make(net, (2, 4, 3), batch=3, dtype=torch.float64)
    found = check_laws(net, fn.MSE(), params, x, target)
    close(found, one_by_one(net, fn.MSE(), params, x, target), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("layer", "shape"), ALONE)
def test_a_layer_with_parameters_knows_how(layer, shape):
    """No layer of the vocabulary is left to the examples one by one."""
    inner = [child for _, child in layer._children()]
    if not inner and layer.init(fn.key(0), shape):
        assert type(layer)._bwd_each is not fn.Layer._bwd_each
