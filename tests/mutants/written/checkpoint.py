"""Bugs in saving and loading."""

from __future__ import annotations

from ..mutant import Row, in_file

CHECKPOINT = (
    *in_file(
        "checkpoint/data.py",
        "test_checkpoint_hostile.py",
        Row(
            "data-checksum-skipped",
            "if found == expected:",
            "if len(found) == len(expected):",
            "a flipped bit in the data is found",
        ),
        Row(
            "last-group-dropped",
            "        previous = item\n    yield previous\n",
            "        previous = item\n",
            "the last tensors are read, too",
        ),
    ),
    *in_file(
        "checkpoint/container.py",
        "test_checkpoint_hostile.py",
        Row(
            "header-checksum-skipped",
            'if len(head) != 8 + size or b"%08x" % zlib.crc32(blank) != head[_CHECKSUM]:',
            "if len(head) != 8 + size:",
            "a flipped bit in the header is found",
        ),
        Row("holes-pass", "if entry.start != end:", "if entry.start < end:", "data without holes"),
        Row(
            "additions-pass",
            "if end != data_size:",
            "if end > data_size:",
            "something added to a file is found",
        ),
        Row("keys-twice", "object_pairs_hook=_unique", "object_pairs_hook=dict", "JSON keeps both"),
    ),
    *in_file(
        "checkpoint/compare.py",
        "test_checkpoint_like.py",
        Row(
            "like-ignores-dtype",
            "if entry.dtype != other.dtype:",
            "if entry.dtype != other.dtype and shape != other_shape:",
            "another dtype is refused",
        ),
        Row(
            "like-ignores-additions",
            "if path not in expected_nodes and not node.children:",
            "if not expected_nodes and not node.children:",
            "every path that differs is named",
        ),
    ),
    *in_file(
        "checkpoint/files.py",
        "test_checkpoint_roundtrip.py test_checkpoint_like.py",
        Row(
            "dtype-converts-integers",
            "floating if floating is not None and dtype.is_floating_point else dtype",
            "floating or dtype",
            "dtype is for floating-point tensors",
        ),
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
            "(target.write_bytes(temporary.read_bytes()), temporary.unlink())",
            "a crash leaves the old file or the new one, whole",
        ),
        Row(
            "folder-not-synced",
            "                _flush_folder(folder)",
            "                os.fspath(path)",
            "the name is on the disk before save returns",
        ),
        Row("mode-not-kept", "os.chmod(temporary, mode)", "os.chmod(temporary, 0o600)", "the mode"),
        Row(
            "abandoned-files-stay",
            "        clear_abandoned(target.parent, re.escape(_head(target)))",
            "        os.fspath(target)",
            "the next save clears what a killed one has left",
        ),
        Row(
            "unsupported-is-an-error",
            "if error.errno not in _UNSUPPORTED:",
            "if error.errno:",
            "what a file system lacks is left out",
        ),
    ),
    *in_file(
        "checkpoint/data.py",
        "test_checkpoint_durability.py",
        Row(
            "block-summed-before-it-is-copied",
            "    return copy, _sum(copy)",
            "    return copy, _sum(block)",
            "what is written is what was summed",
        ),
    ),
    *in_file(
        "checkpoint/files.py",
        "test_checkpoint_durability.py",
        Row(
            "shapes-followed",
            "{name: tensor.detach() for name, tensor in tensors.items()}",
            "dict(tensors)",
            "a tensor that gets another shape meanwhile is written as it was",
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
            "lacking-fields-unknown",
            ", *_lacking(content, fields)]",
            "]",
            "a file may lack a field that is younger than it",
        ),
        Row(
            "defaults-not-taken",
            "fields = trees.defaults(cls) | fields",
            "fields = dict(fields)",
            "a default that JSON cannot hold is taken, too",
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
        "tree.py",
        "test_tree.py test_checkpoint_roundtrip.py",
        Row(
            "int-keys-named-like-texts",
            'return f"{key}%" if str(key) in siblings else str(key)',
            "return str(key)",
            "the keys 7 and '7' of one dict have different names",
        ),
    ),
    *in_file(
        "checkpoint/structure.py",
        "test_checkpoint_hostile.py",
        Row(
            "fields-may-change",
            "and not _same(value, kept)",
            "and type(value) is not type(kept)",
            "a network has the fields that the file states",
        ),
    ),
    *in_file(
        "checkpoint/memory_format.py",
        "test_checkpoint_roundtrip.py",
        Row(
            "copies-not-counted",
            "copies += len(layer._copy_axes())",
            "copies += 0",
            "parameters of Repeat lie in memory as init lays them out",
        ),
    ),
    *in_file(
        "checkpoint/checkpoints.py",
        "test_checkpoints.py",
        Row(
            "damage-counts",
            "    except CheckpointError:\n        return False",
            "    except CheckpointError:\n        return True",
            "a damaged file does not push out the good ones",
        ),
        Row(
            "fresh-files-are-remembered",
            "if time.time_ns() - modified > _TICK:",
            "if modified:",
            "a file may change twice at one time of its clock",
        ),
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
    *in_file(
        "checkpoint/container.py",
        "test_checkpoint_roundtrip.py",
        Row(
            "header-not-padded",
            "(-(8 + len(text)) % ALIGNMENT)",
            "(-len(text) % ALIGNMENT)",
            "the data begin at a multiple of 64",
        ),
        Row(
            "data-of-any-size-first",
            "return tensors[name].nbytes % ALIGNMENT != 0, -",
            "return False, -",
            "what may lie at a multiple of 64 does",
        ),
    ),
    *in_file(
        "checkpoint/container.py",
        "test_checkpoint_refusals.py",
        Row(
            "header-of-any-size-written",
            "if len(text) > MAX_HEADER or _count_values(text) > MAX_VALUES:",
            "if _count_values(text) > MAX_VALUES:",
            "what no reader accepts is not written",
        ),
    ),
    *in_file(
        "checkpoint/data.py",
        "test_checkpoint_durability.py",
        Row(
            "changed-file-mapped",
            "if view is not None and len(view) != header.size + header.data_size:",
            "if False:",
            "a file may change behind its header",
        ),
    ),
)
