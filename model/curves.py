"""Draws a run's metrics.jsonl as a picture."""

import json
import os
from pathlib import Path


def draw_curve(metrics: Path, picture: Path) -> None:
    """Loss (left) and learning rate (right) over the steps, validation as dots."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    train = [line for line in lines if "loss" in line]
    val = [line for line in lines if "val_loss" in line]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), width_ratios=(3, 1.4), layout="constrained")
    left.plot([line["step"] for line in train], [line["loss"] for line in train], lw=1, label="training loss")
    if val:
        left.plot([line["step"] for line in val], [line["val_loss"] for line in val], "o-", label="validation loss")
        if "bits_per_byte" in val[-1]:
            left.set_title(f"bits per byte at the end: {val[-1]['bits_per_byte']:.3f}", fontsize=10)
    left.set(xlabel="step", ylabel="nats per token")
    left.grid(alpha=0.3)
    left.legend()
    right.plot([line["step"] for line in train], [line["lr"] for line in train], lw=1, color="tab:gray")
    right.set(xlabel="step", ylabel="learning rate", ylim=0)
    temporary = picture.with_name(f".{picture.name}.tmp")
    figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    os.replace(temporary, picture)
