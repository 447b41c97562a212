"""The configuration: what is written, what it means, and every fault told with its line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from chatd.app import load
from chatd.config import Ask, Config, ConfigFile
from chatd.errors import ConfigError
from chatd.provider import Timeouts
from chatd.registry import load_registry
from tests.support import chatd_command

ROOT = Path(__file__).parent.parent
GOOD = """\
storage: {use: sqlite}
providers:
  main: {use: echo}
models:
  - match: "*"
    ask: [main]
"""


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{here}: &{here} [{', '.join(['*' + before] * 10)}]\n"
    for before, here in zip("abcdefgh", "bcdefghi", strict=True)
)


def check(text: str, env: dict[str, str] | None = None) -> Config:
    registry = load_registry()
    return ConfigFile("c.yaml", text, env or {}).check(
        {
            "storage": {o.name: o.schema for o in registry.storages.values()},
            "provider": {o.name: o.schema for o in registry.providers.values()},
            "interceptor": {o.name: o.schema for o in registry.interceptors.values()},
        }
    )


def faults(text: str, env: dict[str, str] | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        check(text, env)
    return list(caught.value.faults)


def test_a_small_configuration_has_sensible_defaults() -> None:
    config = check(GOOD)
    assert (config.server.host, config.server.port) == ("localhost", 8000)
    assert config.server.allowed_origins == ()
    assert config.providers["main"].timeouts == Timeouts()
    assert config.first_chatbot is None


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.yaml")), ids=lambda p: p.name)
def test_every_configuration_that_is_shipped_is_good(path: Path, tmp_path: Path) -> None:
    env = {"SUPABASE_URL": "https://x.supabase.co", "SUPABASE_KEY": "sb_secret_x"}
    env["DATABASE_URL"] = "postgresql://x@localhost/x"
    assert chatd_command("check", "--config", str(path), cwd=tmp_path, env=env).returncode == 0


def test_environment_variables_are_filled_in_and_keep_their_types() -> None:
    text = GOOD + "server: {port: '${PORT}'}\n"
    assert faults(text, {"PORT": "9"}) == ["c.yaml:7: server.port: must be a whole number"]
    text = GOOD + "server:\n  port: ${PORT:-8000}\n  host: ${HOST:-0.0.0.0}\n"
    assert check(text, {"PORT": "9"}).server.port == 9
    assert check(text, {"PORT": ""}).server.port == 8000
    assert check(text).server.host == "0.0.0.0"


def test_an_unset_variable_is_an_error_that_says_what_to_do() -> None:
    (fault,) = faults(GOOD.replace("sqlite", "sqlite, path: '${DB_PATH}'"))
    assert fault == (
        "c.yaml:1: storage.path: the environment variable DB_PATH is not set: set it, or write a "
        "default, ${DB_PATH:-default}"
    )


def test_a_provider_is_enabled_by_a_variable() -> None:
    text = GOOD.replace(
        "providers:\n",
        "providers:\n  paid:\n    use: openrouter\n    enabled: ${KEY:+true}\n"
        "    api_key: '${KEY:-}'\n",
    )
    assert set(check(text).providers) == {"main"}
    assert set(check(text, {"KEY": "sk-1"}).providers) == {"main", "paid"}


def test_a_secret_may_come_from_a_file(tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_text("sk-from-file\n")
    text = GOOD.replace("{use: echo}", f"{{use: openrouter, api_key: '${{file:{secret}}}'}}")
    assert check(text).providers["main"].use.settings["api_key"] == "sk-from-file"
    secret.unlink()
    (fault,) = faults(text)
    assert fault.startswith("c.yaml:3: providers.main.api_key:")
    assert "cannot be read: No such file" in fault


def test_every_fault_is_told_at_once_with_its_line() -> None:
    text = """\
server:
  prot: 8000
  port: high
storage:
  use: sqlit
providers:
  main:
    use: openai_compatible
    timout: 5
  other: {use: echo, word_seconds: -1}
models:
  - match: "*"
    ask: [mian, {provider: other, modle: x}]
  - ask: []
colour: red
"""
    assert faults(text) == [
        'c.yaml:2: server.prot: unknown key, did you mean "port"?',
        "c.yaml:3: server.port: must be a whole number",
        'c.yaml:5: storage.use: no plugin offers the storage "sqlit", did you mean "sqlite"?',
        "c.yaml:7: providers.main.base_url is required",
        'c.yaml:9: providers.main.timout: unknown key, did you mean "timeouts"?',
        "c.yaml:10: providers.other.word_seconds: must be at least 0",
        'c.yaml:13: models[0].ask[0]: there is no provider "mian", did you mean "main"?',
        'c.yaml:13: models[0].ask[1].modle: unknown key, did you mean "model"?',
        "c.yaml:14: models[1].ask: must not be empty",
        "c.yaml:14: models[1].match is required",
        "c.yaml:15: colour: unknown key",
    ]


def test_a_key_that_stands_twice_is_refused() -> None:
    text = GOOD + "storage:\n  use: sqlite\n"
    assert faults(text) == ["c.yaml:7: storage: stands twice, first on line 1"]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "c.yaml:1: the file is empty"),
        ("- a\n- b\n", "c.yaml:1: the file: must be an object"),
        ("a: [1,\nb: 2\n", "c.yaml:3: not valid YAML"),
        ("a: {b: ${C}}\n", 'a "${NAME}" inside braces needs quotes'),
        ("a: !!python/object/apply:os.system [echo]\n", "c.yaml:1: a: unknown key"),
        ("a: " + "[" * 5000, "nested too deep"),
        ("storage: &s {use: sqlite, x: *s}\n", "storage: holds itself"),
        (BOMB, "holds more than"),
        (GOOD + "server: &s\n  <<: {port: 1}\n", "merge keys (<<) are not supported"),
    ],
)
def test_what_is_not_a_configuration_is_told_apart(text: str, told: str) -> None:
    assert any(told in fault for fault in faults(text)), faults(text)


@pytest.mark.parametrize("text", [".nan", ".inf", "-.inf", "1e999", "${BIG}"])
def test_what_is_no_finite_number_is_told_once(text: str) -> None:
    written = GOOD + f"server:\n  body_timeout: {text}\n"
    assert faults(written, {"BIG": "1e999"}) == ["c.yaml:8: server.body_timeout: must be finite"]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("1e1", 10), ("${TEN}", 10), ("+.5E-1", 0.05), ("2.5e+1", 25), ("1e+1", 10), ("1.e1", 10)],
)
def test_a_number_may_have_an_exponent(text: str, seconds: float) -> None:
    config = check(GOOD + f"server:\n  body_timeout: {text}\n", {"TEN": "1e1"})
    assert config.server.body_timeout == seconds


def test_a_whole_number_is_one_however_it_is_written_and_text_stays_text() -> None:
    text = GOOD.replace("{use: echo}", "{use: openrouter, api_key: '12e3'}")
    config = check(text + "server: {port: 8e3, trusted_proxies: 1.0}\n")
    assert repr((config.server.port, config.server.trusted_proxies)) == "(8000, 1)"
    assert config.providers["main"].use.settings["api_key"] == "12e3"
    assert faults(GOOD + "server: {port: 8.5e0}\n") == [
        "c.yaml:7: server.port: must be a whole number"
    ]


LEAST, MOST, MORE = "must be at least", "must be at most", "must be more than"
BOUNDS = [
    *[
        (f"timeouts.{name}", 0.001, 1e6, (0, f"{MORE} 0"), None)
        for name in ("connect", "first_token", "idle", "total", "plain")
    ],
    ("retries.attempts", 1, 20, (0, f"{LEAST} 1"), (21, f"{MOST} 20")),
    *[
        (f"retries.{name}", 0, 600, (-0.1, f"{LEAST} 0"), (600.1, f"{MOST} 600"))
        for name in ("base", "most", "patience")
    ],
    ("breaker.share", 0.01, 1, (0, f"{MORE} 0"), (1.01, f"{MOST} 1")),
    ("breaker.requests", 1, 10**6, (0, f"{LEAST} 1"), (10**6 + 1, f"{MOST} 1000000")),
    ("breaker.window", 0.1, 86400, (0.09, f"{LEAST} 0.1"), (86401, f"{MOST} 86400")),
    ("breaker.open_seconds", 0.01, 86400, (0.009, f"{LEAST} 0.01"), (86401, f"{MOST} 86400")),
    *[
        (f"prices[0].{name}", 0, 10**6, (-0.1, f"{LEAST} 0"), (10**6 + 1, f"{MOST} 1000000"))
        for name in ("input", "output", "cached")
    ],
]
"""A setting of a provider, the least and the most it takes, and what is said of less and of more."""


@pytest.mark.parametrize(
    ("setting", "least", "most", "less", "more"), BOUNDS, ids=[case[0] for case in BOUNDS]
)
def test_the_numbers_of_a_provider_have_bounds(
    setting: str,
    least: float,
    most: float,
    less: tuple[float, str],
    more: tuple[float, str] | None,
) -> None:
    part, _, name = setting.partition(".")

    def written(value: float) -> str:
        group: dict[str, Any] = {name: value}
        if part == "prices[0]":
            group = {"match": "*", "input": 1, "output": 1, **group}
        provider = {"use": "echo", part.removesuffix("[0]"): [group] if "[" in part else group}
        return GOOD.replace("{use: echo}", json.dumps(provider))

    for value in (least, most):
        provider = check(written(value)).providers["main"]
        group = getattr(provider, part.removesuffix("[0]"))
        assert getattr(group[0] if "[" in part else group, name) == value
    for value, told in filter(None, (less, more)):
        assert faults(written(value)) == [f"c.yaml:3: providers.main.{setting}: {told}"]


@pytest.mark.parametrize(
    ("weight", "told"),
    [
        ("0", None),
        ("1e6", None),
        ("-1", "must be at least 0"),
        ("1000001", "must be at most 1000000"),
    ],
)
def test_the_weight_of_a_provider_in_a_chain_has_bounds(weight: str, told: str | None) -> None:
    text = GOOD.replace("[main]", f"[main, {{provider: main, weight: {weight}}}]")
    if told is None:
        assert check(text).models[0].ask[1].weight == float(weight)
    else:
        assert faults(text) == [f"c.yaml:6: models[0].ask[1].weight: {told}"]


def test_no_secret_is_ever_in_a_fault() -> None:
    secret = "sk-canary-1234567890"
    text = (
        GOOD.replace("{use: echo}", "{use: openrouter, api_key: ['${KEY}'], app_url: '${KEY}é'}")
        + "server: {port: '${KEY}', host: ['${KEY}'], allowed_origins: ['${KEY}']}\n"
        + "log_level: ${KEY}\n"
    )
    found = faults(text, {"KEY": secret})
    assert len(found) >= 5
    assert secret not in "\n".join(found)


def test_a_secret_is_not_in_the_repr_of_a_configuration() -> None:
    text = GOOD.replace("{use: echo}", "{use: openrouter, api_key: sk-canary}")
    assert "sk-canary" not in repr(check(text))


def test_models_may_name_providers_with_their_own_model() -> None:
    text = GOOD.replace("[main]", "[main, {provider: main, model: llama3.2}]")
    (rule,) = check(text).models
    assert rule.ask == (Ask("main"), Ask("main", "llama3.2"))


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot be read: No such file"):
        load(tmp_path / "nothing.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"a: \xff")
    with pytest.raises(ConfigError, match="it is not UTF-8 text"):
        load(tmp_path / "latin.yaml")
