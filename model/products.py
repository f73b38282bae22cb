"""x Wᵀ, the product that nearly all work of the model is, at the speed that a CPU has.

PyTorch hands float32 products on a CPU to MKL, which leaves AVX-512 unused on AMD's processors and so takes up to twice
as long as it could there; oneDNN, which PyTorch brings along too, does not. Elsewhere MKL is about as fast or
faster. There, on other devices, in other precisions, and wherever autocast chooses, all of this is plain F.linear.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.symbolic_shapes import guard_or_false

TOKEN_STEP = 256  # products over multiples of so many tokens are fast ...
FEW_TOKENS = 16  # ... and those over so few


def mkl_is_slow() -> bool:
    """Whether this is a processor with AVX-512 that Intel has not made."""
    cpu = torch.cpu.get_capabilities()
    return bool(cpu.get("avx512_f")) and not cpu.get("cpu_name", "").startswith("Intel")


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies matrices of bfloat16 in hardware: GPUs since Ampere, some CPUs.

    Those are Intel's with AMX (Xeons since 2023) and AMD's since Zen 4 (2022), which have AVX512_BF16. Where PyTorch is
    told to do without AVX-512 (ATEN_CPU_CAPABILITY=avx2), it is to do without these, too.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    cpu = torch.cpu.get_capabilities()
    return cpu.get("amx_bf16", False) or cpu.get("avx512_bf16", False)


ONEDNN = torch.backends.mkldnn.is_available() and mkl_is_slow()


def takes_onednn(x: Tensor) -> bool:
    """Whether a product with x may go to oneDNN."""
    return ONEDNN and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


def onednn_product(x: Tensor, weight: Tensor) -> Tensor:
    if x.numel() == 0:  # which oneDNN refuses
        return x.new_zeros(*x.shape[:-1], len(weight))
    return torch.ops.mkldnn._linear_pointwise(x, weight, None, "none", [], "")


# The same under a name of its own: a compiler takes oneDNN's for weights that never change only. A process may load a
# copy of this file, too, from a saved folder: to define it twice would pull it away from under those that call it.
if not hasattr(torch.ops.minimind, "product"):
    definition = torch.library.custom_op("minimind::product", onednn_product, mutates_args=())
    definition.register_fake(lambda x, weight: x.new_empty(*x.shape[:-1], len(weight)))
compiled_product = torch.ops.minimind.product


def product(x: Tensor, weight: Tensor) -> Tensor:
    """x Wᵀ, without gradients: x [..., I], weight [O, I] -> [..., O].

    oneDNN keeps a program, and megabytes, for each shape that it meets: this is for shapes that come again and again.
    """
    if not takes_onednn(x) or not x.dtype == weight.dtype == torch.float32:
        return F.linear(x, weight)
    return compiled_product(x, weight) if torch.compiler.is_compiling() else onednn_product(x, weight)


def product_over(tokens: int, x: Tensor, weight: Tensor) -> Tensor:
    """`product`, if so many tokens are usual: full rows in training, a token for each stream in generation.

    (To a compiler, how many tokens visit an expert is not known: not usual.)
    """
    usual = guard_or_false(tokens <= FEW_TOKENS) or guard_or_false(tokens % TOKEN_STEP == 0)
    return product(x, weight) if usual else F.linear(x, weight)


def missing_tokens(tokens: int, weight: Tensor) -> int:
    """How many more tokens make their products with `weight` usual ones, where that matters."""
    return -tokens % TOKEN_STEP if takes_onednn(weight) and tokens > FEW_TOKENS else 0


class LinearFunction(torch.autograd.Function):
    """x Wᵀ and its gradients, which are products of the same kind."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return product_over(x.numel() // x.shape[-1], x, weight)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        tokens, x_grad, weight_grad = x.numel() // x.shape[-1], None, None
        if ctx.needs_input_grad[0]:
            x_grad = product_over(tokens, grad, weight.t())
        if ctx.needs_input_grad[1]:
            weight_grad = product_over(tokens, grad.flatten(0, -2).t(), x.flatten(0, -2).t())
        return x_grad, weight_grad


class Linear(nn.Linear):
    """nn.Linear without a bias, faster on a CPU."""

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not takes_onednn(x):
            return super().forward(x)
        if not torch.is_grad_enabled():  # an autograd function costs more than it looks, for a token at a time
            return product_over(x.numel() // x.shape[-1], x, self.weight)
        return LinearFunction.apply(x, self.weight)
