"""The files that mutants are generated for, and the tests that each mutant meets first.

A target is a glob below the root and tests, the quickest to fail first. A file belongs to the first
target that it matches. The tests of a layer's file follow from its name and from the registry, so
that a new file is found without a word here. What `ops/` holds for convolutions has rows in
`written/` instead: most of what an operator changes there costs time and changes no number.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from funcnet.testing.registry import REGISTRY
from funcnet.testing.registry.row import Row

from .runner import ROOT


def _family(file: Path) -> tuple[str, str]:
    """Return a file of layers with the tests of its name, then the properties of each class."""
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    others = [other.stem for other in file.parent.glob(f"{file.stem}_*.py")]
    found = sorted(path.name for path in (ROOT / "tests").glob(f"test_{file.stem}*.py"))
    tests = [name for name in found if not name.startswith(tuple(f"test_{o}" for o in others))]
    if file.parent.name == "combinators":
        tests += ["test_combinators.py", *([] if tests else ["test_sequential.py"])]
    for cls, row in REGISTRY.items():
        if cls.__module__ == module:
            tests += [f"test_properties.py::{test}[{cls.__name__}]" for test in _properties(row)]
    source = file.read_text(encoding="utf-8")
    tests += [others for name, others in _WRITTEN.items() if name in source]
    tests += [f"test_properties.py::{test}" for test in _QUICK]
    return file.relative_to(ROOT).as_posix(), " ".join([*tests, "test_errors.py"])


_DEFAULTS = "test_arguments_have_torchs_order_and_defaults"
_QUICK = ("test_what_is_not_asked_for_is_not_computed", _DEFAULTS)
"""The properties that take no longer for all layers than for one."""


_WRITTEN = {
    "class Kernels(": (
        "test_conv.py test_conv_ranks.py test_conv_transpose.py test_upsample_conv.py "
        "test_pooling.py test_per_example.py"
    ),
    "_tile": "test_tiling.py",
    "def cropped(": "test_tiling.py",
    "_bwd_each": "test_per_example.py",
    "_bwd_(": "test_sequential.py",
    " as_pair(": "test_layer.py",
    "widened(": "test_half_precision.py::test_terms_that_float16_cannot_hold_cancel",
    "coupling(": "test_gradients.py::test_what_micro_batches_refuse test_batch_statistics.py",
    "def _laid_out(": ("test_transforms.py::test_compiled_gradients_of_activations_in_two_layouts"),
}
"""The tests of what a file of layers may hold besides formulas."""


def _properties(row: Row) -> Iterator[str]:
    """Yield the properties of a layer, the quickest first."""
    yield from ("test_what_is_not_asked_for_is_none", "test_out_shape_is_true")
    yield "test_what_may_be_written_over_is_promised"
    if row.twin:
        yield "test_value_and_gradients_are_torchs"
    if row.classes is None:
        yield "test_gradient"
    yield "test_the_same_answer_twice_in_memory_of_its_own"


def _families() -> Iterator[tuple[str, str]]:
    for folder in ("layers", "combinators"):
        for file in sorted((ROOT / "funcnet" / folder).glob("*.py")):
            if file.stem != "__init__":
                yield _family(file)


_CELLS = " ".join(
    f"test_per_example.py::test_every_layer[{cls}(3)-4x2] "
    f"test_properties.py::test_what_is_not_asked_for_is_none[{cls}] "
    f"test_properties.py::test_the_same_answer_twice_in_memory_of_its_own[{cls}]"
    for cls in ("RNN", "LSTM", "GRU")
)

_NORMS = (
    f"test_normalization.py test_properties.py::{_QUICK[0]} "
    "test_per_example.py::test_every_layer "
    "test_export.py::test_gradients_of_norms_traced_for_any_batch "
    "test_transforms.py::test_gradients_can_be_differentiated "
    "test_transforms.py::test_vjp_in_half_precision[cpu-torch.bfloat16-LayerNorm()-(5,)]"
)

_OPS = {
    "attention": "test_attention.py test_fake_cuda.py::test_layers",
    "conv_transpose": (
        "test_conv_transpose.py test_properties.py::test_what_is_not_asked_for_is_not_computed"
    ),
    "counter": " ".join(
        f"test_dropout.py::test_{name}"
        for name in (
            *("the_generator_stays_as_it_is", "chunks_are_one_sequence"),
            *("an_entry_is_hit_where_its_number_is_below_p", "probabilities_at_the_ends"),
            *("drawn_on_a_gpu_without_asking_it", "compiled_once_for_batches_of_any_size"),
            "compiled_it_writes_to_no_other_memory",
        )
    )
    + " test_export.py::test_masks_of_a_saved_program_are_the_keys",
    "each": (
        "test_optimizers.py "
        "test_gate_properties.py::test_a_step_of_many_states_is_the_step_of_each "
        "test_gate_properties.py::test_step_underscore_writes_into_what_it_was_given"
    ),
    "embedding": "test_embedding.py",
    "fused": "test_optimizers.py",
    "nll": "test_losses.py",
    **dict.fromkeys(("group_norm", "norm_kernels", "normalization"), _NORMS),
    "pooling": (
        "test_pooling.py test_export.py::test_max_pooling_of_signals_of_any_length "
        "test_transforms.py::test_compiled_gradients_of_means_of_windows_beyond_the_padding"
    ),
    **dict.fromkeys(("recurrent", "recurrent_op"), f"test_recurrent.py {_CELLS}"),
    "stacking": "test_combinators.py",
    "trees": (
        "test_tree.py test_transforms.py::test_compiled_steps_of_dicts_without_tensors "
        "test_transforms.py::test_compiled_where_named_layers_have_no_parameters"
    ),
}

TARGETS: tuple[tuple[str, str], ...] = (
    *_families(),
    *((f"funcnet/ops/{name}.py", tests) for name, tests in _OPS.items()),
    (
        "funcnet/losses/*.py",
        f"test_losses.py test_properties.py::{_DEFAULTS} test_errors.py test_gradients.py",
    ),
    (
        "funcnet/param.py",
        "test_layer.py test_errors.py test_attention.py test_upsample_conv.py test_linear.py "
        "test_gate_properties.py test_shape.py test_recurrent.py test_embedding.py",
    ),
    (
        "funcnet/running.py",
        "test_layer.py test_sequential.py test_combinators.py test_tiling.py "
        f"test_properties.py::{_QUICK[0]}",
    ),
    (
        "funcnet/layer.py",
        "test_layer.py test_errors.py test_sequential.py test_combinators.py "
        "test_gate_properties.py::test_tensors_on_another_device_are_refused "
        "test_linear.py::test_refusals test_tiling.py::test_what_is_cut test_batch_statistics.py",
    ),
    (
        "funcnet/fields.py",
        "test_fields.py test_errors.py test_activations.py::test_refused_settings "
        "test_sequential.py test_layer.py test_package.py "
        "test_transforms.py::test_a_compiled_step_that_makes_all_it_needs "
        "test_transforms.py::test_a_layer_made_in_a_compiled_function_that_is_broken_in_two "
        "test_transforms.py::test_a_layer_of_a_new_class_is_refused_in_a_compiled_function",
    ),
    ("funcnet/compat.py", "test_private_names.py"),
    ("funcnet/position.py", "test_combinators.py test_sequential.py"),
    (
        "funcnet/checks.py",
        "test_errors.py test_layer.py test_optimizers.py test_shape.py test_combinators.py",
    ),
    ("funcnet/initializers.py", "test_initializers.py"),
    ("funcnet/gradients.py", "test_gradients.py"),
    ("funcnet/summary.py", "test_summary.py test_combinators.py test_errors.py"),
    (
        "funcnet/tree.py",
        "test_tree.py test_initializers.py::test_files_know_public_initialisers_alone "
        "test_checkpoint_roundtrip.py",
    ),
    (
        "funcnet/batch_statistics.py",
        "test_batch_statistics.py test_fake_cuda.py::test_batch_statistics",
    ),
    (
        "funcnet/optimizers/*.py",
        "test_optimizers.py test_partition.py test_norms.py "
        "test_fake_mps.py::test_counts_of_many_states_on_the_device",
    ),
    ("funcnet/schedules.py", "test_schedules.py"),
)
