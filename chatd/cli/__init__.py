"""The command `chatd`: its exit codes are 0 for done, 1 for a failure told in words, 2 for usage."""

from __future__ import annotations

from typing import Any

import click

import chatd
from chatd.app import load
from chatd.cli import bots, chat, init, plugins, storage
from chatd.cli.check import check
from chatd.cli.common import CliContext, configured, reports_errors
from chatd.cli.data import erase, export, retention
from chatd.cli.doctor import doctor
from chatd.cli.serve import serve
from chatd.cli.usage import usage
from chatd.errors import ChatdError


class _Cli(click.Group):
    """The group, which learns the plugins' commands only when its own do not have the name."""

    _asked = False

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if (own := super().get_command(ctx, name)) is not None:
            return own
        self._ask()
        return super().get_command(ctx, name)

    def list_commands(self, ctx: click.Context) -> list[str]:
        self._ask()
        return super().list_commands(ctx)

    def invoke(self, ctx: click.Context) -> Any:
        # Here, for the commands of plugins; chatd's own tell theirs.
        return reports_errors(super().invoke)(ctx)

    def _ask(self) -> None:
        if not self._asked:
            self._asked = True
            try:
                _, registry = load(configured(None))
                registry.add_commands(self)
            except ChatdError as error:
                click.echo(f"Commands of plugins are left out: {error}", err=True)


@click.group(cls=_Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(chatd.__version__, prog_name="chatd")
@click.pass_context
def main(ctx: click.Context) -> None:
    """A chatbot back end: chats for many chatbots, over HTTP."""
    ctx.obj = CliContext()


main.add_command(serve)
main.add_command(check)
main.add_command(plugins.plugins)
main.add_command(bots.bots)
main.add_command(chat.chat)
main.add_command(init.init)
main.add_command(doctor)
main.add_command(storage.storage)
main.add_command(usage)
main.add_command(export)
main.add_command(erase)
main.add_command(retention)

__all__ = ["main"]
