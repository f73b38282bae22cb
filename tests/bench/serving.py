"""How fast my_openai_api.py serves, and whether it stays whole: over HTTP on this computer, with fresh weights.

    python tests/bench/serving.py                          # minimind-small-T
    python tests/bench/serving.py --checkpoint out/multi_chat/full_sft_512.pth
    python tests/bench/serving.py --streams 32 --requests 0

Reports tokens/s of one stream and of many at once, how long the first token of a newcomer takes while they run, and of
the 300 requests from 64 clients, of which a third hang up midway: how many got their answer, what is left running, and
the server's memory before and after.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

QUESTION = [{"role": "user", "content": "请用几句话介绍一下长江。"}]


async def ask(port: int, leave_after: int | None = None, **fields) -> tuple[float, float, int]:
    """Streams one answer over a connection of its own: seconds to the first token, seconds in all, tokens.

    With `leave_after` it hangs up after so many pieces, and the tokens are -1. Raises RuntimeError for a broken answer.
    """
    body = {"messages": QUESTION, "stream": True, "stream_options": {"include_usage": True}} | fields
    data = json.dumps(body).encode()
    started, first, pieces, tokens = time.perf_counter(), 0.0, 0, 0
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(data)}\r\n\r\n"
        )
        writer.write(head.encode() + data)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(status.decode().strip())
        async for line in reader:
            if b'"content": "' in line and b'"role"' not in line:
                first = first or time.perf_counter() - started
                pieces += 1
                if pieces == leave_after:
                    return first, time.perf_counter() - started, -1
            if b'"choices": []' in line:
                tokens = int(re.search(rb'"completion_tokens": (\d+)', line)[1])
            if line.startswith(b"data: [DONE]"):
                return first, time.perf_counter() - started, tokens
        raise RuntimeError("the stream broke off")
    finally:
        writer.close()


async def speed(port: int, streams: int, tokens: int) -> None:
    endless = {"max_tokens": tokens, "logit_bias": {"2": -100}}
    await ask(port, **endless | {"max_tokens": 20})  # warm
    alone = []
    for _ in range(3):
        _, seconds, count = await ask(port, **endless)
        alone.append(count / seconds)
    one = statistics.median(alone)
    print(f"one stream: {one:.1f} tokens/s", flush=True)

    started = time.perf_counter()
    answers = await asyncio.gather(*(ask(port, **endless) for _ in range(streams)))
    many = sum(count for *_, count in answers) / (time.perf_counter() - started)
    print(f"{streams} at once: {many:.1f} tokens/s, {many / one:.1f} times as many", flush=True)

    running = asyncio.gather(*(ask(port, **endless) for _ in range(streams)))
    firsts = []
    for _ in range(10):
        await asyncio.sleep(0.3)
        first, *_ = await ask(port, max_tokens=5, logit_bias={"2": -100})
        firsts.append(first)
    await running
    print(f"first token of a newcomer meanwhile: median {statistics.median(firsts):.3f} s, longest {max(firsts):.3f} s")


async def soak(port: int, pid: int, requests: int, clients: int) -> None:
    choose = random.Random(0)
    wanted = [(choose.randrange(5, 100), choose.random() < 1 / 3) for _ in range(requests)]
    whole = left = 0

    async def client() -> None:
        nonlocal whole, left
        while wanted:
            tokens, leaves = wanted.pop()
            after = tokens // 2 if leaves else None
            *_, count = await ask(port, after, max_tokens=tokens, logit_bias={"2": -100})
            left += leaves
            if not leaves:
                if count != tokens:
                    raise RuntimeError(f"{count} tokens instead of {tokens}")
                whole += 1

    before = memory(pid)
    started = time.perf_counter()
    await asyncio.gather(*(client() for _ in range(clients)))
    seconds = time.perf_counter() - started
    figures = await metrics(port)
    while figures["running"] or figures["waiting"]:
        await asyncio.sleep(0.1)
        figures = await metrics(port)
    print(
        f"{requests} requests from {clients} clients in {seconds:.1f} s: {whole} whole answers, {left} hung up, "
        f"{figures['running']} running and {figures['waiting']} waiting afterwards, "
        f"memory {before} MB before and {memory(pid)} MB after",
        flush=True,
    )


async def metrics(port: int) -> dict[str, int]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return {name: int(value) for name, value in re.findall(r"^minimind_(running|waiting) (\d+)$", text, re.M)}


def memory(pid: int) -> int:
    return int(re.search(r"VmRSS:\s+(\d+)", Path(f"/proc/{pid}/status").read_text())[1]) // 1024


def fresh_weights(preset: str, folder: Path) -> Path:
    import torch

    from model.checkpoint import save_weights
    from model.LMConfig import LMConfig
    from model.model import Transformer
    from model.tokenizer import SHIPPED

    torch.manual_seed(0)
    save_weights(folder / "full_sft.pth", Transformer(LMConfig.preset(preset)), SHIPPED)
    return folder / "full_sft.pth"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, help="what to serve; default: fresh weights")
    parser.add_argument("--preset", default="minimind-small-T", help="size of the fresh weights")
    parser.add_argument("--streams", type=int, default=16, help="at once")
    parser.add_argument("--tokens", type=int, default=200, help="of each answer")
    parser.add_argument("--requests", type=int, default=300, help="0: none")
    parser.add_argument("--clients", type=int, default=64, help="that send them")
    parser.add_argument("--rounds", type=int, default=3, help="of the requests; memory should not grow from the second")
    parser.add_argument("server_options", nargs="*", help="behind --, for my_openai_api.py")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = args.checkpoint or fresh_weights(args.preset, Path(folder))
        command = [sys.executable, ROOT / "my_openai_api.py", "--checkpoint", checkpoint, "--port", "0"]
        command += ["--max_batch", str(args.streams + 1), *args.server_options]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        try:
            port = next(int(found[1]) for line in server.stdout if (found := re.search(r":(\d+)/v1$", line)))
            print(f"{checkpoint.name}, {args.preset if not args.checkpoint else ''} {os.cpu_count()} processors")
            asyncio.run(speed(port, args.streams, args.tokens))
            for _ in range(args.rounds if args.requests else 0):
                asyncio.run(soak(port, server.pid, args.requests, args.clients))
        finally:
            server.send_signal(signal.SIGTERM)
            print("the server ended with exit code", server.wait(60))


if __name__ == "__main__":
    main()
