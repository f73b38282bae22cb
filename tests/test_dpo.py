"""Preference training: its ids, its loss against the formula, its runs and how they end and go on."""

import copy
import json
import math
import os
import signal
import time
from pathlib import Path

import pytest
import torch
from conftest import load_script, make_model
from test_resume import POINTS, assert_same_run, run, start, steps_in
from test_training import metrics, torchrun, train

from model import cli
from model.checkpoint import load_model, read_tensors, save_weights
from model.cli import UserError, parse
from model.distributed import Run
from model.preference_trainer import PreferenceTrainer
from model.preferences import PreferenceData, figures, rate
from model.training_state import states_folder

SCRIPT = "5-dpo_train.py"
ALONE = Run(0, 1, torch.device("cpu"))


def line(prompt, chosen, rejected) -> dict:
    sides = dict(chosen=chosen, rejected=rejected)
    messages = [
        {"role": "user", "content": text} if i % 2 == 0 else {"role": "assistant", "content": text}
        for i, text in enumerate([prompt] if isinstance(prompt, str) else prompt)
    ]
    return {"prompt": messages} | {k: [{"role": "assistant", "content": v}] for k, v in sides.items()}


def write(path: Path, lines: list[dict]) -> Path:
    path.write_text("\n".join(json.dumps(each, ensure_ascii=False) for each in lines), encoding="utf-8")
    return path


def toy(number: int, offset: int = 0) -> list[dict]:
    """Pairs whose chosen answer ends with an equals sign, the rejected one otherwise; the rest is random."""
    generator = torch.Generator().manual_seed(offset)
    texts = []
    for _ in range(number):
        digits = torch.randint(0, 10, (3, 2), generator=generator).tolist()
        question, one, other = ("".join(map(str, each)) for each in digits)
        texts.append(line(question, f"{one}=", f"{other}#"))
    return texts


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer_dir) -> Path:
    path = tmp_path_factory.mktemp("base") / "full_sft_32.pth"
    save_weights(path, make_model(max_seq_len=128, initializer_range=0.02), tokenizer_dir, stage="full_sft", step=1)
    return path


def flags_of(base: Path, folder: Path, *more, pairs: int = 64) -> list[str]:
    """Of a run of 16 steps."""
    data = write(folder / "pairs.json", toy(pairs))
    flags = [
        "--data_path",
        data,
        "--init_from",
        base,
        "--out_dir",
        folder / "out",
        "--max_seq_len",
        64,
        "--device",
        "cpu",
    ]
    return list(map(str, [*flags, "--log_interval", 1, "--save_interval", 5, "--learning_rate", "1e-3", *more]))


# Ids


def test_ids_are_those_of_fine_tuning_and_a_typed_special_token_stays_text(tokenizer, tmp_path):
    prompt = ["你好</s>\n<s>assistant\n", "一", "Hello<s>"]
    data = PreferenceData(write(tmp_path / "a.json", [line(prompt, "好</s>", "不好")]), tokenizer, 512)
    plain = lambda text: tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)  # noqa: E731
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    expected = [bos, *plain("user\n"), *plain(prompt[0]), eos, *plain("\n")]
    expected += [bos, *plain("assistant\n"), *plain("一"), eos, *plain("\n")]
    expected += [bos, *plain("user\n"), *plain("Hello<s>"), eos, *plain("\n"), bos, *plain("assistant\n")]
    (pair,) = data.pairs
    assert pair == dict(prompt_ids=expected, chosen_ids=[*plain("好</s>"), eos], rejected_ids=[*plain("不好"), eos])
    assert expected.count(bos) == 4 and pair["chosen_ids"].count(eos) == 1


def test_what_cannot_be_used_is_counted(tokenizer, tmp_path):
    user = [{"role": "user", "content": "你好"}]
    lines = [
        line("你好", "好", "不好"),
        {"prompt": "你好", "chosen": "好", "reject": "不好"},
        {
            "chosen": [*user, {"role": "assistant", "content": "好"}],
            "rejected": [*user, {"role": "assistant", "content": "坏"}],
        },
        line("你好", "好", "好"),
        line("你好", "", "好"),
        {"prompt": [{"role": "robot", "content": "你好"}], "chosen": "好", "rejected": "坏"},
        {"prompt": user + user, "chosen": "好", "rejected": "坏"},
        line("你" * 100, "好", "坏"),
        line("你好", "好" * 90 + "一", "好" * 90 + "二"),
        {"text": "x"},
    ]
    data = PreferenceData(write(tmp_path / "a.json", lines), tokenizer, 80)
    told = data.told()
    assert len(data.pairs) == 3 and "3 pairs" in told
    for reason in ("are the same", "empty", "a role that", "do not alternate", "question alone", "differ only behind"):
        assert "1: " in told and reason in told, reason
    with pytest.raises(UserError, match="holds no pair to train on: .*the same"):
        PreferenceData(write(tmp_path / "b.json", [lines[3]]), tokenizer, 80)
    with pytest.raises(UserError, match=r"no file .*data_process.py dpo"):
        PreferenceData(tmp_path / "c.json", tokenizer, 80)


def test_too_long_prompts_lose_old_turns_and_answers_their_end(tokenizer, tmp_path):
    lines = [line(["旧" * 9, "旧", "新问题"], "一" * 5, "二"), line("问", "一" * 90, "二")]
    data = PreferenceData(write(tmp_path / "a.json", lines), tokenizer, 64)
    (old, long), eos = data.pairs, tokenizer.eos_token_id
    assert "旧" not in tokenizer.decode(old["prompt_ids"]) and "新问题" in tokenizer.decode(old["prompt_ids"])
    assert old["chosen_ids"][-1] == eos
    assert len(long["prompt_ids"]) + len(long["chosen_ids"]) == 64 and eos not in long["chosen_ids"]
    assert long["rejected_ids"][-1] == eos and data.shortened == 2


# The loss


def log_probability(model, prompt: list[int], answer: list[int]) -> torch.Tensor:
    """One sequence, without padding."""
    ids = torch.tensor([prompt + answer])
    log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
    return sum(log_probs[len(prompt) - 1 + i, token] for i, token in enumerate(answer))


def make_trainer(base: Path, folder: Path, *more, pairs: int = 3) -> PreferenceTrainer:
    """Its model and its reference differ."""
    args = parse(load_script(SCRIPT).Args, flags_of(base, folder, "--batch_size", pairs, *more, pairs=pairs))
    model, tokenizer = load_model(base)
    reference = copy.deepcopy(model).requires_grad_(False)
    torch.manual_seed(5)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    data = PreferenceData(args.data_path, tokenizer, 64)
    data.pairs[0]["chosen_ids"] = data.pairs[0]["chosen_ids"] * 3  # so that there is padding
    return PreferenceTrainer(model, reference, tokenizer, data, args, ALONE, folder / "dpo_32.pth")


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "hinge", "sigmoid sft"])
def test_loss_and_gradients_are_those_of_the_formula(loss_type, base, tmp_path):
    trainer = make_trainer(base, tmp_path, "--beta", "0.3", "--loss_type", *loss_type.split())
    pairs = list(trainer.train_dataset)
    batch = trainer.data_collator(pairs)
    assert (batch["attention_mask"] == 0).any()
    trainer.model.zero_grad()
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()
    found = {name: p.grad.clone() for name, p in trainer.model.named_parameters()}
    trainer.model.zero_grad()

    expected, nats, tokens = 0.0, 0.0, 0
    for pair in pairs:
        ours, theirs = (
            [log_probability(model, pair["prompt_ids"], pair[key]) for key in ("chosen_ids", "rejected_ids")]
            for model in (trainer.model, trainer.ref_model)
        )
        ratios = [our - their.detach() for our, their in zip(ours, theirs, strict=True)]
        margin = 0.3 * (ratios[0] - ratios[1])
        if loss_type == "ipo":  # means over the tokens, and beta in the role of tau
            means = [ratio / len(pair[key]) for ratio, key in zip(ratios, ("chosen_ids", "rejected_ids"), strict=True)]
            expected += (means[0] - means[1] - 1 / (2 * 0.3)) ** 2
        elif loss_type == "hinge":
            expected += torch.relu(1 - margin)
        else:
            expected += -torch.log(1 / (1 + torch.exp(-margin)))
        nats, tokens = nats - ours[0], tokens + len(pair["chosen_ids"])
    expected = expected / len(pairs) + (nats / tokens if "sft" in loss_type else 0.0)
    expected.backward()
    torch.testing.assert_close(loss, expected)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_rating(base, tmp_path, tokenizer):
    data = PreferenceData(write(tmp_path / "a.json", toy(5)), tokenizer, 64)
    data.pairs[2]["rejected_ids"] = data.pairs[2]["rejected_ids"] * 4
    model, _ = load_model(base)
    found = rate(model, data.pairs, 0, ALONE, batch_size=2, dtype=torch.float32)
    with torch.no_grad():
        expected = [
            [log_probability(model, pair["prompt_ids"], pair[key]) for key in ("chosen_ids", "rejected_ids")]
            for pair in data.pairs
        ]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=1e-4)
    assert figures(found, found, 0.1)["accuracy"] == 0.5
    told = figures(found + torch.tensor([[1.0, 0.0]]), found, 0.1)
    assert told["accuracy"] == 1 and told["margin"] == pytest.approx(0.1, abs=1e-4)
    assert told["val_loss"] == pytest.approx(math.log(1 + math.exp(-0.1)), abs=1e-4)


# Runs


def lines_of(weights: Path, key: str) -> list[dict]:
    lines = [json.loads(text) for text in weights.with_suffix(".metrics.jsonl").read_text().splitlines()]
    return [each for each in lines if key in each]


@pytest.mark.parametrize("more", [[], ["--lora", "--learning_rate", "3e-2"]], ids=str)
def test_a_toy_preference_is_learnt(more, base, tmp_path):
    val = write(tmp_path / "val.json", toy(40, offset=1))
    flags = flags_of(
        base, tmp_path, "--val_path", val, "--learning_rate", "1e-2", "--val_interval", 20, *more, pairs=128
    )
    train(SCRIPT, flags)
    weights = tmp_path / "out" / "dpo_32.pth"
    rated = lines_of(weights, "val_loss")
    assert [each["step"] for each in rated] == [0, 20, 32]
    assert abs(rated[0]["chosen_more_probable"] - 0.5) < 0.2 and rated[0]["accuracy"] == 0.5
    assert rated[-1]["chosen_more_probable"] > 0.95 and rated[-1]["accuracy"] > 0.95
    assert rated[-1]["margin"] > 0.05 and rated[-1]["val_loss"] < rated[0]["val_loss"]
    model, tokenizer = load_model(weights)  # strictly
    described = json.loads(weights.with_suffix(".json").read_text())
    assert described["step"] == 32 and weights.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    held_out = PreferenceData(val, tokenizer, 64)
    again = rate(model, held_out.pairs, 0, ALONE, batch_size=8, dtype=torch.float32)
    assert float((again[:, 0] > again[:, 1]).float().mean()) == pytest.approx(rated[-1]["chosen_more_probable"])
    if "--lora" in more:
        from model.adapters import with_adapter

        whole = with_adapter(load_model(base)[0], tmp_path / "out" / "lora" / "dpo_32").state_dict()
        assert all(torch.equal(value, whole[key]) for key, value in model.state_dict().items())


def test_the_reference_may_be_asked_beforehand(base, tmp_path):
    found = []
    for name, more in [("during", []), ("before", ["--precompute_reference"])]:
        (tmp_path / name).mkdir()
        train(SCRIPT, flags_of(base, tmp_path / name, *more, pairs=16))
        found.append([each["loss"] for each in metrics(tmp_path / name / "out" / "dpo_32.metrics.jsonl")])
    assert found[0] == pytest.approx(found[1], abs=1e-5) and found[0][-1] < math.log(2)


def test_each_loss_has_a_gradient(base, tmp_path):
    trainer = make_trainer(base, tmp_path)
    batch = trainer.data_collator(list(trainer.train_dataset))
    for loss_type in load_script(SCRIPT).LOSSES.__args__:
        trainer.loss_types = [loss_type]
        trainer.model.zero_grad()
        trainer.compute_loss(trainer.model, batch).backward()
        norm = torch.cat([p.grad.flatten() for p in trainer.model.parameters()]).norm()
        assert norm.isfinite() and norm > 1e-3, loss_type


def test_a_mixture_of_experts(tokenizer_dir, tmp_path):
    path = tmp_path / "full_sft_32_moe.pth"
    save_weights(path, make_model(max_seq_len=128, use_moe=True), tokenizer_dir, stage="full_sft", step=1)
    train(SCRIPT, flags_of(path, tmp_path, "--max_steps", 2))
    assert load_model(tmp_path / "out" / "dpo_32_moe.pth")[0].config.use_moe


def soak(base: Path, folder: Path, points: list[str], *more) -> None:
    for name in ("whole", "killed"):
        (folder / name).mkdir()
    flags = flags_of(base, folder / "whole", *more)
    assert run(SCRIPT, flags, folder / "log") == 0, (folder / "log").read_text()
    flags, weights = flags_of(base, folder / "killed", *more), folder / "killed" / "out" / "dpo_32.pth"
    for number, point in enumerate(points):
        before = steps_in(states_folder(weights))
        assert run(SCRIPT, flags, folder / "log", (point, 1 if before else 2)) == -signal.SIGKILL, point
        said = (folder / "log").read_text()
        assert (f"going on after step {before[-1]}," if number else "starting fresh") in said
    assert run(SCRIPT, flags, folder / "log") == 0, (folder / "log").read_text()
    assert "going on after step" in (folder / "log").read_text()
    assert_same_run(weights, folder / "whole" / "out" / "dpo_32.pth")
    assert len(steps_in(states_folder(weights))) == 2


def test_a_killed_run_ends_with_the_same_weights(base, tmp_path):
    soak(base, tmp_path, ["rename"])


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--lora"], ["--precompute_reference", "--accumulation_steps", "2"]], ids=str)
def test_the_soak(more, base, tmp_path):
    soak(base, tmp_path, POINTS * 2, "--epochs", 6, *more)


def test_changes_are_named_a_longer_run_goes_on_and_a_damaged_state_is_passed_over(base, tmp_path, capsys):
    flags = flags_of(base, tmp_path, "--max_steps", 8)
    train(SCRIPT, flags)
    train(SCRIPT, flags)
    assert "is finished, 8 steps" in capsys.readouterr().out
    with pytest.raises(UserError, match="beta was 0.1, is 0.2"):
        train(SCRIPT, [*flags, "--beta", "0.2"])
    with pytest.raises(UserError, match="rows of a step was 4, is 2"):
        train(SCRIPT, [*flags, "--batch_size", "2"])
    states = states_folder(tmp_path / "out" / "dpo_32.pth")
    (states / "step_00000008" / "model.pt").write_bytes(b"half")
    flags[flags.index("--max_steps") + 1] = "10"
    train(SCRIPT, flags)
    said = capsys.readouterr().out
    assert "step_00000008 is damaged" in said and "going on after step 5," in said
    assert [each["step"] for each in metrics(tmp_path / "out" / "dpo_32.metrics.jsonl")] == list(range(1, 11))


def test_numbers_that_are_not_finite_end_the_run(base, tmp_path, monkeypatch):
    step = PreferenceTrainer.compute_loss

    def poisoned(self, *args, **kwargs):
        return step(self, *args, **kwargs) * (math.nan if self.state.global_step == 6 else 1)

    monkeypatch.setattr(PreferenceTrainer, "compute_loss", poisoned)
    with pytest.raises(UserError, match="the gradient of step 7 is not finite"):
        train(SCRIPT, flags_of(base, tmp_path))
    weights = tmp_path / "out" / "dpo_32.pth"
    assert json.loads(weights.with_suffix(".json").read_text())["step"] == 5
    assert all(value.isfinite().all() for value in read_tensors(weights).values())


def test_a_full_disk_is_a_warning_while_the_run_goes_on_and_an_error_at_its_end(base, tmp_path):
    assert run(SCRIPT, flags_of(base, tmp_path), tmp_path / "log", limit=40_000) == 2  # bytes: weights are larger
    said = (tmp_path / "log").read_text()
    assert "warning: step 5 could not be saved" in said and "error: step 16 could not be saved" in said
    assert "no room" in said and "Traceback" not in said


def test_a_stopped_run_saves_and_goes_on(base, tmp_path):
    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
    train(SCRIPT, flags_of(base, tmp_path / "whole", "--save_interval", 0, "--epochs", 2))
    flags = flags_of(base, tmp_path / "stopped", "--save_interval", 0, "--epochs", 2)
    weights = tmp_path / "stopped" / "out" / "dpo_32.pth"
    process, lines = start(SCRIPT, flags, tmp_path / "log"), weights.with_suffix(".metrics.jsonl")
    while process.is_alive() and not (lines.exists() and lines.stat().st_size):
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGTERM)
    process.join(60)
    assert process.exitcode == 128 + signal.SIGTERM, (tmp_path / "log").read_text()
    (step,) = steps_in(states_folder(weights))
    assert f"stopped by SIGTERM after step {step};" in (tmp_path / "log").read_text()
    train(SCRIPT, flags)
    assert_same_run(weights, tmp_path / "whole" / "out" / "dpo_32.pth")


def test_a_signal_in_the_middle_of_saving_ends_the_run_there(base, tmp_path, monkeypatch, capsys):
    write_state, saved = PreferenceTrainer.write_state, []

    def interrupted(self, content):
        write_state(self, content)
        saved.append(self.state.global_step)
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(PreferenceTrainer, "write_state", interrupted)
    for step, flags in [(5, []), (16, ["--save_interval", "16"])]:  # in an interval, and in the last step of all
        with pytest.raises(cli.Stopped):
            train(SCRIPT, flags_of(base, tmp_path, *flags, "--log_interval", "1"))
        assert saved.pop() == step and not saved
        assert [each["step"] for each in metrics(tmp_path / "out" / "dpo_32.metrics.jsonl")][-1] == step
    assert "stopped by SIGTERM after step 5; the same command goes on after step 5" in capsys.readouterr().out


def test_without_a_picture_nothing_is_lost(base, tmp_path, monkeypatch, capsys):
    def full_disk(metrics, picture):
        raise OSError("no space left")

    monkeypatch.setattr("model.preference_trainer.draw_preference_curves", full_disk)
    train(SCRIPT, flags_of(base, tmp_path, "--max_steps", 6))
    weights = tmp_path / "out" / "dpo_32.pth"
    assert steps_in(states_folder(weights)) == [5, 6] and not weights.with_suffix(".png").exists()
    assert json.loads(weights.with_suffix(".json").read_text())["step"] == 6
    assert "could not be saved" not in capsys.readouterr().out


def test_there_is_no_muon_and_no_deepspeed(capsys):
    module = load_script(SCRIPT)
    for flags in (
        ["--optimizer", "muon"],
        ["--deepspeed", "zero2"],
        ["--loss_type", "orpo"],
        ["--loss_type"],
        ["--beta", "0"],
    ):
        with pytest.raises(SystemExit) as stop:
            cli.run(module.main, module.Args, flags)
        assert stop.value.code == 2


@pytest.mark.slow
def test_two_processes_are_one_with_a_batch_twice_as_large(base, tmp_path):
    found = []
    val = write(tmp_path / "val.json", toy(13, offset=1))
    for processes in (1, 2):
        folder = tmp_path / str(processes)
        folder.mkdir()
        flags = flags_of(base, folder, "--batch_size", 4 // processes, "--val_path", val)
        done = torchrun(SCRIPT, *flags, processes=processes)
        assert done.returncode == 0, done.stderr
        lines = lines_of(folder / "out" / "dpo_32.pth", "margin")
        found.append([[each["margin"], each["logp_chosen"]] for each in lines])
    assert len(found[0]) == len(found[1]) == 18
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-3, atol=1e-3)
