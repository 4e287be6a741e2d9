"""The command ``bench convert``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bench.errors import BenchError, shown

app = typer.Typer(rich_markup_mode=None)


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="A pickled checkpoint: .pth.tar, .pt, .pth, .ckpt or .bin.")],
    to: Annotated[Path, typer.Option(help="NAME.safetensors to write; a folder for a diffusion model.")],
    as_: Annotated[
        str,
        typer.Option(
            "--as",
            help="A timm model, or tensors: keep the names and write no config. Default: recognise the network.",
        ),
    ] = "",
    mean: Annotated[str, typer.Option(help="Of the classifier's input in [0, 1]: three numbers with commas.")] = "",
    std: Annotated[str, typer.Option(help="As --mean.")] = "",
    flags: Annotated[
        str, typer.Option(help="Of a diffusion model: the model and diffusion flags that its authors published.")
    ] = "",
) -> None:
    """Convert a pickled checkpoint to safetensors. It is read weights-only: no code in it is run."""
    from bench.models.convert import Stated
    from bench.models.convert import convert as convert_file

    for line in convert_file(file, to, Stated(as_, _numbers("--mean", mean), _numbers("--std", std), flags)):
        print(shown(line))


def _numbers(option: str, text: str) -> tuple[float, ...]:
    try:
        return tuple(float(word) for word in text.split(",")) if text else ()
    except ValueError:
        raise BenchError(f"{option} {text}: write numbers with commas, such as .4914,.4822,.4465") from None
