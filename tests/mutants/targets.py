"""The files that mutants are generated for, and the tests that each mutant meets first.

A target is a glob below the root and tests, the quickest to fail first. A file belongs to the first
target that it matches. The derivations have rows in `written/` instead.
"""

_PURITY = (
    "test_properties.py::test_the_same_answer_twice_in_memory_of_its_own "
    "test_properties.py::test_bwd_may_be_called_twice_and_without_dx "
)

TARGETS: tuple[tuple[str, str], ...] = (
    (
        "funcnet/layers/activations.py",
        "test_activations.py test_errors.py test_properties.py::test_gradient[ReLU] "
        f"test_properties.py::test_gradient[Sigmoid] {_PURITY} test_gate_properties.py",
    ),
    (
        "funcnet/layers/upsample.py",
        "test_upsample.py test_errors.py test_properties.py::test_gradient[Upsample2d] "
        f"test_properties.py::test_out_shape_is_true {_PURITY} test_gate_properties.py",
    ),
    ("funcnet/losses.py", "test_losses.py test_errors.py test_gate_properties.py"),
    (
        "funcnet/combinators.py",
        f"test_sequential.py test_errors.py {_PURITY} test_gate_properties.py test_transforms.py",
    ),
)
