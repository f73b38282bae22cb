"""Supervised fine-tuning: base model -> chat model, first on single questions, then on whole conversations.

    python data_process.py sft                                             # raw dialogues -> dataset/sft_data*.csv
    python 3-full_sft.py                                                   # single turn, from the newest base model
    python 3-full_sft.py --data_path dataset/sft_data.csv                  # then multi-turn, from the model just made
    torchrun --nproc_per_node 2 3-full_sft.py                              # two GPUs

Writes out/single_chat/full_sft_{dim}.pth or out/multi_chat/full_sft_{dim}.pth, and beside it .json, .metrics.jsonl
and .png (the curve). Every answer of a conversation is trained, its closing </s> too, and nothing else.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from model.cli import run
from model.options import TrainingOptions

FOLDERS = {"single": "single_chat", "multi": "multi_chat"}


@dataclass
class Args(TrainingOptions):
    """Fine-tune a model on dialogues of data_process.py."""

    data_path: str = "dataset/sft_data_single.csv"  # dialogues: columns history, q, a
    val_path: str = ""  # held-out dialogues, in the same form
    init_from: str = ""  # checkpoint to start from; empty: newest base model, or for multi-turn the single-turn one
    stage: Literal["auto", "single", "multi"] = "auto"  # auto: multi if any row has a history
    packing: bool = True  # several conversations in a row; off: one each, and padding
    epochs: int = 2  # times through the data
    learning_rate: float = 3e-3  # the highest, after the warm-up


def main(args: Args) -> None:
    import torch

    from model.checkpoint import load_model, weights_path
    from model.dataset import SFTDataset, has_history
    from model.distributed import launch
    from model.evaluate import answer_loss
    from model.trainer import Trainer

    with launch(args.device) as run:
        torch.manual_seed(args.seed)
        stage = args.stage
        if stage == "auto":
            stage = "multi" if has_history(args.data_path) else "single"
        if not args.init_from:
            args.init_from = str(newest_start(stage, Path(args.out_dir)))
            run.print(f"first weights: {args.init_from}")
        model, tokenizer = load_model(args.init_from, tokenizer=args.tokenizer or None)
        model.config.max_seq_len = max(model.config.max_seq_len, args.max_seq_len)  # longer rows teach a longer context
        data = SFTDataset(args.data_path, tokenizer, args.max_seq_len, args.packing)
        run.print(data.account())
        held_out = SFTDataset(args.val_path, tokenizer, args.max_seq_len) if args.val_path else None

        def validate() -> dict[str, float]:
            return {"val_loss": answer_loss(model, held_out, run, args.batch_size)}

        weights = weights_path(Path(args.out_dir), f"{FOLDERS[stage]}/full_sft", model.config)
        trainer = Trainer(model.to(run.device), tokenizer, data, args, run, weights, validate if held_out else None)
        for batch in trainer.batches():
            with trainer.autocast():
                output = trainer.model(**batch.inputs(trainer.varlen), num_items_in_batch=batch.num_targets)
            trainer.step(output)


def newest_start(stage: str, out_dir: Path) -> Path:
    """The newest base model; for multi-turn training the newest single-turn model, where there is one."""
    from model.checkpoint import newest_checkpoint

    single = out_dir / FOLDERS["single"]
    if stage == "multi" and any(single.glob("*.pth")):
        return newest_checkpoint(single)
    return newest_checkpoint(out_dir, ("pretrain",))


if __name__ == "__main__":
    run(main, Args)
