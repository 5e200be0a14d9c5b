"""Damaged, truncated, forged and foreign files: refused, in bounded time, and no code runs."""

from __future__ import annotations

import json
import os
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import funcnet as fn
from funcnet.checkpoint import container
from funcnet.checkpoint import data as checkpoint_data

Content = dict[str, Any]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("hostile") / "tree.safetensors"


@pytest.fixture(scope="module")
def valid(path: Path) -> bytes:
    """A small file with everything in it: padding, two tensors, values, a network, metadata."""
    net = fn.Sequential(fn.Conv2d(1, 1), fn.ReLU())
    tree = {"w": torch.arange(3.0), "n": [torch.tensor([1, 2], dtype=torch.int16)], "x": 0.5}
    fn.save_model(path, net, tree, metadata={"epoch": 30})
    assert b"}  " in path.read_bytes()
    return path.read_bytes()


def refused(path: Path, data: bytes, load: Callable[[Path], Any] = fn.load) -> str:
    path.write_bytes(data)
    with pytest.raises(fn.CheckpointError) as error:
        load(path)
    assert str(error.value).startswith(f"{path}: ")
    return str(error.value).removeprefix(f"{path}: ")


def test_every_flipped_bit_is_found(path: Path, valid: bytes) -> None:
    path.write_bytes(valid)
    with open(path, "r+b", buffering=0) as file:
        for position, byte in enumerate(valid):
            for bit in range(8):
                file.seek(position)
                file.write(bytes([byte ^ 1 << bit]))
                with pytest.raises(fn.CheckpointError):
                    fn.load(path)
            file.seek(position)
            file.write(bytes([byte]))
    fn.load(path)


def test_damage_is_traced_to_its_tensor(path: Path, valid: bytes) -> None:
    start = 8 + int.from_bytes(valid[:8], "little")
    for position in range(start, len(valid)):
        data = bytearray(valid)
        data[position] = ~data[position] & 0xFF
        name = "w" if position < start + 12 else "n.0"
        for mmap in (False, True):
            message = refused(path, bytes(data), lambda path, m=mmap: fn.load(path, mmap=m))
            assert message.startswith(f"{name}: the data does not match its checksum")
        fn.inspect(path)  # reads no tensor


@pytest.mark.parametrize("group", [1, 100, 2**23])
@given(sizes=st.lists(st.integers(0, 40), min_size=1, max_size=12), data=st.data())
def test_many_tensors_of_many_blocks(
    group: int, sizes: list[int], data: st.DataObject, path: Path
) -> None:
    """The threads share out the blocks of several tensors; each comes back to its own."""
    tree = {f"{i}": torch.arange(size, dtype=torch.int16) + i for i, size in enumerate(sizes)}
    with pytest.MonkeyPatch.context() as patch:
        for module in (container, checkpoint_data):
            patch.setattr(module, "BLOCK", 16)
        patch.setattr(checkpoint_data, "_GROUP", group)
        fn.save(path, tree)
        for name, tensor in fn.load(path).items():
            assert torch.equal(tensor, tree[name])
        entries = read_entries(path.read_bytes())
        name = data.draw(st.sampled_from(sorted(tree)))
        start, stop = entries[name]["data_offsets"]
        if start == stop:
            return
        whole = path.read_bytes()
        place = (
            len(whole) - sum(2 * size for size in sizes) + data.draw(st.integers(start, stop - 1))
        )
        damaged = whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]
        blocks = -(-(stop - start) // 16)
        message = refused(path, damaged)
        assert message.startswith(f"{name}: ")
        assert f"damaged in 1 of its {blocks} blocks" in message


@pytest.mark.parametrize("load", [fn.load, fn.load_model, fn.inspect])
def test_every_truncation_is_found(load: Callable[[Path], Any], path: Path, valid: bytes) -> None:
    refused(path, valid + b"\0", load)
    for length in reversed(range(len(valid))):
        os.truncate(path, length)
        with pytest.raises(fn.CheckpointError):
            load(path)


@given(data=st.data())
def test_any_damage_is_found(data: st.DataObject, path: Path, valid: bytes) -> None:
    start = data.draw(st.integers(0, len(valid)))
    end = data.draw(st.integers(start, len(valid)))
    new = data.draw(st.binary(max_size=20))
    damaged = valid[:start] + new + valid[end:]
    if damaged != valid:
        refused(path, damaged)


def read_entries(data: bytes) -> Content:
    """The header, as any reader of safetensors has it."""
    return dict(json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")]))


class Boom:
    def __reduce__(self) -> Any:
        return os.mkdir, ("executed",)


def _zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("data.pkl", pickle.dumps(Boom()))


FOREIGN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "empty": (lambda path: path.write_bytes(b""), "an empty one"),
    "text": (lambda path: path.write_text("hello, world"), "something else"),
    "zeros": (lambda path: path.write_bytes(bytes(1000)), "something else"),
    "pickle": (lambda path: path.write_bytes(pickle.dumps(Boom())), "a pickle"),
    "zip": (_zip, "a zip archive"),
    "torch.save": (lambda path: torch.save({"w": torch.ones(1)}, path), "a zip archive"),
    "safetensors": (
        lambda path: save_file({"w": torch.ones(1)}, path),
        "that funcnet did not write",
    ),
    "no tensors": (
        lambda path: save_file({}, path, {"funcnet": "1"}),
        "that funcnet did not write",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_foreign_files_are_refused_and_run_no_code(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write, message = FOREIGN[case]
    write(tmp_path / "file")
    for load in (fn.load, fn.load_model, fn.inspect):
        with pytest.raises(fn.CheckpointError, match=message):
            load(tmp_path / "file")
    assert not (tmp_path / "executed").exists()


def test_what_is_no_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(fn.CheckpointError, match="got a folder"):
        fn.load(tmp_path)
    with pytest.raises(FileNotFoundError):
        fn.load(tmp_path / "missing")


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs the pipes and devices of Unix")
def test_pipes_and_devices_are_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(fn.CheckpointError, match="expected a regular file"):
        fn.load(tmp_path / "pipe")
    with pytest.raises(fn.CheckpointError, match="expected a regular file"):
        fn.load("/dev/zero")


def test_a_file_without_a_network_is_not_a_model(path: Path) -> None:
    fn.save(path, (3,))
    message = refused(path, path.read_bytes(), fn.load_model)
    assert message == "expected a file of save_model, got one without a network"


# --- Forged files: the checksums are right, the content lies.


def forge(valid: bytes, change: Callable[[Content, Content], Any]) -> bytes:
    """A file whose header and its metadata were changed by `change`, with the right checksums."""
    start = 8 + int.from_bytes(valid[:8], "little")
    content = json.loads(valid[8:start])
    change(content, content["__metadata__"])
    return sealed(json.dumps(content, separators=(",", ":")).encode(), valid[start:])


def sealed(text: bytes, data: bytes = b"") -> bytes:
    at = text.index(b'"funcnet.header_crc32":"') + len(b'"funcnet.header_crc32":"')
    head = struct.pack("<Q", len(text)) + text[:at] + b"0" * 8 + text[at + 8 :]
    checksum = b"%08x" % zlib.crc32(head)
    return head[: 8 + at] + checksum + head[16 + at :] + data


def with_structure(structure: str) -> Callable[[Content, Content], None]:
    return lambda header, metadata: metadata.update({"funcnet.structure": structure})


def with_entry(**values: Any) -> Callable[[Content, Content], None]:
    return lambda header, metadata: header["w"].update(values)


def with_text(key: str, text: Any) -> Callable[[Content, Content], None]:
    return lambda header, metadata: metadata.update({key: text})


W, N = '{"tensor":"w"}', '{"tensor":"n.0"}'
FORGED: dict[str, tuple[Callable[[Content, Content], Any], str]] = {
    "newer format": (with_text("funcnet.format", "2"), "expected format '1'.* got '2'"),
    "no structure": (lambda h, m: m.pop("funcnet.structure"), "the metadata: expected"),
    "unknown key": (with_text("x", "y"), "the metadata: expected"),
    "not a text": (with_text("format", 1), "expected every value to be a str"),
    "structure not JSON": (with_structure("{"), r"funcnet\.structure: expected JSON"),
    "NaN": (with_structure("NaN"), "NaN is not JSON"),
    "half of a surrogate pair": (with_structure('"\\udC00"'), r"funcnet\.structure: expected JSON"),
    "a key with half of a pair": (with_structure('{"dict":[["\\uD800",1]]}'), "expected JSON"),
    "long number": (with_structure("1" * 100_000), "64 bits"),
    "deep": (with_structure("[" * 100_000), "too deep"),
    "deep, closed": (with_structure('{"list":[' * 102 + "]}" * 102), "expected a tree of at most"),
    "very deep": (with_structure('{"list":[' * 10_000 + "]}" * 10_000), "too deep|100 deep"),
    "missing tensor": (with_structure(W), "each tensor of the file once"),
    "tensor twice": (with_structure(f'{{"list":[{W},{W},{N}]}}'), "each tensor of the file once"),
    "other tensor": (with_structure(f'{{"list":[{W},{{"tensor":"q"}}]}}'), "each tensor"),
    "bare list of one": (with_structure("[1]"), r"the tree: expected a node of a tree, got \[1\]"),
    "bare list": (with_structure("[]"), r"the tree: expected a node of a tree, got \[\]"),
    "empty node": (with_structure("{}"), "expected a node"),
    "unknown node": (with_structure('{"set":[]}'), "expected a node"),
    "two kinds": (with_structure('{"list":[],"tuple":[]}'), "expected a node"),
    "key twice": (with_structure('{"dict":[["a",1],["a",2]]}'), "expected a node"),
    "item of three": (with_structure('{"dict":[["a",1,2]]}'), "expected a node"),
    "item of nothing": (with_structure('{"dict":[[]]}'), "expected a node"),
    "text for an item": (with_structure('{"dict":["ab"]}'), "expected a node"),
    "float key": (with_structure('{"dict":[[0.5,1]]}'), "expected a node"),
    "bool key": (with_structure('{"dict":[[true,1]]}'), "expected a node"),
    "list key": (with_structure('{"dict":[[[],1]]}'), "expected a node"),
    "name of another type": (with_structure('{"tensor":3}'), "expected a node"),
    "bad int": (with_structure('{"int":"0xg"}'), "expected a node"),
    "bad float": (with_structure('{"float":"7ff"}'), "expected a node"),
    "gradient of an integer": (
        with_structure(f'{{"list":[{W},{{"tensor":"n.0","requires_grad":true}}]}}'),
        r"n\.0: expected a dtype that has gradients",
    ),
    "unknown class": (
        with_structure(f'{{"list":[{W},{N},{{"class":"os.system","fields":{{"x":"ls"}}}}]}}'),
        r"2: expected a class known by name, got 'os\.system'",
    ),
    "a function's name": (
        with_structure(f'{{"list":[{W},{N},{{"class":"save","fields":{{}}}}]}}'),
        "expected a class known by name",
    ),
    "wrong fields": (
        with_structure(f'{{"list":[{W},{N},{{"class":"MSE","fields":{{"x":1}}}}]}}'),
        "2: expected the fields of MSE",
    ),
    "wrong values": (
        with_structure(f'{{"list":[{W},{N},{{"class":"MSE","fields":{{"reduction":1}}}}]}}'),
        "2: MSE refused its fields",
    ),
    "abstract class": (
        with_structure(f'{{"list":[{W},{N},{{"class":"Layer","fields":{{}}}}]}}'),
        "2: Layer refused its fields",
    ),
    "unknown dtype": (with_entry(dtype="F128"), "w: expected a known dtype, got 'F128'"),
    "dtype of another type": (with_entry(dtype=["F32"]), "w: expected a known dtype"),
    "negative size": (with_entry(shape=[-3, -1, 1]), "w: expected a shape"),
    "bool size": (with_entry(shape=[True, 3]), "w: expected a shape"),
    "float size": (with_entry(shape=[3.0]), "w: expected a shape"),
    "huge size": (with_entry(shape=[2**62, 0]), "w: expected a shape"),
    "many dimensions": (with_entry(shape=[3] + [1] * 64), "w: expected a shape"),
    "other size": (with_entry(shape=[4]), "w: expected data_offsets 16 bytes apart"),
    "other dtype": (with_entry(dtype="F16"), "w: expected data_offsets 6 bytes apart"),
    "odd pairs": (with_entry(dtype="F4", shape=[3]), "w: expected an even number"),
    "extra key": (with_entry(x=1), "w: expected dtype, shape and data_offsets"),
    "hole": (with_entry(data_offsets=[4, 16]), "expected data to start at 0"),
    "overlap": (
        lambda h, m: h["n.0"].update(data_offsets=[8, 12]),
        r"n\.0: expected data to start at 12.* got 8",
    ),
    "beyond the end": (with_entry(shape=[6], data_offsets=[0, 24]), "expected data to start at 24"),
    "backwards": (with_entry(data_offsets=[12, 0]), "w: expected data_offsets"),
    "entry is no object": (lambda h, m: h.update(w=[]), "w: expected dtype"),
    "another entry": (
        lambda h, m: h.update(q={"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}),
        "expected a checksum for each tensor",
    ),
    "checksums are no object": (with_text("funcnet.crc32", "[]"), "expected a checksum for each"),
    "short checksum": (
        with_text("funcnet.crc32", '{"w":"00","n.0":"00000000"}'),
        "w: expected a CRC",
    ),
    "metadata is no object": (with_text("funcnet.metadata", "[]"), "expected an object"),
    "network with a tensor": (with_text("funcnet.architecture", W), "expected no tensor"),
    "network with a tensor without a name": (
        with_text("funcnet.architecture", '{"tensor":""}'),
        "expected no tensor",
    ),
}


@pytest.mark.parametrize("case", FORGED)
def test_forged_files_are_refused(case: str, path: Path, valid: bytes) -> None:
    change, message = FORGED[case]
    data = forge(valid, change)
    path.write_bytes(data)
    with pytest.raises(fn.CheckpointError, match=message):
        fn.load(path)


def test_forging_nothing_changes_nothing(path: Path, valid: bytes) -> None:
    path.write_bytes(forge(valid, lambda header, metadata: None))
    assert fn.load(path)["x"] == 0.5


@pytest.mark.parametrize(
    ("architecture", "message"),
    [
        ('{"class":"Conv2d","fields":{"out_channels":0}}', "expected the fields of Conv2d"),
        ('{"class":"ReLU","fields":{"x":0}}', "expected the fields of ReLU, [], got ['x']"),
        ('{"class":"Upsample2d","fields":{"scale":{"tuple":[0,1]}}}', "Upsample2d refused"),
        ('{"class":"Sequential","fields":{"layers":{"tuple":[1]}}}', "Sequential refused"),
        ('{"class":"Sequential","fields":{"layers":1}}', "Sequential refused"),
        ('{"class":"Sequential","fields":{"layers":{"dict":[]}}}', "another layers back"),
        ('{"class":"Sequential","fields":{"layers":{"OrderedDict":[]}}}', "another layers back"),
        ('{"class":"Sequential","fields":{"layers":{"list":[]}}}', "another layers back"),
        ('{"class":"Sequential","fields":{"layers":""}}', "another layers back"),
        ('{"class":"Sequential","fields":{"layers":{"dict":[["layers",{"tuple":[]}]]}}}', "back"),
        (
            '{"class":"Sequential","fields":{"layers":{"dict":[["names",{"tuple":["a"]}],'
            '["layers",{"tuple":[{"class":"ReLU","fields":{}}]}]]}}}',
            "another layers back",
        ),
        (
            '{"class":"Residual","fields":{"layer":'
            '{"class":"Sequential","fields":{"layers":{"dict":[]}}}}}',
            "layer: expected Sequential to keep its fields as they are",
        ),
        ('{"class":"Reshape","fields":{"shape":{"list":[-1]}}}', "another shape back"),
        ("1", "expected a layer, got int"),
        ('{"class":"MSE","fields":{"reduction":"sum"}}', "expected a layer, got MSE"),
    ],
)
def test_forged_networks_are_refused(
    architecture: str, message: str, path: Path, valid: bytes
) -> None:
    data = forge(valid, with_text("funcnet.architecture", architecture))
    assert message in refused(path, data, fn.load_model)


def test_a_field_that_a_network_lacks_takes_its_default(path: Path, valid: bytes) -> None:
    architecture = '{"class":"Conv2d","fields":{"kernel_size":3,"out_channels":2}}'
    path.write_bytes(forge(valid, with_text("funcnet.architecture", architecture)))
    assert fn.load_model(path)[0] == fn.inspect(path).architecture == fn.Conv2d(2, 3)


def test_a_foreign_network_is_printed_without_control_characters(path: Path, valid: bytes) -> None:
    architecture = r'{"class":"\u001b[2J","fields":{"\u001b[2J":"\u001b[2J"}}'
    path.write_bytes(forge(valid, with_text("funcnet.architecture", architecture)))
    assert "\x1b" not in str(fn.inspect(path))


def test_keys_twice_in_the_header_are_refused(path: Path, valid: bytes) -> None:
    start = 8 + int.from_bytes(valid[:8], "little")
    text = valid[8:start].replace(b'"n.0":{"dtype', b'"w":{"dtype')
    assert "a key appears twice" in refused(path, sealed(text, valid[start:]))


def test_a_header_that_is_not_utf8_is_refused(path: Path, valid: bytes) -> None:
    start = 8 + int.from_bytes(valid[:8], "little")
    for bad in (b"\xff", b"\xed\xa0\x80"):
        text = valid[8:start].replace(b'"pt"', b'"%b"' % bad)
        assert "expected JSON" in refused(path, sealed(text, valid[start:]))


def test_large_headers_are_refused_without_being_parsed(path: Path) -> None:
    prefix = b'{"__metadata__":{"funcnet.header_crc32":"00000000","x":['
    text = prefix + b"[]," * 15_000_000
    path.write_bytes(sealed(text))
    assert "values of JSON" in refused(path, path.read_bytes())
    path.write_bytes(struct.pack("<Q", 2**63) + prefix)
    assert "100000000 at most" in refused(path, path.read_bytes())


def test_long_names_of_many_values_cost_little(path: Path, valid: bytes) -> None:
    # 100 kB of key times 200 000 values would be 20 GB of names.
    values = ",".join(["0"] * 200_000)
    structure = f'{{"dict":[["{"k" * 100_000}",{{"list":[{values}]}}]]}}'
    data = forge(valid, with_structure(structure))
    assert "expected a tree of at most" in refused(path, data)
