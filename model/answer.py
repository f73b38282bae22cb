"""Tokens in, text out: one answer in the making, piece by piece, for a thread or a coroutine that waits for it."""

import asyncio
import time
from bisect import bisect_right
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import suppress
from queue import SimpleQueue

from transformers import PreTrainedTokenizerBase

from .generate import Generation
from .sampling import Token

REPLACEMENT = "\ufffd"  # what bytes decode to that are no character, or not yet


class Answer:
    """Iterate over it, once, with `for` or `async for`: its text in pieces of whole characters.

    Leaving the loop early, or `cancel` from any thread, ends the generation at the next step. Text from the first
    occurrence of a string of `stop` on does not appear.
    """

    def __init__(self, generation: Generation, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()):
        self.generation = generation
        self.stop = [text for text in stop if text]
        self.prompt_tokens = len(generation.prompt_ids)
        self.tokens: list[Token] = []  # so far, the closing </s> included
        self.text = ""  # all pieces so far
        self.ends: list[int] = []  # of each token, in the text
        self.finish_reason: str | None = None  # "stop": ended by the model or by a stop string, "length": it had to end
        self.is_over = False  # has ended, for whatever reason
        self.seconds = 0.0  # from the beginning to the last token so far
        self.seconds_to_first = 0.0
        self.started = time.monotonic()
        self.detokenizer = Detokenizer(tokenizer)
        self.inbox: SimpleQueue[tuple[float, Token | Exception | None]] = SimpleQueue()
        self.notify: Callable[[], object] = lambda: None

    def deliver(self, item: Token | Exception | None) -> None:
        """For the engine's thread: a token, what went wrong, or None where nothing more comes."""
        self.inbox.put((time.monotonic(), item))
        with suppress(RuntimeError):  # the event loop of a coroutine that waited is closed
            self.notify()

    def cancel(self) -> None:
        """Nobody wants the rest; what has come stays. Of no effect on a finished answer."""
        self.generation.cancelled = True
        self.deliver(None)

    def __iter__(self) -> Iterator[str]:
        try:
            while not self.is_over:
                if piece := self.take(*self.inbox.get()):
                    yield piece
        finally:
            self.cancel()

    async def __aiter__(self) -> AsyncIterator[str]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        self.notify = lambda: loop.call_soon_threadsafe(arrived.set)
        try:
            while not self.is_over:
                if self.inbox.empty():
                    await arrived.wait()
                    arrived.clear()
                elif piece := self.take(*self.inbox.get()):
                    yield piece
        finally:
            self.cancel()

    def take(self, at: float, item: Token | Exception | None) -> str:
        """What text has become certain; also brings the figures up to date. Raises what the engine delivered."""
        if not isinstance(item, Token):
            self.is_over = True
            if item is not None:
                raise item
            return ""
        self.tokens.append(item)
        self.seconds = at - self.started
        if len(self.tokens) == 1:
            self.seconds_to_first = self.seconds
        if item.id in self.generation.stop_ids:
            self.finish_reason = "stop"
        else:
            self.detokenizer.add(item.id)
            if len(self.tokens) >= self.generation.sampling.max_new_tokens:
                self.finish_reason = "length"
        if self.finish_reason == "stop":
            self.detokenizer.finish()  # cut by length, the beginning of a character does not show
        self.ends.append(len(self.detokenizer.text))
        return self.advance()

    def advance(self) -> str:
        """The next piece: what is certain and cannot become a stop string any more."""
        certain = self.detokenizer.text
        found = [at for text in self.stop if (at := certain.find(text, len(self.text))) >= 0]
        if found:
            self.finish_reason = "stop"
            end = min(found)
        elif self.finish_reason:
            end = len(certain)
        else:
            end = len(certain) - max((overlap(certain[len(self.text) :], text) for text in self.stop), default=0)
        if self.finish_reason:
            self.is_over = True
        piece = certain[len(self.text) : end]
        self.text += piece
        return piece

    @property
    def shown_tokens(self) -> int:
        """How many of the tokens lie in the text so far."""
        return bisect_right(self.ends, len(self.text))

    @property
    def completion_tokens(self) -> int:
        return len(self.tokens)

    @property
    def tokens_per_s(self) -> float:
        """Waiting and reading the prompt included."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        return f"{self.finish_reason or 'stopped'}, {self.completion_tokens} tokens, {self.tokens_per_s:.1f} tokens/s"


def overlap(text: str, stop: str) -> int:
    """How many characters at the end of `text` are the beginning of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class Detokenizer:
    """Ids -> text, as they come. A character's bytes may lie in several tokens: nothing of it appears until all are in.

    All ids are decoded anew each time, so that the pieces together are what decoding them at once gives, in any
    tokenizer; it takes 0.1 ms for 1,000 tokens.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.text = ""  # all pieces so far

    def add(self, token: int) -> str:
        """What text has become certain with this token; often a word, sometimes nothing."""
        self.ids.append(token)
        text = self.decode()
        # At most three bytes wait for a fourth. Replacement characters before them are bytes that are no character.
        unfinished = min(len(text) - len(text.rstrip(REPLACEMENT)), 3)
        certain = text[: len(text) - unfinished]
        return self.advance(certain) if len(certain) > len(self.text) else ""

    def finish(self) -> str:
        """What was held back, now that nothing follows: bytes that are no character, or a real U+FFFD."""
        return self.advance(self.decode())

    def decode(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def advance(self, text: str) -> str:
        piece, self.text = text[len(self.text) :], text
        return piece
