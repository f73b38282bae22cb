"""--deepspeed and the other options -> the configuration that DeepSpeed reads."""

import json
from typing import Any

import torch

from .cli import UserError
from .optim import ADAM_BETAS
from .options import TrainingOptions

STAGES = {"zero1": 1, "zero2": 2, "zero3": 3}
SECTIONS = ("optimizer", "bf16", "fp16")


def read_config(args: TrainingOptions, world_size: int, dtype: torch.dtype) -> dict[str, Any]:
    """ZeRO by its stage, or a user's own file, completed by what our options say.

    Raises:
        UserError: no such file, not one for us, or one that contradicts an option.
    """
    if args.deepspeed in STAGES:
        config = {"zero_optimization": {"stage": STAGES[args.deepspeed]}}
    else:
        config = read_file(args.deepspeed)
    check_optimizer(config, args)
    batch = args.batch_size * args.accumulation_steps * world_size
    options = {
        "train_micro_batch_size_per_gpu": (args.batch_size, f"--batch_size {args.batch_size}"),
        "gradient_accumulation_steps": (args.accumulation_steps, f"--accumulation_steps {args.accumulation_steps}"),
        "train_batch_size": (batch, f"--batch_size and --accumulation_steps of {world_size} processes make {batch}"),
        "gradient_clipping": (args.grad_clip, f"--grad_clip {args.grad_clip}"),
        "bf16.enabled": (dtype == torch.bfloat16, f"--dtype means {dtype} here"),
        "fp16.enabled": (dtype == torch.float16, f"--dtype means {dtype} here"),
        "bf16.check_grad_overflow": (True, "updates that are not finite are left out"),
        "gradient_allreduce_op": ("mean", "losses are scaled for a mean"),
        "managed_gradient_accumulation": (True, "the trainer says where a step ends"),
    }
    for name, (value, reason) in options.items():
        settle(config, name, value, f"--deepspeed {args.deepspeed}: {name}", reason)
    if "offload_optimizer" in config["zero_optimization"]:
        config.setdefault("zero_force_ds_cpu_optimizer", False)  # PyTorch's own AdamW works there, too
    return config


def read_file(path: str) -> dict[str, Any]:
    try:
        with open(path, encoding="utf-8") as file:
            config = json.load(file)
    except FileNotFoundError as error:
        raise UserError(f"--deepspeed {path} is neither zero1, zero2, zero3 nor a file") from error
    except (OSError, ValueError) as error:
        raise UserError(f"--deepspeed {path} is no JSON file: {error}") from error
    config = without_auto(config)
    zero = config.get("zero_optimization") if isinstance(config, dict) else None
    if not isinstance(zero, dict) or zero.get("stage") not in STAGES.values():
        raise UserError(f"--deepspeed {path} must have zero_optimization with a stage of 1, 2 or 3")
    for name in SECTIONS:
        if not isinstance(config.get(name, {}), dict):
            raise UserError(f"--deepspeed {path}: {name} must be a section {{...}}")
    return config


def without_auto(config: Any) -> Any:
    """What is "auto" is left out: our options say it, or else DeepSpeed's defaults."""
    if not isinstance(config, dict):
        return config
    return {key: without_auto(value) for key, value in config.items() if value != "auto"}


def check_optimizer(config: dict[str, Any], args: TrainingOptions) -> None:
    """An optimizer in a file must be the one that our options make, which then takes its place."""
    where = f"--deepspeed {args.deepspeed}:"
    if "scheduler" in config:
        raise UserError(f"{where} scheduler contradicts --schedule and --warmup_steps; leave it out")
    optimizer = {"type": "AdamW", "params": {}} | config.pop("optimizer", {})
    settle(optimizer, "type", "AdamW", f"{where} optimizer.type", "--optimizer is AdamW with DeepSpeed")
    ours = dict(lr=args.learning_rate, weight_decay=args.weight_decay, betas=list(ADAM_BETAS), eps=1e-8)
    for name in optimizer["params"]:
        reason = f"ours is {ours.get(name, 'without it')} (--learning_rate, --weight_decay)"
        settle(optimizer["params"], name, ours.get(name), f"{where} optimizer.params.{name}", reason)


def settle(config: dict[str, Any], name: str, value: Any, where: str, reason: str) -> None:
    """Sets config's `name` ("a.b": b in a section a) to `value`; UserError if it is there and something else."""
    *sections, name = name.split(".")
    for section in sections:
        config = config.setdefault(section, {})
    if config.setdefault(name, value) != value:
        raise UserError(f'{where} is {config[name]}, but {reason}; make them equal, or write "auto"')
