"""`chatd bots`: chatbots, beside a running server."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import click

from chatd.cli.bot_settings import (
    DEFAULT_MODEL,
    SETTINGS,
    BadValue,
    changed_settings,
    check_options,
    settings_options,
)
from chatd.cli.common import (
    asynchronous,
    config_option,
    find_chatbot,
    json_option,
    opened_storage,
    opened_with_plugins,
    tell_changed,
)
from chatd.domain import (
    Chatbot,
    ChatbotSettings,
    canonical_id,
    hash_api_key,
    new_api_key,
    new_id,
)
from chatd.identity import new_identity_secret

MIN_KEY_CHARS = 16


@click.group()
def bots() -> None:
    """Make, change and remove chatbots, beside a running server."""


@bots.command()
@config_option
@click.option("--id", "bot_id", metavar="UUID", help="Its id; else a new one.")
@click.option("--api-key", metavar="KEY", help="Its API key; else a new one, shown once.")
@settings_options
@json_option
@asynchronous
async def add(
    config_path: Path | None,
    bot_id: str | None,
    api_key: str | None,
    name: str | None,
    model: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Make a chatbot."""
    id = new_id() if bot_id is None else canonical_id(bot_id)
    if id is None:
        raise BadValue(f"--id {bot_id}: must be a UUID like 123e4567-e89b-12d3-a456-426614174000")
    key = _checked_key(api_key)
    changed = changed_settings(ChatbotSettings(), settings)
    chatbot = Chatbot(
        id=id,
        name=_checked_name("Chatbot" if name is None else name, "--name"),
        model=_checked_name(DEFAULT_MODEL if model is None else model, "--model"),
        api_key_hash=hash_api_key(key),
        settings=changed,
    )
    async with opened_with_plugins(config_path) as (storage, registry):
        check_options(changed, settings, registry)
        await storage.add_chatbot(chatbot)
    await tell_changed(config_path, chatbot.id)
    _tell_what_is_missing(chatbot)
    if as_json:
        click.echo(json.dumps({**_shown(chatbot), "api_key": key}))
        return
    click.echo(f'Made "{chatbot.name}", model {chatbot.model}')
    click.echo(f"id       {chatbot.id}")
    click.echo(f"api_key  {key}" + ("" if api_key else "   (shown only now)"))


@bots.command("list")
@config_option
@json_option
@asynchronous
async def list_(config_path: Path | None, as_json: bool) -> None:
    """List the chatbots."""
    async with opened_storage(config_path) as storage:
        chatbots = await storage.list_chatbots()
    if as_json:
        click.echo(json.dumps([_shown(chatbot) for chatbot in chatbots]))
        return
    for chatbot in chatbots:
        click.echo(f"{chatbot.id}  {chatbot.model}  {chatbot.name}")
    if not chatbots:
        click.echo("There is no chatbot yet; `chatd bots add` makes one.", err=True)


@bots.command()
@click.argument("bot")
@config_option
@json_option
@asynchronous
async def show(bot: str, config_path: Path | None, as_json: bool) -> None:
    """Show a chatbot, by id or name. Its API key is not stored and cannot be shown."""
    async with opened_storage(config_path) as storage:
        chatbot = await find_chatbot(storage, bot)
    shown = _shown(chatbot)
    if as_json:
        click.echo(json.dumps(shown))
        return
    width = max(map(len, shown))
    for name, value in shown.items():
        click.echo(f"{name:<{width}}  {_in_words(value)}")


@bots.command("set")
@click.argument("bot")
@config_option
@settings_options
@json_option
@asynchronous
async def set_(
    bot: str,
    config_path: Path | None,
    name: str | None,
    model: str | None,
    as_json: bool,
    **settings: Any,
) -> None:
    """Change a chatbot, by id or name; what is not given stays. A server sees it within seconds."""
    async with opened_with_plugins(config_path) as (storage, registry):
        old = await find_chatbot(storage, bot)
        changed = changed_settings(old.settings, settings)
        check_options(changed, settings, registry)
        chatbot = dataclasses.replace(
            old,
            name=old.name if name is None else _checked_name(name, "--name"),
            model=old.model if model is None else _checked_name(model, "--model"),
            settings=changed,
        )
        await storage.update_chatbot(chatbot)
    await tell_changed(config_path, chatbot.id)
    click.echo(json.dumps(_shown(chatbot)) if as_json else f'Changed "{chatbot.name}"')
    _tell_what_is_missing(chatbot)


@bots.command("rotate-key")
@click.argument("bot")
@config_option
@json_option
@asynchronous
async def rotate_key(bot: str, config_path: Path | None, as_json: bool) -> None:
    """Give a chatbot a new API key, shown once. The old one stops working within seconds."""
    key = new_api_key()
    async with opened_storage(config_path) as storage:
        chatbot = await find_chatbot(storage, bot)
        await storage.set_api_key(chatbot.id, hash_api_key(key))
    await tell_changed(config_path, chatbot.id)
    if as_json:
        click.echo(json.dumps({"id": chatbot.id, "api_key": key}))
    else:
        click.echo(f"api_key  {key}   (shown only now)")


@bots.command("identity-secret")
@click.argument("bot")
@config_option
@click.option("--keep-old", is_flag=True, help="Take tokens of the last one too, until the next.")
@json_option
@asynchronous
async def identity_secret(
    bot: str, config_path: Path | None, keep_old: bool, as_json: bool
) -> None:
    """Give a chatbot a new secret to sign visitors' tokens with, shown once.

    The one before stops working within seconds, unless it is kept.
    """
    secret = new_identity_secret()
    async with opened_storage(config_path) as storage:
        chatbot = await find_chatbot(storage, bot)
        old = chatbot.settings.identity_secrets[:1] if keep_old else ()
        settings = dataclasses.replace(chatbot.settings, identity_secrets=(secret, *old))
        await storage.update_chatbot(dataclasses.replace(chatbot, settings=settings))
    await tell_changed(config_path, chatbot.id)
    if as_json:
        click.echo(json.dumps({"id": chatbot.id, "identity_secret": secret}))
    else:
        click.echo(f"identity_secret  {secret}   (shown only now)")


@bots.command()
@click.argument("bot")
@config_option
@click.option("--yes", is_flag=True, help="Do not ask.")
@asynchronous
async def remove(bot: str, config_path: Path | None, yes: bool) -> None:
    """Remove a chatbot, with all its sessions and everything said in them."""
    async with opened_storage(config_path) as storage:
        chatbot = await find_chatbot(storage, bot)
        if not yes:
            click.confirm(
                f'Remove "{chatbot.name}" ({chatbot.id}) and all its conversations?', abort=True
            )
        await storage.remove_chatbot(chatbot.id)
    await tell_changed(config_path, chatbot.id)
    click.echo(f'Removed "{chatbot.name}"')


def _shown(chatbot: Chatbot) -> dict[str, Any]:
    """What can be shown of a chatbot, as JSON."""
    settings = {name: getattr(chatbot.settings, name) for name in SETTINGS}
    return {
        "id": chatbot.id,
        "name": chatbot.name,
        "model": chatbot.model,
        **{k: list(v) if isinstance(v, tuple) else v for k, v in settings.items()},
    }


def _in_words(value: Any) -> str:
    if isinstance(value, dict) and not all(isinstance(inner, str) for inner in value.values()):
        return json.dumps(value, ensure_ascii=False)
    if isinstance(value, dict):
        return "; ".join(f"{name}={rate}" for name, rate in value.items())
    if isinstance(value, list):
        return ", ".join(value) or "default"
    return "default" if value is None else str(value)


def _tell_what_is_missing(chatbot: Chatbot) -> None:
    if chatbot.settings.require_identity and not chatbot.settings.identity_secrets:
        text = "It has no identity secret, so no visitor gets in: "
        click.echo(f"{text}`chatd bots identity-secret {chatbot.id}` makes one.", err=True)


def _checked_key(api_key: str | None) -> str:
    if api_key is None:
        return new_api_key()
    if (
        len(api_key) < MIN_KEY_CHARS
        or not api_key.isascii()
        or not api_key.isprintable()
        or " " in api_key
    ):
        raise BadValue(
            f"--api-key: must be at least {MIN_KEY_CHARS} visible ASCII characters without spaces"
        )
    return api_key


def _checked_name(value: str, option: str) -> str:
    if not value.strip() or len(value) > 200 or not value.isprintable():
        raise BadValue(f"{option}: must be 1 to 200 printable characters")
    return value
