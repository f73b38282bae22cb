"""Texts -> a token file: every document as <s>…</s>, one after another, encoded in several processes.

The processes hold nothing but the tokenizer and the texts they are at, so memory does not grow with the corpus.
"""

import hashlib
import multiprocessing
import os
import signal
from array import array
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, NamedTuple

from .cli import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BATCH_CHARACTERS = 100_000  # of a task; long enough that handing it over costs nothing
KILLED = "a process that encodes was killed (out of memory? try fewer --num_workers)"
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
    with encoding_processes(num_workers, settings) as connections, ThreadPoolExecutor(num_workers) as threads:
        idle = SimpleQueue()
        for connection in connections:
            idle.put(connection)
        tasks: deque[Future[Encoded]] = deque()
        # As many tasks as keep the processes busy and no more: what is read ahead is held in memory.
        for batch in batches_of(texts, BATCH_CHARACTERS):
            tasks.append(threads.submit(ask, idle, batch))
            if len(tasks) == 2 * num_workers:
                yield tasks.popleft().result()
        while tasks:
            yield tasks.popleft().result()


def ask(idle: "SimpleQueue[Connection]", batch: list[str]) -> Encoded:
    """Has a batch encoded by a process that is idle, and waits for it."""
    connection = idle.get()
    try:
        tell(connection, batch)
        return connection.recv()
    except (EOFError, OSError) as error:
        raise UserError(KILLED) from error
    finally:
        idle.put(connection)


def tell(connection: Connection, what: object) -> None:
    try:
        connection.send(what)
    except OSError as error:
        raise UserError(KILLED) from error


@contextmanager
def encoding_processes(number: int, settings: tuple[str, int, int, str]) -> Iterator[list[Connection]]:
    """Starts processes and gives the connections to them. They end when these are closed, or when we die."""
    spawn = multiprocessing.get_context("spawn")
    processes, connections = [], []
    try:
        for _ in range(number):
            ours, theirs = spawn.Pipe()
            connections.append(ours)
            processes.append(spawn.Process(target=serve, args=(theirs,)))
            with signals_held():
                processes[-1].start()
            theirs.close()
        for connection in connections:  # not as arguments: a start hangs if much is to be told to a process that dies
            tell(connection, settings)
        yield connections
    finally:
        for connection in connections:
            connection.close()
        for process in processes:
            if process.pid is not None:
                process.join()


@contextmanager
def signals_held() -> Iterator[None]:
    """Puts signals off while a process is started, since half a start leaves a process with half its orders. The new
    process inherits that Ctrl-C, which reaches every process of a terminal, is put off, and never looks at it."""
    received: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.signal(number, lambda got, _: received.append(got)) for number in numbers]
    if can_block := hasattr(signal, "pthread_sigmask"):  # not on Windows
        resource_tracker.ensure_running()  # its start would end the blocking
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        if can_block:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        for number in received:
            signal.raise_signal(number)


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


def serve(connection: Connection) -> None:
    """What an encoding process does. It needs the tokenizers library only, so it is small and starts quickly."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # every process has one core's share
    from tokenizers import Tokenizer

    try:
        tokenizer_json, bos, eos, dtype = connection.recv()
        encoder = Tokenizer.from_str(tokenizer_json)
        encoder.no_truncation()
        encoder.no_padding()
        encoder.encode_special_tokens = True  # a typed </s> stays text
        while True:
            texts = connection.recv()
            ids = array(TYPE_CODES[dtype])
            for encoding in encoder.encode_batch_fast(texts, add_special_tokens=False):
                ids.append(bos)
                ids.extend(encoding.ids)
                ids.append(eos)
            connection.send(Encoded(ids.tobytes(), len(texts), sum(len(text.encode()) for text in texts)))
    except (EOFError, OSError):
        pass  # the connection was closed: no more work
