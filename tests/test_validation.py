"""Schemas: the quick validator and the thorough one agree, and faults are told in words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import chatd.schemas
from chatd.errors import InvalidRequest, MalformedRequest
from chatd.registry import load_registry
from chatd.validation import Schema, parse_json, pointer, schema

NAMES = sorted(path.stem for path in Path(chatd.schemas.__path__[0]).glob("*.json"))
WORDS = ["api_key", "assistant_id", "session_id", "chatbot_id", "type", "messages", "message"]
WORDS += ["role", "content", "stream", "user_id", "metadata", "user", "assistant", "system"]
WORDS += ["123e4567-e89b-12d3-a456-426614174000", "123E4567-E89B-12D3-A456-426614174000\n"]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**60), 2**60)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=8)
    | st.sampled_from(WORDS)
)
KEYS = st.sampled_from(WORDS) | st.text(max_size=4)
DOCUMENTS = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=20,
)


@pytest.mark.parametrize("name", NAMES)
def test_schemas_are_draft_2020_12(name: str) -> None:
    document = schema(name).document
    assert document["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    jsonschema.Draft202012Validator.check_schema(document)


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=150, deadline=None, derandomize=True)
@given(value=DOCUMENTS)
def test_both_validators_say_the_same(name: str, value: Any) -> None:
    compiled = schema(name)
    thorough = jsonschema.Draft202012Validator(compiled.document)
    assert compiled.fits(value) == thorough.is_valid(value)
    assert bool(compiled.faults(value)) != compiled.fits(value)


CHAT = {
    "assistant_id": "123e4567-e89b-12d3-a456-426614174000",
    "session_id": "123e4567-e89b-12d3-a456-426614174000",
    "type": "message",
    "messages": [{"role": "user", "content": "hi"}],
}


@settings(max_examples=400, deadline=None, derandomize=True)
@given(key=st.sampled_from([*CHAT, "api_key", "stream"]), value=DOCUMENTS)
def test_both_validators_say_the_same_of_bodies_that_nearly_fit(key: str, value: Any) -> None:
    compiled = schema("chat_request")
    body = {**CHAT, key: value}
    assert compiled.fits(CHAT)
    thorough = jsonschema.Draft202012Validator(compiled.document)
    assert compiled.fits(body) == thorough.is_valid(body)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(value=DOCUMENTS)
def test_what_json_writes_is_read_back(value: Any) -> None:
    text = json.dumps(value).encode()
    if b"\\u0000" in text.replace(b"\\\\", b"") or b"\\ud" in text:
        return
    assert parse_json(text) == json.loads(text)


@settings(max_examples=500, deadline=None, derandomize=True)
@given(body=st.binary(max_size=64) | st.text('[]{}",:\\u019aefn-. \n', max_size=40).map(str.encode))
def test_reading_bytes_raises_nothing_but_malformed_request(body: bytes) -> None:
    try:
        value = parse_json(body)
    except MalformedRequest as error:
        assert error.detail.endswith(".")
    else:
        assert value == json.loads(body)


def test_pointers_escape_what_rfc_6901_says() -> None:
    assert pointer(["a/b", 0, "c~d", ""]) == "/a~1b/0/c~0d/"


@pytest.mark.parametrize(
    ("rule", "value", "told"),
    [
        ({"type": "integer"}, "7", "must be a whole number"),
        ({"type": ["string", "null"]}, 7, "must be a string or null"),
        ({"enum": ["a", "b"]}, "c", 'must be one of "a", "b"'),
        ({"const": False}, True, "must be false"),
        ({"minLength": 1}, "", "must not be empty"),
        ({"minLength": 3}, "ab", "must have at least 3 characters"),
        ({"maxLength": 3}, "abcd", "must have at most 3 characters"),
        ({"minItems": 1}, [], "must not be empty"),
        ({"maximum": 2}, 3, "must be at most 2"),
        ({"exclusiveMinimum": 0}, 0, "must be more than 0"),
        ({"pattern": "^x$"}, "y", "must match ^x$"),
        ({"pattern": "^x$", "x-error": "must be an x"}, "y", "must be an x"),
        ({"multipleOf": 2}, 3, "does not fit (multipleOf)"),
    ],
)
def test_faults_are_sentences_that_do_not_quote_the_value(
    rule: dict[str, Any], value: Any, told: str
) -> None:
    assert Schema({"properties": {"a": rule}}).faults({"a": value}) == [(("a",), told)]


def test_a_misspelt_key_gets_a_suggestion() -> None:
    strict = Schema({"properties": {"timeout": {}}, "additionalProperties": False})
    assert strict.faults({"timout": 1}) == [(("timout",), 'unknown key, did you mean "timeout"?')]


def test_requiring_a_fit_raises_every_fault() -> None:
    with pytest.raises(InvalidRequest) as caught:
        schema("widget_chat_request").require({"session_id": "x"})
    assert {f.pointer for f in caught.value.errors} == {"/session_id", "/message"}


def test_settings_of_bundled_plugins_are_documented_schemas() -> None:
    registry = load_registry()
    for offer in [*registry.storages.values(), *registry.providers.values()]:
        document = offer.schema.document
        assert document["additionalProperties"] is False
        for name, rule in document["properties"].items():
            assert rule["description"], (offer.name, name)
