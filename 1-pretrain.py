"""Pretraining: tokens -> a base model that continues text.

    python data_process.py pretrain                                # raw text -> dataset/pretrain_data.bin
    python 1-pretrain.py                                           # one GPU, or the CPU
    python 1-pretrain.py --model tiny --max_seq_len 256            # small enough for a laptop
    torchrun --nproc_per_node 2 1-pretrain.py                      # two GPUs
    deepspeed --num_gpus 2 1-pretrain.py --deepspeed zero2         # the same with DeepSpeed's ZeRO

Stopped, by Ctrl-C or by a power cut, it goes on where it was when the same command is given again.

Writes out/pretrain_{dim}.pth, and beside it .json (what it is), .metrics.jsonl, .png (the curve), and .state/, from
which it goes on.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from model.cli import UserError, run
from model.options import TrainingOptions

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from model.model import Transformer

ARCHITECTURE = ("dim", "n_layers", "n_heads", "n_kv_heads", "dropout", "use_moe")  # options of a fresh model


@dataclass
class Args(TrainingOptions):
    """Pretrain a base model on a token file of data_process.py."""

    model: str = "minimind-small-T"  # minimind-small-T, minimind-small, minimind, minimind-moe, minimind-v1 or tiny
    data_path: str = "dataset/pretrain_data.bin"  # token file
    val_path: str = ""  # JSONL of held-out documents ({"text": …}), scored in bits per byte
    init_from: str = ""  # checkpoint to start from, instead of fresh weights
    dim: int = 0  # width; 0 here and below: the preset's
    n_layers: int = 0  # blocks
    n_heads: int = 0  # query heads
    n_kv_heads: int = 0  # key/value heads
    dropout: float = 0.0  # in training
    use_moe: bool = False  # make any preset a mixture of experts


def main(args: Args) -> None:
    import torch

    from model.checkpoint import load_model, weights_path
    from model.dataset import PretrainDataset
    from model.distributed import launch
    from model.evaluate import score_documents
    from model.records import read_texts
    from model.trainer import Trainer

    with launch(args.device) as run:
        torch.manual_seed(args.seed)
        if args.init_from:
            if given := [name for name in ARCHITECTURE if getattr(args, name)]:
                raise UserError(f"--{given[0]} is settled by --init_from {args.init_from}: leave out one of the two")
            model, tokenizer = load_model(args.init_from, tokenizer=args.tokenizer)
            model.config.max_seq_len = max(model.config.max_seq_len, args.max_seq_len)  # as 3-full_sft.py does
        else:
            model, tokenizer = fresh_model(args)
        data = PretrainDataset(args.data_path, tokenizer, args.max_seq_len)
        texts = read_texts(args.val_path) if args.val_path else []

        def validate() -> dict[str, float]:
            score = score_documents(model, tokenizer, texts, args.max_seq_len, run, args.batch_size)
            return {"val_loss": score.loss, "bits_per_byte": score.bits_per_byte}

        weights = weights_path(args.out_dir, "pretrain", model.config)
        trainer = Trainer(model.to(run.device), tokenizer, data, args, run, weights, validate if texts else None)
        for batch in trainer.batches():
            with trainer.autocast():
                output = trainer.model(**batch.inputs(trainer.varlen), num_items_in_batch=batch.num_targets)
            trainer.step(output)


def fresh_model(args: Args) -> "tuple[Transformer, PreTrainedTokenizerBase]":
    """A model of the preset's size with random weights, and its tokenizer, whose size is that of the vocabulary."""
    from model.LMConfig import PRESETS, LMConfig
    from model.model import Transformer
    from model.tokenizer import SHIPPED, load_tokenizer

    if args.model not in PRESETS:
        raise UserError(f"--model {args.model}: there is no such preset; choose among {', '.join(PRESETS)}")
    tokenizer = load_tokenizer(args.tokenizer or SHIPPED)
    needed = PRESETS[args.model]["vocab_size"]
    if not args.tokenizer and len(tokenizer) != needed:
        raise UserError(
            f"{args.model} has a vocabulary of {needed:,} tokens, for which no tokenizer is shipped: train one with "
            f"`python train_tokenizer.py --vocab_size {needed}`, or name a folder with --tokenizer DIR"
        )
    chosen = {name: getattr(args, name) for name in (*ARCHITECTURE, "max_seq_len") if getattr(args, name)}
    vocab_size = max(tokenizer.get_vocab().values()) + 1  # ids may have gaps
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    try:
        config = LMConfig.preset(args.model, vocab_size=vocab_size, **chosen, **ids)
    except ValueError as error:
        raise UserError(str(error)) from error
    return Transformer(config), tokenizer


if __name__ == "__main__":
    run(main, Args)
