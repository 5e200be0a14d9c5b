"""What `interop.from_torch` refuses to translate."""

import copy

import pytest
import torch
from test_properties import same
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import funcnet as fn
from funcnet.interop import from_torch

pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")


class Standardised(nn.Conv2d):
    def _conv_forward(self, x, weight, bias):
        return super()._conv_forward(x, weight - weight.mean(), bias)


class Halved(nn.TransformerEncoderLayer):
    def _ff_block(self, x):
        return super()._ff_block(x) / 2


class Unattending(nn.TransformerEncoderLayer):
    def _sa_block(self, x, *others, **options):
        return 0 * x


class Backwards(nn.Sequential):
    def __iter__(self):
        return reversed([*self._modules.values()])


class Calling(nn.Linear):
    def __call__(self, x):
        return 2 * super().__call__(x)


class Doubling(nn.Module):
    """A mixin behind the layer, in front of torch.nn.Module."""

    def __call__(self, x):
        return 2 * super().__call__(x)


class Mixed(nn.Linear, Doubling):
    pass


def shadowing():
    module = nn.Conv2d(3, 4, 1)
    module._conv_forward = lambda x, weight, bias: x
    return module


@pytest.mark.parametrize(
    ("build", "shape", "message"),
    [
        (lambda: Standardised(3, 4, 1), (3, 2, 2), "Standardised .*_conv_forward .* not Conv2d's"),
        (
            lambda: Halved(4, 2, 6, batch_first=True),
            (3, 4),
            "Halved has no .* has _ff_block of its",
        ),
        (lambda: Unattending(4, 2, 6, batch_first=True), (3, 4), "has _sa_block of its own, not T"),
        (lambda: Backwards(nn.ReLU(), nn.Tanh()), (3,), "__iter__ of its own, not Sequential's"),
        (lambda: Calling(3, 2), (3,), "Calling has no twin: it has __call__ of its own, not Li"),
        (lambda: Mixed(3, 2), (3,), "Mixed has no twin: it has __call__ of its own, not Linear's"),
        (shadowing, (3, 2, 2), "Conv2d has no twin: it has _conv_forward of its own, not Conv2d's"),
    ],
    ids=["conv", "network", "attention", "order", "call", "mixin", "instance"],
)
def test_a_module_that_overrides_what_its_forward_pass_calls_has_no_twin(build, shape, message):
    with pytest.raises(ValueError, match=message):
        from_torch(build().eval(), shape)


def test_a_subclass_may_override_what_no_forward_pass_calls():
    class Mine(nn.Linear):
        """Documented."""

        scale: float = 2.0

        def __init__(self, outputs):
            super().__init__(3, outputs)

        def extra_repr(self):
            return "mine"

        def train(self, mode=True):
            return super().train(mode)

        def _load_from_state_dict(self, *args):
            super()._load_from_state_dict(*args)

        def helper(self):
            return self.scale

    module = Mine(2)
    module.compile(backend="eager")
    assert from_torch(module, (3,))[0] == fn.Linear(2)


@pytest.mark.parametrize("kind", ["hook", "pre_hook"])
def test_a_hook_on_all_modules_is_refused(kind):
    register = getattr(nn.modules.module, f"register_module_forward_{kind}")
    handle = register(lambda *_: None)
    try:
        with pytest.raises(ValueError, match="expected no forward hooks on all modules, got 1"):
            from_torch(nn.Linear(3, 2), (3,))
    finally:
        handle.remove()
    assert from_torch(nn.Linear(3, 2), (3,))[0] == fn.Linear(2)


@pytest.mark.parametrize("name", ["weight", "out_proj.weight"])
def test_reading_a_parametrised_weight_changes_no_module(name):
    """spectral_norm in train mode iterates once more whenever its weight is read."""
    shape = (5,) if name == "weight" else (3, 4)
    module = nn.Linear(5, 4) if name == "weight" else nn.MultiheadAttention(4, 2, batch_first=True)
    spectral_norm(module.out_proj if name.startswith("out") else module)
    module.double().train()
    before, expected = copy.deepcopy(module.state_dict()), copy.deepcopy(module)
    net, params = from_torch(nn.Sequential(module), shape)
    assert same(dict(module.state_dict()), dict(before))
    x = fn.normal(fn.key(1), (2, *shape), dtype=torch.float64)
    y = expected(x) if name == "weight" else expected(x, x, x)[0]
    torch.testing.assert_close(net.apply(params, x), y)
