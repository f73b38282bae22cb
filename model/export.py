"""The same model in the layouts of other programs: transformers folders, with our code or without, and llama2.c.

Dense models are Llamas. A mixture of experts is an ERNIE-4.5-MoE: of the architectures that transformers, vLLM and
llama.cpp know, the one with shared experts that have no gate, weights of the chosen experts that sum to 1, and rotary
pairs that are neighbours; its correction bias for balancing stays 0.
"""

import json
import shutil
import struct
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    Ernie4_5_MoeConfig,
    GenerationConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

from .chat import TEMPLATE
from .checkpoint import build, read_tensors, weights_files
from .cli import UserError
from .LMConfig import LMConfig
from .model import Transformer, rotary_turns

# Parts of a tensor's name, ours and those of Llama and its relatives; what is not listed is called the same.
PARTS = {
    "tok_embeddings": "embed_tokens",
    "attention_norm": "input_layernorm",
    "attention": "self_attn",
    "wq": "q_proj",
    "wk": "k_proj",
    "wv": "v_proj",
    "wo": "o_proj",
    "ffn_norm": "post_attention_layernorm",
    "feed_forward": "mlp",
    "w1": "gate_proj",
    "w2": "down_proj",
    "w3": "up_proj",
}
OUR_PARTS = {theirs: ours for ours, theirs in PARTS.items()}
BALANCING_BIAS = "mlp.moe_statics.e_score_correction_bias"
FOREIGN_TYPES = ("llama", "ernie4_5_moe")  # model types that from_llama reads


def context_of(config: LMConfig) -> int:
    """Tokens, stretched by rope_scaling."""
    return int(config.max_seq_len * config.rope_factor)


def rename(key: str, parts: dict[str, str]) -> str:
    return ".".join(parts.get(part, part) for part in key.split("."))


def half_rotated(weight: Tensor, heads: int) -> Tensor:
    """Rows of wq or wk, whose rotary pairs are neighbours (2i, 2i+1) -> Llama's order, pairs (i, i + d/2)."""
    return weight.unflatten(0, (heads, -1, 2)).transpose(1, 2).flatten(0, 2)


def neighbouring(weight: Tensor, heads: int) -> Tensor:
    """The way back."""
    return weight.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def turn_pairs(
    state: dict[str, Tensor], n_heads: int, n_kv_heads: int, turn: Callable[[Tensor, int], Tensor]
) -> dict[str, Tensor]:
    """Our state dict with the rows of all wq and wk in another order."""
    heads = {"wq": n_heads, "wk": n_kv_heads}
    return {
        key: turn(value, heads[key.split(".")[-2]]) if key.split(".")[-2] in heads else value
        for key, value in state.items()
    }


def to_llama(model: Transformer) -> dict[str, Tensor]:
    """Tensors under the names of Llama, or of ERNIE-4.5-MoE; the head is the embedding."""
    config, state = model.config, dict(model.state_dict())
    state.pop("output.weight")
    if not config.use_moe:
        state = turn_pairs(state, config.n_heads, config.n_kv_heads, half_rotated)
    state = {f"model.{rename(key, PARTS)}": value.contiguous() for key, value in state.items()}
    if config.use_moe:
        bias = torch.zeros(1, config.n_routed_experts)
        state |= {f"model.layers.{layer}.{BALANCING_BIAS}": bias.clone() for layer in range(config.n_layers)}
    return state


def llama_config(config: LMConfig, tokenizer: PreTrainedTokenizerBase) -> PretrainedConfig:
    """Raises UserError for experts' weights that do not sum to 1, for which there is no architecture."""
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": config.rope_theta}
    if config.rope_factor != 1:
        rope |= {"rope_type": "linear", "factor": config.rope_factor}
    shared = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        max_position_embeddings=context_of(config),
        rms_norm_eps=config.norm_eps,
        rope_parameters=rope,
        tie_word_embeddings=True,
        dtype="float32",
        **special_ids(tokenizer),
    )
    if not config.use_moe:
        return LlamaConfig(architectures=["LlamaForCausalLM"], **shared)
    check_normalized(config)
    return Ernie4_5_MoeConfig(
        architectures=["Ernie4_5_MoeForCausalLM"],
        moe_intermediate_size=config.hidden_dim,
        moe_k=config.num_experts_per_tok,
        moe_num_experts=config.n_routed_experts,
        moe_num_shared_experts=config.n_shared_experts,
        moe_layer_start_index=0,
        **shared,
    )


def check_normalized(config: LMConfig) -> None:
    if config.use_moe and not config.norm_topk_prob:
        raise UserError(
            "norm_topk_prob is off: no architecture of other programs computes that; use --format transformers"
        )


def special_ids(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}


def write_llama_folder(folder: Path, model: Transformer, tokenizer: PreTrainedTokenizerBase) -> None:
    """A transformers folder that needs no code of ours. Raises UserError where there is no such architecture."""
    config = llama_config(model.config, tokenizer)
    folder.mkdir(parents=True)
    save_file(to_llama(model), folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    # transformers 5 and what builds on it read rope_parameters and dtype, older programs these:
    older = {"rope_theta": model.config.rope_theta, "torch_dtype": "float32"}
    if model.config.rope_factor != 1:
        older["rope_scaling"] = {"rope_type": "linear", "factor": model.config.rope_factor}
    update_json(folder / "config.json", older)
    GenerationConfig(**special_ids(tokenizer)).save_pretrained(folder)
    write_tokenizer(folder, tokenizer)


def write_transformers_folder(folder: Path, model: Transformer, tokenizer: PreTrainedTokenizerBase) -> None:
    """A transformers folder with model.py and the files that it imports, for trust_remote_code=True."""
    ids = special_ids(tokenizer)
    model.generation_config = GenerationConfig(**ids)
    logging.disable_progress_bar()
    model.save_pretrained(folder)
    update_json(folder / "config.json", ids)
    write_tokenizer(folder, tokenizer)


def write_tokenizer(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """With the project's chat layout, in which the model was trained."""
    tokenizer.save_pretrained(folder)
    sentencepiece_file = Path(tokenizer.name_or_path) / "tokenizer.model"
    if sentencepiece_file.is_file():
        shutil.copy2(sentencepiece_file, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    changes: dict[str, Any] = {"is_local": None, "local_files_only": None, "chat_template": None}
    if settings["tokenizer_class"] == "TokenizersBackend":  # a name that only transformers 5 knows
        changes["tokenizer_class"] = "PreTrainedTokenizerFast"
    update_json(file, changes)


def update_json(file: Path, changes: dict[str, Any]) -> None:
    """None takes a field away."""
    content = json.loads(file.read_text(encoding="utf-8")) | changes
    content = {name: value for name, value in content.items() if value is not None or name not in changes}
    file.write_text(json.dumps(content, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


# The way back.


def foreign_type(folder: Path) -> str | None:
    """The model type of a folder that from_llama reads; None where it is not one of these."""
    try:
        model_type = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return model_type if model_type in FOREIGN_TYPES else None


def from_llama(folder: Path, **overrides: Any) -> Transformer:
    """A folder that write_llama_folder made, or any Llama of that kind: one matrix for embedding and head, no biases.

    Args:
        overrides: LMConfig fields to set; None leaves a field as it is.

    Raises:
        UserError: a configuration or tensors that are not of that kind.
    """
    moe = foreign_type(folder) == "ernie4_5_moe"
    try:
        theirs = (Ernie4_5_MoeConfig if moe else LlamaConfig).from_pretrained(folder)
    except (OSError, ValueError, TypeError, StrictDataclassError) as error:
        raise UserError(f"{folder / 'config.json'} cannot be read: {' '.join(str(error).split())}") from error
    fields = our_fields(theirs) | (our_moe_fields(theirs) if moe else {})
    fields |= {name: value for name, value in overrides.items() if value is not None}
    state: dict[str, Tensor] = {}
    for key, tensor in chain.from_iterable(read_tensors(file).items() for file in weights_files(folder)):
        if not (key.endswith(BALANCING_BIAS) and not tensor.any()):
            name = rename(key.removeprefix("model."), OUR_PARTS)
            state["output.weight" if name == "lm_head.weight" else name] = tensor
    return build(
        fields, state if moe else turn_pairs(state, fields["n_heads"], fields["n_kv_heads"], neighbouring), folder
    )


def our_fields(theirs: PretrainedConfig) -> dict[str, Any]:
    rope = theirs.rope_parameters
    scaled = rope.get("rope_type", "default") != "default"
    factor = rope.get("factor", 1.0) if scaled else 1.0
    return dict(
        vocab_size=theirs.vocab_size,
        dim=theirs.hidden_size,
        hidden_dim=theirs.intermediate_size,
        n_layers=theirs.num_hidden_layers,
        n_heads=theirs.num_attention_heads,
        n_kv_heads=theirs.num_key_value_heads,
        max_seq_len=round(theirs.max_position_embeddings / factor),
        norm_eps=theirs.rms_norm_eps,
        rope_theta=rope["rope_theta"],
        rope_scaling={"rope_type": rope["rope_type"], "factor": factor} if scaled else None,
        **{name: getattr(theirs, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")},
    )


def our_moe_fields(theirs: PretrainedConfig) -> dict[str, Any]:
    return dict(
        use_moe=True,
        hidden_dim=theirs.moe_intermediate_size,
        num_experts_per_tok=theirs.moe_k,
        n_routed_experts=theirs.moe_num_experts,
        n_shared_experts=theirs.moe_num_shared_experts,
    )


# llama2.c, the first of its formats: seven int32, then float32 tensors, those of one kind for all layers in a row.

LLAMA2C_HEADER = struct.Struct("<7i")
LLAMA2C_BEFORE = ("attention_norm", "attention.wq", "attention.wk", "attention.wv", "attention.wo")
LLAMA2C_AFTER = ("ffn_norm", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")


def llama2c_names(n_layers: int) -> Iterator[str]:
    """Our names in the file's order; the rotary tables come after them."""
    yield "tok_embeddings.weight"
    for part in (*LLAMA2C_BEFORE, *LLAMA2C_AFTER):
        yield from (f"layers.{layer}.{part}.weight" for layer in range(n_layers))
    yield "norm.weight"


def write_llama2c(path: Path, model: Transformer) -> None:
    """Raises UserError for what llama2.c cannot compute."""
    config = model.config
    if config.use_moe:
        raise UserError("llama2.c knows no mixture of experts: use --format gguf or llama")
    if config.norm_eps != 1e-5:
        raise UserError(f"llama2.c has a norm_eps of 1e-5 built in, but this model's is {config.norm_eps:g}")
    if config.rope_theta != 10000 or config.rope_factor != 1:
        raise UserError("llama2.c has rope_theta 10000 without scaling built in, but this model's differ")
    sizes = (config.dim, config.hidden_dim, config.n_layers, config.n_heads, config.n_kv_heads)
    state = model.state_dict()
    with open(path, "wb") as file:
        # A positive vocabulary tells that the head is the embedding.
        file.write(LLAMA2C_HEADER.pack(*sizes, config.vocab_size, config.max_seq_len))
        for name in llama2c_names(config.n_layers):
            file.write(state[name].float().numpy().astype("<f4").tobytes())
        tables = llama2c_rotary_tables(config.max_seq_len, config.dim // config.n_heads)
        file.write(tables.numpy().astype("<f4").tobytes())


def llama2c_rotary_tables(max_seq_len: int, head_dim: int) -> Tensor:
    """All cosines, then all sines, of every position and pair: [2 · max_seq_len · head_dim / 2]."""
    turns = rotary_turns(torch.arange(max_seq_len)[None], head_dim, LMConfig.rope_theta)
    return torch.cat((turns.real.flatten(), turns.imag.flatten()))


def read_llama2c(path: Path) -> Transformer:
    """The model in such a file. Raises UserError where its size or its rotary tables do not fit its header."""
    data = path.read_bytes()
    dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, max_seq_len = LLAMA2C_HEADER.unpack_from(data)
    fields = dict(dim=dim, hidden_dim=hidden_dim, n_layers=n_layers, n_heads=n_heads, n_kv_heads=n_kv_heads)
    fields |= dict(vocab_size=vocab_size, max_seq_len=max_seq_len)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in Transformer(LMConfig(**fields)).state_dict().items()}
    numbers = torch.from_numpy(np.frombuffer(data, "<f4", offset=LLAMA2C_HEADER.size).copy())
    names = list(llama2c_names(n_layers))
    tables = llama2c_rotary_tables(max_seq_len, dim // n_heads)
    sizes = [shapes[name].numel() for name in names]
    if len(numbers) != sum(sizes) + len(tables):
        raise UserError(f"{path} has not the size that its header tells")
    if not torch.equal(numbers[sum(sizes) :], tables):
        raise UserError(f"{path} holds other rotary tables than this model's")
    tensors = numbers[: sum(sizes)].split(sizes)
    state = {name: tensor.view(shapes[name]) for name, tensor in zip(names, tensors, strict=True)}
    return build(fields, state, path)
