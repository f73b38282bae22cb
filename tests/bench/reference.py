"""What the benchmarks compare with: transformers' own Llama of the same size, trained as its users train it."""

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from model.LMConfig import LMConfig


def llama_like(config: LMConfig) -> LlamaForCausalLM:
    """A Llama of the same shape with transformers' own random weights and SDPA attention."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=config.vocab_size,
            hidden_size=config.dim,
            intermediate_size=config.hidden_dim,
            num_hidden_layers=config.n_layers,
            num_attention_heads=config.n_heads,
            num_key_value_heads=config.n_kv_heads,
            max_position_embeddings=config.max_seq_len,
            rms_norm_eps=config.norm_eps,
            pad_token_id=config.pad_token_id,
            bos_token_id=config.bos_token_id,
            eos_token_id=config.eos_token_id,
            tie_word_embeddings=True,
            attn_implementation="sdpa",
            use_cache=False,
        )
    )


def adamw(model: torch.nn.Module, learning_rate: float) -> torch.optim.AdamW:
    """Fused AdamW, weight decay 0.1 on matrices: the usual settings of small language models."""
    matrices = [p for p in model.parameters() if p.dim() > 1]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), fused=True)


def train_step(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    """One step on ids [B, T], plain causal attention over the whole row; returns the loss."""
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.detach()
