"""Bits per byte: a held-out loss that does not depend on the tokenizer.

For each document the sum of -log2 p over its tokens and the closing </s>, given the opening <s>; summed over all
documents and divided by the UTF-8 bytes of their text. Documents longer than the context are scored in windows moved
by half a window, each token once, with the longest context it has.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from .dataset import Batch, Segment, SFTDataset, make_row, pack, stack, stack_rows
from .distributed import Run
from .LMConfig import IGNORED_LABEL
from .model import Transformer
from .tokenizer import encode_texts


class Score(NamedTuple):
    bits_per_byte: float
    loss: float  # nats per token, the closing </s> included
    tokens: int
    bytes: int


@torch.no_grad()
def score_documents(
    model: Transformer,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    max_seq_len: int,
    run: Run,
    batch_size: int = 16,
    progress: bool = False,
) -> Score:
    """Bits per byte and loss of a model on texts; every process scores its share, all of them get the result."""
    segments = [
        window
        for ids in encode_texts(tokenizer, list(texts))
        for window in windows([tokenizer.bos_token_id, *ids, tokenizer.eos_token_id], max_seq_len)
    ]
    rows = pack([len(segment.ids) for segment in segments], max_seq_len)
    nats, tokens = 0.0, 0
    was_training = model.training
    model.eval()
    batches = share(len(rows), batch_size, run)
    for numbers in tqdm(batches, "scoring", unit="batch", disable=not (progress and run.is_main), leave=False):
        rows_of_segments = [[segments[i] for i in rows[number]] for number in numbers] or [[]]
        batch = stack_rows(rows_of_segments, max_seq_len, tokenizer.pad_token_id).to(run.device)
        nats += summed_loss(model, batch)
        tokens += batch.num_targets
    model.train(was_training)
    nats, tokens = sum_over_processes(run, nats, tokens)
    num_bytes = sum(len(text.encode()) for text in texts)
    return Score(nats / math.log(2) / num_bytes, nats / tokens, int(tokens), num_bytes)


@torch.no_grad()
def answer_loss(model: Transformer, data: SFTDataset, run: Run, batch_size: int = 16) -> float:
    """Nats per token of the answers of held-out conversations; every process scores its share."""
    nats, tokens = 0.0, 0
    was_training = model.training
    model.eval()
    for numbers in share(len(data), batch_size, run):
        rows = [data.row(number) for number in numbers] or [make_row([], data.max_seq_len, data.pad)]
        batch = stack(rows).to(run.device)
        nats += summed_loss(model, batch)
        tokens += batch.num_targets
    model.train(was_training)
    nats, tokens = sum_over_processes(run, nats, tokens)
    return nats / tokens


def share(num_rows: int, batch_size: int, run: Run) -> list[range]:
    """The rows of this process's batches. All processes get as many batches, of which some may have no row.

    In a forward pass processes may wait for each other: with ZeRO-3 each holds a part of every weight.
    """
    width = batch_size * run.world_size
    starts = (start + run.rank * batch_size for start in range(0, num_rows, width))
    return [range(min(start, num_rows), min(start + batch_size, num_rows)) for start in starts]


def sum_over_processes(run: Run, *numbers: float) -> list[float]:
    return run.sum(torch.tensor(numbers, dtype=torch.float64)).tolist()


def summed_loss(model: Transformer, batch: Batch) -> float:
    """Nats, summed over the batch's trained tokens, without the balance loss of a mixture of experts."""
    output = model(**batch.inputs(), num_items_in_batch=1)
    return float(output.loss - (output.aux_loss or 0.0))


def windows(ids: Sequence[int], size: int) -> list[Segment]:
    """One document's ids -> segments of at most `size` ids; labels mark the tokens that each of them scores."""
    ids = np.asarray(ids)
    segments = []
    scored = 1  # the opening <s> is given
    for start in range(0, max(1, len(ids) - size + size // 2), size // 2):
        end = min(start + size, len(ids))
        labels = np.full(end - start, IGNORED_LABEL)
        labels[scored - start :] = ids[scored:end]
        segments.append(Segment(ids[start:end], labels))
        scored = end
    return segments
