"""An OpenAI-compatible server: chat interfaces such as Open-WebUI and FastGPT can talk to the model.

    python my_openai_api.py                                            # the newest chat model, at http://127.0.0.1:8000/v1
    python my_openai_api.py --checkpoint out/multi_chat/full_sft_512.pth --lora out/lora/medical_512
    python my_openai_api.py --host 0.0.0.0 --api_key secret            # for other computers
    python my_openai_api.py --also base=out/pretrain_512.pth           # two models under two names

    python chat_openai_api.py                                          # a client for the terminal
    curl http://127.0.0.1:8000/v1/chat/completions -H 'Content-Type: application/json' \\
         -d '{"model": "minimind", "messages": [{"role": "user", "content": "你好"}], "stream": true}'

Requests that come at the same time are answered together, in one batch. /health tells whether the model is loaded,
/metrics has figures for Prometheus. SIGTERM and Ctrl-C let running answers end first.
"""

import logging
import os
import signal
import socket
import threading
from dataclasses import dataclass, field, replace
from types import FrameType
from typing import TYPE_CHECKING

from model.cli import UserError, run
from model.options import InferenceOptions

if TYPE_CHECKING:
    import uvicorn

    from model.server import Service

STAGES = ("full_sft", "dpo")


@dataclass
class Args(InferenceOptions):
    """Serve a model. Sampling options hold where a request leaves them open; without a limit of the request's own an
    answer may fill the context."""

    host: str = "127.0.0.1"  # address to listen on; 0.0.0.0: reachable from other computers
    port: int = 8000  # 0: any that is free
    api_key: str = ""  # what clients must send; empty: what MINIMIND_API_KEY says, if anything
    model_name: str = "minimind"  # under which the model is served
    also: list[str] = field(default_factory=list)  # further checkpoints to serve, each as NAME=PATH
    max_batch: int = 16  # answers generated at the same time
    max_queue: int = 64  # further ones that may wait; more are refused (429)
    max_body_mb: float = 2.0  # largest request, in megabytes
    grace: int = 30  # seconds that running answers have to end after SIGTERM
    cors_origins: list[str] = field(default_factory=list)  # web pages that may call the server, or *; none: no page
    embedding_model: str = ""  # sentence-transformers model for /v1/embeddings; empty: a toy, made from this model

    def __post_init__(self):
        for name, least in {"max_batch": 1, "max_queue": 0, "max_body_mb": 0.001, "grace": 0, "port": 0}.items():
            if not getattr(self, name) >= least:
                raise UserError(f"--{name} is {getattr(self, name)}, but must be at least {least}")


def main(args: Args) -> None:
    listener = listen(args.host, args.port)

    import uvicorn

    from model.engine import sampling_of
    from model.server import Service, create_app

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    service = Service(sampling_of(args), embedder(args.embedding_model))
    key = args.api_key or os.environ.get("MINIMIND_API_KEY", "")
    app = create_app(service, key, int(args.max_body_mb * 2**20), args.cors_origins)
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=args.grace + 5)
    server = uvicorn.Server(config)
    end_answers_after(args.grace, server, service)
    errors: list[Exception] = []
    loader = threading.Thread(target=load, args=(args, service, server, listener, errors), daemon=True)
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, lambda *_: None)  # uvicorn raises them once more after its tidy end
    loader.start()
    server.run(sockets=[listener])
    if errors:
        raise errors[0]


def listen(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=1024)
    except (OSError, OverflowError) as error:
        raise UserError(f"cannot listen on {host} port {port} ({error}): choose another --port") from error


def end_answers_after(grace: int, server: "uvicorn.Server", service: "Service") -> None:
    """Those that still run so many seconds after a signal end with an error that says why."""
    handle_exit = server.handle_exit

    def handle(signum: int, frame: FrameType | None) -> None:
        handle_exit(signum, frame)
        timer = threading.Timer(grace, service.close)
        timer.daemon = True
        timer.start()

    server.handle_exit = handle


def load(
    args: Args, service: "Service", server: "uvicorn.Server", listener: socket.socket, errors: list[Exception]
) -> None:
    """Meanwhile the server answers that it is loading."""
    from model.engine import load_engine

    try:
        engines = {args.model_name: load_engine(args, STAGES, args.max_batch, args.max_queue)}
        for entry in args.also:
            name, _, path = entry.partition("=")
            if not name or not path or name in engines:
                raise UserError(f"--also {entry}: must be NAME=PATH, with a name of its own")
            other = replace(args, checkpoint=path, tokenizer="", lora="", rope_theta=None, n_heads=None)
            engines[name] = load_engine(other, STAGES, args.max_batch, args.max_queue)
        service.engines = engines
        host, port = listener.getsockname()[:2]
        print(f"serving {', '.join(engines)} at http://{f'[{host}]' if ':' in host else host}:{port}/v1", flush=True)
    except Exception as error:  # whatever it is, the main thread has to hear of it
        errors.append(error)
        server.should_exit = True


def embedder(name: str):
    """What turns texts into vectors, where a model for that is named."""
    if not name:
        return None
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise UserError("--embedding_model needs a package: pip install sentence-transformers") from error
    try:
        model = SentenceTransformer(name)
    except (OSError, ValueError) as error:
        raise UserError(f"--embedding_model {name} cannot be loaded: {error}") from error
    return lambda texts: model.encode(texts, normalize_embeddings=True, show_progress_bar=False)


if __name__ == "__main__":
    run(main, Args)
