"""Answers in the making -> the objects and the stream of events that OpenAI's API sends."""

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from functools import lru_cache
from typing import Any

from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from .answer import Answer
from .sampling import Token

BYTE_OF = {character: byte for byte, character in bytes_to_unicode().items()}


class Interrupted(Exception):
    """The server ended an answer before its end."""


class Reply:
    """What chats and completions have in common.

    Args:
        answers: one for each choice.
        prompts: how many different prompts they answer; choices of one prompt are neighbours.
    """

    prefix, whole_object, chunk_object = "", "", ""

    def __init__(self, model: str, answers: Sequence[Answer], tokenizer: PreTrainedTokenizerBase, prompts: int = 1):
        self.answers, self.tokenizer = answers, tokenizer
        self.prompt_tokens = sum(answer.prompt_tokens for answer in answers[:: len(answers) // prompts])
        self.head = {"id": f"{self.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    async def whole(self) -> dict[str, Any]:
        """The one object of a reply that is not streamed. Raises Interrupted."""
        async for _ in pieces_of(self.answers):
            pass
        if any(answer.finish_reason is None for answer in self.answers):
            raise Interrupted("the server is shutting down")
        choices = [self.choice(index, answer) for index, answer in enumerate(self.answers)]
        return self.head | {"object": self.whole_object, "choices": choices, "usage": self.usage()}

    async def events(self, include_usage: bool) -> AsyncIterator[bytes]:
        """The same as server-sent events."""
        head = self.head | {"object": self.chunk_object}
        extra = {"usage": None} if include_usage else {}
        shown = [0] * len(self.answers)  # tokens of each
        try:
            for index in range(len(self.answers)):
                for choice in self.opening(index):
                    yield event(head | {"choices": [choice]} | extra)
            async for index, piece in pieces_of(self.answers):
                answer = self.answers[index]
                if not piece and answer.finish_reason is None:
                    raise Interrupted("the server is shutting down")
                tokens = answer.tokens[shown[index] : answer.shown_tokens]
                shown[index] += len(tokens)
                choice = self.part(index, piece, tokens) if piece else self.ending(index, answer.finish_reason, tokens)
                yield event(head | {"choices": [choice]} | extra)
            if include_usage:
                yield event(head | {"choices": [], "usage": self.usage()})
            yield b"data: [DONE]\n\n"
        except Exception as error:  # whatever it is, it is too late for a status: the headers are gone
            yield event({"error": {"message": str(error), "type": "server_error", "param": None, "code": None}})

    def usage(self) -> dict[str, int]:
        completion = sum(answer.completion_tokens for answer in self.answers)
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": completion,
            "total_tokens": self.prompt_tokens + completion,
        }

    def shown(self, answer: Answer) -> list[Token]:
        return answer.tokens[: answer.shown_tokens]

    def opening(self, index: int) -> list[dict[str, Any]]:
        """What a choice's stream begins with."""
        raise NotImplementedError

    def part(self, index: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """A piece of a choice."""
        raise NotImplementedError

    def ending(self, index: int, finish_reason: str, tokens: Sequence[Token]) -> dict[str, Any]:
        """What a choice's stream ends with; the tokens are such as made no text any more."""
        raise NotImplementedError

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        """All of a choice at once."""
        raise NotImplementedError


class ChatReply(Reply):
    prefix, whole_object, chunk_object = "chatcmpl", "chat.completion", "chat.completion.chunk"

    def opening(self, index: int) -> list[dict[str, Any]]:
        return [self.delta(index, {"role": "assistant", "content": ""})]

    def part(self, index: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return self.delta(index, {"content": text}) | {"logprobs": self.logprobs(tokens)}

    def ending(self, index: int, finish_reason: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return self.delta(index, {}) | {"logprobs": self.logprobs(tokens), "finish_reason": finish_reason}

    def delta(self, index: int, delta: dict[str, str]) -> dict[str, Any]:
        return {"index": index, "delta": delta, "logprobs": None, "finish_reason": None}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        return {
            "index": index,
            "message": {"role": "assistant", "content": answer.text, "refusal": None},
            "logprobs": self.logprobs(self.shown(answer)),
            "finish_reason": answer.finish_reason,
        }

    def logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        entries = [
            self.entry(token.id, token.logprob)
            | {"top_logprobs": [self.entry(other, logprob) for other, logprob in token.top]}
            for token in tokens
            if token.logprob is not None and token.id not in self.tokenizer.all_special_ids
        ]
        return {"content": entries, "refusal": None} if entries else None

    def entry(self, token: int, logprob: float) -> dict[str, Any]:
        data = token_bytes(self.tokenizer, token)
        return {"token": token_text(data), "logprob": logprob, "bytes": list(data)}


class CompletionReply(Reply):
    prefix, whole_object, chunk_object = "cmpl", "text_completion", "text_completion"

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.echoes = [""] * len(self.answers)  # what each choice begins with: its prompt, where that is asked for

    def opening(self, index: int) -> list[dict[str, Any]]:
        return [self.text(index, self.echoes[index])] if self.echoes[index] else []

    def part(self, index: int, text: str, tokens: Sequence[Token]) -> dict[str, Any]:
        before = len(self.answers[index].text) - len(text)
        return self.text(index, text) | {"logprobs": self.logprobs(tokens, len(self.echoes[index]) + before)}

    def ending(self, index: int, finish_reason: str, tokens: Sequence[Token]) -> dict[str, Any]:
        return self.part(index, "", tokens) | {"finish_reason": finish_reason}

    def text(self, index: int, text: str) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": None, "finish_reason": None}

    def choice(self, index: int, answer: Answer) -> dict[str, Any]:
        echo = self.echoes[index]
        logprobs = self.logprobs(self.shown(answer), len(echo))
        return self.text(index, echo + answer.text) | {"logprobs": logprobs, "finish_reason": answer.finish_reason}

    def logprobs(self, tokens: Sequence[Token], offset: int) -> dict[str, Any] | None:
        tokens = [t for t in tokens if t.logprob is not None and t.id not in self.tokenizer.all_special_ids]
        if not tokens:
            return None
        texts = [self.token_text(token.id) for token in tokens]
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{self.token_text(i): logprob for i, logprob in token.top} for token in tokens],
            "text_offset": [offset + sum(map(len, texts[:i])) for i in range(len(texts))],
        }

    def token_text(self, token: int) -> str:
        return token_text(token_bytes(self.tokenizer, token))


async def pieces_of(answers: Sequence[Answer]) -> AsyncIterator[tuple[int, str]]:
    """Pieces of several answers as they come, each with its answer's number; "" is an answer's last."""
    queue: asyncio.Queue[tuple[int, str | Exception]] = asyncio.Queue()

    async def read(index: int, answer: Answer) -> None:
        try:
            async for piece in answer:
                queue.put_nowait((index, piece))
            queue.put_nowait((index, ""))
        except Exception as error:  # whatever it is, it belongs to who reads the pieces
            queue.put_nowait((index, error))

    readers = [asyncio.create_task(read(index, answer)) for index, answer in enumerate(answers)]
    try:
        unfinished = len(answers)
        while unfinished:
            index, piece = await queue.get()
            if isinstance(piece, Exception):
                raise piece
            unfinished -= not piece
            yield index, piece
    finally:
        for reader in readers:
            reader.cancel()


def event(content: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(content, ensure_ascii=False).encode() + b"\n\n"


def token_text(data: bytes) -> str:
    """A token as text; one that is a part of a character is spelt as OpenAI's API spells it: bytes:\\xe4."""
    try:
        return data.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


@lru_cache(maxsize=4096)
def token_bytes(tokenizer: PreTrainedTokenizerBase, token: int) -> bytes:
    """What a token stands for: of byte-level BPE, or of sentencepiece."""
    piece = tokenizer.convert_ids_to_tokens(token)
    if token in tokenizer.all_special_ids or piece is None:
        return (piece or "").encode()
    if len(piece) == 6 and piece.startswith("<0x"):
        return bytes([int(piece[3:5], 16)])
    if "▁" in piece or not all(character in BYTE_OF for character in piece):
        return piece.replace("▁", " ").encode()
    return bytes(BYTE_OF[character] for character in piece)
