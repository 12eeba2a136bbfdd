"""`qwencli serve`: an OpenAI-compatible server over one engine."""

from __future__ import annotations

import functools
from typing import Annotated

import typer

from qwencli.commands.options import RunOptions, with_run_options
from qwencli.errors import UsageError
from qwencli.output import Output

LOOPBACK = ("127.0.0.1", "::1", "localhost")


# What a server prints is no answer.
@functools.partial(with_run_options, without=("json", "stats"))
def serve(
    context: typer.Context,
    host: Annotated[
        str,
        typer.Option(metavar="ADDRESS", help="Where to listen; beyond this machine with a key."),
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(metavar="N", min=0, max=65535, help="0 = any that is free.")
    ] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="QWENCLI_API_KEY",
            metavar="KEY",
            help="What clients must send as their key.",
        ),
    ] = None,
    allow_image_urls: Annotated[
        bool, typer.Option("--allow-image-urls", help="Fetch pictures from public addresses.")
    ] = False,
    *,
    run: RunOptions,
) -> None:
    """Serve a model to OpenAI clients, with a page to try it at /."""
    check_extra()
    from qwencli.commands.start_engine import announce_model, choose_model, reading_speed
    from qwencli.engine.abilities import Abilities, fetch_model
    from qwencli.engine.factory import create_engine
    from qwencli.engine.resolve import resolve_device
    from qwencli.server.engine_thread import EngineThread
    from qwencli.server.http_process import HttpProcess
    from qwencli.server.listen import listening
    from qwencli.server.settings import ServerSettings

    output = context.ensure_object(Output)
    local = host in LOOPBACK
    if api_key == "":
        raise UsageError("--api-key is empty", "give a key, or leave it out")
    if api_key and not (api_key.isascii() and api_key.isprintable() and api_key == api_key.strip()):
        raise UsageError(
            "--api-key has characters that no header can carry, or blanks around it",
            "give letters, digits and signs of ASCII",
        )
    if not (local or api_key):
        raise UsageError(
            f"--host {host}: others can reach this address, and there is no key",
            "add --api-key KEY (or QWENCLI_API_KEY), or listen at 127.0.0.1",
        )
    sampling = run.sampling_options()
    spec = choose_model(run, output)
    opened = listening(host, port)
    announce_model(spec, run, output, Abilities())
    config = run.engine_config(spec)
    with output.status(f"starting {spec.name}"):
        engine = create_engine(config)
        resolve_device(config.device)
    fetch_model(config, Abilities())
    thread = EngineThread(engine)
    aliases = {str(each) for each in (run.model, spec.repo_id) if each} - {spec.name}
    settings = ServerSettings(
        model=spec.name,
        aliases=tuple(sorted(aliases)),
        api_key=api_key,
        hosts=LOOPBACK if local and not api_key else None,
        allow_image_urls=allow_image_urls,
        sampling=sampling,
    )
    shown = f"[{host}]" if ":" in host else host
    address = f"http://{shown}:{opened.getsockname()[1]}"
    http = HttpProcess(opened, settings, output.warn)
    try:
        with output.status(f"loading {spec.name}", reading_speed(engine)):
            thread.start(http.check)
        for warning in engine.load_warnings:
            output.warn(warning)
        serving = f"serving {spec.name} at {address} (API: {address}/v1)"
        http.serve(thread, lambda: output.notice(serving))
        if thread.failure is not None:
            raise thread.failure
    finally:
        http.close()
        thread.close()


def check_extra() -> None:
    """Raises MissingDependencyError where the packages of a server are not installed or too old."""
    from qwencli.engine.machine.packages import require

    for package in ("starlette", "uvicorn", "pydantic"):
        require(package, "qwencli serve", "pip install 'qwencli[serve]'")
