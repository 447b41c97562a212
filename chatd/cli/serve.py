"""`chatd serve`."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import click

from chatd import logs, tuning
from chatd.app import load
from chatd.cli.common import config_option, configured, reports_errors
from chatd.config import Config
from chatd.domain import Chatbot
from chatd.registry import Registry
from chatd.server import serve as serve_until_stopped


@click.command()
@config_option
@click.option(
    "--host",
    metavar="ADDRESS",
    help="The address to listen on; 0.0.0.0 is every one of this machine.",
)
@click.option("--port", type=click.IntRange(0, 65535), help="The port; 0 is any that is free.")
@reports_errors
def serve(config_path: Path | None, host: str | None, port: int | None) -> None:
    """Serve until SIGTERM or Ctrl-C; running turns then finish first."""
    path = configured(config_path)
    config, registry = load(path)
    server = dataclasses.replace(
        config.server,
        host=config.server.host if host is None else host,
        port=config.server.port if port is None else port,
    )
    config = dataclasses.replace(config, server=server)
    logs.set_up(config.log_level)
    tuning.run(
        serve_until_stopped(
            config, registry, lambda port, made: _greet(config, registry, path, port, made)
        )
    )


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
