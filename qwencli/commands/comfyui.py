"""`qwencli comfyui`: puts the nodes into ComfyUI, and moves saved graphs over to them."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwencli.errors import OutputError, QwenCliError
from qwencli.output import Output, counted

app = typer.Typer(no_args_is_help=True, help="Nodes for ComfyUI, and graphs that use them.")


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
        f"{done.said}; restart ComfyUI, and open Workflow > Browse Templates for examples"
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


@app.command()
def convert(
    context: typer.Context,
    workflow: Annotated[
        Path,
        typer.Argument(
            metavar="WORKFLOW.json", help="As ComfyUI saves it, or exports it for its API."
        ),
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            "-o",
            metavar="FILE",
            help="Replaced where it exists; - is stdout. Default: WORKFLOW.qwencli.json.",
        ),
    ] = None,
) -> None:
    """Replace the nodes of other Qwen packs in a saved graph by ours."""
    from json import dumps

    from qwencli.comfyui.convert import convert as converted
    from qwencli.comfyui.convert import read_workflow
    from qwencli.dataset.sinks import write_whole

    output = context.ensure_object(Output)
    done = converted(read_workflow(workflow), str(workflow))
    target = out or workflow.with_suffix(".qwencli.json")
    if out is None and target.exists():
        raise OutputError(f"{target}: is there already", f"--out {target} replaces it")
    if str(target) == "-":
        output.json_line(done.document)
    else:
        text = dumps(done.document, ensure_ascii=False, indent=2) + "\n"
        try:
            # Half of a surrogate pair is written as JSON writes it.
            write_whole(target, text.encode("utf-8", "backslashreplace"))
        except OSError as error:
            raise OutputError(
                f"{target} cannot be written: {error.strerror or error}",
                "give another place with --out",
            ) from error
        output.answer(str(target))
    output.notice(*done.converted)
    for note in done.notes:
        output.warn(note)
    output.notice(f"{counted(len(done.converted), 'node')} converted; the others are untouched")
