"""What `interop.wrap` sees of a module, and what it refuses."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import funcnet as fn
from funcnet.interop import wrap

KEY = fn.key(7)


class Calling(nn.Module):
    """y = function(self, x), with parameters and modules of one's own."""

    def __init__(self, function, **own):
        super().__init__()
        self.function = function
        for name, value in own.items():
            setattr(self, name, value)

    def forward(self, x):
        return self.function(self, x)


def batch_norm():
    return nn.BatchNorm1d(4, track_running_stats=False)


# --- Writing to parameters, and to x


def clamped(self, x):
    with torch.no_grad():
        self.scale.clamp_(min=0)
    return x * self.scale


def clamped_unseen(self, x):
    self.scale.data.clamp_(min=0)
    return x * self.scale


def bounded(self, x):
    self.scale.data.clamp_(max=5)
    return x * self.scale


def normalised(self, x):
    self.scale.data = self.scale.data / self.scale.data.norm()
    return x * self.scale


@pytest.mark.parametrize("function", [clamped, clamped_unseen, bounded, normalised])
def test_a_module_that_writes_to_its_parameters_is_refused(function):
    """They would be the caller's: in a copy of the module they are replaced by params."""
    inner = Calling(function, scale=nn.Parameter(torch.ones(3)))
    module = nn.Sequential(nn.ReLU(), inner)
    with pytest.raises(
        ValueError, match=r"to its parameters, got 1 \(Calling, train mode\), wh.* 1\.s"
    ):
        wrap(module, (3,))
    assert torch.equal(inner.scale, torch.ones(3))
    with pytest.raises(ValueError, match=r"to its parameters, got Embedding \(train mode\), which"):
        wrap(nn.Embedding(5, 3, max_norm=0.1), (3,))


def test_a_module_that_writes_to_x_unseen_gets_a_copy():
    layer, params = wrap(Calling(lambda self, x: x.data.mul_(2)), (3,))
    x = torch.ones(2, 3)
    assert torch.equal(layer.apply(params, x), torch.full((2, 3), 2.0))
    assert torch.equal(x, torch.ones(2, 3))


def test_a_module_that_writes_to_some_x_alone_gets_a_copy():
    layer, params = wrap(Calling(lambda self, x: x.clamp_(max=100.0)), (3,))
    x = torch.full((2, 3), 200.0)
    assert torch.equal(layer.apply(params, x), torch.full((2, 3), 100.0))
    assert torch.equal(x, torch.full((2, 3), 200.0))


def cached(self, x):
    if self.doubled is None:
        self.doubled = 2 * self.weight
    return x @ self.doubled


def test_a_module_that_keeps_what_it_computed_from_its_parameters_is_refused():
    module = Calling(cached, weight=nn.Parameter(torch.ones(3, 2)), doubled=None)
    with pytest.raises(ValueError, match="got Calling, which computes with earlier parameters"):
        wrap(module, (3,))
    assert module.doubled is None


# --- Coupling


def behind_zeros():
    module = nn.Sequential(nn.Linear(3, 4), batch_norm(), nn.Linear(4, 2))
    nn.init.zeros_(module[2].weight)
    return module


@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (lambda: nn.Sequential(nn.Embedding(7, 4), Calling(mean_over_time), batch_norm()), (5,)),
        (behind_zeros, (3,)),
        (lambda: Calling(lambda self, x: x.cumsum(0)), (3,)),
        (lambda: Calling(lambda self, x: x.flip(0).cumsum(0).flip(0)), (3,)),
        (lambda: Calling(lambda self, x: x / len(x)), (3,)),
        (lambda: Calling(lambda self, x: x + 1e-3 * x.mean(0)), (3,)),
        (lambda: Calling(lambda self, x: 1e-6 * (x + x.mean(0))), (3,)),
    ],
    ids=["integers", "zeros", "cumsum", "from the end", "count", "weakly", "small"],
)
def test_coupling_is_seen(build, shape):
    layer, _ = wrap(build(), shape)
    assert layer.couples_examples
    with pytest.raises(ValueError, match="treat every example alone"):
        fn.value_and_grad(layer, fn.MSE(), micro_batch=2)


def mean_over_time(self, x):
    return x.mean(1)


def last(self, x):
    return self.recurrent(x)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("build", "shape"),
    [
        (
            lambda: nn.Sequential(*[m for _ in range(20) for m in (nn.Linear(16, 16), nn.ReLU())]),
            (16,),
        ),
        (lambda: Calling(last, recurrent=nn.RNN(16, 16, 2, batch_first=True)), (40, 16)),
        (lambda: nn.Sequential(nn.Embedding(5, 4), nn.Linear(4, 3)), (6,)),
        (
            lambda: Calling(
                lambda self, x: x @ torch.linalg.cholesky(self.matrix.float()).to(x),
                matrix=nn.Parameter(torch.eye(3)),
            ),
            (3,),
        ),
    ],
    ids=["deep", "recurrent", "integers", "not of any parameters"],
)
def test_no_coupling_is_seen_where_there_is_none(build, shape, dtype):
    torch.manual_seed(0)
    assert not wrap(build().to(dtype), shape)[0].couples_examples


# --- The shape and the dtype of y


@pytest.mark.parametrize(
    ("function", "shape", "message"),
    [
        (lambda self, x: x.mean(-1).squeeze(), (1, 3), r"y of shape \(1, …\) for .* 1, got \(\)"),
        (lambda self, x: x.reshape(3, -1), (3,), r"y of shape \(1, …\) for .* 1, got \(3, 1\)"),
        (lambda self, x: x.reshape(2, -1), (4,), r"y of shape \(3, …\) for .* 3, got \(2, 6\)"),
        (lambda self, x: x[:, : len(x)], (3,), r"\(1, 3\) for .* as for one of 3, got \(1, 1\)"),
    ],
    ids=["squeezed", "three", "two", "as wide as the batch"],
)  # fmt: skip
def test_y_has_one_shape_whatever_the_batch(function, shape, message):
    with pytest.raises(ValueError, match=message):
        wrap(Calling(function), shape)


def scaled(self, x):
    return self.linear(x) * self.scale


@pytest.mark.parametrize(
    "module",
    [
        Calling(
            lambda self, x: self.linear(x.bfloat16()).float() * self.scale,
            scale=nn.Parameter(torch.ones(4)),
            linear=nn.Linear(4, 4, dtype=torch.bfloat16),
        ),
        Calling(
            scaled, linear=nn.Linear(4, 4), scale=nn.Parameter(torch.ones(4, dtype=torch.float64))
        ),
    ],
    ids=["bfloat16 inside", "float64 factor"],
)
def test_parameters_of_several_dtypes_are_refused(module):
    """params have one dtype: the others would be rounded, or the module fail."""
    with pytest.raises(ValueError, match=r"of one dtype, got scale \(torch\.float.*, linear\.weig"):
        wrap(module, (4,))


@pytest.mark.parametrize(
    ("module", "shape", "got"),
    [
        (Calling(lambda self, x: x.double()), (4,), "float64"),
        (Calling(lambda self, x: self.inner(x).half(), inner=nn.Linear(4, 3)), (4,), "float16"),
        (nn.Sequential(nn.Embedding(5, 4), Calling(lambda self, x: x.double())), (4,), "float64"),
    ],
)  # fmt: skip
def test_y_of_another_dtype_is_refused(module, shape, got):
    with pytest.raises(ValueError, match=rf"expected y of torch\.float32, got torch\.{got}"):
        wrap(module, shape)


# --- What cannot be observed


class Reentrant(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 3)

    def forward(self, x):
        return checkpoint(self.linear, x, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_a_module_that_autograd_cannot_differentiate_is_refused():
    module = nn.Sequential(nn.ReLU(inplace=True), Reentrant())
    with pytest.raises(ValueError, match=r"can differentiate, got Sequential: .*checkpoint"):
        wrap(module, (3,))
    layer, _ = wrap(Calling(lambda self, x: x.round().detach()), (3,))
    assert layer.vjp((), torch.ones(1, 3), torch.ones(1, 3))[1].tolist() == [[0.0] * 3]


def test_a_module_without_values_is_refused():
    module = nn.Sequential(nn.ReLU(), nn.Linear(4, 3, device="meta"))
    with pytest.raises(ValueError, match=r"with values, got 1\.weight, 1\.bias on meta"):
        wrap(module, (4,))


def test_a_lazy_module_gets_its_parameters():
    module = nn.Sequential(nn.LazyLinear(3), nn.Tanh(), nn.LazyLinear(2))
    state = torch.get_rng_state()
    layer, params = wrap(module, (4,))
    assert torch.equal(torch.get_rng_state(), state)
    assert params["0"]["weight"].shape == (3, 4)
    assert layer.apply(params, torch.ones(5, 4)).shape == (5, 2)
    assert nn.parameter.is_lazy(module[0].weight)


def test_wrap_under_inference_mode_and_autocast():
    with torch.inference_mode():
        layer, params = wrap(nn.Linear(3, 2), (3,))
    assert not params["weight"].is_inference()
    dx = layer.vjp(params, torch.ones(1, 3), torch.ones(1, 2))[1]
    torch.testing.assert_close(dx, params["weight"].sum(0, keepdim=True))
    with torch.autocast("cpu", torch.bfloat16):
        wrap(nn.Linear(3, 2), (3,))


class Views(torch.autograd.Function):
    """2·x, whose gradient is computed from a view that a contiguous grad alone has."""

    @staticmethod
    def forward(x):
        return 2 * x

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, grad):
        return 2 * grad.view(-1).view(grad.shape)


@pytest.mark.parametrize("module", [nn.InstanceNorm2d(3), Calling(lambda _, x: Views.apply(x))])
def test_autograd_gets_grad_in_the_layout_of_y(module):
    """PyTorch's instance_norm of one image is wrong by a grad in channels_last."""
    layer, params = wrap(module, (3, 4, 5))
    x, grad = fn.normal(KEY, (2, 1, 3, 4, 5))
    other = grad.contiguous(memory_format=torch.channels_last)
    expected = layer.vjp(params, x, grad)
    torch.testing.assert_close(layer.vjp(params, x, other), expected)
    torch.testing.assert_close(layer.vjp(params, x, other.requires_grad_()), expected)
