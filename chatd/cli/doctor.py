"""`chatd doctor`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from chatd.cli.common import asynchronous, config_option, configured, json_option
from chatd.cli.places import NoPlace, Place, place_in
from chatd.errors import ChatdError, RequestError
from chatd.storage import Finding


@click.command()
@config_option
@json_option
@asynchronous
async def doctor(config_path: Path | None, as_json: bool) -> None:
    """Say what is wrong with the database, and what to do; exits with 1 when something is."""
    place = place_in(configured(config_path))
    findings = await _findings(place)
    if as_json:
        found = [dataclasses.asdict(finding) for finding in findings]
        click.echo(json.dumps({"storage": str(place), "findings": found}))
    elif findings:
        click.echo(f"{place}:")
        for finding in findings:
            click.echo(f"- {finding.problem}")
            click.echo(f"  {finding.cure}")
    else:
        click.echo(f"Nothing is wrong with {place}.")
    if findings:
        sys.exit(1)


async def _findings(place: Place) -> Sequence[Finding]:
    """What the storage says, or why it says nothing."""
    mend = "mend that, then run `chatd doctor` again"
    try:
        place.require_files()
        async with place.opened() as storage:
            if findings := await storage.diagnose():
                return findings
            await storage.check()
    except NoPlace as error:
        return [Finding(f"{error} yet", "`chatd serve` makes it, or name another in the settings")]
    except RequestError as error:
        return [Finding(error.detail, mend)]
    except ChatdError as error:
        return [Finding(str(error), mend)]
    except Exception as error:
        return [Finding(f"the plugin of {place} failed: {type(error).__name__}: {error}", mend)]
    return []
