"""The files that Heroku reads: what they say is what chatd does."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

from click.testing import CliRunner

from chatd.cli import main
from tests.postgres import ROLES, Postgres, PostgREST, jwt
from tests.support import chatd_command, clean_env

ROOT = Path(__file__).parent.parent


def processes() -> dict[str, str]:
    """The commands of the Procfile by their names."""
    lines = (ROOT / "Procfile").read_text().splitlines()
    return dict(line.split(": ", 1) for line in lines if line and not line.startswith("#"))


def test_every_process_of_the_procfile_is_a_command_that_exists() -> None:
    assert set(processes()) == {"web", "release"}
    for process in processes().values():
        for command in process.replace("$PORT", "8000").split(" && "):
            program, *arguments = shlex.split(command)
            assert program == "chatd"
            shown = CliRunner().invoke(main, [arguments[0], "--help"])
            assert shown.exit_code == 0
            options = [argument for argument in arguments if argument.startswith("--")]
            assert all(option in shown.output for option in options)
    assert "--host 0.0.0.0 --port $PORT" in processes()["web"]


def release(folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs the release phase as a dyno does."""
    (folder / "chatd").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m chatd "$@"\n')
    (folder / "chatd").chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", processes()["release"]],
        cwd=folder,
        env={**clean_env(), "PATH": path, "DYNO": "release.1", **env},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_the_release_phase_takes_a_supabase_that_is_up_to_date_and_no_other(
    tmp_path: Path,
) -> None:
    text = (ROOT / "config" / "supabase.yaml").read_text()
    mine = text.replace("use: supabase", "use: supabase\n  rest_path: ''")
    (tmp_path / "chatd.yaml").write_text(mine)
    postgres = Postgres()
    postgrest = None
    try:
        postgres.execute(ROLES)
        postgrest = PostgREST(postgres)
        env = {"SUPABASE_URL": postgrest.url, "SUPABASE_KEY": jwt("service_role")}
        missing = release(tmp_path, **env)
        assert missing.returncode == 1
        assert "run schema.sql" in missing.stderr
        postgres.execute((ROOT / "schema.sql").read_text())
        for _ in range(100):
            if postgrest.ask_with("chatd_schema_version")[0] == 200:
                break
            time.sleep(0.1)
        good = release(tmp_path, **env)
        assert (good.returncode, good.stderr) == (0, "")
        postgres.execute(
            "CREATE OR REPLACE FUNCTION chatd_schema_version() RETURNS integer"
            " LANGUAGE sql STABLE SET search_path = '' AS 'SELECT 1'"
        )
        old = release(tmp_path, **env)
        assert old.returncode == 1
        assert "run schema.sql again" in old.stderr
    finally:
        if postgrest is not None:
            postgrest.stop()
        postgres.close()


def test_the_release_phase_takes_sqlite_where_losing_everything_is_fine(tmp_path: Path) -> None:
    text = (ROOT / "config" / "chatd.yaml").read_text()
    mine = text.replace("use: sqlite", "use: sqlite\n  allow_ephemeral: true")
    (tmp_path / "chatd.yaml").write_text(mine)
    good = release(tmp_path)
    assert (good.returncode, good.stderr) == (0, "")


def test_the_buildpack_finds_what_it_needs() -> None:
    assert (ROOT / "requirements.txt").read_text().split("\n#")[0]
    assert re.search(r"^\.\[uvloop\]$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
    assert (ROOT / ".python-version").read_text().strip() == "3.11"
    app = json.loads((ROOT / "app.json").read_text())
    assert "OPENROUTER_API_KEY" in app["env"]


def test_the_release_phase_refuses_a_disk_that_does_not_last(tmp_path: Path) -> None:
    result = chatd_command("check", cwd=tmp_path, env={"DYNO": "release.1"})
    assert result.returncode == 1
    assert "a dyno's disk is wiped at least once a day" in result.stderr


def test_the_release_phase_takes_supabase(tmp_path: Path) -> None:
    env = {
        "DYNO": "release.1",
        "SUPABASE_URL": "https://x.supabase.co",
        "SUPABASE_KEY": "sb_secret_x",
    }
    config = str(ROOT / "config" / "supabase.yaml")
    assert chatd_command("check", "--config", config, cwd=tmp_path, env=env).returncode == 0
