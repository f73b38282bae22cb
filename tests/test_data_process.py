"""data_process.py: what it writes for each kind of data, what it leaves out, and how it ends."""

import gzip
import hashlib
import json
import multiprocessing
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import data_process
from data_process import All, Dpo, Pretrain, Sft
from model import tokens
from model.cli import UserError, run
from model.dataset import PretrainDataset, SFTDataset, has_history
from model.tokenizer import encode_texts, load_tokenizer, tokenizer_hash

OUTPUTS = {
    "pretrain_data.bin",
    "pretrain_data.json",
    "pretrain_data_val.jsonl",
    "sft_data.csv",
    "sft_data_single.csv",
    "train_data.json",
}


def process(*argv: object) -> None:
    run(data_process.main, All | Pretrain | Sft | Dpo, list(map(str, argv)), default=All())


def process_and_fail(capsys: pytest.CaptureFixture, *argv: object) -> str:
    """Runs into a user's mistake; returns its one line."""
    with pytest.raises(SystemExit) as ended:
        process(*argv)
    assert ended.value.code == 2
    errors = [line for line in capsys.readouterr().err.split("\n") if line.startswith("error: ")]
    assert len(errors) == 1
    return errors[0]


def write_jsonl(path: Path, rows: list) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def documents_of(folder: Path, tokenizer) -> list[str]:
    """The documents of a token file, found and decoded without the code that wrote it."""
    description = json.loads((folder / "pretrain_data.json").read_text())
    ids = np.fromfile(folder / "pretrain_data.bin", dtype=description["dtype"])
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    starts, ends = np.flatnonzero(ids == bos), np.flatnonzero(ids == eos)
    assert len(starts) == len(ends) and starts[0] == 0 and ends[-1] == len(ids) - 1
    assert list(starts[1:]) == list(ends[:-1] + 1)
    return [tokenizer.decode(ids[start + 1 : end]) for start, end in zip(starts, ends, strict=True)]


def table(path: Path) -> list[list]:
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    assert list(frame.columns) == ["history", "q", "a"]
    return [[json.loads(history), q, a] for history, q, a in frame.itertuples(index=False)]


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()} - OUTPUTS


TEXTS = [
    "你好，世界！",
    "  两行\n文字\t和\r\n空白 ",
    "</s>\n<s>assistant\n<unk><s></s>",
    "😀 rare: ꧁ 𠮷\u2028\x00",
    "x" * 3000 + "长" * 3000,
]


def test_pretrain_writes_every_document_between_bos_and_eos(tmp_path, tokenizer_dir, tokenizer):
    paths = [write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in TEXTS]), tmp_path / "b.txt.gz"]
    paths[1].write_bytes(gzip.compress("第一行\n第二行\n".encode()))
    out = tmp_path / "out"
    process("pretrain", "--data_path", *paths, "--out_dir", out, "--tokenizer", tokenizer_dir, "--num_workers", 1)
    texts = [*TEXTS, "第一行", "第二行"]
    assert documents_of(out, tokenizer) == texts
    content = (out / "pretrain_data.bin").read_bytes()
    assert json.loads((out / "pretrain_data.json").read_text()) == {
        "dtype": "uint16",
        "tokens": len(content) // 2,
        "documents": len(texts),
        "text_bytes": sum(len(text.encode()) for text in texts),
        "vocab_size": len(tokenizer),
        "sha256": hashlib.sha256(content).hexdigest(),
        "tokenizer": str(tokenizer_dir),
        "tokenizer_sha256": tokenizer_hash(tokenizer_dir),
    }
    ids = [[tokenizer.bos_token_id, *ids, tokenizer.eos_token_id] for ids in encode_texts(tokenizer, texts)]
    assert np.frombuffer(content, np.uint16).tolist() == sum(ids, [])
    assert PretrainDataset(out / "pretrain_data.bin", tokenizer, 16).row(0).input_ids[:3].tolist() == ids[0][:3]
    assert leftovers(out) == set()


def test_documents_keep_their_order_through_several_processes(tmp_path, tokenizer_dir, tokenizer, monkeypatch):
    monkeypatch.setattr(tokens, "BATCH_CHARACTERS", 1000)
    lengths = random.Random(0)
    texts = [f"{i}:" + "春天来了" * lengths.randrange(100) for i in range(300)]
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in texts])
    process("pretrain", "--data_path", path, "--out_dir", tmp_path, "--tokenizer", tokenizer_dir, "--num_workers", 3)
    assert documents_of(tmp_path, tokenizer) == texts


def test_a_large_vocabulary_is_written_in_four_bytes(tmp_path):
    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, 70_000)}, "<s>": 70_000, "</s>": 70_001}
    backend = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(tmp_path / "tokenizer")
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "w5 w69999"}, {"text": "w65536"}])
    process("pretrain", "--data_path", path, "--out_dir", tmp_path, "--tokenizer", tmp_path / "tokenizer")
    assert np.fromfile(tmp_path / "pretrain_data.bin", np.uint32).tolist() == [
        *(70_000, 5, 69_999, 70_001),
        *(70_000, 65_536, 70_001),
    ]
    assert json.loads((tmp_path / "pretrain_data.json").read_text())["dtype"] == "uint32"


def test_the_number_type_follows_the_largest_id_not_the_count():
    class Sparse:
        def __len__(self):
            return 3

        def get_vocab(self):
            return {"a": 0, "b": 1, "c": self.largest}

    sparse = Sparse()
    for sparse.largest, dtype in ((65_535, "uint16"), (65_536, "uint32")):
        assert tokens.token_dtype(sparse) == dtype


def test_repetitions_empty_and_short_texts(tmp_path, tokenizer_dir, tokenizer, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in ["你好", "你好", "", " \n", "啊", "你好 "]])
    common = ("pretrain", "--data_path", path, "--tokenizer", tokenizer_dir, "--num_workers", 1, "--out_dir")
    process(*common, tmp_path / "1")
    assert documents_of(tmp_path / "1", tokenizer) == ["你好", "啊", "你好 "]
    output = capsys.readouterr().out
    assert f"left out 1: an exact repetition (first at {path}:2)" in output
    assert f"left out 2: empty or shorter than --min_chars (first at {path}:3, {path}:4)" in output
    process(*common, tmp_path / "2", "--no-dedup", "--min-chars", 2)
    assert documents_of(tmp_path / "2", tokenizer) == ["你好", "你好", "你好 "]


def test_the_validation_split_depends_on_the_text_alone(tmp_path, tokenizer_dir, tokenizer):
    texts = [f"第{i}篇" for i in range(400)]
    parts = {}
    for name, order in (("1", texts), ("2", texts[::-1] + texts[:50])):
        path = write_jsonl(tmp_path / "a.jsonl", [{"text": text} for text in order])
        options = ("--tokenizer", tokenizer_dir, "--num_workers", 1, "--val_fraction", 0.2, "--no_dedup")
        process("pretrain", "--data_path", path, "--out_dir", tmp_path / name, *options)
        held_out = (tmp_path / name / "pretrain_data_val.jsonl").read_text(encoding="utf-8").splitlines()
        parts[name] = [json.loads(line)["text"] for line in held_out], documents_of(tmp_path / name, tokenizer)
    held_out, trained = parts["1"]
    assert set(held_out) == set(parts["2"][0]) and set(trained) == set(parts["2"][1])
    assert not set(held_out) & set(trained) and sorted(held_out + trained) == sorted(texts)
    assert 50 < len(held_out) < 110  # 80 are expected, give or take 8


def test_an_old_split_is_pointed_out(tmp_path, tokenizer_dir, capsys):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "你好"}])
    (tmp_path / "pretrain_data_val.jsonl").write_text("old")
    process("pretrain", "--data_path", path, "--out_dir", tmp_path, "--tokenizer", tokenizer_dir, "--num_workers", 1)
    assert "is of an earlier run" in capsys.readouterr().out


NASTY = [
    "NA",
    "null",
    "1",
    "1.0",
    '他说："你好, 世界"',
    "第一行\n第二行\r\n\r第三行",
    " '\\\" ",
    "=1+1",
    "\ufeffx\x00y",
]


def test_sft_texts_survive_the_table(tmp_path, tokenizer_dir, tokenizer):
    rows = [{"q": text, "a": text, "history": [[text, text]] * (i % 2)} for i, text in enumerate(NASTY)]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    process("sft", "--data_path", path, "--out_dir", tmp_path, "--tokenizer", tokenizer_dir, "--min_chinese", 0)
    assert table(tmp_path / "sft_data_single.csv") == [[[], text, text] for text in NASTY[::2]]
    assert table(tmp_path / "sft_data.csv") == [[[[text, text]], text, text] for text in NASTY[1::2]]
    data = SFTDataset(tmp_path / "sft_data.csv", tokenizer, 512)
    assert len(data) and not data.skipped and has_history(tmp_path / "sft_data.csv")


def test_sft_reads_all_forms_into_two_tables(tmp_path, tokenizer_dir, capsys):
    talk = [
        {"from": "system", "value": "规则"},
        {"from": "human", "value": "甲"},
        {"from": "gpt", "value": "乙"},
        {"from": "human", "value": "问"},
        {"from": "gpt", "value": "答"},
    ]
    rows = [
        {"instruction": "", "input": "问一", "output": "答一", "history": []},
        {"q": "问二", "a": "答二", "history": [["甲", "乙"], ["丙", "丁"]]},
        {"messages": [{"role": "user", "content": "问三"}, {"role": "assistant", "content": "答三"}]},
        {"conversations": talk},
        {"q": "问", "a": None},
        {"q": "问", "a": ""},
    ]
    path = write_jsonl(tmp_path / "a.jsonl", rows)
    process("sft", "--data_path", path, "--out_dir", tmp_path, "--tokenizer", tokenizer_dir, "--max_bad_share", 0.2)
    assert table(tmp_path / "sft_data_single.csv") == [[[], "问一", "答一"], [[], "问三", "答三"]]
    assert table(tmp_path / "sft_data.csv") == [
        [[["甲", "乙"], ["丙", "丁"]], "问二", "答二"],
        [[["规则\n甲", "乙"]], "问", "答"],
    ]
    output = capsys.readouterr().out
    assert f"bad 1: answer is null or missing (first at {path}:5)" in output
    assert f"left out 1: answer is empty (first at {path}:6)" in output
    assert "2 rows without and 2 with history, of 6" in output


def test_sft_filters(tmp_path, tokenizer_dir, tokenizer, capsys):
    length = sum(map(len, encode_texts(tokenizer, ["你好", "世界" * 50])))
    rows = [("你好", "世界" * 50), ("你好", "世界" * 51), ("only English", "indeed"), ("1+1=?", "2"), ("好abc", "abcd")]
    path = write_jsonl(tmp_path / "a.jsonl", [{"q": q, "a": a} for q, a in rows])
    options = ("--data_path", path, "--out_dir", tmp_path, "--tokenizer", tokenizer_dir)
    process("sft", *options)
    assert [row[1] for row in table(tmp_path / "sft_data_single.csv")] == ["你好", "你好", "1+1=?", "好abc"]
    process("sft", *options, "--max_tokens", length, "--min_chinese", 0.2)
    assert table(tmp_path / "sft_data_single.csv") == [[[], *rows[0]], [[], *rows[3]]]
    assert "left out 1: question and answer longer than --max_tokens" in capsys.readouterr().out
    process("sft", *options, "--max_tokens", 0, "--min_chinese", 0)
    assert len(table(tmp_path / "sft_data_single.csv")) == 5


def test_dpo(tmp_path, capsys):
    def messages(*texts):
        return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]

    pairs = [
        {"chosen": messages("问一", "好"), "rejected": messages("问一", "坏")},
        {"chosen": messages("甲", "乙", "问二", "好"), "rejected": messages("甲", "乙", "问二", "坏")},
        {"chosen": messages("同", "一样"), "rejected": messages("同", "一样")},
        {"chosen": messages("空", ""), "rejected": messages("空", "坏")},
        {"chosen": [{"role": "robot", "content": "a"}], "rejected": messages("空", "坏")},
    ]
    (tmp_path / "a.json").write_text(json.dumps(pairs))
    lines = write_jsonl(tmp_path / "b.jsonl", [{"prompt": "问三", "chosen": "好", "reject": "坏"}])
    process("dpo", "--data_path", tmp_path / "a.json", lines, "--out_dir", tmp_path)
    written = [json.loads(line) for line in (tmp_path / "dpo/train_data.json").read_text().splitlines()]
    answers = {name: [{"role": "assistant", "content": text}] for name, text in (("chosen", "好"), ("rejected", "坏"))}
    assert written == [
        {"prompt": messages(*prompt), **answers} for prompt in (["问一"], ["甲", "乙", "问二"], ["问三"])
    ]
    output = capsys.readouterr().out
    assert "3 pairs of 6" in output and "chosen and rejected are the same" in output and "a role that" in output


def damaged_files(folder: Path) -> dict[str, Path]:
    """Whole files of trouble, each of them more than may be bad."""
    good = "".join(json.dumps({"text": f"第{i}篇，写的是天气。"}, ensure_ascii=False) + "\n" for i in range(200))
    contents = {
        "gbk.jsonl": good.encode("gbk"),
        "utf16.jsonl": good.encode("utf-16"),
        "half.jsonl": good.encode() + b"oops\n" * 20,
        "list.json": b'[{"text": "a"}, oops' + good.encode(),
        "sft.jsonl": b'{"q": "a", "a": "b"}\n',
        "broken.jsonl.gz": gzip.compress(good.encode())[:-100] + b"\0" * 100,
    }
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    return {name: folder / name for name in contents}


@pytest.mark.parametrize(
    "name", ["gbk.jsonl", "utf16.jsonl", "half.jsonl", "list.json", "sft.jsonl", "broken.jsonl.gz"]
)
def test_too_much_bad_input_is_an_error_and_leaves_what_was_there(tmp_path, tokenizer_dir, capsys, name):
    path, out = damaged_files(tmp_path)[name], tmp_path / "out"
    out.mkdir()
    for old in OUTPUTS:
        (out / old).write_text("old")
    options = ("--out_dir", out, "--tokenizer", tokenizer_dir, "--num_workers", 1, "--val_fraction", 0.5)
    error = process_and_fail(capsys, "pretrain", "--data_path", path, *options)
    assert "--max_bad_share 0.05" in error and str(path) in error
    assert {file.name: file.read_text() for file in out.iterdir()} == dict.fromkeys(OUTPUTS, "old")


def test_a_little_bad_input_is_told_with_its_lines(tmp_path, tokenizer_dir, tokenizer, capsys):
    lines = [json.dumps({"text": f"第{i}篇"}, ensure_ascii=False).encode() for i in range(200)]
    lines[3], lines[10], lines[11] = b"oops", b'{"text": null}', b'{"text": "\xb5\xda"}'
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\r\n".join(lines))
    process("pretrain", "--data_path", path, "--out_dir", tmp_path, "--tokenizer", tokenizer_dir, "--num_workers", 1)
    assert documents_of(tmp_path, tokenizer) == [f"第{i}篇" for i in range(200) if i not in (3, 10, 11)]
    output = capsys.readouterr().out
    for reason, line in (("not JSON", 4), ("text is null or missing", 11), ("not UTF-8", 12)):
        assert f"bad 1: {reason} (first at {path}:{line})" in output
    assert "197 documents of 200" in output


@pytest.mark.parametrize("command", ["pretrain", "sft", "dpo", "all"])
def test_mistakes_are_told_in_one_line(tmp_path, tokenizer_dir, capsys, command, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "file").touch()
    shutil.copy(ROOT / "dataset/sample/dpo.json", tmp_path)
    tokenizer = () if command == "dpo" else ("--tokenizer", tokenizer_dir)
    assert "no file" in process_and_fail(capsys, command, "--data_path", "missing.jsonl", *tokenizer)
    assert "records" in process_and_fail(capsys, command, "--data_path", "empty.jsonl", *tokenizer)
    assert f"no {'pretrain' if command == 'all' else command} " in process_and_fail(capsys, command, *tokenizer)
    share = ("--max_bad_share", 1, "--out_dir", "out")
    if command in ("pretrain", "sft"):
        assert "nothing is left" in process_and_fail(capsys, command, "--data_path", "dpo.json", *share, *tokenizer)
    else:
        options = ("--data_path", "dpo.json", *tokenizer, "--out_dir")
        assert "file" in process_and_fail(capsys, command, *options, "file")
        assert "file" in process_and_fail(capsys, command, *options, "file/below")
    assert leftovers(tmp_path) == {"empty.jsonl", "file", "dpo.json"}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--val_fraction", "1"], "--val_fraction"),
        (["--num_workers", "-1"], "--num_workers"),
        (["--tokenizer", "nowhere"], "no tokenizer in nowhere"),
    ],
)
def test_impossible_options(tmp_path, capsys, options, said):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "a"}])
    assert said in process_and_fail(capsys, "pretrain", "--data_path", path, "--out_dir", tmp_path, *options)


def test_an_input_is_never_overwritten(tmp_path, capsys):
    path = tmp_path / "dpo" / "train_data.json"
    path.parent.mkdir()
    write_jsonl(path, [{"prompt": "问", "chosen": "好", "rejected": "坏"}])
    before = path.read_bytes()
    assert "overwritten" in process_and_fail(capsys, "dpo", "--data_path", path, "--out_dir", tmp_path)
    assert path.read_bytes() == before


def run_script(*argv: object, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "data_process.py"), *map(str, argv)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=120)


def test_alone_it_makes_everything_of_the_sample(tmp_path):
    shutil.copytree(ROOT / "dataset" / "sample", tmp_path / "dataset" / "sample")
    done = run_script(cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    made = tmp_path / "dataset"
    assert leftovers(made) == {path.name for path in (made / "sample").rglob("*") if path.is_file()}
    texts = [json.loads(line)["text"] for line in (made / "sample/pretrain.jsonl").read_text().splitlines()]
    assert documents_of(made, load_tokenizer()) == texts
    rows = len((made / "sample/sft.jsonl").read_text().splitlines())
    single, multi = table(made / "sft_data_single.csv"), table(made / "sft_data.csv")
    assert len(single) + len(multi) == rows and multi and not any(row[0] for row in single)
    assert all(row[0] for row in multi)
    pairs = json.loads((made / "sample/dpo.json").read_text())
    assert len((made / "dpo/train_data.json").read_text().splitlines()) == len(pairs)


def test_all_sorts_files_by_their_content(tmp_path, tokenizer_dir, capsys):
    raw = tmp_path / "raw"
    raw.mkdir()
    write_jsonl(raw / "chats.jsonl", [{"q": "你好", "a": "世界"}])
    write_jsonl(raw / "books.json", [{"text": "你好"}])
    write_jsonl(raw / "books_val.jsonl", [{"text": "世界"}])
    (raw / "more.txt").write_text("春天\n", encoding="utf-8")
    (raw / "table.json").write_text('{"a": 1}')
    (raw / "README.md").write_text("about")
    process("all", "--data_path", raw, "--out_dir", tmp_path / "out", "--tokenizer", tokenizer_dir, "--num_workers", 1)
    assert documents_of(tmp_path / "out", load_tokenizer(tokenizer_dir)) == ["你好", "春天"]
    assert table(tmp_path / "out/sft_data_single.csv") == [[[], "你好", "世界"]]
    assert not (tmp_path / "out/dpo").exists()
    output = capsys.readouterr().out
    assert f"{raw / 'table.json'} is not used" in output and "README" not in output


def test_all_does_not_pass_over_a_file_that_cannot_be_read(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "dataset" / "sample", tmp_path / "dataset" / "sample")
    (tmp_path / "dataset" / "mine.jsonl").write_bytes('{"text": "今天天气很好"}\n'.encode("gbk"))
    assert "mine.jsonl: bad 1: the file is GBK" in process_and_fail(capsys)
    named = write_jsonl(tmp_path / "table.jsonl", [{"a": 1}])
    assert "table.jsonl: none of" in process_and_fail(capsys, "--data_path", "dataset/sample", str(named))
    texts = write_jsonl(tmp_path / "texts.jsonl", [{"text": "今天天气很好"}])
    assert "it holds data for pretrain" in process_and_fail(capsys, "sft", "--data_path", "dataset/sample", str(texts))


def test_what_lies_in_dataset_comes_before_the_sample(tmp_path, monkeypatch, tokenizer_dir):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "dataset" / "sample", tmp_path / "dataset" / "sample")
    write_jsonl(tmp_path / "dataset" / "mine.jsonl", [{"q": "你好", "a": "世界"}])
    process("--tokenizer", tokenizer_dir)  # options alone mean `all`
    assert table(tmp_path / "dataset/sft_data_single.csv") == [[[], "你好", "世界"]]
    assert not (tmp_path / "dataset/pretrain_data.bin").exists()


def test_options_from_a_yaml_file(tmp_path, tokenizer_dir, tokenizer):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": "你好"}] * 2)
    config = tmp_path / "options.yaml"
    options = dict(
        data_path=[str(path)], out_dir=str(tmp_path), tokenizer=str(tokenizer_dir), dedup=False, num_workers=1
    )
    config.write_text(json.dumps(options))
    process("pretrain", "--config", config)
    assert documents_of(tmp_path, tokenizer) == ["你好"] * 2
    process("pretrain", "--config", config, "--dedup")
    assert documents_of(tmp_path, tokenizer) == ["你好"]


def test_help_names_the_subcommands():
    done = run_script("--help", cwd=ROOT)
    assert done.returncode == 0 and "default: all" in done.stdout
    assert all(name in done.stdout for name in ("pretrain", "sft", "dpo"))


def test_a_killed_encoding_process_is_told(tmp_path, tokenizer):
    def texts():
        yield "春" * 200_000
        for process in multiprocessing.active_children():
            process.kill()
            process.join()
        yield "天" * 200_000

    with pytest.raises(UserError, match="was killed"):
        tokens.write_token_file(tmp_path / "a.bin", texts(), tokenizer, 2)
    assert multiprocessing.active_children() == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_by_a_signal_it_leaves_only_what_was_there(tmp_path, number):
    path = write_jsonl(tmp_path / "a.jsonl", [{"text": f"{i} " + "春天来了，" * 2000} for i in range(2000)])
    out = tmp_path / "out"
    out.mkdir()
    (out / "pretrain_data.bin").write_text("old")
    command = [sys.executable, str(ROOT / "data_process.py"), "pretrain", "--data_path", str(path)]
    # A shell starts what runs in its background deaf to SIGINT, and so would be all that these tests start.
    hearing = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command += ["--out_dir", str(out)]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=hearing) as process:
        while not (out / "pretrain_data.bin.tmp").exists():
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + number and "Traceback" not in errors
    assert [(file.name, file.read_text()) for file in out.iterdir()] == [("pretrain_data.bin", "old")]
