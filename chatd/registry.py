"""Plugins, found and loaded: from `hook` calls to typed factories with names.

One `Registry` an application; nothing else touches pluggy's untyped `hook`.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pluggy
from tornado.web import RequestHandler

from chatd import hookspecs
from chatd.errors import PluginError
from chatd.interceptor import Interceptor
from chatd.offers import Offer, Register, RouteRegister
from chatd.provider import Provider
from chatd.shared import Shared
from chatd.storage import Storage
from chatd.validation import did_you_mean


@dataclass(frozen=True, slots=True)
class Loaded:
    """A plugin that is loaded: its name, where it comes from and the hooks it implements."""

    name: str
    source: str
    hooks: tuple[str, ...]


@dataclass(slots=True)
class Registry:
    """What all plugins offer."""

    storages: dict[str, Offer[Storage]] = field(default_factory=dict)
    providers: dict[str, Offer[Provider]] = field(default_factory=dict)
    interceptors: dict[str, Offer[Interceptor]] = field(default_factory=dict)
    shared: dict[str, Offer[Shared]] = field(default_factory=dict)
    routes: list[tuple[str, type[RequestHandler]]] = field(default_factory=list)
    plugins: list[Loaded] = field(default_factory=list)
    _modules: dict[str, str] = field(default_factory=dict)
    _manager: pluggy.PluginManager = field(
        default_factory=lambda: pluggy.PluginManager(hookspecs.PROJECT)
    )

    def add_commands(self, cli: click.Group) -> None:
        """Lets each plugin add its subcommands to `cli`."""
        for plugin in self.plugins:
            self._call(plugin.name, "chatd_register_commands", cli=cli)

    def plugin_of(self, module: str) -> str | None:
        """The plugin whose code a module is, by the module's name; None for everybody else's."""
        parents = [module.rsplit(".", n)[0] for n in range(module.count(".") + 1)]
        for parent in parents:
            if (plugin := self._modules.get(parent)) is not None:
                return plugin
        # A distribution with one plugin: the rest of its package is the plugin's as well.
        top = module.partition(".")[0]
        owners = {p for name, p in self._modules.items() if name.partition(".")[0] == top}
        return owners.pop() if len(owners) == 1 and top != hookspecs.PROJECT else None

    def _call(self, plugin: str, hook: str, **arguments: Any) -> None:
        """Calls one hook of one plugin, whose name any failure then carries."""
        others = [p for name, p in self._manager.list_name_plugin() if name != plugin]
        try:
            self._manager.subset_hook_caller(hook, others)(**arguments)
        except PluginError:
            raise
        except Exception as error:
            raise PluginError(_failed(plugin, f"{hook} raised {_told(error)}")) from error

    def _register(self, name: str, source: str, module: ModuleType) -> None:
        _check_hooks(name, module)
        try:
            self._manager.register(module, name=name)
        except pluggy.PluginValidationError as error:
            raise PluginError(_failed(name, f"has a hook that does not fit: {error}")) from error
        self._modules[module.__name__] = name
        callers = self._manager.get_hookcallers(module) or []
        self.plugins.append(Loaded(name, source, tuple(sorted(c.name for c in callers))))
        self._call(
            name, "chatd_register_storage", register=Register("storage", name, self.storages)
        )
        self._call(
            name, "chatd_register_provider", register=Register("provider", name, self.providers)
        )
        self._call(
            name,
            "chatd_register_interceptor",
            register=Register("interceptor", name, self.interceptors),
        )
        self._call(name, "chatd_register_shared", register=Register("shared", name, self.shared))
        self._call(name, "chatd_register_routes", register=RouteRegister(name, self.routes))


def load_registry(folder: Path | None = None, disabled: frozenset[str] = frozenset()) -> Registry:
    """Loads every installed plugin and every `*.py` in `folder`, but those in `disabled`.

    Raises `PluginError`, which names the plugin and says what to do, at the first that fails.
    """
    registry = Registry()
    registry._manager.add_hookspecs(hookspecs)
    seen: dict[str, str] = {}
    for name, source, load in _found(folder):
        if name in disabled:
            continue
        if name in seen:
            raise PluginError(
                f'two plugins are named "{name}", from {seen[name]} and from {source}: '
                "rename or uninstall one"
            )
        seen[name] = source
        try:
            module = load()
        except Exception as error:
            raise PluginError(
                _failed(name, f"from {source} cannot be loaded: {_told(error)}")
            ) from error
        registry._register(name, source, module)
    return registry


def _found(folder: Path | None) -> Iterator[tuple[str, str, Callable[[], ModuleType]]]:
    for entry in sorted(entry_points(group=hookspecs.PROJECT), key=lambda e: e.name):
        yield entry.name, _distribution(entry), entry.load
    if folder is not None:
        if not folder.is_dir():
            raise PluginError(f"the plugin folder {folder} does not exist: create it or unset it")
        for path in sorted(folder.glob("*.py")):
            if not path.name.startswith("_"):
                yield path.stem, str(path), lambda path=path: _load_file(path)  # type: ignore[misc]


def _distribution(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else entry.value


def _load_file(path: Path) -> ModuleType:
    name = f"chatd_plugin_files.{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickles look their module up by name.
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def _check_hooks(plugin: str, module: ModuleType) -> None:
    """Refuses what pluggy would pass over in silence: a misspelt, unmarked or async hook."""
    known = [name for name in vars(hookspecs) if name.startswith("chatd_")]
    for name, value in vars(module).items():
        if not name.startswith("chatd_") or not inspect.isfunction(value):
            continue
        if name not in known:
            raise PluginError(
                f'plugin "{plugin}": there is no hook "{name}"{did_you_mean(name, known)}'
            )
        if not hasattr(value, f"{hookspecs.PROJECT}_impl"):
            raise PluginError(f'plugin "{plugin}": mark "{name}" with @chatd.hookimpl')
        if inspect.iscoroutinefunction(value):
            raise PluginError(
                f'plugin "{plugin}": hook "{name}" must be a plain function; register an object '
                "with async methods instead"
            )


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _failed(plugin: str, what: str) -> str:
    return (
        f'plugin "{plugin}" {what}. Mend or uninstall it, or list "{plugin}" under plugins.disable'
    )
