"""Plot the loss curves of a run: python -m acceleron.plot RUN_DIR writes RUN_DIR/loss.png."""

import json
import math
import sys
from pathlib import Path

from .errors import InputError, file_error, path_error, run_command
from .flags import Parser, nonempty


def read_curves(path: Path) -> list[list[tuple[float, float]]]:
    """Return the training and validation curves as (tokens, loss) pairs. A non-finite loss is NaN.

    Skips an incomplete last line: the run may still be writing it. Raises InputError for an invalid file.
    """

    def number(value) -> float:
        if abs(value) > 1e100:  # matplotlib overflows
            raise ValueError("a value is above 1e100")
        return float(value)

    try:
        lines = path.read_text(encoding="utf-8").rpartition("\n")[0].splitlines()
        records = [json.loads(line) for line in lines]
        curves = [[(number(r["tokens"]), r[name]) for r in records if name in r] for name in ("loss", "val_loss")]
        if not curves[0]:
            raise ValueError("no losses")
        return [[(x, math.nan if loss is None else number(loss)) for x, loss in curve] for curve in curves]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not a metrics file of train.py ({error})") from error


def plot_losses(run_dir: Path) -> Path:
    """Plot the training loss (mean per log interval) and validation loss against tokens. Raises InputError."""
    path, picture = run_dir / "metrics.jsonl", run_dir / "loss.png"
    if not run_dir.is_dir():
        raise path_error("RUN_DIR", run_dir, "directory")
    if not path.is_file():
        raise InputError(f"RUN_DIR {run_dir} has no {path.name}: pass the --save_dir of a run")
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise InputError("plotting needs matplotlib: pip install matplotlib") from error
    training, validation = read_curves(path)
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*training, strict=True), label="training")
    if validation:
        axes.plot(*zip(*validation, strict=True), "o-", label="validation")
    axes.set(xlabel="tokens", ylabel="cross-entropy (nats per token)")
    axes.set_title(run_dir.resolve().name, parse_math=False)
    axes.grid(alpha=0.3)
    axes.legend()
    try:
        figure.savefig(picture, dpi=120)
    except OSError as error:
        raise file_error(f"{picture}: cannot be written", error) from error
    return picture


def main():
    parser = Parser(prog="python -m acceleron.plot", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=nonempty)
    print(f"wrote {plot_losses(Path(parser.parse_args().run_dir))}")


if __name__ == "__main__":
    sys.exit(run_command(main))
