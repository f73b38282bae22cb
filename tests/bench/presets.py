"""Speed and memory of every preset on this machine: answering, and training 8 rows of 512 tokens as the scripts do.

    python tests/bench/presets.py          # some seven minutes and 10 GB on two cores
    python tests/bench/presets.py --models minimind-small-T minimind-moe

Random weights: they do not change the time. Each measurement is a process of its own, so that its peak memory is its
own, too. Answers: one stream, 64 tokens of prompt, 128 new ones. Training: the median of the steps after the first.
"""

import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from model.cli import run  # noqa: E402

PRESETS = ["minimind-small-T", "minimind-small", "minimind", "minimind-moe", "minimind-v1"]


@dataclass
class Args:
    models: list[str] = field(default_factory=lambda: PRESETS)
    new_tokens: int = 128  # of the answer
    batch_size: int = 8  # rows
    max_seq_len: int = 512  # tokens of a row
    steps: int = 6  # of training, the first of which warms up


def main(args: Args) -> None:
    print("| preset | parameters | answering | memory | training | memory |\n|---|---|---|---|---|---|")
    # A fresh process for each task; `maxtasksperchild` is what makes it so.
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for name in args.models:
            parameters, speed, memory = pool.apply(answer, (args, name))
            trained, trained_memory = pool.apply(train, (args, name))
            print(
                f"| {name} | {parameters:,} | {speed:,.1f} tokens/s | {memory:.2f} GB "
                f"| {trained:,.0f} tokens/s | {trained_memory:.2f} GB |",
                flush=True,
            )


def answer(args: Args, name: str) -> tuple[int, float, float]:
    """Parameters, new tokens a second, peak memory in GB."""
    import torch
    from decoding import generate

    from model.engine import apart
    from model.LMConfig import LMConfig
    from model.model import Transformer
    from model.tokenizer import load_tokenizer
    from model.trainer import peak_memory

    tokenizer = load_tokenizer()
    model = apart(lambda: Transformer(LMConfig.preset(name, max_seq_len=args.max_seq_len)).eval())
    prompt = torch.randint(3, len(tokenizer), (64,)).tolist()
    generate(args, model, tokenizer, prompt)  # warms up
    (answer,) = generate(args, model, tokenizer, prompt)
    return model.num_parameters(), answer.tokens_per_s, peak_memory(torch.device("cpu"))


def train(args: Args, name: str) -> tuple[float, float]:
    """Tokens a second, peak memory in GB."""
    import torch
    from train_speed import make_ours

    from model.LMConfig import LMConfig
    from model.products import has_bfloat16
    from model.trainer import peak_memory

    config = LMConfig.preset(name, max_seq_len=args.max_seq_len)
    device = torch.device("cpu")
    precision = torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16(device))  # as --dtype auto chooses
    step, seconds = make_ours(config, "muon", precision), []
    for _ in range(args.steps):
        ids = torch.randint(config.vocab_size, (args.batch_size, args.max_seq_len))
        started = time.perf_counter()
        step(ids)
        seconds.append(time.perf_counter() - started)
    tokens = args.batch_size * args.max_seq_len
    return tokens / statistics.median(seconds[1:]), peak_memory(device)


if __name__ == "__main__":
    run(main, Args)
