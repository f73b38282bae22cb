"""Text in, text out, for many callers at once: a loaded model that answers chats and continues texts.

    with load_engine(options, stages=("full_sft",)) as engine:
        answer = engine.chat([{"role": "user", "content": "你好"}], Sampling(temperature=0.7))
        for piece in answer:
            print(piece, end="", flush=True)
        print(answer.finish_reason, answer.tokens_per_s)

One thread owns the model. Callers come and go at any time, from threads or coroutines (`async for`): their answers are
decoded together, one token each a step; new ones join and finished or cancelled ones leave between two steps.
"""

import logging
import threading
import warnings
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from .answer import Answer
from .chat import ROLES, Message, encode
from .checkpoint import load_model, newest_checkpoint
from .cli import UserError
from .distributed import pick_device
from .generate import Batch, Generation
from .model import Transformer
from .options import InferenceOptions, ModelOptions
from .products import Linear
from .sampling import Sampling
from .tokenizer import encode_texts

T = TypeVar("T")
log = logging.getLogger(__name__)


class TooLong(UserError):
    """A prompt that leaves no room for an answer in the model's context."""


class Busy(Exception):
    """As many callers wait already as may wait."""


class Closed(Exception):
    """The engine takes no more work."""


class Engine:
    """A model, its tokenizer, and how many tokens a prompt and its answer can have together.

    Args:
        path: where the model came from.
        max_batch: answers that are generated at the same time.
        max_queue: further ones that may wait.
    """

    def __init__(
        self,
        model: Transformer,
        tokenizer: PreTrainedTokenizerBase,
        path: str | Path = "",
        max_batch: int = 1,
        max_queue: int = 64,
    ):
        self.model, self.tokenizer, self.path = model, tokenizer, path
        self.max_batch, self.max_queue = max_batch, max_queue
        self.context = int(model.config.max_seq_len * model.config.rope_factor)
        self.characters_per_token = max(map(len, tokenizer.get_vocab()))  # at most
        encode_texts(tokenizer, ["\n"])  # the first call changes its settings, which threads must not do at a time
        self.changed = threading.Condition()  # guards what follows
        self.waiting: deque[Answer] = deque()
        self.jobs: deque[tuple[Future, Callable[[], Any]]] = deque()
        self.closing = False
        self.thread: threading.Thread | None = None  # started, and the cache allocated, when first needed
        self.batch: Batch | None = None
        self.answers: list[Answer] = []  # that the batch generates

    def chat(self, messages: Sequence[Message], sampling: Sampling, stop: Sequence[str] = ()) -> Answer:
        """The assistant's next turn. A conversation too long for the context loses its oldest turns.

        Raises:
            TooLong: the system turn and the last user turn alone are too long.
            ValueError: an unknown role, or content that is not text.
            Busy, Closed: it cannot be taken in now.
        """
        return self.submit([(self.chat_prompt(messages, sampling), sampling)], stop)[0]

    def complete(self, text: str, sampling: Sampling, stop: Sequence[str] = ()) -> Answer:
        """What follows `text` in a document that begins with it. Raises as `chat` does."""
        return self.submit([(self.text_prompt(text), sampling)], stop)[0]

    def chat_prompt(self, messages: Sequence[Message], sampling: Sampling) -> list[int]:
        check_unicode([str(message.get("content")) for message in messages])
        # Half the context at most is kept free for the answer, so that a large max_new_tokens does not cost all turns.
        room = min(sampling.max_new_tokens, self.context // 2)
        messages = newest_messages(messages, self.context * self.characters_per_token)
        self.check_length(sum(characters_in(message) for message in messages))
        ids, _ = encode(self.tokenizer, messages, add_generation_prompt=True, max_length=self.context - room)
        return ids

    def text_prompt(self, text: str) -> list[int]:
        check_unicode([text])
        self.check_length(len(text))
        (ids,) = encode_texts(self.tokenizer, [text])
        return [self.tokenizer.bos_token_id, *ids]

    def check_length(self, characters: int) -> None:
        """Refuses megabytes at once, without counting their tokens."""
        if characters > self.context * self.characters_per_token:
            raise self.too_long(f"more than {self.context}")

    def too_long(self, tokens: int | str) -> TooLong:
        return TooLong(
            f"the prompt has {tokens} tokens and leaves no room for an answer in the model's context of "
            f"{self.context}: shorten it, or stretch the context with --rope_scaling"
        )

    def submit(self, prompts: Sequence[tuple[Sequence[int], Sampling]], stop: Sequence[str] = ()) -> list[Answer]:
        """Answers to several prompts (ids); either all of them are taken in or none. Raises as `chat` does."""
        answers = [self.prepare(ids, sampling, stop) for ids, sampling in prompts]
        with self.changed:
            self.start()
            self.waiting = deque(answer for answer in self.waiting if not answer.generation.cancelled)
            room = self.max_batch - len(self.answers) + self.max_queue - len(self.waiting)
            if len(answers) > room:
                raise Busy(f"{len(self.waiting)} answers wait already; try again soon")
            self.waiting.extend(answers)
            self.changed.notify()
        return answers

    def prepare(self, prompt_ids: Sequence[int], sampling: Sampling, stop: Sequence[str]) -> Answer:
        room = self.context - len(prompt_ids)
        if room < 1:
            raise self.too_long(len(prompt_ids))
        sampling = replace(sampling, max_new_tokens=min(sampling.max_new_tokens, room))
        return Answer(Generation(prompt_ids, sampling, {self.tokenizer.eos_token_id}), self.tokenizer, stop)

    def run(self, function: Callable[[], T]) -> "Future[T]":
        """Calls a function that needs the model between two steps, on the thread that owns it."""
        future: Future[T] = Future()
        with self.changed:
            self.start()
            self.jobs.append((future, function))
            self.changed.notify()
        return future

    def embed(self, ids: Sequence[int]) -> "Future[list[float]]":
        """The mean of a text's last hidden states, of length 1."""

        @torch.inference_mode()
        def mean() -> list[float]:
            states = self.model(input_ids=torch.tensor([ids], device=self.model.device), logits_to_keep=1)
            return torch.nn.functional.normalize(states.last_hidden_state[0].float().mean(0), dim=0).tolist()

        return self.run(mean)

    def start(self) -> None:
        if self.closing:
            raise Closed("the engine is shutting down")
        if self.thread is None:
            self.batch = apart(Batch, self.model, self.max_batch, self.context)
            self.thread = threading.Thread(target=self.work, name="engine", daemon=True)
            self.thread.start()

    def work(self) -> None:
        """What the engine's thread does until it is closed."""
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.closing or self.jobs or self.waiting or self.answers)
                if self.closing:
                    break
                job = self.jobs.popleft() if self.jobs else None
                self.admit()
            if job:
                do(*job)
            self.step()
        for answer in [*self.answers, *self.waiting]:
            answer.cancel()
        for future, _ in self.jobs:
            future.cancel()

    def admit(self) -> None:
        while self.waiting and self.batch.has_room:
            answer = self.waiting.popleft()
            try:
                self.batch.add(answer.generation)
            except Exception as error:  # no memory for its sampler, say: the others go on
                log.exception("an answer could not begin")
                answer.deliver(error)
            else:
                self.answers.append(answer)

    def step(self) -> None:
        """One token for each answer. What goes wrong there is told to all of them, and the engine goes on afresh."""
        by_generation = {answer.generation: answer for answer in self.answers}
        try:
            for generation, token in self.batch.step():
                by_generation[generation].deliver(token)
            self.batch.remove_those_over()
        except Exception as error:
            log.exception("a step of the engine failed")
            for answer in self.answers:
                answer.deliver(error)
            self.batch.clear()
        with self.changed:
            self.answers = [by_generation[generation] for generation in self.batch.generations]
            self.changed.notify_all()

    def close(self) -> None:
        """Ends the thread; unfinished answers end where they are."""
        with self.changed:
            self.closing = True
            self.changed.notify()
        if self.thread:
            self.thread.join()

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def apart(function: Callable[..., T], *args, **kwargs) -> T:
    """Calls it on a thread that ends with it.

    OpenMP keeps a team of threads for every thread that has ever computed. Two teams are more threads than cores, and
    then it puts those to sleep that wait for the next product, which halves the engine's speed.
    """
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(function, *args, **kwargs).result()


def do(future: Future, function: Callable[[], Any]) -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:  # whatever it is, it belongs to who waits for the result
        future.set_exception(error)


def newest_messages(messages: Sequence[Message], max_characters: int) -> Sequence[Message]:
    """Leaves out old exchanges that cannot fit anyway, whatever their tokens are: so nobody has to count those."""
    system = [message for message in messages[:1] if ROLES.get(message.get("role")) == "system"]
    rest = messages[len(system) :]
    characters = sum(map(characters_in, system))
    start = 0
    for i in reversed(range(len(rest))):
        characters += characters_in(rest[i])
        if characters > max_characters and start:
            return [*system, *rest[start:]]
        if ROLES.get(rest[i].get("role")) == "user":
            start = i
    return messages


def characters_in(message: Message) -> int:
    content = message.get("content")
    return len(content) if isinstance(content, str) else 0


def check_unicode(texts: Sequence[str]) -> None:
    """Half a surrogate pair, as Python reads from bytes that are not UTF-8, has no tokens."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the text is not valid UTF-8 at character {error.start}: {text[:20]!r}…") from error


def load_engine(options: ModelOptions, stages: Sequence[str] = (), max_batch: int = 1, max_queue: int = 64) -> Engine:
    """The engine that a script's options ask for; says what it loaded.

    Args:
        stages: which checkpoints to prefer where none is named: those whose file names begin so.

    Raises:
        UserError: no checkpoint, one that does not fit, or a device that is not there.
    """
    device = pick_device(options.device)
    for name in ("rope_scaling", "rope_theta"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise UserError(f"{name} is {value}, but must be above 0")
    path = Path(options.checkpoint) if options.checkpoint else newest_checkpoint(options.out_dir, stages)
    overrides = {name: getattr(options, name) for name in ("rope_scaling", "rope_theta", "n_heads")}
    model, tokenizer = apart(load_model, path, device, options.tokenizer or None, **overrides)
    if options.lora:
        from .adapters import with_adapter  # late: peft takes a second to import

        model = apart(with_adapter, model, options.lora, options.lora_scale)
    engine = Engine(model, tokenizer, path, max_batch, max_queue)
    which = "" if options.checkpoint else f", the newest in {options.out_dir}"
    print(
        f"{path}{which}: {model.num_parameters():,} parameters, context {engine.context} tokens, on {device}",
        flush=True,
    )
    if options.quantize == "int8":
        apart(quantize_to_int8, model)
    if options.compile:
        model.compile(dynamic=True)  # one program for all lengths and batch sizes
    return engine


def quantize_to_int8(model: Transformer) -> None:
    """The blocks' matrices become 8-bit numbers with a scale a matrix; inputs are rounded as they come. In place.

    The embedding, which is the output head too, and a mixture's router stay as they are. Raises UserError on a GPU.
    """
    if model.device.type != "cpu":
        raise UserError(f"--quantize int8 works on a CPU only, not on {model.device.type}: leave it out")
    quantization = torch.ao.quantization
    matrices = {}
    for name, module in model.layers.named_modules():
        if type(module) is Linear and not name.endswith(".gate"):
            module.__class__ = torch.nn.Linear  # which it is but for its speed; PyTorch quantizes no other
            matrices[name] = quantization.default_dynamic_qconfig
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # announcements of another package that is to take this function over
        quantization.quantize_dynamic(model.layers, matrices, inplace=True)


def sampling_of(options: InferenceOptions) -> Sampling:
    """The sampling options of a command line. Raises UserError for a value outside its range."""
    names = [field.name for field in fields(Sampling) if hasattr(options, field.name)]
    return Sampling(**{name: getattr(options, name) for name in names})
