"""Raw data -> the files that the training scripts read.

    python data_process.py                                        # all that lies in dataset/, or the bundled sample
    python data_process.py pretrain --data_path a.jsonl b.jsonl.gz --val_fraction 0.001
    python data_process.py sft --data_path sft_data_zh.jsonl --max_tokens 512
    python data_process.py dpo --data_path huozi_rlhf_data.json

    pretrain   {"text": …}                              -> dataset/pretrain_data.bin and .json (1-pretrain.py)
    sft        conversations in four published forms    -> dataset/sft_data_single.csv, without history, and
                                                           dataset/sft_data.csv, with it (3-full_sft.py)
    dpo        a prompt, a chosen and a rejected answer -> dataset/dpo/train_data.json (5-dpo_train.py)

The forms are told in model/forms.py. Inputs are JSON lines, a JSON list, or plain text with a document a line (*.txt),
gzipped or not, in UTF-8. A folder as --data_path means the files in it, except those with _val in their name. Records
that cannot be read are skipped and counted; more than --max_bad_share of them is an error. Files get their final names
when they are complete.
"""

import csv
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from model.cli import UserError, run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from model.forms import Message
    from model.records import Account

INPUTS = (".jsonl", ".json", ".txt")  # each also with .gz behind it
DEFAULT_FOLDERS = ("dataset", "dataset/sample")


@dataclass
class Common:
    data_path: list[str] = field(default_factory=list)
    """files, or folders of them; empty: dataset/, or the bundled sample where there are none"""
    out_dir: str = "dataset"  # folder to write to
    max_bad_share: float = 0.05  # end with an error if more of the input cannot be read


@dataclass
class WithTokenizer(Common):
    tokenizer: str = ""  # folder of the tokenizer; empty: the shipped one


@dataclass
class Pretrain(WithTokenizer):
    """Texts -> token ids."""

    min_chars: int = 1  # leave out texts of fewer characters
    dedup: bool = True  # leave out exact repetitions; takes about 80 bytes of memory a text
    val_fraction: float = 0.0  # share of the texts to keep out and write to pretrain_data_val.jsonl instead
    num_workers: int = 0  # processes that encode; 0: one for each core


@dataclass
class Sft(WithTokenizer):
    """Conversations -> csv tables."""

    max_tokens: int = 2048  # leave out rows with a longer question and answer; 0: keep all. History does not count
    min_chinese: float = 0.02  # leave out rows with a smaller share of Chinese among their letters; 0: keep all


@dataclass
class Dpo(Common):
    """Pairs of answers -> JSON lines."""


@dataclass
class All(Pretrain, Sft, Dpo):
    """All three, whatever is there; each file goes where its records belong (the default)."""


def main(args: All | Pretrain | Sft | Dpo) -> None:
    make = {"pretrain": make_tokens, "sft": make_tables, "dpo": make_pairs}
    for kind, files in input_files(args).items():
        print(f"{kind}: reading {', '.join(map(str, files))}")
        make[kind](args, files)


def input_files(args: Common) -> dict[str, list[Path]]:
    """The files to read for each kind of output that is to be made. `all` makes what there is data for."""
    kinds = [kind for kind, options in dict(pretrain=Pretrain, sft=Sft, dpo=Dpo).items() if isinstance(args, options)]
    if not args.data_path:
        for folder in DEFAULT_FOLDERS:
            if found := by_kind(data_files(Path(folder)), kinds, []):
                return found
        raise UserError(f"no {' or '.join(kinds)} data in {' or '.join(DEFAULT_FOLDERS)}: name some with --data_path")
    paths = [file for path in map(Path, args.data_path) for file in (data_files(path) if path.is_dir() else [path])]
    if len(kinds) == 1 and not any(Path(path).is_dir() for path in args.data_path):
        return {kinds[0]: paths}  # what the user says is in them is what we look for, and report where it is not
    found = by_kind(paths, kinds, args.data_path)
    if not found:
        raise UserError(f"no {' or '.join(kinds)} data in {', '.join(args.data_path)}")
    return found


def data_files(folder: Path) -> list[Path]:
    """The files of a folder that may be inputs: no validation data, and nothing that we wrote."""
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    files = [path for path in files if path.is_file() and path.name.removesuffix(".gz").endswith(INPUTS)]
    return [path for path in files if "_val" not in path.name and path.name != "pretrain_data.json"]


def by_kind(paths: list[Path], kinds: list[str], named: list[str]) -> dict[str, list[Path]]:
    """Sorts files by what the first sound one of their records is for. A file of a folder may be for something else;
    one that cannot be read, or that was named, is an error."""
    from model.forms import kind_of
    from model.records import Account, read_files

    found: dict[str, list[Path]] = {}
    for path in paths:
        account = Account()
        head = islice(read_files([path], account), 100)
        kind = next(filter(None, (kind_of(record.value) for record in head)), None)
        if kind in kinds:
            found.setdefault(kind, []).append(path)
        elif kind and str(path) in named:
            raise UserError(f"cannot use {path}: it holds data for {kind}, not for {' or '.join(kinds)}")
        elif kind is None:
            reason = next(
                iter(account.lines()), "none of its first records is a text, a conversation or a pair of answers"
            )
            if account.bad or str(path) in named:
                raise UserError(f"cannot use {path}: {reason}")
            print(f"{path} is not used: {reason}")
    return found


def make_tokens(args: Pretrain, files: list[Path]) -> None:
    """Texts -> pretrain_data.bin, pretrain_data.json, and the held-out texts if there are to be any."""
    from model.records import Account
    from model.tokenizer import SHIPPED, load_tokenizer, tokenizer_hash
    from model.tokens import write_token_file

    if not 0 <= args.val_fraction < 1:
        raise UserError(f"--val_fraction {args.val_fraction:g} must be at least 0 and less than 1")
    if args.num_workers < 0:
        raise UserError(f"--num_workers {args.num_workers} must not be negative")
    folder = args.tokenizer or SHIPPED
    tokenizer = load_tokenizer(folder)
    account, start = Account(), time.monotonic()
    names = ["pretrain_data_val.jsonl"] * (args.val_fraction > 0) + ["pretrain_data.bin", "pretrain_data.json"]
    with complete_files(args, names, files) as (*held_out_path, tokens_path, description_path):
        with open(held_out_path[0] if held_out_path else os.devnull, "w", encoding="utf-8") as held_out:
            texts = training_texts(args, files, account, held_out)
            about = write_token_file(tokens_path, texts, tokenizer, args.num_workers)
        seconds = time.monotonic() - start
        about |= {"tokenizer": args.tokenizer or "model/minimind_tokenizer", "tokenizer_sha256": tokenizer_hash(folder)}
        description_path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
        finish(args, account, kept=about["documents"])
    old_split = Path(args.out_dir) / "pretrain_data_val.jsonl"
    if not args.val_fraction and old_split.exists():
        print(f"{old_split} is of an earlier run: its texts may be among those to train on now")
    print(
        f"{about['documents']:,} documents of {account.records:,}, {about['tokens']:,} tokens ({about['dtype']}) of "
        f"{about['text_bytes'] / 1e6:,.1f} MB of text, {about['text_bytes'] / about['tokens']:.2f} bytes per token, "
        f"in {seconds:.1f} s ({about['text_bytes'] / 1e6 / seconds:.1f} MB/s)"
    )


def training_texts(args: Pretrain, files: list[Path], account: "Account", held_out: TextIO) -> Iterator[str]:
    """The texts to train on. What becomes of a text depends on it alone, so that a repeated one is not held out once
    and trained on once."""
    from model.forms import document
    from model.records import read_as, read_files

    seen: set[int] = set()
    for text, record in read_as(document, read_files(files, account, "pretrain"), account):
        if len(text.strip()) < max(args.min_chars, 1):
            account.drop("empty or shorter than --min_chars", record)
            continue
        key = int.from_bytes(blake2b(text.encode(), digest_size=8).digest())
        if args.dedup:
            if key in seen:
                account.drop("an exact repetition", record)
                continue
            seen.add(key)
        if key < args.val_fraction * 2**64:
            held_out.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            account.drop("held out for validation", record)
            continue
        yield text


def make_tables(args: Sft, files: list[Path]) -> None:
    """Conversations -> sft_data_single.csv, those of one question, and sft_data.csv, those with a history."""
    from model.forms import conversation
    from model.records import Account, read_as, read_files
    from model.tokenizer import SHIPPED, load_tokenizer

    tokenizer = load_tokenizer(args.tokenizer or SHIPPED) if args.max_tokens else None
    account, counts = Account(), [0, 0]
    with complete_files(args, ["sft_data_single.csv", "sft_data.csv"], files) as paths:
        with csv_table(paths[0]) as single, csv_table(paths[1]) as multi:
            for messages, record in read_as(conversation, read_files(files, account, "sft"), account):
                *history, (question, answer) = question_answer_pairs(messages)
                reason = reason_to_drop(args, tokenizer, question, answer)
                if reason:
                    account.drop(reason, record)
                    continue
                table = multi if history else single
                table.writerow([json.dumps(history, ensure_ascii=False), question, answer])
                counts[bool(history)] += 1
        finish(args, account, kept=sum(counts))
    print(f"{counts[0]:,} rows without and {counts[1]:,} with history, of {account.records:,}")


def question_answer_pairs(messages: list["Message"]) -> list[list[str]]:
    """Messages -> [question, answer] pairs. The tables have no place for a system message, so it opens the first
    question, on a line of its own."""
    texts = [message["content"] for message in messages]
    if messages[0]["role"] == "system":
        texts[:2] = ["\n".join(texts[:2])]
    return [[question, answer] for question, answer in zip(texts[::2], texts[1::2], strict=True)]


def reason_to_drop(args: Sft, tokenizer: "PreTrainedTokenizerBase | None", question: str, answer: str) -> str | None:
    """Why a row is left out, or None."""
    letters = [char for char in question + answer if char.isalpha()]
    chinese = sum("\u3400" <= char <= "\u9fff" for char in letters)
    if letters and chinese / len(letters) < args.min_chinese:
        return "less Chinese than --min_chinese"
    # A token is at least a byte, so most rows are short enough without a look at their tokens.
    if tokenizer and len((question + answer).encode()) > args.max_tokens:
        from model.tokenizer import encode_texts

        if sum(map(len, encode_texts(tokenizer, [question, answer]))) > args.max_tokens:
            return "question and answer longer than --max_tokens"
    return None


def make_pairs(args: Dpo, files: list[Path]) -> None:
    """Pairs of answers -> dpo/train_data.json, in which prompt, chosen and rejected are lists of messages."""
    from model.forms import pair
    from model.records import Account, read_as, read_files

    account, count = Account(), 0
    with complete_files(args, ["dpo/train_data.json"], files) as (path,):
        with path.open("w", encoding="utf-8") as file:
            for (prompt, *answers), _ in read_as(pair, read_files(files, account, "dpo"), account):
                chosen, rejected = ([{"role": "assistant", "content": answer}] for answer in answers)
                line = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
                file.write(json.dumps(line, ensure_ascii=False) + "\n")
                count += 1
        finish(args, account, kept=count)
    print(f"{count:,} pairs of {account.records:,}")


@contextmanager
def csv_table(path: Path) -> "Iterator[csv._writer]":
    """A table of conversations. Everything is quoted, so that no text can be taken for a number or for a new row."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerow(["history", "q", "a"])
        yield writer


@contextmanager
def complete_files(args: Common, names: list[str], inputs: list[Path]) -> Iterator[list[Path]]:
    """Paths to write to; the files get their names, in this order, when the block ends well, and vanish otherwise."""
    finals = [Path(args.out_dir) / name for name in names]
    temporaries = [path.with_name(path.name + ".tmp") for path in finals]
    for path in finals:
        if path.resolve() in [file.resolve() for file in inputs]:
            raise UserError(f"{path} would be overwritten while it is read: choose another --out_dir")
    try:
        for path in temporaries:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()  # so that a folder we may not write to is told at once
        yield temporaries
        for path in temporaries:
            with path.open("r+b") as file:
                os.fsync(file.fileno())
        for path, final in zip(temporaries, finals, strict=True):
            os.replace(path, final)
    except OSError as error:
        raise UserError(f"cannot write {error.filename or args.out_dir}: {error.strerror or error}") from error
    finally:
        for path in temporaries:
            if path.is_file():
                path.unlink()


def finish(args: Common, account: "Account", kept: int) -> None:
    """Tells what was left out. Raises UserError where it was too much, or everything."""
    for line in account.lines():
        print(line)
    account.check(args.max_bad_share)
    if not kept:
        raise UserError("nothing is left to write: see above for what was left out and why")


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # so that temporary files are removed
    run(main, All | Pretrain | Sft | Dpo, default=All())
