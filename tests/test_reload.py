"""A server that runs takes on another configuration, or says why not."""

from __future__ import annotations

import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.support import ServerProcess, server_process
from tests.test_process import Client, call, wait_for_a_turn
from tests.test_workers import eventually

CONFIG = """
server: {port: 0, drain_seconds: 5%s}
plugins: {folder: plugins}
storage: {use: sqlite, path: %s}
providers: {main: {use: noted, reply: "%s", word_seconds: %s}}
models: [{match: "*", ask: [main]}]
log_level: %s
"""
# An echo that writes into a file when it is closed.
NOTED = """
import asyncio
import chatd

class Noted:
    def __init__(self, settings):
        self.settings = settings

    async def stream(self, request):
        for word in self.settings["reply"].split():
            await asyncio.sleep(self.settings["word_seconds"])
            yield chatd.TextDelta(word + " ")
        yield chatd.Finish("stop")

    async def check(self):
        pass

    async def close(self):
        with open("closed", "a") as file:
            file.write(self.settings["reply"] + ";")

async def open_noted(settings):
    if settings["reply"] == "refused":
        raise chatd.PluginError("it does not open")
    return Noted(settings)

@chatd.hookimpl
def chatd_register_provider(register):
    register.add("noted", open_noted, {"type": "object"}, "an echo")
"""


def configure(
    folder: Path,
    reply: str,
    *,
    word_seconds: float = 0,
    path: str = "chatd.db",
    more: str = "",
    log_level: str = "info",
) -> None:
    """Writes the configuration and its plugin."""
    (folder / "plugins").mkdir(exist_ok=True)
    (folder / "plugins" / "noted.py").write_text(NOTED)
    text = CONFIG % (more, path, reply, word_seconds, log_level)
    (folder / "chatd.yaml").write_text(text)


def reload(server: ServerProcess, says: str) -> None:
    """Has the configuration read again, until the log says what is expected."""
    before = server.stdout.count(says)
    server.process.send_signal(signal.SIGHUP)
    eventually(lambda: server.stdout.count(says) > before)


def closed(folder: Path) -> str:
    """Which providers were closed."""
    return (folder / "closed").read_text() if (folder / "closed").exists() else ""


def test_a_good_file_counts_for_new_turns_and_running_ones_end_as_they_began(
    tmp_path: Path,
) -> None:
    configure(tmp_path, "one two three four", word_seconds=0.6)
    with server_process(tmp_path) as server, ThreadPoolExecutor() as pool:
        slow, quick = Client(server), Client(server)
        running = pool.submit(slow.say, "hi")
        wait_for_a_turn(tmp_path)
        configure(tmp_path, "new", more=", max_body_bytes: 1024")
        reload(server, "in force")
        assert quick.say("hi")[1]["response"] == "new "
        assert quick.say("x" * 2000)[1]["code"] == "body_too_large"
        assert not running.done() and closed(tmp_path) == ""
        assert running.result(timeout=20)[1]["response"] == "one two three four "
        eventually(lambda: closed(tmp_path) == "one two three four;")
        assert server.stop() == 0
        assert closed(tmp_path) == "one two three four;new;"


def test_a_bad_file_changes_nothing_and_the_log_says_where_it_is_wrong(tmp_path: Path) -> None:
    configure(tmp_path, "old")
    with server_process(tmp_path) as server:
        client = Client(server)
        configure(tmp_path, "new", more=", prot: 1")
        reload(server, "stays as it was: chatd.yaml:2: server.prot: unknown key")
        configure(tmp_path, "refused")
        reload(server, "stays as it was: it does not open")
        (tmp_path / "chatd.yaml").unlink()
        reload(server, "stays as it was: chatd.yaml: cannot be read")
        configure(tmp_path, "new")
        (tmp_path / "plugins" / "noted.py").write_text("broken (")
        reload(server, 'plugin \\"noted\\" from plugins/noted.py cannot be loaded: SyntaxError')
        assert client.say("hi")[1]["response"] == "old "
        assert closed(tmp_path) == ""
        assert server.stop() == 0


def test_what_needs_a_restart_is_named_and_the_rest_of_the_file_counts(tmp_path: Path) -> None:
    configure(tmp_path, "old")
    with server_process(tmp_path) as server:
        client = Client(server)
        configure(tmp_path, "new", more=", host: 127.0.0.9", log_level="warning")
        reload(server, "server.host changes only with a restart: it stays localhost")
        eventually(lambda: client.say("hi")[1]["response"] == "new ")
        lines = server.stdout.count("\n")
        call("GET", f"{server.url}/health")
        # At this level requests are not logged.
        assert server.stdout.count("\n") == lines
        assert server.stop() == 0


def test_another_storage_holds_what_is_new_and_the_old_one_what_runs(tmp_path: Path) -> None:
    configure(tmp_path, "one two three four", word_seconds=0.6)
    with server_process(tmp_path) as server, ThreadPoolExecutor() as pool:
        before = Client(server)
        running = pool.submit(before.say, "hi")
        wait_for_a_turn(tmp_path)
        configure(tmp_path, "new", path="other.db")
        reload(server, "in force")
        assert Client(server).say("hi")[1]["response"] == "new "
        assert before.say("hi")[0] == 401
        assert running.result(timeout=20)[1]["response"] == "one two three four "
        assert server.stop() == 0
        assert closed(tmp_path) == "new;one two three four;"


def test_a_changed_env_file_counts_but_not_against_the_environment(tmp_path: Path) -> None:
    configure(tmp_path, "${REPLY} ${GIVEN}")
    (tmp_path / ".env").write_text("REPLY=old\nGIVEN=file\n")
    with server_process(tmp_path, env={"GIVEN": "outside"}) as server:
        client = Client(server, GIVEN="outside")
        assert client.say("hi")[1]["response"] == "old outside "
        (tmp_path / ".env").write_text("REPLY=new\nGIVEN=changed\n")
        reload(server, "in force")
        assert client.say("hi")[1]["response"] == "new outside "
        (tmp_path / ".env").write_text("")
        reload(server, "the environment variable REPLY is not set")
        assert client.say("hi")[1]["response"] == "new outside "
        assert server.stop() == 0


def test_a_server_for_development_starts_again_when_a_file_changes_and_never_dies_of_one(
    tmp_path: Path,
) -> None:
    configure(tmp_path, "old")
    with server_process(tmp_path, "--reload") as server:
        assert call("GET", f"{server.url}/health")[0] == 200
        (tmp_path / "plugins" / "noted.py").write_text("broken (")
        eventually(lambda: "noted.py changed" in server.stderr)
        eventually(lambda: "cannot be loaded: SyntaxError" in server.stderr)
        eventually(lambda: "starts again when a file changes" in server.stderr)
        configure(tmp_path, "new")
        eventually(lambda: server.stderr.count("chatd serves") == 2)
        url = server.stderr.split("chatd serves ")[-1].split()[0]
        assert call("GET", f"{url}/health")[0] == 200
        (tmp_path / ".env").write_text("X=1\n")
        eventually(lambda: server.stderr.count("chatd serves") == 3)
        assert server.stop() == 0
        time.sleep(0.1)
        assert "Traceback" not in server.stderr
