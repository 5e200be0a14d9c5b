"""Batch normalisation without state: what is measured, merged, and folded."""

import re
from dataclasses import dataclass

import optree
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from registry import budget
from test_properties import close
from users_layers import Passing, Weighted

import funcnet as fn
from funcnet.running import run_fwd
from funcnet.testing import check_vjp

KEY = fn.key(0)


@st.composite
def networks(draw, depth=2, images=True):
    """Nested Sequentials with batch normalisation among layers for images, or for features."""
    flags, channels = st.booleans(), st.integers(1, 2).map(lambda n: 2 * n)
    groups = st.sampled_from([1, 2])
    parts = [
        st.builds(fn.BatchNorm, st.sampled_from([1e-5, 0.1]), affine=flags),
        st.builds(fn.BatchNorm),
        st.builds(fn.Linear, channels, bias=flags),
        st.sampled_from([fn.Sigmoid(), fn.ReLU(), fn.Dropout(0.0)]),
    ]
    if images:
        parts += [
            st.builds(fn.Conv2d, channels, st.just(2), groups=groups, bias=flags),
            st.builds(fn.ConvTranspose2d, channels, st.just(2), groups=groups, bias=flags),
            st.builds(fn.UpsampleConv2d, channels, st.integers(1, 3), bias=flags),
        ]
    if depth:
        parts.append(networks(depth - 1, images))
    return fn.Sequential(*draw(st.lists(st.one_of(parts), max_size=5)))


def measured(net, shape, batch=4, dtype=torch.float64):
    """(params, x, m), with weights and biases that matter."""
    params = net.init(fn.key(1), shape, dtype=dtype)
    params = optree.tree_map(
        lambda leaf: leaf + (torch.arange(leaf.numel()) % 3).reshape(leaf.shape).to(leaf) / 2,
        params,
    )
    x = fn.normal(fn.key(2), (batch, *shape), dtype=dtype)
    return params, x, fn.moments(net, params, x, key=KEY)


def check_law(net, shape, fold=True, tolerance=1e-10):
    params, x, m = measured(net, shape)
    expected = net.apply(params, x, key=KEY)
    before = optree.tree_map(torch.clone, (params, m))
    plain, learned = fn.for_inference(net, params, m, fold=fold)
    close((params, m), before, rtol=0, atol=0)
    assert not plain.couples_examples
    close(plain.apply(learned, x), expected, rtol=tolerance, atol=tolerance)
    assert plain.out_shape(shape) == net.out_shape(shape)
    fresh = plain.init(KEY, shape, dtype=x.dtype)
    assert optree.tree_structure(fresh) == optree.tree_structure(learned)
    return plain, learned


# --- The law


@pytest.mark.parametrize("fold", [True, False])
@budget(40)
@given(st.data())
def test_inference_is_the_training_pass_on_what_was_measured(fold, data):
    images = data.draw(st.booleans())
    shape = (2, 6, 6) if images else (3,)
    net = data.draw(networks(images=images))
    try:
        net.out_shape(shape)
    except ValueError:
        assume(False)  # an image smaller than the kernel
    plain, _ = check_law(net, shape, fold)
    if not fold:
        assert len(plain) == len(net)


def test_folding_takes_the_layer_away():
    net = fn.Sequential(
        fn.BatchNorm(),
        fn.Conv2d(4, 3, padding=1, groups=2, bias=False),
        fn.BatchNorm(),
        fn.Sequential(fn.UpsampleConv2d(6), fn.BatchNorm(affine=False), fn.BatchNorm()),
        fn.BatchNorm(),
        fn.ReLU(),
        fn.BatchNorm(),
    )
    plain, params = check_law(net, (2, 5, 4))
    assert plain == fn.Sequential(
        fn.ChannelAffine(),
        fn.Conv2d(4, 3, padding=1, groups=2),
        fn.Sequential(fn.UpsampleConv2d(6)),
        fn.ChannelAffine(),
        fn.ReLU(),
        fn.ChannelAffine(),
    )
    assert len(params) == 6
    plain, _ = check_law(net, (2, 5, 4), fold=False)
    assert not any(isinstance(layer, fn.Conv2d) and layer.bias for layer in plain)


def test_a_lone_batch_norm():
    plain, params = check_law(fn.BatchNorm(), (3, 4, 4))
    assert plain == fn.ChannelAffine()
    assert params["weight"].dtype == torch.float64


def test_a_subclass_absorbs_nothing():
    class Doubled(fn.Conv2d):
        def _fwd(self, params, x, key):
            y, kept = super()._fwd(params, x, key)
            return 2 * y, kept

    plain, _ = check_law(fn.Sequential(Doubled(2, 1), fn.BatchNorm()), (2, 3, 3))
    assert plain[1] == fn.ChannelAffine()


@dataclass(frozen=True, init=False)
class WithSkips(fn.Sequential):
    """x + f(x) for each layer f, by other code than Sequential's."""

    def _apply(self, params, x, key):
        return self._fwd(params, x, key)[0]

    def _fwd(self, params, x, key):
        residuals = []
        for i, layer in enumerate(self.layers):
            y, kept = layer.fwd(params[i], x, key=None if key is None else fn.fold_in(key, i))
            x = x + y
            residuals.append(kept)
        return x, residuals


class SameSequential(fn.Sequential):
    pass


def test_a_subclass_of_sequential_is_asked_what_it_computes():
    check_law(WithSkips(fn.Conv2d(2, 1), fn.BatchNorm()), (2, 3, 3))
    plain, _ = check_law(SameSequential(fn.Conv2d(2, 1), fn.BatchNorm()), (2, 3, 3))
    assert plain == SameSequential(fn.Conv2d(2, 1))


@dataclass(frozen=True)
class TwoPaths(fn.Layer):
    """a(x) + b(x), whose params are a dict by the names of its fields."""

    a: fn.Layer
    b: fn.Layer

    _joins = "apart"

    def _init(self, key, shape, dtype, device):
        return {
            name: layer.init(key, shape, dtype=dtype, device=device)
            for name, layer in (("a", self.a), ("b", self.b))
        }

    def _check(self, params, x):
        return x

    def _fwd(self, params, x, key):
        return sum(
            layer.apply(params[name], x, key=key) for name, layer in (("a", self.a), ("b", self.b))
        ), None


def test_parameters_by_the_names_of_fields():
    net = fn.Sequential(TwoPaths(fn.BatchNorm(), fn.Sequential(fn.Tanh(), fn.BatchNorm())))
    plain, params = check_law(net, (3, 4))
    affine = fn.ChannelAffine()
    assert plain == fn.Sequential(TwoPaths(affine, fn.Sequential(fn.Tanh(), affine)))
    assert params[0].keys() == {"a", "b"}
    params, x = net.init(KEY, (3, 4)), torch.rand(5, 3, 4)
    m = fn.moments(net, params, x, key=KEY)
    assert m[0].keys() == {"a", "b"}
    close(fn.merge_moments(m, fn.moments(net, params, x[:0], key=KEY)), m, rtol=0, atol=0)


@pytest.mark.parametrize("others", [(), (fn.Linear(4),)])
def test_parameters_beside_those_of_layers(others):
    normed = fn.Sequential(fn.Linear(4), fn.BatchNorm())
    net = fn.Sequential(Weighted(fn.Recompute(normed), *others), Weighted(fn.BatchNorm()))
    plain, params = check_law(net, (3,))
    assert plain[1] == Weighted(fn.ChannelAffine())
    assert [{"layer", "w"} <= part.keys() for part in params] == [True, True]


@dataclass(frozen=True)
class Mixed(fn.Layer):
    """Σ wᵢ · fᵢ(x), whose params keep those of the layers in a tuple by the field's name."""

    parts: tuple[fn.Layer, ...]

    _joins = "apart"

    def init(self, key, shape, **options):
        weight = torch.arange(1.0, 1 + len(self.parts)).to(**options)
        parts = tuple(layer.init(key, shape, **options) for layer in self.parts)
        return {"parts": parts, "weight": weight}

    def fwd(self, params, x, *, key=None):
        pairs = zip(self.parts, params["parts"], strict=True)
        found = [layer.fwd(own, x, key=key) for layer, own in pairs]
        ys = torch.stack([y for y, _ in found])
        return torch.einsum("i,i...->...", params["weight"], ys), (params, ys, found)

    def bwd(self, params, residuals, grad, *, input_grad=True):
        _, ys, found = residuals
        each = zip(self.parts, params["parts"], params["weight"], found, strict=True)
        pairs = [layer.bwd(own, kept, w * grad) for layer, own, w, (_, kept) in each]
        dparts, dxs = zip(*pairs, strict=True)
        dweight = (ys * grad).flatten(1).sum(1)
        return {"parts": dparts, "weight": dweight}, sum(dxs) if input_grad else None


def test_parameters_beside_those_of_layers_in_a_tuple():
    normed = fn.Sequential(fn.Linear(3), fn.BatchNorm())
    net = fn.Sequential(Mixed((fn.Frozen(fn.Linear(3)), normed)), Mixed((fn.BatchNorm(),)))
    plain, params = check_law(net, (3,))
    assert plain[1] == Mixed((fn.ChannelAffine(),))
    assert [part.keys() for part in params] == [{"parts", "weight"}] * 2
    x = fn.normal(KEY, (5, 3), dtype=torch.float64)
    check_vjp(net, net.init(KEY, (3,), dtype=torch.float64), x, key=KEY)


@pytest.mark.parametrize("name", ["layer", "stem"])
def test_all_parameters_of_an_only_layer(name):
    """The params are the layer's, also where a part of it has the field's name."""
    normed = fn.Sequential(**{name: fn.Linear(4), "norm": fn.BatchNorm()})
    plain, _ = check_law(Passing(normed), (3,))
    assert plain == Passing(fn.Sequential(**{name: fn.Linear(4)}))


def test_without_batch_norm_nothing_changes():
    net = fn.Sequential(fn.Conv2d(2, 1), fn.Sequential(fn.ReLU()))
    params = net.init(KEY, (1, 2, 2))
    m = fn.moments(net, params, torch.zeros(1, 1, 2, 2), key=KEY)
    assert m == ((), ((),))
    plain, same = fn.for_inference(net, params, m)
    assert plain is net
    assert same is params


def test_no_variance_and_no_eps():
    """x̂ is 0 there, in training as at inference."""
    net, x = fn.BatchNorm(eps=0), torch.ones(3, 2, dtype=torch.float64)
    params = {"weight": torch.ones(2).double(), "bias": torch.tensor([1.0, 2.0]).double()}
    m = fn.moments(net, params, x, key=KEY)
    plain, learned = fn.for_inference(net, params, m)
    close(plain.apply(learned, x), net.apply(params, x, key=KEY))


def test_two_values_are_enough():
    net = fn.BatchNorm(affine=False)
    x = fn.normal(KEY, (2, 3), dtype=torch.float64)
    plain, params = fn.for_inference(net, (), fn.moments(net, (), x, key=KEY))
    close(plain.apply(params, x), net.apply((), x, key=KEY))


def test_of_a_constant_channel_without_eps_the_bias_is_left():
    net = fn.BatchNorm(eps=0.0, affine=False)
    m = fn.moments(net, (), torch.ones(4, 2), key=KEY)
    _, params = fn.for_inference(net, (), m)
    assert not params["weight"].any()
    assert not params["bias"].any()


def test_without_parameters_new_ones_have_the_dtype_of_the_moments():
    net = fn.BatchNorm(affine=False)
    m = fn.moments(net, (), torch.rand(4, 2), key=KEY)
    _, params = fn.for_inference(net, (), optree.tree_map(torch.Tensor.float, m))
    assert {leaf.dtype for leaf in params.values()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype):
    net = fn.Sequential(fn.Conv2d(4, 3), fn.BatchNorm(), fn.ReLU(), fn.BatchNorm(affine=False))
    params, x, m = measured(net, (2, 6, 6), 8, dtype)
    assert {leaf.dtype for leaf in optree.tree_leaves(m)} == {torch.float64}
    plain, learned = fn.for_inference(net, params, m)
    assert {leaf.dtype for leaf in optree.tree_leaves(learned)} == {dtype}
    tolerance = 1e-4 if dtype == torch.float32 else 0.2
    close(plain.apply(learned, x), net.apply(params, x, key=KEY), rtol=0.05, atol=tolerance)


@dataclass(frozen=True)
class Wrapped(fn.Layer):
    """A combinator of somebody's own, which runs its child a number of times."""

    layer: fn.Layer
    times: int = 1

    def _init(self, key, shape, dtype, device):
        return self.layer.init(key, shape, dtype=dtype, device=device)

    def _check(self, params, x):
        return self.layer._check(params, x)

    def _fwd(self, params, x, key):
        for _ in range(self.times):
            x, _ = run_fwd(self.layer, params, x, key)
        return x, None


NORMED = fn.Sequential(fn.Conv2d(4, 1, groups=2, bias=False), fn.BatchNorm(), fn.Sigmoid())
EVERY_COMBINATOR = [
    fn.Residual(NORMED),
    fn.Sum(fn.BatchNorm(affine=False), NORMED),
    fn.Sum(skip=fn.Sigmoid(), main=NORMED),
    fn.Product(fn.Sigmoid(), fn.BatchNorm()),
    fn.Concat(fn.BatchNorm(), fn.ReLU(), NORMED),
    fn.Recompute(NORMED),
    fn.Reversible(fn.BatchNorm(), fn.Sequential(fn.Conv2d(2, 1), fn.BatchNorm())),
    fn.Repeat(NORMED, 3),
    fn.Repeat(fn.Residual(fn.Repeat(fn.Sequential(NORMED, fn.BatchNorm(affine=False)), 2)), 2),
    fn.Frozen(NORMED),
    fn.Cast(NORMED, torch.float64),
    fn.Sequential(stem=NORMED, norm=fn.BatchNorm(), head=fn.Conv2d(2, 1), last=fn.BatchNorm()),
]


@pytest.mark.parametrize("fold", [True, False])
@pytest.mark.parametrize("net", EVERY_COMBINATOR, ids=repr)
def test_every_combinator(net, fold):
    check_law(net, (4, 3, 3), fold)
    plain, _ = check_law(fn.Sequential(fn.Conv2d(4, 1), net, fn.BatchNorm()), (4, 3, 3), fold)
    # What is right before the last is not a convolution.
    assert len(plain) == 3


def test_names_stay():
    net = fn.Sequential(
        stem=fn.Conv2d(2, 1), norm=fn.BatchNorm(), act=fn.ReLU(), last=fn.BatchNorm()
    )
    _, _, m = measured(net, (3, 2, 2))
    assert set(m) == {"stem", "norm", "act", "last"}
    plain, params = check_law(net, (3, 2, 2))
    assert plain == fn.Sequential(stem=fn.Conv2d(2, 1), act=fn.ReLU(), last=fn.ChannelAffine())
    assert list(params) == ["stem", "act", "last"]
    merged = fn.merge_moments(m, m)
    close(merged["norm"][1], m["norm"][1])
    with pytest.raises(ValueError, match=r"norm: BatchNorm\(\): expected moments m to be"):
        fn.for_inference(net, params | {"norm": params["last"]}, m | {"norm": ()})


def test_copies_have_moments_of_their_own():
    net = fn.Repeat(fn.Repeat(fn.Sequential(fn.BatchNorm(), fn.Sigmoid()), 2), 3)
    _, _, m = measured(net, (4, 3, 3))
    count, mean, m2 = m[0]
    assert count.shape == (3, 2, 1, 1)
    assert mean.shape == m2.shape == (3, 2, 4)
    assert not torch.equal(mean[0, 0], mean[0, 1])


def test_mixed_precision():
    """In Cast, moments are of bfloat16; new parameters have the dtype of the others."""
    net = fn.Cast(fn.Sequential(fn.Conv2d(4, 1), fn.BatchNorm(affine=False)), torch.bfloat16)
    params, x, m = measured(net, (2, 4, 4), dtype=torch.float32)
    plain, learned = fn.for_inference(net, params, m, fold=False)
    assert learned[1]["weight"].dtype == torch.float32
    close(plain.apply(learned, x), net.apply(params, x, key=KEY), rtol=0.05, atol=0.05)


@pytest.mark.parametrize("inner", [fn.BatchNorm(), fn.BatchNorm(affine=False), NORMED], ids=repr)
def test_a_loop_is_refused(inner):
    net = fn.Sequential(fn.ReLU(), fn.Repeat(fn.Loop(inner, 2), 3))
    params = net.init(KEY, (4, 2, 2))
    with pytest.raises(ValueError, match=r"layer 1: .*BatchNorm\(.*\): expected to run once.*Loop"):
        fn.moments(net, params, torch.rand(4, 4, 2, 2), key=KEY)


def test_through_combinators_of_any_kind():
    net = Wrapped(fn.Sequential(fn.ReLU(), Wrapped(fn.BatchNorm())))
    plain, params = check_law(net, (3, 4, 4))
    assert plain == Wrapped(fn.Sequential(fn.ReLU(), Wrapped(fn.ChannelAffine())))
    assert isinstance(params, tuple)


def test_the_same_parameters_twice_are_refused():
    net = fn.Sequential(fn.ReLU(), Wrapped(fn.Sequential(fn.BatchNorm()), times=3))
    params = net.init(KEY, (2,))
    with pytest.raises(
        ValueError, match=r"layer 1: layer 0: BatchNorm\(\): expected to run once.*ran 3 times"
    ):
        fn.moments(net, params, torch.rand(4, 2), key=KEY)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (fn.Linear(3), (3,)),
        (fn.Conv2d(4, 3, padding=1, groups=2), (4, 3, 3)),
        (fn.ConvTranspose2d(4, 3, padding=1, groups=2), (4, 3, 3)),
    ],
    ids=repr,
)
def test_copies_absorb(layer, shape):
    plain, _ = check_law(fn.Repeat(fn.Sequential(layer, fn.BatchNorm()), 2), shape)
    assert plain == fn.Repeat(fn.Sequential(layer), 2)


def test_linear_absorbs_features_alone():
    net = fn.Sequential(fn.Linear(4), fn.BatchNorm())
    assert check_law(net, (3,))[0] == fn.Sequential(fn.Linear(4))
    # Axis 1 counts steps here.
    assert check_law(net, (5, 3))[0] == fn.Sequential(fn.Linear(4), fn.ChannelAffine())
    assert check_law(net, (4, 3))[0] == fn.Sequential(fn.Linear(4), fn.ChannelAffine())


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (fn.Conv1d(4, 2, groups=2), (2, 5)),
        (fn.Conv3d(2, 2, bias=False), (2, 3, 3, 3)),
        (fn.ConvTranspose1d(4, 2, groups=2, bias=False), (2, 3)),
        (fn.ConvTranspose3d(2, 2), (2, 2, 2, 2)),
    ],
    ids=repr,
)
def test_signals_and_volumes(layer, shape):
    plain, params = check_law(fn.Sequential(layer, fn.BatchNorm(affine=False)), shape)
    assert len(plain) == 1
    assert set(params[0]) == {"weight", "bias"}


@pytest.mark.parametrize("bias", [True, False])
def test_transposed_convolutions_with_groups(bias):
    layer = fn.ConvTranspose2d(6, 3, stride=2, groups=2, bias=bias)
    plain, _ = check_law(fn.Sequential(layer, fn.BatchNorm()), (4, 3, 3))
    assert len(plain) == 1


# --- Moments


@budget(30)
@given(st.lists(st.integers(2, 4), min_size=1, max_size=3), st.integers(0, 2), st.data())
def test_parts_merge_into_the_whole(sizes, axes, data):
    net = fn.Sequential(fn.LeakyReLU(), fn.BatchNorm(affine=False))
    x = fn.normal(KEY, (sum(sizes), 3, *(2,) * axes), dtype=torch.float64) * 3 + 2
    params = net.init(KEY, x.shape[1:])
    parts = [fn.moments(net, params, part, key=KEY) for part in x.split(sizes)]
    merged = parts[0]
    for part in data.draw(st.permutations(parts[1:])):
        merged = fn.merge_moments(merged, part)
    count, mean, m2 = merged[1]
    close(merged, fn.moments(net, params, x, key=KEY), rtol=1e-12, atol=1e-14)
    seen = torch.nn.functional.leaky_relu(x).transpose(0, 1).flatten(1)
    assert int(count) == seen.shape[1]
    close((mean, m2), (seen.mean(1), seen.var(1, correction=0) * count.squeeze()))


def test_moments_are_a_tree_like_params():
    net = fn.Sequential(fn.Conv2d(2, 1), fn.Sequential(fn.BatchNorm(), fn.ReLU()))
    params, x = net.init(KEY, (1, 4, 4)), fn.normal(KEY, (3, 1, 4, 4))
    m = fn.moments(net, params, x, key=KEY)
    (count, mean, m2) = m[1][0]
    assert m == ((), ((count, mean, m2), ()))
    assert mean.shape == m2.shape == (2,)
    assert count == 48


def test_moments_in_float32_are_computed_with_in_float64():
    m = tuple(fn.uniform(fn.key(i), size, 2.0, 3.0) for i, size in enumerate(((), (64,), (64,))))
    _, params = fn.for_inference(fn.BatchNorm(affine=False), (), m)
    _, exact = fn.for_inference(fn.BatchNorm(affine=False), (), tuple(part.double() for part in m))
    assert torch.equal(params["weight"], exact["weight"].to(params["weight"].dtype))
    assert params["weight"].dtype == torch.float32


def test_a_large_mean_in_float32():
    x = fn.normal(KEY, (1000, 2)) + 1e4
    _, mean, m2 = fn.moments(fn.BatchNorm(affine=False), (), x, key=KEY)
    close(
        (mean, m2 / 1000), (x.double().mean(0), x.double().var(0, correction=0)), rtol=1e-9, atol=0
    )


def test_sets_of_nothing_merge():
    m = fn.moments(fn.BatchNorm(affine=False), (), torch.rand(4, 2), key=KEY)
    nothing = optree.tree_map(torch.zeros_like, m)
    close(fn.merge_moments(m, nothing), m)
    close(fn.merge_moments(nothing, m), m)
    close(fn.merge_moments(nothing, nothing), nothing)
    one = (torch.ones(()), torch.ones(2), torch.zeros(2))
    close(fn.merge_moments(optree.tree_map(torch.zeros_like, one), one), one)


@pytest.mark.parametrize(("channels", "expected"), [(0, 0), (1, 20), (3, 20)])
def test_the_count_is_of_one_channel_s_values(channels, expected):
    count, mean, _ = fn.moments(fn.BatchNorm(affine=False), (), torch.ones(4, channels, 5), key=KEY)
    assert (count.item(), mean.shape) == (expected, (channels,))


def test_no_examples_have_moments():
    """A machine's part of a batch may be empty; what follows still runs."""
    net = fn.Sequential(fn.Conv2d(2, 1), fn.BatchNorm(), fn.BatchNorm(affine=False))
    params, x, m = measured(net, (3, 4, 4))
    nothing = fn.moments(net, params, x[:0], key=KEY)
    close(nothing, optree.tree_map(torch.zeros_like, m))


@dataclass(frozen=True)
class Times(fn.Layer):
    """A user's layer, whose parameters are one number, or a tensor without axes."""

    as_tensor: bool

    def init(self, key, shape, *, dtype=None, device=None):
        return torch.tensor(2.0, dtype=dtype) if self.as_tensor else 2.0

    def out_shape(self, shape):
        return shape

    def fwd(self, params, x, *, key=None):
        return x * params, ()

    def bwd(self, params, residuals, grad, *, input_grad=True):
        return params, grad


@pytest.mark.parametrize("as_tensor", [True, False])
def test_parameters_without_parts_stay_as_they_are(as_tensor):
    net, x = fn.Sequential(Times(as_tensor), fn.BatchNorm()), fn.normal(KEY, (4, 2))
    params = net.init(KEY, (2,))
    plain, learned = fn.for_inference(net, params, fn.moments(net, params, x, key=KEY))
    assert learned[0] is params[0]
    close(plain.apply(learned, x), net.apply(params, x, key=KEY), rtol=1e-5, atol=1e-6)


@dataclass(frozen=True)
class Scaled(fn.Layer):
    """A user's layer, whose parameters are a tensor of integers and a number."""

    def init(self, key, shape, *, dtype=None, device=None):
        return {"factor": torch.tensor(2), "power": 3}

    def out_shape(self, shape):
        return shape

    def fwd(self, params, x, *, key=None):
        return x * params["factor"] ** params["power"], ()

    def bwd(self, params, residuals, grad, *, input_grad=True):
        return params, grad


def test_new_parameters_have_the_dtype_of_those_that_are_learned():
    net, x = fn.Sequential(Scaled(), fn.BatchNorm()), fn.normal(KEY, (4, 2), dtype=torch.float64)
    params = net.init(KEY, (2,), dtype=torch.float64)
    plain, learned = fn.for_inference(net, params, fn.moments(net, params, x, key=KEY))
    assert learned[0] is params[0]
    close(plain.apply(learned, x), net.apply(params, x, key=KEY))


def test_an_ensemble_under_vmap():
    net = fn.Sequential(fn.Conv2d(2, 1), fn.BatchNorm())
    each = [net.init(key, (1, 3, 3)) for key in fn.split(KEY)]
    many = optree.tree_map(lambda *leaves: torch.stack(leaves), *each)
    x = fn.normal(KEY, (4, 1, 3, 3))

    def evaluate(params):
        m = fn.moments(net, params, x, key=KEY)
        plain, learned = fn.for_inference(net, params, m)
        return plain.apply(learned, x)

    expected = torch.stack([net.apply(params, x, key=KEY) for params in each])
    torch.testing.assert_close(torch.func.vmap(evaluate)(many), expected, rtol=1e-4, atol=1e-5)


# --- Refusals


def test_refusals():
    net = fn.Sequential(
        fn.ReLU(), fn.Sequential(fn.BatchNorm(), fn.Conv2d(3, 1), fn.BatchNorm(affine=False))
    )
    params, _, m = measured(net, (2, 3, 3))
    first, nothing, last = m[1]
    one = (torch.ones(1, 1), *first[1:])
    narrow = tuple(part[..., :1] for part in last)
    cases = [
        (
            (first, m[1]),
            r"layer 0: ReLU\(\): expected moments m to be \(\), got \(count, mean, M2\)",
        ),
        (((),), "Sequential of 2 layers: expected moments m to be those of 2 layers, got a tuple"),
        (first, "Sequential of 2 layers: expected moments m to be those of 2 layers, got .count"),
        (((), (nothing, nothing, last)), r"layer 1: layer 0: BatchNorm\(\): expected moments m to"),
        (
            ((), (one, nothing, last)),
            r"layer 1: layer 0: BatchNorm\(\): expected moments of at least "
            "2 values per channel, got count 1",
        ),
        (
            ((), (narrow, nothing, last)),
            r"layer 1: layer 0: BatchNorm\(\): expected params of the shapes of m, "
            r"{'weight': \(1,\), 'bias': \(1,\)}, got {'weight': \(2,\), 'bias': \(2,\)}",
        ),
        (((), (first, nothing, narrow)), "layer 1: layer 2: expected moments m of 3 channels"),
        (
            ((), first),
            "layer 1: Sequential of 3 layers: expected moments m to be those of 3 layers",
        ),
        (
            ((), ((*first[:2], ()), nothing, last)),
            r"BatchNorm\(\): expected moments m to be \(count, mean, M2\), got a tuple of 3",
        ),
        ({"a": first}, "those of 2 layers, got a dict with keys 'a'"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            fn.for_inference(net, params, wrong)
    lone = fn.Sequential(fn.Linear(2), fn.BatchNorm())
    with pytest.raises(ValueError, match=r"layer 1: BatchNorm\(\): expected moments m to be \(c"):
        fn.for_inference(lone, lone.init(KEY, (2,)), ((), ()))
    with pytest.raises(ValueError, match=r"^BatchNorm\(\): expected params of the.*, got \(\)$"):
        fn.for_inference(fn.BatchNorm(), (), first)
    with pytest.raises(ValueError, match="expected params of 2 layers, got a tuple of 1"):
        fn.for_inference(net, params[:1], m)
    with pytest.raises(
        TypeError, match="for_inference: expected net to be a Layer, got a tuple of 2"
    ):
        fn.for_inference(params, net, m)
    with pytest.raises(TypeError, match="expected fold to be True or False, got 1"):
        fn.for_inference(net, params, m, fold=1)
    with pytest.raises(TypeError, match="moments: expected net to be a Layer"):
        fn.moments(params, net, torch.zeros(1), key=KEY)
    with pytest.raises(ValueError, match=r"layer 1: layer 0: BatchNorm\(\): expected a key"):
        fn.moments(net, params, torch.rand(2, 2, 3, 3).double(), key=None)
    for other in (
        ((), ()),
        ((), (last, nothing, first)),
        ((), (first, nothing)),
        ((), first),
        None,
    ):
        with pytest.raises(ValueError, match=r"merge_moments: .*expected moments of"):
            fn.merge_moments(m, other)


MOMENTS = tuple(torch.zeros(shape) for shape in ((), (3,), (3,)))
SMALLER = tuple(torch.zeros(shape) for shape in ((), (2,), (2,)))


@pytest.mark.parametrize(
    ("m", "other", "message"),
    [
        (MOMENTS, (), "expected moments of the same layers, (count, mean, M2), got ()"),
        ((), MOMENTS, "expected moments of the same layers, (), got (count, mean, M2)"),
        ((MOMENTS, ()), MOMENTS, "of the same layers, a tuple of 2, got (count, mean, M2)"),
        (MOMENTS, ((), (), ()), "same layers, (count, mean, M2), got a tuple of 3"),
        (((), (), ()), MOMENTS, "same layers, a tuple of 3, got (count, mean, M2)"),
        (None, (), "expected moments of the same layers, NoneType, got ()"),
        (
            ((), MOMENTS),
            ((), SMALLER),
            "merge_moments: layer 1: expected moments of shapes ((), (3,), (3,)), got ((), (2,)",
        ),
        ({"a": MOMENTS}, {"a": SMALLER}, "merge_moments: a: expected moments of shapes"),
    ],
)
def test_what_is_not_merged(m, other, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        fn.merge_moments(m, other)


def test_moments_of_copies_are_merged_copy_by_copy():
    net = fn.Repeat(fn.Sequential(fn.BatchNorm(), fn.Sigmoid()), 3)
    params, x = net.init(KEY, (2,)), fn.normal(KEY, (6, 2), dtype=torch.float64)
    params = optree.tree_map(torch.Tensor.double, params)
    (whole, _) = fn.moments(net, params, x, key=KEY)
    m, other = (tuple(part[i] for part in whole) for i in (0, 1))
    by_copies = tuple(torch.stack(parts) for parts in zip(m, other, m, strict=True))
    backwards = tuple(torch.stack(parts) for parts in zip(other, m, other, strict=True))
    merged = fn.merge_moments(by_copies, backwards)
    for i in range(3):
        close(tuple(part[i] for part in merged), fn.merge_moments(m, other))


def test_moments_of_a_copy_without_values_or_of_other_copies_are_refused():
    net = fn.Repeat(fn.Sequential(fn.Linear(2), fn.BatchNorm(affine=False)), 2)
    params, _, (nothing, (count, mean, m2)) = measured(net, (2,))
    some = count.index_fill(0, torch.tensor(0), 1.0)
    with pytest.raises(ValueError, match=r"of at least 2 values per channel, got count 1"):
        fn.for_inference(net, params, (nothing, (some, mean, m2)))
    with pytest.raises(ValueError, match=r"expected moments m of 2 channels, got shape \(1, 2\)"):
        fn.for_inference(net, params, (nothing, (count[:1], mean[:1], m2[:1])))


@pytest.mark.parametrize("fold", [True, False])
def test_shapes_of_a_network_for_inference_on_meta(fold):
    net = fn.Sequential(fn.Conv2d(4, 3), fn.BatchNorm(), fn.ReLU())
    params = net.init(KEY, (3, 8, 8), device="meta")
    x = torch.zeros(2, 3, 8, 8, device="meta")
    inferred, params = fn.for_inference(net, params, fn.moments(net, params, x, key=KEY), fold)
    y = inferred.apply(params, x)
    assert y.is_meta
    assert y.shape == (2, 4, 6, 6)


def test_a_name_of_digits_is_a_name_in_every_message():
    net = fn.Sequential(**{"0": fn.Sequential(**{"7": fn.BatchNorm()})})
    params, x, m = measured(net, (2, 3, 3))
    looped = fn.Sequential(**{"0": fn.Sequential(**{"7": fn.Loop(fn.BatchNorm(), 2)})})
    other = {"0": {"7": tuple(part[..., :1] for part in m["0"]["7"])}}
    for call in (
        lambda: net.apply(params, x),
        lambda: fn.value_and_grad(net, fn.MSE(), micro_batch=2),
        lambda: fn.moments(looped, params, x, key=KEY),
        lambda: fn.for_inference(net, params, {"0": {"7": ()}}),
        lambda: fn.merge_moments(m, other),
    ):
        with pytest.raises(ValueError, match=r"(?<!layer )0: 7: (BatchNorm|expected)"):
            call()


@pytest.mark.parametrize("net", [fn.BatchNorm(), fn.Residual(fn.BatchNorm())], ids=repr)
def test_moments_names_the_network_that_it_was_given(net):
    for x, key in ((torch.ones(3, 2), 3), ([1.0], KEY)):
        with pytest.raises(TypeError, match=f"^{re.escape(repr(net))}: expected"):
            fn.moments(net, net.init(KEY, (2,)), x, key=key)
