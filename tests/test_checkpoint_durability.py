"""Whatever happens during a save, there is the old file or the new one, whole, and no litter."""

from __future__ import annotations

import errno
import io
import mmap
import os
import random
import signal
import stat
import subprocess
import sys
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import funcnet as fn
from funcnet.checkpoint import atomic, data, files
from funcnet.checkpoint.container import BLOCK

fcntl = pytest.importorskip("fcntl", reason="needs the locks of Unix")
resource = pytest.importorskip("resource", reason="needs the limits of Unix")

SAVE_FOREVER = """
import sys, torch, funcnet as fn
path, fill, size = sys.argv[1], float(sys.argv[2]), int(sys.argv[3])
tree = {"a": torch.full((size,), fill), "b": [torch.full((size,), fill)], "fill": fill}
print("ready", flush=True)
while True:
    fn.save(path, tree)
"""


@contextmanager
def saving_forever(path: Path, fill: float, size: int) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-c", SAVE_FOREVER, str(path), str(fill), str(size)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            yield process
        finally:
            process.kill()


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    while not path.exists():
        assert process.poll() is None
        time.sleep(0.001)


def assert_whole(path: Path, size: int) -> None:
    tree = fn.load(path)
    for tensor in (tree["a"], tree["b"][0]):
        assert torch.equal(tensor, torch.full((size,), tree["fill"]))


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tree.safetensors"


def litter(path: Path) -> list[str]:
    return [name for name in os.listdir(path.parent) if name != path.name]


def test_a_killed_save_leaves_a_whole_file_and_one_temporary_at_most(path: Path) -> None:
    size = 300_000
    choose = random.Random(0)
    left = 0
    for _ in range(4):
        with saving_forever(path, 1.0, size) as process:
            wait_for(path, process)
            time.sleep(choose.uniform(0, 0.03))
            process.kill()
        assert_whole(path, size)
        assert len(litter(path)) <= 1
        left += len(litter(path))
    fn.save(path, {"a": torch.zeros(1), "b": [torch.zeros(1)], "fill": 0.0})
    assert litter(path) == []


def test_processes_that_save_to_one_path_do_not_disturb_each_other(path: Path) -> None:
    size = 100_000
    with saving_forever(path, 1.0, size) as one, saving_forever(path, 2.0, size) as two:
        wait_for(path, one)
        seen = set()
        end = time.monotonic() + 20
        while len(seen) < 3 and time.monotonic() < end:
            fn.save(path, {"a": torch.ones(size), "b": [torch.ones(size)], "fill": 1.0})
            for _ in range(5):
                assert_whole(path, size)
                seen |= {path.stat().st_size, fn.load(path)["fill"]}
        assert {1.0, 2.0} <= seen
        assert (one.poll(), two.poll()) == (None, None)  # neither has failed
    fn.save(path, ())
    assert litter(path) == []


def test_threads_that_save_to_one_path_do_not_disturb_each_other(path: Path) -> None:
    errors = []

    def save(fill: float) -> None:
        try:
            for _ in range(20):
                tree = {"a": torch.full((999,), fill), "b": [torch.full((999,), fill)]}
                fn.save(path, {**tree, "fill": fill})
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=save, args=(float(i),)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert_whole(path, 999)
    assert litter(path) == []


def test_a_temporary_file_in_use_is_left_alone(path: Path) -> None:
    with atomic.replacing(path) as file:
        file.write(b"half")
        fn.save(path, "meanwhile")
        assert len(litter(path)) == 1
        assert fn.load(path) == "meanwhile"
        file.write(b" done")
    assert path.read_bytes() == b"half done"
    assert litter(path) == []


def test_only_its_own_abandoned_files_are_cleared(path: Path) -> None:
    abandoned = path.with_name(f".{path.name}.0123456789abcdef.tmp")
    others = [
        ".other.0123456789abcdef.tmp",
        f".{path.name}.tmp",
        f"{path.name}.0123456789abcdef.tmp",
    ]
    for name in [abandoned.name, *others]:
        path.with_name(name).touch()
    fn.save(path, ())
    assert sorted(litter(path)) == sorted(others)


# --- While another thread goes on training


def of_one_step(tensor: torch.Tensor) -> bool:
    """Whether a tensor of equal entries has at most a block of each step."""
    return len(set(tensor.flatten().tolist())) <= -(-tensor.nbytes // BLOCK)


def large() -> torch.Tensor:
    return torch.zeros(3 * BLOCK // 8 + 1, dtype=torch.float64)


def shared_file(folder: Path) -> torch.Tensor:
    (folder.parent / "values").write_bytes(bytes(8 * 1000))
    name = str(folder.parent / "values")
    return torch.from_file(name, shared=True, size=1000, dtype=torch.float64)


WRITTEN: dict[str, Callable[[Path], list[torch.Tensor]]] = {
    "one": lambda path: [torch.zeros(1000)],
    "many blocks": lambda path: [large()],
    "several": lambda path: [torch.zeros(3), large(), torch.zeros(5, dtype=torch.int16)],
    "views of one storage": lambda path: list(torch.zeros(100, 4).unbind(1)),
    "rows": lambda path: list(torch.zeros(4, 100).unbind()),
    "parameter": lambda path: [torch.nn.Parameter(torch.zeros(1000))],
    "conjugated": lambda path: [torch.zeros(100, dtype=torch.complex64).conj()],
    "shared with other processes": lambda path: [torch.zeros(1000).share_memory_()],
    "a mapped file": lambda path: [shared_file(path)],
    "NumPy's": lambda path: [torch.from_numpy(np.zeros(1000))],
}


@pytest.mark.parametrize("case", WRITTEN)
@pytest.mark.parametrize("moment", ["before it is summed", "after it is summed", "when written"])
def test_what_is_written_is_what_was_summed(
    case: str, moment: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every tensor changes at the worst moments; the file matches its checksums all the same."""
    path = tmp_path / "folder" / "tree.safetensors"
    path.parent.mkdir()
    tensors = WRITTEN[case](path)

    def step() -> None:
        with torch.no_grad():
            for tensor in tensors:
                tensor.add_(1)

    crc32, write_all = zlib.crc32, data.write_all

    def summing(*args: Any) -> int:
        if moment == "before it is summed":
            step()
        checksum = crc32(*args)
        if moment == "after it is summed":
            step()
        return checksum

    def writing(*args: Any) -> None:
        if moment == "when written":
            step()
        write_all(*args)

    monkeypatch.setattr(zlib, "crc32", summing)
    monkeypatch.setattr(data, "write_all", writing)
    fn.save(path, tensors)
    monkeypatch.undo()
    for mapped in (False, True):
        assert all(map(of_one_step, fn.load(path, mmap=mapped)))


def test_training_goes_on_in_another_thread(path: Path) -> None:
    tree = {"large": large(), "small": [torch.zeros(7), torch.zeros(1, dtype=torch.int64)]}
    done = threading.Event()

    def train() -> None:
        while not done.is_set():
            tree["large"].add_(1)
            for tensor in tree["small"]:
                tensor.add_(1)

    thread = threading.Thread(target=train)
    thread.start()
    try:
        for _ in range(10):
            fn.save(path, tree)
            fn.load(path)
    finally:
        done.set()
        thread.join()


CHANGES: dict[str, Callable[[torch.Tensor], Any]] = {
    "transposed": lambda x: x.t_(),
    "resized": lambda x: x.resize_(7),
    "grown": lambda x: x.resize_(9, 9),
    "other data": lambda x: setattr(x, "data", torch.ones(5)),
    "set": lambda x: x.set_(torch.ones(3, 2)),
}


@pytest.mark.parametrize("case", CHANGES)
def test_a_tensor_that_gets_another_shape_meanwhile(
    case: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.arange(12.0).reshape(3, 4)
    expected, create = x.clone(), atomic._create

    def changing(*args: Any) -> Any:
        CHANGES[case](x)
        return create(*args)

    monkeypatch.setattr(atomic, "_create", changing)
    fn.save(path, [x])
    assert torch.equal(fn.load(path)[0], expected)


def test_memory_that_is_freed_meanwhile_is_refused(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fn.save(path, "old")
    x, create = torch.ones(3, 4), atomic._create

    def freeing(*args: Any) -> Any:
        x.untyped_storage().resize_(8)
        return create(*args)

    monkeypatch.setattr(atomic, "_create", freeing)
    with pytest.raises(ValueError, match=r"^w: expected memory for all its values, 48 bytes"):
        fn.save(path, {"w": x})
    monkeypatch.undo()
    assert fn.load(path) == "old"
    assert litter(path) == []
    with pytest.raises(ValueError, match=r"^w: expected memory .* got a storage of 8"):
        fn.save(path, {"w": x})


# --- Order of what reaches the disk


def test_data_is_on_the_disk_before_the_name_and_the_name_before_save_returns(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        events.append("folder" if is_folder else f"file of {os.fstat(descriptor).st_size}")
        fsync(descriptor)

    def spy_replace(source: Any, target: Any) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", spy_fsync)
    monkeypatch.setattr(os, "replace", spy_replace)
    fn.save(path, torch.ones(3))
    assert events == [f"file of {path.stat().st_size}", "rename", "folder"]


# --- What fails


def fail(number: int) -> Callable[..., Any]:
    def failing(*args: Any, **kwargs: Any) -> Any:
        raise OSError(number, os.strerror(number))

    return failing


def expect_the_old_file(path: Path, owner: Any, function: str, failing: Any, number: int) -> None:
    """Save with a function that fails. The error names the file, which stays as it was."""
    fn.save(path, "old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, function, failing)
        with pytest.raises(OSError, match=f"save: {os.strerror(number)}: '{path}'") as error:
            fn.save(path, "new")
    assert error.value.errno == number
    assert fn.load(path) == "old"
    assert litter(path) == []


def test_a_full_disk_leaves_the_old_file(path: Path) -> None:
    fn.save(path, "old")
    old_limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, old_limit[1]))
    try:
        with pytest.raises(OSError, match=f"save: File too large: '{path}'"):
            fn.save(path, torch.zeros(10**6))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old_limit)
    assert fn.load(path) == "old"
    assert litter(path) == []


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="needs Linux's /dev/full")
def test_no_space_left(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fn.save(path, "old")
    create = atomic._create

    def on_a_full_disk(target: Path, mode: int | None) -> Any:
        temporary, file = create(target, mode)
        file.close()
        return temporary, open("/dev/full", "r+b", buffering=0)

    monkeypatch.setattr(atomic, "_create", on_a_full_disk)
    with pytest.raises(OSError, match=f"save: No space left on device: '{path}'"):
        fn.save(path, "new")
    assert fn.load(path) == "old"
    assert litter(path) == []


def test_an_interrupt_leaves_the_old_file(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fn.save(path, "old")

    def interrupt(*args: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fn.save(path, "new")
    assert fn.load(path) == "old"
    assert litter(path) == []


def test_a_folder_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="path of a file, got a folder"):
        fn.save(tmp_path, ())
    for path in (f"{tmp_path}/new/", f"{tmp_path}/new/.", os.fsencode(f"{tmp_path}/new/.")):
        with pytest.raises(IsADirectoryError, match="path of a file, got a folder"):
            fn.save(path, ())  # `load` would not find a file called "new"
    assert os.listdir(tmp_path) == []
    with pytest.raises(FileNotFoundError, match=r"save: No such file.*missing/tree"):
        fn.save(tmp_path / "missing" / "tree", ())
    with pytest.raises(OSError, match="a regular file"):
        fn.save("/dev/null", ())
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError):
        fn.save(tmp_path / "file" / "tree", ())


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_without_permission_the_old_file_stays(path: Path) -> None:
    fn.save(path, "old")
    path.parent.chmod(0o500)
    try:
        with pytest.raises(PermissionError):
            fn.save(path, "new")
    finally:
        path.parent.chmod(0o700)
    path.chmod(0o400)
    with pytest.raises(PermissionError, match="write-protected"):
        fn.save(path, "new")
    assert fn.load(path) == "old"
    assert litter(path) == []


def test_a_folder_that_may_be_written_but_not_listed(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor can it be opened for an fsync, and the file is in place by then."""
    os_open = os.open

    def refuse_folders(name: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if os.path.isdir(name):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), name)
        return os_open(name, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse_folders)
    fn.save(path, "new")
    assert fn.load(path) == "new"


def test_errors_name_paths_of_any_kind(tmp_path: Path) -> None:
    class Somewhere:
        def __fspath__(self) -> str:
            return str(tmp_path / "missing" / "tree")

    with pytest.raises(FileNotFoundError, match="missing/tree"):
        fn.save(Somewhere(), ())


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC])
def test_a_file_system_that_refuses(number: int, path: Path) -> None:
    os_open = os.open

    def refuse_to_create(name: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), name)
        return os_open(name, flags, *args, **kwargs)

    expect_the_old_file(path, os, "open", refuse_to_create, number)


UNSUPPORTED = {
    name: getattr(errno, name) for name in ("EINVAL", "ENOTSUP", "ENOSYS", "EPERM", "EACCES")
}


def at_a_folder(function: str, number: int) -> Callable[..., Any]:
    """A function of os that fails for folders alone."""
    real = getattr(os, function)

    def failing(target: Any, *args: Any, **kwargs: Any) -> Any:
        if os.path.isdir(target):
            raise OSError(number, os.strerror(number))
        return real(target, *args, **kwargs)

    return failing


def without_flag(flag: int, number: int) -> Callable[..., Any]:
    os_open = os.open

    def failing(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & flag:
            raise OSError(number, os.strerror(number), path)
        return os_open(path, flags, *args, **kwargs)

    return failing


OPTIONAL: dict[str, Callable[[int], tuple[Any, str, Callable[..., Any]]]] = {
    "fsync of a folder": lambda number: (os, "fsync", at_a_folder("fsync", number)),
    "opening a folder": lambda number: (os, "open", at_a_folder("open", number)),
    "listing a folder": lambda number: (os, "scandir", fail(number)),
    "fsync": lambda number: (os, "fsync", fail(number)),
    "chmod": lambda number: (os, "chmod", fail(number)),
    "locks": lambda number: (fcntl, "flock", fail(number)),
    "maps": lambda number: (mmap, "mmap", fail(number)),
    "O_NONBLOCK": lambda number: (os, "open", without_flag(os.O_NONBLOCK, number)),
}


@pytest.mark.parametrize("number", UNSUPPORTED.values(), ids=UNSUPPORTED)
@pytest.mark.parametrize("what", OPTIONAL)
def test_what_a_file_system_lacks_is_left_out(
    what: str, number: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(*OPTIONAL[what](number))
    fn.save(path, [torch.zeros(3)])
    fn.save(path, [torch.arange(3.0)])
    for mapped in (False, True):
        assert torch.equal(fn.load(path, mmap=mapped)[0], torch.arange(3.0))
    checkpoints = fn.Checkpoints(path.parent / "new" / "run", keep=1)
    for step in range(2):
        checkpoints.save(step, "checkpoint")
    assert checkpoints.latest() == (1, "checkpoint")
    assert len(os.listdir(checkpoints.folder)) == 1
    assert sorted(os.listdir(path.parent)) == ["new", path.name]


@pytest.mark.parametrize("number", [errno.ENODEV, errno.ENOMEM, errno.ENFILE])
def test_files_that_cannot_be_mapped_are_read(
    number: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fn.save(path, torch.arange(3.0))
    monkeypatch.setattr(mmap, "mmap", fail(number))
    assert torch.equal(fn.load(path, mmap=True), torch.arange(3.0))


def test_a_lock_that_is_never_given(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fcntl, "flock", fail(errno.EAGAIN))
    fn.save(path, "new")
    assert fn.load(path) == "new"
    assert litter(path) == []


def test_files_whose_numbers_change(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some file systems number a file anew each time it is asked about."""
    monkeypatch.setattr(os.path, "samestat", lambda *_: False)
    fn.save(path, "new")
    assert fn.load(path) == "new"
    assert litter(path) == []


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.EROFS])
@pytest.mark.parametrize(
    ("owner", "function"),
    [(os, "fsync"), (os, "chmod"), (os, "replace"), (os, "open"), (Path, "stat")],
)
def test_what_is_needed_and_fails_leaves_the_old_file(
    owner: Any, function: str, number: int, path: Path
) -> None:
    expect_the_old_file(path, owner, function, fail(number), number)


@pytest.mark.parametrize("number", [errno.EMFILE, errno.EIO])
def test_a_folder_that_cannot_be_opened_leaves_the_old_file(number: int, path: Path) -> None:
    expect_the_old_file(path, os, "open", at_a_folder("open", number), number)


def test_an_error_while_removing_what_was_begun_does_not_hide_the_first(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", fail(errno.EIO))
    monkeypatch.setattr(os, "unlink", fail(errno.EPERM))
    with pytest.raises(OSError, match="save: Input/output error"):
        fn.save(path, "new")


@pytest.mark.parametrize("supported", [True, False])
def test_on_macos_the_cache_of_the_drive_is_flushed(
    supported: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flushed, fsync = [], os.fsync

    def fully(file: int, command: int) -> None:
        flushed.append(command)
        if not supported:
            raise OSError(errno.ENOTSUP, "not supported")

    def partly(file: int) -> None:
        flushed.append("folder" if stat.S_ISDIR(os.fstat(file).st_mode) else "file")
        fsync(file)

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", fully)
    monkeypatch.setattr(os, "fsync", partly)
    fn.save(path, "new")
    assert flushed == ([51, "folder"] if supported else [51, "file", "folder"])


def test_a_write_that_takes_nothing_is_an_error(path: Path) -> None:
    class Full(io.RawIOBase):
        def write(self, _: Any) -> int:
            return 0

    with pytest.raises(OSError, match="expected 3 more bytes to be written, got none"):
        data.write_all(Full(), b"abc")


@pytest.mark.parametrize("load", [fn.load, fn.load_model, fn.inspect])
def test_an_error_of_reading_names_the_file(
    load: Callable[..., Any], path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fn.save_model(path, fn.ReLU(), ())
    with monkeypatch.context() as patch:
        patch.setattr(os, "fstat", fail(errno.EIO))
        with pytest.raises(OSError) as error:  # noqa: PT011 - `patch` ends before it is examined
            load(path)
    assert str(error.value) == f"[Errno {errno.EIO}] Input/output error: '{path}'"


# --- On Windows, where no file can be locked, and none that is open can be replaced


@pytest.fixture
def on_windows(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds that were waited for."""
    waited: list[float] = []
    monkeypatch.setattr(atomic, "fcntl", None)
    monkeypatch.setattr(time, "sleep", waited.append)
    return waited


def refusing(times: int, call: Callable[..., Any]) -> Callable[..., Any]:
    """A function that Windows refuses so many times."""
    refusals = iter(range(times))

    def refused(*args: Any, **kwargs: Any) -> Any:
        if next(refusals, None) is not None:
            raise PermissionError(errno.EACCES, "Access is denied")
        return call(*args, **kwargs)

    return refused


@pytest.mark.usefixtures("on_windows")
def test_a_save_leaves_anothers_file_alone_where_there_are_no_locks(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace = os.replace

    def saving_first(temporary: Path, target: Path) -> None:
        monkeypatch.setattr(os, "replace", replace)
        fn.save(path, "meanwhile")
        replace(temporary, target)

    monkeypatch.setattr(os, "replace", saving_first)
    fn.save(path, "new")
    assert fn.load(path) == "new"
    assert litter(path) == []


@pytest.mark.usefixtures("on_windows")
def test_an_hour_later_a_file_is_abandoned_where_there_are_no_locks(path: Path) -> None:
    old, young = (path.with_name(f".{path.name}.{i:016x}.tmp") for i in range(2))
    for file in (old, young):
        file.touch()
    os.utime(old, (time.time() - 3700,) * 2)
    fn.save(path, ())
    assert litter(path) == [young.name]


@pytest.mark.parametrize("function", ["replace", "open"])
def test_a_file_that_is_busy_for_a_moment(
    function: str, path: Path, on_windows: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    fn.save(path, "old")
    monkeypatch.setattr(os, function, refusing(4, getattr(os, function)))
    assert function == "open" or fn.save(path, "old") is None
    assert fn.load(path) == "old"
    assert on_windows == sorted(on_windows)
    assert len(on_windows) == 4


def test_a_file_that_stays_open(path: Path, on_windows: list[float]) -> None:
    message = f"save: Access is denied: a program has the old file open.*'{path}'"
    fn.save(path, "old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "replace", refusing(99, os.replace))
        with pytest.raises(PermissionError, match=message):
            fn.save(path, "new")
    assert fn.load(path) == "old"
    assert litter(path) == []
    assert sum(on_windows) == pytest.approx(0.5)


def test_elsewhere_what_is_refused_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "replace", refusing(1, os.replace))
    with pytest.raises(PermissionError, match=f"save: Access is denied: '{path}'"):
        fn.save(path, "new")


# --- Modes and links


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o027])
def test_a_new_file_has_the_mode_of_the_umask(umask: int, path: Path) -> None:
    before = os.umask(umask)
    try:
        fn.save(path, ())
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o777])
def test_the_mode_of_the_old_file_is_kept(mode: int, path: Path) -> None:
    fn.save(path, "old")
    path.chmod(mode)
    fn.save(path, "new")
    assert stat.S_IMODE(path.stat().st_mode) == mode


def test_the_new_file_is_never_more_open_than_the_old(path: Path) -> None:
    fn.save(path, "old")
    path.chmod(0o600)
    with atomic.replacing(path) as file:
        assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o600


def test_symbolic_links_stay(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    target, link, dangling = (
        tmp_path / "folder" / "target",
        tmp_path / "link",
        tmp_path / "dangling",
    )
    fn.save(target, "old")
    link.symlink_to(target)
    dangling.symlink_to("folder/new")
    fn.save(link, "new")
    fn.save(dangling, "newer")
    assert link.is_symlink()
    assert dangling.is_symlink()
    assert (fn.load(target), fn.load(tmp_path / "folder" / "new")) == ("new", "newer")
    assert os.listdir(tmp_path / "folder") in (["target", "new"], ["new", "target"])


def test_other_hard_links_keep_the_old_tree(tmp_path: Path) -> None:
    fn.save(tmp_path / "a", "old")
    os.link(tmp_path / "a", tmp_path / "b")
    fn.save(tmp_path / "a", "new")
    assert (fn.load(tmp_path / "a"), fn.load(tmp_path / "b")) == ("new", "old")


def test_a_file_may_be_replaced_by_what_is_mapped_from_it(path: Path) -> None:
    fn.save(path, torch.arange(1000.0))
    tensor = fn.load(path, mmap=True)
    fn.save(path, tensor.reshape(10, 100))
    assert torch.equal(fn.load(path).flatten(), torch.arange(1000.0))
    assert torch.equal(tensor, torch.arange(1000.0))


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("more", [-100, 100])
def test_a_file_that_changes_after_its_header_was_read(
    mapped: bool, more: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = torch.arange(100_000.0)  # more than Python reads ahead with the header
    fn.save(path, expected)
    begin = data._map if mapped else data._one_ahead

    def changed(argument: Any) -> Any:
        os.truncate(path, size + more)
        return begin(argument)

    size = path.stat().st_size
    monkeypatch.setattr(data, begin.__name__, changed)
    if more > 0 and not mapped:
        assert torch.equal(fn.load(path, mmap=mapped), expected)
    else:
        with pytest.raises(fn.CheckpointError, match=r"the file (changed|was truncated) while"):
            fn.load(path, mmap=mapped)


@pytest.mark.parametrize("is_windows", [False, True])
def test_large_files_are_mapped_where_a_mapped_file_can_be_replaced(
    is_windows: bool, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fn.save(path, torch.arange(1000.0))
    monkeypatch.setattr(files, "MAPPED_FROM", 4000)
    if is_windows:
        monkeypatch.setattr(atomic, "fcntl", None)
    mapped, mmap_ = [], mmap.mmap
    monkeypatch.setattr(mmap, "mmap", lambda *a, **k: mapped.append(a) or mmap_(*a, **k))
    assert torch.equal(fn.load(path), torch.arange(1000.0))
    assert bool(mapped) != is_windows


def test_saving_ignores_a_signal_handler_that_returns(path: Path) -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        fn.save(path, torch.ones(10**6))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert fn.load(path).sum() == 10**6
