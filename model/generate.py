"""Token ids in, token ids out: the key/value cache, and the only sampling code of the project.

The model gives the logits of the next token, a `Sampler` chooses it; each sequence has a sampler of its own, so that
what one caller asks for cannot change another's answer.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from math import inf

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import Cache

from .cli import UserError
from .model import Transformer

GREEDY_BELOW = 1e-5  # logits divided by less than this would overflow


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one answer are chosen; by default at random, as probable as the model finds them.

    Raises:
        UserError: a value outside its range.
    """

    temperature: float = 1.0  # logits are divided by it; 0: always the most probable token
    top_k: int = 0  # choose among the k most probable tokens; 0: among all
    top_p: float = 1.0  # choose among the fewest tokens that together have this probability
    repetition_penalty: float = 1.0  # above 1: tokens of prompt and answer become less probable
    max_new_tokens: int = 256  # longest answer; the prompt does not count
    seed: int | None = None  # the same seed gives the same answer; None: another one each time

    def __post_init__(self):
        in_range = {
            "temperature": (0 <= self.temperature < inf, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (0 < self.repetition_penalty < inf, "above 0"),
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "between 0 and 2**63 - 1"),
        }
        for name, (fits, wanted) in in_range.items():
            if not fits:
                raise UserError(f"{name} is {getattr(self, name)}, but must be {wanted}")


def generate(
    model: Transformer, prompt_ids: Sequence[int], sampling: Sampling, stop_ids: Collection[int] = ()
) -> Iterator[int]:
    """The ids that follow the prompt, each as soon as it is chosen; one of `stop_ids` is the last."""
    sampler = Sampler(sampling, prompt_ids, model.config.vocab_size, model.device)
    cache = DynamicCache(config=model.config)
    ids = prompt_ids
    for _ in range(sampling.max_new_tokens):
        token = sampler.choose(next_logits(model, ids, cache))
        yield token
        if token in stop_ids:
            return
        ids = [token]


# A decorator on each step, not a `with` round the loop: that would stay switched on for the caller between two tokens.
@torch.inference_mode()
def next_logits(model: Transformer, ids: Sequence[int], cache: Cache) -> Tensor:
    """Feeds ids behind what the cache holds; logits [V] of the token after them, in float32."""
    input_ids = torch.tensor([ids], device=model.device)
    output = model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return output.logits[0, -1].float()


class Sampler:
    """Chooses the tokens of one sequence: knows which ones have occurred, and has its own source of chance."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], vocab_size: int, device: torch.device):
        self.sampling = sampling
        self.penalties_V = torch.ones(vocab_size, device=device)
        self.penalties_V[list(prompt_ids)] = sampling.repetition_penalty
        self.generator = torch.Generator(device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    @torch.inference_mode()
    def choose(self, logits_V: Tensor) -> int:
        """The next token, given its logits."""
        if self.sampling.repetition_penalty != 1:
            logits_V = penalize(logits_V, self.penalties_V)
        if self.sampling.temperature < GREEDY_BELOW:
            token = int(logits_V.argmax())
        else:
            probabilities_C, ids_C = candidates(logits_V, self.sampling)
            token = int(ids_C[torch.multinomial(probabilities_C, 1, generator=self.generator)])
        self.penalties_V[token] = self.sampling.repetition_penalty
        return token


def penalize(logits_V: Tensor, penalties_V: Tensor) -> Tensor:
    """Lowers logits by a factor, whatever their sign (Keskar et al. 2019 divide, which raises negative ones)."""
    return torch.where(logits_V < 0, logits_V * penalties_V, logits_V / penalties_V)


def candidates(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """What temperature, then top_k, then top_p leave to choose from.

    Returns:
        Probabilities [C], most probable first, 0 where top_p cuts (so their sum can be below 1), and their ids [C].
    """
    k = min(sampling.top_k or len(logits_V), len(logits_V))
    logits_C, ids_C = (logits_V / sampling.temperature).topk(k)
    probabilities_C = logits_C.softmax(-1)
    if sampling.top_p < 1:
        more_probable_C = probabilities_C.cumsum(-1) - probabilities_C  # what the tokens before have together
        probabilities_C = probabilities_C * (more_probable_C < sampling.top_p)
    return probabilities_C, ids_C
