"""Files -> raw records, one at a time, whatever their size, with an account of what could not be read.

A file may be JSON lines, one JSON list, or plain text named *.txt, in which each line is a document; any of them may
be gzipped. All are UTF-8. A record that cannot be read is counted with its place and skipped, never repaired by
guessing. What a record means (a text, a conversation, a pair of answers) is the matter of forms.py.
"""

import codecs
import gzip
import io
import json
import os
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

from tqdm import tqdm

from .cli import UserError
from .forms import BadRecord, document

Form = TypeVar("Form")

MAX_RECORD = 64 << 20  # bytes; whatever is longer is no record but a file of another kind
HEAD = 1 << 20  # bytes looked at to tell what a file is
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
        counted = [("bad", self.bad), ("dropped", self.dropped)]
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
        size = path.stat().st_size
        with path.open("rb") as raw:
            head = read_head(raw)
            raw.seek(0)
            start = account.bytes_done
            account.bytes_total += size
            kind = path.name.lower().removesuffix(".gz")
            encoding = other_encoding(head)
            if encoding:
                yield from read_lines(raw, path, account, whole_file_bad(encoding))
            elif kind.endswith(".txt"):
                yield from read_lines(raw, path, account, parse_text)
            elif head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[" and not kind.endswith(".jsonl"):
                yield from read_list(raw, path, account)
            else:
                yield from read_lines(raw, path, account, parse_json)
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


def read_head(raw: BinaryIO) -> bytes:
    """The first bytes of a file's content, unpacked; as many as can be had where it is damaged."""
    pieces = []
    try:
        stream = unpacked(raw)
        for _ in range(HEAD // io.DEFAULT_BUFFER_SIZE):
            pieces.append(stream.read(io.DEFAULT_BUFFER_SIZE))
    except (EOFError, zlib.error, gzip.BadGzipFile):
        pass  # said when the place is reached in earnest
    return b"".join(pieces)


def unpacked(raw: BinaryIO) -> BinaryIO:
    """The content of an open file: gzip is told by its first two bytes, not by the name."""
    magic = raw.read(2)
    raw.seek(0)
    return gzip.GzipFile(fileobj=raw) if magic == b"\x1f\x8b" else raw


def other_encoding(head: bytes) -> str | None:
    """What a file is if it is not UTF-8. A short line of another encoding can be UTF-8 by chance, a file is not."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or head.count(b"\0") > len(head) / 20:
        return "UTF-16"
    lines = [line for line in head.split(b"\n")[: -1 if len(head) >= HEAD else None] if not line.isascii()]
    wrong = [line for line in lines if not is_utf8(line)]
    if len(wrong) * 2 <= len(lines):
        return None
    try:
        b"\n".join(wrong).decode("gb18030")
        return "GBK"
    except UnicodeDecodeError:
        return "of no known encoding"


def is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def whole_file_bad(encoding: str) -> Callable[[bytes], Any]:
    """A parser for the lines of a file that is not UTF-8: every one of them is bad."""

    def parse(line: bytes) -> Any:
        raise BadRecord(f"the file is {encoding}: convert it to UTF-8, for example with iconv")

    return parse


def parse_text(line: bytes) -> dict[str, str]:
    return {"text": decode(line)}


def parse_json(line: bytes) -> Any:
    try:
        return json.loads(decode(line))
    except RecursionError as error:
        raise BadRecord("JSON nested too deeply") from error
    except BadRecord:
        raise
    except ValueError as error:
        raise BadRecord("not JSON") from error


def decode(line: bytes) -> str:
    if b"\0" in line:
        raise BadRecord("a zero byte in the line")
    try:
        return line.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8") from error


def read_lines(raw: BinaryIO, path: Path, account: Account, parse: Callable[[bytes], Any]) -> Iterator[Record]:
    """A record a line; blank lines are skipped."""
    start = account.bytes_done
    stream = unpacked(raw)
    number = 0
    while True:
        number += 1
        try:
            line = stream.readline(MAX_RECORD)
            too_long = len(line) == MAX_RECORD and not line.endswith(b"\n")
            if too_long:
                skip_line(stream)
        except (EOFError, zlib.error, gzip.BadGzipFile):
            break_off("the gzip file breaks off here", path, number, account, start + raw.tell())
            return
        if not line:
            return
        account.bytes_done = start + raw.tell()
        line = line.rstrip(b"\r\n")
        if not line.strip() or line == codecs.BOM_UTF8:
            continue
        account.records += 1
        try:
            if too_long:
                raise BadRecord(f"a line of more than {MAX_RECORD >> 20} MB")
            value = parse(line)
        except BadRecord as error:
            account.count_bad(str(error), path, number)
            continue
        yield Record(value, path, number)


def skip_line(stream: BinaryIO) -> None:
    while (piece := stream.readline(MAX_RECORD)) and not piece.endswith(b"\n"):
        pass


def break_off(reason: str, path: Path, line: int, account: Account, done: int) -> None:
    """Counts a file that cannot be read on; what stands behind that point is lost."""
    account.records += 1
    account.count_bad(reason, path, line)
    account.bytes_lost += max(0, account.bytes_total - done)


def read_list(raw: BinaryIO, path: Path, account: Account) -> Iterator[Record]:
    """The items of one JSON list, without holding the list. After a broken item there is no telling where the next
    one begins, so reading ends there."""
    start = account.bytes_done
    reader = ListReader(unpacked(raw))
    while True:
        try:
            item = reader.next_item()
        except (BadRecord, EOFError, zlib.error, gzip.BadGzipFile) as error:
            reason = str(error) if isinstance(error, BadRecord) else "the gzip file breaks off here"
            break_off(reason, path, reader.line, account, start + raw.tell() - len(reader.text))
            return
        account.bytes_done = start + raw.tell()
        if item is None:
            return
        account.records += 1
        yield Record(item[0], path, reader.line)


class ListReader:
    """Takes the items of a JSON list from a stream, holding little more than one of them."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text = ""  # read and not used yet
        self.line = 1  # in which the last item, or the trouble, begins
        self.lines_used = 0  # newlines before self.text
        self.ended = False
        self.separator = "["

    def next_item(self) -> tuple[Any] | None:
        """The next item, or None behind the last one.

        Raises:
            BadRecord: the list is broken here.
        """
        char = self.next_char()
        if char == "]" and self.separator != "[":
            return self.finish()
        if char != self.separator:
            raise BadRecord("the JSON list is broken here")
        self.use(1)
        if self.next_char() == "]" and self.separator == "[":
            return self.finish()
        self.separator = ","
        value, end = self.decode_item()
        self.use(end)
        return (value,)

    def next_char(self) -> str:
        """The next character that is no blank; stays in the text. Empty at the end."""
        while True:
            stripped = self.text.lstrip(" \t\r\n\ufeff")
            self.use(len(self.text) - len(stripped))
            self.line = self.lines_used + 1
            if self.text or not self.read_on(HEAD // 16):
                return self.text[:1]

    def decode_item(self) -> tuple[Any, int]:
        size = HEAD // 16
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text)
                if end < len(self.text):  # a number that ends with the text may have more digits
                    return value, end
            except RecursionError as error:
                raise BadRecord("JSON nested too deeply") from error
            except ValueError:
                pass  # cut short or broken: more text will tell
            size *= 2  # so that a long item is not decoded again and again
            if len(self.text) > MAX_RECORD or not self.read_on(size):
                raise BadRecord("the JSON list is broken here")

    def finish(self) -> None:
        self.use(1)
        if self.next_char():
            raise BadRecord("there is more behind the end of the JSON list")

    def use(self, count: int) -> None:
        self.lines_used += self.text.count("\n", 0, count)
        self.text = self.text[count:]

    def read_on(self, size: int) -> bool:
        """Reads about so many more bytes; False at the end of the stream."""
        if self.ended:
            return False
        data = self.stream.read(size)
        self.ended = not data
        try:
            self.text += self.decoder.decode(data, final=self.ended)
        except UnicodeDecodeError as error:
            raise BadRecord("not UTF-8") from error
        return not self.ended
