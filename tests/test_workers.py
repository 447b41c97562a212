"""Several processes on one port: watched by a parent, stopped and reloaded together."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import socket
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from chatd.supervisor import MOST_PAUSE, STEADY_SECONDS, _Place
from tests.support import ServerProcess, chatd_command, clean_env, server_process
from tests.test_process import Client, call, wait_for_a_turn

# SQLite, which several processes can use at once, says no to it for the sake of speed.
SHARED = """
import asyncio, os, pathlib
import chatd
from chatd_plugins.sqlite import open_sqlite

async def open_shared(settings):
    if pathlib.Path("broken").exists():
        os._exit(7)
    if pathlib.Path("refuses").exists():
        raise chatd.PluginError("the storage is out")
    if pathlib.Path("slow").exists():
        pathlib.Path("slow").rename("opening")
    while pathlib.Path("opening").exists():
        await asyncio.sleep(0.02)
    return await open_sqlite(settings)

@chatd.hookimpl
def chatd_register_storage(register):
    register.add("shared", open_shared, {"type": "object"}, "a file")
"""
CONFIG = """
server:
  port: 0
  drain_seconds: 5
  workers: %s
plugins: {folder: plugins}
storage: {use: shared}
providers: {main: {use: echo, word_seconds: %s, reply: "%s"}}
models: [{match: "*", ask: [main]}]
"""
SQLITE = """
server: {workers: %s}
storage: {use: sqlite}
providers: {main: {use: echo}}
models: [{match: "*", ask: [main]}]
"""


def configure(
    folder: Path, *, workers: str = "2", word_seconds: float = 0, reply: str = "a b c"
) -> None:
    """Writes a configuration whose storage can be shared."""
    (folder / "plugins").mkdir(exist_ok=True)
    (folder / "plugins" / "shared.py").write_text(SHARED)
    (folder / "chatd.yaml").write_text(CONFIG % (workers, word_seconds, reply))


def workers(server: ServerProcess) -> list[int]:
    """The processes that the parent has started and that live."""
    pid = server.process.pid
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def eventually(holds: Callable[[], object], seconds: float = 20) -> None:
    """Returns when it holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it does not come to hold"
        time.sleep(0.05)


def is_gone(pid: int) -> bool:
    """Whether a process has ended; nobody may have asked how yet."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return True


def test_a_worker_that_dies_is_started_again_and_the_others_answer_meanwhile(
    tmp_path: Path,
) -> None:
    configure(tmp_path)
    with server_process(tmp_path) as server:
        client = Client(server)
        eventually(lambda: len(workers(server)) == 2)
        before = workers(server)
        os.kill(before[0], signal.SIGKILL)
        for _ in range(20):
            assert client.say("hi")[0] == 200
        eventually(lambda: len(workers(server)) == 2 and before[0] not in workers(server))
        assert before[1] in workers(server)
        assert f"(pid {before[0]}) ended with SIGKILL: started again in 0.5 s" in server.stdout
        assert server.stop() == 0
        # What each process counts on its own is said once.
        assert server.stdout.count("2 workers: limits are counted by each of them") == 1
        assert server.stderr.count("chatd serves") == 1


def test_a_worker_that_dies_at_once_is_started_again_after_longer_and_longer(
    tmp_path: Path,
) -> None:
    configure(tmp_path)
    with server_process(tmp_path) as server:
        assert server.url
        eventually(lambda: len(workers(server)) == 2)
        (tmp_path / "broken").touch()
        os.kill(workers(server)[1], signal.SIGKILL)
        eventually(lambda: "in 2 s" in server.stdout)
        pauses = re.findall(r"ended with ([\w ]+): started again in ([\d.]+) s", server.stdout)
        assert pauses == [("SIGKILL", "0.5"), ("exit code 7", "1"), ("exit code 7", "2")]
        (tmp_path / "broken").unlink()
        eventually(lambda: len(workers(server)) == 2)
        assert call("GET", f"{server.url}/health")[0] == 200
        assert server.stop() == 0


def test_the_pause_has_an_end_and_a_long_life_is_no_reason_for_one() -> None:
    place = _Place(1)
    assert [place.left(0.0) for _ in range(30)][-1] == MOST_PAUSE
    assert place.left(STEADY_SECONDS) == 0


def test_workers_told_to_stop_by_their_parent_let_running_turns_finish(tmp_path: Path) -> None:
    configure(tmp_path, word_seconds=0.4)
    with server_process(tmp_path) as server, ThreadPoolExecutor() as pool:
        client = Client(server)
        eventually(lambda: len(workers(server)) == 2)
        pids = workers(server)
        running = pool.submit(client.say, "hi")
        wait_for_a_turn(tmp_path)
        assert server.stop() == 0
        status, answer = running.result(timeout=10)
        assert (status, answer["response"]) == (200, "a b c")
        assert all(is_gone(pid) for pid in pids)


def test_workers_that_were_told_to_stop_leave_new_clients_to_other_servers(tmp_path: Path) -> None:
    configure(tmp_path, word_seconds=1.5)
    with server_process(tmp_path) as server, ThreadPoolExecutor() as pool:
        client = Client(server)
        eventually(lambda: len(workers(server)) == 2)
        address = ("127.0.0.1", int(server.url.rpartition(":")[2]))
        running = pool.submit(client.say, "hi")
        wait_for_a_turn(tmp_path)
        server.process.send_signal(signal.SIGTERM)

        def refused() -> bool:
            try:
                socket.create_connection(address).close()
            except ConnectionRefusedError:
                return True
            return False

        eventually(refused)
        assert not running.done()
        assert running.result(timeout=10)[0] == 200
        assert server.stop() == 0


def test_workers_whose_parent_was_killed_let_running_turns_finish_and_end(tmp_path: Path) -> None:
    configure(tmp_path, word_seconds=0.4)
    with server_process(tmp_path) as server, ThreadPoolExecutor() as pool:
        client = Client(server)
        eventually(lambda: len(workers(server)) == 2)
        pids = workers(server)
        running = pool.submit(client.say, "hi")
        wait_for_a_turn(tmp_path)
        os.kill(server.process.pid, signal.SIGKILL)
        status, answer = running.result(timeout=10)
        assert (status, answer["response"]) == (200, "a b c")
        eventually(lambda: all(is_gone(pid) for pid in pids))
        assert server.stdout.count("the parent process is gone") == 2


def test_a_worker_whose_parent_was_killed_before_it_served_ends_in_good_order(
    tmp_path: Path,
) -> None:
    configure(tmp_path)
    (tmp_path / "slow").touch()
    with server_process(tmp_path) as server:
        eventually((tmp_path / "opening").exists)
        [pid] = workers(server)
        os.kill(server.process.pid, signal.SIGKILL)
        (tmp_path / "opening").unlink()
        eventually(lambda: is_gone(pid))
        assert "the parent process is gone" in server.stdout
        assert '"message":"stopped"' in server.stdout
        assert "failed" not in server.stdout


def test_workers_all_take_on_a_good_configuration_and_none_a_bad_one(tmp_path: Path) -> None:
    configure(tmp_path, reply="old")
    with server_process(tmp_path) as server:
        client = Client(server)
        eventually(lambda: len(workers(server)) == 2)
        assert client.say("hi")[1]["response"] == "old"
        with (tmp_path / "chatd.yaml").open("a") as config:
            config.write("modles: []\n")
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: "stays as it was: chatd.yaml:10: modles: unknown key" in server.stdout)
        configure(tmp_path, reply="new")
        server.process.send_signal(signal.SIGHUP)
        eventually(lambda: server.stdout.count("is in force") == 2)
        assert {client.say("hi")[1]["response"] for _ in range(10)} == {"new"}
        # One that is started later has it too.
        os.kill(workers(server)[0], signal.SIGKILL)
        eventually(lambda: len(workers(server)) == 2)
        assert {client.say("hi")[1]["response"] for _ in range(10)} == {"new"}
        assert server.stdout.count("stays as it was") == 1
        assert server.stop() == 0


def test_workers_that_cannot_start_say_why_once(tmp_path: Path) -> None:
    configure(tmp_path)
    (tmp_path / "refuses").touch()
    result = chatd_command("serve", "--port", "0", cwd=tmp_path)
    assert (result.returncode, result.stderr) == (1, "chatd: the storage is out\n")


def test_sqlite_says_no_to_several_workers_and_why(tmp_path: Path) -> None:
    (tmp_path / "chatd.yaml").write_text(SQLITE % "2")
    for command in (["check"], ["serve", "--port", "0"]):
        result = chatd_command(*command, cwd=tmp_path)
        assert result.returncode == 1
        assert result.stderr.startswith(
            "chatd.yaml:2: server.workers: must be 1 with the storage sqlite: a SQLite file has "
            "one writer at a time"
        )
    (tmp_path / "chatd.yaml").write_text(SQLITE % "1")
    result = chatd_command("serve", "--workers", "2", "--port", "0", cwd=tmp_path)
    assert result.returncode == 1
    assert "one writer at a time" in result.stderr


@pytest.mark.parametrize(("written", "processes"), [("1", 0), ("${WEB_CONCURRENCY:-1}", 2)])
def test_web_concurrency_counts_only_where_the_configuration_names_it(
    tmp_path: Path, written: str, processes: int
) -> None:
    configure(tmp_path, workers=written)
    with server_process(tmp_path, env={"WEB_CONCURRENCY": "2"}) as server:
        assert server.url
        if processes:
            eventually(lambda: len(workers(server)) == processes)
        assert len(workers(server)) == processes
        assert server.stop() == 0


def test_the_first_chatbot_is_made_once_for_all_workers(tmp_path: Path) -> None:
    configure(tmp_path)
    with (tmp_path / "chatd.yaml").open("a") as config:
        config.write("first_chatbot: {name: One, model: test/model}\n")
    with server_process(tmp_path, "--workers", "3") as server:
        assert server.url
        eventually(lambda: len(workers(server)) == 3)
        assert server.stop() == 0
    listed = chatd_command("bots", "list", "--json", cwd=tmp_path)
    assert len(json.loads(listed.stdout)) == 1


@pytest.mark.parametrize("processes", ["1", "2"])
def test_a_server_whose_terminal_is_closed_stops(tmp_path: Path, processes: str) -> None:
    configure(tmp_path, workers=processes)
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(
            sys.executable, [sys.executable, "-m", "chatd", "serve", "--port", "0"], clean_env()
        )
    shown = b""
    while b"chatd serves" not in shown:
        shown += os.read(terminal, 65536)
    os.close(terminal)
    ended: list[int] = []

    def has_ended() -> bool:
        ended.extend(os.waitpid(pid, os.WNOHANG))
        return ended[-2] == pid

    eventually(has_ended)
    assert os.waitstatus_to_exitcode(ended[-1]) == 0
