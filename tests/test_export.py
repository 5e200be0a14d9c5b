"""Graphs for batches of any size: torch.export, torch.jit.trace, torch.compile and ONNX."""

import io
import warnings

import onnxruntime
import pytest
import torch
from hypothesis import settings
from registry import EXAMPLES, draw_x, key_for, make
from test_properties import close
from torch.fx.experimental.proxy_tensor import make_fx

import funcnet as fn
from funcnet.ops import bfloat16, processor

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")

IS_QUICK = settings().max_examples < 100
FEW = (fn.Conv2d, fn.UpsampleConv2d, fn.GroupNorm)
EXPORTED = [e for e in EXAMPLES if not IS_QUICK or type(e[0]) in FEW]
DENOISER = fn.Sequential(
    fn.Conv2d(8, 2, stride=2),
    fn.ReLU(),
    fn.Conv2d(16, 2, stride=2),
    fn.ReLU(),
    fn.UpsampleConv2d(8),
    fn.ReLU(),
    fn.UpsampleConv2d(3, method="karatsuba"),
    fn.Sigmoid(),
)
TRACED = [
    (fn.UpsampleConv2d(20), (4, 4, 6)),
    (fn.UpsampleConv2d(2, (4, 1), scale=(3, 2), padding=(0, 2)), (1, 2, 4)),
    (fn.Conv2d(4, 2, stride=2), (2, 4, 6)),
    (fn.Conv2d(2, 2, padding="same", method="unfold"), (1, 4, 6)),
    (DENOISER, (3, 8, 8)),
    (fn.GroupNorm(2), (4, 3, 5)),
    (fn.GroupNorm(3, affine=False), (6,)),
    (fn.InstanceNorm(affine=True), (2, 4, 3)),
]
NORMS = fn.Sequential(fn.Conv2d(16, 3, padding=1), fn.GroupNorm(4), fn.InstanceNorm())


class Module(torch.nn.Module):
    """x ↦ layer.apply(params, x)."""

    def __init__(self, layer, params):
        super().__init__()
        self.layer, self.params = layer, params

    def forward(self, x):
        return self.layer.apply(self.params, x, key=key_for(self.layer))


def check(graph, layer, params, shape, batches=(7, 2)):
    for batch in batches:
        x = draw_x(layer, (batch, *shape))
        close(graph(x), layer.apply(params, x, key=key_for(layer)), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("layer", "shape"), EXPORTED, ids=lambda value: str(value)[:40])
def test_exported_for_any_batch(layer, shape):
    params, x, _ = make(layer, shape, batch=3)
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(Module(layer, params), (x,), dynamic_shapes=(batch,))
    check(program.module(), layer, params, shape)


def test_a_convolution_in_bfloat16_exported_for_any_batch(monkeypatch):
    """Eagerly, it is done in parts, whose number depends on the batch."""
    monkeypatch.setattr(processor, "HAS_BFLOAT16", True)
    monkeypatch.setattr(bfloat16, "_IS_ANY_STRIDE_RIGHT", False)
    layer = fn.Conv2d(32, 3, stride=2)
    params = layer.init(fn.key(0), (32, 9, 9), dtype=torch.bfloat16)
    x, y = (fn.normal(fn.key(n), (n, 32, 9, 9), dtype=torch.bfloat16) for n in (3, 7))
    batch = {0: torch.export.Dim("batch", min=2, max=64)}
    program = torch.export.export(Module(layer, params), (x,), dynamic_shapes=(batch,))
    close(program.module()(y), layer.apply(params, y), rtol=0.02, atol=0.02)


@pytest.mark.parametrize("layer", [fn.MaxPool2d(2), fn.MaxPool2d(3, stride=2, padding=1)], ids=repr)
def test_max_pooling_exported_for_images_of_any_size(layer):
    sizes = {axis: torch.export.Dim(f"size_{axis}", min=5, max=64) for axis in (0, 2, 3)}
    x, larger = fn.normal(fn.key(0), (5, 2, 9, 10)), fn.normal(fn.key(1), (7, 2, 12, 11))
    program = torch.export.export(Module(layer, ()), (x,), dynamic_shapes=(sizes,))
    close(program.module()(larger), layer.apply((), larger))


def test_max_pooling_of_signals_of_any_length():
    """PyTorch holds graphs with its kernel for signals to one length."""
    layer, sizes = fn.MaxPool1d(2), dict.fromkeys((0, 2), torch.export.Dim.DYNAMIC)
    x, longer = fn.normal(fn.key(0), (5, 2, 9)), fn.normal(fn.key(1), (7, 2, 14))
    program = torch.export.export(Module(layer, ()), (x,), dynamic_shapes=(sizes,))
    close(program.module()(longer), layer.apply((), longer))


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize(("layer", "shape"), TRACED, ids=lambda value: str(value)[:40])
def test_traced_for_any_batch(layer, shape):
    params, x, _ = make(layer, shape, batch=3)
    check(torch.jit.trace(Module(layer, params), (x,)), layer, params, shape)


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_gradients_of_norms_traced_for_any_batch():
    layer = fn.GroupNorm(2)

    def gradients(params, x, grad):
        dparams, dx = layer.vjp(params, x, grad)
        return dx, dparams["weight"], dparams["bias"]

    graph = torch.jit.trace(gradients, make(layer, (4, 3, 5), batch=3), strict=False)
    given = make(layer, (4, 3, 5), batch=7)
    close(graph(*given), gradients(*given), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("function", ["apply", "vjp"])
def test_compiled_at_most_twice(function):
    """Once for a batch of 1, and once for all larger ones."""
    layer, count, double = fn.UpsampleConv2d(4), 0, torch.float64
    params = layer.init(fn.key(0), (2, 4, 4), dtype=double)

    def backend(graph, inputs):
        nonlocal count
        count += 1
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(getattr(layer, function), fullgraph=True, backend=backend)
    for batch in range(1, 9):
        arguments = [fn.normal(fn.key(batch), (batch, 2, 4, 4), dtype=double)]
        if function == "vjp":
            arguments.append(fn.normal(fn.key(0), (batch, 4, 8, 8), dtype=double))
        expected = getattr(layer, function)(params, *arguments)
        close(compiled(params, *arguments), expected, rtol=1e-10, atol=1e-10)
    assert count <= 2


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("dynamo", [False, True])
@pytest.mark.parametrize("net", [DENOISER, NORMS], ids=["denoiser", "norms"])
def test_onnx_for_any_batch(net, dynamo):
    """The same numbers in onnxruntime."""
    shape = (3, 8, 8)
    params, x, _ = make(net, shape, batch=3)
    module, file = Module(net, params), io.BytesIO()
    batch = {"dynamic_axes": {"x": {0: "n"}}}
    if dynamo:
        batch = {"dynamic_shapes": ({0: torch.export.Dim("n", min=2, max=64)},)}
    torch.onnx.export(module, (x,), file, input_names=["x"], dynamo=dynamo, **batch)
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    check(lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0]), net, params, shape)


GATED = fn.Product(fn.Linear(3), fn.Sequential(fn.Linear(3), fn.Sigmoid()))
RECORDED = [
    *EXPORTED,
    (DENOISER, (3, 8, 8)),
    (fn.Sequential(fn.Linear(8), fn.ReLU(), fn.Linear(4)), (3,)),
    (fn.Sequential(fn.LayerNorm(), fn.MultiheadAttention(2), fn.Linear(5)), (6, 4)),
    (
        fn.Concat(fn.Identity(), fn.Sequential(fn.Conv2d(4, 2, stride=2), fn.Upsample2d(2))),
        (3, 8, 8),
    ),
    (fn.Residual(fn.Sum(GATED, fn.Tanh())), (3,)),
    (fn.AdaptiveAvgPool2d((None, 5)), (1, 2, 3)),
]


@pytest.mark.parametrize(("net", "shape"), RECORDED, ids=lambda value: str(value)[:40])
def test_make_fx_records_a_training_step_for_any_batch(net, shape):
    (params, x, grad), key = make(net, shape, batch=11, dtype=torch.float64), key_for(net)

    def step(params, x, grad):
        y, residuals = net.fwd(params, x, key=key)
        return y, net.bwd(params, residuals, grad)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = make_fx(step, tracing_mode="symbolic")(params, x, grad)
    for batch in (11, 7):
        given = make(net, shape, batch, dtype=torch.float64)
        close(graph(*given), step(*given), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("layer", [fn.LayerNorm(), fn.RMSNorm()], ids=repr)
def test_gradients_of_many_rows_for_any_batch(layer):
    """Eagerly, they are added up in blocks, whose number depends on the batch."""
    params, x, grad = make(layer, (64,), batch=4100, dtype=torch.bfloat16)
    dim = {0: torch.export.Dim("n", min=2, max=9000)}

    def gradients(params, x, grad):
        return layer.vjp(params, x, grad)

    class Gradients(torch.nn.Module):
        def forward(self, *given):
            return gradients(*given)

    shapes = ((dict.fromkeys(params), dim, dim),)
    program = torch.export.export(Gradients(), (params, x, grad), dynamic_shapes=shapes).module()
    graph = make_fx(gradients, tracing_mode="symbolic")(params, x, grad)
    for batch in (7, 5000):
        given = make(layer, (64,), batch, dtype=torch.bfloat16)
        for found in (program(*given), graph(*given)):
            close(found, layer.vjp(*given), rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("layer", "first", "second"),
    [
        (fn.Upsample2d(2), (11, 4, 5, 6), (7, 4, 8, 9)),
        (fn.GroupNorm(2), (11, 4, 5, 6), (7, 4, 8, 9)),
        (fn.Linear(4), (1, 1), (1, 1)),  # sizes of 1 are not open, though those of the weight are
    ],
    ids=str,
)
def test_make_fx_of_a_layer_that_has_run_before(layer, first, second):
    """The graph is not held to sizes that the layer remembers, nor does it remember open ones."""
    params, x, _ = make(layer, first[1:], batch=first[0])
    other = draw_x(layer, second)
    for _ in range(2):
        graph = make_fx(lambda params, x: layer.apply(params, x), tracing_mode="symbolic")
        close(graph(params, x)(params, other), layer.apply(params, other))
        layer.apply(params, x)


class Keyed(torch.nn.Module):
    def __init__(self, layer, shape):
        super().__init__()
        self.layer, self.key = layer, fn.key(5)
        self.params = layer.init(fn.key(0), shape)

    def forward(self, x):
        return self.layer.apply(self.params, x, key=self.key)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (fn.Dropout(0.4), (4,)),
        (fn.Dropout(0.4), (3,)),
        (fn.Dropout2d(0.4), (3, 2, 2)),
        (fn.Sequential(fn.Dropout(0.2), fn.Dropout(0.3)), (3,)),
    ],
    ids=repr,
)
def test_masks_of_a_saved_program_are_the_keys(layer, shape, strict, tmp_path):
    """A strict export forgets the numbers of NumPy's arrays, without a word."""
    module, x = Keyed(layer, shape), fn.normal(fn.key(1), (5, *shape))
    sizes = ({0: torch.export.Dim("n", min=1)},)
    program = torch.export.export(module, (x[:3],), dynamic_shapes=sizes, strict=strict)
    torch.export.save(program, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    for examples in (3, 5, 2, 1):
        torch.testing.assert_close(loaded(x[:examples]), module(x[:examples]))


@pytest.mark.parametrize("shape", [(-1,), (3, -1)], ids=str)
def test_reshape_to_an_open_size_compiled_for_any_batch(shape):
    layer, x = fn.Reshape(*shape), fn.normal(fn.key(0), (5, 3, 2))
    compiled = torch.compile(
        lambda x: layer.apply((), x), fullgraph=True, backend="eager", dynamic=True
    )
    for examples in (2, 5):
        assert torch.equal(compiled(x[:examples]), layer.apply((), x[:examples]))
