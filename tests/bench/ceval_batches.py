"""How much faster are eval_ceval.py's length-sorted batches than one question at a time, and is the result the same?

    python tests/bench/ceval_batches.py --checkpoint out/multi_chat/full_sft_512.pth --data_dir dataset/ceval

Each batch size scores the same questions in turn, some rounds; medians of the seconds are printed.
"""

import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from model.cli import run  # noqa: E402


@dataclass
class Args:
    checkpoint: str  # a .pth or a transformers folder
    data_dir: str = "dataset/ceval"  # folder with val/*.csv
    batch_size: list[int] = field(
        default_factory=lambda: [1, 4, 16, 64]
    )  # the first one is what others are compared to
    subjects: int = 12  # how many of them, evenly chosen
    rounds: int = 3  # how often to measure each


def main(args: Args) -> None:
    from model.checkpoint import load_model
    from model.choices import Prompt, find_subjects, guess, make_prompt, read_questions
    from model.records import Account

    model, tokenizer = load_model(args.checkpoint)
    files = list(find_subjects(args.data_dir, "val").values())
    prompts: list[list[Prompt]] = []
    for file in files[:: max(1, len(files) // args.subjects)]:
        questions = read_questions(file, Account())
        prompts.append([make_prompt(tokenizer, one, [], "chat", model.config.max_seq_len) for one in questions])
    seconds: dict[int, list[float]] = {size: [] for size in args.batch_size}
    guesses = {}
    for size in args.batch_size * (args.rounds + 1):
        start = time.monotonic()
        guesses[size] = [one for part in prompts for one in guess(model, part, size)]
        seconds[size].append(time.monotonic() - start)
    first = args.batch_size[0]
    print(f"{len(guesses[first])} questions, {sum(len(one.ids) for part in prompts for one in part):,} tokens")
    for size, times in seconds.items():
        median = statistics.median(times[1:])  # the first round warms up
        pairs = list(zip(guesses[first], guesses[size], strict=True))
        same = sum(one.letter == other.letter for one, other in pairs)
        apart = max(
            abs(p - q) for one, other in pairs for p, q in zip(one.probabilities, other.probabilities, strict=True)
        )
        faster = statistics.median(seconds[first][1:]) / median
        print(f"batches of {size:>3}: {median:6.2f} s, {faster:.2f} x; {same} same answers, p differs by {apart:.1e}")


if __name__ == "__main__":
    run(main, Args)
