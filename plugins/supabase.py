"""Storage in Supabase, through PostgREST: one RPC to begin a turn and one to end it.

What is asked of the database stands in schema.sql, a function for each operation of the
contract. `FunctionStorage` calls them by name, however they are reached; `postgres` builds on it.
"""

from __future__ import annotations

import asyncio
import base64
import io
import json
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

import aiohttp
import orjson

import chatd

log = logging.getLogger(__name__)

SCHEMA_VERSION = 5
"""What `chatd_schema_version()` of this version's schema.sql answers."""

SHARED_CALLS = 4
"""Shared RPCs that run at once; what comes meanwhile waits, and goes together in the next."""

MAX_SHARED = 64
"""The most turns that share an RPC, so that none waits long for the others' work."""

RUN_AGAIN = "run schema.sql again (`chatd migrate`)"

Call = Callable[[str, Mapping[str, Any]], Awaitable[Any]]


class SharedCall:
    """Lets items that wait at the same moment share one call of a function over an array.

    An item that comes while fewer than `SHARED_CALLS` run goes at the end of this turn of the
    event loop, so a lone one is not delayed.
    """

    def __init__(self, function: str, call: Call) -> None:
        self._function = function
        self._call = call
        self._waiting: list[tuple[Mapping[str, Any], asyncio.Future[Any]]] = []
        self._sending = 0
        self._tasks: set[asyncio.Task[None]] = set()

    async def ask(self, item: Mapping[str, Any]) -> Any:
        """The answer for `item`. Raises what the call raises."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._sending < SHARED_CALLS:
            self._sending += 1
            task = asyncio.create_task(self._send())
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        return await future

    async def _send(self) -> None:
        try:
            while self._waiting:
                await self._send_some()
        finally:
            # At once: what comes before the task counts as done would be sent by nobody.
            self._sending -= 1

    async def _send_some(self) -> None:
        # Nobody waits any more for what was cancelled meanwhile: it is not to be begun then.
        wanted = [(item, future) for item, future in self._waiting if not future.done()]
        batch, self._waiting = wanted[:MAX_SHARED], wanted[MAX_SHARED:]
        if not batch:
            return
        try:
            answers = await self._call(self._function, {"items": [item for item, _ in batch]})
            for (_, future), answer in zip(batch, answers, strict=True):
                if not future.done():
                    future.set_result(answer)
        except Exception as error:
            for _, future in batch:
                if not future.done():
                    future.set_exception(error)


class FunctionStorage:
    """`chatd.Storage` by the functions of schema.sql.

    :param call: calls a function with named arguments and returns its JSON. Raises
        `StorageUnavailable`.
    """

    def __init__(self, call: Call) -> None:
        self._call = call
        self._begin = SharedCall("chatd_begin_turns", call)
        self._finish = SharedCall("chatd_finish_turns", call)
        self._tally = SharedCall("chatd_tally_sessions", call)
        self._export = SharedCall("chatd_export_sessions", call)
        self._import = SharedCall("chatd_import_sessions", call)

    async def _ask(self, function: str, **args: Any) -> Any:
        return await self._call(function, {"args": args})

    async def close(self) -> None:
        """Nothing to let go of here."""

    async def check(self) -> None:
        version = await self._call("chatd_schema_version", {})
        if version != SCHEMA_VERSION:
            newer = isinstance(version, int) and version > SCHEMA_VERSION
            raise chatd.StorageUnavailable(
                f"the database has schema version {version}, this chatd wants {SCHEMA_VERSION}: "
                + ("install the chatd that made it" if newer else RUN_AGAIN)
            )

    async def diagnose(self) -> Sequence[chatd.Finding]:
        try:
            found = await self._call("chatd_doctor", {})
            if not found:
                await self.check()
        except chatd.StorageUnavailable as error:
            return [self._unanswered(error.detail)]
        return [chatd.Finding(finding["problem"], finding["cure"]) for finding in found]

    def _unanswered(self, detail: str) -> chatd.Finding:
        """The finding when the database could not be asked."""
        problem, found, cure = detail.rpartition(": ")
        if found and cure == RUN_AGAIN:
            return chatd.Finding(problem, cure)
        return chatd.Finding(detail, "see that the database runs, and check the storage settings")

    # Chatbots

    async def add_chatbot(self, chatbot: chatd.Chatbot) -> None:
        _raise(await self._ask("chatd_add_chatbot", **_chatbot_args(chatbot)))

    async def get_chatbot(self, chatbot_id: str) -> chatd.Chatbot | None:
        found = await self._ask("chatd_get_chatbot", id=chatbot_id)
        return _chatbot(found) if found else None

    async def get_chatbot_by_key(self, api_key_hash: bytes) -> chatd.Chatbot | None:
        found = await self._ask("chatd_get_chatbot_by_key", api_key=_stored(api_key_hash))
        return _chatbot(found) if found else None

    async def list_chatbots(self) -> Sequence[chatd.Chatbot]:
        return [_chatbot(found) for found in await self._ask("chatd_list_chatbots")]

    async def update_chatbot(self, chatbot: chatd.Chatbot) -> bool:
        return _true(await self._ask("chatd_update_chatbot", **_chatbot_args(chatbot)))

    async def set_api_key(self, chatbot_id: str, api_key_hash: bytes) -> bool:
        return _true(
            await self._ask("chatd_set_api_key", id=chatbot_id, api_key=_stored(api_key_hash))
        )

    async def remove_chatbot(self, chatbot_id: str) -> bool:
        return _true(await self._ask("chatd_remove_chatbot", id=chatbot_id))

    async def allowed_origins(self) -> frozenset[str]:
        return frozenset(await self._ask("chatd_allowed_origins"))

    # Sessions

    async def create_session(self, session: chatd.Session) -> None:
        _raise(
            await self._ask(
                "chatd_create_session",
                id=session.id,
                chatbot_id=session.chatbot_id,
                channel=session.channel,
                user_id=session.user_id,
                metadata=dict(session.metadata),
            )
        )

    async def get_session(self, session_id: str) -> chatd.Session | None:
        found = await self._ask("chatd_get_session", id=session_id)
        return _session(found) if found else None

    async def delete_session(self, session_id: str, chatbot_id: str) -> bool:
        return _true(await self._ask("chatd_delete_session", id=session_id, chatbot_id=chatbot_id))

    async def erase_idle_sessions(
        self, chatbot_id: str, before: datetime, *, limit: int, after: str | None = None
    ) -> chatd.Erased:
        told = await self._ask(
            "chatd_erase_idle_sessions",
            chatbot_id=chatbot_id,
            before=before,
            limit=limit,
            after=None if after is None else json.loads(after),
        )
        place = told["after"]
        return chatd.Erased(told["sessions"], None if place is None else json.dumps(place))

    async def reclaim(self) -> None:
        """Nothing to do: PostgreSQL's autovacuum does it."""

    async def list_messages(
        self, session_id: str, chatbot_id: str, *, limit: int, before: int | None = None
    ) -> chatd.MessagePage:
        rows = await self._ask(
            "chatd_list_messages",
            session_id=session_id,
            chatbot_id=chatbot_id,
            limit=limit + 1,
            before=before,
        )
        _raise(rows)
        messages = [
            chatd.StoredMessage(
                row["id"],
                row["role"],
                row["content"],
                datetime.fromisoformat(row["timestamp"]),
                row["turn_id"],
            )
            for row in rows[:limit]
        ]
        return chatd.MessagePage(messages[::-1], has_more=len(rows) > limit)

    # Turns

    async def begin_turn(self, request: chatd.BeginTurn) -> chatd.BegunTurn | chatd.ExistingTurn:
        answer = await self._begin.ask(
            {
                "turn_id": request.turn_id,
                "session_id": request.session_id,
                "chatbot_id": request.chatbot_id,
                "messages": [[m.role, m.content] for m in request.messages],
                "history_chars": request.history_chars,
                "overhead_chars": chatd.MESSAGE_OVERHEAD_CHARS,
                "lease_seconds": request.lease_seconds,
                "label": request.label,
                "idempotency_key": request.idempotency_key,
                "request_hash": request.request_hash.hex() if request.request_hash else None,
            }
        )
        _raise(answer)
        if "existing" in answer:
            return chatd.ExistingTurn(_turn(answer["existing"]))
        history = [chatd.Message(role, content) for role, content in reversed(answer["history"])]
        return chatd.BegunTurn(
            answer["turn_id"], history, answer["truncated"], answer["user_id"], answer["run"]
        )

    async def finish_turn(self, result: chatd.FinishTurn) -> bool:
        return _true(
            await self._finish.ask(
                {
                    "turn_id": result.turn_id,
                    "status": result.status,
                    "reply": result.reply,
                    "model": result.model,
                    "provider": result.provider,
                    "finish_reason": result.finish_reason,
                    "error_code": result.error_code,
                    **_usage_args(result.usage),
                    "attempts": list(result.attempts),
                    "rerunnable": result.rerunnable,
                    "run": result.run,
                    "history_truncated": result.history_truncated,
                    "side": result.side,
                }
            )
        )

    async def settle_turn(self, turn_id: str, run: int, usage: chatd.Usage) -> bool:
        return _true(
            await self._ask("chatd_settle_turn", id=turn_id, run=run, **_usage_args(usage))
        )

    async def renew_turns(
        self, turns: Sequence[tuple[str, int]], lease_seconds: float
    ) -> chatd.Renewed:
        told = await self._ask("chatd_renew_turns", turns=list(turns), lease_seconds=lease_seconds)
        return chatd.Renewed(frozenset(told["lost"]), frozenset(told["stopping"]))

    async def stop_turn(self, turn_id: str, chatbot_id: str) -> bool:
        return _true(await self._ask("chatd_stop_turn", id=turn_id, chatbot_id=chatbot_id))

    async def running_turn(self, session_id: str, chatbot_id: str) -> chatd.TurnRecord | None:
        found = await self._ask("chatd_running_turn", session_id=session_id, chatbot_id=chatbot_id)
        _raise(found)
        return _turn(found) if found else None

    async def get_turn(self, turn_id: str, chatbot_id: str) -> chatd.TurnRecord | None:
        found = await self._ask("chatd_get_turn", id=turn_id, chatbot_id=chatbot_id)
        return _turn(found) if found else None

    async def rate_turn(
        self, turn_id: str, session_id: str, rating: chatd.Rating | None, comment: str | None
    ) -> bool:
        return _true(
            await self._ask(
                "chatd_rate_turn",
                id=turn_id,
                session_id=session_id,
                rating=rating,
                comment=comment,
            )
        )

    async def usage_totals(
        self,
        *,
        by: chatd.UsageBy,
        chatbot_id: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
    ) -> Sequence[chatd.UsageTotal]:
        found = await self._ask(
            "chatd_usage_totals", by=by, chatbot_id=chatbot_id, since=since, until=until
        )
        return [chatd.UsageTotal(**total) for total in found]

    async def sweep(self) -> int:
        return int(await self._ask("chatd_sweep"))

    # Moving

    async def list_sessions(
        self,
        *,
        limit: int,
        after: str | None = None,
        chatbot_id: str | None = None,
        user_id: str | None = None,
    ) -> Sequence[chatd.Session]:
        found = await self._ask(
            "chatd_list_sessions", limit=limit, after=after, chatbot_id=chatbot_id, user_id=user_id
        )
        return [_session(session) for session in found]

    async def tally_session(self, session_id: str) -> chatd.Tally | None:
        counted = await self._tally.ask({"id": session_id})
        _raise(counted)
        return chatd.Tally(**counted) if counted else None

    async def export_session(self, session_id: str, *, place: int = 0) -> chatd.SessionPart | None:
        found = await self._export.ask(
            {
                "id": session_id,
                "place": place,
                "budget": chatd.PART_CHARS,
                "overhead": chatd.PART_MESSAGE_CHARS,
            }
        )
        _raise(found)
        if not found:
            return None
        session = _session(found["session"])
        return chatd.SessionPart(
            session=session,
            place=place,
            messages=[
                chatd.StoredMessage(id, role, content, datetime.fromisoformat(timestamp), turn_id)
                for id, role, content, timestamp, turn_id in found["messages"]
            ],
            turns=[_exported(turn, session) for turn in found["turns"]],
            more=found["more"],
        )

    async def import_session(self, part: chatd.SessionPart) -> None:
        session = part.session
        places = {message.id: place for place, message in enumerate(part.messages)}
        answer = await self._import.ask(
            {
                "id": session.id,
                "chatbot_id": session.chatbot_id,
                "channel": session.channel,
                "user_id": session.user_id,
                "metadata": dict(session.metadata),
                "created_at": session.created_at,
                "place": part.place,
                "messages": [[m.role, m.content, m.timestamp, m.turn_id] for m in part.messages],
                "turns": [_turn_args(turn, places) for turn in part.turns],
            }
        )
        if isinstance(answer, dict) and answer.get("error") == "session_conflict":
            raise chatd.ConflictError(f"session {session.id}: {answer['detail']}")
        _raise(answer)


def _raise(answer: Any) -> None:
    """Raises what a function answered that it was."""
    if not isinstance(answer, dict) or "error" not in answer:
        return
    match answer["error"]:
        case "not_found":
            raise chatd.NotFound
        case "conflict":
            raise chatd.ConflictError(f"a chatbot with this {answer['what']} exists already")
        case "turn_in_progress":
            raise chatd.TurnInProgress(turn_id=answer["turn_id"])
        case "idempotency_key_reused":
            raise chatd.IdempotencyKeyReused
        case _:
            raise chatd.StorageUnavailable(f"the database refused: {answer.get('detail')}")


def _true(answer: Any) -> bool:
    _raise(answer)
    return answer is True


def _stored(api_key_hash: bytes) -> str:
    return f"sha256:{api_key_hash.hex()}"


def _time(text: str | None) -> datetime | None:
    return None if text is None else datetime.fromisoformat(text)


def _chatbot_args(chatbot: chatd.Chatbot) -> dict[str, Any]:
    return {
        "id": chatbot.id,
        "name": chatbot.name,
        "model": chatbot.model,
        "api_key": _stored(chatbot.api_key_hash),
        "settings": chatbot.settings.to_json(),
        "created_at": chatbot.created_at,
        "updated_at": chatbot.updated_at,
    }


def _chatbot(found: Mapping[str, Any]) -> chatd.Chatbot:
    return chatd.Chatbot(
        id=found["id"],
        name=found["name"],
        model=found["model"],
        api_key_hash=bytes.fromhex(found["api_key"].removeprefix("sha256:")),
        settings=chatd.ChatbotSettings.from_json(found["settings"]),
        created_at=_time(found["created_at"]),
        updated_at=_time(found["updated_at"]),
    )


def _session(found: Mapping[str, Any]) -> chatd.Session:
    return chatd.Session(
        id=found["session_id"],
        chatbot_id=found["chatbot_id"],
        channel=found["channel"],
        user_id=found["user_id"],
        metadata=found["metadata"],
        created_at=_time(found["created_at"]),
    )


def _exported(found: Mapping[str, Any], session: chatd.Session) -> chatd.ExportedTurn:
    request_hash = found["request_hash"]
    return chatd.ExportedTurn(
        turn=_turn({**found, "chatbot_id": session.chatbot_id, "reply": None}),
        seq=found["seq"],
        rerunnable=found["rerunnable"],
        idempotency_key=found["idempotency_key"],
        request_hash=None if request_hash is None else bytes.fromhex(request_hash),
        reply_id=found["reply_id"],
    )


def _turn_args(exported: chatd.ExportedTurn, places: Mapping[int, int]) -> dict[str, Any]:
    """A turn as chatd_import_session takes it.

    :param places: where the part's messages stand in it, by id.
    """
    turn = exported.turn
    lost = turn.status is chatd.TurnStatus.RUNNING
    return {
        "turn_id": turn.id,
        "seq": exported.seq,
        "status": chatd.TurnStatus.INTERRUPTED if lost else turn.status,
        "label": turn.label,
        "idempotency_key": exported.idempotency_key,
        "request_hash": exported.request_hash.hex() if exported.request_hash is not None else None,
        "rerunnable": exported.rerunnable,
        "run": exported.turn.run,
        "reply_id": None if exported.reply_id is None else places.get(exported.reply_id),
        "model": turn.model,
        "provider": turn.provider,
        "finish_reason": turn.finish_reason,
        "error_code": "process_lost" if lost else turn.error_code,
        **_usage_args(turn.usage),
        "attempts": list(turn.attempts),
        "rating": turn.rating,
        "comment": turn.comment,
        "started_at": turn.started_at,
        "finished_at": turn.finished_at,
        "history_truncated": turn.history_truncated,
        "side": turn.side,
    }


def _usage_args(usage: chatd.Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.input_tokens,
        "output_tokens": usage.output_tokens,
        "cached_tokens": usage.cached_tokens,
        "reasoning_tokens": usage.reasoning_tokens,
        "cost_usd": usage.cost_usd,
    }


def _turn(found: Mapping[str, Any]) -> chatd.TurnRecord:
    return chatd.TurnRecord(
        id=found["turn_id"],
        session_id=found["session_id"],
        chatbot_id=found["chatbot_id"],
        status=chatd.TurnStatus(found["status"]),
        label=found["label"],
        reply=found["reply"],
        model=found["model"],
        provider=found["provider"],
        finish_reason=found["finish_reason"],
        error_code=found["error_code"],
        usage=chatd.Usage(
            found["input_tokens"],
            found["output_tokens"],
            found["cached_tokens"],
            found["reasoning_tokens"],
            found["cost_usd"],
        ),
        attempts=found["attempts"],
        rating=found["rating"],
        comment=found["comment"],
        started_at=_time(found["started_at"]),
        finished_at=_time(found["finished_at"]),
        history_truncated=found["history_truncated"],
        run=found["run"],
        side=found["side"],
    )


class PostgRESTCall:
    """Calls functions through PostgREST.

    The `postgrest` client makes each request (address, headers) and its errors; aiohttp sends it,
    which costs a tenth of what the client's own transport does (docs/adr/0009).

    :param rest_url: where PostgREST answers, without a slash at the end.
    :param headers: with the key.
    :param timeout: seconds for one attempt; repeating what failed may take as long again.
    """

    def __init__(self, rest_url: str, headers: Mapping[str, str], timeout: float) -> None:
        # Here, because only who uses Supabase should wait for it: 0.3 s of a start.
        import httpx  # noqa: PLC0415
        import postgrest  # noqa: PLC0415

        self._api_error = postgrest.APIError
        self._unused = httpx.AsyncClient()
        self._client = postgrest.AsyncPostgrestClient(
            rest_url, headers=dict(headers), http_client=self._unused
        )
        self._timeout = timeout
        self._requests: dict[str, Any] = {}
        self._http = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=32),
            timeout=aiohttp.ClientTimeout(total=timeout, sock_connect=timeout / 2),
            cookie_jar=aiohttp.DummyCookieJar(),
        )

    async def close(self) -> None:
        """Closes the connections."""
        await self._http.close()
        await self._unused.aclose()

    async def __call__(self, function: str, args: Mapping[str, Any]) -> Any:
        """The function's answer. Raises `StorageUnavailable`."""
        body = orjson.dumps(args)
        pauses = iter(() if function in _ONCE else RETRY_PAUSES)
        try:
            async with asyncio.timeout(self._timeout * 2):
                while True:
                    try:
                        return await self._send(function, body)
                    except _Transient as error:
                        pause = next(pauses, None)
                        if pause is None:
                            raise chatd.StorageUnavailable(f"supabase: {error}") from error
                        await asyncio.sleep(pause)
        except TimeoutError:
            raise chatd.StorageUnavailable(
                f"supabase: {function} took more than {self._timeout * 2:g} s"
            ) from None

    async def _send(self, function: str, body: bytes) -> Any:
        request = self._requests.get(function)
        if request is None:
            request = self._requests[function] = self._client.rpc(function, {}).request
        headers = {**request.headers, "Content-Type": "application/json"}
        data = body if len(body) < LARGE_BODY else io.BytesIO(body)
        try:
            async with self._http.request(
                request.http_method,
                request.path,
                data=data,
                headers=headers,
                allow_redirects=False,
            ) as response:
                answer = await response.read()
                if response.status < 300:
                    return orjson.loads(answer) if answer else None
                status = response.status
        except TimeoutError:
            raise _Transient(f"no answer in {self._timeout:g} s") from None
        except (aiohttp.ClientError, OSError) as error:
            raise _Transient(f"{type(error).__name__}: {error}") from error
        except orjson.JSONDecodeError:
            raise _Transient("an answer that is not JSON: check SUPABASE_URL") from None
        raise self._refused(status, answer)

    def _refused(self, status: int, answer: bytes) -> Exception:
        """What an error answer means, in the operator's words."""
        try:
            told = orjson.loads(answer)
            error = self._api_error(told if isinstance(told, dict) else {})
        except orjson.JSONDecodeError:
            error = self._api_error({})
        code, message = error.code or "", error.message or ""
        if status in (502, 503, 504, 520, 522, 524) or code in _TRANSIENT_CODES:
            return _Transient(f"HTTP {status} {code} {message}".rstrip())
        for codes, cure in _CURES.items():
            if code in codes:
                return chatd.StorageUnavailable(f"supabase: {code} {message}: {cure}")
        if status == 401:
            return chatd.StorageUnavailable(f"supabase: HTTP 401 {code} {message}: {_WRONG_KEY}")
        return chatd.StorageUnavailable(f"supabase: HTTP {status} {code} {message}")


RETRY_PAUSES = (0.05, 0.2, 0.5, 1.0)
"""Seconds before what failed on its way, and may be repeated without harm, is sent again."""

LARGE_BODY = 2**20
"""Bytes from which a body is sent in pieces, so that the event loop is not kept from others."""

_ONCE = {"chatd_add_chatbot"}
"""Repeated after an answer that was lost, it would call its own success a conflict."""

_TRANSIENT_CODES = {
    "PGRST000",  # no connection to the database
    "PGRST001",
    "PGRST002",  # the schema cache is being loaded
    "PGRST003",  # no connection free in PostgREST's pool
    "40001",  # serialization failure
    "40P01",  # deadlock
    "53300",  # too many connections
    "57P01",  # the database is shutting down
    "57P02",
    "57P03",  # the database is starting
    "08000",
    "08003",
    "08006",
}
_WRONG_KEY = "SUPABASE_KEY is not this project's secret key"
_CURES = {
    (
        "PGRST202",
        "PGRST205",
        "42883",
        "42P01",
    ): "run schema.sql in the SQL editor (`chatd migrate`); "
    "if it was run just now, PostgREST has yet to reload: NOTIFY pgrst, 'reload schema'",
    ("42501",): "a grant is missing: run schema.sql again, and use the secret key",
    ("PGRST301", "PGRST302", "PGRST303"): _WRONG_KEY,
}


class _Transient(Exception):
    """It may work when it is sent again."""


class SupabaseStorage(FunctionStorage):
    """`chatd.Storage` through PostgREST."""

    def __init__(self, call: PostgRESTCall) -> None:
        super().__init__(call)
        self._rest = call

    async def close(self) -> None:
        await self._rest.close()

    def _unanswered(self, detail: str) -> chatd.Finding:
        if "PGRST202" in detail:
            problem = f"schema.sql has not been run here, or is of an older version ({detail})"
            return chatd.Finding(problem, RUN_AGAIN)
        if "42501" in detail:
            return chatd.Finding(detail, RUN_AGAIN)
        if detail.endswith(_WRONG_KEY):
            return chatd.Finding(detail, "set SUPABASE_KEY to the project's secret key")
        if detail.endswith(RUN_AGAIN):
            return super()._unanswered(detail)
        return chatd.Finding(
            detail, "see that SUPABASE_URL is the project's address and the project is not paused"
        )


def _headers(key: str) -> dict[str, str]:
    """The headers that carry a key. Raises `PluginError` for one that cannot do what is needed.

    New keys (sb_secret_…) are no tokens: Supabase's gateway takes them in `apikey` alone. Legacy
    keys are JSON Web Tokens, and go in both headers.
    """
    if key.startswith("sb_secret_"):
        return {"apikey": key}
    if key.startswith("sb_publishable_"):
        raise chatd.PluginError(_PUBLIC_KEY.format("publishable"))
    role = _role(key)
    if role is None:
        raise chatd.PluginError(
            "supabase: SUPABASE_KEY is neither a secret key (sb_secret_…) nor a legacy service_role "
            "key. Copy one from the project's API keys"
        )
    if role in ("anon", "authenticated"):
        raise chatd.PluginError(_PUBLIC_KEY.format(role))
    return {"apikey": key, "Authorization": f"Bearer {key}"}


_PUBLIC_KEY = (
    "supabase: SUPABASE_KEY is the {} key, which anybody may have and which may read nothing. "
    "chatd runs on a server and needs the secret key (sb_secret_…, or the legacy service_role key)"
)


def _role(key: str) -> str | None:
    """The role that a legacy key stands for, by its own word; None when it is no such key."""
    parts = key.split(".")
    if len(parts) != 3:
        return None
    try:
        claims = json.loads(base64.urlsafe_b64decode(parts[1] + "=" * (-len(parts[1]) % 4)))
    except (ValueError, RecursionError):
        return None
    role = claims.get("role") if isinstance(claims, dict) else None
    return role if isinstance(role, str) else None


async def open_supabase(settings: Mapping[str, Any]) -> SupabaseStorage:
    """Makes a client from the settings; nothing is asked of the database yet."""
    url = settings["url"].rstrip("/") + settings.get("rest_path", "/rest/v1")
    return SupabaseStorage(
        PostgRESTCall(url, _headers(settings["key"]), settings.get("timeout", 4))
    )


_SETTINGS = {
    "$schema": "https://json-schema.org/draft/2020-12/schema",
    "type": "object",
    "additionalProperties": False,
    "required": ["url", "key"],
    "properties": {
        "url": {
            "type": "string",
            "pattern": "^https?://[^\\s?#]+$",
            "x-error": "must be the project's address, like https://abcdefghijkl.supabase.co",
            "description": "The project's address, like https://abcdefghijkl.supabase.co.",
            "x-place": "address",
        },
        "key": {
            "type": "string",
            "pattern": "^[!-~]+$",
            "x-error": "must be the project's secret key",
            "description": "The secret key (sb_secret_…), or the legacy service_role key.",
        },
        "rest_path": {
            "type": "string",
            "default": "/rest/v1",
            "pattern": "^(/[^\\s?#]*[^\\s?#/])?$",
            "x-error": "must be empty, or begin with a slash and not end with one",
            "description": "Where PostgREST is below `url`; empty for a PostgREST of your own.",
            "x-place": "address",
        },
        "timeout": {
            "type": "number",
            "exclusiveMinimum": 0,
            "maximum": 60,
            "default": 4,
            "description": "Seconds for one request; with repetitions it may take twice as long.",
        },
    },
}


@chatd.hookimpl
def chatd_register_storage(register: chatd.StorageRegister) -> None:
    register.add("supabase", open_supabase, _SETTINGS, "a Supabase project, through PostgREST")
