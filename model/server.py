"""The OpenAI-compatible server: routes, models by name, errors in the shape that clients expect."""

import asyncio
import base64
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from .cli import UserError
from .engine import Busy, Closed, Engine, TooLong, apart, check_unicode
from .sampling import Sampling
from .server_gate import ApiError, Gate, Metrics
from .server_replies import ChatReply, CompletionReply, Interrupted, Reply
from .server_schema import ChatRequest, CompletionRequest, EmbeddingRequest
from .tokenizer import encode_texts

RETRY_AFTER = {"Retry-After": "1"}
MAX_INPUTS = 2048  # of one embedding request, as the published schema has it


class Service:
    """The engines that are served, by name; none while they are being loaded."""

    def __init__(self, defaults: Sampling, embed_texts: Callable[[list[str]], np.ndarray] | None = None):
        self.defaults, self.embed_texts = defaults, embed_texts
        self.engines: Mapping[str, Engine] = {}
        self.metrics = Metrics()
        self.created = int(time.time())

    def check_ready(self) -> None:
        if not self.engines:
            raise ApiError(503, "the model is being loaded", "server_error", headers=RETRY_AFTER)

    def find(self, name: str | None) -> tuple[str, Engine]:
        """Where one model is served, every name means it: clients send placeholders."""
        self.check_ready()
        if len(self.engines) == 1:
            return next(iter(self.engines.items()))
        if name not in self.engines:
            there = ", ".join(self.engines)
            raise ApiError(404, f"there is no model {name!r}; there are {there}", param="model", code="model_not_found")
        return name, self.engines[name]

    def describe(self, name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": self.created, "owned_by": "minimind"}

    def gauges(self) -> dict[str, float]:
        engines = self.engines.values()
        return {
            "ready": int(bool(self.engines)),
            "running": sum(len(engine.answers) for engine in engines),
            "waiting": sum(len(engine.waiting) for engine in engines),
        }

    def close(self) -> None:
        for engine in self.engines.values():
            engine.close()


class EventStream(StreamingResponse):
    """A reply as server-sent events; proxies must pass each of them on at once."""

    def __init__(self, events: AsyncIterator[bytes]):
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")


def create_app(service: Service, api_key: str = "", max_body: int = 2**21, cors_origins: list[str] | None = None):
    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(title="MiniMind", docs_url=None, redoc_url=None, lifespan=lifespan)
    add_errors(app)
    add_information(app, service)
    add_generation(app, service)
    add_embeddings(app, service)
    known_paths = {route.path for route in app.routes}
    app.add_middleware(Gate, api_key=api_key, max_body=max_body, metrics=service.metrics, known_paths=known_paths)
    if cors_origins:
        app.add_middleware(CORSMiddleware, allow_origins=cors_origins, allow_methods=["*"], allow_headers=["*"])
    return app


def add_errors(app: FastAPI) -> None:
    def answer(error_class: type[Exception], make: Callable[[Any], ApiError]) -> None:
        async def handler(_: Request, error: Exception) -> Response:
            return make(error).response()

        app.add_exception_handler(error_class, handler)

    answer(ApiError, lambda error: error)
    answer(TooLong, lambda error: ApiError(400, str(error), code="context_length_exceeded"))
    answer(UserError, lambda error: ApiError(400, str(error)))
    answer(RequestValidationError, validation_error)
    answer(HTTPException, lambda error: ApiError(error.status_code, str(error.detail), headers=error.headers))
    answer(Busy, lambda error: ApiError(429, str(error), "rate_limit_error", code="queue_full", headers=RETRY_AFTER))
    answer(Closed, lambda error: ApiError(503, str(error), "server_error", headers=RETRY_AFTER))
    answer(Interrupted, lambda error: ApiError(503, str(error), "server_error", headers=RETRY_AFTER))
    answer(Exception, lambda error: ApiError(500, f"{type(error).__name__} in the server: see its log", "server_error"))


def validation_error(error: RequestValidationError) -> ApiError:
    """The first mistake only, by the name of its field."""
    first = error.errors()[0]
    field = ".".join(str(part) for part in first["loc"] if part != "body") or None
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{field}: {message}" if field else message, param=field)


def add_information(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    async def health() -> dict[str, Any]:
        service.check_ready()
        return {"status": "ok", "models": list(service.engines)}

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(service.metrics.text(service.gauges()), media_type="text/plain; version=0.0.4")

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        service.check_ready()
        return {"object": "list", "data": [service.describe(name) for name in service.engines]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        service.check_ready()
        if name not in service.engines:
            raise ApiError(404, f"there is no model {name!r}", param="model", code="model_not_found")
        return service.describe(name)


def add_generation(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", response_model=None)
    async def chat_completions(body: ChatRequest, request: Request) -> Response | dict[str, Any]:
        name, engine = service.find(body.model)
        samplings = samplings_of(body, service, engine)
        prompt = await asyncio.to_thread(engine.chat_prompt, body.conversation, samplings[0])
        answers = engine.submit([(prompt, sampling) for sampling in samplings], body.stop_strings)
        return await send(request, ChatReply(name, answers, engine.tokenizer), body)

    @app.post("/v1/completions", response_model=None)
    async def completions(body: CompletionRequest, request: Request) -> Response | dict[str, Any]:
        if (body.best_of or 1) > (body.n or 1):
            raise ApiError(400, "best_of above n is not supported", param="best_of")
        name, engine = service.find(body.model)
        samplings = samplings_of(body, service, engine)
        prompts = await asyncio.to_thread(lambda: [ids_of(engine, prompt, "prompt") for prompt in body.prompts])
        if not 0 < len(prompts) * len(samplings) <= engine.max_batch + engine.max_queue:
            raise ApiError(400, f"{len(prompts)} prompts times n={len(samplings)} is not possible here", param="prompt")
        pairs = [(prompt, sampling) for prompt in prompts for sampling in samplings]
        reply = CompletionReply(name, engine.submit(pairs, body.stop_strings), engine.tokenizer, len(prompts))
        if body.echo:
            texts = [engine.tokenizer.decode(ids, skip_special_tokens=True) for ids in prompts]
            reply.echoes = [text for text in texts for _ in samplings]
        return await send(request, reply, body)


def samplings_of(body: ChatRequest | CompletionRequest, service: Service, engine: Engine) -> list[Sampling]:
    try:
        samplings = body.samplings(service.defaults, engine.context, engine.model.config.vocab_size)
    except ValueError as error:
        raise ApiError(400, str(error), param="logit_bias") from error
    if len(samplings) > engine.max_batch + engine.max_queue:
        raise ApiError(400, f"n must be at most {engine.max_batch + engine.max_queue} here", param="n")
    return samplings


def ids_of(engine: Engine, text: str | list[int], param: str) -> list[int]:
    """A prompt as ids, with <s> in front; ids of a client may be any of the vocabulary."""
    if isinstance(text, str):
        return engine.text_prompt(text)
    vocab_size = engine.model.config.vocab_size
    if not text or not all(0 <= token < vocab_size for token in text):
        raise ApiError(400, f"{param}: token ids must be 0 or more and below {vocab_size}", param=param)
    return text


def text_of(engine: Engine, text: str | list[int]) -> str:
    """The same as text, whatever its length."""
    if isinstance(text, list):
        return engine.tokenizer.decode(ids_of(engine, text, "input"))
    check_unicode([text])
    return text


async def send(request: Request, reply: Reply, body: ChatRequest | CompletionRequest) -> Response | dict[str, Any]:
    request.state.answers.extend(reply.answers)
    if body.stream:
        return EventStream(reply.events(body.include_usage))
    return await unless_hung_up(request, reply.whole())


async def unless_hung_up(request: Request, work: Coroutine[Any, Any, dict[str, Any]]) -> Response | dict[str, Any]:
    """The work's result; it is given up when the client leaves."""

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, waiting = asyncio.create_task(work), asyncio.create_task(hang_up())
    try:
        await asyncio.wait([working, waiting], return_when=asyncio.FIRST_COMPLETED)
        return working.result() if working.done() else Response(status_code=499)
    finally:
        working.cancel()
        waiting.cancel()


def add_embeddings(app: FastAPI, service: Service) -> None:
    @app.post("/v1/embeddings")
    async def embeddings(body: EmbeddingRequest) -> dict[str, Any]:
        """A toy: the mean of the language model's hidden states; nothing was trained for it."""
        name, engine = service.find(body.model)
        texts = body.texts
        if not 0 < len(texts) <= MAX_INPUTS or "" in texts:
            raise ApiError(400, f"input must be 1 to {MAX_INPUTS} texts, none of them empty", param="input")
        if service.embed_texts:  # our model's context is no limit then, and its tokens are only what is counted
            plain = [text_of(engine, text) for text in texts]
            prompts = await asyncio.to_thread(encode_texts, engine.tokenizer, plain)
            vectors = np.asarray(await asyncio.to_thread(apart, service.embed_texts, plain), dtype=np.float32)
        else:
            prompts = await asyncio.to_thread(lambda: [ids_of(engine, text, "input") for text in texts])
            longest = max(map(len, prompts))
            if longest > engine.context:
                raise TooLong(f"a text has {longest} tokens, but the model's context is {engine.context}")
            vectors = np.array([await asyncio.wrap_future(engine.embed(ids)) for ids in prompts], dtype=np.float32)
        if body.dimensions:
            vectors = vectors[:, : body.dimensions]
            vectors = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        tokens = sum(map(len, prompts))
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": encoded(vector, body.encoding_format)}
                for index, vector in enumerate(vectors)
            ],
            "model": name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }


def encoded(vector: np.ndarray, encoding: str | None) -> list[float] | str:
    """Numbers, or base64 of little-endian float32."""
    if encoding == "base64":
        return base64.b64encode(vector.astype("<f4").tobytes()).decode()
    return vector.tolist()
