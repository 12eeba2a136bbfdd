from __future__ import annotations

import gzip

from benchmarks.pack_results import pack


def test_what_can_be_made_again_goes_and_rows_are_packed(tmp_path):
    own = tmp_path / "processes" / "one"
    (own / "logs").mkdir(parents=True)
    (own / "logs" / "cell.log").write_text("loading")
    (own / "report.html").write_text("<html>")
    (own / "probes.csv").write_text("cell_id,run\n")
    (own / "runs.csv").write_text("cell_id,run\nc,1\n")
    (own / "tokens.csv").write_text("cell_id,run\nc,1\nc,1\n")
    pack(tmp_path)
    assert sorted(path.name for path in own.iterdir()) == ["runs.csv", "tokens.csv.gz"]
    assert gzip.decompress((own / "tokens.csv.gz").read_bytes()).count(b"\n") == 3
    first = (own / "tokens.csv.gz").read_bytes()
    (own / "tokens.csv").write_bytes(gzip.decompress(first))
    pack(tmp_path)
    assert (own / "tokens.csv.gz").read_bytes() == first
