"""0-eval_pretrain.py and 2-eval.py, called as the command line calls them."""

import codecs
import fcntl
import gzip
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script, make_model

from model.checkpoint import save_weights
from model.cli import run

SCRIPTS = {name: load_script(name) for name in ("0-eval_pretrain.py", "2-eval.py")}
DOCUMENTS = ["春天来了，小草绿了。", "Hello, world 123", "你好，世界！"]


@pytest.fixture
def out(tmp_path, tokenizer_dir) -> Path:
    """A folder with a base model and, older, a chat model."""
    for age, name in enumerate(("pretrain_32.pth", "single_chat/full_sft_32.pth")):
        save_weights(tmp_path / "out" / name, make_model(), tokenizer_dir)
        os.utime(tmp_path / "out" / name, (2000 - age, 2000 - age))
    return tmp_path / "out"


@pytest.fixture
def call(out, capsys, monkeypatch):
    """Runs a script in this process; returns what it printed."""

    def call(script: str, *flags: object, stdin: bytes = b"") -> str:
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        run(SCRIPTS[script].main, SCRIPTS[script].Args, ["--out_dir", str(out), *map(str, flags)])
        return capsys.readouterr().out

    return call


@pytest.fixture
def fail(call, capsys):
    """Runs a script that must end with exit code 2; returns its one line."""

    def fail(script: str, *flags: object, stdin: bytes = b"") -> str:
        with pytest.raises(SystemExit) as caught:
            call(script, *flags, stdin=stdin)
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        return line

    return fail


@pytest.mark.parametrize(
    ("script", "newest"), [("0-eval_pretrain.py", "pretrain_32.pth"), ("2-eval.py", "single_chat/full_sft_32.pth")]
)
def test_each_takes_the_newest_of_its_kind_and_says_which(call, out, script, newest):
    flags = ("--prompt", "你好", "--max_new_tokens", 3)
    assert call(script, *flags).startswith(f"{out / newest}, the newest in {out}: ")
    (out / newest).unlink()  # then any other will do
    assert ".pth, the newest in" in call(script, *flags)


def test_published_weights_need_to_be_told_what_their_shapes_do_not_show(call, fail, out, tokenizer_dir):
    model = make_model(rope_theta=500.0)
    save_weights(out / "ours.pth", model, tokenizer_dir)
    torch.save(dict(model.state_dict()), out / "published.pth")
    sampling = ("--seed", 1, "--temperature", 1, "--repetition_penalty", 2, "--max_new_tokens", 16)
    flags = ("--prompt", "你好", *sampling, "--output", out / "answers.json")

    def answer(name: str, *more: object) -> str:
        call("2-eval.py", "--checkpoint", out / name, "--tokenizer", tokenizer_dir, *flags, *more)
        return json.loads((out / "answers.json").read_text())["answers"][0]["answer"]

    expected = answer("ours.pth")
    assert answer("published.pth", "--n_heads", 4, "--rope_theta", 500) == expected
    assert answer("published.pth", "--n_heads", 4) != expected != answer("published.pth", "--rope_theta", 500)
    said = fail("2-eval.py", "--checkpoint", out / "published.pth", "--tokenizer", tokenizer_dir, "--n_heads", 5)
    assert "published.pth" in said and "n_heads" in said
    assert "rope_theta is 0.0" in fail("2-eval.py", "--rope_theta", 0)


def test_several_texts_are_continued(call):
    printed = call("0-eval_pretrain.py", "--prompt", "春天", "Hello", "--max_new_tokens", 4, "--temperature", 0)
    assert re.findall(r"^(春天|Hello)\|", printed, re.M) == ["春天", "Hello"]
    assert len(re.findall(r"^\[(length|stop), \d+ tokens, [\d.]+ tokens/s\]$", printed, re.M)) == 2


def test_built_in_openings_are_continued(call):
    printed = call("0-eval_pretrain.py", "--max_new_tokens", 1)
    openings = SCRIPTS["0-eval_pretrain.py"].OPENINGS
    assert len(openings) == 7
    assert all(f"\n{opening}|" in printed for opening in openings)


@pytest.mark.parametrize("packed", [False, True])
def test_documents_are_scored(call, tmp_path, packed):
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in DOCUMENTS).encode()
    path = tmp_path / ("val.jsonl.gz" if packed else "val.jsonl")
    path.write_bytes(gzip.compress(lines) if packed else lines)
    *_, figures, last = call("0-eval_pretrain.py", "--data_path", path).splitlines()
    assert float(re.fullmatch(r"bits per byte: (\d+\.\d+)", last)[1]) > 1
    assert figures.startswith(f"3 documents, {sum(len(text.encode()) for text in DOCUMENTS)} bytes, ")
    assert "windows of 64 tokens" in figures
    *_, figures, shorter = call(
        "0-eval_pretrain.py", "--data_path", path, "--max_docs", 1, "--max_seq_len", 8
    ).splitlines()
    assert figures.startswith(f"1 documents, {len(DOCUMENTS[0].encode())} bytes, ")
    assert "windows of 8 tokens" in figures
    assert shorter != last


@pytest.mark.parametrize("use_moe", [False, True])
def test_int8_costs_little(call, tmp_path, tokenizer_dir, use_moe):
    save_weights(tmp_path / "pretrain.pth", make_model(use_moe=use_moe), tokenizer_dir)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in DOCUMENTS)
    (tmp_path / "val.jsonl").write_text(lines)

    def bits(*flags: str) -> float:
        flags = ("--checkpoint", tmp_path / "pretrain.pth", "--data_path", tmp_path / "val.jsonl", *flags)
        return float(call("0-eval_pretrain.py", *flags).rsplit(maxsplit=1)[1])

    exact, rounded = bits(), bits("--quantize", "int8")
    assert rounded != exact
    assert rounded == pytest.approx(exact, rel=0.03)


def test_questions_and_answers_go_to_a_file(call, out, tmp_path):
    file = tmp_path / "answers.json"
    flags = ["--prompt", "你好", "Hello 😀", "--seed", 1, "--max_new_tokens", 5, "--output", file]
    printed = call("2-eval.py", *flags)
    content = json.loads(file.read_text(encoding="utf-8"))
    assert [answer["prompt"] for answer in content["answers"]] == ["你好", "Hello 😀"]
    assert "你好" in file.read_text(encoding="utf-8")  # no \u escapes
    for number, answer in enumerate(content["answers"], 1):
        assert f"{number}. {answer['prompt']}\n{answer['answer']}\n[" in printed
        assert answer["finish_reason"] in ("stop", "length")
        assert 1 <= answer["completion_tokens"] <= 5
        assert answer["prompt_tokens"] > 0 and answer["tokens_per_s"] > 0
    settings = content["settings"]
    assert settings["checkpoint"] == str(out / "single_chat" / "full_sft_32.pth")
    assert (settings["seed"], settings["max_new_tokens"], settings["temperature"]) == (1, 5, 0.7)
    call("2-eval.py", *flags)
    again = json.loads(file.read_text(encoding="utf-8"))
    assert [a["answer"] for a in again["answers"]] == [a["answer"] for a in content["answers"]]


def test_built_in_questions_are_asked(call):
    printed = call("2-eval.py", "--auto", "--max_new_tokens", 1)
    questions = SCRIPTS["2-eval.py"].QUESTIONS
    assert len(set(questions)) == 24
    assert [line for line in re.findall(r"^\d+\. (.*)$", printed, re.M) if line in questions] == questions


def test_questions_come_from_stdin_where_it_is_no_terminal(call):
    printed = call("2-eval.py", "--max_new_tokens", 1, stdin="你好\n\n  Hello \r\n".encode())
    assert re.findall(r"^(\d\. .*)$", printed, re.M) == ["1. 你好", "2. Hello"]


def asked(call, monkeypatch, *flags: object) -> list[str]:
    """The roles and texts the engine is shown for each of three questions."""
    import model.engine

    conversations = []
    chat = model.engine.Engine.chat

    def spy(engine, messages, sampling):
        conversations.append(" ".join(m["role"][0] + ":" + m["content"] for m in messages if m["role"] != "assistant"))
        return chat(engine, messages, sampling)

    monkeypatch.setattr(model.engine.Engine, "chat", spy)
    call("2-eval.py", "--prompt", "a", "b", "c", "--max_new_tokens", 1, *flags)
    return conversations


def test_single_questions_know_nothing_of_one_another(call, monkeypatch):
    assert asked(call, monkeypatch) == ["u:a", "u:b", "u:c"]


def test_history_counts_turns_and_the_system_text_stays(call, monkeypatch):
    assert asked(call, monkeypatch, "--history", 1, "--system", "S") == ["s:S u:a", "s:S u:a u:b", "s:S u:b u:c"]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--out_dir", "nowhere"], "no checkpoint in nowhere"),
        (["--checkpoint", "nowhere.pth"], "no checkpoint at nowhere.pth"),
        (["--checkpoint", __file__], "is damaged, or no weights"),
        (["--tokenizer", "nowhere"], "no tokenizer in nowhere"),
        (["--temperature", "-1"], "temperature"),
        (["--top_p", "nan"], "top_p"),
        (["--max_new_tokens", "0"], "max_new_tokens"),
        (["--rope_scaling", "0"], "rope_scaling"),
        (["--rope_scaling", "nan"], "rope_scaling"),
        (["--prompt", "x" * 99], "context of 64"),
        (["--prompt", "a\udcff"], "not valid UTF-8"),
    ],
)
def test_a_mistake_ends_with_one_line(fail, script, flags, reason):
    assert reason in fail(script, *flags)


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (["--data_path", "nowhere.jsonl"], "nowhere.jsonl"),
        (["--data_path", __file__], "no documents"),
        (["--max_docs", "-1"], "max_docs"),
        (["--max_seq_len", "1"], "max_seq_len"),
        (["--batch_size", "0"], "batch_size"),
    ],
)
def test_a_mistake_in_scoring_ends_with_one_line(call, capsys, flags, reason):
    with pytest.raises(SystemExit) as caught:
        call("0-eval_pretrain.py", *flags)
    assert caught.value.code == 2
    assert reason in capsys.readouterr().err.splitlines()[-1]


def test_a_mistake_in_chatting_ends_with_one_line(fail, tmp_path):
    assert "history" in fail("2-eval.py", "--history", "-1")
    assert "no folder" in fail("2-eval.py", "--output", tmp_path / "absent" / "a.json")
    assert "not valid UTF-8" in fail("2-eval.py", stdin="你好".encode("gbk"))


def test_a_question_that_is_too_long_is_passed_over(call, tmp_path):
    file = tmp_path / "answers.json"
    printed = call("2-eval.py", "--prompt", "hi", "x" * 99, "ho", "--max_new_tokens", 1, "--output", file)
    assert [answer["prompt"] for answer in json.loads(file.read_text())["answers"]] == ["hi", "ho"]
    assert re.search(r"^2\. x+…\nerror: .*context of 64.*\n\n3\. ho$", printed, re.M)
    assert printed.splitlines()[-1] == "not asked: 1 of 3 questions"


def test_a_terminal_without_chinese_shows_question_marks(call, monkeypatch):
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    call("2-eval.py", "--prompt", "你好a", "--max_new_tokens", "1")
    screen.flush()
    assert b"1. ??a\n" in screen.buffer.getvalue()


def test_a_reader_that_leaves_is_no_error(out):
    command = [sys.executable, ROOT / "2-eval.py", "--out_dir", out, "--auto", "--max_new_tokens", "1"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


class Terminal:
    """A program that believes to have a person before it."""

    def __init__(self, *command: object):
        self.file, inner = pty.openpty()
        self.process = subprocess.Popen(
            list(map(str, command)),
            stdin=inner,
            stdout=inner,
            stderr=inner,
            env=os.environ | {"TERM": "dumb", "OMP_NUM_THREADS": "1"},
            start_new_session=True,
            preexec_fn=self.take_control,
        )
        os.close(inner)
        self.screen = ""
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a read may end within a character

    @staticmethod
    def take_control() -> None:
        """Ctrl-C becomes a signal only at the terminal that controls a session, and only if it is not ignored."""
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __enter__(self) -> "Terminal":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.file)

    def wait_for(self, pattern: str) -> str:
        """Reads on until the pattern appears in what is new; takes it off the screen."""
        while not (found := re.search(pattern, self.screen, re.S)):
            ready, _, _ = select.select([self.file], [], [], 30)
            assert ready, f"{pattern!r} never came; the screen shows {self.screen!r}"
            self.screen += self.decoder.decode(os.read(self.file, 4096))
        self.screen = self.screen[found.end() :]
        return found[0]

    def type(self, keys: str) -> None:
        os.write(self.file, keys.encode())


@pytest.fixture
def endless(tmp_path, tokenizer_dir) -> Path:
    """A model that speaks without end: special tokens have the logit 0, and some other one always has a larger."""
    network = make_model(vocab_size=300, max_seq_len=10**6)
    torch.nn.init.zeros_(network.tok_embeddings.weight[:3])
    save_weights(tmp_path / "full_sft_32.pth", network, tokenizer_dir)
    return tmp_path / "full_sft_32.pth"


def test_a_chat_in_a_terminal(endless, tmp_path):
    file = tmp_path / "answers.json"
    flags = ["--checkpoint", endless, "--temperature", 0, "--max_new_tokens", 10**6, "--output", file]
    with Terminal(sys.executable, ROOT / "2-eval.py", *flags) as terminal:
        terminal.wait_for("Ctrl-C stops an answer")
        terminal.wait_for("you> ")
        # Ctrl-C at the prompt does not leave. A signal that comes just before input() waits is seen after the next key.
        terminal.type("\x03\n")
        terminal.wait_for("/exit or Ctrl-D leaves.*you> ")
        for question in ("你好", "second"):
            terminal.type(question + "\n")
            terminal.wait_for(question + r"\r?\n.{20}")  # the answer is coming
            terminal.type("\x03")
            terminal.wait_for(r"\[stopped, \d+ tokens, [\d.]+ tokens/s\].*you> ")
        terminal.type("/clear\n")
        terminal.wait_for("forgotten.*you> ")
        terminal.type("\n")  # nothing asked
        terminal.wait_for("you> ")
        terminal.type("\x04")  # Ctrl-D
        assert terminal.process.wait() == 0
    answers = json.loads(file.read_text())["answers"]
    assert [answer["prompt"] for answer in answers] == ["你好", "second"]
    assert all(answer["finish_reason"] is None and answer["answer"] for answer in answers)
    assert answers[1]["prompt_tokens"] > answers[0]["completion_tokens"]  # the stopped answer is remembered
