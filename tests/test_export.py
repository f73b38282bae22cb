"""export_model.py: other programs must compute what the source computes, from nothing but the export."""

import json
from functools import partial
from pathlib import Path

import gguf
import huggingface_hub
import numpy as np
import pytest
import torch
from conftest import load_script, make_model
from peft import LoraConfig, get_peft_model
from test_model import random_ids
from transformers import AutoModelForCausalLM, AutoTokenizer, Ernie4_5_MoeForCausalLM, LlamaForCausalLM, pipeline

import model.export
from model.chat import encode
from model.checkpoint import load_model, save_weights
from model.cli import UserError, run
from model.export import from_llama, write_llama2c, write_llama_folder, write_transformers_folder
from model.export_check import TEXTS, check_tokenizer
from model.gguf_file import modelfile, read_gguf, write_gguf
from model.model_card import model_card
from model.tokenizer import load_tokenizer

SCRIPT = load_script("export_model.py")
TEXT = "你好，世界！ Hello  123 </s>\n\n🙂"
CONVERSATION = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "春天"},
    {"role": "user", "content": "!"},
]
STRETCHED = {"rope_scaling": 2.0, "rope_theta": 5000.0, "norm_eps": 1e-3}


@pytest.fixture
def call(capsys, tmp_path, monkeypatch):
    """Runs the script in this process, in an empty folder; returns what it printed."""
    monkeypatch.chdir(tmp_path)

    def call(*flags: object) -> str:
        run(SCRIPT.main, SCRIPT.Args, [str(flag) for flag in flags])
        return capsys.readouterr().out

    return call


@pytest.fixture
def fail(call, capsys):
    """Runs the script, which must end with exit code 2; returns its one line."""

    def fail(*flags: object) -> str:
        with pytest.raises(SystemExit) as caught:
            call(*flags)
        assert caught.value.code == 2
        (line,) = capsys.readouterr().err.splitlines()
        return line

    return fail


@pytest.fixture
def saved(tmp_path, tokenizer_dir):
    """Saves a model of these settings; returns it and its path."""

    def saved(**overrides):
        network = make_model(**overrides)
        path = tmp_path / "out" / f"full_sft_32{'_moe' if network.config.use_moe else ''}.pth"
        save_weights(path, network, tokenizer_dir, stage="full_sft", step=3, tokens=99)
        return network, path

    return saved


def same_weights(a, b) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def assert_same_logits(theirs, ours, length: int = 60) -> None:
    ids = random_ids(2, length)
    torch.testing.assert_close(theirs.eval()(ids).logits, ours(ids).logits, rtol=1e-4, atol=1e-4)


# Llama and its relative with experts.


@pytest.mark.parametrize("overrides", [{}, STRETCHED, {"n_kv_heads": 4}])
def test_a_dense_model_is_a_llama(tmp_path, tokenizer, overrides):
    ours = make_model(**overrides)
    write_llama_folder(tmp_path / "llama", ours, tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "llama")
    assert type(theirs) is LlamaForCausalLM
    assert_same_logits(theirs, ours)
    ids = random_ids(1, 9)
    generate = dict(max_new_tokens=20, do_sample=False)
    assert theirs.generate(ids, **generate).tolist() == ours.generate(ids, **generate, eos_token_id=2).tolist()
    settings = json.loads((tmp_path / "llama" / "config.json").read_text())
    assert settings["rope_theta"] == ours.config.rope_theta and "auto_map" not in settings
    assert settings["max_position_embeddings"] == 64 * ours.config.rope_factor
    assert same_weights(from_llama(tmp_path / "llama"), ours)


@pytest.mark.parametrize(
    "overrides", [{}, {"n_shared_experts": 0, "num_experts_per_tok": 1}, {"n_shared_experts": 2, "rope_scaling": 3.0}]
)
def test_a_mixture_of_experts_is_an_ernie(tmp_path, tokenizer, overrides):
    ours = make_model(use_moe=True, n_routed_experts=5, **overrides)
    write_llama_folder(tmp_path / "ernie", ours, tokenizer)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "ernie")
    assert type(theirs) is Ernie4_5_MoeForCausalLM
    assert_same_logits(theirs, ours)
    assert same_weights(from_llama(tmp_path / "ernie"), ours)


def test_the_tokenizer_comes_along(tmp_path, tokenizer):
    write_llama_folder(tmp_path / "llama", make_model(), tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "llama")
    assert theirs(TEXT, add_special_tokens=False).input_ids == tokenizer(TEXT, add_special_tokens=False).input_ids
    text = theirs.apply_chat_template(CONVERSATION, add_generation_prompt=True, tokenize=False)
    assert text == "<s>user\n你好</s>\n<s>assistant\n春天</s>\n<s>user\n!</s>\n<s>assistant\n"
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id) == (1, 2, 0)
    settings = json.loads((tmp_path / "llama" / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # transformers 4 knows it, too
    generation = json.loads((tmp_path / "llama" / "generation_config.json").read_text())
    assert (generation["eos_token_id"], generation["pad_token_id"]) == (2, 0)


def test_weights_of_a_foreign_llama_are_refused(tmp_path, tokenizer):
    """A head of its own and biases: what our model does not have."""
    write_llama_folder(tmp_path / "llama", make_model(), tokenizer)
    file = tmp_path / "llama" / "model.safetensors"
    state = model.checkpoint.read_tensors(file)
    for extra in ({"lm_head.weight": torch.ones(300, 32)}, {"model.layers.0.self_attn.q_proj.bias": torch.ones(32)}):
        model.export.save_file({key: value.clone() for key, value in (state | extra).items()}, file)
        with pytest.raises(UserError, match="output.weight|q_proj|wq.bias"):
            from_llama(tmp_path / "llama")


# The script, with its check in a fresh process.


@pytest.mark.parametrize("use_moe", [False, True])
def test_a_transformers_folder(call, saved, tmp_path, use_moe):
    ours, path = saved(use_moe=use_moe, rope_scaling=2.0)
    name = path.stem
    printed = call("--checkpoint", path)
    assert "read back in a fresh process" in printed and f"export/{name}-transformers: done" in printed
    folder = tmp_path / "export" / f"{name}-transformers"
    assert [file.name for file in folder.parent.iterdir()] == [folder.name]
    theirs = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    assert type(theirs) is not type(ours) and type(theirs).__name__ == "Transformer"
    assert_same_logits(theirs, ours)
    again, tokenizer = load_model(folder)
    assert same_weights(again, ours) and len(tokenizer) == 300
    say = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    options = dict(max_new_tokens=5, do_sample=False)
    answer = say(CONVERSATION, **options)[0]["generated_text"][-1]
    ids = tokenizer.apply_chat_template(CONVERSATION, add_generation_prompt=True, return_dict=False)
    expected = ours.generate(torch.tensor([ids]), **options, eos_token_id=2)[0, len(ids) :]
    assert answer == {"role": "assistant", "content": tokenizer.decode(expected, skip_special_tokens=True)}


def test_published_weights_become_a_llama_folder_and_come_back(call, tmp_path, tokenizer_dir):
    """A plain state dict, half precision, nothing beside it; the number of heads is told."""
    ours = make_model(max_seq_len=512).half().float()
    torch.save({f"_orig_mod.{key}": value.half() for key, value in ours.state_dict().items()}, tmp_path / "full.pth")
    call("--format", "llama", "--checkpoint", "full.pth", "--tokenizer", tokenizer_dir, "--n_heads", 4)
    assert_same_logits(LlamaForCausalLM.from_pretrained("export/full-llama"), ours)
    call("--format", "pth", "--checkpoint", "export/full-llama", "--output", "back/again.pth")
    back, tokenizer = load_model(tmp_path / "back" / "again.pth")
    assert same_weights(back, ours)
    assert tokenizer(TEXT).input_ids == load_tokenizer(tokenizer_dir)(TEXT).input_ids
    assert sorted(path.name for path in (tmp_path / "back").iterdir()) == ["again.json", "again.pth", "tokenizer"]
    call("--format", "pth", "--checkpoint", "export/full-llama", "--output", "stretched.pth", "--rope_scaling", 2)
    assert load_model(tmp_path / "stretched.pth")[0].config.rope_factor == 2
    for file in (tmp_path / "export" / "full-llama").glob("token*"):
        file.unlink()
    flags = ["--output", "other.pth", "--tokenizer", tokenizer_dir]
    call("--format", "pth", "--checkpoint", "export/full-llama", *flags)
    assert same_weights(load_model(tmp_path / "other.pth")[0], ours)


def test_a_folder_of_ours_comes_back_and_its_code_is_not_run(call, tmp_path, tokenizer):
    ours = make_model(use_moe=True)
    write_transformers_folder(tmp_path / "folder", ours, tokenizer)
    (tmp_path / "folder" / "model.py").write_text("raise SystemExit(5)")
    call("--format", "pth", "--checkpoint", "folder", "--output", "again.pth")
    assert same_weights(load_model(tmp_path / "again.pth")[0], ours)


def test_an_export_that_computes_something_else_gets_no_name(fail, saved, monkeypatch, tmp_path):
    """Two matrices of one shape are exchanged; the fresh process reads them as they should be."""
    _, path = saved()
    order = ("attention_norm", "attention.wo", "attention.wk", "attention.wv", "attention.wq")
    monkeypatch.setattr(model.export, "LLAMA2C_BEFORE", order)
    assert "other logits" in fail("--format", "llama2c", "--checkpoint", path)
    assert list((tmp_path / "export").iterdir()) == []


def test_the_card_tells_what_was_measured(saved, tmp_path):
    ours, path = saved()
    lines = [{"step": 2, "val_loss": 9.0}, {"step": 3, "val_loss": 1.25, "bits_per_byte": 0.75}, {"step": 3, "loss": 1}]
    path.with_suffix(".metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    weights = json.loads(path.with_suffix(".json").read_text())["sha256"]
    for correct, sha256 in ((12, weights), (13, "0")):
        total = {"correct": correct, "questions": 40, "accuracy": correct / 40, "interval_95": [0.2, 0.5]}
        summary = {"weights_sha256": sha256, "lora": "", "data_dir": "x/ceval", "shots": 5, "prompt_style": "chat"}
        summary["total"] = total
        (tmp_path / str(correct)).mkdir()
        (tmp_path / str(correct) / "summary.json").write_text(json.dumps(summary))
    card = model_card("full_sft_32", "llama", ours, path, "", tmp_path)
    parameters = f"{sum(p.numel() for p in ours.parameters()):,}"
    for figure in (parameters, "1.2500 nats", "0.7500 比特/字节", "3 步，99 个词元", "12/40 = 30.00 %", "20.0 – 50.0"):
        assert figure in card
    assert "13/40" not in card and "9.0" not in card and "trust_remote_code" not in card
    assert "trust_remote_code" in model_card("full_sft_32", "transformers", ours, path, "", tmp_path)
    adapted = model_card("full_sft_32", "llama", ours, path, "lora/music", tmp_path)
    assert "music" in adapted and "12/40" not in adapted and "nats" not in adapted


# GGUF. transformers reads dense ones with code of its own.


@pytest.mark.parametrize(("dtype", "tolerance"), [("f32", 1e-4), ("f16", 0.05), ("q8_0", 1.5)])
def test_transformers_reads_a_dense_gguf(tmp_path, tokenizer, dtype, tolerance):
    ours = make_model(rope_theta=5000.0)
    write_gguf(tmp_path / "a.gguf", ours, tokenizer, dtype, "a")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="a.gguf").eval()
    ids = random_ids(2, 30)
    difference = (theirs(ids).logits - ours(ids).logits).abs().max()
    assert difference < tolerance
    if dtype != "f32":
        assert difference > 1e-4  # it was rounded
    tokens = AutoTokenizer.from_pretrained(tmp_path, gguf_file="a.gguf")
    assert tokens(TEXT, add_special_tokens=False).input_ids == tokenizer(TEXT, add_special_tokens=False).input_ids


@pytest.mark.parametrize("use_moe", [False, True])
def test_a_gguf_holds_settings_tokenizer_and_tensors(tmp_path, tokenizer, use_moe):
    ours = make_model(use_moe=use_moe, vocab_size=310, rope_scaling=2.0)
    write_gguf(tmp_path / "a.gguf", ours, tokenizer, "f32", "小模型")
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    fields = {name: field.contents() for name, field in reader.fields.items()}
    arch = "ernie4_5-moe" if use_moe else "llama"
    assert (fields["general.architecture"], fields["general.name"]) == (arch, "小模型")
    assert (fields[f"{arch}.context_length"], fields[f"{arch}.rope.scaling.factor"]) == (128, 2.0)
    assert (fields[f"{arch}.attention.head_count"], fields[f"{arch}.attention.head_count_kv"]) == (4, 2)
    assert (fields["tokenizer.ggml.model"], fields["tokenizer.ggml.pre"]) == ("gpt2", "gpt-2")
    assert [fields[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos", "padding")] == [1, 2, 0]
    assert fields["tokenizer.ggml.tokens"][:4] == ["<unk>", "<s>", "</s>", "!"]
    assert fields["tokenizer.ggml.token_type"] == [3, 3, 3, *[1] * 297, *[5] * 10]
    assert fields["tokenizer.ggml.add_bos_token"] is False and "assistant" in fields["tokenizer.chat_template"]
    state = ours.state_dict()
    tensors = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    assert torch.equal(tensors["blk.1.attn_k.weight"], state["layers.1.attention.wk.weight"])
    assert torch.equal(tensors["token_embd.weight"], state["tok_embeddings.weight"]) and "output.weight" not in tensors
    if use_moe:
        inner = "feed_forward"
        assert torch.equal(tensors["blk.1.ffn_down_exps.weight"][3], state[f"layers.1.{inner}.experts.3.w2.weight"])
        assert torch.equal(tensors["blk.0.ffn_up_shexp.weight"], state[f"layers.0.{inner}.shared_experts.w3.weight"])
        assert (fields[f"{arch}.expert_count"], fields[f"{arch}.expert_used_count"]) == (4, 2)
    known = gguf.get_tensor_name_map(gguf.MODEL_ARCH.ERNIE4_5_MOE if use_moe else gguf.MODEL_ARCH.LLAMA, 2)
    assert all(known.get_name(name, (".weight",)) == name for name in tensors)
    assert same_weights(read_gguf(tmp_path / "a.gguf"), ours)


def test_a_gguf_folder_of_experts_goes_through_the_script(call, saved, tmp_path):
    ours, path = saved(use_moe=True)
    assert "logits differ by" in call("--format", "gguf", "--gguf_type", "q8_0", "--checkpoint", path)
    folder = tmp_path / "export" / "full_sft_32_moe-gguf-q8_0"
    assert sorted(file.name for file in folder.iterdir()) == ["Modelfile", "full_sft_32_moe-q8_0.gguf"]
    tensors = gguf.GGUFReader(folder / "full_sft_32_moe-q8_0.gguf").tensors
    kinds = {tensor.name: tensor.tensor_type.name for tensor in tensors}
    assert {kinds["blk.0.ffn_up_exps.weight"], kinds["token_embd.weight"]} == {"Q8_0"}
    assert {kinds["blk.0.ffn_gate_inp.weight"], kinds["output_norm.weight"]} == {"F32"}
    text = (folder / "Modelfile").read_text()
    assert "FROM ./full_sft_32_moe-q8_0.gguf" in text and "num_ctx 64" in text


def test_the_modelfile_lays_a_chat_out_as_we_do(tokenizer):
    head, loop = modelfile("a.gguf", tokenizer, 64).split('"""')[1].split("{{- range .Messages }}")
    turn, tail = loop.split("{{ end }}")
    turn = turn.replace("{{ .Role }}", "{role}").replace("{{ .Content }}", "{content}")
    text = head + "".join(turn.format(**message) for message in CONVERSATION) + tail
    ids, _ = encode(tokenizer, CONVERSATION, add_generation_prompt=True)
    assert text == tokenizer.decode(ids)


@pytest.fixture
def sentencepiece_dir(tmp_path) -> Path:
    """A bare tokenizer.model that puts a space before each text, as Mistral's does."""
    import sentencepiece

    (tmp_path / "text").write_text("你好，世界！春天来了，小草绿了。 Hello, world 123\n" * 50, encoding="utf-8")
    (tmp_path / "sentencepiece").mkdir()
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(tmp_path / "sentencepiece" / "tokenizer"), model_type="bpe",
        vocab_size=300, hard_vocab_limit=False, byte_fallback=True, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False,
    )  # fmt: skip
    return tmp_path / "sentencepiece"


def test_a_sentencepiece_vocabulary_is_its_own(tmp_path, sentencepiece_dir):
    import sentencepiece

    native = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_dir / "tokenizer.model"))
    tokens = load_tokenizer(sentencepiece_dir)
    write_gguf(tmp_path / "a.gguf", make_model(vocab_size=310), tokens, "f32", "a")
    fields = {name: field.contents() for name, field in gguf.GGUFReader(tmp_path / "a.gguf").fields.items()}
    assert fields["tokenizer.ggml.model"] == "llama"
    size = native.vocab_size()
    assert fields["tokenizer.ggml.tokens"][:size] == [native.id_to_piece(i) for i in range(size)]
    assert fields["tokenizer.ggml.scores"][:size] == [native.get_score(i) for i in range(size)]
    types = fields["tokenizer.ggml.token_type"]
    assert types[:4] == [2, 3, 3, 6] and set(types[size:]) == {5}
    assert sum(kind == 6 for kind in types) == 256
    assert fields["tokenizer.ggml.add_space_prefix"] is False  # load_tokenizer has taken it away


def test_exported_tokenizers_put_no_space_before_a_text_and_other_ids_are_refused(
    tmp_path, sentencepiece_dir, tokenizer
):
    for name, source in (("space", load_tokenizer(sentencepiece_dir)), ("none", tokenizer)):
        write_llama_folder(tmp_path / name, make_model(), source)
        theirs = AutoTokenizer.from_pretrained(tmp_path / name)
        found = {f"ids{n}": torch.tensor(theirs(text).input_ids) for n, text in enumerate(TEXTS)}
        chat = theirs.apply_chat_template([{"role": "user", "content": TEXTS[0]}], add_generation_prompt=True)
        found["chat"] = torch.tensor(chat["input_ids"])
        check_tokenizer(found, source, tmp_path)
        assert (tmp_path / name / "tokenizer.model").is_file() == (name == "space")
        for key in found:
            with pytest.raises(UserError, match="tokenizes otherwise"):
                check_tokenizer(found | {key: found[key].flip(0)}, source, tmp_path)


# llama2.c.


def llama2c_logits(data: bytes, ids: list[int]) -> np.ndarray:
    """Reads the file as llama2.c's run.c does and computes as it does, token by token, in numpy."""
    dim, hidden, layers, heads, kv_heads, vocab, length = np.frombuffer(data, "<i4", 7)
    numbers, size = np.frombuffer(data, "<f4", offset=28), dim // heads
    place = 0

    def take(*shape: int) -> np.ndarray:
        nonlocal place
        place += int(np.prod(shape))
        return numbers[place - int(np.prod(shape)) : place].reshape(shape)

    embedding, att_norm = take(vocab, dim), take(layers, dim)
    wq, wk, wv = take(layers, dim, dim), take(layers, kv_heads * size, dim), take(layers, kv_heads * size, dim)
    wo, ffn_norm = take(layers, dim, dim), take(layers, dim)
    w1, w2, w3 = take(layers, hidden, dim), take(layers, dim, hidden), take(layers, hidden, dim)
    norm, cos, sin = take(dim), take(length, size // 2), take(length, size // 2)
    assert place == len(numbers)

    def rms(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
        return weight * x / np.sqrt(np.mean(x * x) + 1e-5)

    def rotate(x: np.ndarray, t: int) -> np.ndarray:
        turned = (x.reshape(-1, size // 2, 2) @ [1, 1j]) * (cos[t] + 1j * sin[t])
        return np.stack([turned.real, turned.imag], -1).reshape(-1, size)

    keys, values = [[] for _ in range(layers)], [[] for _ in range(layers)]
    logits = []
    for t, token in enumerate(ids):
        x = embedding[token].astype(np.float64)
        for i in range(layers):
            h = rms(x, att_norm[i])
            q = rotate(wq[i] @ h, t)
            keys[i].append(rotate(wk[i] @ h, t))
            values[i].append((wv[i] @ h).reshape(-1, size))
            out = []
            for head in range(heads):
                group = head * kv_heads // heads
                scores = np.array([q[head] @ key[group] for key in keys[i]]) / np.sqrt(size)
                weights = np.exp(scores - scores.max())
                out.append(sum(w * v[group] for w, v in zip(weights / weights.sum(), values[i], strict=True)))
            x = x + wo[i] @ np.concatenate(out)
            h = rms(x, ffn_norm[i])
            gate = w1[i] @ h
            x = x + w2[i] @ (gate / (1 + np.exp(-gate)) * (w3[i] @ h))
        logits.append(embedding @ rms(x, norm))
    return np.stack(logits)


def test_llama2c_computes_the_same(tmp_path):
    ours = make_model(n_layers=3)
    write_llama2c(tmp_path / "a.bin", ours)
    ids = random_ids(1, 20)
    found = llama2c_logits((tmp_path / "a.bin").read_bytes(), ids[0].tolist())
    np.testing.assert_allclose(found, ours(ids).logits[0].detach().numpy(), rtol=1e-4, atol=1e-4)


def test_a_llama2c_file_with_an_adapter_goes_through_the_script(call, saved, tmp_path):
    ours, path = saved()
    adapted = get_peft_model(ours, LoraConfig(r=2, target_modules="all-linear", init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "music")
    call("--format", "llama2c", "--checkpoint", path, "--lora", tmp_path / "music")
    found = model.export.read_llama2c(Path("export/full_sft_32-music-llama2c/full_sft_32-music.bin"))
    assert_same_logits(found, adapted)
    with adapted.disable_adapter(), pytest.raises(AssertionError):
        assert_same_logits(found, adapted)


# What cannot be done is said in one line, and leaves nothing.


@pytest.mark.parametrize(
    ("overrides", "flags", "reason"),
    [
        ({"use_moe": True}, ["--format", "llama2c"], "mixture of experts"),
        ({"rope_scaling": 2.0}, ["--format", "llama2c"], "rope_theta"),
        ({"norm_eps": 1e-6}, ["--format", "llama2c"], "norm_eps"),
        ({"use_moe": True, "norm_topk_prob": False}, ["--format", "llama"], "norm_topk_prob"),
        ({"use_moe": True, "norm_topk_prob": False}, ["--format", "gguf"], "norm_topk_prob"),
        ({"dim": 48}, ["--format", "gguf", "--gguf_type", "q8_0"], "multiples of 32"),
        ({}, ["--format", "pth"], "--output"),
        ({}, ["--format", "gguf", "--push_to_hub", "a/b"], "--push_to_hub"),
        ({}, ["--output", "out"], "exists already"),
        ({}, ["--checkpoint", "nowhere.pth"], "nowhere.pth"),
    ],
)  # fmt: skip
def test_mistakes_end_with_one_line(fail, saved, tmp_path, overrides, flags, reason):
    saved(**overrides)
    assert reason in fail(*flags)
    assert not list(tmp_path.glob("export/*")) and (tmp_path / "out").is_dir()


@pytest.mark.parametrize("damage", [b"", b"{", b'{"model_type": "llama", "hidden_size": "x"}'])
def test_a_damaged_folder_is_refused(fail, tmp_path, tokenizer, damage):
    write_llama_folder(tmp_path / "llama", make_model(), tokenizer)
    (tmp_path / "llama" / "config.json").write_bytes(damage)
    assert "llama" in fail("--format", "gguf", "--checkpoint", "llama")


# Uploading.


def test_without_a_token_nothing_is_begun(fail, saved, monkeypatch):
    _, path = saved()
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    assert "hf auth login" in fail("--checkpoint", path, "--push_to_hub", "me/it")
    assert not Path("export").exists()


@pytest.mark.parametrize(("repository", "reason"), [("me/it", "refused"), ("me/it/too", "Repo id")])
def test_a_hub_that_cannot_be_reached_is_said_and_the_folder_stays(tmp_path, repository, reason, monkeypatch):
    """No server listens at this port."""
    api = partial(huggingface_hub.HfApi, endpoint="http://127.0.0.1:9", token="hf_none")
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    with pytest.raises(UserError, match=f"is made, but not uploaded to {repository}: .*{reason}"):
        SCRIPT.push(tmp_path, repository)


def test_the_folder_is_uploaded(monkeypatch, tmp_path, capsys):
    calls = {}
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda _, repo, **kwargs: calls.update(created=repo))
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", lambda _, **kwargs: calls.update(kwargs))
    SCRIPT.push(tmp_path, "me/it")
    assert calls == {"created": "me/it", "repo_id": "me/it", "folder_path": tmp_path}
    assert "me/it" in capsys.readouterr().out
