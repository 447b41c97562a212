"""What services say of their failures: the kind, the hint when to ask again, words for a log."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from typing import Any, get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st
from openrouter.components import APIErrorType

from chatd.domain import Message
from chatd.errors import ProviderErrorKind as Kind
from chatd.http_errors import MAX_HINT_SECONDS, cleaned, kind_of, retry_hint, sentences

NOW = datetime(2026, 3, 1, 12, 0, tzinfo=UTC)
SOON = NOW + timedelta(seconds=90)


def hint(headers: dict[str, str] | None = None, error: Any = None) -> float | None:
    return retry_hint(headers or {}, error or {}, now=NOW)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"Retry-After": "7"}, 7),
        ({"retry-after": " 7 "}, 7),
        ({"RETRY-AFTER": "1.5"}, 1.5),
        ({"Retry-After": "0"}, 0),
        ({"Retry-After": "3600"}, 3600),
        ({"Retry-After": "Sun, 01 Mar 2026 12:01:30 GMT"}, 90),
        ({"Retry-After": "Sun, 01 Mar 2026 11:00:00 GMT"}, 0),
        ({"retry-after-ms": "1500", "Retry-After": "2"}, 1.5),
        ({"retry-after-ms": "?", "Retry-After": "2"}, 2),
        ({"X-RateLimit-Reset": str(int(SOON.timestamp() * 1000))}, 90),
        ({"X-RateLimit-Reset": str(int(SOON.timestamp()))}, 90),
        ({"X-RateLimit-Reset": "12"}, 12),
        ({"x-ratelimit-reset-requests": "6m0s", "x-ratelimit-remaining-requests": "0"}, 360),
        ({"x-ratelimit-reset-requests": "6m0s", "x-ratelimit-remaining-requests": "9"}, None),
        ({"anthropic-ratelimit-requests-reset": "2026-03-01T12:01:30Z"}, 90),
        (
            {
                "anthropic-ratelimit-requests-reset": "2026-03-01T12:00:01Z",
                "anthropic-ratelimit-requests-remaining": "3",
                "anthropic-ratelimit-input-tokens-reset": "2026-03-01T12:00:20Z",
                "anthropic-ratelimit-input-tokens-remaining": "0",
                "anthropic-ratelimit-output-tokens-reset": "2026-03-01T12:00:30Z",
                "anthropic-ratelimit-output-tokens-remaining": "0",
            },
            30,
        ),
        ({"retry-after": "4", "anthropic-ratelimit-requests-reset": "2026-03-01T12:01:30Z"}, 4),
    ],
)
def test_a_hint_is_read_from_every_header_that_has_one(
    headers: dict[str, str], seconds: float | None
) -> None:
    assert hint(headers) == seconds


RETRY_INFO = {
    "error": {
        "code": 429,
        "message": "Quota exceeded.",
        "status": "RESOURCE_EXHAUSTED",
        "details": [
            {"@type": "type.googleapis.com/google.rpc.Help"},
            {"@type": "type.googleapis.com/google.rpc.RetryInfo", "retryDelay": "3.5s"},
        ],
    }
}


@pytest.mark.parametrize(
    ("error", "seconds"),
    [
        ({"metadata": {"headers": {"X-RateLimit-Reset": int(SOON.timestamp() * 1000)}}}, 90),
        ({"metadata": {"headers": {"Retry-After": "17"}}}, 17),
        ({"metadata": {"retry_after_seconds": 17, "retry_after_seconds_raw": 16.007}}, 17),
        ({"metadata": {"retry_after": "2.5"}}, 2.5),
        ({"retry_after": 3}, 3),
        ({"metadata": {"raw": json.dumps(RETRY_INFO)}}, 3.5),
        ({"metadata": {"raw": json.dumps([RETRY_INFO])}}, 3.5),
        ({"metadata": {"raw": RETRY_INFO}}, 3.5),
        (RETRY_INFO["error"], 3.5),
        ({"message": "Rate limit reached. Please try again in 1.5s. Visit us."}, 1.5),
        ({"message": "Please try again in 20ms."}, 0.02),
        ({"message": "Please try again in 1m3s."}, 63),
        ({"message": "Please try again in 1h2m3.5s"}, 3723.5),
        ({"message": "Please retry in 34.074824224s."}, 34.074824224),
        ({"message": "Please retry after 20 seconds."}, 20),
        ({"message": "Try again in 6 minutes, please"}, 360),
        ({"metadata": {"raw": "You are too quick. Please try again in 4s"}}, 4),
        ({"message": "Please try again in 3 meters"}, None),
        ({"message": "Please try again later."}, None),
    ],
)
def test_a_hint_is_read_from_the_body_of_the_error(error: Any, seconds: float | None) -> None:
    assert hint(error=error) == (None if seconds is None else pytest.approx(seconds))


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "soon", "", "9" * 400, "1e999", "²", "٣"])
@pytest.mark.parametrize("name", ["Retry-After", "retry-after-ms", "X-RateLimit-Reset"])
def test_a_hint_that_makes_no_sense_is_none(name: str, value: str) -> None:
    assert hint({name: value}) is None
    assert hint(error={"metadata": {"headers": {name: value}, "retry_after": value}}) is None


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), 10**400, True, [], {}, None])
def test_a_number_that_makes_no_sense_is_no_hint(value: Any) -> None:
    assert hint(error={"metadata": {"retry_after_seconds": value}, "retry_after": value}) is None


def test_when_a_limit_begins_anew_says_nothing_where_no_limit_was_the_reason() -> None:
    headers = {"X-RateLimit-Reset": "12"}
    assert retry_hint(headers, {}, limited=False) is None
    assert retry_hint({**headers, "Retry-After": "5"}, {}, limited=False) == 5


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(
                [
                    "metadata",
                    "headers",
                    "raw",
                    "retry_after",
                    "error",
                    "details",
                    "retryDelay",
                    "message",
                    "code",
                    "type",
                    "error_type",
                    "retry-after",
                    "x-ratelimit-reset",
                ]
            ),
            inner,
            max_size=4,
        )
    ),
    max_leaves=12,
)


@given(JSON, st.text(), st.text())
def test_nothing_that_is_said_breaks_the_reading(said: Any, header: str, reset: str) -> None:
    error = said if isinstance(said, dict) else {"metadata": said, "message": said}
    seconds = hint({"Retry-After": header, "X-RateLimit-Reset": reset}, error)
    assert seconds is None or 0 <= seconds <= MAX_HINT_SECONDS
    assert isinstance(kind_of(None, error), Kind)
    assert all(isinstance(sentence, str) for sentence in sentences(error))


OF_OPENROUTER = {
    "context_length_exceeded": Kind.CONTEXT_LENGTH,
    "token_limit_exceeded": Kind.CONTEXT_LENGTH,
    "string_too_long": Kind.CONTEXT_LENGTH,
    "authentication": Kind.AUTHENTICATION,
    "permission_denied": Kind.AUTHENTICATION,
    "payment_required": Kind.CREDIT,
    "rate_limit_exceeded": Kind.RATE_LIMIT,
    "provider_overloaded": Kind.OVERLOADED,
    "provider_unavailable": Kind.OVERLOADED,
    "content_policy_violation": Kind.MODERATION,
    "refusal": Kind.MODERATION,
    "server": Kind.OVERLOADED,
    "timeout": Kind.TIMEOUT,
    "unmapped": Kind.OVERLOADED,
}
"""All others are faults of the request."""


@pytest.mark.parametrize("word", get_args(get_args(APIErrorType)[0]))
def test_every_error_type_of_openrouters_sdk_is_of_its_kind(word: str) -> None:
    kind = OF_OPENROUTER.get(word, Kind.INVALID_REQUEST)
    assert kind_of(None, {"metadata": {"error_type": word}}) is kind
    assert kind_of(None, {"error_type": word}) is kind


@pytest.mark.parametrize(
    ("status", "error", "kind"),
    [
        (403, {"metadata": {"reasons": ["violence"], "flagged_input": "…"}}, Kind.MODERATION),
        (403, {"metadata": {"flagged_input": "…"}}, Kind.MODERATION),
        (403, {"metadata": {"provider_name": "x"}}, Kind.AUTHENTICATION),
        (403, {}, Kind.AUTHENTICATION),
        (402, {"message": "Insufficient credits"}, Kind.CREDIT),
        (429, {"code": "insufficient_quota", "type": "insufficient_quota"}, Kind.CREDIT),
        (429, {"type": "insufficient_quota", "code": None}, Kind.CREDIT),
        # Google says so of a limit of a minute.
        (429, {"message": "You exceeded your current quota, check your plan"}, Kind.RATE_LIMIT),
        (429, {"type": "tokens", "code": "rate_limit_exceeded"}, Kind.RATE_LIMIT),
        (413, {"type": "tokens", "code": "rate_limit_exceeded"}, Kind.INVALID_REQUEST),
        (401, {"type": "invalid_request_error", "code": "invalid_api_key"}, Kind.AUTHENTICATION),
        (404, {"type": "invalid_request_error", "code": "model_not_found"}, Kind.INVALID_REQUEST),
        (400, {"code": "content_filter"}, Kind.MODERATION),
        (400, {"message": "flagged as potentially violating our usage policy"}, Kind.MODERATION),
        (400, {"message": "Your credit balance is too low to access the API"}, Kind.CREDIT),
        (400, {"message": "prompt is too long: 9 tokens > 8 maximum"}, Kind.CONTEXT_LENGTH),
        (
            400,
            {"message": "input length and `max_tokens` exceed context limit"},
            Kind.CONTEXT_LENGTH,
        ),
        (
            400,
            {
                "message": "Provider returned error",
                "metadata": {"raw": '{"error": {"message": "maximum context length is 9"}}'},
            },
            Kind.CONTEXT_LENGTH,
        ),
        (None, {"code": "context_length_exceeded"}, Kind.CONTEXT_LENGTH),
        (
            None,
            {"type": "invalid_request_error", "message": "prompt is too long"},
            Kind.CONTEXT_LENGTH,
        ),
        (None, {"type": "overloaded_error"}, Kind.OVERLOADED),
        (None, {"type": "rate_limit_error"}, Kind.RATE_LIMIT),
        (None, {"type": "api_error"}, Kind.OVERLOADED),
        (None, {"type": "billing_error"}, Kind.CREDIT),
        (None, {"type": "request_too_large"}, Kind.INVALID_REQUEST),
        (529, {}, Kind.OVERLOADED),
        (408, {}, Kind.TIMEOUT),
        (418, {}, Kind.INVALID_REQUEST),
        (502, {"metadata": {"error_type": "unmapped"}}, Kind.OVERLOADED),
    ],
)
def test_an_error_is_of_its_kind(status: int | None, error: dict[str, Any], kind: Kind) -> None:
    assert kind_of(status, error) is kind


def test_the_words_of_the_service_behind_a_router_are_told_too() -> None:
    error = {
        "message": "Provider returned error",
        "metadata": {"provider_name": "Acme", "raw": '{"error": {"message": "out of GPUs"}}'},
    }
    assert sentences(error) == ["Provider returned error", "Acme", "out of GPUs"]


def test_a_page_is_not_told() -> None:
    assert sentences({"message": "Bad gateway", "metadata": {"raw": " <html>…"}}) == ["Bad gateway"]


def test_a_log_holds_no_key_whosever_it_is() -> None:
    text = "keys my-own-secret, sk-ant-api03-0123456789abcdef, AIzaSyA0123456789abcdef; Bearer abc.def.ghi.jkl"
    assert cleaned(text, ["my-own-secret"]) == ("keys [removed], [removed], [removed]; [removed]")


def test_a_log_holds_nothing_that_was_said_nor_a_part_of_it() -> None:
    said = Message("user", "My parcel 4711 was sent to Ann in Bonn.")
    text = cleaned("flagged: …parcel 4711 was sent to…", [], [said])
    assert "4711" not in text and text.startswith("flagged")
