"""The floors of the house: each module imports only from floors below its own."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
FLOORS = [
    {
        "headers",
        "domain",
        "errors",
        "sse",
        "logs",
        "watchdog",
        "loop_watch",
        "pacing",
        "tuning",
        "ending",
    },
    {"validation", "schemas", "http_errors", "origins", "env_file", "metrics", "tracing"},
    {"storage", "provider", "shared", "breaker", "prices", "identity"},
    {"interceptor", "reply", "memory", "racing", "http_provider", "timed_storage"},
    {"offers", "sharing"},
    {"hookspecs"},
    {"config", "registry"},
    {"routing", "limits", "budgets", "access", "copying", "exporting", "retention"},
    {"answering", "bookkeeping", "settling", "estimates", "elsewhere"},
    {"observing", "turn_spans"},
    {"turns"},
    {"handlers"},
    {"openapi"},
    {"app", "connections"},
    {"reload"},
    {"server"},
    {"supervisor"},
    {"cli", "testing"},
    {"__main__"},
]
"""From the ground up. A module may import from every floor below, and not from its own."""

LEVEL = {name: level for level, floor in enumerate(FLOORS) for name in floor}
DOMAIN = {
    "domain",
    "errors",
    "storage",
    "provider",
    "interceptor",
    "breaker",
    "routing",
    "answering",
    "observing",
    "turn_spans",
    "bookkeeping",
    "reply",
    "elsewhere",
    "shared",
    "sharing",
    "memory",
    "turns",
    "access",
    "limits",
    "budgets",
    "estimates",
    "identity",
    "copying",
    "exporting",
    "retention",
}


def imports(path: Path) -> set[str]:
    """The absolute module names that a file imports, when it runs."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return found


def modules() -> dict[str, list[Path]]:
    """The files of each top-level module or package of chatd."""
    found: dict[str, list[Path]] = {}
    for path in sorted((ROOT / "chatd").rglob("*.py")):
        parts = path.relative_to(ROOT / "chatd").with_suffix("").parts
        if parts != ("__init__",):
            found.setdefault(parts[0], []).append(path)
    return found


def test_every_module_has_a_floor() -> None:
    assert set(modules()) <= set(LEVEL)


def test_modules_import_only_from_floors_below() -> None:
    wrong = []
    for name, paths in modules().items():
        for path in paths:
            for imported in imports(path):
                first, _, rest = imported.partition(".")
                other = rest.partition(".")[0]
                inside = first == "chatd" and other in LEVEL and other != name
                if inside and LEVEL[other] >= LEVEL[name]:
                    wrong.append(f"{path.name}: {imported}")
    assert wrong == []


def test_the_domain_knows_no_http() -> None:
    for name in DOMAIN:
        for path in modules()[name]:
            known = {imported.partition(".")[0] for imported in imports(path)}
            assert not known & {"tornado", "aiohttp", "http"}, path


def test_nothing_in_chatd_names_a_plugin() -> None:
    plugins = {path.stem for path in (ROOT / "plugins").iterdir()}
    for paths in modules().values():
        for path in paths:
            for imported in imports(path):
                assert not imported.startswith("chatd_plugins"), path
                assert imported.partition(".")[0] not in {
                    *("apsw", "postgrest", "asyncpg", "redis"),
                }, path
    assert {"sqlite", "echo", "openrouter", "openai_compatible"} <= plugins
