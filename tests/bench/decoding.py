"""How fast are answers generated, beside transformers and llama.cpp with the same weights?

    python tests/bench/decoding.py                      # minimind-small-T, random weights, float32
    pip install -r requirements-export.txt              # llama.cpp takes part where it is installed

A prompt of 64 tokens, 448 new ones, greedy, one stream; the contestants take turns, medians of some rounds. Then 16
streams of the engine at once, and how the time of a token grows from the first 64 to the last 64.
"""

import importlib.util
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from model.cli import run  # noqa: E402


@dataclass
class Args:
    model: str = "minimind-small-T"  # preset
    prompt_tokens: int = 64
    new_tokens: int = 448
    streams: int = 16  # of the engine, together
    rounds: int = 3  # measured, after one that warms up


def main(args: Args) -> None:
    from model.engine import apart

    # Nothing computes on the main thread, and a contestant's thread ends with its turn: see `apart`.
    work = apart(contestants, args)
    rounds = [{name: apart(measure, one) for name, one in work.items()} for _ in range(args.rounds + 1)][1:]
    first = next(iter(work))
    for name in work:
        tokens = args.new_tokens * (args.streams if "streams" in name else 1)
        speed = tokens / statistics.median(seconds[name] for seconds in rounds)
        ratio = statistics.median(seconds[first] / seconds[name] for seconds in rounds) * tokens / args.new_tokens
        print(f"{name:<24}{speed:8,.1f} tokens/s, {ratio:5.2f} x {first}")
    ratio = statistics.median(growth(*apart(work["engine"])) for _ in range(args.rounds))
    print(f"a token of the last 64 takes {ratio:.2f} x one of the first 64")


def contestants(args: Args) -> dict[str, Callable[[], object]]:
    """Name -> what makes args.new_tokens for each of its streams."""
    import torch

    from model.engine import quantize_to_int8
    from model.LMConfig import LMConfig
    from model.model import Transformer
    from model.tokenizer import load_tokenizer

    torch.manual_seed(0)
    tokenizer = load_tokenizer()
    config = LMConfig.preset(args.model, max_seq_len=args.prompt_tokens + args.new_tokens)
    model, quantized = Transformer(config).eval(), Transformer(config).eval()
    quantized.load_state_dict(model.state_dict())
    quantize_to_int8(quantized)
    prompt = torch.randint(3, config.vocab_size, (args.prompt_tokens,)).tolist()
    work: dict[str, Callable[[], object]] = {
        "transformers.generate": transformers_generate(args, config, prompt),
        "engine": lambda: generate(args, model, tokenizer, prompt),
        "engine, int8": lambda: generate(args, quantized, tokenizer, prompt),
        f"engine, {args.streams} streams": lambda: generate(args, model, tokenizer, prompt, args.streams),
    }
    if importlib.util.find_spec("llama_cpp"):
        for kind in ("f32", "q8_0"):
            work[f"llama.cpp {kind}"] = llama_cpp(args, model, tokenizer, prompt, kind)
    return work


def measure(work: Callable[[], object]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def generate(args: Args, model, tokenizer, prompt: list[int], streams: int = 1) -> list:
    """Answers of full length: whatever token ends a text is made impossible. `arrived` tells when."""
    from model.engine import Engine
    from model.sampling import Sampling

    never = {tokenizer.eos_token_id: -1e9}
    sampling = Sampling(temperature=0, max_new_tokens=args.new_tokens, logit_bias=never)
    with Engine(model, tokenizer, max_batch=streams) as engine:
        answers = engine.submit([(prompt, sampling)] * streams)
        for answer in answers:
            answer.arrived = [(len(answer.tokens), answer.seconds) for _ in answer]  # at each piece of text
            if len(answer.tokens) != args.new_tokens:
                raise RuntimeError(f"{len(answer.tokens)} tokens instead of {args.new_tokens}")
    return answers


def growth(answer) -> float:
    """Time of a late token over that of an early one."""

    def seconds_per_token(first: int, last: int) -> float:
        inside = [(tokens, seconds) for tokens, seconds in answer.arrived if first <= tokens <= last]
        (tokens_before, before), (tokens_after, after) = inside[0], inside[-1]
        return (after - before) / (tokens_after - tokens_before)

    end = len(answer.tokens)
    return seconds_per_token(end - 64, end) / seconds_per_token(1, 64)


def transformers_generate(args: Args, config, prompt: list[int]) -> Callable[[], object]:
    """A Llama of the same size. (Whose weights they are does not change the time.)"""
    import torch
    from reference import llama_like

    llama = llama_like(config).eval()
    ids = torch.tensor([prompt])
    settings = dict(max_new_tokens=args.new_tokens, min_new_tokens=args.new_tokens, do_sample=False, use_cache=True)
    return lambda: llama.generate(ids, attention_mask=torch.ones_like(ids), **settings)


def llama_cpp(args: Args, model, tokenizer, prompt: list[int], kind: str) -> Callable[[], object]:
    import torch
    from llama_cpp import Llama

    from model.gguf_file import write_gguf

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        write_gguf(file, model, tokenizer, kind, "bench")
        threads = torch.get_num_threads()
        llama = Llama(str(file), n_ctx=model.config.max_seq_len, n_threads=threads, verbose=False, use_mmap=False)

    def work() -> None:
        llama.reset()
        tokens = llama.generate(prompt, temp=0.0)
        for _ in range(args.new_tokens):
            next(tokens)

    return work


if __name__ == "__main__":
    run(main, Args)
