"""What is wrong with a file, and what to do about it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import apsw

import chatd

from .schema import MIGRATIONS


def diagnose(db: apsw.Connection, path: Path) -> list[chatd.Finding]:
    """What `chatd.Storage.diagnose` says of a file that could be opened."""
    findings = []
    mode = path.stat().st_mode
    if mode & 0o002:
        findings.append(
            chatd.Finding(f"anybody on this machine may write {path}", f"chmod o-w {path}")
        )
    for place in (path, path.resolve().parent):
        if not os.access(place, os.W_OK):
            findings.append(
                chatd.Finding(f"chatd may not write {place}", f"chmod u+w {place}, as its owner")
            )
    if (journal := db.pragma("journal_mode")) != "wal":
        findings.append(
            chatd.Finding(
                f"{path} cannot keep a write-ahead log (its journal is {journal})",
                "put the file on a local disk that can be written",
            )
        )
    faults = [fault for (fault,) in db.execute("PRAGMA quick_check(5)")]
    if faults != ["ok"]:
        told = "; ".join(" ".join(str(fault).split()) for fault in faults)
        cure = "restore a backup, or recover it with the sqlite3 tool's .recover"
        return [chatd.Finding(f"{path} is damaged: {told}", cure), *findings]
    return [*findings, *_missing(db, path), *_orphans(db, path)]


def _missing(db: apsw.Connection, path: Path) -> list[chatd.Finding]:
    """Tables and indexes that the migrations make and that are not there."""
    named = "SELECT name, type, sql FROM sqlite_schema WHERE sql IS NOT NULL"
    made = apsw.Connection(":memory:")
    for script in MIGRATIONS:
        made.execute(script)
    there = {name for name, _, _ in db.execute(named)}
    return [
        chatd.Finding(
            f"the {kind} {name} is missing from {path}",
            _run(path, sql) if kind == "index" else "restore a backup",
        )
        for name, kind, sql in made.execute(named)
        if name not in there
    ]


def _orphans(db: apsw.Connection, path: Path) -> list[chatd.Finding]:
    """Rows that belong to nothing."""
    counted: dict[tuple[str, str, int], int] = {}
    for table, _, parent, key in db.execute("PRAGMA foreign_key_check"):
        counted[table, parent, key] = counted.get((table, parent, key), 0) + 1
    findings = []
    for (table, parent, key), count in counted.items():
        column, other = db.execute(
            'SELECT "from", "to" FROM pragma_foreign_key_list(?) WHERE id = ?', (table, key)
        ).get
        findings.append(
            chatd.Finding(
                f"{count} rows of {table} belong to no row of {parent}",
                _run(
                    path,
                    f"DELETE FROM {table} WHERE {column} NOT IN (SELECT {other} FROM {parent})",
                ),
            )
        )
    return findings


def _run(path: Path, sql: str) -> str:
    """A command that runs SQL in the file, with the SQLite that chatd brings."""
    text = f"import apsw; apsw.Connection({str(path)!r}).execute({' '.join(sql.split())!r})"
    return f"python -c {shlex.quote(text)}"
