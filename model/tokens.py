"""Texts -> a token file: every document as <s>…</s>, one after another, encoded in several processes.

The processes hold nothing but the tokenizer and the texts they are at, so memory does not grow with the corpus.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .cli import UserError

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

BATCH_CHARACTERS = 100_000  # of a task; long enough that handing it over costs nothing
TYPE_CODES = {"uint16": "H", "uint32": "I"}  # of Python's array


class Encoded(NamedTuple):
    ids: bytes  # in the file's number type
    documents: int
    text_bytes: int


def write_token_file(
    path: Path, texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase", num_workers: int
) -> dict[str, Any]:
    """Writes the ids of all texts and returns what there is to say about the file.

    Args:
        num_workers: processes that encode; 0: one for each core we may use.

    Raises:
        UserError: a tokenizer without a fast form, or an encoding process that was killed.
    """
    dtype = token_dtype(tokenizer)
    documents = text_bytes = tokens = 0
    sha256 = hashlib.sha256()
    with path.open("wb") as file:
        for encoded in encode_in_processes(texts, tokenizer, dtype, num_workers or core_count()):
            file.write(encoded.ids)
            sha256.update(encoded.ids)
            tokens += len(encoded.ids) // array(TYPE_CODES[dtype]).itemsize
            documents += encoded.documents
            text_bytes += encoded.text_bytes
    return {
        "dtype": dtype,
        "tokens": tokens,
        "documents": documents,
        "text_bytes": text_bytes,
        "vocab_size": len(tokenizer),
        "sha256": sha256.hexdigest(),
    }


def core_count() -> int:
    """Cores that this process may use, where the system can tell, or else all there are."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def token_dtype(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The smallest number type that holds every id: ids need not be as many as the largest of them says."""
    largest = max(len(tokenizer) - 1, *tokenizer.get_vocab().values())
    return "uint16" if largest < 1 << 16 else "uint32"


def encode_in_processes(
    texts: Iterable[str], tokenizer: "PreTrainedTokenizerBase", dtype: str, num_workers: int
) -> Iterator[Encoded]:
    """Encodes batches of texts in other processes; the results come in the order of the texts."""
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer in {tokenizer.name_or_path} has no fast form (tokenizer.json)")
    settings = (tokenizer.backend_tokenizer.to_str(), tokenizer.bos_token_id, tokenizer.eos_token_id, dtype)
    batches = batches_of(texts, BATCH_CHARACTERS)
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), start_encoder, settings)
    try:
        # As many tasks as keep the processes busy and no more: what is read ahead is held in memory.
        tasks = deque(pool.submit(encode_batch, batch) for batch in islice(batches, 2 * num_workers))
        while tasks:
            yield tasks.popleft().result()
            tasks.extend(pool.submit(encode_batch, batch) for batch in islice(batches, 1))
    except BrokenProcessPool as error:
        raise UserError("a process that encodes was killed (out of memory? try fewer --num_workers)") from error
    finally:
        pool.shutdown(cancel_futures=True)


def batches_of(texts: Iterable[str], characters: int) -> Iterator[list[str]]:
    """Lists of successive texts with about so many characters together; a text is never cut."""
    batch, size = [], 0
    for text in texts:
        batch.append(text)
        size += len(text)
        if size >= characters:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


encoder: "Tokenizer"  # in an encoding process, set when it starts
frame: tuple[int, int]  # <s> and </s>
type_code: str


def start_encoder(tokenizer_json: str, bos: int, eos: int, dtype: str) -> None:
    """What an encoding process does first. It needs the tokenizers library only, so it is small and starts quickly."""
    global encoder, frame, type_code
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches us too; our parent ends us in order
    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every process has one core's share
    from tokenizers import Tokenizer

    encoder = Tokenizer.from_str(tokenizer_json)
    encoder.no_truncation()
    encoder.no_padding()
    encoder.encode_special_tokens = True  # a typed </s> stays text
    frame, type_code = (bos, eos), TYPE_CODES[dtype]


def end_with_parent() -> None:
    """Ends this process when the parent was killed and could not."""
    multiprocessing.parent_process().join()
    os._exit(1)


def encode_batch(texts: list[str]) -> Encoded:
    bos, eos = frame
    ids = array(type_code)
    for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False):
        ids.append(bos)
        ids.extend(encoding.ids)
        ids.append(eos)
    return Encoded(ids.tobytes(), len(texts), sum(len(text.encode()) for text in texts))
