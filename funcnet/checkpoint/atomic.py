"""Replacing a file: a crash at any instant leaves the old file or the new one, complete.

The new file is written beside the old one as `.NAME.0123456789abcdef.tmp`, made durable, and then
renamed. It is locked (flock) while it is written. A lock ends with its process, so a temporary file
without a lock was left by a killed process, and the next save removes it. Two processes that save
to one path write two files; the last rename wins.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # Windows has no flock, but cannot remove an open file: that is lock enough
    fcntl = None  # type: ignore[assignment]


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a new file, which replaces the one at `path` if the block raises nothing.

    The new file gets the old one's mode, or else the umask's. A symbolic link stays, and the file
    that it points to is replaced. If anything is raised, the old file is unchanged and the new one
    removed. Only if the disk fails while the renaming is made durable, the new one is in place. In
    a folder that may be written but not listed, a power cut may undo the renaming.

    Raises OSError (FileNotFoundError, PermissionError, IsADirectoryError, …) with the path.
    """
    target = Path(os.path.realpath(path))
    try:
        mode = _mode_to_keep(target)
        _clear_abandoned(target)
        temporary, file = _create(target, mode)
        try:
            with file:
                yield file
                if mode is not None:
                    os.chmod(temporary, mode)
                _flush_to_disk(file)
                if fcntl is None:
                    file.close()  # Windows cannot rename an open file
                os.replace(temporary, target)
        except BaseException:
            with suppress(FileNotFoundError):
                temporary.unlink()
            raise
        _flush_folder(target.parent)
    except OSError as error:
        # Some, like "no space left", name no path. The number chooses the subclass of OSError.
        raise OSError(error.errno, f"save: {error.strerror}", os.fspath(path)) from error


def _mode_to_keep(target: Path) -> int | None:
    """Return the permissions of the file to replace, or None if there is none."""
    try:
        status = target.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, "expected the path of a file, got a folder")
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "expected the path of a regular file, got another kind")
    # os.replace ignores the write protection of the file.
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "the file is write-protected")
    return stat.S_IMODE(status.st_mode) & 0o777


def _create(target: Path, mode: int | None) -> tuple[Path, BinaryIO]:
    """Return a new, locked file beside `target`, and its path."""
    while True:
        # A long name would become too long for the file system.
        temporary = target.with_name(f".{target.name[:32]}.{secrets.token_hex(8)}.tmp")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        # The kernel applies the umask.
        descriptor = os.open(temporary, flags, 0o666 if mode is None else mode)
        file = os.fdopen(descriptor, "w+b", buffering=0)
        try:
            locked = _try_lock(file)
        except OSError:
            locked = True  # the file system has no locks, so no save removes the file
        # Another save may have removed the file before it was locked.
        if locked and _is_at(file, temporary):
            return temporary, file
        file.close()
        temporary.unlink(missing_ok=True)


def _clear_abandoned(target: Path) -> None:
    abandoned = re.compile(rf"\.{re.escape(target.name[:32])}\.[0-9a-f]{{16}}\.tmp")
    with suppress(OSError):  # the folder may be written but not listed
        for entry in os.scandir(target.parent):
            if abandoned.fullmatch(entry.name):
                with suppress(OSError):
                    _remove_unless_locked(Path(entry.path))


def _remove_unless_locked(path: Path) -> None:
    if fcntl is None:
        path.unlink()
        return
    with path.open("r+b") as file:
        if _try_lock(file) and _is_at(file, path):
            path.unlink()


def _try_lock(file: BinaryIO) -> bool:
    if fcntl is not None:
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _is_at(file: BinaryIO, path: Path) -> bool:
    """Return whether the open file is still the one at `path`."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def _flush_to_disk(file: BinaryIO) -> None:
    # On macOS, fsync stops at the drive's cache.
    if fcntl is not None and hasattr(fcntl, "F_FULLFSYNC"):
        with suppress(OSError):  # not every file system supports it
            fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC)
            return
    os.fsync(file.fileno())


def _flush_folder(folder: Path) -> None:
    if fcntl is None:
        return  # Windows cannot open a folder
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:
        return  # the folder may be written but not listed
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
