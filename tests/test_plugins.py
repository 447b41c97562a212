"""Plugins: a third party's distribution, a single file in a folder, and what is refused."""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import chatd
from chatd.errors import PluginError
from chatd.registry import load_registry
from tests.conftest import Serve
from tests.support import ECHO_CONFIG, Served, chatd_command
from tests.test_http import assert_problem

EXAMPLE = Path(__file__).parent / "example_distribution"
PLUGIN = EXAMPLE / "src" / "chatd_example_plugin.py"
HEAD = "import chatd\nNOTHING = {'type': 'object'}\nasync def open(settings): return None\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "my_plugins"
    folder.mkdir()
    return folder


def with_example(folder: Path, interceptors: str = "[]") -> str:
    """A configuration that answers with the example plugin, from a plugin folder."""
    (folder / "example.py").write_text(PLUGIN.read_text())
    return (
        ECHO_CONFIG.replace('use: echo, reply: "You said: {message}"', "use: shout")
        + f"plugins: {{folder: '{folder}'}}\ninterceptors: {interceptors}\n"
    )


async def _ask(served: Served, text: str) -> str:
    bot = await served.add_bot()
    answer = await served.chat(bot, await served.session(bot), text)
    assert answer.status == 200, answer.body
    return str(answer.json["response"])


def test_a_distribution_that_pip_installed_is_loaded_and_answers(tmp_path: Path) -> None:
    site = tmp_path / "site"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    install += ["--no-build-isolation", "--disable-pip-version-check", "--target", str(site)]
    source = shutil.copytree(EXAMPLE, tmp_path / "source")
    subprocess.run([*install, str(source)], check=True, capture_output=True, timeout=120)
    env = {
        "PYTHONPATH": os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    }
    listed = chatd_command("plugins", cwd=tmp_path, env=env)
    assert "example  (chatd-example-plugin 1.2.3)" in listed.stdout
    assert "provider shout: answers in capitals" in listed.stdout
    (tmp_path / "chatd.yaml").write_text(
        "storage: {use: sqlite}\nproviders: {main: {use: shout}}\n"
        "models: [{match: '*', ask: [main]}]\n"
    )
    assert chatd_command("greet", cwd=tmp_path, env=env).stdout == "hello from a plugin\n"
    assert chatd_command("bots", "add", "--name", "Bot", cwd=tmp_path, env=env).returncode == 0
    said = chatd_command("chat", "Bot", cwd=tmp_path, env=env, stdin="hello there\n")
    assert said.stdout == "HELLO THERE\n"


async def test_a_single_file_in_a_plugin_folder_answers(serve: Serve, folder: Path) -> None:
    served = await serve(with_example(folder))
    assert await _ask(served, "hello") == "HELLO"


async def test_a_plugins_route_is_served(serve: Serve, folder: Path) -> None:
    served = await serve(with_example(folder))
    answer = await served.get("/x/ping")
    assert (answer.status, answer.json) == (200, {"pong": True})


async def test_an_interceptor_changes_what_is_asked_and_what_is_answered(
    serve: Serve, folder: Path
) -> None:
    served = await serve(with_example(folder, "[{use: polite, word: please}]"))
    assert await _ask(served, "the secret") == "THE [redacted] PLEASE"


async def test_interceptors_run_in_their_order(serve: Serve, folder: Path) -> None:
    both = "[{use: polite, word: one}, {use: polite, word: two}]"
    served = await serve(with_example(folder, both))
    assert await _ask(served, "hi") == "HI ONE TWO"


async def test_an_interceptor_may_decline_and_the_next_turn_is_untouched(
    serve: Serve, folder: Path
) -> None:
    served = await serve(with_example(folder, "[{use: polite, word: please}]"))
    bot = await served.add_bot()
    session = await served.session(bot)
    problem = assert_problem(await served.chat(bot, session, "rude"), 403, "turn_refused")
    assert problem["detail"] == "Please say that more kindly."
    assert (await served.chat(bot, session, "hi")).status == 200


async def test_an_interceptor_that_raises_is_named_in_the_log_and_fails_its_turn_alone(
    serve: Serve, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    served = await serve(with_example(folder, "[{use: polite, word: please}]"))
    bot = await served.add_bot()
    session = await served.session(bot)
    with caplog.at_level(logging.ERROR):
        answer = await served.chat(bot, session, "crash")
    problem = assert_problem(answer, 500, "internal_error")
    assert "ZeroDivisionError" not in answer.body.decode()
    assert problem["detail"].startswith("Something went wrong")
    raised = [record.getMessage() for record in caplog.records if " raised " in record.getMessage()]
    assert [line.splitlines()[0] for line in raised] == [
        "interceptor polite raised ZeroDivisionError"
    ]
    assert "a bug in the plugin" not in caplog.text.replace(
        'ZeroDivisionError("a bug in the plugin")', ""
    )
    assert (await served.chat(bot, session, "hi")).status == 200


@pytest.mark.parametrize(
    ("source", "told"),
    [
        ("import nothing_of_this_name", "ModuleNotFoundError: No module named"),
        ("syntax error here", "SyntaxError"),
        (
            "@chatd.hookimpl\ndef chatd_register_storge(register): pass",
            'there is no hook "chatd_register_storge", did you mean "chatd_register_storage"?',
        ),
        ("def chatd_register_storage(register): pass", 'mark "chatd_register_storage" with'),
        (
            "@chatd.hookimpl\nasync def chatd_register_storage(register): pass",
            "must be a plain function",
        ),
        (
            "@chatd.hookimpl\ndef chatd_register_provider(register): 1 / 0",
            "chatd_register_provider raised ZeroDivisionError",
        ),
        (
            "@chatd.hookimpl\ndef chatd_register_provider(wrong_name): pass",
            "chatd_register_provider",
        ),
        (
            "@chatd.hookimpl\ndef chatd_register_provider(register):\n"
            "    register.add('p', lambda s: None, NOTHING, '')",
            "must be a coroutine function",
        ),
        (
            "@chatd.hookimpl\ndef chatd_register_provider(register):\n"
            "    register.add('p', open, {'type': 'objekt'}, '')",
            'config_schema of "p" is not a JSON Schema',
        ),
        (
            "@chatd.hookimpl\ndef chatd_register_provider(register):\n"
            "    register.add('echo', open, NOTHING, '')",
            'the provider "echo" is offered by two plugins, "echo" and "broken"',
        ),
        (
            "@chatd.hookimpl\ndef chatd_register_routes(register):\n"
            "    register.add('/api/mine', None)",
            'must start with "/x/"',
        ),
    ],
)
def test_a_plugin_that_cannot_be_used_is_named_with_what_to_do(
    folder: Path, source: str, told: str
) -> None:
    (folder / "broken.py").write_text(HEAD + source + "\n")
    with pytest.raises(PluginError) as caught:
        load_registry(folder)
    assert told in str(caught.value)
    assert '"broken"' in str(caught.value)


def test_a_disabled_plugin_is_not_loaded(folder: Path) -> None:
    (folder / "broken.py").write_text("1 / 0\n")
    registry = load_registry(folder, frozenset({"broken", "echo"}))
    assert "echo" not in registry.providers
    assert "sqlite" in registry.storages


def test_two_plugins_of_one_name_are_refused(folder: Path) -> None:
    (folder / "echo.py").write_text(HEAD)
    with pytest.raises(PluginError, match='two plugins are named "echo"'):
        load_registry(folder)


def test_files_that_begin_with_an_underscore_are_not_plugins(folder: Path) -> None:
    (folder / "_helper.py").write_text("1 / 0\n")
    assert load_registry(folder).plugins


def test_each_application_has_plugins_of_its_own(folder: Path) -> None:
    (folder / "more.py").write_text(
        HEAD + "@chatd.hookimpl\ndef chatd_register_provider(register):\n"
        "    register.add('more', open, NOTHING, '')\n"
    )
    assert "more" in load_registry(folder).providers
    assert "more" not in load_registry().providers


def test_bundled_plugins_import_only_what_chatd_exports() -> None:
    for path in (Path(__file__).parent.parent / "plugins").glob("*.py"):
        for line in path.read_text().splitlines():
            assert not line.startswith(("from chatd", "import chatd.")), (path, line)
    assert set(chatd.__all__) <= set(dir(chatd))
