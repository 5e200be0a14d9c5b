"""Optimisers: the numbers of torch.optim over products of hyperparameters, from one table."""

import dataclasses
import inspect
import itertools
import math
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_properties import close, same
from test_transforms import compile_whole

import funcnet as fn
from funcnet.ops import fused
from funcnet.testing import strategies


class Row(NamedTuple):
    """An optimiser, its twin, and the hyperparameters whose whole product is tried."""

    ours: type
    theirs: type
    grid: dict[str, tuple[Any, ...]]
    goes: Callable[[dict[str, Any]], bool] = lambda settings: True

    def product(self):
        for values in itertools.product(*self.grid.values()):
            settings = dict(zip(self.grid, values, strict=True))
            if self.goes(settings):
                yield settings


BOTH = (False, True)
ADAM = {
    "betas": ((0.9, 0.999), (0.0, 0.5)),
    "eps": (1e-8, 0.1),
    "weight_decay": (0.0, 0.1),
    "amsgrad": BOTH,
    "maximize": BOTH,
}
ROWS = [
    Row(
        fn.SGD,
        torch.optim.SGD,
        {
            "momentum": (0.0, 0.9),
            "dampening": (0.0, 0.3),
            "weight_decay": (0.0, 0.01),
            "nesterov": BOTH,
            "maximize": BOTH,
        },
        lambda settings: (
            not settings["nesterov"] or (settings["momentum"] and not settings["dampening"])
        ),
    ),
    Row(fn.Adam, torch.optim.Adam, ADAM),
    Row(fn.AdamW, torch.optim.AdamW, ADAM),
    Row(
        fn.RMSprop,
        torch.optim.RMSprop,
        {
            "alpha": (0.99, 0.5),
            "eps": (1e-8, 0.1),
            "weight_decay": (0.0, 0.01),
            "momentum": (0.0, 0.9),
            "centered": BOTH,
        },
    ),
]
products = pytest.mark.parametrize(
    ("row", "settings"),
    [
        pytest.param(row, settings, id=f"{row.ours.__name__}-{settings}")
        for row in ROWS
        for settings in row.product()
    ],
)
# Everything that a formula has, and nothing of it.
OPTIMIZERS = [
    fn.SGD(0.1, momentum=0.9, dampening=0.3, weight_decay=0.01),
    fn.SGD(0.1),
    fn.Adam(0.1, weight_decay=0.01, amsgrad=True),
    fn.Adam(0.1),
    fn.AdamW(0.1, amsgrad=True, maximize=True),
    fn.RMSprop(0.1, weight_decay=0.01, momentum=0.9, centered=True),
    fn.RMSprop(0.1),
]
optimizers = pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=repr)


def parameters(dtype=torch.float32):
    a, b, c, d = fn.split(fn.key(0), 4)
    return (
        {"weight": fn.normal(a, (2, 3), dtype=dtype), "bias": fn.normal(b, (2,), dtype=dtype)},
        (),
        [fn.normal(c, (), dtype=dtype), fn.normal(d, (37, 9), dtype=dtype)],
    )


def gradients(params, step):
    leaves, structure = optree.tree_flatten(params)
    keys = fn.split(fn.fold_in(fn.key(1), step), len(leaves))
    return structure.unflatten(
        [fn.normal(k, p.shape, dtype=p.dtype) for k, p in zip(keys, leaves, strict=True)]
    )


def schedule(step):
    return 0.3 / (1 + step)


class Twin:
    """An optimiser of torch.optim on copies of the leaves of params."""

    def __init__(self, row, params, lr, settings, **variant):
        self.leaves = [leaf.clone().requires_grad_() for leaf in optree.tree_leaves(params)]
        first = lr(0) if callable(lr) else lr
        self.lr, self.optimizer = lr, row.theirs(self.leaves, lr=first, **settings, **variant)

    def step(self, grads, step):
        for leaf, grad in zip(self.leaves, optree.tree_leaves(grads), strict=True):
            leaf.grad = grad.clone()
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(step) if callable(self.lr) else self.lr
        self.optimizer.step()
        return [leaf.detach() for leaf in self.leaves]


@products
@pytest.mark.parametrize("lr", [0.1, schedule], ids=["0.1", "schedule"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_the_numbers_of_torch(row, settings, lr, dtype):
    """Bit for bit; of `torch.optim.Adam(fused=True)` where that is precise."""
    params = parameters(dtype)
    is_fused = row.ours in (fn.Adam, fn.AdamW) and dtype != torch.bfloat16
    twin = Twin(row, params, lr, settings, **({"fused": True} if is_fused else {}))
    looped = Twin(row, params, lr, settings, foreach=False)
    optimizer = row.ours(lr, **settings)
    state = optimizer.init(params)
    written, written_state = optree.tree_map(torch.clone, params), optimizer.init(params)
    for step in range(4):
        grads = gradients(params, step)
        params, state = optimizer.step(params, grads, state)
        written, written_state = optimizer.step_(written, grads, written_state)
        assert same(optree.tree_leaves(params), twin.step(grads, step))
        assert same((written, written_state), (params, state))
        rounding = 32 * torch.finfo(dtype).eps if is_fused else 0
        close(
            optree.tree_leaves(params), looped.step(grads, step), rtol=rounding, atol=rounding / 10
        )
    assert int(state.step) == int(written_state.step) == 4


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.ours.__name__)
def test_a_rate_of_0_is_a_rate(row):
    params = parameters()
    optimizer = row.ours(0.0)
    new, state = optimizer.step(params, gradients(params, 0), optimizer.init(params))
    assert same(new, params)
    assert int(state.step) == 1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.ours.__name__)
@pytest.mark.parametrize(
    ("dtype", "lr"), [(torch.float16, 7e4), (torch.bfloat16, 1e39), (torch.float32, 1e39)]
)
def test_a_rate_that_a_parameter_cannot_hold_changes_nothing(row, dtype, lr):
    """It is a leaf behind one that holds it, which would have been written."""
    params = {"a": torch.ones(2, dtype=torch.float64), "b": torch.ones(2, dtype=dtype)}
    for rate in (lr, lambda step: lr):
        optimizer = row.ours(rate)
        state = optimizer.init(params)
        before = optree.tree_map(torch.clone, (params, state))
        with pytest.raises(ValueError, match=rf"of at most \S+ for {dtype}, got "):
            optimizer.step_(params, params, state)
        assert same((params, state), before)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.ours.__name__)
def test_the_largest_rate_that_float16_holds(row):
    optimizer, params = row.ours(65504.0), torch.zeros(2, dtype=torch.float16)
    _, state = optimizer.step(params, params, optimizer.init(params))
    assert int(state.step) == 1


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.ours.__name__)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_infinite_parameters_are_torchs(row, dtype):
    """A decay of 0 adds no 0 · ∞, by the kernel and by the formula."""
    params = {"w": torch.tensor([math.inf, -math.inf, 1.0], dtype=dtype)}
    grads = {"w": torch.ones(3, dtype=dtype)}
    optimizer = row.ours(0.1, weight_decay=0.0)
    new, _ = optimizer.step(params, grads, optimizer.init(params))
    (expected,) = Twin(row, params, 0.1, {"weight_decay": 0.0}).step(grads, 0)
    torch.testing.assert_close(new["w"], expected, equal_nan=True)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.ours.__name__)
def test_defaults_are_those_of_torch(row):
    required = {"lr": 0.1} if row.ours is fn.SGD else {}
    ours = row.ours(**required)
    theirs = row.theirs([torch.ones(1)], **required).defaults
    for name in row.grid.keys() | {"lr"}:
        assert getattr(ours, name) == theirs[name]
    arguments, torchs = (list(inspect.signature(cls).parameters) for cls in (row.ours, row.theirs))
    both = [name for name in arguments if name in torchs]
    assert both == sorted(both, key=torchs.index)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.ours.__name__)
def test_complex_parameters(row):
    """Adam and RMSprop treat real and imaginary parts apart, as torch does."""
    settings = dict(list(row.product())[-1])
    params = parameters(torch.float64)
    params = optree.tree_map(lambda p: torch.complex(p, p.flip(0) if p.ndim else -p), params)
    twin, optimizer = Twin(row, params, 0.1, settings), row.ours(0.1, **settings)
    state = optimizer.init(params)
    written, written_state = optree.tree_map(torch.clone, params), optimizer.init(params)
    for step in range(3):
        grads = optree.tree_map(lambda p: (p * (1 + 2j)).conj(), params)  # lazily conjugated
        params, state = optimizer.step(params, grads, state)
        written, written_state = optimizer.step_(written, grads, written_state)
        close(optree.tree_leaves(params), twin.step(grads, step), rtol=1e-13, atol=1e-14)
        close((written, written_state), (params, state), rtol=1e-13, atol=1e-14)


@optimizers
def test_real_parameters_beside_complex_ones(optimizer):
    p, g = (fn.normal(fn.key(seed), (3,), dtype=torch.float64) for seed in range(2))
    params, grads = {"real": p, "complex": p + 1j * g}, {"real": g, "complex": g - 2j * p}
    found, _ = optimizer.step(params, grads, optimizer.init(params))
    for name, leaf in found.items():
        alone = optimizer.step(params[name], grads[name], optimizer.init(params[name]))[0]
        close(leaf, alone, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.ours.__name__)
def test_infinite_complex_gradients_are_torchs(row):
    """SGD multiplies complex numbers, 0 · ∞ among them; the others treat parts apart."""
    params, grads = {"w": torch.ones(2) + 0j}, {"w": torch.tensor([complex(math.inf, 1), 1j])}
    optimizer = row.ours(0.1)
    new, _ = optimizer.step(params, grads, optimizer.init(params))
    (expected,) = Twin(row, params, 0.1, {}).step(grads, 0)
    torch.testing.assert_close(new["w"], expected, equal_nan=True)


LAYOUTS = {
    "contiguous": lambda x: x.clone(),
    "transposed": lambda x: x.mT.contiguous().mT,
    "gaps": lambda x: torch.stack([x, x], -1)[..., 0],
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
}


@optimizers
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("other", LAYOUTS)
def test_memory_layouts_do_not_matter(optimizer, layout, other):
    p, g = (fn.normal(fn.key(seed), (2, 3, 4, 5), dtype=torch.float64) for seed in (0, 1))
    expected = optimizer.step({"v": p, "w": p}, {"v": g, "w": g}, optimizer.init({"v": p, "w": p}))
    laid_out, grads = {"v": p.clone(), "w": LAYOUTS[layout](p)}, {"v": g, "w": LAYOUTS[other](g)}
    for method in (optimizer.step, optimizer.step_):
        found = method(laid_out, grads, optimizer.init(laid_out))
        close(found, expected, rtol=1e-14, atol=1e-14)
        assert found[0]["w"].stride() == laid_out["w"].stride() or layout == "gaps"
    assert torch.equal(grads["w"], g)


@pytest.mark.parametrize("cls", [fn.Adam, fn.AdamW])
@pytest.mark.parametrize(
    "shape", [(7, 9), (8, 7, 3, 3), (4, 3, 2, 3, 3), (2, 4, 3, 5, 3), (24, 20, 3, 3)]
)
def test_adams_numbers_are_torchs_in_every_order_of_axes(cls, shape):
    """Bit for bit, by the kernel, as for contiguous leaves: in channels_last, and in others."""
    row = next(row for row in ROWS if row.ours is cls)
    for axis in range(len(shape)):
        w, g = (
            fn.normal(fn.key(i), shape).movedim(axis, -1).contiguous().movedim(-1, axis)
            for i in (0, 1)
        )
        params, optimizer = {"w": w}, cls(0.1)
        twin, state = Twin(row, params, 0.1, {}, fused=True), optimizer.init(params)
        for step in range(3):
            params, state = optimizer.step(params, {"w": g * (step + 1)}, state)
            assert params["w"].stride() == w.stride()
            assert same([params["w"]], twin.step({"w": g * (step + 1)}, step))


@pytest.mark.parametrize("method", ["step", "step_"])
def test_parameters_that_want_gradients_have_the_same_bits(method):
    """Autograd sees no step_, and no step under torch.no_grad."""
    params, optimizer = parameters(), fn.Adam(0.1)
    tracked = optree.tree_map(lambda p: p.clone().requires_grad_(), params)
    args = gradients(params, 0), optimizer.init(params)
    expected, _ = optimizer.step(params, *args)
    with torch.no_grad():
        found, _ = getattr(optimizer, method)(tracked, *args)
    assert same(found, expected)


class NoKernels(torch.Tensor):
    """A tensor that knows no kernel for a whole step."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        assert "fused" not in func.__name__
        return super().__torch_function__(func, types, args, kwargs)


@optimizers
def test_subclasses_of_tensor_are_asked_for_elementwise_operations_alone(optimizer):
    for which in range(3):
        args = [fn.normal(fn.key(seed), (3,)) for seed in range(2)]
        args = [*args, optimizer.init(args[0])]
        expected, _ = optimizer.step(*args)
        args[which] = optree.tree_map(lambda x: x.as_subclass(NoKernels), args[which])
        found, _ = optimizer.step(*args)
        close(found.as_subclass(torch.Tensor), expected)


@pytest.mark.parametrize("cls", [fn.Adam, fn.AdamW])
def test_without_torchs_kernel_adam_is_its_formula(cls, monkeypatch):
    params, optimizer = parameters(torch.float64), cls(0.1, weight_decay=0.1)
    args = params, gradients(params, 0), optimizer.init(params)
    expected = optimizer.step(*args)
    monkeypatch.setattr(fused, "fused_adam", None)
    close(optimizer.step(*args), expected, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@optimizers
def test_the_order_of_axes_in_memory_changes_no_bit(optimizer, dtype):
    """Of params, gradients and state: what a file holds, loaded without `like`, is row-major.

    The size fills the processor's registers: PyTorch rounds what is left over in another way.
    """
    shape, orders = (4, 8, 2, 3), [tuple(range(4)), (0, 2, 3, 1), (2, 0, 3, 1), (3, 1, 0, 2)]

    def laid_out(x, order):
        return x.permute(order).contiguous().permute([order.index(axis) for axis in range(4)])

    p, *gs = (fn.normal(fn.key(i), shape, dtype=dtype) for i in range(4))
    runs = []
    for ours, theirs in itertools.product(orders, orders):
        params = {"w": laid_out(p, ours)}
        state = optimizer.init({"w": p})
        for g in gs:
            params, state = optimizer.step(params, {"w": laid_out(g, theirs)}, state)
        runs.append((params, state))
    assert all(same(run, runs[0]) for run in runs)


@optimizers
def test_a_stride_along_an_axis_of_size_1_changes_no_bit(optimizer):
    p, g = (fn.normal(fn.key(i), (4, 8, 1, 3)) for i in range(2))
    p = p.contiguous(memory_format=torch.channels_last)
    odd = p.as_strided(p.shape, (24, 1, 77, 8))
    expected = optimizer.step(p, g, optimizer.init(p))
    assert same(optimizer.step(odd, g, optimizer.init(odd)), expected)


@optimizers
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_step_writes_to_nothing_and_step_underscore_into_params_and_state(optimizer, dtype):
    params = parameters(dtype)
    grads, state = gradients(params, 0), optimizer.init(params)
    _, state = optimizer.step(params, grads, state)
    kept = optree.tree_map(torch.clone, (params, grads, state))
    new_params, new_state = optimizer.step(params, grads, state)
    assert same((params, grads, state), kept)
    assert optree.tree_structure(new_params) == optree.tree_structure(params)
    old = {leaf.data_ptr() for leaf in optree.tree_leaves((params, grads, state))}
    assert old.isdisjoint(leaf.data_ptr() for leaf in optree.tree_leaves((new_params, new_state)))
    places = [leaf.data_ptr() for leaf in optree.tree_leaves((params, state[1:]))]
    returned, after = optimizer.step_(params, grads, state)
    assert returned is params
    assert same(params, new_params)
    assert same(grads, kept[1])
    assert [leaf.data_ptr() for leaf in optree.tree_leaves((returned, after[1:]))] == places


@optimizers
def test_steps_are_differentiable(optimizer):
    """By params, gradients and state, after two steps."""
    p, g, h = (fn.normal(fn.key(seed), (3,), dtype=torch.float64) for seed in range(3))

    def steps(p, g, h):
        state = optimizer.init(p)
        p, state = optimizer.step(p, g, state)
        return optimizer.step(p, h, state)[0]

    inputs = [x.requires_grad_() for x in (p, g, h)]
    assert torch.autograd.gradcheck(steps, inputs)
    with torch.no_grad():
        close(steps(p, g, h), torch.func.vmap(steps)(*(x[None] for x in (p, g, h)))[0])


@optimizers
def test_steps_are_differentiable_by_the_rate(optimizer):
    """A schedule may return a tensor that has a gradient."""
    p, g = (fn.normal(fn.key(seed), (3,), dtype=torch.float64) for seed in range(2))

    def step(lr):
        by_rate = dataclasses.replace(optimizer, lr=lambda step: lr)
        return by_rate.step(p, g, by_rate.init(p))[0]

    rate = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(step, rate)
    close(step(rate), optimizer.step(p, g, optimizer.init(p))[0])


@optimizers
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_step_of_many_states_is_the_step_of_each(optimizer, dtype):
    params = torch.stack([fn.normal(fn.key(seed), (4,), dtype=dtype) for seed in range(3)])
    grads = params.flip(0) + 0.5
    optimizer = dataclasses.replace(optimizer, lr=schedule)
    states = []
    for i in range(3):
        state = optimizer.init(params[i])
        for step in range(i):
            _, state = optimizer.step(params[i], gradients(params[i], step), state)
        states.append(state)
    stacked = optree.tree_map(lambda *leaves: torch.stack(leaves), *states)
    found = torch.func.vmap(optimizer.step)(params, grads, stacked)
    each = [optimizer.step(*args) for args in zip(params, grads, states, strict=True)]
    rounding = {"rtol": 0.0, "atol": 0.02} if dtype == torch.bfloat16 else {}
    close(found, optree.tree_map(lambda *leaves: torch.stack(leaves), *each), **rounding)
    torch.func.vmap(lambda *args: optimizer.step_(*args)[1])(params, grads, stacked)
    close(params, found[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("optimizer", [OPTIMIZERS[2], OPTIMIZERS[5]], ids=repr)
def test_compiled(optimizer):
    params = {"w": fn.normal(fn.key(0), (2, 3))}
    grads = gradients(params, 0)
    _, state = optimizer.step(params, grads, optimizer.init(params))
    expected = optimizer.step(params, grads, state)
    close(compile_whole(optimizer.step)(params, grads, state), expected)
    found, after = compile_whole(optimizer.step_)(params, grads, state)
    close((params, state[1:]), (expected[0], expected[1][1:]))
    close((found, after), expected)


def test_a_compiled_schedule_is_given_a_tensor():
    """What it decides by an int would hold for one step alone."""
    sgd = fn.SGD(lambda step: 0.5 if isinstance(step, torch.Tensor) else math.nan)
    params = {"w": torch.ones(2)}
    new, _ = compile_whole(sgd.step)(params, params, sgd.init(params))
    assert new["w"].tolist() == [0.5, 0.5]


@optimizers
def test_a_resumed_run_has_the_same_bits(optimizer, tmp_path):
    params = parameters()
    state = optimizer.init(params)
    for step in range(6):
        if step == 3:
            saved = optree.tree_map(torch.clone, (params, state))
            fn.save(tmp_path / "run", {"run": saved, "optimizer": optimizer})
        params, state = optimizer.step_(params, gradients(params, step), state)
    loaded = fn.load(tmp_path / "run")
    (again, again_state), again_optimizer = loaded["run"], loaded["optimizer"]
    assert type(again_state) is type(state)
    assert again_optimizer == optimizer
    for step in range(3, 6):
        again, again_state = again_optimizer.step_(again, gradients(params, step), again_state)
    assert same((again, again_state), (params, state))


@optimizers
@pytest.mark.parametrize("method", ["step", "step_"])
def test_bad_trees_change_nothing(optimizer, method):
    params = {"a": torch.ones(2), "b": torch.ones(3)}
    state = optimizer.init(params)
    kept = optree.tree_map(torch.clone, (params, state))
    step = getattr(optimizer, method)
    with pytest.raises(ValueError, match=r"grads\['b'\] like params, \(3,\) torch.float32"):
        step(params, {"a": torch.ones(2), "b": torch.ones(4)}, state)
    with pytest.raises(ValueError, match=r"grads\['b'\] like params, .* on cpu, got .* on meta"):
        step(params, {"a": torch.ones(2), "b": torch.ones(3, device="meta")}, state)
    with pytest.raises(TypeError, match=f"expected an {type(state).__name__}, as init makes it"):
        step(params, params, tuple(state))
    for i, tree in enumerate(state[1:], 1):
        if tree:
            bad = [*state[:i], {**tree, "b": torch.ones(3).double()}, *state[i + 1 :]]
            with pytest.raises(ValueError, match=r"\['b'\] like params, .*got .*float64"):
                step(params, params, type(state)(*bad))
            for other in ((), {"a": tree["a"]}):
                bad[i] = other
                with pytest.raises(ValueError, match=r" with the structure of params"):
                    step(params, params, type(state)(*bad))
    for count, got in ((None, "NoneType"), (torch.zeros(2).long(), r"shape \(2,\)")):
        with pytest.raises(
            TypeError, match=f"expected state.step to be a scalar tensor, got {got}"
        ):
            step(params, params, state._replace(step=count))
    sparse = {"a": torch.ones(2), "b": torch.ones(3).to_sparse()}
    with pytest.raises(TypeError, match=r"a dense tensor at grads\['b'\], got torch.sparse_coo"):
        step(params, sparse, state)
    with pytest.raises(TypeError, match=r"dense tensors, got torch.sparse_coo at params\['b'\]"):
        step(sparse, params, state)
    assert same((params, state), kept)


@pytest.mark.parametrize("cls", [fn.SGD, fn.Adam, fn.AdamW, fn.RMSprop])
def test_numbers_of_numpy_are_kept_as_pythons(cls, tmp_path):
    optimizer = cls(np.float32(0.5), weight_decay=np.float64(0.25))
    assert repr(optimizer) == repr(cls(0.5, weight_decay=0.25))
    fn.save(tmp_path / "optimizer", optimizer)
    assert fn.load(tmp_path / "optimizer") == optimizer


def test_zeros_have_no_direction():
    """A gradient of 0 moves nothing, by the kernel and by the formula: eps keeps 0 / 0 away."""
    for dtype in (torch.float32, torch.bfloat16):
        params = {"w": torch.ones(3, dtype=dtype), "nothing": torch.ones(0, 2, dtype=dtype)}
        for optimizer in (fn.Adam(), fn.RMSprop(centered=True, momentum=0.9)):
            grads = optree.tree_map(torch.zeros_like, params)
            new, _ = optimizer.step(params, grads, optimizer.init(params))
            assert same(new, params)


@pytest.mark.parametrize("optimizer", [fn.Adam(0.1), fn.AdamW(0.1), fn.RMSprop(0.1)], ids=repr)
def test_a_quadratic_is_minimised(optimizer):
    p = {"w": torch.tensor([1.0, -2.0, 3.0])}
    state = optimizer.init(p)
    for _ in range(300):
        p, state = optimizer.step_(p, {"w": p["w"] * torch.tensor([1.0, 10.0, 100.0])}, state)
    assert p["w"].abs().max() < 0.1


@given(strategies.trees(), st.floats(0, 1))
def test_any_tree_will_do(tree, momentum):
    sgd = fn.SGD(0.5, momentum=momentum)
    grads = optree.tree_map(torch.ones_like, tree)
    new, state = sgd.step(tree, grads, sgd.init(tree))
    assert same(new, optree.tree_map(lambda leaf: leaf - 0.5, tree))
    assert int(state.step) == 1


@optimizers
@pytest.mark.parametrize("method", ["step", "step_"])
def test_without_parameters_a_step_counts(optimizer, method):
    params = ((), {})
    new, state = getattr(optimizer, method)(params, params, optimizer.init(params))
    assert new == params
    assert int(state.step) == 1


def test_schedules_count_from_zero():
    seen = []
    sgd = fn.SGD(lambda step: seen.append(step) or 0.1)
    params = {"w": torch.ones(2)}
    state = sgd.init(params)
    for _ in range(3):
        params, state = sgd.step(params, params, state)
    assert seen == [0, 1, 2]


def test_what_is_not_needed_is_not_kept():
    params = {"w": torch.ones(2)}
    assert fn.SGD(0.1).init(params).momentum == ()
    assert fn.Adam().init(params).largest == ()
    assert fn.RMSprop().init(params)[2:] == ((), ())


@optimizers
def test_the_count_is_an_int_on_the_cpu_whatever_the_default_device(optimizer):
    with torch.device("meta"):
        count = optimizer.init({"w": torch.ones(2, device="cpu")}).step
    assert (count.dtype, count.device.type, int(count)) == (torch.int64, "cpu", 0)


@optimizers
def test_the_count_may_be_an_int(optimizer):
    params = parameters()
    grads, state = gradients(params, 0), optimizer.init(params)
    expected = optimizer.step(params, grads, state)[0]
    found, after = optimizer.step(params, grads, state._replace(step=0))
    assert same(found, expected)
    assert after.step == 1
    found, after = compile_whole(optimizer.step)(params, grads, state._replace(step=0))
    close(found, expected)
    assert after.step == 1


@optimizers
def test_the_default_device_changes_no_step(optimizer):
    params = parameters()
    args = params, gradients(params, 0), optimizer.init(params)
    expected = optimizer.step(*args)
    with torch.device("meta"):
        found = optimizer.step(*args)
    assert same(found, expected)


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


@optimizers
def test_they_are_values(optimizer):
    again = eval(repr(optimizer), vars(fn))
    for other in (again, pickle.loads(pickle.dumps(optimizer)), dataclasses.replace(optimizer)):
        assert other == optimizer
        assert hash(other) == hash(optimizer)
    assert dataclasses.replace(optimizer, lr=0.2) != optimizer
    assert fn.Adam(weight_decay=1e-2) != fn.AdamW()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fn.Adam(-1.0), ValueError, "Adam: expected lr to be finite and >= 0, got -1.0"),
        (
            lambda: fn.AdamW(lr=None),
            TypeError,
            "AdamW: expected lr to be a number or a function of the step count, got None",
        ),
        (
            lambda: fn.Adam(betas=(0.9, 1.0)),
            ValueError,
            "Adam: expected every number in betas < 1, got 1.0",
        ),
        (
            lambda: fn.Adam(betas=(math.nan, 0.9)),
            ValueError,
            "Adam: expected every number in betas to be finite and >= 0, got nan",
        ),
        (
            lambda: fn.AdamW(betas=0.9),
            ValueError,
            "AdamW: expected betas to be a pair of numbers, got 0.9",
        ),
        (lambda: fn.Adam(betas=("a", 0)), TypeError, "every number in betas to be a number"),
        (lambda: fn.Adam(eps=-1e-8), ValueError, "Adam: expected eps to be finite and >= 0"),
        (lambda: fn.Adam(amsgrad=1), TypeError, "Adam: expected amsgrad to be True or False"),
        (lambda: fn.RMSprop(alpha=1.5), ValueError, "RMSprop: expected alpha in [0, 1], got 1.5"),
        (lambda: fn.RMSprop(momentum=math.inf), ValueError, "RMSprop: expected momentum to be fin"),
        (lambda: fn.RMSprop(centered=None), TypeError, "RMSprop: expected centered to be True or"),
    ],
)
def test_bad_hyperparameters(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


def test_betas_are_kept_as_a_tuple():
    assert fn.Adam(betas=[0.8, 0.9]) == fn.Adam(betas=(0.8, 0.9))


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
    with pytest.raises(
        TypeError,
        match=r"SGD: expected lr to be a number or a function of the step count, got '0.1'",
    ):
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
    for plain, other in ((fn.SGD(0.1), sgd), (fn.Adam(), fn.Adam(amsgrad=True))):
        with pytest.raises(ValueError, match=r"expected no (velocities|largest second .*), \(\), "):
            getattr(plain, method)(params, params, other.init(params))
    assert all((leaf == 1).all() for leaf in params.values())
    assert all((leaf == 0).all() for leaf in state.momentum.values())


@pytest.mark.parametrize("method", ["step", "step_"])
def test_leaves_are_matched_by_key_in_dicts_of_any_kind(method):
    sgd, params = fn.SGD(1.0), {"a": torch.zeros(2), "b": torch.zeros(2)}
    grads = OrderedDict(b=torch.full((2,), 2.0), a=torch.ones(2))
    params, _ = getattr(sgd, method)(params, grads, sgd.init(params))
    assert type(params) is dict
    assert same(params, {"a": torch.full((2,), -1.0), "b": torch.full((2,), -2.0)})


@pytest.mark.parametrize("size", [2, 3])
def test_what_is_expanded_cannot_be_written_into(size):
    params = {"w": torch.ones(1).expand(size)}
    sgd = fn.SGD(0.1)
    with pytest.raises(ValueError, match="tensors that can be written to, got an expanded one"):
        sgd.step_(params, {"w": torch.ones(size)}, sgd.init(params))


@pytest.mark.parametrize("optimizer", [fn.SGD(0.5), fn.Adam(0.5)])
def test_a_tensor_in_two_places_is_not_written_to_twice(optimizer):
    w = torch.ones(2)
    params = {"a": w, "b": [w], "0": torch.ones(3)}
    grads = {"a": torch.ones(2), "b": [torch.ones(2)], "0": torch.ones(3)}
    with pytest.raises(ValueError, match=r"every tensor once, got one of shape \(2,\) in two pl"):
        optimizer.step_(params, grads, optimizer.init(params))
    assert torch.equal(w, torch.ones(2))
    new, _ = optimizer.step(params, grads, optimizer.init(params))
    assert torch.equal(new["a"], new["b"][0])


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
