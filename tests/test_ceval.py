"""eval_ceval.py: what the model is asked, what counts as its answer, and what is reported of it."""

import csv
import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import ROOT, load_script, make_model
from peft import LoraConfig, get_peft_model

from model.checkpoint import save_weights
from model.choices import LETTERS, Question, find_subjects, guess, make_prompt, read_questions
from model.cli import UserError, run
from model.records import Account
from model.scoreboard import CATEGORIES, CATEGORY_OF, summarize, wilson_interval

SCRIPT = load_script("eval_ceval.py")
REAL = ROOT.parent / "shared" / "data" / "ceval"
SHORT = Question("1+1=____。", ("1", "2", "3", "4"), "B")
LONG = Question("你好，世界！春天来了，小草绿了。" * 3, ("甲", "乙", "丙丙丙", "丁"), "D")
EXAMPLES = [Question(f"例{n}", ("a", "b", "c", "d"), LETTERS[n]) for n in range(4)]

HEADER = "id,question,A,B,C,D,answer"


def write_subject(folder: Path, name: str, answers: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f'{n},"第{n}题，{name * (n % 3)}",甲,乙{n},丙,丁,{answer}' for n, answer in enumerate(answers)]
    (folder / f"{name}.csv").write_text("\n".join([HEADER, *rows, ""]), encoding="utf-8")


@pytest.fixture
def data(tmp_path) -> Path:
    """Two subjects of C-Eval and one of ours, with worked examples."""
    for name, answers in {"law": "ABCDD", "logic": "DDDAB", "cooking": "CD"}.items():
        write_subject(tmp_path / "data" / "val", f"{name}_val", answers)
        write_subject(tmp_path / "data" / "dev", f"{name}_dev", "ABCDA")
    return tmp_path / "data"


@pytest.fixture
def call(data, tmp_path, tokenizer_dir, capsys):
    """Runs the script in this process; returns what it printed, errors last."""
    weights = tmp_path / "out" / "full_sft_32.pth"
    save_weights(weights, make_model(max_seq_len=256), tokenizer_dir)
    defaults = ["--checkpoint", weights, "--data_dir", data, "--result_dir", tmp_path / "results"]

    def call(*flags: object) -> str:
        run(SCRIPT.main, SCRIPT.Args, [str(flag) for flag in (*defaults, *flags)])
        return "".join(capsys.readouterr())

    return call


@pytest.fixture
def fail(call, capsys):
    """Runs the script, which must end with exit code 2; returns its one line."""

    def fail(*flags: object) -> str:
        with pytest.raises(SystemExit) as caught:
            call(*flags)
        assert caught.value.code == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    return fail


def rows_of(path: Path) -> list[dict[str, str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# What the model is asked.


def test_the_chat_style_asks_as_a_user_would(tokenizer):
    prompt = make_prompt(tokenizer, SHORT, [], "chat", 999)
    question = "以下是单项选择题，请选出其中的正确答案。\n\n1+1=____。\nA. 1\nB. 2\nC. 3\nD. 4\n答案："
    assert tokenizer.decode(prompt.ids) == f"<s>user\n{question}</s>\n<s>assistant\n"
    assert prompt.ids.count(tokenizer.bos_token_id) == 2
    assert [tokenizer.decode([letter]) for letter in prompt.letters] == list("ABCD")
    assert (prompt.shots, prompt.cut) == (0, 0)


def test_worked_examples_are_earlier_turns_or_text_before(tokenizer):
    chat = tokenizer.decode(make_prompt(tokenizer, SHORT, EXAMPLES[1:3], "chat", 999).ids)
    assert chat.count("<s>user\n") == chat.count("<s>assistant\n") == 3
    assert (
        "例1" in chat
        and "答案：</s>\n<s>assistant\nB</s>\n<s>user\n" in chat
        and "答案：</s>\n<s>assistant\nC</s>" in chat
    )
    plain = tokenizer.decode(make_prompt(tokenizer, SHORT, EXAMPLES[1:3], "plain", 999).ids)
    assert plain == (
        "<s>以下是单项选择题，请选出其中的正确答案。\n\n例1\nA. a\nB. b\nC. c\nD. d\n答案：B\n\n"
        "例2\nA. a\nB. b\nC. c\nD. d\n答案：C\n\n1+1=____。\nA. 1\nB. 2\nC. 3\nD. 4\n答案："
    )


@pytest.mark.parametrize("style", ["chat", "plain"])
def test_what_is_too_long_loses_examples_and_then_its_beginning(tokenizer, style):
    whole = make_prompt(tokenizer, LONG, EXAMPLES, style, 9999)
    assert whole.shots == 4
    three = make_prompt(tokenizer, LONG, EXAMPLES, style, len(whole.ids) - 1)
    assert (three.shots, three.cut) == (3, 0)
    assert three.ids == make_prompt(tokenizer, LONG, EXAMPLES[:3], style, 9999).ids
    bare = make_prompt(tokenizer, LONG, [], style, 9999)
    short = make_prompt(tokenizer, LONG, EXAMPLES, style, len(bare.ids) - 7)
    assert (short.shots, short.cut, len(short.ids)) == (0, 7, len(bare.ids) - 7)
    opening = "<s>user\n" if style == "chat" else "<s>"
    assert tokenizer.decode(short.ids).startswith(opening)
    assert short.ids[-40:] == bare.ids[-40:]


def test_letters_that_are_several_tokens_are_refused(tokenizer, monkeypatch):
    twice = {"A": [5, 6], "B": [5, 7], "C": [8, 6], "D": [5, 9]}
    monkeypatch.setattr("model.choices.encode_texts", lambda _, texts: [twice.get(text, [3]) for text in texts])
    with pytest.raises(UserError, match="single tokens"):
        make_prompt(tokenizer, SHORT, [], "chat", 999)


# What counts as its answer.


@pytest.mark.parametrize("use_moe", [False, True])
@pytest.mark.parametrize(("style", "size"), [("chat", 5), ("plain", 3)])
@pytest.mark.usefixtures("products")
def test_a_batch_gives_what_one_question_at_a_time_gives(tokenizer, use_moe, style, size):
    model = make_model(use_moe=use_moe)
    questions = [SHORT, LONG, *EXAMPLES, LONG, SHORT]
    prompts = [make_prompt(tokenizer, one, EXAMPLES[: n % 3], style, 400) for n, one in enumerate(questions)]
    assert len({len(prompt.ids) for prompt in prompts}) > 3
    batched, alone = guess(model, prompts, size), guess(model, prompts, 1)
    assert [one.letter for one in batched] == [one.letter for one in alone]
    for prompt, one, other in zip(prompts, batched, alone, strict=True):
        assert one.probabilities == pytest.approx(other.probabilities, abs=1e-5)
        # ... and what the definition gives: the next token's distribution, of the letters only.
        everything = model(torch.tensor([prompt.ids])).logits[0, -1].softmax(-1)
        expected = [everything[tokenizer.convert_tokens_to_ids(letter)].item() for letter in "ABCD"]
        assert one.probabilities == pytest.approx([p / sum(expected) for p in expected], abs=1e-5)
        assert one.any_letter == pytest.approx(sum(expected), rel=1e-4)
        assert one.letter == "ABCD"[expected.index(max(expected))]


def test_what_prompts_begin_with_is_read_once(tokenizer):
    """The worked examples are most of a prompt: counted are the ids that go through the model."""
    model, seen = make_model(), []
    model.tok_embeddings.register_forward_hook(lambda _, ids, __: seen.append(ids[0].numel()))
    questions = [Question(f"{n}{text}", tuple("1234"), "A") for n, text in enumerate(["一", "二二", "三三三三"])]
    prompts = [make_prompt(tokenizer, one, EXAMPLES, "chat", 9999) for one in questions]
    bare = [make_prompt(tokenizer, one, [], "chat", 9999) for one in questions]
    prompts[1] = make_prompt(tokenizer, questions[1], EXAMPLES, "chat", len(prompts[1].ids) - 1)
    assert [prompt.shots for prompt in prompts] == [4, 3, 4]
    guess(model, prompts, 1)
    whole = sum(len(prompt.ids) for prompt in prompts)
    examples = len(prompts[0].ids) - len(bare[0].ids)
    assert examples < sum(seen) <= examples + sum(len(alone.ids) for alone in bare) < whole


# What is reported.


def test_results_are_written_and_add_up(call, data, tmp_path):
    printed = call()
    folder = tmp_path / "results" / "full_sft_32"
    tables = {name: rows_of(folder / f"{name}.csv") for name in ("law", "logic", "cooking")}
    assert [row["answer"] for row in tables["law"]] == list("ABCDD")
    right = {}
    for name, rows in tables.items():
        for row in rows:
            probabilities = {letter: float(row[f"p_{letter}"]) for letter in "ABCD"}
            assert sum(probabilities.values()) == pytest.approx(1, abs=1e-5)
            assert row["prediction"] == max(probabilities, key=probabilities.get)
            assert row["correct"] == str(row["prediction"] == row["answer"])
            assert 0 < float(row["p_any_letter"]) < 1
            assert row["C"] == "丙" and row["question"].startswith("第")
        right[name] = sum(row["correct"] == "True" for row in rows)
        assert f"{name:<42} {right[name]:>4} of {len(rows):>4}" in printed
    summary = json.loads((folder / "summary.json").read_text())
    assert {name: one["correct"] for name, one in summary["subjects"].items()} == right
    assert summary["categories"].keys() == {"Humanities", "Uncategorised"}
    assert summary["categories"]["Humanities"]["correct"] == right["law"] + right["logic"]
    assert (summary["total"]["questions"], summary["total"]["correct"]) == (12, sum(right.values()))
    assert sum(summary["chosen"].values()) == 12
    assert summary["chosen"]["A"] == sum(row["prediction"] == "A" for rows in tables.values() for row in rows)
    assert (summary["most_common_letter"], summary["total"]["always_same_letter"]) == ("D", 6 / 12)
    assert summary["mean_of_subjects"] == pytest.approx(
        (right["law"] / 5 + right["logic"] / 5 + right["cooking"] / 2) / 3
    )
    text = (folder / "summary.md").read_text()
    assert f"| **total** | 12 | {sum(right.values())} |" in text and "*25.00 %*" in text and "50.00 %" in text
    assert (folder / "chart.png").read_bytes().startswith(b"\x89PNG")


def test_the_same_model_gives_the_same_result(call, tmp_path):
    call("--batch_size", 4)
    folder = tmp_path / "results" / "full_sft_32"
    first = {file.name: file.read_bytes() for file in folder.iterdir()}
    call("--batch_size", 4)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == first


def test_settings_have_folders_of_their_own_and_are_compared(call, fail, tmp_path):
    call("--shots", 2)
    call("--prompt_style", "plain", "--name", "other")
    results = tmp_path / "results"
    table = call("--compare", results / "full_sft_32_2shot", results / "other")
    scores = [json.loads((results / name / "summary.json").read_text()) for name in ("full_sft_32_2shot", "other")]
    assert "|  | full_sft_32_2shot | other |" in table and "| setting | chat, 2 shots | plain, 0 shots |" in table
    for subject in ("law", "cooking"):
        cells = " | ".join(f"{100 * score['subjects'][subject]['accuracy']:.2f} %" for score in scores)
        assert f"| {subject} | {cells} |" in table
    assert (results / "comparison.md").read_text() in table
    assert (results / "comparison.png").stat().st_size > 1000
    scores[1]["subjects"].pop("law")
    (results / "other" / "summary.json").write_text(json.dumps(scores[1]))
    assert "not measured on the same questions" in fail("--compare", results / "full_sft_32_2shot", results / "other")
    assert str(tmp_path / "nowhere") in fail("--compare", tmp_path / "nowhere")


def test_products_in_bfloat16_are_asked_for_and_change_little(call, fail, tmp_path):
    call()
    assert "dtype float32;" in fail("--dtype", "bfloat16")
    call("--dtype", "bfloat16", "--name", "halves")
    exact, rounded = (
        [float(row[f"p_{letter}"]) for row in csv.DictReader(text.splitlines()) for letter in LETTERS]
        for text in ((tmp_path / "results" / name / "law.csv").read_text() for name in ("full_sft_32", "halves"))
    )
    assert exact != rounded
    assert rounded == pytest.approx(exact, abs=0.05)


def test_results_of_another_checkpoint_are_kept(call, fail, tmp_path, tokenizer_dir):
    call()
    adapter = get_peft_model(make_model(max_seq_len=256), LoraConfig(r=2, target_modules="all-linear"))
    adapter.save_pretrained(tmp_path / "music")
    call("--lora", tmp_path / "music")
    assert "full_sft_32_music" in fail("--lora", tmp_path / "music", "--lora_scale", 0.5)
    call("--lora", tmp_path / "music", "--lora_scale", 0.5, "--quantize", "int8", "--name", "half_music")
    assert json.loads((tmp_path / "results" / "half_music" / "summary.json").read_text())["lora_scale"] == 0.5
    summary = json.loads((tmp_path / "results" / "full_sft_32_music" / "summary.json").read_text())
    assert summary["lora"] == str(tmp_path / "music")
    assert "full_sft_32.pth:" in fail("--lora", tmp_path / "music", "--name", "full_sft_32")
    shutil.copytree(tmp_path / "data", tmp_path / "cmmlu")
    assert f"data_dir {tmp_path / 'data'};" in fail("--data_dir", tmp_path / "cmmlu")
    assert "split val;" in fail("--split", "dev")
    assert "shots 0;" in fail("--shots", 2, "--name", "full_sft_32")
    assert "max_seq_len 0;" in fail("--max_seq_len", 64)
    other = tmp_path / "elsewhere" / "full_sft_32.pth"
    save_weights(other, make_model(1), tokenizer_dir)
    before = (tmp_path / "results" / "full_sft_32" / "law.csv").read_bytes()
    assert "--name" in fail("--checkpoint", other)
    assert (tmp_path / "results" / "full_sft_32" / "law.csv").read_bytes() == before


def test_interval_bounds_are_where_the_share_is_at_the_edge_of_chance():
    """Wilson's bounds are the true shares p from which the found one lies 1.96 standard deviations away."""
    for correct, questions in [(13, 50), (1, 19), (361, 1346), (40, 40), (0, 7)]:
        share = correct / questions
        low, high = wilson_interval(correct, questions)
        assert 0 <= low <= share <= high <= 1
        for p in {low, high} - {0.0, 1.0}:
            assert abs(share - p) == pytest.approx(1.96 * (p * (1 - p) / questions) ** 0.5, abs=1e-9)


def test_subjects_have_the_categories_of_c_eval():
    assert {name: len(subjects.split()) for name, subjects in CATEGORIES.items()} == {
        "STEM": 20, "Social sciences": 10, "Humanities": 11, "Other": 11
    }  # fmt: skip
    assert len(CATEGORY_OF) == 52


@pytest.mark.skipif(not REAL.is_dir(), reason="C-Eval is not here")
def test_all_of_c_eval_is_read():
    account = Account()
    subjects = find_subjects(REAL, "val")
    assert subjects.keys() == CATEGORY_OF.keys()
    questions = {name: read_questions(path, account) for name, path in subjects.items()}
    assert not account.bad
    always_d = {name: [(question.answer, "D") for question in part] for name, part in questions.items()}
    total = summarize(always_d)["total"]
    assert (total["questions"], total["correct"]) == (1346, 354)


# Files of others, and broken ones.


def test_other_collections_of_that_layout_work(call, tmp_path):
    folder = tmp_path / "cmmlu"
    for part in ("dev", "test"):
        (folder / part).mkdir(parents=True)
        text = ',Question,A,B,C,D,Answer,note\r\n0,"多行\r\n题目",1,2,3,4,c,x\r\n1,题,1,2,3,4,A,\r\n'
        (folder / part / "agronomy.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    call("--data_dir", folder, "--split", "test", "--shots", 1, "--name", "cmmlu")
    rows = rows_of(tmp_path / "results" / "cmmlu" / "agronomy.csv")
    assert [(row["question"], row["answer"]) for row in rows] == [("多行\r\n题目", "C"), ("题", "A")]


def test_rows_that_are_no_questions_are_skipped_and_counted(call, data, tmp_path):
    lines = [
        HEADER,
        "0,好,甲,乙,丙,丁,A",
        "1,好,甲,乙",
        '2,"好\n好",甲,乙,丙,丁,',
        "3,好,,乙,丙,丁,A",
        "4,好,甲,乙,丙,丁,E",
    ]
    file = data / "val" / "law_val.csv"
    file.write_text("\n".join(lines), encoding="utf-8")
    told = call()
    assert f"bad 2: the answer is none of A, B, C, D (first at {file}:4, {file}:7)" in told
    assert f"too few cells (first at {file}:3)" in told and f"is empty (first at {file}:6)" in told
    assert len(rows_of(tmp_path / "results" / "full_sft_32" / "law.csv")) == 1
    assert json.loads((tmp_path / "results" / "full_sft_32" / "summary.json").read_text())["skipped"] == 4


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"a,b\n", "no column question"),
        (b"", "no column question"),
        (b"\xff\xfe\x00", "cannot read"),
        (b"x" * 10, "column"),
    ],
)
def test_a_wrong_file_is_named(fail, data, content, reason):
    (data / "val" / "law_val.csv").write_bytes(content)
    message = fail()
    assert "law_val.csv" in message and reason in message


def test_mistakes_end_with_one_line(fail, data, tmp_path):
    assert "ceval-exam" in fail("--data_dir", tmp_path / "nowhere")
    assert "no checkpoint" in fail("--checkpoint", tmp_path / "nowhere.pth")
    assert "shots is -1" in fail("--shots", -1)
    assert "worked examples, fewer than --shots 99" in fail("--shots", 99)
    assert "fewer than 32 tokens" in fail("--max_seq_len", 4)
    assert "rope_scaling" in fail("--rope_scaling", 0)
    for file in (data / "dev").iterdir():
        file.unlink()
    assert "no worked examples for cooking" in fail("--shots", 1)
    for file in (data / "val").iterdir():
        file.write_text(HEADER)
    assert "no question" in fail()
