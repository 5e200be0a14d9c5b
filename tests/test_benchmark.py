"""The benchmark runs, small: contenders agree, and what it writes is whole."""

from __future__ import annotations

import importlib.util
import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import optree
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import funcnet as fn

BENCHMARK = Path(__file__).parents[1] / "examples" / "benchmark"
SMALL = ["--quick", "--no-compile", "--no-jax", "--no-memory", "--threads", "1"]


def run(*words: str) -> str:
    command = [sys.executable, str(BENCHMARK), *SMALL, *words]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


@pytest.fixture
def benchmark_modules(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Its modules can be imported as its own files import them, and are forgotten afterwards."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(BENCHMARK))
    yield
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "").parent == BENCHMARK:
            del sys.modules[name]


def test_writes_report_json_and_plot(tmp_path: Path) -> None:
    printed = run("--networks", "thin", "relu", "--batch", "1", "--out", str(tmp_path))
    report = (tmp_path / "report.md").read_text(encoding="utf-8")
    assert report in printed
    assert "## Training steps" in report
    results = json.loads((tmp_path / "results.json").read_text())
    modes = [(row["network"], row["batch"], row["mode"]) for row in results["rows"]]
    assert modes == [(name, 1, mode) for name in ("thin", "relu") for mode in ("train", "infer")]
    for row in results["rows"]:
        assert {"funcnet", "torch.nn", "torch.nn channels_last"} <= row["times"].keys()
        assert all(0 < t["low"] <= t["median"] <= t["high"] for t in row["times"].values())
        fastest = row["times"][row["fastest_other"]]["median"]
        assert math.isclose(row["ratio"], fastest / row["times"]["funcnet"]["median"])
        least, middle, most = row["spread"]
        assert 0 < least <= middle <= most
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.usefixtures("benchmark_modules")
def test_says_what_it_has_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without rows there is no plot."""
    from arithmetic import Rates
    from results import Results
    from worker import Settings

    spec: Any = importlib.util.spec_from_file_location("main", BENCHMARK / "__main__.py")
    program = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(program)
    results = Results({"device": "cpu", "dtype": "float32"}, [], {}, Rates(1e9, 1e9))
    monkeypatch.setattr(program, "run", lambda *_: results)
    monkeypatch.setattr(Settings, "apply", lambda _: None)
    monkeypatch.setattr(sys, "argv", ["benchmark", "--out", str(tmp_path)])
    program.main()
    last = capsys.readouterr().out.splitlines()[-1]
    names = last.removeprefix(f"Written to {tmp_path}: ").split(", ")
    assert sorted(names) == sorted(path.name for path in tmp_path.iterdir())


@pytest.mark.parametrize(
    ("dtype", "wanted"), [("float32", 3), ("float32, mixed with bfloat16", 2)], ids=str
)
@pytest.mark.usefixtures("benchmark_modules")
def test_mixed_precision_has_a_target_of_its_own(dtype: str, wanted: float) -> None:
    from arithmetic import Rates
    from entries import OURS, PURE
    from results import Results, Row
    from targets import targets
    from timing import Times

    times = dict.fromkeys((OURS, PURE, "torch.nn"), Times(1.0, 1.0, 1.0, 1))
    rows = [Row("denoiser", 64, mode, times) for mode in ("train", "infer")]
    found = targets(Results({"dtype": dtype, "device": "cpu"}, rows, {}, Rates(1e9, 1e9)))
    step = "denoiser, batch 64: training step, against the fastest"
    assert [target.wanted for target in found if target.name == step] == [wanted]


@pytest.mark.usefixtures("benchmark_modules")
def test_memory_that_the_system_does_not_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    """As Windows, which has no `resource`."""
    import memory
    from report import _mb

    monkeypatch.setattr(memory, "resource", None)
    assert _mb(memory._resident("VmHWM")) == "–"


@pytest.mark.usefixtures("benchmark_modules")
def test_clipped_sums_agree(capsys: pytest.CaptureFixture[str]) -> None:
    from clipping import compare

    x, y = fn.normal(fn.key(0), (4, 1, 8, 8)), fn.permutation(fn.key(1), 4)
    compare(x, y, seconds=0.01)
    assert "torch.func.vmap of torch.nn" in capsys.readouterr().out


@pytest.mark.usefixtures("benchmark_modules")
def test_losses_and_layers_with_keys_agree() -> None:
    from more_layers import check, rows, timed

    found = list(rows(scale=1))
    for row in found:
        check(row)
    assert found[0].theirs()[1].abs().max() > 0.01  # batch normalisation's gradient for x
    assert re.fullmatch(r"\| Huber( \| [\d.]+ ms){2} \| [\d.]+× \|", timed(found[10], 0.001))
    with pytest.raises(AssertionError):
        check(found[0]._replace(theirs=list))


# torch.nn's attention has no rule for vmap.
@pytest.mark.filterwarnings("ignore:There is a performance drop:UserWarning")
@pytest.mark.usefixtures("benchmark_modules")
def test_ensembles_agree() -> None:
    from ensembles import rows
    from more_layers import check

    for row in rows(batch=2):
        check(row)
        assert not any(tensor.requires_grad for tensor in row.theirs())  # nothing is recorded


@pytest.mark.usefixtures("benchmark_modules")
def test_recompute_and_reversible_keep_less() -> None:
    from residuals import kept

    found = kept(torch.device("cpu"), batch=1, side=4, seconds=0.001)
    assert [row.bytes < found[0].bytes / 2 for row in found] == [False, True, True]
    assert all(row.seconds > 0 for row in found)


@pytest.mark.usefixtures("benchmark_modules")
@pytest.mark.parametrize("name", ["mlp", "transformer", "upsample-conv 128→3"])
def test_mixed_precision_agrees_with_autograd(name: str) -> None:
    import agreement
    from entries import entries
    from networks import all_networks
    from problem import Problem

    cpu = torch.device("cpu")
    (network,) = (network for network in all_networks() if network.name == name)
    problem = Problem(network, 2, torch.float32, cpu, mixed=True)
    entered = entries(cpu, compiled=False, jax=False)
    seen = {name: agreement.observed(entry(problem)) for name, entry in entered.items()}
    agreement.check(problem, seen, agreement.MIXED_TOLERANCE)
    full = agreement.observed(entered["funcnet"](Problem(network, 2, torch.float32, cpu)))
    assert not torch.equal(seen["funcnet"][0], full[0])  # bfloat16 rounds


@pytest.mark.usefixtures("benchmark_modules")
def test_growth_is_measured_in_processes_of_their_own() -> None:
    from growth import grow
    from networks import all_networks
    from problem import Problem
    from worker import Settings

    settings = Settings(torch.device("cpu"), threads=1, tf32=False, keep_memory=False)
    problem = Problem(all_networks()[0], 1, torch.float32, settings.device)
    grown = grow(problem, settings, tolerance=1e-2, sides=(32,))
    assert [found.mode for found in grown] == ["infer", "train"]
    for found in grown:
        names = {"funcnet", "torch.nn channels_last"}
        assert found.nanoseconds.keys() == found.peak.keys() == names
        assert all(value > 0 for value in found.nanoseconds.values())


@pytest.mark.usefixtures("benchmark_modules")
def test_a_difference_on_a_large_image_is_noticed() -> None:
    import agreement
    from entries import entries
    from networks import all_networks
    from problem import Problem

    problem = Problem(all_networks()[0], 1, torch.float32, torch.device("cpu"))
    contender = entries(problem.device)["torch.nn"](problem)
    start = [tensor.clone() for tensor in contender.state()]
    contender.train()
    after = contender.state()
    agreement.check_large(problem, after, after, trained=True, tolerance=1e-2)
    wrong = [1.02 * theirs - 0.02 * before for theirs, before in zip(after, start, strict=True)]
    with pytest.raises(agreement.DisagreementError, match=r"denoiser on \(3, 32, 32\): funcnet"):
        agreement.check_large(problem, wrong, after, trained=True, tolerance=1e-2)


@pytest.mark.usefixtures("benchmark_modules")
def test_networks_run_on_fake_tensors_on_a_gpu() -> None:
    """As far as a machine without one can tell: weights and data are drawn before."""
    from contenders import funcnet_in_place
    from networks import all_networks
    from problem import Problem

    for network in all_networks():
        on_cpu = Problem(network, 2, torch.float32, torch.device("cpu"))
        params, x, target = on_cpu.params(), on_cpu.x(), on_cpu.target()
        with FakeTensorMode() as mode:
            problem = _Faked(mode, network, (params, x, target))
            contender = funcnet_in_place(problem)
            assert contender.infer().device.type == "cuda"
            assert contender.train().device.type == "cuda"


class _Faked:
    """A problem whose tensors are fake ones on a GPU."""

    mixed = False

    def __init__(self, mode: FakeTensorMode, network: Any, tensors: Any) -> None:
        def fake(leaf: torch.Tensor) -> torch.Tensor:
            return mode.from_tensor(leaf).to("cuda:0")

        self.network, self.net = network, network.net[0] if network.is_layer else network.net
        self._tensors: Any = optree.tree_map(fake, tensors)

    def params(self) -> Any:
        return self._tensors[0]

    def x(self) -> torch.Tensor:
        return self._tensors[1]

    def target(self) -> torch.Tensor:
        return self._tensors[2]


def test_profile_names_every_layer() -> None:
    printed = run("--profile", "--batch", "1")
    for line in ("0: Conv2d(128, kernel_size=2, stride=2)", "7: Sigmoid()", "whole step"):
        assert line in printed


@pytest.mark.usefixtures("benchmark_modules")
def test_all_networks_agree_with_autograd() -> None:
    import agreement
    from entries import entries
    from networks import all_networks
    from problem import Problem

    cpu = torch.device("cpu")
    for network in all_networks():
        problem = Problem(network, 2, torch.float32, cpu)
        entered = entries(cpu, compiled=False, jax=False)
        seen = {name: agreement.observed(entry(problem)) for name, entry in entered.items()}
        agreement.check(problem, seen, agreement.TOLERANCE[torch.float32])


@pytest.mark.parametrize(("name", "layer"), [("denoiser", fn.Sigmoid), ("mlp", fn.ReLU)])
@pytest.mark.usefixtures("benchmark_modules")
def test_a_wrong_gradient_is_noticed(
    monkeypatch: pytest.MonkeyPatch, name: str, layer: type[fn.Layer]
) -> None:
    """Also by Adam, whose steps do not tell a gradient from its double."""
    import agreement
    from contenders import funcnet_in_place
    from networks import all_networks
    from problem import Problem

    backward = layer.bwd

    def nearly(*args: Any, **kwargs: Any) -> Any:
        dparams, dx = backward(*args, **kwargs)
        return dparams, 1.01 * dx

    monkeypatch.setattr(layer, "bwd", nearly)
    (network,) = (network for network in all_networks() if network.name == name)
    problem = Problem(network, 1, torch.float32, torch.device("cpu"))
    seen = {"funcnet": agreement.observed(funcnet_in_place(problem))}
    with pytest.raises(agreement.DisagreementError, match=f"{name}: funcnet: expected"):
        agreement.check(problem, seen, 2e-3)


@pytest.mark.usefixtures("benchmark_modules")
def test_a_contender_that_fails_says_why_and_leaves_the_environment_as_it_was() -> None:
    from worker import Settings, Worker, WorkerError

    settings = Settings(torch.device("cpu"), threads=1, tf32=False, keep_memory=False)
    before = dict(os.environ)
    with Worker("torch.nn", settings) as worker:
        assert dict(os.environ) == before
        with pytest.raises(WorkerError, match=r"^torch.nn:\n(.|\n)*no attribute 'swim'"):
            worker.clock("swim")(1)
    with (
        Worker("nobody", settings) as worker,
        pytest.raises(WorkerError, match=r"nobody: .* ended"),
    ):
        worker.clock("train")(1)


@pytest.mark.usefixtures("benchmark_modules")
@pytest.mark.parametrize(
    ("name", "keep_memory", "switch"),
    [
        ("torch.nn", False, "0"),
        ("JAX stax, jit", False, "0"),
        ("torch.nn", True, None),
        ("funcnet, pure step", False, None),
    ],
)
def test_who_keeps_freed_memory(name: str, keep_memory: bool, switch: str | None) -> None:
    from worker import Settings, allocator_of

    settings = Settings(torch.device("cpu"), threads=1, tf32=False, keep_memory=keep_memory)
    before = dict(os.environ)
    with allocator_of(name, settings):
        assert os.environ.get("FUNCNET_KEEP_MEMORY") == switch
    assert dict(os.environ) == before


@pytest.mark.usefixtures("benchmark_modules")
def test_operations_needed_by_the_denoiser() -> None:
    from arithmetic import operations
    from networks import denoiser

    first, second = 3 * 4 * 128 * 16**2, 128 * 4 * 256 * 8**2
    ups = 9 * 256 * 128 * 8**2 + 9 * 128 * 3 * 16**2
    assert operations(denoiser(), (3, 32, 32), 5) == 2 * 5 * (2 * first + 3 * (second + ups))
