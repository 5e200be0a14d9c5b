"""Coverage-guided fuzzing of `load`: any bytes give CheckpointError or a tree, and nothing else.

    pip install atheris
    python tests/fuzz_checkpoint.py -max_total_time=180 -max_len=4096 FOLDER_FOR_THE_CORPUS

The checksum and the length of the header would stop almost every mutation, so they are corrected
first, unless the first byte of the input is 0; else it is one more than the bytes of data after the
header. What loads must save and load again as it is, and
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
from safetensors.torch import load_file

_AT = 8 + len(b'{"__metadata__":{"funcnet.header_crc32":"')
_FOLDER = tempfile.mkdtemp()
_PATH = os.path.join(_FOLDER, "fuzzed")
_AGAIN = os.path.join(_FOLDER, "again")


def test_one_input(data: bytes) -> None:
    """What atheris calls; anything raised here but CheckpointError is a finding."""
    with open(_PATH, "wb") as file:
        file.write(_sealed(data[1:], data[0] - 1) if data[:1] > b"\0" else data[1:])
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


def _sealed(data: bytes, data_size: int) -> bytes:
    """The bytes with the right length and checksum of the header."""
    if len(data) < _AT + 8 + data_size:
        return data
    data = (len(data) - 8 - data_size).to_bytes(8, "little") + data[8:]
    head = data[:_AT] + b"0" * 8 + data[_AT + 8 : len(data) - data_size]
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
        size = sum(tensor.nbytes for tensor in load_file(_PATH).values())
        with open(_PATH, "rb") as source, open(os.path.join(folder, f"{number}"), "wb") as seed:
            seed.write(bytes([1 + size]) + source.read())


if __name__ == "__main__":
    folders = [argument for argument in sys.argv[1:] if not argument.startswith("-")]
    for folder in folders[:1]:
        os.makedirs(folder, exist_ok=True)
        _write_seeds(folder)
    atheris.Setup(sys.argv, test_one_input)
    atheris.Fuzz()
