"""Storage in PostgreSQL without PostgREST: the same functions, called through asyncpg.

And the command `chatd migrate`, which needs a connection that PostgREST cannot give.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

import chatd

from .supabase import RETRY_PAUSES, FunctionStorage, open_supabase

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


def schema_sql() -> str:
    """The text of schema.sql: beside the configurations in a wheel, above them in a checkout."""
    folder = Path(str(resources.files("chatd_config")))
    inside = folder / "schema.sql"
    path = inside if inside.is_file() else folder.parent / "schema.sql"
    return path.read_text(encoding="utf-8")


async def _apply(url: str) -> None:
    """Runs schema.sql in the database."""
    try:
        import asyncpg  # noqa: PLC0415 - an extra
    except ImportError:
        raise chatd.PluginError(_INSTALL) from None
    try:
        connection = await asyncpg.connect(url, timeout=10)
        try:
            await connection.execute(schema_sql())
        finally:
            await connection.close()
    except (asyncpg.PostgresError, OSError, ValueError) as error:
        raise chatd.StorageUnavailable(f"postgres: {type(error).__name__}: {error}") from error


async def _check() -> None:
    """Returns when the database is at this version. Raises `StorageUnavailable`."""
    if (url := os.environ.get("SUPABASE_URL")) and (key := os.environ.get("SUPABASE_KEY")):
        rest_path = os.environ.get("SUPABASE_REST_PATH", "/rest/v1")
        storage: FunctionStorage = await open_supabase(
            {"url": url, "key": key, "rest_path": rest_path}
        )
    elif url := os.environ.get("DATABASE_URL"):
        storage = await open_postgres({"url": url})
    else:
        raise chatd.PluginError("set SUPABASE_URL and SUPABASE_KEY, or DATABASE_URL")
    try:
        await storage.check()
    finally:
        await storage.close()


@click.command()
@click.option("--check", "only_check", is_flag=True, help="Only say whether it is up to date.")
def migrate(only_check: bool) -> None:
    """Bring the database of Supabase or PostgreSQL to this version, over $DATABASE_URL.

    Without DATABASE_URL it prints schema.sql, for the SQL editor. With --check it asks, through
    PostgREST where SUPABASE_URL and SUPABASE_KEY are set, and exits with 1 when something is to do.
    """
    url = os.environ.get("DATABASE_URL")
    try:
        if only_check:
            asyncio.run(_check())
            click.echo("The database is at this version.")
        elif url:
            asyncio.run(_apply(url))
            click.echo("The database is at this version now.")
        else:
            click.echo("DATABASE_URL is not set: run this in the SQL editor.", err=True)
            click.echo(schema_sql(), nl=False)
    except chatd.PluginError as error:
        click.echo(f"chatd: {error}", err=True)
        sys.exit(1)
    except chatd.StorageUnavailable as error:
        click.echo(f"chatd: {error.detail}", err=True)
        sys.exit(1)


@chatd.hookimpl
def chatd_register_commands(cli: click.Group) -> None:
    cli.add_command(migrate)
