"""Promises as tests: what exists is documented, and what the pages show works as it is shown."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import pytest

from chatd import hookspecs
from chatd.app import load, packaged_config, routes
from chatd.cli import main
from chatd.config import LimitsConfig, ServerConfig
from chatd.handlers.problems import PROBLEMS
from chatd.offers import Offer
from chatd.provider import Timeouts
from chatd.registry import load_registry
from chatd.validation import schema
from tests.support import ServerProcess, chatd_command, clean_env
from tests.test_cli import serving, wait_for

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
LISTS = {"allowed_origins", "suggestions", "limits"}
"""Settings of a chatbot of which an option names one."""
SERVED = "http://localhost:8000"
"""The address that the pages show, for which the tests put the one that is served."""

_BLOCK = re.compile(r"^(?:<!-- ([^>]*?) -->\n)?```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced block of a page: the word of the comment before it, its language, its text."""

    mark: str
    language: str
    text: str


def page(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


def blocks(name: str) -> list[Block]:
    return [Block(mark or "", kind, text) for mark, kind, text in _BLOCK.findall(page(name))]


def plugin_files() -> dict[str, str]:
    """The plugins that docs/plugins.md shows, by file name."""
    marked = [block for block in blocks("docs/plugins.md") if block.mark.startswith("plugin: ")]
    return {block.mark.removeprefix("plugin: "): block.text for block in marked}


def section(text: str, heading: str) -> str:
    """What stands under a heading, up to the next one of the same or a higher level."""
    level = heading.index(" ")
    body = text.split(f"\n{heading}\n", maxsplit=1)[1]
    return re.split(rf"^#{{1,{level}}} ", body, maxsplit=1, flags=re.MULTILINE)[0]


def row(text: str, name: str) -> str:
    """The line of a table that describes `name`."""
    rows = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
    assert len(rows) == 1, f"{name} has {len(rows)} rows"
    return rows[0]


def settings_of(document: Mapping[str, Any], path: str = "") -> Iterator[str]:
    """The settings of a schema, as the page writes them: `server.port`, `models[].match`."""
    inner = {f"{path}.{name}": part for name, part in document.get("properties", {}).items()}
    if isinstance(part := document.get("additionalProperties"), dict):
        inner[f"{path}.NAME"] = part
    if not inner:
        yield path.removeprefix(".")
    items = document.get("items", {})
    for branch in items.get("anyOf", [items]):
        if "properties" in branch:
            inner[f"{path}[]"] = branch
    for name, part in inner.items():
        yield from settings_of(part, name)


def bundled(offers: Mapping[str, Offer[Any]]) -> list[Offer[Any]]:
    return [o for o in offers.values() if o.open.__module__.startswith("chatd_plugins.")]


def shown(value: Any) -> str:
    """A default as a table shows it."""
    return str(value).lower() if isinstance(value, bool) else str(value)


# Everything is documented


def test_every_setting_of_the_configuration_is_documented() -> None:
    text = page("docs/configuration.md")
    names = set(settings_of(schema("config").document))
    assert {"server.port", "providers.NAME.timeouts.plain", "models[].ask", "log_level"} <= names
    assert [name for name in sorted(names) if f"`{name}`" not in text] == []


@pytest.mark.parametrize(
    ("prefix", "defaults"),
    [
        ("server", ServerConfig()),
        ("limits", LimitsConfig()),
        ("providers.NAME.timeouts", Timeouts()),
    ],
)
def test_the_documented_defaults_are_the_defaults(prefix: str, defaults: Any) -> None:
    text = page("docs/configuration.md")
    for field in dataclasses.fields(defaults):
        value = getattr(defaults, field.name)
        cell = row(text, f"{prefix}.{field.name}").split("|")[2].strip().strip("`")
        expected = "[]" if value == () else "none" if value is None else str(value)
        assert cell == expected, field.name


def test_every_setting_of_the_bundled_plugins_is_documented_with_its_default() -> None:
    text = page("docs/configuration.md")
    registry = load_registry()
    storages, providers = bundled(registry.storages), bundled(registry.providers)
    shared = bundled(registry.shared)
    assert {offer.name for offer in storages} >= {"sqlite", "supabase", "postgres"}
    assert {offer.name for offer in shared} >= {"memory", "redis"}
    assert {offer.name for offer in providers} >= {"echo", "openai_compatible", "openrouter"}
    settings = [
        (section(text, f"### `use: {offer.name}`"), name, document)
        for offer in [*storages, *providers, *shared]
        for name, document in offer.schema.document.get("properties", {}).items()
    ]
    for where, name, document in settings:
        assert shown(document.get("default", "")) in row(where, name), name


def test_every_setting_of_a_chatbot_is_documented() -> None:
    text = section(page("docs/configuration.md"), "## Settings of a chatbot")
    names = ["name", "model", *schema("chatbot_settings").document["properties"]]
    for name in names:
        option = name.replace("_", "-").removesuffix("s" if name in LISTS else "\0")
        assert row(text, f"--{option}")


def test_every_way_to_refer_to_a_value_is_documented() -> None:
    text = page("docs/configuration.md")
    for written in ("${NAME}", "${NAME:-default}", "${NAME:+text}", "${file:/path}"):
        assert row(text, written)


def test_every_hook_is_documented_with_its_argument() -> None:
    text = page("docs/plugins.md")
    hooks = {name: value for name, value in vars(hookspecs).items() if name.startswith("chatd_")}
    assert len(hooks) >= 5
    for name, hook in hooks.items():
        arguments = ", ".join(hook.__code__.co_varnames[: hook.__code__.co_argcount])
        assert row(text, f"{name}({arguments})")


def test_every_error_code_is_documented_with_its_status() -> None:
    text = page("docs/api.md")
    rows = [f"| {problem.status} | `{error.code}` |" for error, problem in PROBLEMS.items()]
    assert [line for line in rows if line not in text] == []


def test_every_route_is_documented_with_its_methods() -> None:
    text = page("docs/api.md")
    for route in routes():
        assert f"{route.path}`" in text, route.path
        for method in route.operations:
            assert f"`{method} {route.path}`" in text or method == "GET"


def test_every_command_and_option_is_documented() -> None:
    everything = "\n".join(page(str(path.relative_to(ROOT))) for path in PAGES)
    commands = dict(_commands("chatd", main))
    assert {"chatd serve", "chatd bots rotate-key"} <= commands.keys()
    for name, command in commands.items():
        assert f"`{name}" in page("docs/operations.md"), name
        options = [o for p in command.params if isinstance(p, click.Option) for o in p.opts]
        assert [option for option in options if option not in everything] == [], name


def _commands(name: str, group: click.Group) -> Iterator[tuple[str, click.Command]]:
    for word, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from _commands(f"{name} {word}", command)
        else:
            yield f"{name} {word}", command


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(ROOT)))
def test_internal_links_lead_somewhere(path: Path) -> None:
    text = _BLOCK.sub("", path.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("https://", "http://", "mailto:")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert target.is_relative_to(ROOT), link
        if anchor:
            assert anchor in _anchors(target), link


def _anchors(path: Path) -> set[str]:
    """The headings of a page, as links name them."""
    text = _BLOCK.sub("", path.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# What is shown works


@pytest.fixture
def server(tmp_path: Path) -> Iterator[ServerProcess]:
    """A first start in an empty folder, greeting and all."""
    with serving(tmp_path) as process:
        wait_for(lambda: "/api/chat " in process.stderr)
        yield process


def bash(script: str, folder: Path, **env: str) -> str:
    """What a script writes to stdout, with chatd's environment on its path. Fails as it does."""
    tools = folder / ".tools"
    tools.mkdir(exist_ok=True)
    for name, module in (("chatd", " -m chatd"), ("python", "")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{module} "$@"\n')
        (tools / name).chmod(0o755)
    path = f"{tools}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        check=False,
        cwd=folder,
        env={**clean_env(), "PATH": path, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def greeted(process: ServerProcess, word: str) -> str:
    """What the greeting says after a word."""
    found = re.search(rf"^  {word} +(\S+)", process.stderr, re.MULTILINE)
    assert found, process.stderr
    return found[1]


@pytest.mark.parametrize(
    "name",
    ["README.md", "docs/quick-start.md", "docs/api.md", "docs/openai.md", "docs/operations.md"],
)
def test_the_commands_of_a_page_give_what_it_shows(name: str, server: ServerProcess) -> None:
    marked = [block for block in blocks(name) if block.mark in ("run", "answer")]
    runs, answers = marked[::2], marked[1::2]
    assert runs
    assert {block.mark for block in runs} == {"run"}
    assert {block.mark for block in answers} == {"answer"}
    assert len(runs) == len(answers)
    end = "--- the end of a block ---"
    script = "".join(f"{block.text}\necho; echo '{end}'\n" for block in runs)
    output = bash(
        script.replace(SERVED, server.url),
        server.folder,
        ASSISTANT_ID=greeted(server, "assistant_id"),
        API_KEY=greeted(server, "api_key"),
    )
    given = output.split(f"\n{end}\n")[:-1]
    for wanted, got in zip(answers, given, strict=True):
        if wanted.language == "json":
            assert_like(json.loads(wanted.text), json.loads(got))
        else:
            assert_like(wanted.text.strip(), got.strip())


def assert_like(wanted: Any, got: Any) -> None:
    """Compares an answer with the one of the page, in which "…" stands for any text."""
    if isinstance(wanted, dict):
        assert isinstance(got, dict)
        assert wanted.keys() == got.keys()
        for name, value in wanted.items():
            assert_like(value, got[name])
    elif isinstance(wanted, list):
        assert len(wanted) == len(got)
        for item, other in zip(wanted, got, strict=True):
            assert_like(item, other)
    elif isinstance(wanted, str):
        pattern = ".+".join(map(re.escape, wanted.split("…")))
        assert re.fullmatch(pattern, str(got), re.DOTALL), f"{got!r} is not like {wanted!r}"
    else:
        assert wanted == got


def test_the_lines_that_a_first_start_prints_work_when_pasted(server: ServerProcess) -> None:
    lines = [
        line
        for line in server.stderr.splitlines()
        if line.lstrip().startswith(("SESSION=", "curl "))
    ]
    assert len(lines) == 2
    answer = json.loads(bash("\n".join(lines), server.folder))
    assert "You said: Hello!" in answer["response"]


def test_the_provider_in_ten_lines_answers_through_a_server(tmp_path: Path) -> None:
    source = plugin_files()["shout.py"]
    assert len(source.splitlines()) == 10
    (config,) = (b.text for b in blocks("docs/plugins.md") if b.mark == "config: chatd.yaml")
    (tmp_path / "my_plugins").mkdir()
    (tmp_path / "my_plugins" / "shout.py").write_text(source, encoding="utf-8")
    (tmp_path / "chatd.yaml").write_text(config, encoding="utf-8")
    with serving(tmp_path) as process:
        wait_for(lambda: "/api/chat " in process.stderr)
        lines = [line for line in process.stderr.splitlines() if "curl " in line]
        assert json.loads(bash("\n".join(lines), tmp_path))["response"] == "HELLO!"


def test_the_other_plugins_of_the_page_work_together(tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    for name, source in plugin_files().items():
        (tmp_path / "plugins" / name).write_text(source, encoding="utf-8")
    (tmp_path / "chatd.yaml").write_text(
        "plugins: {folder: plugins}\n"
        "storage: {use: sqlite}\n"
        "providers: {main: {use: louder, marks: '?'}}\n"
        "models: [{match: '*', ask: [main]}]\n"
        "first_chatbot: {name: Bot, model: any/model}\n"
        "interceptors: [{use: manners, word: please}]\n"
    )
    with serving(tmp_path) as process:
        wait_for(lambda: "/api/chat " in process.stderr)
        polite = chatd_command("chat", "Bot", cwd=tmp_path, stdin="speak please\n")
        rude = chatd_command("chat", "Bot", cwd=tmp_path, stdin="speak\n")
        endpoint = bash(f"curl -s {process.url}/x/hello/you", tmp_path)
    command = chatd_command("greet", "you", cwd=tmp_path)
    counted = chatd_command("sessions", cwd=tmp_path)
    unread = chatd_command("sessions", "--config", "no.yaml", cwd=tmp_path)
    assert polite.stdout.strip() == "SPEAK? PLEASE?"
    assert (rude.returncode, rude.stderr) == (1, "(Say please.)\n")
    assert json.loads(endpoint) == {"hello": "you"}
    assert command.stdout == "Hello, you.\n"
    assert counted.stdout == "2  Bot\n"
    assert unread.returncode == 1
    assert unread.stderr == "chatd: no.yaml: cannot be read: No such file or directory\n"


def test_the_provider_around_another_that_the_page_shows_answers(tmp_path: Path) -> None:
    (tmp_path / "plugins").mkdir()
    (tmp_path / "plugins" / "signed.py").write_text(plugin_files()["signed.py"], encoding="utf-8")
    (shown,) = (b.text for b in blocks("docs/plugins.md") if "use: signed" in b.text)
    rest = (
        "plugins: {folder: plugins}\nstorage: {use: sqlite}\nmodels: [{match: '*', ask: [main]}]\n"
    )
    (tmp_path / "chatd.yaml").write_text(shown + rest, encoding="utf-8")
    assert chatd_command("bots", "add", "--name", "Bot", cwd=tmp_path).returncode == 0
    said = chatd_command("chat", "Bot", cwd=tmp_path, stdin="Hi\n")
    assert said.stdout == "Hello. Yours, Bot\n"
    (tmp_path / "chatd.yaml").write_text(shown.replace("reply", "replly") + rest)
    fault = chatd_command("check", cwd=tmp_path).stderr
    assert fault == ('chatd.yaml:5: providers.main.of.replly: unknown key, did you mean "reply"?\n')


def test_the_line_that_the_page_on_replay_shows_can_be_replayed(tmp_path: Path) -> None:
    (shown,) = (b.text for b in blocks("docs/record-replay.md") if b.language == "json")
    (tmp_path / "answers.jsonl").write_text(json.dumps(json.loads(shown)), encoding="utf-8")
    (replay,) = (b.text for b in blocks("docs/record-replay.md") if "use: replay" in b.text)
    (tmp_path / "chatd.yaml").write_text(
        f"{replay}storage: {{use: sqlite}}\nmodels: [{{match: '*', ask: [main]}}]\n"
    )
    checked = chatd_command("check", "--online", cwd=tmp_path)
    assert (checked.returncode, checked.stderr) == (0, "")
    bot = ("bots", "add", "--name", "Bot", "--model", "openai/gpt-4o-mini")
    assert chatd_command(*bot, cwd=tmp_path).returncode == 0
    temperature = ("bots", "set", "Bot", "--temperature", "0.5")
    assert chatd_command(*temperature, cwd=tmp_path).returncode == 0
    assert chatd_command("chat", "Bot", cwd=tmp_path, stdin="Hello!\n").stdout == "Hi there.\n"


def test_the_conformance_suites_run_as_the_page_shows(tmp_path: Path) -> None:
    (tmp_path / "louder.py").write_text(plugin_files()["louder.py"], encoding="utf-8")
    tests = {b.mark.removeprefix("test: "): b.text for b in blocks("docs/plugins.md") if b.mark}
    for name in ("test_louder.py", "test_my_storage.py"):
        (tmp_path / name).write_text(tests[name], encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-k", "TestLouder or history"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout
    ran = re.findall(r"^(test_\w+\.py) \.+ ", done.stdout, re.MULTILINE)
    assert ran == ["test_louder.py", "test_my_storage.py"]


def test_the_react_example_compiles_with_the_ai_sdk(tmp_path: Path) -> None:
    (example,) = (block.text for block in blocks("docs/api.md") if block.language == "tsx")
    (tmp_path / "node_modules").symlink_to(ROOT / "node_modules")
    (tmp_path / "example.tsx").write_text(example, encoding="utf-8")
    # That a wrong name is seen shows that the types of the packages were read.
    assert "prepareSendMessagesRequest" in example
    misspelt = example.replace("prepareSendMessagesRequest", "prepareSendMessageRequest")
    (tmp_path / "misspelt.tsx").write_text(misspelt, encoding="utf-8")
    options = {
        "strict": True,
        "noEmit": True,
        "skipLibCheck": True,  # as pages do: the packages name types of Node's
        "target": "es2022",
        "lib": ["es2022", "dom", "dom.iterable"],
        "module": "esnext",
        "moduleResolution": "bundler",
        "jsx": "react-jsx",
        "types": [],
    }
    project = {"compilerOptions": options, "files": ["example.tsx", "misspelt.tsx"]}
    (tmp_path / "tsconfig.json").write_text(json.dumps(project), encoding="utf-8")
    done = subprocess.run(
        [str(ROOT / "node_modules" / ".bin" / "tsc"), "--project", "tsconfig.json"],
        check=False,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    faults = done.stdout.splitlines()
    assert faults, done.stderr
    assert [fault for fault in faults if not fault.startswith("misspelt.tsx(")] == []
    assert "prepareSendMessageRequest" in faults[0]


def test_the_faults_that_the_configuration_page_shows_are_what_check_says(tmp_path: Path) -> None:
    (tmp_path / "chatd.yaml").write_text(
        "server:\n"
        "  prot: 8000\n"
        "  port: eighty\n"
        "storage:\n"
        "  use: sqlit\n"
        "providers:\n"
        "  main:\n"
        "    use: echo\n" + "\n" * 4 + "models:\n"
        '  - match: "*"\n'
        "    ask: [mian]\n"
    )
    text = section(page("docs/configuration.md"), "## What errors look like")
    (block,) = _BLOCK.findall(text)
    checked = chatd_command("check", "--config", "chatd.yaml", cwd=tmp_path)
    assert (checked.returncode, checked.stderr) == (1, block[2])


def test_whole_configurations_on_the_pages_are_good(tmp_path: Path) -> None:
    whole = [
        block.text
        for name in ("README.md", "docs/configuration.md")
        for block in blocks(name)
        if block.language == "yaml" and "providers:" in block.text and "models:" in block.text
    ]
    assert len(whole) == 2
    for text in whole:
        full = text if "storage:" in text else f"storage: {{use: sqlite}}\n{text}"
        (tmp_path / "chatd.yaml").write_text(full, encoding="utf-8")
        config, _ = load(tmp_path / "chatd.yaml")
        assert config.models[0].ask[0].model == "llama3.2"


def test_the_carried_configuration_names_only_documented_settings() -> None:
    names = re.findall(
        r"^ *([a-z_]+):", packaged_config().read_text(encoding="utf-8"), re.MULTILINE
    )
    text = page("docs/configuration.md")
    assert [name for name in names if not re.search(rf"`[^`]*\b{name}\b[^`]*`", text)] == []


def test_the_make_targets_that_the_pages_name_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", page("Makefile"), re.MULTILINE))
    named = {
        target
        for path in PAGES
        for target in re.findall(r"\bmake ([a-z]+)(?:`|\s+#|$)", path.read_text(), re.MULTILINE)
    }
    assert {"run", "test"} <= named <= targets
