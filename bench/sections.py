"""The sections of the report, one for each file of results: their tables and plots, and the sources of each line."""

import math

import numpy as np

from . import rows as fields
from .comparison import RULE, Change, Comparison
from .page import Picture, Section, Table, figure, plain, spread, table
from .rows import Rows

TITLES = {
    "throughput": "Training throughput", "quality": "Quality", "ops": "Ops", "kernels": "Kernel correctness",
    "memory": "Memory", "peers": "Training against peers", "decoding": "Decoding", "loader": "Data loader",
    "checkpoints": "Checkpoints",
}  # fmt: skip
# A MoE and its twin are compared where these agree; the reference and Triton alike have the fastest twin to beat.
MODE = ("size", "dtype", "checkpointing", "batch_size", "grad_accum", "seq_len")


def ratio_text(value: float) -> str:
    return f"{value:.3f}"


def ratio(row: dict, other: dict) -> tuple[float, float, float]:
    """Median, p20 and p80 of the rates' ratio, round by round, which drops what slowed a whole round.

    Where one has fewer rounds than the other, those that both have.
    """
    values = [a / b for a, b in zip(row["rounds"], other["rounds"], strict=False)]
    return tuple(float(value) for value in np.percentile(values, (50, 20, 80)))


def ratio_cell(row: dict, other: dict) -> str:
    middle, low, high = ratio(row, other)
    return f"{ratio_text(middle)} {spread(low, high, ratio_text)}"


def twin(row: dict, rows: list[dict], same: tuple[str, ...]) -> dict | None:
    """The fastest dense twin that was measured in a MoE row's rounds with the same fields `same`."""
    twins = [
        other
        for other in rows
        if other["model"] == "dense" and fields.same_run(row, other) and all(row[x] == other[x] for x in same)
    ]
    return max(twins, key=lambda other: other["tokens_per_second"], default=None)


def fastest_pair(rows: list[dict]) -> tuple[dict, dict] | None:
    """A MoE and its twin, of the mode in which the twin is fastest; with learned routing where there is any.

    The twin decides: the MoE is not to win by a mode that suits it and slows its twin.
    """
    moes = [row for row in rows if row["model"] == "moe" and twin(row, rows, MODE)]
    pairs = [(row, twin(row, rows, MODE)) for row in moes if row["routing"] == "learned"]
    pairs = pairs or [(row, twin(row, rows, MODE)) for row in moes]
    return max(pairs, key=lambda pair: (pair[1]["tokens_per_second"], pair[0]["tokens_per_second"]), default=None)


def section(name: str, rows: Rows, plots) -> Section:
    """What there is of one file. `plots` is the module, or None."""
    used, missing = rows.used[name], rows.missing[name]
    number, listed = sources([*used, *missing])
    blocks = []
    if used:
        blocks += _BLOCKS[name](used, plots, lambda row: number[_source(row)])
        checks = "; ".join(dict.fromkeys(row["check"] for row in used))
        blocks.append(f"Every line passed its check in its own run: {checks}.")
    if missing:
        columns = {
            "what": lambda row: _what(name, row),
            "why": lambda row: f"failed: {row['failed']}" if "failed" in row else f"absent: {row['absent']}",
            "source": lambda row: number[_source(row)],
        }
        blocks.append(table("Not measured", missing, columns))
    return Section(TITLES[name], [*blocks, listed])


def _source(row: dict) -> tuple[str, ...]:
    return tuple(plain(row.get(field, "unknown")) for field in ("command", "device", "versions", "commit"))


def sources(rows: list[dict]) -> tuple[dict[tuple, str], Table]:
    """The number of each distinct (command, device, versions, commit), and the table of them with their dates."""
    dates: dict[tuple, list[str]] = {}
    for row in rows:
        dates.setdefault(_source(row), []).append(plain(row.get("date", "unknown")))
    number = {source: str(index) for index, source in enumerate(dates, 1)}
    head = ["source", "command", "device", "versions", "commit", "date", "lines"]
    lines = [
        [number[source], *source, " to ".join(dict.fromkeys((min(found), max(found)))), str(len(found))]
        for source, found in dates.items()
    ]
    return number, Table("Sources (a + marks a commit with changes on top)", head, lines)


def _what(name: str, row: dict) -> str:
    words = [f"{field} {row[field]}" for field in fields.IDENTITY[name] if row.get(field) is not None]
    return ", ".join(words) or TITLES[name]


def _text(field: str):
    return lambda row: "" if row.get(field) is None else str(row[field])


def _yes(field: str):
    return lambda row: {True: "yes", False: "no"}.get(row.get(field), "")


def _figure(field: str, unit: float = 1):
    return lambda row: figure(row.get(field), unit)


def _median(field: str, unit: float = 1):
    """The median with its range."""

    def cell(row: dict) -> str:
        low, high = row[f"{field}_p20"] / unit, row[f"{field}_p80"] / unit
        return f"{figure(row[field], unit)} {spread(low, high)}"

    return cell


def _error(row: dict) -> str:
    return f"{figure(row['check_error'])} / {figure(row['check_allowed'])}"


def _batch(row: dict) -> str:
    return f"{row['batch_size']} × {row['grad_accum']} × {row['seq_len']}"


def _rounds(row: dict) -> str:
    return str(len(row["rounds"]))


def mode_label(row: dict) -> str:
    """What tells one row of a size and model from another."""
    words = [row["kernels"], *([f"{row['routing']} routing"] if row.get("routing") else [])]
    words += ["compiled" if row["compiled"] else "eager", *["checkpointing"] * row["checkpointing"]]
    words += ["deterministic"] * bool(row.get("deterministic"))
    return ", ".join([*words, _batch(row), row["dtype"]])


_MODEL_MODE = {
    "size": _text("size"), "kernels": _text("kernels"), "routing": _text("routing"), "compiled": _yes("compiled"),
    "checkpointing": _yes("checkpointing"), "deterministic": _yes("deterministic"),
    "batch × accumulation × sequence": _batch, "dtype": _text("dtype"),
}  # fmt: skip


def _throughput(used: list[dict], plots, source) -> list:
    pairs = [(row, twin(row, used, (*MODE, "compiled"))) for row in used if row["model"] == "moe"]
    pairs = [row | {"ratio": ratio_cell(row, other), "twin's": other["kernels"]} for row, other in pairs if other]
    blocks = []
    if pairs:
        columns = _MODEL_MODE | {"twin's kernels": _text("twin's"), "MoE / dense twin": _text("ratio")}
        columns |= {"rounds": _rounds, "source": source}
        blocks.append(table("Tokens/s, MoE / its fastest dense twin of the same rounds and mode", pairs, columns))
    columns = {"model": _text("model"), **_MODEL_MODE, "tokens/s": _median("tokens_per_second"), "rounds": _rounds}
    columns |= {
        "MFU (%)": _figure("mfu", 0.01),
        "peak memory (GiB)": _figure("peak_memory_bytes", 2**30),
        "start (s)": _figure("start_seconds"),
        "least busy expert (%)": _figure("expert_least_share", 0.01),
        "busiest expert (%)": _figure("expert_most_share", 0.01),
        "error / allowed": _error,
        "source": source,
    }
    blocks.append(table("Training steps with their optimizer and data loader", used, columns))
    if plots:
        caption = "Training tokens/s: the median of the rounds, with p20 and p80."
        blocks.append(Picture(caption, plots.throughput(used, mode_label)))
    profiled = [row for row in used if row.get("op_shares")]
    if profiled:
        totals: dict[str, float] = {}
        for row in profiled:
            for op, share in row["op_shares"].items():
                totals[op] = totals.get(op, 0) + share
        columns = {"model": _text("model"), **_MODEL_MODE}
        for op in sorted(totals, key=lambda op: (-totals[op], op)):
            columns[f"{op} (%)"] = lambda row, op=op: figure(row["op_shares"].get(op), 0.01)
        blocks.append(table("Share of device time", profiled, columns | {"source": source}))
    return blocks


def loss_runs(rows: list[dict]) -> dict[tuple[str, str, str], list[dict]]:
    """The final runs by (device, size, dtype): those that can be compared with each other."""
    runs: dict[tuple[str, str, str], list[dict]] = {}
    for row in fields.final_runs(rows):
        runs.setdefault((row["device"], row["size"], row["dtype"]), []).append(row)
    return runs


def statistic(name: str, runs: list[dict]) -> dict | None:
    """A summary of final runs by bench.quality, or None if they do not give it with finite bounds."""
    from . import quality  # which imports what trains a model

    found = getattr(quality, name)(runs)
    bounds = [found.get(field) for field in ("low", "high")] if found else []
    return found if bounds and all(isinstance(x, (int, float)) and math.isfinite(x) for x in bounds) else None


def _quality(used: list[dict], plots, source) -> list:
    blocks, summary, budgets = [], [], []
    for (device, size, dtype), runs in loss_runs(used).items():
        line = {"device": device, "size": size, "dtype": dtype}
        if found := statistic("paired_difference", runs):
            figures = f"{found['mean']:+.4f} ({found['low']:+.4f} .. {found['high']:+.4f})"
            line |= {"difference": figures, "tokens": f"{found['tokens']:,}", "pairs": str(found["pairs"])}
        if found := statistic("time_to_dense_loss", runs):
            line["time"] = f"{ratio_text(found['ratio'])} {spread(found['low'], found['high'], ratio_text)}"
            line["seeds"] = str(found["seeds"])
        summary.append(line)
        for model, tokens in dict.fromkeys((row["model"], row["tokens"]) for row in runs):
            same = [row for row in runs if (row["model"], row["tokens"]) == (model, tokens)]
            budgets.append({"size": size, "dtype": dtype, "model": model, "tokens": tokens, "runs": same})
    if summary:
        columns = {head: _text(head) for head in ("device", "size", "dtype")} | {
            "dense − MoE validation loss at equal tokens (nats, 95 % interval)": _text("difference"),
            "tokens": _text("tokens"),
            "pairs": _text("pairs"),
            "MoE's wall clock to the twin's final loss / the twin's (95 % interval)": _text("time"),
            "seeds": _text("seeds"),
        }
        blocks.append(table("The MoE against its dense twin", summary, columns))
        columns = {head: _text(head) for head in ("size", "dtype", "model")} | {
            "tokens": _figure("tokens"),
            "seeds": lambda line: str(len(line["runs"])),
            "validation loss, mean (least .. most)": lambda line: _mean(line, "val_loss", _loss),
            "wall clock (s), mean (least .. most)": lambda line: _mean(line, "seconds", figure),
        }
        blocks.append(table("Final runs by budget", budgets, columns))
    final = fields.final_runs(used)
    if plots and any(row["curve"] for row in final):
        caption = "Validation loss of final runs: every seed thin, their mean bold where a budget has several."
        blocks.append(Picture(caption, plots.loss(final)))
    for how in dict.fromkeys(row["tuning"] for row in used if row.get("tuning")):
        blocks.append(f"Tuning: {how}")
    columns = {head: _text(head) for head in ("size", "model", "seed", "purpose", "dtype")} | {
        "learning rate": _figure("lr"),
        "tokens": _figure("tokens"),
        "validation loss": lambda row: _loss(row["val_loss"]),
        "wall clock (s)": _figure("seconds"),
        "tokens/s": _figure("tokens_per_second"),
        "error / allowed": _error,
        "source": source,
    }
    return [*blocks, table("Runs; wall clock is of training, without compilation and validation", used, columns)]


def _loss(value: float) -> str:
    return f"{value:.4f}"


def _mean(line: dict, field: str, form) -> str:
    values = [run[field] for run in line["runs"]]
    return f"{form(sum(values) / len(values))} {spread(min(values), max(values), form)}"


def _rate(row: dict) -> str:
    unit = "B/s" if row.get("bound") == "memory" else "FLOP/s"
    return "" if row.get("rate") is None else f"{figure(row['rate'], 1e9)} G{unit}"


def _ops(used: list[dict], plots, source) -> list:
    columns = {head: _text(head) for head in ("shape", "pass", "dtype", "provider")} | {
        "time (ms)": _median("seconds", 1e-3),
        "samples": _text("samples"),
        "rate": _rate,
        "bound by": _text("bound"),
        "share of ceiling (%)": _figure("share_of_ceiling", 0.01),
        "error / allowed": _error,
        "source": source,
    }
    shared = [row for row in used if row.get("share_of_ceiling") is not None]
    blocks = []
    if plots and shared:
        blocks.append(Picture("Ops against the roofline measured in the same run.", plots.roofline(shared)))
    for op in dict.fromkeys(row["op"] for row in used):
        blocks.append(table(op, [row for row in used if row["op"] == op], columns))
    return blocks


def _kernels(used: list[dict], plots, source) -> list:
    lines: dict[tuple, dict] = {}
    for row in used:
        key = (row["op"], row["pass"], row["provider"], row["dtype"], source(row))
        lines.setdefault(key, {}).setdefault(row["shape"], []).append(row)
    heads = ("op", "pass", "provider", "dtype")
    rows = [dict(zip((*heads, "source"), key, strict=True)) | {"shapes": shapes} for key, shapes in lines.items()]
    columns = {head: _text(head) for head in heads}
    for shape in dict.fromkeys(row["shape"] for row in used):
        columns[shape] = lambda line, shape=shape: "; ".join(map(_error, line["shapes"].get(shape, [])))
    return [table("Error / allowed error, at each shape", rows, columns | {"source": _text("source")})]


def _memory(used: list[dict], plots, source) -> list:
    columns = {head: _text(head) for head in ("what", "size", "part", "model", "provider", "dtype")} | {
        "checkpointing": _yes("checkpointing"),
        "compiled": _yes("compiled"),
        "tokens": _figure("tokens"),
        "MiB": _figure("bytes", 2**20),
        "bytes a token and layer": _figure("bytes_per_token_per_layer"),
        "formula (MiB)": _figure("formula_bytes", 2**20),
        "measured / formula": lambda row: row.get("formula_bytes") and ratio_text(row["bytes"] / row["formula_bytes"]),
        "error / allowed": _error,
        "source": source,
    }  # fmt: skip
    blocks = [table("Bytes: counted, so without a spread", used, columns)]
    if plots:
        blocks.append(Picture("Memory, and where the formula puts it.", plots.memory(used)))
    return blocks


def _race(used: list[dict], plots, source) -> list:
    def against_first(row: dict) -> str:
        first = next(other for other in used if fields.same_run(row, other))
        return "" if first is row else f"{first['provider']}: {ratio_cell(first, row)}"

    columns = {head: _text(head) for head in ("provider", "size", "dtype")} | {
        "batch": _figure("batch_size"),
        "sequence": _figure("seq_len"),
        "tokens": _figure("tokens"),
        "tokens/s": _median("tokens_per_second"),
        "rounds": _rounds,
        "the first of its group / this": against_first,
        "error / allowed": _error,
        "source": source,
    }
    return [table("Tokens/s; the ratio is taken round by round", used, columns)]


def _checkpoints(used: list[dict], plots, source) -> list:
    columns = {head: _text(head) for head in ("size", "dtype")} | {
        "compiled": _yes("compiled"),
        "batch × sequence": lambda row: f"{row['batch_size']} × {row['seq_len']}",
        "steps": _figure("interval"),
        "with a checkpoint / without": lambda row: (
            f"{ratio_text(row['ratio'])} {spread(row['ratio_p20'], row['ratio_p80'], ratio_text)}"
        ),
        "rounds": _rounds,
        "without (s)": _figure("interval_seconds"),
        "training waits (s)": _figure("blocked_seconds"),
        "written in (s)": _figure("write_seconds"),
        "MiB": _figure("bytes", 2**20),
        "error / allowed": _error,
        "source": source,
    }
    return [table("Wall clock of so many steps, with a checkpoint written meanwhile / without", used, columns)]


_BLOCKS = {
    "throughput": _throughput, "quality": _quality, "ops": _ops, "kernels": _kernels, "memory": _memory,
    "peers": _race, "decoding": _race, "loader": _race, "checkpoints": _checkpoints,
}  # fmt: skip


def compared(found: Comparison, baseline: Rows) -> Section:
    """The changes against a baseline, marked ones first, and what only one of the two has."""
    here, there = (", ".join(devices) or "none" for devices in found.devices)
    blocks = [found.summary(), RULE]
    if found.devices[0] != found.devices[1]:
        blocks.append(
            f"The devices differ: {here} here, {there} in the baseline. Rows of different devices are not compared."
        )
    if found.changes:
        heads = ("mark", "file", "what", "figure", "baseline", "here", "here / baseline")
        lines = [_change_line(change) for change in found.changes]
        blocks.append(table("Changes", lines, {head: _text(head) for head in heads}))
    for caption, listed in (
        ("Measured in the baseline, and failed here: regressions", found.failed),
        ("Only here", found.only_here),
        ("Only in the baseline", found.only_there),
    ):
        lines = [[name, _what(name, row), plain(row.get("failed", ""))] for name, row in listed]
        if lines:
            blocks.append(Table(caption, ["file", "what", "why"], lines))
    if baseline.refused:
        blocks.append(f"Refused rows of the baseline: {len(baseline.refused)}.")
    return Section("Against the baseline", [*blocks, sources(baseline.everything())[1]])


_FIGURES = {
    "ops": ("ms", 1e-3), "memory": ("MiB", 2**20), "quality": ("validation loss (nats)", 1),
    "checkpoints": ("wall clock with / without", 1),
}  # fmt: skip


def _change_line(change: Change) -> dict[str, str]:
    name, unit = _FIGURES.get(change.name, ("tokens/s", 1))
    form = _loss if change.name == "quality" else lambda value: figure(value, unit)
    return {
        "mark": change.mark,
        "file": change.name,
        "what": _what(change.name, change.row),
        "figure": name,
        "baseline": form(change.before),
        "here": form(change.after),
        "here / baseline": ratio_text(change.after / change.before),
    }


def refused(rows: Rows) -> Section:
    """The rows that no table shows, and why."""
    lines = [[row.file, str(row.line), row.reason] for row in rows.refused]
    return Section("Refused rows", [Table("In no table and no plot", ["file", "line", "reason"], lines)])
