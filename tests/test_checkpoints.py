"""Checkpoints: the last few, the way back past damage, and other files left alone."""

import errno
import mmap
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_properties import same

import funcnet as fn
from funcnet import tree as trees
from funcnet.checkpoint import atomic, files
from funcnet.checkpoint import checkpoints as module


def tree(step):
    return {"params": (torch.full((3,), float(step)),), "epoch": step}


def names(checkpoints):
    return sorted(os.listdir(checkpoints.folder))


def path_of(checkpoints, step):
    return os.path.join(checkpoints.folder, f"step-{step:08d}.safetensors")


def flip(path, position=-1):
    with open(path, "r+b") as file:
        file.seek(position, os.SEEK_END)
        byte = file.read(1)
        file.seek(position, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))


def truncate(path):
    os.truncate(path, os.path.getsize(path) - 1)


def empty(path):
    os.truncate(path, 0)


def dangle(path):
    os.remove(path)
    os.symlink(path + ".gone", path)


def folder(path):
    os.remove(path)
    os.mkdir(path)


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=8, unique=True), st.integers(1, 4))
def test_the_last_few_are_kept(tmp_path_factory, steps, keep):
    """In the order of their numbers, however many digits they have."""
    checkpoints = fn.Checkpoints(tmp_path_factory.mktemp("run") / "new" / "folder", keep=keep)
    assert checkpoints.latest() is None
    for step in sorted(steps):
        checkpoints.save(step, tree(step))
        found, loaded = checkpoints.latest()
        assert found == step
        assert loaded["epoch"] == step
        assert same(loaded["params"], tree(step)["params"])
    assert len(names(checkpoints)) == min(keep, len(steps))
    for step in sorted(steps)[-keep:]:
        assert fn.inspect(path_of(checkpoints, step)).metadata == {"step": step}


def test_other_files_are_left_alone(tmp_path):
    others = ["model.safetensors", "step-1.safetensors", "step-000000001.safetensors", "notes.txt"]
    others += ["step-00000001.safetensors.bak", "step-0000001x.safetensors", "my-step-00000001"]
    for name in others:
        (tmp_path / name).write_text("mine")
    checkpoints = fn.Checkpoints(tmp_path, keep=1)
    assert checkpoints.latest() is None
    for step in range(3):
        checkpoints.save(step, tree(step))
    assert names(checkpoints) == sorted([*others, "step-00000002.safetensors"])
    assert all((tmp_path / name).read_text() == "mine" for name in others)


@pytest.mark.parametrize("damage", [flip, truncate, empty, dangle, folder])
def test_damaged_files_are_passed_over_and_named(tmp_path, damage):
    checkpoints = fn.Checkpoints(tmp_path)
    for step in range(3):
        checkpoints.save(step, tree(step))
    for step in (2, 1):
        damage(path_of(checkpoints, step))
        with pytest.warns(RuntimeWarning, match="Checkpoints: passing over a damaged file") as log:
            assert checkpoints.latest()[0] == step - 1
        assert path_of(checkpoints, step) in str(log[-1].message)
        assert log[0].filename == __file__
    damage(path_of(checkpoints, 0))
    with pytest.warns(RuntimeWarning):
        assert checkpoints.latest() is None


@pytest.mark.parametrize("damage", [truncate, empty])
def test_a_damaged_newer_file_does_not_push_out_the_good_ones(tmp_path, damage):
    """A run that resumes before the damage goes on, and keeps what it resumed from."""
    checkpoints = fn.Checkpoints(tmp_path, keep=2)
    for step in (10, 20, 30, 40):
        checkpoints.save(step, tree(step))
        if step >= 30:
            damage(path_of(checkpoints, step))
    checkpoints.save(25, tree(25))
    with pytest.warns(RuntimeWarning):
        assert checkpoints.latest()[0] == 25
    damage(path_of(checkpoints, 25))
    with pytest.warns(RuntimeWarning):
        assert checkpoints.latest()[0] == 20
    checkpoints.save(30, tree(30))
    with pytest.warns(RuntimeWarning):
        assert checkpoints.latest()[0] == 30
    assert os.path.exists(path_of(checkpoints, 20))


def test_later_files_whose_bits_are_wrong_do_not_push_out_the_good_ones(tmp_path):
    """Their headers are right, and only `latest` reads the rest."""
    checkpoints = fn.Checkpoints(tmp_path, keep=3)
    for step in (20, 30, 40):
        checkpoints.save(step, tree(step))
    for step in (30, 40):
        flip(path_of(checkpoints, step))
    for step in (25, 26):
        checkpoints.save(step, tree(step))
    assert [fn.load(path_of(checkpoints, step))["epoch"] for step in (20, 25, 26)] == [20, 25, 26]
    with pytest.warns(RuntimeWarning):
        assert checkpoints.latest()[0] == 26


@pytest.mark.parametrize("age", [0, 3600])
@pytest.mark.parametrize("is_the_same", [True, False])
def test_earlier_files_whose_bits_are_wrong_are_not_counted(tmp_path, is_the_same, age):
    """Of those that a save keeps, all can be loaded, even if they became damaged since."""
    checkpoints = fn.Checkpoints(tmp_path, keep=2)
    for step in (10, 20, 30):
        checkpoints.save(step, tree(step))
        then = os.stat(path_of(checkpoints, step)).st_mtime - age
        os.utime(path_of(checkpoints, step), (then, then))
    flip(path_of(checkpoints, 30))
    if not is_the_same:
        checkpoints = fn.Checkpoints(tmp_path, keep=2)
    checkpoints.save(40, tree(40))
    assert [fn.load(path_of(checkpoints, step))["epoch"] for step in (20, 40)] == [20, 40]
    checkpoints.save(50, tree(50))
    assert [fn.load(path_of(checkpoints, step))["epoch"] for step in (40, 50)] == [40, 50]
    assert not os.path.exists(path_of(checkpoints, 20))


def test_a_file_is_verified_once(tmp_path, monkeypatch):
    checkpoints, verified = fn.Checkpoints(tmp_path, keep=9), []
    verify = module._matches_its_checksums

    def spy(path):
        verified.append(path.name)
        return verify(path)

    monkeypatch.setattr(module, "_matches_its_checksums", spy)
    for step in range(4):
        checkpoints.save(step, tree(step))
        os.utime(path_of(checkpoints, step), (0, 0))
    assert verified == [f"step-0000000{step}.safetensors" for step in range(3)]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_a_disk_that_fails_to_read_is_passed_over(tmp_path, monkeypatch, number):
    """ESTALE tells that another computer has removed a file on a disk of the network."""
    checkpoints = fn.Checkpoints(tmp_path)
    for step in range(2):
        checkpoints.save(step, tree(step))
    bad, opened = OSError(number, os.strerror(number), path_of(checkpoints, 1)), module.opened

    def opening(path):
        if path.name == "step-00000001.safetensors":
            raise bad
        return opened(path)

    monkeypatch.setattr(module, "opened", opening)
    with pytest.warns(RuntimeWarning, match=f"passing over .*{bad.strerror}: .*step-00000001"):
        assert checkpoints.latest()[0] == 0
    bad.errno = errno.EACCES
    with pytest.raises(OSError, match="step-00000001"):
        checkpoints.latest()


def test_no_file_is_mapped(tmp_path, monkeypatch):
    """A disk that fails to read a mapped file, or another program that cuts it, ends the process.

    Windows can neither remove nor replace a file that is mapped.
    """
    for step in range(3):
        fn.Checkpoints(tmp_path).save(step, torch.zeros(2))
    monkeypatch.setattr(files, "MAPPED_FROM", 0)
    monkeypatch.setattr(mmap, "mmap", lambda *_, **__: pytest.fail("mapped"))
    checkpoints = fn.Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest()[0] == 2
    checkpoints.save(3, torch.zeros(2))
    assert names(checkpoints) == ["step-00000002.safetensors", "step-00000003.safetensors"]


def test_an_earlier_file_that_cannot_be_removed_is_named(tmp_path, monkeypatch):
    checkpoints = fn.Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, tree(1))

    def busy(path, *args, **kwargs):
        raise OSError(errno.EBUSY, os.strerror(errno.EBUSY), os.fspath(path))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", busy)
        with pytest.warns(RuntimeWarning, match="could not remove .*step-00000001") as log:
            checkpoints.save(2, tree(2))
    assert log[0].filename == __file__
    assert checkpoints.latest()[0] == 2


@pytest.mark.parametrize("step", [7, 10**12, 10**40])
def test_what_a_killed_save_of_another_step_left_is_cleared(tmp_path, step):
    checkpoints = fn.Checkpoints(tmp_path)
    left = tmp_path / f".{f'step-{step:08d}.safetensors'[:32]}.0123456789abcdef.tmp"
    others = [tmp_path / name for name in (".model.0123456789abcdef.tmp", ".step-00000007.tmp")]
    for path in (left, *others):
        path.write_text("half")
    checkpoints.save(8, tree(8))
    assert not left.exists()
    assert all(path.exists() for path in others)
    assert checkpoints.latest()[0] == 8
    with atomic.replacing(path_of(checkpoints, 9)):  # in use
        checkpoints.save(10, tree(10))


def test_a_new_folder_is_on_the_disk(tmp_path, monkeypatch):
    flushed = []
    fsync = os.fsync

    def spy(descriptor):
        flushed.append(os.fstat(descriptor).st_ino)
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", spy)
    fn.Checkpoints(tmp_path / "new" / "run").save(1, tree(1))
    made = (tmp_path, tmp_path / "new", tmp_path / "new" / "run")
    assert {path.stat().st_ino for path in made} <= set(flushed)


def test_a_run_that_begins_again_keeps_what_it_saves(tmp_path):
    checkpoints = fn.Checkpoints(tmp_path, keep=1)
    checkpoints.save(100, tree(100))
    checkpoints.save(5, tree(5))
    assert os.path.exists(path_of(checkpoints, 5))
    checkpoints.save(6, tree(6))
    assert names(checkpoints) == ["step-00000006.safetensors", "step-00000100.safetensors"]


def test_a_save_that_fails_removes_nothing(tmp_path):
    checkpoints = fn.Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, tree(1))
    with pytest.raises(TypeError, match="bad: expected a tensor"):
        checkpoints.save(2, {"bad": object()})
    assert names(checkpoints) == ["step-00000001.safetensors"]


class Moments(NamedTuple):
    first: Any


def test_a_class_that_is_not_registered_is_no_damage(tmp_path, monkeypatch):
    checkpoints = fn.Checkpoints(tmp_path)
    checkpoints.save(1, tree(1))
    monkeypatch.setattr(trees, "_registered", dict(trees._registered))
    fn.register_node(Moments)
    checkpoints.save(2, Moments(torch.ones(1)))
    assert same(checkpoints.latest()[1], Moments(torch.ones(1)))
    monkeypatch.setattr(trees, "_registered", {})
    with pytest.raises(fn.CheckpointError, match="before loading"):
        checkpoints.latest()


def test_what_another_process_removes_meanwhile(tmp_path, monkeypatch):
    mine, other = fn.Checkpoints(tmp_path, keep=1), fn.Checkpoints(tmp_path, keep=1)
    mine.save(1, tree(1))
    listed = fn.Checkpoints._files
    calls = []

    def list_and_lose(self):
        files = listed(self)
        if not calls:
            calls.append(1)
            other.save(2, tree(2))
        return files

    monkeypatch.setattr(fn.Checkpoints, "_files", list_and_lose)
    assert mine.latest()[0] == 2
    calls.clear()
    mine.save(3, tree(3))
    assert mine.latest()[0] == 3


def test_two_processes_at_the_same_time(tmp_path):
    """Neither fails, and every file that stays is whole."""
    script = (
        "import sys, torch, funcnet as fn\n"
        "checkpoints = fn.Checkpoints(sys.argv[1], keep=2)\n"
        "for step in range(int(sys.argv[2]), 30, 2):\n"
        "    checkpoints.save(step, [torch.full((1000,), float(step))])\n"
        "    assert checkpoints.latest() is not None\n"
    )
    processes = [
        subprocess.Popen([sys.executable, "-W", "error", "-c", script, str(tmp_path), str(first)])
        for first in (0, 1)
    ]
    assert [process.wait() for process in processes] == [0, 0]
    checkpoints = fn.Checkpoints(tmp_path, keep=2)
    assert checkpoints.latest()[0] == 29
    assert all(fn.inspect(tmp_path / name) for name in names(checkpoints))


def test_a_tree_like_another(tmp_path):
    """Its memory formats are those of `like`; what is whole and differs is no damage."""
    columns = torch.arange(6.0).reshape(3, 2).t()
    checkpoints = fn.Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.save(step, (columns, step))
    assert checkpoints.latest()[1][0].stride() == (3, 1)
    for like in ((torch.zeros_like(columns), 0), (torch.empty_like(columns, device="meta"), 0)):
        step, (loaded, at) = checkpoints.latest(like)
        assert (step, at, loaded.stride()) == (2, 2, (1, 2))
        assert torch.equal(loaded, columns)
    for like, words in {
        (columns.double(), 0): "1 place(s):\n  0: expected torch.float64, got torch.float32",
        (columns.t(), None): "2 place(s):\n  0: expected shape (3, 2), got (2, 3)\n  1: expected",
    }.items():
        with pytest.raises(fn.CheckpointError) as error:
            checkpoints.latest(like=like)
        where = f"{path_of(checkpoints, 2)}: differs from like in "
        assert str(error.value).startswith(where + words)
    flip(path_of(checkpoints, 2))
    with pytest.warns(RuntimeWarning, match="passing over a damaged file"):
        assert checkpoints.latest((columns, 0))[0] == 1


def test_a_device(tmp_path, device):
    checkpoints = fn.Checkpoints(tmp_path)
    checkpoints.save(1, tree(1))
    assert checkpoints.latest(device=device)[1]["params"][0].device.type == device


def test_what_is_remembered_of_files_goes_with_them(tmp_path):
    checkpoints = fn.Checkpoints(tmp_path, keep=1)
    for step in range(5):
        checkpoints.save(step, tree(step))
        os.utime(path_of(checkpoints, step), (0, 0))  # what has just been written is not remembered
        checkpoints.save(step + 1, tree(step))
    assert len(checkpoints.__dict__.get("_verified", ())) <= 1


def test_they_are_values(tmp_path):
    checkpoints = fn.Checkpoints(tmp_path, keep=2)
    assert checkpoints == fn.Checkpoints(str(tmp_path), 2) != fn.Checkpoints(tmp_path)
    assert hash(checkpoints) == hash(fn.Checkpoints(str(tmp_path), 2))
    assert repr(checkpoints) == f"Checkpoints({str(tmp_path)!r}, keep=2)"
    assert pickle.loads(pickle.dumps(checkpoints)) == checkpoints


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fn.Checkpoints(3), TypeError, "Checkpoints: expected folder to be a path, got 3"),
        (lambda: fn.Checkpoints("a", keep=0), ValueError, "Checkpoints: expected keep >= 1, got 0"),
        (lambda: fn.Checkpoints("a").save(-1, ()), ValueError, "expected step >= 0, got -1"),
        (
            lambda: fn.Checkpoints("a").save(10**25, ()),
            ValueError,
            rf"^Checkpoints: expected step < 2\*\*63, got {10**25}$",
        ),
        (lambda: fn.Checkpoints("a").save(1.0, ()), TypeError, "expected step to be an int"),
    ],
)
def test_bad_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()
    assert not os.path.exists("a")
