"""What the benchmarks compare with: transformers' own Llama of the same size, trained as its users train it."""

import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from model.export import llama_config
from model.LMConfig import LMConfig
from model.tokenizer import load_tokenizer


def llama_like(config: LMConfig) -> LlamaForCausalLM:
    """A Llama of the same shape with transformers' own random weights and SDPA attention."""
    llama = llama_config(config, load_tokenizer())
    llama.use_cache = False  # of no use in training; generate asks for one by itself
    return LlamaForCausalLM(llama)


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
