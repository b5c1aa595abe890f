"""Tell a file's type by its first bytes: compressed text, a table of another kind, or something without rows."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import IO, Any

from qunlearn.errors import DataError

HEAD_BYTES = 512
PACKED_ENDINGS = (".gz", ".bz2", ".xz", ".zst")
# A row takes some ten times its bytes in memory. Texts are packed to a tenth, hardly ever to a thirtieth.
_UNPACKED_BYTES, _MOST_UNPACKED_BYTES, _MAX_RATIO = 64 << 20, 256 << 20, 30
_PARQUET = b"PAR1"
_CSV = "save it as CSV or JSONL"
_NO_ROWS: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive", "unpack it, and give the file"),
    (b"%PDF", "a PDF", "take its text out first: `qunlearn data import text` cuts a text into rows"),
    (b"\xd0\xcf\x11\xe0", "an old Office document", _CSV),
    (b"SQLite format 3", "an SQLite database", _CSV),
    (b"ARROW1", "an Arrow file", _CSV),
    (b"Obj\x01", "an Avro file", _CSV),
    (b"\x89HDF", "an HDF5 file", _CSV),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it, and give the file"),
    (b"Rar!", "a RAR archive", "unpack it, and give the file"),
    (b"version https://git-lfs", "a pointer of Git LFS, not the file itself", "fetch it with `git lfs pull`"),
)
_PAGES = (b"<!doctype html", b"<html")


class _ZstdFile(io.RawIOBase):
    """What is in a zstd file of one frame or several, by the package zstandard.

    Its own reader ends without a word where a file was cut off. Few bytes at a time: 4 of them may be 128 KiB.
    """

    _PIECE_BYTES = 256

    def __init__(self, file: IO[bytes], zstandard: Any) -> None:
        super().__init__()
        self._file, self._package = file, zstandard
        self._frame: Any = None  # None between two frames, and at the file's end
        self._packed, self._ready = b"", memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Fill the buffer; 0 at the end. Raises ZstdError for what is damaged, and where the file ends too early."""
        while not self._ready:
            self._packed = self._packed or self._file.read(self._PIECE_BYTES)
            if not self._packed:
                if self._frame is not None:
                    raise self._package.ZstdError("the file was cut off")
                return 0
            if self._frame is None:
                self._frame = self._package.ZstdDecompressor().decompressobj()
            self._ready = memoryview(self._frame.decompress(self._packed))
            self._packed = self._frame.unused_data
            if self._frame.eof:
                self._frame = None
        given, self._ready = self._ready[: len(buffer)], self._ready[len(buffer) :]
        buffer[: len(given)] = given
        return len(given)


def _zstd(file: IO[bytes]) -> IO[bytes]:
    try:
        from compression import zstd  # type: ignore[import-not-found, unused-ignore]  # Python 3.14

        return zstd.open(file)  # type: ignore[no-any-return, unused-ignore]
    except ImportError:
        pass
    try:
        import zstandard  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        raise DataError("packed with zstd", hint="unpack it with `zstd -d`, or pip install zstandard") from None
    return io.BufferedReader(_ZstdFile(file, zstandard))


_UNPACKERS: tuple[tuple[bytes, str, Callable[[IO[bytes]], Any]], ...] = (
    (b"\x1f\x8b", "gzip", lambda file: gzip.GzipFile(fileobj=file)),
    (b"BZh", "bzip2", bz2.BZ2File),
    (b"\xfd7zXZ\x00", "xz", lzma.LZMAFile),
    (b"\x28\xb5\x2f\xfd", "zstd", _zstd),
)


def damaged() -> tuple[type[Exception], ...]:
    """Return what the unpackers raise."""
    zstd = [sys.modules[name].ZstdError for name in ("compression.zstd", "zstandard") if sys.modules.get(name)]
    return (OSError, EOFError, zlib.error, lzma.LZMAError, *zstd)


def damage(name: str, error: Exception, where: str) -> DataError:
    """Return the error of a packed file that is damaged."""
    said = str(error).rpartition("error: ")[2]  # zstandard says that it is one
    return DataError(f"damaged {name}: {said}", where=where, hint="pack the file again")


def packing(head: bytes) -> str | None:
    """Return how a file is packed, or None."""
    return next((name for magic, name, _ in _UNPACKERS if head.startswith(magic)), None)


def unpacking(file: IO[bytes], head: bytes, where: str) -> IO[bytes]:
    """Return a reader of what is in a packed file. Raises DataError where the unpacker is not installed."""
    opener = next(opener for magic, _, opener in _UNPACKERS if head.startswith(magic))
    try:
        return opener(file)  # type: ignore[no-any-return]
    except DataError as error:
        raise DataError(error.message, where=where, hint=error.hint) from None


def unpacked(raw: bytes, where: str) -> bytes:
    """Return what is in packed bytes, unless it is a bomb.

    Raises DataError.
    """
    name, most = packing(raw), min(max(_UNPACKED_BYTES, _MAX_RATIO * len(raw)), _MOST_UNPACKED_BYTES)
    if name is None:
        return raw
    try:
        with unpacking(io.BytesIO(raw), raw, where) as file:
            content = file.read(most + 1)
    except damaged() as error:
        raise damage(name, error, where) from None
    if len(content) > most:
        hint = "unpack it yourself, if you trust it"
        raise DataError(f"unpacks to more than {most >> 20} MiB, from {len(raw)} bytes", where=where, hint=hint)
    return content


def check_holds_rows(head: bytes, where: str) -> None:
    """Raise DataError for what is no text, by its first bytes, and say what it is."""
    if b"[Content_Types].xml" in head and head.startswith(b"PK"):
        raise DataError("is an Excel workbook or another Office document", where=where, hint=_CSV)
    for magic, what, hint in _NO_ROWS:
        if head.startswith(magic):
            raise DataError(f"is {what}", where=where, hint=hint)
    if head[257:262] == b"ustar":
        raise DataError("is a tar archive", where=where, hint="unpack it, and give the file")
    if head.lstrip().lower().startswith(_PAGES):
        raise DataError("is a web page", where=where, hint="download the file itself; a page about it was saved")


def is_parquet(head: bytes) -> bool:
    return head.startswith(_PARQUET)


def parquet_rows(file: IO[bytes], where: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (number, row) of a Parquet file. Raises DataError where it cannot be read."""
    try:
        from pyarrow import ArrowException, parquet  # type: ignore[import-not-found, import-untyped, unused-ignore]
    except ImportError:
        hint = "pip install 'qunlearn[hub]', which brings pyarrow; or save it as CSV or JSONL"
        raise DataError("is a Parquet file, and pyarrow is not installed", where=where, hint=hint) from None
    number = 0
    try:
        table = parquet.ParquetFile(file)
        if twice := sorted(name for name, n in Counter(table.schema_arrow.names).items() if n > 1):
            hint = "name each column once"
            raise DataError(f"several columns are called {twice[0][:80]!r}", where=where, hint=hint)
        for batch in table.iter_batches(batch_size=1000):
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except (ArrowException, OSError) as error:
        first = (str(error).splitlines() or ["?"])[0][:200]
        raise DataError(f"damaged Parquet: {first}", where=where, hint="download the file again") from None
