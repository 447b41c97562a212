"""What docs/observability.md, the dashboard and the alerts name is there, and nothing else is."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from chatd.errors import ProviderErrorKind
from chatd.metrics.families import FAMILIES
from tests.support import Served
from tests.test_metrics import WITH_TOKEN, Numbers, Serve, numbers

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
PAGE = (DOCS / "observability.md").read_text()
DASHBOARD = (DOCS / "observability" / "grafana.json").read_text()
ALERTS = (DOCS / "observability" / "alerts.yaml").read_text()

_NAME = re.compile(r"\b(?:chatd|process)_[a-z_]+\b")
_GROUPED = re.compile(r"\bby \(([a-z_, ]+)\)")
LABELS = {family.name: set(family.labels) for family in FAMILIES}
SUFFIXES = {"histogram": ("_bucket", "_sum", "_count"), "counter": ("",), "gauge": ("",)}
NAMES = {family.name + end: family for family in FAMILIES for end in SUFFIXES[family.kind]}


def queries() -> list[str]:
    """Every query of the dashboard and of the alerts."""
    panels = json.loads(DASHBOARD)["panels"]
    shown = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    rules = [rule["expr"] for group in yaml.safe_load(ALERTS)["groups"] for rule in group["rules"]]
    assert len(shown) > 30 and len(rules) > 5
    return [*shown, *rules]


async def after_some_turns(serve: Serve) -> tuple[Served, Numbers]:
    served = await serve(WITH_TOKEN)
    bot = await served.add_bot()
    session = await served.session(bot)
    await served.chat(bot, session, "hi")
    await served.chat(bot, session, "hi", stream=True)
    return served, await numbers(served)


async def test_every_query_names_what_metrics_answers(serve: Serve) -> None:
    _, told = await after_some_turns(serve)
    answered = set(re.findall(r"^# TYPE (\w+) ", told.text, re.MULTILINE))
    assert answered == set(LABELS)
    for query in queries():
        names = _NAME.findall(query)
        assert names, query
        for name in names:
            assert name in NAMES and NAMES[name].name in answered, query


def test_every_query_groups_by_labels_that_are_there() -> None:
    for query in queries():
        known = set[str]().union(*(LABELS[NAMES[name].name] for name in _NAME.findall(query)))
        for group in _GROUPED.findall(query):
            assert set(group.split(", ")) <= known | {"le"}, query
        for label in re.findall(r"[{,]\s*([a-z_]+)=", query):
            assert label in known | {"job"}, query


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_every_metric_is_documented_with_its_labels_and_shown(family: Any) -> None:
    (row,) = [line for line in PAGE.splitlines() if re.match(rf"\| .*`{family.name}`.* \|", line)]
    labels = re.findall(r"`([a-z_]+)`", row.split("|")[2])
    assert set(labels) == set(family.labels)
    assert any(family.name in query for query in queries())


def test_every_name_on_the_page_is_there() -> None:
    assert {name for name in _NAME.findall(PAGE) if name not in LABELS} == set()


def test_every_way_in_which_an_attempt_ends_is_documented() -> None:
    (row,) = [line for line in PAGE.splitlines() if line.startswith("| `chatd_attempts_total`")]
    assert [kind for kind in ProviderErrorKind if f"`{kind}`" not in row] == []


def test_panels_of_the_dashboard_do_not_overlap() -> None:
    taken = set()
    for panel in json.loads(DASHBOARD)["panels"]:
        at = panel["gridPos"]
        cells = {
            (x, y)
            for x in range(at["x"], at["x"] + at["w"])
            for y in range(at["y"], at["y"] + at["h"])
        }
        assert not cells & taken, panel["title"]
        assert at["x"] + at["w"] <= 24
        taken |= cells


def test_every_attribute_of_a_span_is_documented() -> None:
    sources = [ROOT / "chatd" / name for name in ("turn_spans.py", "timed_storage.py")]
    sources.append(ROOT / "chatd" / "handlers" / "base.py")
    text = "".join(source.read_text() for source in sources)
    names = set(re.findall(r'"((?:gen_ai|chatd|http|db)\.[a-z_.]+)"', text))
    assert len(names) > 20
    assert [name for name in sorted(names) if f"`{name}`" not in PAGE] == []
