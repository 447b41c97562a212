"""Storage in PostgreSQL without PostgREST: the same functions, called through asyncpg."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import orjson

import chatd

from .supabase import RETRY_PAUSES, FunctionStorage

if TYPE_CHECKING:
    import asyncpg

_INSTALL = "postgres: asyncpg is not installed. Type: pip install 'chatd[postgres]'"
_SCHEMA = "run schema.sql in it (`chatd migrate`)"


class PostgresStorage(FunctionStorage):
    """`chatd.Storage` by direct calls over a pool of connections."""

    def __init__(self, pool: asyncpg.Pool, timeout: float) -> None:
        super().__init__(self._call_function)
        self._pool = pool
        self._timeout = timeout

    async def close(self) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                await self._pool.close()
        except TimeoutError:
            self._pool.terminate()

    async def _call_function(self, function: str, args: Mapping[str, Any]) -> Any:
        import asyncpg  # noqa: PLC0415 - an extra

        names = ", ".join(f"{name} => ${i}::jsonb" for i, name in enumerate(args, start=1))
        values = [orjson.dumps(value).decode() for value in args.values()]
        sql = f"SELECT to_jsonb(public.{function}({names}))"
        failure: Exception | None = None
        try:
            async with asyncio.timeout(self._timeout * 2):
                for pause in (*RETRY_PAUSES, None):
                    try:
                        answer = await self._pool.fetchval(sql, *values, timeout=self._timeout)
                        return None if answer is None else orjson.loads(answer)
                    except (asyncpg.UndefinedFunctionError, asyncpg.UndefinedTableError) as error:
                        raise chatd.StorageUnavailable(f"postgres: {error}: {_SCHEMA}") from error
                    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
                        failure = error
                    if pause is None or function == "chatd_add_chatbot":
                        break
                    await asyncio.sleep(pause)
        except TimeoutError:
            failure = TimeoutError(f"{function} took too long")
        raise chatd.StorageUnavailable(
            f"postgres: {type(failure).__name__}: {failure}"
        ) from failure


async def open_postgres(settings: Mapping[str, Any]) -> PostgresStorage:
    """Makes a pool from the settings; connections are made when they are needed."""
    try:
        import asyncpg  # noqa: PLC0415 - an extra
    except ImportError:
        raise chatd.PluginError(_INSTALL) from None
    timeout = settings.get("timeout", 4)
    pool = asyncpg.create_pool(
        settings["url"],
        min_size=0,
        max_size=settings.get("connections", 8),
        timeout=timeout,
    )
    return PostgresStorage(await pool, timeout)


_SETTINGS = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "required": ["url"],
    "properties": {
        "url": {
            "type": "string",
            "pattern": "^postgres(ql)?://",
            "x-error": "must be like postgresql://user:password@host:5432/database",
            "description": "The database, like postgresql://user:password@host:5432/database.",
        },
        "connections": {
            "type": "integer",
            "minimum": 1,
            "maximum": 100,
            "default": 8,
            "description": "The most connections to the database.",
        },
        "timeout": {
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 60,
            "default": 4,
            "description": "Seconds for one call; with repetitions it may take twice as long.",
        },
    },
}


@chatd.hookimpl
def chatd_register_storage(register: chatd.StorageRegister) -> None:
    register.add("postgres", open_postgres, _SETTINGS, "PostgreSQL, without PostgREST")
