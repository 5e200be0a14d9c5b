"""Whatever happens during a save, there is the old file or the new one, whole, and no litter."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import funcnet as fn
from funcnet.checkpoint import atomic

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


@pytest.mark.parametrize("function", ["fsync", "replace"])
def test_a_failing_disk_leaves_the_old_file(
    function: str, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fn.save(path, "old")
    monkeypatch.setattr(os, function, fail(errno.EIO))
    with pytest.raises(OSError, match=rf"save: Input/output error: '{path}'"):
        fn.save(path, "new")
    monkeypatch.undo()
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
def test_a_file_system_that_refuses(
    number: int, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fn.save(path, "old")
    os_open = os.open

    def refuse_to_create(name: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(number, os.strerror(number), name)
        return os_open(name, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse_to_create)
    with pytest.raises(OSError, match=f"save: {os.strerror(number)}: '{path}'") as error:
        fn.save(path, "new")
    assert error.value.errno == number
    monkeypatch.undo()
    assert fn.load(path) == "old"
    assert litter(path) == []


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


def test_saving_ignores_a_signal_handler_that_returns(path: Path) -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.001, 0.001)
    try:
        fn.save(path, torch.ones(10**6))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert fn.load(path).sum() == 10**6
