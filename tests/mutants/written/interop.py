"""Bugs in the translation between networks and torch.nn modules."""

from __future__ import annotations

from ..mutant import Row, in_file

INTEROP = (
    *in_file(
        "interop/from_torch.py",
        "test_interop.py",
        Row(
            "running-variance-without-eps",
            "scale = (variance + module.eps).rsqrt()",
            "scale = variance.rsqrt()",
            "√(σ² + ε) is what a normalisation divides by",
        ),
        Row(
            "running-mean-not-scaled",
            "shift = -mean * scale",
            "shift = -mean",
            "the mean is scaled, too",
        ),
    ),
    *in_file(
        "interop/unrolled.py",
        "test_interop.py",
        Row(
            "norm-first-is-norm-last",
            "if module.norm_first:",
            "if not module.norm_first:",
            "TransformerEncoderLayer has its norms behind the sums unless told otherwise",
        ),
    ),
    *in_file(
        "interop/to_torch.py",
        "test_interop.py",
        Row(
            "time-before-batch",
            '"batch_first": True,',
            '"batch_first": False,',
            "x has the batch in front",
        ),
    ),
    *in_file(
        "interop/as_module.py",
        "test_interop.py",
        Row(
            "gradients-in-the-order-of-names",
            "enumerate(names_of(structure))",
            "enumerate(state_dict(params))",
            "leaves have optree's order, names that of the dict",
        ),
    ),
    *in_file(
        "interop/wrap.py",
        "test_interop.py",
        Row(
            "written-x-handed-on",
            "if self.traits.writes_x else given",
            "if False else given",
            "a module that writes over its input gets a copy",
        ),
    ),
    *in_file(
        "interop/state_dict.py",
        "test_interop.py",
        Row(
            "state-shared",
            "value.detach().clone(memory_format=torch.contiguous_format)",
            "value.detach().contiguous()",
            "parameters are copies of a module's",
        ),
    ),
)
