"""Bugs in gradients of each example, in their norms and in their clipped sum."""

from __future__ import annotations

from ..mutant import Row, in_file

PER_EXAMPLE = (
    *in_file(
        "per_example.py",
        "test_per_example.py",
        Row(
            "normalised-instead-of-clipped",
            "clipping(norms, self.max_norm)",
            "float(self.max_norm) / norms.clamp(min=1e-30)",
            "a gradient below the norm stays as it is",
        ),
        Row(
            "squares-of-turns-added",
            'if wanted == "squares" and not self.is_tied:',
            'if wanted == "squares":',
            "the square of a sum over turns is not the sum of squares",
        ),
        Row(
            "masks-of-the-batch-forgotten",
            "    if key is None:\n        return structure.unflatten(products",
            "    if len(x):\n        return structure.unflatten(products",
            "with a key, the masks are those of the batch",
        ),
    ),
    *in_file(
        "ops/products.py",
        "test_per_example.py",
        Row(
            "rows-without-their-company",
            "products = (left @ left.mT) * (right @ right.mT)",
            "products = left.square().sum(-1) * right.square().sum(-1)",
            "‖x‖²·‖g‖² is the square of one row's product, not of a sum over rows",
        ),
        Row(
            "tokens-that-come-twice-counted-apart",
            "return _squares(self._added(torch.zeros_like(rank).scatter(1, order, rank), "
            "rank.shape[1]))",
            "return _squares(self.rows)",
            "rows of one index are added before they are squared",
        ),
    ),
    *in_file(
        "ops/kernel_products.py",
        "test_per_example.py",
        Row(
            "taps-of-boxes-not-reversed",
            "by_tap.flip(1, 2).permute(0, 3, 4, 1, 2)",
            "by_tap.permute(0, 3, 4, 1, 2)",
            "behind upsampling, windows on the gradient see the taps in reverse",
        ),
    ),
)
