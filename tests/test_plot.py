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
from acceleron.plot import plot_losses, read_curves

ROOT = Path(__file__).resolve().parents[2]
LINES = """{"tokens": 100, "loss": 4.5}
{"tokens": 200, "loss": null, "val_loss": 4.25}
{"tokens": 300, "loss": 3.5}
{"tokens": 400, "lo"""  # the run is still writing


def test_curves_contain_only_complete_lines(tmp_path):
    (tmp_path / "metrics.jsonl").write_text(LINES)
    training, validation = read_curves(tmp_path / "metrics.jsonl")
    assert [tokens for tokens, _ in training] == [100, 200, 300]
    assert [loss for _, loss in training] == pytest.approx([4.5, math.nan, 3.5], nan_ok=True)
    assert validation == [(200, 4.25)]


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
    (tmp_path / "metrics.jsonl").write_text(f'{{"tokens": 1, "loss": {loss}}}\n')
    with pytest.raises(InputError, match=r"metrics\.jsonl: not a metrics file of train\.py"):
        plot_losses(tmp_path)


def test_missing_metrics_or_directory_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"has no metrics\.jsonl: pass the --save_dir of a run"):
        plot_losses(tmp_path)
    with pytest.raises(InputError, match=r"RUN_DIR .*nowhere does not exist"):
        plot_losses(tmp_path / "nowhere")
