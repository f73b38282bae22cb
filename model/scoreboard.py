"""Right and wrong answers -> a summary: by subject, by category, in total, as JSON, Markdown and a picture."""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from math import sqrt
from pathlib import Path
from typing import Any

CHANCE = 0.25  # of four options
LETTERS = "ABCD"

CATEGORIES = {  # C-Eval's own (Huang et al. 2023, table of subjects)
    "STEM": """advanced_mathematics college_chemistry college_physics college_programming computer_architecture
        computer_network discrete_mathematics electrical_engineer high_school_biology high_school_chemistry
        high_school_mathematics high_school_physics metrology_engineer middle_school_biology middle_school_chemistry
        middle_school_mathematics middle_school_physics operating_system probability_and_statistics
        veterinary_medicine""",
    "Social sciences": """business_administration college_economics education_science high_school_geography
        high_school_politics mao_zedong_thought marxism middle_school_geography middle_school_politics
        teacher_qualification""",
    "Humanities": """art_studies chinese_language_and_literature high_school_chinese high_school_history
        ideological_and_moral_cultivation law legal_professional logic middle_school_history modern_chinese_history
        professional_tour_guide""",
    "Other": """accountant basic_medicine civil_servant clinical_medicine environmental_impact_assessment_engineer
        fire_engineer physician plant_protection sports_science tax_accountant urban_and_rural_planner""",
}
CATEGORY_OF = {subject: name for name, subjects in CATEGORIES.items() for subject in subjects.split()}
NO_CATEGORY = "Uncategorised"

Marks = Sequence[tuple[str, str]]  # of each question, the right letter and the chosen one


def wilson_interval(correct: int, questions: int, z: float = 1.96) -> tuple[float, float]:
    """Between which shares the true one lies with 95 % confidence (Wilson 1927)."""
    share = correct / questions
    middle = share + z * z / (2 * questions)
    half = z * sqrt(share * (1 - share) / questions + z * z / (4 * questions**2))
    scale = 1 + z * z / questions
    return min(share, (middle - half) / scale), max(share, (middle + half) / scale)  # rounding aside, they enclose it


def score(marks: Marks, letter: str) -> dict[str, Any]:
    """Figures of a group of questions, beside those of always answering `letter`."""
    correct = sum(right == chosen for right, chosen in marks)
    always = sum(right == letter for right, _ in marks)
    return {
        "questions": len(marks),
        "correct": correct,
        "accuracy": correct / len(marks),
        "interval_95": wilson_interval(correct, len(marks)),
        "always_same_letter": always / len(marks),
    }


def most_common_letter(marks: Iterable[tuple[str, str]]) -> str:
    """The first in the alphabet where several are as common."""
    counts = Counter(right for right, _ in marks)
    return min(counts, key=lambda letter: (-counts[letter], letter))


def summarize(marks_of: dict[str, Marks]) -> dict[str, Any]:
    """Subject -> marks, as the figures of all of them, of the categories, and of each subject."""
    everything = [mark for marks in marks_of.values() for mark in marks]
    letter = most_common_letter(everything)
    categories: dict[str, list[tuple[str, str]]] = {name: [] for name in (*CATEGORIES, NO_CATEGORY)}
    for subject, marks in marks_of.items():
        categories[CATEGORY_OF.get(subject, NO_CATEGORY)] += marks
    subjects = {subject: score(marks, letter) for subject, marks in marks_of.items()}
    return {
        "total": score(everything, letter),
        "mean_of_subjects": sum(figures["accuracy"] for figures in subjects.values()) / len(subjects),
        "chance": CHANCE,
        "most_common_letter": letter,
        "chosen": {option: sum(chosen == option for _, chosen in everything) for option in LETTERS},
        "categories": {name: score(marks, letter) for name, marks in categories.items() if marks},
        "subjects": subjects,
    }


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def row(name: str, figures: dict[str, Any]) -> str:
    low, high = figures["interval_95"]
    return (
        f"| {name} | {figures['questions']} | {figures['correct']} | {percent(figures['accuracy'])} "
        f"| {100 * low:.1f} – {100 * high:.1f} % | {percent(figures['always_same_letter'])} |"
    )


def by_category(subjects: Iterable[str]) -> list[str]:
    """Subjects in the order of their categories, then of their names."""
    order = [*CATEGORIES, NO_CATEGORY]
    return sorted(subjects, key=lambda subject: (order.index(CATEGORY_OF.get(subject, NO_CATEGORY)), subject))


def markdown(summary: dict[str, Any]) -> str:
    """The summary of one model for people."""
    letter = summary["most_common_letter"]
    head = [f"| | questions | right | accuracy | 95 % interval | always {letter} |", "|---|--:|--:|--:|--:|--:|"]
    chance = f"| *chance* | | | *{percent(CHANCE)}* | | |"
    return "\n".join(
        [
            f"# {summary['model']}",
            "",
            f"{summary['checkpoint']}{summary['lora'] and ' with '}{summary['lora']}, "
            f"{summary['prompt_style']} style, {summary['shots']} shots, {summary['data_dir']} ({summary['split']}).",
            f"Mean of the subjects: {percent(summary['mean_of_subjects'])}. "
            f"It chose {', '.join(f'{letter} {count} times' for letter, count in summary['chosen'].items())}, "
            f"and says a letter at all with probability {summary['any_letter']:.3f}.",
            "",
            *head,
            row("**total**", summary["total"]),
            *(row(f"**{name}**", figures) for name, figures in summary["categories"].items()),
            chance,
            *(row(subject, summary["subjects"][subject]) for subject in by_category(summary["subjects"])),
            "",
        ]
    )


def comparison(summaries: Sequence[dict[str, Any]]) -> str:
    """Several models side by side, a line a category and a subject."""
    names = [summary["model"] for summary in summaries]
    first = summaries[0]

    def line(title: str, cells: Iterable[str]) -> str:
        return f"| {title} | {' | '.join(cells)} |"

    def with_interval(figures: dict[str, Any]) -> str:
        low, high = figures["interval_95"]
        return f"{percent(figures['accuracy'])} ({100 * low:.1f} – {100 * high:.1f})"

    letter, always = first["most_common_letter"], percent(first["total"]["always_same_letter"])
    return "\n".join(
        [
            line("", names),
            "|---|" + "--:|" * len(names),
            line("setting", (f"{summary['prompt_style']}, {summary['shots']} shots" for summary in summaries)),
            line("**total**", (with_interval(summary["total"]) for summary in summaries)),
            *(
                line(f"**{category}**", (with_interval(summary["categories"][category]) for summary in summaries))
                for category in first["categories"]
            ),
            line("*chance*", [percent(CHANCE)] * len(names)),
            line(f"*always {letter}*", [always] * len(names)),
            *(
                line(subject, (percent(summary["subjects"][subject]["accuracy"]) for summary in summaries))
                for subject in by_category(first["subjects"])
            ),
            "",
        ]
    )


def draw(summaries: Sequence[dict[str, Any]], picture: Path) -> None:
    """Bars of the total, the categories and, of a single model, the subjects; lines at chance and always one letter."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    first = summaries[0]
    groups = ["total", *first["categories"]]
    subjects = by_category(first["subjects"]) if len(summaries) == 1 else []
    places = range(len(groups) + len(subjects))
    thickness = 0.8 / len(summaries)
    height = 1.6 + 0.2 * len(places) * max(1, len(summaries) / 2)
    figure, axes = plt.subplots(figsize=(8, height), layout="constrained")
    for number, summary in enumerate(summaries):
        figures = [summary["total"], *summary["categories"].values(), *(summary["subjects"][s] for s in subjects)]
        shift = (number - (len(summaries) - 1) / 2) * thickness
        colour = bar_colours(groups, subjects) if subjects else f"C{number}"
        bars(axes, [place + shift for place in places], figures, thickness, color=colour, label=summary["model"])
    axes.axvline(100 * CHANCE, color="black", lw=1, ls="--", label=f"chance, {100 * CHANCE:.0f} %")
    always = 100 * first["total"]["always_same_letter"]
    axes.axvline(always, color="0.5", lw=1, ls=":", label=f"always {first['most_common_letter']}")
    axes.set_yticks(places, [*groups, *subjects], fontsize=8)
    axes.set(xlabel="right answers in %, with 95 % intervals", xlim=(0, 100), ylim=(len(places) - 0.4, -0.6))
    axes.legend(fontsize=8, loc="lower right")
    temporary = picture.with_name(f".{picture.name}.tmp")
    figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)
    os.replace(temporary, picture)


def bar_colours(groups: Sequence[str], subjects: Sequence[str]) -> list[str]:
    """A category and its subjects have one colour."""
    colours = {name: f"C{number}" for number, name in enumerate((*CATEGORIES, NO_CATEGORY))} | {"total": "0.3"}
    return [colours[name] for name in (*groups, *(CATEGORY_OF.get(subject, NO_CATEGORY) for subject in subjects))]


def bars(axes: Any, places: Sequence[float], figures: Sequence[dict[str, Any]], thickness: float, **style: Any) -> None:
    """Accuracies in percent, with their intervals as whiskers."""
    shares = [100 * one["accuracy"] for one in figures]
    below = [100 * (one["accuracy"] - one["interval_95"][0]) for one in figures]
    above = [100 * (one["interval_95"][1] - one["accuracy"]) for one in figures]
    whiskers = dict(lw=0.6, ecolor="0.35")
    axes.barh(places, shares, xerr=[below, above], height=thickness * 0.9, error_kw=whiskers, **style)
