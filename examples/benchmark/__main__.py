"""Training steps and inference of funcnet and of others, side by side: python examples/benchmark.

See `python examples/benchmark --help`.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import agreement
import torch
from entries import PURE, entries
from networks import Network, all_networks
from problem import Problem
from profiling import print_profile
from report import Row
from timing import side_by_side

DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in agreement.TOLERANCE}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="benchmark", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer networks, shorter runs")
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--threads", default=2, type=int, help="CPU threads (default 2)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument("--batch", nargs="+", type=int, help="in the place of each network's own")
    parser.add_argument("--networks", nargs="+", help="names, or parts of names")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--no-jax", action="store_true", help="without JAX")
    parser.add_argument("--profile", action="store_true", help="where funcnet's time goes; no race")
    parser.add_argument("--out", default=Path("runs/benchmark"), type=Path)
    return parser.parse_args()


def chosen(options: argparse.Namespace) -> list[tuple[Network, int]]:
    """The networks and batch sizes to run."""
    return [
        (network, batch)
        for network in all_networks()
        if not options.networks or any(part in network.name for part in options.networks)
        for batch in options.batch or (network.quick_batches if options.quick else network.batches)
    ]


def profile_all(options: argparse.Namespace) -> None:
    """Profiles of the networks asked for; of the denoiser at batch 64 by default."""
    options.networks = options.networks or ["denoiser"]
    options.batch = options.batch or [64]
    for network, batch in chosen(options):
        print_profile(Problem(network, batch, DTYPES[options.dtype], options.device))


def main() -> None:
    """Check, time, report."""
    options = arguments()
    torch.set_num_threads(options.threads)
    os.environ["NPROC"] = str(options.threads)  # the size of JAX's pool of threads
    if options.profile:
        profile_all(options)
        return
    seconds = 0.3 if options.quick else 0.6
    entered = entries(not options.no_compile, not options.no_jax)
    for network, batch in chosen(options):
        problem = Problem(network, batch, DTYPES[options.dtype], options.device)
        torch.compiler.reset()
        contenders = {name: entry(problem) for name, entry in entered.items()}
        agreement.check(problem, contenders)
        for mode in ("train", "infer"):
            functions = {name: getattr(c, mode) for name, c in contenders.items()}
            if network.is_layer and mode == "train":
                del functions[PURE]
            times = side_by_side(functions, seconds, options.device)
            print(Row(network.name, batch, mode, times), flush=True)


if __name__ == "__main__":
    main()
