"""The loss curve of a run as a picture: python -m acceleron.training.plot RUN_DIR writes RUN_DIR/loss.png."""

import json
import sys
from pathlib import Path

from ..errors import InputError, file_error, path_error, run_command
from ..flags import Parser


def plot_losses(run_dir: Path) -> Path:
    """Training loss (a mean over each log interval) and validation loss against tokens. Raises InputError."""
    path = run_dir / "metrics.jsonl"
    if not path.is_file():
        raise path_error("RUN_DIR", path if run_dir.is_dir() else run_dir, "directory")
    try:
        import matplotlib
    except ImportError as error:
        raise InputError("plots need matplotlib: pip install matplotlib") from error
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    try:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        tokens, losses = zip(*[(r["tokens"], r["loss"]) for r in records], strict=True)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path}: not the metrics of a run ({error})") from error
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    axes.plot(tokens, losses, label="training")
    validated = [(r["tokens"], r["val_loss"]) for r in records if "val_loss" in r]
    if validated:
        axes.plot(*zip(*validated, strict=True), "o-", label="validation")
    axes.set(xlabel="tokens", ylabel="cross-entropy (nats a token)", title=run_dir.resolve().name)
    axes.grid(alpha=0.3)
    axes.legend()
    picture = run_dir / "loss.png"
    try:
        figure.savefig(picture, dpi=120)
    except OSError as error:
        raise file_error(f"{picture}: cannot be written", error) from error
    return picture


def main():
    parser = Parser(prog="python -m acceleron.training.plot", description=__doc__)
    parser.add_argument("run_dir", metavar="RUN_DIR", type=Path)
    print(f"wrote {plot_losses(parser.parse_args().run_dir)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
