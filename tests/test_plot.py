"""Plots of metrics.jsonl."""

import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from matplotlib.image import imread
from waiting import TIMEOUT

from acceleron.errors import InputError
from acceleron.plot import plot_losses, read_metrics

ROOT = Path(__file__).resolve().parents[2]
LINES = """{"step": 1, "tokens": 100, "loss": 4.5}
{"step": 2, "tokens": 200, "loss": null, "val_loss": 4.25}
{"step": 3, "tokens": 300, "loss": 3.5}
{"step": 4, "tokens": 400, "lo"""  # the run is still writing


def test_metrics_contain_only_complete_lines_up_to_a_step(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(LINES)
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [record["tokens"] for record in records] == [100, 200, 300]
    assert [record["loss"] for record in records] == pytest.approx([4.5, math.nan, 3.5], nan_ok=True)
    assert [record.get("val_loss") for record in records] == [None, 4.25, None]
    assert [record["tokens"] for record in read_metrics(tmp_path / "metrics.jsonl", last_step=2)] == [100, 200]


def test_plot_works_with_any_directory_name_and_backend(tmp_path):
    run_dir = tmp_path / "lr$3$x_{"  # not TeX
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text(LINES)
    subprocess.run(
        [sys.executable, "-m", "acceleron.plot", str(run_dir)],
        cwd=ROOT, env=os.environ | {"MPLBACKEND": "xyz"}, timeout=TIMEOUT, check=True,
    )  # fmt: skip
    picture = imread(run_dir / "loss.png")
    assert picture.shape[:2] == (540, 840)
    assert picture[..., :3].std() > 0.05  # not blank


@pytest.mark.parametrize("loss", ["[1, 2]", "{}", '"x"', "9" * 400, "1e308", "Infinity"])
def test_loss_that_is_not_a_finite_number_is_rejected(tmp_path, loss):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "tokens": 1, "loss": {loss}}}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl: not a metrics file of train\.py"):
        plot_losses(tmp_path)


def test_missing_metrics_or_directory_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"has no metrics\.jsonl: pass the --save_dir of a run"):
        plot_losses(tmp_path)
    with pytest.raises(InputError, match=r"RUN_DIR .*nowhere does not exist"):
        plot_losses(tmp_path / "nowhere")
