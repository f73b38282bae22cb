"""my_openai_api.py as a process of its own, spoken to by openai's client and by bare HTTP; chat_openai_api.py, too."""

import asyncio
import base64
import http.client
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock, call

import numpy as np
import openai
import pytest
from conftest import ROOT, load_script, make_model
from openai.types import Completion, CreateEmbeddingResponse, Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from starlette.testclient import TestClient
from streamlit.testing.v1 import AppTest

from model.chat import encode
from model.checkpoint import save_weights
from model.cli import parse
from model.engine import Engine
from model.sampling import Sampling
from model.server import Service, create_app
from model.server_schema import ChatRequest

HELLO = [{"role": "user", "content": "你好"}]
CHAT, COMPLETE, EMBED = "/v1/chat/completions", "/v1/completions", "/v1/embeddings"
ENDLESS = {"logit_bias": {"2": -100}, "max_tokens": -1}
CONTEXT = 4000


class Server:
    """A running my_openai_api.py."""

    def __init__(self, *flags: object):
        command = [sys.executable, ROOT / "my_openai_api.py", "--port", 0, *flags]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "utf-8"}
        self.process = subprocess.Popen(
            list(map(str, command)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )

    def wait(self) -> "Server":
        """Until it serves."""
        for line in self.process.stdout:
            if found := re.match(r"serving .* at (http://127\.0\.0\.1:(\d+)/v1)$", line):
                self.url, self.port = found[1], int(found[2])
                return self
        raise AssertionError(self.process.stderr.read())

    def stop(self) -> str:
        """What it has logged."""
        self.process.send_signal(signal.SIGTERM)
        _, log = self.process.communicate(timeout=60)
        return log

    def client(self, **options) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.url, **{"api_key": "none", "max_retries": 0, "timeout": 60} | options)

    def request(self, method: str, path: str, body: dict | bytes | None = None, **headers: str):
        """Bare HTTP: status, headers, body."""
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            data = json.dumps(body).encode() if isinstance(body, dict) else body
            connection.request(method, path, data, {"Content-Type": "application/json"} | headers)
            response = connection.getresponse()
            return response.status, dict(response.headers), response.read()

    def post(self, path: str, body: dict) -> dict:
        status, _, answer = self.request("POST", path, body)
        assert status == 200, answer
        return json.loads(answer)

    def events(self, path: str, body: dict) -> list[dict]:
        """The chunks of a stream, whose form is checked."""
        status, headers, data = self.request("POST", path, body | {"stream": True})
        assert status == 200, data
        assert headers["content-type"].startswith("text/event-stream")
        *events, last, rest = data.decode().split("\n\n")
        assert (last, rest) == ("data: [DONE]", "")
        assert all(event.startswith("data: {") and "\n" not in event for event in events)
        assert not re.search(r"\\u(?!00[01])", data.decode())  # control characters only cannot stand as they are
        return [json.loads(event.removeprefix("data: ")) for event in events]

    def gauge(self, name: str) -> int:
        text = self.request("GET", "/metrics")[2].decode()
        return int(re.search(rf"^minimind_{name} (\d+)$", text, re.M)[1])

    def wait_until_idle(self) -> None:
        while self.gauge("running") or self.gauge("waiting"):
            time.sleep(0.01)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer_dir) -> Path:
    path = tmp_path_factory.mktemp("out") / "full_sft_32.pth"
    save_weights(path, make_model(max_seq_len=CONTEXT), tokenizer_dir)
    return path


@pytest.fixture(scope="module")
def servers(checkpoint) -> Iterator[list[Server]]:
    """An open one, and a strict one."""
    strict = ["--api_key", "sécret", "--max_batch", 1, "--max_queue", 1, "--max_body_mb", 0.01]
    strict += ["--model_name", "first", "--also", f"second={checkpoint}", "--cors_origins", "http://page"]
    servers = [Server("--checkpoint", checkpoint, *flags) for flags in (["--max_batch", 4], strict)]
    try:
        yield [server.wait() for server in servers]
    finally:
        for server in servers:
            server.process.kill()
            server.process.communicate()


@pytest.fixture(scope="module")
def server(servers) -> Server:
    return servers[0]


@pytest.fixture(scope="module")
def strict(servers) -> Server:
    return servers[1]


# What it answers.


def test_models(server):
    (model,) = server.client().models.list().data
    Model.model_validate(model.model_dump(), strict=True)
    assert model.id == "minimind"
    assert server.client().models.retrieve("minimind") == model
    with pytest.raises(openai.NotFoundError, match="no model"):
        server.client().models.retrieve("gpt")


def test_an_answer_has_all_that_the_schema_wants(server, tokenizer):
    answer = server.post(CHAT, {"model": "gpt-4o", "messages": HELLO, "max_tokens": 7, **ENDLESS | {"max_tokens": 7}})
    ChatCompletion.model_validate(answer, strict=True)
    assert answer["model"] == "minimind"
    prompt, _ = encode(tokenizer, HELLO, add_generation_prompt=True)
    assert answer["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": 7,
        "total_tokens": len(prompt) + 7,
    }
    (choice,) = answer["choices"]
    assert (choice["finish_reason"], choice["message"]["role"]) == ("length", "assistant")
    assert abs(answer["created"] - time.time()) < 600


@pytest.mark.parametrize("include_usage", [False, True])
@pytest.mark.parametrize("n", [1, 3])
def test_a_stream_comes_in_order_and_says_what_the_whole_answer_says(server, n, include_usage):
    body = {"messages": HELLO, "max_tokens": 12, "temperature": 1.5, "seed": 5, "n": n}
    options = {"stream_options": {"include_usage": True}} if include_usage else {}
    chunks = server.events(CHAT, body | options)
    whole = server.post(CHAT, body)
    for chunk in chunks:
        ChatCompletionChunk.model_validate(chunk, strict=True)
    assert len({(chunk["id"], chunk["created"], chunk["model"], chunk["object"]) for chunk in chunks}) == 1
    if include_usage:
        last = chunks.pop()
        assert (last["choices"], last["usage"]) == ([], whole["usage"])
    assert all(len(chunk["choices"]) == 1 and not chunk.get("usage") for chunk in chunks)
    for index in range(n):
        first, *parts, end = (c["choices"][0] for c in chunks if c["choices"][0]["index"] == index)
        assert (first["delta"], first["finish_reason"]) == ({"role": "assistant", "content": ""}, None)
        assert all(set(part["delta"]) == {"content"} and part["finish_reason"] is None for part in parts)
        expected = whole["choices"][index]
        assert (end["delta"], end["finish_reason"]) == ({}, expected["finish_reason"])
        assert "".join(part["delta"]["content"] for part in parts) == expected["message"]["content"]
    if n == 3:
        assert len({choice["message"]["content"] for choice in whole["choices"]}) == 3


def test_one_token_and_empty_answers(server):
    one = {"messages": HELLO, "max_tokens": 1, "logit_bias": {"70": 100}}
    assert [c["choices"][0]["delta"] for c in server.events(CHAT, one)][0::2] == [
        {"role": "assistant", "content": ""},
        {},
    ]
    assert len(server.post(CHAT, one)["choices"][0]["message"]["content"]) == 1
    empty = {"messages": HELLO, "logit_bias": {"2": 100}}
    assert [c["choices"][0]["finish_reason"] for c in server.events(CHAT, empty)] == [None, "stop"]
    whole = server.post(CHAT, empty)
    assert whole["choices"][0]["message"]["content"] == ""
    assert whole["usage"]["completion_tokens"] == 1


def test_special_tokens_never_show(server):
    body = {"messages": HELLO, "max_tokens": 20, "logit_bias": {"0": 50, "1": 50, "2": -100}}
    assert server.post(CHAT, body)["choices"][0]["message"]["content"] == ""


def test_stop_strings_end_an_answer_before_them(server):
    body = {"messages": HELLO, "max_tokens": 30, "seed": 2, "temperature": 1.5, "logit_bias": {"2": -100}}
    text = server.post(CHAT, body)["choices"][0]["message"]["content"]
    stop = text[4:7]
    for value in (stop, ["never comes", stop]):
        (choice,) = server.post(CHAT, body | {"stop": value})["choices"]
        assert choice["message"]["content"] == text[: text.index(stop)]
        assert choice["finish_reason"] == "stop"


def test_answers_without_a_limit_fill_the_context(server):
    short = {"messages": [{"role": "user", "content": "x" * (CONTEXT - 100)}], "logit_bias": {"2": -100}}
    for limit in ({}, {"max_tokens": None}, {"max_tokens": -1}, {"max_completion_tokens": -1, "max_tokens": 3}):
        usage = server.post(CHAT, short | limit)["usage"]
        assert usage["total_tokens"] == CONTEXT


def test_logprobs(server):
    body = {"messages": HELLO, "max_tokens": 15, "logprobs": True, "top_logprobs": 3, "temperature": 2, "seed": 1}
    whole = server.post(CHAT, body)
    ChatCompletion.model_validate(whole, strict=True)
    entries = whole["choices"][0]["logprobs"]["content"]
    data = b"".join(bytes(entry["bytes"]) for entry in entries)
    text = whole["choices"][0]["message"]["content"]
    assert data.decode(errors="replace").rstrip("\ufffd") == text.rstrip("\ufffd")
    assert all(len(entry["top_logprobs"]) == 3 and entry["logprob"] < 0 for entry in entries)
    streamed = [c["choices"][0]["logprobs"] for c in server.events(CHAT, body)]
    assert [entry for part in streamed if part for entry in part["content"]] == entries


def test_completions(server, tokenizer):
    body = {"prompt": ["春天", "Hello"], "max_tokens": 6, "temperature": 0, "n": 2, "echo": True, "logprobs": 2}
    whole = server.post(COMPLETE, body)
    Completion.model_validate(whole, strict=True)
    assert [choice["text"][:2] for choice in whole["choices"]] == ["春天", "春天", "He", "He"]
    ids = [tokenizer(text, add_special_tokens=False).input_ids for text in body["prompt"]]
    assert whole["usage"]["prompt_tokens"] == sum(map(len, ids)) + 2
    for choice in whole["choices"]:
        assert len(choice["logprobs"]["top_logprobs"][0]) == 2
        for token, offset in zip(choice["logprobs"]["tokens"], choice["logprobs"]["text_offset"], strict=True):
            assert token.startswith("bytes:") or choice["text"][offset:].startswith(token)
    chunks = server.events(COMPLETE, body)
    for chunk in chunks:
        Completion.model_validate(chunk | {"choices": [c | {"finish_reason": "stop"} for c in chunk["choices"]]})
    for index, choice in enumerate(whole["choices"]):
        parts = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == index]
        assert "".join(part["text"] for part in parts) == choice["text"]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
    as_ids = server.post(COMPLETE, {"prompt": [[1, *some] for some in ids], "max_tokens": 6, "temperature": 0})
    assert [c["text"] for c in as_ids["choices"]] == [
        c["text"][len(p) :] for c, p in zip(whole["choices"][::2], body["prompt"], strict=True)
    ]


def test_embeddings(server):
    raw = server.post(EMBED, {"input": ["春天", "Hello"], "model": "x", "encoding_format": "float"})
    CreateEmbeddingResponse.model_validate(raw)
    vectors = np.array([entry["embedding"] for entry in raw["data"]])
    assert vectors.shape == (2, 32)
    assert np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1], abs=1e-5)
    encoded = server.post(EMBED, {"input": "Hello", "encoding_format": "base64"})["data"][0]["embedding"]
    assert np.frombuffer(base64.b64decode(encoded), "<f4") == pytest.approx(vectors[1], abs=1e-6)
    by_client = server.client().embeddings.create(model="x", input=["春天", "Hello"], dimensions=8)
    shorter = vectors[:, :8] / np.linalg.norm(vectors[:, :8], axis=1, keepdims=True)
    assert np.array([entry.embedding for entry in by_client.data]) == pytest.approx(shorter, abs=1e-6)
    assert raw["usage"]["prompt_tokens"] == raw["usage"]["total_tokens"] > 2


def test_openais_client(server):
    client = server.client()
    options = dict(model="minimind", messages=HELLO, max_tokens=10, seed=3, extra_body={"top_k": 5, "min_p": 0.01})
    whole = client.chat.completions.create(**options)
    with client.chat.completions.create(**options, stream=True) as stream:
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream]
    assert "".join(pieces) == whole.choices[0].message.content
    assert client.completions.create(model="m", prompt="a", max_tokens=2).object == "text_completion"


def test_many_at_once_get_what_each_gets_alone(server):
    def body(number: int) -> dict:
        return dict(
            model="m", messages=[{"role": "user", "content": f"{number} 你好"}], max_tokens=20, temperature=0
        ) | {"extra_body": {"repetition_penalty": 1.8}}

    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=server.url, api_key="none", max_retries=0) as client:

            async def ask(number: int) -> str:
                stream = await client.chat.completions.create(**body(number), stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(ask(number) for number in range(17)))

    alone = [server.client().chat.completions.create(**body(number)) for number in range(17)]
    assert asyncio.run(ask_all()) == [answer.choices[0].message.content for answer in alone]


LIST_CONTENT = [{"role": "user", "content": [{"type": "text", "text": "你"}, {"type": "text", "text": "好"}]}]
TOOL_TALK = [
    {"role": "developer", "content": "S"},
    {"role": "user", "content": "u", "name": "me"},
    {"role": "assistant", "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {}}]},
    {"role": "tool", "content": "42", "tool_call_id": "1"},
]


@pytest.mark.parametrize(
    "body",
    [
        {"model": "minimind", "messages": HELLO, "max_tokens": 50, "stream": False},  # a title
        {"model": "m", "messages": HELLO, "stream_options": {"include_usage": True}, "max_tokens": 3},
        {"messages": LIST_CONTENT, "max_tokens": 3},
        {"messages": TOOL_TALK, "max_tokens": 3},
        {"messages": HELLO, "tools": [], "tool_choice": "auto", "max_completion_tokens": 3},
        {"messages": HELLO, "tools": [{"type": "function", "function": {"name": "f"}}], "max_tokens": 3},
        {"messages": HELLO, "response_format": {"type": "text"}, "modalities": ["text"], "max_tokens": 3},
        {"messages": HELLO, "max_tokens": 3, "metadata": {"a": 1}, "session_id": "x", "features": [1], "store": True},
        {"messages": HELLO, "max_tokens": 3, "top_k": -1, "min_p": 0.1, "repetition_penalty": 1.2, "top_p": 0},
        {"messages": HELLO, "max_tokens": 3, "seed": -(10**30), "user": "me", "service_tier": "auto"},
        {"messages": HELLO, "max_tokens": 10**30, "stop": "", "logit_bias": {"2": 100}},
        {"messages": [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}, *HELLO], "max_tokens": 3},
    ],
)
def test_requests_as_clients_send_them(server, body):
    everything_else = dict.fromkeys([*ChatRequest.model_fields, "functions"])
    ChatCompletion.model_validate(server.post(CHAT, everything_else | body | {"stream": False}), strict=True)
    assert server.events(CHAT, everything_else | body)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "messages"),
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]}, "messages.0.content"),
        ({"messages": HELLO, "temperature": -1}, "temperature"),
        ({"messages": HELLO, "temperature": "hot"}, "temperature"),
        ({"messages": HELLO, "temperature": "nan"}, "temperature"),
        ({"messages": HELLO, "top_p": 1.5}, "top_p"),
        ({"messages": HELLO, "n": 0}, "n"),
        ({"messages": HELLO, "n": 100}, "n"),
        ({"messages": HELLO, "max_tokens": 0}, "max_tokens"),
        ({"messages": HELLO, "logit_bias": {"300": 1}}, "logit_bias"),
        ({"messages": HELLO, "logit_bias": {"٣": 1}}, "logit_bias"),
        ({"messages": HELLO, "logit_bias": {"3": 101}}, "logit_bias.3"),
        ({"messages": HELLO, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": HELLO, "response_format": {"type": "json_schema"}}, "response_format"),
        ({"messages": HELLO, "tool_choice": "required"}, "tool_choice"),
        ({"messages": HELLO, "modalities": ["text", "audio"]}, "modalities"),
    ],
)
def test_what_cannot_be_given_is_refused_by_name(server, body, param):
    for stream in (False, True):
        status, _, answer = server.request("POST", CHAT, body | {"stream": stream})
        error = json.loads(answer)["error"]
        assert status == 400
        assert set(error) == {"message", "type", "param", "code"}
        assert error["param"].startswith(param)
        assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        (COMPLETE, {"prompt": [300]}),
        (COMPLETE, {"prompt": [-1]}),
        (COMPLETE, {"prompt": [[]]}),
        (COMPLETE, {"prompt": []}),
        (COMPLETE, {"prompt": ["a"] * 100}),
        (COMPLETE, {"prompt": "a", "suffix": "b"}),
        (COMPLETE, {"prompt": "a", "best_of": 2}),
        (EMBED, {"input": ""}),
        (EMBED, {"input": []}),
        (EMBED, {"input": "a", "encoding_format": "hex"}),
    ],
)
def test_other_mistakes(server, path, body):
    status, _, answer = server.request("POST", path, body)
    assert status == 400 and json.loads(answer)["error"]["message"]


@pytest.mark.parametrize("length", [CONTEXT, 10**6])
@pytest.mark.parametrize("path", [CHAT, COMPLETE, EMBED])
def test_texts_too_long_for_the_context(server, path, length):
    text = "x" * length
    body = {CHAT: {"messages": [{"role": "user", "content": text}]}, COMPLETE: {"prompt": text}, EMBED: {"input": text}}
    status, _, answer = server.request("POST", path, body[path])
    assert (status, json.loads(answer)["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[" * 10**5,
        b'{"a":' * 10**5,
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}',
        b'{"messages": [{"role": "user", "content": "x"}], "temperature": 1e999}',
        b'{"messages": [{"role": "user", "content": "x"}], "seed": ' + b"9" * 5000 + b"}",
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "x"}], "model": "\\udfff"}',
        b'"x"',
        b"null",
    ],
)
def test_bodies_that_are_none_are_refused(server, body):
    status, _, answer = server.request("POST", CHAT, body)
    assert (status, set(json.loads(answer)["error"])) == (400, {"message", "type", "param", "code"})


def test_ten_megabytes_are_refused_and_nothing_suffers(server):
    body = {"messages": [{"role": "user", "content": "x" * 10**7}]}
    status, _, answer = server.request("POST", CHAT, body)
    assert (status, json.loads(answer)["error"]["code"]) == (413, "body_too_large")
    assert server.post(CHAT, {"messages": HELLO, "max_tokens": 1})


def test_a_body_need_not_say_that_it_is_json(server):
    status, *_ = server.request("POST", CHAT, {"messages": HELLO, "max_tokens": 1}, **{"Content-Type": "text/plain"})
    assert status == 200


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nowhere", 404), ("GET", CHAT, 405)])
def test_unknown_paths(server, method, path, status):
    found, _, answer = server.request(method, path)
    assert (found, set(json.loads(answer)["error"])) == (status, {"message", "type", "param", "code"})


def test_a_long_conversation_still_gets_an_answer(server):
    turns = [{"role": role, "content": "你好" * 100} for role in ("user", "assistant")] * 20
    body = {"messages": [{"role": "system", "content": "S"}, *turns, *HELLO], "max_tokens": 3}
    assert server.post(CHAT, body)["usage"]["prompt_tokens"] <= CONTEXT


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_frees_its_place(server, stream):
    body = json.dumps({"messages": HELLO, "stream": stream, **ENDLESS}).encode()
    for _ in range(6):  # more than run at a time
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
            connection.sendall(head.encode() + body)
            if stream:
                assert connection.recv(100)
            else:
                while not server.gauge("running"):
                    time.sleep(0.005)
    server.wait_until_idle()
    assert server.post(CHAT, {"messages": HELLO, "max_tokens": 1})


def test_figures_for_prometheus(server):
    def figures() -> dict[str, float]:
        _, headers, text = server.request("GET", "/metrics")
        assert headers["content-type"].startswith("text/plain; version=0.0.4")
        lines = [line for line in text.decode().splitlines() if not line.startswith("#")]
        assert all(
            re.fullmatch(r'minimind_[a-z_]+(\{[a-z]+="[^"]*"(,[a-z]+="[^"]*")*\})? [\d.]+', line) for line in lines
        )
        return {name: float(value) for name, _, value in (line.rpartition(" ") for line in lines)}

    before = figures()
    usage = server.post(CHAT, {"messages": HELLO, "max_tokens": 4})["usage"]
    after = figures()
    gained = {name: after[name] - before.get(name, 0) for name in after}
    assert gained[f'minimind_requests_total{{path="{CHAT}",status="200"}}'] == 1
    assert gained['minimind_tokens_total{kind="prompt"}'] == usage["prompt_tokens"]
    assert gained['minimind_tokens_total{kind="completion"}'] == usage["completion_tokens"]
    assert gained["minimind_first_token_seconds_count"] == 1


# The strict one.


def test_a_key_is_needed(strict):
    for key in ("none", "sécret2", ""):
        status, _, answer = strict.request("GET", "/v1/models", Authorization=f"Bearer {key}".encode())
        assert (status, json.loads(answer)["error"]["code"]) == (401, "invalid_api_key")
    assert strict.request("GET", "/v1/models")[0] == 401
    assert strict.request("POST", CHAT, b"x" * 10**5)[0] == 401
    assert strict.request("GET", "/health")[0] == 200
    with pytest.raises(openai.AuthenticationError):
        strict.client().models.list()


def with_key(server: Server, path: str, body: dict) -> tuple[int, dict, dict]:
    status, headers, answer = server.request("POST", path, body, Authorization="Bearer sécret".encode())
    return status, headers, json.loads(answer)


def test_models_by_name(strict):
    for name in ("first", "second"):
        status, _, answer = with_key(strict, CHAT, {"model": name, "messages": HELLO, "max_tokens": 1})
        assert (status, answer["model"]) == (200, name)
    for name in ("third", None):
        status, _, answer = with_key(strict, CHAT, {"model": name, "messages": HELLO})
        assert (status, answer["error"]["code"]) == (404, "model_not_found")
        assert "first, second" in answer["error"]["message"]


def test_a_full_queue_says_when_to_come_again(strict):
    body = json.dumps({"model": "first", "messages": HELLO, "stream": True, **ENDLESS}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer sécret\r\nContent-Length: {len(body)}\r\n\r\n"
    connections = [socket.create_connection(("127.0.0.1", strict.port)) for _ in range(2)]
    try:
        for connection in connections:
            connection.sendall(head.encode() + body)
        while (strict.gauge("running"), strict.gauge("waiting")) != (1, 1):
            time.sleep(0.005)
        status, headers, answer = with_key(strict, CHAT, {"model": "first", "messages": HELLO})
        assert (status, answer["error"]["code"]) == (429, "queue_full")
        assert int(headers["retry-after"]) >= 1
    finally:
        for connection in connections:
            connection.close()
    strict.wait_until_idle()
    assert with_key(strict, CHAT, {"model": "first", "messages": HELLO, "max_tokens": 1})[0] == 200


def test_pages_of_the_named_origin_may_call(strict, server):
    ask = {"Origin": "http://page", "Access-Control-Request-Method": "POST"}
    status, headers, _ = strict.request("OPTIONS", CHAT, **ask)
    assert (status, headers["access-control-allow-origin"]) == (200, "http://page")
    assert "access-control-allow-origin" not in strict.request("OPTIONS", CHAT, **ask | {"Origin": "http://other"})[1]
    assert "access-control-allow-origin" not in server.request("OPTIONS", CHAT, **ask)[1]


# Beginning and end.


def test_running_answers_end_before_the_server_does(checkpoint):
    server = Server("--checkpoint", checkpoint, "--grace", 60).wait()
    with server.client().chat.completions.create(
        model="m",
        messages=[{"role": "user", "content": "secret words"}],
        stream=True,
        max_tokens=400,
        logit_bias={"2": -100},
    ) as stream:
        chunks = iter(stream)
        next(chunks)
        server.process.send_signal(signal.SIGTERM)
        *_, last = chunks
    assert last.choices[0].finish_reason == "length"
    log = server.process.communicate(timeout=60)[1]
    assert server.process.returncode == 0
    assert re.search(
        rf"POST {CHAT} 200 prompt=\d+ completion=400 first=[\d.]+s [\d.]+tokens/s length [\d.]+s$", log, re.M
    )
    assert "secret words" not in log and "Traceback" not in log


@pytest.mark.slow
def test_answers_that_outlast_the_grace_end_with_an_error(checkpoint):
    server = Server("--checkpoint", checkpoint, "--grace", 0).wait()
    body = {"messages": HELLO, **ENDLESS}
    with ThreadPoolExecutor(2) as pool:
        stream = pool.submit(server.request, "POST", CHAT, body | {"stream": True})
        whole = pool.submit(server.request, "POST", CHAT, body)
        while server.gauge("running") < 2:
            time.sleep(0.005)
        server.process.send_signal(signal.SIGTERM)
    log = server.process.communicate(timeout=60)[1]
    assert (server.process.returncode, "Traceback" in log) == (0, False)
    status, _, answer = whole.result()
    assert (status, json.loads(answer)["error"]["message"]) == (503, "the server is shutting down")
    status, _, events = stream.result()
    assert (status, json.loads(events.split(b"data: ")[-1])["error"]["type"]) == (200, "server_error")


def test_a_failure_of_ours_is_counted_as_one():
    service = Service(Sampling())
    app = create_app(service)
    app.add_api_route("/failing", Mock(side_effect=MemoryError("no memory"), __signature__=inspect.Signature()))
    assert TestClient(app, raise_server_exceptions=False).get("/failing").status_code == 500
    assert service.metrics.requests == {("other", 500): 1}


def test_a_model_for_embeddings_has_a_context_of_its_own(tokenizer):
    vectors = Mock(side_effect=lambda texts: np.eye(3)[: len(texts)])
    service = Service(Sampling(), vectors)
    with Engine(make_model(max_seq_len=CONTEXT), tokenizer) as engine:
        service.engines = {"minimind": engine}
        client = TestClient(create_app(service))
        texts = ["春天" * 10 * CONTEXT, "Hello"]
        answer = client.post(EMBED, json={"input": texts}).json()
        assert client.post(EMBED, content=b'{"input": ["\\ud800"]}').status_code == 400
    assert vectors.call_args_list == [call(texts)]
    assert [one["embedding"] for one in answer["data"]] == [[1, 0, 0], [0, 1, 0]]
    assert answer["usage"]["prompt_tokens"] == sum(len(tokenizer(text).input_ids) for text in texts)


def test_while_the_model_is_loaded():
    """Asked in this process: a real server is too quick."""

    async def ask(path: str) -> tuple[int, dict]:
        sent = []

        async def send(message) -> None:
            sent.append(message)

        async def receive():
            return {"type": "http.request", "body": b"{}", "more_body": False}

        scope = {"type": "http", "method": "GET", "path": path, "headers": [], "query_string": b"", "root_path": ""}
        await create_app(Service(Sampling()))(scope, receive, send)
        return sent[0]["status"], json.loads(sent[1]["body"])

    for path in ("/health", "/v1/models"):
        status, body = asyncio.run(ask(path))
        assert (status, body["error"]["type"]) == (503, "server_error")


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--port", "99999"], "cannot listen"),
        (["--max_batch", "0"], "max_batch"),
    ],
)
def test_a_mistake_ends_with_one_line(flags, reason):
    command = [sys.executable, ROOT / "my_openai_api.py", "--port", "0", *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: ") and reason in done.stderr


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--checkpoint", "nowhere.pth"], "no checkpoint at nowhere.pth"),
        (["--also", "twice"], "NAME=PATH"),
        (["--also", "minimind=x.pth"], "a name of its own"),
        (["--also", "other="], "NAME=PATH"),
        (["--also", "other=nowhere.pth"], "no checkpoint at nowhere.pth"),
        (["--lora", "nowhere"], "nowhere"),
    ],
)
def test_a_model_that_cannot_be_loaded_ends_the_server(checkpoint, flags, reason):
    script = load_script("my_openai_api.py")
    args = parse(script.Args, ["--checkpoint", str(checkpoint), *flags])
    server, service, errors = SimpleNamespace(should_exit=False), Service(Sampling()), []
    script.load(args, service, server, None, errors)
    assert server.should_exit and not service.engines
    assert reason in str(errors[0])


def test_any_other_failure_to_load_ends_it_too(checkpoint, monkeypatch):
    script = load_script("my_openai_api.py")
    monkeypatch.setattr("model.engine.load_engine", Mock(side_effect=RuntimeError("CUDA out of memory")))
    server, errors = SimpleNamespace(should_exit=False), []
    script.load(parse(script.Args, []), Service(Sampling()), server, None, errors)
    assert server.should_exit and "out of memory" in str(errors[0])


# The web page and the terminal client.


def test_the_page_talks_to_it(server, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fast_inference.py", "--out_dir", str(tmp_path)])
    page = AppTest.from_file(str(ROOT / "fast_inference.py"), default_timeout=60).run()
    page.selectbox(key="model").set_value("").run()
    page.text_input(key="base_url").set_value(server.url)
    page.slider(key="max_new_tokens").set_value(16)
    page.chat_input[0].set_value("你好").run()
    assert not page.exception and not page.error
    assert [message.name for message in page.chat_message] == ["user", "assistant"]
    assert re.match(r"\d+ 词元 · [\d.]+ 词元/秒", page.chat_message[1].caption[0].value)


def talk(server: Server, *flags: object, typed: str = "") -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "chat_openai_api.py", "--base_url", server.url, "--max_tokens", 5, *flags]
    return subprocess.run(list(map(str, command)), input=typed, capture_output=True, text=True, encoding="utf-8")


def test_the_client_asks_questions(server):
    streamed = talk(server, "--prompt", "你好", "Hello", "--seed", 1)
    assert (streamed.returncode, streamed.stderr) == (0, "")
    assert streamed.stdout.strip()
    assert talk(server, "--prompt", "你好", "Hello", "--seed", 1, "--no_stream").stdout == streamed.stdout


def test_the_client_chats(server):
    done = talk(server, "--system", "S", typed="你好\n/clear\n\nHello\n/exit\n")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.count("you> ") == 5 and "(forgotten)" in done.stdout


def test_the_client_reports_errors_in_a_line(strict):
    done = talk(strict, "--prompt", "hi")
    assert done.returncode == 1
    assert len(done.stderr.splitlines()) == 1 and "API key" in done.stderr
