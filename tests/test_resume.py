"""Runs that are killed, stopped, short of disk or fed with bad numbers: how they end and go on. Real signals."""

import contextlib
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import load_script
from test_training import data, make_data, metrics, pretrain_flags, rows_of, torchrun, train  # noqa: F401

from model import checkpoint, cli, training_state
from model.checkpoint import read_tensors
from model.dataset import epoch_order
from model.options import InferenceOptions, TrainingOptions
from model.trainer import Trainer

INTERVAL = 5  # steps between saves
POINTS = ["before", "middle", "fsync", "rename", "renamed"]
# A server that has imported PyTorch once and forks: real processes without the seconds of its import.
processes = multiprocessing.get_context("forkserver")
MODULES = ["model.trainer", "model.evaluate", "model.preference_trainer", "pandas", "matplotlib.pyplot"]
processes.set_forkserver_preload(MODULES)


def kill_at(point: str, count: int) -> None:
    """Has this process kill itself at the count-th time it comes to a point of saving a state."""
    from model import backends, preference_trainer, trainer

    module, name = {
        "before": (trainer, "begin_state"),
        "middle": (backends, "write_tensors"),
        "fsync": (checkpoint, "flush"),
        "rename": (os, "replace"),
        "renamed": (os, "replace"),
    }[point]
    function, seen = getattr(module, name), itertools.count(1)

    def killing(*args):
        paths = [Path(arg) for arg in args if isinstance(arg, str | Path) and ".state" in str(arg)]
        # Files within a state are renamed, too; the point meant is the rename of the whole folder.
        due = paths and (module is not os or paths[0].is_dir()) and next(seen) == count
        if due and point in ("before", "fsync", "rename"):
            os.kill(os.getpid(), signal.SIGKILL)
        result = function(*args)
        if due:
            if point == "middle":
                os.truncate(paths[0], paths[0].stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(module, name, killing)
    if hasattr(preference_trainer, name):
        setattr(preference_trainer, name, killing)


def child(script: str, flags: list[str], log: str, point: tuple[str, int] | None, limit: int) -> None:
    os.setsid()  # a group of its own, for signals to all of a group
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    if point:
        kill_at(*point)
    if limit:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    module = load_script(script)
    cli.run(module.main, module.Args, flags)


def start(script: str, flags: list[str], log: Path, point: tuple[str, int] | None = None, limit: int = 0):
    process = processes.Process(target=child, args=(script, [str(flag) for flag in flags], str(log), point, limit))
    process.start()
    return process


def run(script: str, flags: list[str], log: Path, point: tuple[str, int] | None = None, limit: int = 0) -> int:
    """Its exit code, minus the signal where one has killed it."""
    process = start(script, flags, log, point, limit)
    process.join(120)
    return process.exitcode


def steps_in(folder: Path) -> list[int]:
    return [int(path.name.removeprefix("step_")) for path in training_state.finished_states(folder)]


def assert_same_run(weights: Path, other: Path) -> None:
    """Weights bit by bit, and metrics line by line, apart from times."""
    ours, theirs = read_tensors(weights), read_tensors(other)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    lines = [
        [json.loads(line) | {"tokens_per_s": 0} for line in w.with_suffix(".metrics.jsonl").read_text().splitlines()]
        for w in (weights, other)
    ]
    assert lines[0] == lines[1]


def flags_of(stage: str, data: Path, tokenizer_dir: Path, out: Path, *more) -> tuple[str, list[str], Path]:  # noqa: F811
    """Script, flags and weights of a run of some 40 steps in 2 to 4 epochs with everything that has a state."""
    common = ["--dropout", 0.1, "--log_interval", 3, "--save_interval", INTERVAL, "--accumulation_steps", 2]
    if stage == "sft":
        base = out.parent / "base"
        if not base.exists():
            run("1-pretrain.py", pretrain_flags(data, tokenizer_dir, base, "--max_steps", 2), out.parent / "base.log")
        flags = ["--data_path", data / "sft.csv", "--out_dir", out, "--init_from", base / "pretrain_32.pth"]
        flags += ["--max_seq_len", 128, "--epochs", 12, "--batch_size", 2, "--device", "cpu", *common[2:], *more]
        return "3-full_sft.py", list(map(str, flags)), out / "multi_chat" / "full_sft_32.pth"
    flags = pretrain_flags(data, tokenizer_dir, out, *common, "--batch_size", 2, "--epochs", 3, *more)
    return "1-pretrain.py", flags, out / f"pretrain_32{'_moe' if stage == 'moe' else ''}.pth"


def kill_at_a_moment(script: str, flags: list[str], log: Path, generator: random.Random) -> None:
    """Kills a run within half a second after its progress bar first shows a speed, whatever it does then."""
    log.unlink(missing_ok=True)
    process = start(script, flags, log)
    while process.is_alive() and not (log.exists() and "step/s" in log.read_text()):
        time.sleep(0.005)
    time.sleep(generator.uniform(0, 0.5))
    process.kill()
    process.join()


def soak(stage: str, data: Path, tokenizer_dir: Path, folder: Path, kills: list[str], *more) -> None:  # noqa: F811
    """Kills a run again and again, each time after it has a state, and compares it with one that was left alone."""
    script, flags, whole = flags_of(stage, data, tokenizer_dir, folder / "whole", *more)
    assert run(script, flags, folder / "log") == 0, (folder / "log").read_text()
    total = json.loads(whole.with_suffix(".json").read_text())["step"]
    script, flags, weights = flags_of(stage, data, tokenizer_dir, folder / "killed", *more)
    states = training_state.states_folder(weights)
    done_again, generator, log = 0, random.Random(len(kills)), folder / "log"
    for number, point in enumerate(kills):
        before = steps_in(states)
        if point == "moment":
            kill_at_a_moment(script, flags, log, generator)
        else:
            assert run(script, flags, log, (point, 1 if before else 2)) == -signal.SIGKILL, point
        said = log.read_text()
        if before:
            assert f"going on after step {before[-1]}," in said, said
        else:
            assert "starting fresh" in said
        lines = metrics(weights.with_suffix(".metrics.jsonl"))
        assert [line["step"] for line in lines] == sorted({line["step"] for line in lines}), number
        done_again += max(0, lines[-1]["step"] - steps_in(states)[-1])
    assert run(script, flags, log) == 0
    said = log.read_text()
    assert "going on after step" in said and f"saved {weights} after {total} steps" in said
    assert done_again <= len(kills) * INTERVAL
    assert_same_run(weights, whole)
    assert len(steps_in(states)) == 2 and not list(states.glob("*.tmp"))


def test_a_run_killed_at_each_point_of_saving_ends_with_the_same_weights(data, tokenizer_dir, tmp_path):  # noqa: F811
    soak("pretrain", data, tokenizer_dir, tmp_path, POINTS)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["pretrain", "moe", "sft"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_soak(stage, optimizer, data, tokenizer_dir, tmp_path):  # noqa: F811
    more = ["--optimizer", optimizer, "--epochs", 60 if stage == "sft" else 10, *(["--use_moe"] * (stage == "moe"))]
    soak(stage, data, tokenizer_dir, tmp_path, POINTS + ["moment"] * 12, *more)


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_finishes_its_step_saves_and_goes_on(signum, data, tokenizer_dir, tmp_path):  # noqa: F811
    script, flags, whole = flags_of("sft", data, tokenizer_dir, tmp_path / "whole")
    assert run(script, flags, tmp_path / "log") == 0
    script, flags, weights = flags_of("sft", data, tokenizer_dir, tmp_path / "stopped")
    process = start(script, flags, tmp_path / "log")
    lines = weights.with_suffix(".metrics.jsonl")
    while not (lines.exists() and lines.stat().st_size):
        time.sleep(0.01)
    os.kill(process.pid, signum)
    process.join(60)
    assert process.exitcode == 128 + signum
    (step,) = steps_in(training_state.states_folder(weights))[-1:]
    assert f"stopped by {signum.name} after step {step}" in (tmp_path / "log").read_text()
    assert json.loads(weights.with_suffix(".json").read_text())["step"] == step
    assert run(script, flags, tmp_path / "log") == 0
    assert f"going on after step {step}," in (tmp_path / "log").read_text()
    assert_same_run(weights, whole)


def test_a_signal_to_the_whole_group_leaves_the_loading_processes_to_the_trainer(data, tokenizer_dir, tmp_path):  # noqa: F811
    flags = pretrain_flags(data, tokenizer_dir, tmp_path / "out", "--epochs", 200, "--num_workers", 1)
    process = start("1-pretrain.py", [*flags, "--batch_size", "2"], tmp_path / "log")
    lines = tmp_path / "out" / "pretrain_32.metrics.jsonl"
    while not (lines.exists() and lines.stat().st_size):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    process.join(60)
    said = (tmp_path / "log").read_text()
    assert process.exitcode == 128 + signal.SIGTERM and "Traceback" not in said
    (step,) = steps_in(training_state.states_folder(tmp_path / "out" / "pretrain_32.pth"))
    assert f"goes on after step {step}" in said


def test_accepted_changes_are_trained(half, tmp_path):
    """Half as large a global batch from step 12 of 16 rows on, without decay: the rows go on where they were."""
    folder, flags = half
    shutil.copytree(folder / "out", tmp_path / "out")
    more = ["--out_dir", tmp_path / "out", "--batch_size", 8, "--weight_decay", 0, "--accept_changes"]
    assert run("1-pretrain.py", [*flags, *more], tmp_path / "log") == 0, (tmp_path / "log").read_text()
    lines = metrics(tmp_path / "out" / "pretrain_32.metrics.jsonl")
    rows = rows_of(folder)
    epochs, left = divmod(12, -(-rows // 16))
    assert lines[12]["epoch"] == pytest.approx(epochs + (left * 2 + 1) / -(-rows // 8), abs=1e-4)
    state = torch.load(tmp_path / "out" / "pretrain_32.state" / "step_00000020" / "model.pt", weights_only=True)
    assert {g["weight_decay"] for optimizer in state["optimizers"] for g in optimizer["param_groups"]} == {0.0}


def test_weights_of_an_unknown_run_are_not_written_over(finished):
    script, flags, weights, log = finished
    shutil.rmtree(training_state.states_folder(weights))
    before = snapshot(weights.parent)
    assert run(script, flags, log) == 2
    assert "--resume never" in log.read_text() and snapshot(weights.parent) == before
    assert run(script, [*flags, "--resume", "never"], log) == 0


def test_a_start_from_what_it_would_write_over_touches_nothing(finished):
    script, flags, weights, log = finished
    before = snapshot(weights.parent)
    architecture = {"--dim", "--n_layers", "--n_heads", "--n_kv_heads"}
    pairs = zip(flags[::2], flags[1::2], strict=True)
    rest = [part for pair in pairs if pair[0] not in architecture for part in pair]
    assert run(script, [*rest, "--init_from", weights, "--resume", "never"], log) == 2
    assert "would write over" in log.read_text() and snapshot(weights.parent) == before


@pytest.fixture
def finished(data, tokenizer_dir, tmp_path):  # noqa: F811
    """Script, flags, weights and log of a finished run of 12 steps."""
    flags = pretrain_flags(data, tokenizer_dir, tmp_path / "out", "--max_steps", 12, "--save_interval", 4)
    assert run("1-pretrain.py", flags, tmp_path / "log") == 0
    return "1-pretrain.py", flags, tmp_path / "out" / "pretrain_32.pth", tmp_path / "log"


def snapshot(folder: Path) -> dict[Path, tuple[bytes, int]]:
    return {p: (p.read_bytes(), p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


def test_a_finished_run_changes_nothing_and_a_longer_one_goes_on(finished):
    script, flags, weights, log = finished
    before = snapshot(weights.parent)
    assert run(script, flags, log) == 0
    assert "is finished, 12 steps" in log.read_text() and snapshot(weights.parent) == before
    flags[flags.index("--max_steps") + 1] = "20"
    assert run(script, flags, log) == 0
    assert "longer than it was: 12 -> 20" in log.read_text()
    assert [line["step"] for line in metrics(weights.with_suffix(".metrics.jsonl"))] == list(range(1, 21))


CHANGES = {
    "learning_rate": (["--learning_rate", "1e-4"], "learning_rate was 0.005, is 0.0001"),
    "batch": (["--batch_size", "8"], "rows of a step was 16, is 8"),
    "length": (["--max_steps", "14"], "steps was 20, is 14"),
    "architecture": (["--n_heads", "2"], "n_heads was 4, is 2"),
    "optimizer": (["--optimizer", "adamw"], "optimizer was muon, is adamw"),
    "seed": (["--seed", "1"], "seed was 42, is 1"),
}


@pytest.fixture(scope="module")
def half(tokenizer_dir, tmp_path_factory):
    """Flags of a run of 20 steps, stopped after 12."""
    folder = tmp_path_factory.mktemp("half")
    make_data(folder, tokenizer_dir)
    flags = pretrain_flags(folder, tokenizer_dir, folder / "out", "--max_steps", 20, "--save_interval", 6)
    assert run("1-pretrain.py", flags, folder / "log", ("rename", 3)) == -signal.SIGKILL
    return folder, flags


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_option_is_named(change, half):
    folder, flags = half
    more, words = CHANGES[change]
    before = snapshot(folder / "out")
    assert run("1-pretrain.py", [*flags, *more], folder / "log") == 2
    said = (folder / "log").read_text()
    assert words in said and "--accept_changes" in said and "Traceback" not in said
    assert snapshot(folder / "out") == before


def test_options_that_change_nothing_may_change(half, tmp_path):
    """Another place, twice the micro-batch in half as many pieces: the state is the same run's."""
    folder, flags = half
    shutil.copytree(folder / "out", tmp_path / "out")
    more = ["--batch_size", "8", "--accumulation_steps", "2", "--out_dir", tmp_path / "out", "--log_interval", "2"]
    assert run("1-pretrain.py", [*flags, *more], tmp_path / "log") == 0, (tmp_path / "log").read_text()
    assert "going on after step 12," in (tmp_path / "log").read_text()


def test_a_change_may_be_accepted_and_a_run_begun_anew(half, tmp_path):
    folder, flags = half
    shutil.copytree(folder / "out", tmp_path / "out")
    flags = [*flags, "--out_dir", tmp_path / "out", "--learning_rate", "1e-4"]
    assert run("1-pretrain.py", [*flags, "--accept_changes"], tmp_path / "log") == 0
    assert "going on after step 12" in (tmp_path / "log").read_text()
    assert run("1-pretrain.py", [*flags, "--resume", "never"], tmp_path / "log") == 0
    assert "starting fresh" in (tmp_path / "log").read_text()
    lines = metrics(tmp_path / "out" / "pretrain_32.metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 21)) and max(line["lr"] for line in lines) == 1e-4


def test_other_data_is_another_run(data, finished):  # noqa: F811
    script, flags, weights, log = finished
    tokens = np.fromfile(data / "tokens.bin", dtype=np.uint16)
    tokens[100] = 50
    tokens.tofile(data / "tokens.bin")
    assert run(script, flags, log) == 2
    assert "data was" in log.read_text()


@pytest.mark.parametrize("damage", ["flipped", "cut", "missing", "sums"])
def test_a_damaged_state_is_reported_and_the_one_before_used(damage, half, tmp_path):
    folder, flags = half
    shutil.copytree(folder / "out", tmp_path / "out")
    newest = tmp_path / "out" / "pretrain_32.state" / "step_00000012"
    file = newest / ("SHA256SUMS" if damage == "sums" else "model.pt")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content[: len(content) // 2] if damage == "cut" else content)
    if damage == "missing":
        file.unlink()
    assert run("1-pretrain.py", [*flags, "--out_dir", tmp_path / "out"], tmp_path / "log") == 0
    said = (tmp_path / "log").read_text()
    assert f"{newest} is damaged" in said and "going on after step 6," in said
    whole = pretrain_flags(folder, flags[flags.index("--tokenizer") + 1], tmp_path / "whole", "--max_steps", 20)
    assert run("1-pretrain.py", whole, tmp_path / "log") == 0
    assert_same_run(tmp_path / "out" / "pretrain_32.pth", tmp_path / "whole" / "pretrain_32.pth")


def test_without_an_intact_state_nothing_is_guessed(half, tmp_path):
    folder, flags = half
    shutil.copytree(folder / "out", tmp_path / "out")
    for file in (tmp_path / "out").rglob("state.pt"):
        file.write_bytes(b"")
    assert run("1-pretrain.py", [*flags, "--out_dir", tmp_path / "out"], tmp_path / "log") == 2
    assert "--resume never" in (tmp_path / "log").read_text()


def test_a_full_disk_is_a_warning_while_the_run_goes_on_and_an_error_at_its_end(finished, tmp_path):
    script, flags, weights, log = finished
    before = snapshot(weights.parent)
    flags[flags.index("--max_steps") + 1] = "20"
    assert run(script, flags, log, limit=40_000) == 2  # bytes: a file of weights is larger
    said = log.read_text()
    assert "warning: step 16 could not be saved" in said and "no room" in said and "Traceback" not in said
    assert re.search(r"error: step 20 could not be saved: \S+\.pth\.tmp takes [\d,]+ bytes", said), said
    after = snapshot(weights.parent)
    assert all(after[path] == content for path, content in before.items() if path.suffix not in (".jsonl", ".png"))
    assert run(script, flags, log) == 0
    assert "going on after step 12," in log.read_text()


def poisoned(monkeypatch, bad_steps: set[int], number: float, where: str) -> None:
    """Losses or gradients that are not finite at some steps, as a corrupt record would cause them."""
    step = Trainer.step

    def wrapped(self, output):
        if self.place.step + 1 in bad_steps:
            if where == "loss":
                output.loss = output.loss * number
            else:
                output.loss.register_hook(lambda gradient: gradient * number)
        step(self, output)

    monkeypatch.setattr(Trainer, "step", wrapped)


@pytest.mark.parametrize(("number", "where"), [(math.nan, "loss"), (math.inf, "loss"), (math.nan, "gradient")])
def test_updates_that_are_not_finite_are_skipped(number, where, data, tokenizer_dir, tmp_path, monkeypatch):  # noqa: F811
    poisoned(monkeypatch, {3, 5, 6}, number, where)
    train("1-pretrain.py", pretrain_flags(data, tokenizer_dir, tmp_path, "--max_steps", 8, "--batch_size", 2))
    lines = [json.loads(line) for line in (tmp_path / "pretrain_32.metrics.jsonl").read_text().splitlines()]
    skipped = [line for line in lines if "skipped" in line]
    assert [line["step"] for line in skipped] == [3, 5, 6]
    order = epoch_order(rows_of(data), 42, 0)
    starts = [order[i] * 31 for i in (4, 5)]  # the third step's two rows
    assert skipped[0]["where"] == [f"tokens {s:,} to {s + 31:,} of {data / 'tokens.bin'}" for s in starts]
    assert where in skipped[0]["skipped"]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert [i + 1 for i, loss in enumerate(losses) if loss is None] == [3, 5, 6]
    weights = read_tensors(tmp_path / "pretrain_32.pth")
    assert all(value.isfinite().all() for value in weights.values())


def test_a_skipped_update_leaves_the_weights_alone(data, tokenizer_dir, tmp_path, monkeypatch):  # noqa: F811
    for steps, folder in [(4, "before"), (6, "after")]:
        poisoned(monkeypatch, {5, 6}, math.nan, "loss")
        flags = pretrain_flags(data, tokenizer_dir, tmp_path / folder, "--max_steps", steps, "--warmup_steps", 99)
        train("1-pretrain.py", flags)
    one, other = (read_tensors(tmp_path / folder / "pretrain_32.pth") for folder in ("before", "after"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_ten_in_a_row_end_the_run(data, tokenizer_dir, tmp_path, monkeypatch):  # noqa: F811
    poisoned(monkeypatch, set(range(5, 99)), math.nan, "loss")
    flags = pretrain_flags(data, tokenizer_dir, tmp_path, "--max_steps", 30, "--save_interval", 2, "--batch_size", 2)
    with pytest.raises(cli.UserError, match="10 updates in a row skipped, up to step 14"):
        train("1-pretrain.py", flags)


def test_weights_that_are_not_finite_are_never_written(data, tokenizer_dir, tmp_path, monkeypatch):  # noqa: F811
    step = Trainer.step

    def wrapped(self, output):
        step(self, output)
        if self.place.step == 3:
            with torch.no_grad():
                self.raw_model.norm.weight[0] = math.inf

    monkeypatch.setattr(Trainer, "step", wrapped)
    flags = pretrain_flags(data, tokenizer_dir, tmp_path, "--max_steps", 5, "--save_interval", 2, "--batch_size", 2)
    with pytest.raises(cli.UserError, match="norm.weight holds numbers that are not finite"):
        train("1-pretrain.py", flags)
    assert json.loads((tmp_path / "pretrain_32.json").read_text())["step"] == 2
    assert steps_in(tmp_path / "pretrain_32.state") == [2]


def test_out_of_memory_names_the_options_to_lower(capsys):
    for error in (torch.OutOfMemoryError("CUDA out of memory. Tried"), MemoryError()):
        with pytest.raises(SystemExit) as stop:
            cli.run(Mock(side_effect=error), TrainingOptions, [])
        assert stop.value.code == 2
        assert "--batch_size (and raise --accumulation_steps as much)" in capsys.readouterr().err
        with pytest.raises(SystemExit):
            cli.run(Mock(side_effect=error), InferenceOptions, ["--rope_scaling", "1000"])
        assert capsys.readouterr().err == "error: out of memory: lower --rope_scaling\n"


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(before, after, data, tokenizer_dir, tmp_path):  # noqa: F811
    """The same global batch of 4 rows: the losses are those of a run that was never stopped."""
    common = ["--optimizer", "adamw", "--learning_rate", "1e-3", "--save_interval", 12, "--max_steps", 20]

    def go(processes: int, out: Path) -> list[float]:
        flags = pretrain_flags(data, tokenizer_dir, out, *common, "--batch_size", 4 // processes)
        done = torchrun("1-pretrain.py", *flags, processes=processes)
        assert done.returncode == 0, done.stderr
        assert ("going on after step 12," in done.stdout) == (processes == after and out.name == "out")
        return [line["loss"] for line in metrics(out / "pretrain_32.metrics.jsonl")]

    whole = go(before, tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "pretrain_32.state" / "step_00000020")  # as if killed between
    changed = go(after, tmp_path / "out")
    assert len(changed) == 20 and changed == pytest.approx(whole, abs=1e-4)


def anonymous_memory(pid: int) -> int:
    """kB: the mapped token file does not count."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path(f"/proc/{pid}/status").read_text()).group(1))


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read where Linux tells it")
def test_memory_does_not_grow_with_the_steps(data, tokenizer_dir, tmp_path):  # noqa: F811
    more = ["--max_steps", 2000, "--batch_size", 2, "--save_interval", 100, "--val_path", data / "val.jsonl"]
    flags = pretrain_flags(data, tokenizer_dir, tmp_path, *more, "--val_interval", 100)
    process = start("1-pretrain.py", flags, tmp_path / "log")
    lines, memory = tmp_path / "pretrain_32.metrics.jsonl", {}
    while process.is_alive():
        step = len(lines.read_bytes().splitlines()) if lines.exists() else 0
        with contextlib.suppress(FileNotFoundError, AttributeError):  # it has just ended
            memory[step] = anonymous_memory(process.pid)
        time.sleep(0.05)
    process.join()
    assert process.exitcode == 0, (tmp_path / "log").read_text()
    early = np.median([kb for step, kb in memory.items() if 200 <= step < 300])
    late = np.median([kb for step, kb in memory.items() if step >= 1900])
    print(f"{early:,.0f} kB after 200 steps, {late:,.0f} kB after 2,000")
    assert late < 1.02 * early
