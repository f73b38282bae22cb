"""The command line: spellings, YAML files, DeepSpeed's extra flag."""

from dataclasses import dataclass, field

import pytest

from model.cli import UserError, parse


@dataclass
class Options:
    max_steps: int = 1  # steps
    prompt: list[str] = field(default_factory=list)  # texts
    compile: bool = False  # whether


def test_both_spellings_and_lists():
    assert parse(Options, ["--max_steps", "2", "--prompt", "a", "b"]) == Options(2, ["a", "b"])
    assert parse(Options, ["--max-steps", "3", "--compile"]) == Options(3, [], True)


def test_deepspeeds_flag_is_accepted():
    assert parse(Options, ["--local_rank=1", "--max_steps", "2"]) == Options(2)


@pytest.mark.parametrize("spelling", [["--config", "options.yaml"], ["--config=options.yaml"]])
def test_flags_win_over_the_yaml_file(tmp_path, monkeypatch, spelling):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "options.yaml").write_text("max_steps: 5\nprompt: [春天, b]\ncompile: true\n", encoding="utf-8")
    assert parse(Options, spelling) == Options(5, ["春天", "b"], True)
    assert parse(Options, [*spelling, "--max_steps", "7", "--no_compile"]) == Options(7, ["春天", "b"], False)
    assert parse(Options, ["--max_steps", "7", *spelling]) == Options(7, ["春天", "b"], True)


@pytest.mark.parametrize("content", ["- a\n", ": {", "\xff"])
def test_bad_yaml_is_a_users_mistake(tmp_path, content):
    path = tmp_path / "options.yaml"
    path.write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"options\.yaml"):
        parse(Options, ["--config", str(path)])
    with pytest.raises(UserError, match="YAML"):
        parse(Options, ["--config"])


def test_unknown_options_of_a_yaml_file_name_the_nearest(tmp_path, capsys):
    (tmp_path / "options.yaml").write_text("max_step: 5\n")
    with pytest.raises(SystemExit) as stop:
        parse(Options, ["--config", str(tmp_path / "options.yaml")])
    assert stop.value.code == 2 and "--max_steps" in capsys.readouterr().err
