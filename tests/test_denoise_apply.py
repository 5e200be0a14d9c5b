"""The pictures of examples/denoise.py: reading, writing, tiles, and the command `apply`."""

from __future__ import annotations

import io
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tifffile
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageCms, ImageOps

import funcnet as fn

EXAMPLES = Path(__file__).parents[1] / "examples"
PROFILE = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
ZEROS = fn.initializers.Zeros()
UNCHANGED = fn.Residual(fn.Conv2d(3, 1, weight_init=ZEROS, bias_init=ZEROS))


@pytest.fixture(scope="module")
def denoising():
    """The modules of the example, which are found as they are when it runs as a script."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        import denoise
        from denoising import errors, pictures, tiles

        yield SimpleNamespace(main=denoise.main, errors=errors, pictures=pictures, tiles=tiles)


def saved(path: Path, net: fn.Layer, seed: int = 0) -> Path:
    fn.save_model(path, net, net.init(fn.key(seed), (3, 32, 32)))
    return path


@pytest.fixture
def unchanged(tmp_path):
    """A model that gives back what it is given."""
    return saved(tmp_path / "unchanged.safetensors", UNCHANGED)


def random_pixels(shape: tuple[int, ...], dtype: type, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype, endpoint=True)


def refusal(denoising, arguments: list[object]) -> str:
    """What a command that must be refused says, in one line."""
    with pytest.raises(SystemExit) as caught:
        denoising.main(list(map(str, arguments)))
    message = caught.value.code
    assert message.startswith("denoise.py: ")
    assert "\n" not in message
    return message


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# --- Tiles


def halving(stride: int, dilation: int) -> fn.Layer:
    """A network of this stride that sees far by dilation."""
    wide = fn.Conv2d(3, 3, padding=dilation, dilation=dilation)
    inner = (fn.Conv2d(4, stride, stride=stride), fn.UpsampleConv2d(3, scale=stride))
    return fn.Sequential(wide, *inner, wide)


@given(
    stride=st.sampled_from([1, 2, 3, 4, 8]),
    dilation=st.integers(1, 9),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 70)),
    tile=st.integers(1, 40),
    seed=st.integers(0, 9),
)
def test_tiles_equal_one_piece(denoising, stride, dilation, sizes, tile, seed):
    net = halving(stride, dilation)
    denoiser = denoising.tiles.Denoiser.of(net, net.init(fn.key(seed), (3, 32, 32)))
    noisy = fn.uniform(fn.key(seed), (3, *sizes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(denoising.tiles, "TILE", 1000)
        whole = denoiser.picture(noisy)
        patch.setattr(denoising.tiles, "TILE", tile)
        torch.testing.assert_close(denoiser.picture(noisy), whole)
    if all(size % stride == 0 for size in sizes):
        torch.testing.assert_close(whole, net.apply(denoiser.params, noisy[None])[0].clamp(0, 1))


@pytest.mark.parametrize(
    ("net", "stride", "reach"),
    [
        (fn.Conv2d(3, 1), 1, 0),
        (fn.Conv2d(3, 3, padding=1), 1, 1),
        (fn.Sequential(fn.Conv2d(4, 5, padding=2), fn.Conv2d(3, 3, padding=1)), 1, 3),
        (fn.Conv2d(3, 3, padding=60, dilation=60), 1, 60),
        (fn.Sequential(fn.MaxPool2d(2), fn.Upsample2d(2)), 2, 1),
        (fn.Sequential(fn.AvgPool2d(6), fn.Upsample2d(6)), 6, 5),
        (fn.Sequential(fn.Conv2d(4, 16, stride=16), fn.UpsampleConv2d(3, scale=16)), 16, 16),
        (fn.Sequential(fn.Conv2d(3, 32, stride=32), fn.UpsampleConv2d(3, scale=32)), 32, 32),
        (fn.Sequential(fn.Conv2d(6, 3, padding=1), fn.GroupNorm(2), fn.Conv2d(3, 1)), 1, None),
    ],
    ids=str,
)
def test_stride_and_reach_are_found(denoising, net, stride, reach):
    """(A network may see beyond its reach in one direction only: the larger one counts.)"""
    denoiser = denoising.tiles.Denoiser.of(net, net.init(fn.key(0), (3, 32, 32)))
    assert denoiser.stride == stride
    assert denoiser.reach == reach


def test_memory_is_bounded(denoising, monkeypatch):
    """No window is larger than a tile and its margins, however large the picture."""
    monkeypatch.setattr(denoising.tiles, "TILE", 16)
    net = halving(2, 3)
    denoiser = denoising.tiles.Denoiser.of(net, net.init(fn.key(0), (3, 32, 32)))
    seen = []

    def read(window):
        seen.append([span.stop - span.start for span in window])
        return torch.zeros(3, *seen[-1])

    rows = [(rows.start, rows.stop) for rows, _ in denoiser.bands(read, 100, 50)]
    assert rows == [(top, min(top + 16, 100)) for top in range(0, 100, 16)]
    assert max(map(max, seen)) <= 16 + 2 * (denoiser.reach + 1)


# --- Pictures in files


@given(
    sizes=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    channels=st.integers(1, 4),
    dtype=st.sampled_from([np.uint8, np.uint16]),
    suffix=st.sampled_from([".png", ".tif"]),
    profile=st.sampled_from([None, PROFILE]),
)
def test_what_is_written_is_read(
    tmp_path_factory, denoising, sizes, channels, dtype, suffix, profile
):
    path = tmp_path_factory.mktemp("picture") / f"picture{suffix}"
    pixels = random_pixels((*sizes, channels), dtype)
    denoising.pictures.write(path, denoising.pictures.Picture(pixels, profile))
    again = denoising.pictures.read(path)
    assert again.pixels.dtype == dtype
    assert np.array_equal(again.pixels, pixels)
    assert again.icc_profile == profile
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
def test_lossy_formats(tmp_path, denoising, suffix):
    pixels = np.full((16, 24, 3), (200, 100, 50), np.uint8)
    path = tmp_path / f"picture{suffix}"
    denoising.pictures.write(path, denoising.pictures.Picture(pixels, PROFILE))
    again = denoising.pictures.read(path)
    assert again.icc_profile == PROFILE
    assert np.abs(again.pixels.astype(int) - pixels).max() <= 3


@pytest.mark.parametrize(
    ("mode", "channels"), [("1", 1), ("L", 1), ("LA", 2), ("P", 3), ("RGB", 3), ("RGBA", 4)]
)
def test_modes_of_8_bits(tmp_path, denoising, mode, channels):
    image = Image.fromarray(random_pixels((7, 5, 3), np.uint8)).convert(mode)
    image.save(tmp_path / "picture.png")
    pixels = denoising.pictures.read(tmp_path / "picture.png").pixels
    expected = np.asarray(image.convert(denoising.pictures.MODES[channels]))
    assert np.array_equal(pixels, expected.reshape(7, 5, channels))


def test_a_transparent_colour_is_alpha(tmp_path, denoising):
    pixels = random_pixels((6, 4, 3), np.uint8)
    color = tuple(map(int, pixels[2, 1]))
    Image.fromarray(pixels).save(tmp_path / "picture.png", transparency=color)
    found = denoising.pictures.read(tmp_path / "picture.png").pixels
    assert np.array_equal(found[:, :, :3], pixels)
    assert np.array_equal(found[:, :, 3] == 0, (pixels == color).all(2))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("deep", [False, True])
def test_pictures_are_turned_upright(tmp_path, denoising, orientation, deep):
    path = tmp_path / "picture.tif"
    pixels = random_pixels((3, 5, 3), np.uint16 if deep else np.uint8)
    tags = [(274, "H", 1, orientation, True)]
    tifffile.imwrite(path, pixels, photometric="rgb", extratags=tags)
    image = Image.fromarray((pixels >> 8 if deep else pixels).astype(np.uint8))
    image.getexif()[274] = orientation
    expected = np.asarray(ImageOps.exif_transpose(image))
    found = denoising.pictures.read(path).pixels
    assert np.array_equal((found >> 8 if deep else found).astype(np.uint8), expected)


def test_other_tiffs(tmp_path, denoising):
    """Compressed as cameras do, in planes, or white at 0."""
    path, pixels = tmp_path / "picture.tif", random_pixels((6, 8, 3), np.uint16)
    tifffile.imwrite(path, pixels, photometric="rgb", compression="lzw", predictor=True)
    assert np.array_equal(denoising.pictures.read(path).pixels, pixels)
    planes = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    tifffile.imwrite(path, planes, photometric="rgb", planarconfig="separate")
    assert np.array_equal(denoising.pictures.read(path).pixels, pixels)
    tifffile.imwrite(path, pixels[:, :, 0], photometric="miniswhite")
    assert np.array_equal(denoising.pictures.read(path).pixels, 65535 - pixels[:, :, :1])


def write_kind(path: Path, kind: str) -> None:
    """A file that is refused."""
    pixels = random_pixels((8, 8, 3), np.uint8)
    image = Image.fromarray(pixels)
    if kind == "pages":
        tifffile.imwrite(path, np.stack([pixels, pixels]), photometric="rgb")
    elif kind == "animation":
        image.save(path, "WEBP", save_all=True, append_images=[ImageOps.invert(image)])
    elif kind == "LAB":
        tifffile.imwrite(path, pixels, photometric="cielab")
    elif kind == "LAB of 16 bits":
        tifffile.imwrite(path, pixels.astype(np.uint16), photometric="cielab")
    elif kind == "CMYK":
        image.convert("CMYK").save(path, "JPEG")
    elif kind in ("float32", "uint32", "int16"):
        tifffile.imwrite(path, pixels[:, :, 0].astype(kind), photometric="minisblack")
    elif kind == "GIF":
        image.save(path, "GIF")
    elif kind == "half":
        image.save(path, "PNG")
        path.write_bytes(path.read_bytes()[:100])
    elif kind == "half of 16 bits":
        tifffile.imwrite(path, pixels.astype(np.uint16), photometric="rgb")
        path.write_bytes(path.read_bytes()[:400])
    elif kind == "text":
        path.write_text("no picture")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("pages", "expected one image, got 2 pages"),
        ("animation", "expected one image, got 2 pages"),
        ("LAB", "expected gray or RGB, got colours of the kind CIELAB"),
        ("LAB of 16 bits", "expected gray or RGB, got colours of the kind CIELAB"),
        ("CMYK", "expected gray or RGB, got colours of the kind CMYK"),
        ("float32", "expected 8 or 16 bits a channel, got float32"),
        ("uint32", "expected 8 or 16 bits a channel, got uint32"),
        ("int16", "expected 8 or 16 bits a channel, got int16"),
        ("GIF", "expected an image, got what cannot be read"),
        ("half", "expected an image, got what cannot be read"),
        ("half of 16 bits", "expected an image, got what cannot be read"),
        ("text", "expected an image, got what cannot be read"),
        ("nothing", "no such file"),
    ],
)
def test_pictures_that_are_refused(tmp_path, denoising, kind, words):
    path = tmp_path / "picture.png"
    write_kind(path, kind)
    with pytest.raises(denoising.errors.InputError) as caught:
        denoising.pictures.read(path)
    assert f"{path}: {words}" in str(caught.value)


def test_previews_behind_a_jpeg_are_left_out(tmp_path, denoising):
    """As cameras write them: the format MPO."""
    image = Image.fromarray(random_pixels((16, 16, 3), np.uint8))
    image.save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[image.resize((8, 8))])
    assert denoising.pictures.read(tmp_path / "a.jpg").pixels.shape == (16, 16, 3)


# --- apply


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_a_network_that_changes_nothing_changes_nothing(
    tmp_path, denoising, monkeypatch, unchanged, channels, dtype, suffix
):
    """Not a bit, in dark 16-bit pictures either; profile and transparency stay."""
    monkeypatch.setattr(denoising.tiles, "TILE", 8)
    pixels = random_pixels((21, 30, channels), dtype) // 40
    source, target = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    denoising.pictures.write(source, denoising.pictures.Picture(pixels, PROFILE))
    denoising.main(["apply", str(unchanged), str(source), str(target)])
    result = denoising.pictures.read(target)
    assert np.array_equal(result.pixels, pixels)
    assert result.icc_profile == PROFILE


def test_apply_is_the_network(tmp_path, denoising, monkeypatch):
    monkeypatch.setattr(denoising.tiles, "TILE", 8)
    net = fn.Sequential(halving(4, 5), fn.Sigmoid())
    model = saved(tmp_path / "model.safetensors", net, seed=3)
    pixels = random_pixels((40, 64, 4), np.uint16)
    denoising.pictures.write(tmp_path / "in.png", denoising.pictures.Picture(pixels))
    denoising.main(["apply", str(model), str(tmp_path / "in.png"), str(tmp_path / "out.png")])
    result = denoising.pictures.read(tmp_path / "out.png").pixels.astype(int)
    assert np.array_equal(result[:, :, 3], pixels[:, :, 3])
    x = torch.from_numpy(pixels[:, :, :3].astype(np.float32) / 65535).permute(2, 0, 1)[None]
    y = net.apply(fn.load(model), x)[0].permute(1, 2, 0).numpy()
    assert np.abs(result[:, :, :3] - y * 65535).max() <= 1


def test_a_network_that_may_see_all_is_applied_in_one_piece(tmp_path, denoising, capsys):
    net = fn.Sequential(fn.Conv2d(4, 3, padding=1), fn.GroupNorm(1), fn.Conv2d(3, 1), fn.Sigmoid())
    model = saved(tmp_path / "model.safetensors", net)
    pixels = random_pixels((40, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "in.png")
    denoising.main(["apply", str(model), str(tmp_path / "in.png"), str(tmp_path / "out.png")])
    assert "in.png: denoised in one piece" in capsys.readouterr().err
    x = denoising.pictures.as_floats(pixels)
    y = denoising.pictures.as_integers(net.apply(fn.load(model), x[None])[0], pixels)
    result = np.asarray(Image.open(tmp_path / "out.png"))
    assert np.abs(result.astype(int) - y).max() <= 1


def test_a_folder(tmp_path, denoising, unchanged, capsys):
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "folder.png").mkdir(parents=True)
    for name in ("a.png", "b.JPG", "._a.png", "notes.txt"):
        (folder / name).write_bytes(b"no picture")
    Image.fromarray(random_pixels((9, 9, 3), np.uint8)).save(folder / "a.png")
    Image.fromarray(random_pixels((9, 9, 3), np.uint8)).save(folder / "b.JPG", "JPEG")
    denoising.main(["apply", str(unchanged), str(folder), str(out)])
    assert sorted(path.name for path in out.iterdir()) == ["a.png", "b.JPG"]
    assert np.array_equal(Image.open(out / "a.png"), Image.open(folder / "a.png"))
    assert "._" not in capsys.readouterr().err


def test_one_that_cannot_be_read_does_not_stop_the_others(tmp_path, denoising, unchanged, capsys):
    paths = [tmp_path / f"{name}.png" for name in "abc"]
    for path in paths:
        Image.fromarray(random_pixels((9, 9, 3), np.uint8)).save(path)
    paths[1].write_text("no picture")
    message = refusal(denoising, ["apply", unchanged, *paths, tmp_path / "out"])
    assert "1 of 3 images could not be denoised" in message
    assert f"warning: {paths[1]}: expected an image" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["a.png", "c.png"]


def test_nothing_is_replaced_unless_forced(tmp_path, denoising, unchanged):
    image = Image.fromarray(random_pixels((9, 9, 3), np.uint8))
    image.save(tmp_path / "in.png")
    out = tmp_path / "out"
    out.mkdir()
    (out / "in.png").write_text("precious")
    for target in (out, out / "in.png"):
        command = ["apply", unchanged, tmp_path / "in.png", target]
        message = refusal(denoising, command)
        assert f"{out / 'in.png'}: is there already; --force replaces it" in message
        assert (out / "in.png").read_text() == "precious"
    denoising.main([*map(str, command), "--force"])
    assert np.array_equal(Image.open(out / "in.png"), image)


def test_what_apply_refuses(tmp_path, denoising, unchanged):
    picture = tmp_path / "in.png"
    Image.fromarray(random_pixels((9, 9, 4), np.uint8)).save(picture)
    deep = tmp_path / "deep.png"
    pixels = random_pixels((9, 9, 3), np.uint16)
    denoising.pictures.write(deep, denoising.pictures.Picture(pixels))
    other = saved(tmp_path / "other.safetensors", fn.Conv2d(3, 2, stride=2))
    gray = tmp_path / "gray.safetensors"
    fn.save_model(gray, fn.Conv2d(1, 3), fn.Conv2d(1, 3).init(fn.key(0), (1, 8, 8)))
    norm = saved(tmp_path / "norm.safetensors", fn.BatchNorm())
    tree = tmp_path / "tree.safetensors"
    fn.save(tree, [torch.zeros(2)])
    (tmp_path / "empty").mkdir()
    (tmp_path / "more").mkdir()
    Image.fromarray(random_pixels((9, 9, 3), np.uint8)).save(tmp_path / "more" / "in.png")
    out = tmp_path / "out.png"
    cases = [
        ([tmp_path / "none", picture, out], "none: no such file"),
        ([picture, picture, out], "in.png: "),
        ([tree, picture, out], "tree.safetensors: "),
        ([other, picture, out], "other.safetensors: expected a network that keeps (3, H, W)"),
        ([gray, picture, out], "gray.safetensors: "),
        ([norm, picture, out], "norm.safetensors: "),
        ([unchanged, tmp_path / "none.png", out], "none.png: no such file"),
        ([unchanged, tmp_path / "empty", out], "empty: expected images"),
        ([unchanged, picture, tmp_path / "out.doc"], "out.doc: expected a name that ends in"),
        ([unchanged, picture, tmp_path / "none" / "out.png"], "none: no such folder"),
        ([unchanged, picture, tmp_path / "more", tmp_path / "new"], "two of this one"),
        ([unchanged, picture, tmp_path / "out.jpg"], "out.jpg: cannot write mode RGBA as JPEG"),
        ([unchanged, deep, tmp_path / "out.jpg"], "expected .png or .tif for 16 bits a channel"),
    ]
    before = contents(tmp_path)
    for arguments, words in cases:
        assert words in refusal(denoising, ["apply", *arguments])
        assert contents(tmp_path) == before


def test_an_output_that_cannot_be_written(tmp_path, denoising, monkeypatch, unchanged):
    Image.fromarray(random_pixels((9, 9, 3), np.uint8)).save(tmp_path / "in.png")

    def full(*_arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    message = refusal(denoising, ["apply", unchanged, tmp_path / "in.png", tmp_path / "out.png"])
    assert f"{tmp_path / 'out.png'}: " in message
    assert "No space left" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.png", unchanged.name]


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_files_that_write_a_part_at_a_time(tmp_path, denoising, monkeypatch, suffix):
    """As a raw file may do, without an error."""
    write = io.FileIO.write

    class Slow(io.FileIO):
        def write(self, content):
            return write(self, memoryview(content)[:100])

    @contextmanager
    def replacing(path):
        with Slow(path, "w+") as file:
            yield file

    monkeypatch.setattr(denoising.pictures, "replacing", replacing)
    pixels, path = random_pixels((30, 20, 3), np.uint16), tmp_path / f"out{suffix}"
    denoising.pictures.write(path, denoising.pictures.Picture(pixels))
    assert np.array_equal(denoising.pictures.read(path).pixels, pixels)


def test_others_can_read_a_deep_png(denoising):
    """Pillow, another reader than ours, finds it whole, with its profile."""
    pixels = random_pixels((5, 4, 3), np.uint16)
    file = io.BytesIO()
    denoising.pictures.encode(file, Path("a.png"), denoising.pictures.Picture(pixels, PROFILE))
    image = Image.open(io.BytesIO(file.getvalue()))
    image.verify()
    assert image.info["icc_profile"] == PROFILE
    image = Image.open(io.BytesIO(file.getvalue()))
    assert np.array_equal(np.asarray(image), (pixels >> 8).astype(np.uint8))
