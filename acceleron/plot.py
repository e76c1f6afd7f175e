"""Plot the loss curves of a run: python -m acceleron.plot RUN_DIR writes RUN_DIR/loss.png."""

import json
import math
import sys
from pathlib import Path

from .errors import InputError, file_error, path_error, run_command
from .flags import Parser, nonempty


def read_metrics(path: Path, last_step: float = math.inf) -> list[dict]:
    """Return the records of metrics.jsonl up to `last_step`. A loss that is not finite is NaN.

    Skips an incomplete last line: the run may still be writing it. Raises InputError for an invalid file.
    """

    def number(value) -> float:
        if value is None:
            return math.nan
        if abs(value) > 1e100:  # matplotlib overflows
            raise ValueError("a value is above 1e100")
        return float(value)

    try:
        lines = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
        records = [json.loads(line) for line in lines]
        records = [record for record in records if record["step"] <= last_step]
        names = ("tokens", "loss", "val_loss", "val_bits_per_byte")
        records = [{name: number(record[name]) for name in names if name in record} for record in records]
        if not any("loss" in record for record in records):
            raise ValueError("no losses")
        return records
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not a metrics file of train.py ({error})") from error


def plot_losses(run_dir: Path) -> Path:
    """Plot the losses of a run to loss.png in its directory. Returns the path. Raises InputError."""
    path = run_dir / "metrics.jsonl"
    if not run_dir.is_dir():
        raise path_error("RUN_DIR", run_dir, "directory")
    if not path.is_file():
        raise InputError(f"RUN_DIR {run_dir} has no {path.name}: pass the --save_dir of a run")
    picture = run_dir / "loss.png"
    draw_losses(read_metrics(path), picture, run_dir.resolve().name)
    return picture


def draw_losses(records: list[dict], picture: Path, title: str):
    """Draw the training loss (mean per log interval) and validation loss against tokens. Raises InputError."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plotting needs matplotlib: pip install matplotlib") from error
    training, validation = ([(r["tokens"], r[name]) for r in records if name in r] for name in ("loss", "val_loss"))
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*training, strict=True), label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", label="validation")
    axes.set(xlabel="tokens", ylabel="cross-entropy (nats per token)")
    axes.set_title(title, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(picture, dpi=120)
    except OSError as error:
        raise file_error(f"{picture}: cannot be written", error) from error


def main():
    parser = Parser(prog="python -m acceleron.plot", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=nonempty)
    print(f"wrote {plot_losses(Path(parser.parse_args().run_dir))}")


if __name__ == "__main__":
    sys.exit(run_command(main))
