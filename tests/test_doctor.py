"""`chatd doctor`: each kind of damage is named, and its cure cures it."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import apsw
import pytest
from chatd_plugins.postgres import PostgresStorage, open_postgres
from chatd_plugins.sqlite import open_sqlite
from chatd_plugins.supabase import open_supabase

from chatd.storage import Finding
from tests.postgres import ROLES, ROOT, Postgres, PostgREST, Supabase, jwt
from tests.support import chatd_command
from tests.test_schema import FIRST_VERSION, FUNCTIONS

SCHEMA = (ROOT / "schema.sql").read_text()


@pytest.fixture(scope="module")
def server() -> Iterator[Postgres]:
    server = Postgres()
    server.execute(ROLES)
    yield server
    server.close()


@pytest.fixture
def postgres(server: Postgres) -> Postgres:
    """A database with chatd's schema and nothing else."""
    server.execute(
        "DROP SCHEMA public CASCADE; CREATE SCHEMA public;"
        "GRANT USAGE ON SCHEMA public TO anon, authenticated, service_role;"
        "ALTER ROLE service_role BYPASSRLS;",
        SCHEMA,
    )
    return server


async def findings(server: Postgres, user: str = "postgres") -> list[Finding]:
    """What doctor says over a direct connection."""
    storage: PostgresStorage = await open_postgres(
        {"url": server.url.replace("postgres@", f"{user}@")}
    )
    try:
        return list(await storage.diagnose())
    finally:
        await storage.close()


def follow(server: Postgres, found: list[Finding]) -> None:
    """Does what the cures say."""
    for finding in found:
        sql, end, words = finding.cure.rpartition(";")
        server.execute(sql + end)
        if "schema.sql" in words:
            server.execute(SCHEMA)


DAMAGE = [
    ("ALTER TABLE turns DISABLE ROW LEVEL SECURITY", "row-level security is off", "turns"),
    (
        'CREATE POLICY "Allow anon select" ON chatbots FOR SELECT TO anon USING (true)',
        'the policy "Allow anon select" lets anon read the API keys',
        'DROP POLICY "Allow anon select" ON public.chatbots;',
    ),
    ("CREATE POLICY p ON turns USING (true)", "the policy p lets public read and change", "turns"),
    ("GRANT SELECT ON sessions TO anon", "anon may SELECT", "REVOKE ALL ON TABLE public.sessions"),
    ("GRANT SELECT (api_key) ON chatbots TO authenticated", "authenticated may SELECT", "REVOKE"),
    ("GRANT USAGE ON SEQUENCE conversations_id_seq TO PUBLIC", "public may USAGE", "SEQUENCE"),
    ("GRANT EXECUTE ON FUNCTION chatd_sweep TO PUBLIC", "public may call", "chatd_sweep"),
    ("REVOKE INSERT ON turns FROM service_role", "service_role may not INSERT", "GRANT INSERT"),
    ("REVOKE ALL ON FUNCTION chatd_sweep FROM service_role", "may not call", "GRANT EXECUTE"),
    ("REVOKE ALL ON SEQUENCE conversations_id_seq FROM service_role", "may not use", "SEQUENCE"),
    ("REVOKE USAGE ON SCHEMA public FROM service_role", "may not use the schema", "GRANT USAGE"),
    ("ALTER ROLE service_role NOBYPASSRLS", "hides every row", "BYPASSRLS"),
    ("DROP INDEX running_leases", "the index running_leases is missing", "schema.sql"),
    (
        "DROP INDEX turns_of_session; CREATE INDEX turns_of_session ON turns (seq)",
        "the index turns_of_session is not the one",
        "DROP INDEX public.turns_of_session; then run schema.sql",
    ),
    (
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'running_leases'::regclass",
        "the index running_leases is not valid",
        "DROP INDEX",
    ),
    ("ALTER TABLE chatbots DROP CONSTRAINT chatbots_api_key_key", "not unique", "ADD UNIQUE"),
    ("ALTER TABLE turns DROP CONSTRAINT turns_session_id_fkey", "refers to no row", "CASCADE"),
    (
        "ALTER TABLE sessions DROP CONSTRAINT sessions_chatbot_id_fkey,"
        " ADD FOREIGN KEY (chatbot_id) REFERENCES chatbots (id)",
        "is stopped by public.sessions",
        "DROP CONSTRAINT",
    ),
    ("DROP FUNCTION chatd_sweep", "functions are missing: chatd_sweep", "schema.sql"),
    ("ALTER FUNCTION chatd_sweep SECURITY DEFINER", "owner's rights", "SECURITY INVOKER"),
    ("ALTER FUNCTION chatd_sweep RESET search_path", "pin its search_path", "SET search_path"),
    ("DROP TRIGGER chatd_hash_api_key ON chatbots", "chatd_hash_api_key is missing", "schema.sql"),
    ("ALTER TABLE chatbots DISABLE TRIGGER chatd_hash_api_key", "is disabled", "ENABLE TRIGGER"),
    (
        "ALTER TABLE chatbots DISABLE TRIGGER chatd_hash_api_key;"
        "INSERT INTO chatbots (api_key, model_name) VALUES ('plain', 'm');"
        "ALTER TABLE chatbots ENABLE TRIGGER chatd_hash_api_key",
        "1 API keys are stored unhashed",
        "schema.sql",
    ),
    (
        "CREATE FUNCTION keys() RETURNS SETOF text LANGUAGE sql SECURITY DEFINER"
        " AS 'SELECT api_key FROM public.chatbots'",
        "keys(), with its owner's rights, lets anon, authenticated, public use chatd's tables",
        "REVOKE ALL ON ROUTINE public.keys() FROM public, anon, authenticated;",
    ),
    (
        "CREATE PROCEDURE forget() LANGUAGE plpgsql SECURITY DEFINER"
        " AS 'BEGIN PERFORM public.chatd_sweep(NULL); END'",
        "forget(), with its owner's rights",
        "REVOKE ALL ON ROUTINE public.forget()",
    ),
    ("GRANT service_role TO anon", "anon may become service_role", "REVOKE service_role FROM anon"),
    (
        "CREATE ROLE reader; GRANT SELECT (content) ON conversations TO reader;"
        "CREATE ROLE staff; GRANT reader TO staff; GRANT staff TO authenticated",
        "authenticated may become staff",
        "REVOKE staff FROM authenticated;",
    ),
    ("ALTER ROLE anon BYPASSRLS", "anon is not held by row-level", "ALTER ROLE anon NOBYPASSRLS;"),
    (
        "CREATE OR REPLACE FUNCTION chatd_sweep(args jsonb) RETURNS jsonb LANGUAGE sql"
        " SET search_path = '' AS $$ SELECT '0'::jsonb $$",
        "chatd_sweep(jsonb) is not what chatd makes it",
        "schema.sql",
    ),
    ("CREATE VIEW v AS SELECT * FROM chatbots; GRANT SELECT ON v TO anon", "the view", "REVOKE"),
    (
        "CREATE MATERIALIZED VIEW m AS SELECT content FROM conversations; GRANT SELECT ON m TO anon",
        "shows public.conversations to anon",
        "REVOKE",
    ),
    (
        "DROP TABLE usage_of_erased CASCADE",
        "the table public.usage_of_erased is missing",
        "schema.sql",
    ),
    ("GRANT SELECT ON usage_of_erased TO anon", "anon may SELECT", "public.usage_of_erased"),
    ("DROP INDEX usage_of_erased_day", "the index usage_of_erased_day is missing", "schema.sql"),
    ("DROP FUNCTION chatd_settle_turn", "functions are missing: chatd_settle_turn", "schema.sql"),
    ("ALTER TABLE turns DROP COLUMN side", "lacks the columns side", "schema.sql"),
    ("ALTER TABLE sessions DROP COLUMN channel", "lacks the columns channel", "schema.sql"),
    ("DROP TABLE turns CASCADE", "the table public.turns is missing", "schema.sql"),
    (
        "CREATE OR REPLACE FUNCTION chatd_schema_version() RETURNS integer LANGUAGE sql STABLE"
        " SET search_path = '' AS 'SELECT 1'",
        "the database has schema version 1",
        "schema.sql",
    ),
    ("DROP FUNCTION chatd_schema_version", "schema.sql has not been run here", "schema.sql"),
]


@pytest.mark.parametrize(("damage", "problem", "cure"), DAMAGE, ids=[d[0][:60] for d in DAMAGE])
async def test_each_damage_is_named_and_its_cure_cures_it(
    postgres: Postgres, damage: str, problem: str, cure: str
) -> None:
    assert await findings(postgres) == []
    postgres.execute(damage)
    found = await findings(postgres)
    assert any(problem in f.problem and cure in f.cure for f in found), found
    follow(postgres, found)
    assert await findings(postgres) == []


async def test_a_column_that_schema_sql_does_not_add_is_not_said_to_come_from_it(
    postgres: Postgres,
) -> None:
    postgres.execute("ALTER TABLE turns DROP COLUMN label")
    (found,) = await findings(postgres)
    assert found.problem == "the table public.turns lacks the columns label"
    assert found.cure == "restore the table from a backup"


async def test_policies_and_views_of_others_are_left_alone(postgres: Postgres) -> None:
    postgres.execute(
        "CREATE POLICY mine ON chatbots FOR SELECT TO service_role USING (true);"
        "CREATE VIEW mine AS SELECT * FROM chatbots; CREATE TABLE other (id int);"
        "GRANT ALL ON other TO anon; GRANT SELECT ON mine TO service_role;"
        "CREATE FUNCTION safe() RETURNS int LANGUAGE sql SECURITY DEFINER AS 'SELECT 1';"
        "CREATE FUNCTION own() RETURNS text LANGUAGE sql AS 'SELECT api_key FROM public.chatbots';"
        "CREATE FUNCTION noted() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER"
        " AS 'BEGIN DELETE FROM public.turns; RETURN NEW; END';"
        "CREATE FUNCTION others() RETURNS int LANGUAGE plpgsql SECURITY DEFINER"
        " AS 'BEGIN RETURN (SELECT count(*) FROM auth.sessions); END';"
        "CREATE FUNCTION inside() RETURNS text LANGUAGE sql SECURITY DEFINER"
        " AS 'SELECT api_key FROM public.chatbots'; REVOKE ALL ON FUNCTION inside() FROM PUBLIC;"
    )
    assert await findings(postgres) == []


async def test_an_empty_database_has_none_of_the_tables(server: Postgres) -> None:
    server.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public;")
    found = await findings(server)
    assert [f.cure for f in found] == ["run schema.sql (`chatd migrate`)"]
    follow(server, found)
    server.execute("GRANT USAGE ON SCHEMA public TO anon, authenticated, service_role;")
    assert await findings(server) == []


async def test_a_database_of_the_first_version_is_brought_up_to_date(server: Postgres) -> None:
    server.execute(
        'DROP SCHEMA public CASCADE; CREATE SCHEMA public; DROP EXTENSION IF EXISTS "uuid-ossp";'
        "GRANT USAGE ON SCHEMA public TO anon, authenticated, service_role;",
        FIRST_VERSION,
        'CREATE POLICY "Allow anon select" ON chatbots FOR SELECT TO anon USING (true);'
        "GRANT SELECT ON chatbots TO anon;",
    )
    found = await findings(server)
    assert 'DROP POLICY "Allow anon select" ON public.chatbots;' in [f.cure for f in found]
    server.execute(SCHEMA)
    (left,) = await findings(server)
    assert left.problem == 'the policy "Allow anon select" lets anon read the API keys'
    follow(server, [left])
    assert await findings(server) == []


async def test_a_plain_postgresql_without_supabases_roles_is_healthy() -> None:
    plain = Postgres()
    try:
        plain.execute(SCHEMA)
        assert await findings(plain) == []
    finally:
        plain.close()


async def test_a_user_who_may_nothing_or_sees_nothing_is_told_so(postgres: Postgres) -> None:
    postgres.execute("DROP ROLE IF EXISTS app; CREATE ROLE app LOGIN;")
    postgres.execute("GRANT USAGE ON SCHEMA public TO app;")
    found = await findings(postgres, "app")
    told = "\n".join(f.problem for f in found)
    assert "app may not SELECT, INSERT, UPDATE, DELETE public.chatbots" in told
    assert "row-level security hides the rows of public.turns from app" in told
    follow(postgres, found)
    assert await findings(postgres, "app") == []
    postgres.execute("DROP OWNED BY app; DROP ROLE app;")


def test_the_functions_and_columns_that_doctor_looks_for_are_those_of_the_schema(
    postgres: Postgres,
) -> None:
    body = SCHEMA.split("FUNCTION public.chatd_doctor()")[1]
    (functions,) = re.findall(r"callable constant jsonb := '(.*?)';", body, re.DOTALL)
    assert sorted(json.loads(functions)) == FUNCTIONS
    (tables,) = re.findall(r"wanted constant jsonb := '(.*?)';", body, re.DOTALL)
    rows = postgres.execute(
        "SELECT table_name, column_name FROM information_schema.columns"
        " WHERE table_schema = 'public'"
    ).splitlines()
    wanted = {
        f"{table}|{column}" for table, names in json.loads(tables).items() for column in names
    }
    assert wanted == set(rows)


def test_doctor_knows_what_each_function_of_the_schema_does(postgres: Postgres) -> None:
    body = SCHEMA.split("FUNCTION public.chatd_doctor()")[1]
    (bodies,) = re.findall(r"bodies constant jsonb := '(.*?)';", body, re.DOTALL)
    made = postgres.execute(
        "SELECT proname, left(md5(prosrc), 8) FROM pg_proc WHERE proname LIKE 'chatd\\_%'"
        " AND proname <> 'chatd_doctor'"
    )
    assert json.loads(bodies) == dict(line.split("|") for line in made.splitlines())


# Through PostgREST


async def through(url: str, key: str | None = None) -> list[Finding]:
    storage = await open_supabase(
        {"url": url, "rest_path": "", "key": key or jwt("service_role"), "timeout": 1}
    )
    try:
        return list(await storage.diagnose())
    finally:
        await storage.close()


async def test_supabase_asks_through_postgrest(database: Supabase) -> None:
    url = database.postgrest.url
    assert await through(url) == []
    database.postgres.execute("ALTER TABLE turns DISABLE ROW LEVEL SECURITY;")
    try:
        (found,) = await through(url)
    finally:
        database.postgres.execute("ALTER TABLE turns ENABLE ROW LEVEL SECURITY;")
    assert found.problem == "row-level security is off on public.turns"


async def test_supabase_says_why_it_cannot_be_asked(postgres: Postgres) -> None:
    postgrest = PostgREST(postgres)
    try:
        (wrong,) = await through(postgrest.url, jwt("service_role")[:-4] + "AAAA")
        assert wrong.cure == "set SUPABASE_KEY to the project's secret key"
        postgres.execute("REVOKE ALL ON FUNCTION chatd_doctor FROM service_role;")
        (refused,) = await through(postgrest.url)
        assert "42501" in refused.problem
        assert "schema.sql" in refused.cure
        postgres.execute("DROP FUNCTION chatd_doctor;")
        postgrest.stop()
        postgrest.start()
        (missing,) = await through(postgrest.url)
        assert missing.problem.startswith("schema.sql has not been run here, or is of an older")
        assert "schema.sql" in missing.cure
    finally:
        postgrest.stop()
    (gone,) = await through(postgrest.url)
    assert "SUPABASE_URL" in gone.cure


# SQLite


async def diagnosed(path: Path) -> list[Finding]:
    storage = await open_sqlite({"path": str(path)})
    try:
        return list(await storage.diagnose())
    finally:
        await storage.close()


SQLITE_DAMAGE = [
    ("DROP INDEX conversations_of_session", "the index conversations_of_session is missing"),
    (
        "INSERT INTO sessions (session_id, chatbot_id) VALUES ('s', 'nobody')",
        "1 rows of sessions belong to no row of chatbots",
    ),
]


@pytest.mark.parametrize(("damage", "problem"), SQLITE_DAMAGE)
async def test_sqlite_names_damage_and_its_cure_cures_it(
    tmp_path: Path, damage: str, problem: str
) -> None:
    path = tmp_path / "chatd.db"
    assert await diagnosed(path) == []
    connection = apsw.Connection(str(path))
    connection.execute(damage)
    connection.close()
    (found,) = await diagnosed(path)
    assert found.problem.startswith(problem)
    python = str(ROOT / ".venv" / "bin")
    subprocess.run(f'PATH="{python}:$PATH" {found.cure}', shell=True, check=True, cwd=tmp_path)
    assert await diagnosed(path) == []


async def test_a_file_that_anybody_may_write_is_named(tmp_path: Path) -> None:
    path = tmp_path / "chatd.db"
    assert await diagnosed(path) == []
    path.chmod(0o666)
    (found,) = await diagnosed(path)
    subprocess.run(found.cure, shell=True, check=True)
    assert await diagnosed(path) == []


async def test_a_damaged_file_is_said_to_be_damaged(tmp_path: Path) -> None:
    path = tmp_path / "chatd.db"
    await diagnosed(path)
    data = bytearray(path.read_bytes())
    data[4096 * 3 + 8 : 4096 * 5] = b"\xff" * (4096 * 2 - 8)
    path.write_bytes(data)
    (found,) = await diagnosed(path)
    assert "is damaged" in found.problem
    assert "restore a backup" in found.cure


# The command


def doctor(folder: Path, *options: str, **env: str) -> subprocess.CompletedProcess[str]:
    return chatd_command("doctor", *options, cwd=folder, env=env)


def test_the_command_says_which_storage_it_looks_at_and_what_is_wrong(
    postgres: Postgres, tmp_path: Path
) -> None:
    config = ["--config", str(ROOT / "config" / "postgres.yaml")]
    url = postgres.url.replace("postgres@", "postgres:hunter2@")
    place = postgres.url.replace("postgres@", "")
    good = doctor(tmp_path, *config, DATABASE_URL=url)
    assert (good.returncode, good.stderr) == (0, "")
    assert good.stdout == f"Nothing is wrong with postgres {place}.\n"
    postgres.execute("ALTER TABLE turns DISABLE ROW LEVEL SECURITY;")
    bad = doctor(tmp_path, *config, DATABASE_URL=url)
    assert bad.returncode == 1
    assert bad.stdout.splitlines() == [
        f"postgres {place}:",
        "- row-level security is off on public.turns",
        "  ALTER TABLE public.turns ENABLE ROW LEVEL SECURITY;",
    ]
    as_json = doctor(tmp_path, "--json", *config, DATABASE_URL=url)
    told: dict[str, Any] = json.loads(as_json.stdout)
    assert as_json.returncode == 1
    assert told["storage"] == f"postgres {place}"
    assert [finding.keys() for finding in told["findings"]] == [{"problem", "cure"}]


def test_the_command_works_where_storage_cannot_be_opened(tmp_path: Path) -> None:
    missing = doctor(tmp_path)
    assert missing.returncode == 1
    assert f"there is no database at {tmp_path / 'chatd.db'} yet" in missing.stdout
    assert not (tmp_path / "chatd.db").exists()
    (tmp_path / "chatd.db").write_text("these are my notes\n" * 100)
    notes = doctor(tmp_path)
    assert notes.returncode == 1
    assert "is not a SQLite database" in notes.stdout
    config = ["--config", str(ROOT / "config" / "supabase.yaml")]
    key = doctor(tmp_path, *config, SUPABASE_URL="http://127.0.0.1:9", SUPABASE_KEY=jwt("anon"))
    assert key.returncode == 1
    assert "is the anon key" in key.stdout
