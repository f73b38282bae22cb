"""Text in, text out: a loaded model that answers chats and continues texts, piece by piece.

    engine = load_engine(options, stages=("full_sft",))
    answer = engine.chat([{"role": "user", "content": "你好"}], Sampling(temperature=0.7))
    for piece in answer:
        print(piece, end="", flush=True)
    print(answer.finish_reason, answer.tokens_per_s)

One answer at a time.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from .chat import Message, encode
from .checkpoint import load_model, newest_checkpoint
from .cli import UserError
from .distributed import pick_device
from .generate import Sampling, generate
from .model import Transformer
from .options import InferenceOptions
from .tokenizer import encode_texts

REPLACEMENT = "\ufffd"  # what bytes decode to that are no character, or not yet


class Engine:
    """A model, its tokenizer, and how many tokens a prompt and its answer can have together."""

    def __init__(self, model: Transformer, tokenizer: PreTrainedTokenizerBase, path: str | Path = ""):
        self.model, self.tokenizer = model, tokenizer
        self.path = path  # where it came from
        self.context = int(model.config.max_seq_len * model.config.rope_factor)

    def chat(self, messages: Sequence[Message], sampling: Sampling) -> "Answer":
        """The assistant's next turn. A conversation too long for the context loses its oldest turns.

        Raises:
            UserError: the system turn and the last user turn alone are too long.
            ValueError: an unknown role, or content that is not text.
        """
        check_unicode([str(message.get("content")) for message in messages])
        # Half the context at most is kept free for the answer, so that a large max_new_tokens does not cost all turns.
        room = min(sampling.max_new_tokens, self.context // 2)
        ids, _ = encode(self.tokenizer, messages, add_generation_prompt=True, max_length=self.context - room)
        return self.answer(ids, sampling)

    def complete(self, text: str, sampling: Sampling) -> "Answer":
        """What follows `text` in a document that begins with it. Raises UserError where it is too long."""
        check_unicode([text])
        (ids,) = encode_texts(self.tokenizer, [text])
        return self.answer([self.tokenizer.bos_token_id, *ids], sampling)

    def answer(self, prompt_ids: Sequence[int], sampling: Sampling) -> "Answer":
        room = self.context - len(prompt_ids)
        if room < 1:
            raise UserError(
                f"the prompt has {len(prompt_ids)} tokens and leaves no room for an answer in the model's context "
                f"of {self.context}: shorten it, or stretch the context with --rope_scaling"
            )
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        stop_ids = {self.tokenizer.eos_token_id}
        ids = generate(self.model, prompt_ids, sampling, stop_ids)
        return Answer(ids, stop_ids, Detokenizer(self.tokenizer), len(prompt_ids))


class Answer:
    """One answer in the making: iterate over it, once, for its text in pieces of whole characters."""

    def __init__(self, ids: Iterator[int], stop_ids: Collection[int], detokenizer: "Detokenizer", prompt_tokens: int):
        self.ids, self.stop_ids, self.detokenizer = ids, stop_ids, detokenizer
        self.prompt_tokens = prompt_tokens
        self.completion_tokens = 0  # so far, the closing </s> included
        self.seconds = 0.0  # from the beginning of the iteration to the last token so far
        self.finish_reason: str | None = None  # "stop": the model ended it, "length": it had to; None: unfinished

    def __iter__(self) -> Iterator[str]:
        started = time.monotonic()
        for token in self.ids:
            self.completion_tokens += 1
            self.seconds = time.monotonic() - started
            if token in self.stop_ids:
                self.finish_reason = "stop"
            elif piece := self.detokenizer.add(token):
                yield piece
        self.finish_reason = self.finish_reason or "length"
        if rest := self.detokenizer.finish():
            yield rest

    @property
    def text(self) -> str:
        """All pieces so far."""
        return self.detokenizer.text

    @property
    def tokens_per_s(self) -> float:
        """Reading the prompt included."""
        return self.completion_tokens / self.seconds if self.seconds else 0.0

    def __str__(self) -> str:
        return f"{self.finish_reason or 'stopped'}, {self.completion_tokens} tokens, {self.tokens_per_s:.1f} tokens/s"


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


def check_unicode(texts: Sequence[str]) -> None:
    """Half a surrogate pair, as Python reads from bytes that are not UTF-8, has no tokens."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not valid UTF-8 at character {error.start}: {text[:20]!r}…") from error


def load_engine(options: InferenceOptions, stages: Sequence[str] = ()) -> Engine:
    """The engine that a script's options ask for; says what it loaded.

    Args:
        stages: which checkpoints to prefer where none is named: those whose file names begin so.

    Raises:
        UserError: no checkpoint, one that does not fit, or a device that is not there.
    """
    device = pick_device(options.device)
    if options.rope_scaling is not None and not 0 < options.rope_scaling < float("inf"):
        raise UserError(f"rope_scaling is {options.rope_scaling}, but must be above 0")
    path = Path(options.checkpoint) if options.checkpoint else newest_checkpoint(options.out_dir, stages)
    model, tokenizer = load_model(path, device, options.tokenizer or None, rope_scaling=options.rope_scaling)
    engine = Engine(model, tokenizer, path)
    which = "" if options.checkpoint else f", the newest in {options.out_dir}"
    print(
        f"{path}{which}: {model.num_parameters():,} parameters, context {engine.context} tokens, on {device}",
        flush=True,
    )
    return engine


def sampling_of(options: InferenceOptions) -> Sampling:
    """The sampling options of a command line. Raises UserError for a value outside its range."""
    return Sampling(**{field.name: getattr(options, field.name) for field in fields(Sampling)})
