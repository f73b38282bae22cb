"""Adapters (LoRA, Hu et al. 2021): beside a frozen matrix W a trained product, W + scale · B A, of low rank.

A folder of an adapter is peft's: adapter_config.json and adapter_model.safetensors. Its metadata holds a hash of the
base's weights, so that an adapter is put to no other model than the one it was made for.
"""

import hashlib
import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .checkpoint import check_finite, file_hash, load_model, read_description, save_weights, write_bytes
from .cli import UserError
from .model import OutputHead, Transformer

TARGETS = ("wq", "wk", "wv", "wo", "w1", "w2", "w3")  # every matrix of attention and feed-forward
warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks; transformers renamed it
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


def lora_config(
    model: Transformer, rank: int, alpha: int, dropout: float, target_modules: Sequence[str] = TARGETS
) -> LoraConfig:
    """What peft is to do.

    Args:
        alpha: the product counts alpha / rank times.
        dropout: of what goes into the product, in training.
        target_modules: names of matrices, as the layers' attributes are called.

    Raises:
        UserError: values out of range, or names of no matrix that can have an adapter.
    """
    if rank < 1 or alpha <= 0 or not 0 <= dropout < 1:
        raise UserError(f"rank {rank}, alpha {alpha}, dropout {dropout}: they must be at least 1, above 0, in [0, 1)")
    matrices = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    known = {name.rpartition(".")[2] for name, module in matrices if not isinstance(module, OutputHead)}
    for name in target_modules or [""]:
        if name not in known:  # the head is the embedding, too: an adapter would untie the two
            raise UserError(f"--target_modules {name}: no such matrix; choose among {' '.join(sorted(known))}")
    return LoraConfig(
        r=rank, lora_alpha=alpha, lora_dropout=dropout, target_modules=list(target_modules), task_type="CAUSAL_LM"
    )


def add_adapter(model: Transformer, config: LoraConfig) -> PeftModel:
    """The model, frozen, with a fresh adapter, which changes nothing yet (B is zero)."""
    return get_peft_model(model, config)


def share_of(model: PeftModel) -> str:
    """How much of a model is trained, in words."""
    trained, total = model.get_nb_trainable_parameters()
    return f"{trained:,} trained parameters beside {total - trained:,} frozen ones ({trained / total:.2%} of all)"


def base_hash(model: Transformer) -> str:
    """Of the weights as numbers: the same for a `.pth` and for a transformers folder made of it."""
    digest = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        if name != "output.weight":  # the embedding once more
            digest.update(name.encode())
            digest.update(value.detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def save_adapter(
    folder: Path, model: PeftModel, tokenizer_dir: str | Path, state: dict[str, Tensor], base_sha256: str, **facts: Any
) -> None:
    """Writes a peft folder, in place of checkpoint.save_weights. Each file gets its name when it is complete.

    Args:
        tokenizer_dir: not used: an adapter goes with its base, and so with its tokenizer.
        state: what was trained, by its name in `model`.
        facts: what else the metadata shall say: stage, step, tokens, ...

    Raises:
        OSError: the disk is full, say.
        FloatingPointError: a weight is not finite.
    """
    tensors = get_peft_model_state_dict(model, state_dict=state, save_embedding_layers=False)
    tensors = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    check_finite(tensors)
    metadata = {"format": "pt", "base_sha256": base_sha256} | {name: str(value) for name, value in facts.items()}
    config = model.peft_config["default"].to_dict() | {"inference_mode": True, "base_model_name_or_path": None}
    config = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    folder.mkdir(parents=True, exist_ok=True)
    write_bytes(folder / CONFIG, json.dumps(config, indent=1, default=str).encode())
    write_bytes(folder / WEIGHTS, save(tensors, metadata))


def read_metadata(folder: Path) -> dict[str, str]:
    """What an adapter says of itself; adapters of other programs may say nothing."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"no adapter in {folder}: there is no {CONFIG}")
    try:
        with safe_open(folder / WEIGHTS, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot read {folder / WEIGHTS}: {error}") from error


def with_adapter(model: Transformer, folder: str | Path, scale: float = 1.0) -> Transformer:
    """The model with an adapter merged into its weights, so that it is as fast as without.

    Args:
        scale: how much of the adapter: 0 is the base alone, 1 what was trained.

    Raises:
        UserError: no adapter there, one made for another base, or one that does not fit.
    """
    folder = Path(folder)
    if not 0 <= scale < float("inf"):
        raise UserError(f"the scale of an adapter is {scale}, but must be at least 0")
    wanted, found = read_metadata(folder).get("base_sha256"), base_hash(model)
    if wanted not in (None, found):
        raise UserError(
            f"the adapter in {folder} was made for another base: for weights {wanted[:12]}, but these are {found[:12]}"
        )
    try:
        adapted = PeftModel.from_pretrained(model, folder)
    except (OSError, ValueError, TypeError, RuntimeError, KeyError) as error:
        raise UserError(f"the adapter in {folder} does not fit the checkpoint: {str(error)[:200]}") from error
    for module in adapted.modules():
        if isinstance(module, LoraLayer):
            module.set_scale("default", scale)
    return adapted.merge_and_unload()


@torch.no_grad()
def merge(
    checkpoint: str | Path, folder: str | Path, output: Path, scale: float = 1.0, tokenizer: str = "", **facts: Any
) -> None:
    """Writes a `.pth` of a checkpoint with an adapter in its weights; `facts` go into its `.json`.

    Raises:
        UserError: they do not belong together, or the adapter is in these weights already.
    """
    checkpoint, folder = Path(checkpoint), Path(folder)
    read_metadata(folder)
    adapter = file_hash(folder / WEIGHTS)
    if checkpoint.is_file() and read_description(checkpoint).get("adapter_sha256") == adapter:
        raise UserError(f"{checkpoint} has the adapter in {folder} in its weights already")
    model, loaded = load_model(checkpoint, tokenizer=tokenizer or None)
    merged = with_adapter(model, folder, scale)
    facts = {"stage": f"{output.stem}, merged", "adapter_sha256": adapter, "adapter_scale": scale} | facts
    save_weights(output, merged, loaded.name_or_path, **facts)
