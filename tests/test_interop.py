"""Beside torch.nn: the same outputs both ways, the same gradients inside each other's networks."""

import copy
import pickle
from collections import OrderedDict
from dataclasses import dataclass

import onnxruntime
import optree
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from registry import EVERY_LAYER, EXAMPLE_IDS, EXAMPLES, budget, draw_x, key_for, make
from test_properties import close, same
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint
from users_layers import Dense

import funcnet as fn
from funcnet.interop import as_module, from_torch, load_state_dict, state_dict, to_torch, wrap
from funcnet.testing import GradientMismatch, check_vjp, strategies
from funcnet.testing.registry import REGISTRY

examples = pytest.mark.parametrize(("layer", "shape"), EXAMPLES, ids=EXAMPLE_IDS)
FLOAT64 = st.just(torch.float64)
KEY = fn.key(7)

# What PyTorch warns of in its own code
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using padding='same'"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:There is a performance drop because"),
]


def agree(a, b):
    """Whether two outputs in float64 are the same up to rounding."""
    return a.shape == b.shape and torch.allclose(a, b, rtol=1e-11, atol=1e-12)


def case_of(layer, shape):
    """(params, x, y) in float64, with the key that the layer needs."""
    params, x, _ = make(layer, shape, batch=3, dtype=torch.float64)
    return params, x, layer.apply(params, x, key=key_for(layer))


# --- to_torch and back


@examples
def test_to_torch_and_back(layer, shape):
    params, x, y = case_of(layer, shape)
    before = optree.tree_map(torch.clone, params)
    module = to_torch(layer, params, shape)
    assert agree(module(x), y)
    assert same(params, before)
    if isinstance(layer, fn.Cast):
        return  # its module computes in another dtype than x has
    net, again = from_torch(module, shape)
    assert agree(net.apply(again, x, key=key_for(layer)), y)


@budget(60)
@given(strategies.cases(EVERY_LAYER, dtypes=FLOAT64))
def test_any_network_to_torch_and_back(case):
    net, params, x = case
    shape = tuple(x.shape[1:])
    module, key = to_torch(net, params, shape), key_for(net)
    if len(x) < 2:
        return  # torch.nn's GroupNorm refuses a single value per group, and Conv some empty batches
    y = net.apply(params, x, key=key)
    assert agree(module(x), y)
    if not any(isinstance(part, fn.Cast) for part in every_layer(net)):
        back, again = from_torch(module, shape)
        assert agree(back.apply(again, x, key=key), y)


def every_layer(layer):
    """A layer and all layers in it."""
    return [layer, *(part for _, child in layer._children() for part in every_layer(child))]


def test_to_torch_makes_plain_modules_and_draws_nothing():
    net = fn.Sequential(
        fn.Conv2d(4, 3), fn.BatchNorm(), fn.ReLU(), fn.Repeat(fn.UpsampleConv2d(4, scale=1), 2),
        fn.Flatten(), fn.Linear(2),
    )  # fmt: skip
    params = net.init(fn.key(0), (3, 6, 6))
    state = torch.get_rng_state()
    module = to_torch(net, params, (3, 6, 6))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(type(part).__module__.startswith("torch.nn") for part in module.modules())
    assert [type(part) for part in module] == [
        nn.Conv2d, nn.BatchNorm2d, nn.ReLU, nn.Sequential, nn.Flatten, nn.Linear
    ]  # fmt: skip
    assert not module.training
    assert module[0].weight.data_ptr() != params[0]["weight"].data_ptr()


def test_names_of_native_networks_are_the_same():
    net = fn.Sequential(stem=fn.Conv2d(4, 3), rest=fn.Sequential(fn.ReLU(), fn.PReLU(4)))
    params = net.init(fn.key(0), (3, 6, 6))
    module = to_torch(net, params)
    assert same(dict(module.state_dict()), state_dict(params))
    assert from_torch(module, (3, 6, 6))[0] == net


@pytest.mark.parametrize(
    ("first", "x"),
    [(fn.Linear(3), torch.ones(2, 4)), (fn.Embedding(5, 3), torch.ones(2, dtype=torch.int64))],
)
def test_the_module_of_a_cast_returns_numbers_in_the_networks_dtype(first, x):
    net = fn.Cast(fn.Sequential(first), torch.bfloat16)
    params = net.init(fn.key(0), tuple(x.shape[1:]))
    y, expected = to_torch(net, params)(x), net.apply(params, x)
    assert y.dtype == expected.dtype == torch.float32
    assert torch.allclose(y, expected, rtol=1e-2)


def test_frozen_parameters_require_no_gradient():
    net = fn.Sequential(fn.Frozen(fn.Sequential(fn.Linear(3))), fn.Linear(2))
    module = to_torch(net, net.init(fn.key(0), (4,)))
    assert [p.requires_grad for p in module.parameters()] == [False, False, True, True]


@pytest.mark.parametrize("layer", [fn.AdaptiveAvgPool1d(None), fn.AdaptiveMaxPool1d(None)], ids=str)
def test_pooling_that_keeps_its_only_axis(layer):
    """torch.nn refuses None for a single axis."""
    x = torch.ones(2, 3, 4)
    assert torch.equal(to_torch(layer, ())(x), layer.apply((), x))


@pytest.mark.parametrize("cls", [fn.LayerNorm, fn.RMSNorm])
def test_norms_without_parameters_are_over_the_last_axes(cls):
    layer, x = cls(elementwise_affine=False), fn.normal(KEY, (2, 3, 4, 5))
    torch.testing.assert_close(to_torch(layer, (), (3, 4, 5))(x), layer.apply((), x))


def test_dropout_of_a_module_in_train_mode_drops():
    net = fn.Sequential(fn.Dropout(1.0), fn.Identity())
    assert not to_torch(net, ((), ())).train()(torch.ones(2, 3)).any()


@dataclass(frozen=True)
class Doubled(fn.Layer):
    """A layer of one's own: y = 2x."""

    def _fwd(self, params, x, key):
        return 2 * x, None

    def _bwd(self, params, residuals, dy, need):
        return (), 2 * dy if need.input else None


def test_all_layers_without_a_form_are_named_at_once():
    inner = fn.Sequential(fn.ReLU(), a := Doubled())
    net = fn.Sequential(stem=Doubled(), body=fn.Residual(inner), norm=fn.InstanceNorm())
    with pytest.raises(ValueError, match="to_torch: expected layers") as error:
        to_torch(net, net.init(fn.key(0), (2, 4)))
    assert str(error.value).splitlines()[1:] == [
        "  stem: Doubled() has no form in torch.nn",
        f"  body.1: {a} has no form in torch.nn",
        "  norm: InstanceNorm() needs shape, as none of its parameters tells its sizes",
    ]


def test_to_torch_refuses_what_does_not_fit():
    net = fn.Sequential(fn.Linear(3), fn.Linear(2))
    params = net.init(fn.key(0), (4,))
    with pytest.raises(TypeError, match="to_torch: expected net to be a Layer, got Linear"):
        to_torch(nn.Linear(3, 4), params)
    with pytest.raises(ValueError, match=r"Linear\(3\): expected x of shape \(N, …, 4\)"):
        to_torch(net, params, (5,))
    with pytest.raises(ValueError, match="expected params of 2 layers, got 1"):
        to_torch(net, params[:1])
    with pytest.raises(ValueError, match=r"1: Linear\(2\): expected params with 'weight', got"):
        to_torch(net, (params[0], {"bias": params[1]["bias"]}))
    with pytest.raises(ValueError, match=r"0: Linear\(3\): expected params that fit"):
        to_torch(net, ({**params[0], "more": params[0]["bias"]}, params[1]))
    for layer, own, message in (
        (fn.MultiheadAttention(3), fn.MultiheadAttention(2).init(KEY, (5, 8)), "embed_dim must be"),
        (fn.GroupNorm(3), fn.GroupNorm(2).init(KEY, (4,)), "num_channels"),
    ):
        with pytest.raises(ValueError, match=rf"\(3\): expected params that fit, got .*{message}"):
            to_torch(layer, own)
    with pytest.raises(ValueError, match=r"expected weight of 2 axes or more, got shape \(3,\)"):
        to_torch(fn.Linear(3), {"weight": torch.ones(3), "bias": torch.ones(3)})
    with pytest.raises(TypeError, match="to_torch: expected params to be a tensor, or a tuple"):
        to_torch(fn.Linear(3), None)
    with pytest.raises(ValueError, match="expected params with a leading axis of 3"):
        to_torch(fn.Repeat(fn.Linear(4), 3), fn.Repeat(fn.Linear(4), 2).init(fn.key(0), (4,)))
    with pytest.raises(ValueError, match=r"Sequential of 1 layer has a name .* 'train'"):
        to_torch(fn.Sequential(train=fn.ReLU()), {"train": ()})


# --- from_torch


def plain_twin(layer, shape):
    """torch.nn's own module for a layer; None where torch.nn has none."""
    sizes = {2: "1d", 3: "2d", 4: "3d"}
    if isinstance(layer, fn.BatchNorm | fn.InstanceNorm):
        rank = "1d" if len(shape) == 1 else sizes[len(shape)]
        cls = getattr(nn, type(layer).__name__ + rank)
        return cls(shape[0], layer.eps, affine=layer.affine, track_running_stats=False)
    if isinstance(layer, fn.GroupNorm):
        return nn.GroupNorm(layer.num_groups, shape[0], layer.eps, layer.affine)
    if isinstance(layer, fn.MultiheadAttention) and not layer.causal:
        return nn.MultiheadAttention(
            shape[1], layer.num_heads, layer.dropout, layer.bias, batch_first=True
        )
    if isinstance(layer, fn.RNN | fn.LSTM | fn.GRU):
        return getattr(nn, type(layer).__name__)(
            shape[1], layer.hidden_size, layer.num_layers, bias=layer.bias, batch_first=True,
            bidirectional=layer.bidirectional,
            **({"nonlinearity": layer.nonlinearity} if isinstance(layer, fn.RNN) else {}),
        )  # fmt: skip
    twin = REGISTRY[type(layer)].twin
    module = None if twin is None else twin(layer, shape)
    return module if type(module).__module__.startswith("torch.nn") else None


WITH_TWIN = [case for case in EXAMPLES if plain_twin(*case) is not None]


@pytest.mark.parametrize(("layer", "shape"), WITH_TWIN, ids=str)
def test_from_the_twin(layer, shape):
    module = plain_twin(layer, shape).double().eval()
    x = draw_x(layer, (3, *shape), torch.float64)
    net, params = from_torch(module, shape)
    assert type(net) is type(layer)
    y = module(x, x, x)[0] if isinstance(module, nn.MultiheadAttention) else module(x)
    y = y[0] if isinstance(y, tuple) else y
    assert agree(net.apply(params, x, key=key_for(layer)), y)
    assert same(state_dict(params), {n: p.data for n, p in module.named_parameters()})
    owned = {p.data_ptr() for p in module.parameters()}
    assert not owned & {leaf.data_ptr() for leaf in optree.tree_leaves(params)}
    again = net.init(fn.key(0), shape)
    assert optree.tree_map(torch.Tensor.size, again) == optree.tree_map(torch.Tensor.size, params)


LAYERS_WITH_TWIN = sorted({type(layer) for layer, _ in WITH_TWIN}, key=lambda cls: cls.__name__)


@budget(40)
@given(st.sampled_from(LAYERS_WITH_TWIN).flatmap(lambda cls: strategies.cases(
    strategies.layers(cls), dtypes=FLOAT64
)))  # fmt: skip
def test_from_any_twin(case):
    layer, _, x = case
    module = plain_twin(layer, tuple(x.shape[1:]))
    if module is None or len(x) < 2:
        return
    module = module.double().eval()
    net, params = from_torch(module, tuple(x.shape[1:]))
    y = module(x, x, x)[0] if isinstance(module, nn.MultiheadAttention) else module(x)
    y = y[0] if isinstance(y, tuple) else y
    assert agree(net.apply(params, x, key=key_for(layer)), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_dtype_and_device_are_the_modules(dtype, device):
    module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(device, dtype).eval()
    net, params = from_torch(module, (3,))
    assert {(leaf.dtype, leaf.device.type) for leaf in optree.tree_leaves(params)} == {
        (dtype, device)
    }
    x = fn.normal(fn.key(0), (2, 3), dtype=dtype, device=device)
    torch.testing.assert_close(net.apply(params, x), module(x))


@pytest.mark.parametrize(
    ("norm", "shape"),
    [
        (nn.BatchNorm1d(4), (4,)),
        (nn.BatchNorm1d(4, affine=False), (4, 5)),
        (nn.BatchNorm2d(4, eps=0.1), (4, 3, 2)),
        (nn.BatchNorm3d(4), (4, 2, 3, 2)),
        (nn.SyncBatchNorm(4), (4, 3, 2)),
        (nn.InstanceNorm1d(4, affine=True, track_running_stats=True), (4, 5)),
        (nn.InstanceNorm2d(4, track_running_stats=True), (4, 3, 2)),
        (nn.InstanceNorm3d(4, affine=True, track_running_stats=True), (4, 2, 3, 2)),
    ],
    ids=str,
)
def test_norms_with_running_statistics(norm, shape):
    norm = copy.deepcopy(norm).double()
    with torch.no_grad():
        for i, tensor in enumerate([*norm.parameters(), norm.running_mean, norm.running_var]):
            tensor.copy_(fn.uniform(fn.fold_in(KEY, i), tensor.shape, 0.5, 2.0))
    x = fn.normal(KEY, (3, *shape), dtype=torch.float64)
    net, params = from_torch(norm.eval(), shape)
    assert net == fn.ChannelAffine()
    assert agree(net.apply(params, x), norm(x))
    if isinstance(norm, nn.SyncBatchNorm):
        with pytest.raises(ValueError, match="SyncBatchNorm: expected eval mode, got train mode"):
            from_torch(norm.train(), shape)
        return
    net, params = from_torch(norm.train(), shape)
    assert type(net) in (fn.BatchNorm, fn.InstanceNorm)
    assert agree(net.apply(params, x, key=KEY), norm(x))


@pytest.mark.parametrize(
    "norm", [nn.GroupNorm(2, 4), nn.BatchNorm1d(4), nn.InstanceNorm1d(4, affine=True)]
)
def test_norms_without_bias(norm):
    norm.bias = None  # as by bias=False, which new versions of torch.nn have
    with pytest.raises(ValueError, match=r"1: .*Norm.*: expected bias=True"):
        from_torch(nn.Sequential(nn.CELU(), norm), (4, 3))


def test_running_statistics_without_bias():
    norm = nn.BatchNorm1d(4)
    norm.bias = None
    norm.running_mean.uniform_()
    net, params = from_torch(norm.eval(), (4, 3))
    x = fn.normal(KEY, (2, 4, 3))
    torch.testing.assert_close(net.apply(params, x), norm(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_running_statistics_are_rounded_once(dtype):
    norm = nn.BatchNorm1d(64, dtype=dtype).eval()
    for i, tensor in enumerate((norm.weight, norm.bias, norm.running_mean, norm.running_var)):
        tensor.data.copy_(fn.uniform(fn.key(i), (64,), 1.0, 2.0))
    _, params = from_torch(norm, (64,))
    _, exact = from_torch(copy.deepcopy(norm).double(), (64,))
    assert same(params, optree.tree_map(lambda leaf: leaf.to(dtype), exact))


def test_settings_are_kept():
    module = nn.Sequential(
        nn.Conv2d(4, 8, (3, 5), stride=2, padding=(1, 2), dilation=1, groups=2, bias=False),
        nn.MaxPool2d(2), nn.AvgPool2d(3, 1, 1), nn.LeakyReLU(0.2, inplace=True),
        nn.Sequential(nn.Dropout2d(0.3), nn.Upsample(scale_factor=2)), nn.Flatten(),
        nn.Unflatten(1, (8, -1)), nn.Linear(16, 3), nn.Softmax(dim=-1),
    )  # fmt: skip
    net, params = from_torch(module, (4, 8, 8))
    assert net == fn.Sequential(
        fn.Conv2d(8, (3, 5), stride=2, padding=(1, 2), groups=2, bias=False),
        fn.MaxPool2d(2), fn.AvgPool2d(3, 1, 1), fn.LeakyReLU(0.2),
        fn.Sequential(fn.Dropout2d(0.3), fn.Upsample2d(2)), fn.Flatten(),
        fn.Reshape(8, 16), fn.Linear(3), fn.Softmax(-1),
    )  # fmt: skip
    x = fn.normal(KEY, (2, 4, 8, 8))
    torch.testing.assert_close(net.apply(params, x), module.eval()(x))


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("activation", ["relu", F.gelu, nn.Tanh()], ids=["relu", "gelu", "Tanh"])
def test_transformer_encoders(norm_first, activation):
    options = {"batch_first": True, "norm_first": norm_first, "activation": activation}
    layer = nn.TransformerEncoderLayer(8, 2, 12, **options)
    encoder = nn.TransformerEncoder(layer, 2, nn.LayerNorm(8), enable_nested_tensor=False)
    net, params = from_torch(encoder.double().eval(), (5, 8))
    x = fn.normal(KEY, (3, 5, 8), dtype=torch.float64)
    assert agree(net.apply(params, x), encoder(x))
    assert len(net) == 3
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, activation=torch.sin)
    with pytest.raises(ValueError, match="expected activation to be relu, gelu or a module, got"):
        from_torch(layer, (5, 8))


def test_names_of_a_sequential_are_kept():
    module = nn.Sequential(OrderedDict(stem=nn.Linear(3, 4), act=nn.ReLU()))
    net, params = from_torch(module, (3,))
    assert net == fn.Sequential(stem=fn.Linear(4), act=fn.ReLU())
    assert list(state_dict(params)) == list(module.state_dict())


def test_other_modules_that_have_a_layer():
    x = fn.normal(KEY, (2, 4, 3, 3))
    for module, expected in (
        (nn.Softmax2d(), fn.Softmax(1)),
        (nn.Upsample(size=(6, 9)), fn.Upsample2d((2, 3))),
        (nn.UpsamplingNearest2d(scale_factor=2), fn.Upsample2d(2)),
        (nn.Upsample(scale_factor=3, mode="nearest-exact"), fn.Upsample2d(3)),
        (nn.AlphaDropout().eval(), fn.Identity()),
        (nn.Sequential(), fn.Sequential()),
    ):
        net, params = from_torch(module, (4, 3, 3))
        assert net == expected
        assert torch.allclose(net.apply(params, x), module(x))


def test_a_subclass_that_computes_the_same_has_the_twin():
    class Mine(nn.Linear):
        def reset_parameters(self):
            nn.init.ones_(self.weight)
            nn.init.zeros_(self.bias)

    assert from_torch(Mine(3, 2), (3,))[0] == fn.Linear(2)
    weighted = nn.utils.parametrizations.weight_norm(nn.Linear(3, 2))
    net, params = from_torch(weighted, (3,))
    x = torch.ones(1, 3)
    torch.testing.assert_close(net.apply(params, x), weighted(x))


class Other(nn.Linear):
    """A Linear that computes something else."""

    def forward(self, x):
        return super().forward(x) + 1


def test_all_that_has_no_twin_is_named_at_once():
    hooked = nn.Linear(2, 2)
    hooked.register_forward_hook(lambda *_: None)
    tied = nn.Linear(2, 2)
    module = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        nn.Sequential(nn.CELU(), nn.MaxPool2d(2, return_indices=True)),
        nn.AvgPool2d(2, divisor_override=3), nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Embedding(3, 2, max_norm=1.0, scale_grad_by_freq=True),
        nn.LSTM(2, 3, num_layers=2, dropout=0.5),
        nn.LSTM(2, 3, batch_first=True, proj_size=2), Other(2, 2), hooked, nn.LazyLinear(3),
        nn.MultiheadAttention(4, 2, kdim=3, add_bias_kv=True, add_zero_attn=True, batch_first=True),
        nn.Softmax(), nn.Flatten(0), nn.AlphaDropout(), nn.ModuleList([nn.Linear(2, 2)]),
        tied, nn.ReLU(), tied, nn.MSELoss(), nn.NLLLoss(),
    )  # fmt: skip
    with pytest.raises(ValueError, match="from_torch: expected modules that have a twin") as error:
        from_torch(module, (3, 8, 8))
    assert str(error.value).splitlines()[1:] == [
        "  0: Conv2d: expected padding_mode='zeros', got 'reflect'",
        "  1.0: CELU has no twin",
        "  1.1: MaxPool2d: expected return_indices=False, got True",
        "  2: AvgPool2d: expected divisor_override=None, got 3",
        "  3: Upsample: expected mode='nearest', got 'bilinear'",
        "  4: Embedding: expected max_norm=None, got 1.0; "
        "expected scale_grad_by_freq=False, got True",
        "  5: LSTM: expected batch_first=True, got False; "
        "expected dropout=0.0 in train mode, got 0.5",
        "  6: LSTM: expected proj_size=0, got 2",
        "  7: Other has no twin: it has forward of its own, not Linear's",
        "  8: Linear: expected no forward hooks, got 1",
        "  9: LazyLinear: expected parameters, got none yet: call the module once before",
        "  10: MultiheadAttention: expected add_zero_attn=False, got True; "
        "expected add_bias_kv=False; expected kdim and vdim to be embed_dim",
        "  11: Softmax: expected dim to be an int, got None",
        "  12: Flatten: expected start_dim not to be 0, the batch, got 0",
        "  13: AlphaDropout has no twin in train mode",
        "  14: ModuleList has no twin",
        "  18: MSELoss is a loss, which stands beside the network: fn.MSE()",
        "  19: NLLLoss has no twin",
        "  17.weight: expected a parameter of its own, got one tied to 15.weight",
        "  17.bias: expected a parameter of its own, got one tied to 15.bias",
    ]


@pytest.mark.parametrize(
    ("module", "shape", "message"),
    [
        (nn.Sequential(nn.ReLU(), nn.Linear(4, 3)), (5,), r"1: Linear\(3\): expected x of shape"),
        (nn.BatchNorm2d(3), (3, 4), r"BatchNorm2d: expected one example to have 3 axes, got"),
        (nn.BatchNorm1d(3).eval(), (4,), r"ChannelAffine\(\): expected x of shape \(N, 3, …\)"),
        (nn.Upsample(size=(5, 4)), (1, 2, 2), r"a scale of whole numbers, got \(2\.5, 2\.0\)"),
        (nn.Unflatten(1, (3, 3)), (8,), "Unflatten: "),
        (nn.Unflatten(0, (2, 2)), (8,), "Unflatten: expected dim to be an axis after the batch"),
        (nn.LayerNorm(4), (5,), "LayerNorm"),
        (nn.Linear(3, 4, dtype=torch.complex64), (3,), "expected"),
    ],
    ids=str,
)
def test_modules_that_do_not_fit_the_shape(module, shape, message):
    with pytest.raises(ValueError, match=message):
        from_torch(module, shape)


def test_from_torch_refuses_what_is_no_module():
    with pytest.raises(TypeError, match=r"expected module to be a torch\.nn\.Module, got ReLU"):
        from_torch(fn.ReLU(), (3,))


# --- Exports


def unet():
    down = fn.Sequential(fn.MaxPool2d(2), fn.Conv2d(6, 3, padding=1), fn.UpsampleConv2d(6))
    squeeze = fn.Sequential(fn.AdaptiveAvgPool2d(1), fn.Conv2d(12, 1), fn.Sigmoid())
    half = fn.Conv2d(6, 3, padding=1)
    return fn.Sequential(
        fn.Conv2d(6, 3, padding="same"), fn.ReLU(), fn.Concat(fn.Identity(), down),
        fn.ChannelAffine(), fn.Residual(fn.Sequential(fn.GroupNorm(2), fn.Conv2d(12, 1))),
        fn.Product(fn.Identity(), squeeze), fn.Sum(fn.SiLU(), fn.Conv2d(12, 1)),
        fn.Reversible(half, half), fn.Repeat(fn.Conv2d(12, 1), 2), fn.Loop(fn.Conv2d(12, 1), 2),
        fn.Recompute(fn.Frozen(fn.Conv2d(4, 1))), fn.Flatten(), fn.Linear(5),
    )  # fmt: skip


def reader():
    attention = fn.Residual(fn.Sequential(fn.LayerNorm(), fn.MultiheadAttention(2, causal=True)))
    return fn.Sequential(
        embedding=fn.Embedding(11, 8), positions=fn.PositionalEmbedding(6), attention=attention,
        recurrent=fn.GRU(4, bidirectional=True), last=fn.Select(1, -1), reshape=fn.Reshape(2, 4),
        permute=fn.Permute(0, 2, 1), flatten=fn.Flatten(), head=fn.Linear(3),
    )  # fmt: skip


EXPORTED = [(unet(), (3, 8, 8)), (reader(), (6,))]
exported = pytest.mark.parametrize(("net", "shape"), EXPORTED, ids=["unet", "reader"])


def batches(net, shape):
    """(params, x, other batches)."""
    words = torch.arange(7 * 6).reshape(7, 6) % 11
    x = words if len(shape) == 1 else fn.normal(KEY, (7, *shape))
    return net.init(fn.key(0), shape), x[:3], [x[:1], x[:2], x]


BATCH = torch.export.Dim("batch", min=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:The tensor attributes self.recurrent")  # of nn.GRU's own
@exported
def test_torch_export_with_a_dynamic_batch(net, shape):
    params, x, others = batches(net, shape)
    module = to_torch(net, params, shape)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: BATCH},))
    for other in others:
        torch.testing.assert_close(program.module()(other), net.apply(params, other))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_torch_export_of_our_own_operations():
    net, shape = fn.Sequential(fn.Embedding(11, 4), fn.LayerNorm(), fn.Linear(3)), (6,)
    params, x, others = batches(net, shape)
    module = as_module(net, params)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: BATCH},))
    for other in others:
        torch.testing.assert_close(program.module()(other), net.apply(params, other))


@exported
def test_torch_fx(net, shape):
    params, _, others = batches(net, shape)
    traced = torch.fx.symbolic_trace(to_torch(net, params, shape))
    for x in others:
        torch.testing.assert_close(traced(x), net.apply(params, x))


@pytest.mark.filterwarnings("ignore")  # the exporters warn of each other, and of torchvision
@pytest.mark.parametrize(
    ("net", "shape", "dynamo"),
    [(unet(), (3, 8, 8), False), (reader(), (6,), False), (unet(), (3, 8, 8), True)],
    ids=["unet-torchscript", "reader-torchscript", "unet-dynamo"],
)
def test_onnx_with_a_dynamic_batch(net, shape, dynamo, tmp_path):
    params, x, others = batches(net, shape)
    path = str(tmp_path / "net.onnx")
    if dynamo:
        options = {"dynamic_shapes": ({0: BATCH},), "verbose": False}
    else:
        options = {"dynamic_axes": {"x": {0: "batch"}, "y": {0: "batch"}}}
    module = to_torch(net, params, shape)
    torch.onnx.export(
        module, (x,), path, dynamo=dynamo, input_names=["x"], output_names=["y"], **options
    )
    session = onnxruntime.InferenceSession(path)
    for other in others:
        y = torch.from_numpy(session.run(None, {"x": other.numpy()})[0])
        torch.testing.assert_close(y, net.apply(params, other), rtol=1e-5, atol=1e-6)


# --- as_module


@examples
def test_as_module_has_our_gradients(layer, shape):
    params, x, _ = make(layer, shape, dtype=torch.float64)
    key = key_for(layer) or KEY
    module = as_module(layer, params)
    x.requires_grad_(x.is_floating_point())
    y = module(x, key)
    grad = fn.normal(fn.key(5), y.shape, dtype=torch.float64)
    dparams, dx = layer.vjp(params, x.detach(), grad, key=key)
    assert torch.equal(y, layer.apply(params, x.detach(), key=key)) or agree(
        y, layer.apply(params, x.detach(), key=key)
    )
    if y.requires_grad:
        y.backward(grad)
    assert same({n: p.grad for n, p in module.named_parameters()}, state_dict(dparams))
    if dx is not None:
        assert torch.equal(x.grad, dx)
    assert same(dict(module.state_dict()), state_dict(params))
    assert same(load_state_dict(layer, shape, module.state_dict()), params)


def denoiser():
    return fn.Sequential(
        conv=fn.Conv2d(4, 2, stride=2), relu=fn.ReLU(), drop=fn.Dropout(0.2),
        up=fn.UpsampleConv2d(3), end=fn.Sigmoid(),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (fn.SGD(0.5, momentum=0.9), lambda p: torch.optim.SGD(p, 0.5, momentum=0.9)),
        (fn.AdamW(1e-2), lambda p: torch.optim.AdamW(p, 1e-2)),
    ],
    ids=["SGD", "AdamW"],
)
def test_as_module_trains_as_we_do(ours, theirs):
    net = denoiser()
    params = net.init(fn.key(0), (3, 6, 6), dtype=torch.float64)
    x, target = (fn.uniform(k, (4, 3, 6, 6), dtype=torch.float64) for k in fn.split(KEY))
    module = as_module(net, params)
    optimizer, state = theirs(module.parameters()), ours.init(params)
    value_and_grad = fn.value_and_grad(net, fn.MSE())
    for step in range(5):
        key = fn.fold_in(KEY, step)
        value, grads = value_and_grad(params, x, target, key)
        params, state = ours.step(params, grads, state)
        optimizer.zero_grad()
        loss = F.mse_loss(module(x, key), target)
        loss.backward()
        optimizer.step()
        close(loss.detach(), value)
    close(load_state_dict(net, (3, 6, 6), module.state_dict()), params, rtol=1e-9, atol=1e-12)


@dataclass(frozen=True)
class Asked(fn.Layer):
    """A layer that notes what it is asked for."""

    asked: list

    __hash__ = None

    def _params(self, shape):
        return {"w": fn.Param((), fn.initializers.Ones())}

    def _fwd(self, params, x, key):
        return params["w"] * x, x

    def _bwd(self, params, x, dy, need):
        self.asked.append((need.params, need.input))
        dw = (x * dy).sum() if need.params else None
        return {"w": dw}, params["w"] * dy if need.input else None


def test_only_what_autograd_needs_is_computed():
    layer = Asked([])
    module = as_module(layer, {"w": torch.tensor(2.0)})
    x = torch.ones(3)
    module(x).sum().backward()
    module(x.requires_grad_()).sum().backward()
    module.requires_grad_(False)
    module(x).sum().backward()
    with torch.no_grad():
        assert not module(x).requires_grad
    assert layer.asked == [(True, False), (True, True), (False, True)]


def test_a_backward_pass_may_be_run_twice_but_not_differentiated():
    net = denoiser()
    module = as_module(net, net.init(fn.key(0), (3, 6, 6)))
    x = fn.uniform(KEY, (2, 3, 6, 6)).requires_grad_()
    y = module(x, KEY)
    (first,) = torch.autograd.grad(y.sum(), x, retain_graph=True)
    (again,) = torch.autograd.grad(y.sum(), x, create_graph=True)
    assert torch.equal(first, again)
    for wanted in (x, module.get_parameter("conv.weight")):
        with pytest.raises(RuntimeError, match="expected a first derivative of Sequential of"):
            torch.autograd.grad(module(x).sum() + again.sum(), wanted)


def test_as_module_under_autocast():
    net = fn.Sequential(fn.Linear(4), fn.Tanh())
    inner = as_module(net, net.init(fn.key(0), (3,)))
    module = nn.Sequential(nn.Linear(5, 3), inner, nn.Linear(4, 2))
    x = fn.normal(KEY, (6, 5))
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
        between = module[0](x)
        assert between.dtype == y.dtype == torch.bfloat16
        assert torch.equal(inner(between), inner(between.float()))
        with pytest.raises(TypeError, match="expected weight to have the dtype and device of x"):
            inner(between.double())
    y.float().sum().backward()
    assert all(p.grad.any() for p in module.parameters())


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_as_module_under_checkpoint(use_reentrant):
    net = denoiser()
    module = as_module(net, net.init(fn.key(0), (3, 6, 6)))
    x = fn.uniform(KEY, (2, 3, 6, 6)).requires_grad_()
    y = checkpoint(module, x, use_reentrant=use_reentrant)
    y.sum().backward()
    (expected,) = torch.autograd.grad(module(x).sum(), x)
    assert torch.equal(x.grad, expected)


@pytest.mark.parametrize("what", ["x", "y", "parameter"])
def test_writing_over_what_the_backward_pass_needs_is_an_error(what):
    net = fn.Sequential(fn.Linear(3), fn.Sigmoid())
    module = as_module(net, net.init(fn.key(0), (3,)))
    x = torch.ones(2, 3)
    y = module(x)
    with torch.no_grad():
        {"x": x, "y": y, "parameter": module.get_parameter("0.weight")}[what].mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_as_module_inside_a_module():
    net = fn.Sequential(fn.Linear(4), fn.Tanh())
    module = nn.Sequential(nn.Linear(3, 3), as_module(net, net.init(fn.key(0), (3,))), nn.ReLU())
    module = module.double()
    x = fn.normal(KEY, (5, 3), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(module, (x,))
    names = ["0.weight", "0.bias", "1.0.weight", "1.0.bias"]
    assert list(module.state_dict()) == names
    assert "Sequential of 2 layers" in repr(module)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        other.load_state_dict({name: p + 1 for name, p in module.state_dict().items()})
        assert not torch.equal(other(x), module(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_as_module_under_torch_func_and_compile():
    net = fn.Sequential(fn.Linear(4), fn.Tanh())
    params = net.init(fn.key(0), (3,))
    module, x = as_module(net, params), fn.normal(KEY, (5, 3))
    state = dict(module.named_parameters())

    def loss(state):
        return torch.func.functional_call(module, state, (x,)).sum()

    dparams, _ = net.vjp(params, x, torch.ones(5, 4))
    found = torch.func.grad(loss)(state)
    assert all(torch.allclose(found[name], d) for name, d in state_dict(dparams).items())
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))


def test_as_module_refuses():
    net = fn.Sequential(fn.Linear(3), fn.Linear(3))
    params = net.init(fn.key(0), (3,))
    with pytest.raises(TypeError, match="as_module: expected net to be a Layer, got Linear"):
        as_module(nn.Linear(2, 2), ())
    with pytest.raises(TypeError, match="as_module: expected params to be a tensor, or a tuple"):
        as_module(net, None)
    with pytest.raises(ValueError, match="expected params of Sequential of 2 layers to be differ"):
        as_module(net, (params[0], params[0]))
    with pytest.raises(TypeError, match=r"expected 0\.w to be floating-point, got torch\.int64"):
        as_module(net, ({"w": torch.ones(1, dtype=torch.int64)}, ()))
    with pytest.raises(ValueError, match=r"expected names .* got 'train\.weight'"):
        as_module(fn.Sequential(train=fn.Linear(3)), {"train": params[0]})
    with pytest.raises(ValueError, match=r"layer 0: Linear\(3\): expected x of shape \(N, …, 3\)"):
        as_module(net, params)(torch.ones(2, 4))


# --- wrap


class Block(nn.Module):
    """A residual block as torchvision writes it."""

    def __init__(self, channels):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)

    def forward(self, x):
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        return self.relu(y + x)


class Steps(nn.Module):
    """Recurrent, with the first output alone."""

    def __init__(self):
        super().__init__()
        self.lstm = nn.LSTM(3, 2, batch_first=True)

    def forward(self, x):
        return self.lstm(x)[0]


class Tied(nn.Module):
    """Two layers with one weight."""

    def __init__(self):
        super().__init__()
        self.encode, self.decode = nn.Linear(3, 3), nn.Linear(3, 3)
        self.decode.weight = self.encode.weight

    def forward(self, x):
        return self.decode(self.encode(x).tanh())


class Checkpointed(nn.Module):
    """Runs again in its backward pass."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))

    def forward(self, x):
        return checkpoint(self.layers, x, use_reentrant=False)


class Viewing(nn.Module):
    """Takes x without gaps alone, and writes to it."""

    def __init__(self, size):
        super().__init__()
        self.size, self.linear = size, nn.Linear(size, 2)

    def forward(self, x):
        return self.linear(x.relu_().view(x.shape[0], self.size))


def twice():
    """One layer in two places."""
    layer = nn.Linear(3, 3)
    return nn.Sequential(layer, nn.Tanh(), layer)


class Calling(nn.Module):
    """y = function(self, x)."""

    def __init__(self, function):
        super().__init__()
        self.function, self.calls = function, 0

    def forward(self, x):
        return self.function(self, x)


def calls_times(self, x):
    self.calls += 1
    return self.calls * x


WRAPPED = [
    (lambda: nn.Linear(4, 3), (4,)),
    (lambda: Block(2).eval(), (2, 4, 3)),
    (lambda: nn.Sequential(nn.ReLU(inplace=True), nn.Linear(3, 2)), (3,)),
    (lambda: nn.Flatten(), (2, 3)),
    (lambda: nn.GLU(), (4,)),
    (lambda: nn.BatchNorm1d(3, track_running_stats=False), (3,)),
    (lambda: nn.TransformerEncoderLayer(4, 2, 6, batch_first=True).eval(), (3, 4)),
    (lambda: Steps(), (4, 3)),
    (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)), (3,)),
    (lambda: Tied(), (3,)),
    (lambda: Viewing(8), (2, 2, 2)),
    (twice, (3,)),
]
wrapped = pytest.mark.parametrize(("build", "shape"), WRAPPED)


@wrapped
def test_wrapped_modules_hold_the_contract(build, shape):
    module = build()
    layer, params = wrap(module, shape)
    x = fn.normal(KEY, (3, *shape))
    torch.testing.assert_close(layer.apply(params, x), module(x.clone()))
    assert "autograd" in repr(layer)
    assert list(state_dict(params)) == [name for name, _ in module.named_parameters()]
    if isinstance(module, Steps):  # what check_vjp tries last
        with pytest.raises(GradientMismatch, match="Batching rule not implemented for aten::lstm"):
            check_vjp(layer, params, x)
    else:
        check_vjp(layer, params, x)


def test_a_block_inside_a_network():
    block, params = wrap(Block(4).eval(), (4, 6, 6))
    assert list(params) == ["conv1", "bn1", "conv2", "bn2"]
    net = fn.Sequential(fn.Conv2d(4, 3, padding=1), block, fn.Residual(block), fn.Flatten())
    params = net.init(fn.key(0), (3, 6, 6))
    x = fn.normal(KEY, (2, 3, 6, 6))
    assert net.out_shape((3, 5, 4)) == (80,)
    check_vjp(net, params, x)
    module = to_torch(net, params, (3, 6, 6))
    torch.testing.assert_close(module(x), net.apply(params, x))
    assert isinstance(module[1], Block)
    inside = as_module(net, params)
    inside(x).sum().backward()
    dparams, _ = net.vjp(params, x, torch.ones(2, 144))
    close({n: p.grad for n, p in inside.named_parameters()}, state_dict(dparams))


def test_per_example_gradients_of_a_block():
    net = fn.Sequential(wrap(Block(2).eval(), (2, 4, 4))[0], fn.Flatten(), fn.Linear(3))
    params = net.init(fn.key(0), (2, 4, 4), dtype=torch.float64)
    x, target = fn.normal(KEY, (3, 2, 4, 4), dtype=torch.float64), torch.tensor([0, 2, 1])
    values, grads = fn.per_example(net, fn.CrossEntropy())(params, x, target)
    value, mean = fn.value_and_grad(net, fn.CrossEntropy())(params, x, target)
    close(values.mean(), value)
    close(optree.tree_map(lambda each: each.mean(0), grads), mean)


@wrapped
def test_wrapped_modules_under_torch_func(build, shape):
    module = build()
    if isinstance(module, Steps):
        pytest.skip("PyTorch has no batching rule for LSTM")
    layer, params = wrap(module, shape)
    params = optree.tree_map(torch.Tensor.double, params)
    x = fn.normal(KEY, (3, *shape), dtype=torch.float64)
    y = layer.apply(params, x)
    grad, xs = torch.ones_like(y), torch.stack([x, 2 * x])
    vjps = [layer.vjp(params, x, grad) for x in xs]
    mapped = torch.func.vmap(lambda x: layer.vjp(params, x, grad))(xs)
    close(mapped, optree.tree_map(lambda *leaves: torch.stack(leaves), *vjps))
    alone = torch.func.vmap(lambda x: layer.vjp(params, x, grad, input_grad=False)[0])(xs)
    close(alone, mapped[0])
    with torch.inference_mode():
        close(layer.vjp(params, x + 0, grad), vjps[0])


@wrapped
def test_gradients_of_wrapped_modules_can_be_differentiated(build, shape):
    """By autograd as by torch.func: by params and x, and by grad alone."""
    layer, params = wrap(build(), shape)
    net = fn.Sequential(layer, fn.Tanh())
    x = fn.normal(KEY, (3, *shape), dtype=torch.float64)
    params = (optree.tree_map(torch.Tensor.double, params), ())
    grad = fn.normal(fn.key(8), net.apply(params, x).shape, dtype=torch.float64)
    leaves, structure = optree.tree_flatten((params, x, grad))

    def penalty(*leaves):
        (params, _), x, grad = structure.unflatten(leaves)
        return sum(
            leaf.square().sum() for leaf in optree.tree_leaves(net.vjp((params, ()), x, grad))
        )

    everything = tuple(range(len(leaves)))
    for moved in (everything, everything[-1:]):
        starts = [leaf.clone().requires_grad_(i in moved) for i, leaf in enumerate(leaves)]
        with sdpa_kernel(SDPBackend.MATH):  # the other kernels' gradients have none
            expected = torch.func.grad(penalty, moved)(*leaves)
            found = torch.autograd.grad(
                penalty(*starts), [starts[i] for i in moved], materialize_grads=True
            )
        close(found, expected)


def test_what_is_not_a_function_of_params_and_x_is_refused():
    drawing, block = nn.Sequential(nn.Linear(3, 4), nn.Sequential(nn.Dropout())), Block(3)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=r"draws no numbers, got 1\.0 \(Dropout, train mode\): "):
        wrap(drawing, (3,))
    with pytest.raises(ValueError, match=r"got bn1 \(BatchNorm2d, train mode\), bn2 .* bn1\.runn"):
        wrap(block, (3, 4, 4))
    for impure in (nn.Dropout2d(), nn.BatchNorm2d(3)):
        many = nn.Sequential(*[copy.deepcopy(impure) for _ in range(20)])
        with pytest.raises(ValueError, match=r"got 0 \(.*, …") as caught:
            wrap(many, (3, 4, 4))
        assert len(str(caught.value)) < 400
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(ValueError, match="LSTM: expected y to be one floating-point tensor, got t"):
        wrap(nn.LSTM(3, 4), (2, 3))
    with pytest.raises(ValueError, match=r"expected examples that Linear takes, got shape \(5,\)"):
        wrap(nn.Linear(3, 4), (5,))
    with pytest.raises(ValueError, match=r"expected y of shape \(3, …\) for a batch of 3, got"):
        wrap(nn.Flatten(0), (5,))
    with pytest.raises(TypeError, match=r"expected module to be a torch\.nn\.Module, got ReLU"):
        wrap(fn.ReLU(), (3,))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated", "ignore:.*weight_norm.*")
def test_modules_that_others_parameters_cannot_be_put_into_are_refused():
    scripted = nn.Sequential(nn.ReLU(), torch.jit.script(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"a plain .*, got 1 \(RecursiveScriptModule\)"):
        wrap(scripted, (3,))
    with pytest.raises(ValueError, match=r"got the module itself \(DataParallel\)"):
        wrap(nn.DataParallel(nn.Linear(3, 3)), (3,))
    with pytest.raises(
        ValueError, match=r"real parameters, got weight \(torch\.complex64\), bias "
    ):
        wrap(nn.Linear(3, 3, dtype=torch.complex64), (3,))
    with pytest.raises(ValueError, match="a module that can be copied, got Linear: Only Tensors"):
        wrap(nn.utils.weight_norm(nn.Linear(3, 3)), (3,))
    with pytest.raises(ValueError, match="got Calling, which gave another y the second time"):
        wrap(Calling(calls_times), (3,))


@pytest.mark.parametrize("build", [twice, Tied])
def test_tied_parameters_stay_the_modules_own(build):
    module = build().requires_grad_(False)
    layer, params = wrap(module, (3,))
    others = optree.tree_map(lambda leaf: leaf + 1, params)
    x = fn.normal(KEY, (2, 3))
    layer.vjp(others, x, torch.ones(2, 3))
    assert layer.out_shape((2, 3)) == (2, 3)
    assert same(layer.init(KEY, (3,)), params)
    for own in (params, others, optree.tree_map(torch.Tensor.double, others)):
        back = to_torch(layer, own)
        x = x.to(optree.tree_leaves(own)[0].dtype)
        torch.testing.assert_close(back(x), layer.apply(own, x))
        assert len([*back.parameters()]) == len([*module.parameters()])
        assert not any(p.requires_grad for p in back.parameters())


@pytest.mark.parametrize("training", [True, False])
def test_a_wrapped_module_keeps_its_mode(training):
    module = Calling(lambda self, x: x * (2 if self.training else 3)).train(training)
    net = fn.Sequential(fn.Linear(3), wrap(module, (3,))[0], fn.Dropout(0.5))
    params = net.init(KEY, (3,))
    back, x = to_torch(net, params), fn.normal(KEY, (4, 3))
    close(back(x), net.apply(params, x))
    assert [part.training for part in (back, *back)] == [False, False, training, False]


def test_a_module_of_buffers_alone_keeps_their_dtype():
    module = Calling(lambda self, x: x * self.scale)
    module.register_buffer("scale", torch.ones(3, dtype=torch.float64))
    layer, params = wrap(module, (3,))
    assert to_torch(layer, params).scale.dtype == torch.float64


def test_a_module_that_runs_again_in_its_backward_pass():
    module = Checkpointed()
    layer, params = wrap(module, (3,))
    others = optree.tree_map(lambda leaf: leaf.double() + 1, params)
    x, grad = (fn.normal(KEY, (4, size), dtype=torch.float64) for size in (3, 2))
    dparams, dx = layer.vjp(others, x, grad)
    module.double().load_state_dict(state_dict(others))
    module(x.requires_grad_()).backward(grad)
    close(state_dict(dparams), {name: p.grad for name, p in module.named_parameters()})
    close(dx, x.grad)


def test_a_module_that_views_x_behind_a_convolution():
    net = fn.Sequential(fn.Conv2d(4, 3), fn.ReLU(), wrap(Viewing(36), (4, 3, 3))[0])
    params = net.init(KEY, (2, 5, 5))
    x = fn.normal(KEY, (3, 2, 5, 5))
    check_vjp(net, params, x)
    torch.testing.assert_close(to_torch(net, params)(x), net.apply(params, x))


def test_a_wrapped_layer_is_a_value():
    module = nn.Linear(3, 3)
    layer, params = wrap(module, (3,))
    x = torch.ones(2, 3)
    y = layer.apply(params, x)
    with torch.no_grad():
        module.weight.zero_()  # the layer and its params are copies
    assert torch.equal(layer.apply(layer.init(KEY, (3,)), x), y)
    assert fn.Sequential(layer) == fn.Sequential(layer)
    assert hash(layer) == hash(layer)
    assert layer != wrap(module, (3,))[0]
    with pytest.raises(ValueError, match=r"Wrapped\(Linear, .*\): expected the shape of an"):
        layer.apply(params, torch.ones(2, 4))
    other = pickle.loads(pickle.dumps(layer))
    assert torch.equal(other.apply(params, x), y)


def test_a_wrapped_layer_is_not_saved(tmp_path):
    layer, params = wrap(nn.Linear(3, 3), (3,))
    with pytest.raises(TypeError, match=r"a torch\.nn\.Module is code, which a file"):
        fn.save_model(tmp_path / "net", fn.Sequential(layer), (params,))
    fn.save(tmp_path / "params", params)
    assert same(fn.load(tmp_path / "params"), params)


def test_a_wrapped_embedding_takes_integers():
    layer, params = wrap(nn.Embedding(5, 3), (4,))
    x = torch.tensor([[1, 2, 3, 4]])
    dparams, dx = layer.vjp(params, x, torch.ones(1, 4, 3))
    assert dx is None
    assert dparams["weight"].tolist() == [[0.0] * 3, *[[1.0] * 3] * 4]
    assert layer.out_shape((7,)) == (7, 3)
    with pytest.raises(TypeError, match=r"expected x to be int32 or int64, got torch\.float32"):
        layer.apply(params, torch.ones(1, 4))


def test_examples_that_a_module_couples_are_noticed():
    layer, _ = wrap(nn.BatchNorm1d(3, track_running_stats=False), (3,))
    assert layer.couples_examples
    with pytest.raises(ValueError, match="treat every example alone"):
        fn.value_and_grad(fn.Sequential(layer), fn.MSE(), micro_batch=2)
    assert not wrap(nn.Linear(3, 3), (3,))[0].couples_examples


# --- State dicts


@given(strategies.cases(EVERY_LAYER))
def test_state_dicts_come_back(case):
    net, params, x = case
    state = state_dict(params)
    back = load_state_dict(net, tuple(x.shape[1:]), state)
    assert same(back, params)
    assert strides(back) == strides(params)
    owned = {leaf.data_ptr() for leaf in state.values() if leaf.numel()}
    assert not owned & {leaf.data_ptr() for leaf in optree.tree_leaves(back) if leaf.numel()}


def strides(params):
    return [leaf.stride() for leaf in optree.tree_leaves(params)]


def test_a_state_dict_is_laid_out_without_drawing_a_number(monkeypatch):
    net = fn.Repeat(fn.Sequential(fn.Conv2d(4, 3, padding=1), fn.UpsampleConv2d(4, scale=1)), 2)
    params = net.init(KEY, (4, 5, 5))
    assert not params[0]["weight"].is_contiguous()
    monkeypatch.setattr(fn.initializers.Uniform, "_draw", None)
    for state in (
        state_dict(params),
        {n: p.clone(memory_format=torch.contiguous_format) for n, p in state_dict(params).items()},
    ):
        assert strides(load_state_dict(net, (4, 5, 5), state)) == strides(params)


def test_a_state_dict_of_a_layer_whose_init_looks_at_its_numbers():
    class Scaled(Dense):
        def init(self, key, shape, *, dtype=None, device=None):
            params = super().init(key, shape, dtype=dtype, device=device)
            largest = float(params["weight"].max())
            return {**params, "weight": params["weight"] / largest}

    params = Scaled(3).init(KEY, (4,))
    assert same(load_state_dict(Scaled(3), (4,), state_dict(params)), params)


def test_a_state_dict_of_a_network_is_refused():
    """As module.state_dict() is written: a network holds no tensors."""
    for net in (fn.Sequential(fn.Linear(3)), fn.ReLU()):
        with pytest.raises(TypeError, match=r"state_dict: expected params, as init makes"):
            fn.interop.state_dict(net)


def test_a_state_dict_of_torch_fits():
    module = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(4, 2, 1)))
    net = fn.Sequential(fn.Conv2d(4, 3), fn.ReLU(), fn.Sequential(fn.Conv2d(2, 1)))
    params = load_state_dict(net, (3, 5, 5), module.state_dict())
    x = fn.normal(KEY, (2, 3, 5, 5))
    torch.testing.assert_close(net.apply(params, x), module(x))
    assert list(state_dict(params)) == list(module.state_dict())
    module.load_state_dict(state_dict(net.init(fn.key(1), (3, 5, 5))))
    learned = load_state_dict(net, (3, 5, 5), dict(module.named_parameters()))
    assert not any(leaf.requires_grad for leaf in optree.tree_leaves(learned))


def test_every_discrepancy_is_named_at_once():
    net = fn.Sequential(stem=fn.Linear(4), head=fn.Linear(2))
    state = {
        "stem.weight": torch.ones(4, 3),
        "stem.bias": torch.ones(4, dtype=torch.float64),
        "head.weight": torch.ones(3, 4, dtype=torch.int64),
        "norm.running_mean": torch.ones(4),
        "epoch": 3,
    }
    with pytest.raises(ValueError, match="load_state_dict: expected the 4 tensors of") as error:
        load_state_dict(net, (3,), state)
    assert str(error.value).splitlines()[1:] == [
        "  stem.bias: expected torch.float32 on cpu as stem.weight, got torch.float64 on cpu",
        "  head.weight: expected shape (2, 4), got (3, 4)",
        "  head.weight: expected a floating-point dtype, got torch.int64",
        "  head.bias: missing, expected shape (2,)",
        "  norm.running_mean: unexpected, of shape (4,)",
        "  epoch: unexpected",
        "BatchNorm keeps no running statistics: leave them out to train on, "
        "or evaluate by from_torch(module.eval(), shape)",
    ]
    with pytest.raises(ValueError, match=r"got\n  weight: expected a tensor, got int\n  bias: mi"):
        load_state_dict(fn.Linear(2), (3,), {"weight": 3})
    with pytest.raises(TypeError, match=r"a dict of tensors, got ReLU, a torch.nn.Module$"):
        load_state_dict(net, (3,), nn.ReLU())
    with pytest.raises(TypeError, match="expected net to be a Layer, got Linear"):
        load_state_dict(nn.Linear(2, 2), (3,), {})
    with pytest.raises(TypeError, match=r"state_dict: expected 0\.a to be a tensor, .* got int"):
        state_dict(({"a": 3},))


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor", "ignore:The PyTorch API of nested tensors")
def test_tensors_that_are_not_dense_are_named():
    net, weight = fn.Sequential(fn.Linear(4), fn.Linear(4), fn.Linear(4)), torch.eye(4)
    state = {
        **state_dict(net.init(KEY, (4,))),
        "0.weight": weight.to_sparse(),
        "1.weight": weight.to_sparse_csr(),
        "2.weight": torch.nested.nested_tensor([weight]),
    }
    with pytest.raises(ValueError, match="load_state_dict: expected the 6 tensors of") as error:
        load_state_dict(net, (4,), state)
    assert str(error.value).splitlines()[1:] == [
        "  0.weight: expected a dense tensor, got torch.sparse_coo",
        "  1.weight: expected a dense tensor, got torch.sparse_csr",
        "  2.weight: expected a dense tensor, got a nested one",
    ]
