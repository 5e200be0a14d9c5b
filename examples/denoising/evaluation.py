"""The measures of a denoiser, beside the noisy images and a classical denoiser."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from skimage.metrics import structural_similarity
from skimage.restoration import denoise_nl_means
from torch import Tensor

from denoising.data import Data, scaled
from denoising.tiles import Denoiser

MOST_SIDE = 1024


@dataclass(frozen=True)
class Result:
    """Images of one size, (N, 3, H, W), and what became of them."""

    title: str
    noisy: Tensor
    classical: Tensor
    denoised: Tensor
    target: Tensor
    is_clean: bool
    """Whether the target is the clean image, or another noisy copy."""

    def rows(self) -> dict[str, Tensor]:
        return {
            "noisy": self.noisy,
            "non-local means": self.classical,
            "denoiser": self.denoised,
        }

    def quality(self, pictures: Tensor) -> float:
        """PSNR, or the mean squared error where no image is clean."""
        return (mean_psnr if self.is_clean else mse)(pictures, self.target)

    def table(self) -> str:
        """PSNR and SSIM, or the loss between the copies where no image is clean."""
        if not self.is_clean:
            lines = [f"Mean squared error against the other noisy copy, {self.title}:"]
            lines += [f"  {name:<15}  {self.quality(x):.6f}" for name, x in self.rows().items()]
            return "\n".join([*lines, "  (no PSNR: no image is clean)"])
        lines = [f"PSNR of {self.title}:"]
        before = self.quality(self.noisy)
        for name, x in self.rows().items():
            value = self.quality(x)
            gain = f", {value - before:+.2f} dB" if x is not self.noisy else " " * 10
            lines.append(f"  {name:<15}  {value:5.2f} dB{gain}   SSIM {ssim(x, self.target):.3f}")
        return "\n".join(lines)


def compare(denoiser: Denoiser, data: Data) -> list[Result]:
    """The held-out patches, and the whole photograph if there is one."""
    noisy, target = scaled(data.held_out_noisy), scaled(data.held_out_target)
    denoised = denoise_all(denoiser, noisy)
    results = [Result(data.title, noisy, non_local_means(noisy), denoised, target, data.is_clean)]
    if data.photograph is not None:
        noisy, target = (centre(picture)[None] for picture in data.photograph)
        denoised = denoiser.picture(noisy[0])[None]
        is_whole = noisy[0].shape == data.photograph[0].shape
        title = f"{'a whole' if is_whole else 'the centre of a'} held-out photograph"
        results.append(
            Result(title, noisy, non_local_means(noisy), denoised, target, data.is_clean)
        )
    return results


def centre(picture: Tensor) -> Tensor:
    """The middle, at most `MOST_SIDE` pixels a side: non-local means take minutes for more."""
    top, left = (max(0, (size - MOST_SIDE) // 2) for size in picture.shape[1:])
    return picture[:, top : top + MOST_SIDE, left : left + MOST_SIDE]


def denoise_all(denoiser: Denoiser, noisy: Tensor) -> Tensor:
    return torch.cat([denoiser(part) for part in noisy.split(256)])


def measure(denoiser: Denoiser, data: Data) -> dict[str, float]:
    """The held-out numbers of an epoch: "psnr" is there where the targets are clean."""
    denoised = denoise_all(denoiser, scaled(data.held_out_noisy))
    target = scaled(data.held_out_target)
    found = {"held_out_loss": mse(denoised, target)}
    return found | ({"psnr": mean_psnr(denoised, target)} if data.is_clean else {})


def score(row: dict[str, float]) -> float:
    """The larger, the better."""
    return row["psnr"] if "psnr" in row else -row["held_out_loss"]


def mse(pictures: Tensor, target: Tensor) -> float:
    return float((pictures - target).square().mean())


def psnr(pictures: Tensor, clean: Tensor) -> Tensor:
    """The peak signal-to-noise ratio of each image in dB, 10 · log₁₀(1 / MSE), at most 100."""
    errors = (pictures - clean).square().flatten(1).mean(1)
    return -10 * torch.log10(errors.clamp_min(1e-10))


def mean_psnr(pictures: Tensor, clean: Tensor) -> float:
    return float(psnr(pictures, clean).mean())


def ssim(pictures: Tensor, clean: Tensor) -> float:
    """The mean structural similarity (Wang et al., 2004), in windows of at most 7×7."""
    side = min(7, *clean.shape[2:])
    values = [
        structural_similarity(
            a.numpy(), b.numpy(), win_size=side - 1 + side % 2, channel_axis=0, data_range=1.0
        )
        for a, b in zip(pictures, clean, strict=True)
    ]
    return float(np.mean(values))


def non_local_means(noisy: Tensor) -> Tensor:
    """A classical denoiser to compare with, scikit-image's, told the strength of the noise.

    Of its settings for h, 0.6σ served our photographs better than 0.8σ and 1.0σ.
    """
    sigma = max(estimate_sigma(noisy), 1 / 255)
    denoised = [
        denoise_nl_means(
            picture.permute(1, 2, 0).numpy(),
            patch_size=5,
            patch_distance=6,
            h=0.6 * sigma,
            sigma=sigma,
            channel_axis=-1,
        )
        for picture in noisy
    ]
    return torch.from_numpy(np.stack(denoised)).permute(0, 3, 1, 2)


def estimate_sigma(noisy: Tensor) -> float:
    """σ of Gaussian noise from the median of the finest diagonal Haar coefficients.

    Donoho and Johnstone, "Ideal spatial adaptation by wavelet shrinkage", Biometrika, 1994.
    """
    height, width = (size - size % 2 for size in noisy.shape[2:])
    x = noisy[:, :, :height, :width]
    detail = x[..., ::2, ::2] - x[..., 1::2, ::2] - x[..., ::2, 1::2] + x[..., 1::2, 1::2]
    return float((detail / 2).abs().median()) / 0.6745
