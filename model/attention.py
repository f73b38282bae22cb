"""Which keys a query looks at, and softmax(q kᵀ / √d) v by the fastest kernel that the device has for it.

Letters as in model.py: B batch, T time (queries), S keys, H query heads, K key/value heads, d width of a head.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from .LMConfig import LMConfig

LONG_ROW = 512  # tokens, from which on a CPU is faster without a mask over a row's segments


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

    On a GPU by FlashAttention: in halves, since Ampere, with heads of such widths. On a CPU segment by segment, which
    pays where rows are long; a compiler would make a program for all lengths that it meets.
    """
    if not config.flash_attn or config.dropout:
        return False
    if device.type == "cpu":
        return T >= LONG_ROW and not compiled
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16):
        return False
    head_dim = config.dim // config.n_heads
    return head_dim % 8 == 0 and head_dim <= 256 and torch.cuda.get_device_capability(device) >= (8, 0)


def attend_fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Segments | None, dropout: float) -> Tensor:
    """PyTorch's fused kernels (FlashAttention on a GPU): no [T, S] matrix in memory, no copies of k and v."""
    if isinstance(mask, Segments):
        return attend_segments(q, k, v, mask, attend_fused)
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


def attend_segments(q: Tensor, k: Tensor, v: Tensor, segments: Segments, attend: Callable[..., Tensor]) -> Tensor:
    """The same without a mask, for segments of any length side by side, by `attend` where each takes its turn.

    Of a single row there may be more keys than queries, from a cache: those come before each of its segments.
    """
    B, _, T, _ = q.shape
    past = k.shape[2] - T
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (q, k, v))  # B·T H d, B·(past + T) K d
    if q.device.type == "cuda" and not past:
        y = all_segments_at_once(q, k, v, segments)
    else:
        y = segment_by_segment(q, k, v, segments, attend)
    return y.unflatten(0, (B, T)).transpose(1, 2)


@torch.compiler.disable  # it would make a program for all lengths that it meets
def segment_by_segment(q: Tensor, k: Tensor, v: Tensor, segments: Segments, attend: Callable[..., Tensor]) -> Tensor:
    lengths = segments.cu_seq_lens.diff().tolist()
    past = len(k) - len(q)
    parts = []
    for one in zip(q.split(lengths), *(split_after(past, x, lengths) for x in (k, v)), strict=True):
        one_q, one_k, one_v = (x.transpose(0, 1)[None] for x in one)  # 1 H t d, 1 K past+t d
        mask = visible_keys(one_q.shape[2], past, None, None, q.device)
        parts.append(attend(one_q, one_k, one_v, mask, 0.0)[0].transpose(0, 1))
    return torch.cat(parts)


def split_after(past: int, x: Tensor, lengths: list[int]) -> list[Tensor]:
    """Parts of such lengths, each after a copy of the first `past` keys or values."""
    beginning, *parts = x.split([past, *lengths])
    return [torch.cat((beginning, part)) for part in parts] if past else parts


def all_segments_at_once(q: Tensor, k: Tensor, v: Tensor, segments: Segments) -> Tensor:
    """FlashAttention."""
    ends, longest = segments.cu_seq_lens, segments.longest
    return varlen_attn(q, k, v, ends, ends, longest, longest, window_size=(-1, 0), enable_gqa=True)  # causal


def attend_plainly(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | Segments | None, dropout: float) -> Tensor:
    """softmax(q kᵀ / √d) v, as in the textbook: what the fused kernel computes."""
    if isinstance(mask, Segments):
        return attend_segments(q, k, v, mask, attend_plainly)
    k, v = without_groups(k, q), without_groups(v, q)
    scores = q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5  # B H T S
    if mask is None:
        T, S = scores.shape[-2:]
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    weights = scores.masked_fill(~mask, float("-inf")).float().softmax(-1).type_as(q)
    return F.dropout(weights, dropout) @ v
