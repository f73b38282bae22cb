"""C-Eval: multiple-choice questions of 52 subjects. Four options, so chance is 25 %.

    python eval_ceval.py                                                   # the newest chat model
    python eval_ceval.py --checkpoint out/pretrain_512.pth --prompt_style plain
    python eval_ceval.py --shots 5                                         # after five worked examples
    python eval_ceval.py --compare ceval_result/full_sft_512 ceval_result/dpo_512
    python eval_ceval.py --data_dir cmmlu --split test                     # other questions of that layout

The model's answer is the most probable of the tokens A, B, C and D; nothing is sampled, so the same model gives the
same result. The questions: unpack ceval-exam.zip of https://huggingface.co/datasets/ceval/ceval-exam to dataset/ceval.
What comes out, in ceval_result/MODEL/: a csv a subject, summary.json, summary.md and chart.png.
"""

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from model.cli import UserError, run
from model.options import ModelOptions

if TYPE_CHECKING:
    from model.choices import Guess, Prompt, Question
    from model.engine import Engine

SHORTEST = 32  # tokens of a prompt that may be asked for


@dataclass
class Args(ModelOptions):
    """Measure a model on multiple-choice questions, or compare models that were."""

    data_dir: str = "dataset/ceval"  # folder with dev/*.csv (examples) and val/*.csv
    split: str = "val"  # folder of the questions in data_dir
    shots: int = 0  # worked examples before each question
    prompt_style: Literal["chat", "plain"] = "chat"  # chat: as a user asks; plain: one text, for base models
    max_seq_len: int = 0  # longest prompt in tokens; 0: the context the model was trained with
    result_dir: str = "ceval_result"  # where the results go, in a folder of the model's name
    name: str = ""  # that folder's name; empty: the checkpoint's, with adapter, style and shots where they matter
    compare: list[str] = field(default_factory=list)  # folders of results to put side by side; nothing is measured
    batch_size: int = 8  # questions scored at once
    # float32, so that every machine finds the same: rounded, an answer in hundreds is another one.
    dtype: Literal["float32", "bfloat16"] = "float32"  # of matrix products; bfloat16 is faster where hardware has it


def main(args: Args) -> None:
    from model.choices import find_subjects
    from model.engine import load_engine

    for name, least in {"shots": 0, "batch_size": 1, "max_seq_len": 0}.items():
        if getattr(args, name) < least:
            raise UserError(f"{name} is {getattr(args, name)}, but must be {least} or more")
    if 0 < args.max_seq_len < SHORTEST:
        raise UserError(f"max_seq_len is {args.max_seq_len}: no question fits in fewer than {SHORTEST} tokens")
    if args.compare:
        compare(args)
        return
    subjects = find_subjects(args.data_dir, args.split)
    with load_engine(args, stages=("full_sft", "dpo")) as engine:
        measure(args, engine, subjects)


def measure(args: Args, engine: "Engine", subjects: dict[str, Path]) -> None:
    """Writes and prints the results of each subject, then those of all."""
    import torch
    from tqdm import tqdm

    from model.choices import guess
    from model.records import Account

    halves = torch.autocast(engine.model.device.type, torch.bfloat16, enabled=args.dtype == "bfloat16")
    context = args.max_seq_len or engine.context
    folder = result_folder(args, engine.path)
    results: dict[str, list[tuple[Question, Prompt, Guess]]] = {}
    account = Account()
    bar = tqdm(subjects.items(), unit="subject", disable=not sys.stderr.isatty())
    for subject, path in bar:
        questions, prompts = prompts_of(args, engine.tokenizer, subject, path, context, account)
        if questions:
            with halves:
                guesses = guess(engine.model, prompts, args.batch_size)
            results[subject] = list(zip(questions, prompts, guesses, strict=True))
            write_csv(folder / f"{subject}.csv", results[subject])
            right = sum(question.answer == one.letter for question, _, one in results[subject])
            tqdm.write(f"{subject:<42} {right:>4} of {len(questions):>4}  {right / len(questions):7.2%}", sys.stdout)
    report(args, folder, engine.path, results, account)


def result_folder(args: Args, checkpoint: Path) -> Path:
    """Made if need be; refused where it holds the results of another model, or of other questions."""
    name = args.name or checkpoint.absolute().name.removesuffix(".pth")
    if not args.name:
        name += f"_{Path(args.lora).name}" if args.lora else ""
        name += "_plain" * (args.prompt_style == "plain") + f"_{args.shots}shot" * (args.shots > 0)
    folder = Path(args.result_dir) / name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the folder {folder}: {error.strerror}") from error
    if (folder / "summary.json").is_file():
        other = read_summary(folder)
        differing = [name for name, value in settings_of(args, checkpoint).items() if other.get(name, value) != value]
        if differing:
            models = " with ".join(filter(None, (other["checkpoint"], other["lora"])))
            others = ", ".join(f"{name} {'none' if other[name] in (None, '') else other[name]}" for name in differing)
            raise UserError(f"{folder} holds other results, of {models}: {others}; choose another name with --name")
    return folder


def settings_of(args: Args, checkpoint: Path) -> dict[str, Any]:
    """What is measured, and on what, for the summary."""
    names = ("lora", "lora_scale", "quantize", "rope_scaling", "rope_theta", "n_heads")
    names += ("data_dir", "split", "shots", "prompt_style", "max_seq_len", "dtype")
    return {"checkpoint": str(checkpoint), **{name: getattr(args, name) for name in names}}


def prompts_of(
    args: Args, tokenizer: Any, subject: str, path: Path, context: int, account: Any
) -> tuple[list["Question"], list["Prompt"]]:
    """The questions of a subject, and what the model is shown of each."""
    from model.choices import make_prompt, read_questions

    questions = read_questions(path, account)
    examples: list[Question] = []
    if args.shots:
        dev = Path(args.data_dir) / "dev"
        files = [file for file in (dev / f"{subject}_dev.csv", dev / f"{subject}.csv") if file.is_file()]
        if not files:
            raise UserError(f"no worked examples for {subject} in {dev}: leave --shots out")
        examples = read_questions(files[0], account)[: args.shots]
        if len(examples) < args.shots:
            raise UserError(f"{files[0]} holds only {len(examples)} worked examples, fewer than --shots {args.shots}")
    return questions, [make_prompt(tokenizer, one, examples, args.prompt_style, context) for one in questions]


def write_csv(path: Path, rows: list[tuple["Question", "Prompt", "Guess"]]) -> None:
    import pandas as pd

    from model.choices import LETTERS

    table = pd.DataFrame(
        {
            "question": question.text,
            **dict(zip(LETTERS, question.options, strict=True)),
            "answer": question.answer,
            "prediction": guess.letter,
            "correct": question.answer == guess.letter,
            **{f"p_{letter}": p for letter, p in zip(LETTERS, guess.probabilities, strict=True)},
            "p_any_letter": guess.any_letter,
        }
        for question, _, guess in rows
    )
    write(path, table.to_csv(index=False, float_format="%.6g", lineterminator="\n"))


def report(args: Args, folder: Path, checkpoint: Path, results: dict[str, list], account: Any) -> None:
    """Writes the summary and prints what a reader wants to know first."""
    from model.checkpoint import weights_hash, write_json
    from model.scoreboard import draw, markdown, percent, summarize

    for line in account.lines():
        print(line, file=sys.stderr)
    if not results:
        raise UserError(f"{args.data_dir} holds no question that could be read")
    rows = [row for rows in results.values() for row in rows]
    summary = {
        "model": folder.name,
        **settings_of(args, checkpoint),
        "weights_sha256": weights_hash(checkpoint),
        "shortened": sum(prompt.cut > 0 or prompt.shots < args.shots for _, prompt, _ in rows),
        "skipped": account.bad.total(),
        "any_letter": sum(guess.any_letter for *_, guess in rows) / len(rows),
        **summarize({subject: [(q.answer, g.letter) for q, _, g in part] for subject, part in results.items()}),
    }
    write_json(folder / "summary.json", summary)
    write(folder / "summary.md", markdown(summary))
    draw([summary], folder / "chart.png")
    total = summary["total"]
    low, high = total["interval_95"]
    for name, figures in summary["categories"].items():
        print(f"{name:<42} {figures['correct']:>4} of {figures['questions']:>4}  {figures['accuracy']:7.2%}")
    print(
        f"total: {total['correct']} of {total['questions']}, {percent(total['accuracy'])} "
        f"(95 % interval {100 * low:.1f} to {100 * high:.1f}); chance 25 %, "
        f"always {summary['most_common_letter']} {percent(total['always_same_letter'])}"
    )
    if summary["shortened"]:
        print(f"{summary['shortened']} prompts were longer than the context: they lost examples or their beginning")
    print(f"{folder}/: summary.md, summary.json, chart.png and a csv a subject")


def compare(args: Args) -> None:
    """Several models side by side, printed and written to result_dir/comparison.md and .png."""
    from model.scoreboard import comparison, draw

    summaries = [read_summary(Path(folder)) for folder in args.compare]
    asked = [{name: one["questions"] for name, one in summary["subjects"].items()} for summary in summaries]
    for folder, questions in zip(args.compare, asked, strict=True):
        if questions != asked[0]:
            raise UserError(f"{folder} and {args.compare[0]} were not measured on the same questions")
    table = comparison(summaries)
    folder = Path(args.result_dir)
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / "comparison.md", table)
    draw(summaries, folder / "comparison.png")
    print(table)
    print(f"{folder}/: comparison.md, comparison.png")


def read_summary(folder: Path) -> dict[str, Any]:
    file = folder / "summary.json"
    try:
        summary = json.loads(file.read_text(encoding="utf-8"))
        if not {"model", "checkpoint", "lora", "total", "categories", "subjects"} <= set(summary):
            raise ValueError("something is missing")
    except OSError as error:
        raise UserError(f"no results in {folder}: there is no {file} that can be read") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{file} is no summary of this script: {error}") from error
    return summary


def write(path: Path, text: str) -> None:
    temporary = path.with_name(f"{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


if __name__ == "__main__":
    run(main, Args)
