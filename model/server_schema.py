"""What clients may send: the published schema of OpenAI's API, as far as it makes sense for a text model.

null means the same as leaving a field out; unknown fields are passed over. What is asked for but cannot be given
(images, JSON schemas, a forced tool call) is refused where passing it over would mislead.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

from .chat import Message
from .sampling import Sampling

MAX_CHOICES = 128  # as the published schema has it
SMALLEST_TOP_P = 1e-9  # 0 means the most probable token only


def whole_or_positive(value: int) -> int:
    if value < 1 and value != -1:
        raise ValueError("must be 1 or more, or -1: until the context is full")
    return value


def text_format_only(value: dict[str, Any]) -> dict[str, Any]:
    if value.get("type", "text") != "text":
        raise ValueError(f"{value['type']!r} is not supported: this model answers with plain text")
    return value


def not_forced(value: str | dict[str, Any]) -> str | dict[str, Any]:
    if value not in ("none", "auto"):
        raise ValueError("a tool call cannot be forced: this model calls no tools")
    return value


def text_only(value: list[str]) -> list[str]:
    if value != ["text"]:
        raise ValueError("only text is supported")
    return value


class Lenient(BaseModel):
    """Unknown fields are passed over; numbers must be finite."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False, protected_namespaces=())


class Part(Lenient):
    type: Literal["text"]
    text: str


class ChatMessage(Lenient):
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[Part] | None = None  # None beside tool calls

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "\n".join(part.text for part in self.content)
        return self.content or ""


class StreamOptions(Lenient):
    include_usage: bool | None = None


TokenLimit = Annotated[int, AfterValidator(whole_or_positive)]


class Generating(Lenient):
    """The fields that chats and completions share."""

    model: str | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(ge=0, le=1)] | None = None
    n: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    max_tokens: TokenLimit | None = None
    seed: int | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Any = None
    top_k: Annotated[int, Field(ge=-1)] | None = None  # 0 or -1: all tokens
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(ge=0.01, le=100)] | None = None

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or [])

    @property
    def include_usage(self) -> bool:
        return bool(self.stream_options and self.stream_options.include_usage)

    @property
    def token_limit(self) -> int | None:
        return self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """How many alternatives to tell beside each token's log-probability; None: nothing."""
        return None

    def samplings(self, defaults: Sampling, context: int, vocab_size: int) -> list[Sampling]:
        """One for each of the n choices. What the request leaves open is as the server's options have it.

        Raises ValueError for a bias on a token that is none.
        """
        limit = self.token_limit
        asked = {
            "temperature": self.temperature,
            "top_k": None if self.top_k is None else max(self.top_k, 0),
            "top_p": None if self.top_p is None else max(self.top_p, SMALLEST_TOP_P),
            "min_p": self.min_p,
            "repetition_penalty": self.repetition_penalty,
            "presence_penalty": self.presence_penalty,
            "frequency_penalty": self.frequency_penalty,
            "logit_bias": token_biases(self.logit_bias or {}, vocab_size),
            "logprobs": self.wanted_logprobs,
        }
        values = {**vars(defaults), **{name: value for name, value in asked.items() if value is not None}}
        values["max_new_tokens"] = context if limit is None or limit < 0 else min(limit, context)
        seed = self.seed if self.seed is not None else defaults.seed
        return [
            Sampling(**(values | {"seed": None if seed is None else (seed + choice) % 2**63}))
            for choice in range(self.n or 1)
        ]


def token_biases(biases: Mapping[str, float], vocab_size: int) -> dict[int, float]:
    for token in biases:
        if not (token.isascii() and token.isdigit() and len(token) < 10 and int(token) < vocab_size):
            raise ValueError(f"logit_bias: {token[:20]!r} is not a token id below {vocab_size}")
    return {int(token): bias for token, bias in biases.items()}


class ChatRequest(Generating):
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: TokenLimit | None = None  # wins over max_tokens
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    response_format: Annotated[dict[str, Any], AfterValidator(text_format_only)] | None = None
    tools: list[Any] | None = None  # passed over: clients send theirs always
    tool_choice: Annotated[str | dict[str, Any], AfterValidator(not_forced)] | None = None
    modalities: Annotated[list[str], AfterValidator(text_only)] | None = None

    @property
    def token_limit(self) -> int | None:
        return self.max_completion_tokens if self.max_completion_tokens is not None else self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def conversation(self) -> list[Message]:
        """In the model's roles; several system messages at the beginning are one."""
        messages = [{"role": role_of(message.role), "content": message.text} for message in self.messages]
        system = []
        while messages and messages[0]["role"] == "system":
            system.append(messages.pop(0)["content"])
        return [{"role": "system", "content": "\n\n".join(system)}, *messages] if system else messages


def role_of(role: str) -> str:
    return {"developer": "system", "function": "tool"}.get(role, role)


Prompt = str | list[str] | list[int] | list[list[int]]


class CompletionRequest(Generating):
    prompt: Prompt = ""
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    suffix: Annotated[str, Field(max_length=0)] | None = None  # there is no filling in
    best_of: Annotated[int, Field(ge=1, le=MAX_CHOICES)] | None = None

    @property
    def wanted_logprobs(self) -> int | None:
        return self.logprobs

    @property
    def prompts(self) -> list[str | list[int]]:
        return split_prompts(self.prompt)


class EmbeddingRequest(Lenient):
    input: Prompt
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    user: Any = None

    @property
    def texts(self) -> list[str | list[int]]:
        return split_prompts(self.input)


def split_prompts(prompt: Prompt) -> list[str | list[int]]:
    """A text, token ids, or a list of either -> a list of texts or token ids."""
    if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int)):
        return list(prompt)
    return [prompt]
