"""Pairs of answers -> ids, and how a model rates them.

The ids come from chat.py, as those of fine-tuning do: `<s>assistant\\n` closes the prompt, `</s>` closes an answer.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedTokenizerBase
from trl.trainer.dpo_trainer import DataCollatorForPreference

from .chat import Turn, drop_oldest_turns, encode_turns, generation_prompt
from .cli import UserError
from .distributed import Run
from .evaluate import share
from .forms import Pair, pair
from .model import Transformer
from .records import Account, Record, read_as, read_files

AT_ONCE = 1024  # pairs that go through the tokenizer together


class PairIds(TypedDict):
    """The columns that trl reads."""

    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


class PreferenceData:
    """The pairs of a file of data_process.py, or of any of the forms that it reads.

    Too long prompts lose their oldest turns, then answers their end. What cannot be used is counted in `account`.

    Raises:
        UserError: no such file, or no pair in it that can be used.
    """

    def __init__(self, path: str | Path, tokenizer: PreTrainedTokenizerBase, max_seq_len: int):
        self.path, self.max_seq_len, self.tokenizer = Path(path), max_seq_len, tokenizer
        self.account, self.shortened = Account(), 0
        self.pairs: list[PairIds] = []
        if not self.path.is_file():
            raise UserError(f"no file {path}: make it with `python data_process.py dpo`")
        found = list(read_as(pair, read_files([path], self.account), self.account))
        for start in range(0, len(found), AT_ONCE):
            self.add(found[start : start + AT_ONCE])
        if not self.pairs:
            raise UserError(f"{path} holds no pair to train on: {'; '.join(self.account.lines()) or 'it is empty'}")

    def add(self, found: Sequence[tuple[Pair, Record]]) -> None:
        answer = "assistant"
        chosen = [[*each.prompt, {"role": answer, "content": each.chosen}] for each, _ in found]
        rejected = [[{"role": answer, "content": each.rejected}] for each, _ in found]
        turns = encode_turns(self.tokenizer, chosen + rejected)
        opening = generation_prompt(self.tokenizer)
        for (_, record), (*prompt, good), (bad,) in zip(found, turns[: len(found)], turns[len(found) :], strict=True):
            kept = drop_oldest_turns([*prompt, max(good, bad, key=lambda turn: len(turn.ids))], self.max_seq_len)[:-1]
            prompt_ids = [i for turn in kept for i in turn.ids] + opening
            room = self.max_seq_len - len(prompt_ids)
            whole = (trained_ids(good), trained_ids(bad))
            chosen_ids, rejected_ids = (ids[: max(0, room)] for ids in whole)
            if not chosen_ids:
                self.account.drop("the question alone fills max_seq_len", record)
            elif chosen_ids == rejected_ids:
                self.account.drop("the answers differ only behind max_seq_len", record)
            else:
                self.shortened += len(kept) < len(prompt) or (chosen_ids, rejected_ids) != whole
                self.pairs.append(dict(prompt_ids=prompt_ids, chosen_ids=chosen_ids, rejected_ids=rejected_ids))

    def told(self) -> str:
        """What there is to train on, and what was left out."""
        tokens = sum(len(each["chosen_ids"]) + len(each["rejected_ids"]) for each in self.pairs)
        line = f"{self.path}: {len(self.pairs):,} pairs, {tokens:,} tokens of answers; {self.shortened:,} shortened"
        return "\n".join([line, *self.account.lines()])


def trained_ids(turn: Turn) -> list[int]:
    """Of an answer: what it says, and `</s>`."""
    return [i for i, trained in zip(turn.ids, turn.mask, strict=True) if trained]


class PairCollator(DataCollatorForPreference):
    """Pairs -> a batch, the chosen answers first, then the rejected ones: tensors are [2B, T]."""

    def torch_call(self, examples: Sequence[PairIds]) -> dict[str, Tensor | int]:
        # trl has a head of its own; without this the model would also compute logits of all tokens, for nobody.
        return super().torch_call(examples) | {"logits_to_keep": 1}


@torch.no_grad()
def rate(
    model: Transformer, pairs: Sequence[PairIds], pad: int, run: Run, batch_size: int, dtype: torch.dtype
) -> Tensor:
    """Log-probabilities of answers given their prompts -> [pairs, 2] chosen and rejected, on every process.

    With products in `dtype`, as in training: else rounding would look like a difference that training has made.
    """
    collator, mine = PairCollator(pad_token_id=pad), []
    was_training = model.training
    model.eval()
    for numbers in filter(None, share(len(pairs), batch_size, run)):
        batch = collator([pairs[i] for i in numbers])
        with torch.autocast(run.device.type, dtype, enabled=dtype != torch.float32):
            log_probs = answer_log_probs(model, batch, run.device)
        mine += torch.stack(log_probs.float().chunk(2), -1).tolist()
    model.train(was_training)
    parts = run.gather(mine)
    # Batches were dealt out in turn.
    ordered: list[list[float]] = []
    for start in range(0, max(map(len, parts)), batch_size):
        ordered += [row for part in parts for row in part[start : start + batch_size]]
    return torch.tensor(ordered)


def answer_log_probs(model: Transformer, batch: dict[str, Any], device: torch.device) -> Tensor:
    """[2B] sums over the tokens of an answer."""
    ids, seen, answer = (batch[key].to(device) for key in ("input_ids", "attention_mask", "completion_mask"))
    logits = model(input_ids=ids, attention_mask=seen).logits[:, :-1].float()
    nats = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")  # 2B T-1
    return -(nats * answer[:, 1:]).sum(-1)


def figures(policy: Tensor, reference: Tensor, beta: float) -> dict[str, float]:
    """What validation tells of log-probabilities [pairs, 2].

    A reward is beta times what an answer has become more probable by, in nats, since the reference model. Where both
    answers have the same reward, as before training, the pair counts as half right.
    """
    rewards = beta * (policy - reference)
    margins = rewards[:, 0] - rewards[:, 1]
    right = (margins > 0).float() + 0.5 * (margins == 0)
    means = {
        "val_loss": F.softplus(-margins),  # -log sigmoid
        "accuracy": right,
        "margin": margins,
        "chosen_more_probable": (policy[:, 0] > policy[:, 1]).float(),
        "logp_chosen": policy[:, 0],
        "logp_rejected": policy[:, 1],
    }
    return {name: float(values.mean()) for name, values in means.items()}
