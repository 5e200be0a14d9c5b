"""What a user meets first: the names of the package, and its overview."""

import inspect
import pydoc
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import funcnet as fn


def test_only_public_names_complete():
    assert {name for name in dir(fn) if not name.startswith("_")} == set(fn.__all__)
    assert all(hasattr(fn, name) for name in fn.__all__)


def test_importing_it_imports_no_compiler():
    """PyTorch's takes a second, three times as long as all of the package."""
    use = "import sys, funcnet as fn; fn.Linear(2).init(fn.key(0), (3,))"
    script = f"{use}; sys.exit('torch._dynamo' in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_help_opens_with_every_name_by_family():
    assert set(fn.__all__) <= set(re.findall(r"\w+", fn.__doc__ or ""))
    assert "combinators  Sequential" in pydoc.render_doc(fn)[:4000]


def test_what_value_and_grad_returns_explains_itself():
    step = fn.value_and_grad(fn.ReLU(), fn.MSE())
    assert list(inspect.signature(step).parameters) == ["params", "x", "target", "key"]
    assert "(params, x, target, key=None)" in (inspect.getdoc(step) or "")


def test_the_user_script_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = runpy.run_path(str(Path(__file__).with_name("user_script.py")))
    assert names["loaded"] == names["net"]
    assert names["found"] is None


@pytest.mark.parametrize(
    ("base", "names"),
    [
        (fn.Layer, ["_params", "_layout", "_out_shape", "_fwd", "_bwd", "_bwd_each", "_tile"]),
        (fn.Layer, ["_check_x"]),
        (fn.Loss, ["_check", "_fwd", "_bwd", "_count"]),
    ],
)
def test_authors_may_name_the_arguments(base, names):
    """Type checkers refuse another name where a caller might use the base class's."""
    for name in names:
        _, *arguments = inspect.signature(getattr(base, name)).parameters.values()
        assert arguments
        assert {argument.kind for argument in arguments} == {inspect.Parameter.POSITIONAL_ONLY}
