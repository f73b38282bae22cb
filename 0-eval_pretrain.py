"""What a base model has learnt: it continues texts, and it is scored on held-out ones.

    python 0-eval_pretrain.py                                                # the newest base model, built-in openings
    python 0-eval_pretrain.py --prompt 春天来了， 从前有一座山，
    python 0-eval_pretrain.py --checkpoint out/pretrain_512.pth --temperature 0
    python 0-eval_pretrain.py --data_path dataset/pretrain_val.jsonl         # bits per byte: lower is better

Bits per byte compares models whatever their tokenizers are: 8 is knowing nothing.
"""

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from model.cli import UserError, run
from model.options import InferenceOptions

if TYPE_CHECKING:
    from model.engine import Engine

OPENINGS = [
    "春天来了，公园里的",
    "长江是中国最长的河流，它",
    "小明放学回家，看见妈妈正在",
    "水在零度以下会",
    "计算机的中央处理器负责",
    "唐代是中国诗歌的黄金时代，",
    "要做好一碗面条，先",
]


@dataclass
class Args(InferenceOptions):
    """Continue texts with a base model, or score it on held-out documents."""

    prompt: list[str] = field(default_factory=list)  # texts to continue; none: the built-in openings
    data_path: str = ""  # JSONL of documents ({"text": …}, also .gz) to score, instead of continuing texts
    max_docs: int = 0  # score only so many documents; 0: all
    max_seq_len: int = 0  # context in tokens; 0: the one the model was trained with
    batch_size: int = 16  # rows scored at once


def main(args: Args) -> None:
    from model.engine import load_engine, sampling_of

    for name, least in {"max_docs": 0, "batch_size": 1}.items():
        if getattr(args, name) < least:
            raise UserError(f"{name} is {getattr(args, name)}, but must be {least} or more")
    if args.max_seq_len and args.max_seq_len < 2:
        raise UserError(f"max_seq_len is {args.max_seq_len}, but must be 2 or more")
    sampling = sampling_of(args)
    with load_engine(args, stages=("pretrain",)) as engine:
        engine.context = args.max_seq_len or engine.context
        if args.data_path:
            score(engine, args)
            return
        for prompt in args.prompt or OPENINGS:
            answer = engine.complete(prompt, sampling)
            print(f"\n{prompt}|", end="", flush=True)
            for piece in answer:
                print(piece, end="", flush=True)
            print(f"\n[{answer}]", flush=True)


def score(engine: "Engine", args: Args) -> None:
    from model.distributed import Run
    from model.evaluate import score_documents
    from model.records import read_texts

    texts = read_texts(args.data_path)[: args.max_docs or None]
    alone = Run(rank=0, world_size=1, device=engine.model.device)
    result = score_documents(
        engine.model, engine.tokenizer, texts, engine.context, alone, args.batch_size, progress=sys.stderr.isatty()
    )
    print(
        f"{len(texts):,} documents, {result.bytes:,} bytes, {result.tokens:,} tokens "
        f"({result.bytes / result.tokens:.2f} bytes per token), loss {result.loss:.4f} per token, "
        f"windows of {engine.context} tokens"
    )
    print(f"bits per byte: {result.bits_per_byte:.4f}")


if __name__ == "__main__":
    run(main, Args)
