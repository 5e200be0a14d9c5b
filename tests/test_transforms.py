"""torch.func.vmap, autograd and torch.compile: layers are plain functions, so all of them work."""

import dataclasses
import os
import subprocess
import sysconfig
from functools import partial
from pathlib import Path

import optree
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from registry import EVERY_LAYER, EXAMPLE_IDS, EXAMPLES, FLOAT_EXAMPLES, draw_x, key_for, make
from test_properties import close, same
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import funcnet as fn
from funcnet.fields import Size
from funcnet.testing import check_vjp, strategies

examples = pytest.mark.parametrize(("layer", "shape"), EXAMPLES, ids=EXAMPLE_IDS)
examples_of_floats = pytest.mark.parametrize(("layer", "shape"), FLOAT_EXAMPLES, ids=str)
FLOAT64 = st.just(torch.float64)


def variants(x):
    """Three inputs like x: of integers, ones that are in range."""
    return torch.stack([x, 2 * x, -x] if x.is_floating_point() else [x, x.flip(0), x])


def stack(trees):
    return optree.tree_map(lambda *leaves: torch.stack(leaves), *trees)


def members(layer, x, count=3):
    """The parameters of several networks in float64, apart and stacked."""
    keys = fn.split(fn.key(0), count)
    options = {"dtype": torch.float64, "device": x.device}
    each = [layer.init(key, x.shape[1:], **options) for key in keys]
    return each, stack(each)


# --- Global state


@examples
@pytest.mark.parametrize("given_dtype", [torch.float32, torch.bfloat16])
def test_global_settings_change_nothing(layer, shape, given_dtype, device):
    """Not the default device and dtype, not autocast: not even the bits."""
    sgd, key = fn.SGD(0.1, momentum=0.9), key_for(layer)

    def everything():
        params, x, grad = make(layer, shape, dtype=given_dtype, device=device)
        y = layer.apply(params, x, key=key)
        dparams, dx = layer.vjp(params, x, grad, key=key)
        loss, grads = fn.value_and_grad(layer, fn.MSE())(params, x, grad, key)
        return y, dx, dparams, loss, grads, sgd.step(params, grads, sgd.init(params))

    expected = everything()
    dtype = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        with torch.device("meta"), torch.autocast(device, dtype=torch.float16):
            found = everything()
    finally:
        torch.set_default_dtype(dtype)
    assert same(found, expected)


def test_global_settings_change_no_verdict_and_no_file(tmp_path):
    net = fn.Sequential(fn.Conv2d(2, 2), fn.Sigmoid(), fn.UpsampleConv2d(1))
    params, x, _ = make(net, (1, 4, 4))
    interleaved = torch.arange(6.0).reshape(3, 2)
    tree = {"net": params, "left": interleaved[:, 0], "right": interleaved[:, 1]}
    overlapping = {"a": interleaved, "b": interleaved[:2]}

    @given(strategies.cases(strategies.layers()))
    @settings(max_examples=5)
    def check_drawn(case):
        check_vjp(*case)

    with torch.device("meta"):
        check_vjp(net, params, x)
        check_vjp(fn.MSE(), x, torch.zeros_like(x, device="cpu"))
        check_drawn()
        with pytest.raises(ValueError, match="b: expected memory of its own"):
            fn.save(tmp_path / "tree", overlapping)
        fn.save(tmp_path / "tree", tree)
        for mmap in (False, True):
            found = fn.load(tmp_path / "tree", mmap=mmap)
            assert {leaf.device.type for leaf in optree.tree_leaves(found)} == {"cpu"}
            assert same(found, tree)


# --- vmap


@given(strategies.cases(EVERY_LAYER, dtypes=FLOAT64))
def test_apply_over_parameters(case):
    layer, _, x = case
    each, stacked = members(layer, x)
    if not optree.tree_leaves(stacked):
        return
    y = torch.func.vmap(layer.apply, in_dims=(0, None))(stacked, x)
    close(y, torch.stack([layer.apply(params, x) for params in each]))


@given(strategies.cases(EVERY_LAYER, dtypes=FLOAT64))
def test_apply_over_x(case):
    layer, params, x = case
    xs = variants(x)
    y = torch.func.vmap(layer.apply, in_dims=(None, 0))(params, xs)
    close(y, torch.stack([layer.apply(params, x) for x in xs]))


@given(strategies.cases(EVERY_LAYER, dtypes=FLOAT64), st.booleans())
def test_vjp_over_parameters_x_and_grad(case, input_grad):
    layer, _, x = case
    each, stacked = members(layer, x)
    xs = variants(x)
    grads = fn.normal(fn.key(1), (3, *layer.apply(each[0], x).shape), dtype=torch.float64)

    def vjp(params, x, grad):
        return optree.tree_leaves(layer.vjp(params, x, grad, input_grad=input_grad))

    mapped = torch.func.vmap(vjp)(stacked, xs, grads)
    close(mapped, stack([vjp(*args) for args in zip(each, xs, grads, strict=True)]))


@examples_of_floats
def test_vjp_over_grad_alone(layer, shape, device):
    """Rows of a Jacobian: one x, many grads."""
    params, x, grad = make(layer, shape, dtype=torch.float64, device=device)
    grads, key = torch.stack([grad, -grad, grad.flip(0)]), key_for(layer)
    mapped = torch.func.vmap(lambda grad: layer.vjp(params, x, grad, key=key)[1])(grads)
    close(mapped, torch.stack([layer.vjp(params, x, grad, key=key)[1] for grad in grads]))


@examples_of_floats
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_vjp_in_half_precision(layer, shape, device, dtype):
    """Kernels may take no two dtypes under vmap; the statistics are float32 there, too."""
    params, x, grad = make(layer, shape, dtype=dtype, device=device)
    xs, grads, key = torch.stack([x, x.flip(0)]), torch.stack([grad, -grad]), key_for(layer)
    stacked = stack([params, params])

    def step(params, x, grad):
        y = layer.apply(params, x, key=key)
        return optree.tree_leaves((y, layer.vjp(params, x, grad, key=key)))

    found = torch.func.vmap(step)(stacked, xs, grads)
    expected = stack([step(params, x, grad) for x, grad in zip(xs, grads, strict=True)])
    double = optree.tree_map(torch.Tensor.double, (stacked, xs, grads))
    exact = torch.func.vmap(step)(*double)
    for got, plain, want in zip(found, expected, exact, strict=True):
        assert got.dtype == plain.dtype == dtype
        off, allowed = (got - want).abs().max(), (plain - want).abs().max()
        assert off <= 4 * allowed + 4 * torch.finfo(dtype).eps * want.abs().max()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@examples
def test_a_whole_step_over_parameters(layer, shape, momentum, device):
    """An ensemble trained at once is the networks trained one by one."""
    x, key = draw_x(layer, (2, *shape), torch.float64, device), key_for(layer)
    each, stacked = members(layer, x)
    out = layer.apply(each[0], x, key=key).shape
    target = fn.normal(fn.key(3), out, dtype=torch.float64, device=device)
    value_and_grad = fn.value_and_grad(layer, fn.MSE())
    sgd = fn.SGD(0.1, momentum=momentum, weight_decay=0.01)
    if not optree.tree_leaves(stacked):
        return

    def step(params, velocities):
        value, grads = value_and_grad(params, x, target, key)
        params, state = sgd.step(params, grads, sgd.init(params)._replace(momentum=velocities))
        return value, params, state.momentum

    velocities = [sgd.init(params).momentum for params in each]
    mapped = torch.func.vmap(step)(stacked, stack(velocities))
    close(mapped, stack([step(*args) for args in zip(each, velocities, strict=True)]))


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.jacrev], ids=["grad", "jacrev"])
def test_derivatives_of_steps_over_tasks(transform):
    """As meta-learning takes them: each task's loss after a step, by what the step started from."""
    sgd = fn.SGD(0.1, momentum=0.9, weight_decay=0.1, nesterov=True)
    target = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)

    def loss_after_a_step(w):
        new, _ = sgd.step(w, (w - target) ** 3, sgd.init(w))
        return (new**2).sum()

    tasks = fn.normal(fn.key(0), (4, 3), dtype=torch.float64)
    found = torch.func.vmap(transform(loss_after_a_step))(tasks)
    close(found, torch.stack([torch.func.grad(loss_after_a_step)(task) for task in tasks]))
    w = tasks[0].clone().requires_grad_()
    close(found[0], torch.autograd.grad(loss_after_a_step(w), w)[0])


# --- autograd and torch.func


def inner(one, other):
    return sum((a * b).sum() for a, b in zip(one, other, strict=True))


@settings(max_examples=15)
@given(strategies.cases(EVERY_LAYER, dtypes=FLOAT64, integers=False))
def test_autograd_through_apply(case):
    layer, params, x = case
    leaves, structure = optree.tree_flatten((params, x))
    leaves = [leaf.detach().clone() for leaf in leaves]
    moved = [leaf.requires_grad_() for leaf in leaves if leaf.is_floating_point()]
    y = layer.apply(*structure.unflatten(leaves))
    if not y.requires_grad:
        return
    grad = fn.normal(fn.key(1), y.shape, dtype=torch.float64)
    expected = torch.autograd.grad(y, moved, grad, materialize_grads=True)
    close(optree.tree_leaves(layer.vjp(params, x, grad)), list(expected), rtol=1e-9, atol=1e-9)


@examples_of_floats
def test_torch_func_agrees(layer, shape, device):
    params, x, grad = make(layer, shape, dtype=torch.float64, device=device)
    key = key_for(layer)
    _, vjp = torch.func.vjp(lambda params, x: layer.apply(params, x, key=key), params, x)
    close(layer.vjp(params, x, grad, key=key), vjp(grad))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:An output with one or more")  # in torch's own logsigmoid
@examples_of_floats
def test_forward_derivatives_along_one_direction(layer, shape, device):
    params, x, _ = make(layer, shape, dtype=torch.float64, device=device)
    direction, xs, key = x.flip(0), variants(x), key_for(layer)

    def derivative(x):
        return torch.func.jvp(lambda x: layer.apply(params, x, key=key), (x,), (direction,))

    mapped = torch.func.vmap(derivative)(xs)
    close(mapped, stack([derivative(x) for x in xs]))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:An output with one or more")
@examples_of_floats
def test_dual_numbers_do_as_torch_func(layer, shape, device):
    """In float32 too, where kernels stand in for formulas."""
    key = key_for(layer)
    params, x, grad = make(layer, shape, device=device)
    direction = fn.normal(fn.key(6), x.shape, device=device)

    def values_and_gradients(x):
        return layer.apply(params, x, key=key), layer.vjp(params, x, grad, key=key)

    _, expected = torch.func.jvp(values_and_gradients, (x,), (direction,))
    with forward_ad.dual_level():
        found = values_and_gradients(forward_ad.make_dual(x, direction))
        tangents = [forward_ad.unpack_dual(leaf).tangent for leaf in optree.tree_leaves(found)]
    for tangent, leaf in zip(tangents, optree.tree_leaves(expected), strict=True):
        close(torch.zeros_like(leaf) if tangent is None else tangent, leaf)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@examples_of_floats
def test_gradients_can_be_differentiated(layer, shape, device):
    """Forward along v and backward from w: ⟨w, J·v⟩ = ⟨Jᵀ·w, v⟩ for the Jacobian of a gradient."""
    inputs, key = make(layer, shape, dtype=torch.float64, device=device), key_for(layer)
    leaves, structure = optree.tree_flatten(inputs)

    def gradients(*leaves):
        params, x, grad = structure.unflatten(leaves)
        return tuple(optree.tree_leaves(layer.vjp(params, x, grad, key=key)))

    def along(leaves, seed):
        draws = (fn.normal(fn.key(seed), leaf.shape, dtype=leaf.dtype) for leaf in leaves)
        return tuple(draw.to(device) for draw in draws)

    v = along(leaves, 6)
    found, change = torch.func.jvp(gradients, tuple(leaves), v)
    again, backward = torch.func.vjp(gradients, *leaves)
    w = along(found, 7)
    close(again, found)
    close(inner(w, change), inner(backward(w), v), rtol=1e-9, atol=1e-9)


@examples_of_floats
def test_gradients_can_be_differentiated_by_one_tensor_alone(layer, shape, device):
    """As by all together, in float32, where kernels stand in for formulas."""
    key = key_for(layer)
    leaves, structure = optree.tree_flatten(make(layer, shape, device=device))

    def derivatives(moved):
        starts = [leaf.clone().requires_grad_(i in moved) for i, leaf in enumerate(leaves)]
        found = optree.tree_leaves(layer.vjp(*structure.unflatten(starts), key=key))
        total = sum((leaf.square().sum() for leaf in found), sum(start.sum() for start in starts))
        return torch.autograd.grad(total, [starts[i] for i in moved])

    together = derivatives(range(len(leaves)))
    for i, expected in enumerate(together):
        close(derivatives([i]), [expected], rtol=1e-4, atol=1e-4)


def test_what_apply_returns_may_be_written_over():
    layer = fn.UpsampleConv2d(16, bias=False)
    params, x, grad = make(layer, (3, 4, 4))
    leaf = x.clone().requires_grad_()
    layer.apply(params, leaf).mul_(2).backward(grad)
    close(leaf.grad, layer.vjp(params, x, 2 * grad)[1])


# --- torch.compile. Compiling is slow: few cases, the backend that only traces.


COMPILED = [
    (fn.Conv2d(4, 3, stride=2, padding=1, groups=2), (4, 5, 5)),
    (fn.Conv2d(4, 2, stride=2, method="unfold"), (2, 5, 4)),
    (fn.UpsampleConv2d(3), (2, 3, 3)),
    (
        fn.Sequential(
            fn.Conv2d(4, 2, stride=2), fn.ReLU(), fn.UpsampleConv2d(3, scale=2), fn.Sigmoid()
        ),
        (3, 4, 4),
    ),
]


def compile_whole(function, dynamic=None):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", dynamic=dynamic)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize(("layer", "shape"), COMPILED, ids=lambda value: str(value)[:30])
def test_compiled_apply_and_vjp(layer, shape):
    params, x, grad = make(layer, shape)
    close(compile_whole(layer.apply)(params, x), layer.apply(params, x))
    close(compile_whole(layer.vjp)(params, x, grad), layer.vjp(params, x, grad))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_gradients_of_activations_in_two_layouts():
    """Graphs take the layout of dx from x, where some kernels take it from grad."""
    kinds = fn.ReLU6, fn.Hardtanh, fn.Hardswish, fn.ELU, fn.SELU, fn.Softplus, fn.LogSigmoid
    nets = [fn.Sequential(fn.Linear(3), kind()) for kind in kinds]
    params, x, grad = make(nets[0], (4, 5))
    grad = grad.transpose(1, 2).contiguous().transpose(1, 2)
    gradients = lambda params, x, grad: [net.vjp(params, x, grad) for net in nets]  # noqa: E731
    recorded = make_fx(gradients, tracing_mode="fake")(params, x, grad)
    for graph in (compile_whole(gradients), recorded):
        close(graph(params, x, grad), gradients(params, x, grad))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("layer", [fn.GroupNorm(2), fn.InstanceNorm(affine=True)], ids=repr)
def test_compiled_forward_derivatives_of_norms(layer):
    """Of y, and of a gradient."""
    params, x, v = make(layer, (4, 3, 2), dtype=torch.float64)

    def along(params, x, v):
        apply = lambda x: layer.apply(params, x)  # noqa: E731
        gradient = torch.func.grad(lambda x: apply(x).sin().sum())
        return [torch.func.jvp(function, (x,), (v,)) for function in (apply, gradient)]

    close(compile_whole(along)(params, x, v), along(params, x, v))


GLOBAL = fn.Sequential(fn.Conv2d(8, 3, padding=1), fn.ReLU())


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_for_pictures_of_any_size():
    """A network that is a global: one that a closure holds is traced in another way."""
    params = GLOBAL.init(fn.key(0), (3, 8, 8))
    compiled = compile_whole(lambda params, x: GLOBAL.apply(params, x), dynamic=True)
    for shape in [(2, 3, 8, 8), (3, 3, 8, 8), (5, 3, 10, 9)]:
        x = fn.normal(fn.key(1), shape)
        close(compiled(params, x), GLOBAL.apply(params, x))


@pytest.mark.parametrize("layer", [fn.Linear(2), fn.MultiheadAttention(2)], ids=repr)
def test_compiled_maps_over_batches_of_any_size(layer):
    """`F.linear` fails there for three axes, in PyTorch 2.13."""
    params, x, grad = make(layer, (3, 4), batch=6)
    torch._dynamo.reset()
    for function, inputs in ((layer.apply, [x]), (layer.vjp, [x, grad])):
        mapped = torch.func.vmap(partial(function, params))
        compiled = torch.compile(mapped, fullgraph=True, backend="eager", dynamic=True)
        batches = [part.unflatten(0, (2, 3)) for part in inputs]
        close(compiled(*batches), mapped(*batches))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("combinator", [fn.Product, fn.Sum, fn.Concat])
def test_compiled_branches_for_pictures_of_any_size(combinator, monkeypatch):
    """Results that fit are joined, others are refused with their shapes."""
    net = combinator(fn.ReLU(), fn.Conv2d(3, (4, 3), padding="same"))
    monkeypatch.setitem(globals(), "GLOBAL", net)
    params = net.init(fn.key(0), (3, 8, 8))
    compiled = compile_whole(lambda params, x: GLOBAL.apply(params, x), dynamic=True)
    for shape in [(2, 3, 8, 8), (5, 3, 10, 9)]:
        x = fn.normal(fn.key(1), shape)
        close(compiled(params, x), net.apply(params, x))
    monkeypatch.setitem(globals(), "GLOBAL", combinator(fn.ReLU(), fn.Conv2d(3, 3)))
    compiled = compile_whole(lambda params, x: GLOBAL.apply(params, x), dynamic=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=f"{combinator.__name__} of 2 layers: "):
        compiled(((), fn.Conv2d(3, 3).init(fn.key(0), (3, 8, 8))), x)


FUNCTIONS_OF_NETWORKS = {
    "per_example": lambda net: fn.per_example(net, fn.MSE()),
    "clipped_value_and_grad": lambda net: fn.clipped_value_and_grad(net, fn.MSE(), 0.1),
    "gradients_by_layer": lambda net: (
        lambda *args: [own for _, own in fn.gradients_by_layer(net, fn.MSE())(*args)]
    ),
    "trace": lambda net: lambda *args: [(r.y, r.grad) for r in fn.trace(net, *args)],
    "moments": lambda net: lambda params, x, _, key: fn.moments(net, params, x, key=key),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", FUNCTIONS_OF_NETWORKS)
def test_compiled_functions_of_networks(name):
    net = fn.Sequential(stem=fn.Linear(2), rest=fn.Residual(fn.Sequential(fn.Linear(2), fn.Tanh())))
    params, x, target = make(net, (3,))
    function = FUNCTIONS_OF_NETWORKS[name](net)
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    close(compiled(params, x, target, fn.key(7)), function(params, x, target, fn.key(7)))


@pytest.mark.parametrize("layer", [fn.PReLU(6), fn.Reshape(2, -1), fn.Reshape(6)], ids=repr)
def test_compiled_where_hyperparameters_are_dynamic(layer, monkeypatch):
    """Those of a layer that is a global become numbers without a value, as sizes do."""
    monkeypatch.setitem(globals(), "GLOBAL", layer)
    params, x = layer.init(fn.key(0), (6,)), fn.normal(fn.key(1), (4, 6))
    grad = layer.apply(params, x)
    function = lambda params, x, grad: GLOBAL.vjp(params, x, grad)  # noqa: E731
    compiled = torch.compile(function, backend="eager", fullgraph=True, dynamic=True)
    close(compiled(params, x, grad), function(params, x, grad))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_training_step():
    net, shape = COMPILED[-1]
    params, x, _ = make(net, shape)
    target = fn.uniform(fn.key(6), x.shape)
    value_and_grad, sgd = fn.value_and_grad(net, fn.MSE()), fn.SGD(0.5, momentum=0.9)

    def step(params, state, x, target):
        value, grads = value_and_grad(params, x, target)
        return value, *sgd.step(params, grads, state)

    compiled = compile_whole(step)
    state = sgd.init(params)
    theirs = params, state
    for _ in range(3):
        value, params, state = step(params, state, x, target)
        compiled_value, *theirs = compiled(*theirs, x, target)
        close(compiled_value, value)
        close(theirs, [params, state])


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_step_that_makes_all_it_needs():
    """Network, loss and optimiser; also a loss of a class of which there was none before."""

    @dataclasses.dataclass(frozen=True)
    class New(fn.MSE):
        pass

    def step(x, target):
        convolution = fn.Conv2d(2, 3, bias=False, weight_init=initializer)
        net = fn.Sequential(convolution, fn.Residual(fn.Tanh()))
        params = net.init(fn.key(0), (3, 5, 5))
        optimizer = fn.Partition(lambda path, _: path, {"0.weight": fn.SGD(schedule(0.1, 9))})
        value, grads = fn.value_and_grad(net, New())(params, x, target)
        return value, *optimizer.step(params, grads, optimizer.init(params))

    schedule, initializer = fn.schedules.cosine, fn.initializers.LecunNormal()
    x, target = fn.normal(fn.key(1), (4, 3, 5, 5)), fn.normal(fn.key(2), (4, 2, 3, 3))
    torch._dynamo.reset()
    compiled = torch.compile(step, backend="eager", fullgraph=True, dynamic=True)
    close(compiled(x, target), step(x, target), rtol=1e-5, atol=1e-6)


def test_a_layer_made_in_a_compiled_function_names_itself():
    def function(params, x):
        return fn.Sequential(fn.Conv2d(2, 3, padding=1), fn.Tanh()).apply(params, x)

    params = fn.Sequential(fn.Conv2d(2, 3), fn.Tanh()).init(fn.key(0), (3, 5, 5))
    message = r"Conv2d\(2, kernel_size=3, padding=1\): expected x of shape \(N, 3, H, W\)"
    compiled = torch.compile(function, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=message):
        compiled(params, torch.ones(1, 4, 5, 5))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_layer_made_in_a_compiled_function_that_is_broken_in_two():
    """PyTorch starts again where it breaks, and holds the second run to the first one's calls."""

    @dataclasses.dataclass(frozen=True)
    class New(fn.Linear):
        pass

    def made(x):
        first = New(3)
        y = first.apply(first.init(fn.key(0), (4,)), x)
        torch._dynamo.graph_break()
        second = New(2)
        return second.apply(second.init(fn.key(1), (3,)), y)

    x = fn.normal(fn.key(2), (5, 4))
    torch._dynamo.reset()
    close(torch.compile(made, backend="eager")(x), made(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_layer_of_a_new_class_is_refused_in_a_compiled_function():
    @dataclasses.dataclass(frozen=True)
    class New(fn.Linear):
        repeats: Size = 1

    torch._dynamo.reset()
    made = torch.compile(lambda x: x * New(3, repeats=0).repeats, backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match="New: expected repeats"):
        made(torch.ones(2))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("layer", [fn.Conv2d(16, 3), fn.UpsampleConv2d(16)], ids=str)
def test_compiled_before_it_ever_ran(layer):
    """Under autograd, torch.func.grad and torch.func.vmap, too."""
    layer = dataclasses.replace(layer)
    params, x, _ = make(layer, (3, 4, 4))
    y = layer.apply(params, x)
    leaves = optree.tree_map(lambda leaf: leaf.clone().requires_grad_(), params)
    compiled = compile_whole(dataclasses.replace(layer).apply)(leaves, x)
    close(compiled, y)
    compiled.sum().backward()
    loss = lambda params: layer.apply(params, x).sum()  # noqa: E731
    grads = torch.func.grad(loss)(params)
    close(optree.tree_map(lambda leaf: leaf.grad, leaves), grads)
    close(compile_whole(torch.func.grad(loss))(params), grads)
    over = torch.func.vmap(layer.apply, in_dims=(None, 0))
    close(compile_whole(over)(params, torch.stack([x, x])), torch.stack([y, y]))


NAMED = fn.Sequential(linear=fn.Linear(2), part=fn.Sum(x=fn.Identity()))


WRAPPED = [fn.Repeat(NAMED, 2), fn.Loop(NAMED, 2), fn.Frozen(NAMED), fn.Cast(NAMED, torch.float64)]


@pytest.mark.parametrize("net", WRAPPED, ids=str)
def test_compiled_where_named_layers_have_no_parameters(net):
    """Parameters have dicts without tensors there, which torch.compile cannot follow by optree."""
    params, x = net.init(fn.key(0), (2,)), fn.normal(fn.key(1), (2, 2))
    found = torch.compile(net.vjp, backend="eager", fullgraph=True)(params, x, x)
    expected = net.vjp(params, x, x)
    assert optree.tree_structure(found) == optree.tree_structure(expected)
    close(found, expected, rtol=1e-4, atol=1e-5)


def test_compiled_steps_of_dicts_without_tensors():
    params = {"a": torch.ones(2), "b": {"c": None, "d": [(), {}]}}
    step = fn.SGD(0.1).step
    found, _ = torch.compile(step, backend="eager", fullgraph=True)(
        params, params, fn.SGD(0.1).init(params)
    )
    assert found["b"] == params["b"]
    assert torch.equal(found["a"], torch.full((2,), 0.9))


def test_compiled_steps_where_named_layers_have_no_parameters():
    params, x = NAMED.init(fn.key(0), (2,)), fn.normal(fn.key(1), (2, 2))
    value_and_grad = fn.value_and_grad(NAMED, fn.MSE(), micro_batch=1)
    parts = {"linear.weight": fn.SGD(0.1), "linear.bias": None}
    optimizers = [fn.Adam(), fn.Partition(lambda path, _: path, parts)]

    def steps(params):
        value, grads = value_and_grad(params, x, x)
        grads, norm = fn.clip_by_global_norm(grads, 1.0)
        return value, norm, [each.step(params, grads, each.init(params)) for each in optimizers]

    found = torch.compile(steps, backend="eager", fullgraph=True)(params)
    assert optree.tree_structure(found) == optree.tree_structure(steps(params))
    close(found, steps(params), rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_step_in_place():
    params, grads = {"w": torch.ones(3)}, {"w": torch.ones(3)}
    sgd = fn.SGD(0.5, momentum=0.9)
    compile_whole(sgd.step_)(params, grads, sgd.init(params))
    assert torch.equal(params["w"], torch.full((3,), 0.5))


def can_build():
    """Whether there are a C++ compiler and Python's headers."""
    try:
        # Without its tools, macOS has a g++ that only says so.
        ran = subprocess.run([os.environ.get("CXX", "g++"), "--version"], capture_output=True)
    except OSError:
        return False
    return ran.returncode == 0 and Path(sysconfig.get_path("include"), "Python.h").exists()


needs_a_compiler = pytest.mark.skipif(
    not can_build(), reason="no C++ compiler, or no headers of Python's"
)


@pytest.mark.parametrize("compiler", ["false", "not there"])
def test_what_is_no_compiler(compiler, monkeypatch):
    monkeypatch.setenv("CXX", compiler)
    assert not can_build()


@needs_a_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_updates_by_products_of_matrices():
    """PyTorch's own backend fuses x + A·B, and loses the alpha of x + alpha · A·B."""
    layer = fn.Linear(4)
    params, x, grad = make(layer, (5,))
    optimizers = [
        fn.SGD(0.5),
        fn.SGD(0.5, momentum=0.5, dampening=0.25, weight_decay=0.25),
        fn.SGD(0.5, momentum=0.5, weight_decay=0.25, nesterov=True, maximize=True),
        fn.Adam(weight_decay=0.25),
        fn.RMSprop(weight_decay=0.25, momentum=0.5),
    ]

    def steps(params, x, grad):
        updated = []
        for optimizer in optimizers:
            new, state = params, optimizer.init(params)
            for _ in range(2):
                new, state = optimizer.step(new, layer.vjp(new, x, grad)[0], state)
            updated.append((new, state))
        return updated

    torch._dynamo.reset()
    found = torch.compile(steps, fullgraph=True)(params, x, grad)
    close(found, steps(params, x, grad), rtol=1e-4, atol=1e-5)


@needs_a_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_gradients_of_means_of_windows_beyond_the_padding():
    """PyTorch's own backend divides by all taps of a window there."""
    cases = [
        (fn.AvgPool1d(3, stride=2, padding=1, ceil_mode=True), (2, 6)),
        (fn.AvgPool2d((3, 2), stride=(2, 3), padding=(1, 0), ceil_mode=True), (2, 6, 4)),
        (fn.AvgPool2d(3, stride=2, padding=1, ceil_mode=True, count_include_pad=False), (2, 6, 4)),
        (fn.AvgPool3d(2, stride=2, padding=1, ceil_mode=True), (2, 3, 4, 5)),
    ]

    def gradients(inputs):
        found = []
        for (layer, _), (x, grad) in zip(cases, inputs, strict=True):
            by_autograd = torch.func.vjp(lambda x, layer=layer: layer.apply((), x), x)[1](grad)
            found += [layer.apply((), x), layer.vjp((), x, grad)[1], by_autograd[0]]
        return found

    inputs = [make(layer, shape)[1:] for layer, shape in cases]
    torch._dynamo.reset()
    close(torch.compile(gradients, fullgraph=True)(inputs), gradients(inputs))


@needs_a_compiler
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_compiled_gradients_of_an_empty_batch():
    cases = [
        (fn.Conv1d(4, 3), (2, 8)),
        (fn.Conv2d(4, 3, stride=2, padding=1), (2, 6, 5)),
        (fn.Conv3d(4, 3), (2, 3, 4, 5)),
        (fn.ConvTranspose2d(4, 3), (2, 3, 4)),
    ]

    def gradients(inputs):
        return [layer.vjp(*own) for (layer, _), own in zip(cases, inputs, strict=True)]

    inputs = [make(layer, shape, batch=0) for layer, shape in cases]
    torch._dynamo.reset()
    assert same(torch.compile(gradients, fullgraph=True)(inputs), gradients(inputs))
