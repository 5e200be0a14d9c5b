"""check_function passes right autograd.Functions, modules and functions, and names wrong ones."""

import itertools
import math
import warnings

import optree
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import funcnet as fn
from funcnet.testing import GradientMismatch, check_function


def draw(*shape, dtype=torch.float64, key=0):
    return fn.normal(fn.key(key), shape, dtype=dtype)


class Affine(torch.autograd.Function):
    """y = x·Wᵀ + b, in the old style, with the faults that such functions have."""

    fault = ""

    @classmethod
    def forward(cls, ctx, x, weight, bias=None):
        ctx.save_for_backward(x, weight)
        ctx.has_bias = bias is not None
        y = x @ weight.T + (0 if bias is None else bias)
        if cls.fault == "value of strides" and not x.is_contiguous():
            y = 2 * y
        return x.mul_(1.0) @ weight.T if cls.fault == "writes to x" else y

    @classmethod
    def backward(cls, ctx, grad):
        x, weight = ctx.saved_tensors
        dx = grad @ weight if ctx.needs_input_grad[0] else None
        dweight = grad.T @ x if ctx.needs_input_grad[1] else None
        dbias = grad.sum(0) if ctx.has_bias and ctx.needs_input_grad[2] else None
        if cls.fault == "writes to a saved input":
            x.data.mul_(1.0)
            x.mul_(1.0 + 1e-9)
        if cls.fault == "half" and dweight is not None:
            dweight = dweight / 2
        if cls.fault == "no bias":
            dbias = None
        if cls.fault == "needs both" and not all(ctx.needs_input_grad[:2]) and dx is not None:
            dx = 2 * dx
        if cls.fault == "counts":
            dweight = dweight * (1 + 1e-15 * next(COUNT))
        if cls.fault == "refuses strides" and 0 in grad.stride():
            raise RuntimeError("no stride of 0")
        if cls.fault == "view of x":
            x.view(-1)
        if cls.fault == "layout" and not grad.is_contiguous() and dx is not None:
            dx = dx + 1
        return dx, dweight, dbias


def affine(fault):
    return type("Affine", (Affine,), {"fault": fault})


COUNT = itertools.count()
FAULTS = {
    "half": r"inputs\[1\].* is wrong",
    "no bias": r"inputs\[2\].* is wrong",
    "writes to x": r"writes to inputs\[0\]",
    "writes to a saved input": r"writes to inputs\[0\]",
    "needs both": r"where inputs\[0\] alone requires a gradient",
    "layout": "a gradient in the memory layout",
    "value of strides": r"inputs\[0\] in the memory layout 'strided' changes the result",
    "counts": "called twice, the backward pass gives two different answers",
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_right_functions_pass(dtype):
    x, weight, bias = draw(3, 4, dtype=dtype), draw(2, 4, dtype=dtype), draw(2, dtype=dtype)
    check_function(Affine, x, weight, bias, reference=F.linear)
    check_function(Affine, x, weight)
    check_function(F.linear, x, weight, bias, grad=draw(3, 2))


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(fault):
    with pytest.raises(GradientMismatch, match=FAULTS[fault]) as caught:
        check_function(affine(fault), draw(3, 4), draw(2, 4, key=1), draw(2, key=2))
    assert str(caught.value).startswith("Affine: ")


LAYOUTS_REFUSED = {
    "refuses strides": "raised by a gradient in the memory layout 'expanded'",
    "view of x": "raised by inputs[0] in the memory layout 'transposed'",
}


@pytest.mark.skipif(not hasattr(Exception, "add_note"), reason="notes came with Python 3.11")
@pytest.mark.parametrize("fault", LAYOUTS_REFUSED)
def test_an_error_in_one_memory_layout_names_it(fault):
    with pytest.raises(RuntimeError) as caught:
        check_function(affine(fault), draw(3, 4), draw(2, 4, key=1))
    assert "check_function" not in str(caught.value)
    assert caught.value.__notes__ == [f"check_function: {LAYOUTS_REFUSED[fault]}"]


class Polar(torch.autograd.Function):
    """(r, φ, the quadrant) of x and y, in the style of setup_context."""

    fault = ""

    @staticmethod
    def forward(x, y):
        return torch.hypot(x, y), torch.atan2(y, x), (x > 0).long() + 2 * (y > 0)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs)
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)

    @classmethod
    def backward(cls, ctx, dr, dphi, _):
        x, y = ctx.saved_tensors
        square = x * x + y * y
        dx, dy = torch.zeros_like(x), torch.zeros_like(y)
        if dr is not None:
            dx, dy = dx + dr * x / square.sqrt(), dy + dr * y / square.sqrt()
        if dphi is not None:
            dx, dy = dx - dphi * y / square, dy + dphi * x / square
        if cls.fault == "one output" and dphi is None:
            dy = -dy
        if cls.fault == "angle":
            dx = dx if dphi is None else dx + 2 * dphi * y / square
        return dx, dy


def test_several_outputs():
    x, y = draw(5), draw(5, key=1)
    check_function(Polar, x, y, reference=lambda x, y: (torch.hypot(x, y), torch.atan2(y, x), 0))
    wrong = type("Polar", (Polar,), {"fault": "one output"})
    with pytest.raises(GradientMismatch, match="where output 0 alone is used"):
        check_function(wrong, x, y)
    wrong = type("Polar", (Polar,), {"fault": "angle"})
    with pytest.raises(GradientMismatch, match=r"inputs\[0\].* is wrong"):
        check_function(wrong, x, y)


def test_modules_with_their_parameters():
    torch.manual_seed(0)
    check_function(nn.Sequential(nn.Linear(4, 3), nn.GELU(), nn.Linear(3, 2)), draw(5, 4).float())
    check_function(nn.LSTM(3, 2, batch_first=True), draw(2, 4, 3).float())
    norm = nn.BatchNorm1d(3)
    before = norm.running_mean.clone()
    check_function(norm, draw(4, 3).float())
    assert torch.equal(norm.running_mean, before)

    class Wrong(nn.Linear):
        def forward(self, x):
            return affine("half").apply(x, self.weight, self.bias)

    with pytest.raises(GradientMismatch, match=r"parameters\['weight'\].* is wrong"):
        check_function(Wrong(4, 2), draw(3, 4).float())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("of", ["weight", "module", "module's y", "y"])
def test_hooks_that_change_a_gradient(of, dtype):
    def hook(*args):
        return optree.tree_map(lambda grad: factor * grad, args[-1])  # of a tensor, or a tuple

    class Inner(nn.Linear):
        def forward(self, x):
            y = super().forward(x)
            if of == "y" and y.requires_grad:
                y.register_hook(hook)
            return y

    torch.manual_seed(0)
    module = nn.Sequential(nn.Tanh(), Inner(2, 1)).to(dtype)
    if of == "weight":
        module[1].weight.register_hook(hook)
    elif of == "module":
        module[1].register_full_backward_hook(lambda module, dx, dy: hook(dx))
    elif of == "module's y":
        module[1].register_full_backward_pre_hook(hook)
    factor, x = 1.0, draw(3, 2, dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a hook on a module asks for an x that needs a gradient
        check_function(module, x)
        factor = 1.1
        with pytest.raises(GradientMismatch, match=r"(1\.weight|inputs\[0\]|1\.bias).* is wrong"):
            check_function(module, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_modules_that_are_computed_again_in_the_backward_pass(dtype):
    """Recomputation reads the parameters, and buffers, of the module in the backward pass."""

    class Block(nn.Module):
        wrong = False

        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Tanh())

        def forward(self, x):
            y = checkpoint(self.inner, x, use_reentrant=False)
            return x + (affine("half").apply(y, self.inner[0].weight) if self.wrong else y)

    torch.manual_seed(0)
    block = Block().to(dtype)
    check_function(block, draw(3, 4, dtype=dtype))
    check_function(block.eval(), draw(3, 4, dtype=dtype))
    block.wrong = True
    with pytest.raises(GradientMismatch, match=r"parameters\['inner\.0\.weight'\].* is wrong"):
        check_function(block, draw(3, 4, dtype=dtype))


def test_inputs_of_any_kind():
    """A tree of tensors, integers that pick, a number and a name."""

    def function(tree, index, power, *, name="sum"):
        return (tree["a"][index] ** power + tree["b"][0]).sum(), index

    tree = {"a": draw(4).abs() + 1, "b": (draw(1), "a name")}
    check_function(function, tree, torch.tensor([0, 2, 2]), 3)
    with pytest.raises(TypeError, match="expected a floating-point tensor among the inputs"):
        check_function(torch.neg, torch.arange(3))
    with pytest.raises(TypeError, match=r"real numbers, got torch\.complex128"):
        check_function(torch.abs, draw(3).to(torch.complex128))
    with pytest.raises(GradientMismatch, match="expected an output that has a gradient"):
        check_function(lambda x: x.detach(), draw(3))
    with pytest.raises(ValueError, match=r"of the outputs' shapes, \[\(3,\)\], got \[\(2,\)\]"):
        check_function(torch.sin, draw(3), grad=draw(2))
    with pytest.raises(ValueError, match=r"of the outputs' shapes, \[\(3,\)\], got \[\(\)\]"):
        check_function(torch.sin, draw(3), grad=2.0)
    check_function(torch.sum, draw(3), grad=2.0)


def test_random_functions_are_refused():
    with pytest.raises(GradientMismatch, match="draws from the global random state of torch"):
        check_function(lambda x: F.dropout(x, 0.5), torch.ones(100))

    generator = torch.Generator()
    with pytest.raises(GradientMismatch, match="called twice, the function gives two different"):
        check_function(lambda x: x * torch.rand(5, generator=generator), torch.ones(5))


class Kernel(torch.autograd.Function):
    """exp in float32 alone."""

    factor = 1.0

    @staticmethod
    def forward(ctx, x):
        if x.dtype != torch.float32:
            raise TypeError("expected float32")
        y = torch.exp(x)
        ctx.save_for_backward(y)
        return y

    @classmethod
    def backward(cls, ctx, grad):
        (y,) = ctx.saved_tensors
        return cls.factor * grad * y


def test_kernels_that_have_no_float64():
    x = draw(3, 4, dtype=torch.float32)
    check_function(Kernel, x)
    check_function(Kernel, x, reference=torch.exp)
    with pytest.raises(GradientMismatch, match="further from float64 than rounding"):
        check_function(Kernel, x, reference=torch.expm1)
    with pytest.raises(GradientMismatch, match="further from float64 than rounding"):
        check_function(type("Kernel", (Kernel,), {"factor": 1.001}), x, reference=torch.exp)
    with pytest.raises(GradientMismatch, match="along a random direction"):
        check_function(type("Kernel", (Kernel,), {"factor": 1.5}), x)


def test_a_reference_of_another_value_or_gradient():
    with pytest.raises(GradientMismatch, match="the result is not that of the reference"):
        check_function(torch.sin, draw(3), reference=torch.cos)


def in_bfloat16(function, factor, refuses=True):
    """A function that computes in bfloat16, with its gradient times a factor."""

    def gradients(grad, *inputs):
        with torch.enable_grad():
            leaves = [x.detach().bfloat16().requires_grad_() for x in inputs]
            found = torch.autograd.grad(function(*leaves), leaves, grad.bfloat16())
        return tuple((factor * x).to(grad) for x in found)

    class InBfloat16(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            if refuses and inputs[0].dtype != torch.bfloat16:
                raise TypeError("expected bfloat16")
            ctx.save_for_backward(*inputs)
            return function(*(x.bfloat16() for x in inputs)).to(inputs[0])

        @staticmethod
        def backward(ctx, grad):
            return gradients(grad, *ctx.saved_tensors)

    return InBfloat16


KERNELS = {
    "linear": (torch.nn.functional.linear, [(8, 16), (5, 16)]),
    "gelu": (torch.nn.functional.gelu, [(4, 8)]),
    "softmax": (lambda x: torch.softmax(x, -1), [(4, 8)]),
    "layer_norm": (lambda x: torch.nn.functional.layer_norm(x, (8,)), [(4, 8)]),
    "conv2d": (torch.nn.functional.conv2d, [(2, 3, 5, 5), (4, 3, 3, 3)]),
    "chain": (lambda x, a, b: torch.tanh(x @ a) @ b, [(6, 8), (8, 8), (8, 4)]),
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("refuses", [True, False], ids=["alone", "any"])
def test_a_factor_of_a_tenth_in_bfloat16(kernel, refuses):
    """An entry has 8 bits; a factor that all entries share is averaged over them."""
    function, shapes = KERNELS[kernel]
    inputs = [draw(*shape, key=i, dtype=torch.float32) for i, shape in enumerate(shapes)]
    inputs = [x.bfloat16() for x in inputs] if refuses else inputs
    check_function(in_bfloat16(function, 1.0, refuses), *inputs, reference=function)
    for factor in (1.1, 0.9):
        with pytest.raises(GradientMismatch, match=r"in torch\.bfloat16, the gradient for "):
            check_function(in_bfloat16(function, factor, refuses), *inputs, reference=function)


@pytest.mark.parametrize("seed", range(6))
def test_what_oscillates_in_half_precision_without_a_reference(seed):
    """Some steps are too long to tell a slope, and the others are too short."""

    class Sine(torch.autograd.Function):
        factor = 1.0

        @staticmethod
        def forward(ctx, x, times):
            if x.dtype != torch.float16:
                raise TypeError("expected float16")
            ctx.save_for_backward(x)
            ctx.times = times
            return (times * x).sin()

        @classmethod
        def backward(cls, ctx, grad):
            (x,) = ctx.saved_tensors
            slope = ctx.times * (ctx.times * x.float()).cos()
            return (cls.factor * grad * slope).half(), None

    for shape in ((16, 64), (5, 7)):
        x = draw(*shape, dtype=torch.float16, key=seed)
        check_function(Sine, x, 10)
    with pytest.raises(GradientMismatch, match="the gradient is wrong"):
        check_function(type("Wrong", (Sine,), {"factor": 2.0}), x, 1 / 4)


@pytest.mark.parametrize("power", [-1, -2, -3])
def test_a_mistake_of_one_layout_where_y_grows_to_zero(power):
    """Near 0 the gradient is 64³ times as large, and not because its terms cancel here."""

    class Power(torch.autograd.Function):
        right = False

        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return x * w**power

        @classmethod
        def backward(cls, ctx, grad):
            x, w = ctx.saved_tensors
            factor = 1 if cls.right or w.is_contiguous() else 1.001
            return factor * grad * w**power, grad * x * power * w ** (power - 1)

    inputs = draw(4, 3).float(), draw(4, 3, key=1).float()
    check_function(type("Right", (Power,), {"right": True}), *inputs)
    with pytest.raises(GradientMismatch, match="memory layout 'strided' changes the gradient"):
        check_function(Power, *inputs)


def test_nothing_to_check():
    with pytest.raises(ValueError, match="grad is 0"):
        check_function(torch.sin, draw(3), grad=torch.zeros(3))


def oscillating(x):
    return x + torch.sin(1e20 * x)


def test_noise_without_a_reference():
    x = draw(3).double()
    with pytest.raises(ValueError, match="no two steps of a numeric derivative agree"):
        check_function(oscillating, x)
    check_function(oscillating, x, reference=oscillating)


def rms_norm(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


class Inside(torch.autograd.Function):
    """x², computed in float32 whatever x is in."""

    factor = 2.0

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x.float() ** 2).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return Inside.factor * x * grad


@pytest.mark.parametrize("reference", [None, rms_norm], ids=["alone", "reference"])
def test_what_computes_in_float32_is_held_to_its_own_dtype(reference):
    for dtype in (torch.float32, torch.float64):
        x = fn.normal(fn.key(1), (3, 8), dtype=dtype)
        check_function(lambda x: rms_norm(x.float()).to(x.dtype), x, reference=reference)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_any_dtype_inside(dtype):
    check_function(lambda x: (x.to(dtype) * 2).to(x.dtype), fn.normal(fn.key(1), (3, 8)))


@pytest.mark.parametrize("seed", [7, 12, 15, 20])
def test_what_returns_float32_may_compute_in_bfloat16(seed):
    """Its steps show in y alone: y's dtype is finer than they are."""
    x = torch.rand(4, 3, generator=torch.Generator().manual_seed(seed))
    check_function(lambda x: x.bfloat16().sin().float(), x)


@pytest.mark.parametrize("reference", [None, torch.square], ids=["alone", "reference"])
@pytest.mark.parametrize("factor", [2.0, 2.2])
def test_wrong_gradients_of_what_computes_in_float32(factor, reference, monkeypatch):
    monkeypatch.setattr(Inside, "factor", factor)
    x = fn.normal(fn.key(1), (3, 8))
    if factor == 2:
        check_function(Inside, x, reference=reference)
        return
    with pytest.raises(GradientMismatch, match=r"in torch\.float32, the gradient"):
        check_function(Inside, x, reference=reference)


# --- What comes back is refused by name


def test_complex_outputs_are_refused():
    with pytest.raises(TypeError, match=r"torch\.complex128: return y\.real and y\.imag"):
        check_function(torch.fft.rfft, torch.ones(4, dtype=torch.float64))


def test_the_parts_of_complex_outputs_can_be_checked():
    """`view_as_real` takes no gradient in memory that starts at an odd place."""

    def spectrum(x):
        y = torch.fft.rfft(x)
        return y.real, y.imag

    check_function(spectrum, draw(3, 4))


def test_a_reference_that_returns_something_else_is_refused():
    x = torch.tensor([1.0, -2.0, 3.0])
    for reference, got in ((lambda x: x[:2], r"\[\(2,\)\]"), (lambda x: (), r"\[None\]")):
        with pytest.raises(ValueError, match=r"of shapes \[\(3,\)\], got " + got):
            check_function(lambda x: 2 * x, x, reference=reference)


def test_what_writes_to_a_leaf_is_found():
    with pytest.raises(GradientMismatch, match=r"writes to inputs\[0\]"):
        check_function(lambda x: x.mul_(2), torch.tensor([1.0, -2.0]))


def test_inputs_of_several_dtypes_that_float64_does_not_fit():
    x, weight = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.5, 3.0]], dtype=torch.bfloat16)
    check_function(lambda x, w: torch.nn.functional.linear(x, w.float()), x, weight)


@pytest.mark.parametrize("seed", range(4))
def test_a_gradient_is_rounded_in_the_dtype_of_its_own_input(seed):
    x = fn.normal(fn.key(seed), (4, 3))
    weight = fn.normal(fn.key(100 + seed), (3, 2), dtype=torch.bfloat16)
    check_function(lambda x, weight: x @ weight.to(x.dtype), x, weight)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("reference", [None, lambda x, w: x @ w.to(x.dtype)], ids=["alone", "with"])
def test_steps_of_an_input_are_as_coarse_as_its_dtype(seed, reference):
    x = fn.normal(fn.key(seed), (4, 1))
    weight = fn.normal(fn.key(100 + seed), (1, 2), dtype=torch.bfloat16)
    check_function(lambda x, weight: x @ weight.float(), x, weight, reference=reference)


def test_a_gradient_that_is_doubled_where_it_is_alone_in_bfloat16():
    """64 ε would be half of a number."""

    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a * b

        @staticmethod
        def backward(ctx, grad):
            a, b = ctx.saved_tensors
            return grad * b * (1 if ctx.needs_input_grad[1] else 2), grad * a

    a, b = (fn.normal(fn.key(i), (3,), dtype=torch.bfloat16) for i in range(2))
    with pytest.raises(GradientMismatch, match=r"where inputs\[0\] alone requires a gradient"):
        check_function(Product, a, b)


# --- What a function does in a network


@pytest.mark.parametrize("stale", [True, False])
def test_what_is_kept_of_a_tensor_that_is_written_over(stale):
    """A kernel may pack its weight once, and an optimiser writes into the weight."""
    packed = {}

    def linear(x, weight):
        name = id(weight) if stale else (id(weight), weight._version)
        if not weight.requires_grad:
            weight = packed.setdefault(name, (weight, weight.clone()))[1]
        return x @ weight

    inputs = draw(4, 3), draw(3, 2)
    if not stale:
        check_function(linear, *inputs)
        return
    with pytest.raises(GradientMismatch, match="numbers that are written into an input do not"):
        check_function(linear, *inputs)


@pytest.mark.parametrize("way", ["last", "stack", "cleared"])
def test_state_outside_ctx(way):
    xs = []

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            if way == "last":
                xs.clear()
            xs.append(x.detach().clone())
            return x * x

        @staticmethod
        def backward(ctx, grad):
            x = xs[-1]
            if way == "cleared":
                xs.clear()
            elif way == "stack" and len(xs) > 1:
                xs.pop()
            return 2 * x * grad

    with pytest.raises(GradientMismatch, match="state is kept outside ctx"):
        check_function(Square, draw(3))


def test_a_gradient_that_is_wrong_where_two_inputs_of_three_need_one():
    class Product(torch.autograd.Function):
        needs = (True, True, False)

        @staticmethod
        def forward(ctx, a, b, c):
            ctx.save_for_backward(a, b, c)
            return a * b * c

        @classmethod
        def backward(cls, ctx, grad):
            a, b, c = ctx.saved_tensors
            factor = 2 if ctx.needs_input_grad == cls.needs else 1
            return grad * b * c, factor * grad * a * c, grad * a * b

    inputs = [draw(3, key=i) for i in range(3)]
    message = r"where inputs\[0\] and inputs\[1\] alone require gradients, they get another one"
    with pytest.raises(GradientMismatch, match=message):
        check_function(Product, *inputs)
    check_function(type("Right", (Product,), {"needs": None}), *inputs)


@pytest.mark.parametrize("absent", [(3,), (0, 1, 4), (1, 2, 3, 4)])
def test_a_gradient_that_is_wrong_where_some_of_five_inputs_need_one(absent):
    class Sum(torch.autograd.Function):
        needs = tuple(i not in absent for i in range(5))

        @staticmethod
        def forward(ctx, *inputs):
            return sum(inputs)

        @classmethod
        def backward(cls, ctx, grad):
            factor = 2 if ctx.needs_input_grad == cls.needs else 1
            return (factor * grad,) * 5

    inputs = [draw(3, key=i) for i in range(5)]
    with pytest.raises(GradientMismatch, match="alone require"):
        check_function(Sum, *inputs)
    check_function(type("Right", (Sum,), {"needs": None}), *inputs)


class Tanh32(torch.autograd.Function):
    """tanh, computed in float32 whatever the dtype of x is."""

    factor = 1.0

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.float().tanh().to(x.dtype)

    @classmethod
    def backward(cls, ctx, grad):
        (x,) = ctx.saved_tensors
        return (cls.factor * grad.float() * (1 - x.float().tanh() ** 2)).to(x.dtype)


@pytest.mark.parametrize("reference", [None, torch.tanh])
@pytest.mark.parametrize("x", [torch.zeros(1, 4), torch.zeros(5, 4), draw(5, 4)])
def test_half_precision_of_a_function_that_computes_in_float32(x, reference):
    x = x.bfloat16()
    check_function(Tanh32, x, reference=reference)
    with pytest.raises(GradientMismatch):
        check_function(type("Off", (Tanh32,), {"factor": 1.1}), x, reference=reference)


def test_steps_of_the_middle_one_of_equal_entries_show_no_slope():
    """Its neighbours take its place on either side, so that both one-sided slopes are 0."""
    zeros = torch.zeros(2, 5, dtype=torch.float64)
    check_function(lambda x: x.kthvalue(2, -1).values, zeros)
    check_function(lambda x: x.quantile(0.4, dim=-1), zeros)


class Counting(nn.Module):
    """y = a·w·x, where a is what the module keeps from call to call."""

    def __init__(self, way):
        super().__init__()
        self.way, self.count, self.first = way, 0, None
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.register_buffer("ready", torch.tensor(False))
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        self.count += 1
        if self.first is None:
            self.first = x.detach().mean(), self.weight.detach().mean()
        if not self.ready:
            self.mean.copy_(x.detach().mean())
            self.ready.fill_(True)
        factor = {
            "nothing": 1,
            "its calls": self.calls,
            "its third call": 1 + (self.calls > 2),
            "calls, in a number": 1 + (self.count > 60),
            "its first x": self.mean,
            "its first x, not in a buffer": self.first[0].to(x),
            "its first weight": self.first[1].to(x),
        }
        return factor[self.way] * self.weight * x


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_modules_that_keep_state(dtype):
    x = draw(4, 3, dtype=dtype)
    check_function(Counting("nothing").to(dtype), x)
    for way in (
        "its calls",
        "its third call",
        "its first x",
        "its first x, not in a buffer",
        "its first weight",
    ):
        with pytest.raises(GradientMismatch, match="the module keeps state"):
            check_function(Counting(way).to(dtype), x)
    with pytest.raises(GradientMismatch):
        check_function(Counting("calls, in a number").to(dtype), x)


@pytest.mark.parametrize("limit", [3, 10, 30, 60])
def test_functions_that_count_their_calls(limit):
    calls = iter(range(10**9))
    with pytest.raises(GradientMismatch):
        check_function(lambda x: x.tanh() * (1 + (next(calls) >= limit)), draw(4, 3))


class Rectified(torch.autograd.Function):
    """relu, whose slope at 0 is `at_zero`."""

    at_zero = 0.0

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.relu()

    @classmethod
    def backward(cls, ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * torch.where(x == 0, cls.at_zero, (x > 0).to(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("x", [[-2, -1, 0, 0, 1, 2, 0, 3], [0, 1, 2, 3, -4, 5], [0, 0]])
def test_slopes_at_kinks_among_other_entries(x, dtype):
    x = torch.tensor(x, dtype=dtype)
    for at_zero in (0.0, 0.3, 1.0):
        check_function(type("Right", (Rectified,), {"at_zero": at_zero}), x)
    for at_zero in (-0.1, 1.01, 1.1, 2.0):
        with pytest.raises(GradientMismatch, match="is wrong"):
            check_function(type("Wrong", (Rectified,), {"at_zero": at_zero}), x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_module_is_right_at_torchs_kinks_inside(dtype):
    """The slope 0 of every relu at 0 adds up to one that need not be between those of the sum."""

    class Net(nn.Sequential):
        lost = False

        def forward(self, x):
            y = super().forward(x)
            return y.detach() + 0.9 * y - 0.9 * y.detach() if self.lost else y

    torch.manual_seed(2)
    net = Net(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).to(dtype)
    nn.init.zeros_(net[0].bias)
    x = draw(3, 3, dtype=dtype) * torch.tensor([[1], [0], [1]])
    check_function(net, x)
    net.lost = True
    with pytest.raises(GradientMismatch, match="is wrong"):
        check_function(net, x)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_function_that_keeps_its_first_input(dtype):
    """Only a reference tells it from one that has been given that as a constant."""
    kept = {}

    def square(x):
        return x * kept.setdefault(dtype, x.detach().clone()).to(x)

    with pytest.raises(GradientMismatch, match="the result is not that of the reference"):
        check_function(square, draw(3, 4).to(dtype), reference=torch.square)


def test_state_that_depends_on_signs_alone():
    class Rectifier(torch.autograd.Function):
        @classmethod
        def forward(cls, ctx, x):
            cls.mask = x > 0
            return x.relu()

        @classmethod
        def backward(cls, ctx, grad):
            return grad * cls.mask

    with pytest.raises(GradientMismatch, match="state is kept outside ctx"):
        check_function(Rectifier, draw(4, 4))


def test_state_that_depends_on_a_mask_alone():
    class Masked(torch.autograd.Function):
        @classmethod
        def forward(cls, ctx, x, mask):
            cls.mask = mask
            return x * mask

        @classmethod
        def backward(cls, ctx, grad):
            return grad * cls.mask, None

    with pytest.raises(GradientMismatch, match="state is kept outside ctx"):
        check_function(Masked, draw(4, 4), draw(4, 4) > 0)


@pytest.mark.parametrize("outside", [-1.0, math.nan, -math.inf])
def test_entries_of_y_that_are_not_finite_are_left_out(outside):
    class Log(torch.autograd.Function):
        factor = 1.0

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.log()

        @staticmethod
        def backward(ctx, grad):
            return Log.factor * grad / ctx.saved_tensors[0]

    x = torch.tensor([outside, 2.0, 3.0])
    check_function(Log, x)
    Log.factor = 5.0
    with pytest.raises(GradientMismatch, match=r"inputs\[0\]\[[12]\] is wrong"):
        check_function(Log, x)


def by_autograd(function, factor_of_a=1.0, factor_of_x=1.0):
    """An autograd.Function (a, x) ↦ function(a, x) whose gradients are off by factors."""

    class Scaled(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, x):
            ctx.save_for_backward(a, x)
            return function(a, x)

        @staticmethod
        def backward(ctx, grad):
            a, x = (leaf.detach().requires_grad_() for leaf in ctx.saved_tensors)
            with torch.enable_grad():
                da, dx = torch.autograd.grad(function(a, x), (a, x), grad)
            return factor_of_a * da, factor_of_x * dx

    return Scaled


CANCELLING = {
    "hyperbola": lambda a, x: (1 + (a * x) ** 2).sqrt() - 1,
    "log-cosh": lambda a, x: (a * x).cosh().log(),
    "cosine": lambda a, x: 1 - (a * x).cos(),
    "sigmoid": lambda a, x: torch.sigmoid(a * x) - 0.5,
    "softplus": lambda a, x: F.softplus(a * x) - math.log(2),
    "exponential": lambda a, x: (a * x).exp() - 1,
    "ten": lambda a, x: (a * x + 10) - 10,
    "softmax": lambda a, x: (a * x).softmax(-1) - 1 / x.shape[-1],
}


@pytest.mark.parametrize("name", CANCELLING)
@pytest.mark.parametrize("scale", [1.0, 0.3, 0.1])
def test_wrong_gradients_are_found_where_a_constant_cancels(name, scale):
    """Rounding that no nudge shows looks like the smallest of kinks there."""
    a, x = torch.tensor(0.7, dtype=torch.float64), scale * draw(3, 5, key=1)
    check_function(by_autograd(CANCELLING[name]), a, x)
    for factors in ((-1.0, 1.0), (1.5, 1.0), (1.0, -1.0), (1.0, 1.5)):
        with pytest.raises(GradientMismatch, match="is wrong"):
            check_function(by_autograd(CANCELLING[name], *factors), a, x)


FAST = {
    "sine": lambda a, x: a + (x * 1e4).sin(),
    "fraction": lambda a, x: a + 1e4 * x - (1e4 * x).floor(),
    "both": lambda a, x: a + torch.cat(((x * 1e4).sin(), (x * 1e4).cos())),
}


@pytest.mark.parametrize("name", FAST)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_changes_within_a_small_share_of_x(name, dtype):
    """Where autograd sees nothing, steps are as small as it takes."""
    a, x = torch.tensor(0.5, dtype=dtype), draw(3, 5, key=1, dtype=dtype)
    check_function(by_autograd(FAST[name]), a, x)
    for factor in (-1.0, 0.0):
        with pytest.raises(GradientMismatch, match="is wrong"):
            check_function(by_autograd(FAST[name], 1.0, factor), a, x)


@pytest.mark.parametrize("eps", [1e-4, 1e-6, 1e-8, 1e-12])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_rows_of_zeros_that_are_normalised(eps, dtype):
    """The slope at 0 is 1/eps, and holds for steps below eps alone."""
    a, x = torch.tensor(0.5, dtype=dtype), torch.tensor([[0.0, 0.0], [1.0, 2.0]], dtype=dtype)
    normalise = lambda a, x: a + F.normalize(x, dim=-1, eps=eps)  # noqa: E731
    check_function(lambda x: normalise(0, x), x)
    check_function(by_autograd(normalise), a, x)
    for factor in (2.0, 0.5, 0.0):
        with pytest.raises(GradientMismatch, match="is wrong"):
            check_function(by_autograd(normalise, 1.0, factor), a, x)


@pytest.mark.parametrize("examples", [1, 2, 3])
def test_medians_of_equal_numbers(examples):
    """Which of them are in the middle, few of the points around tell."""
    median = lambda x: x.unfold(-1, 4, 2).sort(-1)[0][..., 1:3].mean(-1)  # noqa: E731
    check_function(median, torch.zeros(examples, 8, dtype=torch.float64))
    twice = torch.ones(examples, 8, dtype=torch.float64)
    with pytest.raises(GradientMismatch, match="is wrong"):
        check_function(by_autograd(lambda a, x: a + median(x), 1.0, 2.0), twice[0, 0], twice)


@pytest.mark.parametrize("way", ["autograd", "by hand", "no float64"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, 1.1, 1.5, 3.0])
def test_a_value_that_is_wrong_in_the_dtype_at_hand_alone(factor, dtype, way):
    """A kernel is chosen by the dtype. The backward pass may be right, or wrong as well."""

    class Square(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return function(x)

        @staticmethod
        def backward(ctx, grad):
            return 2 * ctx.saved_tensors[0] * grad

    def function(x):
        if way == "no float64" and x.dtype != dtype:
            raise TypeError(f"expected {dtype}, got {x.dtype}")
        return factor * x**2 if x.dtype == dtype else x**2

    x = fn.normal(fn.key(1), (3, 4), dtype=dtype)
    checked = function if way == "autograd" else Square
    if factor == 1:
        check_function(checked, x, reference=torch.square)
        return
    with pytest.raises(GradientMismatch, match=f"in {dtype}"):
        check_function(checked, x, reference=torch.square)


def test_the_output_that_is_wrong_in_the_dtype_at_hand_is_named():
    def function(x):
        return 1000 * x, x**2 * (1.1 if x.dtype == torch.bfloat16 else 1)

    x = fn.normal(fn.key(1), (3, 4), dtype=torch.bfloat16)
    with pytest.raises(GradientMismatch, match=r"bfloat16, output 1 is about 1\.\d+ times that of"):
        check_function(function, x, reference=lambda x: (1000 * x, x**2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_reference_that_depends_on_the_dtype_excuses_the_function(dtype):
    """The eps of such a normalisation is the dtype's own."""

    def normalised(x):
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + torch.finfo(x.dtype).eps)

    def reference(x):
        return x / ((x * x).sum(-1, keepdim=True) / 8 + torch.finfo(x.dtype).eps).sqrt()

    x = fn.normal(fn.key(1), (3, 8), dtype=dtype)
    for given in (None, reference):
        for size in (1.0, 0.01, 0.003):
            check_function(normalised, size * x, reference=given)
    x[0] = 0.0
    check_function(normalised, x, reference=reference)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 0.1, 0.01])
def test_terms_that_cancel_are_held_to_a_reference_up_to_rounding(size, dtype):
    x = size * fn.normal(fn.key(1), (3, 8), dtype=dtype)
    for function, reference in (
        (lambda x: 1 - x.cos(), lambda x: 2 * (x / 2).sin() ** 2),
        (lambda x: x.exp() - 1, torch.expm1),
    ):
        check_function(function, x, reference=reference)
        check_function(reference, x, reference=function)


@pytest.mark.parametrize("way", ["attribute", "saved", "cached", "freed"])
def test_what_the_backward_pass_keeps_for_a_second_one(way):
    """Jacobians, and penalties on gradients, run it again over one graph."""

    class Exp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            y = x.exp()
            ctx.y = y.clone()
            if way == "saved":
                ctx.save_for_backward(ctx.y)
            return y

        @staticmethod
        def backward(ctx, grad):
            if way == "cached":
                ctx.found = getattr(ctx, "found", grad * ctx.y)
                return ctx.found
            if way == "freed":
                y = ctx.y
                del ctx.y
                return y * grad
            return (ctx.saved_tensors[0].data if way == "saved" else ctx.y).mul_(grad)

    message = "a second backward pass over one graph .* " + (
        "raises" if way == "freed" else "gives"
    )
    for grad in (None, -torch.ones(3)):
        with pytest.raises(GradientMismatch, match=message):
            check_function(Exp, draw(3), grad=grad)


def test_what_refuses_to_retain_a_graph_is_asked_once():
    """Compiled code may write over what it kept, and says so."""

    class Exp(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.y = x.exp()
            return ctx.y.clone()

        @staticmethod
        def backward(ctx, grad):
            if torch._C._autograd._get_current_graph_task_keep_graph():
                raise RuntimeError("donated buffers require retain_graph=False")
            return ctx.y.mul_(grad)

    check_function(Exp, draw(3))


def test_gradients_that_lose_digits_where_grad_is_very_large():
    """Torch finds that of a matrix exponential as a block of exp([[A, grad], [0, A]])."""
    for size in (2, 4, 8):
        check_function(torch.linalg.matrix_exp, draw(size, size))

    class Inverse(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a):
            ctx.save_for_backward(a.mT)
            return torch.linalg.inv(a)

        @staticmethod
        def backward(ctx, grad):
            (a,) = ctx.saved_tensors
            blocks = torch.cat([torch.cat([a, grad], 1), torch.cat([0 * a, a], 1)])
            return torch.linalg.inv(blocks)[: len(a), len(a) :]

    check_function(Inverse, draw(4, 4) + 4 * torch.eye(4, dtype=torch.float64))


@pytest.mark.parametrize("bound", [2.0**5, 2.0**20, 2.0**38])
@pytest.mark.parametrize("way", ["entries", "norm", "small", "square"])
def test_gradients_that_are_not_linear_in_very_large_grads(way, bound):
    class Linear(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return 3 * x

        @staticmethod
        def backward(ctx, grad):
            if way == "entries":
                return (3 * grad).clamp(-bound, bound)
            if way == "norm":
                return 3 * grad / torch.clamp(grad.norm() / bound, min=1.0)
            if way == "small":
                return torch.where(grad.abs() < 1 / bound, 0.0, 3 * grad)
            return 3 * grad + grad * (grad / bound).abs()

    if way == "square" and bound > 2.0**30:
        bound = 2.0**30
    with pytest.raises(GradientMismatch, match=r"linear in grad|is wrong"):
        check_function(Linear, draw(4, 4))


def test_sparse_tensors_are_refused_by_name():
    eye, x = torch.eye(3).to_sparse(), torch.ones(3, 3)
    for sparse in (eye, torch.nested.nested_tensor([x[0], x[0, :2]], layout=torch.jagged)):
        with pytest.raises(TypeError, match="expected inputs of dense tensors, got"):
            check_function(lambda x: x.to_dense(), sparse)
    with pytest.raises(TypeError, match=r"expected inputs .* got torch\.sparse_coo"):
        check_function(lambda x, a: a @ x, x, eye)
    with pytest.raises(TypeError, match=r"expected outputs .* return y\.to_dense\(\)"):
        check_function(lambda x: x.to_sparse(), x)
    with pytest.raises(TypeError, match="expected gradients of dense"):
        check_function(torch.sin, x, grad=eye)


def test_sparse_gradients_are_checked_in_all_entries():
    check_function(nn.Embedding(5, 3, sparse=True), torch.tensor([0, 2, 2]))


class SinCos(torch.autograd.Function):
    """Two outputs, of which one may be unused: grad is None for it."""

    fault = ""

    @classmethod
    def forward(cls, ctx, x, scale):
        ctx.save_for_backward(x, scale)
        ctx.set_materialize_grads(cls.fault != "output")
        return scale * x.sin(), scale * x.cos()

    @classmethod
    def backward(cls, ctx, first, second):
        if cls.fault == "input" and not ctx.needs_input_grad[1]:
            raise RuntimeError("expected both to require a gradient")
        x, scale = ctx.saved_tensors
        dscale = first * x.sin() + second * x.cos()
        return scale * (first * x.cos() - second * x.sin()), dscale


@pytest.mark.skipif(not hasattr(Exception, "add_note"), reason="notes came with Python 3.11")
@pytest.mark.parametrize("fault", ["output", "input"])
def test_an_error_where_one_is_used_alone_says_so(fault):
    check_function(SinCos, draw(3), draw(3, key=1))
    kind = TypeError if fault == "output" else RuntimeError
    with pytest.raises(kind) as caught:
        check_function(type("Wrong", (SinCos,), {"fault": fault}), draw(3), draw(3, key=1))
    where = {
        "output": "where output 0 alone is used, and the grad of the others is None",
        "input": "where inputs[0] alone requires a gradient",
    }
    assert caught.value.__notes__ == [f"check_function: raised {where[fault]}"]


def test_a_mistake_for_inputs_that_are_not_dense_in_memory():
    """Where x skips or repeats numbers, or starts inside its memory, `clone` would not."""

    class Cube(torch.autograd.Function):
        @staticmethod
        def is_right(x):
            return True

        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x**3

        @classmethod
        def backward(cls, ctx, grad):
            (x,) = ctx.saved_tensors
            return (3 if cls.is_right(x) else 2) * x * x * grad

    for is_right in (torch.Tensor.is_contiguous, lambda x: not x.storage_offset()):
        wrong = type("Wrong", (Cube,), {"is_right": staticmethod(is_right)})
        with pytest.raises(GradientMismatch, match=r"memory layout '.*' changes the gradient"):
            check_function(wrong, draw(7))
    check_function(Cube, draw(2, 3))
    check_function(Cube, draw(7, 2)[:, 1])
    check_function(Cube, draw(3, 1).expand(3, 4))


@pytest.mark.parametrize("as_module", [False, True])
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_a_mask_that_is_kept_from_the_first_call(when, as_module):
    kept = {}

    class ReLU(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.mask = kept.setdefault(x.shape, x > 0) if when == "forward" else x > 0
            return x.clamp(min=0)

        @staticmethod
        def backward(ctx, grad):
            mask = kept.setdefault(grad.shape, ctx.mask) if when == "backward" else ctx.mask
            return grad * mask

    class Module(torch.nn.Module):
        def forward(self, x):
            return ReLU.apply(x)

    with pytest.raises(GradientMismatch):
        check_function(Module() if as_module else ReLU, draw(3, 4))


def test_gradients_that_lose_digits_by_a_formula_for_small_norms():
    """Torch takes another polynomial for exp([[A, grad], [0, A]]) where grad is small."""
    check_function(lambda a: torch.linalg.matrix_exp(a - a.mT) @ draw(4, 4), draw(4, 4) / 100)
    for key in range(6):
        square = torch.nn.Linear(4, 4)
        torch.nn.init.orthogonal_(square.weight, generator=torch.Generator().manual_seed(key))
        module = torch.nn.utils.parametrizations.orthogonal(square)
        check_function(module, draw(2, 4, dtype=torch.float32, key=key))
    check_function(lambda a: 1e6 * torch.linalg.matrix_exp(a - a.mT), draw(4, 4))
