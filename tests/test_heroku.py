"""The files that Heroku reads: what they say is what chatd does."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

from click.testing import CliRunner

from chatd.cli import main
from tests.support import chatd_command

ROOT = Path(__file__).parent.parent


def test_every_process_of_the_procfile_is_a_command_that_exists() -> None:
    lines = (ROOT / "Procfile").read_text().splitlines()
    processes = dict(line.split(": ", 1) for line in lines if line and not line.startswith("#"))
    assert set(processes) == {"web", "release"}
    for command in processes.values():
        program, *arguments = shlex.split(command.replace("$PORT", "8000"))
        assert program == "chatd"
        assert CliRunner().invoke(main, [arguments[0], "--help"]).exit_code == 0
        options = [argument for argument in arguments if argument.startswith("--")]
        help_text = CliRunner().invoke(main, [arguments[0], "--help"]).output
        assert all(option in help_text for option in options)
    assert "--host 0.0.0.0 --port $PORT" in processes["web"]


def test_the_buildpack_finds_what_it_needs() -> None:
    assert (ROOT / "requirements.txt").read_text().split("\n#")[0]
    assert re.search(r"^\.$", (ROOT / "requirements.txt").read_text(), re.MULTILINE)
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
