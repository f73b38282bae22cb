"""How many conversations does fine-tuning train a second, packed into full rows, beside one padded row for each?

    python tests/bench/sft_packing.py --data_path dataset/sft_data_single.csv

Whole training steps (forward, backward, AdamW) on the same random model, in turns; the first rows of both kinds, taken
in the order in which they would be trained. With a share p of the padded positions carrying tokens, 1/p is the most
that packing can give.
"""

import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from model.cli import run  # noqa: E402


@dataclass
class Args:
    data_path: str = "dataset/sft_data_single.csv"  # dialogues of data_process.py
    model: str = "minimind-small-T"  # preset
    max_seq_len: int = 512  # tokens of a row
    batch_size: int = 8  # rows of a step
    rounds: int = 8  # measured steps of each


def main(args: Args) -> None:
    import torch

    from model.attention import takes_varlen
    from model.dataset import SFTDataset, epoch_order, stack
    from model.LMConfig import LMConfig
    from model.model import Transformer
    from model.optim import build_optimizers
    from model.tokenizer import load_tokenizer

    tokenizer = load_tokenizer()
    model = Transformer(LMConfig.preset(args.model, max_seq_len=args.max_seq_len)).train()
    optimizers = build_optimizers(model, "adamw", 1e-4, 0.1)
    kinds = {
        name: SFTDataset(args.data_path, tokenizer, args.max_seq_len, packing)
        for name, packing in (("padded", False), ("packed", True))
    }
    varlen = takes_varlen(model.config, model.device, model.dtype, args.max_seq_len, compiled=False)
    orders = {name: epoch_order(len(data), 42, 0) for name, data in kinds.items()}
    conversations = len(kinds["padded"])
    share = {}
    for name, data in kinds.items():
        share[name] = sum(data.row(i).num_tokens for i in range(len(data))) / (len(data) * args.max_seq_len)
        print(
            f"{name}: {conversations:,} conversations in {len(data):,} rows, {share[name]:.1%} of positions are tokens"
        )
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    for number in range(args.rounds + 1):
        for name, data in kinds.items():
            rows = orders[name][number * args.batch_size : (number + 1) * args.batch_size]
            batch = stack([data.row(i) for i in rows])
            started = time.perf_counter()
            model(**batch.inputs(varlen), num_items_in_batch=batch.num_targets).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            if number:  # the first one warms up
                seconds[name].append(time.perf_counter() - started)
    per_second = {}
    for name, data in kinds.items():
        per_row = conversations / len(data)
        per_second[name] = args.batch_size * per_row / statistics.median(seconds[name])
        print(f"{name}: {per_second[name]:.2f} conversations/s")
    ratio = per_second["packed"] / per_second["padded"]
    print(f"packed is {ratio:.2f} x padded, {ratio * share['padded']:.2f} of the possible {1 / share['padded']:.2f} x")


if __name__ == "__main__":
    run(main, Args)
