"""The one-page examples run, learn something, and write their pictures."""

import importlib.util
import math
import runpy
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import pytest
import torch
import torch.distributed as dist

import funcnet as fn

mpl.use("Agg")
EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def example(tmp_path, monkeypatch, request):
    """The module of an example, in a folder of its own."""
    spec = importlib.util.spec_from_file_location(request.param, EXAMPLES / f"{request.param}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(tmp_path)
    yield module
    assert module.OUT.stat().st_size > 10_000


@pytest.mark.parametrize("example", ["digits"], indirect=True)
def test_digits(example):
    assert example.main(epochs=6) > 0.95


@pytest.mark.parametrize("example", ["characters"], indirect=True)
def test_characters(example):
    losses = example.main(steps=40)
    assert losses[-1] < 0.75 * losses[0]


@pytest.mark.parametrize("example", ["ensemble"], indirect=True)
def test_ensemble(example):
    assert example.main(steps=300) < 0.1


@pytest.mark.parametrize("example", ["maml"], indirect=True)
def test_maml(example):
    assert math.isfinite(after := example.main(steps=50))
    assert after < 4.5


@pytest.mark.parametrize("example", ["private"], indirect=True)
def test_private(example):
    accuracy = example.main(steps=40, clips=(1.0,), noises=(0.0, 20.0))
    assert accuracy[1.0, 20.0] < 0.6 < 0.8 < accuracy[1.0, 0.0]
    # The numbers that Abadi et al. give with their moments accountant.
    assert example.epsilon(4.0, 0.01, 10_000) == pytest.approx(1.26, abs=0.01)
    # With every example in each step it is the Gaussian mechanism: ρ(α) = α/2σ².
    orders = range(2, 257)
    expected = min(order / 2 - math.log(example.DELTA) / (order - 1) for order in orders)
    assert example.epsilon(1.0, 1 - 1e-12, 1) == pytest.approx(expected)


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.stem)
def test_help_says_what_an_example_shows(script, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit, match=r"^0$"):
        runpy.run_path(str(script), run_name="__main__")
    assert f"examples/{script.name}" in capsys.readouterr().out


# --- Many processes


def test_distributed_goes_on_with_another_number_of_processes(tmp_path, monkeypatch):
    """One process breaks off, and two go on to the parameters that one finds alone."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    monkeypatch.delenv("RANK", raising=False)
    import distributed as example

    def arguments(name):
        options = ["--steps=5", "--batch-size=5", "--patches=20", "--checkpoint-every=2"]
        return [*options, f"--out={tmp_path / name}"]

    example.main(arguments("whole"))
    calls, varied = [], example.varied

    def varied_until_it_breaks_off(*given):
        calls.append(given)
        if len(calls) == 7:
            dist.destroy_process_group()
            raise KeyboardInterrupt("in the fourth step")
        return varied(*given)

    monkeypatch.setattr(example, "varied", varied_until_it_breaks_off)
    with pytest.raises(KeyboardInterrupt, match="in the fourth step"):
        example.main(arguments("parts"))
    assert fn.Checkpoints(tmp_path / "parts" / "checkpoints").latest()[0] == 2
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = [str(EXAMPLES / "distributed.py"), *arguments("parts")]
    done = subprocess.run(
        [sys.executable, *torchrun, *script], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert [line[:7] for line in done.stdout.splitlines()] == ["step 4:", "step 5:", "held ou"]
    (_, whole), (_, parts) = (
        fn.load_model(tmp_path / name / "denoiser.safetensors") for name in ("whole", "parts")
    )
    torch.testing.assert_close(parts, whole, rtol=1e-3, atol=1e-5)
