"""Rows of tokens: packing, positions, labels, and that every token is trained once."""

import csv
import json
import random

import numpy as np
import pytest
import torch
from conftest import LINES

from model.chat import encode
from model.cli import UserError
from model.dataset import (
    PretrainDataset,
    Segment,
    SFTDataset,
    has_history,
    make_row,
    pack,
    parse_history,
    stack,
)
from model.tokenizer import encode_texts, load_tokenizer, tokenizer_hash


@pytest.fixture
def token_file(tmp_path, tokenizer):
    """A file of 40 documents, and their ids with <s> and </s>."""
    texts = [LINES[i % len(LINES)] * (i % 7 + 1) for i in range(40)]
    documents = [[1, *ids, 2] for ids in encode_texts(tokenizer, texts)]
    path = tmp_path / "tokens.bin"
    tokens = np.array(sum(documents, []), dtype=np.uint16)
    tokens.tofile(path)
    description = dict(dtype="uint16", tokens=len(tokens), tokenizer_sha256=tokenizer_hash(tokenizer.name_or_path))
    path.with_suffix(".json").write_text(json.dumps(description))
    return path, documents


@pytest.mark.parametrize("length", [8, 32, 1000])
def test_every_token_but_the_first_of_a_document_is_predicted_once(token_file, tokenizer, length):
    path, documents = token_file
    data = PretrainDataset(path, tokenizer, length)
    found = []
    for i in range(len(data)):
        row = data.row(i)
        assert len(row.input_ids) == length
        found += [label for label in row.labels[1:] if label != -100]
    assert found == [token for document in documents for token in document[1:]]


def test_positions_restart_with_each_document(token_file, tokenizer):
    path, documents = token_file
    row = PretrainDataset(path, tokenizer, 10_000).row(0)
    expected = [place for document in documents for place in range(len(document))]
    assert row.position_ids[: len(expected)].tolist() == expected
    assert row.num_tokens == len(expected)
    assert row.labels[len(expected) :].tolist() == [-100] * (10_000 - len(expected))
    starts = [place for place, position in enumerate(expected) if position == 0]
    assert (row.labels[starts] == -100).all()


def test_documents_are_told_apart_where_bos_and_eos_are_one_id(tmp_path, tokenizer_dir):
    tokenizer = load_tokenizer(tokenizer_dir)
    tokenizer.bos_token = tokenizer.eos_token
    path = tmp_path / "tokens.bin"
    np.array([2, 5, 6, 2, 2, 7, 2, 2, 8, 9, 2], dtype=np.uint16).tofile(path)
    description = dict(dtype="uint16", tokens=11, tokenizer_sha256=tokenizer_hash(tokenizer.name_or_path))
    path.with_suffix(".json").write_text(json.dumps(description))
    row = PretrainDataset(path, tokenizer, 11).row(0)
    assert row.position_ids.tolist() == [0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3]
    assert row.labels.tolist() == [-100, 5, 6, 2, -100, 7, 2, -100, 8, 9, 2]


def test_token_files_that_do_not_fit_are_refused(token_file, tokenizer, tmp_path):
    path, _ = token_file
    with pytest.raises(UserError, match="no token file"):
        PretrainDataset(tmp_path / "none.bin", tokenizer, 8)
    description = json.loads(path.with_suffix(".json").read_text())
    for change, message in [({"tokenizer_sha256": "x"}, "another tokenizer"), ({"tokens": 1}, "its .json says 1")]:
        path.with_suffix(".json").write_text(json.dumps(description | change))
        with pytest.raises(UserError, match=message):
            PretrainDataset(path, tokenizer, 8)
    path.with_suffix(".json").write_text(json.dumps(description))
    content = path.read_bytes()
    for length, message in [(len(content) - 1, "holds .*5 tokens"), (0, "holds 0 tokens")]:
        path.write_bytes(content[:length])
        with pytest.raises(UserError, match=message):
            PretrainDataset(path, tokenizer, 8)
    path.with_suffix(".json").write_text("{}")
    with pytest.raises(UserError, match="cannot use"):
        PretrainDataset(path, tokenizer, 8)


def test_packing_fills_rows_and_splits_nothing():
    generator = random.Random(0)
    lengths = [min(512, int(generator.expovariate(1 / 150)) + 5) for _ in range(3000)]
    groups = pack(lengths, 512)
    assert sorted(item for group in groups for item in group) == list(range(3000))
    assert max(sum(lengths[i] for i in group) for group in groups) <= 512
    assert sum(lengths) / (512 * len(groups)) > 0.98


def test_stacking_counts_what_is_trained():
    ids = np.array([1, 5, 6, 2])
    rows = [make_row([Segment(ids, ids), Segment(ids, ids)], 10, 0), make_row([], 10, 0)]
    batch = stack(rows)
    assert batch.input_ids[0].tolist() == [1, 5, 6, 2, 1, 5, 6, 2, 0, 0]
    assert batch.position_ids[0].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert batch.labels[0].tolist() == [-100, 5, 6, 2, -100, 5, 6, 2, -100, -100]
    assert batch.cu_seq_lens.tolist() == [0, 4, 8, 10, 20] and batch.cu_seq_lens.dtype == torch.int32
    assert (batch.num_tokens, batch.num_targets) == (8, 6)


DIALOGUES = [
    ([], "你好", "你好！"),
    ([["你好", "你好，世界！"]], "你是谁？", "春天来了"),
    ([["一", "二"], ["三", "四"]], '五,\n"六"', "NA"),
]


def write_csv(path, rows) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["history", "q", "a"])
        writer.writerows(rows)


def as_messages(history, question, answer):
    texts = [text for pair in [*history, [question, answer]] for text in pair]
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


@pytest.mark.parametrize("packing", [True, False])
def test_conversations_are_laid_out_as_the_chat_is(tmp_path, tokenizer, packing):
    write_csv(tmp_path / "sft.csv", [[json.dumps(h), q, a] for h, q, a in DIALOGUES])
    data = SFTDataset(tmp_path / "sft.csv", tokenizer, 256, packing)
    assert len(data) == (1 if packing else 3)
    found = []
    for i in range(len(data)):
        row = data.row(i)
        starts = [*np.flatnonzero(row.position_ids == 0), 256]
        for start, end in zip(starts, starts[1:], strict=False):
            if start < row.num_tokens:
                labels = row.labels[start:end]
                found.append((row.input_ids[start:end].tolist(), [int(label != -100) for label in labels]))
                assert all(label in (-100, token) for label, token in zip(labels, found[-1][0], strict=True))
    expected = [encode(tokenizer, as_messages(*dialogue)) for dialogue in DIALOGUES]
    assert sorted(found) == sorted((list(ids), list(mask)) for ids, mask in expected)


def test_old_files_with_python_literals_are_read_and_bad_rows_counted(tmp_path, tokenizer):
    rows = [
        ["[('你好', '你好！')]", "q", "a"],
        ["__import__('os').system('touch owned')", "q", "a"],
        ["[['only one']]", "q", "a"],
        ["[]", " ", "a"],
        ["", "q", "a"],
    ]
    write_csv(tmp_path / "sft.csv", rows)
    data = SFTDataset(tmp_path / "sft.csv", tokenizer, 64)
    assert len(data.lengths) == 2 and has_history(tmp_path / "sft.csv")
    assert data.skipped == {"history is not a list of [question, answer] pairs": 2, "question or answer is empty": 1}
    assert "(first: row 2)" in data.account() and "(first: row 4)" in data.account()


def test_too_long_conversations_lose_their_oldest_turns_then_the_end_of_the_answer(tmp_path, tokenizer):
    long_answer = "你好" * 100
    rows = [[json.dumps([["q1", "a1"]]), "q2", "a2"], ["[]", "q", long_answer], ["[]", long_answer, "a"]]
    write_csv(tmp_path / "sft.csv", rows)
    last = encode(tokenizer, as_messages([], "q2", "a2"))
    limit = len(last[0])
    data = SFTDataset(tmp_path / "sft.csv", tokenizer, limit, packing=False)
    kept = [data.ids[data.starts[i] : data.starts[i + 1]].tolist() for i in range(2)]
    assert kept[0] == last[0]
    cut = encode(tokenizer, as_messages([], "q", long_answer))[0][:limit]
    assert kept[1] == cut and 2 not in cut[-3:]  # a cut answer does not end
    assert len(data.lengths) == 2 and data.shortened >= 2
    assert data.skipped == {"the question alone fills max_seq_len": 1}


@pytest.mark.parametrize("cell", ["nonsense", "[1, 2]", '[["q"]]', '[["q", 1]]', "{}", "[" * 5000, "[['q', f('a')]]"])
def test_bad_histories_are_value_errors(cell):
    with pytest.raises(ValueError):
        parse_history(cell)


@pytest.mark.parametrize("content", ["", "x,y\n1,2\n", "history,q,a\n"])
def test_files_without_conversations_are_refused(tmp_path, tokenizer, content):
    (tmp_path / "sft.csv").write_text(content)
    with pytest.raises(UserError, match=r"sft\.csv"):
        SFTDataset(tmp_path / "sft.csv", tokenizer, 64)


def test_a_missing_or_strange_file_is_a_users_mistake(tmp_path, tokenizer):
    with pytest.raises(UserError, match="no file"):
        SFTDataset(tmp_path / "none.csv", tokenizer, 64)
    (tmp_path / "gbk.csv").write_bytes("history,q,a\n[],你好,你好\n".encode("gbk"))
    with pytest.raises(UserError, match="UTF-8"):
        SFTDataset(tmp_path / "gbk.csv", tokenizer, 64)
