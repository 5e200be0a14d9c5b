"""Layers that move entries: PyTorch's order, memory of its own, refusals, files and reprs."""

import pickle
import re
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcnet as fn
from funcnet.testing import check_vjp, strategies
from funcnet.testing.registry.shape import ROWS

FUNCTIONS = [
    (fn.Identity(), (2, 3), lambda x: x),
    (fn.Flatten(), (2, 3, 4), lambda x: x.flatten(1)),
    (fn.Flatten(2, -2), (2, 3, 2, 4), lambda x: x.flatten(2, -2)),
    (fn.Flatten(-1), (2, 3), lambda x: x),
    (fn.Reshape(4, -1), (2, 6), lambda x: x.reshape(len(x), 4, 3)),
    (fn.Reshape(6), (2, 3), lambda x: x.reshape(len(x), 6)),
    (fn.Reshape(), (1, 1), lambda x: x.reshape(len(x))),
    (fn.Reshape(0, 5), (3, 0), lambda x: x.reshape(len(x), 0, 5)),
    (fn.Permute(0, 3, 1, 2), (2, 3, 4), lambda x: x.permute(0, 3, 1, 2)),
    (fn.Permute(0, -1, -3, 2), (2, 3, 4), lambda x: x.permute(0, -1, -3, 2)),
    (fn.Permute(0, 1), (3,), lambda x: x),
    (fn.Select(1, -1), (3, 2), lambda x: x[:, -1]),
    (fn.Select(-1, 1), (3, 2, 2), lambda x: x[..., 1]),
]
functions = pytest.mark.parametrize(
    ("layer", "shape", "function"), FUNCTIONS, ids=[repr(layer) for layer, *_ in FUNCTIONS]
)


@functions
@given(st.integers(0, 3), st.data())
def test_value_and_gradient(layer, shape, function, batch, data):
    x = data.draw(strategies.tensors((batch, *shape)))
    leaf = x.clone().requires_grad_()
    expected = function(leaf)
    y = layer.apply((), x)
    assert torch.equal(y, expected)
    assert y.shape[1:] == layer.out_shape(shape)
    grad = data.draw(strategies.tensors(y.shape))
    dparams, dx = layer.vjp((), x, grad)
    assert dparams == ()
    assert torch.equal(dx, torch.autograd.grad(expected, leaf, grad)[0])


@functions
def test_memory_of_its_own(layer, shape, function):
    x = torch.randn(2, *shape)
    y = layer.apply((), x)
    grad = torch.randn_like(y)
    dx = layer.vjp((), x, grad)[1]
    assert not y.numel() or y.untyped_storage().data_ptr() != x.untyped_storage().data_ptr()
    assert not y.numel() or dx.untyped_storage().data_ptr() != grad.untyped_storage().data_ptr()


@functions
def test_a_network_that_owns_x_copies_nothing_and_gets_the_same(layer, shape, function):
    net = fn.Sequential(fn.PReLU(), layer, fn.PReLU())  # which own what they return
    x = fn.normal(fn.key(0), (2, *shape))
    params = net.init(fn.key(1), shape)
    inner = fn.PReLU().apply(params[0], x)
    expected = fn.PReLU().apply(params[2], layer.apply((), inner))
    assert torch.equal(net.apply(params, x), expected)
    if x.numel():
        check_vjp(net, params, x)
    if hasattr(layer, "_fwd_"):
        y = layer._fwd_((), inner, None)[0]
        assert y.untyped_storage().data_ptr() == inner.untyped_storage().data_ptr()


def test_y_is_row_major_and_dx_in_the_memory_format_of_x():
    for shape, last in [
        ((2, 3, 4, 5), torch.channels_last),
        ((2, 3, 4, 5, 2), torch.channels_last_3d),
    ]:
        x = torch.randn(shape).contiguous(memory_format=last)
        y = fn.Flatten().apply((), x)
        assert y.is_contiguous()
        assert torch.equal(y, x.flatten(1))
        assert fn.Flatten().vjp((), x, y)[1].is_contiguous(memory_format=last)
        assert fn.Flatten().vjp((), x.contiguous(), y)[1].is_contiguous()


@functions
def test_repr_pickle_and_files(layer, shape, function, tmp_path):
    assert eval(repr(layer), vars(fn)) == layer
    assert pickle.loads(pickle.dumps(layer)) == layer
    assert hash(pickle.loads(pickle.dumps(layer))) == hash(layer)
    fn.save_model(tmp_path / "model", layer, ())
    assert fn.load_model(tmp_path / "model") == (layer, ())


@given(strategies.cases(strategies.layers(*(row.layer for row in ROWS))))
def test_gradients(case):
    check_vjp(*case)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: fn.Flatten(0), ValueError, "Flatten: expected start_dim not to be 0, the batch"),
        (lambda: fn.Flatten(1, 0), ValueError, "Flatten: expected end_dim not to be 0, the batch"),
        (lambda: fn.Flatten(1.0), TypeError, "Flatten: expected start_dim to be an int, got 1.0"),
        (lambda: fn.Select(0, 1), ValueError, "Select: expected dim not to be 0, the batch, got 0"),
        (lambda: fn.Select(1, 0.5), TypeError, "Select: expected index to be an int, got 0.5"),
        (lambda: fn.Permute(1, 0), ValueError, "Permute: expected a permutation of dims that star"),
        (lambda: fn.Permute(0, 2), ValueError, "the batch, got (0, 2)"),
        (lambda: fn.Permute(0, 1, 1), ValueError, "the batch, got (0, 1, 1)"),
        (lambda: fn.Permute(), ValueError, "the batch, got ()"),
        (lambda: fn.Permute(0, -3), ValueError, "the batch, got (0, -3)"),
        (lambda: fn.Permute(0, 1.5), TypeError, "Permute: expected every entry of dims to be an i"),
        (
            lambda: fn.Permute((0, 1), 2),
            TypeError,
            "expected every entry of dims to be an int, got (0",
        ),
        (lambda: fn.Reshape(-1, -1), ValueError, "Reshape: expected at most one size of -1, got ("),
        (
            lambda: fn.Reshape(-2),
            ValueError,
            "Reshape: expected every entry of shape >= -1, got -2",
        ),
        (lambda: fn.Reshape(2.0), TypeError, "expected every entry of shape to be an int, got 2.0"),
    ],
)
def test_refused_settings(make, error, message):
    with pytest.raises(error, match=re.escape(message)):
        make()


@pytest.mark.parametrize(
    ("layer", "shape", "message"),
    [
        (fn.Flatten(-3), (2, 3), "expected start_dim to be an axis after the batch of x of shape"),
        (fn.Flatten(), (), "expected start_dim to be an axis after the batch of x of shape (N,), "),
        (fn.Flatten(1, 3), (2, 3), "expected end_dim to be an axis after the batch of x of shape"),
        (fn.Flatten(2, 1), (2, 3), "expected start_dim not to lie after end_dim, got the axes 2"),
        (
            fn.Select(-2, 0),
            (3,),
            "expected dim to be an axis after the batch of x of shape (N, 3),",
        ),
        (fn.Select(1, 3), (3,), "expected an axis that has the index 3, got one of size 3"),
        (fn.Select(1, -4), (3,), "expected an axis that has the index -4, got one of size 3"),
        (fn.Permute(0, 2, 1), (3,), "expected x with 3 axes, got 2"),
        (fn.Reshape(2, 3), (5,), "expected the entries of an example to be 6, got 5 in shape (5,)"),
        (fn.Reshape(2, -1), (5,), "the entries of an example to be a multiple of 2, got 5"),
        (fn.Reshape(0, -1), (0,), "the entries of an example to be a multiple of 0, got 0"),
    ],
)
def test_refused_shapes(layer, shape, message):
    """By out_shape, init and apply alike."""
    expected = re.escape(f"{layer}: ") + ".*" + re.escape(message)
    for call in (
        lambda: layer.out_shape(shape),
        lambda: layer.init(fn.key(0), shape),
        lambda: layer.apply((), torch.zeros(2, *shape)),
    ):
        with pytest.raises(ValueError, match=expected):
            call()


def test_one_tuple_as_torch_takes_it():
    assert fn.Reshape((2, -1)) == fn.Reshape([2, -1]) == fn.Reshape(2, -1)
    assert fn.Permute((0, 2, 1)) == fn.Permute([0, 2, 1]) == fn.Permute(0, 2, 1)


def test_replaced_fields():
    assert replace(fn.Reshape(2, 3)) == fn.Reshape(2, 3)
    assert replace(fn.Reshape(2, 3), shape=(-1,)) == fn.Reshape(-1)
    assert replace(fn.Permute(0, 2, 1), dims=(0, -1, 1)) == fn.Permute(0, 2, 1)
    with pytest.raises(TypeError, match="Reshape: expected shape to be a tuple, got 6"):
        replace(fn.Reshape(2, 3), shape=6)
    with pytest.raises(TypeError, match="Permute: expected ints by position, got also axes"):
        fn.Permute(0, 1, axes=2)
