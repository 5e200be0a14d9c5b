"""Bugs in the convolutions' geometry and in most of their implementations."""

from __future__ import annotations

from ..mutant import Row, in_file

GEOMETRY = in_file(
    "ops/window.py",
    "test_conv.py test_gate_properties.py",
    Row(
        "count-rounds-up",
        "(n + padding - reach) // stride + 1",
        "-(-(n + padding - reach) // stride) + 1",
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
        "tuple((n // 2, n - n // 2) for n in whole)",
        "tuple((n - n // 2, n // 2) for n in whole)",
        'the odd entry of "same" goes after the image, as in PyTorch',
    ),
    Row(
        "same-without-dilation",
        "whole = [d * (k - 1) for",
        "whole = [k - 1 for",
        '"same" keeps the size with any dilation',
    ),
    Row(
        "padding-axes-swapped",
        'if padding == "valid" else padding)',
        'if padding == "valid" else padding[::-1])',
        "a pair of paddings is (height, width)",
    ),
    Row(
        "flat-sides-order",
        "for sides in reversed(self.sides) for side in sides",
        "for sides in self.sides for side in sides",
        "torch.nn.functional.pad begins with the last axis",
    ),
    Row(
        "patches-whatever-the-padding",
        "all(rest) and sides == none",
        "all(rest) and sides[0] == (0, 0)",
        "padding on either axis rules the patch products out",
    ),
    Row(
        "patches-whatever-the-dilation",
        "rest = stride == self.kernel_size, dilation == ones,",
        "rest = stride == self.kernel_size, dilation[0] == 1,",
        "dilation on either axis rules the patch products out",
    ),
)

SIGNALS = in_file(
    "ops/window.py",
    "test_conv_ranks.py",
    Row(
        "signals-with-the-dilation-of-height",
        "((0, 0), *sides), (1, *dilation), self.groups",
        "((0, 0), *sides), (1, 1), self.groups",
        "a signal's kernel may be dilated",
    ),
)

UNFOLD = in_file(
    "ops/unfold.py",
    "test_gate_properties.py test_conv.py",
    Row(
        "fold-crops-the-other-side",
        "(-left, -right, -top, -bottom)",
        "(-right, -left, -bottom, -top)",
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
    "ops/native.py",
    "test_gate_properties.py test_conv.py",
    Row(
        "dilation-ignored",
        "return convolve(x, weight, bias, stride, padding, dilation, groups)",
        "return convolve(x, weight, bias, stride, padding, (1,) * len(stride), groups)",
        "a dilated kernel has holes",
    ),
    Row(
        "dilated-in-bfloat16",
        "y = run_forward(upcast(x), upcast(weight), None, window)",
        "y = run_forward(x, weight, None, window)",
        "PyTorch's dilated convolutions in bfloat16 can end the process",
    ),
    Row(
        "one-channel-in-channels-last",
        "if x.shape[1] > 1 and x.stride() == strides(x.shape, _CHANNELS_LAST[x.ndim]):",
        "if x.stride() == strides(x.shape, _CHANNELS_LAST[x.ndim]):",
        "images of one channel are not read past their end",
    ),
    Row(
        "strides-of-single-entries-trusted",
        "x.stride() == strides(x.shape, torch.contiguous_format):",
        "x.is_contiguous():",
        "axes of size 1 may have any stride, and PyTorch's kernels believe it",
    ),
    Row(
        "bias-of-dilated-convolutions-lost",
        "        if bias is not None:\n            y = inplace.add(",
        "        if False:\n            y = inplace.add(",
        "the bias is added after a dilated convolution",
    ),
    Row(
        "odd-padding-before",
        "for side in sides]\n",
        "for side in reversed(sides)]\n",
        'the odd entry of "same" goes after the image, as in PyTorch',
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
)

PATCHES = in_file(
    "ops/patches.py",
    "test_conv.py",
    Row(
        "patches-padded-before",
        "F.pad(x, (0, missing[1], 0, missing[0]))",
        "F.pad(x, (missing[1], 0, missing[0], 0))",
        "the remainder that no patch reaches is at the end",
    ),
    Row(
        "remainder-dropped-at-the-start",
        "found = found.unfold(axis, reach, stride)",
        "found = found.narrow(axis, n := (found.shape[axis] - reach) % stride, "
        "found.shape[axis] - n).unfold(axis, reach, stride)",
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
)

CHOICE = in_file(
    "ops/convolution.py",
    "test_conv.py",
    Row(
        "dx-of-the-whole-pass-lost",
        "_, dx = for_x.gradients(",
        "dx, _ = for_x.gradients(",
        "dweight may come from one algorithm and dx from another",
    ),
)

BFLOAT16 = in_file(
    "ops/bfloat16.py",
    "test_half_precision.py",
    Row(
        "strided-in-bfloat16-whatever-the-processor",
        "if window.is_strided and _is_strided_right(x, weight, window):",
        "if window.is_strided:",
        "PyTorch's strided kernels in bfloat16 for AMX return wrong numbers for few columns",
    ),
)

PIXELWISE = in_file(
    "ops/pixelwise.py",
    "test_conv.py test_upsample_conv.py",
    Row(
        "pixels-paired-across-the-diagonal",
        "torch.mm(_rows(grad).t(), _rows(x))",
        "torch.mm(_rows(grad).t(), _rows(x.mT))",
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
    "ops/inplace.py",
    "test_gate_properties.py test_upsample_conv.py test_transforms.py test_normalization.py",
    Row(
        "in-place-inside-of-torch-func",
        "return innermost_transformation() is None and",
        "return",
        "torch.func writes the value over and then refuses the tangent",
    ),
    Row(
        "kernels-for-dual-numbers",
        "is None and dual_level(forward_ad) < 0",
        "is None",
        "oneDNN's LSTM returns no tangent",
    ),
    Row(
        "kernels-for-mapped-dual-numbers",
        "none_but_vmap() and dual_level(forward_ad) < 0",
        "none_but_vmap()",
        "PyTorch's rule for LayerNorm's kernel counts the mean as a constant",
    ),
)

UPSAMPLE_CONV = in_file(
    "layers/upsample.py",
    "test_upsample_conv.py",
    Row(
        "two-steps-always-same",
        "kernel_size, padding=padding, bias",
        'kernel_size, padding="same", bias',
        "both methods give the same numbers",
    ),
    Row(
        "out-size-axes-swapped",
        "return channels, rows * height, columns * width",
        "return channels, columns * height, rows * width",
        "a pair of scales is (height, width)",
    ),
)

IN_PLACE = in_file(
    "layers/activations.py",
    "test_gate_properties.py test_activations.py",
    Row(
        "derivative-over-the-residual",
        "dx: Tensor = backward.grad_input(dy, *others, grad_input=dy)",
        "dx: Tensor = backward.grad_input(dy, *others, grad_input=others[0])",
        "bwd may be called twice on the same residuals",
    ),
)

TRANSPOSED = in_file(
    "ops/transposed.py",
    "test_gate_properties.py test_upsample_conv.py",
    Row(
        "crop-on-the-other-side",
        "left - width + 1, right - width + 1, top - height + 1, bottom - height + 1",
        "right - width + 1, left - width + 1, bottom - height + 1, top - height + 1",
        'with "same" and an even kernel, the sides are cropped differently',
    ),
    Row(
        "kernel-not-flipped",
        "u.unsqueeze(1) - (taps - 1) + t",
        "u.unsqueeze(1) - t",
        "a transposed convolution flips the kernel",
    ),
    Row(
        "gradient-axes-swapped",
        '"ut,vr,couv->octr", rows, columns, dkernel',
        '"ut,vr,couv->octr", columns, rows, dkernel.mT',
        "dweight is (O, C, kh, kw)",
    ),
)

CONV_TRANSPOSE = in_file(
    "ops/conv_transpose.py",
    "test_conv_transpose.py",
    Row(
        "cropped-before",
        "dx.narrow(axis, 0, length)",
        "dx.narrow(axis, dx.shape[axis] - length, length)",
        "what output_padding added after y is what is cropped from dx",
    ),
)

CONVOLUTION = (
    *GEOMETRY,
    *SIGNALS,
    *UNFOLD,
    *NATIVE,
    *PATCHES,
    *CHOICE,
    *BFLOAT16,
    *PIXELWISE,
    *INPLACE,
    *UPSAMPLE_CONV,
    *IN_PLACE,
    *TRANSPOSED,
    *CONV_TRANSPOSE,
)
