"""The options that scripts share; a script adds its own and sets its own defaults."""

from dataclasses import dataclass
from typing import Literal

from .cli import UserError

AUTO = "auto"  # of --batch_size
LEAST = dict(epochs=1, max_steps=0, batch_size=1, accumulation_steps=1, max_seq_len=2, warmup_steps=0)
LEAST |= dict(learning_rate=0, weight_decay=0, grad_clip=0, log_interval=1, save_interval=0, val_interval=0, seed=0)
LEAST |= dict(num_workers=0)


def check_numbers(options: object) -> None:
    """Raises UserError for a number that no training run can mean."""
    for name, lowest in LEAST.items():
        value = getattr(options, name)
        if value != AUTO and not lowest <= value < float("inf"):
            raise UserError(f"--{name} is {value}, but must be at least {lowest}")


@dataclass
class TrainingOptions:
    data_path: str = ""  # what to train on
    val_path: str = ""  # held-out data; empty: no validation
    tokenizer: str = ""  # folder of the tokenizer; empty: the one that comes with the model
    out_dir: str = "out"  # where weights, metrics and curves go
    init_from: str = ""  # checkpoint to start from
    resume: Literal["auto", "never"] = "auto"  # auto: go on where the same run was stopped; never: start anew
    accept_changes: bool = False  # go on although options or data are not those the run began with
    epochs: int = 1  # times through the data
    max_steps: int = 0  # end after so many steps, whatever the epochs say; 0: no limit
    batch_size: int | Literal["auto"] = 16  # rows of a micro-batch, in each process; auto: as many of a step as fit
    accumulation_steps: int = 1  # micro-batches of a step
    max_seq_len: int = 512  # tokens of a row
    learning_rate: float = 5e-3  # the highest, after the warm-up
    warmup_steps: int = 30  # steps in which the learning rate rises
    schedule: Literal["cosine", "wsd"] = "cosine"  # how it falls to zero; wsd: only over the last fifth
    optimizer: Literal["auto", "muon", "adamw"] = "auto"  # auto: Muon (matrices) and AdamW; AdamW with DeepSpeed
    weight_decay: float = 0.1  # pull of the matrices towards zero, times the learning rate
    grad_clip: float = 1.0  # longest gradient, as a norm over all parameters; 0: any
    seed: int = 42  # of fresh weights, the order of the data, and dropout
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of matrix products; auto: a half if it is fast
    compile: bool = False  # compile the model first (about a minute): steps then take less memory and mostly less time
    deepspeed: str = ""  # train with DeepSpeed: zero1, zero2, zero3 or a JSON file of its settings; empty: PyTorch
    log_interval: int = 10  # steps between lines of the metrics
    save_interval: int = 500  # steps between saved weights; the last step saves always
    val_interval: int = 500  # steps between validations; the last step validates always
    num_workers: int = 0  # processes that prepare batches, besides the training one
    plan: bool = False  # only print what the run needs: memory, disk, time, and the largest batch_size that fits

    def __post_init__(self):
        check_numbers(self)
        if self.deepspeed and (self.plan or self.batch_size == AUTO):
            raise UserError("--plan and --batch_size auto do not know what --deepspeed needs: leave out one of the two")
        if self.deepspeed and self.optimizer == "muon":
            raise UserError(
                "--optimizer muon needs whole matrices, but --deepspeed cuts them up (ZeRO): leave out one of the two, "
                "or take --optimizer adamw"
            )


@dataclass
class ModelOptions:
    """Which model is asked."""

    checkpoint: str = ""  # a .pth or a transformers folder; empty: the newest fitting one in out_dir
    out_dir: str = "out"  # where to look for the newest checkpoint
    tokenizer: str = ""  # folder of the tokenizer; empty: the one that comes with the checkpoint
    lora: str = ""  # folder of an adapter (LoRA) for the checkpoint
    lora_scale: float = 1.0  # how much of the adapter: 0 is the checkpoint alone, 1 what was trained
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    quantize: Literal["none", "int8"] = "none"  # int8: whole numbers for the weights; a CPU is faster with them
    compile: bool = False  # compile the model first (about a minute): meant for GPUs, on a CPU it gains nothing
    rope_scaling: float | None = None  # stretch the context by this factor (linear interpolation of positions)
    rope_theta: float | None = None  # base of the rotary wavelengths, for weights without a .json; none: 10000
    n_heads: int | None = None  # query heads, for weights without a .json beside them; none: 16


@dataclass
class InferenceOptions(ModelOptions):
    """Which model is asked, and how its next token is chosen."""

    temperature: float = 0.7  # below 1: more predictable, above: more varied; 0: always the most probable token
    top_k: int = 50  # choose among the k most probable tokens; 0: all
    top_p: float = 0.9  # choose among the fewest tokens that together have this probability
    min_p: float = 0.0  # choose among tokens at least this fraction as probable as the most probable one
    repetition_penalty: float = 1.1  # above 1: tokens that have occurred become less probable
    max_new_tokens: int = 256  # longest answer, in tokens; the prompt does not count
    seed: int | None = None  # the same seed gives the same answers; none: other ones each time
