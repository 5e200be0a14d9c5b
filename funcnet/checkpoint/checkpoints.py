"""A folder of the newest few checkpoints. Reading skips damaged ones."""

from __future__ import annotations

import errno
import os
import re
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, TypeAlias

import torch

from funcnet.checkpoint.atomic import clear_abandoned, make_folder
from funcnet.checkpoint.compare import Expected, refuse
from funcnet.checkpoint.data import matches
from funcnet.checkpoint.files import named, opened, read_tensors, save
from funcnet.checkpoint.structure import INT64, CheckpointError, Node, decode
from funcnet.checks import as_int, shown
from funcnet.fields import Hyperparameters, Size
from funcnet.layer import Tree

_NAME = re.compile(r"step-([0-9]{8,})\.safetensors")

_UNREADABLE = {
    getattr(errno, name)
    for name in ("ENOENT", "EIO", "ELOOP", "EUCLEAN", "EBADMSG", "ENODATA", "EILSEQ", "ESTALE")
    if hasattr(errno, name)
}
"""The errors of reading a file that is damaged, on a damaged disk, or removed meanwhile."""


class _FolderKind:
    def convert(self, owner: type, name: str, value: Any) -> str:
        if not isinstance(value, (str, os.PathLike)):
            raise TypeError(f"{owner.__name__}: expected {name} to be a path, got {shown(value)}")
        return os.fsdecode(value)


Folder: TypeAlias = Annotated[str | os.PathLike[str], _FolderKind()]


@dataclass(frozen=True)
class Checkpoints(Hyperparameters):
    """Checkpoints of a training run in a folder: `save` keeps the last `keep`, `latest` reads one.

    The checkpoint of step 12 is the file `step-00000012.safetensors`, which `fn.save` wrote with
    metadata {"step": 12}. Other files in the folder are left alone. Processes that share the folder
    do not damage each other's files.

    Raises TypeError unless `folder` is a path and `keep` an int, ValueError for keep < 1.

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
        """Write the checkpoint of a step, durably, then remove all but `keep` − 1 earlier ones.

        The folder is made if there is none. A checkpoint of the same step is replaced. Damaged
        files and those of later steps are neither counted nor removed: a run that has resumed from
        an earlier step keeps its own last `keep`. Files that have not been verified yet are read
        completely to verify them. Temporary files that killed saves have left are removed.

        Raises ValueError unless 0 ≤ step < 2⁶³, and what `funcnet.save` raises. Then nothing is
        removed. Warns with a RuntimeWarning if an earlier file cannot be removed.
        """
        step = as_int("Checkpoints", "step", step, 0)
        if step not in INT64:  # as metadata
            raise ValueError(f"Checkpoints: expected step < 2**63, got {step}")
        make_folder(os.fspath(self.folder))
        clear_abandoned(self.folder, r"step-[0-9]{8,}[.a-z]*")
        new = Path(self.folder) / f"step-{step:08d}.safetensors"
        save(new, tree, metadata={"step": step})
        with suppress(FileNotFoundError):  # another process may have saved a later one, and pruned
            self._remember(new, _fingerprint(new), whole=True)
        earlier = [path for at, path in self._files() if at <= step]
        good = [path for path in earlier if path == new or self._is_whole(path)]
        for path in good[: -self.keep]:
            self._verified.pop(path, None)
            try:
                path.unlink(missing_ok=True)
            except OSError as error:
                message = f"Checkpoints: could not remove an earlier file: {error}"
                warnings.warn(message, RuntimeWarning, stacklevel=2)

    def latest(
        self, like: Tree = None, device: torch.device | str | None = None
    ) -> tuple[int, Tree] | None:
        """(step, tree) of the last checkpoint, or None if there is none.

        A damaged file, or one that the disk fails to read, is skipped with a RuntimeWarning
        that names it and says what is wrong. `like` and `device` mean what they mean to
        `funcnet.load`: the tree must equal `like`, if given, in structure, shapes and dtypes, and
        its tensors get the memory format of those of `like`. They go to `device`, by default the
        CPU. With the new parameters and state for `like`, a run that resumes goes on in the same
        memory formats, and so to the same bits.

        Raises CheckpointError if a file is undamaged but differs from `like`, or needs a class that
        is not registered; and another OSError, such as PermissionError, if it cannot be opened.
        """
        for step, path in reversed(self._files()):
            try:
                with opened(path) as (file, header):
                    # A disk that fails to read a mapped file ends the process.
                    tensors = read_tensors(file, header, device, None, mmap=False)
            except (CheckpointError, OSError) as error:  # noqa: PERF203
                if isinstance(error, OSError) and error.errno not in _UNREADABLE:
                    raise
                if not os.path.lexists(path):
                    # Another process has removed it, and written a later one before.
                    return self.latest(like, device)
                message = f"Checkpoints: passing over a damaged file: {error}"
                warnings.warn(message, RuntimeWarning, stacklevel=2)
            else:
                with named(path):
                    return step, _decoded(header.structure, tensors, like)
        return None

    @cached_property
    def _verified(self) -> dict[Path, tuple[tuple[int, ...], bool]]:
        """The fingerprint of each file that has been read, and whether it was whole."""
        return {}

    def _is_whole(self, path: Path) -> bool:
        """Return whether every bit of a file is right."""
        try:
            fingerprint = _fingerprint(path)
            known, whole = self._verified.get(path, ((), False))
            if known != fingerprint:
                whole = _matches_its_checksums(path)
                self._remember(path, fingerprint, whole)
        except OSError:
            return False
        return whole

    def _remember(self, path: Path, fingerprint: tuple[int, ...], whole: bool) -> None:
        """Remember, outside of ==, hash, repr and pickle, whether a file was whole."""
        # A file that was written a moment ago may change again without a later time stamp.
        modified, *_ = fingerprint
        if time.time_ns() - modified > _TICK:
            self._verified[path] = (fingerprint, whole)

    def _files(self) -> list[tuple[int, Path]]:
        """The steps and paths of all checkpoints, first to last."""
        try:
            names = os.listdir(self.folder)
        except FileNotFoundError:
            return []
        matches = [match for match in map(_NAME.fullmatch, names) if match]
        steps = {int(match[1]): match[0] for match in matches if match[1] == f"{int(match[1]):08d}"}
        return [(step, Path(self.folder) / steps[step]) for step in sorted(steps)]


def _decoded(structure: Node, tensors: dict[str, torch.Tensor], like: Tree) -> Tree:
    """The tree in a file. Raises CheckpointError unless it is like the one that is expected."""
    if like is not None:
        expected = Expected(like)
        refuse(expected.differences(structure, tensors))
        tensors = expected.laid_out(tensors)
    return decode(structure, tensors)


_TICK = 3 * 10**9
"""More than the nanoseconds by which file systems round times."""


def _fingerprint(path: Path) -> tuple[int, ...]:
    """Numbers that change when a file changes, the time of its last write first."""
    status = path.stat()
    return status.st_mtime_ns, status.st_ctime_ns, status.st_size, status.st_ino, status.st_dev


def _matches_its_checksums(path: Path) -> bool:
    """Return whether every bit of a file is right. Raises OSError if it cannot be read."""
    try:
        with opened(path) as (file, header):
            return matches(file, header)
    except CheckpointError:
        return False
