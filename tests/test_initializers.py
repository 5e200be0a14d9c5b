"""Initialisers: their distributions, torch.nn's scales, and that they are values files can hold."""

import copy
import inspect
import math
import pickle
import re
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import funcnet as fn
from funcnet import tree as trees

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
OF_FANS = [
    i for i in ALL if any(name in repr(i) for name in ("Kaiming", "Xavier", "Lecun", "Orthogonal"))
]
SHAPE = (30, 20, 3, 2)
every = pytest.mark.parametrize("initializer", ALL, ids=repr)


def test_every_initialiser_is_in_the_list():
    assert {type(i) for i in ALL} == {getattr(init, name) for name in init.__all__} - {
        init.Initializer
    }


# --- Values


@every
def test_a_value_that_files_hold(initializer, tmp_path):
    for other in (
        eval(repr(initializer), dict(vars(fn))),
        pickle.loads(pickle.dumps(initializer)),
        copy.deepcopy(initializer),
    ):
        assert other == initializer
        assert hash(other) == hash(initializer)
    assert sum(initializer == other for other in ALL) == 1
    net = fn.Sequential(fn.Conv2d(4, 3, weight_init=initializer, bias_init=init.Normal()))
    assert eval(repr(net), dict(vars(fn))) == net
    params = net.init(fn.key(0), (2, 5, 5))
    assert torch.equal(
        params[0]["weight"], initializer(fn.split(fn.fold_in(fn.key(0), 0))[0], (4, 2, 3, 3))
    )
    fn.save_model(tmp_path / "model", net, params)
    assert fn.load_model(tmp_path / "model")[0] == net
    name = f"initializers.{type(initializer).__name__}"
    assert trees.class_name(type(initializer)) == name
    assert name in str(fn.inspect(tmp_path / "model"))


def test_an_initialiser_of_ones_own_is_shown_by_its_name():
    @dataclass(frozen=True)
    class Halves(init.Initializer):
        """1/2 everywhere."""

        def _draw(self, key, shape, dtype, device):
            return torch.full(shape, 0.5, dtype=dtype, device=device)

    assert repr(Halves()) == "Halves()"
    layer = fn.Linear(2, weight_init=Halves())
    assert repr(layer) == "Linear(2, weight_init=Halves())"
    assert torch.equal(layer.init(fn.key(0), (3,))["weight"], torch.full((2, 3), 0.5))
    with pytest.raises(TypeError, match="expected weight_init to be an initialiser or None, got 0"):
        fn.Linear(2, weight_init=0.5)


def test_files_know_public_initialisers_alone():
    for name in ("Key", "_Kaiming", "Hyperparameters", "math", "Nothing"):
        assert trees.class_named(f"initializers.{name}") is None
    assert trees.class_named("Zeros") is None
    assert trees.class_named("layers.Conv2d") is None


def test_hyperparameters_are_converted_and_have_defaults():
    assert init.Uniform() == init.Uniform(0.0, 1.0)
    assert init.Normal() == init.Normal(mean=0.0, std=1.0)
    assert init.TruncatedNormal() == init.TruncatedNormal(std=1.0)
    assert init.Orthogonal() == init.Orthogonal(gain=1.0)
    assert init.XavierUniform() == init.XavierUniform(gain=1.0)
    assert init.KaimingUniform() == init.KaimingUniform(0.0, "fan_in", "leaky_relu")
    assert init.KaimingNormal() == init.KaimingNormal(
        a=0.0, mode="fan_in", nonlinearity="leaky_relu"
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: init.TruncatedNormal(-1.0), "TruncatedNormal: expected std to be finite and >= 0"),
        (lambda: init.Normal(std=math.nan), "Normal: expected std to be finite and >= 0, got nan"),
        (lambda: init.Constant(math.inf), "Constant: expected value to be finite, got inf"),
        (
            lambda: init.Constant(1e6)(fn.key(0), (2,), torch.float16),
            "Constant(1000000.0): expected a value within torch.float16",
        ),
        (
            lambda: init.Normal(1e6)(fn.key(0), (2,), torch.float16),
            "normal: expected mean ± std within torch.float16, got 1000000.0 ± 1.0",
        ),
        (
            lambda: init.TruncatedNormal(4e4)(fn.key(0), (2,), torch.float16),
            "TruncatedNormal(std=40000.0): expected numbers up to 80000.0 to be within "
            "torch.float16",
        ),
        (
            lambda: init.Orthogonal(-1e5)(fn.key(0), (2, 2), torch.float16),
            "Orthogonal(gain=-100000.0): expected numbers up to 100000.0 to be within "
            "torch.float16",
        ),
        (lambda: init.Uniform(1.0, 0.0), "Uniform: expected low <= high, got 1.0 and 0.0"),
        (lambda: init.Uniform(0.0, math.nan), "Uniform: expected high to be finite, got nan"),
        (lambda: init.XavierNormal(-1.0), "XavierNormal: expected gain to be finite and >= 0"),
        (lambda: init.Orthogonal(math.nan), "Orthogonal: expected gain to be finite, got nan"),
        (
            lambda: init.KaimingUniform(mode="fan"),
            'KaimingUniform: expected mode to be "fan_in" or "fan_out", got \'fan\'',
        ),
        (
            lambda: init.KaimingNormal(nonlinearity="gelu"),
            'KaimingNormal: expected nonlinearity to be "leaky_relu" or "linear" or "conv1d" or '
            '"conv2d" or "conv3d" or "sigmoid" or "conv_transpose1d" or "conv_transpose2d" or '
            '"conv_transpose3d" or "tanh" or "relu" or "selu", got',
        ),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make()


# --- Drawing


@every
@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str
)
def test_the_key_decides(initializer, dtype, device):
    x = initializer(fn.key(1), SHAPE, dtype, device)
    assert (tuple(x.shape), x.dtype, x.device.type) == (SHAPE, dtype, device)
    assert x.is_contiguous()
    torch.manual_seed(7)
    state = torch.get_rng_state()
    assert torch.equal(x.cpu(), initializer(fn.key(1), SHAPE, dtype=dtype))
    assert torch.equal(torch.get_rng_state(), state)
    constant = isinstance(initializer, init.Constant)
    assert constant == torch.equal(x, initializer(fn.key(2), SHAPE, dtype, device))


@every
def test_defaults_and_the_meta_device(initializer):
    x = initializer(fn.key(0), SHAPE)
    assert (x.dtype, x.device.type) == (torch.float32, "cpu")
    x = initializer(fn.key(0), SHAPE, torch.float64, "meta")
    assert (tuple(x.shape), x.dtype, x.device.type) == (SHAPE, torch.float64, "meta")
    with torch.device("meta"):
        assert initializer(fn.key(0), [2, 3]).device.type == "cpu"
    assert list(inspect.signature(initializer).parameters) == ["key", "shape", "dtype", "device"]


@every
def test_no_memory_is_needed_on_the_meta_device(initializer):
    shape = (10**8, 10**8)
    assert initializer(fn.key(0), shape, device="meta").shape == shape


@every
@given(st.lists(st.integers(0, 4), min_size=2, max_size=4))
def test_any_shape(initializer, shape):
    x = initializer(fn.key(0), shape, dtype=torch.float64)
    assert list(x.shape) == shape
    assert x.isfinite().all()


@every
def test_what_is_no_key_shape_or_dtype(initializer):
    with pytest.raises(TypeError, match="expected a key made by funcnet"):
        initializer(0, (2, 3))
    with pytest.raises(TypeError, match="expected a floating-point dtype"):
        initializer(fn.key(0), (2, 3), torch.int64)
    with pytest.raises(TypeError, match="expected shape to be a tuple of ints"):
        initializer(fn.key(0), 3)
    with pytest.raises(ValueError, match="expected every size in shape >= 0, got -1"):
        initializer(fn.key(0), (2, -1))


@pytest.mark.parametrize("initializer", OF_FANS, ids=repr)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_fan_needs_two_axes(initializer, device):
    message = f"{initializer}: expected a shape of at least 2 axes, (O, I, …), got (3,)"
    with pytest.raises(ValueError, match=re.escape(message)):
        initializer(fn.key(0), (3,), device=device)
    with pytest.raises(ValueError, match=re.escape(message)):
        fn.Linear(3, bias_init=initializer).init(fn.key(0), (2,), device=device)


# --- Distributions

MANY = (200, 100, 3, 2)
FAN_IN, FAN_OUT = 600, 1200


def uniform(low, high):
    return (low + high) / 2, (high - low) / math.sqrt(12), low, high


def normal(std, mean=0.0):
    return mean, std, -math.inf, math.inf


CUT = 0.8796256610342398  # the standard deviation of N(0, 1) cut off at ±2
MOMENTS = {
    init.Zeros(): (0.0, 0.0, 0.0, 0.0),
    init.Ones(): (1.0, 0.0, 1.0, 1.0),
    init.Constant(-2.5): (-2.5, 0.0, -2.5, -2.5),
    init.Uniform(): uniform(0, 1),
    init.Uniform(-2.0, 3.0): uniform(-2, 3),
    init.Normal(): normal(1),
    init.Normal(3.0, 0.5): normal(0.5, 3.0),
    init.TruncatedNormal(0.3): (0.0, CUT * 0.3, -0.6, 0.6),
    init.LecunNormal(): (0.0, FAN_IN**-0.5, -2 / CUT * FAN_IN**-0.5, 2 / CUT * FAN_IN**-0.5),
    init.XavierNormal(2.0): normal(2 * math.sqrt(2 / (FAN_IN + FAN_OUT))),
    init.KaimingNormal(): normal(math.sqrt(2 / FAN_IN)),
    init.Orthogonal(): (0.0, 600**-0.5, -1.0, 1.0),
}


@pytest.mark.parametrize("initializer", MOMENTS, ids=repr)
def test_mean_deviation_and_range(initializer):
    mean, std, low, high = MOMENTS[initializer]
    x = initializer(fn.key(3), MANY, dtype=torch.float64)
    error = 5 / math.sqrt(x.numel())
    assert float(x.mean()) == pytest.approx(mean, abs=error * std)
    assert float(x.std()) == pytest.approx(std, rel=error)
    assert low <= float(x.min()) <= float(x.max()) <= high
    if 0 < high - low < math.inf and not isinstance(initializer, init.Orthogonal):
        assert float(x.min()) < low + 0.01 * (high - low)
        assert float(x.max()) > high - 0.01 * (high - low)


@pytest.mark.parametrize("initializer", OF_FANS[1:], ids=repr)
def test_fans_of_one(initializer):
    """A key's numbers are scaled by fans alone."""
    if getattr(initializer, "mode", "fan_in") == "fan_out":
        shapes = (1, 4), (2, 2)
    else:
        shapes = (4, 1), (2, 2)
    one, two = (initializer(fn.key(0), shape, torch.float64).flatten() for shape in shapes)
    ratio = math.sqrt(4 / 5) if "Xavier" in repr(initializer) else math.sqrt(2)
    torch.testing.assert_close(one, ratio * two)


@pytest.mark.parametrize("std", [0.3, 3.0])
def test_a_normal_is_cut_where_it_is_said_to_be(std, monkeypatch):
    """At its ends the inverse of the distribution function is beyond them by a rounding."""
    for end in (0, 1):
        level = lambda key, shape, *ends, end=end: torch.full(shape, ends[end], dtype=ends[2])  # noqa: E731
        monkeypatch.setattr(init, "uniform", level)
        x = init.TruncatedNormal(std)(fn.key(0), (1,), torch.float64)
        assert x.item() == (-2 * std, 2 * std)[end]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("std", [0.0, 0.1, 0.3, 1.0, 1000.1])
def test_rounding_does_not_leave_the_cut(std, dtype, monkeypatch):
    for end in (0, 1):
        level = lambda key, shape, *ends, end=end: torch.full(shape, ends[end], dtype=ends[2])  # noqa: E731
        monkeypatch.setattr(init, "uniform", level)
        x = init.TruncatedNormal(std)(fn.key(0), (1,), dtype)
        outwards = torch.nextafter(x, torch.full_like(x, (-math.inf, math.inf)[end]))
        assert abs(x.item()) <= 2 * std < abs(outwards.item())


@pytest.mark.parametrize("initializer", [init.TruncatedNormal(3.2e4), init.Orthogonal(65504.0)])
def test_numbers_within_a_dtype_are_drawn(initializer):
    assert initializer(fn.key(0), (2, 2), torch.float16).isfinite().all()


def test_an_interval_of_one_number():
    assert init.Uniform(0.5, 0.5)(fn.key(0), (2,)).tolist() == [0.5, 0.5]


GAINS = ["linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d",
         "conv_transpose3d", "sigmoid", "tanh", "relu", "selu", "leaky_relu"]  # fmt: skip
TORCHS = {
    **{
        init.KaimingUniform(a=0.5, mode=mode, nonlinearity=name): (
            lambda w, mode=mode, name=name: torch.nn.init.kaiming_uniform_(w, 0.5, mode, name)
        )
        for name in GAINS
        for mode in ("fan_in", "fan_out")
    },
    **{
        init.KaimingNormal(nonlinearity=name): (
            lambda w, name=name: torch.nn.init.kaiming_normal_(w, nonlinearity=name)
        )
        for name in GAINS
    },
    init.XavierUniform(1.5): lambda w: torch.nn.init.xavier_uniform_(w, 1.5),
    init.XavierNormal(): torch.nn.init.xavier_normal_,
    init.TruncatedNormal(0.3): lambda w: torch.nn.init.trunc_normal_(w, std=0.3, a=-0.6, b=0.6),
    init.Orthogonal(1.5): lambda w: torch.nn.init.orthogonal_(w, 1.5),
}


@pytest.mark.parametrize("ours", TORCHS, ids=repr)
@pytest.mark.parametrize("shape", [(60, 50, 3, 2), (70, 200)])
def test_the_distribution_is_torchs(ours, shape):
    torch.manual_seed(0)
    a, b = ours(fn.key(3), shape), TORCHS[ours](torch.empty(shape))
    for q in (0.02, 0.25, 0.5, 0.9, 0.98):
        got, expected = (x.flatten().kthvalue(1 + int(q * (x.numel() - 1)))[0] for x in (a, b))
        assert abs(float(got - expected)) < 0.06 * float(b.std())


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4), (6, 2, 3), (2, 3, 2, 2), (1, 3), (3, 1)])
@pytest.mark.parametrize("gain", [1.0, -2.0, 0.0])
def test_orthogonal_rows_or_columns(shape, gain):
    q = init.Orthogonal(gain)(fn.key(0), shape, dtype=torch.float64).reshape(shape[0], -1)
    gram = q @ q.T if q.shape[0] <= q.shape[1] else q.T @ q
    torch.testing.assert_close(gram, gain**2 * torch.eye(len(gram), dtype=torch.float64))


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (5, 3, 1, 1)])
def test_orthogonal_is_contiguous(shape):
    """As torch's is, so that `weight.view(-1)` works."""
    assert init.Orthogonal()(fn.key(0), shape).is_contiguous()


def test_orthogonal_signs_are_even():
    """Without the correction, the first entry of QR's Q would never be positive."""
    first = [float(init.Orthogonal()(key, (3, 3))[0, 0]) for key in fn.split(fn.key(0), 100)]
    assert 30 < sum(x > 0 for x in first) < 70


PINNED = {
    "Zeros": 0.0,
    "Ones": 1.0,
    "Constant": 0.5,
    "Uniform": -0.167195318,
    "Normal": 0.157509398,
    "TruncatedNormal": -0.097466773,
    "Orthogonal": -1.480879136,
    "KaimingUniform": -0.413445817,
    "KaimingNormal": -1.375781391,
    "XavierUniform": -0.438525511,
    "XavierNormal": -1.065675683,
    "LecunNormal": -0.261169492,
}


@every
def test_the_numbers_of_a_key_stay(initializer):
    """Scripts name keys in order to get these numbers again."""
    x = initializer(fn.key(0), (3, 2), dtype=torch.float64)
    assert float(x[1, 1]) == pytest.approx(PINNED[type(initializer).__name__], abs=2e-9)
    square = init.Orthogonal()(fn.key(0), (3, 3), dtype=torch.float64)
    assert float(square[1, 0]) == pytest.approx(-0.700717139, abs=2e-9)


@pytest.mark.parametrize("cls", [init.Zeros, init.Ones])
def test_zeros_and_ones_take_no_value(cls):
    with pytest.raises(TypeError, match="argument"):
        cls(5.0)
