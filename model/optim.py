"""Which parameter gets which optimizer, and how the learning rate moves."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .products import has_bfloat16, product, takes_onednn

ADAM_BETAS = (0.9, 0.95)
EMBEDDING_FACTOR = 8.0  # beside Muon, embedding and norms learn best at so many times the matrices' learning rate


class Muon(torch.optim.Optimizer):
    """Momentum whose update of a matrix is replaced by the nearest (semi-)orthogonal matrix (Jordan et al. 2024).

    The update is scaled to the typical size of AdamW's (0.2 in root mean square, Liu et al. 2025, "Muon is scalable"),
    so one learning rate and one weight decay serve both. torch.optim.Muon does the same, but one matrix after another
    and always in bfloat16, which takes seconds a step on most CPUs.
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

    Newton-Schulz iteration X <- factor(X Xᵀ) X, with factors whose coefficients make small singular values grow
    fastest (Jordan 2024). In bfloat16, as published, where the device is made for it (in a run in float32, too: what
    an update is rounded by does no harm), else with fewer products.
    """
    tall = G.shape[-2] > G.shape[-1]
    X = G.float().mT if tall else G.float()
    X = X / (X.norm(dim=(-2, -1), keepdim=True) + 1e-7)  # now no singular value is above 1
    X = iterate_in_bfloat16(X, steps) if has_bfloat16(G.device) else iterate_factors(X, steps)
    return X.mT if tall else X


def iterate_in_bfloat16(X: Tensor, steps: int) -> Tensor:
    X = X.bfloat16()
    for _ in range(steps):
        X = quintic_factor(X @ X.mT) @ X
    return X


def iterate_factors(X: Tensor, steps: int) -> Tensor:
    """All factors are polynomials of the first A = X Xᵀ, so they are symmetric and commute, and the A of the next X is
    A factor²: X, the larger matrix, need not be touched until all factors are known. As A squares what X has been
    rounded by, this has to be done in float32."""
    A = times(X, X.mT)
    factors = factor = quintic_factor(A)
    for _ in range(steps - 1):
        A = times(times(A, factor), factor)
        factor = quintic_factor(A)
        factors = times(factors, factor)
    return times(factors, X)


def quintic_factor(A: Tensor) -> Tensor:
    """a + b A + c A²."""
    factor = (-4.7750 * A).add_(times(A, A), alpha=2.0315)
    factor.diagonal(dim1=-2, dim2=-1).add_(3.4445)
    return factor


def times(A: Tensor, B: Tensor) -> Tensor:
    """A B, of matrices or of stacks of them, which oneDNN takes one by one."""
    if not takes_onednn(A):
        return A @ B
    return product(A, B.mT) if A.dim() == 2 else torch.stack([product(a, b.mT) for a, b in zip(A, B, strict=True)])


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
