"""Loading against an expectation, in part, in another dtype; and inspecting."""

from __future__ import annotations

import errno
import os
import re
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoint_trees import Moments, same, trees
from hypothesis import given

import funcnet as fn
from funcnet.__main__ import main


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tree.safetensors"


def refusal(path: Path, like: Any, **options: Any) -> list[str]:
    with pytest.raises(fn.CheckpointError) as error:
        fn.load(path, like=like, **options)
    first, *lines = str(error.value).splitlines()
    assert first == f"{path}: differs from like in {len(lines)} place(s):"
    return [line.strip() for line in lines]


def test_every_path_that_differs_is_named(path: Path) -> None:
    fn.save(path, {"a": torch.zeros(2), "b": (torch.zeros(3), 1), "c": None, "d": [], "e": "x"})
    like = {"a": torch.zeros(2).int(), "b": [torch.zeros(1, 3), 2.0], "c": None, "d": {}, "f": ()}
    assert refusal(path, like) == [
        "a: expected torch.int32, got torch.float32",
        "b: expected list, got tuple",
        "b.0: expected shape (1, 3), got (3,)",
        "b.1: expected float, got int",
        "d: expected dict, got list",
        "f: expected tuple, got nothing",
        "e: expected nothing, got str",
    ]


@pytest.mark.parametrize(
    ("tree", "like"),
    [
        ((), []),
        ({}, OrderedDict()),
        (None, ()),
        (1, True),
        (None, ""),
        ({1: ()}, {"1": ()}),
        ((1, 2), Moments(1, 2)),
        (fn.ReLU(), fn.Sigmoid()),
        (torch.zeros(()), 0.0),
        (torch.zeros(()), torch.zeros(1)),
        (torch.zeros(1).half(), torch.zeros(1).bfloat16()),
        ([1], [1, 1]),
        ([1, 1], [1]),
    ],
    ids=repr,
)
def test_another_structure_shape_or_dtype_is_refused(tree: Any, like: Any, path: Path) -> None:
    fn.save(path, tree)
    assert refusal(path, like)


def test_values_and_the_order_of_a_dict_may_differ(path: Path) -> None:
    fn.save(path, {"a": torch.zeros(2), "b": [1, "x", 0.5, True]})
    like = {"b": [2, "y", 1.5, False], "a": torch.ones(2)}
    assert list(fn.load(path, like=like)) == ["a", "b"]


@given(tree=trees())
def test_what_inspect_gives_may_be_expected(
    tree: Any, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "inspected"
    fn.save(path, tree)
    assert same(fn.load(path, like=fn.inspect(path).structure), tree)


def test_dtype_converts_floating_tensors_only(path: Path) -> None:
    tree = {
        "w": torch.ones(2, dtype=torch.float64),
        "n": torch.ones(2, dtype=torch.int32),
        "x": 0.1,
    }
    fn.save(path, tree)
    back = fn.load(path, dtype=torch.bfloat16)
    assert (back["w"].dtype, back["n"].dtype, back["x"]) == (torch.bfloat16, torch.int32, 0.1)
    like = tree | {"w": torch.ones(2)}
    assert refusal(path, like) == ["w: expected torch.float32, got torch.float64"]
    assert fn.load(path, like=like, dtype=torch.float32)["w"].dtype == torch.float32
    with pytest.raises(TypeError, match=r"expected a floating-point dtype, got torch\.int32"):
        fn.load(path, dtype=torch.int32)


@pytest.mark.skipif(not hasattr(torch, "float4_e2m1fn_x2"), reason="PyTorch has no float4")
def test_a_dtype_that_does_not_convert_is_refused_by_name(path: Path) -> None:
    packed = torch.zeros(2, dtype=torch.uint8).view(torch.float4_e2m1fn_x2)
    for tensor, dtype in ((torch.ones(2), packed.dtype), (packed, torch.float32)):
        fn.save(path, {"w": tensor})
        message = f"that PyTorch converts {tensor.dtype} to, got {dtype} at w"
        with pytest.raises(TypeError, match=re.escape(message)):
            fn.load(path, dtype=dtype)


def test_partial_loading_says_what_it_skipped(path: Path) -> None:
    fn.save(path, {"same": torch.ones(2), "shape": torch.ones(3), "gone": 1, "n": 5, "t": (1,)})
    like = {
        "same": torch.zeros(2),
        "shape": torch.zeros(2),
        "new": torch.zeros(1),
        "n": 0,
        "t": [2],
    }
    tree, skipped = fn.load(path, like=like, strict=False)
    expected = like | {"same": torch.ones(2), "n": 5, "t": [1]}
    assert same(tree, expected)
    assert skipped == {
        "shape": "expected shape (2,), got (3,)",
        "new": "expected a tensor of torch.float32 and shape (1,), got nothing",
        "t": "expected list, got tuple",
        "gone": "expected nothing, got int",
    }
    assert fn.load(path, like=fn.load(path), strict=False)[1] == {}
    with pytest.raises(ValueError, match="expected a tree `like`"):
        fn.load(path, strict=False)


def test_device(path: Path) -> None:
    fn.save(path, [torch.ones(2)])
    assert fn.load(path, device="cpu")[0].device.type == "cpu"
    assert fn.load(path, device="meta")[0].device.type == "meta"
    if torch.cuda.is_available():
        on_gpu = fn.load(path, device="cuda")
        fn.save(path, on_gpu)
        assert same(fn.load(path), [torch.ones(2)])


def test_inspect(path: Path) -> None:
    net = fn.Sequential(fn.Conv2d(2, 1), fn.ReLU())
    params = net.init(fn.key(0), (3, 4, 4))
    metadata = {"epoch": 3, "nested": [{"a": None}, 0.5, "ü"], "flag": True}
    fn.save_model(path, net, params, metadata=metadata)
    info = fn.inspect(path)
    assert info.shapes == {"0.weight": (2, 3, 1, 1), "0.bias": (2,)}
    assert info.dtypes == {"0.weight": torch.float32, "0.bias": torch.float32}
    assert info.architecture == net
    assert info.metadata == metadata
    weight = info.structure[0]["weight"]
    assert (weight.device.type, weight.shape) == ("meta", (2, 3, 1, 1))
    fn.save(path, params)
    assert (fn.inspect(path).architecture, fn.inspect(path).metadata) == (None, {})


def test_inspect_reads_no_tensor(path: Path) -> None:
    fn.save(path, torch.zeros(2**25))
    with open(path, "r+b") as file:
        file.seek(-1, 2)
        file.write(b"\xff")  # which `load` would find
    assert fn.inspect(path).shapes == {"%": (2**25,)}
    with pytest.raises(fn.CheckpointError, match="damaged in 1 of its 32 blocks"):
        fn.load(path)


def test_the_command_prints_a_table(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = fn.Sequential(fn.Conv2d(2, 1), fn.ReLU())
    params = net.init(fn.key(0), (3, 4, 4))
    fn.save_model(path, net, params, metadata={"epoch": 3})
    assert main(["inspect", str(path)]) == 0
    output = capsys.readouterr().out
    assert output.splitlines()[:4] == [
        "name      dtype    shape         elements  bytes",
        "0.weight  float32  (2, 3, 1, 1)         6     24",
        "0.bias    float32  (2,)                 2      8",
        "2 tensors, 8 elements, 32 bytes",
    ]
    code, metadata = output.split("architecture:")[1].split("metadata:")
    assert eval(code.strip(), vars(fn)) == net
    assert '"epoch": 3' in metadata


def test_the_command_prints_what_the_terminal_cannot_show(path: Path) -> None:
    fn.save(path, {"é": torch.ones(1)})
    command = [sys.executable, "-m", "funcnet", "inspect", str(path)]
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert r"\xe9" in run.stdout


def inspect_into(stdout: int, path: Path, patch: pytest.MonkeyPatch) -> int:
    """The status of the command, which prints to a descriptor. Like Python's exit, closes it."""
    with patch.context() as context, os.fdopen(stdout, "w") as file:
        context.setattr(sys, "stdout", file)
        return main(["inspect", str(path)])


@pytest.mark.parametrize("count", [1, 3000])
def test_a_reader_that_wants_only_the_beginning(
    count: int, path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As `head` does. A short table would be written as Python exits."""
    fn.save(path, [torch.ones(1) for _ in range(count)])
    reading, writing = os.pipe()
    os.close(reading)
    assert inspect_into(writing, path, monkeypatch) == 0
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(not os.access("/dev/full", os.W_OK), reason="needs Linux's /dev/full")
def test_a_full_disk_is_an_error_of_the_command(
    path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fn.save(path, [torch.ones(1)])
    assert inspect_into(os.open("/dev/full", os.O_WRONLY), path, monkeypatch) == 1
    error = f"funcnet inspect: [Errno {errno.ENOSPC}] No space left on device\n"
    assert capsys.readouterr().err == error


def test_the_command_shows_values_and_no_control_characters(
    path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fn.save(path, {"\x1b[2J": torch.ones(1), "text": "\x1b[2J", "steps": list(range(100))})
    assert main(["inspect", str(path)]) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output
    assert "steps.3 = 3" in output
    assert "more" in output


def test_the_command_refuses_other_files(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path.write_bytes(b"PK\3\4")
    assert main(["inspect", str(path)]) == 1
    assert main(["inspect", str(path) + "x"]) == 1
    error = capsys.readouterr().err
    assert "zip archive" in error
    assert "No such file" in error


def test_keys_of_one_name_are_told_apart(path: Path) -> None:
    fn.save(path, {"7": torch.ones(1)})
    like = {7: torch.ones(1)}
    with pytest.raises(
        fn.CheckpointError, match=r"7 \(key 7\): expected .*\n.*7 \(key '7'\): expected nothing"
    ):
        fn.load(path, like=like)
    _, skipped = fn.load(path, like=like, strict=False)
    assert skipped.keys() == {"7 (key 7)", "7 (key '7')"}
