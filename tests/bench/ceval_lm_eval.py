"""Does lm_eval, which shares no code with us, find the same answers as eval_ceval.py?

    pip install lm_eval==0.4.13
    python export_model.py --format llama --checkpoint out/full_sft_512.pth --output export/llama
    python eval_ceval.py --checkpoint out/full_sft_512.pth --prompt_style plain --max_seq_len 4096
    python tests/bench/ceval_lm_eval.py ceval_result/full_sft_512_plain export/llama

The first folder holds the results of eval_ceval.py in the plain style without examples, with room for every question;
the second one is read by transformers alone. Ends with 1 where a prediction differs.
"""

import csv
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))

from model.cli import UserError, run  # noqa: E402


@dataclass
class Args:
    results: tyro.conf.Positional[str]  # folder of eval_ceval.py's results
    folder: tyro.conf.Positional[str]  # exported Llama folder of the same model
    batch_size: int = 16  # of lm_eval


def main(args: Args) -> None:
    rows = read_rows(Path(args.results))
    with tempfile.TemporaryDirectory() as scratch:
        questions = Path(scratch) / "questions.jsonl"
        questions.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        samples = evaluate(args, questions)
    judged = {sample["doc"]["number"]: likelihoods(sample) for sample in samples}
    theirs = ["ABCD"[judged[row["number"]].index(max(judged[row["number"]]))] for row in rows]
    same = sum(row["prediction"] == letter for row, letter in zip(rows, theirs, strict=True))
    right = sum(row["answer"] == letter for row, letter in zip(rows, theirs, strict=True))
    print(f"lm_eval: {right} of {len(rows)} right; {same} of {len(rows)} predictions are the same")
    for row, letter in zip(rows, theirs, strict=True):
        if row["prediction"] != letter:
            ours = [row[f"p_{one}"] for one in "ABCD"]
            print(f"  {row['subject']}, {row['question'][:30]}…: {letter} instead of {row['prediction']}, p = {ours}")
    sys.exit(same < len(rows))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The questions and answers in the csv files, numbered."""
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    if summary["prompt_style"] != "plain" or summary["shots"] or summary["shortened"]:
        raise UserError(f"{folder} must be of --prompt_style plain, --shots 0, and no prompt shortened (--max_seq_len)")
    rows: list[dict[str, Any]] = []
    for subject in summary["subjects"]:
        with open(folder / f"{subject}.csv", encoding="utf-8", newline="") as file:
            rows += [row | {"subject": subject} for row in csv.DictReader(file)]
    return [row | {"number": number} for number, row in enumerate(rows)]


def evaluate(args: Args, questions: Path) -> list[dict[str, Any]]:
    import lm_eval

    from model.choices import INSTRUCTION

    task = {
        "task": "questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(questions)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "description": f"<s>{INSTRUCTION}\n\n",
        "doc_to_text": "{{question}}\nA. {{A}}\nB. {{B}}\nC. {{C}}\nD. {{D}}\n答案：",
        "doc_to_choice": ["A", "B", "C", "D"],
        "doc_to_target": "{{['A', 'B', 'C', 'D'].index(answer)}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    settings = dict(pretrained=args.folder, dtype="float32", max_length=4096)
    result = lm_eval.simple_evaluate(
        model="hf", model_args=settings, tasks=[task], batch_size=args.batch_size, device="cpu", log_samples=True
    )
    return result["samples"]["questions"]


def likelihoods(sample: dict[str, Any]) -> list[float]:
    return [float(response[0]) for response in sample["filtered_resps"]]


if __name__ == "__main__":
    run(main, Args)
