"""Asks another provider and writes each answer to a file, which `replay` answers from.

The file's format is here once: a line of JSON for each answer (docs/record-replay.md).
"""

from __future__ import annotations

import asyncio
import fcntl
import hashlib
import json
import logging
import os
import re
import stat
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import chatd

log = logging.getLogger(__name__)

VERSION = 1
"""The version of the format. A line with a higher one is not read."""

MAX_ANSWER_BYTES = chatd.MAX_EVENT_BYTES
"""The largest answer that is recorded, as it stands in the file."""

MAX_LINE_BYTES = 2 * chatd.MAX_EVENT_BYTES
"""The longest line: an answer with what was asked."""

MAX_WAITING_BYTES = 8 * chatd.MAX_EVENT_BYTES
"""What may wait for a slow disk; answers beyond it are not recorded."""

WRITE_SECONDS = 1.0
"""How long the end of an answer waits to be written before it is told all the same."""

_Kind = chatd.ProviderErrorKind


# The format

OF_A_REQUEST = ("model", "messages", "max_output_tokens", "temperature", "parameters")
OF_A_MESSAGE = ("role", "content", "tool_calls", "tool_call_id")
_NOTHING: tuple[Any, ...] = (None, "", [], (), {})


def asked(request: chatd.ProviderRequest) -> dict[str, Any]:
    """What of a request is recorded and makes two requests the same.

    Not in it: who asks (`user`, `session_id`), how the answer is to come (`stream`, `timeouts`)
    and `options`, which are a kind of provider's own.
    """
    messages = [
        {name: getattr(message, "whole" if name == "content" else name) for name in OF_A_MESSAGE}
        for message in request.messages
    ]
    whole = {name: getattr(request, name) for name in OF_A_REQUEST}
    return counted({**whole, "messages": messages, "parameters": dict(request.parameters)})


def counted(request: Mapping[str, Any]) -> dict[str, Any]:
    """What counts of a request as `asked` gives it or the file has it: what is not empty."""
    whole = {name: request[name] for name in OF_A_REQUEST if request.get(name) not in _NOTHING}
    whole["messages"] = [
        {name: message[name] for name in OF_A_MESSAGE if message.get(name) not in _NOTHING}
        for message in request["messages"]
    ]
    return whole


def digest(asked: Mapping[str, Any]) -> bytes:
    """The same for two requests when all that counts of them is: 32 bytes.

    Neither the order of keys counts nor how a number is written.
    """
    text = json.dumps(_plain(asked), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).digest()


def _plain(value: Any) -> Any:
    """`value` with 1 for 1.0, which some databases give back for it."""
    if isinstance(value, Mapping):
        return {str(name): _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _known(**values: Any) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def event_json(event: chatd.Event) -> dict[str, Any]:
    """An event as it stands in the file, but for its time. Raises `TypeError` for what is none."""
    match event:
        case chatd.TextDelta(text):
            return {"text": text}
        case chatd.ReasoningDelta(text):
            return {"reasoning": text}
        case chatd.ToolCallDelta():
            return {"tool_call": _known(**asdict(event))}
        case chatd.UsageReport(usage):
            return {"usage": _known(**asdict(usage))}
        case chatd.GenerationId(id):
            return {"generation_id": id}
        case chatd.Finish(reason, model):
            return _known(finish=reason, model=model)
    raise TypeError(f"{type(event).__name__} is not an event")


def error_json(error: BaseException) -> dict[str, Any]:
    """How an answer failed, without a word of the provider's: such could hold what it should not."""
    if isinstance(error, chatd.ProviderError):
        return _known(
            kind=str(error.kind),
            status=error.status,
            retry_after=error.retry_after,
            retryable=error.retryable,
            reached_model=error.reached_model,
        )
    cut = isinstance(error, GeneratorExit | asyncio.CancelledError | StopAsyncIteration)
    kind = _Kind.INCOMPLETE if cut else _Kind.PROTOCOL
    return {"kind": str(kind), "retryable": True, "reached_model": True}


def _encoded(value: Any) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    try:
        return text.encode()
    except UnicodeEncodeError:
        # Half a character, which UTF-8 cannot hold and JSON can escape.
        return json.dumps(value, separators=(",", ":")).encode()


# Recording


class _Answer:
    """An answer as it comes; what is kept of it in memory is bounded.

    `lost` says why it is not recorded.
    """

    def __init__(self, request: chatd.ProviderRequest) -> None:
        self.request = request
        self.events = bytearray()
        self.error: dict[str, Any] | None = None
        self.ended = False
        self.lost: str | None = None
        self._when = datetime.now(UTC)
        self._began = asyncio.get_running_loop().time()

    def _at(self) -> float:
        return round(asyncio.get_running_loop().time() - self._began, 3)

    def add(self, event: chatd.Event) -> None:
        """Keeps an event with its time."""
        if self.lost:
            return
        try:
            more = _encoded({"at": self._at(), **event_json(event)})
        except (TypeError, ValueError) as error:
            # The router tells of it, as of every provider that breaks the contract.
            self._lose(f"an event cannot be written ({type(error).__name__})")
            return
        if len(self.events) + len(more) + 1 > MAX_ANSWER_BYTES:
            self._lose(f"it is larger than {MAX_ANSWER_BYTES} bytes")
            return
        self.events += b"," * bool(self.events) + more

    def fail(self, error: BaseException) -> None:
        """Keeps how the answer failed, unless it has ended."""
        if not self.ended:
            self.error = {"at": self._at(), **error_json(error)}

    def line(self) -> bytes:
        """The line for the file, without its end. Raises `ValueError` or `TypeError`."""
        head = {
            "version": VERSION,
            "recorded_at": self._when.isoformat(timespec="seconds"),
            "stream": self.request.stream,
            "request": asked(self.request),
        }
        error = b',"error":' + _encoded(self.error) if self.error else b""
        line = _encoded(head)[:-1] + b',"events":[' + self.events + b"]" + error + b"}"
        if len(line) > MAX_LINE_BYTES:
            raise ValueError(f"with what was asked it is larger than {MAX_LINE_BYTES} bytes")
        return line

    def _lose(self, reason: str) -> None:
        self.lost = reason
        self.events.clear()


class _File:
    """Appends answers to a file, each whole, in a thread."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, "chatd-record")
        self._writing: set[asyncio.Future[None]] = set()
        self._waiting_bytes = 0

    async def open(self) -> None:
        """Makes the file if there is none. Raises `PluginError` when it cannot be written."""
        try:
            await asyncio.to_thread(_append, self._path, b"", check=True)
        except OSError as error:
            raise chatd.PluginError(
                f"record: {self._path} cannot be written: {error.strerror}"
            ) from None

    def put(self, answer: _Answer) -> Iterable[asyncio.Future[None]]:
        """Begins to write an answer, once; what is returned is done when it is written.

        What cannot be written is logged and harms no answer.
        """
        if answer.ended:
            return ()
        answer.ended = True
        if not answer.lost and self._waiting_bytes > MAX_WAITING_BYTES:
            answer.lost = f"{self._path} is written too slowly"
        if answer.lost:
            log.warning("record: an answer is not recorded: %s", answer.lost)
            return ()
        size = len(answer.events)
        writing = asyncio.get_running_loop().run_in_executor(self._thread, self._write, answer)
        self._writing.add(writing)
        self._waiting_bytes += size
        writing.add_done_callback(lambda done: self._written(done, size))
        return (writing,)

    def _write(self, answer: _Answer) -> None:
        _append(self._path, answer.line() + b"\n")

    def _written(self, done: asyncio.Future[None], size: int) -> None:
        self._writing.discard(done)
        self._waiting_bytes -= size
        if not done.cancelled() and (error := done.exception()) is not None:
            told = error.strerror if isinstance(error, OSError) else error
            log.error("record: an answer is not recorded in %s: %s", self._path, told)

    async def close(self) -> None:
        """Returns when all is written."""
        if self._writing:
            await asyncio.wait(self._writing)
        self._thread.shutdown(wait=False)


def _append(path: Path, line: bytes, *, check: bool = False) -> None:
    """Appends a line, whole or not at all. Raises `OSError`; `PluginError` for another file."""
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC
    # Nobody else on the machine is to read what visitors say.
    file = os.open(path, flags, 0o600)
    try:
        # Another process may record into the same file.
        fcntl.flock(file, fcntl.LOCK_EX)
        if check:
            _check(path, file)
        size = _mended(path, file)
        try:
            while line:
                line = line[os.write(file, line) :]
        except OSError:
            os.ftruncate(file, size)
            raise
    finally:
        os.close(file)


def _check(path: Path, file: int) -> None:
    """Refuses a file that holds anything else, and warns of one that others can read."""
    status = os.fstat(file)
    is_ours = stat.S_ISREG(status.st_mode) and (
        not status.st_size or re.match(rb'\s*\{\s*"version"\s*:', os.pread(file, 256, 0))
    )
    if not is_ours:
        raise chatd.PluginError(f"record: {path} holds no recordings: name another file")
    if status.st_mode & 0o077:
        log.warning(
            "record: other users of this machine may read %s, which holds what visitors say: "
            "chmod 600 it",
            path,
        )


def _mended(path: Path, file: int) -> int:
    """The size of the file, once its last line has an end: one of a killed process is cut off."""
    size = os.fstat(file).st_size
    if not size or os.pread(file, 1, size - 1) == b"\n":
        return size
    start = max(0, size - MAX_LINE_BYTES)
    rest = os.pread(file, size - start, start)
    torn = rest[rest.rfind(b"\n") + 1 :]
    if start and len(torn) == len(rest):
        raise chatd.PluginError(f"record: {path} holds no recordings: name another file")
    try:
        json.loads(torn)
    except (ValueError, RecursionError):
        log.warning("record: the last line of %s was not whole and is cut off", path)
        os.ftruncate(file, size - len(torn))
        return size - len(torn)
    os.write(file, b"\n")
    return size + 1


class Record:
    """`chatd.Provider` that hands everything to another one and keeps what it answers.

    It takes what the other takes, and has a `generation` when the other has.
    """

    generation: Callable[[str], Awaitable[chatd.Usage | None]]

    def __init__(self, inner: chatd.Provider, use: str, file: _File) -> None:
        self._inner = inner
        self.options_of: str = getattr(inner, "options_of", use)
        self._file = file
        self.takes: frozenset[str] = getattr(inner, "takes", frozenset())
        if (generation := getattr(inner, "generation", None)) is not None:
            self.generation = generation

    async def stream(self, request: chatd.ProviderRequest) -> AsyncGenerator[chatd.Event, None]:
        answer = _Answer(request)
        try:
            async with aclosing(self._inner.stream(request)) as events:
                async for event in events:
                    answer.add(event)
                    if isinstance(event, chatd.Finish):
                        await self._keep(answer)
                        yield event
                        return
                    yield event
            answer.fail(StopAsyncIteration())
            await self._keep(answer)
        except (GeneratorExit, asyncio.CancelledError) as cut:
            # Whoever hung up does not wait.
            answer.fail(cut)
            self._file.put(answer)
            raise
        except Exception as error:
            answer.fail(error)
            await self._keep(answer)
            raise

    async def _keep(self, answer: _Answer) -> None:
        """Writes the answer; a slow disk holds it up for `WRITE_SECONDS` at most."""
        if writing := self._file.put(answer):
            await asyncio.wait(writing, timeout=WRITE_SECONDS)

    async def check(self) -> None:
        await self._inner.check()

    async def close(self) -> None:
        try:
            await self._file.close()
        finally:
            await self._inner.close()


FILE = {"type": "string", "minLength": 1}
_SETTINGS = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "required": ["file", "of"],
    "properties": {
        "file": {**FILE, "description": "Where the answers go, a line each; made when missing."},
        "of": {
            "type": "object",
            "required": ["use"],
            "properties": {"use": {"type": "string", "minLength": 1}},
            "x-use": "provider",
            "description": "The provider that is asked: `use` and its own settings.",
        },
    },
}


@chatd.hookimpl
def chatd_register_provider(register: chatd.ProviderRegister) -> None:
    async def open_record(settings: Mapping[str, Any]) -> Record:
        inner = dict(settings["of"])
        file = _File(Path(settings["file"]))
        await file.open()
        # Last, since nothing that could fail may come after it.
        use = inner.pop("use")
        return Record(await register.open(use, inner), use, file)

    register.add("record", open_record, _SETTINGS, "another provider, with its answers recorded")
