"""The files that mutants are generated for, and the tests that each mutant meets first.

A target is a glob below the root and tests, the quickest to fail first. A file belongs to the first
target that it matches. The derivations have rows in `written/` instead.
"""

_PURITY = (
    "test_properties.py::test_the_same_answer_twice_in_memory_of_its_own "
    "test_properties.py::test_what_is_not_asked_for_is_none "
)


def _family(name: str) -> tuple[str, str]:
    return f"funcnet/layers/{name}.py", f"test_{name}.py {_PURITY} test_errors.py"


TARGETS: tuple[tuple[str, str], ...] = (
    *map(_family, ("activations", "attention", "dropout", "embedding", "linear", "normalization")),
    *map(_family, ("conv", "conv_transpose", "pixel_shuffle", "pooling", "recurrent", "shape")),
    _family("upsample"),
    ("funcnet/losses/*.py", "test_losses.py test_errors.py"),
    (
        "funcnet/combinators/*.py",
        f"test_sequential.py test_combinators.py test_errors.py {_PURITY}",
    ),
    ("funcnet/layer.py", "test_layer.py test_errors.py test_sequential.py"),
    ("funcnet/fields.py", "test_layer.py test_errors.py"),
    ("funcnet/gradients.py", "test_gradients.py"),
    ("funcnet/initializers.py", "test_initializers.py"),
    ("funcnet/batch_statistics.py", "test_batch_statistics.py"),
    ("funcnet/optimizers/*.py", "test_optimizers.py test_partition.py test_norms.py"),
    ("funcnet/schedules.py", "test_schedules.py"),
)
