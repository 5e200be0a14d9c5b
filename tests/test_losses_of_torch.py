"""Every loss against torch.nn in float64: values, gradients, the awkward corners, transforms."""

import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_transforms import compile_whole
from torch.nn import functional as F

import funcnet as fn

REDUCTIONS = ["mean", "sum"]
PAIRED = {
    "mse": (fn.MSE, F.mse_loss, {}),
    "l1": (fn.L1, F.l1_loss, {}),
    "huber": (fn.Huber, F.huber_loss, {"delta": 0.7}),
    "bce": (fn.BCEWithLogits, F.binary_cross_entropy_with_logits, {}),
}


def numbers(shape, seed, scale=1.0):
    return scale * fn.normal(fn.key(seed), shape, dtype=torch.float64)


def agree(loss, theirs, x, target, **tolerances):
    """Value and gradient are those of torch's function."""
    leaf = x.clone().requires_grad_()
    value = theirs(leaf, target)
    (dx,) = torch.autograd.grad(value, leaf, torch.full_like(value, 1.5))
    torch.testing.assert_close(loss.apply(x, target), value.detach(), equal_nan=True, **tolerances)
    torch.testing.assert_close(loss.vjp(x, target, 1.5), dx, equal_nan=True, **tolerances)
    grad = torch.tensor(1.5, dtype=x.dtype)
    torch.testing.assert_close(loss.vjp(x, target, grad), dx, equal_nan=True, **tolerances)


@pytest.mark.parametrize("name", PAIRED)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@given(st.lists(st.integers(0, 4), max_size=3), st.sampled_from([1.0, 1e-3, 1e4]))
def test_losses_of_two_alike(name, reduction, shape, scale):
    cls, theirs, options = PAIRED[name]
    x, target = numbers(shape, 0, scale), numbers(shape, 1, scale)
    if name == "bce":
        target = target.sigmoid()
    if not x.numel() and reduction == "mean":
        assert torch.isnan(cls(**options).apply(x, target))
        return
    agree(
        cls(**options, reduction=reduction),
        lambda x, t: theirs(x, t, reduction=reduction, **options),
        x,
        target,
    )


@pytest.mark.parametrize("name", PAIRED)
def test_at_ties_and_kinks(name):
    cls, theirs, options = PAIRED[name]
    x = torch.tensor([0.0, 0.7, -0.7, 1.0, 1e4, -1e4], dtype=torch.float64)
    target = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    agree(cls(**options), lambda x, t: theirs(x, t, **options), x, target)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
@given(
    st.lists(st.integers(1, 3), max_size=2), st.integers(1, 4), st.sampled_from([1.0, 1e4, 1e-3])
)
def test_cross_entropy(reduction, smoothing, kind, places, classes, scale):
    ignored = {"ignore_index": 2} if kind == "classes" else {}
    loss = fn.CrossEntropy(smoothing, **ignored, reduction=reduction)
    x = numbers((3, classes, *places), 0, scale)
    generator = torch.Generator().manual_seed(0)
    if kind == "classes":
        target = torch.randint(classes, (3, *places), generator=generator)
    else:
        target = numbers(x.shape, 1).softmax(1)
    options = {"label_smoothing": smoothing, "reduction": reduction, **ignored}
    agree(loss, lambda x, t: F.cross_entropy(x, t, **options), x, target)


def test_cross_entropy_where_all_is_ignored():
    x, target = numbers((2, 3), 0), torch.tensor([-100, -100])
    assert torch.isnan(fn.CrossEntropy().apply(x, target))
    agree(
        fn.CrossEntropy(reduction="sum"),
        lambda x, t: F.cross_entropy(x, t, reduction="sum"),
        x,
        target,
    )


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (torch.tensor([0, 3]), ValueError, "expected classes in [0, 3), got 3"),
        (torch.tensor([0, -1]), ValueError, "expected classes in [0, 3), got -1"),
        (torch.tensor([0]), ValueError, "expected target of classes of shape (2,), got (1,)"),
        (torch.zeros(2, 2), ValueError, "expected target of shape (2, 3), x's shape, got (2, 2)"),
        (torch.tensor([0, 1], dtype=torch.int32), TypeError, "to be int64 classes or probab"),
        ([0, 1], TypeError, "expected target to be int64 classes or probabilities, got list"),
    ],
)
def test_targets_that_are_refused(target, error, message):
    with pytest.raises(error, match=re.escape(message)):
        fn.CrossEntropy().apply(torch.zeros(2, 3), target)


def test_hyperparameters():
    for wrong in (0.0, -1.0):
        with pytest.raises(ValueError, match="Huber: expected delta"):
            fn.Huber(wrong)
    with pytest.raises(ValueError, match="CrossEntropy: expected label_smoothing <= 1, got 2"):
        fn.CrossEntropy(2.0)
    assert repr(fn.CrossEntropy(0.1, reduction="sum")) == (
        "CrossEntropy(label_smoothing=0.1, reduction='sum')"
    )


LOSSES = [fn.MSE(), fn.L1(), fn.Huber(), fn.BCEWithLogits(), fn.CrossEntropy(0.1)]


def targets(loss, x):
    if isinstance(loss, fn.CrossEntropy):
        return torch.arange(len(x)) % x.shape[1]
    return numbers(x.shape, 5).sigmoid().to(x.dtype)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_transforms(loss):
    x = numbers((4, 3), 0)
    target = targets(loss, x)
    torch.testing.assert_close(compile_whole(loss.vjp)(x, target), loss.vjp(x, target))
    xs, ts = torch.stack([x, 2 * x]), torch.stack([target, target])
    mapped = torch.func.vmap(loss.vjp)(xs, ts)
    torch.testing.assert_close(mapped, torch.stack([loss.vjp(x, target), loss.vjp(2 * x, target)]))
    torch.testing.assert_close(torch.func.grad(loss.apply)(x, target), loss.vjp(x, target))


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes(loss, dtype):
    x = numbers((8, 5), 0).to(dtype)
    target = targets(loss, x)
    value, dx = loss.apply(x, target), loss.vjp(x, target)
    assert (value.dtype, dx.dtype) == (dtype, dtype)
    wide = target if target.dtype == torch.int64 else target.double()
    tolerance = {"rtol": 0.05, "atol": 0.01} if dtype == torch.bfloat16 else {}
    torch.testing.assert_close(
        value.double(), loss.apply(x.double(), wide), **(tolerance or {"rtol": 1e-5, "atol": 1e-6})
    )
    torch.testing.assert_close(
        dx.double(), loss.vjp(x.double(), wide), **(tolerance or {"rtol": 1e-4, "atol": 1e-6})
    )


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_nothing_is_written_to_and_nothing_shared(loss):
    x = numbers((4, 3), 0)
    target = targets(loss, x)
    kept = x.clone(), target.clone()
    dx = loss.vjp(x, target)
    assert torch.equal(x, kept[0])
    assert torch.equal(target, kept[1])
    assert dx.untyped_storage().data_ptr() not in (
        x.untyped_storage().data_ptr(),
        target.untyped_storage().data_ptr(),
    )
