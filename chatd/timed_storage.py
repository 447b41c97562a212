"""A storage whose operations are timed, and traced, whatever plugin it is of."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from functools import partial
from time import monotonic
from typing import Any, cast

from chatd.errors import RequestError, StorageUnavailable
from chatd.metrics import Metrics
from chatd.storage import Storage
from chatd.tracing import Tracing

Call = Callable[..., Awaitable[Any]]


def timed(storage: Storage, metrics: Metrics) -> Storage:
    """The same storage, with each operation of the protocol timed. All else of it is there as it is."""
    return cast("Storage", _Wrapped(storage, partial(_timed, metrics)))


def traced(storage: Storage, tracing: Tracing) -> Storage:
    """The same storage, whose operations are spans of what they are done for."""
    return cast("Storage", _Wrapped(storage, partial(_traced, tracing)))


class _Wrapped:
    def __init__(self, storage: Storage, wrap: Callable[[str, Call], Call]) -> None:
        self._storage = storage
        for name in _OPERATIONS:
            method = getattr(storage, name, None)
            if method is not None:
                setattr(self, name, wrap(name, method))

    def __getattr__(self, name: str) -> Any:
        # What the protocol does not have, and a plugin of its own may.
        return getattr(self._storage, name)


_OPERATIONS = [
    name
    for name, method in inspect.getmembers(Storage, inspect.iscoroutinefunction)
    if not name.startswith("_") and name != "close"
]


def _is_fault(error: BaseException) -> bool:
    """Whether an error is the storage's: what a client did wrong is not, nor that it went away."""
    if isinstance(error, StorageUnavailable):
        return True
    return isinstance(error, Exception) and not isinstance(error, RequestError)


def _timed(metrics: Metrics, name: str, method: Call) -> Call:
    labels, errors = (name,), metrics.storage_errors.values
    observe = metrics.storage[labels].observe

    async def call(*given: Any, **named: Any) -> Any:
        began = monotonic()
        try:
            return await method(*given, **named)
        except BaseException as error:
            if _is_fault(error):
                errors[labels] += 1
            raise
        finally:
            observe(monotonic() - began)

    return call


def _traced(tracing: Tracing, name: str, method: Call) -> Call:
    known = {"db.operation.name": name}

    async def call(*given: Any, **named: Any) -> Any:
        if not tracing.is_within:
            return await method(*given, **named)
        span, fault = tracing.begin(f"storage {name}", "client", known), None
        try:
            return await method(*given, **named)
        except BaseException as error:
            fault = type(error).__name__ if _is_fault(error) else None
            raise
        finally:
            tracing.end(span, {}, error=fault)

    return call
