"""The report of a results directory: report.html, one self-contained page, and report.md, the same without the plots.

    python -m bench report [RESULTS_DIR] [--compare BASELINE_DIR] [--output DIR]

Made from the rows alone: the same rows give the same bytes. Rows without a passed correctness check are refused and
listed. With --compare the exit status is 1 if there is a regression, and 2 if the two have nothing to compare.
"""

import argparse
import sys
from pathlib import Path

from acceleron.errors import InputError

from . import comparison, page, results, sections
from . import rows as fields
from .rows import Rows
from .sections import ratio_text

UNMEASURED = "not measured whether the MoE beats its dense twin on wall clock at equal active parameters."


def headline(rows: Rows) -> str:
    """The report's first line: at equal active parameters, does the MoE beat its dense twin on wall clock?"""
    known = [*rows.used["quality"], *rows.used["throughput"]] or rows.everything()
    devices = dict.fromkeys(row["device"] for row in known)
    answers = [f"On {device}: {_answer(rows, device)} {_rates(rows, device)}" for device in devices]
    return " ".join(answers) or f"Without a valid measurement: {UNMEASURED}"


def _answer(rows: Rows, device: str) -> str:
    answers = []
    for (where, size, dtype), runs in sections.loss_runs(rows.used["quality"]).items():
        if where != device:
            continue
        found, name = sections.statistic("time_to_dense_loss", runs), f"{size} in {dtype}"
        if found is None:
            answers.append(f"unknown for {name}: its runs do not give the MoE's time to its dense twin's final loss.")
            continue
        verdict = "yes" if found["high"] < 1 else "no" if found["low"] > 1 else "undecided"
        answers.append(
            f"{verdict} for {name}: at equal active parameters the MoE reaches its dense twin's final loss in "
            f"{ratio_text(found['ratio'])} of the twin's wall-clock time (95 % interval {ratio_text(found['low'])} .. "
            f"{ratio_text(found['high'])}, {found['seeds']} seeds"
            + (f", {found['extrapolated']} of them extrapolated)." if found.get("extrapolated") else ").")
        )
    return " ".join(answers) or UNMEASURED


def _rates(rows: Rows, device: str) -> str:
    ours = fields.latest("throughput", [row for row in rows.used["throughput"] if row["device"] == device])
    found = []
    for size in dict.fromkeys(row["size"] for row in ours):
        pair = sections.fastest_pair([row for row in ours if row["size"] == size])
        if pair:
            moe = pair[0]
            how = [moe["dtype"], "compiled" if moe["compiled"] else "eager"]
            how += ["checkpointed"] * moe["checkpointing"] + ["deterministic"] * bool(moe.get("deterministic"))
            how += [f"{moe['routing']} routing"] * (moe["routing"] != "learned")
            found.append(f"{size} {sections.ratio_cell(*pair)} ({', '.join(how)})")
    if not found:
        return "The ratio of their training tokens/s was not measured."
    return f"Training tokens/s, MoE / dense twin: {'; '.join(found)}."


def write(rows: Rows, output: Path, baseline: Rows | None = None) -> comparison.Comparison | None:
    """Write report.html and report.md; returns the comparison with a baseline, where there is one.

    Raises InputError if the directory can't be written.
    """
    plots = _plots()
    where = "The plots are in report.html." if plots else "The plots are left out, as matplotlib is not installed."
    lead = "Lines name their source by number; the last table of a section lists its sources. Ranges are p20 .. p80."
    parts = [page.Section("How to read this", [f"{lead} {where}"])]
    names = [name for name in fields.FIELDS if rows.used[name] or rows.missing[name]]
    parts += [sections.section(name, rows, plots) for name in names]
    compared = comparison.compare(rows, baseline) if baseline else None
    if compared:
        parts.append(sections.compared(compared, baseline))
    if rows.refused:
        parts.append(sections.refused(rows))
    title = headline(rows)
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "report.html").write_text(page.to_html(title, parts), encoding="utf-8")
        (output / "report.md").write_text(page.to_markdown(title, parts), encoding="utf-8")
    except OSError as error:
        raise InputError(f"--output {output}: cannot be written ({error.strerror})") from error
    return compared


def _plots():
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return None
    from . import plots

    return plots


def newest(directory: Path) -> Path:
    """The last results directory by name, which begins with its date. Raises InputError if there is none."""
    found = sorted({path.parent for path in directory.glob("*/*.jsonl")})
    if not found:
        raise InputError(
            f"{directory}: no results there yet; make some with python -m bench throughput, or name a directory"
        )
    return found[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, metavar="RESULTS_DIR", help="default: the newest")
    parser.add_argument("--compare", type=Path, metavar="BASELINE_DIR", help="earlier results, to mark what changed")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: RESULTS_DIR")
    arguments = parser.parse_args()
    directory = arguments.results or newest(results.DIRECTORY)
    rows = fields.read(directory)
    baseline = fields.read(arguments.compare) if arguments.compare else None
    output = arguments.output or directory
    compared = write(rows, output, baseline)

    print(headline(rows))
    for name in fields.FIELDS:
        if rows.used[name] or rows.missing[name]:
            print(f"{name:10}  {len(rows.used[name])} rows, {len(rows.missing[name])} not measured")
    for refused in rows.refused:
        print(f"refused: {refused.file}, line {refused.line}: {refused.reason}")
    print(f"wrote {output / 'report.html'} and {output / 'report.md'}")
    if compared is None:
        return
    print(compared.summary())
    if not compared.changes and not compared.failed:
        here, there = ("; ".join(devices) or "none" for devices in compared.devices)
        differ = f"the devices differ: {here} here, {there} there" if here != there else "they have no row in common"
        raise InputError(f"--compare {arguments.compare}: nothing to compare, as {differ}")
    if compared.regressed():
        sys.exit(1)


if __name__ == "__main__":
    main()
