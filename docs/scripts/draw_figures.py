"""Draw the figures of the derivations.

python docs/scripts/draw_figures.py        writes docs/derivations/*.svg
"""

from pathlib import Path

import matplotlib as mpl
from matplotlib import pyplot as plt
from matplotlib.patches import Rectangle

OUT = Path(__file__).parents[1] / "derivations"
COLOURS = ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3")
TAPS = ("w₀", "w₁", "w₂")


def cell(axes, x, y, text, colour, width=1.0):
    """A square of one number."""
    axes.add_patch(Rectangle((x, y), width, 0.8, facecolor=colour, edgecolor="white", alpha=0.85))
    axes.text(x + width / 2, y + 0.4, text, ha="center", va="center", color="white", fontsize=9)


def figure(width, height):
    drawn, axes = plt.subplots(figsize=(width, height))
    axes.set_axis_off()
    return drawn, axes


def write(drawn, name):
    drawn.savefig(OUT / name, bbox_inches="tight", metadata={"Date": None, "Creator": None})
    plt.close(drawn)


def draw_phases():
    """Which source pixels the taps of each output see, for scale 2, 3 taps and padding 1."""
    drawn, axes = figure(7.5, 3.2)
    for i in range(4):
        cell(axes, 2 * i, 3.4, f"x{'₀₁₂₃'[i]}", COLOURS[i], width=2)
        for a in range(2):
            cell(axes, 2 * i + a, 2.2, f"x{'₀₁₂₃'[i]}", COLOURS[i])
    axes.text(-0.2, 3.8, "source", ha="right", va="center")
    axes.text(-0.2, 2.6, "upsampled", ha="right", va="center")
    for output, y in ((3, 1.0), (4, 0.0)):
        phase = "odd phase, y₃" if output % 2 else "even phase, y₄"
        axes.text(-0.2, y + 0.4, phase, ha="right", va="center")
        for tap in range(3):
            pixel = (output - 1 + tap) // 2
            cell(axes, output - 1 + tap, y, f"{TAPS[tap]}x{'₀₁₂₃'[pixel]}", COLOURS[pixel])
    axes.set(xlim=(-2.6, 8.1), ylim=(-0.1, 4.4))
    write(drawn, "phases.svg")


def draw_products():
    """All products of the taps with four source pixels, and which of them make which output."""
    drawn, axes = figure(7.5, 3.4)
    for tap in range(3):
        axes.text(-0.3, 2.4 - tap + 0.4, f"z{'₀₁₂'[tap]} = {TAPS[tap]}·x", ha="right", va="center")
        for i in range(4):
            cell(axes, 2 * i, 2.4 - tap, f"{TAPS[tap]}x{'₀₁₂₃'[i]}", COLOURS[i], width=1.4)
    for output, style in ((3, "-"), (4, "--")):
        xs, ys = [], []
        for tap in range(3):
            pixel = (output - 1 + tap) // 2
            xs.append(2 * pixel + (0.5 if output == 3 else 0.9))
            ys.append(2.4 - tap + 0.1)  # below the text
        axes.plot(xs, ys, style, color="black", linewidth=1.5, marker="o", markersize=4)
        end = xs[-1] + (0.0 if output == 3 else 0.3)
        axes.plot([xs[-1], end], [ys[-1], -0.3], style, color="black", linewidth=1.5)
        axes.text(end, -0.6, f"y{'₃' if output == 3 else '₄'}", ha="center", va="center")
    axes.set(xlim=(-2.2, 8), ylim=(-0.9, 3.4))
    write(drawn, "products.svg")


def draw_pairs():
    """Karatsuba's trick: the pairs of outputs, the pixels that they see, and the products."""
    drawn, axes = figure(7.5, 3.6)
    for i in range(4):
        cell(axes, 2.4 * i, 3, f"x{'₀₁₂₃'[i]}", COLOURS[i], width=1.4)
    formulas = (
        (0.5, "v₀ = S·(x₀+x₁) − b·x₀ − a·x₁", "even"),
        (1.5, "v₁ = a·x₁ + b·x₂", "odd"),
        (2.5, "v₂ = S·(x₂+x₃) − b·x₂ − a·x₃", "even"),
    )
    for middle, formula, parity in formulas:
        x = 2.4 * middle + 0.7
        y = 1.5 if parity == "even" else 0.2
        for pixel in (middle - 0.5, middle + 0.5):
            start = 2.4 * pixel + 0.7
            axes.plot([start, x], [2.95, y + 0.55], color="0.4", linewidth=1)
        colour = "#333333" if parity == "even" else "#777777"
        cell(axes, x - 1.55, y - 0.25, formula, colour, width=3.1)
        axes.texts[-1].set_fontsize(7.5)
    axes.set(xlim=(-0.4, 9), ylim=(-0.2, 4))
    write(drawn, "pairs.svg")


def draw_counts():
    """Products of single numbers for every four source pixels, in two dimensions."""
    drawn, axes = plt.subplots(figsize=(6, 1.7))
    names = ("upsample, then convolve", "at low resolution", "with Karatsuba's trick")
    counts = (144, 36, 25)
    bars = axes.barh(names[::-1], counts[::-1], color=COLOURS[2::-1], height=0.6)
    axes.bar_label(bars, padding=3)
    axes.set_xlim(0, 160)
    axes.set_xlabel("products for 4 source pixels, scale 2, 3×3 taps", fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    write(drawn, "counts.svg")


def main():
    # The same bytes every time, and text that stays text.
    mpl.rcParams.update({"svg.hashsalt": "funcnet", "svg.fonttype": "none", "font.size": 10})
    for draw in (draw_phases, draw_products, draw_pairs, draw_counts):
        draw()


if __name__ == "__main__":
    main()
