"""trace: what passes through each layer; gradients_by_layer: the same backward pass, in parts."""

import gc
import threading
import weakref
from contextvars import ContextVar
from dataclasses import dataclass
from itertools import pairwise

import optree
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from registry import EVERY_LAYER, EXAMPLE_IDS, EXAMPLES, key_for, make
from test_gradients import draw_loss
from test_per_example import NETWORKS, Siamese
from test_properties import close, same
from torch.utils._python_dispatch import TorchDispatchMode
from users_layers import Dense

import funcnet as fn
from funcnet.testing import check_vjp, strategies
from funcnet.testing.registry import REGISTRY

FLOAT64 = st.just(torch.float64)
every_example = pytest.mark.parametrize(("net", "shape"), EXAMPLES, ids=EXAMPLE_IDS)
_CONV = fn.Conv2d(2, 3, padding=1)


LEAVES = [
    cls
    for cls, row in REGISTRY.items()
    if row.classes is None and not row.needs_key and cls.__module__.startswith("funcnet.layers")
]
CHAINS = strategies.networks(parts=strategies.layers(*LEAVES))


# --- trace


def check_trace(net, params, x, key=None):
    """Hold a trace to `fwd` and to autograd of the layers behind each."""
    records = fn.trace(net, params, x, key=key)
    assert all(record.grad is None for record in records)
    y, _ = net.fwd(params, x, key=key)
    grad = fn.normal(fn.key(8), y.shape, dtype=y.dtype)
    again = fn.trace(net, params, x, grad=grad, key=key)
    assert [record[:2] for record in again] == [record[:2] for record in records]
    for one, other in zip(records, again, strict=True):
        assert not one.layer._children()
        assert same((one.params, one.x, one.y), (other.params, other.x, other.y))
        assert other.grad.shape == other.y.shape
    return again, y, grad


def of_gru():
    """A case whose `apply` rounds otherwise than `fwd`."""
    net = fn.Sequential(fn.GRU(3))
    x = fn.normal(fn.key(1), (2, 9, 4), dtype=torch.float64)
    return net, net.init(fn.key(0), (9, 4), dtype=torch.float64), x


@given(strategies.cases(CHAINS, dtypes=FLOAT64))
@example(of_gru())
def test_the_records_of_a_chain(case):
    net, params, x = case
    records, y, grad = check_trace(net, params, x)
    for record in records:
        close(record.layer.apply(record.params, record.x), record.y, equal_nan=True)
        at_path = params
        for step in record.path.split("."):
            at_path = at_path[int(step)]
        assert at_path is record.params
    if records:
        assert same((records[0].x, records[-1].y, records[-1].grad), (x, y, grad))
    for before, after in pairwise(records):
        assert same(before.y, after.x)
        expected = after.layer.vjp(after.params, after.x, after.grad)[1]
        close(before.grad, expected, equal_nan=True)


@every_example
def test_every_layer_is_traced(net, shape):
    params, x, _ = make(net, shape, batch=2)
    records, _, _ = check_trace(net, params, x, key_for(net))
    assert len({record.path for record in records}) >= len(leaves_of(net)) - 1


def leaves_of(net):
    children = net._children()
    if children or isinstance(net, fn.Sequential):
        return [leaf for _, child in children for leaf in leaves_of(child)]
    return [net]


@dataclass(frozen=True)
class Probe(fn.Layer):
    """y = x + probe, whose gradient is the gradient by y."""

    def _params(self, shape):
        return {"probe": fn.Param(shape, fn.initializers.Zeros())}

    _fresh = True  # so that what is around it may write over y

    def _fwd(self, params, x, key):
        return x + params["probe"], None

    def _bwd(self, params, residuals, dy, need):
        return {"probe": dy.sum(0)}, dy.clone()


@pytest.mark.parametrize(
    "around",
    [
        fn.Residual,
        fn.Recompute,
        fn.Frozen,
        lambda layer: fn.Sum(layer, fn.Frozen(layer), fn.ReLU()),
        lambda layer: fn.Product(layer, fn.Recompute(layer)),
        lambda layer: fn.Concat(a=fn.Residual(layer), b=layer),
        lambda layer: fn.Residual(fn.Recompute(layer)),
        lambda layer: fn.Cast(fn.Residual(layer), torch.float64),
        lambda layer: fn.Loop(fn.Recompute(layer), 3),
        lambda layer: fn.Recompute(fn.Repeat(layer, 3)),
        lambda layer: fn.Reversible(layer, layer, fn.Recompute(layer), fn.ReLU()),
        Siamese,
    ],
)
def test_grads_are_autograds(around):
    """A layer's y plus a probe of zeros: autograd's gradient of the probe is the layer's grad."""
    half = fn.Sequential(fn.Conv2d(2, 3, padding=1), Probe())
    net = around(half)
    shape = (4, 3, 3) if isinstance(net, fn.Reversible) else (2, 3, 3)
    params, x, grad = make(net, shape, batch=1, dtype=torch.float64)
    records = fn.trace(net, params, x, grad)
    probes = [i for i, record in enumerate(records) if isinstance(record.layer, Probe)]
    assert probes
    by_path = {}
    for i in probes:
        assert same(records[i - 1].y, records[i].x)
        assert same(records[i - 1].grad, records[i].grad)
        close(records[i].layer.apply(records[i].params, records[i].x), records[i].y)
        by_path[records[i].path] = by_path.get(records[i].path, 0) + records[i].grad.sum(0)
    thawed = eval(repr(net).replace("Frozen", ""), {**vars(fn), "Probe": Probe, "Siamese": Siamese})
    leaves, structure = optree.tree_flatten(params)
    tracked = [leaf.clone().requires_grad_() for leaf in leaves]
    y = thawed.apply(structure.unflatten(tracked), x)
    grads = structure.unflatten(torch.autograd.grad(y, tracked, grad))
    for path, found in by_path.items():
        at_path = grads
        for step in path.split("."):
            at_path = at_path[int(step) if isinstance(at_path, tuple) else step]
        probe = at_path["probe"]
        close(found, probe.sum(0) if probe.ndim > found.ndim else probe)


def test_integers_frozen_below():
    net = fn.Sequential(fn.Frozen(fn.Embedding(5, 3)), fn.Frozen(fn.Linear(3)), fn.Tanh())
    params = net.init(fn.key(0), (2,))
    x = torch.tensor([[1, 2]])
    records = fn.trace(net, params, x, torch.ones(1, 2, 3))
    assert [record.path for record in records] == ["0", "1", "2"]
    assert [record.grad.shape for record in records] == [(1, 2, 3)] * 3


def test_masks_are_those_of_the_key():
    net = fn.Recompute(fn.Sequential(fn.Linear(4), fn.Dropout(0.5)))
    params, x, grad = make(net, (3,))
    records = fn.trace(net, params, x, grad, key=fn.key(3))
    assert same(records[-1].y, net.apply(params, x, key=fn.key(3)))


def test_no_network_is_refused():
    with pytest.raises(TypeError, match="trace: expected net to be a Layer, got MSE"):
        fn.trace(fn.MSE(), (), torch.ones(1))
    with pytest.raises(ValueError, match="layer 0: Linear"):
        fn.trace(fn.Sequential(fn.Linear(2)), ({"weight": 1},), torch.ones(1, 3))
    params, x, grad = make(fn.Linear(2), (3,))
    with pytest.raises(ValueError, match="expected grad of shape"):
        fn.trace(fn.Linear(2), params, x, grad[:1])


# --- gradients_by_layer


def put_together(net, params, found, path=""):
    """The tree of params, with the gradient that was found for each layer."""
    if path in found:
        return found.pop(path)
    children = net._children()
    owns = [
        put_together(child, own, found, ".".join(filter(None, (path, name))))
        for (name, child), own in zip(children, net._child_params(params), strict=True)
    ]
    if not children:
        return params
    if [name for name, _ in children] == [""]:
        return owns[0]
    if isinstance(params, dict):
        return dict(zip([name for name, _ in children], owns, strict=True))
    return tuple(owns)


def check_by_layer(net, loss, params, x, target, key=None):
    found = list(fn.gradients_by_layer(net, loss)(params, x, target, key))
    paths = [path for path, _ in found]
    assert len(set(paths)) == len(paths)
    grads = put_together(net, params, dict(found))
    assert same(grads, fn.value_and_grad(net, loss)(params, x, target, key)[1])
    return paths


@given(strategies.cases(EVERY_LAYER), st.data())
def test_together_they_are_the_gradient(case, data):
    net, params, x = case
    loss, target = draw_loss(data, net.apply(params, x))
    paths = check_by_layer(net, loss, params, x, target)
    records = fn.trace(net, params, x)
    backwards = [r.path for r in reversed(records) if optree.tree_leaves(r.params)]
    assert paths == list(dict.fromkeys(backwards))


def test_it_computes_with_as_many_threads_as_the_caller():
    """OpenMP's number is each thread's own, and a new one has not heard of torch's."""
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1 if threads > 1 else 2)
        net = fn.Conv1d(4, 3, padding=1)
        check_by_layer(net, fn.MSE(), *make(net, (3, 6)))
    finally:
        torch.set_num_threads(threads)


@every_example
def test_every_layer_gives_its_gradient(net, shape):
    params, x, target = make(net, shape)
    check_by_layer(net, fn.MSE(), params, x, target, key_for(net))


@pytest.mark.parametrize(
    "net",
    [*NETWORKS, fn.Sequential(_CONV, Siamese(_CONV), fn.Frozen(_CONV), fn.Residual(_CONV))],
    ids=str,
)
def test_combinators(net):
    params, x, target = make(net, (2, 4, 3))
    check_by_layer(net, fn.MSE(), params, x, target)


def test_the_order_and_the_paths():
    net = fn.Sequential(
        stem=fn.Frozen(fn.Linear(3)),
        body=fn.Sum(
            fn.Linear(3),
            fn.Frozen(fn.Linear(3)),  # the backward pass leaves it out
            fn.Sequential(fn.Tanh(), fn.Residual(fn.Linear(3))),
        ),
        turns=fn.Loop(fn.Sequential(fn.Linear(3), fn.Frozen(fn.Linear(3))), 2),
        head=fn.Cast(fn.Recompute(fn.Linear(2)), torch.float64),
    )
    params, x, target = make(net, (3,))
    paths = check_by_layer(net, fn.MSE(), params, x, target)
    assert paths == ["head", "turns.1", "turns.0", "body.2.1", "body.1", "body.0", "stem"]


def test_names_with_dots_are_escaped():
    """As in files: two layers never have the same path."""
    net = fn.Sequential(**{"a.b": fn.Linear(4), "a": fn.Sequential(b=fn.Linear(4)), "%": fn.Tanh()})
    params, x, target = make(net, (3,))
    found = dict(fn.gradients_by_layer(net, fn.MSE())(params, x, target))
    grads = {"a": {"b": found["a.b"]}, "a.b": found["a%2Eb"], "%": ()}
    assert same(grads, fn.value_and_grad(net, fn.MSE())(params, x, target)[1])
    assert [record.path for record in fn.trace(net, params, x)] == ["a%2Eb", "a.b", "%25"]
    assert "\na%2Eb " in str(fn.summary(net, (3,)))


@dataclass(frozen=True)
class Told(Dense):
    """A layer that tells when its backward pass runs, and keeps a residual of its own."""

    name: str = ""
    log: list = None

    def __hash__(self):
        return hash(self.name)

    def bwd(self, params, residuals, grad, *, input_grad=True):
        self.log.append(self.name)
        return super().bwd(params, residuals, grad, input_grad=input_grad)


@pytest.mark.parametrize(
    "around",
    [
        lambda *layers: fn.Sequential(*layers),
        lambda *layers: fn.Residual(fn.Sequential(*layers)),
        lambda *layers: fn.Cast(fn.Recompute(fn.Sequential(*layers)), torch.float64),
        lambda *layers: fn.Sum(*layers),
    ],
)
def test_each_comes_as_soon_as_it_is_there(around):
    log = []
    net = around(*(Told(4, name, log) for name in "abc"))
    params, x, target = make(net, (4,))
    found = fn.gradients_by_layer(net, fn.MSE())(params, x, target)
    assert log == []
    for count, name in enumerate("cba", 1):
        next(found)
        assert log == list("cba"[:count]), name
    assert next(found, None) is None


def test_parameters_may_be_written_in_place():
    net = fn.Sequential(
        fn.Recompute(fn.Sequential(fn.Linear(4), fn.GELU(), fn.Linear(4))),
        fn.Reversible(fn.Linear(2), fn.Linear(2)),
        fn.Repeat(fn.Residual(fn.Linear(4)), 2),
        fn.Linear(2),
    )
    params, x, target = make(net, (4,), dtype=torch.float64)
    _, grads = fn.value_and_grad(net, fn.MSE())(params, x, target)
    expected, _ = fn.SGD(0.1).step(params, grads, fn.SGD(0.1).init(params))
    for path, dparams in fn.gradients_by_layer(net, fn.MSE())(params, x, target):
        own = params
        for step in path.split("."):
            own = own[int(step)]
        for name, gradient in dparams.items():
            own[name].sub_(gradient, alpha=0.1)
    assert same(params, expected)


class Counting(TorchDispatchMode):
    """Counts operations."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += 1
        return function(*args, **(kwargs or {}))


def test_modes_and_context_variables_of_the_caller_hold():
    seen, variable = [], ContextVar("variable", default=None)

    @dataclass(frozen=True)
    class Reading(fn.Tanh):
        def _bwd(self, params, y, dy, need):
            seen.append(variable.get())
            return super()._bwd(params, y, dy, need)

    net = fn.Sequential(fn.Linear(4), Reading(), fn.Linear(4))
    params, x, target = make(net, (4,))
    variable.set(3)
    gradients = fn.gradients_by_layer(net, fn.MSE())
    list(gradients(params, x, target))
    assert seen == [3]
    with Counting() as forward:
        loss = net.apply(params, x)
    with Counting() as both:
        list(gradients(params, x, target))
    assert loss.shape == target.shape
    assert both.count > 2 * forward.count


def test_one_gradient_is_held_at_a_time():
    net = fn.Sequential(*[fn.Linear(4)] * 4)
    params, x, target = make(net, (4,))
    alive = []
    for _, dparams in fn.gradients_by_layer(net, fn.MSE())(params, x, target):
        alive.append(weakref.ref(dparams["weight"]))
        del dparams
        gc.collect()
        assert sum(ref() is not None for ref in alive) <= 1
    assert not any(ref() for ref in alive)


def test_given_up_in_the_middle():
    threads = threading.active_count()
    log = []
    net = fn.Sequential(*(Told(4, name, log) for name in "abc"))
    params, x, target = make(net, (4,))
    for path, _ in fn.gradients_by_layer(net, fn.MSE())(params, x, target):
        assert path == "2"
        break
    gc.collect()
    assert log == ["c"]
    assert threading.active_count() == threads


def test_errors_come_out_where_the_gradient_was_asked_for():
    @dataclass(frozen=True)
    class Broken(Dense):
        def bwd(self, params, residuals, grad, *, input_grad=True):
            raise ValueError("no gradient")

    threads = threading.active_count()
    net = fn.Sequential(fn.Linear(4), Broken(4), fn.Linear(2))
    params, x, target = make(net, (4,))
    found = fn.gradients_by_layer(net, fn.MSE())(params, x, target)
    assert next(found)[0] == "2"
    with pytest.raises(ValueError, match="layer 1: no gradient"):
        next(found)
    assert threading.active_count() == threads


def test_modes_are_those_of_the_caller():
    net = fn.Sequential(fn.Linear(2), fn.Linear(2))
    params, x, target = make(net, (3,))
    leaves = [leaf.requires_grad_() for leaf in optree.tree_leaves(params)]
    found = list(fn.gradients_by_layer(net, fn.MSE())(params, x, target))
    slopes = torch.autograd.grad(found[1][1]["weight"].sum(), leaves[-1])  # a second derivative
    assert slopes[0].any()
    with torch.no_grad():
        found = list(fn.gradients_by_layer(net, fn.MSE())(params, x, target))
    assert not found[1][1]["weight"].requires_grad
    with torch.inference_mode():
        found = list(fn.gradients_by_layer(net, fn.MSE())(params, x, target))
    assert found[1][1]["weight"].is_inference()


def test_vmap_over_networks():
    net = fn.Sequential(fn.Linear(3), fn.Tanh(), fn.Linear(2))
    members = [net.init(key, (3,)) for key in fn.split(fn.key(0))]
    stacked = optree.tree_map(lambda *leaves: torch.stack(leaves), *members)
    _, x, target = make(net, (3,))

    def gradients(params):
        return dict(fn.gradients_by_layer(net, fn.MSE())(params, x, target))

    mapped = torch.func.vmap(gradients)(stacked)
    for i, params in enumerate(members):
        close(optree.tree_map(lambda leaf, i=i: leaf[i], mapped), gradients(params))


def test_refusals_and_values():
    with pytest.raises(TypeError, match="gradients_by_layer: expected net to be a Layer"):
        fn.gradients_by_layer(fn.MSE(), fn.MSE())
    with pytest.raises(TypeError, match="gradients_by_layer: expected a loss"):
        fn.gradients_by_layer(fn.ReLU(), fn.ReLU())
    net = fn.Sequential(fn.Linear(2))
    made = fn.gradients_by_layer(net, fn.MSE())
    assert repr(made) == "gradients_by_layer(Sequential(Linear(2)), MSE())"
    params, x, target = make(net, (3,))
    with pytest.raises(ValueError, match="expected target of shape"):  # before anything is asked
        made(params, x, target[:1])


# --- Memory


@dataclass(frozen=True)
class Gated(fn.Layer):
    """y = a(x) ∘ b(x), of a's shape, which it asks a for."""

    a: fn.Linear
    b: fn.Linear

    def _out_shape(self, shape):
        return (*shape[:-1], self.a.out_features)

    def _init(self, key, shape, dtype, device):
        keys = fn.split(key)
        return tuple(
            child.init(k, shape, dtype=dtype, device=device)
            for child, k in zip((self.a, self.b), keys, strict=True)
        )

    def _check(self, params, x):
        self.b._check(params[1], x)
        return self.a._check(params[0], x)

    def _fwd(self, params, x, key):
        (y, kept), (z, other) = (
            child.fwd(own, x) for child, own in zip((self.a, self.b), params, strict=True)
        )
        return y * z, (y, z, kept, other)

    def _bwd(self, params, residuals, dy, need):
        y, z, kept, other = residuals
        da, dx = self.a.bwd(params[0], kept, dy * z)
        db, more = self.b.bwd(params[1], other, dy * y)
        return (da, db), dx + more


def test_a_combinator_may_ask_its_layers_for_their_fields():
    net = fn.Sequential(Gated(fn.Linear(3), fn.Linear(3)), fn.ReLU())
    params, x, grad = make(net, (4,))
    check_vjp(net, params, x)
    records = fn.trace(net, params, x, grad)
    assert [record.path for record in records] == ["0.0", "0.1", "1"]
    close(records[0].y * records[1].y, records[2].x)
    assert not hasattr(records[0].layer, "nothing")


USES = {
    "trace": lambda net, params, x, target: fn.trace(net, params, x, grad=torch.ones(2, 4)),
    "by_layer": lambda net, *given: list(fn.gradients_by_layer(net, fn.MSE())(*given)),
    "in part": lambda net, *given: next(fn.gradients_by_layer(net, fn.MSE())(*given)),
    "per_example": lambda net, *given: fn.per_example(net, fn.MSE())(*given),
    "norms": lambda net, *given: fn.gradient_norms(net, fn.MSE())(*given),
    "clipped": lambda net, *given: fn.clipped_value_and_grad(net, fn.MSE(), 1.0)(*given),
    "init": lambda net, *_: net.init(fn.key(0), (3,)),
    "error": lambda net, *given: fail_by_layer(fn.Sequential(net, Broken()), *given),
}


@dataclass(frozen=True)
class Broken(fn.Tanh):
    def _bwd(self, params, y, dy, need):
        raise ValueError("no gradient")


def fail_by_layer(net, params, x, target):
    with pytest.raises(ValueError, match="no gradient"):
        next(fn.gradients_by_layer(net, fn.MSE())((params, ()), x, target))


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_no_tensor_waits_for_the_garbage_collector(use):
    net = fn.Sequential(fn.Linear(4), fn.Residual(fn.Sequential(fn.Linear(4), fn.ReLU())))
    given = make(net, (3,))
    gc.collect()
    gc.disable()
    try:
        use(net, *given)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        kept = [x for x in gc.garbage if isinstance(x, torch.Tensor)]
        assert kept == []
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
