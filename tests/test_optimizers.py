"""SGD: the numbers of torch.optim.SGD, bit for bit, over a product of hyperparameters."""

import itertools
import math
from collections import OrderedDict
from fractions import Fraction

import numpy as np
import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_properties import same

import funcnet as fn
from funcnet.testing import strategies

PRODUCT = [
    dict(
        zip(("momentum", "dampening", "weight_decay", "nesterov", "maximize"), values, strict=True)
    )
    for values in itertools.product(
        (0.0, 0.9), (0.0, 0.3), (0.0, 0.01), (False, True), (False, True)
    )
    if not values[3] or (values[0] and not values[1])
]
settings = pytest.mark.parametrize("settings", PRODUCT, ids=str)


def parameters(dtype=torch.float32):
    a, b, c = fn.split(fn.key(0), 3)
    return (
        {"weight": fn.normal(a, (2, 3), dtype=dtype), "bias": fn.normal(b, (2,), dtype=dtype)},
        (),
        [fn.normal(c, (), dtype=dtype)],
    )


def gradients(params, step):
    leaves, structure = optree.tree_flatten(params)
    keys = fn.split(fn.fold_in(fn.key(1), step), len(leaves))
    return structure.unflatten(
        [fn.normal(k, p.shape, dtype=p.dtype) for k, p in zip(keys, leaves, strict=True)]
    )


def schedule(step):
    return 0.3 / (1 + step)


@settings
@pytest.mark.parametrize("lr", [0.1, schedule, 0.0], ids=["0.1", "schedule", "0"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_numbers_of_torch(settings, lr, dtype):
    params = parameters(dtype)
    theirs = [leaf.clone().requires_grad_() for leaf in optree.tree_leaves(params)]
    optimizer = torch.optim.SGD(theirs, lr=lr(0) if callable(lr) else lr, **settings)
    sgd = fn.SGD(lr, **settings)
    state = sgd.init(params)
    written, written_state = optree.tree_map(torch.clone, params), sgd.init(params)
    for step in range(4):
        grads = gradients(params, step)
        params, state = sgd.step(params, grads, state)
        written, written_state = sgd.step_(written, grads, written_state)
        for leaf, grad in zip(theirs, optree.tree_leaves(grads), strict=True):
            leaf.grad = grad.clone()
        optimizer.param_groups[0]["lr"] = lr(step) if callable(lr) else lr
        optimizer.step()
        assert same(optree.tree_leaves(params), [leaf.detach() for leaf in theirs])
        assert same((written, written_state.momentum), (params, state.momentum))
    assert int(state.step) == int(written_state.step) == 4


@settings
def test_step_writes_to_nothing_and_step_underscore_into_params(settings):
    sgd, params = fn.SGD(0.1, **settings), parameters()
    grads, state = gradients(params, 0), sgd.init(params)
    _, state = sgd.step(params, grads, state)
    kept = optree.tree_map(torch.clone, (params, grads, state))
    new_params, _ = sgd.step(params, grads, state)
    assert same((params, grads, state), kept)
    assert optree.tree_structure(new_params) == optree.tree_structure(params)
    for new, old in zip(optree.tree_leaves(new_params), optree.tree_leaves(params), strict=True):
        assert new.data_ptr() != old.data_ptr()
    places = [leaf.data_ptr() for leaf in optree.tree_leaves((params, state.momentum))]
    returned, after = sgd.step_(params, grads, state)
    assert returned is params
    assert same(params, new_params)
    assert same(grads, kept[1])
    assert [leaf.data_ptr() for leaf in optree.tree_leaves((returned, after.momentum))] == places


@given(strategies.trees(), st.floats(0, 1))
def test_any_tree_will_do(tree, momentum):
    sgd = fn.SGD(0.5, momentum=momentum)
    grads = optree.tree_map(torch.ones_like, tree)
    new, state = sgd.step(tree, grads, sgd.init(tree))
    assert same(new, optree.tree_map(lambda leaf: leaf - 0.5, tree))
    assert int(state.step) == 1


def test_schedules_count_from_zero():
    seen = []
    sgd = fn.SGD(lambda step: seen.append(step) or 0.1)
    params = {"w": torch.ones(2)}
    state = sgd.init(params)
    for _ in range(3):
        params, state = sgd.step(params, params, state)
    assert seen == [0, 1, 2]


def test_by_hand():
    """p₁ = p₀ − lr·g; then v = 0.5·v + g."""
    sgd = fn.SGD(0.1, momentum=0.5, weight_decay=1.0)
    p, state = torch.tensor([1.0], dtype=torch.float64), None
    state = sgd.init(p)
    p, state = sgd.step(p, torch.tensor([2.0], dtype=torch.float64), state)  # v = 2 + 1 = 3
    assert p.item() == pytest.approx(0.7)
    p, state = sgd.step(p, torch.tensor([1.0], dtype=torch.float64), state)  # v = 1.5 + 1 + 0.7
    assert state.momentum.item() == pytest.approx(3.2)
    assert p.item() == pytest.approx(0.38)


def test_gradients_flow_through_a_step():
    """The step is differentiable: a meta-gradient with respect to the gradient is −lr."""
    sgd, p = fn.SGD(0.25), torch.ones(3)
    g = torch.ones(3, requires_grad=True)
    new, _ = sgd.step(p, g, sgd.init(p))
    (meta,) = torch.autograd.grad(new.sum(), g)
    assert meta.tolist() == [-0.25] * 3


def test_optimisers_are_values():
    assert fn.SGD(0.1, momentum=0.9) == fn.SGD(0.1, momentum=0.9) != fn.SGD(0.1)
    assert repr(fn.SGD(0.1, nesterov=True, momentum=0.5)) == "SGD(0.1, momentum=0.5, nesterov=True)"


@pytest.mark.parametrize("name", ["lr", "momentum", "weight_decay"])
@pytest.mark.parametrize("value", [-0.1, math.nan, math.inf])
def test_numbers_out_of_range(name, value):
    with pytest.raises(
        ValueError, match=f"SGD: expected {name} to be finite and >= 0, got {value}"
    ):
        fn.SGD(**{"lr": 0.1, name: value})


def test_settings_that_do_not_go_together():
    for settings in ({}, {"momentum": 0.9, "dampening": 0.1}):
        with pytest.raises(
            ValueError, match="SGD: expected momentum > 0 and dampening 0 with nest"
        ):
            fn.SGD(0.1, nesterov=True, **settings)
    with pytest.raises(ValueError, match="SGD: expected dampening to be finite, got nan"):
        fn.SGD(0.1, dampening=math.nan)
    with pytest.raises(TypeError, match="SGD: expected dampening to be a number, got True"):
        fn.SGD(0.1, dampening=True)
    with pytest.raises(ValueError, match="SGD: expected lr to be finite and >= 0, got inf"):
        fn.SGD(math.inf)
    assert fn.SGD(10**400).lr == 10**400
    for name in ("nesterov", "maximize"):
        with pytest.raises(TypeError, match=f"SGD: expected {name} to be True or False, got 1"):
            fn.SGD(0.1, momentum=0.9, **{name: 1})
    for bad, got in ((torch.ones(2).long(), "torch.int64"), (1, "int")):
        with pytest.raises(TypeError, match=rf"got {got} at params\['a'\]\[0\]"):
            fn.SGD(0.1).init({"a": [bad]})
    with pytest.raises(TypeError, match=r"SGD\(0.1\): expected an SGDState, as init .*got None"):
        fn.SGD(0.1).step(torch.ones(2), torch.ones(2), None)
    with pytest.raises(TypeError, match=r"SGD: expected lr to be a number, got '0.1'"):
        fn.SGD("0.1")
    with pytest.raises(
        ValueError, match=r"SGD: expected lr\(step\) to be finite and >= 0, got -1.0"
    ):
        fn.SGD(lambda step: -1.0).step((), (), fn.SGD(0.1).init(()))


@pytest.mark.parametrize("method", ["step", "step_"])
def test_trees_that_do_not_match_change_nothing(method):
    sgd, params = fn.SGD(0.1, momentum=0.9), {"a": torch.ones(2), "b": torch.ones(3)}
    state = sgd.init(params)
    bad = {
        "structure": {"a": torch.ones(2)},
        r"grads\['b'\] like params": {"a": torch.ones(2), "b": torch.ones(4)},
        r"grads\['a'\] like params": {"a": torch.ones(2).double(), "b": torch.ones(3)},
    }
    for message, grads in bad.items():
        with pytest.raises(ValueError, match=message):
            getattr(sgd, method)(params, grads, state)
    with pytest.raises(TypeError, match=r"expected a tensor at grads\['b'\]"):
        getattr(sgd, method)(params, {"a": torch.ones(2), "b": 1.0}, state)
    with pytest.raises(TypeError, match=r"expected a tensor at grads\['b'\], got tuple"):
        getattr(sgd, method)(params, {"a": torch.ones(2), "b": (torch.ones(3),)}, state)
    with pytest.raises(ValueError, match="velocities with the structure of params"):
        getattr(sgd, method)(params, params, fn.SGD(0.1).init(params))
    assert all((leaf == 1).all() for leaf in params.values())
    assert all((leaf == 0).all() for leaf in state.momentum.values())


@pytest.mark.parametrize("method", ["step", "step_"])
def test_leaves_are_matched_by_key_in_dicts_of_any_kind(method):
    sgd, params = fn.SGD(1.0), {"a": torch.zeros(2), "b": torch.zeros(2)}
    grads = OrderedDict(b=torch.full((2,), 2.0), a=torch.ones(2))
    params, _ = getattr(sgd, method)(params, grads, sgd.init(params))
    assert type(params) is dict
    assert same(params, {"a": torch.full((2,), -1.0), "b": torch.full((2,), -2.0)})


def test_what_is_expanded_cannot_be_written_into():
    params = {"w": torch.ones(1).expand(3)}
    sgd = fn.SGD(0.1)
    with pytest.raises(ValueError, match="tensors that can be written to, got an expanded one"):
        sgd.step_(params, {"w": torch.ones(3)}, sgd.init(params))


def test_what_inference_made_cannot_be_written_into():
    with torch.inference_mode():
        params = {"v": torch.ones(3), "w": torch.ones(3)}
    grads = {"v": torch.ones(3), "w": torch.ones(3)}
    sgd = fn.SGD(0.1, momentum=0.9)
    state = sgd.init(grads)
    with pytest.raises(ValueError, match="got one of shape \\(3,\\) made in inference mode"):
        sgd.step_(params, grads, state)
    assert all((leaf == 0).all() for leaf in state.momentum.values())
    with torch.inference_mode():
        params, _ = sgd.step_(params, grads, sgd.init(grads))
    assert torch.equal(params["v"], torch.full((3,), 0.9))


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_both_steps_over_stacked_parameters(momentum):
    """Under torch.func.vmap, step writes to nothing and step_ into params, as without it."""
    sgd = fn.SGD(0.5, momentum=momentum)

    def make(seed):
        return {"w": fn.normal(fn.key(seed), (3, 2)), "b": fn.normal(fn.key(seed), (3, 1))}

    params, grads = make(0), make(1)
    state = sgd.init({name: leaf[0] for name, leaf in params.items()})
    velocities = sgd.init(params).momentum

    def run(method):
        def step(params, grads, velocities):
            params, after = method(params, grads, state._replace(momentum=velocities))
            return params, after.momentum

        return torch.func.vmap(step)(params, grads, velocities)

    kept = optree.tree_map(torch.clone, (params, velocities))
    updated = run(sgd.step)
    assert same((params, velocities), kept)
    assert same(updated[0], sgd.step(params, grads, sgd.init(params))[0])
    run(sgd.step_)
    assert same((params, velocities), updated)


def test_what_cannot_be_updated_changes_nothing():
    params = {"a": torch.ones(2), "n": torch.ones(2, dtype=torch.int64)}
    sgd = fn.SGD(0.1)
    for method in (sgd.step, sgd.step_):
        with pytest.raises(TypeError, match=r"got torch.int64 at params\['n'\]"):
            method(params, params, sgd.init(params))
    assert (params["a"] == 1).all()
    params, grads = {"a": torch.ones(1)}, {"a": torch.ones(1)}
    sgd = fn.SGD(lambda step: torch.ones(5), momentum=0.9)
    state = sgd.init(params)
    with pytest.raises(ValueError, match=r"expected lr\(step\) to be a scalar, got \(5,\)"):
        sgd.step_(params, grads, state)
    assert (state.momentum["a"] == 0).all()
    sgd = fn.SGD(lambda step: Fraction(1, 10), momentum=0.9)
    params, _ = sgd.step_(params, grads, sgd.init(params))
    assert params["a"].item() == pytest.approx(0.9)


def test_step_writes_to_axes_of_size_1_with_any_stride():
    """NumPy's newaxis makes a stride of 0, which is no expanded tensor."""
    sgd, p = fn.SGD(0.5), torch.from_numpy(np.ones(3, np.float32)[:, None])
    assert p.stride() == (1, 0)
    sgd.step_(p, torch.ones(3, 1), sgd.init(p))
    assert p.tolist() == [[0.5]] * 3
    nothing = torch.empty(0, 1).expand(0, 3)
    sgd.step_(nothing, torch.empty(0, 3), sgd.init(nothing))
    with pytest.raises(ValueError, match=r"an expanded one of shape \(3, 2\)"):
        sgd.step_(torch.ones(3, 1).expand(3, 2), torch.ones(3, 2), sgd.init(p))
