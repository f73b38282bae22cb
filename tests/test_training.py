"""Optimizers, schedules, and whole training runs through the scripts, with one process and with two."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import LINES, ROOT, load_script, make_model
from test_dataset import DIALOGUES, write_csv

from model.checkpoint import load_model
from model.cli import UserError, parse
from model.optim import Muon, build_optimizers, learning_rate_factor, orthogonalize
from model.tokenizer import encode_texts, load_tokenizer, tokenizer_hash
from model.trainer import pick_dtype


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("bfloat16", [False, True])
def test_orthogonalized_updates_have_singular_values_near_one(monkeypatch, bfloat16):
    monkeypatch.setattr("model.optim.has_bfloat16", lambda device: bfloat16)
    torch.manual_seed(0)
    for shape in [(40, 40), (40, 100), (3, 100, 40)]:
        G = torch.randn(shape)
        orthogonal = orthogonalize(G).float()
        values = torch.linalg.svdvals(orthogonal)
        assert values.min() > 0.6 and values.max() < 1.3
        U, _, Vh = torch.linalg.svd(G, full_matrices=False)
        nearest = U @ Vh
        similarity = torch.nn.functional.cosine_similarity(orthogonal.flatten(), nearest.flatten(), dim=0)
        assert similarity > 0.97


def test_orthogonalizing_is_the_published_iteration():
    """X <- a X + (b A + c A²) X with A = X Xᵀ, five times, in float64; also where a gradient has few directions."""
    torch.manual_seed(0)
    for G in (torch.randn(40, 100), torch.randn(100, 40), torch.randn(60, 5) @ torch.randn(5, 30)):
        X = G.double() / G.double().norm()
        for _ in range(5):
            A = X @ X.T
            X = 3.4445 * X + (-4.7750 * A + 2.0315 * A @ A) @ X
        torch.testing.assert_close(orthogonalize(G).double(), X, rtol=0, atol=1e-3)


def test_a_muon_step_written_out():
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(6, 4))
    before, optimizer, momentum = weight.detach().clone(), Muon([weight], lr=0.1, weight_decay=0.5), torch.zeros(6, 4)
    for step, gradient in enumerate(torch.randn(120, 6, 4)):
        weight.grad = gradient
        optimizer.step()
        beta = min(0.95, 0.85 + 0.001 * step)
        momentum = beta * momentum + (1 - beta) * gradient
        update = orthogonalize(((1 - beta) * gradient + beta * momentum)[None])[0]  # rounded as in a stack
        before = before * (1 - 0.1 * 0.5) - 0.1 * 0.2 * 6**0.5 * update
    torch.testing.assert_close(weight.detach(), before)


def test_muon_gets_the_matrices_of_the_blocks_and_adamw_the_rest():
    for use_moe in (False, True):
        model = make_model(use_moe=use_moe)
        muon, adamw = build_optimizers(model, "muon", 1e-3, 0.1)
        names = {id(p): name for name, p in model.named_parameters()}
        by_muon = {names[id(p)] for group in muon.param_groups for p in group["params"]}
        decayed, plain = ({names[id(p)] for p in group["params"]} for group in adamw.param_groups)
        assert by_muon == {n for n, p in model.named_parameters() if n.startswith("layers.") and p.dim() == 2}
        assert decayed == {"tok_embeddings.weight"} and plain == {n for n in names.values() if "norm" in n}
        (only,) = build_optimizers(model, "adamw", 1e-3, 0.1)
        assert sum(len(group["params"]) for group in only.param_groups) == len(names)


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_schedules(schedule):
    factors = [learning_rate_factor(step, 100, 10, schedule) for step in range(100)]
    assert factors[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(factors) == 1 and 0 < factors[-1] < (0.06 if schedule == "wsd" else 0.001)
    assert all(a >= b for a, b in zip(factors[10:], factors[11:], strict=False))
    middle = factors[54]  # half-way down
    assert middle == (1.0 if schedule == "wsd" else pytest.approx(0.5, abs=0.02))


def make_data(folder, tokenizer_dir):
    """A token file of 61 rows of 16, and a csv; flags for a very small model."""
    tokenizer = load_tokenizer(tokenizer_dir)
    documents = [[1, *ids, 2] for ids in encode_texts(tokenizer, [LINES[i % 6] * (i % 3 + 1) for i in range(40)])]
    tokens = np.array(sum(documents, []), dtype=np.uint16)
    tokens.tofile(folder / "tokens.bin")
    description = dict(dtype="uint16", tokens=len(tokens), tokenizer_sha256=tokenizer_hash(tokenizer_dir))
    (folder / "tokens.json").write_text(json.dumps(description))
    write_csv(folder / "sft.csv", [[json.dumps(h), q * n, a * n] for n in range(1, 8) for h, q, a in DIALOGUES])
    (folder / "val.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in LINES))
    return folder


@pytest.fixture
def data(tmp_path, tokenizer_dir):
    return make_data(tmp_path, tokenizer_dir)


def pretrain_flags(data, tokenizer_dir, out, *more) -> list[str]:
    flags = ["--data_path", data / "tokens.bin", "--tokenizer", tokenizer_dir, "--out_dir", out, "--max_seq_len", 32]
    flags += ["--model", "tiny", "--dim", 32, "--n_layers", 2, "--n_heads", 4, "--n_kv_heads", 2]
    flags += ["--log_interval", 1, "--warmup_steps", 3, "--device", "cpu", *more]
    return [str(flag) for flag in flags]


def rows_of(data) -> int:
    return -(-(json.loads((data / "tokens.json").read_text())["tokens"] - 1) // 31)


def train(script: str, flags: list) -> None:
    module = load_script(script)
    module.main(parse(module.Args, [str(flag) for flag in flags]))


def metrics(path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [line for line in lines if "loss" in line]


@pytest.mark.parametrize("moe", ["--no_use_moe", "--use_moe"])
def test_the_chain_from_tokens_to_a_chat_model(data, tokenizer_dir, tmp_path, moe):
    out = tmp_path / "out"
    suffix = "_moe" if moe == "--use_moe" else ""
    val = ["--val_path", data / "val.jsonl", "--max_steps", 12, "--save_interval", 1000, "--val_interval", 5]
    train("1-pretrain.py", pretrain_flags(data, tokenizer_dir, out, moe, *val))
    base = out / f"pretrain_32{suffix}.pth"
    losses = [line["loss"] for line in metrics(base.with_suffix(".metrics.jsonl"))]
    assert len(losses) == 12 and losses[-1] < losses[0] - 0.3
    lines = [json.loads(line) for line in base.with_suffix(".metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "bits_per_byte" in line] == [5, 10, 12]
    assert ("expert_load" in lines[0]) == bool(suffix)
    described = json.loads(base.with_suffix(".json").read_text())
    assert (described["stage"], described["step"]) == (f"pretrain_32{suffix}", 12)
    assert base.with_suffix(".png").read_bytes().startswith(b"\x89PNG")

    sft = ["--data_path", data / "sft.csv", "--out_dir", out, "--max_seq_len", 128, "--log_interval", 1, "--epochs", 4]
    train("3-full_sft.py", [*sft, "--stage", "single", "--batch_size", 4, "--val_path", data / "sft.csv"])
    single = out / "single_chat" / f"full_sft_32{suffix}.pth"
    losses = [line["loss"] for line in metrics(single.with_suffix(".metrics.jsonl"))]
    assert losses[-1] < losses[0]
    train("3-full_sft.py", [*sft, "--batch_size", 4])  # a history is there: multi, from the single-turn model
    multi = out / "multi_chat" / f"full_sft_32{suffix}.pth"
    first = metrics(multi.with_suffix(".metrics.jsonl"))[0]["loss"]
    assert abs(first - losses[-1]) < 0.5 and first < losses[0]
    model, tokenizer = load_model(multi)
    assert model.config.use_moe == bool(suffix) and len(tokenizer) == model.config.vocab_size


def losses_of(script: str, flags: list, weights) -> list[float]:
    train(script, flags)
    return [line["loss"] for line in metrics(weights.with_suffix(".metrics.jsonl"))]


def test_accumulated_micro_batches_are_one_batch(data, tokenizer_dir, tmp_path):
    """An epoch and a half: its short last group included."""
    results = {}
    for batch, accumulation in [(6, 1), (3, 2), (2, 3), (1, 6)]:
        out = tmp_path / f"out{batch}"
        flags = pretrain_flags(data, tokenizer_dir, out, "--batch_size", batch, "--accumulation_steps", accumulation)
        flags += ["--optimizer", "adamw", "--learning_rate", "1e-3", "--max_steps", "12"]
        results[batch] = losses_of("1-pretrain.py", flags, out / "pretrain_32.pth")
    assert len(results[6]) == 12
    for batch in (3, 2, 1):
        assert results[batch] == pytest.approx(results[6], abs=1e-5)


def test_every_row_is_trained_once_an_epoch(data, tokenizer_dir, tmp_path):
    out = tmp_path / "out"
    train("1-pretrain.py", pretrain_flags(data, tokenizer_dir, out, "--batch_size", 4, "--accumulation_steps", 3))
    lines = metrics(out / "pretrain_32.metrics.jsonl")
    total = json.loads((data / "tokens.json").read_text())["tokens"]
    rows = rows_of(data)
    assert lines[-1]["step"] == -(-rows // 12)
    assert lines[-1]["tokens"] == total + rows - 1  # rows overlap by one token
    assert lines[-1]["epoch"] == 1


def torchrun(*command: object, processes: int = 2) -> subprocess.CompletedProcess:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", processes]
    return subprocess.run(
        list(map(str, [*launcher, *command])),
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_two_processes_are_one_with_a_batch_twice_as_large(data, tokenizer_dir, tmp_path):
    common = ["--learning_rate", "1e-3", "--max_steps", "12", "--optimizer", "adamw"]
    flags = pretrain_flags(data, tokenizer_dir, tmp_path / "two", *common, "--batch_size", 3)
    done = torchrun("1-pretrain.py", *flags, "--val_path", data / "val.jsonl")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("2 processes") == 1  # one of them speaks
    flags = pretrain_flags(data, tokenizer_dir, tmp_path / "one", *common, "--batch_size", 6)
    one = losses_of("1-pretrain.py", [*flags, "--val_path", data / "val.jsonl"], tmp_path / "one" / "pretrain_32.pth")
    two = [line["loss"] for line in metrics(tmp_path / "two" / "pretrain_32.metrics.jsonl")]
    assert two == pytest.approx(one, abs=1e-5)
    last = [
        json.loads((tmp_path / n / "pretrain_32.metrics.jsonl").read_text().splitlines()[-1]) for n in ("one", "two")
    ]
    assert last[1]["bits_per_byte"] == pytest.approx(last[0]["bits_per_byte"], abs=1e-4)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--model", "gpt-5"], "no such preset"),
        (["--model", "minimind"], "train one with"),
        (["--data_path", "nowhere.bin"], "data_process.py pretrain"),
        (["--dim", "100"], "multiple"),
        (["--init_from", "nowhere.pth"], "nowhere.pth"),
        (["--max_step", "3"], "--max_steps"),
        (["--batch_size", "0"], "--batch_size is 0, but must be at least 1"),
        (["--learning_rate", "nan"], "--learning_rate"),
        (["--seed", "-1"], "--seed is -1"),
        (["--num_workers", "-1"], "--num_workers is -1"),
        (["--n_layers", "-1"], "n_layers is -1, but must be 1 or more"),
        (["--dropout", "1.5"], "dropout is 1.5"),
        (["--init_from", "weights.pth", "--dim", "64"], "--dim is settled by --init_from weights.pth"),
        (["--config=nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistakes_end_with_one_line_and_exit_code_2(flags, words, capsys, monkeypatch, tmp_path):
    from model import cli

    monkeypatch.chdir(tmp_path)
    module = load_script("1-pretrain.py")
    with pytest.raises(SystemExit) as stop:
        cli.run(module.main, module.Args, flags)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert words in error and "Traceback" not in error


def test_an_output_folder_that_cannot_be_made_is_a_users_mistake(data, tokenizer_dir, tmp_path):
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(UserError, match="cannot make the folder .*taken"):
        train("1-pretrain.py", pretrain_flags(data, tokenizer_dir, tmp_path / "taken", "--max_steps", 1))


def test_longer_rows_teach_a_longer_context(data, tokenizer_dir, tmp_path):
    out = tmp_path / "out"
    train("1-pretrain.py", pretrain_flags(data, tokenizer_dir, out, "--max_steps", 1))
    first = load_model(out / "pretrain_32.pth")[0].config.max_seq_len
    flags = ["--data_path", data / "tokens.bin", "--init_from", out / "pretrain_32.pth", "--max_steps", 1]
    train("1-pretrain.py", [*flags, "--out_dir", tmp_path / "more", "--max_seq_len", 2 * first])
    assert load_model(tmp_path / "more" / "pretrain_32.pth")[0].config.max_seq_len == 2 * first


@pytest.mark.parametrize(
    ("capabilities", "level", "expected"),
    [
        ({"amx_bf16": True}, "AVX512", torch.bfloat16),
        ({"avx512_bf16": True}, "AVX512", torch.bfloat16),
        ({"amx_bf16": True, "avx512_bf16": True}, "AVX2", torch.float32),  # PyTorch is told to do without
        ({"amx_bf16": False, "avx512_bf16": False}, "AVX512", torch.float32),
        ({}, "DEFAULT", torch.float32),  # another architecture
    ],
)
def test_auto_takes_bfloat16_on_a_cpu_only_where_it_is_fast(monkeypatch, capabilities, level, expected):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: level)
    assert pick_dtype("auto", torch.device("cpu")) == expected
    assert pick_dtype("float32", torch.device("cpu")) == torch.float32
    assert pick_dtype("auto", torch.device("mps")) == torch.float32


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_runs_follow_the_float32_one(data, tokenizer_dir, tmp_path, dtype):
    """The path that GPUs take (autocast, and for float16 a scaler), on the CPU."""
    losses = []
    for name in ("float32", dtype):
        out = tmp_path / name
        flags = pretrain_flags(data, tokenizer_dir, out, "--max_steps", 8, "--batch_size", 2, "--dtype", name)
        losses.append(losses_of("1-pretrain.py", flags, out / "pretrain_32.pth"))
    assert losses[1] == pytest.approx(losses[0], rel=0.02) and losses[1] != losses[0]
    assert all(value.dtype == torch.float32 for value in load_model(out / "pretrain_32.pth")[0].state_dict().values())
