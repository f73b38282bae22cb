"""One process or many: finds out which, joins them, and offers the few collective operations that training needs."""

import atexit
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.nn.functional
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .cli import UserError

T = TypeVar("T")

# Seconds that Python waits before it ends. DeepSpeed never lets go of its process groups, so gloo's threads outlive
# them, and one that still has a tensor to free when Python is gone aborts the process (pytorch/pytorch#190489).
LAST_MOMENT = 0.5


@dataclass(frozen=True)
class Run:
    """This process's place among all of them."""

    rank: int
    world_size: int
    device: torch.device
    wrapped: list[DistributedDataParallel] = field(default_factory=list)

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def print(self, *words: object) -> None:
        """Prints once, however many processes there are."""
        if self.is_main:
            print(*words, flush=True)

    def sum(self, values: Tensor) -> Tensor:
        """Element-wise sum over all processes. One process alone leaves it where it is: no GPU is waited for."""
        if self.world_size > 1:
            values = values.to(self.device)
            dist.all_reduce(values)
        return values

    def fail(self, message: str) -> NoReturn:
        """Ends every process, if all of them call it; one says why."""
        raise UserError(message) if self.is_main else SystemExit(2)

    def gather(self, value: T) -> list[T]:
        """Every process's value, in order of rank, on every process."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value)
        return values

    def from_main(self, make: Callable[[], T]) -> T:
        """What `make` gives on the main process, on every process. If it raises UserError, all of them end."""
        if self.world_size == 1:
            return make()
        outcome = [None, None]
        if self.is_main:
            try:
                outcome[0] = make()
            except UserError as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, device=self.device)
        if outcome[1] is not None:
            raise outcome[1] if self.is_main else SystemExit(2)  # one of them has said it
        return outcome[0]

    def attempt(self, work: Callable[[], None]) -> str | None:
        """Does `work`, which saves something, on every process; what went wrong on any of them, on all of them."""
        try:
            work()
            error = None
        except (OSError, FloatingPointError) as caught:
            error = str(caught)
        return next(filter(None, self.gather(error)), None)

    def wrap(self, model: nn.Module) -> nn.Module:
        """The same model, with gradients averaged over processes in its backward pass."""
        if self.world_size == 1:
            return model
        wrapped = DistributedDataParallel(model, device_ids=[self.device] if self.device.type == "cuda" else None)
        self.wrapped.append(wrapped)
        return wrapped

    def synchronize_gradients(self, model: nn.Module, on: bool) -> None:
        """Off while micro-batches are accumulated: only the group's last backward pass exchanges gradients."""
        if self.world_size > 1:
            model.require_backward_grad_sync = on


@contextmanager
def launch(device: str = "auto") -> Iterator[Run]:
    """The one process, or what torchrun started: it tells each process its place in environment variables."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    world_size = int(os.environ.get("WORLD_SIZE", 1))
    chosen = pick_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    if world_size > 1:
        join(chosen)
    run = Run(int(os.environ.get("RANK", 0)), world_size, chosen)
    try:
        yield run
    finally:
        for model in run.wrapped:
            # They hold the process group, too. Were they freed later, its end would come while Python's lock is held,
            # and wait for a thread of its own that waits for this lock (github.com/pytorch/pytorch/issues/56297).
            del model.logger, model.reducer
            model.process_group = None
        if dist.is_initialized():
            dist.destroy_process_group()


def join(device: torch.device, **place: Any) -> None:
    """Makes the group of processes: all that the launcher has started, if `place` does not say otherwise."""
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", **place)
    atexit.register(time.sleep, LAST_MOMENT)


def join_alone(run: Run) -> None:
    """Makes one process a group of one, as DeepSpeed wants it, where no launcher has made a group."""
    if not dist.is_initialized():
        os.environ.setdefault("LOCAL_RANK", "0")
        join(run.device, store=dist.HashStore(), rank=0, world_size=1)


def pick_device(name: str, local_rank: int = 0) -> torch.device:
    """A device by name; `auto` is the best there is. Raises UserError for one that is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if name == "cuda":
        if not torch.cuda.is_available():
            raise UserError("--device cuda: PyTorch sees no GPU here; use --device cpu")
        if local_rank >= torch.cuda.device_count():
            raise UserError(f"{local_rank + 1} processes on this machine, but only {torch.cuda.device_count()} GPUs")
        return torch.device("cuda", local_rank)
    if name == "mps" and not torch.backends.mps.is_available():
        raise UserError("--device mps: PyTorch sees no Apple GPU here; use --device cpu")
    return torch.device(name)
