"""What a run says of itself: a line of NAME.metrics.jsonl at a time, means over the steps since the line before."""

import json
import math
import os
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .checkpoint import flush, write_bytes
from .distributed import Run
from .model import LMOutput


@dataclass
class Group:
    """What this process has seen of the global batch at work."""

    losses: list[Tensor] = field(default_factory=list)  # of each micro-batch
    numbers: list[float] = field(default_factory=list)  # the same, once they were read
    aux_losses: list[Tensor] = field(default_factory=list)
    expert_load: list[Tensor] = field(default_factory=list)  # [n_layers, E] each

    def add(self, output: LMOutput) -> None:
        self.losses.append(output.loss.detach())
        if output.aux_loss is not None:
            self.aux_losses.append(output.aux_loss.detach())
            self.expert_load.append(output.expert_load.detach())

    def values(self) -> list[float]:
        """The losses. However often they are asked for, a GPU is waited for once."""
        if not self.numbers:
            self.numbers = torch.stack(self.losses).tolist()
        return self.numbers

    def finite(self) -> list[bool]:
        """Of each micro-batch, whether its loss is."""
        return [math.isfinite(value) for value in self.values()]


@dataclass
class Window:
    """Sums since the last line."""

    steps: int = 0
    skipped: int = 0  # of the steps: updates left out, which count in nothing below but tokens and seconds
    tokens: int = 0
    seconds: float = 0.0
    loss: float = 0.0  # of this process alone, as the next two
    aux_loss: float = 0.0
    expert_load: list[list[list[float]]] = field(default_factory=list)  # for each step n_layers times E shares

    def add(self, group: Group, well: bool, tokens: int, seconds: float) -> None:
        self.steps, self.tokens, self.seconds = self.steps + 1, self.tokens + tokens, self.seconds + seconds
        if not well:
            self.skipped += 1
            return
        self.loss += sum(group.values())
        if group.aux_losses:
            self.aux_loss += float(torch.stack(group.aux_losses).sum())
            self.expert_load.append(torch.stack(group.expert_load).mean(0).tolist())

    def sum(self, run: Run) -> None:
        """Adds the losses of all processes up on the main one."""
        sums = run.sum(torch.tensor([self.loss, self.aux_loss]))
        self.loss, self.aux_loss = sums.tolist() if run.is_main else (0.0, 0.0)

    def means(self) -> dict[str, Any]:
        trained = max(1, self.steps - self.skipped)
        line = {
            "loss": self.loss / trained if self.steps > self.skipped else None,
            "tokens_per_s": round(self.tokens / self.seconds, 1),
        }
        if self.expert_load:
            load = torch.tensor(self.expert_load).mean(0)  # n_layers E
            line["aux_loss"] = self.aux_loss / trained
            line["expert_load"] = [[round(share, 4) for share in layer] for layer in load.tolist()]
        return line


class MetricsFile:
    """JSON lines. What the disk has no room for waits in memory until it has."""

    def __init__(self, path: Path):
        self.path = path
        self.waiting = b""

    def cut(self, step: int) -> None:
        """Leaves the lines up to a step: those after it are about to be written again."""
        lines = self.path.read_bytes().splitlines(keepends=True) if self.path.is_file() else []
        kept = []
        for line in lines if step else []:
            try:
                if line.endswith(b"\n") and json.loads(line)["step"] <= step:
                    kept.append(line)
            except ValueError:  # spoiled by a power cut, as may be what follows
                break
        write_bytes(self.path, b"".join(kept))

    def write(self, line: dict[str, Any]) -> None:
        """Numbers that JSON does not know, nan and the infinities, become null."""
        known = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
        self.waiting += json.dumps(known, ensure_ascii=False).encode() + b"\n"
        with suppress(OSError):
            self.append()

    def append(self) -> None:
        """Raises OSError where there is no room."""
        size = self.path.stat().st_size
        try:
            with open(self.path, "ab") as file:
                file.write(self.waiting)
            self.waiting = b""
        except OSError:
            os.truncate(self.path, size)  # no half a line
            raise

    def flush(self) -> None:
        """Returns when all lines are on the disk; raises OSError where that has no room."""
        self.append()
        flush(self.path)
