"""The one-page examples run, learn something, and write their pictures."""

import importlib.util
import math
from pathlib import Path

import matplotlib as mpl
import pytest

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
    accuracy = example.main(steps=40, clips=(1.0,), noises=(0.0, 20.0), rounds=1)
    assert accuracy[1.0, 20.0] < 0.6 < 0.8 < accuracy[1.0, 0.0]
    # The numbers that Abadi et al. give with their moments accountant.
    assert example.epsilon(4.0, 0.01, 10_000) == pytest.approx(1.26, abs=0.01)
    # With every example in each step it is the Gaussian mechanism: ρ(α) = α/2σ².
    orders = range(2, 257)
    expected = min(order / 2 - math.log(example.DELTA) / (order - 1) for order in orders)
    assert example.epsilon(1.0, 1 - 1e-12, 1) == pytest.approx(expected)
