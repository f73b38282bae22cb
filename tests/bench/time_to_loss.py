"""Which share of a well-tuned AdamW's tokens does the default recipe need for the same bits per byte?

    python tests/bench/time_to_loss.py --data_path dataset/pretrain_data.bin --val_path dataset/pretrain_val.jsonl

The reference: transformers' Llama of the preset's size, random weights, AdamW, warm-up and a cosine to a tenth. Its
learning rate and batch size are swept at --sweep_tokens, the best two go on to --tokens. Then 1-pretrain.py with its
defaults at shares of these tokens. It takes hours: every finished run is written to --output, and a new start takes the
next one.
Speeds are not taken from here, where other work may run beside: tests/bench/train_speed.py measures them side by side.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from model.cli import run  # noqa: E402

RATES = [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2]
BATCHES = [8, 16]


@dataclass
class Args:
    data_path: str = "dataset/pretrain_data.bin"  # token file of data_process.py
    val_path: str = "dataset/pretrain_val.jsonl"  # held-out documents
    output: str = "tests/bench/time_to_loss.jsonl"  # a line for each finished run; those in it are not repeated
    model: str = "tiny"  # preset
    max_seq_len: int = 256  # tokens of a row
    sweep_tokens: int = 600_000  # of each run of the sweep
    tokens: int = 3_000_000  # of the reference's final runs
    shares: list[float] = field(default_factory=lambda: [0.7, 0.45])  # of these tokens, for the default recipe
    rates: list[float] = field(default_factory=lambda: RATES)  # learning rates of the sweep


def main(args: Args) -> None:
    ledger = Ledger(Path(args.output))
    swept = [(size, rate) for size in BATCHES for rate in args.rates]
    for size, rate in swept:
        ledger.run(("AdamW", args.sweep_tokens, size, rate), reference, args)
    best = sorted(swept, key=lambda pair: ledger.results["AdamW", args.sweep_tokens, *pair])[:2]
    for size, rate in best:
        ledger.run(("AdamW", args.tokens, size, rate), reference, args)
    for share in args.shares:
        tokens = int(share * args.tokens)
        ledger.run(("1-pretrain.py", tokens, 0, 0.0), default_recipe, args)
    goal = min(ledger.results["AdamW", args.tokens, *pair] for pair in best)
    for share in args.shares:
        ours = ledger.results["1-pretrain.py", int(share * args.tokens), 0, 0.0]
        print(f"{share:.2f} x the tokens: {ours:.4f} bits per byte, AdamW with all of them {goal:.4f}")


class Ledger:
    """The results, (who, tokens, batch size, learning rate) -> bits per byte, kept in a file of JSON lines."""

    def __init__(self, path: Path):
        self.path = path
        self.results: dict[tuple, float] = {}
        for line in path.read_text().splitlines() if path.is_file() else []:
            *key, score = json.loads(line)
            self.show(tuple(key), score)

    def run(self, key: tuple, train: Callable[..., float], args: Args) -> None:
        if key not in self.results:
            score = train(args, *key[1:])
            with self.path.open("a") as file:
                file.write(json.dumps([*key, score]) + "\n")
            self.show(key, score)

    def show(self, key: tuple, score: float) -> None:
        self.results[key] = score
        who, tokens, size, rate = key
        print(
            f"{who:>14} {tokens:>10,} tokens, batch {size:>2}, rate {rate:<6g}: {score:.4f} bits per byte", flush=True
        )


def reference(args: Args, tokens: int, batch_size: int, rate: float) -> float:
    """Trains a Llama with AdamW -> bits per byte."""
    import torch
    from reference import adamw, llama_like, train_step
    from tqdm import trange

    from model.dataset import PretrainDataset, epoch_order, stack
    from model.LMConfig import LMConfig
    from model.optim import learning_rate_factor
    from model.tokenizer import load_tokenizer

    torch.manual_seed(42)
    tokenizer = load_tokenizer()
    model = llama_like(LMConfig.preset(args.model, max_seq_len=args.max_seq_len))
    optimizer = adamw(model, rate)
    data = PretrainDataset(args.data_path, tokenizer, args.max_seq_len)
    order = epoch_order(len(data), 42, 0)
    steps = tokens // (batch_size * args.max_seq_len)
    for step in (bar := trange(steps, desc=f"batch {batch_size}, rate {rate:g}", unit="step")):
        for group in optimizer.param_groups:
            group["lr"] = rate * learning_rate_factor(step, steps, steps // 10, "cosine", floor=0.1)
        batch = stack([data.row(i) for i in order[step * batch_size : (step + 1) * batch_size]])
        loss = train_step(model, optimizer, batch.input_ids)
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss:.3f}")
    return score(args, model, tokenizer)


def score(args: Args, llama, tokenizer) -> float:
    """Bits per byte of a Llama, with the measure that 1-pretrain.py uses."""
    import torch

    from model.distributed import Run
    from model.evaluate import score_documents
    from model.records import read_texts

    class Scored(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.llama = llama

        def forward(self, **batch):
            return SimpleNamespace(loss=self.llama(**batch).loss, aux_loss=None)

    texts = read_texts(args.val_path)
    return score_documents(Scored(), tokenizer, texts, args.max_seq_len, Run(0, 1, torch.device("cpu"))).bits_per_byte


def default_recipe(args: Args, tokens: int, batch_size: int, rate: float) -> float:
    """Runs 1-pretrain.py -> bits per byte. Batch size and learning rate of 0 stand for its defaults."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "1-pretrain.py", "--model", args.model, "--max_seq_len", str(args.max_seq_len)]
        command += ["--data_path", str(Path(args.data_path).absolute())]
        command += ["--val_path", str(Path(args.val_path).absolute()), "--out_dir", folder]
        command += ["--batch_size", str(batch_size)] if batch_size else []
        command += ["--learning_rate", str(rate)] if rate else []
        command += ["--max_steps", str(tokens // ((batch_size or 16) * args.max_seq_len)), "--val_interval", "0"]
        subprocess.run(command, cwd=ROOT, check=True)
        lines = next(Path(folder).glob("*.metrics.jsonl")).read_text().splitlines()
    return next(found for line in reversed(lines) if (found := json.loads(line).get("bits_per_byte")))


if __name__ == "__main__":
    run(main, Args)
