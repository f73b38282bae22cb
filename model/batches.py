"""Rows -> the global batches of an epoch, and of each the micro-batches of one process."""

import signal
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from .dataset import Batch, Row, epoch_order, make_row, stack
from .distributed import Run
from .options import TrainingOptions

NO_ROW = -1  # index of a row of padding: it evens out the processes' shares at the end of an epoch


class RowSource(Protocol):
    """What is asked of a dataset."""

    path: Path
    pad: int
    max_seq_len: int
    num_tokens: int  # of an epoch, padding not counted

    def __len__(self) -> int: ...
    def row(self, index: int) -> Row: ...
    def where(self, index: int) -> str:
        """In which place of the file a row lies, in words."""


class GlobalBatch(NamedTuple):
    """What one process has of it."""

    micro_batches: list[Batch]
    rows: list[list[int]]  # of each micro-batch, their numbers in the dataset


class GlobalBatches:
    """Epochs of `data` in random order. A global batch is a stretch of that order, whatever the number of processes."""

    def __init__(self, data: RowSource, args: TrainingOptions, run: Run):
        self.data, self.args, self.run = data, args, run
        self.rows_each = args.batch_size * args.accumulation_steps * run.world_size

    def __len__(self) -> int:
        """In an epoch."""
        return -(-len(self.data) // self.rows_each)

    def epoch(self, epoch: int, done: int = 0) -> Iterator[GlobalBatch]:
        """Those of an epoch, from number `done` on."""
        order = epoch_order(len(self.data), self.args.seed, epoch)
        loader = DataLoader(
            RowsInOrder(self.data, order),
            batch_sampler=(places for number in range(done, len(self)) for places in self.places(number)),
            collate_fn=stack,
            num_workers=self.args.num_workers,
            worker_init_fn=leave_signals,
            pin_memory=self.run.device.type == "cuda",
            # A generator of its own: the loader must not draw from the one that dropout uses.
            generator=torch.Generator().manual_seed(self.args.seed),
        )
        batches = iter(loader)
        for number in range(done, len(self)):
            places = self.places(number)
            rows = [[int(order[place]) for place in batch if place != NO_ROW] for batch in places]
            yield GlobalBatch(list(islice(batches, len(places))), rows)

    def places(self, number: int) -> list[list[int]]:
        """Where in the epoch's order the rows of this process's micro-batches are.

        The last global batch of an epoch may be short: it has as few micro-batches as will do, filled up with rows of
        padding.
        """
        size, width = self.args.batch_size, self.args.batch_size * self.run.world_size
        first = number * self.rows_each
        last = min(first + self.rows_each, len(self.data))
        starts = (start + self.run.rank * size for start in range(first, last, width))
        return [[place if place < last else NO_ROW for place in range(start, start + size)] for start in starts]


def leave_signals(worker: int) -> None:
    """A signal to the whole group of processes is the trainer's affair: it needs its workers until it has saved."""
    for signum in (signal.SIGINT, signal.SIGTERM):
        signal.signal(signum, signal.SIG_IGN)


class RowsInOrder(torch.utils.data.Dataset):
    """Place in an epoch's order -> row."""

    def __init__(self, data: RowSource, order: np.ndarray):
        self.data, self.order = data, order

    def __len__(self) -> int:
        return len(self.order)

    def __getitem__(self, place: int) -> Row:
        if place == NO_ROW:
            return make_row([], self.data.max_seq_len, self.data.pad)
        return self.data.row(int(self.order[place]))
