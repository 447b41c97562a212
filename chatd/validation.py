"""What a document must be: JSON that reads in one way only, then a compiled JSON Schema.

`jsonschema-rs` says quickly whether a document fits (25 to 90 times as quick as `jsonschema`);
only when it does not, `jsonschema` names every fault. A test holds the two to agree.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import cache, cached_property
from importlib import resources
from typing import TYPE_CHECKING, Any

import jsonschema_rs
import orjson

from chatd.errors import Fault, InvalidRequest, MalformedRequest

if TYPE_CHECKING:
    import jsonschema

MAX_DEPTH = 32
"""How deep arrays and objects may be nested; deeper is nobody's chat and costs recursion."""

MAX_INT_CHARS = 20
"""The characters of the longest 64-bit integers, -2^63 and 2^64 - 1."""

Path = tuple[str | int, ...]


def pointer(path: Iterable[str | int]) -> str:
    """A JSON Pointer (RFC 6901) to `path`."""
    return "".join("/" + str(p).replace("~", "~0").replace("/", "~1") for p in path)


def parse_json(body: bytes) -> Any:
    """The value of a JSON document that has one meaning.

    Raises `MalformedRequest` for what parsers read differently or cannot store: bytes that are
    not UTF-8, lone surrogates, NaN, integers of more than 64 bits and other numbers out of
    range, duplicate names, U+0000, nesting deeper than `MAX_DEPTH`.
    """
    if not body:
        raise MalformedRequest("The body is empty; a JSON object is expected.")
    try:
        value = orjson.loads(body)
    except orjson.JSONDecodeError as error:
        raise MalformedRequest(f"The body is not valid JSON: {_reason(body, error)}.") from None
    if body.count(b"{") + body.count(b"[") > MAX_DEPTH and _depth_above(value, MAX_DEPTH):
        raise MalformedRequest(f"The body is nested more than {MAX_DEPTH} levels deep.")
    if b"\\u0000" in body and _has_nul(value):
        raise MalformedRequest("The body holds the character U+0000, which cannot be stored.")
    if not _is_plain(value, body):
        _STRICT.decode(body.decode())
    return value


def _is_plain(value: Any, body: bytes) -> bool:
    """Whether it shows that no name stands twice and no number is out of range, at a third of the cost.

    There are as many names as colons then: one that stood twice would be one name less, and a colon
    in a text one too many. A whole number of more than 64 bits was read as a fraction.
    """
    names, waiting = 0, [value]
    for item in waiting:
        if isinstance(item, dict):
            names += len(item)
            waiting += item.values()
        elif isinstance(item, list):
            waiting += item
        elif isinstance(item, float):
            return False
    return body.count(b":") == names


def _reason(body: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        body.decode("utf-8")
    except UnicodeDecodeError as fault:
        return f"byte {fault.start} is not UTF-8"
    return f"{error.msg} at line {error.lineno} column {error.colno}"


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> None:
    if len(pairs) > 1 and len({name for name, _ in pairs}) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise MalformedRequest(f"The name {json.dumps(twice[:64])} stands twice in one object.")


def _refuse_huge(digits: str) -> None:
    # 64 bits, signed or not: what a larger one becomes depends on who reads it.
    if len(digits) > MAX_INT_CHARS or not -(2**63) <= int(digits) < 2**64:
        raise MalformedRequest("The body holds a whole number of more than 64 bits.")


_STRICT = json.JSONDecoder(
    object_pairs_hook=_refuse_duplicates, parse_int=_refuse_huge, parse_float=str
)
"""Reads nothing; raises what `parse_json` does of names and numbers."""


def _children(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, list) else ()


def _depth_above(value: Any, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        level = [child for item in level for child in _children(item)]
        if not level:
            return False
    return True


def _has_nul(value: Any) -> bool:
    waiting = [value]
    while waiting:
        item = waiting.pop()
        if isinstance(item, str) and "\0" in item:
            return True
        if isinstance(item, dict) and any("\0" in name for name in item):
            return True
        waiting.extend(_children(item))
    return False


class Schema:
    """A compiled Draft 2020-12 schema."""

    def __init__(self, document: Mapping[str, Any]) -> None:
        self.document = document
        self._quick = jsonschema_rs.Draft202012Validator(dict(document))

    @cached_property
    def _thorough(self) -> jsonschema.Draft202012Validator:
        # Imported when a first document is at fault: 100 ms that a start does not pay.
        import jsonschema  # noqa: PLC0415

        return jsonschema.Draft202012Validator(self.document)

    def fits(self, value: Any) -> bool:
        """Whether `value` fits."""
        return self._quick.is_valid(value)

    def faults(self, value: Any) -> list[tuple[Path, str]]:
        """Every fault as path and sentence, in document order; empty when `value` fits."""
        if self.fits(value):
            return []
        errors = sorted(self._thorough.iter_errors(value), key=lambda e: list(map(str, e.path)))
        return list(dict.fromkeys(found for error in errors for found in explain(error)))

    def require(self, value: Any) -> None:
        """Raises `InvalidRequest` with every fault when `value` does not fit."""
        if found := self.faults(value):
            raise InvalidRequest(errors=[Fault(pointer(path), text) for path, text in found])


@cache
def schema(name: str) -> Schema:
    """The schema `chatd/schemas/<name>.json`, compiled once."""
    return Schema(
        orjson.loads(resources.files("chatd.schemas").joinpath(f"{name}.json").read_bytes())
    )


_TYPES = {
    "object": "an object",
    "array": "a list",
    "string": "a string",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`, did you mean "timeout"?` when something known is close to `name`, else nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f', did you mean "{close[0]}"?' if close else ""


def explain(error: jsonschema.ValidationError) -> Iterator[tuple[Path, str]]:
    """Where a fault is and what, in words that never quote the value: it may be a secret."""
    path: Path = tuple(error.absolute_path)
    rule = str(error.validator)
    value: Any = error.instance
    wanted: Any = error.validator_value
    owner: Any = error.schema
    if rule == "required":
        missing = [name for name in wanted if name not in value]
        # One error comes per missing name; each carries it only in its text.
        rules = owner.get("properties", {})
        yield from (
            ((*path, n), rules.get(n, {}).get("x-required", "is required"))
            for n in missing
            if error.message.startswith(repr(n))
        )
    elif rule == "additionalProperties":
        known = owner.get("properties", {})
        for name in value:
            if name not in known:
                yield (*path, name), "unknown key" + did_you_mean(str(name), known)
    elif rule in ("anyOf", "oneOf") and error.context:
        yield from explain(_closest(error.context))
    else:
        yield path, _sentence(rule, wanted, owner)


def _closest(branches: Sequence[jsonschema.ValidationError]) -> jsonschema.ValidationError:
    """Of the alternatives' faults, the one in the alternative that was most likely meant."""
    return max(branches, key=lambda e: (len(e.absolute_path), e.validator != "type"))


def _sentence(rule: str, wanted: Any, owner: Mapping[str, Any]) -> str:
    if rule in _MEANT and "x-error" in owner:
        return str(owner["x-error"])
    if rule == "type":
        names = [wanted] if isinstance(wanted, str) else wanted
        return "must be " + " or ".join(_TYPES[name] for name in names)
    if rule in ("enum", "const"):
        choices = wanted if rule == "enum" else [wanted]
        listed = ", ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)
        return f"must be {'one of ' if len(choices) > 1 else ''}{listed}"
    if rule.startswith("min") and wanted == 1 and rule != "minimum":
        return "must not be empty"
    return _SENTENCES.get(rule, "does not fit ({rule})").format(wanted=wanted, rule=rule)


_MEANT = {"enum", "const", "pattern", "minLength", "maxLength"}
"""Rules in place of which a schema's `x-error` says what is meant."""

_SENTENCES = {
    "pattern": "must match {wanted}",
    "minLength": "must have at least {wanted} characters",
    "maxLength": "must have at most {wanted} characters",
    "minItems": "must have at least {wanted} items",
    "maxItems": "must have at most {wanted} items",
    "minProperties": "must have at least {wanted} keys",
    "maxProperties": "must have at most {wanted} keys",
    "minimum": "must be at least {wanted}",
    "exclusiveMinimum": "must be more than {wanted}",
    "maximum": "must be at most {wanted}",
    "exclusiveMaximum": "must be less than {wanted}",
    "propertyNames": "has a key that is not allowed",
    "uniqueItems": "must not hold the same item twice",
}
