"""Data files that must be refused: (name, file name, bytes)."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator

GOOD = b'{"prompt": "a", "completion": "b"}\n'
Case = tuple[str, str, bytes]


def cases() -> Iterator[Case]:
    for name, raw in _jsonl():
        yield f"jsonl-{name}", "x.jsonl", raw
        if len(raw) < 1_000_000:
            yield f"packed-{name}", "x.jsonl.gz", gzip.compress(raw)
    for name, raw in _json():
        yield f"json-{name}", "x.json", raw
    for name, raw in _csv():
        yield f"csv-{name}", "x.csv", raw
    for name, raw in _gzip():
        yield f"gzip-{name}", "x.jsonl.gz", raw


def _row(**fields: object) -> bytes:
    return json.dumps(fields).encode() + b"\n"


def _jsonl() -> Iterator[tuple[str, bytes]]:
    yield "empty", b""
    yield "white", b" \n\t\n \n"
    yield "only-bom", b"\xef\xbb\xbf"
    yield "huge-line", GOOD + b'{"prompt": "' + b"a" * 10_000_001 + b'", "completion": "b"}'
    yield "deep-lists", b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b', "completion": "b"}'
    yield "deep-objects", b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    yield "deep-unclosed", b"[" * 200_000
    yield "long-number", b'{"prompt": ' + b"9" * 5000 + b', "completion": "b"}'
    yield "nan", b'{"prompt": NaN, "completion": "b"}'
    yield "infinity", b'{"prompt": "a", "completion": Infinity}'
    yield "minus-infinity", b'{"prompt": "a", "completion": -Infinity}'
    yield "huge-exponent", b'{"prompt": "a", "completion": 1e999999}'
    yield "raw-control", b'{"prompt": "a\x01", "completion": "b"}'
    yield "raw-escape", b'{"prompt": "\x1b[2J", "completion": "b"}'
    yield "raw-nul", b'{"prompt": "a\x00", "completion": "b"}'
    yield "escaped-nul", rb'{"prompt": "a\u0000", "completion": "b"}'
    yield "nul-in-answer", rb'{"prompt": "a", "completion": "b\u0000"}'
    yield "nul-line", GOOD + b"\x00\x00\x00\n"
    yield "lone-high", rb'{"prompt": "\ud800", "completion": "b"}'
    yield "lone-low", rb'{"prompt": "a", "completion": "\udfff"}'
    yield "swapped-pair", rb'{"prompt": "a", "completion": "\ude00\ud83d"}'
    yield "latin-1", '{"prompt": "é", "completion": "b"}'.encode("latin-1")
    yield "utf-16", '{"prompt": "a", "completion": "b"}'.encode("utf-16")
    yield "utf-32", '{"prompt": "a", "completion": "b"}'.encode("utf-32")
    yield "mixed", GOOD + '{"prompt": "é", "completion": "b"}\n'.encode("latin-1") + GOOD
    yield "overlong-utf-8", b'{"prompt": "\xc0\xaf", "completion": "b"}'
    yield "cut-utf-8", b'{"prompt": "a", "completion": "\xe2\x82'
    yield "surrogate-utf-8", b'{"prompt": "\xed\xa0\x80", "completion": "b"}'
    yield "two-boms", b"\xef\xbb\xbf\xef\xbb\xbf" + GOOD
    yield "bom-inside", GOOD + b"\xef\xbb\xbf" + GOOD
    yield "cut", GOOD[:-5]
    yield "single-quotes", b"{'prompt': 'a', 'completion': 'b'}"
    yield "trailing-comma", b'{"prompt": "a", "completion": "b",}'
    yield "comment", b'{"prompt": "a", "completion": "b"} // yes'
    yield "two-on-a-line", b'{"prompt": "a", "completion": "b"} {"prompt": "c", "completion": "d"}'
    yield "list", b'["a", "b"]'
    yield "number", b"7"
    yield "null", b"null"
    yield "text", b'"prompt"'
    yield "python", b"__import__('os').system('id')"
    yield "pickle", b"\x80\x04\x95\x1d\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94\x8c\x06system\x94\x93\x94."
    yield "zip", b"PK\x03\x04" + bytes(60)
    yield "elf", b"\x7fELF" + bytes(60)
    yield "html", b"<html><script>alert(1)</script></html>"
    yield "empty-object", b"{}"
    yield "no-answer", _row(prompt="a")
    yield "other-names", _row(frage="a", antwort="b")
    yield "names-with-escapes", b'{"\\u001b[2J\\u0007": "a"}'
    yield "thousand-fields", json.dumps({f"f{i}": i for i in range(1000)}).encode()
    yield "empty-answer", _row(prompt="a", completion="")
    yield "white-answer", _row(prompt="a", completion=" \u3000\t")
    yield "empty-prompt", _row(prompt="", completion="b")
    for kind, value in (("list", ["a"]), ("object", {"a": 1}), ("number", 3), ("null", None), ("true", True)):
        yield f"prompt-{kind}", _row(prompt=value, completion="b")
        yield f"answer-{kind}", _row(prompt="a", completion=value)
        yield f"messages-{kind}", _row(messages=value)
        yield f"text-{kind}", _row(text=value)
    yield "messages-empty", _row(messages=[])
    yield "messages-no-role", _row(messages=[{"content": "a"}, {"content": "b"}])
    yield "messages-role-list", _row(messages=[{"role": [], "content": "a"}, {"role": {}, "content": "b"}])
    yield "messages-open", _row(messages=[{"role": "user", "content": "a"}])
    yield "messages-no-content", _row(messages=[{"role": "user"}, {"role": "assistant"}])
    yield "shape-changes", GOOD + _row(text="a")


def _json() -> Iterator[tuple[str, bytes]]:
    yield "deep", b"[" * 100_000 + b"]" * 100_000
    yield "deep-data", b'{"data": ' * 40_000 + b"1" + b"}" * 40_000
    yield "cut", b'[{"prompt": "a", "completion": "b"}'
    yield "number", b"1e5"
    yield "rows-of-numbers", b"[1, 2, 3]"
    yield "rows-of-lists", b"[[[]], [[]]]"
    yield "nan", b"[NaN]"
    yield "empty-list", b"[]"
    yield "data-object", b'{"data": {"prompt": "a"}}'
    yield "many-problems", b"[" + b",".join([b"1"] * 20_000) + b"]"


def _csv() -> Iterator[tuple[str, bytes]]:
    yield "header-only", b"prompt,completion\n"
    yield "twice", b"prompt,prompt\na,b\n"
    yield "short-row", b"prompt,completion\na\n"
    yield "long-row", b"prompt,completion\na,b,c\n"
    yield "open-quote", b'prompt,completion\n"a,b\nc,d\n'
    yield "nul", b"prompt,completion\na\x00,b\n"
    yield "huge-cell", b"prompt,completion\na," + b"b" * 10_000_001 + b"\n"
    yield "thousand-columns", b",".join(b"c%d" % i for i in range(1000)) + b"\n"
    yield "quote-inside", b'prompt,completion\n"a"x,b\n'


def _gzip() -> Iterator[tuple[str, bytes]]:
    whole = gzip.compress(GOOD * 50)
    yield "cut", whole[:-9]
    yield "only-magic", b"\x1f\x8b"
    yield "wrong-crc", whole[:-8] + b"\0\0\0\0" + whole[-4:]
    yield "wrong-method", whole[:2] + b"\x07" + whole[3:]
    yield "garbage-after", whole + b"garbage"
    yield "flipped", whole[:20] + bytes([whole[20] ^ 0xFF]) + whole[21:]
    yield "not-gzip", b"\x1f\x8b" + GOOD
    yield "twice", gzip.compress(whole)
    yield "bomb", gzip.compress(bytes(80 << 20))
