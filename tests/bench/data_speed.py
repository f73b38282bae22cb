"""How fast is data_process.py, compared with nothing but `encode_batch` of the same tokenizer on the same cores?

    python tests/bench/data_speed.py corpus.jsonl.gz                # 5 rounds of both, in turn
    taskset -c 0 python tests/bench/data_speed.py corpus.jsonl.gz   # on one core

`encode_batch` gets texts that are in memory already, 1,000 at a time. data_process.py reads, checks, hashes and writes
as well; both times leave out the start of Python.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from model.cli import run  # noqa: E402


@dataclass
class Args:
    corpus: tyro.conf.Positional[str]  # file of texts
    rounds: int = 5  # how often to measure both


def main(args: Args) -> None:
    from model.records import read_texts

    texts = read_texts(args.corpus)
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    ratios = []
    for _ in range(args.rounds):
        bare, whole = megabytes / bare_seconds(texts), script_speed(args.corpus)
        ratios.append(whole / bare)
        print(f"encode_batch {bare:.1f} MB/s, data_process.py {whole:.1f} MB/s: {ratios[-1]:.2f} x", flush=True)
    print(f"median {statistics.median(ratios):.2f} x")


def bare_seconds(texts: list[str]) -> float:
    from model.tokenizer import load_tokenizer

    backend = load_tokenizer().backend_tokenizer
    start = time.monotonic()
    for i in range(0, len(texts), 1000):
        backend.encode_batch(texts[i : i + 1000], add_special_tokens=False)
    return time.monotonic() - start


def script_speed(corpus: str) -> float:
    """MB/s as the script itself says it."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable,
            str(ROOT / "data_process.py"),
            "pretrain",
            "--data_path",
            corpus,
            "--out_dir",
            folder,
        ]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.rsplit("(", 1)[1].split()[0])


if __name__ == "__main__":
    run(main, Args)
