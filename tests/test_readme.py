"""Every command in the READMEs names a script, a make target and flags that exist; both READMEs show the same ones.

What needs no GPU, no network and no second machine is also run: here, or where RUN_ELSEWHERE says.
"""

import dataclasses
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import load_script
from test_ceval import write_subject

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README_en.md")
RUN_HERE = ("Models", "Your own data", "LoRA and DPO", "C-Eval", "Export")
RUN_ELSEWHERE = {
    "Two commands": "make itself",
    "Step by step": "make demo, whose commands these are: see below; installing is the Makefile's .venv/installed",
    "A real run": "by hand, for the figures there; the same scripts as in Your own data",
    "Several GPUs, several machines": "tests/test_ddp.py, tests/test_deepspeed.py, with two processes on a CPU",
    "Web page and server": "tests/test_page.py, tests/test_api.py",
    "Tests": "make itself",
}
NOT_RUN = ("From download to chat (one GPU)",)  # the READMEs say so
TRAINING = ("1-pretrain.py", "3-full_sft.py", "4-lora_sft.py", "5-dpo_train.py")


def commands(name: str) -> list[list[str]]:
    """The words of each command line in the code blocks of a README, without its comment."""
    return [words for found in commands_by_section(name).values() for words in found]


def commands_by_section(name: str) -> dict[str, list[list[str]]]:
    """The same under the section's heading; a numbered step belongs to the section above it."""
    found: dict[str, list[list[str]]] = {}
    text = re.sub(r"^(#+) \d+\. .*$", "", (ROOT / name).read_text(encoding="utf-8"), flags=re.MULTILINE)
    for heading, block in re.findall(r"^##+ ([^\n]*)$|^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if heading:
            section = heading
            continue
        lines = block.replace("\\\n", " ").splitlines()
        found.setdefault(section, []).extend(words for line in lines if (words := shlex.split(line, comments=True)))
    return found


def options_of(script: str) -> set[str]:
    """The names of a script's options, those of its subcommands, too."""
    if script == "chat_openai_api.py":
        return set(re.findall(r'"--(\w+)"', (ROOT / script).read_text(encoding="utf-8")))
    module = load_script(script)
    classes = [value for value in vars(module).values() if isinstance(value, type) and dataclasses.is_dataclass(value)]
    return {field.name for one in classes for field in dataclasses.fields(one)} | {"config", "help"}


@pytest.mark.parametrize("name", READMES)
def test_commands_exist(name):
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    found = 0
    for words in commands(name):
        if words[0] == "make":
            assert set(words[1:]) <= targets, words
        script = next((word for word in words if word.endswith(".py")), None)
        if script is None:
            continue
        found += 1
        assert (ROOT / script).is_file(), words
        if script.startswith(("tests/", "images/")):
            continue
        flags = [word.removeprefix("--").split("=")[0] for word in words[words.index(script) + 1 :] if word[:2] == "--"]
        for flag in flags:
            flag = flag.replace("-", "_")
            known = options_of(script)
            assert flag in known or flag.removeprefix("no_") in known, (words, flag)
    assert found > 20


def test_both_readmes_show_the_same_scripts_and_flags():
    def shapes(name: str) -> list[list[str]]:
        return [
            [word for word in words if word.startswith("--") or word.endswith(".py") or word == "make"]
            for words in commands(name)
        ]

    assert shapes(READMES[0]) == shapes(READMES[1])


def test_each_section_is_run_somewhere_or_says_that_it_was_not():
    sections = commands_by_section("README_en.md")
    assert set(sections) == {*RUN_HERE, *RUN_ELSEWHERE, *NOT_RUN}
    text = (ROOT / "README_en.md").read_text(encoding="utf-8")
    for section in NOT_RUN:
        assert "not run here" in text.split(f"### {section}\n")[1][:200]


def test_the_steps_are_the_commands_of_make_demo():
    printed = subprocess.run(["make", "-n", "train-demo"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    made = [shlex.split(line)[1:] for line in printed.splitlines() if line.startswith(".venv/bin/python")]
    told = [words[1:] for words in commands_by_section("README_en.md")["Step by step"] if words[1].endswith(".py")]
    assert len(made) == 8
    assert sorted(map(sorted, told[:-1])) == sorted(map(sorted, made))
    assert told[-1][0] == "2-eval.py"  # the chat, which `make demo` ends in


@pytest.mark.slow  # some minutes
@pytest.mark.parametrize("section", RUN_HERE)
def test_commands_run(section, copy_of_the_repository):
    """Training is cut short; the weights that a section begins with are made first."""
    width = "--model tiny" if section == "LoRA and DPO" else ""  # its files are named after the width
    weights = ("data_process.py", f"1-pretrain.py --max_seq_len 64 {width}", "3-full_sft.py --max_seq_len 256")
    first = [] if section in ("Models", "Your own data") else [["python", *line.split()] for line in weights]
    for program, *words in first + commands_by_section("README_en.md")[section]:
        assert program == "python"
        if words[0] in TRAINING and "merge" not in words:
            words += ["--max_steps", "2", "--batch_size", "2"]
        done = subprocess.run(
            [sys.executable, *words],
            cwd=copy_of_the_repository,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (words, done.stdout[-2000:], done.stderr[-2000:])


@pytest.fixture
def copy_of_the_repository(tmp_path) -> Path:
    """With data under the names that the READMEs give to a user's own."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    for file in listed:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, tmp_path / file)
    shutil.copyfile(ROOT / "dataset/sample/pretrain.jsonl", tmp_path / "yours.jsonl")
    shutil.copyfile(ROOT / "dataset/sample/sft.jsonl", tmp_path / "dialogues.jsonl")
    for name in ("law", "logic"):
        write_subject(tmp_path / "dataset/ceval/val", f"{name}_val", "ABCDD")
        write_subject(tmp_path / "dataset/ceval/dev", f"{name}_dev", "ABCDA")
    return tmp_path
