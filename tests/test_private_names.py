"""Private names of torch: all of them in funcnet/compat.py, and what funcnet does without them."""

import ast
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import forward_ad
from without_private_names import COMPAT, UNDOCUMENTED, is_private, load, results, taken_away

from funcnet import compat

ROOT = Path(__file__).parents[1]
GONE, _ = load(is_private)
close = partial(torch.testing.assert_close, rtol=1e-12, atol=1e-14, equal_nan=True)


# --- Where they are

SOURCES = {path: path.read_text("utf-8") for path in sorted((ROOT / "funcnet").rglob("*.py"))}
OF_OTHERS = {"_replace", "_fields", "_make", "_asdict", "__GLOBAL_NAMESPACE", "_reverse"}
"""Of named tuples, one of optree, and the end of a parameter's name."""


def defined(source):
    """The names that a module defines itself, its classes' attributes among them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Call | ast.Subscript) and "self.__dict__" in ast.unparse(node):
            yield from (x.value for x in ast.walk(node) if isinstance(x, ast.Constant))


OURS = {
    name for path, source in SOURCES.items() if path != COMPAT for name in defined(source)
} | OF_OTHERS


def private_names(source):
    """Names of others that a source reads as attributes, imports, or spells in a string."""
    tree = ast.parse(source)
    of_torch = set(modules_of_torch(tree))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):  # only its start may start a name
            prose |= set(map(id, node.values[1:]))
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            is_torchs = ast.unparse(node).partition(".")[0] in of_torch
            if is_private(node.attr) and (is_torchs or node.attr not in OURS):
                yield node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            parts = [module, *(alias.name for alias in node.names)]
            if any("torch" in part.split(".") for part in parts):
                yield from filter(is_private, ".".join(parts).split("."))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [] if id(node) in prose or " " in node.value else node.value.split(".")
            yield from (name for name in names if is_spelled(name))


def is_spelled(name):
    return name.isidentifier() and is_private(name) and name not in OURS


def modules_of_torch(tree):
    """The names by which a module knows torch, its modules and other parts."""
    yield from ("torch", "Tensor", "nn", "F")
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = getattr(node, "module", None) or ""
            for alias in node.names:
                if f"{module}.{alias.name}".strip(".").startswith("torch"):
                    yield alias.asname or alias.name.partition(".")[0]
        elif isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("torch."):
            yield from (target.id for target in node.targets if isinstance(target, ast.Name))


def test_no_other_module_has_any():
    found = {path: [*private_names(source)] for path, source in SOURCES.items()}
    assert found.pop(COMPAT)
    assert {path: names for path, names in found.items() if names} == {}


@pytest.mark.parametrize(
    "planted",
    [
        "torch._softmax_backward_data(dy, y, 0, y.dtype)",
        "kernel = torch.ops.aten._prelu_kernel.default",
        "aten = torch.ops.aten\nkernel = aten._softmax",
        "torch.ops.aten.mkldnn_rnn_layer.default",
        "torch._C._functorch.peek_interpreter_stack()",
        'getattr(torch, "_foreach_" + name)',
        'getattr(torch, f"_foreach_{name}_")',
        'settings = {"_qkv_same_embed_dim": True}',
        "x._version",
        "module._modules",
        "torch._fwd",  # a name that funcnet has, too
        "from torch.nn import modules as m\nm.x._fwd",
        "from torch.utils import _pytree",
        "from torch._C import Graph",
        "import torch._dynamo",
        "import torch.utils._pytree as pytree",
    ],
)
def test_any_is_found(planted):
    assert [*private_names(planted)]


@pytest.mark.parametrize(
    "harmless",
    [
        "layer._fwd(params, x, key)",
        "spec._replace(shape=())",
        "torch.ops.aten.elu_backward.default",
        '"""torch._C and _prelu_kernel."""',
        "type(x).__name__",
        'f"{kind}_l{i}"',
        "from funcnet.tree import _public",
    ],
)
def test_nothing_else_is(harmless):
    assert [*private_names(harmless)] == []


def test_this_torch_has_them_all():
    """Where one is gone, funcnet is right, but slower: its line may go from compat.py."""
    _, lookups = load(lambda name: False)
    assert [path for path, value in lookups.found.items() if value is None] == []
    assert {path.rpartition(".")[2] for path in lookups.found} >= UNDOCUMENTED


# --- What stands in for each

axes = st.integers(-3, 2)
shapes = st.tuples(*[st.integers(1, 4)] * 3)
seeds = st.integers(0, 2**16)


def normal(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    made = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return made if len(made) > 1 else made[0]


@given(shapes, axes, seeds)
def test_softmax(shape, dim, seed):
    dy, x = normal(seed, shape, shape)
    for name, y in (("softmax", x.softmax(dim)), ("log_softmax", x.log_softmax(dim))):
        kernel, formula = (getattr(of, f"{name}_backward") for of in (compat, GONE))
        close(formula(dy, y, dim, y.dtype), kernel(dy, y, dim, y.dtype))
        half = dy.bfloat16(), y.bfloat16(), dim, torch.bfloat16
        torch.testing.assert_close(formula(*half), kernel(*half))


@given(shapes, seeds)
def test_prelu(shape, seed):
    dy, x, weight = normal(seed, shape, shape, (1, shape[1], 1))
    x[0, 0, 0] = 0
    close(GONE.prelu(x, weight), compat.prelu(x, weight))
    close(GONE.prelu_backward(dy, x, weight), compat.prelu_backward(dy, x, weight))
    dy, weight = dy + torch.inf, weight + torch.inf  # 0 · ∞ is no number
    close(GONE.prelu(x, weight), compat.prelu(x, weight))
    close(GONE.prelu_backward(dy, x, weight), compat.prelu_backward(dy, x, weight))


@given(st.data(), st.sampled_from([4, 5]), seeds)
def test_adaptive_average(data, rank, seed):
    size = data.draw(st.tuples(*[st.integers(1, 6)] * (rank - 2)))
    after = data.draw(st.tuples(*[st.integers(1, 7)] * (rank - 2)))
    x, dy = normal(seed, (2, 3, *size), (2, 3, *after))
    close(GONE.adaptive_average[rank](x, after), compat.adaptive_average[rank](x, after))
    formula, kernel = (of.adaptive_average_backward[rank] for of in (GONE, compat))
    close(formula(dy, x), kernel(dy, x))
    half = dy.bfloat16(), x.bfloat16()
    torch.testing.assert_close(formula(*half), kernel(*half), rtol=0.02, atol=0.02)


OPERANDS = {
    "add": ("list",),
    "addcdiv": ("list", "list"),
    "addcmul": ("list", "list"),
    "div": ("number",),
    "lerp": ("list", "number"),
    "maximum": ("list",),
    "mul": ("number",),
    "neg": (),
    "sqrt": (),
    "sub": ("list",),
}


@given(st.lists(shapes, min_size=1, max_size=3), seeds)
def test_foreach(shapes, seed):
    assert OPERANDS.keys() == compat.foreach.keys() == compat.foreach_.keys()

    def tensors(seed):
        return [normal(seed + i, shape).abs() + 0.1 for i, shape in enumerate(shapes)]

    for name, kinds in OPERANDS.items():
        others = [tensors(seed + 10 + i) if kind == "list" else 0.3 for i, kind in enumerate(kinds)]
        close(
            GONE.foreach[name](tensors(seed), *others),
            [*compat.foreach[name](tensors(seed), *others)],
        )
        written, by_kernel = tensors(seed), tensors(seed)
        GONE.foreach_[name](written, *others)
        compat.foreach_[name](by_kernel, *others)
        close(written, by_kernel)
    close(
        GONE.foreach_norm(tensors(seed), 2.0, torch.float64),
        [*compat.foreach_norm(tensors(seed), 2.0, torch.float64)],
    )


def test_lists_of_different_lengths_are_refused():
    one, two = [torch.ones(2)], [torch.ones(2), torch.ones(2)]
    for of in (compat, GONE):
        for operation in (of.foreach["add"], of.foreach_["add"]):
            for lists in ((one, two), (two, one)):
                with pytest.raises((RuntimeError, ValueError)):
                    operation(*lists)


def test_norms_in_a_wider_dtype():
    xs = [torch.full((1000,), 200.0, dtype=torch.float16)]
    for of in (compat, GONE):
        (norm,) = of.foreach_norm(xs, 2.0, torch.float32)
        close(norm, torch.tensor(4e7).sqrt(), rtol=1e-6)


def test_kernels_that_have_no_stand_in_are_none():
    names = ("flash_attention", "mkldnn_rnn", "fused_adam")
    also = ("flash_attention_backward", "mkldnn_rnn_backward", "fused_adamw")
    assert [getattr(GONE, name) for name in (*names, *also)] == [None] * 6
    only_one, _ = load(lambda name: name in ("_fused_adamw_", "mkldnn_rnn_layer_backward"))
    assert only_one.fused_adam is None
    assert only_one.mkldnn_rnn is None
    assert only_one.flash_attention is not None


def test_adams_kernel_is_not_adamws():
    assert (compat.fused_adam, compat.fused_adamw) == (torch._fused_adam_, torch._fused_adamw_)


@pytest.mark.filterwarnings("ignore:TF32")
def test_mkldnn_that_is_switched_off():
    for enabled in (True, False):
        with torch.backends.mkldnn.flags(enabled=enabled):
            assert GONE.is_mkldnn_enabled() is compat.is_mkldnn_enabled() is enabled


def jvp(function, x):
    return torch.func.jvp(function, (x,), (x,))


TRANSFORMATIONS = {
    "none": lambda function, x: function(x),
    "vmap": lambda function, x: torch.func.vmap(function)(x),
    "grad": lambda function, x: torch.func.grad(function)(x),
    "vjp": lambda function, x: torch.func.vjp(function, x),
    "jvp": jvp,
    "functionalize": lambda function, x: torch.func.functionalize(function)(x),
    "vmap of grad": lambda function, x: torch.func.vmap(torch.func.grad(function))(x),
    "autograd": lambda function, x: function(x.requires_grad_()),
}


# Forward mode compiles by torch.jit.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_questions_about_transformations(name):
    answers = []

    def function(x):
        for of in (compat, GONE):
            inner, outer = of.is_transformed(x), of.is_transformed(outside)
            answers.append((of.innermost_transformation() is not None, inner, outer))
        maps.append((compat.none_but_vmap(), GONE.none_but_vmap()))
        return x.sum()

    maps = []
    outside = torch.ones(2)
    TRANSFORMATIONS[name](function, torch.ones(2, 3))
    is_one = name not in ("none", "autograd")
    assert answers == [(is_one, is_one, False)] * 2
    assert maps == [(not is_one or name == "vmap", not is_one)]
    assert GONE.innermost_transformation() is None


# Forward mode compiles by torch.jit.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("of", [compat, GONE])
def test_questions_about_dual_numbers(of):
    assert of.dual_level(forward_ad) < 0
    with forward_ad.dual_level():
        assert of.dual_level(forward_ad) >= 0
    assert of.dual_level(forward_ad) < 0


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_tensors_of_other_kinds_are_not_transformed():
    ones = torch.ones(2)
    nested = torch.nested.nested_tensor([ones, torch.ones(3)])
    others = [nn.Parameter(ones), ones.to("meta"), ones.to_sparse(), torch.ones(0), nested]
    for of in (compat, GONE):
        assert [of.is_transformed(x) for x in others] == [False] * len(others)


DTYPES = [torch.float64, torch.bfloat16, torch.complex64, torch.int64]


@given(shapes, seeds, st.sampled_from(DTYPES))
def test_a_write_gives_another_version(shape, seed, dtype):
    for of in (compat, GONE):
        for x in (normal(seed, shape).to(dtype), normal(seed, shape).to(dtype).transpose(0, 2)):
            before = of.version(x)
            assert of.version(x) == before
            x.view(-1)[-1:].add_(1) if x.is_contiguous() else x[0, 0, 0].add_(1)
            assert of.version(x) != before


def test_a_write_of_equal_values_is_one():
    """The stand-in misses it."""
    x = torch.ones(2)
    before = compat.version(x), GONE.version(x)
    x.mul_(1)
    assert compat.version(x) != before[0]
    assert GONE.version(x) == before[1]


def test_parameters_have_a_version():
    x = torch.ones(2, requires_grad=True)
    for of in (compat, GONE):
        before = of.version(x)
        with torch.no_grad():
            x.add_(1)
        assert of.version(x) != before


def test_storages_are_known_by_a_number():
    x, other = torch.ones(3, 4), torch.ones(3, 4)
    for of in (compat, GONE):
        number = of.storage_id(x.untyped_storage())
        assert of.storage_id(x[1:].T.untyped_storage()) == number
        assert of.storage_id(other.untyped_storage()) != number


def test_children_and_hooks_of_modules():
    twice = nn.Linear(2, 2)
    net = nn.Sequential(twice, nn.Sequential(nn.ReLU(), nn.Tanh()), twice)
    assert [*GONE.children(net).items()] == [*compat.children(net).items()]
    assert [*GONE.children(twice).items()] == []
    for expected in ([0, 0], [1, 0], [1, 2]):
        assert [*map(len, GONE.forward_hooks(net))] == expected
        assert [*map(len, compat.forward_hooks(net))] == expected
        if expected == [0, 0]:
            net.register_forward_hook(print)
        else:
            net.register_forward_pre_hook(print)
            net.register_forward_pre_hook(repr)


def test_hooks_of_a_tensors_gradient():
    x = torch.ones(2, requires_grad=True)
    for expected in ([], [abs], [abs, torch.neg]):
        for of in (compat, GONE):
            assert [*(of.gradient_hooks(x) or {}).values()] == expected
            assert not of.gradient_hooks(torch.ones(2))
        x.register_hook(torch.neg if expected else abs)


def test_hooks_of_all_modules():
    for of in (compat, GONE):
        assert [*map(len, of.hooks_of_all_modules())] == [0, 0]
        handle = nn.modules.module.register_module_forward_pre_hook(lambda *_: None)
        try:
            assert [*map(len, of.hooks_of_all_modules())] == [0, 1]
        finally:
            handle.remove()


class Table(torch.autograd.Function):
    """y of shape (2, 3) from a (6,) and b (3,), by a kernel that autograd cannot batch."""

    @staticmethod
    def forward(ctx, a, b):
        return torch.unflatten(a, 0, (2, 3)) + b

    @staticmethod
    def backward(ctx, grad):
        return (*compat.over_batched(lambda grad: (grad.flatten(), grad.sum(0)), grad),)


def test_several_grads_at_once():
    starts = torch.ones(6, requires_grad=True), torch.ones(3, requires_grad=True)
    grads = torch.arange(24.0).reshape(4, 2, 3)
    find = partial(torch.autograd.grad, Table.apply(*starts), starts, retain_graph=True)
    for _ in range(2):
        da, db = find(grads, is_grads_batched=True)
        assert torch.equal(da, grads.flatten(1))
        assert torch.equal(db, grads.sum(1))
        torch.rand(2)  # an error where autograd believes to be in a batch
    assert [*map(len, find(grads[0]))] == [6, 3]


def test_one_grad_is_handed_on():
    grad = torch.ones(3)
    for of in (compat, GONE):
        assert of.over_batched(lambda grad: (grad,), grad)[0] is grad


def test_operations_are_not_watched():
    seen = []

    class Watch(GONE.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Watch():
        assert torch.ones(2).sum() == 2
    assert seen == []
    aten = torch.ops.aten
    add, view, nothing = aten.add.Tensor, aten.view.default, aten._assert_async.default
    assert [compat.returns_old_memory(op) for op in (add, view, nothing)] == [False, True, False]
    assert [GONE.returns_old_memory(op) for op in (add, view, nothing)] == [True] * 3


def test_trees_are_registered_where_torch_takes_them():
    assert compat.register_pytree_node is torch.utils._pytree.register_pytree_node
    assert GONE.register_pytree_node(object, None, None) is None


# --- The whole package


def test_all_results_are_the_same_without_them(tmp_path):
    script, path = ROOT / "tests" / "without_private_names.py", tmp_path / "results.pt"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, str(script), str(path)], check=True, env=environment)
    without, with_them = torch.load(path), results()
    assert without.keys() == with_them.keys()
    for name, expected in with_them.items():
        tolerance = 1e-5 if "LSTM" in name else 1e-12  # its kernel takes float32 alone
        where = f"{name}: {{}}".format
        near = {"rtol": tolerance, "atol": tolerance, "msg": where}
        torch.testing.assert_close(without[name], expected, **near)


def test_names_that_are_taken_away_come_back():
    _, lookups = load(lambda name: False)
    with taken_away(lookups) as paths:
        assert torch._foreach_add is None
        assert torch.ops.aten._prelu_kernel is None
        assert torch._C._functorch.peek_interpreter_stack is None
    assert len(paths) > 30
    assert callable(torch._foreach_add)
    assert callable(torch.ops.aten._prelu_kernel)
