"""The files that others run chatd with: each names only what exists, and is as tight as it says."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import jwt
import pytest
import yaml
from click.testing import CliRunner

from chatd.app import load
from chatd.cli import main
from tests.postgres import Postgres
from tests.test_cli import serving

ROOT = Path(__file__).parent.parent
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "compose.yaml").read_text())
UNIT = ROOT / "deploy" / "chatd.service"


def instructions() -> list[tuple[str, str]]:
    """The lines of the Dockerfile, as a word and the rest."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    whole = re.sub(r"\\\n", " ", text).splitlines()
    return [(line.split(" ", 1)[0], line.split(" ", 1)[1].strip()) for line in whole if line]


def of(word: str, lines: list[tuple[str, str]]) -> list[str]:
    return [rest for each, rest in lines if each == word]


def last_stage() -> list[tuple[str, str]]:
    lines = instructions()
    start = max(place for place, (word, _) in enumerate(lines) if word == "FROM")
    return lines[start:]


def known_command(command: list[str]) -> None:
    """Fails unless it is a command of chatd with options that it has."""
    assert command[0] == "chatd"
    shown = CliRunner().invoke(main, [command[1], "--help"])
    assert shown.exit_code == 0
    assert all(word in shown.output for word in command[2:] if word.startswith("--"))


# Docker


def test_the_image_runs_as_a_user_who_owns_nothing_but_the_volume() -> None:
    stage = last_stage()
    assert of("USER", stage) == ["10001:10001"]
    assert of("VOLUME", stage) == ["/data"]
    assert of("WORKDIR", stage) == ["/data"]
    (run,) = of("RUN", stage)
    assert "--owner 10001 --group 10001 --mode 0700 /data" in run
    assert of("COPY", stage) == ["--from=build /opt/chatd /opt/chatd"]
    assert "pip" not in run
    known_command(json.loads(of("CMD", stage)[0]))


def test_the_image_is_built_of_all_that_the_wheel_is_built_of_and_nothing_else() -> None:
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    assert lines[1] == "*"
    sent = {line[1:] for line in lines if line.startswith("!")}
    assert all((ROOT / name).exists() for name in sent)
    needed = {"chatd", "plugins", "config", "setup.py", "pyproject.toml", "README.md", "LICENSE"}
    assert sent == needed | {"schema.sql", "constraints.txt"}
    assert not any(fnmatch(".env", name) for name in sent)
    pip = next(run for run in of("RUN", instructions()) if "pip install" in run)
    assert '--constraint constraints.txt ".[postgres]"' in pip


def test_the_images_health_check_tells_a_server_that_serves_from_none(tmp_path: Path) -> None:
    (told,) = of("HEALTHCHECK", last_stage())
    check = [sys.executable, *json.loads(told.partition("CMD ")[2])[1:]]
    with serving(tmp_path) as server:
        port = server.url.rpartition(":")[2]
        assert subprocess.run(check, env={"PORT": port}, check=False).returncode == 0
    gone = subprocess.run(check, env={"PORT": port}, check=False, capture_output=True)
    assert gone.returncode != 0


# Compose


def test_compose_starts_each_service_after_what_it_needs_and_knows_when_that_is_ready() -> None:
    services = COMPOSE["services"]
    assert set(services) == {"chatd", "migrate", "postgres", "postgrest", "redis"}
    for service in services.values():
        for name, wanted in service.get("depends_on", {}).items():
            if wanted["condition"] == "service_healthy":
                assert services[name]["healthcheck"]["test"]
            elif wanted["condition"] == "service_completed_successfully":
                assert "restart" not in services[name]
    known_command(services["migrate"]["command"])


def test_compose_mounts_and_names_only_what_exists() -> None:
    declared = set(COMPOSE["volumes"])
    for service in COMPOSE["services"].values():
        if "build" in service:
            assert (ROOT / service["build"] / "Dockerfile").is_file()
        for volume in service.get("volumes", ()):
            source = volume.split(":")[0]
            exists = (ROOT / source).is_file() if source.startswith("./") else source in declared
            assert exists, source


def test_compose_gives_chatd_a_configuration_that_is_good_and_all_that_it_names(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    chatd = COMPOSE["services"]["chatd"]
    environment = chatd["environment"]
    path = ROOT / "deploy" / "compose" / "chatd.yaml"
    assert f"./{path.relative_to(ROOT)}:{environment['CHATD_CONFIG']}:ro" in chatd["volumes"]
    required = set(re.findall(r"\$\{(\w+)\}", path.read_text())) - {"OPENROUTER_API_KEY"}
    assert required <= environment.keys()
    monkeypatch.setenv("SUPABASE_URL", environment["SUPABASE_URL"])
    monkeypatch.setenv("SUPABASE_KEY", "sb_secret_x")
    config, _ = load(path)
    assert config.storage.name == "supabase"
    assert config.storage.settings["rest_path"] == ""
    host, _, port = environment["SUPABASE_URL"].partition("//")[2].partition(":")
    assert host in COMPOSE["services"]
    assert port == "3000", "PostgREST's own"
    assert environment["REDIS_URL"].startswith("redis://redis:6379")
    (published,) = chatd["ports"]
    assert published.startswith("127.0.0.1:")
    assert published.endswith(f":{config.server.port}")
    assert chatd["read_only"] is True
    others = [s for name, s in COMPOSE["services"].items() if name != "chatd"]
    assert not any("ports" in service for service in others)


def test_the_secrets_are_those_that_compose_asks_for_and_fit_each_other() -> None:
    script = ROOT / "deploy" / "compose" / "new_env.py"
    told = subprocess.run([sys.executable, script], capture_output=True, text=True, check=True)
    made = dict(line.split("=", 1) for line in told.stdout.splitlines())
    asked = set(re.findall(r"\$\{(\w+):\?", (ROOT / "compose.yaml").read_text()))
    assert asked == made.keys()
    claims = jwt.decode(made["SUPABASE_KEY"], made["PGRST_JWT_SECRET"], algorithms=["HS256"])
    assert claims == {"role": "service_role"}


def test_the_roles_are_made_as_postgrest_needs_them(tmp_path: Path) -> None:
    server = Postgres()
    try:
        # As the image has it: psql reaches the server without being told where.
        (tmp_path / "psql").write_text(
            f'#!/bin/sh\nexec "{server.bin / "psql"}" "$@" "{server.url}"\n'
        )
        (tmp_path / "psql").chmod(0o755)
        env = {"PATH": f"{tmp_path}:/usr/bin:/bin", "POSTGRES_PASSWORD": 'it\'s "one"'}
        script = str(ROOT / "deploy" / "compose" / "roles.sh")
        subprocess.run([script], env=env, check=True, capture_output=True, timeout=60)
        server.execute((ROOT / "schema.sql").read_text())
        told = server.execute(
            "SELECT rolcanlogin, rolinherit, pg_has_role('authenticator', 'service_role', 'MEMBER')"
            " FROM pg_roles WHERE rolname = 'authenticator';"
            "SELECT has_function_privilege('service_role', 'chatd_doctor()', 'EXECUTE');"
        )
        assert told.split() == ["t|f|t", "t"]
    finally:
        server.close()


@pytest.mark.skipif(shutil.which("docker") is None, reason="needs the docker command")
def test_docker_itself_reads_the_compose_file(tmp_path: Path) -> None:
    names = re.findall(r"\$\{(\w+):\?", (ROOT / "compose.yaml").read_text())
    (tmp_path / "env").write_text("".join(f"{name}=x\n" for name in set(names)))
    command = ["docker", "compose", "--env-file", str(tmp_path / "env"), "config", "--quiet"]
    read = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if "is not a docker command" in read.stderr or "unknown flag" in read.stderr:
        pytest.skip("docker has no compose here")
    assert (read.returncode, read.stderr) == (0, "")


# systemd


def unit(word: str) -> list[str]:
    """What the unit says under a name."""
    return re.findall(rf"^{word}=(.*)$", UNIT.read_text(), re.MULTILINE)


def test_the_unit_runs_commands_that_exist_and_gives_turns_time_to_finish() -> None:
    for command in (*unit("ExecStartPre"), *unit("ExecStart")):
        program, *arguments = shlex.split(command)
        assert program == "/opt/chatd/bin/chatd"
        known_command(["chatd", *arguments])
    config, _ = load(ROOT / "config" / "chatd.yaml")
    assert float(unit("TimeoutStopSec")[0]) > config.server.drain_seconds
    assert unit("DynamicUser") == ["yes"]
    assert unit("ProtectSystem") == ["strict"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit_and_finds_it_hardly_exposed(tmp_path: Path) -> None:
    copy = tmp_path / "chatd.service"
    copy.write_text(UNIT.read_text().replace("/opt/chatd/bin/chatd", "/bin/true"))
    verified = subprocess.run(
        ["systemd-analyze", "verify", str(copy)], capture_output=True, text=True, check=False
    )
    assert (verified.returncode, verified.stderr) == (0, "")
    told = subprocess.run(
        ["systemd-analyze", "security", "--offline=true", "--threshold=20", str(copy)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert told.returncode == 0, told.stdout


# Heroku


def test_the_page_says_what_each_of_herokus_files_is_for() -> None:
    page = (ROOT / "docs" / "deploying.md").read_text()
    heroku = page.partition("## Heroku")[2].partition("\n## ")[0]
    for name in ("Procfile", "app.json", "requirements.txt", ".python-version"):
        assert (ROOT / name).is_file()
        assert f"| `{name}` |" in heroku
    for name in json.loads((ROOT / "app.json").read_text())["env"]:
        assert f"`{name}`" in heroku
