"""Does the memory of data_process.py grow with the corpus? Compares a corpus and one of four times as much text.

    python tests/bench/data_memory.py                        # 20 MB and 80 MB of made-up text, all of it different
    python tests/bench/data_memory.py --megabytes 100 --no_dedup

Prints the highest anonymous memory (RssAnon in /proc) of the script and its encoding processes together. What grows is
the memory of exact repetitions, about 80 bytes a text; --no_dedup goes without it. Linux only.
"""

import json
import random
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from model.cli import UserError, run  # noqa: E402


@dataclass
class Args:
    megabytes: int = 20  # of text in the smaller corpus
    characters: int = 500  # of a document
    dedup: bool = True  # as in data_process.py


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as folder:
        peaks = []
        for times in (1, 4):
            corpus = Path(folder) / f"{times}.jsonl"
            documents = write_corpus(corpus, args.megabytes * times, args.characters)
            peak, seconds = measure(corpus, args.dedup)
            peaks.append(peak)
            print(f"{times} x: {documents:,} documents, {peak:.1f} MB anonymous memory at most, {seconds:.1f} s")
        print(f"4 x the text takes {peaks[1] - peaks[0]:+.1f} MB ({peaks[1] / peaks[0]:.3f} x the memory)")


def write_corpus(path: Path, megabytes: int, characters: int) -> int:
    """Documents of characters drawn as often as they stand in the sample; returns how many."""
    lines = (ROOT / "dataset" / "sample" / "pretrain.jsonl").read_text(encoding="utf-8").splitlines()
    alphabet = "".join(json.loads(line)["text"] for line in lines)
    generator, size, documents = random.Random(megabytes), 0, 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            text = "".join(generator.choices(alphabet, k=characters))
            file.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            size += len(text.encode())
            documents += 1
    return documents


def measure(corpus: Path, dedup: bool) -> tuple[float, float]:
    """Peak MB of anonymous memory and seconds of one run."""
    command = [sys.executable, str(ROOT / "data_process.py"), "pretrain", "--data_path", str(corpus)]
    command += ["--out_dir", str(corpus.with_suffix("")), "--dedup" if dedup else "--no_dedup"]
    start, peak = time.monotonic(), 0
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while process.poll() is None:
            peak = max(peak, sum(anonymous_bytes(pid) for pid in family(process.pid)))
            time.sleep(0.02)
    if process.returncode:
        raise UserError(f"data_process.py ended with exit code {process.returncode}")
    return peak / 1e6, time.monotonic() - start


def family(pid: int) -> list[int]:
    """A process and all its descendants. One that is just starting shows its parent's memory and does not count."""
    try:
        children = map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split())
        started = [child for child in children if command_line(child) != command_line(pid)]
    except OSError:  # one of them has just ended
        return []
    return [pid, *(member for child in started for member in family(child))]


def command_line(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


def anonymous_bytes(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has just ended
        return 0
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


if __name__ == "__main__":
    run(main, Args)
