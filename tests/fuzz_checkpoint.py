"""Coverage-guided fuzzing of `load`: any bytes give CheckpointError or a tree, and nothing else.

    pip install atheris
    python tests/fuzz_checkpoint.py -max_total_time=180 -max_len=4096 FOLDER_FOR_THE_CORPUS

The checksum of the header would stop almost every mutation, so it is corrected first, in nine cases
out of ten; what lies behind it is what is tested. What loads must save and load again as it is, and
be the same read or mapped. The corpus starts from files with everything that a tree can hold.
"""

from __future__ import annotations

import os
import sys
import tempfile
import zlib
from typing import Any

import atheris

with atheris.instrument_imports(include=["funcnet.checkpoint", "funcnet.tree"]):
    import funcnet as fn

import torch

_AT = 8 + len(b'{"__metadata__":{"funcnet.header_crc32":"')
_FOLDER = tempfile.mkdtemp()
_PATH = os.path.join(_FOLDER, "fuzzed")
_AGAIN = os.path.join(_FOLDER, "again")


def test_one_input(data: bytes) -> None:
    """What atheris calls; anything raised here but CheckpointError is a finding."""
    with open(_PATH, "wb") as file:
        file.write(_sealed(data[1:]) if data[:1] and data[0] % 10 else data[1:])
    try:
        tree = fn.load(_PATH)
    except fn.CheckpointError:
        return
    fn.save(_AGAIN, tree)
    _check_same(fn.load(_AGAIN), tree)
    _check_same(fn.load(_PATH, mmap=True), tree)
    info = fn.inspect(_PATH)
    str(info)
    fn.load(_PATH, like=info.structure)
    try:
        fn.load_model(_PATH)
    except fn.CheckpointError:
        return


def _sealed(data: bytes) -> bytes:
    """The bytes with the right checksum of the header, and length where that is beyond the end."""
    size = int.from_bytes(data[:8], "little")
    if len(data) < _AT + 8 or size > len(data) - 8:
        return data
    head = data[:_AT] + b"0" * 8 + data[_AT + 8 : 8 + size]
    return data[:_AT] + b"%08x" % zlib.crc32(head) + data[_AT + 8 :]


def _check_same(a: Any, b: Any) -> None:
    from checkpoint_trees import same

    assert same(a, b), (a, b)


def _write_seeds(folder: str) -> None:
    net = fn.Sequential(fn.Conv2d(1, 1), fn.ReLU())
    params = net.init(fn.key(0), (1, 2, 2))
    nested = {"a": [1, 0.5, None, True, "x"], 7: ({}, [], ()), "n": float("nan"), "b": 2**70}
    trees = [torch.ones(2), nested, {"params": params, "key": fn.key(1), "net": net}]
    dtypes = [torch.uint8, torch.bool, torch.bfloat16, torch.complex64, torch.float8_e5m2]
    trees += [[torch.zeros(2, dtype=dtype) for dtype in dtypes]]
    trees += [[torch.ones(1, requires_grad=True), torch.nn.Parameter(torch.ones(0, 3))]]
    for number, tree in enumerate(trees):
        fn.save_model(_PATH, net, tree, metadata={"epoch": 3})
        with open(_PATH, "rb") as source, open(os.path.join(folder, f"{number}"), "wb") as seed:
            seed.write(b"\1" + source.read())


if __name__ == "__main__":
    folders = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    for folder in folders[:1]:
        os.makedirs(folder, exist_ok=True)
        _write_seeds(folder)
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
