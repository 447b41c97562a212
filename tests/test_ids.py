"""Ids: of their form, and never the same twice, in no thread and no process."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

from chatd.domain import canonical_id, new_id, new_turn_id, random_bytes


def test_a_turns_id_is_a_uuid_of_version_7() -> None:
    ids = [new_turn_id() for _ in range(1000)]
    assert {UUID(id).version for id in ids} == {7}
    assert {UUID(id).variant for id in ids} == {UUID(new_id()).variant}
    assert [canonical_id(id) for id in ids] == ids
    assert len(set(ids)) == len(ids)


def test_threads_do_not_get_the_same_bytes() -> None:
    with ThreadPoolExecutor(8) as threads:
        taken = list(threads.map(lambda _: [random_bytes() for _ in range(500)], range(16)))
    given = [each for some in taken for each in some]
    assert {len(each) for each in given} == {16}
    assert len(set(given)) == len(given) == 8000


def test_a_child_does_not_get_its_parents_bytes() -> None:
    random_bytes()
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, random_bytes())
        os._exit(0)
    os.waitpid(child, 0)
    childs = os.read(read, 100)
    os.close(read)
    os.close(write)
    assert len(childs) == 16
    assert childs not in [random_bytes() for _ in range(600)]
