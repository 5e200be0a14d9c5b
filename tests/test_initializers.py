"""Initialisers: their distributions, torch.nn's scales, and that they are values files can hold."""

import pickle
import re

import pytest
import torch

import funcnet as fn

init = fn.initializers
ALL = [
    init.Zeros(),
    init.Ones(),
    init.Constant(0.5),
    init.Uniform(-2.0, 3.0),
    init.Normal(1.0, 0.5),
    init.TruncatedNormal(0.3),
    init.Orthogonal(2.0),
    init.KaimingUniform(a=0.5),
    init.KaimingNormal(mode="fan_out", nonlinearity="relu"),
    init.XavierUniform(1.5),
    init.XavierNormal(),
    init.LecunNormal(),
]
SHAPE = (30, 20, 3, 2)


@pytest.mark.parametrize("initializer", ALL, ids=repr)
def test_it_is_a_value_that_files_hold(initializer, tmp_path):
    assert eval(repr(initializer), vars(fn)) == initializer
    assert pickle.loads(pickle.dumps(initializer)) == initializer
    assert hash(initializer) == hash(eval(repr(initializer), vars(fn)))
    net = fn.Sequential(fn.Conv2d(4, 3, weight_init=initializer))
    params = net.init(fn.key(0), (2, 5, 5))
    assert torch.equal(
        params[0]["weight"], initializer(fn.split(fn.fold_in(fn.key(0), 0))[0], (4, 2, 3, 3))
    )
    fn.save_model(tmp_path / "model", net, params)
    assert fn.load_model(tmp_path / "model")[0] == net


@pytest.mark.parametrize("initializer", ALL, ids=repr)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_key_decides_and_the_dtype_rounds(initializer, dtype):
    x = initializer(fn.key(1), SHAPE, dtype=dtype)
    assert (x.shape, x.dtype) == (SHAPE, dtype)
    assert torch.equal(x, initializer(fn.key(1), SHAPE, dtype=dtype))
    assert initializer(fn.key(1), SHAPE, device="meta").shape == SHAPE
    constant = isinstance(initializer, init.Constant)
    assert constant == torch.equal(x, initializer(fn.key(2), SHAPE, dtype=dtype))


TORCHS = {
    init.KaimingUniform(a=0.5): lambda w: torch.nn.init.kaiming_uniform_(w, a=0.5),
    init.KaimingNormal(mode="fan_out", nonlinearity="relu"): lambda w: (
        torch.nn.init.kaiming_normal_(w, mode="fan_out", nonlinearity="relu")
    ),
    init.KaimingNormal(nonlinearity="tanh"): lambda w: torch.nn.init.kaiming_normal_(
        w, nonlinearity="tanh"
    ),
    init.KaimingUniform(nonlinearity="selu"): lambda w: torch.nn.init.kaiming_uniform_(
        w, nonlinearity="selu"
    ),
    init.XavierUniform(1.5): lambda w: torch.nn.init.xavier_uniform_(w, 1.5),
    init.XavierNormal(): torch.nn.init.xavier_normal_,
    init.TruncatedNormal(0.3): lambda w: torch.nn.init.trunc_normal_(w, std=0.3, a=-0.6, b=0.6),
}


@pytest.mark.parametrize("ours", TORCHS, ids=repr)
def test_the_distribution_is_torchs(ours):
    torch.manual_seed(0)
    a = ours(fn.key(3), (200, 100, 3, 2))
    b = TORCHS[ours](torch.empty(200, 100, 3, 2))
    for q in (0.0, 0.05, 0.25, 0.5, 0.9, 1.0):
        tolerance = 0.2 if q in (0.0, 1.0) else 0.02
        got, expected = (x.flatten().kthvalue(1 + int(q * (x.numel() - 1)))[0] for x in (a, b))
        assert abs(float(got - expected)) < tolerance * float(b.std())


def test_lecun_has_the_variance_of_its_fan():
    x = init.LecunNormal()(fn.key(0), (400, 50, 3), dtype=torch.float64)
    assert float(x.var()) == pytest.approx(1 / 150, rel=0.02)


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (6, 2, 3), (2, 3, 2, 2)])
def test_orthogonal_rows_or_columns(shape):
    q = init.Orthogonal(2.0)(fn.key(0), shape, dtype=torch.float64).reshape(shape[0], -1)
    gram = q @ q.T if q.shape[0] <= q.shape[1] else q.T @ q
    torch.testing.assert_close(gram, 4 * torch.eye(len(gram), dtype=torch.float64))


@pytest.mark.parametrize(
    "initializer", [i for i in ALL if "Kaiming" in repr(i) or "Orth" in repr(i)], ids=repr
)
def test_a_fan_needs_two_axes(initializer):
    message = f"{initializer}: expected a shape of at least 2 axes, (O, I, …), got (3,)"
    with pytest.raises(ValueError, match=re.escape(message)):
        initializer(fn.key(0), (3,))


def test_bad_settings():
    with pytest.raises(ValueError, match="TruncatedNormal: expected std to be finite and >= 0"):
        init.TruncatedNormal(-1.0)
    with pytest.raises(ValueError, match='expected mode to be "fan_in" or "fan_out", got \'fan\''):
        init.KaimingUniform(mode="fan")
    with pytest.raises(ValueError, match=r"Uniform: expected low <= high, got 1\.0 and 0\.0"):
        init.Uniform(1.0, 0.0)
