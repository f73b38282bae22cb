"""The model: a Llama-3-style decoder, dense or with a DeepSeek-V2-style mixture of experts.

Letters in shape comments and names: B batch, T time (tokens of this call), S tokens that can be looked at (earlier
ones from the cache, then T), D model width, H query heads, K key/value heads, d width of a head, F feed-forward width,
E routed experts, k experts a token visits, V vocabulary, N = B·T.

Read it from top to bottom: the parts in the order in which a token meets them, then `Block`, then `Transformer`. What
makes them fast lies in files of its own: matrix products in products.py, attention's kernels in attention.py, and
gradients that are better than autograd's in gradients.py.
"""

import math
import warnings
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple

from .attention import Segments, attend_fused, attend_plainly, visible_keys
from .gradients import (
    GateFunction,
    RMSNormFunction,
    SummedCrossEntropy,
    divided_by_rms,
    gate_values,
    gradients_by_hand,
    kept_as_inputs,
)
from .LMConfig import IGNORED_LABEL, LMConfig
from .products import TOKEN_STEP, Linear

# RoPE's rotations, made once a call: all that a compiled model has of complex numbers.
warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex", UserWarning)


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dimension, in float32 (Zhang and Sennrich 2019)."""

    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if gradients_by_hand():
            return RMSNormFunction.apply(x, self.weight, self.eps)
        scaled, _ = divided_by_rms(x, self.eps)
        return scaled * self.weight


def rotary_turns(position_ids: Tensor, head_dim: int, theta: float, factor: float = 1.0) -> Tensor:
    """RoPE's rotations (Su et al. 2021), complex numbers e^(i · position · theta^(-2j/d)): [B, T, 1, d/2].

    `factor` divides the positions (linear interpolation, Chen et al. 2023). They are cheap, so they are made anew for
    each call: nothing has to be stored with the weights or ends at a longest context.
    """
    exponents = torch.arange(0, head_dim, 2, device=position_ids.device, dtype=torch.float32) / head_dim
    frequencies = 1.0 / theta**exponents  # d/2
    angles = (position_ids.float() / factor)[:, :, None, None] * frequencies
    return torch.polar(torch.ones_like(angles), angles)


def apply_rotary(x_BTHd: Tensor, turns: Tensor) -> Tensor:
    """Turns each pair of neighbouring features (2i, 2i+1), taken as a complex number, by its angle."""
    pairs = x_BTHd.float().unflatten(-1, (-1, 2))  # B T H d/2 2
    if torch.compiler.is_compiling():  # torch.compile makes one loop of this, but not of complex numbers
        (real, imaginary), (cos, sin) = pairs.unbind(-1), torch.view_as_real(turns).unbind(-1)
        turned = torch.stack((real * cos - imaginary * sin, real * sin + imaginary * cos), -1)
    else:
        turned = torch.view_as_real(torch.view_as_complex(pairs) * turns)
    return turned.flatten(-2).type_as(x_BTHd)


class Attention(nn.Module):
    """Causal attention with grouped queries: H/K query heads share a key/value head (Ainslie et al. 2023)."""

    def __init__(self, config: LMConfig, layer_index: int):
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.dim // config.n_heads
        self.wq = Linear(config.dim, config.n_heads * self.head_dim)
        self.wk = Linear(config.dim, config.n_kv_heads * self.head_dim)
        self.wv = Linear(config.dim, config.n_kv_heads * self.head_dim)
        self.wo = Linear(config.n_heads * self.head_dim, config.dim)
        self.wo.is_residual_output = True
        self.dropout = config.dropout
        self.attend = attend_fused if config.flash_attn else attend_plainly

    def forward(self, x: Tensor, turns: Tensor, mask: Tensor | Segments | None, cache: Cache | None) -> Tensor:
        heads = (-1, self.head_dim)
        q = apply_rotary(self.wq(x).unflatten(-1, heads), turns).transpose(1, 2)  # B H T d
        k = apply_rotary(self.wk(x).unflatten(-1, heads), turns).transpose(1, 2)  # B K T d
        v = self.wv(x).unflatten(-1, heads).transpose(1, 2)  # B K T d
        if cache is not None:
            k, v = cache.update(k, v, self.layer_index)  # B K S d
        y = self.attend(q, k, v, mask, self.dropout if self.training else 0.0)
        y = self.wo(y.transpose(1, 2).flatten(-2))  # B T D
        return F.dropout(y, self.dropout, self.training)


class FeedForward(nn.Module):
    """SwiGLU: w2(silu(w1 x) · w3 x) (Shazeer 2020)."""

    gradient_checkpointing = False  # switched on by transformers; then a whole block is made anew, not this alone

    def __init__(self, dim: int, hidden_dim: int, dropout: float):
        super().__init__()
        self.w1 = Linear(dim, hidden_dim)
        self.w2 = Linear(hidden_dim, dim)
        self.w3 = Linear(dim, hidden_dim)
        self.w2.is_residual_output = True
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        gates, values = self.w1(x), self.w3(x)
        if not gradients_by_hand() or self.gradient_checkpointing:
            y = self.w2(gate_values(gates, values))
        else:
            gated = GateFunction.apply(gates, values)
            with kept_as_inputs(gated, gate_values, gates, values):
                y = self.w2(gated)
        return F.dropout(y, self.dropout, self.training)


class Routing(NamedTuple):
    """What a mixture-of-experts layer tells about its choices."""

    balance: Tensor  # [B] how unevenly each row's tokens use the experts: 1 is even, E/k the worst
    load: Tensor  # [E] share of the tokens' visits that each expert got


class MoEFeedForward(nn.Module):
    """Shared experts see every token, routed experts the tokens whose router ranks them in its top k.

    DeepSeek-V2 (DeepSeek-AI 2024, section 2.2): y = shared(x) + Σ_i weight_i · expert_i(x).
    """

    def __init__(self, config: LMConfig):
        super().__init__()
        self.k = config.num_experts_per_tok
        self.norm_topk_prob = config.norm_topk_prob
        self.seq_aux = config.seq_aux
        sizes = (config.dim, config.hidden_dim, config.dropout)
        self.experts = nn.ModuleList(FeedForward(*sizes) for _ in range(config.n_routed_experts))
        self.gate = Linear(config.dim, config.n_routed_experts)
        if config.n_shared_experts:  # several shared experts are one wide one
            width = config.n_shared_experts * config.hidden_dim
            self.shared_experts = FeedForward(config.dim, width, config.dropout)
        else:
            self.shared_experts = None

    def forward(self, x_BTD: Tensor, real_BT: Tensor | None = None) -> tuple[Tensor, Routing]:
        """real_BT: False at padding, which does not count in the balance."""
        scores_BTE = self.gate(x_BTD).float().softmax(-1)
        weights_BTk, chosen_BTk = self.choose(scores_BTE)
        y = self.visit_experts(x_BTD.flatten(0, 1), weights_BTk.flatten(0, 1), chosen_BTk.flatten(0, 1))
        y = y.view_as(x_BTD)
        if self.shared_experts is not None:
            y = y + self.shared_experts(x_BTD)
        return y, routing(scores_BTE, chosen_BTk, real_BT, self.seq_aux)

    def choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """Scores [..., E] -> the weights and the numbers of the experts to visit, [..., k] each."""
        weights, chosen = scores.topk(self.k, dim=-1)
        return weights / weights.sum(-1, keepdim=True) if self.norm_topk_prob else weights, chosen

    def visit_experts(self, x_ND: Tensor, weights_Nk: Tensor, chosen_Nk: Tensor) -> Tensor:
        """Sorts the N·k visits by expert, so that each expert works once, on all of its tokens."""
        order = chosen_Nk.flatten().argsort(stable=True)  # N·k visits; visit j is of token j // k
        tokens = order // self.k
        visits_per_expert = F.one_hot(chosen_Nk, len(self.experts)).sum((0, 1)).tolist()
        inputs = x_ND[tokens].split(visits_per_expert)
        # An expert without tokens is called all the same, so that every process trains the same parameters.
        outputs = torch.cat([expert(x) for expert, x in zip(self.experts, inputs, strict=True)])
        outputs = outputs * weights_Nk.flatten()[order, None].type_as(outputs)
        return torch.zeros_like(x_ND, dtype=outputs.dtype).index_add(0, tokens, outputs)


def routing(scores_BTE: Tensor, chosen_BTk: Tensor, real_BT: Tensor | None, per_row: bool) -> Routing:
    """Balance Σ_i f_i P_i: f_i is E/k times expert i's share of the tokens, P_i its mean score (DeepSeek-V2, eq. 23).

    Only P has a gradient: it lowers the scores of the experts that are visited most.
    """
    B, T, E = scores_BTE.shape
    k = chosen_BTk.shape[-1]
    real = scores_BTE.new_ones(B, T) if real_BT is None else real_BT.to(scores_BTE.dtype)
    visits_BTE = F.one_hot(chosen_BTk, E).sum(2) * real[:, :, None]
    visits_BE, scores_BE, tokens_B1 = visits_BTE.sum(1), (scores_BTE * real[:, :, None]).sum(1), real.sum(1)[:, None]
    load = visits_BE.sum(0) / (k * real.sum().clamp(min=1))
    if not per_row:
        visits_BE, scores_BE, tokens_B1 = (x.sum(0).expand(B, -1) for x in (visits_BE, scores_BE, tokens_B1))
    tokens_B1 = tokens_B1.clamp(min=1)  # a row, or all of them, may be nothing but padding
    f = visits_BE * E / (k * tokens_B1)
    P = scores_BE / tokens_B1
    return Routing((f * P).sum(-1), load)


class Block(GradientCheckpointingLayer):
    """x + attention(norm(x)), then x + feed_forward(norm(x))."""

    def __init__(self, config: LMConfig, layer_index: int):
        super().__init__()
        self.attention_norm = RMSNorm(config.dim, config.norm_eps)
        self.attention = Attention(config, layer_index)
        self.ffn_norm = RMSNorm(config.dim, config.norm_eps)
        self.is_moe = config.use_moe
        if config.use_moe:
            self.feed_forward = MoEFeedForward(config)
        else:
            self.feed_forward = FeedForward(config.dim, config.hidden_dim, config.dropout)

    def forward(
        self,
        x: Tensor,
        turns: Tensor,
        mask: Tensor | Segments | None,
        real: Tensor | None,
        past_key_values: Cache | None,
        only: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns x, and the routing's balance and load, one by one: only so does reentrant checkpointing see them.

        `only`: indices of the tokens that are needed after the attention, and returned; None: all.
        """
        x = x + self.attention(self.attention_norm(x), turns, mask, past_key_values)
        if only is not None:
            x, real = x[:, only], None if real is None else real[:, only]
        if self.is_moe:
            y, routing = self.feed_forward(self.ffn_norm(x), real)
            return x + y, routing.balance, routing.load
        return x + self.feed_forward(self.ffn_norm(x)), None, None


class OutputHead(Linear):
    """Hidden states -> logits, or with labels straight to the summed loss."""

    def __init__(self, config: LMConfig):
        super().__init__(config.dim, config.vocab_size)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        if labels is None:
            return super().forward(x)  # B T V
        x, labels = x.flatten(0, -2), labels.flatten()
        if x.device.type == "cpu" and not torch.compiler.is_compiling():
            # Only answers are trained in fine-tuning. (Where a GPU would have to wait for the count, or a compiler not
            # know the shape, untrained tokens cost their logits and are multiplied by 0.)
            trained, order = (labels != IGNORED_LABEL).sort(stable=True)  # untrained ones first
            kept = order[-TOKEN_STEP * math.ceil(int(trained.sum()) / TOKEN_STEP) :]
            x, labels = x[kept], labels[kept]
        return SummedCrossEntropy.apply(x, self.weight, labels, torch.is_grad_enabled())


@dataclass
class LMOutput(ModelOutput):
    """What `Transformer` returns; what was not asked for is None."""

    loss: Tensor | None = None  # scalar, the balance loss included
    logits: Tensor | None = None  # [B, T, V]; None where labels were given
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None  # n_layers + 1 of [B, T, D]: before each block, and the last one
    last_hidden_state: Tensor | None = None  # [B, T, D], after the final norm
    aux_loss: Tensor | None = None  # scalar, the balance loss alone, weighted as it is in `loss`
    expert_load: Tensor | None = None  # [n_layers, E] share of the visits; 1/E everywhere is even


class Transformer(PreTrainedModel, GenerationMixin):
    """The language model. Embedding and output head are one matrix."""

    config_class = LMConfig
    _tied_weights_keys = {"output.weight": "tok_embeddings.weight"}
    _no_split_modules = ["Block"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: LMConfig):
        super().__init__(config)
        self.tok_embeddings = nn.Embedding(config.vocab_size, config.dim)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.n_layers))
        self.norm = RMSNorm(config.dim, config.norm_eps)
        self.output = OutputHead(config)
        self.post_init()  # fresh weights, tied head

    def get_input_embeddings(self) -> nn.Module:
        return self.tok_embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.tok_embeddings = value

    def get_output_embeddings(self) -> nn.Module:
        return self.output

    def set_output_embeddings(self, value: nn.Module) -> None:
        self.output = value

    def _init_weights(self, module: nn.Module) -> None:
        """Normal weights. Matrices: √(2 / 5 dim), larger in narrow models (Nguyen and Salazar 2019), and smaller where
        they write to the residual stream, as 2·n_layers of them add up there (GPT-2)."""
        if isinstance(module, nn.Embedding | OutputHead):  # one matrix; small, so that all tokens begin as likely
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        elif isinstance(module, nn.Linear):
            std = (2 / (5 * self.config.dim)) ** 0.5
            if getattr(module, "is_residual_output", False):
                std /= (2 * self.config.n_layers) ** 0.5
            init.normal_(module.weight, mean=0.0, std=std)
        elif isinstance(module, RMSNorm):
            init.ones_(module.weight)

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool = False,
        output_hidden_states: bool = False,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        cu_seq_lens_q: Tensor | None = None,
        **kwargs,  # generation and trainers hand over more than a plain decoder has a use for
    ) -> LMOutput:
        """Token ids [B, T] -> logits, or with `labels` the loss.

        Args:
            attention_mask: [B, S], 0 at padding (on either side), earlier tokens of the cache included.
            position_ids: [B, T]; packed segments (`visible_keys`) begin where one is not its predecessor plus one.
            labels: [B, T], the same as input_ids, -100 where nothing is to be learnt; shifted here.
            logits_to_keep: how many of the last positions get logits; 0 means all. Or the indices of those that do: the
                last block then leaves out what it can of the others, and last_hidden_state all of them.
            num_items_in_batch: trained tokens of the global batch, which divide the summed loss; default: this call's.
            cu_seq_lens_q: [N + 1] of int32, where `takes_varlen`: the flattened batch's segments begin there, or end.
                Or for a single row with a cache: each of its segments comes after all that the cache holds.
        """
        x = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds  # B T D
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        placing = self.placing(x, attention_mask, position_ids, past_key_values, cu_seq_lens_q)
        x = F.dropout(x, self.config.dropout, self.training)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        only = kept if isinstance(kept, Tensor) and labels is None and not output_hidden_states else None
        hidden_states = [] if output_hidden_states else None
        x, balances, loads = self.through_blocks(x, placing, past_key_values, only, hidden_states)
        x = self.norm(x)
        logits = self.output(x[:, kept] if only is None else x) if labels is None else None
        loss, aux_loss = (None, None) if labels is None else self.losses(x, labels, balances, num_items_in_batch)
        return LMOutput(
            loss=loss,
            logits=logits,
            past_key_values=past_key_values,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
            last_hidden_state=x,
            aux_loss=aux_loss,
            expert_load=torch.stack(loads) if self.config.use_moe else None,
        )

    def through_blocks(
        self, x: Tensor, placing: tuple, cache: Cache | None, only: Tensor | None, hidden_states: list[Tensor] | None
    ) -> tuple[Tensor, list[Tensor | None], list[Tensor | None]]:
        """x after the last block, there of the tokens `only`, if not None; and each block's balance and load.

        hidden_states: a list takes x before each block.
        """
        balances, loads = [], []
        for layer in self.layers:
            if hidden_states is not None:
                hidden_states.append(x)
            only_here = only if layer is self.layers[-1] else None
            x, balance, load = layer(x, *placing, past_key_values=cache, only=only_here)
            balances.append(balance)
            loads.append(load)
        return x, balances, loads

    def placing(
        self,
        x: Tensor,
        attention_mask: Tensor | None,
        position_ids: Tensor | None,
        cache: Cache | None,
        cu_seq_lens: Tensor | None,
    ) -> tuple[Tensor, Tensor | Segments | None, Tensor | None]:
        """Where tokens stand, for every block: RoPE's rotations, which keys are seen, which tokens are real."""
        past = cache.get_seq_length() if cache is not None else 0
        T = x.shape[1]
        if cu_seq_lens is None:
            mask = visible_keys(T, past, attention_mask, position_ids, x.device)
        else:
            mask = Segments(cu_seq_lens, T)  # no segment is longer than a row
        real = attention_mask[:, -T:] if attention_mask is not None and attention_mask.dim() == 2 else None
        if position_ids is None:
            position_ids = default_positions(T, past, attention_mask if real is not None else None, x.device)
        config = self.config
        turns = rotary_turns(position_ids, config.dim // config.n_heads, config.rope_theta, config.rope_factor)
        return turns, mask, real

    def losses(
        self, x: Tensor, labels: Tensor, balances: list[Tensor | None], num_items: int | Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """The loss, and of a mixture of experts the balance loss in it.

        A row's balance counts with its trained tokens / num_items, as its cross-entropy does: so the loss of a global
        batch does not depend on how its rows are spread over processes and micro-batches.
        """
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORED_LABEL)  # what comes next; nothing after the last token
        trained_per_row = (labels != IGNORED_LABEL).sum(-1)  # B
        if num_items is None:
            num_items = trained_per_row.sum().clamp(min=1)
        loss = self.output(x, labels) / num_items
        if not self.config.use_moe:
            return loss, None
        balance = torch.stack(balances).sum(0)  # B, summed over layers
        aux_loss = self.config.aux_loss_alpha * (balance * trained_per_row).sum() / num_items
        return loss + aux_loss, aux_loss


def default_positions(T: int, past: int, attention_mask: Tensor | None, device: torch.device) -> Tensor:
    """Positions [B or 1, T] after `past` cached tokens; padding does not count."""
    if attention_mask is None:
        return torch.arange(past, past + T, device=device)[None]
    return (attention_mask.long().cumsum(-1) - 1).clamp(min=0)[:, -T:]


# save_pretrained copies this file and what it imports from here, so that the folder loads without this repository.
LMConfig.register_for_auto_class()
Transformer.register_for_auto_class("AutoModelForCausalLM")
