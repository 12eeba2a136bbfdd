"""Makes a campaign or a study small enough to keep: drops what can be made again, packs the rest.

    python benchmarks/pack_results.py results/FOLDER

Logs, HTML reports and tables without a row go; tokens, host and sensors become .csv.gz, which
`bench report` and the verdicts of a study read as they are.
"""

from __future__ import annotations

import gzip
import shutil
import sys
from pathlib import Path

PACKED = ("tokens.csv", "host.csv", "gpu.csv")


def pack(folder: Path) -> None:
    """Pack every campaign in `folder`, and `folder` itself."""
    for path in sorted(folder.rglob("*")):
        if path.name == "logs" and path.is_dir():
            shutil.rmtree(path)
        elif path.name == "report.html" or _is_empty_table(path):
            path.unlink()
        elif path.name in PACKED:
            # Without a time of its own, so that the same rows give the same file.
            packed = gzip.compress(path.read_bytes(), mtime=0)
            path.with_name(path.name + ".gz").write_bytes(packed)
            path.unlink()


def _is_empty_table(path: Path) -> bool:
    return path.suffix == ".csv" and path.read_bytes().count(b"\n") <= 1


if __name__ == "__main__":
    pack(Path(sys.argv[1]))
