"""The typer application and the parts that all commands share."""

from __future__ import annotations

import importlib.metadata
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from lora_fx.errors import LoraFxError
from lora_fx.tools.cli import console
from lora_fx.tools.cli.adapter_commands import combine, convert, extract, migrate, resize
from lora_fx.tools.cli.model_commands import inspect, merge, plan, rewrite, verify, visualize
from lora_fx.tools.cli.onnx_commands import export, export_adapter, generate, run
from lora_fx.tools.cli.options import TypedError, as_options
from lora_fx.tools.cli.project_commands import bench, demo, doctor, zoo

__all__ = ["app"]

ERROR_EXIT = 2
"""Exit code for every error of lora_fx, as typer's for a wrong command line."""

COMMANDS = (
    plan,
    rewrite,
    merge,
    extract,
    convert,
    resize,
    combine,
    migrate,
    export,
    export_adapter,
    visualize,
    run,
    generate,
    verify,
    inspect,
    doctor,
    demo,
    bench,
    zoo,
)


class Commands(TyperGroup):
    """Group of all commands, which takes ``--debug`` anywhere and prints errors of lora_fx as one message."""

    def parse_args(self, ctx: Any, args: list[str]) -> Any:
        """Move ``--debug`` to where typer expects it."""
        if "--debug" in args:
            args = ["--debug", *(arg for arg in args if arg != "--debug")]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        """Run the chosen command, and turn its errors into messages and exit codes."""
        try:
            return super().invoke(ctx)
        except LoraFxError as error:
            if ctx.params.get("debug"):
                raise
            message = str(error)
            if not isinstance(error, TypedError):
                message = as_options(message, self.commands.values())
            console.say_error(message)
            raise typer.Exit(ERROR_EXIT) from error


app = typer.Typer(
    name="lora-fx",
    cls=Commands,
    help="LoRA for any PyTorch model: look at a model, adapt it, merge, export to ONNX, run.\n\n"
    "A MODEL is named package.module:callable (called without arguments), hf:FOLDER (a local "
    "folder of transformers, or a .gguf file), timm:NAME or torchvision:NAME (both untrained). "
    "Nothing is downloaded, and only pictures are overwritten without --force.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        installed = importlib.metadata.version("lora-fx")
        console.say(f"lora-fx {installed}")
        raise typer.Exit


@app.callback()
def common(
    debug: Annotated[
        bool,
        typer.Option("--debug", help="Show tracebacks and all of the log; may stand anywhere."),
    ] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    """Set the options that precede the command."""
    console.log_to_stderr(debug=debug)


for _command in COMMANDS:
    app.command()(_command)
