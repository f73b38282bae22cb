"""What the shipped tokenizer is trained and measured on: splits the trial data by kind, source and held-out rows.

    python tests/bench/tokenizer_data.py                                       # -> out/tokenizer_data/*.jsonl
    python tests/bench/tokenizer_data.py --measure model/minimind_tokenizer    # bytes per token on the held-out files

Training files: modern, classical (pretraining text), chats (conversations under free licences).
Held out: chats_val (a twentieth of such conversations), chats_other (all sources that training does not use),
pretrain_val and C-Eval's cells.
"""

import csv
import hashlib
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from model.cli import run
from model.forms import texts_of
from model.records import Account, read_records

# Under free licences, as their repositories state them. Left out: whatever goes back to Alpaca (NonCommercial), BELLE
# (research only), user-shared talks with models, ruozhiba (terms not checked), Firefly (no licence).
FREE_SOURCES = {
    "CrossWOZ",
    "KdConv/film",
    "KdConv/music",
    "KdConv/travel",
    "smile",
    "chatterbot-corpus/chinese",
    "EmoLLM/aiwei",
    "EmoLLM/data",
    "LLaMA-Factory/glaive_toolcall_zh_demo",
    "LLaMA-Factory/identity",
    "MedicalGPT/medical_sft_1K",
}
# 的 is the commonest character of modern Chinese, and rare in classical prose, old novels and poems.
MODERN_SHARE = 0.008
HELD_OUT = ["ceval_val", "pretrain_val", "chats_val", "chats_other"]


@dataclass
class Args:
    """Split the trial data into training and held-out files for a tokenizer, or measure one."""

    data_dir: str = "../shared/data"  # folder with pretrain.jsonl.gz, pretrain_val.jsonl, sft_train.jsonl, ceval
    out_dir: str = "out/tokenizer_data"  # where the files go
    measure: str = ""  # folder of a tokenizer to measure, once the files are there


def main(args: Args) -> None:
    if args.measure:
        measure(args.measure, Path(args.out_dir))
        return
    data, out_dir = Path(args.data_dir), Path(args.out_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    files = {name: (out_dir / f"{name}.jsonl").open("w", encoding="utf-8") for name in ["modern", "classical", "chats"]}
    files |= {name: (out_dir / f"{name}.jsonl").open("w", encoding="utf-8") for name in HELD_OUT}
    for record in records(data / "pretrain.jsonl.gz"):
        modern = record["text"].count("的") >= MODERN_SHARE * len(record["text"])
        write(files["modern" if modern else "classical"], record)
    for record in records(data / "sft_train.jsonl"):
        free = record["data_source"] in FREE_SOURCES
        write(files["chats_other" if not free else "chats_val" if is_held_out(record["id"]) else "chats"], record)
    for record in records(data / "pretrain_val.jsonl"):
        write(files["pretrain_val"], record)
    for path in sorted((data / "ceval" / "val").glob("*.csv")):
        with path.open(encoding="utf-8-sig", newline="") as file:
            for row in csv.DictReader(file):
                for cell in ("question", "A", "B", "C", "D"):
                    write(files["ceval_val"], {"text": row[cell]})
    for file in files.values():
        print(f"{file.name}: {file.tell() / 1e6:.1f} MB")
        file.close()


def is_held_out(number: int) -> bool:
    """One row in twenty, by a hash of its id."""
    return int(hashlib.sha256(str(number).encode()).hexdigest(), 16) % 20 == 0


def records(path: Path) -> Iterator[dict[str, Any]]:
    return (record.value for record in read_records(path, Account()))


def write(file, record: dict[str, Any]) -> None:
    file.write(json.dumps(record, ensure_ascii=False) + "\n")


def measure(tokenizer_dir: str, out_dir: Path) -> None:
    """Prints bytes per token of each held-out file."""
    from model.tokenizer import encode_texts, load_tokenizer

    tokenizer = load_tokenizer(tokenizer_dir)
    for name in HELD_OUT:
        texts = [text for record in records(out_dir / f"{name}.jsonl") for text in texts_of(record)]
        tokens = sum(map(len, encode_texts(tokenizer, texts)))
        print(f"{name}: {sum(len(text.encode()) for text in texts) / tokens:.3f} bytes per token")


if __name__ == "__main__":
    run(main, Args)
