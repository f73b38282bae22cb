"""What a run will need, before it begins: memory, disk, time, and the largest micro-batch that fits.

Weights, gradients and the optimizers' states are counted. The rest is measured, by steps on a copy of the model: those
of two small micro-batches give a line, memory over rows, which tells what any other one needs.
"""

import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from .backends import TorchBackend
from .batches import GlobalBatches, RowSource
from .cli import UserError
from .distributed import Run
from .gradients import TOKENS_PER_CHUNK
from .optim import Muon
from .options import AUTO, TrainingOptions
from .probe import Usage, free_bytes, give_back_freed, held_bytes, peak_bytes, probe
from .training_state import KEPT

FILL = 0.9  # of the free memory: saving and validation need some, and no allocator wastes nothing
GB = 1e9


class Sizes(NamedTuple):
    """Bytes that can be counted."""

    weights: int  # frozen ones included
    gradients: int
    optimizer: int

    @property
    def saved_state(self) -> int:
        """What is trained, and its optimizers' states."""
        return self.gradients + self.optimizer


class Memory(NamedTuple):
    """Bytes, those already held included."""

    sizes: Sizes
    held: int  # before training
    earlier: int  # at the highest until now, as while the data was read
    budget: float  # what may be held
    fixed: float  # by a micro-batch of no rows, with weights, gradients and optimizers' states
    per_row: float
    update: int  # in an update, whatever the rows

    def peak(self, rows: int) -> float:
        return max(self.fixed + self.per_row * rows, self.update, self.earlier)

    def most_rows(self) -> int:
        """Of a micro-batch that fits; 0 if none does."""
        return max(0, int((self.budget - self.fixed) / self.per_row)) if self.update <= self.budget else 0


def plan_ahead(
    model: nn.Module, data: RowSource, args: TrainingOptions, run: Run, weights: Path, dtype: torch.dtype
) -> None:
    """Puts numbers in place of `--batch_size auto`; with --plan, prints what the run needs and ends the process.

    The global batch stays what it is with the default of --batch_size. No weight and no random generator is changed.

    Raises:
        UserError: nothing fits, or what cannot be measured is asked for.
        SystemExit: the plan is printed.
    """
    if not args.plan and args.batch_size != AUTO:
        return
    if run.device.type not in ("cpu", "cuda"):
        run.fail(f"--plan and --batch_size auto cannot measure the memory of {run.device.type}: use --device cpu")
    if args.plan and run.world_size > 1:
        run.fail("--plan works in one process: start it without torchrun")
    memory = run.from_main(lambda: measure_memory(model, data, args, run, dtype))
    if args.batch_size == AUTO:
        args.batch_size, args.accumulation_steps = share_rows(
            type(args).batch_size * args.accumulation_steps, memory.most_rows()
        )
        run.print(f"--batch_size auto: --batch_size {args.batch_size} --accumulation_steps {args.accumulation_steps}")
    if args.plan:
        print_plan(model, data, args, run, weights, dtype, memory)
        sys.exit()


def share_rows(rows: int, most: int) -> tuple[int, int]:
    """(micro-batch, accumulation) whose product is `rows`: the largest micro-batch that is at most `most`."""
    size = max(size for size in range(1, min(rows, most) + 1) if rows % size == 0)
    return size, rows // size


def measure_memory(model: nn.Module, data: RowSource, args: TrainingOptions, run: Run, dtype: torch.dtype) -> Memory:
    """Raises UserError where not even one row fits."""
    give_back_freed()
    sizes = count(model, args, run, dtype)
    held, earlier = held_bytes(run.device), peak_bytes(run.device)
    sharing = int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if run.device.type == "cpu" else 1
    budget = held + FILL * free_bytes(run.device) / sharing
    small = -(-TOKENS_PER_CHUNK // data.max_seq_len)  # with fewer rows the loss fills no chunk: there is no line yet
    # Gradients of micro-batches before are there from the second one on. Compiled, a model needs no more than this.
    micro_batches = 1 if args.batch_size != AUTO and args.accumulation_steps == 1 else 2
    eager = replace(args, compile=False)
    measured = [
        probe(model, data, eager, run.device, dtype, rows, micro_batches, steps=1) for rows in (small, 2 * small)
    ]
    (first, _), (second, update) = measured
    per_row = max(1.0, (second.peak - first.peak) / small)
    exchanged = sizes.gradients if run.world_size > 1 else 0  # DDP sends gradients from a copy of them
    fixed = first.peak - small * per_row + exchanged
    memory = Memory(sizes, held, earlier, budget, fixed, per_row, update.peak + exchanged)
    if not memory.most_rows():
        raise UserError(
            f"not even one row fits into memory: {memory.peak(1) / GB:.2f} GB are needed, {budget / GB:.2f} GB may be "
            "taken; lower --max_seq_len, or train a smaller model"
        )
    return memory


def count(model: nn.Module, args: TrainingOptions, run: Run, dtype: torch.dtype) -> Sizes:
    """Muon keeps one number for each of its parameters, AdamW two; gradients are as large as what is trained."""
    optimizer = 0
    for each in TorchBackend(model, replace(args, compile=False), Run(0, 1, run.device), dtype).optimizers:
        numbers = 1 if isinstance(each, Muon) else 2
        optimizer += numbers * sum(p.nbytes for group in each.param_groups for p in group["params"])
    parameters = list(model.parameters())
    return Sizes(sum(p.nbytes for p in parameters), sum(p.nbytes for p in parameters if p.requires_grad), optimizer)


def print_plan(
    model: nn.Module,
    data: RowSource,
    args: TrainingOptions,
    run: Run,
    weights: Path,
    dtype: torch.dtype,
    memory: Memory,
) -> None:
    epoch = GlobalBatches(data, args, run)
    steps = args.max_steps or args.epochs * len(epoch)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    time = "not measured, as the micro-batch does not fit: lower --batch_size, or make it auto"
    peak = memory.peak(args.batch_size)
    if args.batch_size <= memory.most_rows():
        usages = probe(model, data, args, run.device, dtype, args.batch_size, min(2, args.accumulation_steps), steps=5)
        time = told_time(*usages, args.accumulation_steps, steps)
        peak = max(peak, *(usage.peak for usage in usages))  # where the line was too low
    lines = {
        "parameters": f"{sum(p.numel() for p in model.parameters()):,}, of which {trained:,} are trained",
        "an epoch": f"{data.num_tokens:,} tokens, in {len(data):,} rows of {data.max_seq_len}; {len(epoch):,} steps",
        "the run": f"{steps:,} steps of {epoch.rows_each} rows ({args.batch_size} x {args.accumulation_steps})",
        "memory": told_memory(memory, peak, run.device),
        "micro-batch": f"of {args.batch_size} rows; at most {memory.most_rows():,} fit",
        "disk": told_disk(memory.sizes, weights),
        "time": time,
    }
    run.print(f"plan of {weights}, on {run.device} in {str(dtype).removeprefix('torch.')}; nothing is written")
    for name, text in lines.items():
        run.print(f"{name:<12} {text}")


def told_memory(memory: Memory, peak: float, device: torch.device) -> str:
    """The peak, and its parts: activations are what is not one of the others."""
    sizes = memory.sizes
    process = memory.held - sizes.weights
    parts = {"weights": sizes.weights, "gradients": sizes.gradients, "optimizer": sizes.optimizer}
    parts = {"process": process, **parts, "activations": max(0.0, peak - process - sum(sizes))}
    where = "GPU" if device.type == "cuda" else "host"
    words = ", ".join(f"{name} {value / GB:.2f}" for name, value in parts.items())
    host = f"; host: {held_bytes(torch.device('cpu')) / GB:.2f} GB" if device.type == "cuda" else ""
    return f"{where}: {peak / GB:.2f} GB at the peak, {memory.budget / GB:.2f} GB may be taken ({words}){host}"


def told_disk(sizes: Sizes, weights: Path) -> str:
    """While a state is written, the older ones are there still."""
    folder = next(parent for parent in weights.absolute().parents if parent.is_dir())
    saved = sizes.gradients + KEPT * sizes.saved_state
    return (
        f"{saved / GB:.2f} GB: weights {sizes.gradients / GB:.2f}, training states {KEPT} x "
        f"{sizes.saved_state / GB:.2f}; {sizes.saved_state / GB:.2f} more while saving; "
        f"{shutil.disk_usage(folder).free / GB:.2f} GB are free"
    )


def told_time(micro_batch: Usage, update: Usage, accumulation: int, steps: int) -> str:
    step = accumulation * micro_batch.seconds + update.seconds
    minutes, seconds = divmod(round(steps * step), 60)
    hours, minutes = divmod(minutes, 60)
    return (
        f"{step:.3f} s a step ({accumulation} x {micro_batch.seconds:.3f}, update {update.seconds:.3f}): "
        f"{hours}:{minutes:02}:{seconds:02} for {steps:,} steps, besides validation and saving"
    )
