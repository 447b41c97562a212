"""The configuration: one YAML file, read with its line numbers, checked all at once."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path as FilePath
from typing import Any, Literal, NoReturn

import yaml

from chatd.breaker import BreakerSettings
from chatd.errors import ConfigError
from chatd.origins import canonical_origin
from chatd.prices import Price
from chatd.provider import Retries, Timeouts
from chatd.validation import MAX_DEPTH, Path, Schema, did_you_mean, schema

_REFERENCE = re.compile(
    r"\$\{(?:file:(?P<file>[^}]+)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)(?:(?P<how>:[-+])(?P<text>[^}]*))?)\}"
)
MAX_VALUES = 100_000
"""Values that a configuration may hold."""

_OF_PROVIDERS = {"enabled", "timeouts", "retries", "breaker", "prices"}
"""What is set for a provider whatever its plugin; the rest is the plugin's."""

_TYPED = ("int", "float", "bool", "null", "str")


class _Loader(yaml.SafeLoader):
    """YAML 1.1 as it is commonly read, but `1e3` is a number, as in YAML 1.2 and in JSON."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)[eE][-+]?[0-9]+$"),
    list("-+.0123456789"),
)


@dataclass(frozen=True, slots=True)
class ServerConfig:
    """The process: where it listens and what it accepts. Times are seconds."""

    host: str = "localhost"
    port: int = 8000
    public_url: str | None = None
    allowed_origins: tuple[str, ...] = ()
    max_body_bytes: int = 64 * 1024
    body_timeout: float = 15
    chatbot_cache_seconds: float = 3
    drain_seconds: float = 25
    lease_seconds: float = 30
    trusted_proxies: int = 0
    metrics_token: str | None = field(default=None, repr=False)
    tracing: Literal["none", "own", "continue"] = "none"
    workers: int = 1
    header_timeout: float = 15
    keep_alive_seconds: float = 100
    unread_seconds: float = 60
    max_connections: int = 4096
    max_connections_per_address: int = 256
    block_seconds: float = 0.25


@dataclass(frozen=True, slots=True)
class LimitsConfig:
    """How much is taken of whom, for chatbots that set nothing else; docs/limits.md says why so."""

    sessions_per_ip: str = "20/minute, 100/hour"
    sessions_per_visitor: str = "10/minute, 60/hour"
    sessions_per_chatbot: str = "120/minute, 2000/hour"
    turns_per_ip: str = "30/minute, 300/hour"
    turns_per_session: str = "10/minute, 100/hour"
    turns_per_visitor: str = "10/minute, 100/hour"
    turns_per_chatbot: str = "120/minute, 2000/hour"
    turns_per_key: str = "none"
    daily_budget_usd: float | Literal["none"] = "none"
    turn_reserve_usd: float = 0.05


@dataclass(frozen=True, slots=True)
class Use:
    """A plugin's offer by name, and the settings that are the plugin's own."""

    name: str
    settings: Mapping[str, Any] = field(repr=False)


@dataclass(frozen=True, slots=True)
class ProviderConfig:
    """A named provider."""

    use: Use
    timeouts: Timeouts = Timeouts()
    retries: Retries = Retries()
    breaker: BreakerSettings = BreakerSettings()
    prices: tuple[Price, ...] = ()


@dataclass(frozen=True, slots=True)
class Ask:
    """One provider of a chain, and its own name for the model (`None`: the chatbot's).

    Of those with a `weight`, each session has one that is asked first.
    """

    provider: str
    model: str | None = None
    weight: float | None = None


@dataclass(frozen=True, slots=True)
class ModelRule:
    """Which providers answer the models that match a pattern (`*` and `?`), in order.

    :param hedge: whether the next one is asked as well when the first token is late.
    """

    match: str
    ask: tuple[Ask, ...]
    hedge: bool = False


@dataclass(frozen=True, slots=True)
class FirstChatbot:
    """The chatbot that is made when there is none yet."""

    name: str
    model: str
    system_prompt: str | None = None


@dataclass(frozen=True, slots=True)
class Config:
    """A configuration that was checked, whole."""

    server: ServerConfig
    limits: LimitsConfig
    storage: Use
    providers: Mapping[str, ProviderConfig]
    models: tuple[ModelRule, ...]
    interceptors: tuple[Use, ...]
    shared: Use | None
    first_chatbot: FirstChatbot | None
    log_level: str


@dataclass(frozen=True, slots=True)
class PluginsConfig:
    """Which plugins to load; needed before the rest can be checked."""

    folder: FilePath | None
    disable: frozenset[str]


Offers = Mapping[str, Mapping[str, Schema]]
"""Kind ("storage", "provider", "interceptor", "shared") → name → schema of its settings."""


class ConfigFile:
    """A configuration file as it was read: values, where each stands, and what is wrong so far."""

    def __init__(self, path: FilePath | str, text: str, env: Mapping[str, str]) -> None:
        self.path = path
        self._lines: dict[Path, int] = {}
        self._faults: list[tuple[int, str]] = []
        self._unresolved: set[Path] = set()
        self._env = env
        self.values: Any = self._parse(text)
        self._core_faults()

    @classmethod
    def read(cls, path: FilePath, env: Mapping[str, str] | None = None) -> ConfigFile:
        """Reads a file. Raises `ConfigError` when there is none or it is not UTF-8 text."""
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
            raise ConfigError([f"{path}: cannot be read: {reason}"]) from None
        return cls(path, text, os.environ if env is None else env)

    @property
    def plugins(self) -> PluginsConfig:
        """Which plugins to load; the defaults where that part of the file is at fault."""
        part = self._part("plugins")
        folder, disable = part.get("folder"), part.get("disable") or []
        return PluginsConfig(
            folder=FilePath(folder) if isinstance(folder, str) else None,
            disable=frozenset(d for d in disable if isinstance(d, str))
            if isinstance(disable, list)
            else frozenset(),
        )

    def check(self, offers: Offers) -> Config:
        """The checked configuration. Raises `ConfigError` with every fault, in line order."""
        self._refuse([*self._faults, *self._plugin_faults(offers)])
        return _build(self.values)

    def refuse(self, path: Path, text: str) -> NoReturn:
        """Raises `ConfigError` for a value that only more than this file shows to be a fault."""
        raise ConfigError([f"{self.path}:{self._line(path)}: {_dotted(path)}: {text}"])

    def check_storage(self, offers: Offers) -> Use:
        """The checked part `storage`, whatever the others say. Raises `ConfigError`."""
        part = self._part("storage")
        faults = [f for f in self._faults if "use" not in part or f[1].startswith("storage")]
        self._use_faults(faults, offers, "storage", ("storage",), set())
        self._refuse(faults)
        return Use(part["use"], _settings(part, set()))

    @property
    def storage_name(self) -> str | None:
        """What stands after `storage.use`, if something does."""
        name = self._part("storage").get("use")
        return name if isinstance(name, str) else None

    def _refuse(self, faults: Sequence[tuple[int, str]]) -> None:
        if faults:
            raise ConfigError([f"{self.path}:{line}: {text}" for line, text in sorted(set(faults))])

    # Reading

    def _parse(self, text: str) -> Any:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = mark.line + 1 if mark else 1
            hint = ' (a "${NAME}" inside braces needs quotes)' if "${" in text else ""
            self._faults.append((line, f"not valid YAML: {error.problem}{hint}"))
            return None
        except yaml.YAMLError as error:
            self._faults.append((1, f"not valid YAML: {error}"))
            return None
        except RecursionError:
            self._faults.append((1, "not valid YAML: nested too deep"))
            return None
        finally:
            loader.dispose()
        if node is None:
            self._faults.append((1, "the file is empty"))
            return None
        return self._value(node, ())

    def _value(self, node: yaml.Node, path: Path) -> Any:
        self._lines.setdefault(path, node.start_mark.line + 1)
        if len(self._lines) > MAX_VALUES:
            # Aliases can multiply a small file.
            raise ConfigError([f"{self.path}:1: the file holds more than {MAX_VALUES} values"])
        if len(path) > MAX_DEPTH:
            # Only an alias to what it stands in gets here.
            self._faults.append((self._lines[path[:1]], f"{_dotted(path[:1])}: holds itself"))
            return None
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(child, (*path, i)) for i, child in enumerate(node.value)]
        assert isinstance(node, yaml.ScalarNode)
        return self._scalar(node, path)

    def _mapping(self, node: yaml.MappingNode, path: Path) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line = key_node.start_mark.line + 1
            key = key_node.value
            if not isinstance(key, str):
                self._faults.append((line, f"{_dotted(path)}: a key must be a plain word"))
            elif key == "<<":
                self._faults.append((line, f"{_dotted(path)}: merge keys (<<) are not supported"))
            elif key in values:
                first = self._lines[(*path, key)]
                self._faults.append(
                    (line, f"{_dotted((*path, key))}: stands twice, first on line {first}")
                )
            else:
                self._lines[(*path, key)] = line
                values[key] = self._value(value_node, (*path, key))
        return values

    def _scalar(self, node: yaml.ScalarNode, path: Path) -> Any:
        text = _REFERENCE.sub(lambda match: self._resolve(match, node, path), node.value)
        tag = node.tag
        if text != node.value and node.style is None:
            # A plain (unquoted) reference stands for what would have been written there.
            resolver: Any = _Loader("")
            tag = resolver.resolve(yaml.ScalarNode, text, (True, False))
        if tag.rpartition(":")[2] not in _TYPED:
            tag = "tag:yaml.org,2002:str"
        try:
            value = _Loader("").construct_object(yaml.ScalarNode(tag, text))
        except (yaml.YAMLError, ValueError):
            return text
        if not isinstance(value, float):
            return value
        if not math.isfinite(value):
            self._unresolved.add(path)
            self._faults.append((node.start_mark.line + 1, f"{_dotted(path)}: must be finite"))
            return 0
        # A schema takes 8e3 for a whole number; what counts with it must be given one.
        return int(value) if value.is_integer() and abs(value) < 2**53 else value

    def _resolve(self, match: re.Match[str], node: yaml.Node, path: Path) -> str:
        line = node.start_mark.line + 1
        if name := match["file"]:
            try:
                return FilePath(name).read_text(encoding="utf-8").rstrip("\r\n")
            except (OSError, UnicodeDecodeError) as error:
                self._unresolved.add(path)
                reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
                self._faults.append((line, f"{_dotted(path)}: {name} cannot be read: {reason}"))
                return ""
        name, how, text = match["name"], match["how"], match["text"]
        value = self._env.get(name, "")
        if how == ":+":
            return text if value else ""
        if how == ":-":
            return value or text
        if name not in self._env:
            self._unresolved.add(path)
            self._faults.append(
                (
                    line,
                    f"{_dotted(path)}: the environment variable {name} is not set: set it, or "
                    f"write a default, ${{{name}:-default}}",
                )
            )
        return value

    # Checking

    def _part(self, *path: str) -> dict[str, Any]:
        value = self.values
        for name in path:
            value = value.get(name) if isinstance(value, dict) else None
        return value if isinstance(value, dict) else {}

    def _line(self, path: Path) -> int:
        while path and path not in self._lines:
            path = path[:-1]
        return self._lines.get(path, 1)

    def _add(self, faults: list[tuple[int, str]], path: Path, text: str) -> None:
        if path in self._unresolved:
            return  # told already, and nothing is known of the value
        colon = "" if text.startswith("is required") else ":"
        faults.append((self._line(path), f"{_dotted(path)}{colon} {text}"))

    def _core_faults(self) -> None:
        if self.values is None and self._faults:
            return
        told = set()
        for path, text in schema("config").faults(self.values):
            told.add(path)
            self._add(self._faults, path, text)
        given = self._part("server").get("allowed_origins")
        origins: list[Any] = given if isinstance(given, list) else []
        for i, origin in enumerate(origins):
            path = ("server", "allowed_origins", i)
            try:
                origins[i] = canonical_origin(origin) if path not in told else origin
            except ValueError as error:
                self._add(self._faults, path, str(error))

    def _plugin_faults(self, offers: Offers) -> list[tuple[int, str]]:
        faults: list[tuple[int, str]] = []
        self._use_faults(faults, offers, "storage", ("storage",), set())
        self._use_faults(faults, offers, "shared", ("shared",), set())
        for name in self._part("providers"):
            if self._part("providers", name).get("enabled", True):
                self._use_faults(faults, offers, "provider", ("providers", name), _OF_PROVIDERS)
        interceptors = self.values.get("interceptors") if isinstance(self.values, dict) else None
        for i in range(len(interceptors) if isinstance(interceptors, list) else 0):
            self._use_faults(faults, offers, "interceptor", ("interceptors", i), set())
        self._ask_faults(faults)
        return faults

    def _use_faults(
        self,
        faults: list[tuple[int, str]],
        offers: Offers,
        kind: str,
        path: Path,
        own: set[str],
    ) -> None:
        value: Any = self.values
        for step in path:
            if isinstance(value, list) and isinstance(step, int):
                value = value[step]
            else:
                value = value.get(step) if isinstance(value, dict) else None
        if not isinstance(value, dict) or not isinstance(use := value.get("use"), str):
            return
        if use not in offers[kind]:
            known = sorted(offers[kind])
            hint = did_you_mean(use, known) or f"; there is {', '.join(known) or 'none'}"
            self._add(faults, (*path, "use"), f'no plugin offers the {kind} "{use}"{hint}')
            return
        settings = _settings(value, own)
        for inner, text in offers[kind][use].faults(settings):
            hint = did_you_mean(str(inner[-1]), own) if text == "unknown key" else ""
            self._add(faults, (*path, *inner), text + hint)
        for inner, other in _inner_uses(offers[kind][use].document, settings):
            if other in offers:
                self._use_faults(faults, offers, other, (*path, *inner), set())

    def _ask_faults(self, faults: list[tuple[int, str]]) -> None:
        rules = self.values.get("models") if isinstance(self.values, dict) else None
        known = self._part("providers")
        for i, rule in enumerate(rules if isinstance(rules, list) else []):
            asks = rule.get("ask") if isinstance(rule, dict) else None
            for j, ask in enumerate(asks if isinstance(asks, list) else []):
                name = ask.get("provider") if isinstance(ask, dict) else ask
                if isinstance(name, str) and name not in known:
                    hint = did_you_mean(name, known) or f"; there is {', '.join(known) or 'none'}"
                    self._add(
                        faults, ("models", i, "ask", j), f'there is no provider "{name}"{hint}'
                    )


def _settings(value: Mapping[str, Any], own: set[str]) -> dict[str, Any]:
    return {k: v for k, v in value.items() if k != "use" and k not in own}


def _inner_uses(document: Any, value: Any, path: Path = ()) -> Iterator[tuple[Path, str]]:
    """Where settings hold another offer's name and settings, and its kind: by `x-use`."""
    if not isinstance(document, dict):
        return
    if isinstance(kind := document.get("x-use"), str):
        yield path, kind
    elif isinstance(value, dict):
        for name, part in document.get("properties", {}).items():
            if name in value:
                yield from _inner_uses(part, value[name], (*path, name))
    elif isinstance(value, list):
        for i, item in enumerate(value):
            yield from _inner_uses(document.get("items"), item, (*path, i))


def _dotted(path: Sequence[str | int]) -> str:
    text = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)
    return text.removeprefix(".") or "the file"


def _build(values: Mapping[str, Any]) -> Config:
    server = dict(values.get("server") or {})
    if "allowed_origins" in server:
        server["allowed_origins"] = tuple(server["allowed_origins"])
    server["trusted_proxies"] = server.get("trusted_proxies") or 0
    providers = {
        name: ProviderConfig(
            Use(part["use"], _settings(part, _OF_PROVIDERS)),
            Timeouts(**part.get("timeouts", {})),
            Retries(**part.get("retries", {})),
            BreakerSettings(**part.get("breaker", {})),
            tuple(Price(**price) for price in part.get("prices", ())),
        )
        for name, part in values["providers"].items()
        if part.get("enabled", True)
    }
    first = values.get("first_chatbot")
    return Config(
        server=ServerConfig(**server),
        limits=LimitsConfig(**(values.get("limits") or {})),
        storage=Use(values["storage"]["use"], _settings(values["storage"], set())),
        providers=providers,
        models=tuple(
            ModelRule(
                rule["match"],
                tuple(Ask(a) if isinstance(a, str) else Ask(**a) for a in rule["ask"]),
                rule.get("hedge", False),
            )
            for rule in values["models"]
        ),
        interceptors=tuple(
            Use(i["use"], _settings(i, set())) for i in values.get("interceptors") or ()
        ),
        shared=_shared(values.get("shared")),
        first_chatbot=FirstChatbot(**first) if first else None,
        log_level=values.get("log_level", "info"),
    )


def _shared(part: Mapping[str, Any] | None) -> Use | None:
    return Use(part["use"], _settings(part, set())) if part else None


def find_config(given: FilePath | None, folder: FilePath, packaged: FilePath) -> FilePath:
    """The file to use: `given`, `$CHATD_CONFIG`, `config/chatd.yaml`, `chatd.yaml`, `packaged`."""
    if given is not None:
        return given
    if named := os.environ.get("CHATD_CONFIG"):
        return FilePath(named)
    for candidate in (folder / "config" / "chatd.yaml", folder / "chatd.yaml"):
        if candidate.is_file():
            return candidate
    return packaged
