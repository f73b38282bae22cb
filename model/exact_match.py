"""Questions with known answers: is an answer right, and how many are?

An answer is right if it names an accepted form of what was asked for, and nothing else that could have been the answer.
"""

import json
import re
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from .cli import UserError

if TYPE_CHECKING:  # torch takes seconds to import, and to judge an answer needs none
    from .engine import Engine
    from .sampling import Sampling

KINDS = {
    "single": "one question",
    "multi": "a question and a follow-up",
    "builtin": "built-in questions",
    "unknown": "what it cannot know",
}
EVASION = "“don't know” to what it could know"


@dataclass
class Case:
    kind: str  # of KINDS
    relation: str  # whose other answers must not occur; empty: none
    about: str  # what the last question is about
    questions: list[str]  # turns of a conversation; the answer to the last one counts
    accept: list[list[str]]  # a right answer has a form of each group
    answer: str = ""
    right: bool = False
    dont_know: bool = False


def read_test(path: str | Path) -> tuple[list[Case], dict[str, list[str]], list[str]]:
    """Cases, the forms of all answers of each relation, and what shows that an answer admits ignorance."""
    with reading(path, "a test as dataset/make_sample.py writes it") as test:
        answers = {name: [form for forms in groups for form in forms] for name, groups in test["answers"].items()}
        return [Case(**case) for case in test["cases"]], answers, test["dont_know"]


def read_results(path: str | Path) -> list[Case]:
    """The cases of an earlier test, with their answers, from what 2-eval.py wrote."""
    with reading(path, "the --output of an earlier test") as results:
        return [Case(**case) for case in results["answers"]]


@contextmanager
def reading(path: str | Path, wanted: str) -> Iterator[Any]:
    """A JSON file's content, while it is taken apart. Raises UserError where it is not what is wanted."""
    try:
        yield json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is not {wanted}: {error}") from error


def run_test(engine: "Engine", sampling: "Sampling", path: str | Path) -> list[Case]:
    """Asks all questions, as many at a time as the engine takes, and judges the answers."""
    cases, answers, dont_know = read_test(path)

    def ask(case: Case) -> None:
        messages = []
        for question in case.questions:
            messages.append({"role": "user", "content": question})
            answer = engine.chat(messages, sampling)
            list(answer)  # waits for its end
            messages.append({"role": "assistant", "content": answer.text})
        case.answer = answer.text
        case.dont_know = any(words in case.answer for words in dont_know)
        case.right = is_right(case.answer, case.about, case.accept, answers.get(case.relation, ()))

    with ThreadPoolExecutor(engine.max_batch) as pool:
        list(tqdm(pool.map(ask, cases), "asking", len(cases), unit="question"))
    return cases


def is_right(answer: str, about: str, accept: Sequence[Sequence[str]], others: Sequence[str] = ()) -> bool:
    """Whether an answer has a form of each group of `accept`, and nothing of `others`.

    The thing asked about is taken out first: 法国的首都是巴黎 names 巴黎 only. Then the longest forms are looked for
    first, and each that is found is taken out, so that 非金属 does not count as 金属. Latin letters and digits
    count as whole words: 18 is not 8. What belongs to an accepted form as well as to another answer is accepted.
    """
    text = answer.replace(about, " ") if about else answer
    accepted = {form: group for group, forms in enumerate(accept) for form in forms}
    missing = set(range(len(accept)))
    # Of forms as long as one another that overlap in the text, such as 体温 and 温度 in 体温度, a wrong one counts.
    for form in sorted({*accepted, *others}, key=lambda form: (-len(form), form in accepted, form)):
        text, found = re.subn(whole(form), " ", text)
        if found and form not in accepted:
            return False
        if found:
            missing.discard(accepted[form])
    return not missing


def whole(form: str) -> str:
    """Pattern of a form that does not start or end within a word of Latin letters or a number."""
    before = r"(?<![A-Za-z0-9])" if re.match(r"[A-Za-z0-9]", form) else ""
    after = r"(?![A-Za-z0-9])" if re.search(r"[A-Za-z0-9]$", form) else ""
    return before + re.escape(form) + after


def scores(cases: Sequence[Case]) -> dict[str, tuple[int, int]]:
    """By kind, how many answers are right, and of how many."""
    table = {}
    for kind, name in KINDS.items():
        if of_kind := [case for case in cases if case.kind == kind]:
            table[name] = sum(case.right for case in of_kind), len(of_kind)
    if known := [case for case in cases if case.kind == "single"]:
        table[EVASION] = sum(case.dont_know for case in known), len(known)
    return table


def report(cases: Sequence[Case], before: Sequence[Case] = ()) -> str:
    """The built-in questions with their answers, then the scores, beside those of an earlier test."""
    lines = []
    for case in cases:
        if case.kind == "builtin":
            lines.append(f"{'✓' if case.right else '✗'} {case.questions[-1]}\n  {case.answer}")
    earlier = scores(before)
    lines.append("")
    for name, (right, all_of_them) in scores(cases).items():
        first = f"{earlier[name][0] / earlier[name][1]:7.1%} -> " if name in earlier else ""
        lines.append(f"{name:<36}{first}{right / all_of_them:7.1%}  ({right} of {all_of_them})")
    return "\n".join(lines)


def as_json(cases: Sequence[Case]) -> list[dict]:
    return [asdict(case) for case in cases]
