"""What `interop.from_torch` refuses to translate."""

import copy
from collections import OrderedDict

import pytest
import torch
from test_properties import same
from torch import nn
from torch.nn.utils.parametrizations import spectral_norm

import funcnet as fn
from funcnet.interop import from_torch
from funcnet.interop.blocks import First, Sum

KEY = fn.key(7)

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
    x = fn.normal(KEY, (2, *shape), dtype=torch.float64)
    y = expected(x) if name == "weight" else expected(x, x, x)[0]
    torch.testing.assert_close(net.apply(params, x), y)


def encoder(**options):
    layer = nn.TransformerEncoderLayer(4, 2, 6, **{"batch_first": True, **options})
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


def with_network(network):
    module = encoder()
    module.layers[1].linear1 = network
    return module


@pytest.mark.parametrize(
    ("build", "problems"),
    [
        (lambda: encoder(batch_first=False), [
            "1.layers.0.self_attn: MultiheadAttention: expected batch_first=True, got False",
            "1.layers.1.self_attn: MultiheadAttention: expected batch_first=True, got False",
        ]),
        (lambda: with_network(nn.Sequential(nn.Linear(4, 6), nn.CELU())), [
            "1.layers.1.linear1.1: CELU has no twin",
        ]),
        (lambda: encoder(activation=torch.sin), [
            f"1.layers.{i}: TransformerEncoderLayer: expected activation to be relu, gelu or a "
            f"module, got {torch.sin}" for i in range(2)
        ]),
        (lambda: First(nn.GRU(4, 3)), ["1.module: GRU: expected batch_first=True, got False"]),
    ],
    ids=["attention", "inside", "activation", "first"],
)  # fmt: skip
def test_problems_are_named_by_paths_in_the_callers_module(build, problems):
    module = nn.Sequential(nn.Identity(), build())
    for line in problems:
        module.get_submodule(line.partition(":")[0])
    with pytest.raises(ValueError, match="expected modules that have a twin") as error:
        from_torch(module, (5, 4))
    assert [line.strip() for line in str(error.value).splitlines()[1:]] == problems


# --- Examples and parts that do not fit


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (nn.Linear(4, 3), (), r"Linear\(3\): expected .*, \(…, C\), got \(\)"),
        (nn.Conv2d(3, 4, 1), (), r"Conv2d\(4, .*, \(C, H, W\), got \(\)"),
        (nn.LSTM(4, 3, batch_first=True), (4,), r"LSTM\(3\): expected .*, \(T, C\), got \(4,\)"),
        (nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), (4,), r"self_attn: .*got \(4,\)"),
        (nn.Softmax2d(), (3, 4), r"Softmax2d: expected one .* 3 axes, got shape \(3, 4\)"),
        (nn.Sequential(nn.Flatten(), nn.Embedding(3, 4)), (2, 2), r"0: Flatten\(\): expected x"),
        (nn.Sequential(nn.Identity(), nn.Embedding(3, 4)), (2,), r"0: Identity\(\): expected x"),
        (
            nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.Linear(3, 3).double())),
            (3,),
            r"1\.1: Linear\(3\): expected weight to have the dtype and device of x, torch\.float32",
        ),
    ],
    ids=["Linear", "Conv2d", "LSTM", "encoder", "Softmax2d", "Flatten", "Identity", "dtypes"],
)  # fmt: skip
def test_what_does_not_fit_is_named(module, shape, message):
    with pytest.raises(ValueError, match=message):
        from_torch(module, shape)


def test_integers_go_through_every_branch():
    tables = Sum(OrderedDict(a=nn.Embedding(5, 3), b=nn.Embedding(5, 3)))
    net, params = from_torch(nn.Sequential(tables, nn.Linear(3, 2)), (4,))
    x = torch.tensor([[0, 1, 4, 2]])
    assert net.apply(params, x).shape == (1, 4, 2)
