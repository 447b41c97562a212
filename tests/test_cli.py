"""The commands, as an operator runs them: in a folder of their own, beside a running server."""

from __future__ import annotations

import json
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from chatd.app import packaged_config
from chatd.domain import canonical_id, new_id
from tests.support import Answer, ServerProcess, chatd_command, server_process

KEY = "a-key-that-was-chosen-0123456789"
TWO_MODELS = """
storage: {use: sqlite}
providers:
  one: {use: echo, reply: "one: {message}"}
  two: {use: echo, reply: "two: {message}"}
models:
  - {match: "first/*", ask: [one]}
  - {match: "second/*", ask: [two]}
"""
CHANGE_SECONDS = 5.0
"""How soon a running server sees what a command changed, at the latest."""


@contextmanager
def serving(
    folder: Path, *arguments: str, env: Mapping[str, str] | None = None
) -> Iterator[ServerProcess]:
    """A server that answers already."""
    with server_process(folder, *arguments, env=env) as process:
        assert process.url
        yield process


def wait_for(done: Callable[[], bool], seconds: float = CHANGE_SECONDS) -> None:
    """Returns as soon as `done` says so; fails when it does not in time."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def fetch(url: str, body: Any = None, headers: Mapping[str, str] | None = None) -> Answer:
    """Posts JSON, or gets when there is no body; error answers are answers."""
    request = urllib.request.Request(
        url,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/json", **(headers or {})},
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as response:
            return Answer(response.status, dict(response.headers), response.read())
    except urllib.error.HTTPError as error:
        with error:
            return Answer(error.code, dict(error.headers), error.read())


def each(
    folder: Path, commands: Sequence[Sequence[str]], **env: str
) -> list[subprocess.CompletedProcess[str]]:
    """Runs several commands at once."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda words: chatd_command(*words, cwd=folder, env=env), commands))


def configured(folder: Path, text: str = TWO_MODELS) -> None:
    (folder / "chatd.yaml").write_text(text, encoding="utf-8")


def added(folder: Path, *options: str) -> dict[str, Any]:
    """A chatbot that `chatd bots add --json` made."""
    done = chatd_command("bots", "add", "--json", *options, cwd=folder)
    assert done.returncode == 0, done.stderr
    return dict(json.loads(done.stdout))


def listed(folder: Path) -> list[dict[str, Any]]:
    return list(json.loads(chatd_command("bots", "list", "--json", cwd=folder).stdout))


def session_of(url: str, bot: Mapping[str, Any]) -> Answer:
    known = {"api_key": bot["api_key"], "assistant_id": bot["id"]}
    return fetch(f"{url}/api/chat/session", known)


def say(url: str, bot: Mapping[str, Any], session: str, text: str) -> Answer:
    return fetch(
        f"{url}/api/chat",
        {
            "api_key": bot["api_key"],
            "assistant_id": bot["id"],
            "session_id": session,
            "type": "message",
            "messages": [{"role": "user", "content": text}],
        },
    )


def greeting(process: ServerProcess, word: str) -> str:
    """What the greeting of a first start says after a word."""
    wait_for(lambda: "/api/chat " in process.stderr)
    found = re.search(rf"^  {word} +(\S+)", process.stderr, re.MULTILINE)
    assert found, process.stderr
    return found[1]


# chatd serve


def test_a_first_start_shows_a_key_that_works_and_a_second_keeps_everything(tmp_path: Path) -> None:
    with serving(tmp_path) as first:
        bot = {"id": greeting(first, "assistant_id"), "api_key": greeting(first, "api_key")}
        session = session_of(first.url, bot).json["session_id"]
        assert say(first.url, bot, session, "hello").status == 200
        assert first.stop() == 0
    with serving(tmp_path) as second:
        assert say(second.url, bot, session, "still here").status == 200
        assert second.stop() == 0
        assert "api_key" not in second.stderr
        assert bot["api_key"] not in second.stderr
    assert [chatbot["id"] for chatbot in listed(tmp_path)] == [bot["id"]]


def test_no_key_and_no_message_is_in_the_logs(tmp_path: Path) -> None:
    said = "a secret that was told"
    with serving(tmp_path) as server:
        bot = {"id": greeting(server, "assistant_id"), "api_key": greeting(server, "api_key")}
        key = bot["api_key"]
        session = session_of(server.url, bot).json["session_id"]
        assert said in say(server.url, bot, session, said).json["response"]
        wrong = {"assistant_id": bot["id"]}
        for headers in ({"Authorization": f"Bearer {key}"}, {"X-API-Key": key}):
            assert fetch(f"{server.url}/api/chat/session", wrong, headers).status == 200
        assert fetch(f"{server.url}/health?api_key={key}").status == 200
        assert fetch(f"{server.url}/{key}").status == 404
        assert server.stop() == 0
        lines = [json.loads(line) for line in server.stdout.splitlines()]
    assert len([line for line in lines if line["logger"] == "chatd.access"]) == 6
    assert key not in server.stdout
    assert said not in server.stdout


def test_a_request_is_one_line_of_json(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        answer = fetch(f"{server.url}/health", headers={"X-Request-Id": "mine-1"})
        assert answer.headers["X-Request-Id"] == "mine-1"
        assert server.stop() == 0
        lines = [json.loads(line) for line in server.stdout.splitlines()]
    (line,) = (line for line in lines if line["logger"] == "chatd.access")
    assert (line["method"], line["route"], line["status"]) == ("GET", "/health", 200)
    assert line["request_id"] == "mine-1"
    assert line["ms"] >= 0


def test_ctrl_c_ends_a_server_with_success(tmp_path: Path) -> None:
    with serving(tmp_path) as server:
        server.process.send_signal(signal.SIGINT)
        assert server.stop() == 0


def test_a_port_that_is_taken_is_told_with_a_cure(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = chatd_command("serve", "--host", "127.0.0.1", "--port", port, cwd=tmp_path)
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1 port {port}" in done.stderr
    assert "--port" in done.stderr


def test_the_port_of_the_environment_is_the_default(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = chatd_command("serve", "--host", "127.0.0.1", cwd=tmp_path, env={"PORT": port})
    assert done.returncode == 1
    assert f"port {port}" in done.stderr


def test_sqlite_refuses_to_start_on_a_dyno(tmp_path: Path) -> None:
    configured(tmp_path)
    commands = [["serve", "--port", "0"], ["bots", "list"], ["check", "--online"]]
    for done in each(tmp_path, commands, DYNO="web.1"):
        assert done.returncode == 1, done.args
        assert "storage.allow_ephemeral" in done.stderr
    assert not (tmp_path / "chatd.db").exists()


def test_sqlite_starts_on_a_dyno_when_losing_everything_is_fine(tmp_path: Path) -> None:
    configured(tmp_path, TWO_MODELS.replace("sqlite}", "sqlite, allow_ephemeral: true}"))
    with serving(tmp_path, env={"DYNO": "web.1"}) as server:
        assert fetch(f"{server.url}/readyz").status == 200


# The configuration


def test_the_configuration_is_looked_for_in_the_documented_order(tmp_path: Path) -> None:
    found = [tmp_path / "chatd.yaml", tmp_path / "config" / "chatd.yaml", tmp_path / "named.yaml"]
    (tmp_path / "config").mkdir()
    used = [_config_used(tmp_path)]
    for path in found:
        path.write_text(TWO_MODELS, encoding="utf-8")
        env = {"CHATD_CONFIG": path.name} if path.stem == "named" else {}
        used.append(_config_used(tmp_path, **env))
    assert used == [packaged_config().resolve(), *found]


def _config_used(folder: Path, **env: str) -> Path:
    done = chatd_command("check", cwd=folder, env=env)
    assert done.returncode == 0, done.stderr
    return (folder / done.stdout.split(": ", maxsplit=1)[0]).resolve()


def test_a_file_that_is_named_is_used_or_its_absence_told(tmp_path: Path) -> None:
    configured(tmp_path)
    commands = [["serve", "--config", "no.yaml"], ["serve"], ["check", "--config", "chatd.yaml"]]
    given, named, found = each(tmp_path, commands, CHATD_CONFIG="none.yaml")
    assert (given.returncode, given.stdout) == (1, "")
    assert given.stderr == "chatd: no.yaml: cannot be read: No such file or directory\n"
    assert named.returncode == 1
    assert named.stderr == "chatd: none.yaml: cannot be read: No such file or directory\n"
    assert found.stdout == "chatd.yaml: the configuration is good\n"


def test_dot_env_is_read_and_the_environment_wins_over_it(tmp_path: Path) -> None:
    configured(tmp_path, TWO_MODELS.replace("one: {message}", "${SAYS} {message}"))
    (tmp_path / ".env").write_text("SAYS=file\n")
    added(tmp_path, "--name", "Bot", "--model", "first/model")
    chat = chatd_command("chat", "Bot", cwd=tmp_path, stdin="hi\n")
    assert chat.stdout == "file hi\n"
    chat = chatd_command("chat", "Bot", cwd=tmp_path, stdin="hi\n", env={"SAYS": "environment"})
    assert chat.stdout == "environment hi\n"


def test_an_openrouter_key_alone_switches_the_carried_configuration_to_openrouter(
    tmp_path: Path,
) -> None:
    (tmp_path / ".env").write_text("OPENROUTER_API_KEY=sk-or-test-0123456789\n")
    with serving(tmp_path) as server:
        wait_for(lambda: "/api/chat " in server.stderr)
        assert re.search(r"answers by +openrouter", server.stderr)
        assert server.stop() == 0
        assert "sk-or-test" not in server.stdout + server.stderr


def test_check_tells_every_fault_at_once_with_its_line_and_no_value(tmp_path: Path) -> None:
    bad = TWO_MODELS.replace("use: echo, reply", "use: echo, repyl").replace("[two]", "[tow]")
    configured(tmp_path, bad + "server: {port: hunter2}\n")
    commands = [["check", "--config", "chatd.yaml", *more] for more in ([], ["--json"])]
    done, as_json = each(tmp_path, commands)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.splitlines() == [
        'chatd.yaml:4: providers.one.repyl: unknown key, did you mean "reply"?',
        'chatd.yaml:5: providers.two.repyl: unknown key, did you mean "reply"?',
        'chatd.yaml:8: models[1].ask[0]: there is no provider "tow", did you mean "two"?',
        "chatd.yaml:9: server.port: must be a whole number",
    ]
    assert as_json.returncode == 1
    assert json.loads(as_json.stdout) == {"ok": False, "faults": done.stderr.splitlines()}


def test_check_says_that_a_file_is_good(tmp_path: Path) -> None:
    configured(tmp_path)
    done, as_json = each(tmp_path, [["check"], ["check", "--json"]])
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("chatd.yaml: the configuration is good\n")
    assert json.loads(as_json.stdout) == {"ok": True, "faults": []}


def test_check_online_asks_storage_and_providers_and_looks_for_chatbots_without_a_rule(
    tmp_path: Path,
) -> None:
    configured(tmp_path)
    done = chatd_command("check", "--online", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1:] == [
        "storage: answers",
        "providers.one: answers",
        "providers.two: answers",
    ]
    added(tmp_path, "--name", "Lost", "--model", "third/model")
    done = chatd_command("check", "--online", cwd=tmp_path)
    assert done.returncode == 1
    assert 'chatbot "Lost"' in done.stderr
    assert '"third/model"' in done.stderr


def test_check_online_names_a_provider_that_cannot_be_reached(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    configured(
        tmp_path,
        "storage: {use: sqlite}\n"
        "providers:\n"
        f"  away: {{use: openai_compatible, base_url: 'http://127.0.0.1:{port}/v1'}}\n"
        "models: [{match: '*', ask: [away]}]\n",
    )
    done = chatd_command("check", "--online", cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert done.stderr.startswith("providers.away: ")


def test_init_writes_a_good_configuration_once(tmp_path: Path) -> None:
    first = chatd_command("init", cwd=tmp_path)
    assert first.returncode == 0
    text = (tmp_path / "chatd.yaml").read_text(encoding="utf-8")
    assert text == packaged_config().read_text(encoding="utf-8")
    configured(tmp_path, "mine")
    second = chatd_command("init", cwd=tmp_path)
    assert second.returncode == 1
    assert "chatd.yaml exists already" in second.stderr
    assert (tmp_path / "chatd.yaml").read_text() == "mine"
    assert chatd_command("init", "--force", cwd=tmp_path).returncode == 0
    assert (tmp_path / "chatd.yaml").read_text(encoding="utf-8") == text


# chatd plugins


def test_plugins_lists_each_with_its_source_hooks_and_offers(tmp_path: Path) -> None:
    done, text = each(tmp_path, [["plugins", "--json"], ["plugins"]])
    assert done.returncode == 0, done.stderr
    plugins = {plugin["name"]: plugin for plugin in json.loads(done.stdout)}
    assert plugins["sqlite"]["hooks"] == ["chatd_register_storage"]
    assert plugins["sqlite"]["source"].startswith("chatd ")
    assert plugins["echo"]["offers"] == ["provider echo: no model: it repeats what it is told"]
    for name, plugin in plugins.items():
        assert f"{name}  ({plugin['source']})" in text.stdout


# chatd bots


def test_add_prints_one_object_with_id_and_key(tmp_path: Path) -> None:
    bot = added(tmp_path)
    assert canonical_id(bot["id"]) == bot["id"]
    assert len(bot["api_key"]) >= 32
    assert bot.keys() == {
        "id",
        "api_key",
        "name",
        "model",
        "system_prompt",
        "context_tokens",
        "max_output_tokens",
        "temperature",
        "allowed_origins",
        "on_disconnect",
        "allow_tools",
        "allow_images",
        "provider_options",
        "greeting",
        "suggestions",
        "theme",
        "accent",
        "language",
        "require_identity",
        "limits",
        "daily_budget_usd",
        "turn_reserve_usd",
        "retention_days",
    }


def test_add_takes_every_setting_and_show_tells_all_but_the_key(tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("You sell bicycles. 🚲", encoding="utf-8")
    id = new_id()
    given = {
        "--id": id.upper(),
        "--api-key": KEY,
        "--name": "Zoë",
        "--model": "second/model",
        "--system-prompt": "@prompt.txt",
        "--context-tokens": "4000",
        "--max-output-tokens": "300",
        "--temperature": "0.5",
        "--on-disconnect": "stop",
        "--allow-tools": "no",
        "--allow-images": "no",
        "--provider-options": '{"openrouter": {"models": ["a/b"]}}',
        "--allowed-origin": "https://a.example",
        "--greeting": "Hello! What about a bicycle?",
        "--suggestion": "Which one is light?",
        "--theme": "dark",
        "--accent": "#0a7d5c",
        "--language": "pt-BR",
        "--require-identity": "yes",
        "--limit": "turns_per_ip=5/minute, 50/hour",
        "--daily-budget-usd": "2.5",
        "--turn-reserve-usd": "0.01",
        "--retention-days": "30",
    }
    options = [word for pair in given.items() for word in pair]
    options += ["--allowed-origin", "https://*.b.example", "--suggestion", "Which one is cheap?"]
    bot = added(tmp_path, *options)
    expected = {
        "id": id,
        "name": "Zoë",
        "model": "second/model",
        "system_prompt": "You sell bicycles. 🚲",
        "context_tokens": 4000,
        "max_output_tokens": 300,
        "temperature": 0.5,
        "allowed_origins": ["https://a.example", "https://*.b.example"],
        "on_disconnect": "stop",
        "allow_tools": False,
        "allow_images": False,
        "provider_options": {"openrouter": {"models": ["a/b"]}},
        "greeting": "Hello! What about a bicycle?",
        "suggestions": ["Which one is light?", "Which one is cheap?"],
        "theme": "dark",
        "accent": "#0a7d5c",
        "language": "pt-BR",
        "require_identity": True,
        "limits": {"turns_per_ip": "5/minute, 50/hour"},
        "daily_budget_usd": 2.5,
        "turn_reserve_usd": 0.01,
        "retention_days": 30,
    }
    assert bot == {**expected, "api_key": KEY}
    shown = each(tmp_path, [["bots", "show", name, "--json"] for name in (id, "Zoë")])
    assert [json.loads(done.stdout) for done in shown] == [expected, expected]
    assert KEY.encode() not in b"".join(path.read_bytes() for path in tmp_path.glob("chatd.db*"))


def test_set_changes_what_is_given_and_nothing_else(tmp_path: Path) -> None:
    bot = added(tmp_path, "--name", "Bot", "--temperature", "1", "--system-prompt", "Be kind.")
    before = {name: value for name, value in bot.items() if name != "api_key"}
    changes = ["--max-output-tokens", "100", "--temperature", "default", "--system-prompt", ""]
    done = chatd_command("bots", "set", "Bot", "--json", *changes, cwd=tmp_path)
    after = {**before, "max_output_tokens": 100, "temperature": None, "system_prompt": None}
    assert json.loads(done.stdout) == after
    assert listed(tmp_path) == [after]


BAD_VALUES = [
    ("--id", "17", "--id 17: must be a UUID"),
    ("--api-key", "short", "--api-key: must be at least 16"),
    ("--api-key", "with a space in between", "--api-key: must be at least 16"),
    ("--name", " ", "--name: must be 1 to 200 printable characters"),
    ("--model", "", "--model: must be 1 to 200 printable characters"),
    ("--system-prompt", "@no.txt", "--system-prompt @no.txt: cannot be read"),
    ("--context-tokens", "0", "--context-tokens: must be at least 1"),
    ("--max-output-tokens", "many", "--max-output-tokens: must be a whole number"),
    ("--temperature", "2.1", "--temperature: must be at most 2"),
    ("--temperature", "nan", "--temperature: must be"),
    ("--allow-tools", "maybe", "--allow-tools: must be yes or no"),
    *(
        ("--allowed-origin", origin, f"--allowed-origin {origin}: must {told}")
        for origin, told in [
            ("https://a.example/path", "be an origin like"),
            ("https://a.*.example", "be an origin like"),
            ("https://*.com", "have two labels at least after the *"),
        ]
    ),
    ("--limit", "turns_per_ip=many", "--limit turns_per_ip: must be like 20/minute"),
    ("--limit", "turns_per_ip=0/minute", "--limit turns_per_ip: must be like 20/minute"),
    ("--limit", "turns_per_op=5/minute", '--limit turns_per_op: unknown key, did you mean "turns'),
    ("--limit", "5/minute", "--limit 5/minute: must be like turns_per_ip="),
    ("--daily-budget-usd", "much", "--daily-budget-usd: must be a number of USD, none or default"),
    ("--daily-budget-usd", "-1", "--daily-budget-usd: must be a number of USD, none or default"),
    ("--turn-reserve-usd", "0", "--turn-reserve-usd: must be more than 0"),
    ("--retention-days", "0", "--retention-days: must be at least 1"),
    ("--retention-days", "1.5", "--retention-days: must be a whole number"),
    ("--suggestion", "", "--suggestion: must not be empty"),
    ("--theme", "pink", "--theme: must be light, dark, auto or default"),
    ("--accent", "red", "--accent: must be a colour like #0a7d5c"),
    ("--language", "german!", "--language: must be a language tag like de or pt-BR"),
]


def test_set_changes_one_limit_and_takes_it_back(tmp_path: Path) -> None:
    added(tmp_path, "--name", "Bot", "--limit", "turns_per_ip=5/minute")

    def limits(*options: str) -> Any:
        done = chatd_command("bots", "set", "Bot", "--json", *options, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["limits"]

    both = {"turns_per_ip": "5/minute", "turns_per_session": "none"}
    assert limits("--limit", "turns_per_session=none") == both
    assert limits("--greeting", "Hi") == both
    assert limits("--limit", "turns_per_ip=default") == {"turns_per_session": "none"}
    assert limits("--limit", "turns_per_session=default") is None


def test_a_bad_value_is_told_in_a_sentence(tmp_path: Path) -> None:
    tried = each(tmp_path, [["bots", "add", option, value] for option, value, _ in BAD_VALUES])
    for (option, value, told), done in zip(BAD_VALUES, tried, strict=True):
        assert (done.returncode, done.stdout) == (1, ""), (option, value)
        assert done.stderr.startswith(f"chatd: {told}")
        assert "Traceback" not in done.stderr
    assert listed(tmp_path) == []


def test_an_allowed_origin_is_stored_as_browsers_send_it(tmp_path: Path) -> None:
    given = ["HTTPS://WWW.Example.com:443", "https://www.example.com", "https://Bücher.example"]
    options = [word for origin in given for word in ("--allowed-origin", origin)]
    bot = added(tmp_path, *options)
    assert bot["allowed_origins"] == ["https://www.example.com", "https://xn--bcher-kva.example"]


def test_a_taken_id_or_key_is_refused(tmp_path: Path) -> None:
    bot = added(tmp_path, "--api-key", KEY)
    commands = [["bots", "add", "--id", bot["id"]], ["bots", "add", "--api-key", KEY]]
    for done, what in zip(each(tmp_path, commands), ("id", "API key"), strict=True):
        assert done.returncode == 1
        assert done.stderr == f"chatd: a chatbot with this {what} exists already\n"
    assert len(listed(tmp_path)) == 1


def test_an_unknown_or_ambiguous_chatbot_is_told(tmp_path: Path) -> None:
    ids = [new_id(), new_id()]
    for id in ids:
        added(tmp_path, "--name", "Twin", "--id", id)
    commands = [["bots", "show", "Nobody"], ["bots", "remove", "Twin", "--yes"]]
    unknown, twins = each(tmp_path, commands)
    assert unknown.returncode == 1
    assert 'there is no chatbot "Nobody"' in unknown.stderr
    assert twins.returncode == 1
    assert all(id in twins.stderr for id in ids)
    assert len(listed(tmp_path)) == 2


def test_remove_asks_first_and_erases_then(tmp_path: Path) -> None:
    added(tmp_path, "--name", "Bot")
    refused = chatd_command("bots", "remove", "Bot", cwd=tmp_path, stdin="n\n")
    assert refused.returncode == 1
    assert "all its conversations?" in refused.stdout
    done = chatd_command("bots", "remove", "Bot", cwd=tmp_path, stdin="y\n")
    assert done.returncode == 0
    assert listed(tmp_path) == []


def test_a_wrong_command_line_exits_with_2_and_shows_the_usage(tmp_path: Path) -> None:
    wrong = [
        ["frobnicate"],
        ["bots", "frobnicate"],
        ["serve", "--prot", "8000"],
        ["serve", "--port", "100000"],
        ["bots", "show"],
        ["chat"],
    ]
    for arguments, done in zip(wrong, each(tmp_path, wrong), strict=True):
        assert (done.returncode, done.stdout) == (2, ""), arguments
        assert done.stderr.startswith("Usage: ")


# Beside a running server


def test_a_running_server_sees_every_change_in_time(tmp_path: Path) -> None:
    configured(tmp_path)
    with serving(tmp_path) as server:
        bots = {name: added(tmp_path, "--name", name, "--model", "first/m") for name in "ABC"}
        sessions: dict[str, str] = {}
        for name, bot in bots.items():
            begun = session_of(server.url, bot)
            assert begun.status == 200, "a new chatbot is there at once"
            sessions[name] = begun.json["session_id"]
        assert say(server.url, bots["A"], sessions["A"], "hi").json["response"] == "one: hi"

        changes = [
            ["bots", "set", "A", "--model", "second/m"],
            ["bots", "rotate-key", "B", "--json"],
            ["bots", "remove", "C", "--yes"],
        ]
        rotated = json.loads(each(tmp_path, changes)[1].stdout)
        assert rotated.keys() == {"id", "api_key"}
        assert rotated["api_key"] != bots["B"]["api_key"]

        def all_seen() -> bool:
            answer = say(server.url, bots["A"], sessions["A"], "hi")
            return (
                answer.json["response"] == "two: hi"
                and session_of(server.url, bots["B"]).status == 401
                and session_of(server.url, bots["C"]).status == 401
            )

        wait_for(all_seen)
        assert say(server.url, bots["B"], sessions["B"], "hi").status == 401
        assert say(server.url, rotated, sessions["B"], "hi").status == 200


# chatd chat


def test_chat_answers_each_line_within_one_session(tmp_path: Path) -> None:
    configured(tmp_path)
    added(tmp_path, "--name", "Bot", "--model", "first/model")
    done = chatd_command("chat", "Bot", cwd=tmp_path, stdin="hi\nand again\n")
    assert (done.returncode, done.stdout, done.stderr) == (0, "one: hi\none: and again\n", "")


def test_chat_says_why_there_is_no_answer(tmp_path: Path) -> None:
    configured(tmp_path)
    added(tmp_path, "--name", "Lost", "--model", "third/model")
    failed = chatd_command("chat", "Lost", cwd=tmp_path, stdin="hi\n")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "(No model provider could answer. Try again in a moment.)" in failed.stderr
