"""Write report.md and its plots to a results directory: failures, headline figures, then every valid row.

python -m bench report [DIR] [--compare OTHER]. With --compare the exit status is 1 if there is a regression.
"""

import argparse
import html
import re
import sys
from pathlib import Path

import matplotlib
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from acceleron.errors import InputError, file_error
from acceleron.flags import Parser, nonempty

from .quality import final_runs, summary
from .rows import FILE, Row, default_directory, number, ranged, ratio, read, spread

KEYS = ["benchmark", "provider", "case", "device", "switches"]  # rows with equal keys measure the same thing
UNITS = {"s": ("ms", 1e-3), "bytes": ("MiB", 2**20), "FLOP/s": ("TFLOP/s", 1e12), "bytes/s": ("GB/s", 1e9)}
HIDDEN = {"flops", "bytes", "flops_per_token", "peak_flops", "ceiling_flops", "ceiling_bytes", "val_tokens", "loss"}
RANGES = "Ranges: p20 .. p80, or 95% confidence over seeds. `relative`: ratio to the row with 1 in the same rounds."
# Runs vary more than rounds within a run do, so smaller relative changes are ignored. Losses vary less.
FLOOR, LOSS_FLOOR = 0.05, 0.005
STYLE = {"svg.hashsalt": "0", "svg.fonttype": "none", "text.parse_math": False, "figure.constrained_layout.use": True}


def escape(value: object) -> str:
    """Return one line of escaped Markdown. `number` formats floats; NaN becomes an empty string."""
    if isinstance(value, float):
        return "" if value != value else number(value)
    return re.sub(r"([\\`*_|\[\]#~$])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def table(lines: list[dict] | pd.DataFrame) -> str:
    """Return a Markdown table, or an empty string if there are no lines."""
    frame = pd.DataFrame(lines)
    cells = [frame.columns, ["---"] * len(frame.columns), *frame.itertuples(index=False)]
    return "\n".join(f"| {' | '.join(map(escape, line))} |" for line in cells) if len(frame) else ""


def latest(rows: list[Row]) -> pd.DataFrame:
    """Return the latest row per KEYS. `why` is "FAILED: ...", "absent: ..." or, for a valid row, empty."""
    lines = []
    for row in rows:
        why = ("absent: " if row.absent else "FAILED: ") + row.problem() if row.problem() else ""
        case = ", ".join(f"{name} {value}" for name, value in sorted(row.case.items()))
        about = (str(row.about.get(name, "")) for name in ("device", "switches", "date"))
        lines.append((row.benchmark, row.provider, case, *about, why, row))
    frame = pd.DataFrame(lines, columns=[*KEYS, "date", "why", "row"])
    return frame.sort_values("date", kind="stable").drop_duplicates(KEYS, keep="last").sort_index()


def baseline(row: Row, rows: list[Row]) -> Row | None:
    """Return the row to compare with, from the same case and rounds: the fastest dense row if any, or the first row."""
    key = row.group, row.about.get("date"), row.case
    same = [r for r in rows if row.group and (r.group, r.about.get("date"), r.case) == key]
    if row.benchmark == "throughput":
        same = sorted((r for r in same if r.provider.startswith("dense")), key=lambda r: -r.median)
    return next(iter(same), None)


def speed(rows: list[Row]) -> list[dict]:
    """Pair MoE and dense baseline of each size, in the baseline's fastest mode; "balanced" only as a last resort."""
    pairs = [(row, baseline(row, rows)) for row in rows if (row.benchmark, row.provider[:3]) == ("throughput", "MoE")]
    pairs = [(row.case["mode"] != "balanced", dense.median, row.median, row, dense) for row, dense in pairs if dense]
    best = {}
    for *_, row, dense in sorted(pairs, key=lambda pair: pair[:3]):  # best last
        line = {"device": row.about.get("device")} | {name: row.case[name] for name in ("size", "dtype", "mode")}
        line |= {"MoE tokens/s": ranged(spread(row.values)), "dense tokens/s": ranged(spread(dense.values))}
        line |= {"MoE / dense": ranged(ratio(row, dense)), "MFU": row.details.get("mfu")}
        best[line["device"], line["size"], line["dtype"]] = line
    return list(best.values())


def section(rows: list[Row], sources: list[dict]) -> str:
    """Return a table of one benchmark's rows."""
    lines = []
    for row in rows:
        (unit, size), base = UNITS.get(row.unit, (row.unit, 1)), baseline(row, rows)
        line = row.case | {"provider": row.provider}
        if row.values:
            line |= {unit: ranged(spread(row.values), size)} | ({"relative": ranged(ratio(row, base))} if base else {})
        line |= {name: value for name, value in row.details.items() if isinstance(value, (str, int, float))}
        line |= {"error": float(row.error), "allowed": float(row.allowed), "check": row.check}
        lines.append(line | {"source": sources.index(row.about) + 1})
    frame = pd.DataFrame(lines).drop(columns=HIDDEN, errors="ignore")
    for name in frame.filter(regex="_bytes$"):
        frame[name] /= 2**20
    return table(frame.rename(columns=lambda name: re.sub("_bytes$", " MiB", name).replace("_", " ")))


def changes(here: list[Row], there: list[Row]) -> list[dict]:
    """List changes since `there` beyond the spread of both: regressions, including new failures, and improvements."""
    both = latest(there).query("why == ''").merge(latest(here), on=KEYS, suffixes=("_before", ""))
    if both.empty:
        raise InputError("--compare: no row has the same benchmark, provider, case, device and switches in both")
    lines = []
    for line in both.itertuples():
        mark = "regression" if line.why.startswith("FAILED") else ""
        before = ""
        now = line.why
        if not line.why and line.row.values and line.row_before.values:
            (old, *most), (new, *least) = spread(line.row_before.values), spread(line.row.values)
            before = ranged((old, *most))
            now = ranged((new, *least))
            unit = line.row.unit
            if max(most[0] - least[1], least[0] - most[1]) > (LOSS_FLOOR if unit == "nats" else FLOOR) * old:
                mark = "improvement" if (new > old) == unit.endswith("/s") else "regression"
        if mark:
            lines.append({"mark": mark, "before": before, "now": now} | {key: getattr(line, key) for key in KEYS})
    return lines


def bars(rows: list[Row]) -> Figure:
    """Plot bars of tokens/s with p20 and p80, one panel per size and device."""
    frame = pd.DataFrame([row.case | row.about | {"row": row} for row in rows])
    panels = list(frame.groupby(["size", "device"], sort=False).row)
    figure = Figure(figsize=(9, 0.25 * len(frame) + len(panels)))
    for axis, (panel, part) in zip(figure.subplots(len(panels), squeeze=False).flat, panels, strict=True):
        names = [", ".join(map(str, (r.provider, *r.case.values(), *r.about.get("switches", ())))) for r in part]
        middle, low, high = np.transpose([spread(row.values) for row in part])
        colors = ["#0072b2" if row.provider.startswith("MoE") else "#e69f00" for row in part]
        axis.barh(names, middle, xerr=[middle - low, high - middle], color=colors)
        axis.set(title=", ".join(panel), xlabel="tokens/s")
        axis.invert_yaxis()
    return figure


def losses(commands: list[pd.DataFrame]) -> Figure:
    """Plot validation loss against tokens after 20% of the budget, a panel per command: seeds (thin) and their mean."""
    figure = Figure(figsize=(7 * len(commands), 4))
    for axis, runs in zip(figure.subplots(1, len(commands), squeeze=False).flat, commands, strict=True):
        full = runs[runs.tokens == runs.tokens.max()]
        for model, label, color in (("dense", "dense baseline", "#e69f00"), ("MoE", "MoE", "#0072b2")):
            curves = np.array([*full[full.model == model].curve])  # (seeds, points, 3: tokens, seconds, loss)
            if len(curves):
                curves = curves[:, curves.shape[1] // 5 :]
                tokens, _, mean = curves.mean(0).T
                axis.plot(tokens, curves[:, :, 2].T, color=color, linewidth=0.6, alpha=0.5)
                axis.plot(tokens, mean, color=color, linewidth=2, label=f"{label}, mean of {len(curves)} seeds")
        axis.set(xlabel="tokens", ylabel="validation loss (nats per token)")
        axis.xaxis.set_major_formatter("{x:,.0f}")
        axis.legend(title=", ".join(map(str, full.iloc[0][["size", "dtype"]])))
        axis.grid(alpha=0.3)
    return figure


def report(rows: list[Row], output: Path, changed: list[dict] | None = None) -> str:
    """Return the text of report.md. Writes its plots to `output`."""
    frame = latest(rows)
    missing = frame[frame.why != ""].groupby(["why", "benchmark", "provider"], as_index=False).case.agg("; ".join)
    failed, absent = (table(missing[missing.why.str.startswith(start)]) for start in ("FAILED", "absent"))
    valid = list(frame.row[frame.why == ""])
    sources = list({str(row.about): row.about for row in valid}.values())
    blocks = [f"# Benchmarks on {escape('; '.join(filter(None, frame.device.unique())))}", failed or "No row failed."]
    blocks += [table(speed(valid)) or "No MoE was measured together with its dense baseline."]
    trained, runs = [row for row in valid if row.benchmark == "throughput"], final_runs(valid)
    blocks += [table([summary(each) for each in runs]), RANGES]
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figures = {"throughput": bars(trained)} if trained else {}
        figures |= {"loss": losses(runs)} if runs else {}
        for name, figure in figures.items():
            figure.savefig(output / f"{name}.svg", metadata={"Date": None})
            blocks.append(f"![{name}]({name}.svg)")
    if changed is not None:
        blocks += ["## Changes", table(changed) or "No change exceeds the spread of both."]
    for name in dict.fromkeys(row.benchmark for row in valid):
        blocks += [f"## {escape(name)}", section([row for row in valid if row.benchmark == name], sources)]
    blocks += ["## Absent", absent] if absent else []
    blocks += ["## Sources", table([{"source": index} | about for index, about in enumerate(sources, 1)])]
    return "\n\n".join(filter(None, blocks)) + "\n"


def main():
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=nonempty, metavar="DIR", help="default: the newest results")
    parser.add_argument("--compare", type=nonempty, metavar="OTHER", help="earlier results to compare with")
    given = parser.parse_args()
    newest = max(default_directory().glob(f"*/{FILE}"), default=default_directory() / FILE).parent
    directory = Path(given.directory or newest)
    rows, path = read(directory), directory / "report.md"
    changed = changes(rows, read(Path(given.compare), "--compare")) if given.compare else None
    try:
        path.write_text(report(rows, directory, changed), encoding="utf-8", errors="replace")
    except OSError as error:
        raise file_error(f"{path}: cannot be written", error) from error
    print(f"wrote {path}")
    sys.exit(any(line["mark"] == "regression" for line in changed or ()))
