"""Every command in the READMEs names a script, a make target and flags that exist; both READMEs show the same ones."""

import dataclasses
import re
import shlex
from pathlib import Path

import pytest
from conftest import load_script

ROOT = Path(__file__).parents[1]
READMES = ("README.md", "README_en.md")
WITHOUT_CONFIG = ("chat_openai_api.py", "images/draw.py")  # not of model/cli.py


def commands(name: str) -> list[list[str]]:
    """The words of each command line in the code blocks of a README, without its comment."""
    text = (ROOT / name).read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


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
