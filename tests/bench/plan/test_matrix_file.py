from __future__ import annotations

from pathlib import Path

import pytest

from qwencli.bench.plan.matrix import expand
from qwencli.bench.plan.matrix_file import load_matrix, names
from qwencli.bench.plan.stopping import RepetitionOptions
from qwencli.errors import BenchError, UsageError

EXAMPLES = sorted((Path(__file__).parents[3] / "benchmarks").glob("*.toml"))


@pytest.mark.parametrize("name", ["default", "full", "quick"])
def test_built_in_matrices_are_there_and_expand(name, cpu):
    assert name in names()
    cells = expand(load_matrix(name), "scenes", cpu)
    assert any(cell.skip_reason is None for cell in cells)


def test_default_sweeps_quantization_attention_and_cache(gpu):
    cells = expand(load_matrix("default"), "scenes", gpu)
    assert len(cells) == 3 * (4 + 3) * 4
    running = [cell for cell in cells if cell.skip_reason is None]
    assert {cell.engine for cell in running} == {"native", "transformers"}
    assert all(cell.skip_reason is None or cell.skip_reason.strip() for cell in cells)


def test_quick_has_few_cells_on_a_cpu(cpu):
    cells = [c for c in expand(load_matrix("quick"), "scenes", cpu) if not c.skip_reason]
    assert [c.engine for c in cells] == ["native"] * 3 + ["transformers"] * 3


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_examples_expand(path, gpu):
    assert expand(load_matrix(str(path)), "scenes", gpu)


def test_a_file_with_everything(tmp_path, cpu):
    path = tmp_path / "mine.toml"
    path.write_text(
        '[axes]\nmodel = ["a", "b"]\ncache = "static"\n'
        '[[exclude]]\nmodel = "b"\nload_mode = ["keep"]\n'
        "[run]\nmax_noise = 1\nmin_runs = 3\nmax_runs = 9\nmax_time = 60\nprocesses = 2\n"
        'max_new_tokens = 9\nprompt_file = "prompt.txt"\nimages = ["scene", "mine.png"]\n',
        encoding="utf-8",
    )
    (tmp_path / "prompt.txt").write_text("What is it?\n", encoding="utf-8")
    (tmp_path / "mine.png").write_bytes(b"")
    matrix = load_matrix(str(path))
    assert matrix.max_new_tokens == 9
    assert matrix.repetition == RepetitionOptions(None, 1.0, 3, 9, 60.0, 2)
    assert matrix.prompt == "What is it?"
    assert [image.name for image in matrix.images] == ["scene.png", "mine.png"]
    assert [cell.model for cell in expand(matrix, "", cpu)] == ["a"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[axes", "not valid TOML"),
        ("[axes]\ncach = 'static'", "unknown key axes.cach"),
        ("axis = 1", "unknown key axis"),
        ("axes = 1", "axes must be a table"),
        ("[axes]\ncache = ['statics']", "axes.cache: --cache has no value 'statics'"),
        ("[axes]\ncache = []", "axes.cache: --cache has no value"),
        ("[axes]\ncache = [1]", "axes.cache must be a string or a list"),
        ("[[exclude]]", "must be .*exclude"),
        ("[exclude]\ncache = 'static'", "must be .*exclude"),
        ("[[exclude]]\ncache = 'x'", r"exclude\[0\].cache"),
        ("[run]\nruns = 0", "run.runs must be a whole number from 1"),
        ("[run]\nruns = true", "run.runs must be a whole number"),
        ("[run]\nmax_new_tokens = 99999", "run.max_new_tokens must be .* to 8192"),
        ("[run]\nspeed = 1", "unknown key run.speed"),
        ("[run]\nmax_noise = 0", "run.max_noise must be a number above zero"),
        ("[run]\nprompt = 1", "run.prompt must be text"),
        ("[run]\nprompt = 'a'\npreset = 'tags'", "--prompt and --preset exclude each other"),
        ("[run]\npreset = 'x'", "--preset 'x' is unknown"),
        ("[run]\nprompt_file = 'gone.txt'", "gone.txt: cannot be read"),
        ("[run]\nimages = 'scene'", "run.images must be a list"),
        ("[run]\nimages = ['gone.png']", "gone.png: no such file"),
    ],
)
def test_malformed_files_name_file_and_key(tmp_path, text, said):
    path = tmp_path / "bad.toml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(BenchError, match=said) as caught:
        load_matrix(str(path))
    assert "bad.toml" in caught.value.message


def test_bytes_that_are_no_text(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BenchError, match="not valid TOML"):
        load_matrix(str(path))


def test_unknown_name_lists_the_names():
    with pytest.raises(UsageError, match="no built-in named 'fast'") as caught:
        load_matrix("fast")
    assert "default, full, origin, quick" in caught.value.hint


def test_missing_file():
    with pytest.raises(BenchError, match=r"nowhere.toml: No such file"):
        load_matrix("nowhere.toml")
