"""Draws the pictures of the READMEs that are no screenshots: sizes come from model/LMConfig.py, so they stay true.

    python images/draw.py                        # into images/, after a change of a preset or of the model's structure
    python images/draw.py --folder somewhere

    logo.png, structure_dense.png, structure_moe.png, gpt3_sizes.png, fastgpt.png

Lengths are in inches. The description in a picture's PNG header tells a test whether it is of today's sizes.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.patches import Circle

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from images.canvas import AMBER, BLUE, GRAY, GREEN, INDIGO, LINE, MUTED, PANEL, PINK, TEAL, Canvas  # noqa: E402
from model.cli import run  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from model.LMConfig import LMConfig

COLORS = {
    "embedding": INDIGO,
    "attention": BLUE,
    "feed-forward": GREEN,
    "routed experts": GREEN,
    "shared experts": TEAL,
    "routers": PINK,
    "norms": AMBER,
}
# Brown et al. 2020, "Language Models are Few-Shot Learners", table 2.1, as printed:
# name, parameters, layers, d_model, heads, d_head, batch in tokens, learning rate
GPT3 = (
    ("Small", "125M", 12, 768, 12, 64, "0.5M", "6.0e-4"),
    ("Medium", "350M", 24, 1024, 16, 64, "0.5M", "3.0e-4"),
    ("Large", "760M", 24, 1536, 16, 96, "0.5M", "2.5e-4"),
    ("XL", "1.3B", 24, 2048, 24, 128, "1M", "2.0e-4"),
    ("2.7B", "2.7B", 32, 2560, 32, 80, "1M", "1.6e-4"),
    ("6.7B", "6.7B", 32, 4096, 32, 128, "2M", "1.2e-4"),
    ("13B", "13.0B", 40, 5140, 40, 128, "2M", "1.0e-4"),
    ("175B", "175.0B", 96, 12288, 96, 128, "3.2M", "0.6e-4"),
)


@dataclass
class Args:
    """Draw logo, structure of the models, GPT-3's sizes and FastGPT's settings."""

    folder: str = str(ROOT / "images")  # where the pictures go


def main(args: Args) -> None:
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    draw_logo(folder / "logo.png")
    draw_structure(folder / "structure_dense.png", "minimind-small-T")
    draw_structure(folder / "structure_moe.png", "minimind-moe")
    draw_gpt3_sizes(folder / "gpt3_sizes.png")
    draw_fastgpt(folder / "fastgpt.png")


def count_parameters(config: LMConfig, experts: int | None = None) -> dict[str, int]:
    """Parameters of each kind of part, over all layers; the output head is the embedding and costs nothing.

    `experts`: how many routed experts of a layer to count; None means all. With num_experts_per_tok it is what one
    token makes use of.
    """
    head_dim = config.dim // config.n_heads
    swiglu = 3 * config.dim * config.hidden_dim
    layer = {"attention": 2 * config.dim * head_dim * (config.n_heads + config.n_kv_heads)}  # wq and wo, wk and wv
    if config.use_moe:
        layer["routed experts"] = swiglu * (config.n_routed_experts if experts is None else experts)
        layer["shared experts"] = swiglu * config.n_shared_experts
        layer["routers"] = config.dim * config.n_routed_experts
    else:
        layer["feed-forward"] = swiglu
    counts = {"embedding": config.vocab_size * config.dim}
    counts |= {part: config.n_layers * number for part, number in layer.items()}
    return counts | {"norms": (2 * config.n_layers + 1) * config.dim}


def describe(name: str, config: LMConfig) -> str:
    counts = count_parameters(config)
    parts = ", ".join(f"{part} {number:,}" for part, number in counts.items())
    return f"{name}: {sum(counts.values()):,} parameters ({parts})"


def draw_logo(path: Path) -> None:
    """An M of five nodes, as of a small network, and the name; the colors are legible on white and on black."""
    canvas = Canvas(4.6, 1.4, background="none")
    canvas.box(0.7, 0.7, 1.16, 1.16, color=(INDIGO[1], INDIGO[1]))
    nodes = [(0.36, 0.4), (0.42, 1.0), (0.7, 0.58), (0.98, 1.0), (1.04, 0.4)]
    canvas.arrow(*nodes, head=False, color="white", linewidth=3.5, zorder=3)
    for at, color in zip(nodes, ("white", "#A5B4FC", "#FCD34D", "#A5B4FC", "white"), strict=True):
        canvas.axes.add_patch(Circle(at, 0.1, facecolor=color, edgecolor=INDIGO[1], linewidth=2, zorder=4))
    canvas.words(1.5, 0.83, "MiniMind", size=36, color="#6366F1", weight="bold", ha="left")
    canvas.words(1.54, 0.32, "a small language model, from zero", size=11.5, color="#7C8BA1", ha="left")
    canvas.save(path, "MiniMind: a small language model, from zero")


def draw_structure(path: Path, name: str) -> None:
    from model.LMConfig import LMConfig

    config = LMConfig.preset(name)
    total = sum(count_parameters(config).values())
    canvas = Canvas(12, 8.3)
    kind = "mixture of experts" if config.use_moe else "dense"
    canvas.words(0.3, 7.98, f"{name}: {kind}, {total:,} parameters", size=15, weight="bold", ha="left")
    draw_model(canvas, config)
    draw_block(canvas, config)
    if config.use_moe:
        draw_experts(canvas, config)
    else:
        draw_feed_forward(canvas, config)
    draw_attention(canvas, config)
    draw_shares(canvas, config)
    canvas.save(path, describe(name, config))


def draw_model(canvas: Canvas, config: LMConfig) -> None:
    """From token ids, below, to logits."""
    counts = count_parameters(config)
    x, width = 1.85, 2.2
    canvas.panel(0.3, 1.65, 3.2, 7.6, "The model")
    table = f"{config.vocab_size:,} × {config.dim}"
    block = (sum(counts.values()) - counts["embedding"] - config.dim) // config.n_layers
    for below, above in ((2.1, 2.47), (3.17, 3.6), (4.78, 5.05), (5.55, 5.82), (6.52, 6.82)):
        canvas.arrow((x, below), (x, above))
    canvas.words(x, 1.95, "token ids  [B, T]")
    canvas.box(x, 2.82, width, 0.7, "Embedding", f"{table} = {counts['embedding']:,}", INDIGO)
    for back in (0.16, 0.08, 0):
        canvas.box(x + back, 4.15 + back, width - 0.16, 1.1, color=GRAY)
    canvas.words(x, 4.33, f"Block × {config.n_layers}", size=11, weight="bold")
    canvas.words(x, 4.08, f"[B, T, {config.dim}] in and out", size=7.5, color=LINE)
    canvas.words(x, 3.88, f"{block:,} each", size=7.5, color=LINE)
    canvas.box(x, 5.3, width, 0.5, "RMSNorm", f"{config.dim}", AMBER)
    canvas.box(x, 6.17, width, 0.7, "Output head", "the embedding once more: + 0", INDIGO)
    canvas.words(x, 6.97, f"logits of the next token  [B, T, {config.vocab_size:,}]", size=7.5)
    left = x - width / 2
    tie = ((left, 2.82), (0.55, 2.82), (0.55, 6.17), (left, 6.17))
    canvas.arrow(*tie, head=False, color=INDIGO[1], linestyle=(0, (3, 2)))
    canvas.words(0.45, 4.5, "one matrix (tied)", size=7.5, color=INDIGO[1], rotation=90)


def draw_block(canvas: Canvas, config: LMConfig) -> None:
    counts = count_parameters(config)
    x, width, around = 4.75, 1.85, 5.9
    canvas.panel(3.4, 1.65, 6.15, 7.6, "One block")
    rest = [part for part in counts if part not in ("embedding", "attention", "norms")]
    inner = f"{sum(counts[part] for part in rest) // config.n_layers:,}"
    attention = f"{counts['attention'] // config.n_layers:,}"
    for below, above in ((2.08, 2.5), (3.0, 3.22), (3.92, 4.15), (4.41, 4.8), (5.3, 5.52), (6.22, 6.45), (6.71, 6.9)):
        canvas.arrow((x, below), (x, above))
    canvas.words(x, 1.95, f"x  [B, T, {config.dim}]")
    canvas.box(x, 2.75, width, 0.5, "RMSNorm", f"{config.dim}", AMBER)
    canvas.box(x, 3.57, width, 0.7, "Attention", f"rotary, grouped queries\n{attention}", BLUE)
    canvas.symbol(x, 4.28, "+")
    canvas.box(x, 5.05, width, 0.5, "RMSNorm", f"{config.dim}", AMBER)
    kind = "a mixture of experts" if config.use_moe else "SwiGLU"
    canvas.box(x, 5.87, width, 0.7, "Feed-forward", f"{kind}\n{inner}", GREEN)
    canvas.symbol(x, 6.58, "+")
    canvas.words(x, 7.02, f"x  [B, T, {config.dim}]")
    for start, end in ((2.26, 4.28), (4.58, 6.58)):
        canvas.arrow((x, start), (around, start), (around, end), (x + 0.13, end))
        canvas.words(around + 0.12, (start + end) / 2, "residual", size=7.5, color=MUTED, rotation=90)


def draw_attention(canvas: Canvas, config: LMConfig) -> None:
    head_dim, group = config.dim // config.n_heads, config.n_heads // config.n_kv_heads
    canvas.panel(6.35, 1.65, 11.7, 4.4, "Attention")
    middle = 2.82
    canvas.words(6.53, middle, "x")
    for name, y, heads in (
        ("wq", 3.56, config.n_heads),
        ("wk", 2.82, config.n_kv_heads),
        ("wv", 2.08, config.n_kv_heads),
    ):
        canvas.arrow((6.61, middle), (6.7, middle), (6.7, y), (6.84, y))
        canvas.box(7.36, y, 1.04, 0.5, name, f"{heads} heads × {head_dim}", BLUE)
        canvas.arrow((7.88, y), (9.1, y))
    for y in (3.56, 2.82):
        canvas.box(8.48, y, 0.72, 0.5, "RoPE", "positions")
    canvas.words(8.48, 2.2, "k, v are cached", size=7, color=MUTED)
    canvas.box(9.85, middle, 1.5, 2.0, color=BLUE)
    canvas.words(9.85, 3.58, f"softmax(qkᵀ / √{head_dim}) v", weight="bold", size=8.5)
    canvas.words(9.85, 3.36, "causal", size=7, color=LINE)
    draw_heads(canvas, config.n_heads, config.n_kv_heads)
    shared = f"{group} query heads\nshare a key/value head" if group > 1 else "each query head has its\nkey/value head"
    canvas.words(9.85, 2.06, shared, size=7, color=LINE)
    canvas.arrow((10.6, middle), (10.78, middle))
    canvas.box(11.11, middle, 0.66, 0.5, "wo", f"→ {config.dim}", BLUE)
    canvas.arrow((11.44, middle), (11.66, middle))


def draw_heads(canvas: Canvas, heads: int, kv_heads: int) -> None:
    """Query heads in a row, and below the key/value heads that they look at."""
    left, width, top, bottom = 9.25, 1.2, 2.98, 2.48
    queries = [left + width * (i + 0.5) / heads for i in range(heads)]
    keys = [left + width * (i + 0.5) / kv_heads for i in range(kv_heads)]
    for i, x in enumerate(queries):
        canvas.arrow((x, top), (keys[i * kv_heads // heads], bottom), head=False, linewidth=0.7, zorder=3)
    canvas.axes.plot(queries, [top] * heads, "o", color=BLUE[1], markersize=3.6, zorder=3)
    canvas.axes.plot(keys, [bottom] * kv_heads, "s", color=INDIGO[1], markersize=4.4, zorder=3)
    canvas.words(9.85, 3.12, f"{heads} q", size=7, color=BLUE[1])
    canvas.words(9.85, 2.34, f"{kv_heads} k, v", size=7, color=INDIGO[1])


def draw_feed_forward(canvas: Canvas, config: LMConfig) -> None:
    canvas.panel(6.35, 4.6, 11.7, 7.6, "Feed-forward: SwiGLU,  w2( SiLU(w1 x) · w3 x )")
    middle, top, bottom = 5.9, 6.5, 5.3
    matrix = f"{config.dim} → {config.hidden_dim:,}"
    canvas.words(6.53, middle, "x")
    for name, y in (("w1", top), ("w3", bottom)):
        canvas.arrow((6.61, middle), (6.7, middle), (6.7, y), (6.84, y))
        canvas.box(7.46, y, 1.24, 0.56, name, matrix, GREEN)
    canvas.arrow((8.08, top), (8.36, top))
    canvas.box(8.71, top, 0.7, 0.5, "SiLU", "the gate")
    canvas.arrow((9.06, top), (9.5, top), (9.5, middle + 0.13))
    canvas.arrow((8.08, bottom), (9.5, bottom), (9.5, middle - 0.13))
    canvas.symbol(9.5, middle, "×")
    canvas.arrow((9.63, middle), (9.98, middle))
    canvas.box(10.6, middle, 1.24, 0.56, "w2", f"{config.hidden_dim:,} → {config.dim}", GREEN)
    canvas.arrow((11.22, middle), (11.66, middle))
    size = config.dim * config.hidden_dim
    canvas.words(9.02, 4.82, f"3 matrices of {size:,} = {3 * size:,}", size=7.5, color=LINE)


def draw_experts(canvas: Canvas, config: LMConfig) -> None:
    """From left to right: shared experts, routed ones (faint: not visited), and the router that weighs them."""
    experts, k = config.n_routed_experts, config.num_experts_per_tok
    canvas.panel(6.35, 4.6, 11.7, 7.6, "Feed-forward: a mixture of experts")
    foot, y, weigh, join, top = 4.98, 5.68, 6.4, 6.68, 7.0  # heights
    shared, left, right, router = 7.0, 7.58, 10.3, 11.0
    sum_x = (left + right) / 2
    canvas.words(6.53, foot, "x")
    canvas.arrow((6.61, foot), (router, foot), (router, y - 0.42))
    canvas.box(router, y, 1.1, 0.84, "router", f"{config.dim} → {experts}\nsoftmax, top {k}", PINK)
    if config.n_shared_experts:
        canvas.arrow((shared, foot), (shared, y - 0.42))
        canvas.box(shared, y, 0.92, 0.84, f"{config.n_shared_experts} shared", "every token", TEAL)
        canvas.arrow((shared, y + 0.42), (shared, top), (sum_x - 0.13, top), color=TEAL[1])
    step = (right - left) / experts
    visited = {i * experts // k for i in range(k)}  # an example
    for i in range(experts):
        x, style = left + step * (i + 0.5), {} if i in visited else dict(alpha=0.35)
        canvas.arrow((x, foot), (x, y - 0.42), **style)
        canvas.box(x, y, step - 0.1, 0.84, f"{i + 1}", "visited" if i in visited else "skipped", GREEN, **style)
        if i in visited:
            canvas.arrow((x, y + 0.42), (x, weigh - 0.13), color=GREEN[1])
            canvas.arrow((x, weigh), (x, join), (sum_x, join), (sum_x, top - 0.13), color=GREEN[1])
            canvas.arrow((router, y + 0.42), (router, weigh), (x + 0.13, weigh), color=PINK[1])
            canvas.symbol(x, weigh, "×")
    canvas.words(router + 0.06, weigh + 0.13, f"weights of the top {k}", size=7.5, color=PINK[1], ha="right")
    canvas.symbol(sum_x, top, "+")
    canvas.arrow((sum_x + 0.13, top), (11.66, top))
    swiglu = f"SwiGLU {config.dim} → {config.hidden_dim:,} → {config.dim}, {3 * config.dim * config.hidden_dim:,}"
    canvas.words(9.02, 4.78, f"each expert: {swiglu} parameters", size=7.5, color=LINE)


def draw_shares(canvas: Canvas, config: LMConfig) -> None:
    """Where the parameters are: a bar of all; of a mixture of experts another of what one token uses."""
    counts = count_parameters(config)
    total = sum(counts.values())
    bars = [("parameters", 1.2, counts)]
    if config.use_moe:
        bars = [("held", 1.32, counts), ("used for a token", 1.0, count_parameters(config, config.num_experts_per_tok))]
    height, left, width = (0.26 if config.use_moe else 0.36), 1.5, 9.1
    for label, y, shown in bars:
        canvas.words(left - 0.12, y, label, size=8.5, ha="right")
        at = left
        for part, number in shown.items():
            length = width * number / total
            color = COLORS[part][1]
            canvas.box(
                at + length / 2, y, length, height, color=(color, "white"), boxstyle="square,pad=0", linewidth=0.5
            )
            if length > 0.45:
                canvas.words(at + length / 2, y, f"{number / total:.0%}", size=8.5, color="white", weight="bold")
            at += length
        canvas.words(at + 0.1, y, f"{sum(shown.values()):,}", size=8.5, ha="left", weight="bold")
    step = 11.4 / len(counts)
    for i, (part, number) in enumerate(counts.items()):
        x = 0.42 + step * i
        canvas.box(x, 0.5, 0.17, 0.17, color=(COLORS[part][1], "white"))
        canvas.words(x + 0.17, 0.57, part, size=8.5, ha="left", weight="bold")
        canvas.words(x + 0.17, 0.37, f"{number:,}", size=8, color=LINE, ha="left")


def draw_gpt3_sizes(path: Path) -> None:
    canvas = Canvas(12, 4.9)
    canvas.words(0.3, 4.6, "Depth and width: GPT-3's family, and MiniMind's", size=15, weight="bold", ha="left")
    columns = dict(zip((0.35, 1.62, 2.35, 3.13, 3.78, 4.45, 5.15, 5.9), zip(*GPT3, strict=True), strict=True))
    heads = ("GPT-3", "params", "layers", "d_model", "heads", "d_head", "batch", "lr")
    for row in range(0, len(GPT3), 2):
        canvas.box(3.12, 3.62 - 0.36 * row, 5.74, 0.34, color=(PANEL, PANEL))
    for (x, values), head in zip(columns.items(), heads, strict=True):
        align = "left" if head == "GPT-3" else "right"
        canvas.words(x, 4.0, head, size=9, color=MUTED, weight="bold", ha=align)
        for row, value in enumerate(values):
            text = f"{value:,}" if isinstance(value, int) else value
            weight = "bold" if head in ("GPT-3", "layers", "d_model") else "normal"
            canvas.words(x, 3.62 - 0.36 * row, text, size=9.5, ha=align, weight=weight)
    source = "Brown et al. 2020, table 2.1, figures as printed there; batch in tokens"
    canvas.words(0.35, 0.42, source, size=8, color=MUTED, ha="left")
    draw_depth_over_width(canvas.figure.add_axes((0.58, 0.14, 0.4, 0.7)))
    canvas.save(path, "Depth and width of GPT-3's family (Brown et al. 2020, table 2.1) and of MiniMind's presets")


def draw_depth_over_width(axes: Axes) -> None:
    """Both axes logarithmic; presets of one depth and width share a point."""
    from model.LMConfig import PRESETS

    sizes: dict[tuple[int, int], list[str]] = {}
    for name, preset in PRESETS.items():
        sizes.setdefault((preset["dim"], preset["n_layers"]), []).append(name)
    label = dict(size=8, rotation_mode="anchor", textcoords="offset points")
    axes.plot([row[3] for row in GPT3], [row[2] for row in GPT3], "o", color=MUTED, label="GPT-3")
    for name, _, layers, width, *_ in GPT3:
        axes.annotate(name, (width, layers), (4, -6), rotation=-40, ha="left", va="top", color=LINE, **label)
    axes.plot(*zip(*sizes, strict=True), "D", color=INDIGO[1], label="MiniMind")
    for at, names in sizes.items():
        short = ", ".join(name.removeprefix("minimind-") for name in names)
        axes.annotate(short, at, (-3, 5), rotation=-40, ha="right", va="bottom", color=INDIGO[1], **label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.set(xlim=(200, 20000), ylim=(3.4, 150), xlabel="width (d_model)", ylabel="layers")
    axes.set_xticks([256, 512, 1024, 2048, 4096, 8192, 16384], ["256", "512", "1k", "2k", "4k", "8k", "16k"])
    axes.set_yticks([4, 8, 16, 32, 64, 128], ["4", "8", "16", "32", "64", "128"])
    axes.grid(color="#E2E8F0")
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(labelsize=8, color=MUTED)
    axes.legend(frameon=False, fontsize=9, loc="upper left")


def draw_fastgpt(path: Path) -> None:
    """Names as in FastGPT's English translation."""
    canvas = Canvas(8.9, 5.6)
    canvas.words(0.35, 5.27, "MiniMind in FastGPT", size=15, weight="bold", ha="left")
    trail = "Account  ›  Model Providers  ›  Model Channels  ›  Add channel"
    canvas.words(0.35, 4.93, trail, size=9.5, color=MUTED, ha="left")
    canvas.box(2.95, 2.45, 5.2, 4.5, color=("white", "#CBD5E1"))
    canvas.words(0.6, 4.42, "Add channel", size=11, weight="bold", ha="left")
    fields = (
        ("Channel name", "MiniMind", "any name"),
        ("Protocol type", "OpenAI", "what the server speaks"),
        ("Model", "minimind", "the server's --model_name; if the list\nlacks it, first add it as a language model"),
        ("Model mapping", "", "leave it empty"),
        (
            "Proxy address",
            "http://HOST:8000/v1",
            "HOST as FastGPT sees it: in Docker,\nnot localhost but host.docker.internal",
        ),
        ("API key", "KEY", "the server's --api_key"),
    )
    for row, (name, value, meaning) in enumerate(fields):
        y = 3.95 - 0.55 * row
        canvas.words(0.6, y, name, size=9.5, ha="left")
        canvas.box(3.65, y, 3.4, 0.38, color=("white", "#CBD5E1"))
        if name == "Model":
            canvas.box(2.44, y, 0.84, 0.27, color=INDIGO)
        canvas.words(2.12, y, value, size=9.5, ha="left", family="monospace" if "HOST" in value else None)
        if name in ("Protocol type", "Model"):
            canvas.words(5.17, y - 0.01, "▾", size=10, color=MUTED)
        canvas.arrow((5.77, y), (5.4, y), color="#94A3B8", linewidth=1, zorder=3)
        canvas.words(5.85, y, meaning, size=8.5, color=LINE, ha="left", linespacing=1.4)
    canvas.box(4.92, 0.58, 0.86, 0.36, color=(INDIGO[1], INDIGO[1]))
    canvas.words(4.92, 0.58, "Add", color="white", weight="bold")
    command = "python my_openai_api.py\n    --host 0.0.0.0 --api_key KEY"
    canvas.words(5.85, 4.6, command, size=8.5, color=INDIGO[1], ha="left", family="monospace", linespacing=1.4)
    canvas.words(
        5.85, 0.55, "A drawing, not a screenshot:\nnames change with versions.", size=8, color=MUTED, ha="left"
    )
    canvas.save(
        path, "FastGPT's settings: protocol OpenAI, model minimind, address http://HOST:8000/v1, the server's key"
    )


if __name__ == "__main__":
    run(main, Args)
