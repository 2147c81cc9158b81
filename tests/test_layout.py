"""What a run directory holds is read back as it was written."""

from pathlib import Path

from parts.run.directory import RunDir, first_free
from parts.run.layout import (
    CSV_HEADER,
    RunPaths,
    csv_line,
    csv_rows,
    logged_steps,
    sample_block,
    step_line,
)

ROW = {"step": 1250, "loss": 2.144839, "lr": 3e-4, "tokens_per_sec": 15045.4, "grad_norm": 0.5}


def test_a_step_line_is_read_back():
    line = step_line(ROW | {"window_loss": None}, 400_000)
    told = "step 1250/400000 | loss 2.144839 | lr 3.00e-04 | tok/s 15045.4 | grad_norm 0.500"
    assert line == told
    log = f"2025-12-14 03:38:36,559 | INFO | {line}\n2025-12-14 03:38:37,000 | INFO | Saved\n"
    assert logged_steps(log) == [ROW]
    assert logged_steps(log + "2025-12-14 03:38:38,000 | INFO | step 1260/400000 | loss 2.") == [
        ROW
    ]


def test_a_row_is_read_back():
    assert csv_rows(CSV_HEADER + csv_line(ROW | {"val_loss": None})) == [ROW]
    assert csv_line(ROW).startswith("1250,2.14483900,3.00000000e-04,15045.40,,")


def test_a_run_directory_lies_where_the_paths_say():
    paths, run = RunPaths(Path("out/x")), RunDir(Path("out/x"))
    assert paths.files == run.files and paths.best == Path("out/x/checkpoints/best.pt")
    assert RunPaths.around(paths.best).root == paths.root


def test_the_first_pair_of_a_block_is_read_back():
    block = sample_block(6, "A:\n", ["A:\nyes", "A:\nno"])
    assert block.first_pair() == ("A:\n", "A:\nyes")


def test_the_first_free_name_keeps_its_extension(tmp_path):
    (tmp_path / "best-1.pt").touch()
    assert first_free(tmp_path / "best.pt") == tmp_path / "best-2.pt"
    assert first_free(tmp_path / "earlier") == tmp_path / "earlier-1"
