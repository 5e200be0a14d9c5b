"""Embedding: PyTorch's numbers, padding, repeated and wrong indices; PositionalEmbedding."""

import re

import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import funcnet as fn
from funcnet.initializers import Constant, Ones, Uniform
from funcnet.testing import check_vjp, strategies


@given(st.data())
def test_value_and_gradient(data):
    rows, size = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    padding_idx = data.draw(st.none() | st.integers(-rows, rows - 1))
    shape = (data.draw(st.integers(0, 3)), *data.draw(st.lists(st.integers(0, 3), max_size=2)))
    layer = fn.Embedding(rows, size, padding_idx)
    x = torch.randint(rows, shape, dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    weight = data.draw(strategies.tensors((rows, size), torch.float64))
    grad = data.draw(strategies.tensors((*shape, size), torch.float64))
    leaf = weight.clone().requires_grad_()
    y = F.embedding(x, leaf, padding_idx)
    assert torch.equal(layer.apply({"weight": weight}, x), y)
    dparams, dx = layer.vjp({"weight": weight}, x, grad)
    assert dx is None
    torch.testing.assert_close(dparams["weight"], torch.autograd.grad(y, leaf, grad)[0])
    of_apply = layer.apply({"weight": leaf}, x)
    torch.testing.assert_close(dparams["weight"], torch.autograd.grad(of_apply, leaf, grad)[0])
    nothing = layer.vjp({"weight": weight}, x, grad, input_grad=False, param_grad=False)
    assert nothing == (None, None)


def test_repeated_indices_add_up():
    layer = fn.Embedding(3, 2, padding_idx=0)
    x = torch.tensor([[1, 1, 0], [2, 1, 0]])
    dweight = layer.vjp(layer.init(fn.key(0), (3,)), x, torch.ones(2, 3, 2))[0]["weight"]
    assert dweight.tolist() == [[0, 0], [3, 3], [1, 1]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_sums_in_half_precision_go_on_growing(dtype):
    """Ones that are added one by one to a bfloat16 stop at 256."""
    layer, x = fn.Embedding(2, 1), torch.zeros(5000, dtype=torch.int64)
    params = layer.init(fn.key(0), (), dtype=dtype)
    dweight = layer.vjp(params, x, torch.ones(5000, 1, dtype=dtype))[0]["weight"]
    assert dweight.dtype == dtype
    assert dweight.tolist() == [[pytest.approx(5000, rel=0.005)], [0]]


@given(st.data())
def test_gradients_of_few_rows_of_many(data):
    rows, padding_idx = data.draw(st.integers(4, 40)), data.draw(st.none() | st.integers(0, 3))
    layer, shape = fn.Embedding(rows, 2, padding_idx), (data.draw(st.integers(0, 3)), 3)
    x = torch.randint(rows, shape, dtype=data.draw(st.sampled_from([torch.int32, torch.int64])))
    x = x % data.draw(st.integers(1, 4))  # some come twice, and the one for padding
    params = layer.init(fn.key(0), (3,))
    grad = data.draw(strategies.tensors((*shape, 2), integers=True))
    exact = layer.vjp(params, x, grad)[0]["weight"]
    for dtype in (torch.bfloat16, torch.float16):
        half = optree.tree_map(lambda leaf, dtype=dtype: leaf.to(dtype), params)
        assert torch.equal(layer.vjp(half, x, grad.to(dtype))[0]["weight"], exact.to(dtype))


def test_few_rows_of_many_under_vmap():
    layer, x = fn.Embedding(50, 2), torch.tensor([[[3], [7]], [[7], [7]]])
    params, grad = layer.init(fn.key(0), (1,), dtype=torch.bfloat16), torch.ones(2, 1, 2).bfloat16()

    def dweight(x):
        return layer.vjp(params, x, grad)[0]["weight"]

    assert torch.equal(torch.func.vmap(dweight)(x), torch.stack([*map(dweight, x)]))


class Largest(TorchDispatchMode):
    """The numbers of the largest tensor of each dtype that an operation makes."""

    def __init__(self):
        super().__init__()
        self.numbers = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **kwargs or {})
        for leaf in optree.tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self.numbers[leaf.dtype] = max(leaf.numel(), self.numbers.get(leaf.dtype, 0))
        return made


def test_no_table_in_float32_beside_one_in_half_precision():
    layer, x = fn.Embedding(1000, 4), torch.tensor([[3, 999, 3]])
    params, grad = layer.init(fn.key(0), (3,), dtype=torch.bfloat16), torch.ones(1, 3, 4).bfloat16()
    with Largest() as largest:
        layer.vjp(params, x, grad)
    assert largest.numbers[torch.float32] < 100


@pytest.mark.parametrize("size", [1, 3])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("wrong", [-1, 4, 2**31 - 1])
def test_indices_without_a_row(size, dtype, wrong):
    layer = fn.Embedding(4, size)
    params, x = layer.init(fn.key(0), (2,)), torch.tensor([[1, 2], [wrong, 1]], dtype=dtype)
    numbers = f"{min(wrong, 1)} to {max(wrong, 2)}"
    message = f"{layer}: expected x in [0, 4), got numbers from {numbers}"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        layer.apply(params, x)
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.vjp(params, x, torch.zeros(2, 2, size))
    with pytest.raises(ValueError, match=f"^layer 0: {re.escape(message)}$"):
        fn.Sequential(layer, fn.ReLU()).apply((params, ()), x)


def test_x_that_is_not_of_indices():
    layer = fn.Embedding(4, 3)
    params = layer.init(fn.key(0), (2,))
    for dtype in (torch.float32, torch.bool, torch.uint8, torch.int16):
        with pytest.raises(TypeError, match=f"expected x to be int32 or int64, got {dtype}"):
            layer.apply(params, torch.zeros(1, 2, dtype=dtype))
    x = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(TypeError, match="expected params to be floating-point, got"):
        layer.apply({"weight": torch.zeros(4, 3, dtype=torch.int64)}, x)
    with pytest.raises(ValueError, match=re.escape("expected weight of shape (4, 3), got (5, 3)")):
        layer.apply({"weight": torch.zeros(5, 3)}, x)
    with pytest.raises(TypeError, match="expected x on the device of params, meta, got cpu"):
        layer.apply({"weight": torch.zeros(4, 3, device="meta")}, x)
    with pytest.raises(TypeError, match="expected grad to have the dtype and device"):
        layer.vjp(params, x, torch.zeros(1, 2, 3, dtype=torch.float64))


def test_padding_counts_from_the_end_as_in_torch():
    assert fn.Embedding(5, 2, padding_idx=-1) == fn.Embedding(5, 2, 4)
    assert repr(fn.Embedding(5, 2, -5)) == "Embedding(5, embedding_dim=2, padding_idx=0)"
    for wrong in (5, -6):
        message = f"Embedding: expected padding_idx in [-5, 5), got {wrong}"
        with pytest.raises(ValueError, match=re.escape(message)):
            fn.Embedding(5, 2, wrong)
    with pytest.raises(TypeError, match="Embedding: expected padding_idx to be an int"):
        fn.Embedding(5, 2, 1.5)


def test_drawn_as_torch_draws_them_or_as_it_is_told():
    weight = fn.Embedding(300, 40, padding_idx=-1).init(fn.key(0), (2,))["weight"]
    assert abs(float(weight[:-1].mean())) < 0.05
    assert weight[:-1].std() == pytest.approx(1, rel=0.05)
    assert not weight[-1].any()
    layer = fn.Embedding(4, 3, 1, weight_init=Ones())
    weight = layer.init(fn.key(0), (2,), dtype=torch.bfloat16)["weight"]
    assert weight.dtype == torch.bfloat16
    assert weight.sum(1).tolist() == [3, 0, 3, 3]


def test_in_a_network_that_is_mapped_over_and_compiled():
    net = fn.Sequential(fn.Embedding(7, 4, 0), fn.PositionalEmbedding(5), fn.Linear(2))
    params = net.init(fn.key(0), (3,), dtype=torch.float64)
    x, grad = torch.randint(7, (2, 6, 3)), torch.randn(2, 6, 3, 2, dtype=torch.float64)

    def step(params, x, grad):
        return net.apply(params, x), net.vjp(params, x, grad, input_grad=False)[0]

    each = [step(params, x[i], grad[i]) for i in range(2)]
    y, dparams = torch.func.vmap(step, in_dims=(None, 0, 0))(params, x, grad)
    for i in range(2):
        torch.testing.assert_close(
            (y[i], dparams[0]["weight"][i]), (each[i][0], each[i][1][0]["weight"])
        )
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(params, x[0], grad[0]), each[0])
    with FakeTensorMode(), torch.device("cuda"):
        fake = optree.tree_map(lambda leaf: torch.empty(leaf.shape), params)
        y, residuals = net.fwd(fake, torch.empty(2, 3, dtype=torch.int64))
        assert net.bwd(fake, residuals, torch.empty_like(y))[0][0]["weight"].shape == (7, 4)


@pytest.mark.filterwarnings("ignore:`torch.jit")
@pytest.mark.parametrize("dims", [(0, 0), (0, None), (None, 0)], ids=str)
def test_the_row_of_padding_has_no_derivative_under_transformations(dims):
    """PyTorch's rule for vmap forgets it, and so does forward mode."""
    layer = fn.Embedding(5, 2, padding_idx=0)
    params = fn.normal(fn.key(0), (3, 5, 2), dtype=torch.float64)
    params = {"weight": params if dims[0] == 0 else params[0]}
    x = torch.tensor([[[0, 1, 2]], [[3, 0, 1]], [[0, 0, 4]]])
    x = x if dims[1] == 0 else x[0]

    def one(params, x):
        return layer.apply(params, x).square().sum()

    def total(params):
        return torch.func.vmap(one, in_dims=dims)(params, x).sum()

    def by_hand(params, x):
        return layer.vjp(params, x, 2 * layer.apply(params, x))[0]["weight"]

    expected = torch.func.vmap(by_hand, in_dims=dims)(params, x)
    if dims[0] is None:
        expected = expected.sum(0)
    assert not expected[..., 0, :].any()
    compiled = torch.compile(torch.func.grad(total), backend="aot_eager", fullgraph=True)
    for derivative in (torch.func.grad(total), torch.func.jacfwd(total), compiled):
        torch.testing.assert_close(derivative(params)["weight"], expected)


def test_the_row_of_padding_in_an_exported_graph():
    """It holds one look-up."""
    layer = fn.Embedding(5, 2, padding_idx=0)
    params, x = layer.init(fn.key(0), (3,)), torch.tensor([[0, 1, 2]])

    class Module(torch.nn.Module):
        def forward(self, params, x):
            return layer.apply(params, x)

    graph = torch.export.export(Module(), (params, x)).graph
    assert [str(n.target) for n in graph.nodes if n.op == "call_function"] == [
        "aten.embedding.default"
    ]


# --- PositionalEmbedding


@given(st.data())
def test_positions(data):
    length, longest = data.draw(st.integers(0, 4)), data.draw(st.integers(4, 6))
    x = data.draw(strategies.tensors((data.draw(st.integers(0, 3)), length, 3), torch.float64))
    grad = data.draw(strategies.tensors(x.shape, torch.float64))
    layer = fn.PositionalEmbedding(longest)
    params = layer.init(fn.key(0), x.shape[1:], dtype=torch.float64)
    assert torch.equal(layer.apply(params, x), x + params["weight"][:length])
    dparams, dx = layer.vjp(params, x, grad)
    assert torch.equal(dx, grad)
    torch.testing.assert_close(dparams["weight"][:length], grad.sum(0))
    assert not dparams["weight"][length:].any()


def test_positions_in_place_are_the_same():
    layer = fn.PositionalEmbedding(6)
    net = fn.Sequential(fn.Linear(4), layer, fn.Linear(2))
    x, grad = torch.randn(2, 5, 3), torch.randn(2, 5, 2)
    params = net.init(fn.key(0), (5, 3))
    before, after = fn.Linear(4), fn.Linear(2)
    inner = before.apply(params[0], x)
    y = after.apply(params[2], layer.apply(params[1], inner))
    assert torch.equal(net.apply(params, x), y)
    check_vjp(net, params, x, grad=grad)


def test_positions_drawn_and_refused():
    layer = fn.PositionalEmbedding(200)
    weight = layer.init(fn.key(0), (10, 50))["weight"]
    assert weight.shape == (200, 50)
    assert weight.std() == pytest.approx(0.02, rel=0.05)
    drawn = fn.PositionalEmbedding(3, weight_init=Constant(2.0)).init(fn.key(0), (1, 1))
    assert drawn["weight"].tolist() == [[2], [2], [2]]
    assert fn.PositionalEmbedding(3, Uniform()) != fn.PositionalEmbedding(3)
    message = f"{layer}: expected sequences of at most 200, got 201"
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.apply({"weight": weight}, torch.zeros(1, 201, 50))
    with pytest.raises(ValueError, match=re.escape(message)):
        layer.init(fn.key(0), (201, 50))
    with pytest.raises(
        ValueError, match=re.escape("expected x of shape (N, T, 50), got (1, 3, 4)")
    ):
        layer.apply({"weight": weight}, torch.zeros(1, 3, 4))


@pytest.mark.parametrize("padding_idx", [None, 0, 2])
@pytest.mark.parametrize(
    "around", [lambda layer: layer, lambda layer: fn.Sequential(layer, fn.Tanh())]
)
def test_check_vjp_knows_the_row_of_padding(around, padding_idx):
    """Its gradient is 0 by intention; that of the others is checked."""
    net = around(fn.Embedding(4, 2, padding_idx))
    params = net.init(fn.key(0), (3,), dtype=torch.float64)
    check_vjp(net, params, torch.tensor([[0, 1, 2], [2, 0, 3]]))
