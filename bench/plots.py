"""The report's plots, as <svg> elements: text is text, and ink is currentColor, so that they suit light and dark pages.

The same rows give the same bytes. Needs matplotlib.
"""

import io
import re
import statistics
from itertools import groupby

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from .page import plain

INK = "#010203"  # stands for the page's own text colour until the SVG is written
MODELS = {"moe": ("MoE", "#2f7fd6", "-"), "dense": ("dense twin", "#e07b00", "--")}
# Okabe and Ito's colours that show on black and on white, and a marker for those who see no colours.
PROVIDERS = [
    ("#2f7fd6", "o"), ("#e07b00", "s"), ("#009e73", "^"), ("#cc79a7", "D"), ("#8c6bb1", "v"), ("#b8860b", "P"),
    ("#56b4e9", "X"), ("#d55e00", "<"), ("#7f7f7f", ">"),
]  # fmt: skip
STYLE = {
    "svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif", "font.size": 9,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 10, "axes.titlelocation": "left",
    "legend.frameon": False, "figure.constrained_layout.use": True, "savefig.transparent": True,
    **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK),
}  # fmt: skip
WIDTH = 9  # inches


def _drawn(name: str, draw) -> str:
    """The SVG of what `draw()` returns, a Figure. Ids in it begin with what `name` gives, so that plots share none."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE | {"svg.hashsalt": name})
        file = io.StringIO()
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        draw().savefig(file, format="svg", metadata=nothing)
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]  # less the XML header, which names a DTD on the web
    svg = re.sub(r' xmlns(:\w+)?="[^"]*"', "", svg)  # HTML knows both
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # figure_1, axes_1: nothing refers to them, and every plot has them
    return svg.replace(INK, "currentColor").strip()


def _panels(groups: dict[str, list], per_line: float = 0.24):
    """A figure with one panel of horizontal lines a group, each as high as it has entries."""
    heights = [len(entries) + 1.5 for entries in groups.values()]
    figure = Figure(figsize=(WIDTH, sum(heights) * per_line + 0.7 * len(groups) + 0.3))
    axes = figure.subplots(len(groups), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    return figure, dict(zip(groups, axes, strict=True))


def _grouped(rows: list[dict], *names: str) -> dict[str, list[dict]]:
    """The rows of each panel, by its title: what the rows have in common, and their device."""
    groups: dict[str, list[dict]] = {}
    for row in rows:
        groups.setdefault(", ".join(row[name] for name in (*names, "device")), []).append(row)
    return groups


def _label_lines(axes, labels: list[str]):
    axes.set_yticks(range(len(labels)), [plain(label) for label in labels])
    axes.set_ylim(len(labels) - 0.4, -0.6)  # the first on top
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="x", alpha=0.3)


def throughput(rows: list[dict], mode) -> str:
    """Bars of tokens/s with p20 and p80, a panel a size; `mode(row)` is the label of a row."""

    def draw() -> Figure:
        groups = _grouped(rows, "size")
        figure, panels = _panels(groups)
        for title, axes in panels.items():
            for line, row in enumerate(groups[title]):
                middle = row["tokens_per_second"]
                around = [[middle - row["tokens_per_second_p20"]], [row["tokens_per_second_p80"] - middle]]
                axes.barh(line, middle, 0.7, color=MODELS[row["model"]][1])
                axes.errorbar(middle, line, xerr=[[max(x, 0)] for [x] in around], color=INK, capsize=2, linewidth=1)
            _label_lines(axes, [f"{MODELS[row['model']][0]}, {mode(row)}" for row in groups[title]])
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.set(title=plain(title), xlabel="tokens/s")
        return figure

    return _drawn("throughput", draw)


def _budget(run: dict) -> tuple[str, int]:
    return run["model"], run["tokens"]


def _curve(line, points, model: str, **look):
    tokens, seconds, losses = zip(*points, strict=True)
    _, colour, style = MODELS[model]
    line[0].plot(tokens, losses, style, color=colour, **look)
    line[1].plot(seconds, losses, style, color=colour, **look)


def loss(rows: list[dict]) -> str:
    """Validation loss of final runs against tokens and wall clock, a line of panels a size: each run, and the mean of
    the runs of one budget where they were evaluated at the same tokens."""

    def draw() -> Figure:
        groups = _grouped(rows, "size", "dtype")
        figure = Figure(figsize=(WIDTH, 3.6 * len(groups)))
        for title, line in zip(groups, figure.subplots(len(groups), 2, squeeze=False, sharey="row"), strict=True):
            for _, runs in groupby(sorted(groups[title], key=_budget), _budget):
                runs = [run for run in runs if run["curve"]]
                for run in runs:
                    _curve(line, run["curve"], run["model"], linewidth=0.7, alpha=0.4)
                grids = {tuple(point[0] for point in run["curve"]) for run in runs}
                if len(grids) == 1:
                    points = zip(*(run["curve"] for run in runs), strict=True)
                    mean = [[statistics.fmean(values) for values in zip(*point, strict=True)] for point in points]
                    _curve(line, mean, runs[0]["model"], linewidth=2)
            for model, (name, colour, style) in MODELS.items():
                if any(run["model"] == model for run in groups[title]):
                    line[0].plot([], [], style, color=colour, linewidth=2, label=name)
            line[0].legend()
            line[0].set(xlabel="tokens", ylabel="validation loss (nats a token)", title=plain(title))
            line[1].set(xlabel="training wall clock (s)")
            line[0].xaxis.set_major_formatter(EngFormatter(sep=""))
            for axes in line:
                axes.grid(alpha=0.3)
        return figure

    return _drawn("loss", draw)


def _op(row: dict) -> str:
    return f"{row['op']}, {row['shape']}, {row['dtype']}"


def roofline(rows: list[dict]) -> str:
    """The share of the measured ceiling that each provider reaches, a line an op, shape, dtype and pass."""

    def draw() -> Figure:
        groups = _grouped(rows, "pass")
        providers = list(dict.fromkeys(row["provider"] for row in rows))
        lines = {name: list(dict.fromkeys(map(_op, group))) for name, group in groups.items()}
        figure, panels = _panels(lines)
        for name, axes in panels.items():
            for index, provider in enumerate(providers):
                colour, marker = PROVIDERS[index % len(PROVIDERS)]
                theirs = [row for row in groups[name] if row["provider"] == provider]
                shares = [100 * row["share_of_ceiling"] for row in theirs]
                places = [lines[name].index(_op(row)) for row in theirs]
                axes.plot(shares, places, marker, color=colour, label=plain(provider), markersize=5, alpha=0.9)
            axes.axvline(100, color=INK, linewidth=1)
            axes.set_xlim(left=0)
            _label_lines(axes, lines[name])
            axes.set(title=plain(name), xlabel="share of the ceiling measured in the same run (%)")
        figure.legend(*axes.get_legend_handles_labels(), loc="outside upper center", ncols=min(5, len(providers)))
        return figure

    return _drawn("roofline", draw)


def _memory_label(row: dict) -> str:
    modes = [mode for mode in ("compiled", "checkpointing") if row.get(mode)]
    return ", ".join([row["part"], row["provider"], row["dtype"], *modes])


def memory(rows: list[dict]) -> str:
    """Bars of bytes, a panel for each thing measured and size; a tick where the formula puts it."""

    def draw() -> Figure:
        groups = _grouped(rows, "what", "size")
        figure, panels = _panels(groups)
        providers = list(dict.fromkeys(row["provider"] for row in rows))
        for name, axes in panels.items():
            for line, row in enumerate(groups[name]):
                colour = PROVIDERS[providers.index(row["provider"]) % len(PROVIDERS)][0]
                axes.barh(line, row["bytes"] / 2**20, 0.7, color=colour)
                if row.get("formula_bytes"):
                    axes.plot(row["formula_bytes"] / 2**20, line, "|", color=INK, markersize=12, markeredgewidth=2)
            _label_lines(axes, [_memory_label(row) for row in groups[name]])
            axes.set(title=plain(name), xlabel="MiB (the tick is the formula's)")
        return figure

    return _drawn("memory", draw)
