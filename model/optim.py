"""Which parameter gets which optimizer, and how the learning rate moves."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .products import product

ADAM_BETAS = (0.9, 0.95)
EMBEDDING_FACTOR = 8.0  # beside Muon, embedding and norms learn best at so many times the matrices' learning rate


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is replaced by the nearest (semi-)orthogonal matrix (Jordan et al. 2024).

    The update is scaled to the typical size of AdamW's (0.2 in root mean square, Liu et al. 2025, "Muon is scalable"),
    so one learning rate and one weight decay serve both. torch.optim.Muon does the same in bfloat16 only, which takes
    seconds a step on a CPU; here the iteration runs in bfloat16 on a GPU and in float32 elsewhere.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float = 0.0):
        super().__init__(params, dict(lr=lr, weight_decay=weight_decay, lr_scale=1.0, steps=0))

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            momentum = 0.85 + 0.1 * min(1.0, group["steps"] / 100)  # early gradients soon are out of date
            group["steps"] += 1
            updates: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    update = self.nesterov_momentum(parameter, momentum)
                    updates.setdefault(parameter.shape, []).append((parameter, update))
            for shape, pairs in updates.items():  # matrices of one shape in one batch: fewer, larger products
                size = 0.2 * max(shape) ** 0.5
                orthogonal = orthogonalize(torch.stack([update for _, update in pairs]))
                for (parameter, _), update in zip(pairs, orthogonal, strict=True):
                    parameter.mul_(1 - group["lr"] * group["weight_decay"])
                    parameter.add_(update.type_as(parameter), alpha=-group["lr"] * size)

    def nesterov_momentum(self, parameter: Tensor, momentum: float) -> Tensor:
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)


def orthogonalize(G: Tensor, steps: int = 5) -> Tensor:
    """[…, m, n] -> U Vᵀ of its singular value decomposition, nearly: singular values end between 0.7 and 1.2.

    Newton-Schulz iteration with a quintic whose coefficients make small singular values grow fastest (Jordan 2024).
    """
    a, b, c = 3.4445, -4.7750, 2.0315
    X = G.bfloat16() if G.is_cuda else G.float()
    tall = X.shape[-2] > X.shape[-1]
    if tall:
        X = X.mT
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # now no singular value is above 1
    for _ in range(steps):
        A = times(X, X)
        X = a * X + times(b * A + c * times(A, A), X.mT)  # A is symmetric
    return X.mT if tall else X


def times(A: Tensor, B: Tensor) -> Tensor:
    """A Bᵀ, of matrices or of stacks of them, which a CPU takes one by one: `product` is faster than a batch there."""
    if A.dim() == 2:
        return product(A, B)
    return torch.stack([times(*pair) for pair in zip(A, B, strict=True)]) if A.device.type == "cpu" else A @ B.mT


def build_optimizers(
    model: nn.Module, name: str, learning_rate: float, weight_decay: float
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks and AdamW for embedding and norms, or AdamW for all.

    The embedding (which is the head, too) is a table of rows rather than a map, and norms are vectors: neither has a
    use for Muon. Vectors are not decayed. A group's `lr_scale` says how its learning rate relates to the others'.
    """
    parameters = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    muon, decayed, plain = [], [], []
    for key, parameter in parameters:
        if parameter.dim() < 2:
            plain.append(parameter)
        elif name == "muon" and "tok_embeddings" not in key and not key.startswith("output."):
            muon.append(parameter)
        else:
            decayed.append(parameter)
    scale = EMBEDDING_FACTOR if muon else 1.0
    groups = [
        dict(params=params, weight_decay=decay, lr_scale=scale)
        for params, decay in ((decayed, weight_decay), (plain, 0.0))
        if params
    ]
    optimizers: list[torch.optim.Optimizer] = []
    if muon:
        optimizers.append(Muon(muon, lr=learning_rate, weight_decay=weight_decay))
    if groups:
        fused = all(p.device.type in ("cpu", "cuda") for _, p in parameters)
        optimizers.append(torch.optim.AdamW(groups, lr=learning_rate, betas=ADAM_BETAS, fused=fused))
    return optimizers


def learning_rate_factor(step: int, steps: int, warmup: int, schedule: str, floor: float = 0.0) -> float:
    """Share of the peak learning rate at a step (from 0): linear warm-up, then down to `floor`.

    "cosine" falls all the way; "wsd" (warm-up, stable, decay) stays at the peak and falls linearly over the last fifth,
    so a run can be prolonged from its stable part (Hu et al. 2024). To zero is better than to the usual tenth: the last
    steps settle what the earlier ones have found (Bergsma et al. 2025, "Straight to zero").
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)  # 0 at the peak, 1 after the last step
    if schedule == "wsd":
        return 1 - (1 - floor) * max(0.0, (progress - 0.8) / 0.2)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
