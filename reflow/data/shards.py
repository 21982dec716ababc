"""Arrow shards: how one grows batch by batch, survives a kill, appears whole, and is read back from its memory map."""

from __future__ import annotations

import io
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import torch

from reflow.outputs import about, write_text, written

Skipped = list[dict[str, str]]
# From the number of items that are done already: (items done after a batch, its rows, what was skipped in it).
Batches = Callable[[int], Iterator[tuple[int, pyarrow.Table, Skipped]]]


def write_json(path: Path, content: Any) -> None:
    write_text(path, json.dumps(content, indent=1))


def npy(values: np.ndarray) -> bytes:
    """An array as an .npy file. numpy itself, writing to a full disk, does not say why it cannot."""
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def notes_of(path: Path) -> dict[str, Any] | None:
    """The notes of a whole shard; None where it is missing or damaged."""
    try:
        notes = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
        return notes if os.path.getsize(path) == notes["bytes"] else None
    except (OSError, ValueError, KeyError):
        return None


def write_shard(path: Path, table: pyarrow.Table, notes: dict[str, Any]) -> None:
    """A shard and its notes; the shard appears last and whole, and its size in the notes shows later damage."""
    from datasets.arrow_writer import ArrowWriter

    with written(path) as temporary:
        writer = ArrowWriter(path=str(temporary), schema=table.schema)
        writer.write_table(table)
        writer.finalize()
        notes = {"file": path.name, "rows": len(table), "bytes": os.path.getsize(temporary), **notes}
        write_json(path.with_suffix(".json"), notes)


def journal_of(path: Path) -> Path:
    return path.with_name(f".{path.stem}.journal")


def recover(path: Path) -> tuple[int, list[pyarrow.RecordBatch], Skipped]:
    """What a killed process left of a shard: items done, its whole batches, and what was skipped."""
    done, batches, skipped = 0, [], []
    try:
        with pyarrow.OSFile(str(journal_of(path)), "rb") as source, pyarrow.ipc.open_stream(source) as reader:
            while True:
                batch, notes = reader.read_next_batch_with_custom_metadata()
                done, skipped = int(notes["done"]), skipped + json.loads(notes["skipped"])
                batches.append(batch)
    except (OSError, StopIteration, pyarrow.ArrowInvalid):
        return done, batches, skipped  # the stream ends, at a whole batch or inside one that was being written


def grow(path: Path, total: int, batches: Batches) -> Iterator[tuple[int, Skipped]]:
    """Make a shard of `total` items; every batch is on disk before the next is made. Yields (items, skipped) of each.

    The journal beside the shard is an Arrow stream whose record batches carry the number of items done; the same call
    after a kill goes on behind the last whole one.
    """
    done, kept, skipped = recover(path)
    journal = journal_of(path)
    fresh = journal.with_suffix(".next")
    writer = None
    with about(path, fresh, journal), pyarrow.OSFile(str(fresh), "wb") as sink:

        def write(batch: pyarrow.RecordBatch, end: int, bad: Skipped) -> None:
            nonlocal writer
            writer = writer or pyarrow.ipc.new_stream(sink, batch.schema)
            writer.write_batch(batch, custom_metadata={"done": str(end), "skipped": json.dumps(bad)})

        for number, batch in enumerate(kept):
            write(batch, done, skipped if number == 0 else [])
        os.replace(fresh, journal)
        if done:
            yield done, skipped
        if done < total:
            for end, table, bad in batches(done):
                batch = table.combine_chunks().to_batches()[0] if len(table) else empty(table.schema)
                write(batch, end, bad)
                kept.append(batch)
                skipped = skipped + bad
                yield end - done, bad
                done = end
    write_shard(path, pyarrow.Table.from_batches(kept).combine_chunks(), {"skipped": skipped})
    journal.unlink()


def tidy(folder: Path) -> None:
    """Take away what killed preparations left beside whole shards: journals and files that were being written."""
    for pattern in (".*.journal", ".*.next", ".*.tmp", ".*.tmp.npy"):
        for path in folder.glob(pattern):
            path.unlink(missing_ok=True)


def empty(schema: pyarrow.Schema) -> pyarrow.RecordBatch:
    return pyarrow.RecordBatch.from_arrays([pyarrow.array([], field.type) for field in schema], schema=schema)


def vectors(rows: np.ndarray) -> pyarrow.Array:
    """[n, ...] as a column of fixed-size lists of the same floats."""
    return pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(rows.reshape(-1)), int(np.prod(rows.shape[1:])))


class Column:
    """Rows [n, *shape] fp32 of one column over many shards, read from the memory map when asked for."""

    def __init__(self, tables: list[Any], name: str, shape: list[int]) -> None:
        self.shape = tuple(shape)
        chunks = [c for table in tables for c in table.column(name).chunks if len(c)]
        self.views = [c.flatten().to_numpy(zero_copy_only=True).reshape(-1, *shape) for c in chunks]
        self.ends = np.cumsum([len(v) for v in self.views])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def rows(self, items: torch.Tensor) -> torch.Tensor:
        out = np.empty((len(items), *self.shape), np.float32)
        for row, item in enumerate(items.tolist()):
            shard = int(np.searchsorted(self.ends, item, side="right"))
            out[row] = self.views[shard][item - int(self.ends[shard])]  # a negative row counts from the shard's end
        return torch.from_numpy(out)
