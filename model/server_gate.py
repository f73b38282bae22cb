"""What every request passes through: key, size, JSON; afterwards a line in the log, and figures for Prometheus."""

import hmac
import json
import logging
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .answer import Answer

log = logging.getLogger("minimind")

DRAINED = 64  # a body too large is read to its end, unless it is so many times too large: else clients see no answer
BUCKETS = (0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)  # seconds to the first token


class ApiError(Exception):
    """An answer in the shape that OpenAI's clients understand."""

    def __init__(
        self,
        status: int,
        message: str,
        type: str = "invalid_request_error",
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(message)
        self.status, self.headers = status, headers
        self.error = {"message": message, "type": type, "param": param, "code": code}

    def response(self) -> Response:
        body = json.dumps({"error": self.error}, ensure_ascii=False).encode(errors="replace")
        return Response(body, self.status, self.headers, "application/json")


class Metrics:
    """Counters since the start, in Prometheus's text format."""

    def __init__(self):
        self.requests: Counter[tuple[str, int]] = Counter()
        self.tokens: Counter[str] = Counter()
        self.first_token = [0] * (len(BUCKETS) + 1)
        self.first_token_seconds = 0.0

    def count(self, path: str, status: int, answers: list[Answer]) -> None:
        self.requests[path, status] += 1
        for answer in answers:
            self.tokens["completion"] += answer.completion_tokens
            self.tokens["prompt"] += answer.prompt_tokens
            if answer.completion_tokens:
                self.first_token[bisect_left(BUCKETS, answer.seconds_to_first)] += 1
                self.first_token_seconds += answer.seconds_to_first

    def text(self, gauges: Mapping[str, float]) -> str:
        lines = ["# TYPE minimind_requests_total counter"]
        for (path, status), count in sorted(self.requests.items()):
            lines.append(f'minimind_requests_total{{path="{path}",status="{status}"}} {count}')
        lines.append("# TYPE minimind_tokens_total counter")
        lines += [f'minimind_tokens_total{{kind="{kind}"}} {self.tokens[kind]}' for kind in ("prompt", "completion")]
        lines.append("# TYPE minimind_first_token_seconds histogram")
        for bucket, name in enumerate((*map(str, BUCKETS), "+Inf")):
            lines.append(f'minimind_first_token_seconds_bucket{{le="{name}"}} {sum(self.first_token[: bucket + 1])}')
        lines.append(f"minimind_first_token_seconds_sum {self.first_token_seconds:.6f}")
        lines.append(f"minimind_first_token_seconds_count {sum(self.first_token)}")
        for name, value in gauges.items():
            lines += [f"# TYPE minimind_{name} gauge", f"minimind_{name} {value}"]
        return "\n".join(lines) + "\n"


class Gate:
    """ASGI middleware round the whole application.

    Args:
        api_key: what requests to /v1 must bring; empty: nothing.
        max_body: bytes.
        known_paths: those that the figures tell apart; all others count as one.
    """

    def __init__(self, app: ASGIApp, api_key: str, max_body: int, metrics: Metrics, known_paths: Collection[str]):
        self.app, self.api_key, self.max_body, self.metrics = app, api_key.encode(), max_body, metrics
        self.known_paths = known_paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), 0
        answers: list[Answer] = []
        scope.setdefault("state", {})["answers"] = answers  # a route tells here what it generates

        async def noting_send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            try:
                receive = await self.checked(scope, receive)
            except ApiError as error:
                await error.response()(scope, receive, noting_send)
            else:
                await self.app(scope, receive, noting_send)
        except Exception:  # the server answers it, behind our back
            status = status or 500
            raise
        finally:
            for answer in answers:
                answer.cancel()  # of no effect unless the client has left
            self.note(scope, status, time.monotonic() - started, answers)

    async def checked(self, scope: Scope, receive: Receive) -> Receive:
        """Refuses what must not come in (ApiError); the way to read the body again."""
        headers = dict(scope["headers"])
        if self.api_key and scope["path"].startswith("/v1"):
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(key.strip(), self.api_key):
                raise ApiError(
                    401,
                    "a valid API key is needed: Authorization: Bearer KEY",
                    "authentication_error",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            return receive
        body = await self.body(headers, receive)
        check_json(body)
        scope["headers"] = [*(headers | {b"content-type": b"application/json"}).items()]  # clients forget to say so
        pending = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return pending.pop() if pending else await receive()

        return again

    async def body(self, headers: Mapping[bytes, bytes], receive: Receive) -> bytes:
        too_large = ApiError(413, f"the body is larger than {self.max_body:,} bytes", code="body_too_large")
        declared = headers.get(b"content-length", b"")
        if declared.isdigit() and int(declared) > DRAINED * self.max_body:
            raise too_large
        parts, size, more = [], 0, True
        while more and size <= DRAINED * self.max_body:
            message = await receive()
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if size <= self.max_body:
                parts.append(part)
        if size > self.max_body:
            raise too_large
        return b"".join(parts)

    def note(self, scope: Scope, status: int, seconds: float, answers: list[Answer]) -> None:
        """A line without any of the text."""
        path = scope["path"] if scope["path"] in self.known_paths else "other"
        self.metrics.count(path, status, answers)
        words = [scope["method"], scope["path"].encode(errors="replace").decode()[:80], status or "hung up"]
        if answers:
            prompt = sum(answer.prompt_tokens for answer in answers)
            completion = sum(answer.completion_tokens for answer in answers)
            first = min(answer.seconds_to_first for answer in answers)
            last = max(answer.seconds for answer in answers)
            speed = completion / last if last else 0.0
            words += [f"prompt={prompt}", f"completion={completion}", f"first={first:.3f}s", f"{speed:.1f}tokens/s"]
            words += [answer.finish_reason or "hung up" for answer in answers[:1]]
        log.info("%s %.3fs", " ".join(map(str, words)), seconds)


def check_json(body: bytes) -> None:
    """Refuses what Python's parser or ours would stumble over later: NaN, endless nesting, halves of characters."""

    def refuse(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        content = json.loads(body.decode(), parse_constant=refuse)
        json.dumps(content, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError as error:
        raise ApiError(400, "the body holds half a surrogate pair, which is no text") from error
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"the body is not valid JSON: {str(error)[:200]}") from error
