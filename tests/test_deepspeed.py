"""DeepSpeed's ZeRO trains as DDP does, is stopped and goes on as DDP is; what it cannot do is said before it starts."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from test_ddp import free_port, ranks
from test_training import data, metrics, pretrain_flags, torchrun, train  # noqa: F401

from model.checkpoint import load_model, read_tensors
from model.cli import UserError
from model.deepspeed_config import read_config
from model.options import TrainingOptions
from model.training_state import finished_states

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="DeepSpeed is there on Linux only")

RUN = ["--optimizer", "adamw", "--learning_rate", "1e-3", "--max_steps", 14, "--save_interval", 5]
NAMES = {"pretrain": "pretrain_32", "moe": "pretrain_32_moe", "sft": "multi_chat/full_sft_32"}


def run_of(stage: str, data: Path, tokenizer_dir: Path, out: Path, *more) -> tuple[str, list, Path]:  # noqa: F811
    """Script, flags and weights of 14 steps, of which some are short because they end an epoch."""
    if stage != "sft":
        moe = "--use_moe" if stage == "moe" else "--no_use_moe"
        flags = pretrain_flags(data, tokenizer_dir, out, *RUN, moe, "--val_path", data / "val.jsonl", *more)
        return "1-pretrain.py", flags, out / f"{NAMES[stage]}.pth"
    base = data / "base"
    if not base.exists():
        train("1-pretrain.py", pretrain_flags(data, tokenizer_dir, base, "--max_steps", 2))
    flags = [*RUN, "--data_path", data / "sft.csv", "--val_path", data / "sft.csv", "--out_dir", out, "--no_packing"]
    flags += ["--init_from", base / "pretrain_32.pth", "--max_seq_len", 128, "--device", "cpu", "--log_interval", 1]
    return "3-full_sft.py", [*flags, *more], out / f"{NAMES[stage]}.pth"


def lines_of(weights: Path) -> list[dict]:
    lines = [json.loads(line) for line in weights.with_suffix(".metrics.jsonl").read_text().splitlines()]
    return [line | {"tokens_per_s": 0} for line in lines]


def assert_close(weights: Path, other: Path, tolerance: float = 1e-4) -> None:
    ours, theirs = lines_of(weights), lines_of(other)
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    for line, its in zip(ours, theirs, strict=True):
        for name in {"loss", "val_loss", "bits_per_byte", "aux_loss", "lr"} & line.keys():
            assert line[name] == pytest.approx(its[name], abs=tolerance), (line["step"], name)
        if "grad_norm" in line:
            assert line["grad_norm"] == pytest.approx(its["grad_norm"], rel=tolerance), line["step"]


def assert_same(weights: Path, other: Path) -> None:
    ours, theirs = read_tensors(weights), read_tensors(other)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert lines_of(weights) == lines_of(other)


def kill_at_step(step: int, rank: int) -> None:
    from model.trainer import Trainer

    log = Trainer.log

    def killing(self):
        log(self)
        if self.place.step == step:
            os.kill(os.getpid(), signal.SIGKILL)

    Trainer.log = killing


def go_on_after_a_kill(stage, zero, data, tokenizer_dir, folder: Path, whole: Path, *more) -> None:  # noqa: F811
    """A run of two processes that both are killed at step 8 ends with the weights of one that was left alone."""
    script, flags, weights = run_of(stage, data, tokenizer_dir, folder / "killed", "--deepspeed", zero, *more)
    codes, said = ranks(script, flags, folder, act=partial(kill_at_step, 8))
    assert codes == [-signal.SIGKILL] * 2, said
    assert [state.name for state in finished_states(weights.with_suffix(".state"))] == ["step_00000005"]
    codes, said = ranks(script, flags, folder)
    assert codes == [0, 0] and "going on after step 5," in said, said
    assert_same(weights, whole)


def test_zero_2_under_torchrun_is_ddp_and_goes_on_after_a_kill(data, tokenizer_dir, tmp_path):  # noqa: F811
    shape = ["--batch_size", 2, "--accumulation_steps", 2]
    script, flags, one = run_of("pretrain", data, tokenizer_dir, tmp_path / "one", "--batch_size", 8)
    train(script, flags)  # what DDP does, as other tests show
    script, flags, whole = run_of("pretrain", data, tokenizer_dir, tmp_path / "zero", *shape, "--deepspeed", "zero2")
    done = torchrun(script, *flags)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stdout.splitlines() if line.strip()]
    beginnings = ["starting fresh", "40,480 parameters on cpu", "step 14: val loss", "saved"]
    assert len(said) == 4 and all(map(str.startswith, said, beginnings)), said  # nothing of DeepSpeed's own
    assert "Warning" not in done.stderr and "DeepSpeed" not in done.stderr
    assert_close(whole, one)
    assert load_model(whole)[0].config.dim == 32  # strictly, like any other
    go_on_after_a_kill("pretrain", "zero2", data, tokenizer_dir, tmp_path, whole, *shape)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("stage", ["pretrain", "moe", "sft"])
def test_each_stage_of_zero_and_training(zero, stage, data, tokenizer_dir, tmp_path):  # noqa: F811
    script, flags, ddp = run_of(stage, data, tokenizer_dir, tmp_path / "ddp", "--batch_size", 3)
    codes, said = ranks(script, flags, tmp_path)
    assert codes == [0, 0], said
    more = ["--batch_size", 3, "--dropout", 0.0] if stage != "sft" else ["--batch_size", 3]
    script, flags, weights = run_of(stage, data, tokenizer_dir, tmp_path / "zero", "--deepspeed", zero, *more)
    codes, said = ranks(script, flags, tmp_path)
    assert codes == [0, 0], said
    assert_close(weights, ddp)
    load_model(weights)
    go_on_after_a_kill(stage, zero, data, tokenizer_dir, tmp_path, weights, *more)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_an_adapter(zero, data, tokenizer_dir, tmp_path):  # noqa: F811
    base = tmp_path / "base"
    train("1-pretrain.py", pretrain_flags(data, tokenizer_dir, base, "--max_steps", 2))
    flags = ["train", *RUN, "--data_path", data / "sft.csv", "--init_from", base / "pretrain_32.pth"]
    flags += [
        "--max_seq_len",
        128,
        "--log_interval",
        1,
        "--device",
        "cpu",
        "--batch_size",
        2,
        "--dropout",
        0.0,
        "--val_path",
        data / "sft.csv",
    ]
    folders = []
    for name, more in [("ddp", []), ("zero", ["--deepspeed", zero])]:
        codes, said = ranks("4-lora_sft.py", [*flags, "--out_dir", tmp_path / name, *more], tmp_path)
        assert codes == [0, 0], said
        folders.append(tmp_path / name / "lora" / "identity_32")
    assert_close(*reversed(folders))
    ddp, ours = (read_tensors(folder / "adapter_model.safetensors") for folder in folders)
    assert ddp.keys() == ours.keys()
    assert all((ddp[name] - ours[name]).abs().max() < 1e-4 for name in ddp)


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_bfloat16_with_dropout(zero, data, tokenizer_dir, tmp_path):  # noqa: F811
    script, flags, plain = run_of("pretrain", data, tokenizer_dir, tmp_path / "plain", "--batch_size", 4)
    train(script, flags)
    more = ["--batch_size", 2, "--dtype", "bfloat16"]
    script, flags, half = run_of("pretrain", data, tokenizer_dir, tmp_path / "half", "--deepspeed", zero, *more)
    assert ranks(script, flags, tmp_path)[0] == [0, 0]
    losses = [[line["loss"] for line in lines_of(w) if "loss" in line] for w in (half, plain)]
    assert losses[0] == pytest.approx(losses[1], rel=0.02) and losses[0] != losses[1]
    stored = read_tensors(half)
    assert all(value.dtype == torch.float32 for value in stored.values())
    assert any((value != value.bfloat16()).any() for value in stored.values())  # the optimizer's own, not a copy
    script, flags, whole = run_of("pretrain", data, tokenizer_dir, tmp_path / "whole", "--deepspeed", zero, *more)
    assert ranks(script, [*flags, "--dropout", 0.1], tmp_path)[0] == [0, 0]
    go_on_after_a_kill("pretrain", zero, data, tokenizer_dir, tmp_path, whole, *more, "--dropout", 0.1)


@pytest.mark.slow
@pytest.mark.parametrize("zero", [None, "zero2", "zero3"])
def test_the_launcher_of_deepspeed(zero, data, tokenizer_dir, tmp_path):  # noqa: F811
    script, flags, one = run_of("pretrain", data, tokenizer_dir, tmp_path / "one", "--batch_size", 4)
    train(script, flags)
    more = ["--deepspeed", zero] if zero else []
    script, flags, two = run_of("pretrain", data, tokenizer_dir, tmp_path / "two", "--batch_size", 2, *more)
    launcher = [Path(sys.executable).parent / "deepspeed", "--master_port", free_port(), "--num_gpus", 2]
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}
    command = [str(part) for part in [*launcher, script, *flags]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("2 processes") == 1
    assert_close(two, one)
    engine = json.loads(next(two.parent.glob("*.state/*14/facts.json")).read_text())["engine"]
    assert engine == (zero or "torch")


@pytest.mark.slow
def test_one_process_without_a_launcher(data, tokenizer_dir, tmp_path):  # noqa: F811
    script, flags, torchs = run_of("pretrain", data, tokenizer_dir, tmp_path / "torch")
    train(script, flags)
    script, flags, weights = run_of("pretrain", data, tokenizer_dir, tmp_path / "zero", "--deepspeed", "zero3")
    codes, said = ranks(script, flags, tmp_path, 1)
    assert codes == [0], said
    assert_close(weights, torchs)


@pytest.mark.slow
def test_a_state_of_another_engine_or_number_of_processes_is_refused(data, tokenizer_dir, tmp_path):  # noqa: F811
    script, flags, weights = run_of("pretrain", data, tokenizer_dir, tmp_path / "out", "--deepspeed", "zero2")
    assert ranks(script, [*flags, "--batch_size", 2], tmp_path)[0] == [0, 0]
    before = {path: path.read_bytes() for path in weights.parent.rglob("*") if path.is_file()}
    changes = [
        (1, ["--batch_size", 4], "processes was 2, is 1"),
        (2, ["--batch_size", 2, "--deepspeed", "zero3"], "engine was zero2, is zero3"),
        (2, ["--batch_size", 2, "--deepspeed", ""], "engine was zero2, is torch"),
    ]
    for count, change, words in changes:
        for accept in ([], ["--accept_changes"]):
            codes, said = ranks(script, [*flags, *change, *accept], tmp_path, count)
            assert codes[0] == 2 and said.count("error: ") == 1 and words in said and "--resume never" in said
    assert before == {path: path.read_bytes() for path in weights.parent.rglob("*") if path.is_file()}


def spoil(steps: set[int], rank: int) -> None:
    """The second process's loss is not a number at some steps; of its gradient nothing is known."""
    from model.model import Transformer
    from model.trainer import Trainer

    losses, update, step = Transformer.losses, Trainer.after_update, 0

    def spoiled(self, *args):
        loss, aux_loss = losses(self, *args)
        bad = rank == 1 and self.training and step + 1 in steps
        return loss + (float("inf") if bad else 0.0), aux_loss  # whose gradient alone would be finite

    def counting(self, *args):
        nonlocal step
        update(self, *args)
        step = self.place.step

    Transformer.losses, Trainer.after_update = spoiled, counting


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero1", "zero2", "zero3"])
def test_an_update_that_is_not_finite_is_skipped_as_with_ddp(zero, data, tokenizer_dir, tmp_path):  # noqa: F811
    weights = []
    for name, more in [("ddp", []), ("zero", ["--deepspeed", zero])]:
        more = [*more, "--batch_size", 2, "--accumulation_steps", 2]
        script, flags, path = run_of("pretrain", data, tokenizer_dir, tmp_path / name, *more)
        codes, said = ranks(script, flags, tmp_path, act=partial(spoil, {4, 9}))
        assert codes == [0, 0] and said.count("update skipped") == 2, said
        weights.append(path)
    ddp, ours = map(lines_of, weights)
    assert [line["where"] for line in ddp if "where" in line] == [line["where"] for line in ours if "where" in line]
    for line, its in zip(ours, ddp, strict=True):
        assert line.get("loss") == pytest.approx(its.get("loss"), abs=1e-4)
    codes, said = ranks(script, [*flags, "--resume", "never"], tmp_path, act=partial(spoil, set(range(3, 20))))
    assert codes == [2, 2] and said.count("error: the run has diverged") == 1


def fill_the_disk(rank: int) -> None:
    if rank == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


@pytest.mark.slow
@pytest.mark.parametrize("zero", ["zero2", "zero3"])
def test_a_full_disk_of_one_process_keeps_none_waiting(zero, data, tokenizer_dir, tmp_path):  # noqa: F811
    script, flags, _ = run_of("pretrain", data, tokenizer_dir, tmp_path / "out", "--deepspeed", zero)
    codes, said = ranks(script, flags, tmp_path, act=fill_the_disk)
    assert codes == [2, 2], said
    assert said.count("warning: step 5 could not be saved") == said.count("error: step 14 could not be saved") == 1


@pytest.mark.slow
def test_a_file_of_settings(data, tokenizer_dir, tmp_path):  # noqa: F811
    script, flags, one = run_of("pretrain", data, tokenizer_dir, tmp_path / "one", "--batch_size", 4)
    train(script, flags)
    config = {
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": "auto"},
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3, "betas": "auto"}},
        "bf16": {"enabled": "auto"},
    }
    file = tmp_path / "settings.json"
    file.write_text(json.dumps(config))
    more = ["--deepspeed", file, "--batch_size", 2]
    script, flags, whole = run_of("pretrain", data, tokenizer_dir, tmp_path / "two", *more)
    codes, said = ranks(script, flags, tmp_path)
    assert codes == [0, 0], said
    assert_close(whole, one)
    go_on_after_a_kill("pretrain", file, data, tokenizer_dir, tmp_path, whole, *more)
    file.write_text(json.dumps(config | {"zero_optimization": {"stage": 2, "compute_grad_norm": False}}))
    shutil.rmtree(tmp_path / "two")
    codes, said = ranks(script, flags, tmp_path)  # DeepSpeed's own words
    assert codes == [2, 2] and said.count("error: DeepSpeed cannot work with") == 1, said


@pytest.mark.slow
def test_gradients_may_be_summed_in_float32_beside_bfloat16(data, tokenizer_dir, tmp_path):  # noqa: F811
    file = tmp_path / "settings.json"
    file.write_text('{"zero_optimization": {"stage": 1}, "data_types": {"grad_accum_dtype": "fp32"}}')
    more = ["--deepspeed", file, "--dtype", "bfloat16", "--batch_size", 2]
    script, flags, weights = run_of("pretrain", data, tokenizer_dir, tmp_path / "out", *more)
    codes, said = ranks(script, flags, tmp_path)
    assert codes == [0, 0], said
    losses = [line["loss"] for line in metrics(weights.with_suffix(".metrics.jsonl"))]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"train_micro_batch_size_per_gpu": 4}, "train_micro_batch_size_per_gpu is 4, but --batch_size 16"),
        ({"gradient_accumulation_steps": 4}, "--accumulation_steps 1"),
        ({"train_batch_size": 4}, "make 32"),
        ({"gradient_clipping": 0.5}, "gradient_clipping is 0.5, but --grad_clip 1.0"),
        ({"optimizer": {"type": "Adam"}}, "optimizer.type is Adam"),
        ({"optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}, "optimizer.params.lr is 0.5, but ours is 0.005"),
        ({"scheduler": {"type": "WarmupLR"}}, "contradicts --schedule"),
        ({"bf16": {"enabled": True}}, "bf16.enabled is True, but --dtype"),
        ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op is sum"),
        ({"zero_optimization": {"stage": 0}}, "stage of 1, 2 or 3"),
        ({"zero_optimization": "auto"}, "stage of 1, 2 or 3"),
        ({"optimizer": "AdamW"}, "optimizer must be"),
        ({"fp16": True}, "fp16 must be"),
        ("{", "is no JSON file"),
        (None, "is neither zero1, zero2, zero3 nor a file"),
    ],
)
def test_settings_that_contradict_the_options_are_refused(settings, words, tmp_path):
    file = tmp_path / "settings.json"
    if settings is not None:
        whole = {"zero_optimization": {"stage": 2}} | settings if isinstance(settings, dict) else settings
        file.write_text(whole if isinstance(whole, str) else json.dumps(whole))
    with pytest.raises(UserError, match=words) as refused:
        read_config(TrainingOptions(deepspeed=str(file)), 2, torch.float32)
    assert str(file) in str(refused.value) and "\n" not in str(refused.value)


def test_settings_are_completed_by_the_options(tmp_path):
    file = tmp_path / "settings.json"
    file.write_text('{"zero_optimization": {"stage": 3, "stage3_max_live_parameters": "auto"}, "steps_per_print": 9}')
    options = TrainingOptions(deepspeed=str(file), batch_size=4, accumulation_steps=3, grad_clip=0.5)
    config = read_config(options, 2, torch.bfloat16)
    assert config["zero_optimization"] == {"stage": 3} and config["steps_per_print"] == 9
    assert (config["train_micro_batch_size_per_gpu"], config["gradient_accumulation_steps"]) == (4, 3)
    assert (config["train_batch_size"], config["gradient_clipping"]) == (24, 0.5)
    assert config["bf16"]["enabled"] is True and config["fp16"]["enabled"] is False


def test_muon_with_deepspeed_is_refused():
    with pytest.raises(UserError, match="--optimizer muon needs whole matrices"):
        TrainingOptions(deepspeed="zero2", optimizer="muon")
