"""The model: a Llama-3-style decoder, dense or with a DeepSeek-V2-style mixture of experts.

Letters in shape comments and names: B batch, T time (tokens of this call), S tokens that can be looked at (earlier
ones from the cache, then T), D model width, H query heads, K key/value heads, d width of a head, F feed-forward width,
E routed experts, k experts a token visits, V vocabulary, N = B·T.

Read it from top to bottom: the parts in the order in which a token meets them, then `Block`, then `Transformer`.
"""

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention.varlen import varlen_attn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import ModelOutput, can_return_tuple

from .LMConfig import LMConfig
from .products import TOKEN_STEP, Linear, product_over

IGNORED_LABEL = -100
LONG_ROW = 512  # tokens, from which on a CPU is faster without a mask over a row's segments
TOKENS_PER_CHUNK = 512  # of the loss: their logits (of 32,000 tokens: 66 MB) are the most that exist at once

# RoPE's rotations, made once a call: all that a compiled model has of complex numbers.
warnings.filterwarnings("ignore", "Torchinductor does not support code generation for complex", UserWarning)


def gradients_by_hand() -> bool:
    """Whether a gradient may be asked for, and no compiler is there to arrange it better than we do."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


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


def divided_by_rms(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x / rms(x), and 1 / rms(x) of each token in float32."""
    factor = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    return (x.float() * factor).type_as(x), factor


class RMSNormFunction(torch.autograd.Function):
    """RMSNorm with its gradient by hand, in half of autograd's time: s = x / rms(x), y = s · w gives
    dx = (dy · w - s · mean(dy · w · s)) / rms(x)."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        scaled, factor = divided_by_rms(x, eps)
        ctx.save_for_backward(scaled, factor, weight)
        y, device = scaled * weight, x.device.type
        # Under autocast all products round what they get: once for all of them, here.
        return y.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        scaled, factor, weight = ctx.saved_tensors
        grad = grad.float()
        each = grad * scaled
        mean = (each * weight).mean(-1, keepdim=True)
        x_grad = (grad * weight).addcmul_(scaled, mean, value=-1).mul_(factor).type_as(scaled)
        return x_grad, each.flatten(0, -2).sum(0).type_as(weight) if ctx.needs_input_grad[1] else None, None


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


def visible_keys(
    T: int, past: int, attention_mask: Tensor | None, position_ids: Tensor | None, device: torch.device
) -> Tensor | None:
    """Which keys each query may look at: bool [B or 1, 1, T, S]; None where plain causal attention is meant.

    `attention_mask` [B, S] marks padding with 0. Without one and without a cache, `position_ids` [B, T] tell packed
    segments apart: where a position is not its predecessor plus one, a new segment begins.
    """
    if attention_mask is not None and attention_mask.dim() == 4:
        return attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
    packed = attention_mask is None and position_ids is not None and past == 0
    if attention_mask is None and not packed and (past == 0 or T == 1):
        return None
    keys = torch.arange(past + T, device=device)
    queries = keys[past:, None]
    causal = keys <= queries  # T S
    if packed:
        starts = position_ids[:, 1:] != position_ids[:, :-1] + 1
        segments = F.pad(starts.cumsum(-1), (1, 0))  # B T
        return (causal & (segments[:, :, None] == segments[:, None, :]))[:, None]
    if attention_mask is not None:
        # A padded query sees at least itself: a softmax over nothing is not a number.
        return causal & (attention_mask[:, None, None, :].bool() | (keys == queries))
    return causal[None, None]


class Segments(NamedTuple):
    """Packed segments, for attention that skips what a mask would only hide."""

    cu_seq_lens: Tensor  # [N + 1], int32: where each of the N segments begins in the flattened batch, and the end
    longest: int  # tokens; none has more


def takes_varlen(config: LMConfig, device: torch.device, dtype: torch.dtype, T: int, compiled: bool) -> bool:
    """Whether rows of T packed tokens are attended to faster by segments, with `cu_seq_lens_q`, than with a mask.

    On a GPU by FlashAttention: in halves, since Ampere. On a CPU segment by segment, which pays where rows are long; a
    compiler would make a program for all lengths that it meets.
    """
    if not config.flash_attn or config.dropout:
        return False
    if device.type == "cpu":
        return T >= LONG_ROW and not compiled
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


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


def attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Segments | None, dropout: float) -> Tensor:
    """PyTorch's fused kernels (FlashAttention on a GPU): no [T, S] matrix in memory, no copies of k and v."""
    if isinstance(mask, Segments):
        return attend_segments(q, k, v, mask)
    # Branches, not values: a compiler that leaves sizes open can follow them.
    which = {"is_causal": True} if mask is None and q.shape[2] > 1 else {"attn_mask": mask}
    if q.shape[1] != k.shape[1]:
        if q.device.type == "cuda" and mask is not None:  # the kernel for masks there knows no groups
            k, v = without_groups(k, q), without_groups(v, q)
        else:
            which["enable_gqa"] = True
    if q.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
        # Going back, the kernel for CPUs takes four times as long in halves as it does in float32. (Without gradients,
        # too: what is computed again for a checkpoint, or by a reference model, has to come out the same.)
        with torch.autocast("cpu", enabled=False):
            return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), dropout_p=dropout, **which)
    return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, **which)


def without_groups(x: Tensor, q: Tensor) -> Tensor:
    """Keys or values [B, K, S, d], once for each query head: [B, H, S, d]."""
    return x.repeat_interleave(q.shape[1] // x.shape[1], dim=1)


def attend_segments(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """The same without a mask, for segments of any length side by side."""
    B, _, T, _ = q.shape
    attend = segment_by_segment if q.device.type == "cpu" else all_segments_at_once
    y = attend(*(x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)), segments)  # B·T H d
    return y.unflatten(0, (B, T)).transpose(1, 2)


def segment_by_segment(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    lengths = segments.cu_seq_lens.diff().tolist()
    each = zip(*(x.split(lengths) for x in (q, k, v)), strict=True)
    parts = [attend_fused(*(x.transpose(0, 1)[None] for x in one), None, 0.0) for one in each]  # 1 H t d
    return torch.cat([part[0].transpose(0, 1) for part in parts])


def all_segments_at_once(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """FlashAttention."""
    ends, longest = segments.cu_seq_lens, segments.longest
    return varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=True)  # causal


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """softmax(q kᵀ / √d) v, as in the textbook: what the fused kernel computes."""
    k, v = without_groups(k, q), without_groups(v, q)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # B H T S
    if mask is None:
        T, S = scores.shape[-2:]
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    weights = scores.masked_fill(~mask, float("-inf")).float().softmax(-1).type_as(q)
    return F.dropout(weights, dropout) @ v


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


def gate_values(gates: Tensor, values: Tensor) -> Tensor:
    """silu(gates) · values, in one piece of memory where no gradient needs both."""
    silu = F.silu(gates)
    return silu * values if silu.requires_grad else silu.mul_(values)


def kept_as_inputs(y: Tensor, function: Callable[..., Tensor], *inputs: Tensor) -> saved_tensors_hooks:
    """What reads y = function(*inputs) in here does not keep it until the gradient is due, but makes it anew."""

    def pack(kept: Tensor) -> Tensor | torch.Size:
        return kept.shape if kept.data_ptr() == address else kept

    def unpack(kept: Tensor | torch.Size) -> Tensor:
        return function(*inputs).view(kept) if isinstance(kept, torch.Size) else kept

    address, inputs = y.data_ptr(), tuple(x.detach() for x in inputs)  # y itself would be kept with `pack`
    return saved_tensors_hooks(pack, unpack)


class GateFunction(torch.autograd.Function):
    """`gate_values`, without keeping silu(gates) until the gradient is due."""

    @staticmethod
    def forward(ctx, gates: Tensor, values: Tensor) -> Tensor:
        ctx.save_for_backward(gates, values)
        return gate_values(gates, values)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        gates, values = ctx.saved_tensors
        silu_grad = grad * values
        gates_grad = torch.ops.aten.silu_backward.grad_input(silu_grad, gates, grad_input=silu_grad)  # takes its place
        return gates_grad, gate_values(gates, grad)


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
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns x, and the routing's balance and load, one by one: only so does reentrant checkpointing see them."""
        x = x + self.attention(self.attention_norm(x), turns, mask, past_key_values)
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


class SummedCrossEntropy(torch.autograd.Function):
    """Σ -log softmax(x Wᵀ)[label] over tokens whose label is not -100, without ever holding all logits.

    A chunk of tokens at a time: as long as its logits exist they give the loss and also the gradient, softmax minus
    one-hot; `backward` only scales what was kept. (With 6,400 tokens and more to choose from, logits are by far the
    largest tensor of a small model.) `training` is False where no gradient will be asked for, under torch.no_grad.
    """

    @staticmethod
    def forward(ctx, x_ND: Tensor, weight_VD: Tensor, labels_N: Tensor, training: bool) -> Tensor:
        x_grad, weight_grad = None, None
        if training and ctx.needs_input_grad[0]:
            x_grad = torch.empty_like(x_ND)
        if training and ctx.needs_input_grad[1]:
            weight_grad = torch.zeros_like(weight_VD, dtype=torch.float32)
        total = torch.zeros((), device=x_ND.device)
        weight = weight_VD.type_as(x_ND)  # under autocast once, not for each chunk
        for start in range(0, len(x_ND), TOKENS_PER_CHUNK):
            x, labels = x_ND[start : start + TOKENS_PER_CHUNK], labels_N[start : start + TOKENS_PER_CHUNK, None]
            trained = labels != IGNORED_LABEL
            labels = labels.where(trained, 0)
            logprobs = product_over(len(x), x, weight).float().log_softmax(-1)
            total -= (logprobs.gather(-1, labels) * trained).sum()
            if x_grad is None and weight_grad is None:
                continue
            error = logprobs.exp_()  # now the probabilities ...
            error.scatter_add_(-1, labels, torch.full_like(labels, -1, dtype=error.dtype))  # ... minus one-hot
            error = error.type_as(x)
            # Untrained tokens have no part in it: where they are few numbers, not where they are V each.
            if x_grad is not None:
                x_grad[start : start + TOKENS_PER_CHUNK] = product_over(len(x), error, weight.t()) * trained
            if weight_grad is not None:
                weight_grad += product_over(len(x), error.t(), (x * trained).t())
        ctx.save_for_backward(x_grad, weight_grad)
        ctx.weight_dtype = weight_VD.dtype
        return total

    @staticmethod
    def backward(ctx, scale: Tensor):
        x_grad, weight_grad = ctx.saved_tensors
        return (
            None if x_grad is None else (x_grad.float() * scale).type_as(x_grad),
            None if weight_grad is None else (weight_grad * scale).to(ctx.weight_dtype),
            None,
            None,
        )


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
            logits_to_keep: how many of the last positions get logits, or their indices; 0 means all.
            num_items_in_batch: trained tokens of the global batch, which divide the summed loss; default: this call's.
            cu_seq_lens_q: [N + 1] of int32, where `takes_varlen`: the flattened batch's segments begin there, or end.
        """
        x = self.tok_embeddings(input_ids) if inputs_embeds is None else inputs_embeds  # B T D
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.config)
        placing = self.placing(x, attention_mask, position_ids, past_key_values, cu_seq_lens_q)
        x = F.dropout(x, self.config.dropout, self.training)
        hidden_states, balances, loads = [], [], []
        for layer in self.layers:
            if output_hidden_states:
                hidden_states.append(x)
            x, balance, load = layer(x, *placing, past_key_values=past_key_values)
            balances.append(balance)
            loads.append(load)
        x = self.norm(x)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.output(x[:, kept]) if labels is None else None
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
