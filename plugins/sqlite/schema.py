"""The tables of the file, and how an older one becomes a newer."""

from __future__ import annotations

MIGRATIONS = (
    """
    CREATE TABLE chatbots (
        id TEXT PRIMARY KEY,
        api_key TEXT NOT NULL UNIQUE,
        model_name TEXT NOT NULL,
        name TEXT NOT NULL,
        settings TEXT NOT NULL,
        created_at REAL NOT NULL DEFAULT (unixepoch('subsec')),
        updated_at REAL NOT NULL DEFAULT (unixepoch('subsec'))
    ) STRICT;
    CREATE TABLE sessions (
        session_id TEXT PRIMARY KEY,
        chatbot_id TEXT NOT NULL REFERENCES chatbots(id) ON DELETE CASCADE,
        created_at REAL NOT NULL DEFAULT (unixepoch('subsec')),
        channel TEXT,
        user_id TEXT,
        metadata TEXT NOT NULL DEFAULT '{}'
    ) STRICT;
    CREATE INDEX sessions_of_chatbot ON sessions (chatbot_id);
    CREATE TABLE turns (
        turn_id TEXT PRIMARY KEY,
        seq INTEGER NOT NULL,
        session_id TEXT NOT NULL REFERENCES sessions(session_id) ON DELETE CASCADE,
        status TEXT NOT NULL,
        label TEXT,
        idempotency_key TEXT,
        request_hash BLOB,
        lease_until REAL NOT NULL,
        rerunnable INTEGER NOT NULL DEFAULT 0,
        run INTEGER NOT NULL DEFAULT 1,
        reply_id INTEGER,
        model TEXT,
        provider TEXT,
        finish_reason TEXT,
        error_code TEXT,
        input_tokens INTEGER,
        output_tokens INTEGER,
        cached_tokens INTEGER,
        reasoning_tokens INTEGER,
        cost_usd REAL,
        attempts TEXT NOT NULL DEFAULT '[]',
        rating TEXT,
        comment TEXT,
        started_at REAL NOT NULL DEFAULT (unixepoch('subsec')),
        finished_at REAL
    ) STRICT, WITHOUT ROWID;
    CREATE UNIQUE INDEX turns_of_session ON turns (session_id, seq);
    CREATE UNIQUE INDEX one_running_turn ON turns (session_id) WHERE status = 'running';
    CREATE UNIQUE INDEX one_turn_per_key ON turns (session_id, idempotency_key)
        WHERE idempotency_key IS NOT NULL;
    CREATE INDEX running_leases ON turns (lease_until) WHERE status = 'running';
    CREATE TABLE conversations (
        id INTEGER PRIMARY KEY AUTOINCREMENT,
        session_id TEXT NOT NULL REFERENCES sessions(session_id) ON DELETE CASCADE,
        role TEXT NOT NULL,
        content TEXT NOT NULL,
        timestamp REAL NOT NULL DEFAULT (unixepoch('subsec')),
        turn_id TEXT
    ) STRICT;
    CREATE INDEX conversations_of_session ON conversations (session_id, id);
    """,
    """
    ALTER TABLE turns ADD COLUMN history_truncated INTEGER NOT NULL DEFAULT 0;
    ALTER TABLE turns ADD COLUMN stop_asked INTEGER NOT NULL DEFAULT 0;
    """,
    """
    ALTER TABLE turns ADD COLUMN side TEXT;
    CREATE INDEX turns_by_start ON turns (started_at);
    CREATE TABLE usage_of_erased (
        chatbot_id TEXT NOT NULL REFERENCES chatbots(id) ON DELETE CASCADE,
        day TEXT NOT NULL,
        model TEXT,
        side TEXT,
        turns INTEGER NOT NULL,
        completed INTEGER NOT NULL,
        failed INTEGER NOT NULL,
        stopped INTEGER NOT NULL,
        interrupted INTEGER NOT NULL,
        input_tokens INTEGER,
        output_tokens INTEGER,
        cached_tokens INTEGER,
        reasoning_tokens INTEGER,
        cost_usd REAL,
        unknown_cost INTEGER NOT NULL,
        rated_up INTEGER NOT NULL,
        rated_down INTEGER NOT NULL
    ) STRICT;
    CREATE UNIQUE INDEX usage_of_erased_day ON usage_of_erased
        (chatbot_id, day, ifnull(model, ''), ifnull(side, ''));
    """,
    """
    CREATE INDEX failed_turns ON turns (session_id, turn_id) WHERE status = 'failed';
    DROP INDEX sessions_of_chatbot;
    CREATE INDEX sessions_of_chatbot ON sessions (chatbot_id, session_id);
    CREATE INDEX sessions_by_age ON sessions (chatbot_id, created_at, session_id);
    CREATE INDEX sessions_of_user ON sessions (user_id, session_id) WHERE user_id IS NOT NULL;
    """,
    """
    DROP INDEX running_leases;
    """,
)
"""Forward migrations: the n-th brings a database of version n to n + 1. Never edit, only add."""
