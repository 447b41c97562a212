"""What `chatd bots add` and `chatd bots set` take: their options, and the settings made of them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from chatd.answering import storable
from chatd.domain import ChatbotSettings
from chatd.errors import ChatdError, MalformedRequest
from chatd.origins import canonical_origin
from chatd.registry import Registry
from chatd.validation import did_you_mean, parse_json, pointer, schema

DEFAULT_MODEL = "openai/gpt-4o-mini"
SETTINGS = tuple(
    f.name for f in dataclasses.fields(ChatbotSettings) if f.name != "identity_secrets"
)
"""What can be set of a chatbot, and shown."""

_LISTS = ("allowed_origins", "suggestions", "limits")
"""Settings of which an option names one; it is given several times."""
_FRACTIONS = ("temperature", "daily_budget_usd", "turn_reserve_usd")
_WORDS = ("on_disconnect", "theme", "accent", "language")
"""Settings that are text, in few words."""


class BadValue(ChatdError):
    """A value on the command line that cannot be used."""


_ABOUT_IT = (
    click.option("--name", metavar="NAME", help="What people call it."),
    click.option("--model", metavar="MODEL", help=f"The model's id, like {DEFAULT_MODEL}."),
    click.option("--system-prompt", metavar="TEXT", help="Who the chatbot is; @FILE reads a file."),
    click.option("--context-tokens", metavar="N", help="The most tokens a model is given."),
    click.option("--max-output-tokens", metavar="N", help='"default" is the provider\'s.'),
    click.option("--temperature", metavar="0..2", help='"default" is the provider\'s.'),
    click.option(
        "--provider-options",
        metavar="JSON",
        help="What kinds of provider are told, like "
        """'{"openrouter": {"models": ["a/b"]}}'; @FILE reads a file, "default" is nothing.""",
    ),
)
_ITS_CLIENTS = (
    click.option("--allow-tools", metavar="yes|no", help="Whether clients may give it tools."),
    click.option("--allow-images", metavar="yes|no", help="Whether clients may show it images."),
    click.option(
        "--on-disconnect",
        metavar="finish|stop",
        help="Whether a turn goes on when its reader goes away.",
    ),
)
_HOW_MUCH = (
    click.option(
        "--retention-days",
        metavar="DAYS",
        help="After how many days without anything new a session is erased, with everything "
        'said in it; "default" is never.',
    ),
    click.option(
        "--turn-reserve-usd",
        metavar="USD",
        help='What a turn may cost, until it is known; "default" is the server\'s.',
    ),
    click.option(
        "--daily-budget-usd",
        metavar="USD",
        help='What a day may cost, or none; "default" is the server\'s.',
    ),
    click.option(
        "--limit",
        "limits",
        multiple=True,
        metavar="NAME=RATE",
        help='A limit, like turns_per_ip="5/minute, 50/hour"; several may be given. '
        '"default" as the rate is the server\'s.',
    ),
)
_ITS_WIDGET = (
    click.option(
        "--require-identity",
        metavar="yes|no",
        help="Whether the widget's visitors need a token that the site signs.",
    ),
    click.option("--language", metavar="TAG", help="The widget's language, like de or pt-BR."),
    click.option("--accent", metavar="#RRGGBB", help="The widget's colour."),
    click.option("--theme", metavar="light|dark|auto", help="How the widget looks."),
    click.option(
        "--suggestion",
        "suggestions",
        multiple=True,
        metavar="TEXT",
        help='A question that the widget offers; several may be given. "default" is none.',
    ),
    click.option("--greeting", metavar="TEXT", help='What the widget says first; "" is nothing.'),
    click.option(
        "--allowed-origin",
        "allowed_origins",
        multiple=True,
        metavar="ORIGIN",
        help="An origin whose pages may talk to it; several may be given. "
        '"default" is the server\'s list.',
    ),
)


def settings_options(command: Any) -> Any:
    """The options for what can be set of a chatbot, on `add` and on `set`."""
    for option in reversed((*_ABOUT_IT, *_ITS_CLIENTS, *_HOW_MUCH, *_ITS_WIDGET)):
        command = option(command)
    return command


def changed_settings(settings: ChatbotSettings, given: dict[str, Any]) -> ChatbotSettings:
    """`settings` with what was given on the command line. Raises `BadValue`."""
    values = {k: v for k, v in settings.to_json().items() if k in SETTINGS}
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
        if name == "allowed_origins" and given != ["default"]:
            given = list(dict.fromkeys(map(_origin, given)))
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


def _origin(text: str) -> str:
    try:
        return canonical_origin(text)
    except ValueError as error:
        raise BadValue(f"--allowed-origin {text}: {error}") from None


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


def check_options(settings: ChatbotSettings, given: dict[str, Any], registry: Registry) -> None:
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
    if name == "provider_options" and inner:
        return f"--provider-options /{'/'.join(inner)}"
    return "--" + (name.removesuffix("s") if name in _LISTS else name).replace("_", "-")
