"""Two servers of two workers each behind HAProxy, over one PostgREST: what one would run on Heroku."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from tests.postgres import Supabase, children, free_port
from tests.support import ServerProcess

HAPROXY = Path("/usr/sbin/haproxy")
PROVIDER = '''
"""A model whose every answer differs, word by word: what two runs of a turn say can be told apart."""
import asyncio
import secrets

import chatd

class Model:
    async def stream(self, request):
        run = secrets.token_hex(4)
        said = request.messages[-1].content
        yield chatd.UsageReport(chatd.Usage(cost_usd=0.0))
        for number in range(%(words)s):
            await asyncio.sleep(%(word_seconds)s)
            yield chatd.TextDelta(f"{run}-{number} ")
        if said.startswith("pause"):
            await asyncio.sleep(40)
        yield chatd.TextDelta(f"of {said}")
        yield chatd.Finish("stop", "model")

    async def check(self):
        pass

    async def close(self):
        pass

async def open_model(settings):
    return Model()

@chatd.hookimpl
def chatd_register_provider(register):
    register.add("model", open_model, {"type": "object"}, "says something else each time")
'''
"""`pause…` is answered with a pause longer than the proxy lets a connection be silent."""

CONFIG = """
server: {workers: 2, lease_seconds: 3, trusted_proxies: 1}
plugins: {folder: plugins}
storage: %(storage)s
shared: {use: redis, url: "%(redis)s"}
providers:
  main: {use: model}
models:
  - {match: "*", ask: [main]}
"""

# Heroku's router waits 30 s for the first byte of an answer and 55 s for each that follows. HAProxy
# has one time for both, so it is the shorter. Like the router it asks no one for their health: who does
# not take a connection is passed over.
PROXY = """
global
  maxconn 4000
defaults
  mode http
  timeout connect 5s
  timeout client 55s
  timeout server 30s
  timeout http-keep-alive 90s
  option forwardfor
  option redispatch 1
  retries 3
frontend router
  bind 127.0.0.1:%(port)s
  default_backend dynos
backend dynos
  balance roundrobin
%(servers)s
"""


class Proxy:
    """HAProxy before servers on these ports, configured like Heroku's router."""

    def __init__(self, folder: Path, ports: list[int]) -> None:
        assert HAPROXY.exists(), "HAProxy is missing: apt-get install haproxy"
        folder.mkdir()
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        servers = "\n".join(f"  server dyno{p} 127.0.0.1:{p}" for p in ports)
        config = folder / "haproxy.cfg"
        config.write_text(PROXY % {"port": port, "servers": servers})
        with (folder / "log").open("wb") as log:
            self._process = subprocess.Popen(
                [HAPROXY, "-db", "-f", str(config)], stdout=log, stderr=subprocess.STDOUT
            )

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait(10)


class Dyno:
    """A server of two workers on a port that stays, whatever happens to its processes."""

    def __init__(self, folder: Path, config: str, provider: str) -> None:
        (folder / "plugins").mkdir(parents=True)
        (folder / "plugins" / "model.py").write_text(provider)
        (folder / "chatd.yaml").write_text(config)
        self.folder = folder
        self.port = free_port()
        self.server = self._started()

    def _started(self) -> ServerProcess:
        return ServerProcess(self.folder, "--port", str(self.port))

    @property
    def workers(self) -> list[int]:
        """The processes that serve."""
        return children(self.server.process.pid)

    def ready(self) -> None:
        """Returns once it serves with both workers."""
        assert self.server.url
        until(lambda: len(self.workers) == 2)

    def start(self) -> None:
        """Starts it again after its end."""
        self.server = self._started()
        self.ready()

    def stop(self) -> None:
        """SIGTERM: running turns may finish."""
        assert self.server.stop() == 0

    def kill(self) -> None:
        """SIGKILL to all of its processes, as when a machine goes."""
        pids = self.workers
        self.server.process.kill()
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        self.server.kill()

    def kill_parent(self) -> None:
        """SIGKILL to the parent alone; the workers let running turns finish and end."""
        pids = self.workers
        self.server.kill()
        until(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))

    def kill_worker(self) -> None:
        """SIGKILL to one worker, which the parent starts again."""
        pid = self.workers[0]
        os.kill(pid, signal.SIGKILL)
        until(lambda: pid not in self.workers and len(self.workers) == 2)

    def close(self) -> None:
        """Ends it at once."""
        if self.server.process.poll() is None:
            self.kill()


class Cluster:
    """All of it, started.

    :param words: in each answer of the model, one each `word_seconds`.
    """

    def __init__(
        self, folder: Path, database: Supabase, redis: str, *, words: int, word_seconds: float
    ) -> None:
        storage = database.configured("supabase")
        config = CONFIG % {"storage": storage, "redis": redis}
        provider = PROVIDER % {"words": words, "word_seconds": word_seconds}
        self.dynos = [Dyno(folder / name, config, provider) for name in ("one", "two")]
        self.proxy = Proxy(folder / "proxy", [dyno.port for dyno in self.dynos])
        for dyno in self.dynos:
            dyno.ready()

    def close(self) -> None:
        """Ends all of it."""
        self.proxy.close()
        for dyno in self.dynos:
            dyno.close()


def until(holds: Callable[[], bool], seconds: float = 60) -> None:
    """Returns when it holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come to hold"
        time.sleep(0.05)
