"""One archive of a study to send to somebody else: rows and reports, redacted."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path

from qwencli.errors import OutputError

# Raw rows, plans and reports. Logs stay: what libraries print is not ours to vouch for.
_KINDS = (".csv", ".json", ".md")


def share(folder: Path, redact: Callable[[str], str]) -> Path:
    """Write FOLDER.zip beside the folder, every text through `redact`; returns its path.

    Raises:
        OutputError: it cannot be written.
    """
    archive = folder.with_name(folder.name + ".zip")
    files = sorted(path for path in folder.rglob("*") if path.suffix in _KINDS)
    try:
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as target:
            for path in files:
                name = Path(folder.name) / path.relative_to(folder)
                text = redact(path.read_text(encoding="utf-8"))
                # A date of its own would tell nothing, and make equal archives differ.
                target.writestr(zipfile.ZipInfo(name.as_posix()), text, zipfile.ZIP_DEFLATED)
    except OSError as error:
        raise OutputError(
            f"{archive} cannot be written: {error.strerror or error}", "free some space"
        ) from error
    return archive
