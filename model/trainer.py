"""The plumbing round a training step: batches, precision, accumulation, clipping, logging, saving.

Which loss is trained is the script's business: it takes a micro-batch from `batches`, calls the model, and hands the
output to `step`.
"""

import json
import resource
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .checkpoint import save_weights
from .curves import draw_curve
from .dataset import Batch, Row, epoch_order, make_row, stack
from .distributed import Run
from .model import LMOutput, Transformer
from .optim import build_optimizers, learning_rate_factor
from .options import TrainingOptions

NO_ROW = -1  # index of a row of padding: it evens out the processes' shares at the end of an epoch


class RowSource(Protocol):
    """What the trainer needs to know of a dataset."""

    pad: int
    max_seq_len: int

    def __len__(self) -> int: ...
    def row(self, index: int) -> Row: ...


@dataclass
class Place:
    """How far a run has come."""

    epoch: int = 0
    groups: int = 0  # global batches done in this epoch
    step: int = 0  # updates done in all
    tokens: int = 0  # trained on in all, padding not counted


@dataclass
class Window:
    """Sums since the last line of the metrics."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    loss: Tensor | float = 0.0
    aux_loss: Tensor | float = 0.0
    expert_load: list[Tensor] = field(default_factory=list)


class Trainer:
    """Takes a model through `data` as the options say.

    Args:
        tokenizer: copied beside the weights.
        weights: the `.pth` to write; metrics, curve and description lie beside it.
        validate: gives figures of held-out data ("val_loss", ...); called on every process.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: PreTrainedTokenizerBase,
        data: RowSource,
        args: TrainingOptions,
        run: Run,
        weights: Path,
        validate: Callable[[], dict[str, float]] | None = None,
    ):
        self.raw_model, self.data, self.args, self.run = model.train(), data, args, run
        self.weights, self.tokenizer, self.validate = weights, tokenizer, validate
        self.model = run.wrap(torch.compile(model) if args.compile else model)
        optimizer = "muon" if args.optimizer == "auto" else args.optimizer
        self.optimizers = build_optimizers(model, optimizer, args.learning_rate, args.weight_decay)
        self.dtype = pick_dtype(args.dtype, run.device)
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=self.dtype == torch.float16)
        self.place, self.window = Place(), Window()
        self.rows_per_group = args.batch_size * args.accumulation_steps * run.world_size
        self.groups_per_epoch = -(-len(data) // self.rows_per_group)
        self.total_steps = args.max_steps or args.epochs * self.groups_per_epoch
        self.last_of_group = False

    def batches(self) -> Iterator[Batch]:
        """This process's micro-batches, to the end of the run; `num_targets` of each is that of its global batch."""
        self.begin()
        while self.place.step < self.total_steps:
            for group in self.groups():
                started = time.monotonic()
                counts = torch.tensor([[batch.num_targets, batch.num_tokens] for batch in group]).sum(0)
                num_targets, num_tokens = self.run.sum(counts.to(self.run.device)).tolist()
                for batch in group:
                    self.last_of_group = batch is group[-1]
                    self.run.synchronize_gradients(self.model, self.last_of_group)
                    # A group without a single target still gives a number: 0 / 1.
                    yield batch.to(self.run.device)._replace(num_targets=max(1, num_targets))
                self.window.seconds += time.monotonic() - started
                self.after_update(num_tokens)
                if self.place.step == self.total_steps:
                    break
            else:
                self.place.epoch, self.place.groups = self.place.epoch + 1, 0
        self.finish()

    def groups(self) -> Iterator[list[Batch]]:
        """The rest of this epoch's global batches: of each, this process's micro-batches."""
        remaining = range(self.place.groups, self.groups_per_epoch)
        loader = DataLoader(
            RowsOfEpoch(self.data, epoch_order(len(self.data), self.args.seed, self.place.epoch)),
            batch_sampler=(rows for group in remaining for rows in self.micro_batches(group)),
            collate_fn=stack,
            num_workers=self.args.num_workers,
            pin_memory=self.run.device.type == "cuda",
            # A generator of its own: the loader must not draw from the one that dropout uses.
            generator=torch.Generator().manual_seed(self.args.seed),
        )
        batches = iter(loader)
        for group in remaining:
            yield list(islice(batches, len(self.micro_batches(group))))

    def micro_batches(self, group: int) -> list[list[int]]:
        """The rows, by their place in the epoch's order, of this process's micro-batches of a global batch.

        A global batch is a stretch of the epoch's order, whatever the number of processes. The last one of an epoch
        may be short: it has as few micro-batches as will do, filled up with rows of padding.
        """
        size, width = self.args.batch_size, self.args.batch_size * self.run.world_size
        first = group * self.rows_per_group
        last = min(first + self.rows_per_group, len(self.data))
        starts = (start + self.run.rank * size for start in range(first, last, width))
        return [[row if row < last else NO_ROW for row in range(start, start + size)] for start in starts]

    def autocast(self) -> AbstractContextManager:
        """Matrix products in the chosen type, everything else in float32."""
        return torch.autocast(self.run.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def step(self, output: LMOutput) -> None:
        """One micro-batch's backward pass, and after the group's last one the update."""
        self.window.loss += output.loss.detach()
        if output.aux_loss is not None:
            self.window.aux_loss += output.aux_loss.detach()
            self.window.expert_load.append(output.expert_load.detach())
        # Losses are sums divided by the global batch's targets, but DDP averages gradients over processes.
        self.scaler.scale(output.loss * self.run.world_size).backward()
        if self.last_of_group:
            self.update()

    def update(self) -> None:
        factor = learning_rate_factor(self.place.step, self.total_steps, self.args.warmup_steps, self.args.schedule)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
            for group in optimizer.param_groups:
                group["lr"] = self.args.learning_rate * factor * group["lr_scale"]
        self.grad_norm = torch.nn.utils.clip_grad_norm_(self.raw_model.parameters(), self.args.grad_clip)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()

    def begin(self) -> None:
        self.started = time.monotonic()
        if self.run.is_main:
            self.weights.parent.mkdir(parents=True, exist_ok=True)
            self.metrics_path.write_text("")
        parameters = sum(p.numel() for p in self.raw_model.parameters() if p.requires_grad)
        self.run.print(
            f"{parameters:,} parameters on {self.run.device} ({str(self.dtype).removeprefix('torch.')}), "
            f"{len(self.data):,} rows of {self.data.max_seq_len} tokens, {self.total_steps} steps of "
            f"{self.rows_per_group} rows, {self.run.world_size} process{'es' if self.run.world_size > 1 else ''}"
        )
        self.bar = tqdm(total=self.total_steps, unit="step", disable=not self.run.is_main, dynamic_ncols=True)

    @property
    def metrics_path(self) -> Path:
        return self.weights.with_suffix(".metrics.jsonl")

    def after_update(self, num_tokens: int) -> None:
        place, args, window = self.place, self.args, self.window
        place.step, place.groups, place.tokens = place.step + 1, place.groups + 1, place.tokens + num_tokens
        window.steps, window.tokens = window.steps + 1, window.tokens + num_tokens
        self.bar.update()
        last = place.step == self.total_steps
        if place.step % args.log_interval == 0 or place.step == 1 or last:
            self.log()
        if self.validate and (last or (args.val_interval and place.step % args.val_interval == 0)):
            self.log_validation()
        if last or (args.save_interval and place.step % args.save_interval == 0):
            self.save()

    def log(self) -> None:
        """One line of metrics: means over the steps since the last one."""
        window, self.window = self.window, Window()
        sums = torch.stack([torch.as_tensor(x, device=self.run.device).float() for x in (window.loss, window.aux_loss)])
        loss, aux_loss = (self.run.sum(sums) / window.steps).tolist()
        line = {
            "step": self.place.step,
            "epoch": round(self.place.epoch + self.place.groups / self.groups_per_epoch, 4),
            "tokens": self.place.tokens,
            "loss": loss,
            "lr": self.optimizers[0].param_groups[0]["lr"],
            "grad_norm": float(self.grad_norm),
            "tokens_per_s": round(window.tokens / window.seconds, 1),
        }
        if window.expert_load:
            line["aux_loss"] = aux_loss
            load = torch.stack(window.expert_load).mean(0)  # n_layers E
            line["expert_load"] = [[round(share, 4) for share in layer] for layer in load.tolist()]
        self.write_metrics(line)
        self.bar.set_postfix_str(f"loss {loss:.3f}, lr {line['lr']:.2g}, {line['tokens_per_s']:,.0f} tokens/s")

    def log_validation(self) -> None:
        figures = self.validate()
        self.raw_model.train()
        self.write_metrics({"step": self.place.step, "tokens": self.place.tokens, **figures})
        if self.run.is_main:
            words = ", ".join(f"{name.replace('_', ' ')} {value:.4f}" for name, value in figures.items())
            tqdm.write(f"step {self.place.step}: {words}")

    def write_metrics(self, line: dict) -> None:
        if self.run.is_main:
            with open(self.metrics_path, "a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def save(self) -> None:
        if self.run.is_main:
            stage = str(self.weights.relative_to(self.args.out_dir).with_suffix(""))
            save_weights(
                self.weights,
                self.raw_model,
                self.tokenizer.name_or_path,
                stage=stage,
                step=self.place.step,
                tokens=self.place.tokens,
            )
            draw_curve(self.metrics_path, self.weights.with_suffix(".png"))
        self.run.wait()

    def finish(self) -> None:
        self.bar.close()
        minutes = (time.monotonic() - self.started) / 60
        self.run.print(
            f"saved {self.weights} after {self.place.step} steps, {self.place.tokens:,} tokens, "
            f"{minutes:.1f} min, peak memory {peak_memory(self.run.device):.2f} GB"
        )


class RowsOfEpoch(torch.utils.data.Dataset):
    """Place in an epoch's order -> row."""

    def __init__(self, data: RowSource, order: np.ndarray):
        self.data, self.order = data, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> Row:
        if place == NO_ROW:
            return make_row([], self.data.max_seq_len, self.data.pad)
        return self.data.row(int(self.order[place]))


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU that has it, float16 on an older one, float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16


def peak_memory(device: torch.device) -> float:
    """GB: of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
