"""Files -> rows -> batches, for pretraining and fine-tuning.

A dataset has a length and gives its row number i. In which order rows are trained is a function of seed and epoch alone
(`epoch_order`), so the place in a run is two numbers, the epoch and how many rows of it are done, and every process
can find its share without being told.
"""

import ast
import bisect
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .chat import Message, Turn, drop_oldest_turns, encode_turns
from .cli import UserError
from .LMConfig import IGNORED_LABEL
from .tokenizer import tokenizer_hash


class Segment(NamedTuple):
    """A stretch of tokens that sees nothing but itself: a document, a conversation, or a part of one."""

    ids: np.ndarray  # [t]
    labels: np.ndarray  # [t], -100 where nothing is to be learnt


class Row(NamedTuple):
    """What fills one row of a batch; all arrays are [T] of int64."""

    input_ids: np.ndarray
    position_ids: np.ndarray  # restart at 0 with each segment
    labels: np.ndarray
    num_tokens: int  # padding not counted


class Batch(NamedTuple):
    """Rows stacked: tensors are [B, T]."""

    input_ids: Tensor
    position_ids: Tensor
    labels: Tensor
    cu_seq_lens: Tensor  # [N + 1], int32: where each of the N segments begins in the flattened rows, and the end
    num_tokens: int  # padding not counted
    num_targets: int  # labels that count in the loss, after the shift

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(x.to(device, non_blocking=True) for x in self[:4]), *self[4:])

    def inputs(self, varlen: bool = False) -> dict[str, Tensor]:
        """What the model takes. `varlen`: segments are told apart by where they begin, not by a mask."""
        inputs = dict(input_ids=self.input_ids, position_ids=self.position_ids, labels=self.labels)
        return inputs | dict(cu_seq_lens_q=self.cu_seq_lens) if varlen else inputs


def make_row(segments: Sequence[Segment], length: int, pad_id: int) -> Row:
    """Lays segments side by side and fills up with padding, which is a segment of its own that teaches nothing."""
    used = sum(len(segment.ids) for segment in segments)
    padding = length - used
    filler = Segment(np.full(padding, pad_id), np.full(padding, IGNORED_LABEL))
    parts = [*segments, filler]
    ids = np.concatenate([part.ids for part in parts]).astype(np.int64)
    positions = np.concatenate([np.arange(len(part.ids)) for part in parts])
    labels = np.concatenate([part.labels for part in parts]).astype(np.int64)
    starts = np.cumsum([0] + [len(part.ids) for part in parts])[:-1]
    labels[starts[starts < length]] = IGNORED_LABEL  # nothing before it could predict a segment's first token
    return Row(ids, positions, labels, used)


def stack(rows: Sequence[Row]) -> Batch:
    ids, positions, labels = (torch.from_numpy(np.stack(arrays)) for arrays in list(zip(*rows, strict=True))[:3])
    starts = (positions.flatten() == 0).nonzero().flatten()
    cu_seq_lens = torch.cat([starts, torch.tensor([positions.numel()])]).int()
    num_targets = sum(int((row.labels[1:] != IGNORED_LABEL).sum()) for row in rows)
    return Batch(ids, positions, labels, cu_seq_lens, sum(row.num_tokens for row in rows), num_targets)


def stack_rows(rows: Sequence[Sequence[Segment]], length: int, pad_id: int) -> Batch:
    return stack([make_row(segments, length, pad_id) for segments in rows])


def epoch_order(rows: int, seed: int, epoch: int) -> np.ndarray:
    """The order in which an epoch visits its rows."""
    return np.random.default_rng([seed, epoch]).permutation(rows)


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Indices of items, grouped so that each group's lengths add up to at most `capacity`, in few groups.

    Best fit, longest first: each item goes where it leaves the least room (Johnson 1973: at most 11/9 of the optimum,
    and in practice, with many short items, nearly full).
    """
    groups: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free places, group), sorted
    for item in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect.bisect_left(room, (lengths[item], -1))
        if at == len(room):
            free, group = capacity, len(groups)
            groups.append([])
        else:
            free, group = room.pop(at)
        groups[group].append(item)
        if free > lengths[item]:
            bisect.insort(room, (free - lengths[item], group))
    return groups


class PretrainDataset:
    """Rows of max_seq_len consecutive tokens of a token file, in shuffled order.

    The file is mapped, not read: a corpus may be larger than memory. Rows overlap by one token, so that every token is
    predicted once. Documents in one row do not see one another.

    Raises:
        UserError: no such file, no description beside it, or tokens of another tokenizer.
    """

    def __init__(self, path: str | Path, tokenizer: PreTrainedTokenizerBase, max_seq_len: int):
        self.path = Path(path)
        self.description = read_token_description(self.path)
        if self.description["tokenizer_sha256"] != tokenizer_hash(tokenizer.name_or_path):
            raise UserError(f"{path} was made with another tokenizer: run data_process.py again with this one")
        told, dtype = self.description["tokens"], np.dtype(self.description["dtype"])
        held = self.path.stat().st_size / dtype.itemsize
        if held != told or not held:
            raise UserError(f"{path} holds {held:g} tokens, its .json says {told}")
        self.tokens = np.memmap(self.path, dtype=dtype, mode="r")
        self.bos, self.eos, self.pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
        self.max_seq_len = max_seq_len
        self.num_tokens = len(self.tokens) + len(self) - 1  # the overlaps are trained on twice

    def __len__(self) -> int:
        return -(-(len(self.tokens) - 1) // (self.max_seq_len - 1))

    def row(self, index: int) -> Row:
        start = index * (self.max_seq_len - 1)
        ids = self.tokens[start : start + self.max_seq_len].astype(np.int64)
        before = self.tokens[start - 1] if start else self.eos
        # A document opens with a <s> that follows a </s> (they are one id in tokenizers without a bos token).
        opens = (ids == self.bos) & (np.concatenate([[before], ids[:-1]]) == self.eos)
        cuts = np.flatnonzero(opens)
        parts = np.split(ids, cuts[cuts > 0])
        return make_row([Segment(part, part) for part in parts], self.max_seq_len, self.pad)

    def where(self, index: int) -> str:
        start = index * (self.max_seq_len - 1)
        return f"tokens {start:,} to {min(start + self.max_seq_len, len(self.tokens)) - 1:,} of {self.path}"


def read_token_description(path: Path) -> dict[str, Any]:
    """The JSON beside a token file."""
    if not path.is_file():
        raise UserError(f"no token file {path}: make it with `python data_process.py pretrain`")
    file = path.with_suffix(".json")
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        for key in ("dtype", "tokens", "tokenizer_sha256"):
            description[key]
        if description["dtype"] not in ("uint16", "uint32"):
            raise ValueError(f"dtype {description['dtype']}")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot use {file} ({error!r}): make {path.name} again with data_process.py") from error
    return description


class SFTDataset:
    """Conversations of a csv (columns history, q, a), packed into rows of max_seq_len, never split.

    Every answer of a conversation is trained, its closing </s> too. Too long conversations lose their oldest turns,
    then the end of their last answer. Rows of the csv that cannot be used are skipped and counted in `skipped`.

    Args:
        packing: False gives each conversation a row of its own.
    """

    def __init__(self, path: str | Path, tokenizer: PreTrainedTokenizerBase, max_seq_len: int, packing: bool = True):
        self.path, self.max_seq_len, self.packing, self.pad = Path(path), max_seq_len, packing, tokenizer.pad_token_id
        self.skipped: Counter[str] = Counter()
        self.first_lines: dict[str, int] = {}  # reason -> the first csv row (from 1) it happened in
        self.shortened = 0
        ids, masks, self.starts = [], [], [0]
        self.numbers: list[int] = []  # of each conversation, its row of the csv
        for conversations in self.read_conversations():
            all_turns = encode_turns(tokenizer, [messages for _, messages in conversations])
            for (number, _), turns in zip(conversations, all_turns, strict=True):
                conversation_ids, mask = self.fit(turns)
                if not any(mask):
                    self.skip(number, "the question alone fills max_seq_len")
                    continue
                ids.append(np.array(conversation_ids, dtype=np.uint32))
                masks.append(np.array(mask, dtype=bool))
                self.starts.append(self.starts[-1] + len(conversation_ids))
                self.numbers.append(number)
        if not ids:
            raise UserError(f"{path} holds no conversation to train on ({dict(self.skipped)})")
        self.ids, self.mask = np.concatenate(ids), np.concatenate(masks)
        self.lengths = np.diff(self.starts)
        self.rows, self.num_tokens = self.group(), len(self.ids)

    def read_conversations(self) -> Iterator[list[tuple[int, list[Message]]]]:
        """Lists of (row number, messages), a few thousand at a time."""
        import pandas as pd

        try:
            chunks = pd.read_csv(self.path, dtype=str, keep_default_na=False, chunksize=4096, encoding="utf-8")
            number = 0
            for chunk in chunks:
                if not {"history", "q", "a"} <= set(chunk.columns):
                    raise UserError(f"{self.path} must have the columns history, q and a; it has {list(chunk.columns)}")
                conversations = []
                for history, question, answer in zip(chunk["history"], chunk["q"], chunk["a"], strict=True):
                    number += 1
                    messages = self.messages(number, history, question, answer)
                    if messages is not None:
                        conversations.append((number, messages))
                yield conversations
        except FileNotFoundError as error:
            raise UserError(f"no file {self.path}: make it with `python data_process.py sft`") from error
        except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
            raise UserError(f"{self.path} is not a csv file in UTF-8: {error}") from error

    def messages(self, number: int, history: str, question: str, answer: str) -> list[Message] | None:
        """One csv row -> messages, or None (counted) where it cannot be trained on."""
        try:
            pairs = parse_history(history)
        except ValueError:
            return self.skip(number, "history is not a list of [question, answer] pairs")
        if not question.strip() or not answer.strip():
            return self.skip(number, "question or answer is empty")
        return [
            message
            for q, a in [*pairs, [question, answer]]
            for message in ({"role": "user", "content": q}, {"role": "assistant", "content": a})
        ]

    def skip(self, number: int, reason: str) -> None:
        self.skipped[reason] += 1
        self.first_lines.setdefault(reason, number)

    def fit(self, turns: list[Turn]) -> tuple[list[int], list[int]]:
        kept = drop_oldest_turns(turns, self.max_seq_len)
        ids, mask = [i for turn in kept for i in turn.ids], [m for turn in kept for m in turn.mask]
        self.shortened += len(kept) < len(turns) or len(ids) > self.max_seq_len
        return ids[: self.max_seq_len], mask[: self.max_seq_len]

    def account(self) -> str:
        """One line: what there is to train on, and what was left out."""
        filled = len(self.ids) / (len(self.rows) * self.max_seq_len)
        line = (
            f"{len(self.lengths):,} conversations, {len(self.ids):,} tokens of which {int(self.mask.sum()):,} are "
            f"trained, in {len(self.rows):,} rows ({filled:.1%} full); {self.shortened:,} shortened"
        )
        for reason, count in self.skipped.items():
            line += f"; {count:,} skipped, {reason} (first: row {self.first_lines[reason]})"
        return line

    def group(self) -> list[np.ndarray]:
        """Which conversations share a row: packed a few thousand at a time, in random order."""
        order = np.random.default_rng(0).permutation(len(self.lengths))
        if not self.packing:
            return [order[i : i + 1] for i in range(len(order))]
        parts = [order[start : start + 8192] for start in range(0, len(order), 8192)]
        return [part[group] for part in parts for group in pack(self.lengths[part], self.max_seq_len)]

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> Row:
        segments = []
        for i in self.rows[index]:
            span = slice(self.starts[i], self.starts[i + 1])
            ids = self.ids[span].astype(np.int64)
            segments.append(Segment(ids, np.where(self.mask[span], ids, IGNORED_LABEL)))
        return make_row(segments, self.max_seq_len, self.pad)

    def where(self, index: int) -> str:
        return f"rows {', '.join(str(self.numbers[i]) for i in sorted(self.rows[index]))} of {self.path}"


def has_history(path: str | Path) -> bool:
    """Whether any conversation of a csv has turns before its last question."""
    import pandas as pd

    try:
        chunks = pd.read_csv(path, dtype=str, keep_default_na=False, chunksize=4096, usecols=["history"])
        return any((~chunk["history"].str.strip().isin(["", "[]"])).any() for chunk in chunks)
    except FileNotFoundError as error:
        raise UserError(f"no file {path}: make it with `python data_process.py sft`") from error
    except (ValueError, pd.errors.ParserError) as error:
        raise UserError(f"{path} is not a csv file with a column history: {error}") from error


def parse_history(cell: str) -> list[list[str]]:
    """A csv cell -> [question, answer] pairs: JSON, or a Python literal as older files have it, never evaluated.

    Raises:
        ValueError: it is neither, or not a list of pairs of texts.
    """
    if not cell.strip():
        return []
    try:
        pairs = json.loads(cell)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    except ValueError:
        try:
            pairs = ast.literal_eval(cell)
        except (SyntaxError, MemoryError, RecursionError, TypeError) as error:
            raise ValueError("neither JSON nor a literal") from error
    if not isinstance(pairs, list) or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and all(isinstance(text, str) for text in pair)
        for pair in pairs
    ):
        raise ValueError("not a list of pairs of texts")
    return [list(pair) for pair in pairs]
