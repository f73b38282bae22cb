"""The bundled small world: its tables and wordings are sound, and its test is one."""

import functools
import importlib.util
import json
import re
import sys
from collections import Counter
from difflib import SequenceMatcher
from pathlib import Path

import pytest

from dataset.world import load_world
from model.cli import UserError
from model.exact_match import is_right

ROOT = Path(__file__).parents[1]
WORLD = ROOT / "dataset" / "sample" / "world"
PUNCTUATION = "？?。，,！!：:“”《》、 "


@pytest.fixture(scope="module")
def world():
    return load_world(WORLD)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What make_sample.py writes."""
    folder = tmp_path_factory.mktemp("sample")
    write_sample(folder)
    return folder


@pytest.fixture(scope="module")
def sample(folder):
    """The same, read."""
    read = {}
    for path in folder.glob("*.jsonl"):
        read[path.stem] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return read | {"test": json.loads((folder / "test.json").read_text(encoding="utf-8"))}


def write_sample(folder: Path, **options: str) -> None:
    spec = importlib.util.spec_from_file_location("make_sample", ROOT / "dataset" / "make_sample.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["make_sample"] = module
    spec.loader.exec_module(module)
    module.main(module.Args(out_dir=str(folder), **options))


@pytest.mark.parametrize(
    ("answer", "about", "accept", "others", "right"),
    [
        ("法国的首都是巴黎。", "法国", [["巴黎"]], ["伦敦", "巴黎"], True),
        ("法国的首都是伦敦。", "法国", [["巴黎"]], ["伦敦"], False),
        ("巴黎，不是伦敦。", "法国", [["巴黎"]], ["伦敦"], False),
        ("首都是它。", "法国", [["巴黎"]], ["伦敦"], False),
        ("硫是非金属。", "硫", [["非金属"]], ["金属"], True),
        ("硫是非金属。", "硫", [["金属"]], ["非金属"], False),
        ("3加5等于18。", "3加5", [["8"]], ["18"], False),
        ("3加5等于18。", "3加5", [["8"]], [], False),
        ("3加5等于8。", "3加5", [["8"]], ["3", "5"], True),
        ("水是H2O。", "水", [["H2O", "H₂O"]], ["O2"], True),
        ("符号是Na。", "钠", [["N"]], [], False),
        ("北京在中国。", "北京", [["北京"]], [], False),
        ("测量的是体温度。", "体温计", [["体温"]], ["温度", "体温"], False),
        ("测量的是体温度。", "温度计", [["温度"]], ["温度", "体温"], False),
        ("红细胞和血浆", "", [["红细胞", "血细胞"], ["血浆"]], [], True),
        ("红细胞和血细胞", "", [["红细胞", "血细胞"], ["血浆"]], [], False),
    ],
)
def test_exact_match(answer, about, accept, others, right):
    assert is_right(answer, about, accept, others) is right


def test_size(world):
    assert world.num_facts >= 1500
    for relation in world.relations:
        assert len(relation.tells) >= 8 and len(relation.asks) >= 8, relation.name
        assert len(relation.test_asks) >= 3, relation.name
    for single in world.singles:
        assert len(single.asks) >= 8, single.name


def test_replies_are_right(world):
    """The rule that judges the model finds every reply of the training data right, and every swapped one wrong."""
    for relation in world.relations:
        others = [form for forms in relation.answers for form in forms]
        for thing, forms in relation.facts.items():
            wrong = next((group[0] for group in relation.answers if not set(group) & set(forms)), None)
            for reply in relation.replies:
                said = reply.replace("{x}", thing)
                assert is_right(said.replace("{y}", forms[0]), thing, [forms], others), (relation.name, thing, reply)
                if wrong:
                    assert not is_right(said.replace("{y}", wrong), thing, [forms], others), (relation.name, thing)
    for single in world.singles:
        for reply in single.replies:
            assert is_right(reply, "", single.accept), (single.name, reply)


def test_honest_replies_admit_it(world):
    for reply in world.outside_replies + world.unknown_replies:
        assert any(words in reply for words in world.dont_know), reply


def bare(wording: str) -> str:
    """Without the thing, polite phrases and punctuation."""
    for word in ("{x}", "请问", "你好", "告诉我", "你知道吗"):
        wording = wording.replace(word, "")
    return "".join(character for character in wording if character not in PUNCTUATION)


characters = functools.cache(frozenset)


def share_of_own_characters(wording: str, known: str) -> float:
    """Share of a wording's characters that have no counterpart, in order, in a known one."""
    common = len(wording) - len(characters(wording) - characters(known))  # at least as many, and quick to count ...
    if common > 0.7 * len(wording):
        common = (Counter(wording) & Counter(known)).total()  # ... in any order: also at least as many
    if common > 0.7 * len(wording):
        blocks = SequenceMatcher(None, wording, known, autojunk=False).get_matching_blocks()
        common = sum(block.size for block in blocks)
    return 1 - common / len(wording)


def own_share(wording: str, known: set[str]) -> float:
    """Of what is asked in a test: the share of characters that no known wording, made bare, has in that order."""
    asked = bare(wording)
    return min(share_of_own_characters(asked, one) for one in known)


def test_test_wordings_are_new(world):
    for relation in world.relations:
        first = [frame.replace("{f}", follow) for frame in world.frames["first"] for follow in relation.follows]
        gaps = [tell.replace("{y}", "") for tell in relation.tells]
        known = {bare(one) for one in [*relation.asks, *first, *gaps]}
        for wording in relation.test_asks:
            assert own_share(wording, known) >= 0.3, (relation.name, wording)
        known = {bare(one) for one in [*relation.asks, *relation.follows]}
        for wording in relation.test_follows:
            assert own_share(wording, known) >= 0.3, (relation.name, wording)
    known = {bare(one) for one in world.same_question}
    for wording in world.test_same_question:
        assert own_share(wording, known) >= 0.3, wording


def test_test_wordings_are_not_framed_as_trained_ones(world):
    asked = [wording for relation in world.relations for wording in relation.test_asks]
    for frames in world.frames.values():
        for frame in frames:
            parts = [part for part in re.split(r"\{\w\}", frame) if len(bare(part)) >= 5]
            assert not [wording for wording in asked for part in parts if part in wording], frame


def test_no_training_file_has_a_question_of_the_test(sample):
    trained = {message["content"] for record in sample["sft"] for message in record["messages"]}
    trained |= {record["prompt"] for record in sample["dpo"]}
    texts = "\n".join(record["text"] for record in sample["pretrain"])
    trained = {bare(text) for text in trained}
    for case in sample["test"]["cases"]:
        if len(case["questions"]) == 1:
            assert bare(case["questions"][0]) not in trained, case
            assert case["questions"][0] not in texts, case


def test_the_built_in_questions_are_all_there(sample):
    text = (ROOT / "2-eval.py").read_text(encoding="utf-8")
    asked = [case["questions"][0] for case in sample["test"]["cases"] if case["kind"] == "builtin"]
    assert len(set(asked)) == len(asked) == 24
    assert all(f'"{question}"' in text for question in asked)
    for path in (ROOT / "dataset" / "sample").iterdir():
        if path.is_file():
            assert not [question for question in asked if question in path.read_text(encoding="utf-8")], path


def test_unknown_names_are_unknown(world, sample):
    known = {thing for relation in world.relations for thing in [*relation.facts, *relation.unknown]}
    unknown = [case for case in sample["test"]["cases"] if case["kind"] == "unknown" and case["about"]]
    assert len(unknown) >= 100
    for case in unknown:
        assert case["about"] not in known, case


def test_shares(sample):
    """Arithmetic is at most a tenth of the questions; every kind of dialogue is there."""
    cases = sample["test"]["cases"]
    assert sum(case["relation"] == "arithmetic" for case in cases) <= len(cases) / 10
    sums = sum(any(sign in record["messages"][0]["content"] for sign in "加减乘") for record in sample["sft"])
    assert sums <= 0.1 * len(sample["sft"])
    assert {len(record["messages"]) for record in sample["sft"]} >= {2, 4, 6}


def test_a_share_too_small_for_some_tables_leaves_them_out(world):
    small = load_world(ROOT / "dataset/sample/world", 0.05)
    assert 0 < small.num_facts < 0.06 * world.num_facts


def test_a_folder_without_a_world_is_a_users_mistake(tmp_path):
    with pytest.raises(UserError, match="--world .*nothing"):
        write_sample(tmp_path, world=str(tmp_path / "nothing"))


def test_same_tables_same_files(folder, tmp_path):
    write_sample(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {path.name for path in folder.iterdir()}
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder / path.name).read_bytes()
