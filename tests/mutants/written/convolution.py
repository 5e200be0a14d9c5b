"""Bugs in the convolutions' geometry and in most of their implementations."""

from __future__ import annotations

from ..mutant import Row, in_file

GEOMETRY = in_file(
    "layers/geometry.py",
    "test_conv.py test_gate_properties.py",
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
        'the odd entry of "same" goes after the image, as in PyTorch',
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
)

UNFOLD = in_file(
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

NATIVE = in_file(
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
        "images of one channel are not read past their end",
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
        "PyTorch's gradients in bfloat16 are wrong for images of few columns",
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
        'the odd entry of "same" goes after the image, as in PyTorch',
    ),
    Row(
        "odd-padding-cropped-before",
        "dx = dx[:, :, : x.shape[2], : x.shape[3]]",
        "dx = dx[:, :, -x.shape[2] :, -x.shape[3] :]",
        "what was padded after is what is cropped from dx",
    ),
)

PATCHES = in_file(
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

PIXELWISE = in_file(
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

INPLACE = in_file(
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

UPSAMPLE_CONV = in_file(
    "layers/upsample_conv.py",
    "test_upsample_conv.py",
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

TRANSPOSED = in_file(
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

CONVOLUTION = (
    *GEOMETRY,
    *UNFOLD,
    *NATIVE,
    *PATCHES,
    *PIXELWISE,
    *INPLACE,
    *UPSAMPLE_CONV,
    *TRANSPOSED,
)
