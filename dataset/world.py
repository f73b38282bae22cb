"""Tables and wordings of the small world, read and checked."""

import csv
import itertools
import random
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

MOST_NAMES = 400  # made-up names of a table
TEST_NAMES = 0.4  # share of them that only the test has


@dataclass
class Relation:
    """Between a thing and an answer: how it is told, asked, asked for without naming the thing, and answered."""

    name: str
    about: str  # table and column of the things
    facts: dict[str, list[str]]  # thing -> forms of the right answer, the one to say first
    tells: list[str]
    asks: list[str]
    replies: list[str]
    follows: list[str] = field(default_factory=list)
    test_asks: list[str] = field(default_factory=list)
    test_follows: list[str] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)  # made-up things
    test_unknown: list[str] = field(default_factory=list)

    @property
    def answers(self) -> list[list[str]]:
        """All different ones, each with its forms."""
        return [list(forms) for forms in dict.fromkeys(tuple(forms) for forms in self.facts.values())]


@dataclass
class Single:
    """A question with an answer of its own."""

    name: str
    accept: list[list[str]]  # a right answer has a form of each group
    tells: list[str]
    asks: list[str]
    replies: list[str]
    builtin: str = ""  # the question of 2-eval.py that it prepares for


@dataclass
class World:
    relations: list[Relation]
    singles: list[Single]
    outside: list[str]  # questions about what lies outside it
    test_outside: list[str]
    outside_replies: list[str]
    unknown_replies: list[str]  # about a made-up thing {x}
    dont_know: list[str]  # what shows that an answer admits ignorance
    same_question: list[str]  # the same question about another thing {x}
    test_same_question: list[str]
    frames: dict[str, list[str]]  # how questions come along: around, first, blank

    @property
    def num_facts(self) -> int:
        """Without arithmetic, which is worked out and not written down."""
        in_tables = sum(len(relation.facts) for relation in self.relations if relation.about != "arithmetic.sum")
        return in_tables + len(self.singles)

    def groups(self) -> Iterator[list[Relation]]:
        """Relations of the same things together."""
        ordered = sorted(self.relations, key=lambda relation: relation.about)
        for _, group in itertools.groupby(ordered, key=lambda relation: relation.about):
            yield list(group)


def load_world(folder: Path, share: float = 1.0) -> World:
    """The world, or of each table and of the single questions only so large a share, from the top.

    Raises ValueError for wordings that do not fit their table.
    """
    tables = {path.stem: read_table(path) for path in sorted(folder.glob("*.csv"))}
    tables["arithmetic"] = arithmetic()
    main_columns = {name: next(iter(rows[0])) for name, rows in tables.items()}  # the first: what a row is about
    tables = {name: rows[: round(share * len(rows))] for name, rows in tables.items()}
    files = {path.stem: yaml.safe_load(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.yaml"))}
    test, outside, follow = files.pop("test", {}), files.pop("outside"), files.pop("follow")
    frames = files.pop("frames")
    singles = [Single(name, **entry) for name, entry in files.pop("singles").items()]
    real = {form for rows in tables.values() for row in rows for cell in row.values() for form in cell.split("|")}
    unknown = {
        table: split_names(entry, real)
        for name in list(files)
        if name.startswith("unknown")
        for table, entry in files.pop(name).items()
    }
    relations = []
    for entries in files.values():
        for name, entry in entries.items():
            relation = make_relation(name, entry, tables, test.get(name, {}))
            if entry["about"] == main_columns[entry["table"]]:  # made-up names are of things in column one
                relation.unknown, relation.test_unknown = unknown.get(entry["table"], ([], []))
            if len(relation.facts) > 1:  # of a small share of a table there may be none
                relations.append(relation)
    return World(
        relations,
        singles[: round(share * len(singles))],
        outside=outside["train"],
        test_outside=outside["test"],
        outside_replies=outside["replies"],
        unknown_replies=outside["unknown_replies"],
        dont_know=outside["dont_know"],
        same_question=follow["train"],
        test_same_question=follow["test"],
        frames=frames,
    )


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def arithmetic() -> list[dict[str, str]]:
    """Sums and differences up to 10 and the multiplication table, as a table of facts."""
    small = range(1, 10)
    rows = [(f"{a}加{b}", a + b) for a in small for b in small if a + b <= 10]
    rows += [(f"{a}减{b}", a - b) for a in small for b in small if a >= b]
    rows += [(f"{a}乘{b}", a * b) for a in small for b in small if a <= b]
    return [{"sum": text, "result": str(result)} for text, result in rows]


def make_relation(name: str, entry: dict[str, Any], tables: dict, test: dict[str, list[str]]) -> Relation:
    facts: dict[str, list[str]] = {}
    for row in tables[entry["table"]]:
        thing, answer = row[entry["about"]].split("|")[0], row[entry["answer"]]
        if thing and answer:
            if thing in facts:
                raise ValueError(f"{name}: {thing} is there twice")
            facts[thing] = answer.split("|")
    wordings = {key: entry.get(key, []) for key in ("tells", "asks", "replies", "follows")}
    for key, places in {"tells": "{x}{y}", "asks": "{x}", "replies": "{y}", "follows": ""}.items():
        for wording in wordings[key]:
            if any(place not in wording for place in ("{x}", "{y}") if place in places):
                raise ValueError(f"{name}: {wording!r} of {key} must have {places}")
    about = f"{entry['table']}.{entry['about']}"
    return Relation(
        name, about, facts, **wordings, test_asks=test.get("asks", []), test_follows=test.get("follows", [])
    )


def split_names(entry: dict[str, Any], real: set[str]) -> tuple[list[str], list[str]]:
    """Made-up names for training, and others for the test: a name is on one side in all tables that have it."""
    names = ["".join(parts) for parts in itertools.product(*entry.get("parts", []))] if entry.get("parts") else []
    draw = random.Random(len(names))
    names = draw.sample(names, min(len(names), MOST_NAMES)) + entry.get("names", [])
    names = [name for name in dict.fromkeys(names) if name not in real]
    draw.shuffle(names)
    train, test = [], []
    for name in names:
        (test if zlib.crc32(name.encode()) % 10 < 10 * TEST_NAMES else train).append(name)
    return train, test
