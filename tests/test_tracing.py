"""Traces, as a collector gets them over OTLP."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from chatd.testing.fake_provider import SSE_HEAD, FakeProvider, http_response
from tests.conftest import Serve
from tests.support import KEY, Served

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
SAID = "canary-what-was-said"
PROVIDER_KEY = "canary-key-of-the-provider"
CONFIG = """
server: {tracing: MODE}
storage: %(storage)s
providers:
  bad: {use: openai_compatible, base_url: BAD, retries: {attempts: 1}}
  good: {use: openai_compatible, base_url: GOOD, api_key: canary-key-of-the-provider}
models: [{match: "*", ask: [bad, {provider: good, model: own}]}]
"""
ANSWER = {
    "model": "own-2026",
    "choices": [{"message": {"role": "assistant", "content": SAID}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 10, "completion_tokens": 20},
}


class Collector:
    """A server that takes spans, as a collector of OpenTelemetry does."""

    def __init__(self) -> None:
        self.spans: list[Any] = []
        self.resources: list[dict[str, Any]] = []
        self.bytes = b""
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.take(self.path, body)
                self.send_response(200)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def take(self, path: str, body: bytes) -> None:
        assert path == "/v1/traces"
        sent = ExportTraceServiceRequest.FromString(body)
        self.bytes += body
        for resource in sent.resource_spans:
            self.resources.append(attributes(resource.resource))
            self.spans += [span for scope in resource.scope_spans for span in scope.spans]

    async def named(self, name: str, count: int = 1) -> list[Any]:
        """The spans of this name, once there are so many."""
        async with asyncio.timeout(20):
            while len(found := [span for span in self.spans if span.name == name]) < count:
                await asyncio.sleep(0.02)
        return found


def attributes(holder: Any) -> dict[str, Any]:
    """The attributes of a span or a resource, as Python has them."""
    return {pair.key: _value(pair.value) for pair in holder.attributes}


def _value(value: Any) -> Any:
    kind = value.WhichOneof("value")
    if kind == "array_value":
        return [_value(inner) for inner in value.array_value.values]
    return getattr(value, kind)


@pytest.fixture
def collector(monkeypatch: pytest.MonkeyPatch) -> Iterator[Collector]:
    """A collector that the standard variables name."""
    collector = Collector()
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", collector.url)
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "50")
    monkeypatch.setenv("OTEL_RESOURCE_ATTRIBUTES", "deployment.environment.name=test")
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


async def served_with(
    serve: Serve, mode: str, bad: FakeProvider, good: FakeProvider
) -> tuple[Served, Any, str]:
    bad.always(http_response(503, b"no"))
    good.always(http_response(200, json.dumps(ANSWER).encode()))
    text = CONFIG.replace("MODE", mode).replace("BAD", bad.url).replace("GOOD", good.url)
    served = await serve(text)
    bot = await served.add_bot()
    return served, bot, await served.session(bot)


async def chat(served: Served, bot: Any, session: str, **headers: str) -> None:
    said = [{"role": "user", "content": SAID}]
    body = {"api_key": KEY, "assistant_id": bot.id, "session_id": session, "type": "message"}
    answer = await served.post("/api/chat", {**body, "messages": said}, headers=headers)
    assert answer.status == 200, answer.body


async def test_a_turn_is_a_trace_of_request_storage_turn_and_attempts(
    serve: Serve, collector: Collector, first: FakeProvider, second: FakeProvider
) -> None:
    served, bot, session = await served_with(serve, "own", first, second)
    await chat(served, bot, session, **{"X-Request-Id": "my-request"})
    (request,) = await collector.named("POST /api/chat")
    (turn,) = await collector.named("turn")
    (failed,) = await collector.named("chat test/model")
    (answered,) = await collector.named("chat own")
    (begun,) = await collector.named("storage begin_turn")
    (finished,) = await collector.named("storage finish_turn")
    spans = [request, turn, failed, answered, begun, finished]
    assert {span.trace_id for span in spans} == {request.trace_id}
    assert request.parent_span_id == b""
    assert turn.parent_span_id == begun.parent_span_id == request.span_id
    assert failed.parent_span_id == answered.parent_span_id == turn.span_id
    assert finished.parent_span_id == turn.span_id
    times = [(span.start_time_unix_nano, span.end_time_unix_nano) for span in (failed, answered)]
    assert times[0][0] < times[0][1] <= times[1][1]
    told = attributes(request)
    assert told["http.route"] == "/api/chat"
    assert told["http.response.status_code"] == 200
    assert told["chatd.request.id"] == "my-request"
    assert attributes(turn)["chatd.turn.result"] == "completed"
    assert attributes(failed)["error.type"] == "overloaded"
    assert attributes(failed)["gen_ai.provider.name"] == "bad"
    first_chunk = attributes(answered).pop("gen_ai.response.time_to_first_chunk")
    assert 0 < first_chunk < 10
    assert {
        "gen_ai.operation.name": "chat",
        "gen_ai.provider.name": "good",
        "gen_ai.request.model": "own",
        "gen_ai.request.stream": False,
        "gen_ai.response.model": "own-2026",
        "gen_ai.response.finish_reasons": ["stop"],
        "gen_ai.usage.input_tokens": 10,
        "gen_ai.usage.output_tokens": 20,
    }.items() <= attributes(answered).items()
    assert collector.resources[0]["service.name"] == "chatd"
    assert collector.resources[0]["deployment.environment.name"] == "test"
    # Who asked, with what key, and what was said is in none of it.
    for secret in (SAID, KEY, PROVIDER_KEY, session):
        assert secret.encode() not in collector.bytes


async def test_a_provider_is_told_of_the_span_that_it_is_called_in(
    serve: Serve, collector: Collector, first: FakeProvider, second: FakeProvider
) -> None:
    served, bot, session = await served_with(serve, "own", first, second)
    await chat(served, bot, session)
    for fake, name in ((first, "chat test/model"), (second, "chat own")):
        (span,) = await collector.named(name)
        version, trace, parent, flags = fake.requests[0].headers["traceparent"].split("-")
        assert (version, trace, parent) == ("00", span.trace_id.hex(), span.span_id.hex())
        assert int(flags, 16) & 1 == 1


@pytest.mark.parametrize(("mode", "continued"), [("own", False), ("continue", True)])
async def test_a_request_says_whose_part_it_is_only_where_that_is_configured(
    serve: Serve,
    collector: Collector,
    first: FakeProvider,
    second: FakeProvider,
    mode: str,
    continued: bool,
) -> None:
    served, bot, session = await served_with(serve, mode, first, second)
    await chat(served, bot, session, traceparent=f"00-{TRACE}-{PARENT}-01")
    (request,) = await collector.named("POST /api/chat")
    assert (request.trace_id.hex() == TRACE) is continued
    assert (request.parent_span_id.hex() == PARENT) is continued


@pytest.mark.parametrize("given", ["", "nonsense", "00-" + "0" * 32 + "-" + "0" * 16 + "-01"])
async def test_a_traceparent_that_is_none_begins_a_trace(
    serve: Serve, collector: Collector, first: FakeProvider, second: FakeProvider, given: str
) -> None:
    served, _, _ = await served_with(serve, "continue", first, second)
    assert (await served.get("/health", headers={"traceparent": given})).status == 200
    (request,) = await collector.named("GET /health")
    assert request.parent_span_id == b"" and any(request.trace_id)


async def test_two_requests_on_one_connection_are_two_traces(
    serve: Serve, collector: Collector, first: FakeProvider, second: FakeProvider
) -> None:
    served, _, _ = await served_with(serve, "own", first, second)
    for _ in range(2):
        await served.get("/health")
    one, two = await collector.named("GET /health", 2)
    assert one.trace_id != two.trace_id
    assert one.parent_span_id == two.parent_span_id == b""


async def test_a_turn_that_fails_ends_its_spans_with_the_kind_of_error(
    serve: Serve, collector: Collector, first: FakeProvider, second: FakeProvider
) -> None:
    served, bot, session = await served_with(serve, "own", first, second)
    second.always(SSE_HEAD, b"data: nonsense canary\n\n")
    answer = await served.chat(bot, session, "hi", stream=True)
    assert b'"type":"error"' in answer.body
    (turn,) = await collector.named("turn")
    assert attributes(turn)["error.type"] == "provider_failed"
    assert attributes(turn)["chatd.turn.result"] == "failed"
    spans = await collector.named("chat own")
    assert {attributes(span)["error.type"] for span in spans} == {"protocol"}
    assert b"canary" not in collector.bytes


async def test_nothing_is_told_to_providers_while_nothing_is_traced(
    serve: Serve, collector: Collector, first: FakeProvider, second: FakeProvider
) -> None:
    served, bot, session = await served_with(serve, "none", first, second)
    await chat(served, bot, session, traceparent=f"00-{TRACE}-{PARENT}-01")
    assert "traceparent" not in second.requests[0].headers
    assert collector.spans == []


def test_without_tracing_nothing_of_it_and_nothing_that_writes_metrics_is_imported() -> None:
    code = "import sys, chatd.server; print([n for n in sys.modules if n.startswith(%r)])"
    for package in ("opentelemetry", "prometheus_client"):
        done = subprocess.run(
            [sys.executable, "-c", code % package], capture_output=True, text=True, check=True
        )
        assert done.stdout == "[]\n"


def test_a_server_without_the_extra_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "chatd.yaml").write_text(
        "server: {port: 0, tracing: own}\nstorage: {use: sqlite}\n"
        "providers: {a: {use: echo}}\nmodels: [{match: '*', ask: [a]}]\n"
    )
    (tmp_path / "sitecustomize.py").write_text("import sys\nsys.modules['opentelemetry'] = None\n")
    done = subprocess.run(
        [sys.executable, "-m", "chatd", "serve"],
        check=False,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path)},
        timeout=60,
    )
    assert done.returncode == 1
    assert 'server.tracing needs OpenTelemetry: pip install "chatd[otel]"' in done.stderr
