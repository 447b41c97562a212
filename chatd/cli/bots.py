"""`chatd bots`: chatbots, beside a running server."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from chatd.answering import storable
from chatd.cli.common import (
    asynchronous,
    config_option,
    find_chatbot,
    json_option,
    opened_storage,
    opened_with_plugins,
)
from chatd.domain import (
    Chatbot,
    ChatbotSettings,
    canonical_id,
    hash_api_key,
    new_api_key,
    new_id,
)
from chatd.errors import ChatdError, MalformedRequest
from chatd.identity import new_identity_secret
from chatd.registry import Registry
from chatd.validation import did_you_mean, parse_json, pointer, schema

DEFAULT_MODEL = "openai/gpt-4o-mini"
MIN_KEY_CHARS = 16
_SETTINGS = tuple(
    f.name for f in dataclasses.fields(ChatbotSettings) if f.name != "identity_secrets"
)
_LISTS = ("allowed_origins", "suggestions", "limits")
"""Settings of which an option names one; it is given several times."""
_FRACTIONS = ("temperature", "daily_budget_usd", "turn_reserve_usd")
_WORDS = ("on_disconnect", "theme", "accent", "language")
"""Settings that are text, in few words."""


class BadValue(ChatdError):
    """A value on the command line that cannot be used."""


def _settings_options(command: Any) -> Any:
    """The options for what can be set of a chatbot, on `add` and on `set`."""
    for option in (
        click.option(
            "--allowed-origin",
            "allowed_origins",
            multiple=True,
            metavar="ORIGIN",
            help="An origin whose pages may talk to it; several may be given. "
            '"default" is the server\'s list.',
        ),
        click.option(
            "--provider-options",
            metavar="JSON",
            help="What kinds of provider are told, like "
            """'{"openrouter": {"models": ["a/b"]}}'; @FILE reads a file, "default" is nothing.""",
        ),
        click.option(
            "--greeting", metavar="TEXT", help='What the widget says first; "" is nothing.'
        ),
        click.option(
            "--suggestion",
            "suggestions",
            multiple=True,
            metavar="TEXT",
            help='A question that the widget offers; several may be given. "default" is none.',
        ),
        click.option("--theme", metavar="light|dark|auto", help="How the widget looks."),
        click.option("--accent", metavar="#RRGGBB", help="The widget's colour."),
        click.option("--language", metavar="TAG", help="The widget's language, like de or pt-BR."),
        click.option(
            "--limit",
            "limits",
            multiple=True,
            metavar="NAME=RATE",
            help='A limit, like turns_per_ip="5/minute, 50/hour"; several may be given. '
            '"default" as the rate is the server\'s.',
        ),
        click.option(
            "--daily-budget-usd",
            metavar="USD",
            help='What a day may cost, or none; "default" is the server\'s.',
        ),
        click.option(
            "--turn-reserve-usd",
            metavar="USD",
            help='What a turn may cost, until it is known; "default" is the server\'s.',
        ),
        click.option(
            "--retention-days",
            metavar="DAYS",
            help="After how many days without anything new a session is erased, with everything "
            'said in it; "default" is never.',
        ),
        click.option(
            "--require-identity",
            metavar="yes|no",
            help="Whether the widget's visitors need a token that the site signs.",
        ),
        click.option(
            "--on-disconnect",
            metavar="finish|stop",
            help="Whether a turn goes on when its reader goes away.",
        ),
        click.option(
            "--allow-images", metavar="yes|no", help="Whether clients may show it images."
        ),
        click.option("--allow-tools", metavar="yes|no", help="Whether clients may give it tools."),
        click.option("--temperature", metavar="0..2", help='"default" is the provider\'s.'),
        click.option("--max-output-tokens", metavar="N", help='"default" is the provider\'s.'),
        click.option("--context-tokens", metavar="N", help="The most tokens a model is given."),
        click.option(
            "--system-prompt", metavar="TEXT", help="Who the chatbot is; @FILE reads a file."
        ),
        click.option("--model", metavar="MODEL", help=f"The model's id, like {DEFAULT_MODEL}."),
        click.option("--name", metavar="NAME", help="What people call it."),
    ):
        command = option(command)
    return command


@click.group()
def bots() -> None:
    """Make, change and remove chatbots, beside a running server."""


@bots.command()
@config_option
@click.option("--id", "bot_id", metavar="UUID", help="Its id; else a new one.")
@click.option("--api-key", metavar="KEY", help="Its API key; else a new one, shown once.")
@_settings_options
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
    changed = _changed(ChatbotSettings(), settings)
    chatbot = Chatbot(
        id=id,
        name=_checked_name("Chatbot" if name is None else name, "--name"),
        model=_checked_name(DEFAULT_MODEL if model is None else model, "--model"),
        api_key_hash=hash_api_key(key),
        settings=changed,
    )
    async with opened_with_plugins(config_path) as (storage, registry):
        _check_options(changed, settings, registry)
        await storage.add_chatbot(chatbot)
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
@_settings_options
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
        changed = _changed(old.settings, settings)
        _check_options(changed, settings, registry)
        chatbot = dataclasses.replace(
            old,
            name=old.name if name is None else _checked_name(name, "--name"),
            model=old.model if model is None else _checked_name(model, "--model"),
            settings=changed,
        )
        await storage.update_chatbot(chatbot)
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
    click.echo(f'Removed "{chatbot.name}"')


def _shown(chatbot: Chatbot) -> dict[str, Any]:
    """What can be shown of a chatbot, as JSON."""
    settings = {name: getattr(chatbot.settings, name) for name in _SETTINGS}
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


def _changed(settings: ChatbotSettings, given: dict[str, Any]) -> ChatbotSettings:
    """`settings` with what was given on the command line. Raises `BadValue`."""
    values = {k: v for k, v in settings.to_json().items() if k in _SETTINGS}
    limits = _limits(settings.limits or {}, given.pop("limits", ()))
    values |= {k: _typed(k, v) for k, v in given.items() if v not in (None, ())}
    values["limits"] = limits or None
    if faults := schema("chatbot_settings").faults(values):
        raise BadValue("\n".join(f"{_option(pointer(path))}: {text}" for path, text in faults))
    known = {k: v for k, v in values.items() if v is not None}
    return dataclasses.replace(
        ChatbotSettings.from_json(known), identity_secrets=settings.identity_secrets
    )


def _limits(old: Mapping[str, str], given: Sequence[str]) -> dict[str, str]:
    """The limits with those of the command line, each `NAME=RATE`. Raises `BadValue`."""
    limits = dict(old)
    for text in given:
        name, equals, rate = text.partition("=")
        if not equals:
            raise BadValue(f'--limit {text}: must be like turns_per_ip="5/minute, 50/hour"')
        limits[name.strip()] = rate.strip()
    return {name: rate for name, rate in limits.items() if rate != "default"}


def _typed(name: str, value: Any) -> Any:
    default = getattr(ChatbotSettings(), name)
    if isinstance(value, tuple):
        given = [_storable(name, text) for text in value]
        return given if given != ["default"] else None if default is None else list(default)
    if name == "system_prompt":
        return _text("--system-prompt", value) or None
    if name == "provider_options" and value != "default":
        options = _json("--provider-options", _text("--provider-options", value))
        return None if options == {} else options
    if name == "greeting":
        return _storable(name, value) or None
    if name in ("allow_tools", "allow_images", "require_identity"):
        return {"yes": True, "no": False}.get(value, value)
    if value == "default":
        return default
    if name in _WORDS:
        return value
    try:
        number = float(value) if name in _FRACTIONS else int(value)
    except ValueError:
        return value
    return number if math.isfinite(number) else value


def _text(option: str, value: str) -> str:
    if not value.startswith("@"):
        if storable(value) != value:
            raise BadValue(f"{option}: must be text, in UTF-8 and without U+0000")
        return value
    try:
        return Path(value[1:]).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise BadValue(f"{option} {value}: cannot be read: {error}") from None


def _json(option: str, text: str) -> Any:
    try:
        return parse_json(text.encode())
    except MalformedRequest as error:
        raise BadValue(f"{option}: {error.detail.replace('The body', 'it')}") from None


def _check_options(settings: ChatbotSettings, given: dict[str, Any], registry: Registry) -> None:
    """Holds new provider options to what the plugins take. Raises `BadValue` with every fault.

    Those that are kept are not looked at: the plugin that they are for may be gone.
    """
    if given.get("provider_options") is None:
        return
    faults = []
    for name, options in (settings.provider_options or {}).items():
        offer = registry.providers.get(name)
        if offer is None:
            meant = did_you_mean(name, registry.providers)
            faults.append(f'no plugin offers the provider "{name}"{meant}')
        elif offer.options is None:
            faults.append(f'the provider "{name}" takes no options')
        else:
            faults += [
                f"{pointer((name, *path))}: {text}" for path, text in offer.options.faults(options)
            ]
    if faults:
        raise BadValue("\n".join(f"--provider-options {fault}" for fault in faults))


def _storable(name: str, value: str) -> str:
    """The text as it is. Raises `BadValue` for what storage cannot hold."""
    if storable(value) != value:
        raise BadValue(f"{_option(f'/{name}')}: must be text, in UTF-8 and without U+0000")
    return value


def _option(path: str) -> str:
    name, *inner = path.split("/")[1:]
    if name == "limits":
        return " ".join(["--limit", *inner])
    return "--" + (name.removesuffix("s") if name in _LISTS else name).replace("_", "-")
