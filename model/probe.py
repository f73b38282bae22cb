"""A few training steps on a copy of the model, before training: how long they take, how much memory they fill."""

import copy
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import nn

from .attention import takes_varlen
from .backends import TorchBackend
from .batches import RowSource
from .dataset import epoch_order, stack
from .distributed import Run
from .options import TrainingOptions
from .resume import random_state, set_random_state

PATIENCE = 20.0  # seconds after which no further step begins
CLEAR_PEAK = Path("/proc/self/clear_refs")  # Linux: 5 written to it sets the peak to what is held now


class Usage(NamedTuple):
    seconds: float
    peak: int  # bytes that the process held, or had on its GPU, at the highest


class Prober:
    """Takes training steps as a Trainer of one process would, with the run's first rows, on a copy of the model."""

    def __init__(
        self, model: nn.Module, data: RowSource, args: TrainingOptions, device: torch.device, dtype: torch.dtype
    ):
        self.data, self.device, self.dtype = data, device, dtype
        self.order = epoch_order(len(data), args.seed, 0)
        self.varlen = takes_varlen(model.config, device, dtype, data.max_seq_len, args.compile)
        self.backend = TorchBackend(copy.deepcopy(model), args, Run(0, 1, device), dtype)

    def micro_batch(self, rows: int, number: int) -> None:
        """Fetches the rows of the micro-batch `number`, and makes its gradients."""
        places = range(number * rows, (number + 1) * rows)
        batch = stack([self.data.row(int(self.order[place % len(self.order)])) for place in places]).to(self.device)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            output = self.backend.model(**batch.inputs(self.varlen), num_items_in_batch=max(1, batch.num_targets))
        self.backend.backward(output.loss)

    def step(self, number: int, rows: int, micro_batches: int) -> tuple[list[Usage], Usage]:
        """What each micro-batch takes, and the update."""
        numbers = range(number * micro_batches, (number + 1) * micro_batches)
        parts = [watch(self.device, partial(self.micro_batch, rows, each)) for each in numbers]
        return parts, watch(self.device, partial(self.backend.update, 1.0, True))


def probe(
    model: nn.Module,
    data: RowSource,
    args: TrainingOptions,
    device: torch.device,
    dtype: torch.dtype,
    rows: int,
    micro_batches: int,
    steps: int,
) -> tuple[Usage, Usage]:
    """What a micro-batch of `rows` takes, and the update after `micro_batches` of them: median time, highest peak.

    The copy's weights do not count in the peaks. The model and all random generators stay as they are.
    """
    generators, started = random_state(), time.perf_counter()
    prober = Prober(model, data, args, device, dtype)
    prober.step(0, rows, micro_batches)  # not counted: in it the optimizers' states are made
    parts, updates = [], []
    for number in range(1, steps + 1):
        more, update = prober.step(number, rows, micro_batches)
        parts, updates = [*parts, *more], [*updates, update]
        if time.perf_counter() - started > PATIENCE:
            break
    del prober
    give_back_freed()
    set_random_state(generators)
    spare = sum(p.nbytes for p in model.parameters())
    return summary(parts, spare), summary(updates, spare)


def give_back_freed() -> None:
    """To the system, what is free already but kept: activations would fill it first, and seem smaller."""
    with suppress(OSError, AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def summary(usages: list[Usage], spare: int) -> Usage:
    return Usage(statistics.median(usage.seconds for usage in usages), max(usage.peak for usage in usages) - spare)


def watch(device: torch.device, work: Callable[[], object]) -> Usage:
    reset_peak(device)
    synchronize(device)
    started = time.perf_counter()
    work()
    synchronize(device)
    return Usage(time.perf_counter() - started, peak_bytes(device))


def synchronize(device: torch.device) -> None:
    """A GPU works on after its calls have returned."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(device: torch.device) -> int:
    """Of the GPU where there is one, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":
        return psutil.Process().memory_info().peak_wset
    import resource  # which Windows has not

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def reset_peak(device: torch.device) -> None:
    """Where the system cannot, the peak stays at the highest so far."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif CLEAR_PEAK.exists():
        CLEAR_PEAK.write_text("5", encoding="ascii")


def held_bytes(device: torch.device) -> int:
    """What this process holds now, of the GPU where there is one."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def free_bytes(device: torch.device) -> int:
    """What it may take besides."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available
