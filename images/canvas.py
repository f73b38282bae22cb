"""What images/draw.py draws on: colors, and a picture of boxes, arrows and words. Lengths are in inches."""

import os
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

Color = tuple[str, str]  # fill and edge
INK, MUTED, LINE, PANEL = "#0F172A", "#64748B", "#475569", "#F8FAFC"
INDIGO, BLUE, GREEN = ("#DDD6FE", "#4F46E5"), ("#DBEAFE", "#2563EB"), ("#DCFCE7", "#16A34A")
AMBER, PINK, TEAL = ("#FEF3C7", "#D97706"), ("#FCE7F3", "#DB2777"), ("#CCFBF1", "#0D9488")
GRAY = ("#F1F5F9", "#94A3B8")


class Canvas:
    """A picture of boxes, arrows and words; (0, 0) is its lower left corner."""

    def __init__(self, width: float, height: float, background: str = "white"):
        self.background = background
        self.figure = Figure(figsize=(width, height))
        self.axes = self.figure.add_axes((0, 0, 1, 1))
        self.axes.set(xlim=(0, width), ylim=(0, height))
        self.axes.axis("off")

    def words(self, x: float, y: float, text: str, size: float = 9, color: str = INK, **style) -> None:
        self.axes.text(x, y, text, **(dict(size=size, color=color, ha="center", va="center", zorder=4) | style))

    def box(
        self, x: float, y: float, w: float, h: float, title: str = "", note: str = "", color: Color = GRAY, **style
    ) -> None:
        """Its middle is (x, y); the note stands below the title."""
        corner = dict(boxstyle=f"round,pad=0,rounding_size={min(0.1, h / 3)}", facecolor=color[0], edgecolor=color[1])
        corner |= dict(linewidth=1.2, zorder=2)
        self.axes.add_patch(FancyBboxPatch((x - w / 2, y - h / 2), w, h, **(corner | style)))
        alpha = style.get("alpha", 1)
        self.words(x, y + (0.08 + 0.055 * note.count("\n") if note else 0), title, weight="bold", alpha=alpha)
        below = y - 0.1 - (0.02 if "\n" in note else 0)
        self.words(x, below, note, size=7, color=LINE, alpha=alpha, linespacing=1.3)

    def panel(self, left: float, bottom: float, right: float, top: float, title: str) -> None:
        middle, size = ((left + right) / 2, (bottom + top) / 2), (right - left, top - bottom)
        self.box(*middle, *size, color=(PANEL, "#CBD5E1"), zorder=0)
        self.words(left + 0.14, top - 0.19, title, size=9.5, color=LINE, weight="bold", ha="left")

    def arrow(self, *points: tuple[float, float], head: bool = True, **style) -> None:
        """A line through the points, with an arrow's head at the last."""
        style = dict(color=LINE, linewidth=1.2, zorder=1) | style
        self.axes.plot(*zip(*points, strict=True), solid_joinstyle="round", **style)
        if head:
            tip = dict(arrowstyle="-|>", shrinkA=0, shrinkB=0, color=style["color"], linewidth=style["linewidth"])
            tip["alpha"] = style.get("alpha", 1)
            self.axes.annotate("", points[-1], points[-2], arrowprops=tip, zorder=style["zorder"])

    def symbol(self, x: float, y: float, text: str) -> None:
        self.axes.add_patch(Circle((x, y), 0.13, facecolor="white", edgecolor=LINE, linewidth=1.2, zorder=2))
        self.words(x, y - 0.005, text, size=11)

    def save(self, path: Path, description: str) -> None:
        """As a PNG of 256 colors, a third of the size of one of all colors, and not visibly worse."""
        self.figure.set(dpi=150, facecolor=self.background)
        drawn = FigureCanvasAgg(self.figure)
        drawn.draw()
        picture = Image.fromarray(np.asarray(drawn.buffer_rgba()))
        if self.background != "none":
            picture = picture.convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE, kmeans=1)
        header = PngInfo()
        header.add_text("Description", description)
        part = path.with_name(path.name + ".part")
        picture.save(part, "png", optimize=True, dpi=(150, 150), pnginfo=header)
        os.replace(part, path)
