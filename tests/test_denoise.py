"""examples/denoise.py, from the command line down to its parts, at tiny sizes."""

from __future__ import annotations

import csv
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import optree
import pytest
import torch
from PIL import Image

import funcnet as fn

EXAMPLES = Path(__file__).parents[1] / "examples"
SCRIPT = EXAMPLES / "denoise.py"
OUTPUTS = ["denoiser.safetensors", "pictures.png", "curves.png", "history.csv"]


@pytest.fixture(scope="module")
def denoise():
    """The script and its modules, on one thread: bits are compared with those of a subprocess."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import denoise as script
        from denoising import data, evaluation, figures, noise, pairs, progress, report, run, tiles

        modules = (data, evaluation, figures, noise, pairs, progress, report, run, tiles)
        parts = {module.__name__.split(".")[1]: module for module in modules}
        yield SimpleNamespace(main=script.main, script=script, **parts)
    torch.set_num_threads(threads)


@pytest.fixture
def bare(denoise, monkeypatch):
    """The script without its tables and figures, which take longest."""
    monkeypatch.setattr(denoise.report, "write_report", denoise.report.save_best)
    return denoise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three small pictures."""
    path = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        save_picture(path / f"{i}.png", smooth_picture(i, 40, 50))
    return path


def smooth_picture(seed: int, height: int, width: int) -> np.ndarray:
    """(H, W, 3) bytes with colours that change slowly."""
    phase = fn.uniform(fn.key(seed), (3, 1, 1), 0, 6).numpy()
    rows, columns = np.mgrid[:height, :width]
    waves = np.sin(phase + rows / 9) * np.cos(2 * phase + columns / 7)
    return (127.5 + 127.5 * waves).round().astype(np.uint8).transpose(1, 2, 0)


def save_picture(path: Path, pixels: np.ndarray) -> Path:
    Image.fromarray(pixels).save(path)
    return path


def tiny(folder: Path, out: Path, **options: object) -> list[str]:
    """Arguments of a run of 2 · 4 steps of the smaller network."""
    options = {"patches": 16, "epochs": 2, "batch_size": 4, "network": "report", **options}
    arguments = ["--images", str(folder), "--out", str(out)]
    for name, value in options.items():
        if value is not None:
            arguments += ["--" + name.replace("_", "-"), str(value)]
    return arguments


def script(*arguments: object, **kwargs: object) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **kwargs.pop("env", {})}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, **kwargs)


def newest(out: Path) -> Path:
    return max((out / "checkpoints").glob("step-*.safetensors"))


def trained(out: Path) -> tuple[list[torch.Tensor], list[dict[str, str]]]:
    """The leaves of the model and of the newest checkpoint, and the history without times."""
    _, params = fn.load_model(out / "denoiser.safetensors")
    last = fn.load(newest(out))
    leaves = optree.tree_leaves((params, last.params, last.best, last.state))
    with (out / "history.csv").open() as file:
        history = [{k: v for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)]
    return leaves, history


def assert_same(a: Path, b: Path) -> None:
    """Two runs have come to the same bits."""
    (leaves, history), (others, other_history) = trained(a), trained(b)
    assert history == other_history
    assert len(leaves) == len(others)
    for x, y in zip(leaves, others, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(x, y)


def refusal(denoise, capsys, arguments: list[object], status: int = 1) -> str:
    """What a command that must be refused says, in one line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        denoise.main(list(map(str, arguments)))
    message = capsys.readouterr().err
    if status == 1:
        assert message == ""  # sys.exit prints what follows
        message = caught.value.code
        assert isinstance(message, str)
    else:
        assert caught.value.code == status
        message = message.removesuffix("\n")
    assert message.startswith("denoise.py: ")
    assert "\n" not in message
    return message


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- The command line, as a user types it


def test_without_arguments_but_the_sizes(tmp_path, denoise):
    cache = tmp_path / "cache"  # where scikit-image would download to
    process = script(
        *("--patches", 70, "--epochs", 2),
        cwd=tmp_path,
        env={"SKIMAGE_DATADIR": str(cache)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    out, err = process.communicate()
    assert process.returncode == 0, err
    assert not cache.exists()
    assert "epoch 1: loss 0." in out
    assert "epoch 2: loss 0." in out
    assert "PSNR of 7 held-out patches with Gaussian noise, σ = 25/255:" in out
    for name in ("noisy", "non-local means", "denoiser"):
        lines = [line for line in out.splitlines() if line.startswith(f"  {name} ")]
        assert len(lines) == 2
        assert all(" dB" in line and "SSIM 0." in line for line in lines)
    assert "epoch 1:" in err  # a bar; what it shows of so short a run depends on the machine
    assert "step/s" in err or "s/step" in err
    runs = tmp_path / "runs" / "denoise"
    assert sorted(path.name for path in runs.iterdir()) == sorted([*OUTPUTS, "checkpoints"])
    net, params = fn.load_model(runs / "denoiser.safetensors")
    assert net == denoise.script.UNET
    assert net.apply(params, torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)
    with (runs / "history.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    for name, least in [("pictures.png", 700), ("curves.png", 300)]:
        with Image.open(runs / name) as image:
            assert min(image.size) >= least


# --- Training


def test_it_learns_from_noisy_targets(tmp_path, bare):
    """And the U-Net begins as the identity."""
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(4):
        save_picture(pictures / f"{i}.png", smooth_picture(i, 48, 48))
    options = {"network": "unet", "patches": 100, "epochs": 3, "batch_size": 4, "level": 60}
    bare.main(tiny(pictures, tmp_path / "run", **options))
    noise = bare.noise.Noise("gaussian", 60.0)
    data = bare.data.photograph_data(pictures, noise, 100, fn.key(0))
    before = bare.evaluation.mean_psnr(data.held_out_noisy, data.held_out_target)
    with (tmp_path / "run" / "history.csv").open() as file:
        after = [float(row["psnr"]) for row in csv.DictReader(file)]
    assert after[-1] > before + 3
    net = bare.script.UNET
    assert torch.equal(net.apply(net.init(fn.key(1), (3, 8, 8)), torch.ones(1, 3, 8, 8)),
                       torch.ones(1, 3, 8, 8))  # fmt: skip


@pytest.mark.parametrize("noise", ["gaussian", "poisson"])
def test_same_seed_same_bits(tmp_path, bare, folder, noise):
    for name, seed in [("a", 3), ("b", 3), ("c", 4)][: 3 if noise == "gaussian" else 2]:
        torch.manual_seed(random.getrandbits(32))  # nothing may depend on global randomness
        np.random.seed(random.getrandbits(32))
        bare.main(tiny(folder, tmp_path / name, seed=seed, noise=noise))
    assert_same(tmp_path / "a", tmp_path / "b")
    if noise == "gaussian":
        assert not torch.equal(trained(tmp_path / "a")[0][0], trained(tmp_path / "c")[0][0])


def test_data_of_the_course(tmp_path, denoise, capsys):
    clean = torch.from_numpy(np.stack([smooth_picture(i, 16, 24) for i in range(10)]))
    pictures = clean.permute(0, 3, 1, 2)
    torch.save((pictures[:7], pictures[:7].clone()), tmp_path / "train.pkl")
    torch.save([pictures[7:], pictures[7:].clone()], tmp_path / "val.pkl")
    files = ["--data", tmp_path / "train.pkl", "--val", tmp_path / "val.pkl"]
    denoise.main([*map(str, files), "--epochs", "1", "--out", str(tmp_path / "run")])
    assert "PSNR of the 3 images of val.pkl:" in capsys.readouterr().out
    assert all((tmp_path / "run" / name).is_file() for name in OUTPUTS)


def test_the_best_epoch_is_kept(denoise):
    net = denoise.script.REPORTS_NETWORK
    p = denoise.progress.start(net, fn.SGD(0.1).init, (3, 8, 8), fn.key(0), "cpu", {})
    for epoch, quality in enumerate([20.0, 25.0, 24.0], 1):
        for leaf in optree.tree_leaves(p.params):
            leaf.fill_(epoch)  # as training does, in place
        p = p.after_epoch({"epoch": epoch, "psnr": quality})
    assert p.epoch == 3
    assert float(optree.tree_leaves(p.best)[0].max()) == 2


def test_a_loss_that_is_not_a_number_ends_it(tmp_path, denoise, folder):
    with pytest.raises(SystemExit, match=r"epoch 1: the loss is .*; try a smaller --lr$"):
        denoise.main(tiny(folder, tmp_path, network="unet", lr=1000))


def test_batches_are_varied(denoise):
    """In all ways, and one in eight is gray; both copies of a pair alike."""
    x = fn.uniform(fn.key(0), (2, 3, 4, 6))
    variants = [denoise.script.varied(x, fn.fold_in(fn.key(1), i)) for i in range(400)]
    assert all(y.is_contiguous() for y in variants)
    assert torch.equal(variants[0], denoise.script.varied(x, fn.fold_in(fn.key(1), 0)))
    is_gray = [torch.equal(y[:, 0], y[:, 1]) and torch.equal(y[:, 0], y[:, 2]) for y in variants]
    assert 25 < sum(is_gray) < 80
    expected = [torch.rot90(z, k, (2, 3)) for z in (x, x.flip(3)) for k in range(4)]
    found = {
        next(i for i, z in enumerate(expected) if z.shape == y.shape and torch.equal(y, z))
        for y, gray in zip(variants, is_gray, strict=True)
        if not gray
    }
    assert found == set(range(8))


# --- Resuming


@pytest.fixture(scope="module")
def finished(tmp_path_factory, denoise, folder):
    """A run with checkpoints after steps 0, 3, 6 and, at the end, 8, of which three stay."""
    out = tmp_path_factory.mktemp("finished")
    denoise.main(tiny(folder, out, checkpoint_every=3))
    assert [path.stem for path in sorted((out / "checkpoints").iterdir())] == [
        f"step-{step:08}" for step in (3, 6, 8)
    ]
    return out


def test_killed_and_resumed_is_as_never_killed(tmp_path, bare, folder):
    sizes = {"patches": 40, "epochs": 3, "checkpoint_every": 1, "keep": 2}  # 30 steps
    bare.main(tiny(folder, tmp_path / "whole", **sizes))
    arguments = tiny(folder, tmp_path / "killed", **sizes)
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    process = script(*arguments, **quiet)
    last = random.randrange(1, 28)
    while process.poll() is None and newest_step(tmp_path / "killed") < last:
        time.sleep(0.005)
    time.sleep(random.uniform(0, 0.06))
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    bare.main([*arguments, "--resume"])
    assert_same(tmp_path / "killed", tmp_path / "whole")
    assert len(list((tmp_path / "killed" / "checkpoints").iterdir())) == 2


def newest_step(out: Path) -> int:
    names = [path.stem for path in (out / "checkpoints").glob("step-*.safetensors")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


class Killed(BaseException):
    """What nothing in the script catches."""


@contextmanager
def killed_after(step: int) -> Iterator[None]:
    """Ends what happens inside when the checkpoint of a step has been written."""
    save = fn.Checkpoints.save

    def save_and_die(self: fn.Checkpoints, at: int, tree: object) -> None:
        save(self, at, tree)
        if at == step:
            raise Killed

    with pytest.MonkeyPatch.context() as patch, suppress(Killed):
        patch.setattr(fn.Checkpoints, "save", save_and_die)
        yield
        pytest.fail("it went on")


@pytest.fixture(scope="module")
def continued(tmp_path_factory, denoise, folder):
    """A U-Net's run of two epochs, and a third one that was asked for later."""
    out = tmp_path_factory.mktemp("continued")
    for epochs in (2, 3):
        denoise.main([*tiny(folder, out, network="unet", epochs=epochs), "--resume"])
    return out


@pytest.mark.parametrize("last", [0, 2, 4, 8])
def test_killed_after_any_checkpoint(tmp_path, bare, folder, continued, last):
    """Also between the last step of an epoch and its end, and where the goal is raised."""
    sizes = {"network": "unet", "checkpoint_every": 1}
    with killed_after(last):
        bare.main(tiny(folder, tmp_path, **sizes))
    bare.main([*tiny(folder, tmp_path, **{**sizes, "epochs": 3}), "--resume"])
    assert_same(tmp_path, continued)


def test_minutes_are_decided_once(tmp_path, bare, monkeypatch, folder):
    """A resumed run has the steps that the first one chose, though its machine may be slower."""
    minutes = {"epochs": None, "minutes": 0.02, "checkpoint_every": 1}
    monkeypatch.setattr(bare.run.Run, "seconds_per_step", lambda *_: 0.2)
    bare.main(tiny(folder, tmp_path / "whole", **minutes))
    last = fn.load(newest(tmp_path / "whole"))
    assert (last.goals, last.ends, last.steps, last.epoch) == ([0.02], [6], 6, 2)
    with killed_after(5):
        bare.main(tiny(folder, tmp_path / "killed", **minutes))
    monkeypatch.setattr(bare.run.Run, "seconds_per_step", lambda *_: 1.0)
    bare.main([*tiny(folder, tmp_path / "killed", **minutes), "--resume"])
    assert_same(tmp_path / "killed", tmp_path / "whole")
    bare.main([*tiny(folder, tmp_path / "killed", **{**minutes, "minutes": 0.07}), "--resume"])
    last = fn.load(newest(tmp_path / "killed"))
    assert (last.goals, last.ends, last.steps) == ([0.02, 0.07], [6, 9], 9)


def test_minutes_are_measured(tmp_path, bare, folder):
    """On a copy: the trial leaves no trace in the parameters."""
    bare.main(tiny(folder, tmp_path, epochs=None, minutes=0.01))
    first = fn.load(tmp_path / "checkpoints" / "step-00000000.safetensors")
    net, key = bare.script.REPORTS_NETWORK, fn.split(fn.key(0))[1]
    untried = bare.progress.start(net, fn.SGD(0.1).init, (3, 32, 32), key, "cpu", {})
    assert first.steps == 0 < first.ends[0]
    for x, y in zip(*(optree.tree_leaves(p.params) for p in (first, untried)), strict=True):
        assert torch.equal(x, y)
    assert fn.load(newest(tmp_path)).steps == first.ends[0]


def test_training_goes_on_for_more_epochs(tmp_path, bare, folder, finished):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    bare.main([*tiny(folder, out, epochs=3), "--resume"])
    last = fn.load(newest(out))
    assert (last.epoch, last.steps, last.ends) == (3, 12, [8, 12])
    assert [row["epoch"] for row in last.history] == [1, 2, 3]
    assert last.history[:2] == fn.load(newest(finished)).history
    again = snapshot(out)
    for epochs in (3, None):  # there is nothing left to do
        bare.main([*tiny(folder, out, epochs=epochs), "--resume"])
        assert snapshot(out) == again


def test_the_schedule_begins_anew_after_each_goal(denoise):
    data = SimpleNamespace(noisy=torch.zeros(1))
    recipe = denoise.script.RECIPES["unet"]
    options = SimpleNamespace(lr=1.0, momentum=0.9)
    run = denoise.run.Run(options, recipe, data, fn.Checkpoints("none"), 0.0)
    lr = run.optimizer([10, 30]).lr
    for begin, steps in [(0, 10), (10, 20)]:
        expected = fn.schedules.one_cycle(1.0, steps)
        assert [lr(begin + t) for t in range(steps)] == [expected(t) for t in range(steps)]


def test_a_damaged_checkpoint_falls_back(tmp_path, bare, folder, finished, capsys):
    """Twice: good checkpoints are not pruned in favour of damaged ones."""
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before, last = sorted((out / "checkpoints").iterdir())[-2:]
    flip_a_bit(last)
    content = before.read_bytes()
    before.write_bytes(content[: len(content) // 2])
    later = out / "checkpoints" / "step-00000099.safetensors"
    later.write_bytes(content[:100])
    (out / "denoiser.safetensors").unlink()
    bare.main([*tiny(folder, out, checkpoint_every=1), "--resume"])
    warnings = capsys.readouterr().err
    for path in (last, before, later):
        assert f"passing over a damaged file: {path}: " in warnings
    later.rename(tmp_path / "later")
    assert_same(out, finished)
    names = [path.stem for path in sorted((out / "checkpoints").iterdir())]
    assert names == [f"step-{step:08}" for step in (6, 7, 8)]


def test_nothing_whole_to_resume_from(tmp_path, bare, folder, finished):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for path in (out / "checkpoints").iterdir():
        flip_a_bit(path)
    before = snapshot(out)
    with pytest.raises(SystemExit, match="expected a checkpoint that is whole, got none"):
        bare.main([*tiny(folder, out), "--resume"])
    assert snapshot(out) == before


def test_a_model_is_not_taken_for_a_checkpoint(tmp_path, bare, folder, finished):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for name in ("best", "step-best"):
        shutil.copy(out / "denoiser.safetensors", out / "checkpoints" / f"{name}.safetensors")
    bare.main([*tiny(folder, out, epochs=3), "--resume"])
    assert fn.load(out / "checkpoints" / "step-00000012.safetensors").steps == 12
    model = out / "checkpoints" / "step-00000099.safetensors"
    shutil.copy(out / "denoiser.safetensors", model)
    before = snapshot(out)
    with pytest.raises(SystemExit, match=r"step-00000099\.safetensors: expected a checkpoint of"):
        bare.main([*tiny(folder, out, epochs=3), "--resume"])
    assert snapshot(out) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.25}, "lr: 1.0 then, 0.25 now"),
        ({"epochs": 1}, "--epochs: expected at least the 2 of the run to resume, got 1"),
        ({"noise": "poisson"}, "noise: None then, poisson now"),
        ({"network": "unet"}, "network: report then, unet now"),
        ({"epochs": None, "minutes": 2}, "--minutes: expected --epochs, as in the run to resume"),
    ],
)
def test_another_run_cannot_be_resumed(bare, folder, finished, capsys, change, words):
    before = snapshot(finished)
    arguments = [*tiny(folder, finished, **change), "--resume"]
    assert words in refusal(bare, capsys, arguments)
    assert snapshot(finished) == before


def test_resuming_without_checkpoints_begins(tmp_path, bare, folder, finished, capsys):
    bare.main([*tiny(folder, tmp_path / "run", checkpoint_every=3), "--resume"])
    assert "no checkpoint to resume from" in capsys.readouterr().err
    assert_same(tmp_path / "run", finished)


def test_a_new_run_clears_the_checkpoints_of_the_old(tmp_path, bare, folder, finished):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    bare.main(tiny(folder, out, epochs=1))
    names = [path.name for path in sorted((out / "checkpoints").iterdir())]
    assert names == ["step-00000000.safetensors", "step-00000004.safetensors"]


def test_a_new_run_that_cannot_write_removes_nothing(tmp_path, bare, folder, finished, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = snapshot(out / "checkpoints")

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(fn.Checkpoints, "save", full)
    with pytest.raises((OSError, SystemExit)):
        bare.main(tiny(folder, out, epochs=1))
    assert snapshot(out / "checkpoints") == before


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


# --- The user's own pairs


@pytest.fixture
def shots(tmp_path):
    """Two noisy shots of three scenes, in two folders."""
    folders = tmp_path / "first", tmp_path / "second"
    for k, path in enumerate(folders):
        path.mkdir()
        for i in range(3):
            noise = fn.normal(fn.key(10 * k + i), (40, 50, 3), std=20.0).numpy()
            pixels = (smooth_picture(i, 40, 50) + noise).clip(0, 255).astype(np.uint8)
            save_picture(path / f"{i}.png", pixels)
    return folders


def test_pairs(tmp_path, denoise, shots, capsys):
    """Matched by name, whatever the format. Without a clean picture there is no PSNR."""
    (shots[0] / "._1.png").write_text("no picture")
    Image.open(shots[1] / "1.png").save(shots[1] / "1.tif")
    (shots[1] / "1.png").unlink()
    out = tmp_path / "run"
    denoise.main(["--pairs", *map(str, shots), *tiny(tmp_path, out)[2:]])
    printed = capsys.readouterr().out
    assert "epoch 2: loss 0." in printed
    assert "held-out loss 0." in printed
    assert "Mean squared error against the other noisy copy, 1 held-out patches of first" in printed
    assert "(no PSNR: no image is clean)" in printed
    assert " dB" not in printed
    assert all((out / name).is_file() for name in OUTPUTS)
    assert "held_out_loss" in fn.inspect(out / "denoiser.safetensors").metadata


def test_patches_of_pairs_are_of_the_same_places(denoise, shots):
    for path in shots[0].iterdir():
        Image.open(shots[1] / path.name).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)
        Image.open(path).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(shots[1] / path.name)
    for path in shots[1].iterdir():
        shutil.copy(path, shots[0] / path.name)
    data = denoise.pairs.pair_data(shots, 20, fn.key(0))
    assert len(data.noisy) == 20
    assert torch.equal(data.noisy, data.target)
    assert torch.equal(data.held_out_noisy, data.held_out_target)
    assert not data.is_clean


def test_pairs_that_are_refused(tmp_path, bare, shots, capsys):
    run = ["--pairs", *shots, "--out", tmp_path / "run"]
    assert "none: no such folder" in refusal(
        bare, capsys, ["--pairs", shots[0], tmp_path / "none", "--out", tmp_path / "run"]
    )
    save_picture(shots[0] / "3.png", smooth_picture(3, 40, 50))
    assert f"{shots[1]}: expected the other shot of each image, lacking 1 (3)" in refusal(
        bare, capsys, run
    )
    save_picture(shots[1] / "3.png", smooth_picture(3, 50, 40))
    message = refusal(bare, capsys, run)
    assert f"{shots[1] / '3.png'}: expected the size of {shots[0] / '3.png'}, 50×40" in message
    shutil.copy(shots[0] / "3.png", shots[0] / "3.tif")
    assert "expected one image a name" in refusal(bare, capsys, run)
    for option in (["--images", shots[0]], ["--noise", "poisson"], ["--level", 3]):
        assert "does not go with it" in refusal(bare, capsys, [*run, *option])
    assert not (tmp_path / "run").exists()


# --- What training refuses


@pytest.fixture
def precious(tmp_path):
    """The outputs of an earlier run, which no refused command may touch."""
    out = tmp_path / "run"
    (out / "checkpoints").mkdir(parents=True)
    for name in [*OUTPUTS, "checkpoints/step-00000001.safetensors"]:
        (out / name).write_text("precious")
    before = snapshot(out)
    yield out
    assert snapshot(out) == before


def test_folders_that_are_refused(tmp_path, denoise, precious, capsys):
    pictures = tmp_path / "pictures"
    run = ["--images", pictures, "--out", precious]
    assert "pictures: no such folder" in refusal(denoise, capsys, run)
    pictures.mkdir()
    assert "expected at least 2 images" in refusal(denoise, capsys, run)
    save_picture(pictures / "0.png", smooth_picture(0, 40, 40))
    assert "one of which is held out, got 1" in refusal(denoise, capsys, run)
    save_picture(pictures / "1.png", smooth_picture(1, 31, 90))
    message = refusal(denoise, capsys, run)
    assert "1.png: expected an image of at least 32×32, got 90×31" in message
    (pictures / "1.png").write_bytes((pictures / "0.png").read_bytes()[:200])
    assert "1.png: expected an image, got what cannot be read" in refusal(denoise, capsys, run)


def pair_of(*shape: int, dtype: torch.dtype = torch.uint8) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(shape, dtype=dtype), torch.zeros(shape, dtype=dtype)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (torch.zeros(2, 3, 8, 8), "expected a pair of uint8 tensors (N, 3, H, W), got Tensor"),
        (pair_of(2, 3, 8, 8)[:1], "got tuple"),
        ((1, 2), "got int in it"),
        (pair_of(2, 3, 8, 8, dtype=torch.float32), "got torch.float32 of shape (2, 3, 8, 8)"),
        (pair_of(2, 1, 8, 8), "got torch.uint8 of shape (2, 1, 8, 8)"),
        (pair_of(3, 8, 8), "got torch.uint8 of shape (3, 8, 8)"),
        (pair_of(0, 3, 8, 8), "of one shape, N ≥ 1, got (0, 3, 8, 8) and (0, 3, 8, 8)"),
        (pair_of(2, 3, 8, 8)[:1] + pair_of(3, 3, 8, 8)[:1], "(2, 3, 8, 8) and (3, 3, 8, 8)"),
        (pair_of(2, 3, 8, 10), "with H and W multiples of 4, got shape (2, 3, 8, 10)"),
        (pair_of(2, 3, 0, 8), "with H and W multiples of 4, got shape (2, 3, 0, 8)"),
        (Path("a class"), "expected a file that torch.load(weights_only=True) reads"),
        (b"", "expected a file that torch.load(weights_only=True) reads, got EOFError"),
        (b"no pickle", "expected a file that torch.load(weights_only=True) reads"),
        (None, "no such file"),
    ],
)
@pytest.mark.parametrize("wrong", ["train.pkl", "val.pkl"])
def test_tensors_that_are_refused(tmp_path, denoise, precious, capsys, wrong, content, words):
    for name in ("train.pkl", "val.pkl"):
        torch.save(pair_of(2, 3, 8, 8), tmp_path / name)
    if content is None:
        (tmp_path / wrong).unlink()
    elif isinstance(content, bytes):
        (tmp_path / wrong).write_bytes(content)
    else:
        torch.save(content, tmp_path / wrong)
    arguments = ["--data", tmp_path / "train.pkl", "--val", tmp_path / "val.pkl", "--out", precious]
    message = refusal(denoise, capsys, arguments)
    assert f"{wrong}: " in message
    assert words in message


def test_options_that_are_refused(tmp_path, denoise, folder, precious, capsys):
    out = ["--out", precious]
    data = ["--data", "a.pkl", "--val", "b.pkl"]
    cases = [
        ([*data[:2]], 1, "--data and --val: expected both or neither"),
        ([*data[2:]], 1, "--data and --val: expected both or neither"),
        ([*data, "--images", folder], 1, "does not go with it"),
        ([*data, "--level", 25], 1, "does not go with it"),
        (["--epochs", 0], 2, "argument --epochs: expected a whole number from 1"),
        (["--epochs", 1.5], 2, "got '1.5'"),
        (["--lr", "nan"], 2, "argument --lr: expected a number from"),
        (["--level", -1], 2, "argument --level"),
        (["--noise", "pink"], 2, "argument --noise: invalid choice"),
        (["--device", "tpu"], 2, "argument --device: invalid choice"),
        (["--seed", 2**64], 2, "argument --seed"),
        (["--sigma=3"], 2, "unrecognized arguments"),
        (["apply", "model"], 2, "the following arguments are required"),
    ]
    if not torch.cuda.is_available():
        cases.append((["--device", "cuda"], 1, "--device cuda: no such device here"))
    for arguments, status, words in cases:
        assert words in refusal(denoise, capsys, [*out, *arguments], status)


def test_an_output_that_cannot_be_written(tmp_path, denoise, folder, capsys):
    (tmp_path / "file").write_text("precious")
    message = refusal(denoise, capsys, tiny(folder, tmp_path / "file"))
    assert f"{tmp_path / 'file'}" in message
    assert (tmp_path / "file").read_text() == "precious"


# --- Its parts


def test_patches_are_crops_of_the_picture_at_several_sizes(denoise):
    picture = denoise.data.as_floats(smooth_picture(0, 70, 110))
    half = torch.nn.functional.avg_pool2d(picture, 2)
    patches = denoise.data.cut_patches(picture, 9, fn.key(0))
    assert patches.shape == (9, 3, 32, 32)
    for patch, source in [(patches[0], picture), (patches[-1], half)]:  # a third is too small
        windows = source.unfold(1, 32, 1).unfold(2, 32, 1)
        found = (windows == patch[:, None, None]).all(-1).all(-1).all(0)
        assert found.any()
    assert denoise.data.cut_patches(picture[:, :32, :32], 2, fn.key(0)).equal(
        picture[None, :, :32, :32].expand(2, -1, -1, -1)
    )
    assert denoise.data.cut_patches(picture, 0, fn.key(0)).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(("kind", "level"), [("gaussian", 25.0), ("poisson", 30.0)])
def test_noise_of_the_targets_has_mean_zero(denoise, kind, level):
    for value in (0.0, 0.1, 1.0):
        clean = torch.full((3, 200, 200), value)
        noise = denoise.noise.Noise(kind, level).add(clean, fn.key(5)) - clean
        variance = (level / 255) ** 2 if kind == "gaussian" else value / level
        assert abs(float(noise.mean())) < 5 * math.sqrt(variance / clean.numel()) + 1e-6
        assert float(noise.var()) == pytest.approx(variance, rel=0.02, abs=1e-9)


def test_what_the_network_sees_is_clipped_and_its_target_is_not(denoise, folder):
    data = denoise.data.photograph_data(
        folder, denoise.noise.Noise("gaussian", 60.0), 30, fn.key(0)
    )
    assert data.noisy.min() == data.held_out_noisy.min() == 0
    assert data.noisy.max() == data.held_out_noisy.max() == 1
    assert data.target.min() < 0
    assert data.target.max() > 1
    assert (data.noisy == data.target).float().mean() < 1e-4  # two copies, not one
    assert (data.held_out_target >= 0).all()


def test_psnr(denoise):
    clean = torch.zeros(2, 3, 4, 4)
    pictures = clean + torch.tensor([0.1, 0.5]).reshape(2, 1, 1, 1)
    torch.testing.assert_close(
        denoise.evaluation.psnr(pictures, clean), torch.tensor([20.0, 6.0206])
    )
    assert torch.isfinite(denoise.evaluation.psnr(clean, clean)).all()


@pytest.mark.parametrize(
    ("height", "width", "is_clean"), [(1100, 8, True), (8, 1100, False), (4, 4, True)]
)
def test_figures_of_any_shape(tmp_path, denoise, height, width, is_clean):
    pictures = fn.uniform(fn.key(0), (1, 3, height, width))
    data = denoise.data.Data(*[pictures] * 4, (pictures[0], pictures[0]), "one", is_clean)
    params = denoise.script.REPORTS_NETWORK.init(fn.key(0), (3, 32, 32))
    denoiser = denoise.tiles.Denoiser.of(denoise.script.REPORTS_NETWORK, params)
    results = denoise.evaluation.compare(denoiser, data)
    title = "the centre of a" if max(height, width) > 1024 else "a whole"
    assert f"{title} held-out photograph:" in results[1].table()
    denoise.figures.write_pictures(tmp_path / "pictures.png", results)
    with Image.open(tmp_path / "pictures.png") as image:
        assert image.width == 1300
        assert image.height < 5000


def test_the_strength_of_noise_is_estimated(denoise):
    clean = denoise.data.as_floats(smooth_picture(0, 101, 102))[None] / 2 + 0.25
    noisy = clean + fn.normal(fn.key(0), clean.shape, std=0.1)
    assert denoise.evaluation.estimate_sigma(noisy) == pytest.approx(0.1, rel=0.05)
    flat = torch.full((1, 3, 16, 16), 0.5)
    torch.testing.assert_close(denoise.evaluation.non_local_means(flat), flat)


def test_photographs_are_turned_upright(tmp_path, denoise):
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: to be turned by a quarter
    Image.fromarray(smooth_picture(0, 40, 60)).save(tmp_path / "turned.jpg", exif=turned)
    assert denoise.data.read_photograph(tmp_path / "turned.jpg").shape == (3, 60, 40)
