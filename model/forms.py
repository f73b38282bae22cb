"""What a raw record means: a text, a conversation, or a prompt with two answers.

The forms read here, as published data sets have them:

    text            {"text": …}
    conversation    {"instruction"?: …, "input": …, "output": …, "history"?: [[question, answer], …]}
                    {"q": …, "a": …, "history"?: …}
                    {"messages": [{"role": …, "content": …}, …]}
                    {"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}, …]}
                    each of them with or without "system": …
    pair            {"chosen": [messages], "rejected": [messages], "prompt"?: [messages]}
                    {"prompt": …, "chosen": …, "rejected": …}, `reject` meaning rejected

Texts are taken as they are, character by character.
"""

from typing import Any, NamedTuple

Message = dict[str, str]  # {"role": system, user or assistant, "content": …}

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "tool": "user",
    "assistant": "assistant",
    "gpt": "assistant",
}


class BadRecord(ValueError):
    """A record that cannot be used; the message is the reason under which it is counted."""


class UnfitRecord(BadRecord):
    """A sound record in which there is nothing to learn."""


class Pair(NamedTuple):
    prompt: list[Message]  # ends with a user's message
    chosen: str
    rejected: str


def text_of(value: Any, name: str) -> str:
    """A value that must be a text. `name` is how it is called in the data."""
    if value is None:
        raise BadRecord(f"{name} is null or missing")
    if not isinstance(value, str):
        raise BadRecord(f"{name} is not text")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # what JSON can spell (\ud800), or stands for bytes that are not UTF-8
        raise BadRecord("not UTF-8, or half a character (a lone surrogate)") from error
    return value


def filled_text_of(value: Any, name: str) -> str:
    text = text_of(value, name)
    if not text.strip():
        raise UnfitRecord(f"{name} is empty")
    return text


def dict_of(value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadRecord("not a JSON object")
    return value


def kind_of(value: Any) -> str | None:
    """What a record of this form is for: pretrain, sft or dpo."""
    keys = value.keys() if isinstance(value, dict) else set()
    if "text" in keys:
        return "pretrain"
    if "chosen" in keys:
        return "dpo"
    return "sft" if keys & {"messages", "conversations", "output", "q"} else None


def document(value: Any) -> str:
    """A pretraining text; it may be empty."""
    return text_of(dict_of(value).get("text"), "text")


def conversation(value: Any) -> list[Message]:
    """A conversation in any form: an optional system message, then questions and answers in turn."""
    row = dict_of(value)
    for key in ("messages", "conversations"):
        if key in row:
            return check_turns([*system_of(row), *messages_of(row[key], key)])
    if "output" in row:
        parts = [text_of(row[key], key) for key in ("instruction", "input") if row.get(key) is not None]
        question, answer = "\n".join(part for part in parts if part.strip()), row["output"]
    elif "q" in row:
        question, answer = row["q"], row.get("a")
    else:
        raise BadRecord("no conversation: neither messages, conversations, output nor q")
    turns = [*history_of(row.get("history")), (question, answer)]
    messages = [
        {"role": role, "content": filled_text_of(text, name)}
        for turn in turns
        for role, name, text in zip(("user", "assistant"), ("question", "answer"), turn, strict=True)
    ]
    return system_of(row) + messages


def system_of(row: dict[str, Any]) -> list[Message]:
    """The system message that some data sets have in a field of its own."""
    return [{"role": "system", "content": text_of(row["system"], "system")}] if row.get("system") else []


def history_of(value: Any) -> list[tuple[Any, Any]]:
    if value is None or value == "":
        return []
    if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        raise BadRecord("history is not a list of [question, answer] pairs")
    return [(question, answer) for question, answer in value]


def messages_of(value: Any, name: str) -> list[Message]:
    """Messages of either spelling -> {"role", "content"}, the roles called system, user or assistant."""
    if not isinstance(value, list) or not value or not all(isinstance(message, dict) for message in value):
        raise BadRecord(f"{name} is not a list of messages")
    messages = []
    for message in value:
        role = message.get("role", message.get("from"))
        if not isinstance(role, str) or role not in ROLES:
            raise UnfitRecord("a role that is neither system, user nor assistant")
        content = text_of(message.get("content", message.get("value")), "message")
        if content.strip():
            messages.append({"role": ROLES[role], "content": content})
        elif ROLES[role] != "system":  # an empty system message is common, and none
            raise UnfitRecord("message is empty")
    return messages


def check_turns(messages: list[Message]) -> list[Message]:
    """Messages whose turns alternate, from a user's to an assistant's."""
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if not turns or turns != ["user", "assistant"] * (len(turns) // 2):
        raise UnfitRecord("turns do not alternate from user to assistant")
    return messages


def pair(value: Any) -> Pair:
    """A prompt, the answer preferred and the other one."""
    row = dict_of(value)
    chosen = as_messages(row.get("chosen"), "chosen", "assistant")
    rejected = as_messages(row.get("rejected", row.get("reject")), "rejected", "assistant")
    if not chosen or not rejected:
        raise UnfitRecord("an answer is empty")
    if chosen[:-1] != rejected[:-1]:
        raise UnfitRecord("chosen and rejected answer different prompts")
    prompt = chosen[:-1]
    if chosen[0]["role"] == "assistant":  # the conversation opens in a field of its own
        prompt = as_messages(row.get("prompt"), "prompt", "user") + prompt
    for answer in (chosen[-1], rejected[-1]):
        check_turns([*prompt, answer])
    if chosen[-1]["content"].strip() == rejected[-1]["content"].strip():
        raise UnfitRecord("chosen and rejected are the same")
    return Pair(prompt, chosen[-1]["content"], rejected[-1]["content"])


def as_messages(value: Any, name: str, role: str) -> list[Message]:
    """A list of messages, or a text that is the only message, of this role."""
    if isinstance(value, list):
        return messages_of(value, name)
    return [{"role": role, "content": filled_text_of(value, name)}]


def texts_of(value: Any) -> list[str]:
    """All texts of a record of any form, in order: what a tokenizer is to see of it."""
    row = dict_of(value)
    if "text" in row:
        return [document(row)]
    if "chosen" in row:
        found = pair(row)
        return [*(message["content"] for message in found.prompt), found.chosen, found.rejected]
    return [message["content"] for message in conversation(row)]
