"""How fast does a training step run, and in how much memory, beside transformers' Llama of the same size?

    python tests/bench/train_speed.py                        # minimind-small-T, 8 rows of 512 tokens
    python tests/bench/train_speed.py --compile              # ours compiled, too (a minute)
    python tests/bench/train_speed.py --dtype bfloat16       # products in halves, the default where hardware has them
    python tests/bench/train_speed.py --model minimind-moe   # beside our dense model with its activated parameters

Each contestant is a process of its own; they take turns, a step each, while the others wait. All of them train full
rows with AdamW and clipped gradients in the same precision; "Muon" is what the scripts do by default.
"""

import multiprocessing
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from model.cli import run  # noqa: E402


@dataclass
class Args:
    model: str = "minimind-small-T"  # preset
    batch_size: int = 8  # rows
    max_seq_len: int = 512  # tokens of a row
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the products, in all of them
    compile: bool = False  # ours compiled, as one more contestant
    rounds: int = 10  # measured steps of each


def main(args: Args) -> None:
    from model.LMConfig import LMConfig

    sizes = dict(max_seq_len=args.max_seq_len)
    config = LMConfig.preset(args.model, **sizes)
    if config.use_moe:
        width = config.hidden_dim * (config.n_shared_experts + config.num_experts_per_tok)
        dense = LMConfig.preset(args.model, use_moe=False, hidden_dim=width, **sizes)
        names = {f"dense, hidden_dim {width}": ("adamw", dense), "mixture of experts": ("adamw", config)}
    else:
        names = {"transformers' Llama": ("llama", config), "ours": ("adamw", config), "ours, Muon": ("muon", config)}
        if args.compile:
            names["ours, compiled"] = ("compile", config)
    context = multiprocessing.get_context("spawn")
    contestants = {name: Contestant(context, args, *what) for name, what in names.items()}
    seconds = {name: [] for name in contestants}
    for number in range(args.rounds + 2):
        for name, contestant in contestants.items():
            elapsed = contestant.step()
            if number >= 2:  # the first ones warm up
                seconds[name].append(elapsed)
    tokens = args.batch_size * args.max_seq_len
    first = statistics.median(seconds[next(iter(names))])
    first_memory = next(iter(contestants.values())).memory()
    for name, contestant in contestants.items():
        median, memory = statistics.median(seconds[name]), contestant.memory()
        print(
            f"{name:<24}{tokens / median:8,.0f} tokens/s, {first / median:5.2f} x; "
            f"{memory:5.2f} GB, {memory / first_memory:4.2f} x"
        )
        contestant.leave()


class Contestant:
    """A process that makes one step whenever it is told to."""

    def __init__(self, context, args: Args, who: str, config):
        self.pipe, theirs = context.Pipe()
        # Not a daemon: those may not start processes, as a compiler does.
        self.process = context.Process(target=work, args=(theirs, args, who, config))
        self.process.start()

    def step(self) -> float:
        self.pipe.send("step")
        return self.pipe.recv()

    def memory(self) -> float:
        """Peak resident size, GB."""
        self.pipe.send("memory")
        return self.pipe.recv()

    def leave(self) -> None:
        self.pipe.send("leave")
        self.process.join()


def work(pipe: Connection, args: Args, who: str, config) -> None:
    """A contestant's life: seconds of a step, or GB, whatever is asked for."""
    import torch

    from model.trainer import peak_memory

    torch.manual_seed(0)
    precision = torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16")
    train = make_llama(config, precision) if who == "llama" else make_ours(config, who, precision)
    while (wish := pipe.recv()) != "leave":
        if wish == "memory":
            pipe.send(peak_memory(torch.device("cpu")))
            continue
        ids = torch.randint(config.vocab_size, (args.batch_size, args.max_seq_len))
        started = time.perf_counter()
        train(ids)
        pipe.send(time.perf_counter() - started)


def make_llama(config, precision):
    from functools import partial

    from reference import adamw, llama_like, train_step

    model = llama_like(config).train()
    model.forward = precision(model.forward)
    return partial(train_step, model, adamw(model, 1e-3))


def make_ours(config, who: str, precision):
    import torch

    from model.model import Transformer
    from model.optim import build_optimizers

    model = Transformer(config).train()
    optimizers = build_optimizers(model, "muon" if who == "muon" else "adamw", 1e-3, 0.1)
    called = torch.compile(model) if who == "compile" else model

    def train(ids: torch.Tensor) -> None:
        with precision:
            loss = called(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

    return train


if __name__ == "__main__":
    run(main, Args)
