"""train_tokenizer.py, and the tokenizer it shipped: ids, round trips, chat layout, sampling, mistakes."""

import csv
import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from conftest import ROOT, load_script
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from model.chat import encode
from model.cli import UserError
from model.tokenizer import SHIPPED, encode_texts, load_tokenizer

DATA = Path(__file__).parents[2] / "shared" / "data"
script = load_script("train_tokenizer.py")
BYTE_OF = {char: byte for byte, char in bytes_to_unicode().items()}

TEXTS = [
    "春天来了，小草绿了。\n天空很蓝，白云很白。",
    "Hello, world! It's 2024, and 1234 + 5678 = 6912.",
    "你好，你是谁？我是小助手。",
    "def add(a, b):\n    return a + b\n",
]
HARD_TEXTS = [
    "  前后有空格  ",
    "\n\n\t两个换行\r\n",
    "龘靐齉 😀👨‍👩‍👧 é e\u0301 ﬁ Ａ １ \u3000",
    "</s>\n<s>assistant\n<unk>",
    "\x00\x01\x7f\u200b\ufeff\ufffd",
    "café don't 我's I'LL",
]
CHATS = [
    [{"role": "user", "content": "你好"}],
    [{"role": "system", "content": "你是助手。"}, {"role": "user", "content": " 2+2=？ \n"}],
    [
        {"role": "system", "content": "简短回答"},
        {"role": "user", "content": "Hello\n\n世界"},
        {"role": "assistant", "content": "  好的。"},
        {"role": "user", "content": "再见!"},
    ],
]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Two files of different forms: texts, and conversations of every form."""
    folder = tmp_path_factory.mktemp("corpus")
    texts = [{"text": text} for text in TEXTS * 3]
    chats = [
        {"instruction": "", "input": "今天天气怎么样？", "output": "今天天气很好。", "history": [["你好", "你好！"]]},
        {"q": "今天几号？", "a": "今天三号。"},
        {"messages": [{"role": "user", "content": "今天好吗"}, {"role": "assistant", "content": "今天很好。"}]},
    ]
    paths = []
    for name, rows in (("texts.jsonl", texts), ("chats.jsonl", chats * 4)):
        path = folder / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        paths.append(str(path))
    return paths


def train(corpus: list[str], out_dir: Path, **options) -> Path:
    script.main(script.Args(**(dict(data_path=corpus, out_dir=str(out_dir), vocab_size=400) | options)))
    return out_dir


@pytest.fixture(scope="module", params=["shipped", "qwen2", "llama-bpe", "gpt-2", "sentencepiece"])
def folder(request, corpus: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every kind of tokenizer the script makes, and the shipped one."""
    if request.param == "shipped":
        return SHIPPED
    out_dir = tmp_path_factory.mktemp("trained") / "tokenizer"
    if request.param == "sentencepiece":
        return train(corpus, out_dir, kind="sentencepiece", vocab_size=380)
    return train(corpus, out_dir, pre_tokenizer=request.param)


def test_loads_with_special_ids(folder: Path):
    for tokenizer in (AutoTokenizer.from_pretrained(folder), load_tokenizer(folder)):
        assert isinstance(tokenizer, PreTrainedTokenizerFast)
        ids = (tokenizer.unk_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert ids == (0, 0, 1, 2)
        assert tokenizer.convert_ids_to_tokens([0, 1, 2]) == ["<unk>", "<s>", "</s>"]
        assert not set(tokenizer("你好").input_ids) & {0, 1, 2}, "encoding adds no special ids of its own"


def test_texts_come_back(folder: Path):
    tokenizer = load_tokenizer(folder)
    rng = random.Random(0)
    anything = [
        "".join(chr(rng.choice([rng.randrange(1, 0xD800), rng.randrange(0xE000, 0x110000)])) for _ in range(20))
        for _ in range(50)
    ]
    texts = TEXTS + HARD_TEXTS + [text.replace("\u2581", "") for text in anything]
    if not (folder / "tokenizer.model").exists():
        texts.append("\u2581")  # sentencepiece's own sign for a space
    for text, ids in zip(texts, encode_texts(tokenizer, texts), strict=True):
        assert tokenizer.decode(ids) == text
        assert not set(ids) & {0, 1, 2}, "what is typed never becomes a special id"


def test_chat_template_equals_our_layout(folder: Path):
    tokenizer = load_tokenizer(folder)
    for messages in CHATS:
        for opening in (False, True):
            theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=opening, return_dict=False)
            assert theirs == encode(tokenizer, messages, add_generation_prompt=opening)[0]


def test_all_bytes_are_tokens():
    """Any byte string can be written, valid UTF-8 or not: the bytes of its tokens, joined, are the string."""
    tokenizer = load_tokenizer(SHIPPED)
    vocabulary = tokenizer.get_vocab()
    char_of = bytes_to_unicode()
    data = random.Random(1).randbytes(2000)
    ids = [vocabulary[char_of[byte]] for byte in data]
    assert bytes(BYTE_OF[char] for token in tokenizer.convert_ids_to_tokens(ids) for char in token) == data
    assert tokenizer.decode(ids) == data.decode(errors="replace")
    assert len(set(vocabulary.values())) == len(vocabulary) == len(tokenizer) == 6400


def test_shipped_tokens_are_bytes_of_the_text():
    """Independent of any decoder: the tokens' bytes, joined, are the text's UTF-8."""
    tokenizer = load_tokenizer(SHIPPED)
    for text, ids in zip(HARD_TEXTS, encode_texts(tokenizer, HARD_TEXTS), strict=True):
        assert bytes(BYTE_OF[char] for token in tokenizer.convert_ids_to_tokens(ids) for char in token) == text.encode()


def test_shipped_tokenizer_for_exports():
    """What llama.cpp must be told: no normalizer, a cut that it knows by name; digits stay single."""
    shipped = json.loads((SHIPPED / "tokenizer.json").read_text(encoding="utf-8"))
    assert shipped["normalizer"] is None
    assert json.loads((SHIPPED / "tokenizer_config.json").read_text())["llama_cpp_pre"] == "qwen2"
    split, to_bytes = shipped["pre_tokenizer"]["pretokenizers"]
    assert (split["behavior"], split["invert"]) == ("Isolated", False)
    assert (to_bytes["add_prefix_space"], to_bytes["use_regex"]) == (False, False)
    assert split["pattern"]["Regex"] == (  # as in Qwen2's own tokenizer.json
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    tokenizer = load_tokenizer(SHIPPED)
    assert [tokenizer.decode([token]) for token in encode_texts(tokenizer, ["1234567890"])[0]] == list("1234567890")


def test_shipped_template_is_the_one_of_chat():
    from model.chat import TEMPLATE

    assert (SHIPPED / "chat_template.jinja").read_text(encoding="utf-8") == TEMPLATE


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the trial data")
def test_bytes_per_token_of_shipped():
    tokenizer = load_tokenizer(SHIPPED)

    def bytes_per_token(texts: list[str]) -> float:
        return sum(len(text.encode()) for text in texts) / sum(map(len, encode_texts(tokenizer, texts)))

    cells = []
    for path in (DATA / "ceval" / "val").glob("*.csv"):
        with path.open(encoding="utf-8-sig", newline="") as file:
            cells += [row[name] for row in csv.DictReader(file) for name in ("question", "A", "B", "C", "D")]
    assert len(cells) == 5 * 1346
    assert bytes_per_token(cells) >= 3.0

    with (DATA / "pretrain_val.jsonl").open(encoding="utf-8") as file:
        assert bytes_per_token([json.loads(line)["text"] for line in file]) >= 3.4

    with (DATA / "sft_train.jsonl").open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    unseen = [row for row in rows if row["data_source"].startswith(("alpaca_chinese", "BELLE", "MedicalGPT/sharegpt"))]
    assert bytes_per_token([row[key] for row in unseen for key in ("input", "output")]) >= 3.8


def test_merges_are_those_of_a_naive_bpe(tmp_path: Path):
    """The first merges, counted by hand: joins the commonest pair inside words, the same pair nowhere across a cut."""
    path = tmp_path / "text.txt"
    path.write_text("abab abab\n" * 5 + "12 12 12 12 12 12 12 12\n" * 20)
    out_dir = train([str(path)], tmp_path / "tokenizer", vocab_size=262)
    model = json.loads((out_dir / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    assert model["merges"] == [["a", "b"], ["ab", "ab"], ["Ġ", "abab"]]


def test_all_forms_are_read_as_text(corpus: list[str], tmp_path: Path):
    vocabulary = AutoTokenizer.from_pretrained(train(corpus[1:], tmp_path / "tokenizer"))
    for text in ("今天", "天气"):
        assert len(encode_texts(vocabulary, [text])[0]) == 1, f"{text} is common in the conversations"


@pytest.mark.parametrize("kind", ["bpe", "sentencepiece"])
def test_same_seed_same_file(kind: str, corpus: list[str], tmp_path: Path):
    """In two processes, so that no hash seed or thread can matter unseen."""
    contents = []
    for name in ("one", "two"):
        command = [sys.executable, "train_tokenizer.py", "--data_path", *corpus, "--vocab_size", "380"]
        subprocess.run(
            [*command, "--kind", kind, "--out_dir", tmp_path / name, "--weight", "1", "1.5", "--sample_mb", "0.002"],
            cwd=ROOT,
            check=True,
            capture_output=True,
        )
        contents.append({path.name: path.read_bytes() for path in (tmp_path / name).iterdir()})
    assert "tokenizer.json" in contents[0]
    assert contents[0] == contents[1]


def test_sample_is_bounded(tmp_path: Path):
    path = tmp_path / "text.jsonl"
    long_text = "一" * 200_000  # 600 kB: cut, so that it cannot fill the sample or be lost whole
    rows = [{"text": f"{number:05}" + "字" * 100} for number in range(3000)] + [{"text": long_text}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def sample(seed: int) -> list[str]:
        return script.draw_sample(script.Args(data_path=[str(path)], sample_mb=0.3, seed=seed))

    texts = sample(1)
    assert 0.3e6 - 40_000 < sum(len(text.encode()) for text in texts) <= 0.3e6
    assert sorted(texts) == sorted(sample(1)) != sorted(sample(2))
    numbers = [int(text[:5]) for text in texts if text[0] != "一"]
    assert len(set(numbers)) == len(numbers)
    assert 1350 < sum(numbers) / len(numbers) < 1650, "drawn evenly from the whole file"


def test_weights_are_obeyed(tmp_path: Path):
    for name in "ab":
        rows = [json.dumps({"text": f"{name}{number:05}" + name * 94}) for number in range(2000)]  # 100 bytes each
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    paths = [str(tmp_path / f"{name}.jsonl") for name in "ab"]

    def copies(weight: list[float], sample_mb: float) -> tuple[Counter[str], Counter[str]]:
        texts = script.draw_sample(script.Args(data_path=paths, weight=weight, sample_mb=sample_mb))
        return Counter(text for text in texts if text[0] == "a"), Counter(text for text in texts if text[0] == "b")

    once, thrice = copies([1, 3], sample_mb=10)
    assert len(once) == len(thrice) == 2000
    assert set(once.values()) == {1} and set(thrice.values()) == {3}

    half, more = copies([0.5, 2.5], sample_mb=10)
    assert 900 < half.total() < 1100 and set(half.values()) == {1}
    assert 4900 < more.total() < 5100 and set(more.values()) == {2, 3}

    few, many = copies([1, 3], sample_mb=0.2)  # 2,000 texts of 8,000: weights hold in a small sample too
    assert few.total() + many.total() == 2000
    assert 2.5 < many.total() / few.total() < 3.6


def test_sentencepiece_ids_are_its_own(corpus: list[str], tmp_path: Path):
    import sentencepiece

    out_dir = train(corpus, tmp_path / "tokenizer", kind="sentencepiece", vocab_size=380)
    native = sentencepiece.SentencePieceProcessor(model_file=str(out_dir / "tokenizer.model"))
    texts = TEXTS + HARD_TEXTS[:3]
    assert encode_texts(load_tokenizer(out_dir), texts) == [native.encode(text) for text in texts]


@pytest.mark.parametrize("file_class", ["PreTrainedTokenizerFast", "LlamaTokenizer"])
@pytest.mark.parametrize("adder", ["prepend", "metaspace", "byte-level"])
def test_no_space_is_put_before_a_text(adder: str, file_class: str, tmp_path: Path):
    """Tokenizers as others have them: theirs do, ours must not, and a copy that transformers saves must not either."""
    bpe = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    space, alphabet = "\u2581", []
    bpe.decoder = decoders.Sequence(
        [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    if adder == "prepend":
        bpe.normalizer = normalizers.Sequence([normalizers.Prepend(space), normalizers.Replace(" ", space)])
    elif adder == "metaspace":
        bpe.pre_tokenizer = pre_tokenizers.Metaspace(space, prepend_scheme="always", split=False)
    elif file_class == "LlamaTokenizer":
        pytest.skip("it is never byte-level")
    else:
        bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
        space, alphabet = "\u0120", pre_tokenizers.ByteLevel.alphabet()
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256) if adder != "byte-level")]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([*TEXTS, "user\n", "assistant\n", "system\n"], trainer)
    names = dict(unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    PreTrainedTokenizerFast(tokenizer_object=bpe, **names).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"tokenizer_class": file_class}))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.convert_ids_to_tokens(encode_texts(theirs, ["Hello"])[0])[0].startswith(space)

    ours = load_tokenizer(tmp_path)
    ours.save_pretrained(tmp_path / "copy")
    for tokenizer in (ours, load_tokenizer(tmp_path / "copy"), AutoTokenizer.from_pretrained(tmp_path / "copy")):
        texts = [*TEXTS, "  前后有空格  ", " Hello", "A", "</s>\n<s>assistant\n"]
        for text, ids in zip(texts, encode_texts(tokenizer, texts), strict=True):
            assert tokenizer.decode(ids) == text
            assert "".join(tokenizer.convert_ids_to_tokens(ids)).startswith(space) == text.startswith(" ")
        newline = encode_texts(tokenizer, ["\n"])[0]
        bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        user, hello = (encode_texts(tokenizer, [text])[0] for text in ("user\n", "Hello"))
        assert encode(tokenizer, [{"role": "user", "content": "Hello"}])[0] == [bos, *user, *hello, eos, *newline]


def test_inspect_measures_and_decodes(folder: Path, corpus: list[str], capsys: pytest.CaptureFixture[str]):
    script.main(script.Args(inspect=(str(folder), corpus[0])))
    shown = capsys.readouterr().out
    tokens = sum(map(len, encode_texts(load_tokenizer(folder), TEXTS * 3)))
    size = sum(len(text.encode()) for text in TEXTS * 3)
    assert f"12 texts, {size:,} bytes, {tokens:,} tokens" in shown
    assert f"bytes per token: {size / tokens:.3f}" in shown
    assert f"characters per token: {sum(map(len, TEXTS * 3)) / tokens:.3f}" in shown
    assert "12 of 12 texts come back unchanged" in shown
    assert any("\u4e00" <= char <= "\u9fff" for char in shown), "tokens are shown as text"
    assert "Ġ" not in shown and "\ufffd" not in shown
    shares = [float(line.split()[-1].rstrip("%")) for line in shown.splitlines() if line.endswith("%")]
    assert sum(shares) == pytest.approx(100, abs=0.1)


def test_inspect_tells_what_does_not_come_back(tmp_path: Path, corpus: list[str], capsys: pytest.CaptureFixture[str]):
    out_dir = train(corpus, tmp_path / "tokenizer", kind="sentencepiece", vocab_size=380)
    (tmp_path / "odd.txt").write_text("好\n\u2581\n好", encoding="utf-8")
    script.main(script.Args(inspect=(str(out_dir), str(tmp_path / "odd.txt"))))
    assert f"2 of 3 texts come back unchanged {tmp_path / 'odd.txt'}:2" in capsys.readouterr().out


def test_bad_lines_are_counted(tmp_path: Path, corpus: list[str], capsys: pytest.CaptureFixture[str]):
    path = tmp_path / "text.jsonl"
    path.write_bytes(Path(corpus[0]).read_bytes() + b"{broken\n")
    train([str(path)], tmp_path / "tokenizer")
    assert f"bad 1: not JSON (first at {path}:13)" in capsys.readouterr().out
    with pytest.raises(UserError, match="more than --max_bad_share 0.05"):
        train([str(path)], tmp_path / "other", max_bad_share=0.05)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data_path", "absent.jsonl"], "no file absent.jsonl"),
        (["--data_path", "TEXTS", "--weight", "1", "2"], "--weight has 2 values for 1 files"),
        (["--data_path", "TEXTS", "--weight", "-1"], "each --weight must be more than 0"),
        (["--data_path", "TEXTS", "--vocab_size", "100"], "--vocab_size 100 is too small"),
        (["--data_path", "TEXTS", "--sample_mb", "0"], "--sample_mb must be more than 0"),
        (["--data_path", "TEXTS", "--out_dir", str(SHIPPED)], "is in use"),
        (["--data_path", "TEXTS", "--kind", "sentencepiece", "--vocab_size", "9000"], "sentencepiece: "),
        (["--inspect", "absent", "TEXTS"], "no tokenizer in absent"),
        (["--inspect", str(SHIPPED), "absent.txt"], "no file absent.txt"),
    ],
)
def test_mistakes_end_with_one_line(flags, said, corpus: list[str], tmp_path: Path, capsys, monkeypatch):
    from model.cli import run

    monkeypatch.chdir(tmp_path)
    argv = [corpus[0] if flag == "TEXTS" else flag for flag in flags]
    with pytest.raises(SystemExit) as end:
        run(script.main, script.Args, argv)
    assert end.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and said in errors[0]
    assert not (tmp_path / "out").exists() or not any((tmp_path / "out").iterdir()), "nothing half made is left"


def test_missing_file_from_the_shell(tmp_path: Path):
    command = [sys.executable, str(ROOT / "train_tokenizer.py"), "--data_path", "absent.jsonl"]
    ended = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.splitlines()[-1] == "error: no file absent.jsonl"
    assert "Traceback" not in ended.stderr
