"""examples/verify_a_kernel.py: gradcheck passes a mistake, which check_function finds."""

import runpy
from pathlib import Path

import pytest
import torch

from funcnet.testing import GradientMismatch, check_function

SCRIPT = Path(__file__).parents[1] / "examples" / "verify_a_kernel.py"


def test_it_finds_the_mistake_and_ends_well(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(SCRIPT)])
    runpy.run_path(str(SCRIPT), run_name="__main__")
    out = capsys.readouterr().out
    assert "torch.autograd.gradcheck passes: True" in out
    assert "Hasty: where inputs[1] alone requires a gradient, it gets another one" in out
    assert out.index("gradcheck") < out.index("Hasty") < out.index("Mended")


@pytest.mark.parametrize("reference", [None, "plain"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_mistake_is_found_in_every_dtype(dtype, reference):
    script = runpy.run_path(str(SCRIPT))
    inputs = torch.linspace(-2, 3, 12, dtype=dtype).view(3, 4), torch.ones(4, dtype=dtype)
    plain = script[reference] if reference else None
    check_function(script["RMSNorm"], *inputs, reference=plain)
    with pytest.raises(GradientMismatch, match="alone requires a gradient"):
        check_function(script["Hasty"], *inputs, reference=plain)


def test_the_mended_kernel_has_torchs_numbers():
    script = runpy.run_path(str(SCRIPT))
    x = torch.linspace(-2, 3, 12, dtype=torch.float64).view(3, 4)
    y, _ = script["RMSNorm"].apply(x, torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(y, torch.nn.functional.rms_norm(x, (4,), eps=script["EPS"]))
