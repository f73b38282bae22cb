"""fast_inference.py, driven by streamlit's own test harness (no browser, the same script and the same engine)."""

import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, make_model
from peft import LoraConfig, get_peft_model
from streamlit.testing.v1 import AppTest

import model.engine
from model.checkpoint import save_weights


@pytest.fixture
def page(tmp_path, monkeypatch) -> AppTest:
    monkeypatch.setattr(sys, "argv", ["fast_inference.py", "--out_dir", str(tmp_path), "--device", "cpu"])
    return AppTest.from_file(str(ROOT / "fast_inference.py"), default_timeout=60)


@pytest.fixture
def checkpoint(tmp_path, tokenizer_dir) -> Path:
    save_weights(tmp_path / "full_sft_32.pth", make_model(max_seq_len=200), tokenizer_dir)
    return tmp_path / "full_sft_32.pth"


@pytest.fixture
def conversations(monkeypatch) -> list[list[dict]]:
    """What the engine is asked."""
    asked = []
    chat = model.engine.Engine.chat

    def spy(engine, messages, sampling):
        asked.append((list(messages), sampling))
        return chat(engine, messages, sampling)

    monkeypatch.setattr(model.engine.Engine, "chat", spy)
    return asked


def shown(page: AppTest) -> list[tuple[str, str]]:
    assert not page.exception
    return [(message.name, message.markdown[0].value) for message in page.chat_message]


def test_without_a_checkpoint_it_says_how_to_make_one(page):
    page.run()
    assert not page.exception and not page.chat_input
    assert "1-pretrain.py" in page.code[0].value and "3-full_sft.py" in page.code[0].value
    assert "还没有模型" in page.info[0].value


def test_it_speaks_english(page, checkpoint):
    page.run()
    assert page.title[0].value == "MiniMind 对话"
    page.sidebar.radio[0].set_value("English").run()
    assert page.title[0].value == "MiniMind chat"
    assert page.chat_input[0].placeholder == "Your question"


def test_a_conversation(page, checkpoint, conversations):
    page.run()
    page.slider(key="max_new_tokens").set_value(16)
    page.slider(key="temperature").set_value(0.5)
    page.text_area(key="system").set_value("S")
    page.slider(key="history").set_value(1)
    for question in ("一", "二", "三"):
        page.chat_input[0].set_value(question).run()
    roles = [role for role, _ in shown(page)]
    assert roles == ["user", "assistant"] * 3
    asked = [
        [message["content"] for message in messages if message["role"] != "assistant"] for messages, _ in conversations
    ]
    assert asked == [["S", "一"], ["S", "一", "二"], ["S", "二", "三"]]
    assert all((s.temperature, s.max_new_tokens, s.top_k) == (0.5, 16, 50) for _, s in conversations)
    assert "词元/秒" in page.chat_message[-1].caption[0].value
    before = shown(page)
    page.button(key="again_button").click().run()
    assert shown(page)[:-1] == before[:-1] and len(conversations) == 4
    assert conversations[3][0] == conversations[2][0]
    page.button(key="clear").click().run()
    assert shown(page) == []


def test_a_question_that_is_too_long_is_no_part_of_the_conversation(page, checkpoint):
    page.run()
    page.chat_input[0].set_value("长" * 500).run()
    assert "context of 200" in page.error[0].value
    page.slider(key="max_new_tokens").set_value(16)
    page.chat_input[0].set_value("hi").run()
    assert [role for role, _ in shown(page)] == ["user", "assistant"]


def test_a_damaged_checkpoint_is_an_error_in_a_line(page, checkpoint):
    checkpoint.write_bytes(b"x")
    page.run()
    assert not page.exception and "damaged" in page.error[0].value


def test_an_adapter_is_merged(page, checkpoint, tmp_path, conversations, monkeypatch):
    network = make_model(max_seq_len=200)
    adapted = get_peft_model(network, LoraConfig(target_modules=["wq", "w2"], r=4, init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "lora" / "medical_32")
    ids = torch.tensor([[1, 5, 9, 40]])
    with torch.no_grad():
        expected = adapted.eval()(input_ids=ids).logits
    engines = []
    chat = model.engine.Engine.chat
    monkeypatch.setattr(
        model.engine.Engine, "chat", lambda engine, *rest: (engines.append(engine), chat(engine, *rest))[1]
    )
    page.run()
    page.slider(key="max_new_tokens").set_value(16)
    page.selectbox(key="adapter").set_value(str(Path("lora", "medical_32"))).run()
    page.chat_input[0].set_value("hi").run()
    assert not page.exception and not page.error
    with torch.no_grad():
        torch.testing.assert_close(engines[0].model(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_weights_without_a_description_are_told_what_they_are(page, checkpoint, tmp_path, tokenizer_dir, monkeypatch):
    torch.save(dict(make_model(max_seq_len=200).state_dict()), tmp_path / "published.pth")
    more = ["--n_heads", "4", "--rope_theta", "500", "--tokenizer", str(tokenizer_dir)]
    monkeypatch.setattr(sys, "argv", [*sys.argv, *more])
    loaded = []
    load = model.engine.load_engine
    monkeypatch.setattr(model.engine, "load_engine", lambda *a, **k: (loaded.append(load(*a, **k)), loaded[-1])[1])
    page.run()
    page.slider(key="max_new_tokens").set_value(16)
    for name in ("published.pth", "full_sft_32.pth"):
        page.selectbox(key="model").set_value(name).run()
        page.chat_input[0].set_value("hi").run()
        assert not page.exception and not page.error
    configs = [engine.model.config for engine in loaded]
    assert [(c.n_heads, c.rope_theta) for c in configs] == [(4, 500.0), (4, 10000.0)]


def test_a_server_that_is_not_there(page):
    page.run()
    page.selectbox(key="model").set_value("").run()
    page.text_input(key="base_url").set_value("http://127.0.0.1:9/v1")
    page.chat_input[0].set_value("hi").run()
    assert not page.exception and "没有应答" in page.error[0].value
