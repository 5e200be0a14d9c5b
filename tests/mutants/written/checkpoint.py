"""Bugs in saving and loading."""

from __future__ import annotations

from ..mutant import Row, in_file

CHECKPOINT = (
    *in_file(
        "checkpoint/data.py",
        "test_checkpoint_hostile.py",
    ),
    *in_file(
        "checkpoint/atomic.py",
        "test_checkpoint_durability.py",
        Row(
            "data-not-synced",
            "                _flush_to_disk(file)",
            "                file.flush()",
            "the data is on the disk before the name",
        ),
        Row(
            "written-in-place",
            "os.replace(temporary, target)",
            "target.write_bytes(temporary.read_bytes()), temporary.unlink()",
            "a crash leaves the old file or the new one, whole",
        ),
        Row(
            "folder-not-synced",
            "        _flush_folder(target.parent)",
            "        os.fspath(target.parent)",
            "the name is on the disk before save returns",
        ),
        Row("mode-not-kept", "os.chmod(temporary, mode)", "os.chmod(temporary, 0o600)", "the mode"),
        Row(
            "abandoned-files-stay",
            "        _clear_abandoned(target)",
            "        os.fspath(target)",
            "the next save clears what a killed one has left",
        ),
    ),
    *in_file(
        "checkpoint/structure.py",
        "test_checkpoint_roundtrip.py",
        Row(
            "int-keys-become-texts",
            "[[key, child] for key, child in zip(keys, nodes, strict=True)]",
            "[[str(key), child] for key, child in zip(keys, nodes, strict=True)]",
            "str and int keys are kept apart",
        ),
        Row(
            "ordered-dict-becomes-dict",
            '"OrderedDict": OrderedDict}',
            '"OrderedDict": dict}',
            "containers come back as they were",
        ),
        Row(
            "requires-grad-lost",
            "return found.requires_grad_() if requires_grad else found",
            "return found",
            "requires_grad comes back",
        ),
    ),
    *in_file(
        "checkpoint/files.py",
        "test_checkpoint_roundtrip.py test_checkpoint_like.py",
        Row(
            "architecture-lost",
            '{"funcnet.architecture": architecture}',
            "{}",
            "the network travels with its parameters",
        ),
    ),
    *in_file(
        "checkpoint/compare.py",
        "test_checkpoint_like.py",
    ),
    *in_file(
        "checkpoint/storable.py",
        "test_checkpoint_refusals.py",
        Row(
            "tied-tensors-saved",
            "    _check_untied(tensors)",
            "    list(tensors)",
            "tied tensors would come back apart",
        ),
    ),
    *in_file(
        "checkpoint/data.py",
        "test_checkpoint_hostile.py",
        Row(
            "blocks-shared-out-otherwise",
            "found[first::count] = part",
            "found[first * len(part) : (first + 1) * len(part)] = part",
            "each block's checksum stands at its place",
        ),
    ),
    *in_file(
        "checkpoint/container.py",
        "test_checkpoint_roundtrip.py",
        Row(
            "views-not-resolved",
            "tensor.detach().resolve_conj().resolve_neg()",
            "tensor.detach().resolve_conj()",
            "negated views come back with their sign",
        ),
    ),
)
