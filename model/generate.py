"""Token ids in, token ids out: the key/value cache, the batch, and the only sampling code of the project.

    batch = Batch(model, size=16, context=512)
    batch.add(Generation(prompt_ids, Sampling(temperature=0.7), stop_ids={2}))
    while batch.generations:
        for generation, token in batch.step():
            ...

The model gives the logits of the next tokens, a `Sampler` chooses one; each sequence has a sampler and a cache slot of
its own, so that what one caller asks for cannot change another's answer.

Letters in shape comments: B sequences of the batch, T tokens of this call, S tokens that can be looked at,
K key/value heads, d width of a head, V vocabulary, C candidates.
"""

from collections import deque
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache

from .cli import UserError
from .loops import Decoder, takes_loops
from .model import Transformer

GREEDY_BELOW = 1e-5  # logits divided by less than this would overflow
PROMPT_TOKENS_PER_STEP = 256  # read of new prompts: a long one must not hold up the answers that are running


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


def zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, positions_last: bool) -> Tensor:
    """[slots, K, context, d]. In memory positions are last for the loops; PyTorch's attention wants features there."""
    *outer, context, head_dim = shape
    if positions_last:
        return torch.zeros(*outer, head_dim, context, dtype=dtype, device=device).mT
    return torch.zeros(shape, dtype=dtype, device=device)


class SlotCache(Cache):
    """Keys and values of many sequences, [slots, K, context, d] of each layer, all allocated at once.

    Sequences of different lengths lie side by side: `place` says which of them the next call of the model is about.
    """

    def __init__(self, model: Transformer, slots: int, context: int):
        super().__init__(layers=[])
        config = model.config
        head_dim = config.dim // config.n_heads
        # Zeros: what lies behind a sequence's end is masked, but has to be finite: weight 0 times NaN would be NaN.
        # A tensor a layer: a compiled model would copy all layers where one is written.
        shape, positions_last = (slots, config.n_kv_heads, context, head_dim), takes_loops(model)
        self.keys, self.values = (
            [zeros(shape, model.dtype, model.device, positions_last) for _ in model.layers] for _ in range(2)
        )

    def place(self, slots: slice, positions_BT: Tensor) -> None:
        """The next call brings tokens for these slots, at these positions ([B or 1, T])."""
        self.slots = slots
        self.rows_B1 = torch.arange(slots.start, slots.stop, device=positions_BT.device)[:, None]
        self.positions_BT = positions_BT
        self.length = int(positions_BT.max()) + 1

    def update(self, k: Tensor, v: Tensor, layer_idx: int, *args, **kwargs) -> tuple[Tensor, Tensor]:
        """Stores k and v [B, K, T, d]; everything there is of these sequences [B, K, S, d], as a view."""
        stored = []
        for cache, new in ((self.keys[layer_idx], k), (self.values[layer_idx], v)):
            cache[self.rows_B1, :, self.positions_BT] = new.transpose(1, 2)  # B T K d
            stored.append(cache[self.slots, :, : self.length])
        if self.length == k.shape[2]:  # a prompt's beginning: these tokens are all there is
            return k, v
        return stored[0], stored[1]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Of the longest placed sequence, without the tokens of this call."""
        return self.length - self.positions_BT.shape[1]

    def copy(self, source: int, target: int, length: int) -> None:
        """The first `length` tokens of one slot -> another."""
        for cache in (*self.keys, *self.values):
            cache[target, :, :length] = cache[source, :, :length]


class Generation:
    """One sequence in the making, for a `Batch`. Any thread may set `cancelled`: it leaves at the next step."""

    def __init__(self, prompt_ids: Sequence[int], sampling: Sampling, stop_ids: Collection[int] = ()):
        self.prompt_ids, self.sampling, self.stop_ids = list(prompt_ids), sampling, stop_ids
        self.sampler: Sampler | None = None  # made when the batch takes it in
        self.ids: list[int] = []  # chosen so far
        self.cached = 0  # tokens that lie in the cache: of the prompt, then of the answer
        self.finish_reason: str | None = None  # "stop": one of stop_ids is the last; "length": it had to end
        self.cancelled = False

    @property
    def is_over(self) -> bool:
        return self.cancelled or self.finish_reason is not None

    def choose(self, logits_V: Tensor) -> Token:
        token = self.sampler.choose(logits_V)
        self.ids.append(token.id)
        if token.id in self.stop_ids:
            self.finish_reason = "stop"
        elif len(self.ids) >= self.sampling.max_new_tokens:
            self.finish_reason = "length"
        return token


class Batch:
    """Up to `size` sequences that are decoded together, one token each a step. For one thread only.

    Running sequences lie in the slots 0, 1, 2 ... without a gap, so that the cache hands them over as a view; where one
    leaves, the last takes its slot. New prompts are read together; a long one in the slot behind all others, by pieces.
    """

    def __init__(self, model: Transformer, size: int, context: int):
        self.model, self.size = model, size
        self.cache = SlotCache(model, size + 1, context)
        self.decoder = Decoder(model, self.cache) if takes_loops(model) else None
        self.running: list[Generation] = []
        self.newcomers: deque[Generation] = deque()

    @property
    def generations(self) -> list[Generation]:
        return [*self.running, *self.newcomers]

    @property
    def has_room(self) -> bool:
        return len(self.running) + len(self.newcomers) < self.size

    def add(self, generation: Generation) -> None:
        """Takes one in; prompt and answer must fit in the context together."""
        config = self.model.config
        prompt_ids = generation.prompt_ids
        generation.sampler = Sampler(generation.sampling, prompt_ids, config.vocab_size, self.model.device)
        self.newcomers.append(generation)

    # A decorator on each step, not a `with` round a loop of them: that would stay switched on for the caller meanwhile.
    @torch.inference_mode()
    def step(self) -> list[tuple[Generation, Token]]:
        """A token for each running sequence, and the first one for new ones whose prompt is read now."""
        self.remove_those_over()
        tokens = self.decode() if self.running else []
        budget = PROMPT_TOKENS_PER_STEP
        while self.newcomers and budget > 0:
            group = self.short_newcomers(budget)
            newcomer = self.newcomers[0]
            if group:
                read = self.prefill_together(group)
                budget -= len(group) * max(newcomer.cached for newcomer in group)
            elif not newcomer.cached and len(newcomer.prompt_ids) <= PROMPT_TOKENS_PER_STEP:
                break  # the next step has room for all of it
            else:
                before = newcomer.cached
                read = self.prefill_piece(newcomer, budget)
                budget -= newcomer.cached - before
            for newcomer, logits_V in read:
                self.running.append(self.newcomers.popleft())
                tokens.append((newcomer, newcomer.choose(logits_V)))
        return tokens

    def short_newcomers(self, budget: int) -> list[Generation]:
        """The first ones whose prompts, padded to the longest of them, are within the budget together."""
        group, longest = [], 0
        for newcomer in self.newcomers:
            longest = max(longest, len(newcomer.prompt_ids))
            if newcomer.cached or (len(group) + 1) * longest > budget:
                break
            group.append(newcomer)
        return group

    def decode(self) -> list[tuple[Generation, Token]]:
        """Feeds each running sequence's last token, all in one call."""
        ids, positions = [g.ids[-1] for g in self.running], [g.cached for g in self.running]
        logits_BV = self.decoder(ids, positions) if self.decoder else self.decode_by_model(ids, positions)
        for generation in self.running:
            generation.cached += 1
        return [(g, g.choose(logits_V)) for g, logits_V in zip(self.running, logits_BV, strict=True)]

    def decode_by_model(self, ids: list[int], positions: list[int]) -> Tensor:
        """Logits [B, V]."""
        device = self.model.device
        ids_B1 = torch.tensor(ids, device=device)[:, None]
        positions_B1 = torch.tensor(positions, device=device)[:, None]
        self.cache.place(slice(0, len(ids)), positions_B1)
        mask = None
        if len(ids) > 1:
            mask = (torch.arange(self.cache.length, device=device) <= positions_B1)[:, None, None, :]  # B 1 1 S
        return self.logits(ids_B1, attention_mask=mask, position_ids=positions_B1)

    def prefill_together(self, group: list[Generation]) -> list[tuple[Generation, Tensor]]:
        """Reads whole prompts in the slots where they will run; logits [V] of what comes after each.

        Padding stands on the right, where no earlier token sees it; the answer's tokens will take its place.
        """
        device, first = self.model.device, len(self.running)
        ids_BT = pad_sequence([torch.tensor(newcomer.prompt_ids) for newcomer in group], batch_first=True).to(device)
        lengths_B = torch.tensor([len(newcomer.prompt_ids) for newcomer in group], device=device)
        self.cache.place(slice(first, first + len(group)), torch.arange(ids_BT.shape[1], device=device)[None])
        for newcomer in group:
            newcomer.cached = len(newcomer.prompt_ids)
        return list(zip(group, self.logits(ids_BT, lengths_B - 1), strict=True))

    def prefill_piece(self, newcomer: Generation, budget: int) -> list[tuple[Generation, Tensor]]:
        """Feeds at most `budget` further tokens of a prompt; after the last one it is ready to run."""
        device = self.model.device
        ids = newcomer.prompt_ids[newcomer.cached : newcomer.cached + budget]
        positions_1T = torch.arange(newcomer.cached, newcomer.cached + len(ids), device=device)[None]
        self.cache.place(slice(self.size, self.size + 1), positions_1T)
        newcomer.cached += len(ids)
        logits_1V = self.logits(torch.tensor([ids], device=device))
        if newcomer.cached < len(newcomer.prompt_ids):
            return []
        self.cache.copy(self.size, len(self.running), newcomer.cached)
        return [(newcomer, logits_1V[0])]

    def logits(self, ids_BT: Tensor, last_B: Tensor | None = None, **placing: Tensor | None) -> Tensor:
        """Of the token after each row's last one, which padding may follow, [B, V], in float32."""
        output = self.model(input_ids=ids_BT, past_key_values=self.cache, use_cache=True, logits_to_keep=1, **placing)
        if last_B is None:
            return output.logits[:, -1].float()
        hidden_BD = output.last_hidden_state[torch.arange(len(last_B), device=last_B.device), last_B]
        return self.model.output(hidden_BD).float()

    def clear(self) -> None:
        self.running, self.newcomers = [], deque()

    def remove_those_over(self) -> None:
        self.newcomers = deque(generation for generation in self.newcomers if not generation.is_over)
        for slot in reversed(range(len(self.running))):
            if self.running[slot].is_over:
                last = self.running.pop()
                if slot < len(self.running):
                    self.cache.copy(len(self.running), slot, last.cached)
                    self.running[slot] = last
