"""Gradients clipped one by one, beside gradients of each example by torch.func.vmap of torch.nn.

The unit of time and memory is `value_and_grad`, where nothing is clipped. The two clipped sums are
compared first. Contenders run in turns; ratios are of medians.

    python examples/benchmark/clipping.py           handwritten digits; under a minute
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from memory import allocations
from sklearn.datasets import load_digits
from timing import duration, side_by_side
from torch import Tensor, nn

import funcnet as fn

LOSS = fn.CrossEntropy()
NET = fn.Sequential(
    fn.Conv2d(16, 3, padding=1), fn.GroupNorm(4), fn.ReLU(),
    fn.Conv2d(32, 3, stride=2, padding=1), fn.GroupNorm(4), fn.ReLU(),
    fn.Flatten(), fn.Linear(64), fn.ReLU(), fn.Linear(10),
)  # fmt: skip
CLIP = 1.0


def by_vmap(params: Any) -> Callable[[Any, Tensor, Tensor], dict[str, Tensor]]:
    """The clipped sum as PyTorch's tutorial has it: torch.nn, torch.func.grad and vmap."""
    module = fn.interop.to_torch(NET, params)

    def loss(tensors: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        logits = torch.func.functional_call(module, tensors, (x[None],))
        return nn.functional.cross_entropy(logits, y[None])

    each = torch.func.vmap(torch.func.grad(loss), (None, 0, 0))

    def clipped(params: Any, x: Tensor, y: Tensor) -> dict[str, Tensor]:
        grads = each(fn.interop.state_dict(params), x, y)
        norms = torch.stack([g.flatten(1).norm(dim=1) for g in grads.values()]).norm(dim=0)
        shares = (CLIP / norms).clamp(max=1.0)
        return {name: torch.tensordot(shares, g, dims=1) for name, g in grads.items()}

    return clipped


def compare(x: Tensor, y: Tensor, seconds: float) -> None:
    """Print time and memory of both clipped sums; raise AssertionError where they differ."""
    params = NET.init(fn.key(0), x.shape[1:])
    contenders: dict[str, Callable[..., Any]] = {
        "value_and_grad, nothing clipped": fn.value_and_grad(NET, LOSS),
        "clipped_value_and_grad": fn.clipped_value_and_grad(NET, LOSS, CLIP),
        "torch.func.vmap of torch.nn": by_vmap(params),
    }
    unit, ours, theirs = contenders
    total = fn.interop.state_dict(contenders[ours](params, x, y)[1])
    torch.testing.assert_close(total, contenders[theirs](params, x, y), rtol=1e-4, atol=1e-4)
    runs = {name: functools.partial(run, params, x, y) for name, run in contenders.items()}
    clocks = {n: functools.partial(duration, run, device=x.device) for n, run in runs.items()}
    times = side_by_side(clocks, seconds)
    memory = {name: _peak(run) for name, run in runs.items()}
    print(f"{len(x)} images of {'×'.join(map(str, x.shape[1:]))}")
    print(f"{'':<32} {'time':>6} {'memory':>7}")
    for name in contenders:
        ratio = times[name].median / times[unit].median
        print(f"{name:<32} {ratio:>6.1f} {memory[name] / memory[unit]:>7.1f}")


def _peak(run: Callable[[], Any]) -> int:
    """Bytes that PyTorch's allocator holds at most, beyond those before."""
    found = allocations(run)
    (first, own), *_ = found
    return max(total for total, _ in found) - first + own


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", default=1, type=int, help="CPU threads (%(default)s)")
    parser.add_argument("--seconds", default=1.0, type=float, help="a contender (%(default)s)")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(digits.target)
    compare(x[:128], y[:128], options.seconds)
    compare(nn.functional.interpolate(x[:64], scale_factor=4), y[:64], options.seconds)


if __name__ == "__main__":
    main()
