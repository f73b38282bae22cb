"""How far is what --plan foretells from what a run then takes?

    python data_process.py pretrain && python data_process.py sft
    python tests/bench/plan_errors.py --steps 30

Three configurations: pretraining and fine-tuning of the preset tiny, and pretraining of minimind-small-T with 4 rows in
a micro-batch. Of the steps' times the median counts, without the first step; memory is the peak that the run reports.
"""

import json
import re
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from model.cli import UserError, run  # noqa: E402


@dataclass
class Args:
    pretrain_data: str = "dataset/pretrain_data.bin"  # token file
    sft_data: str = "dataset/sft_data_single.csv"  # dialogues
    steps: int = 30  # of each run


def main(args: Args) -> None:
    with tempfile.TemporaryDirectory() as out:
        tiny, small = Path(out) / "tiny", Path(out) / "small"
        pretrain = ["1-pretrain.py", "--data_path", args.pretrain_data]
        sft = ["3-full_sft.py", "--data_path", args.sft_data, "--out_dir", tiny, "--stage", "single"]
        compare(
            "tiny, pretraining, 16 rows of 256",
            [*pretrain, "--out_dir", tiny, "--model", "tiny", "--max_seq_len", 256],
            tiny / "pretrain_256.metrics.jsonl",
            args.steps,
        )
        compare("tiny, fine-tuning, 16 rows of 512", sft, tiny / "single_chat/full_sft_256.metrics.jsonl", args.steps)
        compare(
            "minimind-small-T, pretraining, 4 rows of 512",
            [*pretrain, "--out_dir", small, "--batch_size", 4],
            small / "pretrain_512.metrics.jsonl",
            args.steps,
        )


def compare(name: str, command: list, metrics: Path, steps: int) -> None:
    command = [*command, "--max_steps", steps, "--log_interval", 1]
    plan, done = said(*command, "--plan"), said(*command)
    seconds_planned = float(re.search(r"([\d.]+) s a step", plan)[1])
    memory_planned = float(re.search(r"([\d.]+) GB at the peak", plan)[1])
    memory = float(re.search(r"peak memory ([\d.]+) GB", done)[1])
    seconds = statistics.median(seconds_of_steps(metrics)[1:])
    print(f"{name}\n{plan}")
    told("seconds a step", seconds_planned, seconds)
    told("GB at the peak", memory_planned, memory)


def told(what: str, planned: float, measured: float) -> None:
    print(f"  {what}: {planned:.3f} planned, {measured:.3f} measured, {planned / measured - 1:+.1%}", flush=True)


def seconds_of_steps(metrics: Path) -> list[float]:
    lines = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    before = [0, *(line["tokens"] for line in lines)]
    return [(line["tokens"] - tokens) / line["tokens_per_s"] for line, tokens in zip(lines, before, strict=False)]


def said(*command: object) -> str:
    """What a script prints; raises UserError where it fails."""
    done = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"{command[0]} failed ({done.returncode}): {done.stderr.strip().splitlines()[-1]}")
    return done.stdout


if __name__ == "__main__":
    run(main, Args)
