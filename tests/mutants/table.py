"""The planted bugs: what someone might write, or forget, in the gradients and around them.

Each is one replacement in one file, where the old text stands exactly once. A new bug is one new
row; what it breaks must be something that a user would call wrong, so nothing that only costs time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class Row(NamedTuple):
    """A bug in the file of its group."""

    name: str
    old: str
    new: str
    why: str


@dataclass(frozen=True)
class Mutant:
    """A bug: `old` becomes `new` in `file`. `tests` run first; the whole suite if they pass."""

    name: str
    file: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]


def _in(file: str, tests: str, *rows: Row) -> tuple[Mutant, ...]:
    """Bugs in one file that the same tests are likely to find."""
    paths = tuple(f"tests/{test}" for test in tests.split())
    return tuple(Mutant(row.name, f"funcnet/{file}", *row[1:], paths) for row in rows)


PURITY = (
    "test_properties.py::test_the_same_answer_twice_in_memory_of_its_own "
    "test_properties.py::test_bwd_may_be_called_twice_and_without_dx"
)
VALUES = "test_properties.py::test_repr_is_the_code_that_builds_the_layer"
REFUSALS = (
    "test_errors.py::test_settings test_errors.py::test_another_dtype_of_grad "
    "test_errors.py::test_another_shape_of_grad test_errors.py::test_another_dtype_of_x "
    "test_errors.py::test_x_that_is_no_picture test_errors.py::test_the_message_of_the_contract"
)

GEOMETRY = _in(
    "layers/geometry.py",
    "test_conv.py test_gate_properties.py test_errors.py::test_another_number_of_channels",
    Row(
        "count-rounds-up",
        "(height - self._reach[0]) // self.stride[0] + 1",
        "-(-(height - self._reach[0]) // self.stride[0]) + 1",
        "a stride that does not divide the input evenly leaves a remainder, which is dropped",
    ),
    Row(
        "reach-without-dilation",
        "tuple(d * (k - 1) + 1 for k, d in",
        "tuple(k for k, d in",
        "dilation spreads the kernel over d(k−1) + 1 entries",
    ),
    Row(
        "same-odd-side",
        "(height // 2, height - height // 2), (width // 2, width - width // 2)",
        "(height - height // 2, height // 2), (width - width // 2, width // 2)",
        'the odd entry of "same" goes after the picture, as in PyTorch',
    ),
    Row(
        "same-without-dilation",
        "height, width = (d * (k - 1) for",
        "height, width = (k - 1 for",
        '"same" keeps the size with any dilation',
    ),
    Row(
        "padding-axes-swapped",
        "rows, columns = (0, 0) if isinstance(padding, str) else pair(padding)",
        "columns, rows = (0, 0) if isinstance(padding, str) else pair(padding)",
        "a pair of paddings is (height, width)",
    ),
    Row(
        "flat-sides-order",
        "return left, right, top, bottom",
        "return top, bottom, left, right",
        "torch.nn.functional.pad begins with the last axis",
    ),
    Row(
        "channels-unchecked",
        'if x.ndim != 4 or (channels != "C" and channels != x.shape[1]):',
        "if x.ndim != 4:",
        "x with other channels is refused by a message that names the layer",
    ),
)

UNFOLD = _in(
    "layers/unfold.py",
    "test_gate_properties.py test_conv.py",
    Row(
        "fold-crops-the-other-side",
        "padded[:, :, top : top + height, left : left + width]",
        "padded[:, :, bottom : bottom + height, right : right + width]",
        "dx lies behind the padding before; the padding after may be another",
    ),
    Row(
        "batch-not-summed",
        'torch.einsum("ngol,ngpl->gop", grad, _patches(x, window))',
        'torch.einsum("ngol,ngpl->gop", grad[-1:], _patches(x, window)[-1:])',
        "dweight is a sum over the batch",
    ),
    Row(
        "groups-mixed",
        "_matrix(weight, window).transpose(1, 2) @ grad",
        "_matrix(weight, window).flip(0).transpose(1, 2) @ grad",
        "each group of grad belongs to the same group of the weight",
    ),
    Row(
        "kernel-flipped-in-dx",
        "dpatches.flatten(1, 2),",
        "dpatches.unflatten(2, (-1, *window.kernel_size)).flip(3, 4).flatten(1, 4),",
        "folding is the flip: flipping the kernel too undoes it",
    ),
    Row(
        "unfold-forgets-dilation",
        "window.kernel_size,\n        window.dilation,",
        "window.kernel_size,\n        1,",
        "the patches go back to where they came from",
    ),
)

NATIVE = _in(
    "layers/native.py",
    "test_gate_properties.py test_conv.py",
    Row(
        "dilation-ignored",
        "_plain(wide(weight)), None, stride, padding, dilation, groups)",
        "_plain(wide(weight)), None, stride, padding, (1, 1), groups)",
        "a dilated kernel has holes",
    ),
    Row(
        "dilated-in-bfloat16",
        "F.conv2d(wide(x), _plain(wide(weight)), None",
        "F.conv2d(x, _plain(weight), None",
        "PyTorch's dilated convolutions in bfloat16 can end the process",
    ),
    Row(
        "one-channel-in-channels-last",
        "if x.shape[1] > 1 and x.stride() == _strides(x, torch.channels_last):",
        "if x.stride() == _strides(x, torch.channels_last):",
        "pictures of one channel are not read past their end",
    ),
    Row(
        "strides-of-single-entries-trusted",
        "if x.stride() == _strides(x, memory_format):",
        "if x.is_contiguous(memory_format=memory_format):",
        "axes of size 1 may have any stride, and PyTorch's kernels believe it",
    ),
    Row(
        "gradients-in-half-precision",
        "torch.float16) and x.is_cpu",
        "torch.float16) and not x.is_cpu",
        "PyTorch's gradients in bfloat16 are wrong for pictures of few columns",
    ),
    Row(
        "strides-taken-at-their-word",
        "return x\n    return x.clone(memory_format=memory_format)",
        "return x\n    return x",
        "PyTorch's kernels return wrong numbers for some strides of axes of size 1",
    ),
    Row(
        "bias-of-dilated-convolutions-lost",
        "return (y if bias is None else inplace.add(y, bias[:, None, None])).to(x.dtype)",
        "return y.to(x.dtype)",
        "the bias is added after a dilated convolution",
    ),
    Row(
        "odd-padding-before",
        "F.pad(x, (0, right - left, 0, bottom - top))",
        "F.pad(x, (right - left, 0, bottom - top, 0))",
        'the odd entry of "same" goes after the picture, as in PyTorch',
    ),
    Row(
        "odd-padding-cropped-before",
        "dx = dx[:, :, : x.shape[2], : x.shape[3]]",
        "dx = dx[:, :, -x.shape[2] :, -x.shape[3] :]",
        "what was padded after is what is cropped from dx",
    ),
)

PATCHES = _in(
    "layers/patches.py",
    "test_conv.py",
    Row(
        "patches-padded-before",
        "F.pad(x, (0, missing[1], 0, missing[0]))",
        "F.pad(x, (missing[1], 0, missing[0], 0))",
        "the remainder that no patch reaches is at the end",
    ),
    Row(
        "remainder-dropped-at-the-start",
        "x.permute(0, 2, 3, 1).unfold(",
        "x[:, :, x.shape[2] % size[0] :, x.shape[3] % size[1] :].permute(0, 2, 3, 1).unfold(",
        "windows are counted from the beginning",
    ),
    Row(
        "patch-kernel-transposed",
        "weight.permute(0, 2, 3, 1).flatten(1)",
        "weight.permute(0, 3, 2, 1).flatten(1)",
        "the kernel is laid out in the order of the patches, height first",
    ),
    Row(
        "patch-gradient-transposed",
        "width, channels).permute(0, 3, 1, 2)",
        "width, channels).transpose(1, 2).reshape(-1, height, width, channels).permute(0, 3, 1, 2)",
        "dweight of square kernels has the right shape even when it is transposed",
    ),
    Row(
        "patches-whatever-the-padding",
        "window.sides == ((0, 0), (0, 0))",
        "window.sides[0] == (0, 0)",
        "padding on either axis rules the patch products out",
    ),
    Row(
        "patches-whatever-the-dilation",
        "window.dilation == (1, 1)",
        "window.dilation[0] == 1",
        "dilation on either axis rules the patch products out",
    ),
)

PIXELWISE = _in(
    "layers/pixelwise.py",
    "test_conv.py test_upsample_conv.py",
    Row(
        "pixels-paired-across-the-diagonal",
        "torch.mm(dy.t(), _rows(x))",
        "torch.mm(dy.t(), _rows(x.mT))",
        "dK is the sum over pixels of y's gradient there and x there",
    ),
    Row(
        "pixels-without-a-bias",
        "torch.mm(rows, transposed) if bias is None else",
        "torch.mm(rows, transposed) if True else",
        "the bias is added to every pixel",
    ),
)

CONV = _in(
    "layers/conv.py",
    f"test_conv.py {REFUSALS}",
    Row(
        "bias-gradient-misses-an-axis",
        "dbias = grad.sum((0, 2, 3))",
        "dbias = grad[..., 0].sum((0, 2))",
        "dbias sums over the batch and both axes",
    ),
    Row(
        "init-bound-without-taps",
        "torch.Size(weight_shape[1:]).numel() ** -0.5",
        "weight_shape[1] ** -0.5",
        "q = 1/(C/groups · kh · kw)",
    ),
    Row(
        "init-bound-of-outputs",
        "torch.Size(weight_shape[1:]).numel() ** -0.5",
        "torch.Size((weight_shape[0], *weight_shape[2:])).numel() ** -0.5",
        "the bound counts inputs, not outputs",
    ),
    Row(
        "init-uses-its-key-twice",
        "weight_key, bias_key = split(key)",
        "weight_key = bias_key = split(key)[0]",
        "bias must not repeat the numbers of weight",
    ),
    Row(
        "order-of-params-lost",
        "gradients = params.copy()",
        "gradients = dict(params)",
        "dparams has the tree of params",
    ),
    Row(
        "groups-need-not-divide",
        "if self.out_channels % self.groups:",
        "if self.out_channels < self.groups:",
        "groups divide the output channels, or the layer is refused",
    ),
    Row(
        "same-with-one-stride",
        'if self.padding == "same" and self.stride != (1, 1):',
        'if self.padding == "same" and min(self.stride) > 1:',
        '"same" with any stride but 1 is refused',
    ),
    Row(
        "params-of-another-dtype",
        'check_params(layer, params, shapes, "x", x)',
        'check_params(layer, params, shapes, "weight", params["weight"])',
        "x and params share one dtype, or the call is refused",
    ),
    Row(
        "grad-of-another-shape",
        "check_grad(self, grad, (len(x), self.out_channels, *count), x)",
        "check_grad(self, grad, grad.shape, x)",
        "grad has the shape of y, or the call is refused",
    ),
)

ACTIVATIONS = _in(
    "layers/activations.py",
    f"test_activations.py test_gate_properties.py {PURITY}",
    Row(
        "relu-passes-at-zero",
        "torch.ops.aten.threshold_backward(grad, y, 0)",
        "torch.where(y >= 0, grad, 0)",
        "dx is dy where y > 0, and 0 at the kink",
    ),
    Row(
        "relu-writes-over-x",
        "return torch.relu(x)",
        "return torch.relu_(x)",
        "nothing ever writes to a tensor it was handed",
    ),
    Row(
        "sigmoid-derivative",
        "torch.ops.aten.sigmoid_backward(grad, y)",
        "grad * (1 - y)",
        "σ′ = σ(1 − σ)",
    ),
    Row(
        "activation-ignores-input-grad",
        "self._derivative(residuals, grad) if input_grad else None",
        "self._derivative(residuals, grad)",
        "dx is None without input_grad",
    ),
    Row(
        "activation-claims-its-results",
        '"""y = σ(x) for each entry, with a derivative that is a function of y."""',
        '"""y = σ(x)."""\n\n    _owns_results = True',
        "the next layer would write over y, which is the residual",
    ),
)

INPLACE = _in(
    "layers/inplace.py",
    "test_gate_properties.py test_upsample_conv.py test_transforms.py",
    Row(
        "in-place-inside-of-torch-func",
        "return not (torch.compiler.is_compiling() or _is_transforming())",
        "return not torch.compiler.is_compiling()",
        "torch.func writes the value over and then refuses the tangent",
    ),
    Row(
        "derivative-over-the-residual",
        "_threshold_backward.grad_input(grad, y, 0, grad_input=grad)",
        "_threshold_backward.grad_input(grad, y, 0, grad_input=y)",
        "bwd may be called twice on the same residuals",
    ),
)

UPSAMPLE = _in(
    "layers/upsample.py",
    "test_upsample.py test_properties.py::test_out_shape_is_true",
    Row(
        "mean-over-copies",
        "F.avg_pool2d(grad, (rows, columns), divisor_override=1)",
        "F.avg_pool2d(grad, (rows, columns))",
        "dx sums grad over the copies of a pixel",
    ),
    Row(
        "scale-axes-swapped",
        "return channels, rows * height, columns * width",
        "return channels, columns * height, rows * width",
        "a pair of scales is (height, width)",
    ),
    Row(
        "y-is-a-view-of-x",
        "blocks.clone(memory_format=torch.contiguous_format)",
        "blocks",
        "y is memory of its own: what follows may work in place",
    ),
)

UPSAMPLE_CONV = _in(
    "layers/upsample_conv.py",
    "test_upsample_conv.py",
    Row(
        "bias-gradient-mean-over-batch",
        "dbias = grad.sum((0, 2, 3))",
        "dbias = grad.sum((2, 3)).sum(0) / max(len(grad), 1)",
        "dbias sums over the batch",
    ),
    Row(
        "two-steps-always-same",
        "padding=self.padding,",
        'padding="same",',
        "both methods give the same numbers",
    ),
    Row(
        "out-size-axes-swapped",
        "(scale[0] * size[0], scale[1] * size[1])",
        "(scale[1] * size[0], scale[0] * size[1])",
        "a pair of scales is (height, width)",
    ),
)

LOW_RESOLUTION = _in(
    "layers/low_resolution.py",
    "test_upsample_conv.py",
    Row(
        "wrong-phase",
        "[(phase - before + tap) // s for",
        "[(s - 1 - phase - before + tap) // s for",
        "output s·i + a sees through tap t the pixel i + ⌊(a − p + t)/s⌋",
    ),
    Row(
        "off-by-one-padding",
        "[(phase - before + tap) // s for",
        "[(phase - before + tap + 1) // s for",
        "the padding before shifts every window",
    ),
    Row(
        "taps-transposed",
        "return weight.permute(2, 3, 0, 1).flatten(",
        "return weight.permute(3, 2, 0, 1).flatten(",
        "the taps of a kernel are in row-major order",
    ),
    Row(
        "tap-gradients-transposed",
        "dtaps = dkernel.reshape(kh, kw, *weight.shape[:2])",
        "dtaps = dkernel.reshape(kw, kh, *weight.shape[:2]).transpose(0, 1)",
        "dweight of square kernels has the right shape even when it is transposed",
    ),
    Row(
        "chunks-overlap",
        "part = slice(start, start + batch)",
        "part = slice(start, start + batch + 1)",
        "each example is in one chunk",
    ),
    Row(
        "kernel-gradient-of-the-last-chunk",
        "dkernel = dk if dkernel is None else dkernel.add_(dk)",
        "dkernel = dk",
        "dweight sums over all chunks",
    ),
    Row(
        "chunk-written-to-the-start",
        "dx[part] = d",
        "dx[: len(d)] = d",
        "each chunk has its place in the batch",
    ),
    Row(
        "gather-shifts-like-spread",
        "(dy, -q[tap])",
        "(dy, q[tap])",
        "the adjoint of a shift is the shift back",
    ),
    Row(
        "phases-that-see-the-same-lost",
        "merged[-1] = merged[-1][0] + dy, q",
        "merged[-1] = dy, q",
        "what several phases share gets the sum of their gradients",
    ),
    Row(
        "phases-merged-by-their-first-tap",
        "merged[-1][1] == q and",
        "merged[-1][1][0] == q[0] and",
        "phases differ if any tap sees another pixel",
    ),
    Row(
        "copied-from-a-phase-that-differs",
        "same = phase and q == shifts[phase - 1]",
        "same = phase and q[0] == shifts[phase - 1][0]",
        "phases differ if any tap sees another pixel",
    ),
    Row(
        "rest-added-unshifted",
        "target.add_(source.narrow(dim, start + shift, stop - start))",
        "target.add_(source.narrow(dim, start, stop - start))",
        "each tap sees a pixel of its own",
    ),
    Row(
        "third-term-lost",
        "for source in sources[2:]:",
        "for source in sources[3:]:",
        "every tap counts",
    ),
)

KARATSUBA = _in(
    "layers/karatsuba.py",
    "test_karatsuba.py",
    Row(
        "rows-of-taps-for-columns",
        "for h in down for w in across",
        "for w in across for h in down",
        "the taps of a kernel are in row-major order",
    ),
    Row(
        "sums-of-two-taps-swapped",
        "((0.0, 0.0, 1.0), (0.0, 1.0, 1.0)),",
        "((0.0, 1.0, 1.0), (0.0, 0.0, 1.0)),",
        "of a pair, the first output sees one tap of the second pixel, the other two",
    ),
    Row(
        "even-pairs-without-the-second-pixel",
        "    even.sub_(a)\n",
        "    even.sub_(b)\n",
        "S·(x_i + x_{i+1}) holds products with both pixels too many",
    ),
    Row(
        "odd-pairs-with-the-pixels-swapped",
        "a[..., :-1, :], b[..., 1:, :]",
        "a[..., 1:, :], b[..., :-1, :]",
        "the pair of odd i sees x_i and x_{i+1}, not the two beyond",
    ),
    Row(
        "first-output-from-the-first-entry",
        "line[..., 0].copy_(b[..., 0, 1])",
        "line[..., 0].copy_(b[..., 0, 0])",
        "the first output is the second entry of its pair",
    ),
    Row(
        "last-output-from-the-second-entry",
        "line[..., -1].copy_(a[..., -1, 0])",
        "line[..., -1].copy_(a[..., -1, 1])",
        "the last output is the first entry of its pair",
    ),
    Row(
        "gradient-of-the-first-output-lost",
        "    db[..., 0, 1].add_(line[..., 0])\n",
        "",
        "the first output has a gradient, too",
    ),
    Row(
        "gradient-of-the-last-output-misplaced",
        "da[..., -1, 0].add_(line[..., -1])",
        "da[..., -1, 1].add_(line[..., -1])",
        "the last output is the first entry of its pair",
    ),
    Row(
        "gradient-of-the-sum-to-one-pixel",
        "inplace.add_into(strided(dx, 1, 2, dim), dodd, dboth)",
        "strided(dx, 1, 2, dim).copy_(dodd)",
        "what is multiplied with a sum reaches both of its terms",
    ),
    Row(
        "kernel-gradients-of-a-factor-lost",
        "(dtaps[0] + dtaps[1] + dtaps[2])",
        "(dtaps[0] + dtaps[1])",
        "the taps are in the kernels of every factor",
    ),
    Row(
        "any-padding",
        "window == _WINDOW",
        "window.kernel_size == _WINDOW.kernel_size",
        "the pairs lie like this when one pixel is padded on every side",
    ),
    Row(
        "odd-heights",
        "height % 2 == width % 2 == 0",
        "width % 2 == 0",
        "the pixels go in pairs",
    ),
)

TRANSPOSED = _in(
    "layers/transposed.py",
    "test_gate_properties.py test_upsample_conv.py",
    Row(
        "crop-on-the-other-side",
        "left - width + 1, right - width + 1, top - height + 1, bottom - height + 1",
        "right - width + 1, left - width + 1, bottom - height + 1, top - height + 1",
        'with "same" and an even kernel, the sides are cropped differently',
    ),
    Row(
        "kernel-not-flipped",
        "u[:, None] - (taps - 1) + t",
        "u[:, None] - t",
        "a transposed convolution flips the kernel",
    ),
    Row(
        "gradient-axes-swapped",
        '"ut,vr,couv->octr", rows, columns, dkernel',
        '"ut,vr,couv->octr", columns, rows, dkernel.mT',
        "dweight is (O, C, kh, kw)",
    ),
)

COMBINATORS = _in(
    "combinators.py",
    f"test_sequential.py test_gate_properties.py {REFUSALS} {PURITY}",
    Row(
        "residuals-from-the-front",
        "residuals.pop(), dx",
        "residuals.pop(0), dx",
        "the last layer's residuals are the last",
    ),
    Row(
        "layers-share-one-init-key",
        "fold_in(key, at.i)",
        "fold_in(key, 0)",
        "equal layers must not start from equal weights",
    ),
    Row(
        "layers-share-one-key",
        "return None if key is None else fold_in(key, i)",
        "return key",
        "two dropouts in a row must not drop the same",
    ),
    Row(
        "position-dropped-from-errors",
        'error.args = (f"layer {self.i}: {error}",)',
        "error.args = (str(error),)",
        "a message names the layer by its position",
    ),
    Row(
        "dx-stops-at-the-first-weights",
        "first = 0 if input_grad else _first_to_learn(params)",
        "first = _first_to_learn(params)",
        "dx goes through all layers",
    ),
    Row(
        "input-grad-ignored",
        "need = input_grad or at.i > first",
        "need = True",
        "dx is None without input_grad",
    ),
    Row(
        "first-weights-skipped",
        "            return i\n",
        "            return i + 1\n",
        "the first layer with weights needs its gradient too",
    ),
    Row(
        "containers-of-params-lost",
        'getattr(params, "_make", tuple)(dparams)',
        "tuple(dparams)",
        "dparams has the tree of params",
    ),
    Row(
        "grad-written-over",
        '"_bwd_over" if owned and layer._works_in_place else method',
        '"_bwd_over" if layer._works_in_place else method',
        "nothing ever writes to a grad that it was handed",
    ),
    Row(
        "x-written-over",
        "over if owned and layer._works_in_place else method)",
        "over if layer._works_in_place else method)",
        "nothing ever writes to an x that it was handed",
    ),
    Row(
        "identity-shares-memory",
        "return x.clone(), [x.new_zeros",
        "return x, [x.new_zeros",
        "results share no memory with x",
    ),
    Row(
        "bwd-consumes-residuals",
        'self._backward("bwd", params, list(residuals), grad, input_grad)',
        'self._backward("bwd", params, residuals, grad, input_grad)',
        "bwd may be called twice on the same residuals",
    ),
)

LAYER = _in(
    "layer.py",
    f"{REFUSALS} {VALUES} test_gate_properties.py test_gradients.py test_sequential.py",
    Row(
        "apply-without-key",
        "return self.fwd(params, x, key=key)[0]",
        "return self.fwd(params, x)[0]",
        "layers that draw numbers get their key",
    ),
    Row(
        "vjp-without-key",
        "_, residuals = self.fwd(params, x, key=key)",
        "_, residuals = self.fwd(params, x)",
        "layers that draw numbers get their key",
    ),
    Row(
        "dtype-unchecked",
        "if tensor.dtype != like.dtype or tensor.device != like.device:",
        "if tensor.device != like.device:",
        "x, params and grad share one dtype, or the call is refused",
    ),
    Row(
        "device-unchecked",
        "if tensor.dtype != like.dtype or tensor.device != like.device:",
        "if tensor.dtype != like.dtype:",
        "x, params and grad share one device, or the call is refused",
    ),
    Row(
        "grad-broadcasts",
        "if grad.shape != y_shape:",
        "if grad.ndim != len(y_shape):",
        "grad has the shape of y, or the call is refused",
    ),
    Row(
        "integers-pass",
        "if not x.is_floating_point():",
        "if x.is_complex():",
        "tensors that are not floating-point are refused",
    ),
    Row(
        "mixins-bypassed",
        "if any(getattr(cls, name) is not getattr(parent, name) for name in passes):",
        "if not own.keys().isdisjoint(passes):",
        "what a mixin overrides would be passed by in a Sequential",
    ),
    Row(
        "repr-loses-half-a-pair",
        "len(value) == 2 and value[0] == value[1]",
        "len(value) == 2",
        "the repr of a layer is the code that builds it",
    ),
)

LOSSES = _in(
    "losses.py",
    "test_losses.py test_errors.py::test_losses",
    Row(
        "sum-is-a-mean",
        "else squares.sum())",
        "else squares.mean())",
        'the value for "sum" is not divided',
    ),
    Row(
        "sum-has-the-gradient-of-the-mean",
        'residuals.numel() if self.reduction == "mean" else 1',
        "residuals.numel()",
        'the gradient for "sum" is not divided',
    ),
    Row(
        "mean-over-the-batch-only",
        'residuals.numel() if self.reduction == "mean" else 1',
        '(len(residuals) if residuals.ndim else 1) if self.reduction == "mean" else 1',
        "the mean is over all entries",
    ),
    Row(
        "target-reshaped",
        "if x.shape != target.shape:",
        "if x.numel() != target.numel():",
        "losses never broadcast: (n, 1) against (n,) is refused",
    ),
    Row("factor-two", "(grad * (2 / ", "(grad * (1 / ", "the derivative of a square"),
    Row("loss-ignores-grad", "residuals * (grad * (2 ", "residuals * ((2 ", "dx is linear in grad"),
    Row("sign-of-the-difference", "x - target\n", "target - x\n", "descent goes downhill"),
)

GRADIENTS = _in(
    "gradients.py",
    "test_gradients.py",
    Row(
        "training-without-key",
        "net.fwd(params, x, key=key)",
        "net.fwd(params, x)",
        "a network with dropout is trained with it",
    ),
)

OPTIMIZERS = _in(
    "optimizers.py",
    "test_optimizers.py test_gate_properties.py test_transforms.py",
    Row(
        "lists-under-vmap",
        "if not (xs and inplace.is_plain()):",
        "if not xs:",
        "vmap has no rule for lists of tensors",
    ),
    Row(
        "maximize-ignored",
        "gs = [-g for g in gs]",
        "gs = [+g for g in gs]",
        "maximize goes uphill",
    ),
    Row(
        "weight-decay-sign",
        "_add(gs, ps, self.weight_decay, write=False)",
        "_add(gs, ps, -self.weight_decay, write=False)",
        "weight decay makes weights smaller",
    ),
    Row(
        "dampening-at-the-first-step",
        "return 1.0 if count == 0 else 1.0 - self.dampening",
        "return 1.0 - self.dampening",
        "v is g at the first step",
    ),
    Row(
        "dampening-at-the-first-step-of-many",
        "(count > 0)",
        "(count >= 0)",
        "v is g at the first step under vmap, too",
    ),
    Row(
        "nesterov-ignored",
        "gs = _add(gs, vs, self.momentum, write=False) if self.nesterov else vs",
        "gs = vs",
        "nesterov looks ahead",
    ),
    Row(
        "nesterov-without-gradient",
        "gs = _add(gs, vs, self.momentum, write=False) if self.nesterov else vs",
        "gs = [v * self.momentum for v in vs] if self.nesterov else vs",
        "nesterov's step is g + momentum · v",
    ),
    Row(
        "momentum-after-the-gradient",
        "_add(vs, gs, self._share_of_gradient(count), write)",
        "_add(vs, gs, self.momentum * self._share_of_gradient(count), write)",
        "v is multiplied before g is added",
    ),
    Row(
        "schedule-off-by-one",
        "self._lr(count), count, write",
        "self._lr(count + 1), count, write",
        "the first step is number 0",
    ),
    Row(
        "step-not-counted",
        "SGDState(state.step + 1, velocities)",
        "SGDState(state.step + 0, velocities)",
        "schedules and dampening depend on the count",
    ),
    Row(
        "step-in-place-does-not-write",
        "    if not write:\n",
        "    if True:\n",
        "step_ writes into params",
    ),
    Row(
        "pure-step-writes-params",
        "    if not write:\n",
        "    if False:\n",
        "step is pure",
    ),
    Row(
        "mapped-pure-step-writes-params",
        "x.add_(y, alpha=alpha) if write else x.add(y, alpha=alpha)",
        "x.add_(y, alpha=alpha)",
        "step is pure under vmap, too",
    ),
    Row(
        "mapped-step-in-place-does-not-write",
        "x.add_(y, alpha=alpha) if write else x.add(y, alpha=alpha)",
        "x.add(y, alpha=alpha)",
        "step_ writes into params under vmap, too",
    ),
    Row(
        "pure-step-writes-velocities",
        "v.mul_(self.momentum) if write else v * self.momentum for",
        "v.mul_(self.momentum) for",
        "step is pure",
    ),
    Row(
        "velocities-not-written",
        "v.mul_(self.momentum) if write else v * self.momentum for",
        "v * self.momentum for",
        "step_ writes into the velocities of the state",
    ),
    Row(
        "structure-unchecked",
        "structure.flatten_up_to(tree)",
        "optree.tree_leaves(tree)",
        "grads of another structure are refused, not matched by position",
    ),
    Row(
        "gradient-of-another-dtype",
        "if leaf.shape != p.shape or leaf.dtype != p.dtype or leaf.device != p.device:",
        "if leaf.shape != p.shape:",
        "params would silently change their dtype",
    ),
    Row(
        "nan-is-a-learning-rate",
        "if not (-math.inf < value < math.inf and value >= least):",
        "if value < least or value == math.inf:",
        "NaN is out of range",
    ),
)

KEYS = _in(
    "keys.py",
    f"test_keys.py {REFUSALS}",
    Row(
        "true-is-one",
        "if number is None or isinstance(value, bool):",
        "if number is None:",
        "Conv2d(True, 3) is a mistake",
    ),
    Row(
        "uniform-leaves-its-value",
        "first.item() < low and above.item() < high",
        "first.item() < low",
        "an interval of one number that the dtype does not hold draws that number, rounded",
    ),
    Row(
        "fold-in-collides-with-split",
        '_derive("fold_in", ',
        '_derive("split", ',
        "split(key)[1] and fold_in(key, 1) are different keys",
    ),
    Row(
        "split-ignores-the-key",
        '_derive("split", key.data, i)',
        '_derive("split", 0, i)',
        "different keys have different children",
    ),
    Row(
        "split-repeats",
        '_derive("split", key.data, i)',
        '_derive("split", key.data, i // 2)',
        "the keys of a split are all different",
    ),
    Row(
        "seed-cut-to-32-bits",
        '_uint64("key", "seed", seed))',
        '_uint64("key", "seed", seed) % 2**32)',
        "seeds of 64 bits are all different",
    ),
    Row("bernoulli-complement", "unit < p", "unit >= p", "p is the probability of True"),
    Row("uniform-upper-bound", "* (high - low) + low)", "* high + low)", "draws lie below high"),
    Row(
        "uniform-reaches-high",
        "x.clamp(*_within(low, high, dtype))",
        "x",
        "the interval is half open after rounding, too",
    ),
    Row(
        "normal-scales-its-mean", ".mul_(std).add_(mean)", ".add_(mean).mul_(std)", "N(mean, std²)"
    ),
    Row(
        "float64-drawn-in-float32",
        "np.float64 if dtype == torch.float64 else np.float32",
        "np.float32",
        "float64 numbers have 53 random bits",
    ),
)

TREE = _in(
    "tree.py",
    "test_tree.py",
    Row(
        "dots-not-escaped",
        '.replace(".", "%2E")',
        "",
        'no two leaves have one name: {"a.b": …} and {"a": {"b": …}}',
    ),
    Row(
        "int-keys-named-like-texts",
        'f"{key}%" if str(key) in texts else str(key)',
        "str(key)",
        'no two leaves have one name: {1: …, "1": …}',
    ),
)

CHECKPOINT = (
    *_in(
        "checkpoint/reading.py",
        "test_checkpoint_hostile.py",
        Row(
            "data-checksum-skipped",
            "if found == expected:",
            "if len(found) == len(expected):",
            "a flipped bit in the data is found",
        ),
        Row(
            "last-group-dropped",
            "        previous = item\n    yield previous\n",
            "        previous = item\n",
            "the last tensors are read, too",
        ),
        Row(
            "header-checksum-skipped",
            'if len(head) != 8 + size or b"%08x" % zlib.crc32(blank) != head[CHECKSUM]:',
            "if len(head) != 8 + size:",
            "a flipped bit in the header is found",
        ),
        Row("holes-pass", "if entry.start != end:", "if entry.start < end:", "data without holes"),
        Row(
            "additions-pass",
            "if end != data_size:",
            "if end > data_size:",
            "something added to a file is found",
        ),
        Row("keys-twice", "object_pairs_hook=_unique", "object_pairs_hook=dict", "JSON keeps both"),
    ),
    *_in(
        "checkpoint/atomic.py",
        "test_checkpoint_durability.py",
        Row(
            "data-not-synced",
            "                _flush_to_disk(file)",
            "                file.flush()",
            "the data is on the disk before the name",
        ),
        Row(
            "written-in-place",
            "os.replace(temporary, target)",
            "target.write_bytes(temporary.read_bytes()), temporary.unlink()",
            "a crash leaves the old file or the new one, whole",
        ),
        Row(
            "folder-not-synced",
            "        _flush_folder(target.parent)",
            "        os.fspath(target.parent)",
            "the name is on the disk before save returns",
        ),
        Row("mode-not-kept", "os.chmod(temporary, mode)", "os.chmod(temporary, 0o600)", "the mode"),
        Row(
            "abandoned-files-stay",
            "        _clear_abandoned(target)",
            "        os.fspath(target)",
            "the next save clears what a killed one has left",
        ),
    ),
    *_in(
        "checkpoint/structure.py",
        "test_checkpoint_roundtrip.py",
        Row(
            "int-keys-become-texts",
            "[[key, child] for key, child in zip(keys, nodes, strict=True)]",
            "[[str(key), child] for key, child in zip(keys, nodes, strict=True)]",
            "str and int keys are kept apart",
        ),
        Row(
            "ordered-dict-becomes-dict",
            '"OrderedDict": OrderedDict}',
            '"OrderedDict": dict}',
            "containers come back as they were",
        ),
        Row(
            "requires-grad-lost",
            "return found.requires_grad_() if requires_grad else found",
            "return found",
            "requires_grad comes back",
        ),
    ),
    *_in(
        "checkpoint/__init__.py",
        "test_checkpoint_roundtrip.py test_checkpoint_like.py",
        Row(
            "architecture-lost",
            '{"funcnet.architecture": architecture}',
            "{}",
            "the network travels with its parameters",
        ),
        Row(
            "dtype-converts-integers",
            "converted = dtype if tensor.is_floating_point() else None",
            "converted = dtype",
            "dtype is for floating-point tensors",
        ),
    ),
    *_in(
        "checkpoint/compare.py",
        "test_checkpoint_like.py",
        Row(
            "like-ignores-dtype",
            "if dtype != other_dtype:",
            "if dtype != other_dtype and shape != other_shape:",
            "another dtype is refused",
        ),
        Row(
            "like-ignores-additions",
            "if path not in expected_parts and _is_end(part):",
            "if not expected_parts and _is_end(part):",
            "every path that differs is named",
        ),
    ),
    *_in(
        "checkpoint/storable.py",
        "test_checkpoint_refusals.py",
        Row(
            "tied-tensors-saved",
            "    _check_untied(tensors)",
            "    list(tensors)",
            "tied tensors would come back apart",
        ),
    ),
    *_in(
        "checkpoint/checksums.py",
        "test_checkpoint_hostile.py",
        Row(
            "blocks-shared-out-otherwise",
            "found[first::count] = part",
            "found[first * len(part) : (first + 1) * len(part)] = part",
            "each block's checksum stands at its place",
        ),
    ),
    *_in(
        "checkpoint/container.py",
        "test_checkpoint_roundtrip.py",
        Row(
            "views-not-resolved",
            "tensor.detach().resolve_conj().resolve_neg()",
            "tensor.detach().resolve_conj()",
            "negated views come back with their sign",
        ),
    ),
)

MUTANTS: tuple[Mutant, ...] = (
    *GEOMETRY,
    *UNFOLD,
    *NATIVE,
    *PATCHES,
    *PIXELWISE,
    *CONV,
    *ACTIVATIONS,
    *INPLACE,
    *UPSAMPLE,
    *UPSAMPLE_CONV,
    *LOW_RESOLUTION,
    *KARATSUBA,
    *TRANSPOSED,
    *COMBINATORS,
    *LAYER,
    *LOSSES,
    *GRADIENTS,
    *OPTIMIZERS,
    *KEYS,
    *TREE,
    *CHECKPOINT,
)
