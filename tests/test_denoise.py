"""examples/denoise.py, from the command line down to its parts, at tiny sizes."""

from __future__ import annotations

import csv
import importlib.util
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import optree
import pytest
import torch
from PIL import Image

import funcnet as fn

SCRIPT = Path(__file__).parents[1] / "examples" / "denoise.py"
OUTPUTS = ["denoiser.safetensors", "pictures.png", "curves.png", "history.csv"]


@pytest.fixture(scope="module")
def denoise():
    spec = importlib.util.spec_from_file_location("denoise", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["denoise"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["denoise"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three small pictures."""
    path = tmp_path_factory.mktemp("pictures")
    for i in range(3):
        save_picture(path / f"{i}.png", smooth_picture(i, 40, 50))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory, denoise):
    path = tmp_path_factory.mktemp("model") / "denoiser.safetensors"
    params = denoise.DENOISER.init(fn.key(0), (3, 32, 32))
    fn.save_model(path, denoise.DENOISER, params)
    return path


def smooth_picture(seed: int, height: int, width: int) -> np.ndarray:
    """(H, W, 3) bytes with colours that change slowly."""
    phase = fn.uniform(fn.key(seed), (3, 1, 1), 0, 6).numpy()
    rows, columns = np.mgrid[:height, :width]
    waves = np.sin(phase + rows / 9) * np.cos(2 * phase + columns / 7)
    return (127.5 + 127.5 * waves).round().astype(np.uint8).transpose(1, 2, 0)


def save_picture(path: Path, pixels: np.ndarray, mode: str = "RGB") -> Path:
    Image.fromarray(pixels).convert(mode).save(path)
    return path


def tiny(folder: Path, out: Path, **options: object) -> list[str]:
    """Arguments of a run of 2 · 4 steps."""
    options = {"patches": 16, "epochs": 2, "batch_size": 4, "lr": 0.5, **options}
    arguments = ["--images", str(folder), "--out", str(out)]
    for name, value in options.items():
        arguments += ["--" + name.replace("_", "-"), str(value)]
    return arguments


def script(*arguments: object, **kwargs: object) -> subprocess.Popen[str]:
    # One thread: bits are compared, and several of these may run side by side.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **kwargs.pop("env", {})}
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.Popen(command, env=environment, text=True, **kwargs)


def trained(out: Path) -> tuple[list[torch.Tensor], list[dict[str, str]]]:
    """The leaves of the model and of the newest checkpoint, and the history without times."""
    _, params = fn.load_model(out / "denoiser.safetensors")
    newest = fn.load(max((out / "checkpoints").glob("*.safetensors")))
    leaves = optree.tree_leaves((params, newest.params, newest.best, newest.state))
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


# --- The command line, as a user types it


def test_without_arguments_but_the_sizes(tmp_path, denoise):
    cache = tmp_path / "cache"  # where scikit-image would download to
    process = script(
        *("--patches", 70, "--epochs", 2, "--batch-size", 16, "--lr", 0.5),
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
    assert "non-local means" in out
    assert "epoch 1/2:" in err  # a bar; what it shows of so short a run depends on the machine
    assert "step/s" in err or "s/step" in err
    runs = tmp_path / "runs" / "denoise"
    assert sorted(path.name for path in runs.iterdir()) == sorted([*OUTPUTS, "checkpoints"])
    net, params = fn.load_model(runs / "denoiser.safetensors")
    assert net == denoise.DENOISER
    assert net.apply(params, torch.zeros(1, 3, 32, 32)).shape == (1, 3, 32, 32)
    with (runs / "history.csv").open() as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
    for name, least in [("pictures.png", 700), ("curves.png", 300)]:
        assert min(denoise.open_picture(runs / name).size) >= least


def test_refusals_are_one_line_on_stderr(tmp_path):
    process = script(
        "--images", tmp_path / "none", stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path
    )
    out, err = process.communicate()
    assert process.returncode == 1
    assert out == ""
    assert err == f"denoise.py: {tmp_path / 'none'}: no such folder\n"
    assert list(tmp_path.iterdir()) == []


# --- Training


def test_it_learns_from_noisy_targets(tmp_path, denoise, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(4):
        save_picture(pictures / f"{i}.png", smooth_picture(i, 48, 48))
    options = {"patches": 320, "epochs": 4, "batch_size": 8, "lr": 1, "level": 60}
    denoise.main(tiny(pictures, tmp_path / "run", **options))
    report = capsys.readouterr().out
    noisy, ours = (
        float(line.split()[-4 if "," in line else -2])
        for line in report.split("PSNR of a whole")[0].splitlines()
        if line.startswith(("  noisy", "  denoiser"))
    )
    assert ours > noisy + 3


@pytest.mark.parametrize("noise", [[], ["--noise", "poisson"]])
def test_same_seed_same_bits(tmp_path, denoise, folder, noise):
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        torch.manual_seed(random.getrandbits(32))  # nothing may depend on global randomness
        np.random.seed(random.getrandbits(32))
        denoise.main(tiny(folder, tmp_path / name, seed=seed) + noise)
    assert_same(tmp_path / "a", tmp_path / "b")
    assert not torch.equal(trained(tmp_path / "a")[0][0], trained(tmp_path / "c")[0][0])


def test_data_of_the_course(tmp_path, denoise, capsys):
    clean = torch.from_numpy(np.stack([smooth_picture(i, 16, 24) for i in range(10)]))
    pictures = clean.permute(0, 3, 1, 2)
    torch.save((pictures[:7], pictures[:7].clone()), tmp_path / "train.pkl")
    torch.save([pictures[7:], pictures[7:].clone()], tmp_path / "val.pkl")
    files = ["--data", tmp_path / "train.pkl", "--val", tmp_path / "val.pkl"]
    denoise.main([*map(str, files), "--epochs", "1", "--out", str(tmp_path / "run")])
    assert "PSNR of the 3 pictures of val.pkl:" in capsys.readouterr().out
    assert all((tmp_path / "run" / name).is_file() for name in OUTPUTS)


def test_the_best_epoch_is_kept(denoise):
    optimizer = fn.SGD(0.1)
    p = denoise.start(optimizer, (3, 32, 32), fn.key(0), torch.device("cpu"))
    for epoch, quality in enumerate([20.0, 25.0, 24.0], 1):
        for leaf in optree.tree_leaves(p.params):
            leaf.fill_(epoch)  # as training does, in place
        p = denoise.end_epoch(p, {"epoch": epoch, "psnr": quality})
    assert p.epoch == 3
    assert float(optree.tree_leaves(p.best)[0].max()) == 2


def test_a_loss_that_is_no_number_ends_it(denoise):
    p = denoise.start(fn.SGD(0.1), (3, 32, 32), fn.key(0), torch.device("cpu"))
    with pytest.raises(denoise.InputError, match="epoch 1: the loss is nan; try a smaller --lr"):
        denoise.mean_loss(p._replace(step=3, loss=math.nan))


# --- Resuming


def test_killed_and_resumed_is_as_never_killed(tmp_path, folder):
    sizes = {"patches": 40, "epochs": 3, "checkpoint_every": 1, "keep": 2}  # 30 steps
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    whole = script(*tiny(folder, tmp_path / "whole", **sizes), **quiet)
    arguments = tiny(folder, tmp_path / "killed", **sizes)
    steps = sorted(random.sample(range(1, 28), 3))
    for step in steps:
        process = script(*arguments, "--resume", **quiet)
        while process.poll() is None and newest_step(tmp_path / "killed") < step:
            time.sleep(0.005)
        time.sleep(random.uniform(0, 0.06))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
    assert script(*arguments, "--resume", **quiet).wait() == 0
    assert whole.wait() == 0
    assert_same(tmp_path / "killed", tmp_path / "whole")
    for name in ("killed", "whole"):
        assert len(list((tmp_path / name / "checkpoints").iterdir())) == 2


def newest_step(out: Path) -> int:
    names = [path.stem for path in (out / "checkpoints").glob("step-*.safetensors")]
    return max((int(name.removeprefix("step-")) for name in names), default=0)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, denoise, folder):
    """A run with a checkpoint after steps 3, 6 and, at the end, 8."""
    out = tmp_path_factory.mktemp("finished")
    denoise.main(tiny(folder, out, checkpoint_every=3))
    return out


def test_a_damaged_checkpoint_falls_back(tmp_path, denoise, folder, finished, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    newest, before = sorted((out / "checkpoints").iterdir())[:-3:-1]
    flip_a_bit(newest)
    newest_bytes = before.read_bytes()
    before.write_bytes(newest_bytes[: len(newest_bytes) // 2])
    (out / "denoiser.safetensors").unlink()
    denoise.main([*tiny(folder, out, checkpoint_every=3), "--resume"])
    warnings = capsys.readouterr().err
    for path in (newest, before):
        assert f"warning: {path}: " in warnings
    assert warnings.count("falling back to the checkpoint before") == 2
    assert_same(out, finished)


def test_nothing_whole_to_resume_from(tmp_path, denoise, folder, finished, capsys):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    for path in (out / "checkpoints").iterdir():
        flip_a_bit(path)
    before = snapshot(out)
    with pytest.raises(SystemExit, match="expected a checkpoint that is whole, got none"):
        denoise.main([*tiny(folder, out, checkpoint_every=3), "--resume"])
    assert snapshot(out) == before


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"lr": 0.25}, "lr: 0.5 then, 0.25 now"),
        ({"epochs": 3}, "epochs: 2 then, 3 now"),
        ({"noise": "poisson"}, "noise: None then, poisson now"),
    ],
)
def test_another_run_cannot_be_resumed(denoise, folder, finished, capsys, change, words):
    before = snapshot(finished)
    arguments = [*tiny(folder, finished, **change), "--resume"]
    assert words in refusal(denoise, capsys, arguments)
    assert snapshot(finished) == before


def test_resuming_without_checkpoints_begins(tmp_path, denoise, folder, finished, capsys):
    denoise.main([*tiny(folder, tmp_path / "run", checkpoint_every=3), "--resume"])
    assert "no checkpoint to resume from" in capsys.readouterr().err
    assert_same(tmp_path / "run", finished)


def test_a_new_run_clears_the_checkpoints_of_the_old(tmp_path, denoise, folder, finished):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    denoise.main(tiny(folder, out, epochs=1))
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000004.safetensors"]


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def snapshot(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- apply


@pytest.mark.parametrize("mode", ["RGB", "L", "RGBA", "LA", "P", "1"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (33, 50)])
def test_apply(tmp_path, denoise, model, mode, size):
    source = save_picture(tmp_path / "in.png", smooth_picture(0, *size), mode)
    denoise.main(["apply", str(model), str(source), str(tmp_path / "out.png")])
    result = denoise.open_picture(tmp_path / "out.png")
    assert result.size == size[::-1]
    assert result.mode == {"P": "RGB", "1": "L"}.get(mode, mode)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.png", "out.png"]


def test_apply_keeps_transparency(tmp_path, denoise, model):
    pixels = np.dstack([smooth_picture(0, 20, 30), smooth_picture(1, 20, 30)[:, :, 0]])
    source = save_picture(tmp_path / "in.png", pixels, "RGBA")
    denoise.main(["apply", str(model), str(source), str(tmp_path / "out.png")])
    alpha = np.array(denoise.open_picture(tmp_path / "out.png"))[:, :, 3]
    assert np.array_equal(alpha, pixels[:, :, 3])


@pytest.mark.parametrize("size", [(64, 96), (61, 90), (300, 40)])
def test_tiles_leave_no_seams(denoise, monkeypatch, size):
    net, params = denoise.DENOISER, denoise.DENOISER.init(fn.key(1), (3, 32, 32))
    noisy = fn.uniform(fn.key(2), (3, *size))
    monkeypatch.setattr(denoise, "TILE", 1024)
    whole = denoise.denoise_picture(net, params, noisy)
    monkeypatch.setattr(denoise, "TILE", 32)
    torch.testing.assert_close(denoise.denoise_picture(net, params, noisy), whole)
    if size[0] % 4 == size[1] % 4 == 0:
        inner = net.apply(params, noisy[None])[0, :, 8:-8, 8:-8]
        torch.testing.assert_close(whole[:, 8:-8, 8:-8], inner)


def test_apply_refuses(tmp_path, denoise, model, capsys):
    picture = save_picture(tmp_path / "in.png", smooth_picture(0, 20, 30))
    deep = tmp_path / "deep.png"
    Image.fromarray(np.zeros((20, 30), np.uint16)).save(deep)
    text = tmp_path / "text.png"
    text.write_text("no picture")
    other = tmp_path / "other.safetensors"
    halving = fn.Conv2d(3, 2, stride=2)
    fn.save_model(other, halving, halving.init(fn.key(0), (3, 8, 8)))
    gray = tmp_path / "gray.safetensors"
    fn.save_model(gray, fn.Conv2d(1, 3), fn.Conv2d(1, 3).init(fn.key(0), (1, 8, 8)))
    tree = tmp_path / "tree.safetensors"
    fn.save(tree, [torch.zeros(2)])
    out = tmp_path / "out.png"
    out.write_text("precious")
    cases = [
        (tmp_path / "none", picture, out, "none: no such file"),
        (picture, picture, out, "in.png: "),
        (tree, picture, out, "tree.safetensors: "),
        (other, picture, out, "other.safetensors: expected a network that keeps (3, H, W)"),
        (gray, picture, out, "gray.safetensors: expected a denoiser of RGB pictures"),
        (model, tmp_path / "none.png", out, "none.png: no such file"),
        (model, text, out, "text.png: expected a picture"),
        (model, tmp_path, out, "expected a picture"),
        (model, deep, out, "deep.png: expected 8 bits a channel, got a picture of mode I;16"),
        (model, picture, tmp_path / "out.doc", "out.doc: expected a name that ends in"),
        (model, picture, tmp_path / "none" / "out.png", "none: no such folder"),
    ]
    before = snapshot(tmp_path)
    for *arguments, words in cases:
        assert words in refusal(denoise, capsys, ["apply", *arguments])
        assert snapshot(tmp_path) == before
    (tmp_path / "folder.png").mkdir()
    message = refusal(denoise, capsys, ["apply", model, picture, tmp_path / "folder.png"])
    assert "/folder.png: " in message
    assert snapshot(tmp_path) == before


def test_apply_refuses_transparency_that_the_format_cannot_hold(tmp_path, denoise, model, capsys):
    source = save_picture(tmp_path / "in.png", smooth_picture(0, 20, 30), "RGBA")
    message = refusal(denoise, capsys, ["apply", model, source, tmp_path / "out.jpg"])
    assert "out.jpg: cannot write mode RGBA as JPEG" in message


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
    assert "expected at least 2 pictures" in refusal(denoise, capsys, run)
    save_picture(pictures / "0.png", smooth_picture(0, 40, 40))
    assert "one of which is held out, got 1" in refusal(denoise, capsys, run)
    save_picture(pictures / "1.png", smooth_picture(1, 31, 90))
    message = refusal(denoise, capsys, run)
    assert "1.png: expected a picture of at least 32×32, got 90×31" in message
    (pictures / "1.png").write_bytes((pictures / "0.png").read_bytes()[:200])
    assert "1.png: expected a picture, got what cannot be read" in refusal(denoise, capsys, run)


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
        ([*data, "--images", folder], 1, "do not go with it"),
        ([*data, "--level", 25], 1, "do not go with it"),
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
    picture = denoise.as_tensor(smooth_picture(0, 70, 110))
    half = torch.nn.functional.avg_pool2d(picture, 2)
    patches = denoise.cut_patches(picture, 9, fn.key(0))
    assert patches.shape == (9, 3, 32, 32)
    for patch, source in [(patches[0], picture), (patches[-1], half)]:  # a third is too small
        windows = source.unfold(1, 32, 1).unfold(2, 32, 1)
        found = (windows == patch[:, None, None]).all(-1).all(-1).all(0)
        assert found.any()
    assert denoise.cut_patches(picture[:, :32, :32], 2, fn.key(0)).equal(
        picture[None, :, :32, :32].expand(2, -1, -1, -1)
    )
    assert denoise.cut_patches(picture, 0, fn.key(0)).shape == (0, 3, 32, 32)


@pytest.mark.parametrize(("kind", "level"), [("gaussian", 25.0), ("poisson", 30.0)])
def test_noise_of_the_targets_has_mean_zero(denoise, kind, level):
    for value in (0.0, 0.1, 1.0):
        clean = torch.full((3, 200, 200), value)
        noise = denoise.Noise(kind, level).add(clean, fn.key(5)) - clean
        variance = (level / 255) ** 2 if kind == "gaussian" else value / level
        assert abs(float(noise.mean())) < 5 * math.sqrt(variance / clean.numel()) + 1e-6
        assert float(noise.var()) == pytest.approx(variance, rel=0.02, abs=1e-9)


def test_what_the_network_sees_is_clipped_and_its_target_is_not(denoise, folder):
    data = denoise.photograph_data(folder, denoise.Noise("gaussian", 60.0), 30, fn.key(0))
    assert data.noisy.min() == data.held_out_noisy.min() == 0
    assert data.noisy.max() == data.held_out_noisy.max() == 1
    assert data.target.min() < 0
    assert data.target.max() > 1
    assert (data.noisy == data.target).float().mean() < 1e-4  # two copies, not one
    assert (data.held_out_clean >= 0).all()


def test_psnr(denoise):
    clean = torch.zeros(2, 3, 4, 4)
    pictures = clean + torch.tensor([0.1, 0.5]).reshape(2, 1, 1, 1)
    torch.testing.assert_close(denoise.psnr(pictures, clean), torch.tensor([20.0, 6.0206]))
    assert torch.isfinite(denoise.psnr(clean, clean)).all()


def test_the_strength_of_noise_is_estimated(denoise):
    clean = denoise.as_tensor(smooth_picture(0, 101, 102))[None] / 2 + 0.25
    noisy = clean + fn.normal(fn.key(0), clean.shape, std=0.1)
    assert denoise.estimate_sigma(noisy) == pytest.approx(0.1, rel=0.05)
    flat = torch.full((1, 3, 16, 16), 0.5)
    torch.testing.assert_close(denoise.non_local_means(flat), flat)


def test_the_schedule_rises_and_falls(denoise):
    lr = denoise.schedule(2.0, 1000)
    assert lr(0) == pytest.approx(0.02)
    assert lr(99) == pytest.approx(2.0, rel=0.03)
    assert lr(999) < 1e-4
    assert denoise.schedule(2.0, 1)(0) == pytest.approx(2.0)


def test_shuffling_is_a_permutation(denoise):
    order = denoise.shuffled(100, fn.key(0))
    assert sorted(order.tolist()) == list(range(100))
    assert order.tolist() != list(range(100))


def test_photographs_are_turned_upright(tmp_path, denoise):
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: to be turned by a quarter
    Image.fromarray(smooth_picture(0, 40, 60)).save(tmp_path / "turned.jpg", exif=turned)
    assert denoise.read_photograph(tmp_path / "turned.jpg").shape == (3, 60, 40)
