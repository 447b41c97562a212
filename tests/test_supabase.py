"""Supabase and PostgreSQL: the contract, over real servers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

import pytest
from chatd_plugins.postgres import open_postgres
from chatd_plugins.supabase import open_supabase

from chatd.storage import Storage
from chatd.testing import StorageConformance
from tests.postgres import Supabase, jwt


class TestSupabase(StorageConformance):
    @pytest.fixture
    def open_storage(self, database: Supabase) -> Callable[[], Awaitable[Storage]]:
        database.empty()

        async def open() -> Storage:
            key = jwt("service_role")
            return await open_supabase({"url": database.postgrest.url, "rest_path": "", "key": key})

        return open


class TestPostgres(StorageConformance):
    @pytest.fixture
    def open_storage(self, database: Supabase) -> Callable[[], Awaitable[Storage]]:
        database.empty()

        async def open() -> Storage:
            return await open_postgres({"url": database.postgres.url})

        return open
