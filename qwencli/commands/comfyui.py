"""`qwencli comfyui`: puts the nodes into ComfyUI, and moves saved graphs over to them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwencli.errors import QwenCliError
from qwencli.output import Output

app = typer.Typer(no_args_is_help=True, help="Nodes for ComfyUI, and graphs that use them.")


@app.callback()
def _group() -> None:
    """Keeps a command that is alone here one with a name of its own."""


@app.command()
def install(
    context: typer.Context,
    path: Annotated[
        Path,
        typer.Argument(metavar="PATH", help="A ComfyUI folder, or its custom_nodes."),
    ],
) -> None:
    """Put the qwencli nodes into a ComfyUI; run again, it upgrades them."""
    from qwencli import __version__
    from qwencli.comfyui.install import install_pack, qwencli_in, requirement

    output = context.ensure_object(Output)
    done = install_pack(path)
    output.answer(str(done.folder))
    output.notice(
        f"{'upgraded' if done.replaced else 'installed'}; restart ComfyUI, and open "
        "Workflow > Browse Templates for examples"
    )
    if done.python is None:
        output.warn(
            "which Python runs this ComfyUI cannot be told: there it takes "
            f"python -m pip install {requirement()}"
        )
        return
    with output.status(f"asking {done.python}"):
        try:
            version = qwencli_in(done.python)
        except QwenCliError as error:
            output.warn(f"{error.message}: there it takes python -m pip install {requirement()}")
            return
    if version == __version__:
        output.notice(f"{done.python} has qwencli {version}")
        return
    output.warn(
        f"{done.python} has {f'qwencli {version}' if version else 'no qwencli with nodes'}: "
        f'"{done.python}" -m pip install --upgrade {requirement()}'
    )
