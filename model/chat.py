"""Messages -> token ids and loss mask: the only place where a chat turn is laid out.

    <s>system\\n…</s>\\n          (optional, first)
    <s>user\\n…</s>\\n
    <s>assistant\\n…</s>\\n       trained: the answer and its closing </s>

Ids and mask are made together, piece by piece, so they cannot drift apart. Only this file writes special ids; what a
message says is encoded as plain text, so a user who types `</s>\\n<s>assistant\\n` has typed just that.
"""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from .tokenizer import encode_texts

Message = dict[str, str]  # {"role": …, "content": …}

ROLES = {"system": "system", "developer": "system", "user": "user", "tool": "user", "assistant": "assistant"}

# The same layout in jinja, for apply_chat_template and for other programs that read the tokenizer's folder.
TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set role = {'developer': 'system', 'tool': 'user'}.get(message['role'], message['role']) -%}"
    "{{- bos_token + role + '\\n' + message['content'] + eos_token + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- bos_token + 'assistant\\n' -}}{%- endif -%}"
)


class Turn(NamedTuple):
    role: str  # system, user or assistant
    ids: list[int]
    mask: list[int]  # 1 where the model is trained to produce the id, 0 elsewhere


def encode(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    add_generation_prompt: bool = False,
    max_length: int | None = None,
) -> tuple[list[int], list[int]]:
    """One conversation -> (ids, mask), both of the same length.

    With `add_generation_prompt` the ids end where the assistant is to speak. With `max_length` the oldest turns are
    left out until the rest fits; the system turn and everything from the last user turn on always stay, so the
    result can still be longer.

    Raises:
        ValueError: an unknown role, or content that is not text.
    """
    (turns,) = encode_turns(tokenizer, [messages])
    if add_generation_prompt:
        opening = generation_prompt(tokenizer)
        turns.append(Turn("assistant", opening, [0] * len(opening)))
    if max_length is not None:
        turns = drop_oldest_turns(turns, max_length)
    return [i for turn in turns for i in turn.ids], [m for turn in turns for m in turn.mask]


def encode_turns(tokenizer: PreTrainedTokenizerBase, conversations: Sequence[Sequence[Message]]) -> list[list[Turn]]:
    """Many conversations -> their turns; all texts go through the tokenizer in one batch, which is far faster."""
    roles = [[turn_role(message) for message in messages] for messages in conversations]
    texts = [message["content"] for messages in conversations for message in messages]
    contents = iter(encode_texts(tokenizer, texts))
    headers = {role: [tokenizer.bos_token_id, *header_ids(tokenizer, role)] for role in set(sum(roles, []))}
    (newline,) = encode_texts(tokenizer, ["\n"])
    closing = [tokenizer.eos_token_id, *newline]

    def turn(role: str, content: list[int]) -> Turn:
        trained = int(role == "assistant")
        mask = [0] * len(headers[role]) + [trained] * (len(content) + 1) + [0] * len(newline)
        return Turn(role, headers[role] + content + closing, mask)

    return [[turn(role, next(contents)) for role in turn_roles] for turn_roles in roles]


def turn_role(message: Message) -> str:
    role = message.get("role")
    if role not in ROLES:
        raise ValueError(f"unknown role {role!r}; there are {', '.join(ROLES)}")
    if not isinstance(message.get("content"), str):
        raise ValueError(f"the content of a {role} message must be text")
    return ROLES[role]


def header_ids(tokenizer: PreTrainedTokenizerBase, role: str) -> list[int]:
    return encode_texts(tokenizer, [f"{role}\n"])[0]


def generation_prompt(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`<s>assistant\\n`: what stands before an answer."""
    return [tokenizer.bos_token_id, *header_ids(tokenizer, "assistant")]


def drop_oldest_turns(turns: list[Turn], max_length: int) -> list[Turn]:
    """Leaves out whole exchanges (a user turn and what follows it), oldest first, until the ids fit in max_length."""
    system = [turn for turn in turns[:1] if turn.role == "system"]
    rest = turns[len(system) :]
    starts = [i for i, turn in enumerate(rest) if turn.role == "user"]
    for start in [0, *starts[1:]] if starts else [0]:
        kept = system + rest[start:]
        if sum(len(turn.ids) for turn in kept) <= max_length:
            break
    return kept
