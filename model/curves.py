"""Draws a run's metrics.jsonl as a picture."""

import gc
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_curve(metrics: Path, picture: Path) -> None:
    """Loss (left) and learning rate (right) over the steps, validation as dots."""
    from matplotlib.figure import Figure  # not pyplot: it keeps figures alive, and opens windows

    train, val = read_metrics(metrics)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 1.4))
    left.plot([line["step"] for line in train], [line["loss"] for line in train], lw=1, label="training loss")
    if val:
        left.plot([line["step"] for line in val], [line["val_loss"] for line in val], "o-", label="validation loss")
        if val[-1].get("bits_per_byte") is not None:
            left.set_title(f"bits per byte at the end: {val[-1]['bits_per_byte']:.3f}", fontsize=10)
    left.set(xlabel="step", ylabel="nats per token")
    left.grid(alpha=0.3)
    left.legend()
    right.plot([line["step"] for line in train], [line["lr"] for line in train], lw=1, color="tab:gray")
    right.set(xlabel="step", ylabel="learning rate", ylim=0)
    save_picture(figure, picture)


def draw_preference_curves(metrics: Path, picture: Path) -> None:
    """Loss, accuracy, margin and log-probabilities over the steps; held-out pairs as dots."""
    from matplotlib.figure import Figure  # not pyplot: it keeps figures alive, and opens windows

    train, val = read_metrics(metrics)
    panels = [
        ("loss", [("loss", "val_loss", "tab:blue")]),
        ("pairs rated rightly", [("accuracy", "accuracy", "tab:blue")]),
        ("margin of rewards", [("margin", "margin", "tab:blue")]),
        (
            "log-probability, nats",
            [("logp_chosen", "logp_chosen", "tab:green"), ("logp_rejected", "logp_rejected", "tab:red")],
        ),
    ]
    figure = Figure(figsize=(14, 3.2), layout="constrained")
    for axis, (title, series) in zip(figure.subplots(1, 4), panels, strict=True):
        for name, val_name, color in series:
            label = name.removeprefix("logp_") if len(series) > 1 else "pairs"
            axis.plot([line["step"] for line in train], [line[name] for line in train], lw=1, color=color, label=label)
            if val:
                dots = [line[val_name] for line in val]
                axis.plot([line["step"] for line in val], dots, "o", color=color, label=f"{label}, held out")
        axis.set(xlabel="step", title=title)
        axis.grid(alpha=0.3)
        axis.legend()
    save_picture(figure, picture)


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The lines of training and those of validation."""
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return [line for line in lines if "loss" in line], [line for line in lines if "val_loss" in line]


def save_picture(figure: "Figure", path: Path) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    figure.savefig(temporary, dpi=110, format="png")
    os.replace(temporary, path)
    figure.clear()
    gc.collect()  # a figure is full of circular references: without this each save of a long run costs a megabyte
