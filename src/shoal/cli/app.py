"""The Typer application: commands by discovery, errors as one block."""

from __future__ import annotations

import importlib
import inspect
import os
import pkgutil
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from shoal.cli.console import explain

# After Ctrl-C the same command goes on from what these have stored.
_STORING = ("run", "compare", "leaderboard", "reproduce")
_NO_COMMANDS = ("main", "app", "options", "console", "listing", "progress")


class Group(TyperGroup):
    """Turns errors into one clear block and an exit code."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except (typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except (Exception, KeyboardInterrupt) as error:
            # Typer's own errors (wrong options) know how to show themselves.
            if os.environ.get("SHOAL_DEBUG") or hasattr(error, "show"):
                raise
            raise typer.Exit(explain(error, stored=ctx.invoked_subcommand in _STORING)) from None


app = typer.Typer(
    name="shoal",
    cls=Group,
    help="Decentralised AI: peer programs in simulation on thousands of virtual peers, "
    "and on real machines.",
    epilog="Start with `shoal list`, then `shoal show NAME`, then `shoal reproduce NAME`.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        from shoal.lab.environment import version

        typer.echo(f"shoal {version()}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Options before the command."""


def _register() -> None:
    """Enrol every module beside this one that holds a function `command`."""
    import shoal.cli as package

    for module in pkgutil.iter_modules(package.__path__):
        if module.name not in _NO_COMMANDS and not module.name.startswith("_"):
            function = importlib.import_module(f"shoal.cli.{module.name}").command
            name = module.name.replace("_", "-")
            help, _, examples = (inspect.getdoc(function) or "").partition("\n\nExamples:\n")
            # \b keeps the lines of the examples as they are written.
            text = f"{help}\n\n\b\nExamples:\n{examples}" if examples else help
            app.command(name, help=text)(function)


_register()
