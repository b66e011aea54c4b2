"""Draws docs/images/how_it_works.png: python docs/images/how_it_works.py"""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, Rectangle

EXACT, LATENT, INK = "#1f5f3f", "#d9a441", "#222222"


def token(axis, x, height, colour):
    axis.add_patch(Rectangle((x, 0), 0.8, height, facecolor=colour, edgecolor="white"))


def arrow(axis, start, end):
    axis.add_patch(FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=12, color=INK, linewidth=1.2))


figure = Figure(figsize=(10, 4.1), layout="constrained")
axis = figure.subplots()
for i in range(4):
    token(axis, i, 5, EXACT)
for i in range(4, 24):
    token(axis, i, 1, LATENT)
for i in range(24, 34):
    token(axis, i, 5, EXACT)
for x, text in (
    (1.9, "4 sinks\nexact"),
    (13.9, "every older token: latents\n$c = A\\,k$,  20 % of the channels"),
    (28.9, "window\nat least 32 exact"),
):
    axis.text(x, -0.35, text, ha="center", va="top", fontsize=10, color=INK)
arrow(axis, (24.0, 5.1), (21.0, 1.2))
axis.text(21.0, 5.35, "leaves in blocks of 32: rotated back, encoded once", ha="center", fontsize=9, color=INK)
axis.add_patch(Rectangle((7.2, 2.2), 9.6, 1.9, facecolor="#f6f1e4", edgecolor=LATENT, linestyle="--"))
axis.text(
    12,
    3.15,
    "keys rebuilt tile by tile:\n$\\hat{k} = \\mathrm{RoPE}(B\\,c)$, then dropped",
    ha="center",
    va="center",
    fontsize=9,
)
arrow(axis, (12, 1.1), (12, 2.2))
notes = (
    "query of the next token:\none softmax over exact\nand rebuilt keys\n\nvalues are never rebuilt:\n"
    "$(P\\,c_v)\\,B_v^{\\top}$, once per step"
)
axis.text(36.3, 2.5, notes, ha="left", va="center", fontsize=10, color=INK, linespacing=1.5)
arrow(axis, (36.1, 2.5), (34.2, 2.5))
axis.set_xlim(-0.5, 45.5)
axis.set_ylim(-1.7, 6)
axis.axis("off")
figure.savefig(Path(__file__).with_suffix(".png"), dpi=130)
