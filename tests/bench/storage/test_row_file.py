from __future__ import annotations

import gzip
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwencli.bench.storage.row_file import (
    RowFile,
    format_value,
    keep_rows,
    read_rows,
    replace_file,
    write_rows,
)
from qwencli.errors import BenchError, OutputError

COLUMNS = ("a", "b")
# Surrogates cannot be written as UTF-8; text from models and logs has been decoded already.
texts = st.text(st.characters(exclude_categories=["Cs"])).map(
    lambda text: " ".join(text.splitlines())
)
rows = st.lists(st.fixed_dictionaries({"a": texts, "b": texts}), max_size=5)


@given(rows, rows)
def test_what_is_appended_is_read_back(tmp_path_factory, first, second):
    path = tmp_path_factory.mktemp("rows") / "x.csv"
    for part in (first, second):
        with RowFile(path, COLUMNS) as file:
            file.append(part)
    assert read_rows(path) == first + second


@given(rows, st.data())
def test_a_kill_at_any_byte_loses_at_most_the_row_being_written(tmp_path_factory, written, data):
    path = tmp_path_factory.mktemp("rows") / "x.csv"
    with RowFile(path, COLUMNS) as file:
        file.append(written)
    content = path.read_bytes()
    cut = data.draw(st.integers(0, len(content)))
    path.write_bytes(content[:cut])
    whole = max(content[:cut].count(b"\n") - 1, 0)
    assert read_rows(path) == written[:whole]
    with RowFile(path, COLUMNS) as file:
        assert file.repaired_lines == int(not content[:cut].endswith(b"\n") and cut > 0)
        file.append([{"a": "next", "b": "one"}])
    assert read_rows(path) == [*written[:whole], {"a": "next", "b": "one"}]


def test_columns_of_earlier_versions_are_read_by_their_new_names(tmp_path):
    path = tmp_path / "x.csv"
    path.write_text("cell_id,bound,core_loop_us\na,host,4.1\n")
    assert read_rows(path) == [{"cell_id": "a", "bottleneck": "host", "cpu_loop_us": "4.1"}]
    path.write_text("bound,bottleneck\nhost,host\n")
    with pytest.raises(BenchError, match="names a column twice"):
        read_rows(path)


def test_none_is_empty_and_zero_is_zero(tmp_path):
    with RowFile(tmp_path / "x.csv", COLUMNS) as file:
        file.append([{"a": None, "b": 0}, {"b": 123456.000000001}, {"a": "two\nlines"}])
    assert read_rows(tmp_path / "x.csv") == [
        {"a": "", "b": "0"},
        {"a": "", "b": "123456.000000001"},
        {"a": "two lines", "b": ""},
    ]


def test_other_columns_are_refused(tmp_path):
    (tmp_path / "x.csv").write_text("c,d\n", encoding="utf-8")
    with pytest.raises(BenchError, match="other columns"):
        RowFile(tmp_path / "x.csv", COLUMNS)


def test_a_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OutputError, match="No such file"):
        RowFile(tmp_path / "no" / "x.csv", COLUMNS)


def test_rows_can_be_dropped(tmp_path):
    path = tmp_path / "x.csv"
    write_rows(path, COLUMNS, [{"a": "1"}, {"a": "2"}])
    assert keep_rows(path, COLUMNS, lambda row: row["a"] == "2") == 1
    assert [row["a"] for row in read_rows(path)] == ["2"]
    assert keep_rows(tmp_path / "none.csv", COLUMNS, lambda row: False) == 0


def test_replacing_leaves_the_old_file_when_it_fails(tmp_path):
    path = tmp_path / "x.csv"
    path.write_bytes(b"old")
    (tmp_path / "x.csv.new").mkdir()
    with pytest.raises(OutputError, match="cannot be written"):
        replace_file(path, b"new")
    assert path.read_bytes() == b"old"


class _FullDisk:
    """Takes part of what is written once `room` is used up, as a full disk does."""

    def __init__(self, file, room):
        self._file, self.room = file, room

    def write(self, data):
        taken = self._file.write(data[: self.room])
        self.room -= taken
        return taken

    def __getattr__(self, name):
        return getattr(self._file, name)


def test_a_full_disk_is_an_error_and_keeps_whole_rows(tmp_path):
    path = tmp_path / "x.csv"
    with RowFile(path, COLUMNS) as file:
        file.append([{"a": "1", "b": "2"}])
        file._file = _FullDisk(file._file, room=3)
        with pytest.raises(OutputError, match="cannot be written"):
            file.append([{"a": "333", "b": "444"}])
    assert path.read_bytes() == b"a,b\n1,2\n"


@pytest.mark.skipif(sys.platform == "win32", reason="limits on file sizes are POSIX")
def test_a_real_limit_of_the_system_is_an_error_too(tmp_path):
    script = f"""
        import resource, sys
        sys.path.insert(0, {str(Path(__file__).parents[3])!r})
        from qwencli.bench.storage.row_file import RowFile
        from qwencli.errors import OutputError
        from pathlib import Path
        with RowFile(Path("x.csv"), ("a", "b")) as file:
            resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))
            try:
                for number in range(9):
                    file.append([{{"a": number, "b": "bb"}}])
            except OutputError as error:
                print(error.message)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path, check=True, capture_output=True, encoding="utf-8",
    )  # fmt: skip
    assert "x.csv cannot be written" in done.stdout
    assert (tmp_path / "x.csv").read_bytes() == b"a,b\n0,bb\n1,bb\n2,bb\n"


def test_a_compressed_file_is_read_where_there_is_no_plain_one(tmp_path):
    path = tmp_path / "rows.csv"
    packed = tmp_path / "rows.csv.gz"
    packed.write_bytes(gzip.compress(b"a,b\n1,2\n3,"))
    assert read_rows(path) == [{"a": "1", "b": "2"}]
    path.write_bytes(b"a,b\n5,6\n")
    assert read_rows(path) == [{"a": "5", "b": "6"}]


@pytest.mark.parametrize(
    ("text", "written"),
    [("=cmd()", "'=cmd()"), ("+1+cmd()", "'+1+cmd()"), ("@SUM(1)", "'@SUM(1)"), ("-x", "'-x"),
     ("\t=x", "'\t=x"), ("'=x", "''=x"), ("-1.5e-3", "-1.5e-3"), ("-", "-"), ("a=b", "a=b"),
     ("'quoted'", "'quoted'")],
)  # fmt: skip
def test_no_field_starts_a_formula(text, written):
    assert format_value(text) == written


@given(st.one_of(st.text(), st.text("'=+-@\t1.e5", max_size=6)))
def test_a_field_is_read_back_as_it_was(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("rows") / "x.csv"
    line = " ".join(text.splitlines())
    write_rows(path, ("a", "b"), [{"a": text, "b": 1}])
    assert read_rows(path) == [{"a": line, "b": "1"}]
