"""DPO: chat model -> one that prefers the better of two answers (Rafailov et al. 2023), with trl.

    python data_process.py dpo                                             # pairs of answers -> dataset/dpo/
    python 5-dpo_train.py                                                  # from the newest chat model
    python 5-dpo_train.py --val_path held_out.json                         # ... and rate held-out pairs
    python 5-dpo_train.py --loss_type sigmoid sft                          # DPO and the likelihood of the better answer
    python 5-dpo_train.py --lora --learning_rate 1e-4                      # train an adapter
    torchrun --nproc_per_node 2 5-dpo_train.py                             # two GPUs

Writes out/dpo_{dim}.pth, and beside it .json, .metrics.jsonl and .png (the curves); with --lora also the adapter,
out/lora/dpo_{dim}/. A model learns to find the chosen answer more probable, and the rejected one less, than the model
that it was at first, the reference. There is neither --optimizer muon nor --deepspeed here: the loop is trl's, with
AdamW; resuming, metrics and files are those of the other stages.
"""

import copy
from dataclasses import dataclass, field
from typing import Literal

from model.cli import UserError, run
from model.options import check_numbers

LOSSES = Literal[
    *("sigmoid", "hinge", "ipo", "nca_pair", "bco_pair", "sppo_hard", "aot", "aot_unpaired"),
    *("apo_zero", "apo_down", "discopop", "sigmoid_norm", "sft"),
]


@dataclass
class Args:
    """Train a chat model on pairs of answers of data_process.py."""

    data_path: str = "dataset/dpo/train_data.json"  # pairs: prompt, chosen, rejected
    val_path: str = ""  # held-out pairs, in the same form; empty: no validation
    init_from: str = ""  # chat model; empty: the newest one in out_dir
    tokenizer: str = ""  # folder of the tokenizer; empty: the one that comes with the model
    out_dir: str = "out"  # where weights, metrics and curves go
    resume: Literal["auto", "never"] = "auto"  # auto: go on where the same run was stopped; never: start anew
    accept_changes: bool = False  # go on although options or data are not those the run began with
    beta: float = 0.1  # how strongly the model is held to the reference
    loss_type: list[LOSSES] = field(default_factory=lambda: ["sigmoid"])  # sigmoid: DPO; several: their sum
    precompute_reference: bool = False  # rate all answers by the reference first: half the memory for weights later
    lora: bool = False  # train an adapter instead of the whole model
    rank: int = 16  # of the adapter: its inner width
    alpha: int = 32  # the adapter counts alpha / rank times
    epochs: int = 1  # times through the data
    max_steps: int = 0  # end after so many steps, whatever the epochs say; 0: no limit
    batch_size: int = 4  # pairs of a micro-batch, in each process
    accumulation_steps: int = 1  # micro-batches of a step
    max_seq_len: int = 512  # tokens of a prompt and an answer
    learning_rate: float = 1e-5  # the highest, after the warm-up; from there it falls to zero
    warmup_steps: int = 10  # steps in which the learning rate rises
    weight_decay: float = 0.0  # pull of the weights towards zero, times the learning rate
    grad_clip: float = 1.0  # longest gradient, as a norm over all parameters; 0: no limit
    seed: int = 42  # of the order of the data
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; auto: a half if it is fast
    log_interval: int = 10  # steps between lines of the metrics
    save_interval: int = 100  # steps between saved weights; the last step saves always
    val_interval: int = 50  # steps between validations; there is one before and one after training, too
    num_workers: int = 0  # processes that prepare batches, besides the training one

    def __post_init__(self):
        check_numbers(self)
        if not 0 < self.beta < float("inf"):
            raise UserError(f"--beta is {self.beta}, but must be above 0")
        if not self.loss_type:
            raise UserError("--loss_type needs the name of at least one loss")


def main(args: Args) -> None:
    import torch

    from model.adapters import lora_config
    from model.checkpoint import load_model, newest_checkpoint, weights_path
    from model.distributed import launch
    from model.preference_trainer import PreferenceTrainer
    from model.preferences import PreferenceData, figures, rate
    from model.trainer import pick_dtype

    with launch(args.device) as run:
        torch.manual_seed(args.seed)
        if not args.init_from:
            args.init_from = str(newest_checkpoint(args.out_dir, ("full_sft",)))
        run.print(f"first weights, and reference: {args.init_from}")
        model, tokenizer = load_model(args.init_from, run.device, args.tokenizer or None)
        data = PreferenceData(args.data_path, tokenizer, args.max_seq_len)
        run.print(data.told())
        validate = None
        if args.val_path:
            held_out = PreferenceData(args.val_path, tokenizer, args.max_seq_len)
            run.print(held_out.told())
            dtype = pick_dtype(args.dtype, run.device)
            how = (held_out.pairs, tokenizer.pad_token_id, run, args.batch_size, dtype)
            before = rate(model, *how)

            def validate(model: torch.nn.Module) -> dict[str, float]:
                return figures(rate(model, *how), before, args.beta)

        adapter = lora_config(model, args.rank, args.alpha, 0.0) if args.lora else None
        reference = None if args.lora or args.precompute_reference else copy.deepcopy(model).requires_grad_(False)
        weights = weights_path(args.out_dir, "dpo", model.config)
        PreferenceTrainer(model, reference, tokenizer, data, args, run, weights, adapter, validate).go()


if __name__ == "__main__":
    run(main, Args)
