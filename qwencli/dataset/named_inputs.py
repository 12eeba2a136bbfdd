"""What was named on the command line, in lists and on stdin: paths, addresses, pictures."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

from qwencli.dataset.parts import (
    MAX_PART_BYTES,
    StdinPart,
    url_part,
)
from qwencli.errors import InputError


def read_stdin() -> bytes:
    """All of stdin, which must have an end within `MAX_PART_BYTES`.

    Raises:
        InputError: it has none, or cannot be read.
    """
    return _read_to_its_end(sys.stdin.buffer, "stdin", "check what is piped in")


def _read_to_its_end(stream: IO[bytes], name: str, hint: str) -> bytes:
    try:
        data = stream.read(MAX_PART_BYTES + 1)
    except OSError as error:
        raise InputError(f"{name} cannot be read: {error.strerror or error}", hint) from error
    if len(data) > MAX_PART_BYTES:
        raise InputError(
            f"more than {MAX_PART_BYTES >> 20} MB come through {name}", "write it to a file first"
        )
    return data


def named_inputs(
    named: Sequence[str], filelist: Path | None = None, stdin: Callable[[], bytes] = read_stdin
) -> list[str | StdinPart]:
    """What was named on the command line and in lists: paths, addresses, or a picture itself.

    Args:
        named: `-` is stdin: a picture, or a list of paths.
        filelist: a path a line; `-` is stdin. Paths that are not there from the current folder on
            are looked for from the list's own.

    Raises:
        InputError: a list cannot be read, or has nothing in it; a name is empty.
    """
    inputs: list[str | StdinPart] = []
    for each in named:
        if not each:
            raise InputError(
                "one of the names given is empty", "check the variable that the shell put there"
            )
        if each != "-":
            inputs.append(each)
            continue
        data = stdin()
        inputs += [StdinPart(data)] if _is_picture(data) else _listed(data, "stdin")
    if filelist is not None:
        if str(filelist) == "-":
            return inputs + list(_listed(stdin(), "stdin"))
        hint = "check the path of --filelist"
        try:
            stream = filelist.open("rb")
        except OSError as error:
            raise InputError(f"{filelist} cannot be read: {error.strerror}", hint) from error
        with stream:
            data = _read_to_its_end(stream, str(filelist), hint)
        for path in _listed(data, str(filelist)):
            here = os.path.lexists(path) or url_part(path) is not None
            inputs.append(path if here else str(filelist.parent / path))
    return inputs


def _is_picture(data: bytes) -> bool:
    """Whether these are the bytes of a picture or video, and not a list of paths."""
    from qwencli.engine.frontend.containers import video_kind

    head = data[:512]
    # A list is text: of other control characters it has none.
    return video_kind(head) is not None or bool(re.search(rb"[\x01-\x08\x0b\x0e-\x1f\x7f]", head))


def _listed(data: bytes, name: str) -> list[str]:
    """Paths, a line each; or each ended by a NUL, as `find -print0` writes them."""
    if b"\0" in data:
        lines = data.split(b"\0")
    else:
        lines = [
            line.removesuffix(b"\r") for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        ]
    paths = [os.fsdecode(line) for line in lines if line.strip()]
    if not paths:
        raise InputError(f"{name} lists no files", "write a path a line")
    return paths


# A letter alone is a drive of Windows.
_FILE_ADDRESS = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]+):/{1,3}(?P<rest>.*)", re.DOTALL)


def local_path(path: Path) -> Path:
    """The file that `path` names, which may be a `file://` address as file managers give it.

    Raises InputError for an address of the web.
    """
    found = _FILE_ADDRESS.fullmatch(path.as_posix())
    # lexists: `exists` raises for a name that is too long.
    if found is None or os.path.lexists(path):
        return path
    if found["scheme"].lower() == "file":
        import platform
        from urllib.request import url2pathname

        host, _, rest = found["rest"].partition("/")
        here = host.lower() in ("localhost", platform.node().lower())
        written = "/" + (rest if here else found["rest"])
        decoded = Path(url2pathname(written))
        # Some programs write the name as it is, "%20" and all.
        return Path(written) if os.path.lexists(written) else decoded
    # A path has one slash where the address had two.
    raise InputError(
        f"{found['scheme']}://{found['rest']}: an address of the web is not opened",
        "download the file and give its path",
    )


def without_inner_dots(path: Path) -> Path:
    """The same path without a `..` behind the name of a folder, which may be a link."""
    parts = path.parts
    first = next((n for n, part in enumerate(parts) if part != os.pardir), len(parts))
    if os.pardir not in parts[first:]:
        return path
    if path.name == os.pardir:
        return Path(os.path.realpath(path))
    return Path(os.path.realpath(path.parent), path.name)
