"""Every benchmark runs, on the smallest of work: what it prints is about the right contestants. No time is judged.

One stands for the rest in every run; the others belong to `make test-all`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

QUESTION = "3 + 4 等于多少？,5,6,7,8,C"
SMALL_ROWS = ["--batch_size", "2", "--max_seq_len", "32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The texts and dialogues of dataset/sample, processed, and two questions."""
    folder = tmp_path_factory.mktemp("bench")
    sample = sorted((ROOT / "dataset" / "sample").glob("*.jsonl"))
    output_of(ROOT / "data_process.py", "--data_path", *sample, "--out_dir", folder)
    for split in ("dev", "val"):
        (folder / "ceval" / split).mkdir(parents=True)
        lines = ["question,A,B,C,D,answer", QUESTION, QUESTION.replace("3", "13")]
        (folder / "ceval" / split / f"arithmetic_{split}.csv").write_text("\n".join(lines), encoding="utf-8")
    return folder


def output_of(*command: object) -> str:
    one_thread = os.environ | {"OMP_NUM_THREADS": "1"}  # several would wait for each other beside other tests
    command = [sys.executable, *map(str, command)]
    done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", env=one_thread)
    assert done.returncode == 0, done.stderr
    return done.stdout


def bench(name: str, *flags: object) -> str:
    return output_of(ROOT / "tests" / "bench" / f"{name}.py", *flags)


def ratios(printed: str) -> list[float]:
    """All that is said to be so many times something."""
    return [float(found) for found in re.findall(r"([\d.]+) x\b", printed)]


@pytest.mark.slow
def test_decoding():
    sizes = ["--model", "tiny", "--prompt_tokens", 4, "--new_tokens", 6, "--streams", 2]
    printed = bench("decoding", *sizes, "--rounds", 1)
    names = [line.split("  ")[0] for line in printed.splitlines()]
    assert names[:4] == ["transformers.generate", "engine", "engine, int8", "engine, 2 streams"]
    assert ratios(printed)[0] == 1 and all(ratio > 0 for ratio in ratios(printed))


@pytest.mark.slow
def test_train_speed():
    printed = bench("train_speed", "--model", "tiny", *SMALL_ROWS, "--rounds", 1)
    assert re.findall(r"^(.*?)  .* tokens/s", printed, re.M) == ["transformers' Llama", "ours", "ours, Muon"]
    assert len(ratios(printed)) == 6 and ratios(printed)[:2] == [1, 1]  # time and memory of each


@pytest.mark.slow
def test_presets():
    sizes = ["--models", "tiny", "--batch_size", 1, "--max_seq_len", 96, "--new_tokens", 4]
    printed = bench("presets", *sizes, "--steps", 2)
    assert "6,065,408" in printed


@pytest.mark.slow
def test_sft_packing(folder):
    data = folder / "sft_data_single.csv"
    printed = bench("sft_packing", "--data_path", data, "--model", "tiny", *SMALL_ROWS, "--rounds", 1)
    assert ratios(printed)


def test_ceval_batches(folder):
    printed = bench("ceval_batches", "--data_dir", folder / "ceval", "--shots", 1, "--batch_size", 2, "--rounds", 1)
    assert printed.startswith("2 questions, 1 shots")
    assert printed.count("2 same answers") == 2


@pytest.mark.slow
def test_data_speed():
    printed = bench("data_speed", ROOT / "dataset" / "sample" / "pretrain.jsonl", "--rounds", 1)
    assert printed.splitlines()[-1] == f"median {ratios(printed)[0]:.2f} x"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_data_memory():
    printed = bench("data_memory", "--megabytes", 1)
    assert "1 x: " in printed and "4 x: " in printed and "anonymous memory" in printed


@pytest.mark.slow
def test_serving():
    printed = bench("serving", "--preset", "tiny", "--tokens", 4, "--streams", 2, "--requests", 6, "--clients", 2)
    assert "the server ended with exit code 0" in printed


@pytest.mark.slow
def test_plan_errors(folder):
    data = ["--pretrain_data", folder / "pretrain_data.bin", "--sft_data", folder / "sft_data_single.csv"]
    assert "minimind-small-T" in bench("plan_errors", *data, "--steps", 3)


@pytest.mark.slow
def test_time_to_loss(folder):
    texts = folder / "val.jsonl"
    texts.write_text('{"text": "春眠不觉晓，处处闻啼鸟。"}\n', encoding="utf-8")
    flags = ["--data_path", folder / "pretrain_data.bin", "--val_path", texts, "--output", folder / "ledger.jsonl"]
    flags += ["--max_seq_len", 16, "--sweep_tokens", 256, "--tokens", 512, "--rates", "1e-3", "--shares", 0.5]
    printed = bench("time_to_loss", *flags)
    assert "0.50 x the tokens" in printed
    assert bench("time_to_loss", *flags).splitlines()[-1] == printed.splitlines()[-1]  # from the ledger
