"""MultiheadAttention: kernel and products, dropout, awkward lengths and logits."""

import math

import optree
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_properties import close

import funcnet as fn
from funcnet.ops import attention
from funcnet.testing import check_vjp, strategies

DOUBLE = strategies.cases(strategies.layers(fn.MultiheadAttention), dtypes=st.just(torch.float64))


def by_hand(layer, params, x):
    """Head by head, as the formula says."""
    size = x.shape[-1] // layer.num_heads
    qkv = x @ params["in_proj_weight"].T + params.get("in_proj_bias", 0)
    steps = torch.arange(x.shape[1])
    heads = []
    for q, k, v in zip(*(part.split(size, -1) for part in qkv.chunk(3, -1)), strict=True):
        s = torch.einsum("nid,njd->nij", q, k) / math.sqrt(size)
        if layer.causal:
            s = s.masked_fill(steps[:, None] < steps, -torch.inf)
        heads.append(s.softmax(-1) @ v)
    out = params["out_proj"]
    return torch.cat(heads, -1) @ out["weight"].T + out.get("bias", 0)


def with_products(monkeypatch):
    monkeypatch.setattr(attention, "_is_for_kernel", lambda *tensors: False)


@given(DOUBLE)
def test_value_and_gradients_are_those_of_the_formula(case):
    layer, params, x = case
    torch.testing.assert_close(layer.apply(params, x), by_hand(layer, params, x))
    leaves = optree.tree_map(lambda leaf: leaf.clone().requires_grad_(), (params, x))
    y = by_hand(layer, *leaves)
    grad = fn.normal(fn.key(1), y.shape, dtype=x.dtype)
    expected = torch.autograd.grad(y, optree.tree_leaves(leaves), grad)
    close(layer.vjp(params, x, grad), list(expected), rtol=1e-10, atol=1e-10)


@given(DOUBLE)
def test_kernel_and_products_give_the_same_numbers(case):
    layer, params, x = case
    grad = fn.normal(fn.key(1), x.shape, dtype=x.dtype)
    y, gradients = layer.apply(params, x), layer.vjp(params, x, grad)
    with pytest.MonkeyPatch.context() as patch:
        with_products(patch)
        close(layer.apply(params, x), y, rtol=1e-10, atol=1e-10)
        close(layer.vjp(params, x, grad), gradients, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("steps", [1, 2, 33, 600])  # and beyond a block of the kernel
def test_lengths(steps, causal):
    layer = fn.MultiheadAttention(2, causal=causal)
    params = layer.init(fn.key(0), (steps, 6), dtype=torch.float64)
    x, grad = (fn.normal(k, (2, steps, 6), dtype=torch.float64) for k in fn.split(fn.key(1)))
    leaves = optree.tree_map(lambda leaf: leaf.clone().requires_grad_(), (params, x))
    y = by_hand(layer, *leaves)
    torch.testing.assert_close(layer.apply(params, x), y.detach())
    expected = torch.autograd.grad(y, optree.tree_leaves(leaves), grad)
    close(layer.vjp(params, x, grad), list(expected), rtol=1e-9, atol=1e-9)


def test_a_sequence_without_steps():
    """PyTorch's kernel divides by the number of steps."""
    layer = fn.MultiheadAttention(2)
    params, x = layer.init(fn.key(0), (0, 4)), torch.zeros(3, 0, 4)
    assert layer.apply(params, x).shape == (3, 0, 4)
    dparams, dx = layer.vjp(params, x, x)
    assert dx.shape == (3, 0, 4)
    assert not any(leaf.any() for leaf in optree.tree_leaves(dparams))


@pytest.mark.parametrize("products", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_huge_logits(products, causal, monkeypatch):
    """A softmax of logits of ±10⁴ chooses the largest, and no gradient is NaN."""
    if products:
        with_products(monkeypatch)
    layer = fn.MultiheadAttention(1, bias=False, causal=causal)
    eye = torch.eye(2)
    params = {"in_proj_weight": torch.cat((100 * eye, 100 * eye, eye)), "out_proj": {"weight": eye}}
    x = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]]])
    torch.testing.assert_close(layer.apply(params, x), x)  # each step finds itself
    gradients = layer.vjp(params, x, torch.ones_like(x))
    assert all(leaf.isfinite().all() for leaf in optree.tree_leaves(gradients))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("products", [False, True])
def test_half_precision(dtype, products, monkeypatch):
    if products:
        with_products(monkeypatch)
    layer = fn.MultiheadAttention(2, causal=True)
    params = layer.init(fn.key(0), (40, 16), dtype=dtype)
    x, grad = (fn.normal(k, (2, 40, 16), dtype=dtype) for k in fn.split(fn.key(1)))
    double = optree.tree_map(torch.Tensor.double, (params, x, grad))
    results = layer.apply(params, x), layer.vjp(params, x, grad)
    expected = layer.apply(*double[:2]), layer.vjp(*double)
    for ours, exact in zip(*map(optree.tree_leaves, (results, expected)), strict=True):
        assert ours.dtype == dtype
        bound = 4 * torch.finfo(dtype).eps * exact.abs().max()
        assert (ours.double() - exact).abs().max() <= bound


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_half_precision_are_as_exact_as_the_kernel(dtype, monkeypatch):
    layer = fn.MultiheadAttention(2, causal=True)
    params = layer.init(fn.key(0), (64, 16), dtype=dtype)
    x, grad = 4 * fn.normal(fn.key(1), (4, 64, 16), dtype=dtype), fn.normal(fn.key(2), (4, 64, 16))
    case = params, x, grad.to(dtype)
    double = optree.tree_map(torch.Tensor.double, case)
    exact = layer.apply(*double[:2]), layer.vjp(*double)
    kernels = layer.apply(*case[:2]), layer.vjp(*case)
    with_products(monkeypatch)
    found = layer.apply(*case[:2]), layer.vjp(*case)
    for ours, theirs, right in zip(*map(optree.tree_leaves, (found, kernels, exact)), strict=True):
        assert (ours - right).norm() <= 1.1 * (theirs - right).norm()


def test_a_step_does_not_see_later_ones():
    layer = fn.MultiheadAttention(2, causal=True)
    params = layer.init(fn.key(0), (6, 4), dtype=torch.float64)
    x = fn.normal(fn.key(1), (1, 6, 4), dtype=torch.float64)
    changed = x.clone()
    changed[:, 4:] += 1
    y, other = layer.apply(params, x), layer.apply(params, changed)
    torch.testing.assert_close(y[:, :4], other[:, :4])
    assert not torch.allclose(y[:, 4:], other[:, 4:])
    _, dx = layer.vjp(params, x, torch.ones_like(x).index_fill(1, torch.arange(3, 6), 0.0))
    assert not dx[:, 3:].any()


# --- Dropout


def test_dropout_needs_a_key():
    layer, without = fn.MultiheadAttention(2, dropout=0.5), fn.MultiheadAttention(2)
    params = layer.init(fn.key(0), (5, 4))
    x = fn.normal(fn.key(1), (2, 5, 4))
    assert torch.equal(layer.apply(params, x), without.apply(params, x))
    assert torch.equal(without.apply(params, x, key=fn.key(2)), without.apply(params, x))
    dropped = layer.apply(params, x, key=fn.key(2))
    assert not torch.allclose(dropped, without.apply(params, x))
    assert torch.equal(dropped, layer.apply(params, x, key=fn.key(2)))
    assert not torch.equal(dropped, layer.apply(params, x, key=fn.key(3)))


def test_dropout_scales_what_it_keeps():
    """With equal attention to all steps, y is the mean of the kept ones, over 1 − p."""
    layer = fn.MultiheadAttention(1, bias=False, dropout=0.25)
    zero, eye = torch.zeros(2, 2), torch.eye(2)
    params = {"in_proj_weight": torch.cat((zero, zero, eye)), "out_proj": {"weight": eye}}
    steps = 2000
    y = layer.apply(params, torch.ones(1, steps, 2), key=fn.key(0))
    kept = y * 0.75 * steps
    torch.testing.assert_close(kept, kept.round(), rtol=0, atol=0.1)
    assert torch.equal(kept[..., 0].round(), kept[..., 1].round())  # one mask a head
    assert abs(y.mean() - 1) < 0.01
    assert kept.round().unique().numel() > 20  # each step has its own


@pytest.mark.parametrize("p", [0.3, 1.0])
@pytest.mark.parametrize("causal", [False, True])
def test_gradient_under_dropout(causal, p):
    layer = fn.MultiheadAttention(2, causal=causal, dropout=p)
    params = layer.init(fn.key(0), (5, 4), dtype=torch.float64)
    x = fn.normal(fn.key(1), (2, 5, 4), dtype=torch.float64)
    check_vjp(layer, params, x, key=fn.key(2))


def test_dropping_everything_leaves_the_bias():
    layer = fn.MultiheadAttention(2, dropout=1.0)
    params = layer.init(fn.key(0), (5, 4))
    params["out_proj"]["bias"] = torch.arange(4.0)
    y = layer.apply(params, fn.normal(fn.key(1), (2, 5, 4)), key=fn.key(2))
    assert torch.equal(y, torch.arange(4.0).expand(2, 5, 4))


# --- Memory, parameters, errors


def entries(tree):
    return sum(leaf.untyped_storage().nbytes() for leaf in optree.tree_leaves(tree)) // 4


@pytest.mark.parametrize("products", [False, True])
def test_residuals_are_linear_in_the_number_of_steps(products, monkeypatch):
    if products:
        with_products(monkeypatch)
    layer = fn.MultiheadAttention(2)
    params = layer.init(fn.key(0), (64, 8))
    _, residuals = layer.fwd(params, torch.zeros(1, 512, 8))
    assert entries(residuals) <= 512 * (8 + 3 * 8 + 8 + 2)  # x, qkv, o and log Σ exp a head


def test_bwd_under_vmap_of_residuals_from_outside():
    """The kernel has no rule for vmap; the products take over."""
    layer = fn.MultiheadAttention(2, causal=True)
    params = layer.init(fn.key(0), (5, 4), dtype=torch.float64)
    x = fn.normal(fn.key(1), (2, 5, 4), dtype=torch.float64)
    grads = fn.normal(fn.key(2), (3, 2, 5, 4), dtype=torch.float64)
    _, residuals = layer.fwd(params, x)
    mapped = torch.func.vmap(lambda grad: layer.bwd(params, residuals, grad))(grads)
    each = [layer.bwd(params, residuals, grad) for grad in grads]
    close(mapped, optree.tree_map(lambda *leaves: torch.stack(leaves), *each))


def test_autograd_may_follow_twice():
    """The kernel has no second derivative either."""
    layer = fn.MultiheadAttention(2, causal=True)
    params = layer.init(fn.key(0), (3, 4), dtype=torch.float64)
    x = fn.normal(fn.key(1), (2, 3, 4), dtype=torch.float64).requires_grad_()
    torch.autograd.gradgradcheck(lambda x: layer.apply(params, x), (x,))


def test_autograd_may_follow_bwd_of_residuals_from_outside():
    layer = fn.MultiheadAttention(2, causal=True)
    params = layer.init(fn.key(0), (3, 4), dtype=torch.float64)
    x, grad = (fn.normal(fn.key(seed), (2, 3, 4), dtype=torch.float64) for seed in (1, 2))
    _, residuals = layer.fwd(params, x)
    grad.requires_grad_()
    assert torch.autograd.gradcheck(lambda grad: layer.bwd(params, residuals, grad)[1], (grad,))


@pytest.mark.parametrize("bias", [False, True])
def test_parameters_are_drawn_as_torch_draws_them(bias):
    size = 64
    params = fn.MultiheadAttention(4, bias=bias).init(fn.key(0), (3, size))
    torch.manual_seed(0)
    theirs = torch.nn.MultiheadAttention(size, 4, bias=bias).state_dict()
    ours = {"in_proj_weight": params["in_proj_weight"]}
    ours |= {f"out_proj.{name}": leaf for name, leaf in params["out_proj"].items()}
    if bias:
        ours["in_proj_bias"] = params["in_proj_bias"]
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    for name, leaf in ours.items():
        if name.endswith("bias"):
            assert not leaf.any()
            assert not theirs[name].any()
        else:
            bound = {"in_proj_weight": (6 / (4 * size)) ** 0.5}.get(name, size**-0.5)
            for drawn in (leaf, theirs[name]):
                assert 0.98 * bound < drawn.abs().max() <= bound
                assert abs(drawn.std() / (bound / 3**0.5) - 1) < 0.03


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"MultiheadAttention: expected num_heads >= 1, got 0"):
        fn.MultiheadAttention(0)
    with pytest.raises(
        ValueError, match=r"MultiheadAttention: expected dropout in \[0, 1\], got 1.5"
    ):
        fn.MultiheadAttention(2, dropout=1.5)
    layer = fn.MultiheadAttention(4)
    message = r"MultiheadAttention\(4\): expected a last axis that num_heads=4 divides, got 6"
    with pytest.raises(ValueError, match=message):
        layer.init(fn.key(0), (3, 6))
    with pytest.raises(ValueError, match="expected at least 1 channel, got 0"):
        layer.init(fn.key(0), (3, 0))
    assert fn.MultiheadAttention(1).out_shape((3, 1)) == (3, 1)
    params = layer.init(fn.key(0), (3, 8))
    with pytest.raises(ValueError, match=r"expected x of shape \(N, T, 8\), got \(2, 3, 0\)"):
        layer.apply(params, torch.zeros(2, 3, 0))
    with pytest.raises(ValueError, match=r"expected x of shape \(N, T, E\), got \(3, 8\)"):
        layer.apply(params, torch.zeros(3, 8))
    with pytest.raises(ValueError, match=r"expected x of shape \(N, T, 8\), got \(2, 3, 12\)"):
        layer.apply(params, torch.zeros(2, 3, 12))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_dropout_of_weights_compiles_for_any_key():
    from test_transforms import compile_whole

    layer = fn.MultiheadAttention(2, dropout=0.3)
    params, x = layer.init(fn.key(0), (5, 8)), fn.normal(fn.key(1), (2, 5, 8))
    compiled = compile_whole(lambda params, x, key: layer.apply(params, x, key=key))
    for seed in (2, 3):
        key = fn.key(seed)
        torch.testing.assert_close(compiled(params, x, key), layer.apply(params, x, key=key))
