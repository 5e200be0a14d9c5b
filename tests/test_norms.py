"""Norms of trees, clipping and averages: the numbers of torch, and its mistakes left out."""

import math

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_properties import close, same
from torch._subclasses import FakeTensorMode

import funcnet as fn
from funcnet.testing import strategies

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@given(strategies.trees())
def test_the_norm_of_a_tree_is_that_of_its_numbers(tree):
    numbers = [leaf.double().flatten() for leaf in optree.tree_leaves(tree)]
    expected = torch.cat([torch.zeros(1, dtype=torch.float64), *numbers]).norm()
    norm = fn.global_norm(tree)
    assert norm.ndim == 0
    close(norm.double(), expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_half_precision_does_not_overflow(dtype):
    grads = {"a": torch.full((1000,), 2e4, dtype=dtype), "b": (torch.tensor(3.0, dtype=dtype),)}
    norm = fn.global_norm(grads)
    assert norm.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert norm.item() == pytest.approx(2e4 * math.sqrt(1000), rel=2e-3)
    clipped, before = fn.clip_by_global_norm(grads, 10.0)
    assert torch.equal(before, norm)
    assert {leaf.dtype for leaf in optree.tree_leaves(clipped)} == {dtype}
    assert fn.global_norm(clipped).item() == pytest.approx(10, rel=1e-2)


def test_mixed_dtypes_and_complex_numbers():
    tree = [torch.full((), 2.0, dtype=torch.float64), torch.tensor([2 + 1j]).conj()]
    assert fn.global_norm(tree).dtype == torch.float64
    clipped, norm = fn.clip_by_global_norm(tree, 1.0)
    assert norm.item() == 3
    close(clipped, [tree[0] / 3, tree[1] / 3])


@given(strategies.trees(), st.sampled_from([0.0, 0.1, 1.0, 1e3, math.inf]))
def test_clipping(tree, max_norm):
    kept = optree.tree_map(torch.clone, tree)
    clipped, norm = fn.clip_by_global_norm(tree, max_norm)
    assert same(tree, kept)
    old = {leaf.data_ptr() for leaf in optree.tree_leaves(tree) if leaf.numel()}
    assert old.isdisjoint(leaf.data_ptr() for leaf in optree.tree_leaves(clipped))
    if norm <= max_norm:
        assert same(clipped, tree)
    else:
        close(fn.global_norm(clipped).item(), min(float(norm), max_norm), rtol=1e-2, atol=1e-6)


def test_torch_clips_alike():
    params = [torch.nn.Parameter(fn.normal(fn.key(i), (30, 40))) for i in range(3)]
    for max_norm in (1.0, 1e3):
        for p in params:
            p.grad = p.detach().clone()
        clipped, norm = fn.clip_by_global_norm([p.grad for p in params], max_norm)
        assert torch.equal(torch.nn.utils.clip_grad_norm_(params, max_norm), norm)
        close(clipped, [p.grad for p in params], rtol=1e-6, atol=0)


def test_norms_that_are_not_positive_numbers():
    zeros = {"w": torch.zeros(2)}
    for max_norm in (0.0, 1.0):
        clipped, norm = fn.clip_by_global_norm(zeros, max_norm)
        assert same(clipped, zeros)
        assert norm == 0
    clipped, norm = fn.clip_by_global_norm([torch.tensor([1.0, math.nan]), torch.ones(1)], 1.0)
    assert norm.isnan()
    assert all(leaf.isnan().all() for leaf in clipped)
    clipped, norm = fn.clip_by_global_norm([torch.tensor([1.0, math.inf]), torch.ones(1)], 1.0)
    assert norm == math.inf
    assert str(clipped) == "[tensor([0., nan]), tensor([0.])]"
    assert fn.global_norm(()) == 0


def test_a_tree_without_numbers_has_a_norm_whatever_the_defaults():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            norm = fn.global_norm(())
    finally:
        torch.set_default_dtype(before)
    assert (norm.dtype, norm.device.type, norm.item()) == (torch.float32, "cpu", 0)


def test_a_tree_on_two_devices():
    with FakeTensorMode():
        grads = [torch.ones(2, device="cuda"), torch.ones(3)]
        for tree in (grads, grads[::-1]):
            clipped, norm = fn.clip_by_global_norm(tree, 1.0)
            assert [leaf.device for leaf in clipped] == [leaf.device for leaf in tree]
            assert norm.device == tree[0].device


def test_clipping_is_differentiable():
    g = torch.tensor([3.0, 4.0], dtype=torch.float64, requires_grad=True)
    for max_norm in (1.0, 10.0):
        clip = lambda g, m=max_norm: fn.clip_by_global_norm({"g": g}, m)[0]["g"]  # noqa: E731
        assert torch.autograd.gradcheck(clip, g)
    zeros = torch.zeros(2, requires_grad=True)
    fn.clip_by_global_norm(zeros, 1.0)[0].sum().backward()
    assert zeros.grad.tolist() == [1, 1]


def test_per_example_clipping():
    """Under torch.func.vmap, each example by its own norm."""
    grads = {"a": fn.normal(fn.key(0), (5, 3)), "b": fn.normal(fn.key(1), (5,)).bfloat16()}
    clipped, norms = torch.func.vmap(lambda grads: fn.clip_by_global_norm(grads, 1.0))(grads)
    for i in range(5):
        own = {name: leaf[i] for name, leaf in grads.items()}
        expected = fn.clip_by_global_norm(own, 1.0)
        close(({name: leaf[i] for name, leaf in clipped.items()}, norms[i]), expected)


@given(strategies.trees(), st.floats(0, 1))
def test_averages(tree, decay):
    params = optree.tree_map(lambda leaf: leaf + 1, tree)
    kept = optree.tree_map(torch.clone, (tree, params))
    found = fn.average(tree, params, decay)
    assert same((tree, params), kept)
    expected = optree.tree_map(lambda a, p: a + (1 - decay) * (p - a), tree, params)
    close(found, expected, rtol=1e-2, atol=1e-2)
    assert optree.tree_structure(found) == optree.tree_structure(tree)


def test_averages_at_the_ends_and_of_another_dtype():
    average, params = {"w": fn.normal(fn.key(0), (9,))}, {"w": fn.normal(fn.key(1), (9,))}
    assert same(fn.average(average, params, 0.0), params)
    assert same(fn.average(average, params, 1), average)
    found = fn.average({"w": torch.ones(2)}, {"w": torch.zeros(2).bfloat16()}, 0.999)
    assert found["w"].dtype == torch.float32
    close(found["w"], torch.full((2,), 0.999))
    close(torch.func.vmap(lambda a: fn.average(a, a, 0.5))(average), average)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: fn.global_norm({"a": [torch.ones(2).long()]}),
            TypeError,
            r"^global_norm: expected floating-point tensors, got torch.int64 at tree\['a'\]\[0\]$",
        ),
        (
            lambda: fn.clip_by_global_norm({"a": 1.0}, 1.0),
            TypeError,
            r"^clip_by_global_norm: expected floating-point tensors, got float at grads\['a'\]$",
        ),
        (lambda: fn.clip_by_global_norm((), -1.0), ValueError, "expected max_norm >= 0, got -1.0"),
        (lambda: fn.clip_by_global_norm((), math.nan), ValueError, "max_norm >= 0, got nan"),
        (lambda: fn.clip_by_global_norm((), True), TypeError, "max_norm to be a number, got True"),
        (lambda: fn.clip_by_global_norm((), "1"), TypeError, "max_norm to be a number, got '1'"),
        (
            lambda: fn.average((), (), 1.5),
            ValueError,
            r"average: expected decay in \[0, 1\], got 1.5",
        ),
        (lambda: fn.average((), (), math.nan), ValueError, r"decay in \[0, 1\], got nan"),
        (
            lambda: fn.average([torch.ones(2)], (torch.ones(2),), 0.5),
            ValueError,
            "average: expected average with the structure of params",
        ),
        (
            lambda: fn.average([torch.ones(2)], [torch.ones(3)], 0.5),
            ValueError,
            r"average: expected average\[0\] like params, \(3,\)",
        ),
        (
            lambda: fn.average([torch.ones(2, device="meta")], [torch.ones(2)], 0.5),
            ValueError,
            r"average: expected average\[0\] like params, .* on cpu, got .* on meta",
        ),
        (
            lambda: fn.average([torch.ones(2) + 1j], [torch.ones(2)], 0.5),
            ValueError,
            r"average: expected average\[0\] like params, .*float32 on cpu, got .*complex64",
        ),
        (
            lambda: fn.average([torch.ones(2).long()], [torch.ones(2)], 0.5),
            TypeError,
            r"^average: expected floating-point tensors, got torch.int64 at average\[0\]",
        ),
        (
            lambda: fn.average([torch.ones(2)], [torch.ones(2).long()], 0.5),
            TypeError,
            r"^average: expected floating-point tensors, got torch.int64 at params\[0\]",
        ),
    ],
)
def test_bad_input_is_refused(call, error, message):
    with pytest.raises(error, match=message):
        call()
