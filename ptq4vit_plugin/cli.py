"""The command `ptq4vit`.

Everything heavy (torch, NNCF, timm) is imported inside the commands, so that `--help` is instant.
"""

import errno
import json
import logging
import signal
import sys
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from . import registry
from .errors import PTQ4ViTError, RegistryError


def _say(line: str) -> None:
    """Write to standard error, if it takes anything: the exit code tells the same."""
    with suppress(OSError):
        typer.echo(line, err=True)


class _Group(typer.core.TyperGroup):
    """Turns what a user can cause into one line on stderr and an exit code."""

    def invoke(self, ctx: typer.Context) -> Any:
        # NNCF imports torch's extension builder, which warns wherever there is a compiler for a GPU
        # but no GPU: nothing to do with what the user asked.
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
        try:
            return super().invoke(ctx)
        except PTQ4ViTError as error:
            _say(f"error: {error}")
            raise typer.Exit(2) from error
        except KeyboardInterrupt as error:
            _say("interrupted")
            raise typer.Exit(130) from error
        except OSError as error:
            # A place that the machine does not give, whichever command asked for it.
            place = "standard output" if error.errno == errno.ENOSPC else None
            if error.filename is not None:
                place = f"'{error.filename}'"
            if place is None:
                raise
            _say(f"error: {place}: {error.strerror}")
            raise typer.Exit(2) from error


app = typer.Typer(
    name="ptq4vit",
    cls=_Group,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="""Quantize timm vision transformers to 2-8 bits without retraining.

A config says which model, which images and which algorithm:

```yaml
model: {name: vit_small_patch16_224, pretrained: true}
data: {source: folder, root: imagenet}
compression: {algorithm: ptq4vit, weights: {bits: 6}, activations: {bits: 6}}
output: runs/vit-small-w6a6
```

Then:

- `ptq4vit plan config.yaml` shows what would be quantized, and how

- `ptq4vit quantize config.yaml` calibrates, evaluates and saves

- `ptq4vit export runs/vit-small-w6a6/model.safetensors --format onnx` writes it for a runtime

- `ptq4vit list` shows every algorithm, quantizer and data source
""",
)

ConfigPath = Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML or JSON config.")]
CheckpointPath = Annotated[
    Path,
    typer.Argument(
        metavar="CHECKPOINT", help="A .safetensors file, a run folder, or hf-hub:user/name."
    ),
]


@app.command()
def quantize(
    config: ConfigPath,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for results, instead of the config's."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
    log_json: Annotated[
        bool, typer.Option("--log-json", help="Print one JSON object per event and line instead.")
    ] = False,
) -> None:
    """Calibrate, evaluate and save a quantized model.

    Writes the checkpoint, the measurements and the resolved config into the output folder. A run
    that was interrupted continues when the command is repeated.

    Example: `ptq4vit quantize config.yaml --output runs/w6a6`

    Several processes: `torchrun --nproc-per-node 2 -m ptq4vit_plugin quantize config.yaml`
    """
    from . import commands
    from .config import read

    commands.quantize(read(config), output, quiet, log_json)


@app.command()
def evaluate(
    checkpoint: CheckpointPath,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="Take data and evaluation from this config instead."),
    ] = None,
) -> None:
    """Measure a saved model: top-1, top-5, loss, and agreement with the float model.

    Without `--config`, evaluates on the data that the checkpoint was made with.

    Example: `ptq4vit evaluate runs/w6a6/model.safetensors`
    """
    from . import commands
    from .config import read

    commands.evaluate(checkpoint, read(config) if config else None)


@app.command()
def describe(checkpoint: CheckpointPath) -> None:
    """Show every op of a saved model: quantizers, bits, scales, objective before and after.

    Example: `ptq4vit describe runs/w6a6/model.safetensors`
    """
    from . import commands

    commands.describe(checkpoint)


@app.command()
def export(
    checkpoint: CheckpointPath,
    format: Annotated[
        str, typer.Option("--format", "-f", help="integer, openvino, onnx, or any in `list`.")
    ] = "integer",
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", help="File to write, or a folder, instead of beside the checkpoint."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="Take the images to compare on from this config."),
    ] = None,
    min_sqnr: Annotated[
        float,
        typer.Option(help="Logit SQNR in dB to reach against the simulated model."),
    ] = 10.0,
    per_op: Annotated[
        bool, typer.Option("--per-op", help="Compare the output of every op as well.")
    ] = False,
    option: Annotated[
        list[str] | None,
        typer.Option("--set", help="An option of the format, such as allow_float=true."),
    ] = None,
) -> None:
    """Write a saved model for a runtime, run the result and compare it with the saved model.

    The comparison, on the calibration images, goes into `results.json` beside the written file.

    Example: `ptq4vit export runs/w8a8/model.safetensors --format openvino`
    """
    from . import commands
    from .config import read

    commands.export(
        checkpoint, format, output, read(config) if config else None, min_sqnr, per_op, option or []
    )


@app.command()
def run(
    model: Annotated[
        Path, typer.Argument(metavar="MODEL", help="What `export` wrote: .xml, .onnx, .safetensors")
    ],
    images: Annotated[list[Path], typer.Argument(metavar="IMAGE...", help="Image files.")],
) -> None:
    """Classify image files with an exported model: the five most probable classes.

    Example: `ptq4vit run runs/w8a8/model-openvino.xml cat.jpg`
    """
    from . import commands

    commands.run(model, images)


@app.command()
def plan(config: ConfigPath) -> None:
    """Show what a config would quantize, how, and what it leaves out and why, without calibrating.

    Example: `ptq4vit plan config.yaml`
    """
    from . import commands
    from .config import read

    commands.plan(read(config))


@app.command()
def sweep(
    file: Annotated[Path, typer.Argument(metavar="SWEEP", help="YAML or JSON sweep file.")],
    only: Annotated[
        list[str] | None,
        typer.Option("--only", help="Keep some cells: axis=pattern,pattern; may be repeated."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option("--set", help="Set a config key in all cells: key=value; may be repeated."),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for results, instead of the sweep file's."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Quantize and evaluate every combination of models, algorithms, bits and any config key.

    Appends a line per finished combination to `results.jsonl` in the sweep's output folder. Started
    again, it goes on where it was stopped; under `torchrun` the processes share the work.

    Examples: `ptq4vit sweep examples/imagenet/test_all.yaml --set data.root=/data/imagenet`,
    `torchrun --nproc-per-node 4 -m ptq4vit_plugin sweep sweep.yaml`
    """
    from . import commands

    commands.sweep(file, only or (), overrides or (), output, quiet)


class _Format(str, Enum):
    markdown = "markdown"
    csv = "csv"
    latex = "latex"


@app.command()
def table(
    file: Annotated[Path, typer.Argument(metavar="RESULTS", help="A sweep's results.jsonl.")],
    form: Annotated[_Format, typer.Option("--format", help="How to write it.")] = _Format.markdown,
    published: Annotated[
        Path | None,
        typer.Option("--published", help="CSV file of published numbers to show beside ours."),
    ] = None,
) -> None:
    """Show a sweep's results, published numbers beside them with the difference.

    Example: `ptq4vit table runs/imagenet/results.jsonl --published examples/imagenet/published.csv`
    """
    from . import commands

    commands.table(file, form.value, published)


@app.command()
def report(
    folder: Annotated[Path, typer.Argument(metavar="RUN", help="A run's output folder.")],
) -> None:
    """Write `report.html` of a run: accuracy, which ops hurt, distributions, search curves.

    `quantize` and `sweep` write it by themselves. One page, nothing outside it is loaded.

    Example: `ptq4vit report runs/w6a6`
    """
    from . import commands

    commands.report(folder)


@app.command("list")
def list_registered() -> None:
    """Show every registered algorithm, quantizer, exporter and data source, and who provides it.

    Any installed distribution can add its own through an entry point in the group
    `ptq4vit_plugin.algorithms`, `.quantizers`, `.exporters` or `.datasets`.

    Example: `ptq4vit list`
    """
    from rich import box
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    table = Table("name", "distribution", "options", box=box.SIMPLE_HEAD)
    for group in registry.GROUPS:
        entries = registry.entries(group)
        table.add_section()
        table.add_row(f"[bold]{group}[/bold]", "", "" if entries else "none registered")
        for entry in entries:
            owner = f"{entry.distribution} {entry.version}"
            table.add_row(*map(escape, (f"  {entry.name}", owner, _options(group, entry.name))))
    # In a pipe there is no window to fit: one line for each thing, so that grep finds whole rows.
    Console(width=None if sys.stdout.isatty() else 1000).print(table)


@app.command()
def config(
    file: Annotated[
        Path | None, typer.Argument(metavar="CONFIG", help="YAML or JSON config to check.")
    ] = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of configs, for editors.")
    ] = False,
) -> None:
    """Check a config and print it with every default filled in, or print the JSON schema.

    Examples: `ptq4vit config config.yaml`, `ptq4vit config --schema > ptq4vit.schema.json`
    """
    if schema == (file is not None):
        raise typer.BadParameter("give either a config or --schema")

    from . import config as configs

    if schema:
        found = configs.schema(report=lambda message: typer.echo(f"left out: {message}", err=True))
        typer.echo(json.dumps(found, indent=2))
    else:
        typer.echo(configs.yaml_text(configs.read(file).dump()), nl=False)


def _options(group: str, name: str) -> str:
    try:
        options = registry.options(group, registry.load(group, name))
    except (RegistryError, TypeError, ValueError) as error:  # the latter: it has no signature
        cause = error.__cause__ or error
        return f"broken: {type(cause).__name__}: {cause}"
    return ", ".join(
        f"{option}={default}" if isinstance(default, (str, int, float)) else option
        for option, default in options.items()
    )


def main() -> None:
    """Entry point of the command `ptq4vit`."""
    # What ends a job (a scheduler, a container, `timeout`) is as orderly an end as an interrupt.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    app(prog_name="ptq4vit")
