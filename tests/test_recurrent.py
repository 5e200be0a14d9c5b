"""RNN, LSTM and GRU: against their formulas, step by step, and PyTorch's kernel."""

import importlib.util
from dataclasses import fields

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_properties import close
from test_transforms import compile_whole, needs_a_compiler
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode

import funcnet as fn
from funcnet import compat
from funcnet.gradients import value_and_grad
from funcnet.ops import processor, recurrent
from funcnet.testing import check_vjp, strategies

CLASSES = (fn.RNN, fn.LSTM, fn.GRU)
LAYERS = strategies.layers(*CLASSES)
DOUBLE = strategies.cases(LAYERS, dtypes=st.just(torch.float64))
SINGLE = strategies.cases(strategies.layers(fn.LSTM), dtypes=st.just(torch.float32))
MULTIPLIES = processor.multiplies_bfloat16(torch.empty(0, dtype=torch.bfloat16))
each_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)


def by_hand(layer, params, x):
    """One step after the other, as the formulas say."""
    for number in range(layer.num_layers):
        ends = ["", "_reverse"] if layer.bidirectional else [""]
        x = torch.cat([_direction(layer, params, x, f"l{number}{end}") for end in ends], -1)
    return x


def _direction(layer, params, x, end):
    w_ih, w_hh = params[f"weight_ih_{end}"], params[f"weight_hh_{end}"]
    b_ih, b_hh = params.get(f"bias_ih_{end}", 0), params.get(f"bias_hh_{end}", 0)
    h = c = x.new_zeros(len(x), layer.hidden_size)
    steps = list(x.unbind(1))
    ys = []
    for step in steps[::-1] if end.endswith("reverse") else steps:
        a, u = step @ w_ih.T + b_ih, h @ w_hh.T + b_hh
        if isinstance(layer, fn.RNN):
            h = torch.tanh(a + u) if layer.nonlinearity == "tanh" else torch.relu(a + u)
        elif isinstance(layer, fn.LSTM):
            i, f, g, o = (a + u).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
        else:
            (a_r, a_z, a_n), (u_r, u_z, u_n) = a.chunk(3, -1), u.chunk(3, -1)
            r, z = (a_r + u_r).sigmoid(), (a_z + u_z).sigmoid()
            n = (a_n + r * u_n).tanh()
            h = (1 - z) * n + z * h
        ys.append(h)
    return torch.stack(ys[::-1] if end.endswith("reverse") else ys, 1)


def without_kernel(patch):
    patch.setattr(recurrent, "kernel_is_there", lambda: False)


class Products(TorchDispatchMode):
    """Counts the products of matrices."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += str(function) in ("aten.mm.default", "aten.addmm.default")
        return function(*args, **(kwargs or {}))


def products(call):
    with Products() as counter:
        call()
    return counter.count


@given(DOUBLE)
def test_value_and_gradients_are_those_of_the_formula(case):
    layer, params, x = case
    leaves = optree.tree_map(lambda leaf: leaf.clone().requires_grad_(), (params, x))
    y = by_hand(layer, *leaves)
    torch.testing.assert_close(layer.apply(params, x), y.detach(), rtol=1e-10, atol=1e-10)
    grad = fn.normal(fn.key(1), y.shape, dtype=x.dtype)
    expected = torch.autograd.grad(y, optree.tree_leaves(leaves), grad)
    close(layer.vjp(params, x, grad), list(expected), rtol=1e-10, atol=1e-10)


# --- PyTorch's kernel for the LSTM


@given(SINGLE)
def test_kernel_and_steps_give_the_same_numbers(case):
    layer, params, x = case
    y = layer.apply(params, x)
    grad = fn.normal(fn.key(1), y.shape)
    gradients = layer.vjp(params, x, grad)
    with pytest.MonkeyPatch.context() as patch:
        without_kernel(patch)
        close(layer.apply(params, x), y)
        close(layer.vjp(params, x, grad), gradients, rtol=1e-4, atol=1e-5)


def lstm_case(dtype=torch.float32, **options):
    layer = fn.LSTM(4, **options)
    params = layer.init(fn.key(0), (5, 3), dtype=dtype)
    x = fn.normal(fn.key(1), (2, 5, 3), dtype=dtype)
    grad = fn.normal(fn.key(2), (2, *layer.out_shape((5, 3))), dtype=dtype)
    return layer, params, x, grad


def test_the_kernel_is_used():
    """Or the tests of this section test nothing."""
    layer, params, x, grad = lstm_case()
    _, residuals = layer.fwd(params, x)
    assert isinstance(residuals[1][0][2][0], recurrent.Workspace)
    assert products(lambda: layer.bwd(params, residuals, grad)) == 0


@pytest.mark.filterwarnings("ignore:TF32 acceleration")  # which flags() sets, too
def test_the_kernel_is_not_used_where_onednn_is_switched_off():
    layer, params, x, _ = lstm_case()
    with torch.backends.mkldnn.flags(enabled=False):
        _, (_, residuals) = layer.fwd(params, x)
    assert not isinstance(residuals[0][2][0], recurrent.Workspace)


def test_the_kernel_is_not_there_where_torch_lacks_it(monkeypatch):
    monkeypatch.setattr(compat, "mkldnn_rnn", None)
    spec = importlib.util.spec_from_file_location(recurrent.__name__, recurrent.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert not module._IS_THERE


def test_the_kernel_is_not_used_where_it_is_not_there(monkeypatch):
    monkeypatch.setattr(recurrent, "_IS_THERE", False)
    layer, params, x, _ = lstm_case()
    _, (_, residuals) = layer.fwd(params, x)
    assert not isinstance(residuals[0][2][0], recurrent.Workspace)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_grad_mode_does_not_matter(context):
    """The kernel asks it whether to make a workspace."""
    layer, params, x, grad = lstm_case(bidirectional=True)
    expected = layer.vjp(params, x, grad)
    with context():
        gradients = layer.vjp(params, x, grad)
    close(gradients, expected)


@each_class
def test_no_grad_is_respected(cls):
    layer = cls(3)
    params = layer.init(fn.key(0), (4, 2))
    params = {name: leaf.requires_grad_() for name, leaf in params.items()}
    x = torch.zeros(2, 4, 2)
    with torch.no_grad():
        y, residuals = layer.fwd(params, x)
        results = y, residuals, layer.bwd(params, residuals, y)
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves(results))
    assert layer.apply(params, x).requires_grad


def test_bwd_leaves_the_workspace_as_it_is():
    """The kernel writes to it. A training, which owns it, lets that happen."""
    layer, params, x, grad = lstm_case(num_layers=2)
    _, residuals = layer.fwd(params, x)
    kept = [leaf.clone() for leaf in optree.tree_leaves(residuals)]
    first = layer.bwd(params, residuals, grad)
    assert all(map(torch.equal, optree.tree_leaves(residuals), kept))
    close(layer.bwd(params, residuals, grad), first, rtol=0, atol=0)
    target = torch.zeros_like(grad)
    net = fn.Sequential(layer)
    value, (dparams,) = value_and_grad(net, fn.MSE("sum"))((params,), x, target)
    y = layer.apply(params, x)
    close(dparams, layer.vjp(params, x, 2 * y)[0])
    torch.testing.assert_close(value, (y * y).sum())


def test_what_the_kernel_has_kept_serves_vmap_and_autograd():
    layer, params, x, grad = lstm_case(bidirectional=True)
    _, residuals = layer.fwd(params, x)
    mapped = torch.func.vmap(lambda g: layer.bwd(params, residuals, g))(torch.stack((grad, -grad)))
    expected = layer.bwd(params, residuals, grad)
    close(optree.tree_map(lambda leaf: leaf[0], mapped), expected, rtol=1e-4, atol=1e-5)
    tracked = grad.clone().requires_grad_()
    _, dx = layer.bwd(params, residuals, tracked)
    (tangent,) = torch.autograd.grad(dx, tracked, x)  # of y along x, since dx is linear in grad
    torch.testing.assert_close((tangent * grad).sum(), (x * expected[1]).sum())


def test_what_the_steps_have_kept_serves_where_the_kernel_could_go_back():
    layer, params, x, grad = lstm_case(bidirectional=True)
    _, residuals = layer.fwd(params, x.clone().requires_grad_())
    with torch.no_grad():
        found = layer.bwd(params, residuals, grad)
    close(found, layer.vjp(params, x, grad), rtol=1e-4, atol=1e-5)


def test_gradients_of_each_example_in_float32():
    """The kernel adds them up."""
    layer, params, x, target = lstm_case()
    norms = fn.gradient_norms(layer, fn.MSE("sum"))
    double = optree.tree_map(torch.Tensor.double, (params, x, target))
    close(norms(params, x, target), norms(*double), rtol=1e-4, atol=1e-5, check_dtype=False)


def test_the_kernels_gradients_lie_in_memory_of_their_own():
    """That of both biases is the same."""
    layer, params, x, grad = lstm_case()
    dparams, _ = layer.vjp(params, x, grad)
    assert len({leaf.data_ptr() for leaf in dparams.values()}) == 4


def test_one_layer_that_the_kernel_does_not_take_widens_all():
    layer, params, x, _ = lstm_case(torch.bfloat16, num_layers=2)
    params["weight_ih_l1"].requires_grad_()
    _, (_, residuals) = layer.fwd(params, x)
    assert residuals[0][0].dtype == torch.float32


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_that_are_not_contiguous(dtype, reverse):
    layer, params, x, grad = lstm_case(dtype, bidirectional=reverse)
    expected = layer.apply(params, x), layer.vjp(params, x, grad)
    params, x, grad = optree.tree_map(
        lambda leaf: leaf.mT.contiguous().mT if leaf.ndim > 1 else leaf, (params, x, grad)
    )
    close((layer.apply(params, x), layer.vjp(params, x, grad)), expected)


def test_a_processor_without_bfloat16(monkeypatch):
    """Its kernel is asked for float32."""
    monkeypatch.setattr(processor, "HAS_BFLOAT16", False)
    layer, params, x, _ = lstm_case(torch.bfloat16)
    _, (_, residuals) = layer.fwd(params, x)
    assert residuals[0][0].dtype == torch.float32


@pytest.mark.skipif(not MULTIPLIES, reason="the processor does not multiply in bfloat16")
def test_what_the_kernel_has_kept_serves_vmap_in_bfloat16():
    """By float32, which is more exact: the kernel has no rule for vmap."""
    layer, params, x, grad = lstm_case(torch.bfloat16, num_layers=2, bidirectional=True)
    _, residuals = layer.fwd(params, x)
    assert all(
        isinstance(kept, recurrent.Workspace) for _, _, both in residuals[1] for kept in both
    )
    assert all(x.dtype == h.dtype == torch.bfloat16 for x, h, _ in residuals[1])
    mapped = torch.func.vmap(lambda g: layer.bwd(params, residuals, g))(grad[None])
    expected = layer.bwd(params, residuals, grad)
    for found, kernels in zip(*map(optree.tree_leaves, (mapped, expected)), strict=True):
        assert found.dtype == torch.bfloat16
        assert (found[0] - kernels).norm() <= 0.02 * kernels.norm()


def test_second_derivatives_by_the_weights_of_one_direction():
    """The other direction's h is a part of a tensor that autograd tracks."""
    layer, params, x, grad = lstm_case(bidirectional=True)
    name = "weight_hh_l0_reverse"

    def second(*tracked):
        own = {**params, **{name: params[name].clone().requires_grad_() for name in tracked}}
        dparams, dx = layer.vjp(own, x, grad)
        penalty = sum(d.square().sum() for d in (*dparams.values(), dx))
        return torch.autograd.grad(penalty, own[name])

    close(second(name), second(*params))


@pytest.mark.skipif(not MULTIPLIES, reason="the processor does not multiply in bfloat16")
def test_what_the_kernel_has_kept_serves_autograd_in_bfloat16():
    layer, params, x, grad = lstm_case(torch.bfloat16)
    _, residuals = layer.fwd(params, x)
    _, expected = layer.bwd(params, residuals, grad)
    _, dx = layer.bwd(params, residuals, grad.clone().requires_grad_())
    assert dx.dtype == torch.bfloat16
    assert (dx - expected).norm() <= 0.02 * expected.norm()


@pytest.mark.parametrize(("num_layers", "bidirectional"), [(2, False), (1, True)])
def test_as_exact_as_autocast(num_layers, bidirectional):
    layer = fn.LSTM(16, num_layers, bidirectional=bidirectional)
    params = layer.init(fn.key(0), (100, 8))
    x, grad = (
        fn.normal(fn.key(1), (16, 100, 8)),
        fn.normal(fn.key(2), (16, *layer.out_shape((100, 8)))),
    )
    double = optree.tree_map(torch.Tensor.double, (params, x, grad))
    exact = layer.apply(*double[:2]), *layer.vjp(*double)
    cast = fn.Cast(layer, torch.bfloat16)
    ours = cast.apply(params, x), *cast.vjp(params, x, grad)

    module = torch.nn.LSTM(8, 16, num_layers, batch_first=True, bidirectional=bidirectional)
    module.load_state_dict(params)
    inputs = [*map(module.get_parameter, params), x.clone().requires_grad_()]
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = module(inputs[-1])
    *gradients, dx = torch.autograd.grad(y.float(), inputs, grad)
    theirs = y, dict(zip(params, gradients, strict=True)), dx
    for mine, other, right in zip(*map(optree.tree_leaves, (ours, theirs, exact)), strict=True):
        assert (mine - right).norm() <= 1.05 * (other - right).norm()


# --- Awkward shapes and dtypes


@each_class
@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_one_step_and_a_batch_of_nothing(cls, bidirectional, bias, dtype):
    layer = cls(3, num_layers=2, bias=bias, bidirectional=bidirectional)
    params = layer.init(fn.key(0), (1, 2), dtype=dtype)
    x = fn.normal(fn.key(1), (2, 1, 2), dtype=dtype)
    torch.testing.assert_close(layer.apply(params, x), by_hand(layer, params, x))
    check_vjp(layer, params, x)
    dparams, dx = layer.vjp(params, x[:0], layer.apply(params, x[:0]))
    assert dx.shape == (0, 1, 2)
    assert not any(leaf.any() for leaf in optree.tree_leaves(dparams))


@each_class
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rounds_once(cls, dtype, monkeypatch):
    """Computed in float32: 200 steps are as exact as one."""
    without_kernel(monkeypatch)
    layer = cls(8, num_layers=2)
    params = layer.init(fn.key(0), (200, 4), dtype=dtype)
    x = fn.normal(fn.key(1), (2, 200, 4), dtype=dtype)
    grad = fn.normal(fn.key(2), (2, 200, 8), dtype=dtype)
    results = layer.apply(params, x), layer.vjp(params, x, grad)
    double = optree.tree_map(torch.Tensor.double, (params, x, grad))
    expected = layer.apply(*double[:2]), layer.vjp(*double)
    for ours, exact in zip(*map(optree.tree_leaves, (results, expected)), strict=True):
        assert ours.dtype == dtype
        bound = torch.finfo(dtype).eps * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= bound


@each_class
def test_saturated_gates(cls):
    """Inputs of ±10⁴ give ±1, no NaN, and a gradient of 0 through what is saturated."""
    layer = cls(3)
    params = layer.init(fn.key(0), (4, 2))
    x = 1e4 * fn.normal(fn.key(1), (2, 4, 2)).sign()
    y = layer.apply(params, x)
    dparams, dx = layer.vjp(params, x, torch.ones_like(y))
    assert all(leaf.isfinite().all() for leaf in optree.tree_leaves((y, dparams, dx)))
    assert y.abs().max() <= 1


@each_class
def test_residuals_are_no_larger_than_what_autograd_saves(cls):
    """Gates and states: in float64 the formulas', in float32 the LSTM's are the kernel's."""
    size = 16
    layer = cls(size)
    params = layer.init(fn.key(0), (10, size), dtype=torch.float64)
    x = torch.zeros(3, 10, size, dtype=torch.float64)
    _, residuals = layer.fwd(params, x)
    storages = {leaf.untyped_storage() for leaf in optree.tree_leaves(residuals)}
    kept = sum(storage.nbytes() for storage in storages) // 8
    states = {fn.RNN: 1, fn.LSTM: 6, fn.GRU: 5}[cls]  # h; i, f, g, o, c; r, z, n, u_n
    assert kept <= x.numel() + states * 3 * 10 * size


@each_class
def test_products_that_nobody_asks_for_are_not_computed(cls):
    layer = cls(3, num_layers=2, bidirectional=True)
    params = layer.init(fn.key(0), (4, 5), dtype=torch.float64)
    x, grad = torch.zeros(2, 4, 5).double(), torch.zeros(2, 4, 6).double()
    _, residuals = layer.fwd(params, x)

    def count(**needs):
        return products(lambda: layer.bwd(params, residuals, grad, **needs))

    assert count(input_grad=False) == count() - 2  # a direction of the first layer has one
    assert count(param_grad=False) == count() - 8  # every direction has two


def test_inference_keeps_nothing():
    layer, params, x, _ = lstm_case()
    weights = layer._weights(params)
    assert recurrent.forward(recurrent.LSTM(), x, weights, keep=False)[1] == []


@each_class
def test_autograd_may_follow_twice(cls):
    layer = cls(2, bidirectional=True)
    params = layer.init(fn.key(0), (3, 2), dtype=torch.float64)
    x = fn.normal(fn.key(1), (2, 3, 2), dtype=torch.float64).requires_grad_()
    torch.autograd.gradgradcheck(lambda x: layer.apply(params, x), (x,))


# --- Parameters and errors


@each_class
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("bidirectional", [False, True])
def test_parameters_have_torchs_names_order_and_distribution(cls, bias, bidirectional):
    layer = cls(40, num_layers=2, bias=bias, bidirectional=bidirectional)
    params = layer.init(fn.key(0), (3, 5))
    theirs = getattr(torch.nn, cls.__name__)(
        5, 40, 2, bias=bias, batch_first=True, bidirectional=bidirectional
    )
    named = dict(theirs.named_parameters())
    assert [*params] == [*named]
    assert [leaf.shape for leaf in params.values()] == [leaf.shape for leaf in named.values()]
    drawn = torch.cat([leaf.flatten() for leaf in params.values()])
    bound = 40**-0.5
    assert 0.99 * bound < drawn.abs().max() <= bound
    assert abs(drawn.mean()) < 0.02 * bound
    assert abs(drawn.std() / (bound / 3**0.5) - 1) < 0.02


# --- torch.compile: one operation for all steps


COMPILED = [
    fn.RNN(3, nonlinearity="relu", bias=False),
    fn.RNN(3, num_layers=2, bidirectional=True),
    fn.LSTM(3, bias=False),
    fn.LSTM(3, num_layers=2, bidirectional=True),
    fn.GRU(3, bias=False),
    fn.GRU(3, num_layers=2, bidirectional=True),
]
without_warnings = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


def numbers(layer, steps, dtype=torch.float32, examples=2):
    params = layer.init(fn.key(0), (steps, 2), dtype=dtype)
    x = fn.normal(fn.key(1), (examples, steps, 2), dtype=dtype)
    return params, x, fn.normal(fn.key(2), (examples, *layer.out_shape((steps, 2))), dtype=dtype)


@without_warnings
@pytest.mark.parametrize(
    ("layer", "dtype"),
    [
        *((layer, torch.float32) for layer in COMPILED),
        (COMPILED[2], torch.float64),
        (COMPILED[4], torch.bfloat16),
    ],
    ids=str,
)
def test_compiled_once_for_every_length(layer, dtype):
    def run(params, x, grad):
        y, residuals = layer.fwd(params, x)
        return (
            y,
            layer.apply(params, x),
            layer.bwd(params, residuals, grad),
            layer.bwd(params, residuals, grad, input_grad=False),  # so it does not use them up
            layer.vjp(params, x, grad, param_grad=False),
        )

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, fullgraph=True, backend=counter, dynamic=True)
    for steps, examples in ((5, 7), (4, 6), (70, 11)):  # first, no two sizes are the same
        arguments = numbers(layer, steps, dtype, examples)
        close(compiled(*arguments), run(*arguments))
    assert counter.frame_count == 1


@without_warnings
@pytest.mark.parametrize("layer", COMPILED[::2], ids=str)
def test_what_is_compiled_and_what_is_not_take_each_others_residuals(layer):
    params, x, grad = numbers(layer, 4)
    expected = layer.vjp(params, x, grad)
    fwd, bwd = compile_whole(layer.fwd), compile_whole(layer.bwd)
    for one, other in ((fwd, bwd), (fwd, layer.bwd), (layer.fwd, bwd)):
        _, residuals = one(params, x)
        for _ in range(2):
            close(other(params, residuals, grad), expected)


@without_warnings
@pytest.mark.parametrize("layer", COMPILED[::2], ids=str)
def test_compiled_under_autograd_and_torch_func(layer):
    params, x, grad = numbers(layer, 3)
    leaves = optree.tree_map(lambda leaf: leaf.clone().requires_grad_(), params)
    y = compile_whole(layer.apply)(leaves, x)
    found = torch.autograd.grad(y, optree.tree_leaves(leaves), grad)
    close(list(found), layer.vjp(params, x, grad)[0])

    def by_func(params, x):
        several = torch.func.vmap(layer.apply, (None, 0))(params, torch.stack([x, x]))
        return several, torch.func.grad(lambda x: layer.apply(params, x).sum())(x)

    close(compile_whole(by_func)(params, x), by_func(params, x))
    of_each = fn.per_example(fn.Sequential(layer, fn.Select(1, -1)), fn.MSE())
    target = grad[:, -1]
    close(compile_whole(of_each)((params, ()), x, target), of_each((params, ()), x, target))


@pytest.mark.parametrize("layer", COMPILED[::2], ids=str)
def test_an_exported_program_runs_without_funcnet(layer):
    class Exported(torch.nn.Module):
        def forward(self, params, x):
            return layer.apply(params, x)

    params, x, _ = numbers(layer, 3)
    program = torch.export.export(Exported(), (params, x))
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert not any("funcnet" in name for name in called)
    close(program.module()(params, x), layer.apply(params, x))


@needs_a_compiler
@without_warnings
@pytest.mark.parametrize("layer", COMPILED[2:5:2], ids=str)
def test_compiled_gradients_of_the_same_twice(layer):
    """The backward pass uses up what is kept, which a compiler may think the same."""
    params, x, grad = numbers(layer, 4)

    def twice(params, x, grad):
        return [fn.value_and_grad(layer, fn.MSE())(params, x, c * grad) for c in (1, 2)]

    torch._dynamo.reset()
    close(torch.compile(twice, fullgraph=True)(params, x, grad), twice(params, x, grad))


def test_the_compiled_operations_are_what_they_are_said_to_be():
    """Shapes, dtypes, strides and what is written to, on meta as on the CPU."""
    from funcnet.ops import recurrent_op

    ops = torch.ops.funcnet
    x, h, dh = (torch.randn(4, 2, size) for size in (5, 3, 3))
    for name, cell in recurrent_op._CELLS.items():
        rows = {"LSTM": 12, "GRU": 9}.get(name, 3)
        weights = [torch.randn(shape) for shape in ((rows, 5), (rows, 3), (rows,), (rows,))]
        for own in (weights, weights[:2]):
            torch.library.opcheck(ops.recurrent, (name, False, x, own, True, True))
            kept = [torch.rand(4, 2, 3) for _ in range(cell.keeps)]
            torch.library.opcheck(
                ops.recurrent_backward, (name, x, h, kept, dh, own, True, True, True)
            )


@each_class
def test_defaults_are_torchs(cls):
    twin, layer = getattr(torch.nn, cls.__name__)(2, 3), cls(3)
    for field in fields(layer):
        assert getattr(layer, field.name) == getattr(twin, field.name)


def test_arguments_have_torchs_order():
    assert fn.RNN(3, 2, "relu", False, True) == fn.RNN(
        3, num_layers=2, nonlinearity="relu", bias=False, bidirectional=True
    )
    assert fn.LSTM(3, 2, False, True) == fn.LSTM(3, num_layers=2, bias=False, bidirectional=True)
    assert repr(fn.GRU(3, bidirectional=True)) == "GRU(3, bidirectional=True)"


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"LSTM: expected hidden_size >= 1, got 0"):
        fn.LSTM(0)
    with pytest.raises(ValueError, match=r'RNN: expected nonlinearity to be "tanh" or "relu", got'):
        fn.RNN(3, nonlinearity="sigmoid")
    with pytest.raises(TypeError, match=r"GRU: expected bidirectional to be True or False, got 1"):
        fn.GRU(3, bidirectional=1)
    layer = fn.GRU(3)
    for shape in ((0, 2), (4, 0)):
        with pytest.raises(
            ValueError, match=r"GRU\(3\): expected at least one step and one channel"
        ):
            layer.out_shape(shape)
    params = layer.init(fn.key(0), (4, 2))
    with pytest.raises(ValueError, match=r"expected at least one step"):
        layer.apply(params, torch.zeros(1, 0, 2))
    with pytest.raises(ValueError, match=r"expected x of shape \(N, T, 2\), got \(1, 4, 5\)"):
        layer.apply(params, torch.zeros(1, 4, 5))
    with pytest.raises(ValueError, match=r"expected x of shape \(N, T, C\), got \(4, 2\)"):
        layer.apply(params, torch.zeros(4, 2))
