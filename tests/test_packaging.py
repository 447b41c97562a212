"""The wheel: what it holds, and that it serves where there is no repository."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import urllib.request
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.support import clean_env

ROOT = Path(__file__).parent.parent
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "schema.sql")
FOLDERS = ("chatd", "plugins", "config")
SWAGGER = ROOT / "node_modules" / "swagger-ui-dist"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that nothing of an earlier build gets into it."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in (*SOURCES, *FOLDERS):
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy2(ROOT / name, source / name)
    _run(
        sys.executable,
        *("-m", "build", "--wheel", "--no-isolation"),
        *("--outdir", str(folder), str(source)),
        cwd=folder,
    )
    (built,) = folder.glob("*.whl")
    return built


@dataclass
class Installed:
    """An environment of its own, with the wheel in it and no way to the repository."""

    folder: Path

    @property
    def chatd(self) -> str:
        return str(self.folder / "bin" / "chatd")

    def run(self, *arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return _run(self.chatd, *arguments, cwd=cwd)


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The wheel as pip installs it. What it depends on is lent by this environment."""
    folder = tmp_path_factory.mktemp("installed")
    _run(sys.executable, "-m", "venv", "--without-pip", str(folder), cwd=folder)
    python = str(folder / "bin" / "python")
    _run(
        sys.executable,
        *("-m", "pip", "--python", python, "install"),
        *("--no-deps", "--no-index", "--quiet", str(wheel)),
        cwd=folder,
    )
    (site,) = folder.glob("lib/python*/site-packages")
    # A folder on the path, whose own .pth files do not count: the repository stays out.
    (site / "lent.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
    return Installed(folder)


def _env() -> dict[str, str]:
    return {name: value for name, value in clean_env().items() if not name.startswith("PYTHON")}


def _run(*command: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        command, cwd=cwd, env=_env(), capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@contextmanager
def _serving(installed: Installed, folder: Path) -> Iterator[str]:
    """What `chatd serve` says in `folder`, once it serves."""
    said = folder.parent / f"{folder.name}.stderr"
    with said.open("w") as stderr, (folder.parent / f"{folder.name}.stdout").open("w") as stdout:
        process = subprocess.Popen(
            [installed.chatd, "serve", "--port", "0"],
            cwd=folder,
            env=_env(),
            stdout=stdout,
            stderr=stderr,
        )
    try:
        for _ in range(1200):
            if "chatd serves" in said.read_text() or process.poll() is not None:
                break
            time.sleep(0.05)
        yield said.read_text()
    finally:
        process.terminate()
        assert process.wait(timeout=40) == 0, said.read_text()


def _fetch(url: str, body: Any = None) -> tuple[str, bytes]:
    """The media type and the body of an answer."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as response:
        return response.headers.get_content_type(), response.read()


def _found(pattern: str, text: str) -> str:
    match = re.search(pattern, text)
    assert match is not None, text
    return match[1]


def test_the_wheel_holds_what_chatd_needs_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {
        "chatd",
        "chatd_config",
        "chatd_plugins",
    }
    data = [
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "chatd").rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    ]
    assert set(data) <= names
    plugins = {
        f"chatd_plugins/{path.relative_to(ROOT / 'plugins').as_posix()}"
        for path in (ROOT / "plugins").rglob("*.py")
    }
    assert "chatd_plugins/sqlite/schema.py" in plugins
    assert {"chatd_config/chatd.yaml", "chatd_plugins/py.typed"} | plugins <= names
    assert [name for name in names if name.endswith("licenses/LICENSE")]


def test_an_installed_wheel_serves_a_chat_in_an_empty_folder(
    installed: Installed, tmp_path: Path
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    with _serving(installed, folder) as said:
        url = _found(r"chatd serves (\S+)", said)
        config = Path(_found(r"config +(\S+)", said))
        assert config.is_relative_to(installed.folder)
        assert config.read_bytes() == (ROOT / "config" / "chatd.yaml").read_bytes()

        known = {
            "assistant_id": _found(r"assistant_id (\S+)", said),
            "api_key": _found(r"\n +api_key +(\S+)", said),
        }
        session = json.loads(_fetch(f"{url}/api/chat/session", known)[1])["session_id"]
        said_now = {"type": "message", "messages": [{"role": "user", "content": "Hello!"}]}
        answer = _fetch(f"{url}/api/chat", {**known, **said_now, "session_id": session})[1]
        assert "Hello!" in json.loads(answer)["response"]

        assert _fetch(f"{url}/docs")[0] == "text/html"
        bundle = (SWAGGER / "swagger-ui-bundle.js").read_bytes()
        assert _fetch(f"{url}/docs/assets/swagger-ui-bundle.js") == ("text/javascript", bundle)
    assert (folder / "chatd.db").is_file()


def test_an_installed_wheel_has_the_bundled_plugins(installed: Installed, tmp_path: Path) -> None:
    plugins = installed.run("plugins", cwd=tmp_path).stdout
    for name in ("sqlite", "echo", "openai_compatible", "openrouter"):
        assert name in plugins
    assert str(ROOT) not in plugins


def test_the_wheel_carries_the_schema(installed: Installed, tmp_path: Path) -> None:
    printed = installed.run("migrate", cwd=tmp_path).stdout
    assert printed == (ROOT / "schema.sql").read_text()


def test_init_writes_a_configuration_that_check_accepts(
    installed: Installed, tmp_path: Path
) -> None:
    installed.run("init", cwd=tmp_path)
    written = (tmp_path / "chatd.yaml").read_bytes()
    assert written == (ROOT / "config" / "chatd.yaml").read_bytes()
    assert "chatd.yaml" in installed.run("check", cwd=tmp_path).stdout
    assert "chatd.yaml" in installed.run("check", "--config", "chatd.yaml", cwd=tmp_path).stdout


@pytest.mark.parametrize("name", ["swagger-ui-bundle.js", "swagger-ui.css"])
def test_the_files_of_the_docs_page_are_those_of_the_locked_package(name: str) -> None:
    ours = ROOT / "chatd" / "static" / "docs" / name
    assert ours.read_bytes() == (SWAGGER / name).read_bytes()


def test_the_lock_files_name_no_registry() -> None:
    lock = json.loads((ROOT / "package-lock.json").read_text())
    assert not [name for name, package in lock["packages"].items() if "resolved" in package]
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    for pin in pins:
        assert pin.startswith("#") or re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin), pin


def test_the_scripts_can_be_run() -> None:
    for script in [*(ROOT / "scripts").iterdir(), ROOT / ".ci" / "run"]:
        assert os.access(script, os.X_OK), script
