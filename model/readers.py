"""The bytes of a file -> the values of its records, one at a time, whatever its size.

A file may be JSON lines, one JSON list, or plain text named *.txt, in which each line is a document; any of them may
be gzipped. All are UTF-8. What cannot be read is told apart and never repaired by guessing.
"""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .forms import BadRecord

MAX_RECORD = 64 << 20  # bytes; whatever is longer is no record but a file of another kind
HEAD = 1 << 20  # bytes looked at to tell what a file is
END = object()  # stands behind a file's last record


class BrokenFile(BadRecord):
    """A file that cannot be read on. `damaged`: not even what came before can be trusted."""

    def __init__(self, reason: str, damaged: bool = False):
        super().__init__(reason)
        self.damaged = damaged


def reader_for(raw: BinaryIO, path: Path) -> "LineReader | ListReader":
    """The reader for an open file, chosen by what it begins with, and by its name where that does not tell."""
    head = read_head(raw)
    encoding = other_encoding(head)
    kind = path.name.lower().removesuffix(".gz")
    if encoding:
        return LineReader(unpacked(raw), all_bad(encoding))
    if kind.endswith(".txt"):
        return LineReader(unpacked(raw), parse_text)
    if head.removeprefix(codecs.BOM_UTF8).lstrip()[:1] == b"[" and not kind.endswith(".jsonl"):
        return ListReader(unpacked(raw))
    return LineReader(unpacked(raw), parse_json)


def read_head(raw: BinaryIO) -> bytes:
    """The first bytes of a file's content, unpacked; as many as can be had where it is damaged."""
    stream, pieces = unpacked(raw), []
    try:
        for _ in range(HEAD // io.DEFAULT_BUFFER_SIZE):
            pieces.append(stream.read(io.DEFAULT_BUFFER_SIZE))
    except BrokenFile:
        pass  # said when the place is reached in earnest
    return b"".join(pieces)


def unpacked(raw: BinaryIO) -> BinaryIO:
    """The content of an open file, from its beginning: gzip is told by its first two bytes, not by the name."""
    raw.seek(0)
    magic = raw.read(2)
    raw.seek(0)
    return CheckedGzip(fileobj=raw) if magic == b"\x1f\x8b" else raw


class CheckedGzip(gzip.GzipFile):
    """A gzip file that says in one way what is wrong with it."""

    def read(self, size: int = -1) -> bytes:
        with broken_gzip():
            return super().read(size)

    def readline(self, size: int = -1) -> bytes:
        with broken_gzip():
            return super().readline(size)


@contextmanager
def broken_gzip() -> Iterator[None]:
    try:
        yield
    except EOFError as error:
        raise BrokenFile("the gzip file is cut off here") from error
    except (zlib.error, gzip.BadGzipFile) as error:
        if str(error).startswith("Not a gzipped file"):  # all was well up to here
            raise BrokenFile("there is something else behind the gzip data") from error
        raise BrokenFile("the gzip file is damaged, here or before", damaged=True) from error


def other_encoding(head: bytes) -> str | None:
    """What a file is if it is not UTF-8. A short line of another encoding can be UTF-8 by chance, a file is not."""
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or head.count(b"\0") > len(head) / 20:
        return "UTF-16"
    lines = [line for line in head.split(b"\n")[: -1 if len(head) >= HEAD else None] if not line.isascii()]
    wrong = [line for line in lines if not is_utf8(line)]
    if len(wrong) * 2 <= len(lines):
        return None
    if b"\0" in head:
        return "UTF-16"
    try:
        b"\n".join(wrong).decode("gb18030")
        return "GBK"
    except UnicodeDecodeError:
        return "not UTF-8"


def is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def all_bad(encoding: str) -> Callable[[bytes], Any]:
    """A parser for the lines of a file that is not UTF-8: every one of them is bad."""

    def parse(line: bytes) -> Any:
        raise BadRecord(f"the file is {encoding}: convert it to UTF-8, for example with iconv")

    return parse


def parse_text(line: bytes) -> dict[str, str]:
    return {"text": decode(line)}


def parse_json(line: bytes) -> Any:
    text = decode(line)
    try:
        return json.loads(text)
    except RecursionError as error:
        raise BadRecord("JSON nested too deeply") from error
    except ValueError as error:
        raise BadRecord("not JSON") from error


def decode(line: bytes) -> str:
    if b"\0" in line:
        raise BadRecord("a zero byte in the line")
    try:
        return line.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise BadRecord("not UTF-8") from error


class LineReader:
    """A record a line; blank lines are skipped."""

    pending = 0  # bytes read and not used

    def __init__(self, stream: BinaryIO, parse: Callable[[bytes], Any]):
        self.stream, self.parse = stream, parse
        self.line = 0  # number of the last line

    def next_value(self) -> Any:
        """The next record's value, or BadRecord, BrokenFile or END as a value."""
        try:
            while raw_line := self.stream.readline(MAX_RECORD):
                self.line += 1
                if len(raw_line) == MAX_RECORD and not raw_line.endswith(b"\n"):
                    self.skip_line()
                    raise BadRecord(f"a line of more than {MAX_RECORD / 2**20:.0f} MB")
                line = raw_line.rstrip(b"\r\n")
                if line.strip() and line != codecs.BOM_UTF8:
                    return self.parse(line)
        except BrokenFile as error:
            self.line += 1
            return error
        except BadRecord as error:
            return error
        return END

    def skip_line(self) -> None:
        while (piece := self.stream.readline(MAX_RECORD)) and not piece.endswith(b"\n"):
            pass


class ListReader:
    """The items of one JSON list, holding little more than one of them. After a broken item there is no telling where
    the next one begins, so reading ends there."""

    def __init__(self, stream: BinaryIO):
        self.stream = stream
        # Bytes that are not UTF-8 become lone surrogates, which forms.py finds in the one item that has them.
        self.decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self.text = ""  # read and not used yet
        self.line = 1  # in which the last item, or the trouble, begins
        self.lines_used = 0  # newlines before self.text
        self.ended = False  # the stream
        self.separator = "["  # what must stand before the next item

    @property
    def pending(self) -> int:
        return len(self.text.encode(errors="surrogateescape"))

    def next_value(self) -> Any:
        """The next item, or BrokenFile or END as a value."""
        try:
            char = self.next_char()
            if char == "]" and self.separator == ",":
                return self.finish()
            if char != self.separator:
                raise BrokenFile("the JSON list is broken here")
            self.use(1)
            if self.next_char() == "]" and self.separator == "[":
                return self.finish()
            self.separator = ","
            return self.next_item()
        except BrokenFile as error:
            return error

    def next_char(self) -> str:
        """The next character that is no blank; stays in the text. Empty at the end."""
        while True:
            self.use(len(self.text) - len(self.text.lstrip(" \t\r\n\ufeff")))
            self.line = self.lines_used + 1
            if self.text or not self.read_on(HEAD // 16):
                return self.text[:1]

    def next_item(self) -> Any:
        size = HEAD // 16
        while True:
            try:
                value, end = json.JSONDecoder().raw_decode(self.text)
                if end < len(self.text):  # a number that ends with the text may have more digits
                    self.use(end)
                    return value
            except RecursionError as error:
                raise BrokenFile("JSON nested too deeply") from error
            except ValueError:
                pass  # cut short or broken: more text will tell
            size *= 2  # so that a long item is not decoded again and again
            if len(self.text) > MAX_RECORD or not self.read_on(size):
                raise BrokenFile("the JSON list is broken here")

    def finish(self) -> object:
        self.use(1)
        if self.next_char():
            raise BrokenFile("there is more behind the end of the JSON list")
        return END

    def use(self, count: int) -> None:
        self.lines_used += self.text.count("\n", 0, count)
        self.text = self.text[count:]

    def read_on(self, size: int) -> bool:
        """Reads about so many more bytes; False at the end of the stream."""
        if self.ended:
            return False
        data = self.stream.read(size)
        self.ended = not data
        self.text += self.decoder.decode(data, final=self.ended)
        return not self.ended
