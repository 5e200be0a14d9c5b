"""The options of examples/denoise.py, and what they name."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

import torch

import funcnet as fn
from denoising.data import Data, file_data, photograph_data
from denoising.errors import InputError
from denoising.noise import DEFAULT_LEVELS, MOST_LEVELS, Noise
from denoising.pairs import pair_data


class Parser(argparse.ArgumentParser):
    """A parser that prints an error in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"denoise.py: {message}\n")


def number(kind: type[int] | type[float], least: float, most: float) -> Callable[[str], float]:
    """A number in a range, as an argument."""

    def convert(text: str) -> float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most:
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(
                f"expected {noun} from {least:g} to {most:g}, got {text!r}"
            )
        return value

    return convert


def parse(
    description: str, networks: Sequence[str], arguments: Sequence[str] | None
) -> argparse.Namespace:
    parser = Parser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        prog="denoise.py",
    )
    parser.set_defaults(command="train")
    add_data(parser.add_argument_group("what to learn from").add_argument)
    add_training(parser.add_argument_group("training").add_argument, networks)
    add_run(parser.add_argument_group("the run").add_argument)
    commands = parser.add_subparsers(title="other commands", metavar="apply")
    applying = commands.add_parser("apply", help="denoise images with a trained model")
    applying.set_defaults(command="apply")
    add = applying.add_argument
    add("model", type=Path, metavar="MODEL")
    add("inputs", type=Path, nargs="+", metavar="IN", help="images, or folders of images")
    add("output", type=Path, metavar="OUT", help="an image; a folder for several")
    add("--force", action="store_true", help="replace images that are there already")
    add_device(add)
    return parser.parse_args(arguments)


Add = Callable[..., argparse.Action]


def add_data(add: Add) -> None:
    add(
        "--images",
        type=Path,
        metavar="DIR",
        help="images in a folder; every tenth is held out",
    )
    add(
        "--pairs",
        type=Path,
        nargs=2,
        metavar="DIR",
        help="noisy images in two folders: two shots of each scene, under the same names",
    )
    add("--data", type=Path, metavar="FILE", help="a pair of tensors (noisy, noisy)")
    add("--val", type=Path, metavar="FILE", help="with --data: the held-out pair (noisy, clean)")
    add("--patches", type=number(int, 1, 200_000), help="patches to cut out (10000)")
    add("--noise", choices=DEFAULT_LEVELS, help="the kind of noise to add (gaussian)")
    add(
        "--level",
        type=number(float, 1e-3, max(MOST_LEVELS.values())),
        help="255·σ (25) if gaussian, photons at white (30) if poisson",
    )


def add_training(add: Add, networks: Sequence[str]) -> None:
    count = number(int, 1, 10**6)
    add(
        "--network",
        choices=networks,
        default=networks[0],
        help="a U-Net by Adam, or a smaller network by SGD (%(default)s)",
    )
    add("--epochs", type=count, help="passes over the patches (6)")
    add(
        "--minutes",
        type=number(float, 0.01, 10_000),
        help="train for about this long, by the first steps' speed, instead of --epochs",
    )
    add("--batch-size", type=count, default=16, help="patches a step (%(default)s)")
    add(
        "--lr",
        type=number(float, 1e-9, 1e3),
        help="the learning rate's peak (unet 0.004, report 1)",
    )
    add(
        "--momentum",
        type=number(float, 0, 0.9999),
        default=0.9,
        help="momentum of SGD; first beta of Adam (%(default)s)",
    )
    add(
        "--seed",
        type=number(int, 0, 2**64 - 1),
        default=0,
        help="decides all random numbers (%(default)s)",
    )


def add_run(add: Add) -> None:
    count = number(int, 1, 10**9)
    add(
        "--out",
        type=Path,
        default=Path("runs/denoise"),
        metavar="DIR",
        help="for checkpoints, the model and the report (%(default)s)",
    )
    add(
        "--checkpoint-every",
        type=count,
        default=250,
        metavar="STEPS",
        help="steps between checkpoints (%(default)s)",
    )
    add("--keep", type=count, default=3, help="how many checkpoints to keep (%(default)s)")
    add(
        "--resume",
        action="store_true",
        help="go on from the newest checkpoint in --out, to more epochs or minutes if asked for",
    )
    add_device(add)


def add_device(add: Add) -> None:
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")


def choose_device(name: str) -> torch.device:
    """The device, set to give the same bits every time."""
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no such device here")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    return torch.device("cuda")


def read_data(options: argparse.Namespace, stride: int, key: fn.Key) -> Data:
    """The data that the options name."""
    if (options.data is None) != (options.val is None):
        raise InputError("--data and --val: expected both or neither")
    if options.minutes and options.epochs:
        raise InputError("--minutes and --epochs: expected one of them")
    given = [name for name in ("data", "pairs", "images") if getattr(options, name)]
    if len(given) > 1:
        raise InputError(f"--{given[0]}: --{given[1]} does not go with it")
    if given in (["data"], ["pairs"]):
        wrong = ["noise", "level"] + ["patches"] * (given == ["data"])
        for name in wrong:
            if getattr(options, name):
                raise InputError(f"--{given[0]}: --{name} does not go with it")
    if options.data:
        return file_data(options.data, options.val, stride)
    count = options.patches or 10_000
    if options.pairs:
        return pair_data(options.pairs, count, key)
    kind = options.noise or "gaussian"
    level = options.level or DEFAULT_LEVELS[kind]
    if level > MOST_LEVELS[kind]:
        raise InputError(
            f"--level: expected at most {MOST_LEVELS[kind]:g} for {kind} noise, got {level:g}"
        )
    return photograph_data(options.images, Noise(kind, level), count, key)
