"""What is measured: servers, how they are started, and how they are asked for a turn."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from bench import wording
from bench.load import ROOT, Job
from bench.processes import Process, tree
from tests.gateways import LITELLM_KEY
from tests.postgres import free_port

CHATD = """
server: {port: %(port)s, max_connections: 20000, max_connections_per_address: 20000}
storage: %(storage)s
limits: {daily_budget_usd: 1000}
providers:
  main: {use: openai_compatible, base_url: "%(model)s/v1", api_key: none}
models:
  - {match: "*", ask: [main]}
"""
"""Limits are the defaults. The budget holds the reserves of a thousand turns at once. Logs go to a file."""


STREAMING = 16
"""Connections that ask for streams now and then: uvicorn closes those that are idle for 5 s."""


@dataclass
class Subject:
    """A server that is measured.

    :param name: what results call it; `title` is what tables do.
    :param command: how it is started, with `%(port)s` for its port and `%(model)s` for the mock's
        address.
    :param ready: a request that is answered with 200 as soon as the server serves.
    :param plain: a turn for each connection; `streamed` the same as a stream.
    """

    name: str
    title: str
    command: Sequence[str]
    folder: Path
    ready: bytes = wording.http("GET", "/health")
    plain: Sequence[bytes] = ()
    streamed: Sequence[bytes] = ()
    env: Mapping[str, str] = field(default_factory=dict)
    config: str = ""
    port: int = 0
    cold_start: float = 0
    process: Process | None = None

    def start(self, model: str, cores: frozenset[int] | None) -> None:
        """Starts it, and returns once it answers; `cold_start` is how long that took."""
        self.port = free_port()
        values = {"port": self.port, "model": model}
        if self.config:
            self.folder.mkdir(parents=True, exist_ok=True)
            (self.folder / "config.yaml").write_text(self.config % values)
        command = [part % values for part in self.command]
        env = {name: value % values for name, value in self.env.items()}
        self.process = Process(command, self.folder, cores=cores, env=env)
        self.cold_start = self.process.answers(self.port, self.ready)

    def close(self) -> None:
        """Ends it."""
        if self.process is not None:
            self.process.close()
            self.process = None

    def tail(self) -> str:
        """The end of what it logged."""
        return self.process.tail() if self.process else ""

    def pids(self) -> list[int]:
        """The server's processes."""
        return tree(self.process.pid) if self.process else []

    def job(self, seconds: float, *, rate: float = 0, stream: bool = False) -> Job:
        """Turns as fast as they are answered, or so many a second."""
        expect = wording.FIRST_TOKEN if stream else wording.REPLY
        return Job(
            self.port,
            self.streamed[:STREAMING] if stream else self.plain,
            expect.encode(),
            seconds,
            least=0 if rate else 2 * wording.SESSIONS,
            rate=rate,
            first=wording.FIRST_TOKEN.encode() if stream else b"",
            pids=self.pids(),
        )


class Mock(Subject):
    """The model, measured as a server too: what any other adds is counted from it."""

    def __init__(self, folder: Path, *options: str) -> None:
        super().__init__(
            "mock",
            "the mock model itself",
            [sys.executable, "-m", "bench.mock", *options],
            folder,
            plain=[wording.chat("-")] * wording.SESSIONS,
            streamed=[wording.chat("-", stream=True)] * wording.SESSIONS,
            env={"PYTHONPATH": str(ROOT)},
        )

    def start(self, model: str, cores: frozenset[int] | None) -> None:
        self.process = Process(self.command, self.folder, cores=cores, env=self.env)
        self.port = int(self.process.first_line())

    @property
    def url(self) -> str:
        """Its address, without the version."""
        return f"http://127.0.0.1:{self.port}"


def limit(folder: Path) -> Subject:
    """The bare Tornado handler."""
    turn = wording.chat("-")
    return Subject(
        "limit",
        "limit: bare Tornado proxy",
        [sys.executable, "-m", "bench.tornado_proxy", "%(port)s", "%(model)s/v1/chat/completions"],
        folder,
        plain=[turn] * wording.SESSIONS,
        streamed=[wording.chat("-", stream=True)] * wording.SESSIONS,
        env={"PYTHONPATH": str(ROOT)},
    )


def chatd(
    name: str, folder: Path, storage: Mapping[str, object], sessions: Sequence[str]
) -> Subject:
    """chatd on a storage in which the sessions are."""
    values = {"port": "%(port)s", "model": "%(model)s", "storage": json.dumps(storage)}
    return Subject(
        name,
        f"chatd on {name}",
        [sys.executable, "-m", "chatd", "serve", "--config", "config.yaml"],
        folder,
        plain=wording.chats(sessions),
        streamed=wording.chats(sessions, stream=True),
        config=CHATD % values,
    )


def fastapi(name: str, folder: Path, postgrest: str, key: str, sessions: Sequence[str]) -> Subject:
    """What one would write in an afternoon, on the same tables and the same PostgREST.

    :param name: `async` or `sync`.
    """
    python = str(ROOT / ".venv-bench" / "bin" / "python")
    return Subject(
        f"fastapi_{name}",
        f"FastAPI + supabase-py, {name}",
        [python, "-m", "uvicorn", f"bench.fastapi_{name}:app", "--port", "%(port)s"],
        folder,
        plain=wording.chats(sessions),
        streamed=wording.chats(sessions, stream=True),
        env={
            "PYTHONPATH": str(ROOT),
            "SUPABASE_URL": postgrest,
            "SUPABASE_KEY": key,
            "MODEL_URL": "%(model)s",
        },
    )


LITELLM = """
model_list:
  - model_name: %(name)s
    litellm_params: {model: openai/%(name)s, api_base: "%%(model)s/v1", api_key: none}
"""


def litellm(folder: Path) -> Subject:
    """A LiteLLM proxy, which is given the history and stores nothing."""
    command = str(ROOT / ".venv-gateway" / "bin" / "litellm")
    return Subject(
        "litellm",
        "LiteLLM proxy",
        [command, "--config", "config.yaml", "--host", "127.0.0.1", "--port", "%(port)s"],
        folder,
        ready=wording.http("GET", "/health/liveliness"),
        plain=[wording.completion(LITELLM_KEY)] * wording.SESSIONS,
        streamed=[wording.completion(LITELLM_KEY, stream=True)] * wording.SESSIONS,
        # Else it asks the internet what models cost.
        env={"LITELLM_MASTER_KEY": LITELLM_KEY, "LITELLM_LOCAL_MODEL_COST_MAP": "True"},
        config=LITELLM % {"name": wording.MODEL},
    )
