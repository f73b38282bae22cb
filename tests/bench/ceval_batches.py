"""How much faster is eval_ceval.py than one question at a time, and is the result the same?

    python tests/bench/ceval_batches.py --checkpoint out/multi_chat/full_sft_512.pth --data_dir dataset/ceval
    python tests/bench/ceval_batches.py --shots 5 --subjects 2             # after five worked examples
    python tests/bench/ceval_batches.py --quantize int8                    # with 8-bit weights: the same answers?
    python tests/bench/ceval_batches.py --dtype bfloat16                   # with products in halves: the same ones?

One at a time: the model reads each prompt alone and from its beginning. Each way scores the same questions in turn,
some rounds; medians of the seconds are printed, and of those of the processor, which count on a busy machine (with
--threads 1: threads that wait for each other count, too). Without a checkpoint it is a fresh minimind-small-T.
"""

import copy
import statistics
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from model.cli import run  # noqa: E402

if TYPE_CHECKING:
    from model.choices import Prompt


@dataclass
class Args:
    checkpoint: str = ""  # a .pth or a transformers folder; empty: random weights
    data_dir: str = "dataset/ceval"  # folder with dev/*.csv and val/*.csv
    shots: int = 0  # worked examples before each question
    batch_size: list[int] = field(default_factory=lambda: [1, 8, 32])  # questions scored at once
    quantize: Literal["none", "int8"] = "none"  # of the batches; one at a time is always in float32
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the batches' products
    subjects: int = 12  # how many of them, evenly chosen
    rounds: int = 3  # how often to measure each
    threads: int = 0  # of PyTorch; 0: its own choice


def main(args: Args) -> None:
    import torch

    from model.choices import guess
    from model.engine import quantize_to_int8

    if args.threads:
        torch.set_num_threads(args.threads)
    model, tokenizer = load(args.checkpoint)
    prompts = read_prompts(args, tokenizer, model.config.max_seq_len)
    ways = {0: lambda: [one_alone(model, prompt) for part in prompts for prompt in part]}
    halves = torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16")
    batched = copy.deepcopy(model)
    if args.quantize == "int8":
        quantize_to_int8(batched)
    for size in args.batch_size:
        score = halves(lambda part, size=size: guess(batched, part, size))
        ways[size] = lambda score=score: [list(g.probabilities) for part in prompts for g in score(part)]
    seconds: dict[int, list[tuple[float, float]]] = {size: [] for size in ways}
    found: dict[int, list[list[float]]] = {}
    for _ in range(args.rounds + 1):
        for size, way in ways.items():
            start, start_cpu = time.monotonic(), time.process_time()
            found[size] = way()
            seconds[size].append((time.monotonic() - start, time.process_time() - start_cpu))
    tokens = sum(len(one.ids) for part in prompts for one in part)
    print(f"{len(found[0])} questions, {args.shots} shots, {tokens:,} tokens, {torch.get_num_threads()} threads")
    medians = {  # the first round warms up
        size: [statistics.median(column) for column in zip(*times[1:], strict=True)] for size, times in seconds.items()
    }
    for size, (wall, cpu) in medians.items():
        pairs = list(zip(found[0], found[size], strict=True))
        same = sum(one.index(max(one)) == other.index(max(other)) for one, other in pairs)
        apart = max(abs(p - q) for one, other in pairs for p, q in zip(one, other, strict=True))
        name = f"batches of {size:>3}" if size else "one at a time "
        ratios = f"{wall:6.2f} s, {medians[0][0] / wall:.2f} x; processor {cpu:6.2f} s, {medians[0][1] / cpu:.2f} x"
        print(f"{name}: {ratios}; {same} same answers, p differs by {apart:.1e}", flush=True)


def load(checkpoint: str) -> tuple[Any, Any]:
    from model.checkpoint import load_model
    from model.LMConfig import LMConfig
    from model.model import Transformer
    from model.tokenizer import load_tokenizer

    if checkpoint:
        return load_model(checkpoint)
    return Transformer(LMConfig.preset("minimind-small-T")).eval(), load_tokenizer()


def read_prompts(args: Args, tokenizer: Any, context: int) -> list[list["Prompt"]]:
    """Of each subject."""
    from model.choices import find_subjects, make_prompt, read_questions
    from model.records import Account

    examples = find_subjects(args.data_dir, "dev")
    subjects = list(find_subjects(args.data_dir, "val").items())
    prompts = []
    for name, file in subjects[:: max(1, len(subjects) // args.subjects)]:
        shots = read_questions(examples[name], Account())[: args.shots]
        questions = read_questions(file, Account())
        prompts.append([make_prompt(tokenizer, one, shots, "chat", context) for one in questions])
    return prompts


def one_alone(model: Any, prompt: "Prompt") -> list[float]:
    import torch

    with torch.inference_mode():
        logits_V = model(input_ids=torch.tensor([prompt.ids]), logits_to_keep=1).logits[0, -1].double()
    return logits_V[prompt.letters].softmax(-1).tolist()


if __name__ == "__main__":
    run(main, Args)
