"""The command line: registers the commands and turns errors into one line and an exit code."""

from __future__ import annotations

import errno
import functools
import gc
import importlib
import os
import sys
import warnings
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args, get_origin

import typer
from typer.core import TyperCommand, TyperGroup

from qwencli import __version__
from qwencli.errors import OutputError, QwenCliError, StoppedError, UsageError
from qwencli.output import Output, ready_streams, release_streams, visible
from qwencli.typed_values import read_number, read_whole

# Whatever it was started as: completion scripts complete it by this name.
PROGRAM = "qwencli"
GLOBAL_FLAGS = ("--quiet", "-q", "--debug")
EXIT_FAILURE, EXIT_INTERRUPTED = 1, 130
# Full, over a quota, closed, or a device that fails.
_CANNOT_WRITE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EBADF, errno.EIO)


# A function, or an application with commands of its own. Imported when it is asked for: a caption
# has no use for the bench.
COMMANDS = {
    "caption": "qwencli.commands.caption:caption",
    "chat": "qwencli.commands.chat:chat",
    "serve": "qwencli.commands.serve:serve",
    "warm": "qwencli.commands.warm:warm",
    "dataset": "qwencli.commands.dataset:app",
    "ps": "qwencli.commands.ps_stop:ps",
    "stop": "qwencli.commands.ps_stop:stop",
    "bench": "qwencli.commands.bench:app",
    "diagnose": "qwencli.commands.diagnose:app",
    "models": "qwencli.commands.models:models",
    "comfyui": "qwencli.commands.comfyui:app",
}


def command_of(name: str) -> Any:
    """What stands for one of `COMMANDS`: a function or a Typer."""
    module, _, attribute = COMMANDS[name].partition(":")
    return getattr(importlib.import_module(module), attribute)


class _Root(TyperGroup):
    """The commands, each made when it is asked for.

    Shows its own help as plain text: what rich would take to load doubles the time to see it.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings)
        self.rich_markup_mode = None

    def list_commands(self, ctx: Any) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        # One that does not exist is compared with all: "did you mean ...?"
        for name in [cmd_name] if cmd_name in COMMANDS else COMMANDS:
            if name not in self.commands:
                self.commands[name] = _load_command(name)
        return super().get_command(ctx, cmd_name)

    def get_params(self, ctx: Any) -> list[Any]:
        return [_plainly_read(each) for each in super().get_params(ctx)]


# Options that take a path or a name; of other texts an empty one may well be meant.
_NAMES = frozenset({"model", "schema", "overlay"})


class _Command(TyperCommand):
    def get_params(self, ctx: Any) -> list[Any]:
        return [_plainly_read(each) for each in super().get_params(ctx)]


def _load_command(name: str) -> Any:
    part, alone = command_of(name), typer.Typer(add_completion=False)
    if isinstance(part, typer.Typer):
        alone.add_typer(part, name=name)
        command = typer.main.get_group(alone).commands[name]
    else:
        alone.command(name, cls=_Command)(part)
        command = typer.main.get_command(alone)
    _read_alike(command)
    return command


def _read_alike(command: Any) -> None:
    """Have the options of a command, and of those in it, read and refused in the same words."""
    for parameter in command.params:
        parameter.consume_value = functools.partial(_given, parameter, parameter.consume_value)
        _plainly_read(parameter)
    for part in getattr(command, "commands", {}).values():
        _read_alike(part)


def _given(parameter: Any, consume: Any, context: Any, options: Any) -> Any:
    """What was given for a parameter. A path that is empty would be the current folder.

    Raises:
        UsageError: it is empty, as from a variable that has no value.
    """
    value, source = consume(context, options)
    kind = getattr(getattr(parameter, "type_descriptor", None), "annotation", None)
    is_path = kind is Path or get_args(kind) == (Path,) or parameter.name in _NAMES
    if (
        is_path
        and not context.resilient_parsing
        and (value == "" or (isinstance(value, (list, tuple)) and "" in value))
    ):
        given = parameter.opts[0] if parameter.opts[0].startswith("-") else parameter.metavar
        raise UsageError(f"{given} is empty", "check the variable that the shell put there")
    return value, source


def _plainly_read(parameter: Any) -> Any:
    """Have a parameter's value read without pydantic where it is written plainly: loading that
    takes longer than a caption by a model that is kept loaded. Everything else, faults included,
    is typer's."""
    read = getattr(parameter, "type_descriptor", None)  # older typers know no pydantic
    if read is not None and read.parameter_info.parser is None:
        parameter.process_value = functools.partial(_value, parameter, read)
    return parameter


def _value(parameter: Any, read: Any, context: Any, value: Any) -> Any:
    kind, several = read.annotation, parameter.multiple or parameter.nargs == -1
    if value is None:
        plain: Any = () if several else None
        is_plain = not parameter.required
    elif several:
        plain = list(value)
        is_plain = get_origin(kind) is list and get_args(kind) == (str,) and bool(plain)
    else:
        plain = _plain(kind, value)
        if kind in (int, float):
            plain = _number(parameter, kind, value)
        is_plain = plain is not None
    if not is_plain:
        return type(parameter).process_value(parameter, context, value)
    return plain if parameter.callback is None else parameter.callback(context, parameter, plain)


def _plain(kind: Any, value: Any) -> Any:
    """`value` as a `kind`; None where it is not plainly one."""
    if kind is str or not isinstance(value, str):
        return value if type(value) is kind else None
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return kind._value2member_map_.get(value) if type(value) is str else value
    return None


def _number(parameter: Any, kind: type, value: Any) -> Any:
    """Raises UsageError for text that is no such number, or one that is out of range."""
    flag = max(parameter.opts, key=len)
    number = value
    if isinstance(value, str):
        number = read_whole(value) if kind is int else read_number(value)
    bounds = parameter.type_descriptor.parameter_info
    least, most = bounds.min, bounds.max
    if number is None:
        what, like = ("a whole number", 1000) if kind is int else ("a number", 0.5)
        # One that the option takes.
        like = like if least is None else max(like, least)
        like = like if most is None else min(like, most)
        raise UsageError(f"{flag} is {what}, not {visible(value)}", f"{flag} {like}")
    if (least is not None and number < least) or (most is not None and number > most):
        between = f"from {least} to {most}" if most is not None else f"from {least} on"
        raise UsageError(f"{flag} {number} is out of range", f"give a value {between}")
    return number


app = typer.Typer(
    name="qwencli",
    cls=_Root,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run Qwen vision-language models on your own GPU, and learn why a run was fast or slow.",
)


def _show_version(wanted: bool) -> None:
    if wanted:
        Output().answer(f"qwencli {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    context: typer.Context,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No notices, no progress.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    context.obj = Output(quiet=quiet)


def main() -> None:
    """Entry point of the `qwencli` script."""
    exit_code = run(sys.argv[1:])
    # Python ends with collections of garbage, which go through every object of every module and
    # take most of its end: 50 ms. Memory is the system's to take back; all else that Python does at
    # its end, such as waiting for threads, it does.
    gc.freeze()
    sys.exit(exit_code)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code.

    Everything that goes wrong ends here as one line on stderr; `--debug` lets it through.
    """
    ready_streams()
    try:
        return _run(arguments)
    finally:
        release_streams()


def _run(arguments: list[str]) -> int:
    # Threads of torch that wait for each other sleep meanwhile (`engine.machine.cpu_threads`), and
    # numpy computes on one core (`cpu.decoder`). Read when these are loaded, here or in our
    # processes.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # What torch's profiler says of itself on stderr.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    arguments = _global_flags_first(arguments) or ["--help"]
    if "--debug" in arguments:
        return _finished(app(arguments, standalone_mode=False, prog_name=PROGRAM))
    # Deprecation notes of libraries are ours to act on, not the user's.
    warnings.simplefilter("ignore")
    try:
        return _finished(app(arguments, standalone_mode=False, prog_name=PROGRAM))
    except StoppedError as stopped:
        Output().notice(f"{stopped.message} ({stopped.hint})")
        return stopped.exit_code
    except QwenCliError as error:
        return _fail(error)
    except (KeyboardInterrupt, typer.Abort):
        return _finished(EXIT_INTERRUPTED)
    except BrokenPipeError:  # the reader of the pipe has gone
        return EXIT_FAILURE
    except OSError as error:
        # Help is written by libraries, not by `Output`.
        if error.errno not in _CANNOT_WRITE:
            return _fault(error)
        where = f" {error.filename}" if error.filename else ""
        return _fail(
            OutputError(f"cannot write{where}: {error.strerror}", "free space, or write elsewhere")
        )
    except Exception as error:  # noqa: BLE001 - the one boundary between the program and a person
        usage = getattr(error, "format_message", None)
        if usage is not None:
            said = str(usage()).replace("Value error, ", "").rstrip(".")
            if not said:  # a group that was named alone has shown its help
                return UsageError.exit_code
            return _fail(UsageError(said, "see --help"))
        return _fault(error)


def _fault(error: Exception) -> int:
    line = (str(error).strip() or "no message").splitlines()[0]
    return _fail(
        QwenCliError(
            f"{type(error).__name__}: {line}",
            "this is a fault of qwencli; run again with --debug and report the traceback",
        )
    )


def _global_flags_first(arguments: list[str]) -> list[str]:
    """Let the flags that every command has stand anywhere before a `--`."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    flags = [word for word in arguments[:end] if word in GLOBAL_FLAGS]
    return flags + [word for word in arguments[:end] if word not in flags] + arguments[end:]


def _finished(returned: object) -> int:
    """The exit code for what the application returned; Typer makes Ctrl-C a return of 130."""
    if returned == EXIT_INTERRUPTED:
        Output().notice("interrupted")
    return returned if isinstance(returned, int) else 0


def _fail(error: QwenCliError) -> int:
    Output().error(error)
    return error.exit_code
