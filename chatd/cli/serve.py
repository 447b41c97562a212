"""`chatd serve`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click

from chatd import logs, tuning
from chatd.app import load, packaged_config
from chatd.cli.common import config_option, reports_errors
from chatd.cli.restarting import serve_anew
from chatd.config import Config, find_config
from chatd.domain import Chatbot
from chatd.env_file import EnvFile
from chatd.registry import Registry
from chatd.reload import Load
from chatd.server import Worker, listen
from chatd.server import serve as serve_until_stopped
from chatd.supervisor import Supervisor


@click.command()
@config_option
@click.option(
    "--host",
    metavar="ADDRESS",
    help="The address to listen on; 0.0.0.0 is every one of this machine.",
)
@click.option("--port", type=click.IntRange(0, 65535), help="The port; 0 is any that is free.")
@click.option(
    "--workers", type=click.IntRange(1, 128), metavar="N", help="How many processes serve."
)
@click.option(
    "--reload", is_flag=True, help="Start again whenever a file changes; for development."
)
@reports_errors
def serve(
    config_path: Path | None,
    host: str | None,
    port: int | None,
    workers: int | None,
    reload: bool,
) -> None:
    """Serve until SIGTERM or Ctrl-C; running turns then finish first. SIGHUP reads the configuration
    again."""
    said: dict[str, Any] = {"host": host, "port": port, "workers": workers}
    given = {name: value for name, value in said.items() if value is not None}
    if reload:
        named = [] if config_path is None else ["--config", str(config_path)]
        options = [text for name, value in given.items() for text in (f"--{name}", str(value))]
        sys.exit(serve_anew(config_path, [*named, *options]))
    env_file = EnvFile(Path())
    env_file.read()
    path = find_config(config_path, Path(), packaged_config())

    def load_again() -> tuple[Config, Registry]:
        env_file.read()
        return load(path, **given)

    config, registry = load(path, **given)
    logs.set_up(config.log_level)
    if config.server.workers > 1:
        sys.exit(_supervise(config, registry, path, load_again))
    tuning.run(
        serve_until_stopped(
            config,
            registry,
            lambda port, made: _greet(config, registry, path, port, made),
            load=load_again,
        )
    )


def _supervise(config: Config, registry: Registry, path: Path, load_again: Load) -> int:
    """Serves with several processes, and returns the exit code."""

    def work(
        config: Config, registry: Registry, worker: Worker, says_ready: Callable[[], None]
    ) -> int:
        def ready(port: int, made: tuple[Chatbot, str] | None) -> None:
            if worker.is_first:
                _greet(config, registry, path, port, made)
            says_ready()

        serving = serve_until_stopped(config, registry, ready, load=load_again, worker=worker)
        reports_errors(tuning.run)(serving)
        return 0

    return Supervisor(config, registry, listen(config.server), work, load_again).run()


def _greet(
    config: Config, registry: Registry, path: Path, port: int, made: tuple[Chatbot, str] | None
) -> None:
    """Tells the terminal where the server is, and the new chatbot's key, which is shown once.

    On stderr: stdout is for logs, which hold no key.
    """
    host = config.server.host
    shown = "localhost" if host in ("localhost", "0.0.0.0", "::", "127.0.0.1") else host
    shown = f"[{shown}]" if ":" in shown else shown
    url = config.server.public_url or f"http://{shown}:{port}"
    lines = [
        "",
        f"  chatd serves {url}",
        f"  API docs     {url}/docs",
        f"  config       {path}",
    ]
    for name in _answering(config):
        use = config.providers[name].use.name
        lines.append(f"  answers by   {name} ({registry.providers[use].description})")
    if made:
        chatbot, key = made
        lines += [
            "",
            f'  A chatbot was made: "{chatbot.name}", model {chatbot.model}',
            f"  assistant_id {chatbot.id}",
            f"  api_key      {key}   (shown only now)",
            f"  its widget   {url}/demo/{chatbot.id}",
            "",
            "  Talk to it; paste this:",
            "",
            *_curl(url, chatbot.id, key),
        ]
    click.echo("\n".join([*lines, ""]), err=True)


def _answering(config: Config) -> list[str]:
    """The enabled providers that a model can lead to, in the order of the rules."""
    names: dict[str, None] = {}
    for rule in config.models:
        enabled = [ask.provider for ask in rule.ask if ask.provider in config.providers]
        names.update(dict.fromkeys(enabled))
        if enabled and rule.match == "*":
            break
    return list(names)


def _curl(url: str, chatbot_id: str, key: str) -> list[str]:
    """Commands that begin a session and say hello in it."""
    curl = "curl -s -H 'Content-Type: application/json'"
    known = {"api_key": key, "assistant_id": chatbot_id}
    said = {"type": "message", "messages": [{"role": "user", "content": "Hello!"}]}
    body = json.dumps({**known, **said, "session_id": "SESSION"})
    body = body.replace('"SESSION"', """"'$SESSION'\"""")
    return [
        f"SESSION=$({curl} {url}/api/chat/session -d '{json.dumps(known)}' | cut -d'\"' -f4)",
        f"{curl} {url}/api/chat -d '{body}'; echo",
    ]
