"""Adapters: what they change and what they do not, how they are saved, blended, merged and refused."""

import json
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import make_model
from peft import PeftModel
from safetensors.torch import load_file
from test_dataset import DIALOGUES, write_csv
from test_resume import POINTS, kill_at_a_moment, run, steps_in
from test_training import metrics, torchrun, train
from torch import nn
from transformers import AutoModelForCausalLM

from model.adapters import TARGETS, add_adapter, base_hash, lora_config, merge, save_adapter, with_adapter
from model.backends import trained_state
from model.checkpoint import load_model, save_weights
from model.cli import UserError
from model.dataset import SFTDataset
from model.options import InferenceOptions

IDS = torch.tensor([[1, 17, 40, 99, 250, 7]])
SCRIPT = "4-lora_sft.py"


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def make_base(folder: Path, tokenizer_dir: Path, **overrides) -> Path:
    path = folder / f"full_sft_32{'_moe' if overrides.get('use_moe') else ''}.pth"
    save_weights(path, make_model(max_seq_len=256, **overrides), tokenizer_dir, stage="full_sft", step=1)
    return path


@pytest.fixture
def base(tmp_path, tokenizer_dir) -> Path:
    return make_base(tmp_path, tokenizer_dir)


@pytest.fixture
def adapter(base, tmp_path):
    """A folder of an adapter that changes much, and the logits of the base with it, as peft computes them."""
    model, tokenizer = load_model(base)
    digest = base_hash(model)
    adapted = add_adapter(model, lora_config(model, 4, 8, 0.0))
    generator = torch.Generator().manual_seed(1)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    folder = tmp_path / "lora" / "toy_32"
    save_adapter(folder, adapted, tokenizer.name_or_path, trained_state(adapted), digest, step=3)
    return folder, logits(adapted)


def flags_of(base: Path, out: Path, *more) -> list[str]:
    """Of a run of 24 steps on the identity-like dialogues of the tests."""
    data = out.parent / "lora.csv"
    write_csv(data, [[json.dumps(h), q * n, a * n] for n in range(1, 5) for h, q, a in DIALOGUES])
    flags = ["train", "--init_from", base, "--data_path", data, "--out_dir", out, "--max_seq_len", 128, "--rank", 4]
    flags += ["--epochs", 12, "--batch_size", 2, "--log_interval", 1, "--save_interval", 5, "--device", "cpu"]
    return list(map(str, [*flags, "--dropout", 0.1, "--lora_name", "toy", "--warmup_steps", 2, *more]))


@pytest.mark.parametrize("use_moe", [False, True])
def test_only_the_adapter_changes(use_moe, tmp_path, tokenizer_dir, capsys):
    base = make_base(tmp_path, tokenizer_dir, use_moe=use_moe)
    before, (model, _) = base.read_bytes(), load_model(base)
    train(SCRIPT, flags_of(base, tmp_path / "out", "--max_steps", 6))
    assert base.read_bytes() == before
    folder = tmp_path / "out" / "lora" / f"toy_32{'_moe' if use_moe else ''}"
    tensors = load_file(folder / "adapter_model.safetensors")
    matrices = {
        name: module.weight.shape
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name != "output" and not name.endswith("gate")
    }
    assert {n.removeprefix("base_model.model.").rsplit(".lora_")[0] for n in tensors} == matrices.keys()
    assert all(tensors[name].any() for name in tensors if "lora_B" in name)  # zero before training
    trained, total = sum(4 * sum(shape) for shape in matrices.values()), model.num_parameters()
    assert sum(value.numel() for value in tensors.values()) == trained
    words = f"{trained:,} trained parameters beside {total:,} frozen ones ({trained / (total + trained):.2%} of all)"
    assert words in capsys.readouterr().out
    state = torch.load(folder.with_suffix(".state") / "step_00000006" / "model.pt", weights_only=True)
    assert sum(value.numel() for value in state["model"].values()) == trained
    moments = [
        value for each in state["optimizers"][0]["state"].values() for key, value in each.items() if "exp" in key
    ]
    assert sum(value.numel() for value in moments) == 2 * trained
    losses = [line["loss"] for line in metrics(folder.with_suffix(".metrics.jsonl"))]
    assert losses[-1] < losses[0]


def test_the_adapter_loads_onto_a_transformers_folder_of_the_base(base, adapter, tmp_path, tokenizer_dir):
    folder, expected = adapter
    load_model(base)[0].save_pretrained(tmp_path / "folder")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "folder", trust_remote_code=True)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(model, folder)), expected, rtol=0, atol=1e-5)
    ours, _ = load_model(
        tmp_path / "folder", tokenizer=tokenizer_dir
    )  # its file is another, but its weights are the base's
    torch.testing.assert_close(logits(with_adapter(ours, folder)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_blending(scale, base, adapter):
    folder, _ = adapter
    model, _ = load_model(base)
    tensors = load_file(folder / "adapter_model.safetensors")
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    for name, A in tensors.items():
        if "lora_A" in name:
            B = tensors[name.replace("lora_A", "lora_B")]
            key = name.removeprefix("base_model.model.").replace(".lora_A", "")
            expected[key] += scale * 8 / 4 * B @ A
    merged = with_adapter(model, folder, scale).state_dict()
    assert merged.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(merged[key], value, rtol=0, atol=1e-6)


def test_merging(base, adapter, tmp_path):
    folder, expected = adapter
    command = ["merge", "--lora", folder, "--init_from", base]
    train(SCRIPT, command)
    merged, _ = load_model(folder.with_suffix(".pth"))
    torch.testing.assert_close(logits(merged), expected, rtol=0, atol=1e-5)
    with pytest.raises(UserError, match="exists already"):
        train(SCRIPT, command)
    with pytest.raises(UserError, match="has the adapter in .* in its weights already"):
        merge(folder.with_suffix(".pth"), folder, tmp_path / "twice.pth")
    with pytest.raises(UserError, match="was made for another base"):
        with_adapter(merged, folder)
    assert not (tmp_path / "twice.pth").exists()


def test_the_engine_takes_an_adapter_and_a_scale(base, adapter):
    from model.engine import load_engine

    folder, expected = adapter
    for scale, wanted in [(1.0, expected), (0.0, logits(load_model(base)[0]))]:
        options = InferenceOptions(checkpoint=str(base), lora=str(folder), lora_scale=scale, device="cpu")
        with load_engine(options) as engine:
            torch.testing.assert_close(logits(engine.model), wanted, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(base=True), "was made for another base: for weights"),
        (dict(missing=True), "there is no adapter_config.json"),
        (dict(cut=True), "cannot read"),
        (dict(scale=-1), "scale of an adapter is -1"),
    ],
)
def test_what_does_not_fit_is_refused(change, words, base, adapter):
    folder, _ = adapter
    model, _ = load_model(base)
    if "base" in change:
        model.norm.weight.data[3] += 1e-6
    if "missing" in change:
        shutil.rmtree(folder)
    if "cut" in change:
        file = folder / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=words):
        with_adapter(model, folder, change.get("scale", 1.0))


@pytest.mark.parametrize("name", ["output", "tok_embeddings", "norm", "wx"])
def test_matrices_without_adapters_are_refused(name):
    with pytest.raises(UserError, match=f"--target_modules {name}: no such matrix; choose among w1 w2"):
        lora_config(make_model(), 4, 8, 0.0, [*TARGETS, name])


@pytest.mark.parametrize(("name", "words"), [("dpo", "choose another name"), ("a/b", "letters, digits")])
def test_names_that_cannot_be_a_folder_of_its_own_are_refused(name, words, base, tmp_path):
    with pytest.raises(UserError, match=f"--lora_name {name}: .*{words}"):
        train(SCRIPT, flags_of(base, tmp_path / "out", "--lora_name", name))
    assert not (tmp_path / "out").exists()


def test_a_merge_never_writes_over_its_base(tmp_path, tokenizer_dir):
    own = tmp_path / "out" / "lora" / "toy_32.pth"
    save_weights(own, make_model(max_seq_len=256), tokenizer_dir, stage="lora", step=1)
    before = own.read_bytes()
    with pytest.raises(UserError, match="--merge would write over --init_from"):
        train(SCRIPT, flags_of(own, tmp_path / "out", "--merge", "--resume", "never"))
    assert own.read_bytes() == before


def test_a_merge_is_named_after_its_adapter(base, adapter, monkeypatch):
    folder = adapter[0].rename(adapter[0].with_name("v1.5"))
    train(SCRIPT, ["merge", "--lora", folder, "--init_from", base])
    monkeypatch.chdir(folder)
    with pytest.raises(UserError, match=r"v1\.5\.pth exists already"):
        train(SCRIPT, ["merge", "--lora", ".", "--init_from", base])


def same_adapter(folder: Path, other: Path) -> None:
    ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (folder, other))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in ours)
    lines = [[line | {"tokens_per_s": 0} for line in metrics(f.with_suffix(".metrics.jsonl"))] for f in (folder, other)]
    assert lines[0] == lines[1]


def soak(base: Path, folder: Path, points: list[str], *more) -> None:
    """Kills a run at points of saving and at random moments, and compares it with one left alone."""
    assert run(SCRIPT, flags_of(base, folder / "whole", *more), folder / "log") == 0, (folder / "log").read_text()
    flags = flags_of(base, folder / "killed", *more)
    adapter, generator = folder / "killed" / "lora" / "toy_32", random.Random(len(points))
    for point in points:
        before = steps_in(adapter.with_suffix(".state"))
        if point == "moment":
            kill_at_a_moment(SCRIPT, flags, folder / "log", generator)
        else:
            assert run(SCRIPT, flags, folder / "log", (point, 1 if before else 2)) == -signal.SIGKILL, point
        said = (folder / "log").read_text()
        assert (f"going on after step {before[-1]}," if before else "starting fresh") in said
    assert run(SCRIPT, flags, folder / "log") == 0
    assert "going on after step" in (folder / "log").read_text()
    same_adapter(adapter, folder / "whole" / "lora" / "toy_32")
    assert len(steps_in(adapter.with_suffix(".state"))) == 2


def test_a_killed_run_ends_with_the_same_adapter(base, tmp_path):
    soak(base, tmp_path, ["rename"])


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_the_soak(optimizer, base, tmp_path):
    soak(base, tmp_path, POINTS + ["moment"] * 8, "--optimizer", optimizer, "--epochs", 160)


def test_a_state_of_another_base_is_another_run(base, tmp_path):
    flags = flags_of(base, tmp_path / "out", "--max_steps", 8, "--save_interval", 4)
    train(SCRIPT, flags)
    model, tokenizer = load_model(base)
    model.norm.weight.data[3] += 1
    save_weights(base, model, tokenizer.name_or_path)
    with pytest.raises(UserError, match="initial weights was"):
        train(SCRIPT, flags)


@pytest.mark.slow
def test_two_processes_train_the_same_adapter_as_one(base, tmp_path):
    losses = []
    for processes in (1, 2):
        flags = flags_of(base, tmp_path / str(processes), "--batch_size", 4 // processes, "--dropout", 0)
        done = torchrun(SCRIPT, *flags, processes=processes)
        assert done.returncode == 0, done.stderr
        file = tmp_path / str(processes) / "lora" / "toy_32.metrics.jsonl"
        losses.append([line["loss"] for line in metrics(file)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_the_identity_dialogues_can_be_trained_on(tokenizer):
    data = SFTDataset(Path(__file__).parents[1] / "dataset" / "sample" / "lora_identity.csv", tokenizer, 512)
    assert not data.skipped and not data.shortened and len(data.lengths) >= 30
