"""Multiple-choice questions: csv files -> prompts -> how probable a model finds each of the four letters.

The files lie as C-Eval's do: DIR/dev/SUBJECT_dev.csv (worked examples) and DIR/val/SUBJECT_val.csv, or without the
suffix, as CMMLU's do; columns question, A, B, C, D, answer, in any order and case, and others that are not read.
"""

import copy
import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from .chat import encode, generation_prompt, header_ids
from .cli import UserError
from .dataset import Segment, stack_rows
from .model import Transformer
from .products import missing_tokens
from .records import Account
from .scoreboard import LETTERS
from .tokenizer import encode_texts

INSTRUCTION = "以下是单项选择题，请选出其中的正确答案。"


class Question(NamedTuple):
    text: str
    options: tuple[str, ...]  # what A, B, C and D stand for
    answer: str  # the right letter


class Prompt(NamedTuple):
    ids: list[int]  # what comes before the letter
    letters: list[int]  # the token of each letter
    shots: int  # worked examples that had room
    cut: int  # tokens of the question that had none


class Guess(NamedTuple):
    probabilities: tuple[float, ...]  # of A, B, C and D, compared with each other: their sum is 1
    any_letter: float  # how probable it is that the model says one of them at all

    @property
    def letter(self) -> str:
        return LETTERS[self.probabilities.index(max(self.probabilities))]


def find_subjects(data_dir: str | Path, split: str) -> dict[str, Path]:
    """Subject -> its file, in the order of names. Raises UserError where there are none."""
    folder = Path(data_dir) / split
    files = {path.stem.removesuffix(f"_{split}"): path for path in sorted(folder.glob("*.csv"))}
    if not files:
        raise UserError(
            f"no csv files in {folder}: unpack ceval-exam.zip of https://huggingface.co/datasets/ceval/ceval-exam "
            "there, or name another folder with --data_dir"
        )
    return files


def read_questions(path: Path, account: Account) -> list[Question]:
    """The questions of one file; rows that are none are counted in `account`. Raises UserError for a wrong file."""
    try:
        with open(path, encoding="utf-8-sig", newline="") as file:
            return list(questions_of(csv.reader(file), path, account))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read {path}: {error}") from error


def questions_of(reader: Any, path: Path, account: Account) -> Iterator[Question]:
    names = [name.strip().lower() for name in next(reader, [])]
    columns = ["question", *LETTERS.lower(), "answer"]
    if missing := [name for name in columns if name not in names]:
        raise UserError(f"{path} has no column {missing[0]}: there must be question, A, B, C, D and answer")
    places = [names.index(name) for name in columns]
    line = reader.line_num + 1  # a cell may hold several lines
    for row in reader:
        start, line = line, reader.line_num + 1
        account.records += 1
        if len(row) <= max(places):
            account.count_bad("the row has too few cells", path, start)
            continue
        text, *options, answer = (row[place].strip() for place in places)
        if not text or not all(options):
            account.count_bad("the question or an option is empty", path, start)
        elif len(answer) != 1 or answer.upper() not in LETTERS:
            account.count_bad("the answer is none of A, B, C, D", path, start)
        else:
            yield Question(text, tuple(options), answer.upper())


def layout(question: Question) -> str:
    """The question, its options, and where the answer is to stand."""
    options = (f"{letter}. {option}" for letter, option in zip(LETTERS, question.options, strict=True))
    return "\n".join([question.text, *options, "答案："])


def make_prompt(
    tokenizer: PreTrainedTokenizerBase, question: Question, shots: Sequence[Question], style: str, context: int
) -> Prompt:
    """A question after its worked examples, in `style` chat (examples are earlier turns) or plain (one text).

    Where the context of so many tokens is too short, examples are left out, the last ones first, so that all prompts
    of a subject begin alike; and then the question loses its beginning.
    """
    sequences = chat_sequences if style == "chat" else plain_sequences
    for count in range(len(shots), -1, -1):
        ids, letters = split_letters(sequences(tokenizer, question, shots[:count]))
        if len(ids) <= context:
            return Prompt(ids, letters, count, 0)
    opening = 1 + (len(header_ids(tokenizer, "user")) if style == "chat" else 0)
    cut = len(ids) - context
    return Prompt(ids[:opening] + ids[opening + cut :], letters, 0, cut)


def chat_sequences(
    tokenizer: PreTrainedTokenizerBase, question: Question, shots: Sequence[Question]
) -> list[list[int]]:
    """Ids of the conversation up to each of the four answers."""
    messages = []
    for shot in shots:
        messages.append({"role": "user", "content": f"{INSTRUCTION}\n\n{layout(shot)}"})
        messages.append({"role": "assistant", "content": shot.answer})
    messages.append({"role": "user", "content": f"{INSTRUCTION}\n\n{layout(question)}"})
    ids, _ = encode(tokenizer, messages)
    opening = generation_prompt(tokenizer)
    return [ids + opening + letter for letter in encode_texts(tokenizer, list(LETTERS))]


def plain_text(question: Question, shots: Sequence[Question]) -> str:
    examples = [layout(shot) + shot.answer for shot in shots]
    return "\n\n".join([INSTRUCTION, *examples, layout(question)])


def plain_sequences(
    tokenizer: PreTrainedTokenizerBase, question: Question, shots: Sequence[Question]
) -> list[list[int]]:
    """Ids of a document that ends with each of the four answers."""
    text = plain_text(question, shots)
    texts = encode_texts(tokenizer, [text + letter for letter in LETTERS])
    return [[tokenizer.bos_token_id, *ids] for ids in texts]


def split_letters(sequences: Sequence[list[int]]) -> tuple[list[int], list[int]]:
    """Four sequences that differ in their last id only -> what they share, and these ids.

    Raises:
        UserError: a tokenizer that has no token of its own for each letter.
    """
    beginnings = [sequence[:-1] for sequence in sequences]
    letters = [sequence[-1] for sequence in sequences]
    if any(beginning != beginnings[0] for beginning in beginnings) or len(set(letters)) < len(LETTERS):
        raise UserError("this tokenizer has no single tokens for the answers A, B, C and D")
    return beginnings[0], letters


@torch.inference_mode()
def guess(model: Transformer, prompts: Sequence[Prompt], batch_size: int) -> list[Guess]:
    """What the model thinks of each prompt, in their order.

    The prompts of a subject begin with the same worked examples, as many as each has room for, mostly hundreds of
    tokens: the model reads the longest of these beginnings once. What follows is scored in batches.
    """
    guesses: dict[int, Guess] = {}
    most_shots = max(prompt.shots for prompt in prompts)
    fullest = [prompt.ids[:-1] for prompt in prompts if prompt.shots == most_shots]
    beginning = fullest[0][: common_length(fullest)]
    ids_1T = torch.tensor([beginning], device=model.device)
    cache = model(input_ids=ids_1T, use_cache=True, logits_to_keep=1).past_key_values
    for shots in {prompt.shots for prompt in prompts}:
        group = [i for i, prompt in enumerate(prompts) if prompt.shots == shots]
        known = common_length([beginning, *(prompts[i].ids[:-1] for i in group)])
        for start in range(0, len(group), batch_size):
            batch = group[start : start + batch_size]
            guesses |= zip(batch, guess_batch(model, [prompts[i] for i in batch], cache, known), strict=True)
    return [guesses[i] for i in range(len(prompts))]


def common_length(sequences: Sequence[list[int]]) -> int:
    """How many ids all of them begin with."""
    for length, ids in enumerate(zip(*sequences, strict=False)):
        if len(set(ids)) > 1:
            return length
    return min(map(len, sequences))


def guess_batch(model: Transformer, prompts: Sequence[Prompt], cache: Cache, known: int) -> list[Guess]:
    """The prompts lie one after another, as segments of a single row, so that no product is spent on padding.

    Args:
        cache: of a row that has read what all prompts begin with; it stays as it is.
        known: how many tokens of it that is, at least 1.
    """
    cache = copy.deepcopy(cache)
    cache.crop(known - cache.get_seq_length())
    rests = [np.array(prompt.ids[known:]) for prompt in prompts]
    tokens = sum(map(len, rests))
    segments = [Segment(ids, labels=ids) for ids in rests]
    batch = stack_rows([segments], tokens + missing_tokens(tokens, model.output.weight), pad_id=0).to(model.device)
    output = model(
        input_ids=batch.input_ids,
        position_ids=known + batch.position_ids,
        past_key_values=cache,
        cu_seq_lens_q=batch.cu_seq_lens,
        logits_to_keep=batch.cu_seq_lens[1 : len(prompts) + 1].long() - 1,
    )
    log_probabilities_BV = output.logits[0].double().log_softmax(-1).cpu()
    chosen = log_probabilities_BV.gather(1, torch.tensor([prompt.letters for prompt in prompts]))  # B 4
    return [
        Guess(tuple(among_them), any_letter)
        for among_them, any_letter in zip(chosen.softmax(-1).tolist(), chosen.exp().sum(-1).tolist(), strict=True)
    ]
