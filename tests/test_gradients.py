"""value_and_grad: loss and gradient, memory freed on the way, training in several precisions."""

import gc
import inspect
import math
import pickle
import re
import weakref
from dataclasses import dataclass, field
from types import SimpleNamespace

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from registry import EVERY_LAYER
from test_properties import close, make, same

import funcnet as fn
from funcnet.gradients import contribution
from funcnet.ops.need import Need
from funcnet.testing import check_vjp, strategies
from funcnet.testing.registry import LOSSES

FLOAT64 = st.just(torch.float64)
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


def draw_loss(data, y):
    """A loss and a target that fit y."""
    loss = data.draw(strategies.losses(*(c for c, row in LOSSES.items() if row.rank <= y.ndim)))
    return loss, data.draw(strategies.targets(loss, y))


@given(strategies.cases(EVERY_LAYER), st.data())
def test_it_is_the_chain_rule(case, data):
    net, params, x = case
    y = net.apply(params, x)
    loss, target = draw_loss(data, y)
    value, grads = fn.value_and_grad(net, loss)(params, x, target)
    close(value, loss.apply(y, target), equal_nan=True)
    close(grads, net.vjp(params, x, loss.vjp(y, target))[0], equal_nan=True)
    assert optree.tree_structure(grads) == optree.tree_structure(params)


@given(strategies.cases(EVERY_LAYER, dtypes=FLOAT64, batches=st.just(2)))
def test_it_is_autograds(case):
    net, params, x = case
    target = fn.normal(fn.key(0), net.apply(params, x).shape, dtype=x.dtype)
    leaves, structure = optree.tree_flatten(params)
    leaves = [leaf.clone().requires_grad_() for leaf in leaves]
    value = fn.MSE().apply(net.apply(structure.unflatten(leaves), x), target)
    ours, grads = fn.value_and_grad(net, fn.MSE())(params, x, target)
    close(ours, value.detach())
    if leaves and value.requires_grad:  # of Frozen layers it does not
        expected = torch.autograd.grad(value, leaves, allow_unused=True, materialize_grads=True)
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
    half = type("Half", (), {"fwd": lambda self, x, target: (x, x)})()
    other = type("Other", (), {"bwd": lambda self, residuals, grad=1.0: residuals})()
    for wrong in (fn.MSE, None, len, fn.ReLU(), half, other):
        with pytest.raises(TypeError, match="value_and_grad: expected a loss, such as MSE"):
            fn.value_and_grad(fn.ReLU(), wrong)
    for wrong in (torch.nn.ReLU(), fn.ReLU, None):
        with pytest.raises(TypeError, match="value_and_grad: expected net to be a Layer, got "):
            fn.value_and_grad(wrong, fn.MSE())


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


@dataclass(frozen=True)
class Asked(fn.Layer):
    """y = w·x, by what authors write; notes what it is asked for."""

    asked: list = field(default_factory=list, compare=False)

    def _params(self, shape):
        return {"w": fn.Param((1,), fn.initializers.Constant(3.0))}

    def _fwd(self, params, x, key):
        return params["w"] * x, x

    def _bwd(self, params, x, dy, need):
        self.asked.append(need)
        return {"w": (x * dy).sum().reshape(1)}, params["w"] * dy


class AskedInPublic(Asked):
    """The same, by the public four."""

    def fwd(self, params, x, *, key=None):
        return params["w"] * x, x

    def bwd(self, params, x, grad, *, input_grad=True, param_grad=True):
        need = Need(param_grad, input_grad)
        dparams, dx = self._bwd(params, x, grad, need)
        return dparams, dx if input_grad else None


@pytest.mark.parametrize("layer", [Asked(), AskedInPublic()], ids=["_bwd", "bwd"])
def test_a_layer_is_asked_for_its_parameters_gradients_alone(layer):
    x = torch.tensor([[1.0], [2.0]])
    params = layer.init(fn.key(0), (1,))
    value, grads = fn.value_and_grad(layer, fn.MSE("sum"))(params, x, torch.zeros(2, 1))
    assert (value.item(), grads["w"].item()) == (45, 30)
    assert [(need.params, need.input) for need in layer.asked] == [(True, False)]


# --- What it returns is a value


@pytest.mark.parametrize("options", [{}, {"micro_batch": 3}], ids=str)
def test_the_function_is_a_value(options):
    net = fn.Sequential(fn.Linear(3))
    step = fn.value_and_grad(net, fn.MSE(), **options)
    assert eval(repr(step), dict(vars(fn))) == step
    assert hash(step) == hash(fn.value_and_grad(net, fn.MSE(), **options))
    assert step != fn.value_and_grad(net, fn.MSE("sum"), **options)
    assert pickle.loads(pickle.dumps(step)) == step
    assert list(inspect.signature(step).parameters) == ["params", "x", "target", "key"]
    assert inspect.getdoc(step)
    with pytest.raises(AttributeError):
        step.net = net


# --- Micro-batches


@given(strategies.cases(EVERY_LAYER, dtypes=FLOAT64), st.integers(1, 4), st.data())
def test_micro_batches_give_the_same_numbers(case, size, data):
    net, params, x = case
    if net.couples_examples:
        return
    loss, target = draw_loss(data, net.apply(params, x))
    kept = optree.tree_map(torch.clone, (params, x, target))
    expected = fn.value_and_grad(net, loss)(params, x, target)
    found = fn.value_and_grad(net, loss, micro_batch=size)(params, x, target)
    close(found, expected, rtol=1e-9, atol=1e-11, equal_nan=True)
    assert optree.tree_structure(found) == optree.tree_structure(expected)
    assert same((params, x, target), kept)


CLASSIFIER = fn.Sequential(fn.Flatten(), fn.Linear(4), fn.Tanh(), fn.Linear(3))
LABELS = {
    "another number of places is ignored in each part": [0, 1, 1, 1, 2, 0, 0],
    "a part is ignored as a whole": [1, 1, 0, 2, 0, 0, 1],
    "three places count": [0, 1, 2, 1, 0, 1, 1],
    "all is ignored": [1] * 7,
}


@pytest.mark.parametrize("labels", LABELS.values(), ids=LABELS)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_mean_is_over_places_that_count(labels, smoothing, reduction):
    loss = fn.CrossEntropy(smoothing, 1, reduction)
    params = CLASSIFIER.init(fn.key(0), (2, 2), dtype=torch.float64)
    x = fn.normal(fn.key(1), (7, 2, 2), dtype=torch.float64)
    expected = fn.value_and_grad(CLASSIFIER, loss)(params, x, torch.tensor(labels))
    for size in (1, 2, 3, 7, 8):
        step = fn.value_and_grad(CLASSIFIER, loss, micro_batch=size)
        found = step(params, x, torch.tensor(labels))
        close(found, expected, rtol=1e-12, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize("none", [0, torch.tensor(0)], ids=["int", "tensor"])
def test_a_part_without_terms_contributes_nothing(none):
    """A mean over no terms is NaN."""
    value, share = contribution(torch.tensor(math.nan), none, 4)
    assert (value, share) == (0, 0)


def test_terms_are_counted_beyond_half_precision():
    one, count = torch.ones((), dtype=torch.float16), torch.tensor(70_000)
    assert contribution(one, count, 2 * count) == (0.5, 0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_micro_batches_keep_the_dtype(dtype):
    params = CLASSIFIER.init(fn.key(0), (2, 2), dtype=dtype)
    x = fn.normal(fn.key(1), (7, 2, 2), dtype=dtype)
    step = fn.value_and_grad(CLASSIFIER, fn.CrossEntropy(ignore_index=1), micro_batch=3)
    found = step(params, x, torch.tensor([0, 1, 2, 1, 0, 1, 1]))
    assert {leaf.dtype for leaf in optree.tree_leaves(found)} == {dtype}


@dataclass(frozen=True)
class WeightedError(fn.Loss):
    """A mean over examples of w · (x − t)², with w and t in the target."""

    reduction: str = "mean"

    def fwd(self, x, target):
        w, difference = target["w"][:, None], x - target["t"]
        total = (w * difference**2).sum()
        count = len(x) if self.reduction == "mean" else 1
        return total / count, 2 * w * difference / count

    def bwd(self, residuals, grad=1.0):
        return residuals * grad


def test_a_target_that_is_a_tree_is_cut_too():
    net = fn.Linear(3)
    params = net.init(fn.key(0), (2,), dtype=torch.float64)
    x, t = (fn.normal(fn.key(i), (5, n), dtype=torch.float64) for i, n in ((1, 2), (2, 3)))
    target = {"w": fn.uniform(fn.key(3), (5,), dtype=torch.float64), "t": t}
    expected = fn.value_and_grad(net, WeightedError())(params, x, target)
    close(fn.value_and_grad(net, WeightedError(), micro_batch=2)(params, x, target), expected)


def test_micro_batch_j_draws_from_key_j():
    net = fn.Sequential(fn.Linear(3), fn.Dropout(0.5))
    params = net.init(fn.key(0), (2,))
    x, key = torch.ones(4, 2), fn.key(3)
    step = fn.value_and_grad(net, fn.MSE("sum"), micro_batch=2)
    value, _ = step(params, x, torch.zeros(4, 3), key)
    parts = [net.apply(params, x[:2], key=fn.fold_in(key, j)).square().sum() for j in range(2)]
    close(value, sum(parts))


def test_no_part_is_kept_while_the_next_is_computed():
    alive, seen = {}, []

    class Noted(Watcher):
        def fwd(self, params, x, *, key=None):
            gc.collect()
            seen.append((len(x), "a" in alive and alive["a"]() is not None))
            return super().fwd(params, x, key=key)

    layer = Noted("a", alive)
    alive.update(b=lambda: None, c=lambda: None)
    x = torch.ones(7, 3)
    step = fn.value_and_grad(layer, fn.MSE(), micro_batch=3)
    step(layer.init(fn.key(0), (3,)), x, torch.zeros(7, 3))
    assert seen == [(3, False), (3, False), (1, False)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_many_small_parts_add_up_in_16_bits(dtype):
    """A sum in bfloat16 would stop growing at 256."""
    net = fn.Linear(1, bias=False)
    params = {"weight": torch.ones(1, 1, dtype=dtype)}
    x = torch.ones(1000, 1, dtype=dtype)
    step = fn.value_and_grad(net, fn.L1("sum"), micro_batch=1)
    value, grads = step(params, x, torch.zeros_like(x))
    assert value == grads["weight"] == 1000
    assert value.dtype == grads["weight"].dtype == dtype


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_micro_batches_under_transforms():
    from test_transforms import compile_whole

    params = CLASSIFIER.init(fn.key(0), (2, 2), dtype=torch.float64)
    x = fn.normal(fn.key(1), (5, 2, 2), dtype=torch.float64)
    target = torch.tensor([-100, -100, 1, 2, 0])
    for loss in (fn.CrossEntropy(), fn.CrossEntropy(reduction="sum")):
        step = fn.value_and_grad(CLASSIFIER, loss, micro_batch=2)
        expected = fn.value_and_grad(CLASSIFIER, loss)(params, x, target)
        close(compile_whole(step)(params, x, target), expected)
        many = optree.tree_map(lambda leaf: torch.stack([leaf, 2 * leaf]), params)
        mapped = torch.func.vmap(step, in_dims=(0, None, None))(many, x, target)
        close(optree.tree_map(lambda leaf: leaf[0], mapped), expected)


def test_what_micro_batches_refuse():
    loss, layer = fn.MSE(), fn.ReLU()
    net = fn.Sequential(stem=fn.Linear(3), body=fn.Residual(fn.Sequential(fn.BatchNorm())))
    expected = "expected layers that treat every example alone, for micro_batch, got "
    with pytest.raises(ValueError, match=re.escape(expected + "body: layer 0: BatchNorm()")):
        fn.value_and_grad(net, loss, micro_batch=2)
    with pytest.raises(ValueError, match=re.escape("expected micro_batch >= 1, got 0")):
        fn.value_and_grad(layer, loss, micro_batch=0)
    for wrong in (1.5, True, "2"):
        with pytest.raises(TypeError, match="expected micro_batch to be an int, got"):
            fn.value_and_grad(layer, loss, micro_batch=wrong)
    with pytest.raises(ValueError, match='expected a loss with reduction "mean" or "sum", for'):
        fn.value_and_grad(layer, WeightedError("none"), micro_batch=2)
    like_a_loss = SimpleNamespace(fwd=loss.fwd, bwd=loss.bwd, reduction="mean")
    with pytest.raises(ValueError, match=r"expected a loss with reduction .* got namespace\("):
        fn.value_and_grad(layer, like_a_loss, micro_batch=2)
    step = fn.value_and_grad(layer, loss, micro_batch=2)
    for target, error, message in (
        (torch.zeros(4, 2), ValueError, "expected target of 3 examples, as x, got 4"),
        (torch.tensor(1.0), TypeError, "expected target to be a batch, got shape ()"),
        (1.0, TypeError, "expected target to be a batch, got float"),
    ):
        with pytest.raises(error, match=re.escape(message)):
            step((), torch.zeros(3, 2), target)


@pytest.mark.parametrize("loss", [fn.MSE(), fn.MSE("sum"), fn.CrossEntropy()], ids=repr)
def test_micro_batches_of_nothing(loss):
    """One part, which is all of it."""
    net = fn.Linear(3)
    params = net.init(fn.key(0), (4,))
    x, target = torch.zeros(0, 4), torch.zeros(0, 3)
    target = target if isinstance(loss, fn.MSE) else torch.zeros(0, dtype=torch.int64)
    expected = fn.value_and_grad(net, loss)(params, x, target)
    found = fn.value_and_grad(net, loss, micro_batch=2)(params, x, target)
    torch.testing.assert_close(found, expected, equal_nan=True)


@dataclass(frozen=True)
class Height(fn.Loss):
    """The mean of x², without a target."""

    reduction: str = "mean"

    def _check(self, x, target):
        pass

    def _fwd(self, x, target):
        return x.square().mean(), x

    def _bwd(self, x, grad):
        return 2 * x * (grad / x.numel())


def test_micro_batches_without_a_target():
    net = fn.Linear(3)
    params, x = net.init(fn.key(0), (4,)), fn.normal(fn.key(1), (5, 4))
    expected = fn.value_and_grad(net, Height())(params, x, None)
    found = fn.value_and_grad(net, Height(), micro_batch=2)(params, x, None)
    torch.testing.assert_close(found, expected)
    with pytest.raises(TypeError, match="expected target to be a tensor, got None"):
        fn.value_and_grad(net, fn.MSE(), micro_batch=2)(params, x, None)
