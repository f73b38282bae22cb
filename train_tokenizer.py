"""Tokenizer: raw text -> a vocabulary of byte-level BPE, in a folder that transformers' AutoTokenizer loads.

    python train_tokenizer.py                                                      # on the bundled sample
    python train_tokenizer.py --data_path web.jsonl.gz chats.jsonl --weight 1 3    # chats count three times
    python train_tokenizer.py --vocab_size 32000 --out_dir out/tokenizer_32000     # for the larger presets
    python train_tokenizer.py --kind sentencepiece --out_dir out/tokenizer_sp
    python train_tokenizer.py --inspect model/minimind_tokenizer dataset/sample/pretrain.jsonl

Inputs are texts, conversations or pairs of answers, in JSON lines, a JSON list or plain text, gzipped or not. However
large they are, only --sample_mb of text is held in memory: each text gets a random number and those with the smallest
numbers stay, so every text of every file has the same chance. A file of weight 3 counts as if it were given three
times, one of weight 0.5 as if half of its texts, drawn at random, were given.

The same inputs, options and seed give the same tokenizer. Ids 0, 1, 2 are <unk> (also the padding), <s>, </s>. What
the shipped tokenizer was trained on is told in model/minimind_tokenizer/README.md.
"""

import heapq
import io
import os
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from model.cli import UserError, run

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from model.records import Account

SPECIALS = ["<unk>", "<s>", "</s>"]  # ids 0, 1, 2
NAMES = dict(unk_token="<unk>", pad_token="<unk>", bos_token="<s>", eos_token="</s>")
SMALLEST = len(SPECIALS) + 256  # every byte is a token, so that every text can be written
LONGEST_PIECE = 10_000  # characters; longer texts are cut, so that one of them cannot fill the sample
MAX_WEIGHT = 100

# How text is cut into words before merges are learned: no token reaches over a cut. These are the expressions that
# llama.cpp knows by these names; the name goes into tokenizer_config.json as llama_cpp_pre, for exports.
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
PRE_TOKENIZERS = {
    "qwen2": rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{REST}",
    "llama-bpe": rf"{CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{REST}",
    "gpt-2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
}


@dataclass
class Args:
    """Train a tokenizer on raw text, or look into one with --inspect."""

    data_path: list[str] = field(default_factory=lambda: ["dataset/sample/pretrain.jsonl", "dataset/sample/sft.jsonl"])
    """files to learn from"""
    weight: list[float] = field(default_factory=list)  # how many times each file counts; empty: once each
    out_dir: str = "out/tokenizer"  # folder to make; it must not hold anything yet
    vocab_size: int = 6400  # tokens, special ones and single bytes included
    kind: Literal["bpe", "sentencepiece"] = "bpe"  # byte-level BPE, or sentencepiece's BPE with bytes to fall back on
    pre_tokenizer: Literal["qwen2", "llama-bpe", "gpt-2"] = "qwen2"  # for bpe: llama.cpp's name of how text is cut
    max_token_bytes: int = 15  # for bpe: longest token (five Chinese characters), against whole phrases as tokens
    sample_mb: float = 50  # MB of text to learn from at most; training needs about 70 MB of memory for each of them
    max_bad_share: float = 0.1  # end with an error if more of the input cannot be read
    seed: int = 42  # of the sample
    inspect: tuple[str, str] | None = None  # look into a tokenizer instead: its folder, and a file to measure it on


def main(args: Args) -> None:
    if args.inspect:
        inspect(*args.inspect)
        return
    check(args)
    sample = draw_sample(args)
    train = train_bpe if args.kind == "bpe" else train_sentencepiece
    with finished_folder(Path(args.out_dir)) as folder:
        size = train(sample, args, folder)
    print(f"{args.out_dir}: {size:,} tokens")
    if size < args.vocab_size:
        print(f"fewer than --vocab_size {args.vocab_size}: no more pairs occur twice in the text; give it more text")


def check(args: Args) -> None:
    """Says what is wrong with the options before any work is done."""
    out_dir = Path(args.out_dir)
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise UserError(f"{out_dir} is in use: name another --out_dir, or remove it first")
    if args.weight and len(args.weight) != len(args.data_path):
        raise UserError(f"--weight has {len(args.weight)} values for {len(args.data_path)} files of --data_path")
    if not all(0 < weight <= MAX_WEIGHT for weight in args.weight):
        raise UserError(f"each --weight must be more than 0 and at most {MAX_WEIGHT}")
    if args.vocab_size < SMALLEST:
        raise UserError(f"--vocab_size {args.vocab_size} is too small: bytes and special tokens alone are {SMALLEST}")
    if args.sample_mb <= 0:
        raise UserError("--sample_mb must be more than 0")


def draw_sample(args: Args) -> list[str]:
    """A random sample of the texts of all files, weights obeyed, of at most args.sample_mb.

    Raises:
        UserError: a file is missing, too much of the input is bad, or there is no text in it.
    """
    from model.records import Account

    budget = int(args.sample_mb * 1e6)
    account = Account()
    random_source = random.Random(args.seed)
    heap: list[tuple[float, str, int]] = []  # (minus the random number, text, its bytes): the largest number on top
    held = seen = 0
    for text, weight in weighted_texts(args, account):
        size = len(text.encode())
        copies = int(weight) + (random_source.random() < weight % 1)
        for _ in range(copies):
            heapq.heappush(heap, (-random_source.random(), text, size))
        held += size * copies
        seen += size * copies
        while held > budget:
            held -= heapq.heappop(heap)[2]
    for line in account.lines():
        print(line)
    account.check(args.max_bad_share)
    if not heap:
        raise UserError(
            f"no text in {', '.join(args.data_path)}, or none that fits into --sample_mb {args.sample_mb:g}"
        )
    print(f"sample: {held:,} of {seen:,} bytes of text, weights counted")
    return [text for _, text, _ in heap]


def weighted_texts(args: Args, account: "Account") -> Iterator[tuple[str, float]]:
    """All texts in pieces of bounded length, each with the weight of its file."""
    from model.forms import texts_of
    from model.records import read_as, read_files

    weights = dict(zip(map(Path, args.data_path), args.weight or [1.0] * len(args.data_path), strict=True))
    for texts, record in read_as(texts_of, read_files(args.data_path, account, "reading"), account):
        for text in texts:
            for start in range(0, len(text), LONGEST_PIECE):
                yield text[start : start + LONGEST_PIECE], weights[record.path]


def train_bpe(texts: list[str], args: Args, folder: Path) -> int:
    """Byte-level BPE (Sennrich et al. 2016, over bytes as in GPT-2), no normalizer; returns the number of tokens."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    from model.chat import TEMPLATE

    bpe = Tokenizer(models.BPE())
    cut = pre_tokenizers.Split(Regex(PRE_TOKENIZERS[args.pre_tokenizer]), behavior="isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    bpe.pre_tokenizer = pre_tokenizers.Sequence([cut, to_bytes])
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=args.vocab_size,
        special_tokens=SPECIALS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        max_token_length=args.max_token_bytes,
        min_frequency=2,
    )
    bpe.train_from_iterator(texts, trainer, length=len(texts))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        chat_template=TEMPLATE,
        llama_cpp_pre=args.pre_tokenizer,
        clean_up_tokenization_spaces=False,
        **NAMES,
    )
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


def train_sentencepiece(texts: list[str], args: Args, folder: Path) -> int:
    """sentencepiece's BPE (Kudo and Richardson 2018), as its own tokenizer.model and for transformers; returns the
    number of tokens. The one character that it changes is U+2581, which becomes a space.

    Raises:
        UserError: sentencepiece cannot make such a vocabulary of this text.
    """
    import sentencepiece
    from transformers import LlamaTokenizer

    from model.chat import TEMPLATE

    model = io.BytesIO()
    print("training; sentencepiece may take some minutes")
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            model_type="bpe",
            vocab_size=args.vocab_size,
            byte_fallback=True,
            split_digits=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,  # a text's ids must not depend on whether it comes first
            max_sentence_length=4 * LONGEST_PIECE,  # bytes
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].rpartition("] ")[2]  # behind the place in its source
        raise UserError(f"sentencepiece: {reason}") from error
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    tokenizer = LlamaTokenizer.from_pretrained(folder, chat_template=TEMPLATE, add_prefix_space=False, **NAMES)
    tokenizer.save_pretrained(folder)
    return len(tokenizer)


@contextmanager
def finished_folder(out_dir: Path) -> Iterator[Path]:
    """A folder to write into, which gets its name at the end only, so that there is never half of one."""
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    try:
        yield unfinished
        unfinished.chmod(0o755)  # mkdtemp closes it to other people
        if out_dir.exists():
            out_dir.rmdir()
        os.replace(unfinished, out_dir)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def inspect(folder: str, path: str) -> None:
    """Prints what is in a vocabulary and how well it packs the texts of a file; every text is decoded again."""
    from model.forms import texts_of
    from model.records import Account, read_as, read_files
    from model.tokenizer import encode_texts, load_tokenizer

    tokenizer = load_tokenizer(folder)
    print_vocabulary(tokenizer)
    account = Account()
    used: Counter[int] = Counter()  # id -> times
    total_bytes = total_chars = texts_read = 0
    changed: list[str] = []  # where decoding gives another text
    pairs = read_as(texts_of, read_files([path], account, "measuring"), account)
    lines = ((text, record.line) for texts, record in pairs for text in texts)
    while batch := list(islice(lines, 1000)):
        rows = encode_texts(tokenizer, [text for text, _ in batch])
        for (text, line), ids in zip(batch, rows, strict=True):
            used.update(ids)
            texts_read += 1
            total_bytes += len(text.encode())
            total_chars += len(text)
            if tokenizer.decode(ids, clean_up_tokenization_spaces=False) != text:
                changed.append(f"{path}:{line}")
    for line in account.lines():
        print(line)
    if not used:
        raise UserError(f"no text in {path}")
    print(f"\n{path}: {texts_read:,} texts, {total_bytes:,} bytes, {used.total():,} tokens")
    print(f"bytes per token: {total_bytes / used.total():.3f}   characters per token: {total_chars / used.total():.3f}")
    print_lengths(tokenizer, used)
    print(f"round trip: {texts_read - len(changed):,} of {texts_read:,} texts come back unchanged", *changed[:5])


def print_vocabulary(tokenizer: "PreTrainedTokenizerBase", count: int = 40) -> None:
    """Tokens as people read them: some at equal distances over all ids, and the longest ones."""
    shown = [readable(tokenizer, token) for token in range(len(tokenizer))]
    print(f"{len(tokenizer):,} tokens, for example (id, text):")
    print("  ".join(f"{token} {shown[token]}" for token in range(0, len(tokenizer), -(-len(tokenizer) // count))))
    print("the longest:")
    print("  ".join(sorted(shown, key=len, reverse=True)[:count]))


def readable(tokenizer: "PreTrainedTokenizerBase", token: int) -> str:
    """The text of a token, quoted; <its bytes> where they are only part of a character."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    text = tokenizer.decode([token])
    if "\ufffd" not in text:
        return repr(text)
    byte_of = {char: byte for byte, char in bytes_to_unicode().items()}  # how byte-level BPE writes bytes
    raw = tokenizer.convert_ids_to_tokens(token)
    return f"<{bytes(map(byte_of.__getitem__, raw)).hex(' ')}>" if set(raw) <= set(byte_of) else raw


def print_lengths(tokenizer: "PreTrainedTokenizerBase", used: Counter[int]) -> None:
    """The share of the text's tokens by their length in characters."""
    lengths: Counter[int] = Counter()
    for token, times in used.items():
        text = tokenizer.decode([token])
        lengths[0 if "\ufffd" in text else len(text)] += times
    print("share of tokens by length in characters:")
    for length, times in sorted(lengths.items()):
        print(f"  {length or 'part of one':>11}  {times / used.total():7.2%}")


if __name__ == "__main__":
    run(main, Args)
