"""What turns took: its sums, and what stays of erased sessions."""

from __future__ import annotations

from datetime import datetime
from typing import Any

import chatd

from .rows import seconds_of

_FIGURES = (
    "turns, completed, failed, stopped, interrupted, input_tokens, output_tokens, cached_tokens,"
    " reasoning_tokens, cost_usd, unknown_cost, rated_up, rated_down"
)
"""The columns of `usage_of_erased` that are sums, in the order of `chatd.UsageTotal`."""

_DAY = "date(CAST(t.started_at AS INTEGER), 'unixepoch')"
_COUNTED = """
    count(*) AS turns,
    count(*) FILTER (WHERE t.status = 'completed') AS completed,
    count(*) FILTER (WHERE t.status = 'failed') AS failed,
    count(*) FILTER (WHERE t.status = 'stopped') AS stopped,
    count(*) FILTER (WHERE t.status IN ('interrupted', 'running')) AS interrupted,
    sum(t.input_tokens) AS input_tokens, sum(t.output_tokens) AS output_tokens,
    sum(t.cached_tokens) AS cached_tokens, sum(t.reasoning_tokens) AS reasoning_tokens,
    sum(t.cost_usd) AS cost_usd,
    count(*) FILTER (WHERE t.cost_usd IS NULL AND NOT t.rerunnable) AS unknown_cost,
    count(*) FILTER (WHERE t.rating = 'up') AS rated_up,
    count(*) FILTER (WHERE t.rating = 'down') AS rated_down
"""
"""`_FIGURES` of turns t."""

KEEP_USAGE = f"""
    INSERT INTO usage_of_erased AS u (chatbot_id, day, model, side, {_FIGURES})
    SELECT s.chatbot_id, {_DAY}, t.model, t.side, {_COUNTED}
    FROM sessions s JOIN turns t ON t.session_id = s.session_id
    WHERE s.session_id = ? AND s.chatbot_id = ?
    GROUP BY s.chatbot_id, {_DAY}, t.model, t.side
    ON CONFLICT (chatbot_id, day, ifnull(model, ''), ifnull(side, '')) DO UPDATE SET
""" + ", ".join(
    # What is unknown on both sides stays so.
    f"{name} = coalesce(u.{name} + excluded.{name}, u.{name}, excluded.{name})"
    for name in _FIGURES.split(", ")
)


def usage_query(
    by: chatd.UsageBy, chatbot_id: str | None, since: datetime | None, until: datetime | None
) -> tuple[str, dict[str, Any]]:
    """The query of `usage_totals`, and what it is given."""
    values = {"bot": chatbot_id, "since": seconds_of(since), "until": seconds_of(until)}
    # Without a +, SQLite would read all of a chatbot's turns for a day's.
    bot = "s.chatbot_id" if since is None else "+s.chatbot_id"
    ended = {"bot": f"{bot} = :bot", "since": "t.started_at >= :since"}
    ended["until"] = "t.started_at < :until"
    erased = {"bot": "e.chatbot_id = :bot", "since": "unixepoch(e.day) >= :since"}
    erased["until"] = "unixepoch(e.day) < :until"
    given = [name for name, value in values.items() if value is not None]
    key = {"day": _DAY, "model": "t.model", "side": "t.side"}[by]
    sums = ", ".join(f"sum({name})" for name in _FIGURES.split(", "))
    sql = f"""
        SELECT chatbot_id, key, {sums} FROM (
            SELECT s.chatbot_id, {key} AS key, {_COUNTED}
            FROM turns t JOIN sessions s ON s.session_id = t.session_id
            WHERE {" AND ".join(["t.status <> 'running'", *(ended[name] for name in given)])}
            GROUP BY s.chatbot_id, {key}
            UNION ALL
            SELECT e.chatbot_id, e.{by}, {_FIGURES} FROM usage_of_erased e
            WHERE {" AND ".join(["true", *(erased[name] for name in given)])})
        GROUP BY chatbot_id, key ORDER BY chatbot_id, key NULLS LAST
    """
    return sql, {name: values[name] for name in given}
