"""Training steps and inference of funcnet and of others, side by side.

    python examples/benchmark            # all networks and batch sizes
    python examples/benchmark --quick    # whole networks only, few batch sizes, shorter runs
    python examples/benchmark --only layers residuals --no-compile
    python examples/benchmark --networks mlp lstm --mixed
    python examples/benchmark --profile  # where funcnet's own time goes

Writes report.md, results.json and plot.png under --out. Names for --networks may be parts of names.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from pathlib import Path

import agreement
import torch
from arithmetic import rates
from entries import entries
from growth import grow
from layer_times import print_profile
from memory import Memory
from networks import MEASURED, Network, all_networks
from plot import save_plot
from problem import Problem
from race import race
from report import markdown
from residuals import kept
from results import Results, machine
from worker import Settings, Worker

PARTS = ("networks", "layers", "growth", "residuals")
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in agreement.TOLERANCE}


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="benchmark",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--quick", action="store_true", help="whole networks, few batch sizes, shorter runs"
    )
    parser.add_argument("--device", default=torch.device("cpu"), type=torch.device)
    parser.add_argument("--threads", default=2, type=int, help="CPU threads (default 2)")
    parser.add_argument("--dtype", default="float32", choices=DTYPES)
    parser.add_argument(
        "--mixed",
        action="store_true",
        help="float32 parameters, bfloat16 inside: Cast against torch.nn's autocast",
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, help="only these parts")
    parser.add_argument("--tf32", action="store_true", help="let GPUs round float32 to TF32")
    parser.add_argument("--batch", nargs="+", type=int, help="instead of each network's own")
    parser.add_argument("--networks", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--no-compile", action="store_true", help="without torch.compile")
    parser.add_argument("--no-jax", action="store_true", help="without JAX")
    parser.add_argument("--no-memory", action="store_true", help="do not measure memory")
    parser.add_argument(
        "--keep-memory",
        action="store_true",
        help="let the others keep freed memory, too, as funcnet has its process do",
    )
    parser.add_argument("--profile", action="store_true", help="profile funcnet; no comparison")
    parser.add_argument("--out", default=Path("runs/benchmark"), type=Path)
    options = parser.parse_args()
    if options.only is None:
        options.only = PARTS[:2] if options.networks else PARTS[:1] if options.quick else PARTS
    if options.networks and not chosen(options):
        names = ", ".join(network.name for network in all_networks())
        parser.error(f"expected --networks to be parts of the names {names}")
    return options


def chosen(options: argparse.Namespace) -> list[Problem]:
    """The networks and batch sizes to run."""
    return [
        Problem(network, batch, DTYPES[options.dtype], options.device, options.mixed)
        for network in all_networks()
        if _is_chosen(network, options)
        for batch in options.batch or (network.quick_batches if options.quick else network.batches)
    ]


def _is_chosen(network: Network, options: argparse.Namespace) -> bool:
    if PARTS[network.is_layer] not in options.only:
        return False
    return not options.networks or any(part in network.name for part in options.networks)


def main() -> None:
    """Measure and report, or profile."""
    options = arguments()
    settings = Settings(options.device, options.threads, options.tf32, options.keep_memory)
    settings.apply()
    if options.profile:
        options.networks = options.networks or ["denoiser"]
        options.batch = options.batch or [64]
        for problem in chosen(options):
            print_profile(problem)
        return
    results = run(options, settings)
    options.out.mkdir(parents=True, exist_ok=True)
    report = markdown(results)
    (options.out / "report.md").write_text(report, encoding="utf-8")
    (options.out / "results.json").write_text(json.dumps(results.as_json(), indent=1))
    written = "report.md, results.json"
    if results.rows:
        save_plot(results, options.out / "plot.png")
        written += ", plot.png"
    print(f"\n{report}\nWritten to {options.out}: {written}")


def run(options: argparse.Namespace, settings: Settings) -> Results:
    """Measure everything that was asked for."""
    dtype, device = DTYPES[options.dtype], options.device
    rate = rates(torch.bfloat16 if options.mixed else dtype, device)
    names = list(entries(device, not options.no_compile, not options.no_jax))
    seconds = 0.3 if options.quick else 0.6
    tolerance = agreement.TF32_TOLERANCE if options.tf32 else agreement.TOLERANCE[dtype]
    if options.mixed:
        tolerance = agreement.MIXED_TOLERANCE
    with ExitStack() as stack:
        problems = chosen(options)
        started = names if problems else []
        workers = {name: stack.enter_context(Worker(name, settings)) for name in started}
        rows = [row for p in problems for row in race(p, workers, seconds, tolerance)]
    memory = {} if options.no_memory else _memory(options, settings, names)
    measured = Problem(all_networks()[0], 1, dtype, device, options.mixed)
    growth = grow(measured, settings, tolerance) if "growth" in options.only else []
    saved = kept(device) if "residuals" in options.only else []
    for line in saved:
        print(line)
    return Results(machine(settings, dtype, options.mixed), rows, memory, rate, growth, saved)


def _memory(options: argparse.Namespace, settings: Settings, names: list[str]) -> dict[str, Memory]:
    """The memory of each contender, where the run includes the denoiser at batch 64."""
    found = {}
    for problem in chosen(options):
        if (problem.network.name, problem.batch) == MEASURED:
            for name in names:
                with Worker(name, settings) as worker:
                    found[name] = worker.memory(problem)
    return found


if __name__ == "__main__":
    if hasattr(sys.stdout, "reconfigure"):  # a file's encoding may lack letters
        sys.stdout.reconfigure(errors="backslashreplace")
    main()
