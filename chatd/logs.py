"""Logs: lines of JSON on stdout, or plain text where a person reads along."""

from __future__ import annotations

import asyncio
import logging
import sys
import time
import traceback
from collections import deque
from collections.abc import Mapping
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import lru_cache
from typing import Any, TextIO

import orjson

request_id: ContextVar[str | None] = ContextVar("request_id", default=None)
"""The id of the request that is being handled, for every line that is logged meanwhile."""

access_log = logging.getLogger("chatd.access")


class JsonFormatter(logging.Formatter):
    """One JSON object a line: time, level, logger, message, request id and what `extra` adds."""

    def format(self, record: logging.LogRecord) -> str:
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        if record.exc_info:
            fields = {**fields, "exception": self.formatException(record.exc_info)}
        level = record.levelname.lower()
        return _line(record.created, level, record.name, record.getMessage(), fields)


class LineHandler(logging.StreamHandler[TextIO]):
    """Writes records, and lines that are whole already: for each request there is one.

    The lines of one turn of the event loop are written together, before anything that follows them.
    """

    def __init__(self, stream: TextIO) -> None:
        super().__init__(stream)
        self._lines: deque[str] = deque()
        self._due: asyncio.AbstractEventLoop | None = None

    @property
    def is_json(self) -> bool:
        """Whether the lines are JSON."""
        return isinstance(self.formatter, JsonFormatter)

    def say(self, line: str) -> None:
        """Writes a line, which is what `handle` does at twice the cost."""
        self._lines.append(line + "\n")
        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            self.flush()
            return
        if self._due is not loop:
            self._due = loop
            loop.call_soon(self._write_due)

    def _write_due(self) -> None:
        self._due = None
        if self._lines:
            self.flush()

    def emit(self, record: logging.LogRecord) -> None:
        if self._lines:
            self.flush()
        super().emit(record)

    def flush(self) -> None:
        """Writes the lines that wait; when that fails they are lost, as a record is."""
        lines: list[str] = []
        self.acquire()
        try:
            # One by one: another thread may add one meanwhile.
            while self._lines:
                lines.append(self._lines.popleft())
            if lines:
                self.stream.write("".join(lines))
            super().flush()
        except Exception:
            if not lines:
                raise
            self.handleError(logging.makeLogRecord({"msg": "".join(lines)}))
        finally:
            self.release()


def _line(created: float, level: str, logger: str, message: str, fields: Mapping[str, Any]) -> str:
    second = int(created)
    line: dict[str, Any] = {
        "time": f"{_second(second)}.{int((created - second) * 1000):03d}+00:00",
        "level": level,
        "logger": logger,
        "message": message,
    }
    if (id := request_id.get()) is not None:
        line["request_id"] = id
    line.update(fields)
    return orjson.dumps(line, default=str).decode()


@lru_cache(1)
def _second(seconds: int) -> str:
    """A time in UTC, without its zone."""
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")


class TextFormatter(logging.Formatter):
    """A line for a person."""

    def format(self, record: logging.LogRecord) -> str:
        time = datetime.fromtimestamp(record.created).strftime("%H:%M:%S")
        fields: Mapping[str, Any] = getattr(record, "fields", {})
        if record.name == access_log.name:
            code = f" {fields['code']}" if fields.get("code") else ""
            text = (
                f"{fields['method']} {fields['route']} {fields['status']}{code} {fields['ms']} ms"
                f"  [{fields.get('request_id', '-')}]"
            )
        else:
            text = f"{record.levelname.lower()}: {record.getMessage()}"
            if (id := request_id.get()) is not None:
                text += f"  [{id}]"
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        return f"{time} {text}"


def trace(error: BaseException) -> str:
    """Where an exception came from and its kind, without its text: that may hold what was said."""
    return f"{type(error).__name__}\n" + "".join(traceback.format_tb(error.__traceback__)).rstrip()


def set_up(level: str) -> None:
    """Sends all logs to stdout, as text on a terminal and as JSON elsewhere."""
    handler = LineHandler(sys.stdout)
    handler.setFormatter(TextFormatter() if sys.stdout.isatty() else JsonFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    # One line a request is chatd's own; Tornado's would be a second.
    logging.getLogger("tornado.access").propagate = False
    # At "info" it quotes headers of requests that are not HTTP, which may hold a key.
    logging.getLogger("tornado.general").setLevel(logging.WARNING)


def log_request(fields: Mapping[str, Any]) -> None:
    """Logs a request that was answered: names, numbers and ids, never what was said."""
    status = fields["status"]
    level = logging.ERROR if status >= 500 else logging.INFO
    if access_log.isEnabledFor(level):
        match logging.getLogger().handlers:
            case [LineHandler() as only] if only.is_json and not access_log.handlers:
                name = "error" if level == logging.ERROR else "info"
                only.say(_line(time.time(), name, access_log.name, "request", fields))
                return
        # As `access_log.log` does, but for looking where it was called from.
        record = logging.LogRecord(access_log.name, level, "", 0, "request", (), None)
        record.fields = fields
        access_log.handle(record)
