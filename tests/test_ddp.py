"""Several processes with DDP do what one does with as large a batch as theirs together; two machines what one does."""

import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, load_script
from test_training import data, metrics, pretrain_flags, torchrun  # noqa: F401

from model import cli
from model.checkpoint import load_model
from model.dataset import SFTDataset, epoch_order
from model.tokenizer import tokenizer_hash

# A server that has imported PyTorch once and forks: real processes without the seconds of its import.
processes = multiprocessing.get_context("forkserver")
processes.set_forkserver_preload(["model.trainer", "model.evaluate", "pandas", "matplotlib.pyplot"])


def nothing(rank: int) -> None:
    pass


def one_rank(script: str, flags: list[str], log: Path, environment: dict[str, str], act: Callable[[int], None]) -> None:
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    os.environ.update(environment)
    act(int(environment.get("RANK", 0)))
    module = load_script(script)
    cli.run(module.main, module.Args, flags)


def ranks(
    script: str, flags: list, folder: Path, count: int = 2, act: Callable[[int], None] = nothing
) -> tuple[list[int], str]:
    """Runs a script in `count` processes as launchers do, `act` first in each: exit codes, and all that they said."""
    port, started = free_port(), []
    for rank in range(count):
        environment = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=count, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        environment = {name: str(value) for name, value in environment.items()}
        args = (script, [str(flag) for flag in flags], folder / f"log{rank}", environment if count > 1 else {}, act)
        started.append(processes.Process(target=one_rank, args=args))
        started[-1].start()
    for process in started:
        process.join(120)
        process.kill()
    said = "".join((folder / f"log{rank}").read_text() for rank in range(count))
    return [process.exitcode for process in started], said


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def keep_gradients(folder: Path, rank: int) -> None:
    """Has a process write down the gradients of its first step, before they are clipped."""
    from model.backends import TorchBackend

    update = TorchBackend.update

    def keeping(self, *args):
        gradients = {name: p.grad.clone() for name, p in self.raw_model.named_parameters()}
        if not (folder / f"gradients{rank}.pt").exists():
            torch.save(gradients, folder / f"gradients{rank}.pt")
        return update(self, *args)

    TorchBackend.update = keeping


def first_gradients(folder: Path, rank: int) -> torch.Tensor:
    gradients = torch.load(folder / f"gradients{rank}.pt", weights_only=True)
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def compare(script: str, flags: list, name: str, folder: Path, batch: int, tolerance: float, variants: list) -> None:
    """Runs with (processes, accumulation steps) of `variants` against one process with the batch of all of them."""
    runs = {}
    for count, accumulation in [(1, 1), *variants]:
        out = folder / f"{count}_{accumulation}"
        out.mkdir()
        shape = ["--batch_size", batch // (count * accumulation), "--accumulation_steps", accumulation]
        codes, said = ranks(script, [*flags, "--out_dir", out, *shape], out, count, partial(keep_gradients, out))
        assert codes == [0] * count, said
        losses = [line["loss"] for line in metrics(out / name)]
        runs[count, accumulation] = losses, [first_gradients(out, rank) for rank in range(count)]
    losses, (gradients,) = runs.pop((1, 1))
    assert len(losses) == 20 and losses[-1] < losses[0]
    for variant, (its_losses, each_ranks_gradients) in runs.items():
        assert its_losses == pytest.approx(losses, abs=tolerance), variant
        for its_gradients in each_ranks_gradients:
            assert (its_gradients - gradients).norm() <= 1e-6 * gradients.norm(), variant


def flags_of(data: Path, tokenizer_dir: Path, *more) -> list[str]:  # noqa: F811
    flags = pretrain_flags(data, tokenizer_dir, "elsewhere", "--max_steps", 20, "--learning_rate", "1e-3", *more)
    at = flags.index("--out_dir")
    return flags[:at] + flags[at + 2 :]


@pytest.fixture
def monotonous(tmp_path, tokenizer_dir):
    """Rows in which one token is repeated: all of them go to the same experts, and others get none at all."""
    folder = tmp_path / "monotonous"
    folder.mkdir()
    tokens = np.repeat(np.arange(10, 50, dtype=np.uint16), 2 * 31)
    tokens.tofile(folder / "tokens.bin")
    description = dict(dtype="uint16", tokens=len(tokens), tokenizer_sha256=tokenizer_hash(tokenizer_dir))
    (folder / "tokens.json").write_text(json.dumps(description))
    return folder


def test_experts_without_tokens_on_one_process(monotonous, tokenizer_dir, tmp_path):
    flags = flags_of(monotonous, tokenizer_dir, "--use_moe", "--optimizer", "adamw")
    compare("1-pretrain.py", flags, "pretrain_32_moe.metrics.jsonl", tmp_path, 2, 1e-4, [(2, 1)])
    first = metrics(tmp_path / "2_1" / "pretrain_32_moe.metrics.jsonl")[0]  # the experts' load is the main process's
    assert all(min(layer) == 0 for layer in first["expert_load"])
    gradients = torch.load(tmp_path / "2_1" / "gradients0.pt", weights_only=True)
    idle = [(n, i) for n, layer in enumerate(first["expert_load"]) for i, share in enumerate(layer) if not share]
    experts = [gradients[f"layers.{n}.feed_forward.experts.{i}.w1.weight"] for n, i in idle]
    assert any(gradient.any() for gradient in experts)  # the other process had tokens for them


@pytest.mark.slow
@pytest.mark.parametrize(
    ("more", "tolerance"),
    [
        (["--optimizer", "adamw"], 1e-5),
        (["--optimizer", "muon"], 1e-4),
        (["--optimizer", "adamw", "--use_moe"], 1e-4),
        (["--optimizer", "muon", "--use_moe"], 1e-4),
    ],
)
def test_pretraining(more, tolerance, data, tokenizer_dir, tmp_path):  # noqa: F811
    """Two epochs and a half, each with a short last batch."""
    name = f"pretrain_32{'_moe' if '--use_moe' in more else ''}.metrics.jsonl"
    variants = [(2, 1), (1, 2), (2, 2), (1, 4)]
    compare("1-pretrain.py", flags_of(data, tokenizer_dir, *more), name, tmp_path, 4, tolerance, variants)


@pytest.mark.slow
@pytest.mark.parametrize("moe", ["--no_use_moe", "--use_moe"])
@pytest.mark.parametrize(("optimizer", "tolerance"), [("adamw", 1e-5), ("muon", 1e-4)])
def test_fine_tuning_with_unequally_many_trained_tokens(optimizer, tolerance, moe, data, tokenizer_dir, tmp_path):  # noqa: F811
    base = tmp_path / "base"
    base.mkdir()
    codes, said = ranks("1-pretrain.py", pretrain_flags(data, tokenizer_dir, base, moe, "--max_steps", 2), base, 1)
    assert codes == [0], said
    (weights,) = base.glob("*.pth")
    rows = SFTDataset(data / "sft.csv", load_model(weights)[1], 128, packing=False)
    order = epoch_order(len(rows), 42, 0)
    halves = [sum(int((rows.row(i).labels[1:] >= 0).sum()) for i in half) for half in (order[:2], order[2:4])]
    assert halves[0] != halves[1]
    flags = ["--data_path", data / "sft.csv", "--init_from", weights, "--max_seq_len", 128, "--no_packing"]
    flags += ["--max_steps", 20, "--optimizer", optimizer, "--learning_rate", "1e-3", "--log_interval", 1]
    name = f"multi_chat/full_sft_32{'_moe' if moe == '--use_moe' else ''}.metrics.jsonl"
    tolerance = max(tolerance, 1e-4 if moe == "--use_moe" else 0)
    compare("3-full_sft.py", [*flags, "--device", "cpu"], name, tmp_path, 4, tolerance, [(2, 1), (2, 2)])


def two_agents(flags: list[str]) -> list[subprocess.Popen]:
    """torchrun as one starts it on two machines, with a process on each."""
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nnodes",
        "2",
        "--nproc_per_node",
        "1",
        "--rdzv_backend",
    ]
    command += ["c10d", "--rdzv_endpoint", f"127.0.0.1:{free_port()}", "--rdzv_id", "test", "1-pretrain.py", *flags]
    quiet = dict(cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True)
    return [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **quiet) for _ in range(2)]


@pytest.mark.slow
def test_two_machines(data, tokenizer_dir, tmp_path):  # noqa: F811
    common = ["--max_steps", 400, "--batch_size", 2, "--save_interval", 20]
    done = torchrun("1-pretrain.py", *pretrain_flags(data, tokenizer_dir, tmp_path / "one", *common))
    assert done.returncode == 0, done.stderr
    agents = two_agents(pretrain_flags(data, tokenizer_dir, tmp_path / "two", *common))
    states = tmp_path / "two" / "pretrain_32.state"
    while not list(states.glob("step_*[0-9]")) and agents[0].poll() is None:
        time.sleep(0.01)
    for process in [*psutil.Process(agents[1].pid).children(recursive=True), agents[1]]:
        process.send_signal(signal.SIGKILL)  # as if the machine had lost its power
    said, _ = agents[0].communicate(timeout=120)
    assert agents[0].returncode and "Error" in said
    agents[1].wait()
    assert metrics(tmp_path / "two" / "pretrain_32.metrics.jsonl")[-1]["step"] < 400
    agents = two_agents(pretrain_flags(data, tokenizer_dir, tmp_path / "two", *common))
    said = [agent.communicate(timeout=120)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], said
    assert "going on after step" in said[0] + said[1]
    losses = [[line["loss"] for line in metrics(tmp_path / n / "pretrain_32.metrics.jsonl")] for n in ("one", "two")]
    assert len(losses[0]) == 400 and losses[1] == losses[0]
