"""Replacing a file: a crash at any instant leaves the old file or the new one, complete.

The new file is written beside the old one as `.NAME.0123456789abcdef.tmp`, made durable, and then
renamed. It is locked (flock) while it is written. A lock ends with its process, so a temporary file
without a lock was left by a killed process, and the next save removes it. Two processes that save
to one path write two files; the last rename wins. On Windows, which has no such locks, a temporary
file counts as left by a killed process an hour after it was written.

Some file systems, on networks above all, lack locks, permissions, or a way to flush a folder. What
they lack is left out, and never costs the old file or the new one.
"""

from __future__ import annotations

import errno
import os
import re
import secrets
import stat
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, TypeVar

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None  # type: ignore[assignment]

_Result = TypeVar("_Result")

_UNSUPPORTED = {
    errno.EINVAL,
    errno.ENOTSUP,
    errno.EOPNOTSUPP,
    errno.ENOSYS,
    errno.ENOTTY,
    errno.EPERM,  # chmod on CIFS
    errno.EACCES,  # a folder that may be written but not listed
    errno.EBADF,  # some systems flush no folder that is open for reading
    errno.EISDIR,
}
"""The errors by which a file system says that it lacks an operation."""

_A_FOLDER = "expected the path of a file, got a folder"

_ATTEMPTS = 10
"""The most temporary files to make until one can be locked."""

_HOUR = 3600.0
"""Seconds after which a temporary file, where none can be locked, counts as left behind."""

_PAUSES = (0.01, 0.02, 0.05, 0.12, 0.3)
"""Seconds to wait for a file that Windows refuses: half a second together."""


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """Open a new file, which replaces the one at `path` if the block raises nothing.

    The new file gets the old one's mode, or else the umask's. A symbolic link stays, and the file
    that it points to is replaced. If anything is raised, the old file is unchanged and the new one
    removed; but if the disk fails while the renaming is made durable, the new one is in place. In
    a folder that may be written but not listed, or cannot be flushed, a power cut may undo the
    renaming. On a file system without permissions, the new file has the file system's.

    Raises OSError (FileNotFoundError, PermissionError, IsADirectoryError, …) with the path.
    """
    target = Path(os.path.realpath(path))
    try:
        # realpath drops a slash at the end, or a dot behind it.
        if os.path.basename(os.fsdecode(path)) in ("", "."):
            raise IsADirectoryError(errno.EISDIR, _A_FOLDER)
        mode = _mode_to_keep(target)
        clear_abandoned(target.parent, re.escape(_head(target)))
        temporary, file = _create(target, mode)
        try:
            # The folder is opened first: a failure after the renaming would come too late.
            with file, _opened(target.parent) as folder:
                yield file
                if mode is not None:
                    with _where_supported():
                        os.chmod(temporary, mode)
                _flush_to_disk(file)
                if on_windows():
                    file.close()  # Windows cannot rename an open file
                _rename(temporary, target)
                _flush_folder(folder)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
    except OSError as error:
        # Some, like "no space left", name no path. The number chooses the subclass of OSError.
        reason = error.strerror or str(error)
        raise OSError(error.errno, f"save: {reason}", os.fspath(path)) from error


def make_folder(folder: str) -> None:
    """Make a folder and those above it, durably, where there are none."""
    missing = []
    path = os.path.abspath(folder)
    while not os.path.lexists(path) and path not in missing:  # a drive is its own parent
        missing.append(path)
        path = os.path.dirname(path)
    os.makedirs(folder, exist_ok=True)
    for path in missing:
        with _opened(Path(path).parent) as above:
            _flush_folder(above)


def clear_abandoned(folder: str | os.PathLike[str], names: str) -> None:
    """Remove the temporary files that killed saves left, of files whose names match a pattern."""
    abandoned = re.compile(rf"\.(?:{names})\.[0-9a-f]{{16}}\.tmp")
    with suppress(OSError):  # the folder may be written but not listed
        for entry in os.scandir(folder):
            if abandoned.fullmatch(entry.name):
                with suppress(OSError):
                    _remove_unless_locked(Path(entry.path))


def on_windows() -> bool:
    """Whether this is Windows: files cannot be locked, nor replaced while open or mapped."""
    return fcntl is None


def patiently(call: Callable[[], _Result]) -> _Result:
    """Call a function; on Windows, try again for a while if it is refused.

    Windows refuses to replace a file that somebody reads, and to open one that is being removed.
    """
    for pause in _PAUSES if on_windows() else ():
        with suppress(PermissionError):
            return call()
        time.sleep(pause)
    return call()


@contextmanager
def _where_supported() -> Iterator[None]:
    """Leave out what the file system lacks. Any other error is raised."""
    try:
        yield
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise


def _mode_to_keep(target: Path) -> int | None:
    """Return the permissions of the file to replace, or None if there is none."""
    try:
        status = target.stat()
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(errno.EISDIR, _A_FOLDER)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "expected the path of a regular file, got another kind")
    # os.replace ignores the write protection of the file.
    if not os.access(target, os.W_OK):
        raise PermissionError(errno.EACCES, "the file is write-protected")
    return stat.S_IMODE(status.st_mode) & 0o777


def _head(target: Path) -> str:
    """Return the beginning of a file's name, for its temporary files: all of it may be too long."""
    return target.name[:32]


def _create(target: Path, mode: int | None) -> tuple[Path, BinaryIO]:
    """Return a new file beside `target`, locked if the file system has locks, and its path."""
    for attempt in range(_ATTEMPTS):
        temporary = target.with_name(f".{_head(target)}.{secrets.token_hex(8)}.tmp")
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_BINARY", 0)
        # The kernel applies the umask.
        descriptor = os.open(temporary, flags, 0o666 if mode is None else mode)
        file = os.fdopen(descriptor, "w+b", buffering=0)
        try:
            locked = _try_lock(file)
        except OSError:
            locked = True  # the file system has no locks, so no save removes the file
        # Another save may have removed the file before it was locked. No two files share a name.
        if (locked or attempt == _ATTEMPTS - 1) and os.path.lexists(temporary):
            return temporary, file
        file.close()
        temporary.unlink(missing_ok=True)
    raise FileNotFoundError(errno.ENOENT, "the temporary file was removed again and again")


def _rename(temporary: Path, target: Path) -> None:
    try:
        patiently(lambda: os.replace(temporary, target))
    except PermissionError as error:
        if not on_windows():
            raise
        reason = f"{error.strerror}: a program has the old file open, or load has mapped it"
        raise PermissionError(error.errno, reason) from error


def _remove_unless_locked(path: Path) -> None:
    if on_windows():
        # A younger one may be another save's, which closes it to rename it.
        if time.time() - path.stat().st_mtime > _HOUR:
            path.unlink()
        return
    with path.open("r+b") as file:
        # If the file is complete by now, it has another name.
        if _try_lock(file):
            path.unlink()


def _try_lock(file: BinaryIO) -> bool:
    if not on_windows():
        try:
            fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def _flush_to_disk(file: BinaryIO) -> None:
    # On macOS, fsync stops at the drive's cache.
    if hasattr(fcntl, "F_FULLFSYNC"):
        with suppress(OSError):  # not every file system supports it
            fcntl.fcntl(file.fileno(), fcntl.F_FULLFSYNC)
            return
    with _where_supported():
        os.fsync(file.fileno())


@contextmanager
def _opened(folder: Path) -> Iterator[int | None]:
    """Open a folder to be flushed; None where that is impossible, as on Windows."""
    descriptor = None
    if not on_windows():
        with _where_supported():
            descriptor = os.open(folder, os.O_RDONLY)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            os.close(descriptor)


def _flush_folder(folder: int | None) -> None:
    if folder is not None:
        with _where_supported():
            os.fsync(folder)
