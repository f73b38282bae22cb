"""LoRA: chat model -> a small adapter for one purpose, which can be put on, blended, or merged.

    python 4-lora_sft.py                                                   # who it is: dataset/sample/lora_identity.csv
    python 4-lora_sft.py --lora_name medical --data_path medical.csv --epochs 3 --learning_rate 2e-3
    torchrun --nproc_per_node 2 4-lora_sft.py                              # two GPUs
    python 2-eval.py --lora out/lora/identity_512                          # chat with it
    python 2-eval.py --lora out/lora/identity_512 --lora_scale 0.5         # ... with half of it
    python 4-lora_sft.py merge --lora out/lora/identity_512                # write it into the weights

Writes out/lora/{name}_{dim}/, a folder that peft reads, and beside it .metrics.jsonl, .png (the curve) and the training
states; with --merge, or `merge` for an adapter that is there already, {name}_{dim}.pth. The base is not changed: beside
every matrix of attention and feed-forward a product of two small ones is trained (Hu et al. 2021).
"""

import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

from model.cli import UserError, run
from model.options import TrainingOptions


@dataclass
class Train(TrainingOptions):
    """Train an adapter on dialogues of data_process.py (the default)."""

    lora_name: str = "identity"  # of the adapter: letters, digits, _ and -; not dpo, which 5-dpo_train.py --lora takes
    data_path: str = "dataset/sample/lora_identity.csv"  # dialogues: columns history, q, a
    val_path: str = ""  # held-out dialogues, in the same form
    init_from: str = ""  # chat model; empty: the newest one in out_dir
    rank: int = 16  # of the product: its inner width
    alpha: int = 32  # the product counts alpha / rank times
    dropout: float = 0.05  # of what goes into the product, in training
    target_modules: list[str] = field(default_factory=lambda: ["wq", "wk", "wv", "wo", "w1", "w2", "w3"])
    """matrices that get an adapter; the head cannot have one, it is the embedding, too"""
    packing: bool = True  # several conversations in a row; off: one each, and padding
    epochs: int = 40  # times through the data; many, as the identity dialogues are few
    batch_size: int | Literal["auto"] = 4  # rows of a micro-batch, in each process; auto: as many of a step as fit
    learning_rate: float = 5e-3  # the highest, after the warm-up
    warmup_steps: int = 10  # steps in which the learning rate rises
    optimizer: Literal["auto", "muon", "adamw"] = "adamw"  # auto: muon
    weight_decay: float = 0.0  # pull of the matrices towards zero, times the learning rate
    merge: bool = False  # at the end, also write the base with the adapter in its weights


@dataclass
class Merge:
    """Write a chat model with an adapter in its weights."""

    lora: str  # folder of the adapter
    init_from: str = ""  # the chat model that it was made for; empty: the newest one in out_dir
    output: str = ""  # the .pth to make; empty: beside the adapter, with its name
    lora_scale: float = 1.0  # how much of it: 0 is the base alone, 1 what was trained
    out_dir: str = "out"  # where to look for the newest chat model
    tokenizer: str = ""  # folder of the tokenizer; empty: the one that comes with the model


Args = Train | Merge


def main(args: Args) -> None:
    if not args.init_from:
        from model.checkpoint import newest_checkpoint

        args.init_from = str(newest_checkpoint(args.out_dir, ("full_sft", "dpo")))
    if isinstance(args, Merge):
        merge_existing(args)
    else:
        train(args)


def train(args: Train) -> None:
    import torch

    from model.adapters import add_adapter, base_hash, lora_config, merge, save_adapter, share_of
    from model.checkpoint import load_model, weights_path
    from model.dataset import SFTDataset
    from model.distributed import launch
    from model.evaluate import answer_loss
    from model.trainer import Trainer

    if not re.fullmatch(r"[\w-]+", args.lora_name):
        raise UserError(f"--lora_name {args.lora_name}: it names a folder: letters, digits, _ and - only")
    if args.lora_name == "dpo":
        raise UserError("--lora_name dpo: that folder is for adapters of 5-dpo_train.py --lora; choose another name")
    with launch(args.device) as run:
        torch.manual_seed(args.seed)
        base, tokenizer = load_model(args.init_from, tokenizer=args.tokenizer or None)
        data = SFTDataset(args.data_path, tokenizer, args.max_seq_len, args.packing)
        held_out = SFTDataset(args.val_path, tokenizer, args.max_seq_len) if args.val_path else None
        save = partial(save_adapter, base_sha256=base_hash(base))
        config = lora_config(base, args.rank, args.alpha, args.dropout, args.target_modules)
        model = add_adapter(base, config).to(run.device)
        run.print(f"base: {args.init_from}\n{data.account()}\n{share_of(model)}")

        def validate() -> dict[str, float]:
            return {"val_loss": answer_loss(model, held_out, run, args.batch_size)}

        merged = weights_path(args.out_dir, f"lora/{args.lora_name}", base.config)
        folder = merged.with_suffix("")
        if args.merge and merged.resolve() == Path(args.init_from).resolve():
            raise UserError(f"--merge would write over --init_from {args.init_from}: choose another --lora_name")
        trainer = Trainer(model, tokenizer, data, args, run, folder, validate if held_out else None, save)
        for batch in trainer.batches():
            with trainer.autocast():
                output = trainer.model(**batch.inputs(trainer.varlen), num_items_in_batch=batch.num_targets)
            trainer.step(output)
        if args.merge and run.is_main:
            merge(args.init_from, folder, merged, tokenizer=args.tokenizer)
            print(f"merged into {merged}")


def merge_existing(args: Merge) -> None:
    from model.adapters import merge

    adapter = Path(args.lora).absolute()
    output = Path(args.output) if args.output else adapter.with_name(f"{adapter.name}.pth")
    if output.exists():
        raise UserError(f"{output} exists already: remove it, or name another with --output")
    merge(args.init_from, args.lora, output, args.lora_scale, args.tokenizer)
    print(f"{args.init_from} with {args.lora} in its weights: {output}")


if __name__ == "__main__":
    run(main, Args, default=Train())
