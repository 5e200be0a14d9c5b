"""Saving, loading and inspecting files: the functions that users call."""

from __future__ import annotations

import gc
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, TypeAlias, overload

import torch
from torch import Tensor

from funcnet.checkpoint.atomic import on_windows, patiently, replacing
from funcnet.checkpoint.compare import Expected, refuse
from funcnet.checkpoint.container import (
    Header,
    block_count,
    build_header,
    lay_out,
    read_header,
    to_json,
)
from funcnet.checkpoint.data import read_data, write_all, write_data
from funcnet.checkpoint.inspection import Inspection
from funcnet.checkpoint.memory_format import lay_out_as_init
from funcnet.checkpoint.storable import check_metadata, check_storable
from funcnet.checkpoint.structure import CheckpointError, Json, decode, encode
from funcnet.checks import shown
from funcnet.keys import check_device, check_dtype
from funcnet.layer import Layer, Tree, check_net

_Path: TypeAlias = "str | os.PathLike[str]"

MAPPED_FROM = 2**26
"""The bytes of data from which `load` maps a file instead of reading it, unless told otherwise."""


def save(path: _Path, tree: Tree, metadata: dict[str, Any] | None = None) -> None:
    """Write a tree to one file, atomically and durably, so that `load` gives back the same tree.

    A tree is made of tuples, lists, dicts and OrderedDicts with str or int keys, namedtuples and
    frozen dataclasses known by name (`register_node`), tensors, ints, floats, bools, strs and None.
    Tensors may lie on any device and have any strides; their values are stored row-major.
    `requires_grad` and `torch.nn.Parameter` come back. `metadata` is a dict of JSON values for
    `inspect`.

    The file is a safetensors file with PyTorch's names. The same tree gives the same bytes. The old
    file stays until the new one is complete and on the disk. A symbolic link stays a link.

    Raises TypeError or ValueError, naming the path, before anything is written, if something could
    not come back exactly: an unknown class, a key of another type, or a tensor that shares memory,
    is sparse, quantized, on the meta device, of a subclass, part of an autograd graph, or of a
    dtype that safetensors lacks. Raises OSError with the path if the file cannot be written. The
    old file is then unchanged, with one exception: if the disk fails while the finished renaming is
    made durable, the new file is in place.

    >>> import tempfile, torch
    >>> path = tempfile.mkdtemp() + "/tree.safetensors"
    >>> save(path, {"weight": torch.ones(2), 7: [None, "seven"]})
    >>> load(path)
    {'weight': tensor([1., 1.]), 7: [None, 'seven']}
    """
    _save(_as_path("save", path), tree, metadata, {})


def save_model(
    path: _Path, net: Layer, params: Tree, metadata: dict[str, Any] | None = None
) -> None:
    """Write a network and its parameters, as `save` does, for `load_model`.

    Raises what `save` raises. Raises TypeError for a layer of an unknown class, or with a field
    that `save` would refuse or that holds a tensor.

    >>> import funcnet as fn, tempfile
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> save_model(path, fn.ReLU(), ())
    >>> load_model(path)
    (ReLU(), ())
    """
    path = _as_path("save_model", path)
    check_net("save_model", net)
    architecture, tensors = encode(net)
    if tensors:
        raise TypeError(f"save_model: expected a net without tensors, got {next(iter(tensors))}")
    _save(path, params, metadata, {"funcnet.architecture": architecture})


@overload
def load(
    path: _Path,
    like: Tree = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    strict: Literal[True] = True,
    *,
    mmap: bool | None = None,
) -> Tree: ...
@overload
def load(
    path: _Path,
    like: Tree = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    strict: bool,
    mmap: bool | None = None,
) -> tuple[Tree, dict[str, str]]: ...
def load(
    path: _Path,
    like: Tree = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    strict: bool = True,
    *,
    mmap: bool | None = None,
) -> Any:
    """Return the tree in a file of `save` or `save_model`: same containers, names, dtypes, bits.

    The tree must equal `like`, if given, in structure, shapes and dtypes. The tensors of `like` may
    lie on the meta device. The tensors go to `device`, by default the CPU. `dtype` converts
    floating-point tensors. With `strict=False` and `like` the result is (tree, skipped): the tree
    is `like` with each leaf that the file has in the same shape and dtype; `skipped` gives the
    difference of each other leaf by name. Tensors get the memory format of those of `like`, such as
    channels_last.

    Every bit of the file is checked, and no code from it runs. A field that a file lacks takes its
    default. Files with 64 MiB of data and more are mapped into memory privately; `mmap=True` maps
    any file, `mmap=False` none. Mapping is fast, but a program that overwrites a mapped file in
    place, as `save` never does, changes the tensors or ends the process. Windows refuses to replace
    a mapped file, so none is mapped there without `mmap=True`.

    Raises CheckpointError, a ValueError that names the entry, for a file that is damaged, truncated
    or foreign. Raises CheckpointError that names every difference if the converted tree differs
    from `like`. Raises FileNotFoundError or another OSError if the file cannot be opened, TypeError
    for a dtype that is not floating-point, or that PyTorch does not convert to, ValueError for
    strict=False without `like` and for a device that PyTorch does not know.

    >>> import tempfile, torch
    >>> path = tempfile.mkdtemp() + "/tree"
    >>> save(path, [torch.zeros(2, 3), 0.5])
    >>> load(path, like=[torch.zeros(3), 1])
    Traceback (most recent call last):
    ...
    funcnet.checkpoint.structure.CheckpointError: ...tree: differs from like in 2 place(s):
      0: expected shape (3,), got (2, 3)
      1: expected int, got float
    """
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise TypeError(f"load: expected a floating-point dtype, got {shown(dtype)}")
    check_device("load", device)
    if like is None and not strict:
        raise ValueError("load: expected a tree `like` with strict=False, got None")
    with opened(_as_path("load", path)) as (file, header):
        if like is None:
            return decode(header.structure, read_tensors(file, header, device, dtype, mmap))
        expected = Expected(like)
        entries = {
            name: entry._replace(dtype=_converted(entry.dtype, dtype))
            for name, entry in header.entries.items()
        }
        skipped = expected.differences(header.structure, entries)
        if strict:
            refuse(skipped)
        tensors = expected.laid_out(read_tensors(file, header, device, dtype, mmap))
        if strict:
            return decode(header.structure, tensors)
        return expected.merged(header.structure, tensors, skipped), dict(skipped.values())


def load_model(
    path: _Path, device: torch.device | str | None = None, dtype: torch.dtype | None = None
) -> tuple[Layer, Tree]:
    """Return the network and the parameters in a file of `save_model`.

    The network is built from classes known by name, whose constructors check their arguments.
    `dtype` converts floating-point parameters. They are laid out in memory as by `net.init`.

    Raises what `load` raises, CheckpointError for a file without a network, and TypeError for
    another dtype than float16, bfloat16, float32 and float64.

    >>> import funcnet as fn, tempfile
    >>> path = tempfile.mkdtemp() + "/model.safetensors"
    >>> save_model(path, fn.Sequential(fn.ReLU(), fn.Sigmoid()), ((), ()))
    >>> net, params = load_model(path)
    >>> net
    Sequential(ReLU(), Sigmoid())
    """
    check_dtype("load_model", dtype)
    check_device("load_model", device)
    with opened(_as_path("load_model", path)) as (file, header):
        net = Inspection(header).architecture
        if net is None:
            raise CheckpointError("expected a file of save_model, got one without a network")
        params = decode(header.structure, read_tensors(file, header, device, dtype, None))
        lay_out_as_init(net, params)
        return net, params


def inspect(path: _Path) -> Inspection:
    """Return what a file holds: `.structure`, `.shapes`, `.dtypes`, `.architecture`, `.metadata`.

    Reads and checks the header and the file's length, but no tensor. The result prints as a table,
    as `python -m funcnet inspect FILE` does.

    Raises what `load` raises.

    >>> import tempfile, torch
    >>> path = tempfile.mkdtemp() + "/tree.safetensors"
    >>> save(path, [torch.zeros(2, 3), 0.5], metadata={"note": "halves"})
    >>> info = inspect(path)
    >>> info.shapes, info.dtypes, info.metadata
    ({'0': (2, 3)}, {'0': torch.float32}, {'note': 'halves'})
    >>> info.structure
    [tensor(..., device='meta', size=(2, 3)), 0.5]
    """
    with opened(_as_path("inspect", path)) as (_, header):
        return Inspection(header)


def _as_path(who: str, path: Any) -> str:
    """`path` as a str. Raises TypeError for what is not a path, such as an open file."""
    try:
        found = os.fsdecode(path)
    except TypeError:
        message = f"{who}: expected path to be a str or an os.PathLike, got {shown(path)}"
        raise TypeError(message) from None
    if "\0" in found:
        raise ValueError(f"{who}: expected a path without null characters, got {found!r}")
    return found


def _save(
    path: str, tree: Tree, metadata: dict[str, Any] | None, architecture: dict[str, Json]
) -> None:
    with _without_collector():
        structure, tensors = encode(tree)
        check_storable(tensors)
        # Another thread may give a tensor a new shape meanwhile: these keep theirs.
        tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        values = {"funcnet.structure": structure, **architecture}
        if metadata is not None:
            check_metadata(metadata)
            values["funcnet.metadata"] = metadata
        strings = {key: to_json(value) for key, value in values.items()}
        entries = lay_out(tensors)
        # The checksums' length is fixed, so the header's size is known before the checksums are.
        blanks = {name: "0" * 8 * block_count(entry.size) for name, entry in entries.items()}
        size = len(build_header(entries, blanks, strings))
    with replacing(path) as file:
        file.seek(size)
        checksums = write_data(file, tensors, entries)
        file.seek(0)
        write_all(file, build_header(entries, checksums, strings))


def read_tensors(
    file: BinaryIO,
    header: Header,
    device: torch.device | str | None,
    dtype: torch.dtype | None,
    mmap: bool | None,
) -> dict[str, Tensor]:
    """The tensors in a file by name, on the device and in the dtype that are asked for."""
    large = header.data_size >= MAPPED_FROM and not on_windows()
    tensors = read_data(file, header, mapped=large if mmap is None else mmap)
    if device is None and dtype is None:
        return dict(tensors)
    target = "cpu" if device is None else device
    return {
        name: _moved(name, tensor, target, _converted(tensor.dtype, dtype))
        for name, tensor in tensors
    }


def _moved(name: str, tensor: Tensor, device: torch.device | str, dtype: torch.dtype) -> Tensor:
    try:
        return tensor.to(device, dtype)
    except NotImplementedError:  # as from and to float4
        if dtype == tensor.dtype:
            raise
        raise TypeError(
            f"load: expected a dtype that PyTorch converts {tensor.dtype} to, got {dtype} at {name}"
        ) from None
    except TypeError as error:  # as float64 to MPS
        raise TypeError(f"load: {name}: {error}") from error


def _converted(dtype: torch.dtype, floating: torch.dtype | None) -> torch.dtype:
    return floating if floating is not None and dtype.is_floating_point else dtype


@contextmanager
def opened(path: _Path) -> Iterator[tuple[BinaryIO, Header]]:
    """Open a file and read its header. Every CheckpointError begins with its path."""
    with named(path):
        if os.path.isdir(path):  # Windows cannot open a folder
            raise CheckpointError("expected a file, got a folder")
        with open(_open(path), "rb") as file, _without_collector():
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise CheckpointError("expected a regular file, got another kind")
            yield file, read_header(file)


@contextmanager
def named(path: _Path) -> Iterator[None]:
    """Begin every CheckpointError with a file's path, and give it to every OSError."""
    try:
        yield
    except CheckpointError as error:
        error.args = (f"{os.fsdecode(path)}: {error}",)
        raise
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        # Reading fails without naming the file. The number chooses the subclass of OSError.
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error


@contextmanager
def _without_collector() -> Iterator[None]:
    """Keep the garbage collector from searching every new object again and again.

    With thousands of tensors, that takes a third of the time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def _open(path: _Path) -> int:
    """Return the descriptor of a file opened for reading."""
    flags = os.O_RDONLY | getattr(os, "O_BINARY", 0)
    try:
        # Without O_NONBLOCK, opening a named pipe would wait for its writer.
        return patiently(lambda: os.open(path, flags | getattr(os, "O_NONBLOCK", 0)))
    except OSError:
        if not os.path.isfile(path):
            raise
        return os.open(path, flags)  # not every file system knows O_NONBLOCK
