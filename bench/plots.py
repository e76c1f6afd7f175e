"""The report's plots: SVG files, the same bytes from the same rows."""

from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from .quality import final_runs
from .rows import Row, spread

STYLE = {
    "svg.hashsalt": "acceleron", "svg.fonttype": "none", "text.parse_math": False, "font.size": 9, "axes.grid": True,
    "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "grid.alpha": 0.3,
    "legend.frameon": False, "figure.constrained_layout.use": True, "savefig.facecolor": "white",
}  # fmt: skip
# Okabe and Ito's, which colour-blind readers can tell apart; the MoE's comes first, then the dense baseline's.
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999", "#000000")


def bars(rows: list[Row]) -> Figure:
    """Tokens/s of throughput rows with p20 and p80, a panel for each size and device."""
    lines = []
    for row in rows:
        fields = [str(value) for name, value in row.case.items() if name != "size"]
        case = ", ".join([*fields, *row.about.get("switches", {})])
        panel = f"{row.case['size']}, {row.about.get('device')}"
        lines.append((panel, case, row.provider, *spread(row.values)))
    frame = pd.DataFrame(lines, columns=["panel", "case", "provider", "median", "p20", "p80"])
    wide = frame.pivot_table(["median", "p20", "p80"], ["panel", "case"], "provider", sort=False)
    panels = [(panel, part.droplevel("panel")) for panel, part in wide.groupby("panel", sort=False)]
    figure = Figure(figsize=(9, 0.25 * len(frame) + len(panels)))
    axes = figure.subplots(len(panels), squeeze=False, height_ratios=[len(part) + 1 for _, part in panels])[:, 0]
    for axis, (panel, part) in zip(axes, panels, strict=True):
        errors = np.stack([part["median"] - part.p20, part.p80 - part["median"]]).transpose(2, 0, 1)
        part["median"].plot.barh(ax=axis, xerr=errors, color=COLOURS, width=0.8, legend=False)
        axis.set(title=panel, xlabel="tokens/s", ylabel="")
        axis.invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=4)
    return figure


def losses(runs: dict[tuple[str, str, str, str], list[Row]]) -> Figure:
    """Validation loss against tokens and wall clock: the runs thin, their mean for each model and budget bold."""
    figure = Figure(figsize=(9, 3.6 * len(runs)))
    grid = figure.subplots(len(runs), 2, squeeze=False, sharey="row")
    for (left, right), (title, rows) in zip(grid, runs.items(), strict=True):
        curves: dict[tuple[str, int], list] = {}
        for row in rows:
            curves.setdefault((row.provider, row.case["tokens"]), []).append(row.details["curve"])
        for (model, budget), found in curves.items():
            look = dict(color=COLOURS[model != "MoE"], linestyle="-" if model == "MoE" else "--")
            for curve, width in [*((curve, 0.6) for curve in found), (np.mean(found, axis=0), 2)]:
                tokens, seconds, loss = np.transpose(curve)
                left.plot(tokens, loss, linewidth=width, **look)
                right.plot(seconds, loss, linewidth=width, **look)
            left.lines[-1].set_label(f"{model}, {budget:,} tokens")
        left.set(xlabel="tokens", ylabel="validation loss (nats)", title=", ".join(title[:3]))
        right.set(xlabel="training wall clock (s)", title=title[3])
        left.legend()
    return figure


def draw(rows: list[Row], directory: Path) -> list[str]:
    """Write <name>.svg for each plot that these valid rows give. Returns the names."""
    throughput, runs, figures = [row for row in rows if row.benchmark == "throughput"], final_runs(rows), {}
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        if throughput:
            figures["throughput"] = bars(throughput)
        if runs:
            figures["loss"] = losses(runs)
        for name, figure in figures.items():
            figure.savefig(directory / f"{name}.svg", metadata={"Date": None})
    return list(figures)
