"""A storage whose operations are timed, whatever plugin it is of."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable
from time import monotonic
from typing import Any, cast

from chatd.errors import RequestError, StorageUnavailable
from chatd.metrics import Metrics
from chatd.storage import Storage


def timed(storage: Storage, metrics: Metrics) -> Storage:
    """The same storage, with each operation of the protocol timed. All else of it is there as it is."""
    return cast("Storage", _Timed(storage, metrics))


class _Timed:
    def __init__(self, storage: Storage, metrics: Metrics) -> None:
        self._storage = storage
        for name in _OPERATIONS:
            method = getattr(storage, name, None)
            if method is not None:
                setattr(self, name, _timed(name, method, metrics))

    def __getattr__(self, name: str) -> Any:
        # What the protocol does not have, and a plugin of its own may.
        return getattr(self._storage, name)


_OPERATIONS = [
    name
    for name, method in inspect.getmembers(Storage, inspect.iscoroutinefunction)
    if not name.startswith("_") and name != "close"
]


def _timed(
    name: str, method: Callable[..., Awaitable[Any]], metrics: Metrics
) -> Callable[..., Awaitable[Any]]:
    labels, errors = (name,), metrics.storage_errors.values
    observe = metrics.storage[labels].observe

    async def call(*given: Any, **named: Any) -> Any:
        began = monotonic()
        try:
            return await method(*given, **named)
        except StorageUnavailable:
            errors[labels] += 1
            raise
        except RequestError:
            # What the client did: storage is well.
            raise
        except Exception:
            errors[labels] += 1
            raise
        finally:
            observe(monotonic() - began)

    return call
