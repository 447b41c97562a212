"""Answers from a file that `record` wrote, with the timing of then: no network, no model."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
from collections.abc import AsyncGenerator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, ClassVar, get_args

import chatd

from .record import FILE, MAX_LINE_BYTES, VERSION, asked, counted, digest

log = logging.getLogger(__name__)

MAX_RECORDINGS = 100_000
"""The most answers that a file may hold; where each stands is kept in memory, what it says is not."""

MAX_FILE_BYTES = 64 * 2**20
"""The largest file: it is read through in about 5 s, and on a busy machine in the 30 s there are."""

MAX_SECONDS = 86_400.0
"""The latest that an event of a recording may come."""

_Kind = chatd.ProviderErrorKind


# Reading


class Unreadable(ValueError):
    """A line is no recording; the text says why, and quotes nothing of it."""


@dataclass(frozen=True, slots=True)
class Recording:
    """An answer: events with the seconds after which each came, and how it failed if it did."""

    digest: bytes
    events: tuple[tuple[float, chatd.Event], ...]
    error: tuple[float, chatd.ProviderError] | None


def recording_of(line: bytes, where: str) -> Recording:
    """Reads a line, which stands at `where`. Raises `Unreadable`."""
    try:
        value = json.loads(line.decode(), parse_constant=_no_number)
    except (ValueError, RecursionError):
        raise Unreadable("is not JSON") from None
    if not isinstance(value, dict):
        raise Unreadable("is not a JSON object")
    version = value.get("version")
    if type(version) is not int or version < 1:
        raise Unreadable('has no "version"')
    if version > VERSION:
        raise Unreadable(
            f"was written by a newer chatd (version {version} of the format, this one reads up to "
            f"{VERSION}): replay it with that one"
        )
    events = tuple(_events(_part(value, "events", list)))
    error = _error(_part(value, "error", dict), where) if "error" in value else None
    ends = [isinstance(event, chatd.Finish) for _, event in events]
    if any(ends[:-1]) or (any(ends) and error):
        raise Unreadable("goes on after its end")
    if not any(ends) and not error:
        raise Unreadable('has neither a "finish" nor an "error" at its end')
    try:
        asked = digest(_asked(_part(value, "request", dict)))
    except RecursionError:
        raise Unreadable("is nested too deep") from None
    return Recording(asked, events, error)


def _no_number(name: str) -> None:
    raise ValueError(name)


def _part(value: Mapping[str, Any], name: str, kind: type) -> Any:
    if not isinstance(part := value.get(name), kind):
        raise Unreadable(f'has no "{name}", or one of the wrong type')
    return part


def _asked(request: dict[str, Any]) -> dict[str, Any]:
    """What was asked, if it is as `record.asked` gives it."""
    _part(request, "model", str)
    for message in _part(request, "messages", list):
        if not isinstance(message, dict):
            raise Unreadable("has a message that is not an object")
        _part(message, "role", str)
        if not isinstance(message.get("content", ""), str | list):
            raise Unreadable('has a message whose "content" is neither text nor a list of parts')
    return counted(request)


def _events(values: list[Any]) -> Iterator[tuple[float, chatd.Event]]:
    for i, value in enumerate(values):
        if not isinstance(value, dict):
            raise Unreadable(f"has an event {i} that is not an object")
        try:
            at, text = _at(value), value.get("text")
            # Nearly all are of this kind.
            if text and type(text) is str and len(value) == 2:
                yield at, chatd.TextDelta(text)
            else:
                yield at, _event(value)
        except (TypeError, ValueError) as error:
            told = error if isinstance(error, Unreadable) else "is none that chatd knows"
            raise Unreadable(f"has an event {i} that {told}") from None


def _at(value: Mapping[str, Any]) -> float:
    at: Any = value.get("at")
    if type(at) not in (int, float) or not 0 <= at <= MAX_SECONDS:
        raise Unreadable('has no "at", a number of seconds')
    return float(at)


def _event(value: dict[str, Any]) -> chatd.Event:
    match {name: part for name, part in value.items() if name != "at"}:
        case {"reasoning": str(text), **rest} if not rest:
            return chatd.ReasoningDelta(text)
        case {"tool_call": dict(call), **rest} if not rest:
            return _tool_call(call)
        case {"usage": dict(usage), **rest} if not rest:
            return chatd.UsageReport(_usage(usage))
        case {"generation_id": str(id), **rest} if not rest:
            return chatd.GenerationId(id)
        case {"finish": reason, **rest} if reason in get_args(chatd.FinishReason):
            model = rest.pop("model", None)
            if not rest and isinstance(model, str | None):
                return chatd.Finish(reason, model)
    raise ValueError


def _tool_call(call: dict[str, Any]) -> chatd.ToolCallDelta:
    delta = chatd.ToolCallDelta(**call)
    texts = (delta.id or "", delta.name or "", delta.arguments)
    if type(delta.index) is not int or not all(isinstance(text, str) for text in texts):
        raise ValueError
    return delta


def _usage(usage: dict[str, Any]) -> chatd.Usage:
    for name, count in usage.items():
        kinds = (int, float) if name == "cost_usd" else (int,)
        if type(count) not in kinds or not 0 <= count < 2**53:
            raise ValueError
    return chatd.Usage(**usage)


def _error(value: dict[str, Any], where: str) -> tuple[float, chatd.ProviderError]:
    numbers = [value[name] for name in ("status", "retry_after") if name in value]
    flags = [value[name] for name in ("retryable", "reached_model") if name in value]
    known = (
        value.get("kind") in list(_Kind)
        and type(value.get("status", 0)) is int
        and all(type(n) in (int, float) and 0 <= n < 2**53 for n in numbers)
        and all(isinstance(flag, bool) for flag in flags)
    )
    if not known:
        raise Unreadable('has an "error" that is none that chatd knows')
    try:
        at = _at(value)
    except Unreadable as error:
        raise Unreadable(f"has an error that {error}") from None
    return at, chatd.ProviderError(
        _Kind(value["kind"]),
        f"the answer that {where} recorded failed so",
        status=value.get("status"),
        retry_after=value.get("retry_after"),
        retryable=value.get("retryable"),
        reached_model=value.get("reached_model", False),
    )


# The file


@dataclass(frozen=True, slots=True)
class Place:
    """Where a recording stands: the number of its line, from 1, and its bytes."""

    line: int
    offset: int
    length: int


def places(path: Path) -> Iterator[tuple[bytes, Place]]:
    """Every recording of a file, as the digest of what was asked and its place.

    Raises `PluginError` for a file that cannot be replayed.
    """
    try:
        with path.open("rb") as file:
            yield from _places(path, file)
    except FileNotFoundError:
        raise chatd.PluginError(
            f"replay: there is no file {path}: record answers into it with `use: record`"
        ) from None
    except OSError as error:
        raise chatd.PluginError(f"replay: {path} cannot be read: {error.strerror}") from None


def _places(path: Path, file: BinaryIO) -> Iterator[tuple[bytes, Place]]:
    if os.fstat(file.fileno()).st_size > MAX_FILE_BYTES:
        raise chatd.PluginError(f"replay: {path} has more than {MAX_FILE_BYTES} bytes: split it")
    offset, found = 0, 0
    for number in itertools.count(1):
        line = file.readline(MAX_LINE_BYTES + 1)
        if not line:
            break
        place = Place(number, offset, len(line))
        offset += len(line)
        if not line.strip() and len(line) <= MAX_LINE_BYTES:
            continue
        try:
            if len(line) > MAX_LINE_BYTES:
                raise Unreadable(f"has more than {MAX_LINE_BYTES} bytes")
            recording = recording_of(line, f"{path}:{number}")
        except Unreadable as error:
            if len(line) <= MAX_LINE_BYTES and _is_torn(line):
                log.warning(
                    "replay: %s:%d: the last line is not whole and is left out", path, number
                )
                break
            raise chatd.PluginError(f"replay: {path}:{number}: the line {error}") from None
        found += 1
        if found > MAX_RECORDINGS:
            raise chatd.PluginError(
                f"replay: {path}:{number}: there are more than {MAX_RECORDINGS} recordings: "
                "split the file"
            )
        yield recording.digest, place
    if not found:
        raise chatd.PluginError(
            f"replay: {path} holds no recording: record answers into it with `use: record`"
        )


def _is_torn(line: bytes) -> bool:
    """Whether a line has no end and is a part of JSON, as is left when its writer is killed."""
    if line.endswith(b"\n") or not line.startswith(b"{"):
        return False
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return True
    return False


def _read(path: Path, place: Place) -> bytes:
    with path.open("rb") as file:
        file.seek(place.offset)
        return file.read(place.length)


# Answering


class Replay:
    """`chatd.Provider` that answers what was answered before.

    :param speed: how many times as quick as then; 0 is at once.
    :param any_other: whether a request that was not recorded is answered with the next recording.
    """

    takes: ClassVar[frozenset[str]] = frozenset({"tools", "images"})

    def __init__(
        self, path: Path, found: list[tuple[bytes, Place]], speed: float, any_other: bool
    ) -> None:
        self._path = path
        self._speed = speed
        self._all = found
        self._by_digest: dict[bytes, list[int]] = {}
        for i, (key, _) in enumerate(found):
            self._by_digest.setdefault(key, []).append(i)
        self._played: dict[bytes, int] = {}
        self._any_other = any_other
        self._others = 0

    async def stream(self, request: chatd.ProviderRequest) -> AsyncGenerator[chatd.Event, None]:
        loop = asyncio.get_running_loop()
        began = loop.time()
        recording = await self._recording(self._next(request))
        for at, event in recording.events:
            await self._wait(began, at)
            yield event
        if recording.error is not None:
            at, error = recording.error
            await self._wait(began, at)
            raise error

    async def _wait(self, began: float, at: float) -> None:
        """Waits until the time of an event; in any case others get their turn."""
        now = asyncio.get_running_loop().time()
        due = began + at / self._speed if self._speed else now
        await asyncio.sleep(max(0, due - now))

    def _next(self, request: chatd.ProviderRequest) -> int:
        """Which recording answers a request."""
        key = digest(asked(request))
        if same := self._by_digest.get(key):
            played = self._played.get(key, 0)
            self._played[key] = (played + 1) % len(same)
            return same[played]
        if not self._any_other:
            raise chatd.ProviderError(
                _Kind.INVALID_REQUEST,
                f"{self._path} has no answer to this request (model {request.model}, "
                f"{len(request.messages)} messages): record one, with `use: record` and the same "
                "file, or answer with any recording: `otherwise: any`",
                retryable=False,
            )
        other, self._others = self._others, (self._others + 1) % len(self._all)
        return other

    async def _recording(self, i: int) -> Recording:
        key, place = self._all[i]
        try:
            line = await asyncio.to_thread(_read, self._path, place)
            recording = recording_of(line, f"{self._path}:{place.line}")
            if recording.digest == key:
                return recording
        except (OSError, Unreadable):
            pass
        raise chatd.ProviderError(
            _Kind.INVALID_REQUEST,
            f"{self._path}:{place.line} is not what it was when chatd started: start chatd again",
            retryable=False,
        )

    async def check(self) -> None:
        await self._recording(len(self._all) - 1)

    async def close(self) -> None:
        pass


async def open_replay(settings: Mapping[str, Any]) -> Replay:
    """Reads through the file. Raises `PluginError` with the line that cannot be replayed."""
    path = Path(settings["file"])
    found = await asyncio.to_thread(lambda: list(places(path)))
    return Replay(path, found, settings.get("speed", 1), settings.get("otherwise") == "any")


_SETTINGS = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "required": ["file"],
    "properties": {
        "file": {**FILE, "description": "A file that `record` wrote."},
        "speed": {
            "type": "number",
            "minimum": 0,
            "maximum": 1000,
            "default": 1,
            "description": "How many times as quick as then; 0 is at once.",
        },
        "otherwise": {
            "enum": ["fail", "any"],
            "default": "fail",
            "description": "What to do with a request that was never recorded.",
        },
    },
}


@chatd.hookimpl
def chatd_register_provider(register: chatd.ProviderRegister) -> None:
    register.add("replay", open_replay, _SETTINGS, "recorded answers, without a network")
