"""schema.sql: what it makes, what it adopts, who may, and which queries it makes quick."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest
from chatd_plugins.supabase import SCHEMA_VERSION

from chatd.domain import hash_api_key, new_id
from tests.postgres import ROLES, ROOT, Postgres, Supabase, jwt
from tests.support import chatd_command

SCHEMA = (ROOT / "schema.sql").read_text()
FIRST_VERSION = """
CREATE EXTENSION IF NOT EXISTS "uuid-ossp";
CREATE TABLE public.chatbots (
    id UUID PRIMARY KEY DEFAULT uuid_generate_v4(),
    api_key TEXT NOT NULL UNIQUE,
    model_name TEXT NOT NULL,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT timezone('utc'::text, now()) NOT NULL,
    updated_at TIMESTAMP WITH TIME ZONE DEFAULT timezone('utc'::text, now()) NOT NULL
);
CREATE TABLE public.sessions (
    session_id UUID PRIMARY KEY DEFAULT uuid_generate_v4(),
    chatbot_id UUID NOT NULL REFERENCES public.chatbots(id) ON DELETE CASCADE,
    created_at TIMESTAMP WITH TIME ZONE DEFAULT timezone('utc'::text, now()) NOT NULL
);
CREATE TABLE public.conversations (
    id BIGSERIAL PRIMARY KEY,
    session_id UUID NOT NULL REFERENCES public.sessions(session_id) ON DELETE CASCADE,
    role TEXT NOT NULL,
    content TEXT NOT NULL,
    timestamp TIMESTAMP WITH TIME ZONE DEFAULT timezone('utc'::text, now()) NOT NULL
);
INSERT INTO public.chatbots (id, api_key, model_name)
    VALUES ('e97f4988-4f70-470b-b2e5-aca28ddbcff0', 'an-old-key', 'openai/gpt-3.5-turbo');
INSERT INTO public.sessions (session_id, chatbot_id)
    VALUES ('11111111-1111-4111-8111-111111111111', 'e97f4988-4f70-470b-b2e5-aca28ddbcff0');
INSERT INTO public.conversations (session_id, role, content) VALUES
    ('11111111-1111-4111-8111-111111111111', 'user', 'an old question'),
    ('11111111-1111-4111-8111-111111111111', 'assistant', 'an old answer');
"""
"""The tables of the first version, as its users have them, with rows."""


@pytest.fixture(scope="module")
def postgres() -> Iterator[Postgres]:
    """A database with Supabase's roles and the first version's tables."""
    server = Postgres()
    server.execute(ROLES, FIRST_VERSION)
    yield server
    server.close()


def dump(server: Postgres) -> str:
    """Everything that a database holds, as SQL."""
    command = [str(server.bin / "pg_dump"), "--dbname", server.url, "--no-comments"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    # pg_dump 15.14 and later write a random word.
    return re.sub(r"^\\(un)?restrict .*$", "", text, flags=re.MULTILINE)


def test_the_first_versions_tables_are_adopted_with_their_rows(postgres: Postgres) -> None:
    postgres.execute(SCHEMA)
    rows = postgres.execute(
        "SELECT role, content FROM conversations ORDER BY id; SELECT count(*) FROM sessions;"
        "SELECT api_key FROM chatbots;"
    ).splitlines()
    assert rows == [
        "user|an old question",
        "assistant|an old answer",
        "1",
        f"sha256:{hash_api_key('an-old-key').hex()}",
    ]


def test_running_it_again_changes_nothing(postgres: Postgres) -> None:
    postgres.execute(SCHEMA)
    before = dump(postgres)
    postgres.execute(SCHEMA)
    assert dump(postgres) == before
    assert "an old answer" in before


VERSION_4 = """
DROP FUNCTION chatd_erase_idle_sessions; DROP FUNCTION chatd_idle; DROP FUNCTION chatd_erase_locked;
DROP INDEX sessions_by_chatbot; DROP INDEX sessions_by_age; DROP INDEX sessions_of_user;
CREATE INDEX sessions_of_chatbot ON public.sessions (chatbot_id);
"""
VERSION_3 = f"""{VERSION_4}
DROP FUNCTION chatd_usage_totals; DROP FUNCTION chatd_usage; DROP FUNCTION chatd_settle_turn;
DROP TABLE usage_of_erased; DROP INDEX turns_by_start; ALTER TABLE turns DROP COLUMN side;
CREATE OR REPLACE FUNCTION public.chatd_schema_version() RETURNS integer
LANGUAGE sql STABLE SET search_path = '' AS $$ SELECT 3 $$;
CREATE OR REPLACE FUNCTION public.chatd_delete_session(args jsonb) RETURNS jsonb
LANGUAGE plpgsql SET search_path = '' AS $$
BEGIN
    DELETE FROM public.sessions WHERE session_id = (args->>'id')::uuid
        AND chatbot_id = (args->>'chatbot_id')::uuid;
    RETURN to_jsonb(FOUND);
END $$;
"""
"""Takes a database back to what the schema's version 3 was."""


def test_a_database_of_version_3_is_brought_up_to_date_with_its_turns(tmp_path: Path) -> None:
    server = Postgres()
    bot, session, turn = new_id(), new_id(), new_id()
    config = ["--config", str(ROOT / "config" / "postgres.yaml")]
    env = {"DATABASE_URL": server.url}
    try:
        server.execute(
            ROLES,
            SCHEMA,
            f"INSERT INTO chatbots (id, api_key, model_name) VALUES ('{bot}', 'k', 'm');"
            f"INSERT INTO sessions (session_id, chatbot_id) VALUES ('{session}', '{bot}');"
            "INSERT INTO turns (turn_id, session_id, seq, status, lease_until, cost_usd, model)"
            f" VALUES ('{turn}', '{session}', 1, 'completed', now(), 0.25, 'm');",
        )
        fresh = dump(server)
        server.execute(VERSION_3)
        old = chatd_command("migrate", "--check", *config, cwd=tmp_path, env=env)
        assert old.returncode == 1
        assert "schema version 3, this chatd wants 5" in old.stderr
        server.execute(SCHEMA)
        assert dump(server) == fresh
        for _ in ("stored", "erased"):
            usage = chatd_command("usage", "--json", *config, cwd=tmp_path, env=env)
            assert [(u["turns"], u["cost_usd"]) for u in json.loads(usage.stdout)] == [(1, 0.25)]
            erased = json.dumps({"id": session, "chatbot_id": bot})
            server.execute(f"SELECT chatd_delete_session('{erased}')")
    finally:
        server.close()


def test_an_adopted_session_goes_on_with_its_history(postgres: Postgres) -> None:
    postgres.execute(SCHEMA)
    item = {
        "turn_id": new_id(),
        "session_id": "11111111-1111-4111-8111-111111111111",
        "chatbot_id": "e97f4988-4f70-470b-b2e5-aca28ddbcff0",
        "messages": [["user", "a new question"]],
        "history_chars": 10_000,
        "overhead_chars": 16,
        "lease_seconds": 30,
    }
    answer = postgres.execute(f"SELECT chatd_begin_turns('[{json.dumps(item)}]')")
    (begun,) = json.loads(answer)
    assert begun["history"] == [["assistant", "an old answer"], ["user", "an old question"]]


def test_a_plain_insert_stores_the_key_hashed(postgres: Postgres) -> None:
    postgres.execute(SCHEMA)
    stored = postgres.execute(
        "INSERT INTO chatbots (id, api_key, model_name) VALUES"
        f" ('{new_id()}', 'a-plain-key', 'some/model') RETURNING api_key;"
    ).strip()
    assert stored == f"sha256:{hash_api_key('a-plain-key').hex()}"
    changed = postgres.execute(
        f"UPDATE chatbots SET api_key = 'another-key' WHERE api_key = '{stored}' RETURNING api_key;"
    ).strip()
    assert changed == f"sha256:{hash_api_key('another-key').hex()}"


# chatd migrate


CONFIG = str(ROOT / "config" / "postgres.yaml")


def test_migrate_applies_the_schema_and_checks_it(tmp_path: Path) -> None:
    server = Postgres()
    env = {"DATABASE_URL": server.url}
    try:
        missing = chatd_command("migrate", "--check", "--config", CONFIG, cwd=tmp_path, env=env)
        assert missing.returncode == 1
        assert "run schema.sql in it (`chatd migrate`)" in missing.stderr
        for _ in range(2):
            applied = chatd_command("migrate", cwd=tmp_path, env=env)
            assert (applied.returncode, applied.stderr) == (0, "")
        checked = chatd_command("migrate", "--check", "--config", CONFIG, cwd=tmp_path, env=env)
        assert checked.stdout == "Nothing is to do: the storage is at this version.\n"
    finally:
        server.close()
    gone = chatd_command("migrate", cwd=tmp_path, env=env)
    assert gone.returncode == 1
    assert gone.stderr.startswith("chatd: postgres: ")
    assert "Traceback" not in gone.stderr


def test_migrate_checks_the_storage_that_is_configured(database: Supabase, tmp_path: Path) -> None:
    text = (ROOT / "config" / "supabase.yaml").read_text()
    (tmp_path / "chatd.yaml").write_text(
        text.replace("use: supabase", "use: supabase\n  rest_path: ''")
    )
    env = {"SUPABASE_URL": database.postgrest.url, "SUPABASE_KEY": jwt("service_role")}
    checked = chatd_command("migrate", "--check", cwd=tmp_path, env=env)
    assert (checked.returncode, checked.stderr) == (0, "")
    env["SUPABASE_KEY"] = jwt("anon")
    refused = chatd_command("migrate", "--check", cwd=tmp_path, env=env)
    assert refused.returncode == 1
    assert "is the anon key" in refused.stderr


def test_migrate_says_when_postgrest_has_yet_to_see_it(database: Supabase, tmp_path: Path) -> None:
    text = (ROOT / "config" / "supabase.yaml").read_text()
    (tmp_path / "chatd.yaml").write_text(
        text.replace("use: supabase", "use: supabase\n  rest_path: ''")
    )
    env = {"DATABASE_URL": database.postgres.url, "SUPABASE_KEY": jwt("service_role")}
    env["SUPABASE_URL"] = database.postgrest.url
    seen = chatd_command("migrate", cwd=tmp_path, env=env)
    assert (seen.returncode, seen.stderr) == (0, "")
    (tmp_path / "chatd.yaml").write_text(
        text.replace("use: supabase", "use: supabase\n  timeout: 0.5")
    )
    env["SUPABASE_URL"] = "http://127.0.0.1:9"
    unseen = chatd_command("migrate", cwd=tmp_path, env=env)
    assert unseen.returncode == 0
    assert "NOTIFY pgrst, 'reload schema'" in unseen.stderr


def test_migrate_prints_the_schema_where_it_cannot_connect(tmp_path: Path) -> None:
    printed = chatd_command("migrate", cwd=tmp_path)
    assert printed.stdout == SCHEMA
    assert "run this in the SQL editor" in printed.stderr


def test_with_sqlite_nothing_is_to_migrate(tmp_path: Path) -> None:
    nothing = chatd_command("migrate", "--check", cwd=tmp_path)
    assert (nothing.returncode, nothing.stderr) == (0, "")
    assert "Nothing is to do" in nothing.stdout


# Who may


def call(url: str, key: str | None, method: str = "GET", body: Any = None) -> tuple[int, str]:
    """A request to PostgREST with a key: status and body."""
    headers = {"Content-Type": "application/json"}
    if key is not None:
        headers |= {"apikey": key, "Authorization": f"Bearer {key}"}
    data = None if body is None else json.dumps(body).encode()
    try:
        with urlopen(Request(url, data, headers, method=method), timeout=10) as response:
            return response.status, response.read().decode()
    except HTTPError as error:
        with error:
            return error.code, error.read().decode()


TABLES = ["chatbots", "sessions", "conversations", "turns", "usage_of_erased"]
FUNCTIONS = sorted(set(re.findall(r"FUNCTION public\.(chatd_\w+)\(", SCHEMA)))


@pytest.mark.parametrize("role", [None, "anon", "authenticated"])
def test_with_a_public_key_nothing_can_be_read_written_or_called(
    database: Supabase, role: str | None
) -> None:
    key = None if role is None else jwt(role)
    url = database.postgrest.url
    for table in TABLES:
        for method, body in [("GET", None), ("POST", {}), ("PATCH", {}), ("DELETE", None)]:
            status, text = call(f"{url}/{table}", key, method, body)
            assert status in (401, 403), (table, method, text)
            assert "42501" in text, (table, method, text)
    called = 0
    for function in FUNCTIONS:
        signature = re.search(rf"FUNCTION public\.{function}\((.*?)\)", SCHEMA, re.DOTALL)
        if signature is None or "RETURNS trigger" in SCHEMA[signature.end() :][:40]:
            continue
        names = re.findall(r"(\w+) (?:jsonb|uuid|bigint|integer|text)\b", signature[1])
        arguments = dict.fromkeys(names)
        status, text = call(f"{url}/rpc/{function}", key, "POST", arguments)
        assert status in (401, 403, 404), (function, text)
        called += "42501" in text
    assert called >= 20, "the functions are there, and refused"


def test_what_the_secret_key_asked_for_is_not_given_to_a_public_one(database: Supabase) -> None:
    url = f"{database.postgrest.url}/rpc/chatd_schema_version"
    # As often as it takes for every connection of PostgREST to keep its plan.
    for _ in range(100):
        assert call(url, jwt("service_role"), "POST", {})[0] == 200
    for _ in range(20):
        assert call(url, jwt("anon"), "POST", {})[0] in (401, 403, 404)


def test_row_level_security_is_on_without_any_policy(database: Supabase) -> None:
    names = ", ".join(f"'{table}'" for table in TABLES)
    secured = database.postgres.execute(
        f"SELECT count(*) FROM pg_class WHERE relrowsecurity AND relname IN ({names});"
        "SELECT count(*) FROM pg_policies;"
    ).split()
    assert secured == ["5", "0"]


def test_every_function_pins_its_search_path(database: Supabase) -> None:
    loose = database.postgres.execute(
        "SELECT proname FROM pg_proc WHERE proname LIKE 'chatd\\_%'"
        " AND NOT coalesce(proconfig, '{}') @> ARRAY['search_path=\"\"'];"
    )
    assert loose == ""


def test_the_secret_key_may_do_what_chatd_does(database: Supabase) -> None:
    url, key = database.postgrest.url, jwt("service_role")
    assert call(f"{url}/rpc/chatd_schema_version", key, "POST", {}) == (200, str(SCHEMA_VERSION))
    assert call(f"{url}/chatbots?select=id", key)[0] == 200


# How quick

MILLION = """
INSERT INTO chatbots (id, api_key, model_name) VALUES ('{bot}', 'many', 'm');
INSERT INTO sessions (session_id, chatbot_id)
    SELECT ('00000000-0000-4000-8000-' || lpad(i::text, 12, '0'))::uuid, '{bot}'
    FROM generate_series(1, 20000) i;
INSERT INTO turns (turn_id, session_id, seq, status, lease_until, started_at)
    SELECT ('10000000-0000-4000-8000-' || lpad(i::text, 12, '0'))::uuid,
        ('00000000-0000-4000-8000-' || lpad((1 + i % 20000)::text, 12, '0'))::uuid,
        i / 20000 + 1, 'completed', now(), timestamptz '2024-01-01Z' + i * interval '1 minute'
    FROM generate_series(0, 499999) i;
INSERT INTO conversations (session_id, role, content, turn_id)
    SELECT t.session_id, r.role, 'some words', t.turn_id
    FROM turns t, (VALUES ('user'), ('assistant')) r (role);
ANALYZE;
"""
QUERIES = {
    "chatd_begin_turns": "'[{turn}]'",
    "chatd_finish_turns": "'[{finish}]'",
    "chatd_list_messages": """'{{"session_id": "{session}", "chatbot_id": "{bot}", "limit": 50}}'""",
    "chatd_get_session": """'{{"id": "{session}"}}'""",
    "chatd_get_turn": """'{{"id": "{id}", "chatbot_id": "{bot}"}}'""",
    "chatd_rate_turn": """'{{"id": "{id}", "session_id": "{session}", "rating": "up"}}'""",
    "chatd_renew_turns": """'{{"turns": [["{id}", 1]], "lease_seconds": 30}}'""",
    "chatd_sweep": "'{{}}'",
    "chatd_list_sessions": """'{{"limit": 256, "after": "{session}"}}'""",
    "chatd_tally_sessions": """'[{{"id": "{session}"}}]'""",
    "chatd_export_sessions": "'[{export}]'",
    "chatd_import_sessions": "'[{part}]'",
    "chatd_settle_turn": """'{{"id": "{id}", "run": 1, "cost_usd": 0.5}}'""",
    "chatd_delete_session": """'{{"id": "{session}", "chatbot_id": "{bot}"}}'""",
}
"""Every query over what grows. Chatbots are few."""


def test_every_query_uses_an_index_at_a_million_messages(database: Supabase) -> None:
    database.empty()
    bot, session, id = new_id(), "00000000-0000-4000-8000-000000012345", new_id()
    database.postgres.execute(MILLION.format(bot=bot))
    known = {"turn_id": id, "session_id": session}
    turn = {"chatbot_id": bot, "messages": [["user", "hi"]], "idempotency_key": "k"}
    turn |= {"history_chars": 1000, "overhead_chars": 16, "lease_seconds": 30}
    finish = {"run": 1, "status": "completed", "reply": "ho", "attempts": [], "rerunnable": False}
    values = {"bot": bot, "session": session, "id": id}
    values |= {"turn": json.dumps(known | turn), "finish": json.dumps(known | finish)}
    values |= {"export": json.dumps({"id": session, "place": 1, "budget": 2**21, "overhead": 256})}
    moved = {"turn_id": new_id(), "seq": 99, "status": "completed", "run": 1, "attempts": []}
    said = [["user", "hi", "2024-01-01T00:00:00Z", moved["turn_id"]]]
    part = {"id": session, "chatbot_id": bot, "metadata": {}, "place": 40, "messages": said}
    values |= {"part": json.dumps(part | {"turns": [moved | {"reply_id": 0, "rerunnable": False}]})}
    result = explained(database, {f: a.format(**values) for f, a in QUERIES.items()})
    day = {"since": "2024-03-01T00:00:00Z", "until": "2024-03-02T00:00:00Z"}
    few = new_id()
    database.postgres.execute(
        f"INSERT INTO chatbots (id, api_key, model_name) VALUES ('{few}', 'few', 'm');"
        f"UPDATE sessions SET chatbot_id = '{few}' WHERE session_id IN"
        f" (SELECT session_id FROM sessions LIMIT 9); ANALYZE sessions;"
    )
    reports = [
        explained(database, {"chatd_usage_totals": f"'{json.dumps({'by': 'day'} | asked)}'"})
        for asked in (day, day | {"chatbot_id": bot}, {"chatbot_id": few})
    ]
    database.empty()
    assert result.count("Index") > 20, result
    scans = re.findall(r"Seq Scan on (?:public\.)?(\w+)", result)
    assert not set(scans) & {"sessions", "turns", "conversations"}, result
    for report, index in zip(reports, ("turns_by_start",) * 2 + ("turns_of_session",), strict=True):
        # A day's turns may be joined with all sessions, which are far fewer than turns.
        assert index in report, report
        assert "Seq Scan on turns" not in report, report


def explained(database: Supabase, calls: dict[str, str]) -> str:
    """The plans of all that these functions do with these arguments."""
    script = "LOAD 'auto_explain'; SET auto_explain.log_min_duration = 0;"
    script += "SET auto_explain.log_nested_statements = on; SET client_min_messages = log;"
    for function, arguments in calls.items():
        script += f"\\echo == {function}\nSELECT public.{function}({arguments});\n"
    result = subprocess.run(
        [str(database.postgres.bin / "psql"), database.postgres.url, "-XqAt", "-f", "-"],
        input=script,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    assert "ERROR" not in result
    return result
