"""The six novels as chapters of clean text, from Debian's package r-cran-janeaustenr.

The package holds them as an R lazy-load database, which is decoded here: no R is needed.
"""

import gzip
import re
import struct
import subprocess
import tempfile
import zlib
from pathlib import Path

PACKAGE = "r-cran-janeaustenr"


def read_novels(package=None):
    """Returns each novel's chapters by its name; downloads the package if no file is given."""
    with tempfile.TemporaryDirectory() as scratch:
        if package is None:
            subprocess.run(["apt-get", "download", PACKAGE], cwd=scratch, check=True)
            package = next(Path(scratch).glob(f"{PACKAGE}_*.deb"))
        subprocess.run(["dpkg-deb", "-x", package, scratch], check=True)
        stem = Path(scratch) / "usr/lib/R/site-library/janeaustenr/data/Rdata"
        return {name: clean_chapters(lines) for name, lines in read_lazy_load_database(stem)}


def read_r_value(data):
    """Decodes one R value in R's binary (XDR) serialization, as far as this package uses it."""
    position, symbols = 0, []

    def take(fmt):
        nonlocal position
        values = struct.unpack_from(">" + fmt, data, position)
        position += struct.calcsize(">" + fmt)
        return values

    def value():
        flags = take("i")[0]
        kind, has_attributes, has_tag = flags & 0xFF, flags & 0x200, flags & 0x400
        if kind == 0xFE:  # NULL
            return None
        if kind == 0xFF:  # a symbol that was seen before
            return symbols[(flags >> 8) - 1]
        if kind == 1:  # a new symbol
            symbols.append(value())
            return symbols[-1]
        if kind == 2:  # pairlist: attributes or tagged values
            tag = value() if has_tag else None
            head = value()
            return [(tag, head)] + (value() or [])
        length = take("i")[0]
        if kind == 9:  # one string
            return take(f"{length}s")[0].decode("utf-8") if length >= 0 else None
        if kind in (10, 13):  # logical, integer
            result = list(take(f"{length}i"))
        elif kind in (16, 19):  # character vector, list
            result = [value() for _ in range(length)]
        else:
            raise ValueError(f"R type {kind} is not supported")
        attributes = dict(value()) if has_attributes else {}
        if "names" in attributes:
            return dict(zip(attributes["names"], result, strict=True))
        return result

    if data[:2] != b"X\n":
        raise ValueError("not R's binary serialization")
    position = 2
    version = take("3i")[0]
    if version == 3:
        take(f"{take('i')[0]}s")  # the native encoding's name
    return value()


def read_lazy_load_database(stem):
    """Yields (name, value) of an R lazy-load database: an index (.rdx) and its records (.rdb)."""
    index = read_r_value(gzip.decompress(Path(f"{stem}.rdx").read_bytes()))
    records = Path(f"{stem}.rdb").read_bytes()
    for name, (offset, length) in index["variables"].items():
        # A record is its inflated length in four bytes, then a zlib stream.
        yield name, read_r_value(zlib.decompress(records[offset + 4 : offset + length]))


HEADING = re.compile(r"\s*chapter\s+([ivxlc]+|\d+)\.?\s*$", re.IGNORECASE)
FURNITURE = re.compile(
    r"\s*(volume [ivx]+|the end|finis|\(end of volume \w+\.\)|[*\s]+|\*vide a letter from .*)\s*$",
    re.IGNORECASE,
)


def clean_chapters(lines):
    """Turns a novel's lines into chapters of unwrapped paragraphs with a blank line between.

    Title pages, headings, printers' notes and the marks of italics (`_so_`) go.
    """
    chapters, paragraph, skipping = [], [], False

    def end_paragraph():
        text = re.sub(r"(?<=-)\n", "", "\n".join(paragraph)).replace("\n", " ")
        if text and chapters and not text.startswith("[At this point in the first"):
            chapters[-1].append(text)
        paragraph.clear()

    for line in lines:
        line = line.replace("_", "")
        if HEADING.match(line):
            end_paragraph()
            chapters.append([])
        elif "A NOTE ON THE TEXT" in line:
            break
        elif "[End volume one of this edition." in line:
            skipping = True
        elif skipping:
            skipping = "]" not in line
        elif FURNITURE.match(line) or not line.strip():
            end_paragraph()
        else:
            paragraph.append(" ".join(line.split()))
    end_paragraph()
    return ["\n\n".join(chapter) for chapter in chapters]
