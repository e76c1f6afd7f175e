"""The report of a results directory: report.md, with plots beside it, made from the rows alone.

    python -m bench report [DIR] [--compare OTHER] [--output DIR]

What failed comes first, then the headline figures. Rows without a passed check are never shown as results.
With --compare the exit status is 1 if there is a regression.
"""

import argparse
import html
import re
import sys
from pathlib import Path

import pandas as pd

from acceleron.errors import InputError

from .plots import draw
from .quality import final_runs, summary
from .rows import FILE, Row, default_directory, ratio, read, spread

KEYS = ["benchmark", "provider", "case", "device", "switches"]  # rows of equal keys measure the same thing
UNITS = {"s": ("ms", 1e-3), "bytes": ("MiB", 2**20), "FLOP/s": ("TFLOP/s", 1e12), "bytes/s": ("GB/s", 1e9)}
HIDDEN = {"flops", "bytes", "flops_per_token", "peak_flops", "ceiling_flops", "ceiling_bytes", "val_tokens", "loss"}
PROFILED = 15  # kernels of a profile that are shown
RANGES = "Ranges: p20 .. p80, or 95 % confidence over seeds. `relative`: to the line of the same rounds with 1."
# Two runs on one machine differ by more than the rounds of each. Smaller changes are not marked; a loss is steadier.
FLOOR, LOSS_FLOOR = 0.05, 0.005


def escape(value: object) -> str:
    """Text as a line of Markdown without markup; a float with four digits, or all before the point; nothing for NaN."""
    if isinstance(value, float):
        return "" if value != value else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return re.sub(r"([\\`*_|\[\]#~$])", r"\\\1", html.escape(" ".join(str(value).split()), quote=False))


def markdown(lines: list[dict] | pd.DataFrame) -> str:
    """A table, or nothing if there are no lines."""
    frame = pd.DataFrame(lines)
    if frame.empty:
        return ""
    cells = [map(escape, line) for line in (frame.columns, *frame.itertuples(index=False))]
    first, *rest = ["| " + " | ".join(line) + " |" for line in cells]
    return "\n".join([first, "|" + " --- |" * len(frame.columns), *rest])


def ranged(values: tuple[float, float, float], size: float = 1) -> str:
    """The middle (low .. high), in units of `size`."""
    middle, low, high = (escape(value / size) for value in values)
    return middle if low == high else f"{middle} ({low} .. {high})"


def text_of(fields: dict) -> str:
    return ", ".join(f"{name} {value}" for name, value in fields.items())


def latest(rows: list[Row]) -> pd.DataFrame:
    """The last row by date for each of KEYS, and `why` it is no result: "FAILED: ...", "absent: ..." or nothing."""
    lines = []
    for row in rows:
        why = f"absent: {row.absent}" if row.absent else f"FAILED: {row.complaint()}" if row.complaint() else ""
        device, switches, date = (row.about.get(name, "") for name in ("device", "switches", "date"))
        case = text_of(dict(sorted(row.case.items())))
        lines.append((row.benchmark, row.provider, case, device, text_of(switches or {}), date, why, row))
    frame = pd.DataFrame(lines, columns=[*KEYS, "date", "why", "row"])
    return frame.sort_values("date", kind="stable").drop_duplicates(KEYS, keep="last").sort_index()


def baseline(row: Row, rows: list[Row]) -> Row | None:
    """The row that this one is relative to: the fastest dense row of its case and rounds, or else the first row."""
    group, date = row.group, row.about.get("date")
    same = [r for r in rows if group and (r.group, r.about.get("date"), r.case) == (group, date, row.case)]
    if len(same) < 2:
        return None
    if row.benchmark != "throughput":
        return same[0]
    return max((r for r in same if r.provider.startswith("dense")), key=lambda r: r.median, default=None)


def not_measured(frame: pd.DataFrame) -> str:
    """A line for each reason why these rows are no results."""
    lines = []
    for (why, benchmark), found in frame.groupby(["why", "benchmark"]):
        what = [f"{row.provider} ({row.case})" if row.case else row.provider for row in found[:5].itertuples()]
        what += [f"{len(found) - 5} more"] * (len(found) > 5)
        lines.append("- " + escape(f"{benchmark}, {why}: {'; '.join(what)}"))
    return "\n".join(lines)


def speed(rows: list[Row]) -> list[dict]:
    """Tokens/s of the MoE and the dense baseline of each size, in the mode in which the dense baseline is fastest.

    The MoE must not win by a mode that slows the dense baseline, nor by balanced routing.
    """
    best: dict[tuple, tuple] = {}
    for row in rows:
        if row.benchmark == "throughput" and row.provider.startswith("MoE") and (dense := baseline(row, rows)):
            key = row.about.get("device"), row.case["size"], row.case["dtype"]
            rank = row.case["mode"] != "balanced", dense.median, row.median
            best[key] = max(best.get(key, ()), (rank, row, dense), key=lambda entry: entry[:1])
    lines = []
    for (device, size, dtype), (_, row, dense) in best.items():
        line = {"device": device, "size": size, "dtype": dtype, "mode": row.case["mode"]}
        line |= {"MoE tokens/s": ranged(spread(row.values)), "dense tokens/s": ranged(spread(dense.values))}
        lines.append(line | {"MoE / dense": ranged(ratio(row, dense)), "MFU": row.details.get("mfu")})
    return lines


def quality(rows: list[Row]) -> list[dict]:
    """The MoE against its dense baseline at equal tokens and at equal loss."""
    lines = []
    for (device, size, dtype, _), runs in final_runs(rows).items():
        difference, clock = (ranged(found) if found else "unknown" for found in summary(runs))
        line = {"device": device, "size": size, "dtype": dtype, "validation loss, dense - MoE (nats)": difference}
        lines.append(line | {"wall clock to the dense baseline's loss, MoE / dense": clock})
    return lines


def section(name: str, rows: list[Row], sources: list[dict]) -> str:
    """A benchmark's table, and its profiles. What all rows have in common stands above the table."""
    lines, profiles = [], []
    for row in rows:
        unit, size = UNITS.get(row.unit, (row.unit, 1))
        line = row.case | {"device": row.about.get("device", ""), "switches": text_of(row.about.get("switches", {}))}
        line["provider"] = row.provider
        if row.values:
            line[unit] = ranged(spread(row.values), size)
        if row.values and (base := baseline(row, rows)):
            line["relative"] = "1" if base is row else ranged(ratio(row, base))
        for detail, value in row.details.items():
            if detail == "profile":
                kernels = pd.DataFrame(value).assign(share=lambda frame: frame.seconds / frame.seconds.sum())
                title = f"Kernels of a step, {row.provider}, {text_of(row.case)}:"
                profiles += [escape(title), markdown(kernels[:PROFILED])]
            elif isinstance(value, (str, int, float)) and detail not in HIDDEN:
                in_bytes = detail.endswith("bytes")
                line[detail.replace("bytes", "MiB") if in_bytes else detail] = value / 2**20 if in_bytes else value
        lines.append(line)
    frame = pd.DataFrame(lines).rename(columns=lambda head: head.replace("_", " "))
    frame["error / allowed"] = [f"{escape(float(row.error))} / {escape(float(row.allowed))}" for row in rows]
    frame["source"] = [sources.index(row.about) + 1 for row in rows]
    common = [head for head in frame if frame[head].astype(str).nunique(dropna=False) == 1]
    above = ", ".join(f"{escape(head)} {text}" for head in common if (text := escape(frame[head][0])))
    checks = escape("; ".join(dict.fromkeys(row.check for row in rows)))
    blocks = [f"## {escape(name)}", above, markdown(frame.drop(columns=common))]
    blocks += [f"<details><summary>Checks</summary>{checks}</details>", *profiles]
    return "\n\n".join(filter(None, blocks))


def changes(here: list[Row], there: list[Row]) -> list[dict]:
    """Regressions and improvements since `there` beyond the spread of both. What fails now is a regression.

    Raises InputError if the two have nothing in common.
    """
    before = latest(there)
    both = before[before.why == ""].merge(latest(here), on=KEYS, suffixes=("_before", ""))
    if both.empty:
        raise InputError("--compare: no row has the benchmark, provider, case, device and switches of a row there")
    lines = []
    for line in both.itertuples():
        row, mark, figures = line.row, f"regression, {line.why}" if line.why.startswith("FAILED") else "", {}
        if line.row_before.values and row.values and not line.why:
            (old, *before), (new, *now) = spread(line.row_before.values), spread(row.values)
            apart = before[1] < now[0] or now[1] < before[0]
            if apart and abs(new - old) > (LOSS_FLOOR if row.unit == "nats" else FLOOR) * old:
                mark = "improvement" if (new > old) == row.unit.endswith("/s") else "regression"
                figures = {"before": ranged((old, *before)), "now": ranged((new, *now)), "unit": row.unit}
        if mark:
            lines.append({"mark": mark} | {key: getattr(line, key) for key in KEYS} | figures)
    return sorted(lines, key=lambda line: line["mark"], reverse=True)


def report(rows: list[Row], output: Path, changed: list[dict] | None = None) -> str:
    """The text of report.md. Writes the plots that it shows to `output`."""
    frame = latest(rows)
    failed, absent = (frame.why.str.startswith(start) for start in ("FAILED", "absent"))
    valid, sources = list(frame.row[~failed & ~absent]), []
    for row in valid:
        sources += [row.about] * (row.about not in sources)
    blocks = [
        f"# Benchmarks on {escape('; '.join(filter(None, frame.device.unique())))}",
        not_measured(frame[failed]) or "No row failed.",
    ]
    blocks += [markdown(speed(valid)) or "Tokens/s of the MoE and its dense baseline were not measured."]
    blocks += [markdown(quality(valid)), RANGES, *(f"![{name}]({name}.svg)" for name in draw(valid, output))]
    if changed is not None:
        blocks += ["## Changes", markdown(changed) or "None beyond the spread of both."]
    for name in dict.fromkeys(row.benchmark for row in valid):
        blocks.append(section(name, [row for row in valid if row.benchmark == name], sources))
    blocks += ["## Absent", not_measured(frame[absent])] if absent.any() else []
    numbered = [{"source": number} | about for number, about in enumerate(sources, 1)]
    return "\n\n".join([*filter(None, blocks), "## Sources", markdown(numbered)]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("directory", nargs="?", type=Path, metavar="DIR", help="default: the newest results")
    parser.add_argument("--compare", type=Path, metavar="OTHER", help="earlier results, to mark what changed")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: the directory of the results")
    arguments = parser.parse_args()
    newest = max(default_directory().glob(f"*/{FILE}"), default=default_directory() / FILE).parent
    directory = arguments.directory or newest
    rows, output = read(directory), arguments.output or directory
    changed = changes(rows, read(arguments.compare)) if arguments.compare else None
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "report.md").write_text(report(rows, output, changed), encoding="utf-8", errors="replace")
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written ({error.strerror})") from error
    print(f"wrote {output / 'report.md'}")
    for line in changed or ():
        print(text_of(line))
    if any(line["mark"].startswith("regression") for line in changed or ()):
        sys.exit(1)
