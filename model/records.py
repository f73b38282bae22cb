"""Files -> raw records, one at a time, with an account of what could not be read.

A record that cannot be read is counted with its place and skipped. How files are read is the matter of readers.py, what
a record means (a text, a conversation, a pair of answers) that of forms.py.
"""

import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from tqdm import tqdm

from .cli import UserError
from .forms import BadRecord, UnfitRecord, document
from .readers import END, BrokenFile, reader_for

Form = TypeVar("Form")

PLACES_KEPT = 5  # of each kind of trouble


class Record(NamedTuple):
    value: Any  # what the JSON says; {"text": line} from plain text
    path: Path
    line: int  # where it begins in the file, from 1


@dataclass
class Account:
    """What became of the records of one or several files."""

    records: int = 0  # read, the bad ones too; blank lines are none
    bad: Counter[str] = field(default_factory=Counter)  # reason -> records that could not be used
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> sound records that a filter left out
    places: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first few, as file:line
    bytes_total: int = 0  # of the files opened so far, as they lie on the disk
    bytes_done: int = 0  # of them, how many are behind us
    bytes_lost: int = 0  # of them, how many stand behind the point where a file cannot be read on

    def count_bad(self, reason: str, path: Path, line: int) -> None:
        self.bad[reason] += 1
        self.note(reason, path, line)

    def drop(self, reason: str, record: Record) -> None:
        self.dropped[reason] += 1
        self.note(reason, record.path, record.line)

    def note(self, reason: str, path: Path, line: int) -> None:
        places = self.places.setdefault(reason, [])
        if len(places) < PLACES_KEPT:
            places.append(f"{path}:{line}")

    @property
    def bad_share(self) -> float:
        """Of the records, or of the bytes where a file could not be read to its end, from 0 to 1."""
        of_records = self.bad.total() / max(self.records, 1)
        return max(of_records, self.bytes_lost / max(self.bytes_total, 1))

    def check(self, max_bad_share: float) -> None:
        """Raises UserError where more than this share of the input was bad, or where there was none at all."""
        if not 0 <= max_bad_share <= 1:
            raise UserError(f"--max_bad_share {max_bad_share:g} must be between 0 and 1")
        if self.records == 0:
            raise UserError("the input holds no records")
        if self.bad_share > max_bad_share:
            reason, count = self.bad.most_common(1)[0]
            raise UserError(
                f"{self.bad_share:.1%} of the input is bad, more than --max_bad_share {max_bad_share:g} allows: "
                f"mostly {reason} ({count:,}, first at {self.places[reason][0]})"
            )

    def lines(self) -> list[str]:
        """The account of what was left out, for people: a line for each reason, bad records first."""
        counted = [("bad", self.bad), ("left out", self.dropped)]
        return [
            f"{kind} {count:,}: {reason} (first at {', '.join(self.places[reason])})"
            for kind, counter in counted
            for reason, count in counter.most_common()
        ]


def read_records(path: str | Path, account: Account) -> Iterator[Record]:
    """The records of one file, in order; what cannot be read is counted in `account`.

    Raises:
        UserError: there is no such file, or it cannot be opened.
    """
    path = Path(path)
    try:
        with path.open("rb") as raw:
            size, start = path.stat().st_size, account.bytes_done
            account.bytes_total += size
            reader = reader_for(raw, path)
            while True:
                value = reader.next_value()
                account.bytes_done = start + raw.tell()
                if value is END:
                    break
                account.records += 1
                if isinstance(value, BadRecord):
                    account.count_bad(str(value), path, reader.line)
                else:
                    yield Record(value, path, reader.line)
                if isinstance(value, BrokenFile):
                    account.bytes_lost += size if value.damaged else min(size, size - raw.tell() + reader.pending)
                    break
            account.bytes_done = start + size
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from error


def read_files(paths: Sequence[str | Path], account: Account, title: str = "") -> Iterator[Record]:
    """The records of several files, with a progress bar in bytes on the disk if there is a title.

    Raises:
        UserError: one of the files is missing; said before the first record.
    """
    for path in paths:
        if not Path(path).is_file():
            raise UserError(f"no file {path}")
    total = sum(os.path.getsize(path) for path in paths)
    bar = tqdm(total=total, desc=title, unit="B", unit_scale=True, disable=not title, mininterval=0.5)
    with bar:
        for path in paths:
            for number, record in enumerate(read_records(path, account)):
                yield record
                if number % 64 == 0:
                    bar.update(account.bytes_done - bar.n)
            bar.update(account.bytes_done - bar.n)


def read_as(form: Callable[[Any], Form], records: Iterable[Record], account: Account) -> Iterator[tuple[Form, Record]]:
    """Records as one of forms.py reads them (document, conversation, pair, texts_of); those it cannot read are
    counted."""
    for record in records:
        try:
            yield form(record.value), record
        except UnfitRecord as error:
            account.drop(str(error), record)
        except BadRecord as error:
            account.count_bad(str(error), record.path, record.line)


def read_texts(path: str | Path) -> list[str]:
    """All documents of a file that fits in memory, such as held-out ones; says on stderr what could not be read.

    Raises:
        UserError: there is no such file, or no document in it.
    """
    account = Account()
    texts = [text for text, _ in read_as(document, read_records(path, account), account) if text.strip()]
    for line in account.lines():
        print(line, file=sys.stderr)
    if not texts:
        raise UserError(f'no documents in {path}: it must hold a {{"text": …}} a line')
    return texts
