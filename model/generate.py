"""Token ids in, token ids out: the key/value cache, and the batch of sequences that are decoded together.

    batch = Batch(model, size=16, context=512)
    batch.add(Generation(prompt_ids, Sampling(temperature=0.7), stop_ids={2}))
    while batch.generations:
        for generation, token in batch.step():
            ...

The model gives the logits of the next tokens, a `Sampler` chooses one; each sequence has a sampler and a cache slot of
its own, so that what one caller asks for cannot change another's answer.

Letters in shape comments: B sequences of the batch, T tokens of this call, S tokens that can be looked at,
K key/value heads, d width of a head, V vocabulary.
"""

from collections import deque
from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers.cache_utils import Cache

from .loops import Decoder, takes_loops
from .model import Transformer
from .sampling import Sampler, Sampling, Token

PROMPT_TOKENS_PER_STEP = 256  # read of new prompts: a long one must not hold up the answers that are running


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
        shape, kind = (slots, config.n_kv_heads, context, head_dim), dict(dtype=model.dtype, device=model.device)
        self.keys, self.values = ([torch.zeros(shape, **kind) for _ in model.layers] for _ in range(2))

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
