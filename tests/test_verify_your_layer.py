"""examples/verify_your_layer.py finds the mistake in a layer and passes the mended one."""

import runpy
from pathlib import Path

import pytest

from funcnet.testing import check_vjp

SCRIPT = Path(__file__).parents[1] / "examples" / "verify_your_layer.py"


def test_it_finds_the_mistake_and_ends_well(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(SCRIPT)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    out = capsys.readouterr().out
    assert "Hasty(): the gradient for params['slope'][" in out
    assert "it is too small by a factor of 4: a mean over the batch instead of a sum" in out
    assert out.index("To replay it") < out.index("Mended") < out.index("50 random cases")


def test_the_snippet_of_its_message_replays():
    script = runpy.run_path(str(SCRIPT))
    fn, layer = script["fn"], script["Hasty"]()
    x = fn.normal(fn.key(1), (4, 3, 5, 5))
    with pytest.raises(script["GradientMismatch"]) as caught:
        check_vjp(layer, layer.init(fn.key(0), (3, 5, 5)), x)
    code = caught.value.snippet.replace("from <run_path> import Hasty\n", "")
    with pytest.raises(script["GradientMismatch"], match="slope"):
        exec(code, {"Hasty": script["Hasty"]})
