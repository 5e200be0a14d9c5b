"""A folder of checkpoints: the newest few, and the way back past a damaged one."""

from __future__ import annotations

import os
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch

from funcnet.checkpoint.files import _opened, _tensors, inspect, save
from funcnet.checkpoint.structure import CheckpointError, Node, decode
from funcnet.checks import as_int
from funcnet.fields import Hyperparameters, Size
from funcnet.layer import Tree

_NAME = re.compile(r"step-([0-9]{8,})\.safetensors")


class _FolderKind:
    def convert(self, owner: type, name: str, value: Any) -> str:
        if not isinstance(value, (str, os.PathLike)):
            raise TypeError(f"{owner.__name__}: expected {name} to be a path, got {value!r}")
        return os.fsdecode(value)


Folder: TypeAlias = Annotated[str | os.PathLike[str], _FolderKind()]


@dataclass(frozen=True)
class Checkpoints(Hyperparameters):
    """Checkpoints of a training run in a folder: `save` keeps the last `keep`, `latest` reads one.

    The checkpoint of step 12 is the file `step-00000012.safetensors`, which `fn.save` wrote with
    metadata {"step": 12}. Other files in the folder are left alone. Processes that share the folder
    do each other's files no harm.

    >>> import tempfile, torch
    >>> checkpoints = Checkpoints(tempfile.mkdtemp() + "/run", keep=2)
    >>> for step in (10, 20, 30):
    ...     checkpoints.save(step, {"weight": torch.full((2,), float(step))})
    >>> checkpoints.latest()
    (30, {'weight': tensor([30., 30.])})
    >>> sorted(os.listdir(checkpoints.folder))
    ['step-00000020.safetensors', 'step-00000030.safetensors']
    """

    folder: Folder
    keep: Size = 3

    def save(self, step: int, tree: Tree) -> None:
        """Write the checkpoint of a step, durably, then remove the earlier ones but `keep` − 1.

        The folder is made if there is none. A checkpoint of the same step is replaced. Damaged
        files and those of later steps are neither counted nor removed: a run that has resumed
        before them keeps its last `keep` as well.

        Raises ValueError for a step below 0, and what `funcnet.save` raises. Then nothing is
        removed.
        """
        step = as_int("Checkpoints", "step", step, 0)
        os.makedirs(self.folder, exist_ok=True)
        new = Path(self.folder) / f"step-{step:08d}.safetensors"
        save(new, tree, metadata={"step": step})
        good = [path for at, path in self._files() if at <= step and _is_whole(path)]
        for path in good[: -self.keep]:
            path.unlink(missing_ok=True)

    def latest(self, device: torch.device | str | None = None) -> tuple[int, Tree] | None:
        """(step, tree) of the last checkpoint, or None if there is none.

        A damaged file is passed over, with a RuntimeWarning that names it and says what is wrong.
        The tensors go to `device`, by default the CPU.

        Raises CheckpointError if a file is undamaged but needs a class that is not registered.
        """
        for step, path in reversed(self._files()):
            try:
                structure, tensors = _read(path, device)
            except (CheckpointError, FileNotFoundError) as error:  # noqa: PERF203
                if not os.path.lexists(path):
                    # Another process has removed it, and written a later one before.
                    return self.latest(device)
                message = f"Checkpoints: passing over a damaged file: {error}"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            else:
                return step, decode(structure, tensors)
        return None

    def _files(self) -> list[tuple[int, Path]]:
        """The steps and paths of all checkpoints, first to last."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        matches = [match for match in map(_NAME.fullmatch, names) if match]
        steps = {int(match[1]): match[0] for match in matches if match[1] == f"{int(match[1]):08d}"}
        return [(step, Path(self.folder) / steps[step]) for step in sorted(steps)]


def _read(path: Path, device: torch.device | str | None) -> tuple[Node, dict[str, torch.Tensor]]:
    """The structure and tensors in a file, whose every bit is checked."""
    with _opened(path) as (file, header):
        return header.structure, _tensors(file, header, device, None, None)


def _is_whole(path: Path) -> bool:
    """Whether a file's header and length are right."""
    try:
        inspect(path)
    except (CheckpointError, OSError):
        return False
    return True
