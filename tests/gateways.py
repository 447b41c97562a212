"""Servers of others that speak OpenAI's API, each a process of its own on a free port."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import aiohttp
from tornado.testing import bind_unused_port

from tests.support import clean_env

GATEWAY = Path(__file__).parent.parent / ".venv-gateway" / "bin"
START_SECONDS = 180
"""How long a server may take to listen: LiteLLM imports a lot."""

_LISTENS = re.compile(r"Uvicorn running on (http://127\.0\.0\.1:[1-9][0-9]*)")
_NOWHERE = "http://127.0.0.1:9"


class Llmock:
    """A running llmock, which breaks its answers as it is told and judges who asks."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def breaks(self, *behaviors: Mapping[str, Any]) -> None:
        """Forgets what was, and does these things to the next requests."""
        await self._call("POST", "reset")
        if behaviors:
            await self._call("POST", "scenario", {"behaviors": behaviors})

    async def verdict(self) -> dict[str, Any]:
        """What it says of the requests since."""
        verdict: dict[str, Any] = await self._call("GET", "verdict")
        return verdict

    async def requests(self) -> list[dict[str, Any]]:
        """The requests since, oldest first."""
        requests: list[dict[str, Any]] = (await self._call("GET", "requests"))["requests"]
        return requests

    async def _call(self, method: str, path: str, body: Any = None) -> Any:
        async with (
            aiohttp.ClientSession() as http,
            http.request(method, f"{self.url}/_llmock/{path}", json=body) as answer,
        ):
            assert answer.ok, await answer.text()
            return await answer.json()


@contextmanager
def llmock(folder: Path, *options: str) -> Iterator[Llmock]:
    """An llmock until the end of the `with`."""
    with _uvicorn(folder, "llmock", "serve", "--port", "0", *options) as url:
        yield Llmock(url)


LITELLM_KEY = "sk-litellm-0123456789abcdef0123456789abcdef"
LITELLM = """
model_list:
  - model_name: "*"
    litellm_params: {model: openai/none, api_key: none, mock_response: "REPLY"}
  - model_name: "*"
    litellm_params: {model: openai/none, api_key: none, mock_response: litellm.RateLimitError}
router_settings: {num_retries: 0, disable_cooldowns: true}
"""


@contextmanager
def litellm(folder: Path, reply: str) -> Iterator[str]:
    """The address of a LiteLLM proxy until the end of the `with`.

    It answers with `reply` or, half of the time, that it is asked too often.
    """
    (folder / "litellm.yaml").write_text(LITELLM.replace("REPLY", reply))
    options = ("--config", "litellm.yaml", "--host", "127.0.0.1", "--telemetry", "False")
    socket, port = bind_unused_port()
    socket.close()
    with _uvicorn(
        folder,
        "litellm",
        *options,
        *("--port", str(port)),
        LITELLM_MASTER_KEY=LITELLM_KEY,
        # Else it asks the internet what models cost.
        LITELLM_LOCAL_MODEL_COST_MAP="True",
    ) as url:
        yield url


@contextmanager
def _uvicorn(folder: Path, command: str, *arguments: str, **env: str) -> Iterator[str]:
    """The address of a server that runs on uvicorn until the end of the `with`."""
    assert GATEWAY.exists(), ".venv-gateway is missing: `scripts/setup dev` makes it"
    log = folder / f"{command}.log"
    with (
        log.open("wb") as out,
        subprocess.Popen(
            [str(GATEWAY / command), *arguments],
            cwd=folder,
            # None of them has anything to look for outside of this machine.
            env={
                **{
                    k: v
                    for k, v in clean_env().items()
                    if not k.startswith(("LLMOCK_", "LITELLM_"))
                },
                "HTTP_PROXY": _NOWHERE,
                "HTTPS_PROXY": _NOWHERE,
                "NO_PROXY": "127.0.0.1",
                **env,
            },
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        ) as process,
    ):
        try:
            yield _address(process, log)
        finally:
            # With what it started.
            os.killpg(process.pid, signal.SIGKILL)


def _address(process: subprocess.Popen[bytes], log: Path) -> str:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end and process.poll() is None:
        if found := _LISTENS.search(log.read_text(errors="replace")):
            return found[1]
        time.sleep(0.05)
    raise AssertionError(f"the server did not start: {log.read_text(errors='replace')}")
