#!/usr/bin/env python3
"""Build the parquet files of the built-in calibration corpora from source/.

A maintainers' tool: the product reads only the parquet files this writes.
The output depends on source/ and the pyarrow version alone.

Usage: python build.py        (needs Python 3 and pyarrow)
"""

import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent
SOURCE = HERE / "source"


def read(name):
    # Bytes first: no newline translation on any platform.
    text = (SOURCE / name).read_bytes().decode("utf-8")
    if "\r" in text or text.startswith("\ufeff"):
        raise SystemExit(f"{name}: carriage return or byte order mark")
    return text


def lines(name):
    """The lines of a file, without their newlines."""
    text = read(name)
    return text.removesuffix("\n").split("\n")


def hub_lines(*names):
    """One row per line, keeping its newline; an empty line is ""."""
    return [line + "\n" if line else "" for name in names for line in lines(name)]


def paragraphs(*names):
    """One row per paragraph (a run of non-empty lines), no trailing newline."""
    rows = []
    for name in names:
        for block in re.split(r"\n(?:[ \t]*\n)+", "\n" + read(name) + "\n"):
            block = block.strip("\n")
            if block.strip():
                rows.append(block)
    return rows


def records(name, keys):
    rows = []
    for number, line in enumerate(lines(name), 1):
        row = json.loads(line)
        if set(row) != set(keys):
            raise SystemExit(f"{name}:{number}: expected the keys {keys}")
        rows.append(row)
    return rows


def tables():
    string = pa.string()
    message = pa.struct([("role", string), ("content", string)])

    yield "wikitext", pa.table(
        {"text": hub_lines("wikitext.txt", "chinese.txt")},
        schema=pa.schema([("text", string)]),
    )
    yield "ptb", pa.table(
        {"sentence": [line for line in lines("ptb.txt") if line]},
        schema=pa.schema([("sentence", string)]),
    )
    yield "c4", pa.Table.from_pylist(
        records("c4.jsonl", ("text", "timestamp", "url")),
        schema=pa.schema([("text", string), ("timestamp", string), ("url", string)]),
    )
    yield "chat", pa.Table.from_pylist(
        records("chat.jsonl", ("messages",)),
        schema=pa.schema([("messages", pa.list_(message))]),
    )
    yield "heldout", pa.table(
        {"text": paragraphs("heldout_encyclopedic.txt", "heldout_general.txt")},
        schema=pa.schema([("text", string)]),
    )


def main():
    for name, table in tables():
        path = HERE / f"{name}.parquet"
        pq.write_table(
            table, path, compression="zstd", version="2.6", write_statistics=False
        )
        back = pq.read_table(path)
        if not back.equals(table):
            raise SystemExit(f"{path.name}: read back differently")
        columns = ", ".join(f"{field.name}: {field.type}" for field in back.schema)
        print(f"{path.name}: {back.num_rows} rows, {path.stat().st_size} bytes, {columns}")


if __name__ == "__main__":
    main()
