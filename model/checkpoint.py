"""Weights on disk: a plain state dict NAME.pth, and NAME.json that says what it is.

The tokenizer lies beside them, in tokenizer/HASH/, so that a folder of checkpoints can be moved or handed on.
"""

import errno
import hashlib
import json
import os
import pickle
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedTokenizerBase

from .cli import UserError
from .LMConfig import LMConfig
from .model import Transformer
from .tokenizer import FILES, SHIPPED, load_tokenizer, tokenizer_hash

TOKENIZER_FILES = (
    *FILES,
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
)
LMCONFIG_FIELDS = tuple(LMConfig.__annotations__)
AutoConfig.register(LMConfig.model_type, LMConfig)  # AutoTokenizer looks at the config.json of a folder, too


def weights_path(out_dir: str | Path, stage: str, config: LMConfig) -> Path:
    """`stage` is the name's beginning, folders included: "pretrain" -> out/pretrain_512.pth."""
    return Path(out_dir) / f"{stage}_{config.dim}{'_moe' if config.use_moe else ''}.pth"


def save_weights(
    path: Path, model: Transformer, tokenizer_dir: str | Path, state: dict[str, Tensor] | None = None, **facts: Any
) -> None:
    """Writes NAME.pth, NAME.json and the tokenizer. Whatever moment the process dies at, what is there can be loaded.

    Args:
        state: the tensors, where they do not lie in the model itself.
        facts: what else the JSON shall say: stage, step, tokens, ...

    Raises:
        OSError: the disk is full, say.
        FloatingPointError: a weight is not finite.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".pth.tmp")
    state = {key: value.detach().cpu() for key, value in (state or model.state_dict()).items()}
    check_finite(state)
    state["output.weight"] = state["tok_embeddings.weight"]  # from a GPU they come as two copies of one matrix
    write_tensors(state, temporary)
    description = {
        **facts,
        "config": {name: getattr(model.config, name) for name in LMCONFIG_FIELDS},
        "tokenizer": copy_tokenizer(Path(tokenizer_dir), path.parent),
        "tokenizer_sha256": tokenizer_hash(tokenizer_dir),
        "sha256": file_hash(temporary),
        # The two files cannot change in one instant: between the renames the JSON fits old weights and new ones.
        "previous_sha256": file_hash(path) if path.is_file() else None,
    }
    write_json(path.with_suffix(".json"), description)
    os.replace(temporary, path)


def check_finite(state: dict[str, Tensor]) -> None:
    """Raises FloatingPointError: what is broken is never written."""
    for name, value in state.items():
        if not value.isfinite().all():
            raise FloatingPointError(f"{name} holds numbers that are not finite")


def copy_tokenizer(source: Path, folder: Path) -> str:
    """Copies a tokenizer to folder/tokenizer/HASH, once; returns that path, relative to the folder."""
    name = f"tokenizer/{tokenizer_hash(source)[:12]}"
    if not (folder / name).is_dir():
        temporary = folder / f"{name}.tmp"
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        for file in TOKENIZER_FILES:
            if (source / file).is_file():
                flush(Path(shutil.copy(source / file, temporary)))
        os.replace(temporary, folder / name)
    return name


def load_model(
    path: str | Path, device: str | torch.device = "cpu", tokenizer: str | Path | None = None, **overrides: Any
) -> tuple[Transformer, PreTrainedTokenizerBase]:
    """A `.pth` (with or without its `.json`) or a transformers folder -> (model in eval mode, tokenizer).

    Args:
        tokenizer: folder to take instead of the checkpoint's own.
        overrides: LMConfig fields to set, as in rope_scaling=2.0; None leaves a field as it is.

    Raises:
        UserError: no such file, not a checkpoint, or tensors that do not fit.
    """
    path = Path(path)
    overrides = {name: value for name, value in overrides.items() if value is not None}
    description = read_description(path) if path.is_file() else {}
    if path.is_dir():
        model = load_folder(path, overrides)
        own_tokenizer = path if has_tokenizer(path) else SHIPPED
    elif path.is_file():
        state = read_state(path, description)
        model = build((description.get("config") or infer_config(state, overrides, path)) | overrides, state, path)
        own_tokenizer = path.parent / description["tokenizer"] if description else SHIPPED
    else:
        raise UserError(f"no checkpoint at {path}")
    folder = tokenizer or own_tokenizer
    loaded = load_tokenizer(folder)
    if not tokenizer and tokenizer_hash(folder) != description.get("tokenizer_sha256", tokenizer_hash(folder)):
        raise UserError(f"{folder} is not the tokenizer {path} was trained with: name that one with --tokenizer DIR")
    # Nothing tells which tokenizer weights without one need; the shipped one at least has to be of their size.
    guessed = not tokenizer and own_tokenizer == SHIPPED
    if len(loaded) > model.config.vocab_size or (guessed and len(loaded) < model.config.vocab_size):
        raise UserError(
            f"the tokenizer in {folder} has {len(loaded):,} tokens, {path} has {model.config.vocab_size:,}: "
            "name the right one with --tokenizer DIR"
        )
    return model.to(device).eval(), loaded


def has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in FILES)


def newest_checkpoint(out_dir: str | Path, stages: Sequence[str] = ()) -> Path:
    """The `.pth` written last: of those whose names begin with one of `stages`, or where there are none, of all.

    Raises UserError where there is no `.pth`.
    """
    found = sorted(Path(out_dir).rglob("*.pth"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise UserError(f"no checkpoint in {out_dir}: train one with 1-pretrain.py, or name one with --checkpoint")
    return ([path for path in found if path.name.startswith(tuple(stages))] or found)[-1]


def read_description(path: Path) -> dict[str, Any]:
    """What NAME.json says of NAME.pth; {} where there is none (published weights)."""
    file = path.with_suffix(".json")
    if not file.is_file():
        return {}
    try:
        description = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(description["config"], dict) or not isinstance(description["tokenizer"], str):
            raise TypeError("config or tokenizer is of the wrong type")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} does not describe a checkpoint ({error}): restore it or delete it") from error
    return description


def read_state(path: Path, description: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors of a `.pth`, if it is the file that its description means."""
    if description and file_hash(path) not in (description.get("sha256"), description.get("previous_sha256")):
        raise UserError(f"{path} is not the file that its .json describes (sha256 differs): it is damaged or replaced")
    return read_tensors(path)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a `.pth`, `.bin` or `.safetensors`; no code that such a file may hold is run.

    Names come without `_orig_mod.` (torch.compile), attention-mask buffers not at all.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        raise UserError(f"{path} is damaged, or holds Python objects, which could run code, beside tensors") from error
    except Exception as error:  # unpickling damaged bytes can raise anything
        raise UserError(f"{path} is damaged, or no weights of PyTorch at all") from error
    if not isinstance(state, dict) or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items()):
        raise UserError(f"{path} is not a plain state dict, tensors by name")
    state = {key.removeprefix("_orig_mod."): value for key, value in state.items()}
    return {key: value for key, value in state.items() if key.rpartition(".")[2] != "mask"}


def infer_config(state: dict[str, Tensor], overrides: dict[str, Any], path: Path) -> dict[str, Any]:
    """LMConfig fields from the shapes of published weights. Heads cannot be seen: 16 unless overridden."""
    try:
        vocab_size, dim = state["tok_embeddings.weight"].shape
        n_heads = overrides.get("n_heads", LMConfig.n_heads)
        fields: dict[str, Any] = dict(vocab_size=vocab_size, dim=dim, n_heads=n_heads)
        fields["n_layers"] = len({key.split(".")[1] for key in state if key.startswith("layers.")})
        fields["n_kv_heads"] = state["layers.0.attention.wk.weight"].shape[0] // (dim // n_heads)
        layer = "layers.0.feed_forward."
        fields["use_moe"] = f"{layer}gate.weight" in state
        if fields["use_moe"]:
            fields["n_routed_experts"] = state[f"{layer}gate.weight"].shape[0]
            fields["hidden_dim"] = state[f"{layer}experts.0.w1.weight"].shape[0]
            shared = state.get(f"{layer}shared_experts.w1.weight")
            fields["n_shared_experts"] = 0 if shared is None else shared.shape[0] // fields["hidden_dim"]
        else:
            fields["hidden_dim"] = state[f"{layer}w1.weight"].shape[0]
    except KeyError as error:
        raise UserError(f"{path} does not hold MiniMind weights: there is no tensor {error}") from error
    except (ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} holds tensors of shapes that no MiniMind model has") from error
    return fields


def build(fields: dict[str, Any], state: dict[str, Tensor], path: Path) -> Transformer:
    """A model of this configuration with exactly these weights; UserError names the first tensor that does not fit."""
    try:
        model = Transformer(LMConfig(**fields))
    except (ValueError, TypeError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"the configuration that comes with {path} makes no model: {error}") from error
    expected = model.state_dict()
    state.setdefault("output.weight", state.get("tok_embeddings.weight", torch.empty(0)))
    check_names(expected, state, path)
    for key, tensor in expected.items():
        if tensor.shape != state[key].shape:
            raise UserError(f"{path}: {key} is {list(state[key].shape)}, but the model needs {list(tensor.shape)}")
    if not torch.allclose(state["output.weight"], state["tok_embeddings.weight"], rtol=0, atol=0, equal_nan=True):
        raise UserError(f"{path}: output.weight is not tok_embeddings.weight, but this model has one matrix for both")
    model.load_state_dict(state)
    return model


def check_names(expected: Iterable[str], found: Iterable[str], path: Path) -> None:
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing or unknown:
        what = f"lacks {missing[0]}" if missing else f"has an unknown tensor {unknown[0]}"
        raise UserError(f"{path} {what} ({len(missing)} missing and {len(unknown)} unknown tensors in all)")


def load_folder(folder: Path, overrides: dict[str, Any]) -> Transformer:
    """A transformers folder of ours, read with our own code whatever code lies in it."""
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"no checkpoint at {folder}: name a .pth file, or a transformers folder with its config.json")
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
        model_type = fields["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is no configuration of a model: {error}") from error
    if model_type != LMConfig.model_type:
        raise UserError(f"{folder} holds a {model_type!r} model, not a {LMConfig.model_type!r} one")
    state = {key: tensor for part in weights_files(folder) for key, tensor in read_tensors(part).items()}
    return build(fields | overrides, state, folder)


def weights_files(path: Path) -> list[Path]:
    """Where the tensors lie: a `.pth` itself, or a transformers folder's files (a large model has several)."""
    if path.is_file():
        return [path]
    return sorted(path.glob("model*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))


def weights_hash(path: str | Path) -> str:
    """Of the weights alone, whatever their path is."""
    hashes = [file_hash(part) for part in weights_files(Path(path))]
    return hashes[0] if len(hashes) == 1 else hashlib.sha256("".join(hashes).encode()).hexdigest()


def file_hash(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_tensors(content: Any, path: Path) -> None:
    """torch.save, to the disk; OSError where it has no room, and then no half a file is left."""
    try:
        torch.save(content, path)
        flush(path)
    except (OSError, RuntimeError) as error:  # PyTorch's own writer raises RuntimeError
        path.unlink(missing_ok=True)
        if getattr(error, "errno", errno.ENOSPC) not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        if not path.parent.is_dir():
            raise OSError(f"{path.parent} is not there any more") from error
        raise OSError(f"{path} takes {num_bytes(content):,} bytes, for which there is no room") from error


def num_bytes(content: Any) -> int:
    """Of the tensors in nested dicts and lists, each storage once."""
    storages: dict[int, int] = {}

    def visit(part: Any) -> None:
        if isinstance(part, Tensor):
            storages[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
        elif isinstance(part, dict | list | tuple):
            for inner in part.values() if isinstance(part, dict) else part:
                visit(inner)

    visit(content)
    return sum(storages.values())


def write_json(path: Path, content: Any) -> None:
    write_bytes(path, json.dumps(content, ensure_ascii=False, indent=1).encode())


def write_bytes(path: Path, content: bytes) -> None:
    """A file that has its name when it is complete and on the disk."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_bytes(content)
    flush(temporary)
    os.replace(temporary, path)


def flush(path: Path) -> None:
    """Returns when the file is on the disk, not only in memory: a rename before that could survive without it."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())
