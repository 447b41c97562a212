"""The OpenAPI document: that it is one, that it is whole, and that the server keeps to it."""

from __future__ import annotations

import http.client
import json
import re
import subprocess
import sys
import uuid
from collections import Counter
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from openapi_spec_validator import OpenAPIV31SpecValidator

from chatd import openapi
from chatd.app import packaged_config, routes
from chatd.handlers.base import Operation
from chatd.handlers.problems import PROBLEMS
from tests.support import ServerProcess, clean_env, server_process, without_limits

SEED = 1
SESSION, CHAT = "/api/chat/session", "/api/chat"
WIDGET_SESSION, WIDGET_CHAT = "/api/chat/widget/session", "/api/chat/widget"
CORE = (SESSION, CHAT, WIDGET_SESSION, WIDGET_CHAT)

ALWAYS = {200, 400, 413, 431, 500}
WITH_ANSWER = ALWAYS | {406}
WITH_BODY = WITH_ANSWER | {415, 422}
TURN = {403, 404, 409, 429, 502, 503, 504}
TURN_PATH, WIDGET_TURN_PATH = "/api/chat/turns/{turn_id}", "/api/chat/widget/turns/{turn_id}"
ONE_SESSION = "/api/chat/session/{session_id}"
BY_KEY = (ALWAYS - {200}) | {401, 404, 503}
BY_SESSION = (ALWAYS - {200}) | {401, 403, 404, 503}
STATUSES = {
    ("post", SESSION): WITH_BODY | {401, 503},
    ("post", CHAT): WITH_BODY | TURN | {401},
    ("post", WIDGET_SESSION): WITH_BODY | {403, 404, 429, 503},
    ("post", WIDGET_CHAT): WITH_BODY | TURN,
    ("get", "/api/chat/widget/bot/{chatbot_id}"): WITH_ANSWER | {403, 404, 503},
    ("get", f"{ONE_SESSION}/messages"): BY_KEY | {200, 406, 422},
    ("get", "/api/chat/widget/messages"): BY_SESSION | {200, 406, 422},
    ("delete", ONE_SESSION): BY_KEY | {204},
    ("delete", WIDGET_SESSION): BY_SESSION | {204},
    ("get", f"{ONE_SESSION}/stream"): BY_KEY | {200, 204, 406},
    ("get", "/api/chat/widget/stream"): BY_SESSION | {200, 204, 406},
    **{
        (method, f"{path}{rest}"): who | statuses
        for path, who in ((TURN_PATH, BY_KEY), (WIDGET_TURN_PATH, BY_SESSION))
        for method, rest, statuses in (
            ("get", "", {200, 406}),
            ("get", "/events", {200, 406}),
            ("post", "/stop", {200, 406}),
            ("post", "/feedback", WITH_BODY),
        )
    },
    ("post", "/v1/chat/completions"): WITH_BODY | TURN | {401},
    ("get", "/v1/models"): WITH_ANSWER | {401, 503},
    ("get", "/health"): WITH_ANSWER,
    ("get", "/healthz"): WITH_ANSWER,
    ("get", "/readyz"): WITH_ANSWER | {503},
}
NOT_OF_AN_OPERATION = {"method_not_allowed"}
"""It is of methods that are not described."""


class Target(NamedTuple):
    """A running server, its first chatbot and a session of each channel."""

    server: ServerProcess
    host: str
    port: int
    chatbot: str
    key: str
    session: str
    widget_session: str
    turn: str = ""
    widget_turn: str = ""

    def body(self, path: str) -> dict[str, Any]:
        """A body that `path` answers with 200."""
        known = {"api_key": self.key, "assistant_id": self.chatbot}
        said = {"type": "message", "messages": [{"role": "user", "content": "Hi"}]}
        bodies: dict[str, dict[str, Any]] = {
            SESSION: {**known, "user_id": "u", "metadata": {"page": 1}},
            CHAT: {**known, **said, "session_id": self.session},
            WIDGET_SESSION: {"chatbot_id": self.chatbot},
            WIDGET_CHAT: {"session_id": self.widget_session, "message": "Hi"},
        }
        return bodies[path]


class Reply(NamedTuple):
    """A response, read."""

    status: int
    kind: str
    body: Any


def _post(connection: http.client.HTTPConnection, path: str, body: bytes) -> Reply:
    connection.request("POST", path, body=body, headers={"Content-Type": "application/json"})
    response = connection.getresponse()
    text = response.read()
    return Reply(response.status, response.headers.get_content_type(), json.loads(text))


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Target]:
    """`chatd serve` on the embedded default, without its limits: here one client asks it all."""
    folder = tmp_path_factory.mktemp("server")
    (folder / "chatd.yaml").write_text(without_limits(packaged_config().read_text()))
    with server_process(folder) as server:
        parts = urlsplit(server.url)
        host, port = str(parts.hostname), int(parts.port or 0)
        found = re.search(r"assistant_id (\S+)\s+api_key +(\S+)", server.stderr)
        assert found is not None, server.stderr
        target = Target(server, host, port, found[1], found[2], "", "")
        connection = http.client.HTTPConnection(host, port, timeout=30)
        sessions = [
            _post(connection, path, json.dumps(target.body(path)).encode()).body["session_id"]
            for path in (SESSION, WIDGET_SESSION)
        ]
        target = target._replace(session=sessions[0], widget_session=sessions[1])
        turns = [
            _post(connection, path, json.dumps(target.body(path)).encode()).body["turn_id"]
            for path in (CHAT, WIDGET_CHAT)
        ]
        connection.close()
        yield target._replace(turn=turns[0], widget_turn=turns[1])


@pytest.fixture(scope="module")
def connection(target: Target) -> Iterator[http.client.HTTPConnection]:
    """A connection that is kept open."""
    connection = http.client.HTTPConnection(target.host, target.port, timeout=30)
    yield connection
    connection.close()


@pytest.fixture(scope="module")
def document(target: Target) -> dict[str, Any]:
    """The document as it is served."""
    connection = http.client.HTTPConnection(target.host, target.port, timeout=30)
    connection.request("GET", "/openapi.json")
    found: dict[str, Any] = json.loads(connection.getresponse().read())
    connection.close()
    return found


def _references(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        if isinstance(found := value.get("$ref"), str):
            yield found
        for child in value.values():
            yield from _references(child)
    elif isinstance(value, list):
        for child in value:
            yield from _references(child)


def _resolve(document: dict[str, Any], reference: str) -> Any:
    value: Any = document
    for name in reference.removeprefix("#/").split("/"):
        value = value[name]
    return value


def _public(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _public(v) for k, v in value.items() if k not in ("$schema", "x-error")}
    return [_public(item) for item in value] if isinstance(value, list) else value


def _file(name: str) -> Any:
    return json.loads(resources.files("chatd.schemas").joinpath(f"{name}.json").read_bytes())


def _described() -> Iterator[tuple[str, str, Operation]]:
    """The operations that are no pages."""
    for route in routes():
        for method, operation in route.operations.items():
            answers = operation.response or operation.events or operation.nothing
            if answers and operation.response != "openapi":
                yield method.lower(), route.path, operation


def test_the_document_is_valid_openapi_3_1(document: dict[str, Any]) -> None:
    assert document["openapi"].startswith("3.1.")
    OpenAPIV31SpecValidator(document).validate()


def test_the_document_describes_each_json_operation(document: dict[str, Any]) -> None:
    found = {(method, path) for path, item in document["paths"].items() for method in item}
    assert found == {(method, path) for method, path, _ in _described()} == set(STATUSES)


def test_the_document_holds_the_schemas_that_validate(document: dict[str, Any]) -> None:
    for method, path, operation in _described():
        entry = document["paths"][path][method]
        if operation.request:
            given = entry["requestBody"]["content"]["application/json"]["schema"]
            assert _resolve(document, given["$ref"]) == _public(_file(operation.request))
        if operation.response is None:
            continue
        answer = entry["responses"]["200"]["content"]["application/json"]["schema"]
        assert _resolve(document, answer["$ref"]) == _public(_file(operation.response))


def test_the_document_tells_nothing_that_is_internal(document: dict[str, Any]) -> None:
    assert "x-error" not in json.dumps(document)


def test_each_reference_in_the_document_leads_somewhere(document: dict[str, Any]) -> None:
    found = set(_references(document))
    assert found
    for reference in found:
        assert reference.startswith("#/")
        assert _resolve(document, reference)


def test_each_status_an_operation_can_give_is_described(document: dict[str, Any]) -> None:
    for method, path, operation in _described():
        responses = document["paths"][path][method]["responses"]
        assert {int(status) for status in responses} == STATUSES[method, path], path
        told = "application/problem+json" if operation.problem == "problem" else "application/json"
        given = {"application/json": operation.response, "text/event-stream": operation.events}
        for status, response in responses.items():
            kinds = [told]
            if status == "200":
                kinds = [kind for kind, is_given in given.items() if is_given]
            elif status == "204":
                kinds = []
            assert list(response.get("content", {})) == kinds, path


def test_each_operation_says_who_may(document: dict[str, Any]) -> None:
    for method, path, operation in _described():
        found = document["paths"][path][method].get("security", [])
        names = {name for way in found for name in way}
        wanted = {"api_key": {"bearer", "header"}, "widget": {"session"}, "none": set()}
        assert names == wanted[operation.auth], path


def test_each_parameter_is_described(document: dict[str, Any]) -> None:
    for method, path, operation in _described():
        found = document["paths"][path][method].get("parameters", [])
        in_path = {("path", name) for name in re.findall(r"{([a-z_]+)}", path)}
        read = {(parameter.place, parameter.name) for parameter in operation.parameters}
        assert {(entry["in"], entry["name"]) for entry in found} == in_path | read, path


def test_who_is_refused_for_too_much_is_told_where_to_read_how_long(
    document: dict[str, Any],
) -> None:
    for method, path, _ in _described():
        responses = document["paths"][path][method]["responses"]
        limited = {"RateLimit", "RateLimit-Policy"}
        if "429" in responses:
            assert limited | {"Retry-After"} <= set(responses["429"]["headers"]), path
            assert limited <= set(responses["200"]["headers"]), path


def test_each_code_is_described_under_its_status(document: dict[str, Any]) -> None:
    described: set[tuple[int, str]] = set()
    for item in document["paths"].values():
        for entry in item.values():
            for status, response in entry["responses"].items():
                codes = re.findall(r"`([a-z_]+)`", response["description"])
                described.update((int(status), code) for code in codes)
    known = {(problem.status, error.code) for error, problem in PROBLEMS.items()}
    assert described == {(s, code) for s, code in known if code not in NOT_OF_AN_OPERATION}


def test_the_served_document_is_built_from_the_routes(document: dict[str, Any]) -> None:
    version = document["info"]["version"]
    assert json.loads(json.dumps(openapi.build(routes(), version))) == document


# A widget's session is its proof, so none at all is answered like one that does not exist.
SETTINGS = """
[auth.openapi.bearer]
bearer = "${TEST_API_KEY}"

[auth.openapi.session]
bearer = "${TEST_SESSION_ID}"

# What is erased must not be the session that the others read.
[[operations]]
include-name = "DELETE /api/chat/widget/session"
headers = {Authorization = "Bearer ${TEST_ERASED_SESSION_ID}"}
"""

HOOKS = """
import itertools
import os
import uuid

import schemathesis

CALLS = itertools.count()
NAMES = {
    "/api/chat/session": ["assistant_id", "api_key"],
    "/api/chat": ["assistant_id", "api_key"],
    "/api/chat/widget/session": ["chatbot_id"],
    "/api/chat/widget": ["session_id"],
}

def narrowed(value):
    # What a schema cannot say of members it does not name: integers have at most 64 bits.
    if isinstance(value, dict):
        return {name: narrowed(item) for name, item in value.items()}
    if isinstance(value, list):
        return [narrowed(item) for item in value]
    if isinstance(value, int) and not -(2**63) <= value < 2**64:
        return value % 2**63
    return value

@schemathesis.hook
def before_call(context, case, kwargs):
    '''Gives most of the requests that fit their schema the ids of what exists.'''
    if not (case.meta and case.meta.generation.mode.is_positive):
        return
    if case.headers and "Idempotency-Key" in case.headers:
        # What came with a key before is nothing that a schema knows.
        case.headers["Idempotency-Key"] = uuid.uuid4().hex
    real = next(CALLS) % 3 > 0
    if case.method == "DELETE" and "session_id" in (case.path_parameters or {}):
        # What others talk in is not erased, though its id may be known by now.
        case.path_parameters["session_id"] = str(uuid.uuid4())
    if real and case.method != "DELETE" and case.meta.phase.name.value != "stateful":
        own = "WIDGET" if "/widget/" in case.path else "API"
        for name, value in (("turn_id", f"{own}_TURN_ID"), ("session_id", "API_SESSION_ID")):
            if name in (case.path_parameters or {}):
                case.path_parameters[name] = os.environ["TEST_" + value]
    if not isinstance(case.body, dict):
        return
    body = case.body = narrowed(case.body)
    if case.path == "/v1/chat/completions":
        # The echo that answers takes no tools and no images, and says so.
        body.pop("tools", None)
        body.pop("tool_choice", None)
        messages = body.get("messages")
        for message in messages if isinstance(messages, list) else []:
            if not isinstance(message, dict):
                continue
            if message.pop("tool_calls", None) is not None:
                message["content"] = message.get("content") or "Hi"
            if message.get("role") == "tool":
                message["role"] = "user"
                message.pop("tool_call_id", None)
            if isinstance(parts := message.get("content"), list):
                texts = [p for p in parts if isinstance(p, dict) and p.get("type") == "text"]
                message["content"] = texts or "Hi"
    if case.path == "/api/chat":
        # Nor can it say that the last one who speaks is the user.
        body["messages"].append({"role": "user", "content": "Hi"})
    if real:
        body.update({name: os.environ["TEST_" + name.upper()] for name in NAMES.get(case.path, ())})
    if real and case.path == "/api/chat":
        body["session_id"] = os.environ["TEST_API_SESSION_ID"]
"""


def _answered(target: Target) -> Counter[tuple[str, int]]:
    """How often each route gave each status, by the server's own log."""
    lines = [json.loads(line) for line in target.server.stdout.splitlines()]
    return Counter((line["route"], line["status"]) for line in lines if "route" in line)


def test_schemathesis_finds_nothing_that_differs_from_the_document(
    target: Target, tmp_path: Path
) -> None:
    (tmp_path / "chatd_hooks.py").write_text(HOOKS)
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    before = _answered(target)
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("st")),
            "run",
            f"http://{target.host}:{target.port}/openapi.json",
            "--checks=all",
            # It wants 401 for a widget's session that does not exist, which is a 404 here.
            "--exclude-checks=ignored_auth",
            f"--seed={SEED}",
            "--max-examples=100",
            # Nor that no name and no text holds U+0000; the tests below send it.
            "--generation-allow-x00=false",
            "--generation-database=none",
            "--no-color",
        ],
        cwd=tmp_path,
        env={
            **clean_env(),
            "SCHEMATHESIS_HOOKS": "chatd_hooks",
            "TEST_ASSISTANT_ID": target.chatbot,
            "TEST_CHATBOT_ID": target.chatbot,
            "TEST_API_KEY": target.key,
            "TEST_API_SESSION_ID": target.session,
            "TEST_SESSION_ID": target.widget_session,
            "TEST_ERASED_SESSION_ID": str(uuid.uuid4()),
            "TEST_API_TURN_ID": target.turn,
            "TEST_WIDGET_TURN_ID": target.widget_turn,
        },
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    given = _answered(target) - before
    for path in CORE:
        assert given[path, 200] >= 5, given
        assert given[path, 422] >= 5, given
    for method, path in STATUSES:
        if "{turn_id}" in path or path.endswith(("/messages", "/stream")):
            assert given[path, 200] + given[path, 204] >= 5, (method, path, given)
    assert not [key for key in given if key[1] >= 500]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4)
    ),
    max_leaves=12,
)
JSONISH = st.text(alphabet='{}[]",:\\/u0d8DbBfnNatrse1-+.eE \n\t\0\x7fé\u2028\ufeff😀', max_size=80)


@st.composite
def _mutated(draw: st.DrawFn, text: bytes) -> bytes:
    """Valid JSON with a few of its bytes cut, doubled or replaced."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 12)))
        new = draw(st.sampled_from([b"", text[start:end] * 2]) | st.binary(max_size=6))
        text = text[:start] + new + text[end:]
    return text


@st.composite
def _altered(draw: st.DrawFn, body: dict[str, Any]) -> bytes:
    """Valid JSON with some values replaced, left out or added."""
    changed = dict(body)
    for name in draw(st.sets(st.sampled_from(sorted(body)), max_size=2)):
        if draw(st.booleans()):
            changed[name] = draw(JSON)
        else:
            del changed[name]
    changed.update(draw(st.dictionaries(st.text(max_size=8), JSON, max_size=2)))
    return json.dumps(changed, ensure_ascii=draw(st.booleans())).encode("utf-8", "surrogatepass")


def _refused_or_answered(connection: http.client.HTTPConnection, path: str, body: bytes) -> Reply:
    """Posts bytes; whatever they are, they are answered, and errors are problem details."""
    reply = _post(connection, path, body)
    if reply.status == 200:
        assert reply.kind == "application/json"
        return reply
    assert 400 <= reply.status < 500, reply
    assert reply.kind == "application/problem+json"
    assert reply.body["status"] == reply.status
    assert (reply.status, reply.body["code"]) in {(p.status, e.code) for e, p in PROBLEMS.items()}
    assert "Traceback" not in reply.body["detail"]
    return reply


few = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)


@pytest.mark.parametrize("path", CORE)
def test_any_bytes_are_answered_without_a_server_error(
    connection: http.client.HTTPConnection, path: str
) -> None:
    @few
    @given(st.binary(max_size=300) | JSONISH.map(str.encode) | JSON.map(json.dumps).map(str.encode))
    @example(b"")
    @example(b"\xef\xbb\xbf{}")
    @example('{"message": "é"}'.encode("utf-16"))
    @example(b'{"a": "\\ud800"}')
    @example(b'{"\\u0000": "\\u0000"}')
    @example(b'{"a": NaN, "b": 1e999}')
    @example(b'{"a": 1, "a": 2}')
    @example(b"[" * 5000)
    @example(b"[" * 5000 + b"]" * 5000)
    @example(b'{"a":' * 200 + b"1" + b"}" * 200)
    @example(b"1" * 5000)
    @example(b'{"a": 18446744073709551616}')
    def check(body: bytes) -> None:
        assert _refused_or_answered(connection, path, body).status in (400, 422)

    check()


@pytest.mark.parametrize("path", CORE)
def test_a_valid_body_that_was_mutated_is_answered_without_a_server_error(
    connection: http.client.HTTPConnection, target: Target, path: str
) -> None:
    body = target.body(path)
    valid = json.dumps(body).encode()
    assert _refused_or_answered(connection, path, valid).status == 200

    @few
    @given(_mutated(valid) | _altered(body))
    def check(body: bytes) -> None:
        _refused_or_answered(connection, path, body)

    check()
