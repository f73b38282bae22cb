"""Logits -> the next token: temperature, penalties, what may be chosen from. The only sampling code of the project.

Letters in shape comments: V vocabulary, C candidates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from .cli import UserError

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
    min_p: float = 0.0  # choose among tokens at least this fraction as probable as the most probable one
    repetition_penalty: float = 1.0  # above 1: tokens of prompt and answer become less probable
    presence_penalty: float = 0.0  # subtracted from the logits of tokens that the answer has
    frequency_penalty: float = 0.0  # ... times how often it has them
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of these tokens
    max_new_tokens: int = 256  # longest answer; the prompt does not count
    seed: int | None = None  # the same seed gives the same answer; None: another one each time
    logprobs: int | None = None  # tell each token's log-probability, and of so many others; None: tell none

    def __post_init__(self):
        in_range = {
            "temperature": (0 <= self.temperature < inf, "0 or more"),
            "top_k": (self.top_k >= 0, "0 (all tokens) or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "min_p": (0 <= self.min_p <= 1, "between 0 and 1"),
            "repetition_penalty": (0.01 <= self.repetition_penalty <= 100, "between 0.01 and 100"),
            "presence_penalty": (-100 <= self.presence_penalty <= 100, "between -100 and 100"),
            "frequency_penalty": (-100 <= self.frequency_penalty <= 100, "between -100 and 100"),
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "seed": (self.seed is None or 0 <= self.seed < 2**63, "between 0 and 2**63 - 1"),
        }
        for name, (fits, wanted) in in_range.items():
            if not fits:
                raise UserError(f"{name} is {getattr(self, name)}, but must be {wanted}")


class Token(NamedTuple):
    """A chosen token, and if asked for how probable the model itself found it (before temperature and penalties)."""

    id: int
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()  # the most probable tokens and their log-probabilities


class Sampler:
    """Chooses the tokens of one sequence: knows which ones have occurred, and has its own source of chance."""

    def __init__(self, sampling: Sampling, prompt_ids: Sequence[int], vocab_size: int, device: torch.device):
        self.sampling = sampling
        self.penalties_V = torch.ones(vocab_size, device=device)
        self.penalties_V[list(prompt_ids)] = sampling.repetition_penalty
        self.counts_V = torch.zeros(vocab_size, device=device)  # of the answer's tokens
        self.bias_V = torch.zeros(vocab_size, device=device)
        for token, bias in sampling.logit_bias.items():
            self.bias_V[token] = bias
        self.generator = torch.Generator(device)
        if sampling.seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(sampling.seed)

    @torch.inference_mode()
    def choose(self, logits_V: Tensor) -> Token:
        """The next token, given its logits."""
        adjusted_V = self.adjust(logits_V)
        if self.sampling.temperature < GREEDY_BELOW:
            token = int(adjusted_V.argmax())
        else:
            probabilities_C, ids_C = candidates(adjusted_V, self.sampling)
            token = int(ids_C[torch.multinomial(probabilities_C, 1, generator=self.generator)])
        if self.sampling.repetition_penalty != 1:
            self.penalties_V[token] = self.sampling.repetition_penalty
        if self.sampling.presence_penalty or self.sampling.frequency_penalty:
            self.counts_V[token] += 1
        return (
            Token(token) if self.sampling.logprobs is None else with_logprobs(token, logits_V, self.sampling.logprobs)
        )

    def adjust(self, logits_V: Tensor) -> Tensor:
        """Logits with penalties and bias."""
        sampling = self.sampling
        if sampling.repetition_penalty != 1:
            logits_V = penalize(logits_V, self.penalties_V)
        if sampling.presence_penalty or sampling.frequency_penalty:
            occurred_V = self.counts_V > 0
            logits_V = logits_V - sampling.presence_penalty * occurred_V - sampling.frequency_penalty * self.counts_V
        return logits_V + self.bias_V if sampling.logit_bias else logits_V


def penalize(logits_V: Tensor, penalties_V: Tensor) -> Tensor:
    """Lowers logits by a factor, whatever their sign (Keskar et al. 2019 divide, which raises negative ones)."""
    return torch.where(logits_V < 0, logits_V * penalties_V, logits_V / penalties_V)


def candidates(logits_V: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """What temperature, then top_k, then top_p and min_p leave to choose from.

    Returns:
        Probabilities [C], 0 where top_p or min_p cut (so their sum can be below 1), and their ids [C].
    """
    logits_V = logits_V / sampling.temperature
    k = min(sampling.top_k or len(logits_V), len(logits_V))
    if k == len(logits_V) and sampling.top_p == 1:  # no need to sort
        logits_C, ids_C = logits_V, torch.arange(k, device=logits_V.device)
    else:
        logits_C, ids_C = logits_V.topk(k)  # most probable first
    probabilities_C = logits_C.softmax(-1)
    kept_C = probabilities_C >= sampling.min_p * probabilities_C.max()
    if sampling.top_p < 1:
        more_probable_C = probabilities_C.cumsum(-1) - probabilities_C  # what the tokens before have together
        kept_C &= more_probable_C < sampling.top_p
    return probabilities_C * kept_C, ids_C


def with_logprobs(token: int, logits_V: Tensor, alternatives: int) -> Token:
    logprobs_V = logits_V.log_softmax(-1)
    top = logprobs_V.topk(min(alternatives, len(logprobs_V)))
    return Token(token, float(logprobs_V[token]), tuple(zip(top.indices.tolist(), top.values.tolist(), strict=True)))
