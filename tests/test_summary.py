"""The table of a network: one line a layer, with the numbers that its tensors would have."""

import re
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import funcnet as fn


def table(net, shape):
    return [re.split(r" {2,}", line.strip()) for line in fn.summary(net, shape).splitlines()[1:]]


def test_the_whole_table():
    inner = fn.Sequential(a=fn.ReLU(), b=fn.Residual(fn.Sigmoid()))
    net = fn.Sequential(fn.Conv2d(8, 3), fn.Residual(inner))
    assert fn.summary(net, (3, 32, 32)).splitlines() == [
        "path  layer                               output       parameters  residual bytes",
        "      Sequential of 2 layers              (8, 30, 30)         224          69,888",
        "0       Conv2d(8, kernel_size=3)          (8, 30, 30)         224          12,288",
        "1       Residual(Sequential of 2 layers)  (8, 30, 30)           0          57,600",
        "1         Sequential of 2 layers          (8, 30, 30)           0          57,600",
        "1.a         ReLU()                        (8, 30, 30)           0          28,800",
        "1.b         Residual(Sigmoid())           (8, 30, 30)           0          28,800",
        "1.b           Sigmoid()                   (8, 30, 30)           0          28,800",
        "                                          total               224          69,888",
    ]


@dataclass(frozen=True)
class Kept(fn.Layer):
    """y = w ∘ x, which keeps x twice, w, ten numbers and a word, and makes w on the CPU."""

    of_integers: bool = False

    def init(self, key, shape, *, dtype=None, device=None):
        return {"w": torch.ones(shape)}

    def out_shape(self, shape):
        return list(shape)

    def fwd(self, params, x, *, key=None):
        if self.of_integers and x.is_floating_point():
            raise RuntimeError("expected integers")
        ten = torch.ones(10, device=x.device)
        return x * params["w"], (x, x.flatten(1), params["w"], ten, "word")


def test_what_is_kept_twice_counts_once_and_parameters_do_not_count():
    assert table(Kept(), (2, 3))[0] == ["Kept()", "(2, 3)", "6", "64"]
    assert table(Kept(of_integers=True), (2, 3))[0][1:] == ["(2, 3)", "6", "88"]


def test_layers_that_refuse_a_single_example_or_numbers_that_are_no_integers():
    assert table(fn.BatchNorm(), (3,))[0] == ["BatchNorm()", "(3,)", "6", "24"]
    assert table(fn.Embedding(5, 3), (4,))[0] == [
        "Embedding(5, embedding_dim=3)",
        "(4, 3)",
        "15",
        "32",
    ]


def test_fwd_is_given_a_key():
    (bytes_kept,) = {row[-1] for row in table(fn.Dropout(), (1000,))}
    assert bytes_kept != "0"


@dataclass(frozen=True)
class Silent(fn.Layer):
    """A combinator that does not say what its layer is handed: x as an image of one pixel."""

    layer: fn.Layer

    def init(self, key, shape, *, dtype=None, device=None):
        return self.layer.init(key, (*shape, 1, 1), dtype=dtype, device=device)

    def out_shape(self, shape):
        return self.layer.out_shape((*shape, 1, 1))

    def fwd(self, params, x, *, key=None):
        raise ZeroDivisionError


def test_what_cannot_be_found_out():
    net = fn.Sequential(fn.Linear(2), Silent(fn.Sequential(fn.Conv2d(3, 1))), fn.ReLU())
    assert table(net, (1,))[2:] == [
        ["1", "Silent(Sequential of 1 layer)", "(3, 1, 1)", "9", "?"],
        ["1", "Sequential of 1 layer", "?", "?", "?"],
        ["1.0", "Conv2d(3, kernel_size=1)", "?", "?", "?"],
        ["2", "ReLU()", "(3, 1, 1)", "0", "12"],
        ["total", "13", "?"],
    ]


@dataclass(frozen=True)
class Timed(Silent):
    """y = f([x, 1]): its layer is handed one number more than x."""

    def init(self, key, shape, *, dtype=None, device=None):
        return self.layer.init(key, (shape[0] + 1,), dtype=dtype, device=device)

    def out_shape(self, shape):
        return self.layer.out_shape((shape[0] + 1,))


def test_a_layer_that_is_handed_something_else_than_x_is_not_counted_for_x():
    rows = table(fn.Repeat(Timed(fn.Sequential(fn.Tanh(), fn.Linear(3))), 2), (3,))
    assert [row[-2] for row in rows[:2]] == ["30", "15"]
    assert [row[-3:] for row in rows[2:5]] == [["?"] * 3] * 3


@dataclass(frozen=True)
class Tied(Silent):
    """A combinator of two layers that holds something else than parameters for each."""

    other: fn.Layer
    holds: str

    def init(self, key, shape, *, dtype=None, device=None):
        params = self.layer.init(key, shape, dtype=dtype, device=device)
        return {"shared": params} if self.holds == "by a name" else (params,)

    def out_shape(self, shape):
        return self.layer.out_shape(shape)


@pytest.mark.parametrize("holds", ["by a name", "once"])
def test_a_combinator_that_does_not_hold_the_parameters_of_each_layer(holds):
    rows = table(Tied(fn.Linear(2), fn.Linear(3), holds), (4,))
    assert [row[-2] for row in rows] == ["10", "10", "15", "10"]


@pytest.mark.parametrize("shape", [(1, 3, 3), (3,), 3, (1, -1, 3), "abc"])
def test_a_layer_that_does_not_fit_is_refused_as_by_init(shape):
    net = fn.Sequential(fn.Conv2d(2, 9))
    with pytest.raises((ValueError, TypeError)) as expected:
        net.init(fn.key(0), shape)
    with pytest.raises(expected.type, match=re.escape(str(expected.value))):
        fn.summary(net, shape)


def test_no_number_is_made():
    """2⁴⁰ parameters are four tebibytes."""
    rows = table(fn.Sequential(fn.Linear(2**20), fn.ReLU()), (2**20,))
    assert rows[0] == ["Sequential of 2 layers", "(1048576,)", f"{2**40 + 2**20:,}", f"{2**23:,}"]


def test_a_layer_whose_parameters_cannot_be_drawn():
    class Refusing(fn.Linear):
        def _params(self, shape):
            raise ValueError("expected another day")

    @dataclass(frozen=True)
    class Without(fn.Layer):
        layer: fn.Layer

        def _fwd(self, params, x, key):
            return x.clone(), None

    rows = table(Without(Refusing(2)), (3,))
    assert rows[1] == ["Refusing(2)", "(2,)", "?", "?"]


def test_a_layer_whose_init_looks_at_its_numbers():
    class Normalised(fn.Linear):
        def _init(self, *given):
            params = super()._init(*given)
            return {**params, "weight": params["weight"] / float(params["weight"].norm())}

    assert table(fn.Sequential(Normalised(2)), (3,))[1] == ["0", "Normalised(2)", "(2,)", "8", "12"]


def test_what_is_kept_out_of_sight_is_not_counted_as_nothing():
    """The residuals of a wrapped module are a graph of autograd."""
    module = nn.Sequential(nn.Linear(4, 400), nn.Tanh(), nn.Linear(400, 4))
    rows = table(fn.Sequential(fn.interop.wrap(module, (4,))[0], fn.ReLU()), (4,))
    assert [row[-1] for row in rows] == ["?", "?", "16", "?"]


def test_a_key_that_is_kept_counts_as_nothing():
    block = fn.Sequential(fn.Linear(4), fn.Tanh())
    assert table(fn.Recompute(block), (4,))[0][-1] == "16"  # x alone
    assert table(fn.Reversible(block, block), (8,))[0][-1] == "32"  # y alone
