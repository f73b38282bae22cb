"""The model once more, in plain loops: one further token of each sequence, on a CPU.

For a single token, PyTorch spends more time on calling its hundreds of operations than a small model needs for them.
Here numba compiles them to machine code (once, in some seconds; it keeps the programs in __pycache__), and the weights
are read as fast as memory gives them. Prompts, many tokens at once, and other devices are `model.py`'s business:
`Decoder` works on the same weights and the same cache.

Letters in names and comments: B sequences, D model width, N H·d query features, M K·d key or value features, H query
heads, K key/value heads, d width of a head, S tokens that can be looked at, F feed-forward width, V vocabulary.
"""

import math
import threading
from functools import partial
from typing import TYPE_CHECKING

import numba
import numpy as np
import torch
from numba import njit, prange
from torch import Tensor, nn

from .model import Block, FeedForward, MoEFeedForward, Transformer, rotary_turns

if TYPE_CHECKING:
    from .generate import SlotCache

f32 = np.float32
# Sums in any order, as they fit the processor's vectors; NaN stays NaN.
OPTIONS = dict(cache=True, nogil=True, error_model="numpy", fastmath={"reassoc", "contract", "arcp", "nsz"})
compiled, compiled_for_all_cores = njit(**OPTIONS), njit(parallel=True, **OPTIONS)
one_at_a_time = threading.Lock()  # not all of numba's kinds of threads may be used from two others at once


# Of a linear layer: weight [outputs, inputs] of float32 or int8, and scale [outputs] by which each row is multiplied.
# (A plain tuple: numba takes its time to look into a class.)
Matrix = tuple[np.ndarray, np.ndarray]
Rows = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@compiled
def one_of_each_quarter(i: int, n: int) -> tuple[int, int, int, int]:
    """Of the numbers below n: the i-th of each quarter, or n - 1 where a quarter has no such."""
    quarter, last = (n + 3) // 4, n - 1
    return np.int64(i), min(i + quarter, last), min(i + 2 * quarter, last), min(i + 3 * quarter, last)


@compiled
def rows_at(places: tuple[int, int, int, int], matrix: np.ndarray) -> Rows:
    return matrix[places[0]], matrix[places[1]], matrix[places[2]], matrix[places[3]]


@compiled
def sums_of_one(rows: Rows, x: np.ndarray) -> tuple:
    """Four rows of a matrix times x."""
    w0, w1, w2, w3 = rows
    s0 = s1 = s2 = s3 = f32(0)
    for i in range(len(x)):
        s0, s1, s2, s3 = s0 + w0[i] * x[i], s1 + w1[i] * x[i], s2 + w2[i] * x[i], s3 + w3[i] * x[i]
    return s0, s1, s2, s3


@compiled
def sums_of_two(rows: Rows, x: np.ndarray, y: np.ndarray) -> tuple:
    """Four rows times x and times y: each number of a row that has come from memory is used twice."""
    w0, w1, w2, w3 = rows
    s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = f32(0)
    for i in range(len(x)):
        s0, s1, s2, s3 = s0 + w0[i] * x[i], s1 + w1[i] * x[i], s2 + w2[i] * x[i], s3 + w3[i] * x[i]
        t0, t1, t2, t3 = t0 + w0[i] * y[i], t1 + w1[i] * y[i], t2 + w2[i] * y[i], t3 + w3[i] * y[i]
    return (s0, s1, s2, s3), (t0, t1, t2, t3)


@compiled_for_all_cores
def product(x: np.ndarray, matrix: Matrix) -> np.ndarray:
    """x Wᵀ: [B, inputs] -> [B, outputs].

    Four rows of W at a time, a quarter of it apart: processors fetch ahead along a few long ways through memory.
    """
    weight, scale = matrix
    B, outputs = len(x), len(weight)
    y = np.empty((B, outputs), f32)
    for i in prange((outputs + 3) // 4):
        places = one_of_each_quarter(i, outputs)
        rows = rows_at(places, weight)
        for b in range(0, B - 1, 2):
            one, other = sums_of_two(rows, x[b], x[b + 1])
            for j in range(4):
                y[b, places[j]], y[b + 1, places[j]] = one[j] * scale[places[j]], other[j] * scale[places[j]]
        if B % 2:
            one = sums_of_one(rows, x[B - 1])
            for j in range(4):
                y[B - 1, places[j]] = one[j] * scale[places[j]]
    return y


@compiled
def rms_norm(x_BD: np.ndarray, weight_D: np.ndarray, eps: float) -> np.ndarray:
    y_BD = np.empty_like(x_BD)
    for b in range(len(x_BD)):
        squares = f32(0)
        for value in x_BD[b]:
            squares += value * value
        factor = f32(1 / math.sqrt(squares / x_BD.shape[1] + eps))
        y_BD[b] = x_BD[b] * factor * weight_D
    return y_BD


@compiled
def rotate(x_BN: np.ndarray, cos_Bj: np.ndarray, sin_Bj: np.ndarray) -> None:
    """RoPE on the heads of q or k, side by side in N = heads · d: each pair of neighbours is turned. In place."""
    half = cos_Bj.shape[1]
    for b in range(len(x_BN)):
        for pair in range(x_BN.shape[1] // 2):
            cos, sin = cos_Bj[b, pair % half], sin_Bj[b, pair % half]
            real, imaginary = x_BN[b, 2 * pair], x_BN[b, 2 * pair + 1]
            x_BN[b, 2 * pair] = real * cos - imaginary * sin
            x_BN[b, 2 * pair + 1] = real * sin + imaginary * cos


@compiled
def exp(x: np.float32) -> np.float32:
    """e^x, to 5 parts in a million, for x from -87 to 87: e^x = 2^n e^r with a whole n, and Taylor's series for r.

    The library's own cannot be computed for several numbers at once.
    """
    x = min(max(x, f32(-87)), f32(87))
    n = np.floor(x * f32(1 / math.log(2)) + f32(0.5))
    r = x - n * f32(math.log(2))
    series = f32(1 / 24) + r * (f32(1 / 120) + r * f32(1 / 720))
    series = f32(1) + r * (f32(1) + r * (f32(1 / 2) + r * (f32(1 / 6) + r * series)))
    power_of_two = np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(f32)  # n is a float's exponent
    return series * power_of_two


@compiled
def attend_to(keys_Sd: np.ndarray, values_Sd: np.ndarray, q_Gd: np.ndarray, y_Gd: np.ndarray) -> None:
    """softmax(q kᵀ / √d) v, added to y, for the G query heads that share these keys and values.

    Four positions at a time, a quarter of S apart, as in `product`: what has come from memory serves all G heads.
    """
    (S, d), G, quarter = keys_Sd.shape, len(q_Gd), (len(keys_Sd) + 3) // 4
    weights_Gjs = np.empty((G, 4, quarter), f32)  # of the s-th position of the j-th quarter
    for s in range(quarter):
        rows = rows_at(one_of_each_quarter(s, S), keys_Sd)
        for g in range(G):
            sums = sums_of_one(rows, q_Gd[g])
            for j in range(4):
                weights_Gjs[g, j, s] = sums[j]
    for g in range(G):
        softmax(weights_Gjs[g].ravel(), S, f32(1 / math.sqrt(d)))
    for s in range(quarter):
        v0, v1, v2, v3 = rows_at(one_of_each_quarter(s, S), values_Sd)
        for g in range(G):
            y, (w0, w1, w2, w3) = y_Gd[g], weights_Gjs[g, :, s]
            for i in range(d):
                y[i] += w0 * v0[i] + w1 * v1[i] + w2 * v2[i] + w3 * v3[i]


@compiled
def softmax(x: np.ndarray, S: int, factor: np.float32) -> None:
    """Of factor · x, in place. What stands behind the first S numbers becomes 0."""
    highest, total = x[:S].max(), f32(0)
    for s in range(S):
        x[s] = exp((x[s] - highest) * factor)
        total += x[s]
    x[:S] /= total
    x[S:] = 0


@compiled_for_all_cores
def attend(
    q_BN: np.ndarray, k_BM: np.ndarray, v_BM: np.ndarray, keys: np.ndarray, values: np.ndarray, positions_B: np.ndarray
) -> np.ndarray:
    """Stores k and v in the cache, [B, K, S, d] each, and returns softmax(q kᵀ / √d) v for all H heads, [B, H·d]."""
    B, (K, _, d) = len(q_BN), keys.shape[1:]
    q_BKGd, k_BKd, v_BKd = q_BN.reshape(B, K, -1, d), k_BM.reshape(B, K, d), v_BM.reshape(B, K, d)
    y_BKGd = np.zeros_like(q_BKGd)
    for job in prange(B * K):
        b, head = job // K, job % K
        S = positions_B[b] + 1
        keys[b, head, S - 1], values[b, head, S - 1] = k_BKd[b, head], v_BKd[b, head]
        attend_to(keys[b, head, :S], values[b, head, :S], q_BKGd[b, head], y_BKGd[b, head])
    return y_BKGd.reshape(q_BN.shape)


@compiled
def attention(
    x_BD: np.ndarray,
    norm_D: np.ndarray,
    matrices: tuple[Matrix, Matrix, Matrix, Matrix],
    cache: tuple[np.ndarray, np.ndarray],
    positions_B: np.ndarray,
    turns: tuple[np.ndarray, np.ndarray],
    eps: float,
) -> np.ndarray:
    """x + attention(norm(x)), the first half of a block."""
    (wq, wk, wv, wo), (keys, values), (cos_Bj, sin_Bj) = matrices, cache, turns
    normed_BD = rms_norm(x_BD, norm_D, eps)
    q_BN, k_BM, v_BM = product(normed_BD, wq), product(normed_BD, wk), product(normed_BD, wv)
    rotate(q_BN, cos_Bj, sin_Bj)
    rotate(k_BM, cos_Bj, sin_Bj)
    return x_BD + product(attend(q_BN, k_BM, v_BM, keys, values, positions_B), wo)


@compiled_for_all_cores
def gate(gates_BF: np.ndarray, values_BF: np.ndarray) -> np.ndarray:
    """silu(gates) · values, in the place of gates."""
    gates, values = gates_BF.ravel(), values_BF.ravel()
    for i in prange(len(gates)):
        gates[i] *= values[i] / (f32(1) + exp(-gates[i]))
    return gates_BF


@compiled
def feed_forward(x_BD: np.ndarray, matrices: tuple[Matrix, Matrix, Matrix]) -> np.ndarray:
    """SwiGLU: w2(silu(w1 x) · w3 x)."""
    w1, w2, w3 = matrices
    return product(gate(product(x_BD, w1), product(x_BD, w3)), w2)


def takes_loops(model: Transformer) -> bool:
    """Whether `Decoder` is for this model: on a CPU, in float32."""
    return model.device.type == "cpu" and model.dtype == torch.float32


class Decoder:
    """A dense model or a mixture of experts, for one further token of the sequences in a cache."""

    def __init__(self, model: Transformer, cache: "SlotCache"):
        config, positions = model.config, torch.arange(cache.keys[0].shape[2])
        turns = rotary_turns(positions[None], config.dim // config.n_heads, config.rope_theta, config.rope_factor)
        self.cos_Sj, self.sin_Sj = turns[0, :, 0].real.numpy(), turns[0, :, 0].imag.numpy()
        self.eps = config.norm_eps
        self.embeddings, self.norm, self.head = array(model.tok_embeddings), array(model.norm), matrix(model.output)
        self.layers = [
            Layer(layer, keys, values)
            for layer, keys, values in zip(model.layers, cache.keys, cache.values, strict=True)
        ]
        self.threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)

    def __call__(self, ids: list[int], positions: list[int]) -> Tensor:
        """Reads a token of each sequence, which lie in the cache's first slots; logits [B, V]."""
        positions_B = np.array(positions)
        turns = self.cos_Sj[positions_B], self.sin_Sj[positions_B]
        with one_at_a_time:
            numba.set_num_threads(self.threads)
            x_BD = self.embeddings[ids]
            for layer in self.layers:
                x_BD = attention(x_BD, layer.attention_norm, layer.matrices, layer.cache, positions_B, turns, self.eps)
                x_BD = x_BD + layer.feed_forward(rms_norm(x_BD, layer.ffn_norm, self.eps))
            return torch.from_numpy(product(rms_norm(x_BD, self.norm, self.eps), self.head))


class Layer:
    """The numbers of a block, as numba wants them."""

    def __init__(self, block: Block, keys: Tensor, values: Tensor):
        attention = block.attention
        self.attention_norm, self.ffn_norm = array(block.attention_norm), array(block.ffn_norm)
        self.matrices = tuple(matrix(part) for part in (attention.wq, attention.wk, attention.wv, attention.wo))
        self.cache = keys.numpy(), values.numpy()  # slots K S d
        if isinstance(block.feed_forward, MoEFeedForward):
            self.feed_forward = Experts(block.feed_forward)
        else:
            self.feed_forward = partial(feed_forward, matrices=swiglu(block.feed_forward))


class Experts:
    """A mixture of experts, `MoEFeedForward`: an expert works once, for all sequences that visit it."""

    def __init__(self, mixture: MoEFeedForward):
        self.router, self.choose = array(mixture.gate), mixture.choose
        self.experts = [swiglu(expert) for expert in mixture.experts]
        self.shared = swiglu(mixture.shared_experts) if mixture.shared_experts is not None else None

    def __call__(self, x_BD: np.ndarray) -> np.ndarray:
        scores_BE = torch.from_numpy(x_BD @ self.router.T).softmax(-1)
        weights_Bk, chosen_Bk = (chosen.numpy() for chosen in self.choose(scores_BE))
        y_BD = np.zeros_like(x_BD) if self.shared is None else feed_forward(x_BD, self.shared)
        for expert in np.unique(chosen_Bk):
            visitors, places = np.nonzero(chosen_Bk == expert)
            y_BD[visitors] += weights_Bk[visitors, places, None] * feed_forward(x_BD[visitors], self.experts[expert])
        return y_BD


def array(module: nn.Module) -> np.ndarray:
    """Its weight, not copied."""
    return module.weight.detach().numpy()


def swiglu(module: FeedForward) -> tuple[Matrix, Matrix, Matrix]:
    return matrix(module.w1), matrix(module.w2), matrix(module.w3)


def matrix(module: nn.Module) -> Matrix:
    """Of a linear layer; copied only if it holds 8-bit numbers."""
    if isinstance(module, nn.Linear):
        return array(module), np.ones(module.out_features, f32)
    weight = module.weight()  # PyTorch's layer of 8-bit weights, with one scale for all
    return weight.int_repr().numpy(), np.full(module.out_features, weight.q_scale(), f32)
