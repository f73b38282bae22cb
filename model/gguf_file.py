"""GGUF, the one file that llama.cpp and Ollama need: settings, tokenizer, chat template and tensors.

A dense model is of llama.cpp's architecture `llama`, a mixture of experts of `ernie4_5-moe`; both turn neighbouring
rotary pairs, so that our rows of wq and wk stay as they are.
"""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, TokenType
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from .chat import TEMPLATE
from .checkpoint import build
from .cli import UserError
from .export import check_normalized, context_of
from .LMConfig import LMConfig
from .model import Transformer

TYPES = {
    "f32": (GGMLQuantizationType.F32, gguf.LlamaFileType.ALL_F32),
    "f16": (GGMLQuantizationType.F16, gguf.LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
BLOCK = 32  # numbers that share a scale in Q8_0: the rows of a matrix must be that long, or a multiple

# Our names -> llama.cpp's.
PARTS = {
    "tok_embeddings": "token_embd",
    "norm": "output_norm",
    "attention_norm": "attn_norm",
    "attention.wq": "attn_q",
    "attention.wk": "attn_k",
    "attention.wv": "attn_v",
    "attention.wo": "attn_output",
    "ffn_norm": "ffn_norm",
    "feed_forward.w1": "ffn_gate",
    "feed_forward.w2": "ffn_down",
    "feed_forward.w3": "ffn_up",
    "feed_forward.gate": "ffn_gate_inp",
    "feed_forward.experts.w1": "ffn_gate_exps",
    "feed_forward.experts.w2": "ffn_down_exps",
    "feed_forward.experts.w3": "ffn_up_exps",
    "feed_forward.shared_experts.w1": "ffn_gate_shexp",
    "feed_forward.shared_experts.w2": "ffn_down_shexp",
    "feed_forward.shared_experts.w3": "ffn_up_shexp",
}
OUR_PARTS = {theirs: ours for ours, theirs in PARTS.items()}
STACKED = ("ffn_gate_exps", "ffn_down_exps", "ffn_up_exps")  # all experts of a layer in one tensor


def write_gguf(path: Path, model: Transformer, tokenizer: PreTrainedTokenizerBase, dtype: str, name: str) -> None:
    """Raises UserError for a model or tokenizer that llama.cpp cannot express, or that does not fit `dtype`."""
    config = model.config
    check_normalized(config)
    if dtype == "q8_0" and (config.dim % BLOCK or config.hidden_dim % BLOCK):
        raise UserError(f"q8_0 needs dim {config.dim} and hidden_dim {config.hidden_dim} to be multiples of {BLOCK}")
    arch = "ernie4_5-moe" if config.use_moe else "llama"
    writer = GGUFWriter(path, arch)
    writer.add_name(name)
    writer.add_file_type(TYPES[dtype][1])
    add_settings(writer, config)
    add_vocabulary(writer, tokenizer, config.vocab_size)
    for key, (data, kind) in pack_tensors(model, dtype).items():
        writer.add_tensor(key, data, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_settings(writer: GGUFWriter, config: LMConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(context_of(config))
    writer.add_embedding_length(config.dim)
    writer.add_block_count(config.n_layers)
    writer.add_feed_forward_length(config.hidden_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.dim // config.n_heads)
    writer.add_rope_freq_base(config.rope_theta)
    if config.rope_factor != 1:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(config.rope_factor)
        writer.add_rope_scaling_orig_ctx_len(config.max_seq_len)
    if config.use_moe:
        writer.add_expert_count(config.n_routed_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
        writer.add_expert_feed_forward_length(config.hidden_dim)
        writer.add_interleave_moe_layer_step(1)  # every layer has experts,
        writer.add_leading_dense_block_count(0)  # the first one too
        writer.add_expert_shared_count(config.n_shared_experts)
        if config.n_shared_experts:
            writer.add_expert_shared_feed_forward_length(config.n_shared_experts * config.hidden_dim)


def gguf_tensors(model: Transformer) -> dict[str, Tensor]:
    """Tensors by llama.cpp's names; the experts of a layer stacked [E, …]; the head is the embedding."""
    tensors: dict[str, Tensor] = {}
    experts: dict[str, list[Tensor]] = {}
    for key, value in model.state_dict().items():
        if key == "output.weight":
            continue
        block, part = re.fullmatch(r"(?:layers\.(\d+)\.)?(.+)\.weight", key).groups()
        name = PARTS[re.sub(r"experts\.\d+\.", "experts.", part)]
        name = f"{name}.weight" if block is None else f"blk.{block}.{name}.weight"
        if ".experts." in part:
            experts.setdefault(name, []).append(value)
        else:
            tensors[name] = value
    return tensors | {name: torch.stack(parts) for name, parts in experts.items()}


def pack_tensors(model: Transformer, dtype: str) -> dict[str, tuple[np.ndarray, GGMLQuantizationType]]:
    """Matrices in that type; norms and routers, which are small and sensitive, in float32."""
    packed = {}
    for name, tensor in gguf_tensors(model).items():
        plain = tensor.dim() == 1 or "ffn_gate_inp" in name
        kind = GGMLQuantizationType.F32 if plain else TYPES[dtype][0]
        packed[name] = gguf.quants.quantize(tensor.float().cpu().numpy(), kind), kind
    return packed


def rounded(model: Transformer, dtype: str) -> Transformer:
    """The model with its weights as the file has them: what another program can be expected to compute."""
    packed = pack_tensors(model, dtype)
    tensors = {name: gguf.quants.dequantize(data, kind) for name, (data, kind) in packed.items()}
    return from_tensors(tensors, {field: getattr(model.config, field) for field in LMConfig.__annotations__}, Path("-"))


def from_tensors(tensors: dict[str, np.ndarray], fields: dict[str, Any], path: Path) -> Transformer:
    state: dict[str, Tensor] = {}
    for name, data in tensors.items():
        tensor = torch.from_numpy(np.array(data))
        block, part = re.fullmatch(r"(?:blk\.(\d+)\.)?(.+)\.weight", name).groups()
        ours = OUR_PARTS[part] if block is None else f"layers.{block}.{OUR_PARTS[part]}"
        if part in STACKED:
            state |= {f"{ours.replace('experts', f'experts.{e}')}.weight": one for e, one in enumerate(tensor)}
        else:
            state[f"{ours}.weight"] = tensor
    return build(fields, state, path)


def read_gguf(path: Path) -> Transformer:
    """The model in a file of write_gguf."""
    reader = GGUFReader(path)
    settings = {name: field.contents() for name, field in reader.fields.items()}
    arch = settings["general.architecture"]

    def setting(name: str, default: Any = None) -> Any:
        return settings.get(f"{arch}.{name}", default)

    moe = arch == "ernie4_5-moe"
    fields = dict(
        dim=setting("embedding_length"),
        hidden_dim=setting("feed_forward_length"),
        n_layers=setting("block_count"),
        n_heads=setting("attention.head_count"),
        n_kv_heads=setting("attention.head_count_kv"),
        vocab_size=len(settings["tokenizer.ggml.tokens"]),
        norm_eps=setting("attention.layer_norm_rms_epsilon"),
        rope_theta=setting("rope.freq_base"),
        rope_scaling=setting("rope.scaling.factor"),
        max_seq_len=setting("rope.scaling.original_context_length", setting("context_length")),
        use_moe=moe,
    )
    if moe:
        fields |= dict(
            n_routed_experts=setting("expert_count"),
            num_experts_per_tok=setting("expert_used_count"),
            n_shared_experts=setting("expert_shared_count"),
        )
    tensors = {tensor.name: gguf.quants.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    return from_tensors(tensors, fields, path)


# The tokenizer.


class Vocabulary(NamedTuple):
    model: str  # llama.cpp's name of the kind
    pre: str  # and of how text is cut before merging
    tokens: list[str]
    types: list[int]
    merges: list[str]
    scores: list[float]


def add_vocabulary(writer: GGUFWriter, tokenizer: PreTrainedTokenizerBase, size: int) -> None:
    spec = json.loads(tokenizer.backend_tokenizer.to_str())
    sentencepiece_file = Path(tokenizer.name_or_path) / "tokenizer.model"
    if "ByteLevel" in json.dumps(spec["pre_tokenizer"]):
        vocabulary = byte_level_vocabulary(tokenizer, spec, size)
    elif sentencepiece_file.is_file():
        vocabulary = sentencepiece_vocabulary(sentencepiece_file, size)
    else:
        raise UserError("llama.cpp needs a byte-level BPE tokenizer.json or a sentencepiece tokenizer.model")
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.pre)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.types)
    if vocabulary.merges:
        writer.add_token_merges(vocabulary.merges)
    if vocabulary.scores:
        writer.add_token_scores(vocabulary.scores)
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    writer.add_add_bos_token(False)  # the chat template writes every <s> itself
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(TEMPLATE)


def byte_level_vocabulary(tokenizer: PreTrainedTokenizerBase, spec: dict[str, Any], size: int) -> Vocabulary:
    pre = tokenizer.init_kwargs.get("llama_cpp_pre")
    if pre is None and spec["pre_tokenizer"] == {**spec["pre_tokenizer"], "type": "ByteLevel", "use_regex": True}:
        pre = "gpt-2"
    if pre is None:
        raise UserError("tokenizer_config.json must name in llama_cpp_pre how llama.cpp is to cut text before merging")
    by_id = {id: token for token, id in tokenizer.get_vocab().items()}
    special = {token["id"] for token in spec["added_tokens"] if token["special"]}
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(size)]
    types = [
        TokenType.UNUSED if i not in by_id else TokenType.CONTROL if i in special else TokenType.NORMAL
        for i in range(size)
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in spec["model"]["merges"]]
    return Vocabulary("gpt2", pre, tokens, types, merges, [])


def sentencepiece_vocabulary(file: Path, size: int) -> Vocabulary:
    from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2

    pieces = SentencePieceProcessor(model_file=str(file))
    proto = sentencepiece_model_pb2.ModelProto.FromString(file.read_bytes())
    known = range(pieces.vocab_size())
    tokens = [pieces.id_to_piece(i) if i in known else f"[PAD{i}]" for i in range(size)]
    # The numbers of GGUF's token types are those of sentencepiece's.
    types = [proto.pieces[i].type if i in known else TokenType.UNUSED for i in range(size)]
    scores = [pieces.get_score(i) if i in known else -1e4 for i in range(size)]
    return Vocabulary("llama", "default", tokens, types, [], scores)


def modelfile(gguf_name: str, tokenizer: PreTrainedTokenizerBase, context: int) -> str:
    """What `ollama create NAME -f Modelfile` reads: our chat layout in Go's template language, where to stop."""
    bos, eos = tokenizer.bos_token, tokenizer.eos_token
    return (
        f"FROM ./{gguf_name}\n"
        f'TEMPLATE """{{{{- range .Messages }}}}{bos}{{{{ .Role }}}}\n'
        f"{{{{ .Content }}}}{eos}\n"
        f"{{{{ end }}}}{bos}assistant\n"
        '"""\n'
        f'PARAMETER stop "{eos}"\n'
        f"PARAMETER num_ctx {context}\n"
        "PARAMETER temperature 0.7\n"
        "PARAMETER top_k 50\n"
        "PARAMETER top_p 0.9\n"
        "PARAMETER repeat_penalty 1.1\n"
    )
