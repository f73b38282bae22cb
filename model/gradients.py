"""Gradients by hand, where autograd's take more time or memory: RMSNorm's, SwiGLU's, and those of the loss.

All this is for speed alone. Letters as in model.py: N tokens, D model width, V vocabulary.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks

from .LMConfig import IGNORED_LABEL
from .products import product_over

TOKENS_PER_CHUNK = 512  # of the loss: their logits (of 32,000 tokens: 66 MB) are the most that exist at once


def gradients_by_hand() -> bool:
    """Whether a gradient may be asked for, and no compiler is there to arrange it better than we do."""
    return torch.is_grad_enabled() and not torch.compiler.is_compiling()


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
