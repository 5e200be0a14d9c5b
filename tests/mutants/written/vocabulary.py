"""Bugs in the vocabulary that no operator makes: a formula that someone may well remember wrongly.

Most are right where the common tests look: the value and its gradient agree with each other, or
they differ from PyTorch's at ties, in one kernel's place, or for some hyperparameters alone.
"""

from __future__ import annotations

from ..mutant import Row, in_file

ATTENTION = in_file(
    "ops/attention.py",
    "test_attention.py",
    Row(
        "mask-transposed",
        ".triu(1)",
        ".tril(-1)",
        "a step looks at earlier steps, not at later ones",
    ),
    Row(
        "logits-scaled-by-the-whole-width",
        "s = (q * q.shape[-1] ** -0.5) @ k.mT",
        "s = (q * (q.shape[1] * q.shape[-1]) ** -0.5) @ k.mT",
        "logits are divided by √d of one head, not of all",
    ),
    Row(
        "heads-before-projections",
        "parts = qkv.reshape(examples, steps, 3, heads, size // (3 * heads))",
        "parts = qkv.reshape(examples, steps, heads, 3, -1).transpose(2, 3)",
        "q, k and v stand side by side, and the heads within each",
    ),
    Row(
        "gradient-of-dropped-weights",
        "dp = _dropped(do @ v.mT, kept, scale)",
        "dp = do @ v.mT",
        "a dropped weight has no gradient",
    ),
)

RECURRENT = in_file(
    "ops/recurrent.py",
    "test_recurrent.py",
    Row(
        "gru-resets-before-the-product",
        "u_n = F.linear(h, hh_n, bias_n)\n            n = torch.addcmul(a_n[t], r, u_n).tanh_()",
        "u_n = F.linear(r * h, hh_n, bias_n)\n            n = (a_n[t] + u_n).tanh_()",
        "r multiplies h·W, as in PyTorch, not h, as in the paper",
    ),
)

NORMALIZATION = (
    *in_file(
        "layers/normalization.py",
        "test_normalization.py",
        Row(
            "unbiased-variance",
            "y, mean, rstd = normalization.batch_norm(x, weight, bias, self.eps)",
            "y, mean, rstd = normalization.batch_norm(x, None, None, self.eps)\n"
            "        y = y * (1 - x.shape[1] / max(x.numel(), 1)) ** 0.5\n"
            "        y = y if bias is None else normalization.channel_affine(y, weight, bias)",
            "a batch is normalised by the population's variance",
        ),
    ),
    *in_file(
        "ops/group_norm.py",
        "test_normalization.py",
        Row(
            "gradient-through-the-mean-lost",
            "x if entries == 1 else dx, *others",
            "x if entries == 1 or dx is None else "
            "dx + (dy.reshape(len(x), groups, -1).mean(-1) * rstd).repeat_interleave("
            "dx[0].numel() // groups).view(dx.shape), *others",
            "the mean of a group depends on x",
        ),
    ),
)

DROPOUT = in_file(
    "layers/dropout.py",
    "test_dropout.py",
    Row(
        "dropout-not-scaled",
        "inplace.multiply(x * keep, 1 / (1 - self.p))",
        "x * keep",
        "the mean of y is x's",
    ),
    Row(
        "dropout-in-place-not-scaled",
        "x.mul_(keep).mul_(1 / (1 - self.p))",
        "x.mul_(keep)",
        "working in place changes no number",
    ),
    Row(
        "dropout-of-channels-not-scaled",
        "keep.to(x.dtype).mul_(1 / (1 - self.p))",
        "keep.to(x.dtype)",
        "the mean of y is x's",
    ),
    Row(
        "one-mask-for-all-examples",
        "counter.bernoulli(key, 1 - self.p, x.shape, x.device)",
        "counter.bernoulli(key, 1 - self.p, x.shape[1:], x.device).expand(x.shape)",
        "every example has a mask of its own",
    ),
)

POOLING = in_file(
    "ops/pooling.py",
    "test_pooling.py",
    Row(
        "last-of-equal-entries",
        "y, indices = _MAX[x.ndim](_layout(x), *sizes, ceil_mode)",
        "later = 1e-6 * torch.arange(math.prod(x.shape[2:])).view(x.shape[2:])\n"
        "    y, _ = _MAX[x.ndim](_layout(x), *sizes, ceil_mode)\n"
        "    _, indices = _MAX[x.ndim](_layout(x + later), *sizes, ceil_mode)",
        "of equal entries the first gets the gradient",
    ),
)

EMBEDDING = in_file(
    "ops/embedding.py",
    "test_embedding.py",
    Row(
        "padding-learns",
        "-1 if padding is None else padding",
        "-1",
        "the row for padding has no gradient",
    ),
    Row(
        "padding-learns-among-few-rows",
        "        dweight[padding] = 0.0",
        "        pass",
        "the row for padding has no gradient",
    ),
)

LOSSES = (
    *in_file(
        "losses/cross_entropy.py",
        "test_losses.py",
        Row(
            "ignored-places-in-the-mean",
            "value, count = nll.forward(exact, target, self.reduction, self.ignore_index)",
            'value, count = nll.forward(exact, target, "sum", self.ignore_index)\n'
            "            count = count.new_full((), target.numel())\n"
            '            value = value / count if self.reduction == "mean" else value',
            "the mean is over the places that count",
        ),
        Row(
            "smoothed-over-the-other-classes",
            "return self.label_smoothing / max(x.shape[1], 1)",
            "return self.label_smoothing / max(x.shape[1] - 1, 1)",
            "ε is shared by all classes, the right one among them",
        ),
    ),
    *in_file(
        "losses/mse.py",
        "test_losses.py",
        Row(
            "mean-over-the-batch-only",
            "share(self.reduction, difference.numel())",
            "share(self.reduction, len(difference) if difference.ndim else 1)",
            "the mean is over all entries",
        ),
    ),
)

ADAM = in_file(
    "optimizers/adam.py",
    "test_optimizers.py",
    Row(
        "bias-correction-of-the-next-step",
        "(1 - beta2**n) ** 0.5",
        "(1 - beta2 ** (n + 1)) ** 0.5",
        "the first step is number 1",
    ),
    Row(
        "bias-correction-of-the-next-step-in-the-kernel",
        "            int(n),\n",
        "            int(n) + 1,\n",
        "the first step is number 1",
    ),
    Row(
        "adamw-couples-weight-decay",
        "p = each.mul_(p, 1 - lr * self.weight_decay)",
        "g = each.add(g, p, self.weight_decay)",
        "AdamW's decay is not scaled by the moments",
    ),
    Row(
        "adamw-couples-weight-decay-in-the-kernel",
        "is_adamw=self._decouples_weight_decay",
        "is_adamw=False",
        "AdamW's decay is not scaled by the moments",
    ),
    Row(
        "eps-before-the-bias-correction",
        "root = each.div_(each.sqrt(largest if self.amsgrad else v), (1 - beta2**n) ** 0.5)\n"
        "        p = each.addcdiv_(p, m, each.shift_(root, self.eps), -lr / (1 - beta1**n))",
        "root = each.shift_(each.sqrt(largest if self.amsgrad else v), self.eps)\n"
        "        root = each.div_(root, (1 - beta2**n) ** 0.5)\n"
        "        p = each.addcdiv_(p, m, root, -lr / (1 - beta1**n))",
        "eps is added to the corrected root",
    ),
)

SCHEDULES = in_file(
    "schedules.py",
    "test_schedules.py",
    Row(
        "cosine-one-step-early",
        "angle = math.pi * (t - self.warmup) /",
        "angle = math.pi * (t - self.warmup + 1) /",
        "the fall begins at the peak",
    ),
    Row(
        "linear-one-step-early",
        "_min(t, self.steps) / self.steps",
        "_min(t, self.steps - 1) / max(self.steps - 1, 1)",
        "the last value is reached after `steps` steps",
    ),
)

BATCH_STATISTICS = in_file(
    "batch_statistics.py",
    "test_batch_statistics.py",
    Row(
        "inference-with-the-default-eps",
        "spread = variance + layer.eps",
        "spread = variance + 1e-5",
        "eps is the layer's",
    ),
    Row(
        "inference-by-the-unbiased-variance",
        "variance = m2 / count.reshape(*mean.shape[:-1], 1)",
        "variance = m2 / (count.reshape(*mean.shape[:-1], 1) - 1)",
        "inference computes what training does, unlike PyTorch's running variance",
    ),
)

VOCABULARY = (
    *ATTENTION,
    *RECURRENT,
    *NORMALIZATION,
    *DROPOUT,
    *POOLING,
    *EMBEDDING,
    *LOSSES,
    *ADAM,
    *SCHEDULES,
    *BATCH_STATISTICS,
)
