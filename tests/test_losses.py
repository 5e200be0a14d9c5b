"""Every loss, driven by the registry, its awkward corners, and losses of one's own."""

import copy
import inspect
import pickle
import re
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from registry import budget
from test_properties import restrided
from test_transforms import compile_whole
from torch._subclasses import FakeTensorMode

import funcnet as fn
from funcnet.testing import GradientMismatch, check_vjp, strategies
from funcnet.testing.registry import LOSSES, draw_target

classes = pytest.mark.parametrize("cls", LOSSES, ids=lambda cls: cls.__name__)
FLOAT64 = st.just(torch.float64)


def close(a, b, **tolerances):
    torch.testing.assert_close(a, b, equal_nan=True, **tolerances)


def cases_of(cls, **kwargs):
    return strategies.loss_cases(strategies.losses(cls), **kwargs)


def numbers(shape, seed=0, dtype=torch.float64):
    return fn.normal(fn.key(seed), shape, dtype=dtype)


EXAMPLES = [
    (row.loss(**settings), kind)
    for row in LOSSES.values()
    for settings in (
        {},
        {"reduction": "sum"},
        *([{"label_smoothing": 0.1}] if row.loss is fn.CrossEntropy else []),
    )
    for kind in row.targets(row.loss())
]
examples = pytest.mark.parametrize(
    ("loss", "kind"), EXAMPLES, ids=[f"{loss}-{kind}" for loss, kind in EXAMPLES]
)


def example(loss, kind, shape=(5, 4), dtype=torch.float64, device="cpu"):
    x = numbers(shape, 1, dtype).to(device)
    return x, draw_target(kind, loss, x, seed=2)


def test_every_loss_has_a_row():
    public = {getattr(fn, name) for name in fn.__all__}
    found = {cls for cls in public if inspect.isclass(cls) and issubclass(cls, fn.Loss)}
    assert found - {fn.Loss} == set(LOSSES)


# --- Numbers


@classes
@budget(15)
@given(st.data())
def test_gradient(cls, data):
    check_vjp(*data.draw(cases_of(cls)))


def assert_is_torchs(loss, theirs, x, target):
    """Value and gradients are those of torch's function of x and target."""
    leaf = x.clone(memory_format=torch.contiguous_format).requires_grad_()
    value = theirs(leaf, target)
    close(loss.apply(x, target), value.detach())
    close(loss.bwd(loss.fwd(x, target)[1]), loss.vjp(x, target))
    for grad in (1.0, -2.5):
        (dx,) = torch.autograd.grad(value, leaf, torch.full_like(value, grad), retain_graph=True)
        close(loss.vjp(x, target, grad), dx)
        close(loss.vjp(x, target, torch.full_like(value, grad)), dx)


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@classes
@given(st.data(), st.sampled_from([1.0, 1e-3, 1e4]))
def test_value_and_gradient_are_torchs(cls, data, scale):
    loss, x, target = data.draw(cases_of(cls, dtypes=FLOAT64))
    assert_is_torchs(loss, LOSSES[cls].twin(loss), x * scale, target)


@examples
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_no_less_exact_than_torch(loss, kind, dtype):
    x, target = example(loss, kind, (40, 30), dtype)
    exact = x.double(), target.double() if target.is_floating_point() else target
    value, dx = loss.apply(*exact), loss.vjp(*exact)
    leaf = x.clone().requires_grad_()
    theirs = LOSSES[type(loss)].twin(loss)(leaf, target)
    (their_dx,) = torch.autograd.grad(theirs, leaf)
    ours = loss.apply(x, target), loss.vjp(x, target)
    for mine, other, right in zip(ours, (theirs.detach(), their_dx), (value, dx), strict=True):
        assert mine.dtype == dtype
        slack = torch.finfo(dtype).eps * float(right.abs().max())
        error, their_error = (float((x.double() - right).abs().max()) for x in (mine, other))
        assert error <= max(1.1 * their_error, slack)


@classes
@budget(10)
@given(st.data())
def test_vjp_is_linear_in_grad(cls, data):
    loss, x, target = data.draw(cases_of(cls, dtypes=FLOAT64))
    close(loss.vjp(x, target, 3.0) - 4 * loss.vjp(x, target), loss.vjp(x, target, -1.0))


# --- Purity, layouts, batches, transforms


@classes
@budget(10)
@given(st.data())
def test_the_same_answer_twice_in_memory_of_its_own(cls, data):
    loss, x, target = data.draw(cases_of(cls))
    kept = copy.deepcopy((x, target))
    value, residuals = loss.fwd(x, target)
    dx = loss.bwd(residuals, 3.0)
    assert torch.equal(dx.nan_to_num(), loss.bwd(residuals, 3.0).nan_to_num())
    assert torch.equal(dx.nan_to_num(), loss.vjp(x, target, 3.0).nan_to_num())
    close(value, loss.apply(x, target), rtol=0, atol=0)
    assert value.shape == ()
    for before, after in zip(kept, (x, target), strict=True):
        assert torch.equal(before, after)
        assert (
            not dx.numel() or dx.untyped_storage().data_ptr() != after.untyped_storage().data_ptr()
        )


@classes
@budget(10)
@given(st.data())
def test_strides_do_not_matter(cls, data):
    loss, x, target = data.draw(cases_of(cls, layouts=["contiguous"]))
    there = data.draw(restrided(x)), data.draw(restrided(target))
    close(loss.apply(*there), loss.apply(x, target))
    close(loss.vjp(*there), loss.vjp(x, target))


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
@examples
@pytest.mark.parametrize("shape", [(0, 3), (0, 3, 2), (0, 3, 2, 2), (0, 3, 1, 2, 2)])
def test_a_batch_of_nothing(loss, kind, shape):
    x, target = example(loss, kind, shape)
    close(loss.apply(x, target), LOSSES[type(loss)].twin(loss)(x, target))
    assert loss.vjp(x, target).shape == shape


@examples
@pytest.mark.parametrize("shape", [(5, 4), (3, 4, 2), (2, 3, 2, 2), (2, 3, 1, 2, 2)])
def test_maps(loss, kind, shape):
    x, target = example(loss, kind, shape)
    xs, grads = torch.stack([x, 2 * x, -x]), numbers((3,), 5)
    targets = torch.stack([target, target.flip(0), target])

    def one(x, target, grad):
        return loss.apply(x, target), loss.vjp(x, target, grad)

    for dims in [(0, 0, 0), (0, None, None), (None, 0, None), (None, None, 0)]:
        given_ones = [
            many if dim == 0 else many[0]
            for many, dim in zip((xs, targets, grads), dims, strict=True)
        ]
        mapped = torch.func.vmap(one, in_dims=dims)(*given_ones)
        each = [
            one(*(a[i] if dim == 0 else a for a, dim in zip(given_ones, dims, strict=True)))
            for i in range(3)
        ]
        close(mapped, tuple(map(torch.stack, zip(*each, strict=True))))


@examples
def test_autograd_follows_apply(loss, kind):
    x, target = example(loss, kind)
    close(torch.func.grad(loss.apply)(x, target), loss.vjp(x, target))
    leaf = x.clone().requires_grad_()
    (dx,) = torch.autograd.grad(loss.apply(leaf, target), leaf)
    close(dx, loss.vjp(x, target))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@examples
def test_compiled(loss, kind):
    x, target = example(loss, kind)
    close(compile_whole(loss.apply)(x, target), loss.apply(x, target))
    close(compile_whole(loss.vjp)(x, target), loss.vjp(x, target))


@examples
def test_values_are_not_read_where_there_are_none(loss, kind):
    for device in ("cpu", "cuda"):
        with FakeTensorMode(allow_non_fake_inputs=True):
            x, target = example(loss, kind)
            x, target = (torch.empty_like(tensor, device=device) for tensor in (x, target))
            assert loss.vjp(x, target).shape == x.shape
    x, target = example(loss, kind, device="meta")
    assert loss.vjp(x, target).shape == x.shape


@examples
def test_no_more_is_kept_than_by_autograd(loss, kind):
    x, target = example(loss, kind, (50, 40))
    saved = {}

    def note(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        LOSSES[type(loss)].twin(loss)(x.clone().requires_grad_(), target)
    kept = torch.utils._pytree.tree_leaves(loss.fwd(x, target)[1])
    ours = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in kept}
    assert sum(ours.values()) <= sum(saved.values()) + 16


# --- Losses are values


@classes
@given(st.data())
def test_they_are_values(cls, data):
    loss, other = data.draw(strategies.losses(cls)), data.draw(strategies.losses(cls))
    assert eval(repr(loss), dict(vars(fn))) == loss
    assert pickle.loads(pickle.dumps(loss)) == loss
    assert (loss == other) == (repr(loss) == repr(other))
    assert loss != other or hash(loss) == hash(other)


def test_positions_of_arguments():
    assert fn.MSE("sum") == fn.MSE(reduction="sum") != fn.MSE()
    assert fn.Huber(0.5, "sum") == fn.Huber(delta=0.5, reduction="sum")
    assert fn.CrossEntropy(0.1, 3, "sum") == fn.CrossEntropy(
        label_smoothing=0.1, ignore_index=3, reduction="sum"
    )
    assert repr(fn.CrossEntropy(0.1, reduction="sum")) == (
        "CrossEntropy(label_smoothing=0.1, reduction='sum')"
    )


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fn.Huber(0.0), ValueError, "Huber: expected delta > 0, got 0.0"),
        (lambda: fn.Huber(-1), ValueError, "Huber: expected delta to be finite and >= 0, got -1"),
        (lambda: fn.L1("none"), ValueError, 'L1: expected reduction to be "mean" or "sum", got'),
        (lambda: fn.CrossEntropy(2.0), ValueError, "expected label_smoothing in [0, 1], got 2.0"),
        (lambda: fn.CrossEntropy(0, 0.5), TypeError, "expected ignore_index to be an int, got 0.5"),
    ],
)
def test_settings_that_are_refused(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


# --- Awkward corners


def test_a_delta_beyond_the_dtype():
    x, target = torch.tensor([0.0, 3.0]), torch.tensor([1.0, -1.0])
    loss = fn.Huber(1e300)
    mapped = torch.func.vmap(loss.apply)(x, target)
    torch.testing.assert_close(mapped, torch.tensor([0.5, 8.0]))
    dx = torch.func.vmap(loss.vjp)(x, target)
    torch.testing.assert_close(dx, torch.tensor([-1.0, 4.0]))


def test_at_ties_and_kinks():
    """L1 has slope 0 at 0; the two sides of Huber agree at ±δ."""
    x = torch.tensor([0.0, 0.7, -0.7, 1.0, 1e4, -1e4], dtype=torch.float64)
    target = torch.tensor([0.0, 0.0, 0.0, 1.0, 1.0, 1.0], dtype=torch.float64)
    for loss in (fn.L1("sum"), fn.Huber(0.7, "sum"), fn.MSE("sum")):
        assert_is_torchs(loss, LOSSES[type(loss)].twin(loss), x, target)
    assert fn.L1("sum").vjp(x, target).tolist() == [0, 1, -1, 0, 1, -1]
    assert fn.Huber(0.7, "sum").vjp(x, target).tolist() == [0, 0.7, -0.7, 0, 0.7, -0.7]


def test_a_perfect_guess_costs_nothing():
    x = numbers((2, 3))
    for loss in (fn.MSE(), fn.L1(), fn.Huber()):
        assert loss.apply(x, x.clone()) == 0
        assert not loss.vjp(x, x.clone()).any()


def test_logits_of_ten_thousand():
    x = torch.tensor([[1e4, -1e4, 0.0], [-1e4, 1e4, 1e4]], dtype=torch.float64)
    unit = torch.tensor([[1.0, 0.0, 0.5], [1.0, 0.0, 0.25]], dtype=torch.float64)
    assert_is_torchs(fn.BCEWithLogits(), F.binary_cross_entropy_with_logits, x, unit)
    assert fn.BCEWithLogits("sum").apply(x[0], unit[0]) == pytest.approx(0.6931471805599453)
    for target in (torch.tensor([1, 0]), torch.tensor([0, 2]), unit):
        assert_is_torchs(fn.CrossEntropy(), F.cross_entropy, x, target)
    value = fn.CrossEntropy(reduction="sum").apply(x, torch.tensor([1, 0]))
    assert value == pytest.approx(40_000.6931471805599453, rel=1e-15)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_ignored_places(smoothing, reduction):
    loss = fn.CrossEntropy(smoothing, 1, reduction)
    theirs = LOSSES[fn.CrossEntropy].twin(loss)
    x = numbers((4, 3, 2))
    some, every = torch.tensor([[0, 1], [1, 1], [2, 0], [1, 2]]), torch.ones(4, 2).long()
    for target in (some, every):  # if all are ignored, torch's mean is NaN and its gradient 0
        assert_is_torchs(loss, theirs, x, target)
    assert not loss.vjp(x, some).transpose(1, 2)[some == 1].any()
    assert torch.isnan(loss.apply(x, every)) == (reduction == "mean")
    assert not loss.vjp(x, every).any()


def test_a_class_to_ignore_may_be_out_of_range():
    x, target = numbers((3, 2)), torch.tensor([0, 255, 1])
    assert_is_torchs(
        fn.CrossEntropy(ignore_index=255),
        lambda x, t: F.cross_entropy(x, t, ignore_index=255),
        x,
        target,
    )


def test_what_is_ignored_need_not_be_finite():
    x = torch.tensor([[0.0, 1.0], [torch.nan, torch.inf]])
    target = torch.tensor([1, -100])
    assert torch.isfinite(fn.CrossEntropy().apply(x, target))
    assert torch.isfinite(fn.CrossEntropy().vjp(x, target)[0]).all()


def test_a_class_may_be_left_out_by_a_logit_of_minus_infinity():
    x = torch.tensor([[0.0, -torch.inf, 1.0], [-torch.inf, 2.0, 0.0]], dtype=torch.float64)
    assert_is_torchs(fn.CrossEntropy(), F.cross_entropy, x, torch.tensor([2, 1]))
    assert torch.isfinite(fn.CrossEntropy().apply(x, torch.tensor([2, 1])))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_mean_in_float16_whose_sum_overflows(smoothing):
    """Where torch gives NaN. Nor does float16 hold the number of places."""
    x = (10 * numbers((70_000, 2))).half()
    classes = torch.arange(len(x)) % 2
    loss = fn.CrossEntropy(smoothing)
    exact = loss.apply(x.double(), classes)
    for target in (classes, F.one_hot(classes).half()):
        assert float(loss.apply(x, target)) == pytest.approx(float(exact), rel=0.01)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("kind", ["classes", "probabilities"])
def test_a_mean_in_float64_has_all_its_digits(smoothing, kind):
    x, target = numbers((3, 4)), torch.tensor([0, 3, 1])
    target = target if kind == "classes" else F.one_hot(target, 4).double()
    mean, total = fn.CrossEntropy(smoothing), fn.CrossEntropy(smoothing, reduction="sum")
    for of_loss in ("apply", "vjp"):
        found, summed = (getattr(loss, of_loss)(x, target) for loss in (mean, total))
        close(found * 3, summed, rtol=1e-14, atol=1e-15)


@pytest.mark.parametrize("loss", [fn.CrossEntropy(), fn.CrossEntropy(0.1)], ids=repr)
def test_no_classes(loss):
    x, nothing = torch.zeros(2, 0), torch.full((2,), -100)
    for target in (nothing, x):
        assert_is_torchs(loss, LOSSES[fn.CrossEntropy].twin(loss), x, target)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (torch.tensor([0, 3]), ValueError, "expected classes in [0, 3), got 3"),
        (torch.tensor([0, -1]), ValueError, "expected classes in [0, 3), got -1"),
        (torch.tensor([-100, 7]), ValueError, "expected classes in [0, 3), got 7"),
        (torch.tensor([0]), ValueError, "expected target of classes of shape (2,), got (1,)"),
        (torch.zeros(2, 2), ValueError, "expected target of shape (2, 3), x's shape, got (2, 2)"),
        (torch.zeros(2, 3).double(), TypeError, "expected target to have the dtype and device of"),
        (torch.tensor([0, 1], dtype=torch.int32), TypeError, "to be int64 classes or probab"),
        (torch.tensor([True, False]), TypeError, "int64 classes or probabilities, got torch.bool"),
        ([0, 1], TypeError, "expected target to be int64 classes or probabilities, got list"),
        (torch.empty(2, device="meta").long(), TypeError, "target on cpu, x's device, got meta"),
        (
            torch.zeros(2),
            TypeError,
            "probabilities, got torch.float32 of the shape of cl",
        ),
        (torch.eye(3)[:2].long(), ValueError, "got (2, 3): probabilities are torch.float32, as x"),
    ],
)
def test_targets_that_are_refused(target, error, message):
    with pytest.raises(error, match=re.escape("CrossEntropy(): ") + ".*" + re.escape(message)):
        fn.CrossEntropy().apply(torch.zeros(2, 3), target)


def test_more_that_cross_entropy_refuses():
    with pytest.raises(ValueError, match=r"expected x of shape \(N, C, …\), got \(3,\)"):
        fn.CrossEntropy().apply(torch.zeros(3), torch.tensor(0))
    with pytest.raises(ValueError, match=r"\(2, 5\), got \(2, 3\): the logits .* along axis 1"):
        fn.CrossEntropy().apply(torch.zeros(2, 3, 5), torch.zeros(2, 3).long())
    with pytest.raises(ValueError, match="expected classes, since ignore_index is one, got prob"):
        fn.CrossEntropy(ignore_index=0).apply(torch.zeros(2, 3), torch.zeros(2, 3))


@pytest.mark.parametrize("cls", [fn.L1, fn.Huber, fn.BCEWithLogits])
def test_nothing_is_broadcast(cls):
    with pytest.raises(ValueError, match=r"expected target of shape \(3, 1\), x's shape, got \(3,"):
        cls().apply(torch.zeros(3, 1), torch.zeros(3))


# --- Losses of one's own


@dataclass(frozen=True)
class LogCosh(fn.Loss):
    """Σ log cosh(x − target): a loss of one's own is one class with fwd and bwd."""

    def fwd(self, x, target):
        return (x - target).cosh().log().sum(), x - target

    def bwd(self, residuals, grad=1.0):
        return residuals.tanh() * grad


def test_a_loss_of_ones_own():
    x, target = fn.normal(fn.key(0), (3, 4)), fn.normal(fn.key(1), (3, 4))
    check_vjp(LogCosh(), x, target)
    net = fn.Sequential(fn.Sigmoid())
    value, grads = fn.value_and_grad(net, LogCosh())(((),), x, target)
    assert value == LogCosh().apply(x.sigmoid(), target)
    assert grads == ((),)


@dataclass(frozen=True)
class Weighted(fn.Loss):
    """Σ w · (x_c − 1)²: the target is a tree of a class c and a weight w for each example."""

    factor: float = 2.0

    def _check(self, x, target):
        assert not target["class"].is_floating_point()

    def _fwd(self, x, target):
        picked = x.gather(1, target["class"][:, None])[:, 0]
        return (target["weight"] * (picked - 1) ** 2).sum(), (x, target)

    def _bwd(self, residuals, grad):
        x, target = residuals
        at = target["class"][:, None]
        slope = self.factor * target["weight"][:, None] * (x.gather(1, at) - 1)
        return torch.zeros_like(x).scatter(1, at, slope * grad)


def test_a_target_may_be_a_tree_with_integers():
    x = numbers((3, 4))
    target = {"class": torch.tensor([0, 3, 1]), "weight": numbers((3,), 1)}
    for dtype in (torch.float64, torch.float32):
        check_vjp(Weighted(), x.to(dtype), {**target, "weight": target["weight"].to(dtype)})
    with pytest.raises(GradientMismatch, match="the gradient for x") as caught:
        check_vjp(Weighted(3.0), x, target)
    assert "target['class'] (3,)" in str(caught.value)
    assert "target = {'class': torch.tensor([0, 3, 1], dtype=torch.int64)" in caught.value.snippet
    assert caught.value.target is target


class Broken(fn.Loss):
    """Distances, as a subclass of it returns them."""

    def _bwd(self, distance, grad):
        return distance.sign() * grad


class WithoutResiduals(Broken):
    def _fwd(self, x, target):
        return (x - target).abs().sum()


class WithoutReturn(Broken):
    def _fwd(self, x, target):
        pass


class OfEachExample(Broken):
    def _fwd(self, x, target):
        return (x - target).abs().sum(1), x - target


class OfNumbers(Broken):
    def _fwd(self, x, target):
        return float((x - target).abs().sum()), x - target


class WithTwoGradients(Broken):
    def _fwd(self, x, target):
        return (x - target).abs().sum(), x - target

    def _bwd(self, distance, grad):
        return distance.sign() * grad, None


@pytest.mark.parametrize(
    ("cls", "message"),
    [
        (WithoutResiduals, "expected _fwd to return (value, residuals), got tensor(6.)"),
        (WithoutReturn, "expected _fwd to return (value, residuals), got None"),
        (OfEachExample, "expected the value to be a scalar tensor, got shape (2,)"),
        (OfNumbers, "expected the value to be a scalar tensor, got 6.0"),
        (WithTwoGradients, "expected _bwd to return dx, a tensor, got a tuple of 2"),
    ],
)
def test_a_loss_that_returns_something_else_is_named(cls, message):
    loss, x, target = cls(), torch.zeros(2, 3), torch.ones(2, 3)
    for call in (lambda: loss.vjp(x, target), lambda: check_vjp(loss, x, target)):
        with pytest.raises((ValueError, GradientMismatch)) as caught:
            call()
        assert f"{loss}: {message}" in str(caught.value)


@dataclass(frozen=True)
class Careless(fn.Loss):
    """Writes to its target, or reads it in the order of memory."""

    writes: bool

    def _check(self, x, target):
        pass

    def _fwd(self, x, target):
        if self.writes:
            target.clamp_(min=0)
        else:
            target = target.as_strided((3, 4), (4, 1), target.storage_offset())
        return (x - target).square().sum(), x - target

    def _bwd(self, residuals, grad):
        return 2 * residuals * grad


def test_carelessness_with_the_target_is_found():
    x, target = numbers((3, 4)), numbers((3, 4), 1)
    with pytest.raises(GradientMismatch, match="fwd: writes to target"):
        check_vjp(Careless(writes=True), x, target)
    with pytest.raises(GradientMismatch, match="a target that is not contiguous changes y"):
        check_vjp(Careless(writes=False), x, target)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_probabilities_of_no_classes(reduction):
    x = torch.zeros(2, 0)
    loss = fn.CrossEntropy(reduction=reduction)
    expected = F.cross_entropy(x, x, reduction=reduction)
    torch.testing.assert_close(loss.apply(x, x), expected, equal_nan=True)
    assert loss.vjp(x, x).shape == (2, 0)
