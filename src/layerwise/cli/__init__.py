"""The command line. Each command has a module of its own; torch is imported only inside a command that runs."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from layerwise import __version__
from layerwise.cli import bench, data, demo, eval, generate, models, search, train

app = typer.Typer(
    name="layerwise",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(f"layerwise {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Spend transformer layers where they matter."""


app.command("demo")(demo.run)
app.command("generate")(generate.run)
app.command("models")(models.run)
app.command("data")(data.data)
app.command("eval")(eval.run)
app.command("search")(search.run)
app.add_typer(train.app, name="train")
app.add_typer(bench.app, name="bench")

# typer brings its own copy of click, so the class that all usage errors share has no public name.
_UsageError = next(kind for kind in typer.BadParameter.__mro__ if kind.__name__ == "ClickException")


def main() -> None:
    """Run a command. A mistake of the user's is one line on stderr and exit code 2; Ctrl-C is 130."""
    try:
        status = app(standalone_mode=False)
    except typer.Exit as stop:
        status = stop.exit_code
    except _UsageError as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            print(error.format_message(), file=sys.stderr)
            sys.exit(2)
        _fail(error.format_message())
    except (ValueError, OSError) as error:
        _fail(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
    except (KeyboardInterrupt, typer.Abort):
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
    sys.exit(status if isinstance(status, int) else 0)


def _fail(line: str) -> None:
    print(f"layerwise: {line}", file=sys.stderr)
    sys.exit(2)
