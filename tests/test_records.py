"""Reading raw data: every kind of file and of damage, and every published form of a record."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from model import readers
from model.cli import UserError
from model.forms import BadRecord, conversation, document, kind_of, pair, texts_of
from model.records import Account, read_as, read_files, read_records, read_texts

GOOD = b'{"text": "\xe5\xa5\xbd"}'  # 好


def read(tmp_path: Path, content: bytes, name: str = "a.jsonl") -> tuple[list[Any], Account]:
    path = tmp_path / name
    path.write_bytes(content)
    account = Account()
    return [record.value for record in read_records(path, account)], account


def places(account: Account) -> dict[str, list[int]]:
    return {reason: [int(place.rsplit(":", 1)[1]) for place in found] for reason, found in account.places.items()}


def lines_of(count: int) -> list[str]:
    return [f"第{i}篇文章，写的是天气。" * 20 for i in range(count)]


def jsonl(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts).encode()


BAD_LINES = {
    "cut off": (b'{"text": "abc', "not JSON"),
    "two values": (GOOD + GOOD, "not JSON"),
    "a long number": (b"1" * 5000, "not JSON"),
    "invalid UTF-8": (b'{"text": "\xff\xfe"}', "not UTF-8"),
    "an overlong slash": (b'{"text": "\xc0\xaf"}', "not UTF-8"),
    "UTF-8 of a surrogate": (b'{"text": "\xed\xa0\x80"}', "not UTF-8"),
    "a zero byte": (b'{"text": "\0"}', "a zero byte in the line"),
    "deep nesting": (b"[" * 100_000, "JSON nested too deeply"),
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_line_is_counted_with_its_number_and_its_neighbours_are_read(tmp_path, line, reason):
    values, account = read(tmp_path, b"\n".join([GOOD, GOOD, line, GOOD]))
    assert values == [{"text": "好"}] * 3
    assert (account.records, dict(account.bad), places(account)) == (4, {reason: 1}, {reason: [3]})


def test_byte_order_marks_carriage_returns_and_blank_lines(tmp_path):
    content = b"\xef\xbb\xbf" + GOOD + b"\r\n\r\n  \n\xef\xbb\xbf\n" + b"\xef\xbb\xbf" + GOOD + b"\r\n"
    values, account = read(tmp_path, content)
    assert (values, account.records, account.bad.total()) == ([{"text": "好"}] * 2, 2, 0)


def test_each_line_of_a_text_file_is_a_document(tmp_path):
    values, _ = read(tmp_path, '\ufeff第一行\r\n\n[1]\n  "c" \n'.encode(), "a.txt")
    assert [value["text"] for value in values] == ["第一行", "[1]", '  "c" ']


def test_gzip_is_told_by_content(tmp_path):
    assert read(tmp_path, gzip.compress(GOOD), "a.jsonl")[0] == [{"text": "好"}]
    assert read(tmp_path, GOOD, "a.jsonl.gz")[0] == [{"text": "好"}]
    assert read(tmp_path, gzip.compress(GOOD + b"\n") + gzip.compress(GOOD), "b.gz")[0] == [{"text": "好"}] * 2


def test_a_line_of_five_megabytes_is_read(tmp_path):
    text = "长" * (5_000_000 // 3)
    assert read(tmp_path, jsonl(["a", text, "b"]))[0] == [{"text": "a"}, {"text": text}, {"text": "b"}]


def test_a_longer_line_than_any_record_is_skipped_to_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "MAX_RECORD", 100)
    values, account = read(tmp_path, jsonl(["a", "x" * 1000, "b", "y" * 95]))
    assert values == [{"text": "a"}, {"text": "b"}]
    assert list(places(account).values()) == [[2, 4]]


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "gbk", "gb18030"])
def test_nothing_of_a_file_in_another_encoding_is_taken_for_text(tmp_path, encoding, name):
    content = jsonl(lines_of(30)).decode().encode(encoding)
    values, account = read(tmp_path, content, name)
    assert values == []
    (reason,) = account.bad
    assert "UTF-8" in reason and ("GBK" if encoding.startswith("gb") else "UTF-16") in reason
    with pytest.raises(UserError, match=r"100\.0%"):
        account.check(0.05)


def test_a_gbk_line_that_is_utf8_by_chance_is_not_taken_for_text(tmp_path):
    content = "一\n今天天气很好\n我们去公园\n".encode("gbk")
    assert content.split(b"\n")[0].decode() != "一"  # it does decode, to something else
    values, account = read(tmp_path, content, "a.txt")
    assert (values, account.bad.total()) == ([], 3)


def test_english_in_utf16_is_not_taken_for_text(tmp_path):
    assert read(tmp_path, "only ascii here\nand here\n".encode("utf-16-le"), "a.txt")[0] == []


def test_a_truncated_gzip_file_gives_what_is_whole(tmp_path):
    texts = [f"{i} {'x' * (i * 37 % 800)}" for i in range(3000)]
    packed = gzip.compress(jsonl(texts))
    values, account = read(tmp_path, packed[: len(packed) * 2 // 3], "a.jsonl.gz")
    got = [value["text"] for value in values]
    assert 100 < len(got) < 3000 and got == texts[: len(got)]
    assert dict(account.bad) == {"the gzip file is cut off here": 1}
    assert places(account)["the gzip file is cut off here"] == [len(got) + 1]


def test_a_damaged_gzip_file_is_not_trusted(tmp_path):
    packed = bytearray(gzip.compress(jsonl(lines_of(500)), compresslevel=0))
    packed[len(packed) // 2] ^= 1  # stored text: the only thing that tells is the checksum at the end
    _, account = read(tmp_path, bytes(packed), "a.jsonl.gz")
    with pytest.raises(UserError, match=r"100\.0%.*damaged"):
        account.check(0.05)


def test_garbage_behind_gzip_data_is_counted(tmp_path):
    values, account = read(tmp_path, gzip.compress(GOOD + b"\n") + b"garbage", "a.jsonl.gz")
    assert (values, account.bad.total()) == ([{"text": "好"}], 1)


@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_list_is_read_item_by_item(tmp_path, indent):
    items = [{"text": text} for text in lines_of(900)] + [{"text": "长" * 300_000}, 17, {"text": "end"}]
    content = ("\ufeff \n" + json.dumps(items, ensure_ascii=False, indent=indent) + "\n").encode()
    values, account = read(tmp_path, content, "a.json")
    assert values == items
    assert (account.records, account.bad.total(), account.bytes_done) == (len(items), 0, len(content))


def test_items_of_a_list_know_their_lines(tmp_path):
    path = tmp_path / "a.json"
    path.write_text('[\n {"a":\n 1},\n\n {"a": 2}]\n')
    assert [record.line for record in read_records(path, Account())] == [2, 5]


BROKEN_LISTS = {
    "broken in the middle": b'[{"a": 1},\n{"a": ,\n' + b'{"a": 3},' * 99 + b"{}]",
    "no comma": b'[{"a": 1}\n{"a": 2},' + b'{"a": 3},' * 99 + b"{}]",
    "cut off": b'[{"a": 1},\n{"a": 2',
    "trailing comma": b'[{"a": 1},\n]',
    "two lists": b'[{"a": 1}]\n' + b'[{"a": 2}]' * 9,
}


@pytest.mark.parametrize("content", BROKEN_LISTS.values(), ids=BROKEN_LISTS)
def test_a_broken_list_is_read_up_to_the_break_and_is_an_error(tmp_path, content):
    values, account = read(tmp_path, content, "a.json")
    assert values == [{"a": 1}]
    assert account.bad.total() == 1
    with pytest.raises(UserError):
        account.check(0.05)


def test_an_item_of_a_list_that_is_not_utf8_is_bad_alone(tmp_path):
    items = [json.dumps({"text": text}, ensure_ascii=False).encode() for text in lines_of(100)]
    items[50] = items[50].replace("天气".encode(), b"\xe5\xa4", 1)
    path = tmp_path / "a.json"
    path.write_bytes(b"[" + b",\n".join(items) + b"]")
    account = Account()
    texts = [text for text, _ in read_as(document, read_records(path, account), account)]
    assert texts == lines_of(50) + lines_of(100)[51:]
    assert list(places(account).values()) == [[51]]


def test_the_unread_rest_of_a_list_counts_by_its_bytes(tmp_path):
    items = [json.dumps({"text": text}, ensure_ascii=False) for text in lines_of(1000)]
    items[900] = "oops"
    _, account = read(tmp_path, f"[{','.join(items)}]".encode(), "a.json")
    assert account.bad.total() == 1 and 0.08 < account.bad_share < 0.12


# `mtime=0`: the name of a test may not depend on the clock.
@pytest.mark.parametrize("content", [b"", b"\n \n\r\n", b"\xef\xbb\xbf", b"[]", gzip.compress(b"", mtime=0)])
def test_no_records(tmp_path, content):
    values, account = read(tmp_path, content, "a.json")
    assert (values, account.bad.total()) == ([], 0)
    with pytest.raises(UserError, match="no records"):
        account.check(1.0)


def test_only_the_first_places_are_kept_and_the_share_decides(tmp_path):
    _, account = read(tmp_path, (GOOD + b"\n") * 90 + b"oops\n" * 10)
    assert places(account) == {"not JSON": [91, 92, 93, 94, 95]}
    assert account.lines()[0].startswith("bad 10: not JSON (first at ")
    account.check(0.1)
    with pytest.raises(UserError, match="between 0 and 1"):
        account.check(-1)
    with pytest.raises(UserError, match=r"10\.0% .*--max_bad_share 0\.09 .*:91\)"):
        account.check(0.09)


def test_several_files_are_counted_together(tmp_path):
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl.gz"]
    paths[0].write_bytes(GOOD + b"\noops\n")
    paths[1].write_bytes(gzip.compress(GOOD * 2))
    account = Account()
    assert len(list(read_files(paths, account))) == 1
    assert account.places["not JSON"] == [f"{paths[0]}:2", f"{paths[1]}:1"]
    assert account.bytes_done == account.bytes_total == sum(path.stat().st_size for path in paths)


def test_a_missing_file_is_said_before_anything_is_read(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(GOOD)
    with pytest.raises(UserError, match=r"no file .*b\.jsonl"):
        next(read_files([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], Account()))
    with pytest.raises(UserError, match="cannot read"):
        list(read_records(tmp_path, Account()))


def test_read_texts(tmp_path, capsys):
    path = tmp_path / "val.jsonl"
    path.write_bytes(GOOD + b'\n{"text": null}\n{"text": " "}\n' + GOOD)
    assert read_texts(path) == ["好", "好"]
    assert "text is null or missing" in capsys.readouterr().err
    path.write_bytes(b'{"q": 1}')
    with pytest.raises(UserError, match="no documents"):
        read_texts(path)


QA = [{"role": "user", "content": "问"}, {"role": "assistant", "content": "答"}]
LONGER = [{"role": "user", "content": "甲"}, {"role": "assistant", "content": "乙"}, *QA]
SYSTEM = {"role": "system", "content": "规则"}

CONVERSATIONS = {
    "deepctrl": ({"id": 1, "instruction": "", "input": "问", "output": "答", "history": []}, QA),
    "deepctrl with history": ({"input": "问", "output": "答", "history": [["甲", "乙"]]}, LONGER),
    "deepctrl without history": ({"instruction": None, "input": "问", "output": "答", "history": None}, QA),
    "alpaca": (
        {"instruction": "翻译", "input": "问", "output": "答"},
        [{"role": "user", "content": "翻译\n问"}, QA[1]],
    ),
    "instruction only": ({"instruction": "问", "input": "", "output": "答"}, QA),
    "q and a": ({"q": "问", "a": "答"}, QA),
    "q, a and history": ({"q": "问", "a": "答", "history": [["甲", "乙"]]}, LONGER),
    "messages": ({"messages": LONGER}, LONGER),
    "messages with a system's": ({"messages": [SYSTEM, *QA]}, [SYSTEM, *QA]),
    "messages with an empty system's": ({"messages": [{"role": "system", "content": ""}, *QA]}, QA),
    "system beside": ({"system": "规则", "conversations": QA}, [SYSTEM, *QA]),
    "developer": ({"messages": [{"role": "developer", "content": "规则"}, *QA]}, [SYSTEM, *QA]),
    "sharegpt": (
        {
            "conversations": [
                {"from": "system", "value": "规则"},
                {"from": "human", "value": "问"},
                {"from": "gpt", "value": "答"},
            ]
        },
        [SYSTEM, *QA],
    ),
}


@pytest.mark.parametrize(("raw", "messages"), CONVERSATIONS.values(), ids=CONVERSATIONS)
def test_conversations(raw, messages):
    assert conversation(raw) == messages
    assert texts_of(raw) == [message["content"] for message in messages]
    assert kind_of(raw) == "sft"


def test_texts_are_taken_as_they_are():
    text = "  NA\r\n\t</s> \u3000😀\n"
    assert document({"text": text}) == text
    assert conversation({"q": text, "a": "null"})[0]["content"] == text


PAIRS = {
    "huozi": {"chosen": [QA[0], QA[1]], "rejected": [QA[0], {"role": "assistant", "content": "坏"}]},
    "strings": {"prompt": "问", "chosen": "答", "rejected": "坏"},
    "reject": {"prompt": "问", "chosen": "答", "reject": "坏"},
    "trl": {"prompt": [QA[0]], "chosen": [QA[1]], "rejected": [{"role": "assistant", "content": "坏"}]},
    "prompt twice": {"prompt": "问", "chosen": QA, "rejected": [QA[0], {"role": "assistant", "content": "坏"}]},
    "sharegpt": {
        "chosen": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "答"}],
        "rejected": [{"from": "human", "value": "问"}, {"from": "gpt", "value": "坏"}],
    },
}


@pytest.mark.parametrize("raw", PAIRS.values(), ids=PAIRS)
def test_pairs(raw):
    assert pair(raw) == ([QA[0]], "答", "坏")
    assert texts_of(raw) == ["问", "答", "坏"]
    assert kind_of(raw) == "dpo"


def test_the_prompt_of_a_pair_keeps_its_earlier_turns():
    chosen = [SYSTEM, *LONGER]
    assert pair({"chosen": chosen, "rejected": [*chosen[:-1], {"role": "assistant", "content": "坏"}]}).prompt == [
        SYSTEM,
        *LONGER[:-1],
    ]


BAD = [  # sound JSON that does not hold what it should
    (document, None, "not a JSON object"),
    (document, ["a"], "not a JSON object"),
    (document, {"text": None}, "text is null or missing"),
    (document, {"q": "a"}, "text is null or missing"),
    (document, {"text": 5}, "text is not text"),
    (document, {"text": ["a"]}, "text is not text"),
    (document, {"text": "a\ud800"}, "not UTF-8, or half a character (a lone surrogate)"),
    (conversation, {"text": "a"}, "no conversation: neither messages, conversations, output nor q"),
    (conversation, {"q": "a"}, "answer is null or missing"),
    (conversation, {"input": ["a"], "output": "b"}, "input is not text"),
    (conversation, {"q": "a", "a": {"b": 1}}, "answer is not text"),
    (conversation, {"q": "a", "a": "\udc00"}, "not UTF-8, or half a character (a lone surrogate)"),
    (conversation, {"q": "a", "a": "b", "history": "[]"}, "history is not a list of [question, answer] pairs"),
    (conversation, {"q": "a", "a": "b", "history": [["c"]]}, "history is not a list of [question, answer] pairs"),
    (conversation, {"q": "a", "a": "b", "history": [["c", None]]}, "answer is null or missing"),
    (conversation, {"messages": "a"}, "messages is not a list of messages"),
    (conversation, {"messages": []}, "messages is not a list of messages"),
    (conversation, {"messages": ["a"]}, "messages is not a list of messages"),
    (conversation, {"messages": [QA[0], {"role": "assistant", "content": None}]}, "message is null or missing"),
    (pair, {"prompt": "a", "chosen": "b"}, "rejected is null or missing"),
    (pair, {"chosen": "b", "rejected": "c"}, "prompt is null or missing"),
    (pair, {"prompt": "a", "chosen": 1, "rejected": "c"}, "chosen is not text"),
]

UNFIT = [  # nothing wrong with the record, but nothing to learn either
    (conversation, {"q": " ", "a": "b"}, "question is empty"),
    (conversation, {"instruction": "", "input": "", "output": "b"}, "question is empty"),
    (conversation, {"q": "a", "a": "\n"}, "answer is empty"),
    (conversation, {"messages": [QA[0]]}, "turns do not alternate from user to assistant"),
    (conversation, {"messages": [SYSTEM]}, "turns do not alternate from user to assistant"),
    (conversation, {"messages": QA[::-1]}, "turns do not alternate from user to assistant"),
    (conversation, {"messages": [*QA, QA[1]]}, "turns do not alternate from user to assistant"),
    (conversation, {"messages": [*QA, SYSTEM]}, "turns do not alternate from user to assistant"),
    (
        conversation,
        {"messages": [{"role": "bot", "content": "a"}]},
        "a role that is neither system, user nor assistant",
    ),
    (conversation, {"messages": [{"role": [], "content": "a"}]}, "a role that is neither system, user nor assistant"),
    (pair, {"prompt": "a", "chosen": "b", "rejected": "b\n"}, "chosen and rejected are the same"),
    (pair, {"prompt": "a", "chosen": "b", "rejected": ""}, "rejected is empty"),
    (pair, {"prompt": "", "chosen": "b", "rejected": "c"}, "prompt is empty"),
    (pair, {"chosen": QA, "rejected": LONGER}, "chosen and rejected answer different prompts"),
    (pair, {"chosen": [QA[0]], "rejected": [QA[0]]}, "turns do not alternate from user to assistant"),
    (pair, {"chosen": [{"role": "system", "content": ""}], "rejected": QA}, "an answer is empty"),
]


@pytest.mark.parametrize(("form", "raw", "reason"), BAD + UNFIT)
def test_bad_and_unfit_records(form, raw, reason):
    with pytest.raises(BadRecord) as caught:
        form(raw)
    assert str(caught.value) == reason


@pytest.mark.parametrize(("cases", "counter"), [(BAD, "bad"), (UNFIT, "dropped")])
def test_unfit_records_are_left_out_and_do_not_count_as_bad(tmp_path, cases, counter):
    for form, raw, reason in cases:
        (tmp_path / "a.jsonl").write_text(json.dumps(raw))
        account = Account()
        assert list(read_as(form, read_records(tmp_path / "a.jsonl", account), account)) == []
        assert (account.bad + account.dropped, dict(getattr(account, counter))) == ({reason: 1}, {reason: 1})
