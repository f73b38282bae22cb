"""Chat with a model in the browser.

    streamlit run fast_inference.py                                    # the checkpoints in out/
    streamlit run fast_inference.py -- --out_dir elsewhere             # ... or in another folder
    streamlit run fast_inference.py --server.address 0.0.0.0           # for other computers, too

The page can also talk to an OpenAI-compatible server, such as my_openai_api.py.
"""

import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import streamlit as st

from model.cli import UserError, run

if TYPE_CHECKING:
    from model.chat import Message
    from model.engine import Engine

API = ""  # the choice that is no checkpoint
COMMANDS = """python data_process.py
python 1-pretrain.py --model tiny --max_seq_len 256
python 3-full_sft.py --max_seq_len 256"""

CHINESE = {
    "language": "语言 / Language",
    "title": "MiniMind 对话",
    "model": "模型",
    "adapter": "LoRA 适配器",
    "none": "不使用",
    "api": "OpenAI 兼容接口",
    "base_url": "接口地址",
    "api_model": "模型名称",
    "api_key": "密钥",
    "system": "系统提示词",
    "history": "携带的历史轮数",
    "temperature": "温度：越低越稳定，越高越多样",
    "top_p": "top-p：只在累计概率内选择",
    "top_k": "top-k：只在前 k 个词元中选择（0 为全部）",
    "repetition_penalty": "重复惩罚",
    "max_new_tokens": "回答的最大长度（词元）",
    "ask": "请输入问题",
    "stop": "停止",
    "stopped": "已停止",
    "again": "重新生成",
    "clear": "清空对话",
    "nothing": "`{folder}` 里还没有模型。用自带的小样本训练一个（几分钟，仅用于体验流程）：",
    "or_api": "或者在左侧选择“OpenAI 兼容接口”。",
    "unreachable": "接口没有应答：{error}",
    "note": "{tokens} 词元 · {speed:.1f} 词元/秒",
    "cut": " · 达到长度上限",
}
ENGLISH = {
    "language": "语言 / Language",
    "title": "MiniMind chat",
    "model": "Model",
    "adapter": "LoRA adapter",
    "none": "none",
    "api": "OpenAI-compatible server",
    "base_url": "Address",
    "api_model": "Name of the model",
    "api_key": "Key",
    "system": "System prompt",
    "history": "Earlier turns that are sent",
    "temperature": "Temperature: low is steady, high is varied",
    "top_p": "top-p: choose within this probability",
    "top_k": "top-k: choose among k tokens (0: all)",
    "repetition_penalty": "Repetition penalty",
    "max_new_tokens": "Longest answer, in tokens",
    "ask": "Your question",
    "stop": "Stop",
    "stopped": "stopped",
    "again": "Another answer",
    "clear": "Clear",
    "nothing": "There is no model in `{folder}` yet. Train one on the bundled sample (minutes; only to try the chain):",
    "or_api": "Or choose the OpenAI-compatible server on the left.",
    "unreachable": "The server does not answer: {error}",
    "note": "{tokens} tokens · {speed:.1f} tokens/s",
    "cut": " · cut at the limit",
}


@dataclass
class Args:
    """Chat with a model in the browser."""

    out_dir: str = "out"  # where to look for checkpoints and adapters
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # where to compute
    tokenizer: str = ""  # folder of the tokenizer, for weights without a .json beside them; empty: the shipped one
    rope_theta: float | None = None  # base of the rotary wavelengths, for such weights; none: 10000
    n_heads: int | None = None  # query heads, for such weights; none: 16


@dataclass
class Settings:
    """What the sidebar says."""

    checkpoint: str  # empty: an API
    adapter: str
    base_url: str
    api_model: str
    api_key: str
    system: str
    history: int
    sampling: dict[str, Any]


def main(args: Args) -> None:
    if not st.runtime.exists():
        raise UserError("start the page with: streamlit run fast_inference.py")
    st.set_page_config(page_title="MiniMind", page_icon="💬")
    language = st.sidebar.radio(CHINESE["language"], ["中文", "English"], horizontal=True)
    words = ENGLISH if language == "English" else CHINESE
    settings = sidebar(args, words)
    st.title(words["title"])
    if not settings.checkpoint and not settings.base_url:
        st.info(words["nothing"].format(folder=args.out_dir))
        st.code(COMMANDS, language="bash")
        st.write(words["or_api"])
        return
    try:
        chat(args, settings, words)
    except UserError as error:
        st.error(str(error))


def sidebar(args: Args, words: dict[str, str]) -> Settings:
    with st.sidebar:
        folder = Path(args.out_dir)
        checkpoints = sorted(folder.rglob("*.pth"), key=lambda path: path.stat().st_mtime, reverse=True)
        adapters = sorted(path.parent for path in folder.rglob("adapter_config.json"))
        checkpoint, adapter, base_url, api_model, api_key = "", "", "", "minimind", ""
        choices = [str(path.relative_to(folder)) for path in checkpoints]
        choice = st.selectbox(
            words["model"],
            [*choices, API],
            index=0 if choices else None,
            format_func=lambda choice: words["api"] if choice == API else choice,
            key="model",
        )
        if choice in choices:
            checkpoint = str(folder / choice)
            names = [words["none"], *(str(path.relative_to(folder)) for path in adapters)]
            adapter = st.selectbox(words["adapter"], names, key="adapter") if adapters else words["none"]
            adapter = "" if adapter == words["none"] else str(folder / adapter)
        elif choice == API:
            base_url = st.text_input(words["base_url"], "http://127.0.0.1:8000/v1", key="base_url")
            api_model = st.text_input(words["api_model"], api_model, key="api_model")
            api_key = st.text_input(words["api_key"], os.environ.get("OPENAI_API_KEY", ""), type="password", key="key")
        system = st.text_area(words["system"], key="system")
        history = st.slider(words["history"], 0, 10, 3, key="history")
        sampling = {
            "temperature": st.slider(words["temperature"], 0.0, 2.0, 0.7, 0.05, key="temperature"),
            "top_p": st.slider(words["top_p"], 0.05, 1.0, 0.9, 0.05, key="top_p"),
            "top_k": st.slider(words["top_k"], 0, 200, 50, key="top_k"),
            "repetition_penalty": st.slider(words["repetition_penalty"], 1.0, 2.0, 1.1, 0.05, key="penalty"),
            "max_new_tokens": st.slider(words["max_new_tokens"], 16, 2048, 256, 16, key="max_new_tokens"),
        }
        st.button(words["clear"], on_click=lambda: st.session_state.update(messages=[]), key="clear")
    return Settings(checkpoint, adapter, base_url, api_model, api_key, system, history, sampling)


def chat(args: Args, settings: Settings, words: dict[str, str]) -> None:
    """The conversation so far, the next question, and its answer."""
    ask = engine_source(args, settings, words) if settings.checkpoint else api_source(settings, words)
    messages: list[Message] = st.session_state.setdefault("messages", [])
    question = st.chat_input(words["ask"], key="question")
    if st.session_state.pop("again", False) and messages and messages[-1]["role"] == "assistant":
        messages.pop()
    for message in messages:
        show(message, words)
    if question:
        messages.append({"role": "user", "content": question})
        show(messages[-1], words)
    if not messages:
        return
    if messages[-1]["role"] == "user":
        answer(ask, messages, settings, words)
    st.button(words["again"], on_click=lambda: st.session_state.update(again=True), key="again_button")


def show(message: "Message", words: dict[str, str]) -> None:
    with st.chat_message(message["role"]):
        st.markdown(with_line_breaks(message["content"]))
        if message["role"] == "assistant":
            st.caption(message.get("note", words["stopped"]))


def answer(
    ask: Callable[[list["Message"], dict[str, str]], Iterator[str]],
    messages: list["Message"],
    settings: Settings,
    words: dict[str, str],
) -> None:
    """Streams the answer to the last message. Whatever is clicked meanwhile, what has come so far is kept."""
    opening = [{"role": "system", "content": settings.system}] if settings.system else []
    sent = [{"role": m["role"], "content": m["content"]} for m in messages[-2 * settings.history - 1 :]]
    reply = {"role": "assistant", "content": ""}
    messages.append(reply)
    with st.chat_message("assistant"):
        place, below = st.empty(), st.empty()
        below.button(words["stop"], key="stop")  # any click ends this run of the script
        pieces = ask([*opening, *sent], reply)
        try:
            for piece in pieces:
                reply["content"] += piece
                place.markdown(with_line_breaks(reply["content"]))
        except UserError as error:
            del messages[-2:]  # the question that cannot be answered
            below.empty()
            st.error(str(error))
            return
        finally:
            pieces.close()
        below.caption(reply["note"])


def with_line_breaks(text: str) -> str:
    return text.replace("\n", "  \n")


@st.cache_resource(max_entries=3, on_release=lambda engine: engine.close())
def engine_of(checkpoint: str, written: tuple[float, ...], **options: Any) -> "Engine":
    """Loaded once for all visitors; `written` is when its files were, so that new ones of these names are seen."""
    from model.engine import load_engine
    from model.options import InferenceOptions

    return load_engine(InferenceOptions(checkpoint=checkpoint, **options), max_batch=8)


def engine_source(
    args: Args, settings: Settings, words: dict[str, str]
) -> Callable[[list["Message"], dict[str, str]], Iterator[str]]:
    """Answers from a model in this process, which all visitors share."""
    from model.engine import Busy, Closed
    from model.sampling import Sampling

    path = settings.checkpoint
    options: dict[str, Any] = dict(lora=settings.adapter, device=args.device)
    if not Path(path).with_suffix(".json").is_file():  # nothing tells what these weights are, but the command line
        options |= dict(tokenizer=args.tokenizer, rope_theta=args.rope_theta, n_heads=args.n_heads)
    files = [Path(path), *(Path(settings.adapter).glob("adapter_model.*") if settings.adapter else ())]
    engine = engine_of(path, tuple(file.stat().st_mtime for file in files), **options)

    def ask(messages: list["Message"], reply: dict[str, str]) -> Iterator[str]:
        try:
            made = engine.chat(messages, Sampling(**settings.sampling))
        except (Busy, Closed) as error:
            raise UserError(str(error)) from error
        try:
            yield from made
        finally:
            made.cancel()
        reply["note"] = note(words, made.completion_tokens, made.seconds, made.finish_reason)

    return ask


def api_source(settings: Settings, words: dict[str, str]) -> Callable[[list["Message"], dict[str, str]], Iterator[str]]:
    """Answers from an OpenAI-compatible server."""
    from openai import OpenAI, OpenAIError

    def ask(messages: list["Message"], reply: dict[str, str]) -> Iterator[str]:
        sampling = dict(settings.sampling)
        extras = {name: sampling.pop(name) for name in ("top_k", "repetition_penalty")}
        started, tokens, reason = time.monotonic(), 0, None
        client = OpenAI(base_url=settings.base_url, api_key=settings.api_key or "none", max_retries=0)
        try:
            stream = client.chat.completions.create(
                model=settings.api_model,
                messages=messages,
                stream=True,
                stream_options={"include_usage": True},
                max_tokens=sampling.pop("max_new_tokens"),
                extra_body=extras,
                **sampling,
            )
            for chunk in stream:
                tokens = chunk.usage.completion_tokens if chunk.usage else tokens
                for choice in chunk.choices:
                    reason = choice.finish_reason or reason
                    yield choice.delta.content or ""
        except OpenAIError as error:
            raise UserError(words["unreachable"].format(error=error)) from error
        finally:
            client.close()  # ends the stream, too
        reply["note"] = note(words, tokens, time.monotonic() - started, reason)

    return ask


def note(words: dict[str, str], tokens: int, seconds: float, reason: str | None) -> str:
    text = words["note"].format(tokens=tokens, speed=tokens / seconds if seconds else 0.0)
    return text + words["cut"] if reason == "length" else text


if __name__ == "__main__":
    run(main, Args)
