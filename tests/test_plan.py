"""--plan and --batch_size auto: what is foretold against what is, and that foretelling changes nothing."""

import json
import re

import numpy as np
import pytest
import torch
from conftest import load_script, make_model
from test_ddp import ranks
from test_lora import flags_of as lora_flags
from test_lora import make_base
from test_training import data, metrics, pretrain_flags, rows_of, train  # noqa: F401

from model import cli
from model.adapters import add_adapter, lora_config
from model.backends import TorchBackend
from model.cli import UserError
from model.dataset import Segment, SFTDataset, make_row, stack
from model.distributed import Run
from model.options import TrainingOptions
from model.plan import Memory, Sizes, count, measure_memory, plan_ahead, share_rows
from model.probe import probe
from model.resume import random_state
from model.tokenizer import load_tokenizer

ALONE = Run(0, 1, torch.device("cpu"))
LENGTH = 64


class Rows:
    """Random tokens."""

    pad, max_seq_len, num_tokens = 0, LENGTH, 48 * LENGTH

    def __len__(self) -> int:
        return 48

    def row(self, index: int):
        ids = np.random.default_rng(index).integers(3, 300, LENGTH)
        return make_row([Segment(ids, ids)], LENGTH, 0)


def seven_rows_fit(rank: int) -> None:
    """Has a process believe it. (7 divides no step of these tests.)"""
    Memory.most_rows = lambda self: 7


@pytest.fixture
def only_seven_rows_fit(monkeypatch):
    monkeypatch.setattr(Memory, "most_rows", lambda self: 7)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("kind", ["dense", "moe", "adapter"])
def test_counted_bytes_are_those_of_a_real_model(kind, optimizer):
    model = make_model(use_moe=kind == "moe").train()
    if kind == "adapter":
        model = add_adapter(model, lora_config(model, 4, 8, 0.0))
    args = TrainingOptions(optimizer=optimizer)
    sizes = count(model, args, ALONE, torch.float32)
    backend = TorchBackend(model, args, ALONE, torch.float32)
    ids = torch.randint(300, (2, 16))
    backend.backward(model(input_ids=ids, labels=ids).loss)
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage() for value in model.state_dict().values()}
    assert sizes.weights == sum(storage.nbytes() for storage in storages.values())
    assert sizes.gradients == sum(p.grad.nbytes for p in model.parameters() if p.grad is not None)
    backend.update(1.0, True)
    states = [state for each in backend.optimizers for state in each.state_dict()["state"].values()]
    assert sizes.optimizer == sum(value.nbytes for state in states for value in state.values() if value.dim())


@pytest.mark.parametrize(
    ("rows", "most", "shared"), [(16, 99, (16, 1)), (16, 15, (8, 2)), (12, 5, (4, 3)), (7, 6, (1, 7)), (1, 1, (1, 1))]
)
def test_a_step_keeps_its_rows(rows, most, shared):
    assert share_rows(rows, most) == shared


def test_of_what_fits_one_row_more_does_not():
    memory = Memory(Sizes(1, 1, 1), held=50, earlier=60, budget=1000.0, fixed=100.0, per_row=7.0, update=300)
    most = memory.most_rows()
    assert memory.peak(most) <= 1000 < memory.peak(most + 1)
    assert memory.peak(1) == 300 and memory._replace(update=0).peak(1) == 107
    assert memory._replace(update=1001).most_rows() == 0 == memory._replace(budget=106.0).most_rows()


def saved_bytes(model, rows: int) -> int:
    """What autograd keeps from a forward pass for the backward one, the weights not counted."""
    seen = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    batch = stack([Rows().row(number) for number in range(rows)])
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(**batch.inputs())
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    assert output.loss.requires_grad
    return sum(size for address, size in seen.items() if address not in weights)


def test_memory_of_a_row_and_nothing_changed_by_measuring():
    """Also where much memory was freed, but not given back, before."""
    model = make_model(dim=64, n_layers=4, dropout=0.1, initializer_range=0.02).train()
    blocks = [torch.ones(50_000) for _ in range(1000)]
    kept = blocks[::50]  # between holes
    del blocks
    before, random = {name: value.clone() for name, value in model.state_dict().items()}, random_state()
    memory = measure_memory(model, Rows(), TrainingOptions(), ALONE, torch.float32)
    after = random_state()
    assert len(kept) == 20 and torch.equal(after.pop("torch"), random.pop("torch")) and str(after) == str(random)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training and all(p.grad is None for p in model.parameters())
    exact = (saved_bytes(model, 16) - saved_bytes(model, 8)) / 8
    assert exact < memory.per_row < 2.5 * exact  # besides, there are gradients of activations, and what operations need


def test_probing_takes_what_steps_take():
    micro_batch, update = probe(make_model(), Rows(), TrainingOptions(), *(ALONE.device, torch.float32), 4, 2, 3)
    assert 0 < micro_batch.seconds < 60 and 0 < update.seconds < 60
    assert 10e6 < update.peak < 100e9 and 10e6 < micro_batch.peak < 100e9


def tree(folder) -> dict:
    return {path: path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def planned(script: str, flags: list, capsys) -> dict[str, str]:
    """The lines of a plan, by name; it ends with exit code 0."""
    with pytest.raises(SystemExit) as stop:
        train(script, [*flags, "--plan"])
    assert not stop.value.code
    said = capsys.readouterr().out.splitlines()
    first = next(number for number, line in enumerate(said) if line.startswith("plan of"))
    return {line[:13].strip(): line[13:] for line in said[first + 1 :]}


def test_the_plan_of_pretraining(data, tokenizer_dir, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    flags = pretrain_flags(data, tokenizer_dir, out, "--batch_size", 2, "--accumulation_steps", 3, "--epochs", 2)
    before = tree(tmp_path)
    lines = planned("1-pretrain.py", flags, capsys)
    assert tree(tmp_path) == before and not out.exists()
    train("1-pretrain.py", flags)
    line = metrics(out / "pretrain_32.metrics.jsonl")[-1]
    rows = rows_of(data)
    assert lines["an epoch"] == f"{line['tokens'] // 2:,} tokens, in {rows} rows of 32; {line['step'] // 2} steps"
    assert lines["the run"] == f"{line['step']} steps of 6 rows (2 x 3)"
    parameters = sum(p.numel() for p in torch.load(out / "pretrain_32.pth", weights_only=True).values())
    trained = int(re.match(r"[\d,]+", lines["parameters"])[0].replace(",", ""))
    assert trained == parameters - 300 * 32  # the file names the embedding twice
    assert f"for {line['step']} steps" in lines["time"] and "GB at the peak" in lines["memory"]


def test_the_plans_of_fine_tuning(data, tokenizer_dir, tmp_path, capsys):  # noqa: F811
    base = make_base(tmp_path, tokenizer_dir)
    sft = ["--data_path", data / "sft.csv", "--init_from", base, "--out_dir", tmp_path / "out"]
    sft += ["--max_seq_len", 64, "--device", "cpu"]
    lora = lora_flags(base, tmp_path / "out", "--merge")
    before = tree(tmp_path)
    lines = {
        script: planned(script, flags, capsys) for script, flags in (("3-full_sft.py", sft), ("4-lora_sft.py", lora))
    }
    assert tree(tmp_path) == before
    dialogues = SFTDataset(data / "sft.csv", load_tokenizer(tokenizer_dir), 64)
    tokens = sum(dialogues.row(number).num_tokens for number in range(len(dialogues)))
    assert lines["3-full_sft.py"]["an epoch"].startswith(f"{tokens:,} tokens, in {len(dialogues)} rows")
    total, trained = re.findall(r"[\d,]*\d", lines["4-lora_sft.py"]["parameters"])
    assert int(trained.replace(",", "")) < int(total.replace(",", ""))


def test_a_micro_batch_that_does_not_fit(data, tokenizer_dir, tmp_path, capsys, only_seven_rows_fit):  # noqa: F811
    flags = pretrain_flags(data, tokenizer_dir, tmp_path / "out", "--batch_size", 8)
    lines = planned("1-pretrain.py", flags, capsys)
    assert lines["micro-batch"] == "of 8 rows; at most 7 fit" and "does not fit" in lines["time"]
    lines = planned("1-pretrain.py", [*flags, "--batch_size", "auto"], capsys)
    assert lines["micro-batch"] == "of 4 rows; at most 7 fit" and "s a step" in lines["time"]


def weights_of(out) -> bytes:
    return json.loads((out / "pretrain_32.json").read_text())["sha256"]


def test_auto_gives_the_weights_of_the_same_batch_set_by_hand(data, tokenizer_dir, tmp_path, only_seven_rows_fit):  # noqa: F811
    """Bit for bit, with dropout, which draws random numbers; and what was stopped goes on with another micro-batch."""
    runs = {}
    for name, shape in {"auto": ("auto", 3), "hand": (6, 8), "other": (16, 3)}.items():
        out = tmp_path / name
        more = ["--batch_size", shape[0], "--accumulation_steps", shape[1], "--dropout", 0.2, "--epochs", 2]
        train("1-pretrain.py", pretrain_flags(data, tokenizer_dir, out, *more))
        runs[name] = weights_of(out)
    assert runs["auto"] == runs["hand"] != runs["other"]


def test_a_run_goes_on_with_another_micro_batch(data, tokenizer_dir, tmp_path, monkeypatch, capsys):  # noqa: F811
    losses = {}
    for name, fitting in {"once": [99], "twice": [7, 99]}.items():
        out = tmp_path / name
        flags = pretrain_flags(data, tokenizer_dir, out, "--batch_size", "auto", "--schedule", "wsd")
        flags += ["--optimizer", "adamw", "--learning_rate", "1e-3"]
        for rows, steps in zip(fitting, [4, 8][-len(fitting) :], strict=True):
            monkeypatch.setattr(Memory, "most_rows", lambda self, rows=rows: rows)
            train("1-pretrain.py", [*flags, "--max_steps", steps])
        losses[name] = [line["loss"] for line in metrics(out / "pretrain_32.metrics.jsonl")]
    assert "going on after step 4" in capsys.readouterr().out
    assert losses["twice"][:5] == pytest.approx(losses["once"][:5], abs=1e-5) and len(losses["twice"]) == 8


def test_two_processes_agree_on_a_micro_batch(data, tokenizer_dir, tmp_path):  # noqa: F811
    weights = {}
    for name, shape in {"auto": ("auto", 1), "hand": (4, 4)}.items():
        out = tmp_path / name
        out.mkdir()
        more = ["--batch_size", shape[0], "--accumulation_steps", shape[1], "--dropout", 0.2]
        codes, said = ranks("1-pretrain.py", pretrain_flags(data, tokenizer_dir, out, *more), out, 2, seven_rows_fit)
        assert codes == [0, 0], said
        weights[name] = weights_of(out)
    assert weights["auto"] == weights["hand"]


@pytest.mark.parametrize(
    ("run", "free", "flags", "words"),
    [
        (ALONE, 0, dict(batch_size="auto"), "not even one row fits"),
        (ALONE, 0, dict(plan=True), "not even one row fits"),
        (Run(0, 2, torch.device("cpu")), 1e12, dict(plan=True), "without torchrun"),
        (Run(0, 1, torch.device("mps")), 1e12, dict(batch_size="auto"), "mps"),
    ],
)
def test_what_cannot_be_planned(run, free, flags, words, monkeypatch, tmp_path):
    monkeypatch.setattr("model.plan.free_bytes", lambda device: free)
    monkeypatch.setattr("model.plan.held_bytes", lambda device: 0)
    with pytest.raises(UserError, match=words):
        plan_ahead(make_model(), Rows(), TrainingOptions(**flags), run, tmp_path / "a.pth", torch.float32)


@pytest.mark.parametrize("flag", [["--plan"], ["--batch_size", "auto"]])
def test_deepspeed_is_not_planned(flag, capsys):
    module = load_script("3-full_sft.py")
    with pytest.raises(SystemExit) as stop:
        cli.run(module.main, module.Args, ["--deepspeed", "zero2", *flag])
    assert stop.value.code == 2 and "--deepspeed" in capsys.readouterr().err
