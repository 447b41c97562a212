"""Storage in PostgreSQL without PostgREST: the same functions, called through asyncpg.

And the command `chatd migrate`, which needs a connection that PostgREST cannot give.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import orjson

import chatd

from .supabase import RETRY_PAUSES, FunctionStorage

if TYPE_CHECKING:
    import asyncpg

_INSTALL = "postgres: asyncpg is not installed. Type: pip install 'chatd[postgres]'"
_CURES = {
    ("42883", "42P01"): "run schema.sql in it (`chatd migrate`)",
    ("42501",): "a grant is missing: use the role that ran schema.sql",
    ("28000", "28P01", "3D000"): "check DATABASE_URL",
}
"""What to do about an SQLSTATE that would be the same if it was tried again."""


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

    async def diagnose(self) -> Sequence[chatd.Finding]:
        import asyncpg  # noqa: PLC0415 - an extra

        try:
            async with asyncio.timeout(self._timeout * 2), self._pool.acquire() as connection:
                # This version's doctor, who leaves nothing behind: also where there is no schema.
                transaction = connection.transaction()
                await transaction.start()
                try:
                    await connection.execute(doctor_sql())
                    found = orjson.loads(await connection.fetchval("SELECT pg_temp.chatd_doctor()"))
                finally:
                    await transaction.rollback()
        except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
            return [self._unanswered(f"postgres: {type(error).__name__}: {error}")]
        return [chatd.Finding(finding["problem"], finding["cure"]) for finding in found]

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
                    except (asyncpg.PostgresError, asyncpg.InterfaceError, OSError) as error:
                        if cure := _cure(error):
                            raise chatd.StorageUnavailable(f"postgres: {error}: {cure}") from error
                        failure = error
                    if pause is None or function == "chatd_add_chatbot":
                        break
                    await asyncio.sleep(pause)
        except TimeoutError:
            failure = TimeoutError(f"{function} took too long")
        raise chatd.StorageUnavailable(
            f"postgres: {type(failure).__name__}: {failure}"
        ) from failure


def _cure(error: Exception) -> str | None:
    """What the operator can do about an error that does not end by itself."""
    code = getattr(error, "sqlstate", None)
    return next((cure for codes, cure in _CURES.items() if code in codes), None)


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
            "x-place": "address",
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


def doctor_sql() -> str:
    """SQL that makes schema.sql's `chatd_doctor` for this connection alone."""
    name = "CREATE OR REPLACE FUNCTION public.chatd_doctor()"
    text, end = schema_sql().split(name, 1)[1].split("\nEND $$;\n", 1)[0], "\nEND $$;\n"
    return name.replace("public.", "pg_temp.") + text + end


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


async def _check(context: chatd.CommandContext, config: Path | None) -> None:
    """Returns when the configured storage is at this version. Raises `StorageUnavailable`."""
    async with context.open_storage(config) as storage:
        await storage.check()


async def _seen(context: chatd.CommandContext) -> bool:
    """Whether PostgREST, if it is what the configuration uses, knows of what was applied."""
    try:
        if context.storage_name() != "supabase":
            return True
        async with context.open_storage() as storage:
            for pause in RETRY_PAUSES:
                with contextlib.suppress(chatd.StorageUnavailable):
                    await storage.check()
                    return True
                await asyncio.sleep(pause)
    except (chatd.ConfigError, chatd.PluginError):
        return True
    return False


@click.command()
@click.option("--check", "only_check", is_flag=True, help="Only say whether it is up to date.")
@click.option(
    "--config",
    type=click.Path(path_type=Path, dir_okay=False),
    help="With --check: the configuration file whose storage is asked.",
)
@click.pass_obj
def migrate(context: chatd.CommandContext, only_check: bool, config: Path | None) -> None:
    """Bring the database of Supabase or PostgreSQL to this version, over $DATABASE_URL.

    Without DATABASE_URL it prints schema.sql, for the SQL editor. With --check it asks the
    configured storage, and exits with 1 when something is to do.
    """
    if only_check:
        asyncio.run(_check(context, config))
        click.echo("Nothing is to do: the storage is at this version.")
    elif url := os.environ.get("DATABASE_URL"):
        asyncio.run(_apply(url))
        click.echo("The database is at this version now.")
        if not asyncio.run(_seen(context)):
            click.echo(
                "SUPABASE_URL does not answer with it yet. If both are the same project, run: "
                "NOTIFY pgrst, 'reload schema';",
                err=True,
            )
    else:
        click.echo("DATABASE_URL is not set: run this in the SQL editor.", err=True)
        click.echo(schema_sql(), nl=False)


@chatd.hookimpl
def chatd_register_commands(cli: click.Group) -> None:
    cli.add_command(migrate)
