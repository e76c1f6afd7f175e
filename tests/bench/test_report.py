"""The report: what is in the rows, all of it, nothing else, and nothing that was not checked."""

import importlib
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import made_rows
import pytest
from read_report import Page, markdown_tables, numbers

import bench
from acceleron.errors import InputError, run_command
from bench import report, results
from bench import rows as fields

MOE = [610e3, 600e3, 640e3, 590e3, 620e3]
DENSE = [650e3, 660e3, 655e3, 640e3, 645e3]


@pytest.fixture(autouse=True)
def statistics_of_runs(monkeypatch):
    """The summaries of bench.quality; tests change what they find."""
    found = SimpleNamespace(
        difference={"mean": 0.031, "low": 0.022, "high": 0.041, "pairs": 5, "tokens": 2000},
        time={"ratio": 0.72, "low": 0.66, "high": 0.79, "seeds": 5},
    )
    stub = SimpleNamespace(paired_difference=lambda rows: found.difference, time_to_dense_loss=lambda rows: found.time)
    monkeypatch.setattr(bench, "quality", stub, raising=False)
    return found


def everything() -> dict[str, list[dict]]:
    """A row or two of every file."""
    shares = {"gemm": 0.61, "attention": 0.22, "other": 0.17}
    return {
        "throughput": [
            made_rows.throughput(MOE, op_shares=shares, expert_least_share=0.11, expert_most_share=0.34),
            made_rows.throughput(DENSE, "dense"),
        ],
        "quality": [
            made_rows.quality(model, seed, loss + 0.01 * seed)
            for seed in range(3)
            for model, loss in (("moe", 3.1), ("dense", 3.2))
        ],
        "ops": [made_rows.op("triton", 2.5e-3), made_rows.op("torch", 4e-3, share_of_ceiling=0.31)],
        "kernels": [made_rows.kernel(), made_rows.kernel(shape="large", check_error=0.0015)],
        "memory": [made_rows.memory(300 * 2**20)],
        "peers": [made_rows.race("ours", [200.0, 220.0, 210.0]), made_rows.race("theirs", [100.0, 100.0, 140.0])],
        "decoding": [made_rows.race("ours", [46.2, 43.9, 48.3])],
        "loader": [made_rows.race("loader", [177e6, 167e6, 196e6], size=None, dtype=None, seq_len=2048)],
        "checkpoints": [made_rows.checkpoints([1.021, 1.013, 1.048])],
    }


def made(tmp_path: Path, **files: list[dict]) -> tuple[Page, str]:
    """The report of these rows: the page, and the Markdown."""
    directory = made_rows.write(tmp_path / "results", **files)
    report.write(fields.read(directory), directory)
    return Page((directory / "report.html").read_text()), (directory / "report.md").read_text()


def test_the_tables_hold_the_figures_of_the_rows(tmp_path):
    page, _ = made(tmp_path, **everything())
    moe, dense = page.table("Training steps")
    assert (moe["model"], moe["size"], moe["kernels"], moe["compiled"]) == ("moe", "tiny", "triton", "yes")
    assert (dense["model"], dense["routing"], dense["busiest expert (%)"]) == ("dense", "", "")
    assert numbers(moe["tokens/s"])[0] == statistics.median(MOE)
    assert numbers(dense["tokens/s"]) == [650e3, 645e3, 655e3]
    assert numbers(moe["MFU (%)"] + " " + moe["peak memory (GiB)"]) == [43.7, 12]
    assert numbers(moe["least busy expert (%)"] + " " + moe["busiest expert (%)"]) == [11, 34]
    assert numbers(moe["error / allowed"]) == [0.001, 0.002]
    [share] = page.table("Share of device time")
    assert [share[f"{op} (%)"] for op in ("gemm", "attention", "other")] == ["61", "22", "17"]

    triton, torch = page.table("expert_mlp")
    assert numbers(triton["time (ms)"]) == pytest.approx([2.5, 2.475, 2.525], abs=6e-3)
    assert (torch["provider"], torch["share of ceiling (%)"], torch["rate"]) == ("torch", "31", "250,000 GFLOP/s")
    [rope] = page.table("Error / allowed error")
    assert (rope["op"], numbers(rope["small"]), numbers(rope["large"])) == ("rope", [0.001, 0.002], [0.0015, 0.002])
    [saved] = page.table("Bytes")
    assert numbers(saved["MiB"]) == [300]
    assert numbers(saved["bytes a token and layer"]) == [4800]
    assert numbers(saved["measured / formula"]) == [2]
    [line] = page.table("Wall clock of so many steps")
    assert numbers(line["with a checkpoint / without"]) == [1.021, 1.013, 1.048]
    waits = [numbers(line[head]) for head in ("steps", "without (s)", "training waits (s)", "written in (s)", "MiB")]
    assert waits == [[100], [31.7], [0.0123], [0.456], [25]]
    [line] = page.table("The MoE against its dense twin")
    assert [numbers(cell)[:3] for head, cell in line.items() if "nats" in head] == [[0.031, 0.022, 0.041]]
    assert [numbers(cell) for head, cell in line.items() if "wall clock" in head] == [[0.72, 0.66, 0.79]]
    runs = page.table("Runs;")
    assert [numbers(run["validation loss"])[0] for run in runs] == [3.1, 3.2, 3.11, 3.21, 3.12, 3.22]
    budgets = page.table("Final runs by budget")
    found = [numbers(line["validation loss, mean (least .. most)"]) for line in budgets]
    assert found == [[3.11, 3.1, 3.12], [3.21, 3.2, 3.22]]


def test_ratios_are_taken_round_by_round_within_a_group(tmp_path):
    # Of the medians the ratio would be 1.0: both halve in some rounds, but not in the same ones as their medians say.
    moe, dense = [100.0, 200.0, 300.0, 400.0, 500.0], [50.0, 400.0, 150.0, 800.0, 250.0]
    rows = [made_rows.throughput(moe), made_rows.throughput(dense, "dense")]
    rows += [made_rows.throughput([1e6] * 5, "dense", group="another"), made_rows.throughput([7.0] * 5, size="small")]
    page, _ = made(tmp_path, throughput=rows)
    [pair] = page.table("Tokens/s, MoE /")
    assert numbers(pair["MoE / dense twin"]) == [2.0, 0.5, 2.0]
    page, _ = made(tmp_path / "race", peers=everything()["peers"])
    ours, theirs = page.table("Tokens/s; the ratio")
    assert ours["the first of its group / this"] == ""
    assert numbers(theirs["the first of its group / this"])[0] == 2.0  # of 2, 2.2 and 1.5


def test_the_twin_is_the_fastest_of_the_same_mode(tmp_path):
    rows = [
        made_rows.throughput([90.0] * 5),
        made_rows.throughput([80.0] * 5, "dense"),
        made_rows.throughput([100.0] * 5, "dense", kernels="reference"),
        made_rows.throughput([300.0] * 5, "dense", checkpointing=True),
        made_rows.throughput([200.0] * 5, "dense", batch_size=64),
    ]
    page, _ = made(tmp_path, throughput=rows)
    [pair] = page.table("Tokens/s, MoE /")
    assert (pair["twin's kernels"], numbers(pair["MoE / dense twin"])[0]) == ("reference", 0.9)
    assert "tiny 0.900 (0.900 .. 0.900)" in page.texts["h1"]


def test_markdown_has_the_tables_of_the_page(tmp_path):
    page, text = made(tmp_path, **everything())
    assert len(page.tables) > 15
    assert markdown_tables(text) == page.tables
    assert text.splitlines()[0].removeprefix("# ").replace("\\", "") == page.texts["h1"]


def test_every_line_leads_to_its_command_machine_versions_commit_and_date(tmp_path):
    files = everything()
    later = {"command": "python -m bench throughput --eager", "commit": "fff0000+", "date": "2026-11-23T01:02:03+00:00"}
    files["throughput"].append(made_rows.throughput([5e5] * 5, compiled=False) | later)
    page, _ = made(tmp_path, **files)
    captions = [caption for caption, _, _ in page.tables if not caption.startswith("Sources")]
    assert len(page.tables) - len(captions) == len(files)
    lines = page.table("Training steps")
    [sources, *_] = [table for table in page.tables if table[0].startswith("Sources")]
    sources = {line[0]: dict(zip(sources[1], line, strict=True)) for line in sources[2]}
    for row, line in zip(files["throughput"], lines, strict=True):
        source = sources[line["source"]]
        assert all(source[field] == row[field] for field in ("command", "device", "versions", "commit", "date"))


@pytest.mark.parametrize(
    ("time", "starts"),
    [
        ({"ratio": 0.72, "low": 0.66, "high": 0.79, "seeds": 5}, "On Some GPU 80GB: yes for nano"),
        ({"ratio": 1.3, "low": 1.1, "high": 1.5, "seeds": 5}, "On Some GPU 80GB: no for nano"),
        ({"ratio": 0.97, "low": 0.9, "high": 1.05, "seeds": 5}, "On Some GPU 80GB: undecided for nano"),
        ({"ratio": 0.7, "low": float("nan"), "high": float("nan"), "seeds": 1}, "On Some GPU 80GB: unknown for nano"),
        (None, "On Some GPU 80GB: unknown for nano"),
    ],
)
def test_the_first_line_answers_from_the_time_to_the_dense_loss(time, starts, tmp_path, statistics_of_runs):
    statistics_of_runs.time = time
    page, text = made(tmp_path, **everything())
    line = text.splitlines()[0].replace("\\", "")
    assert line.startswith(f"# {starts}")
    assert line.removeprefix("# ") == page.texts["h1"] == page.texts["title"]
    if time and time["low"] > 0:
        assert numbers(line.split("time (")[0].split("loss in")[1]) == [time["ratio"]]
        assert numbers(line.split("interval")[1].split("seeds")[0]) == [time["low"], time["high"], 5]
    ratio = sorted(a / b for a, b in zip(MOE, DENSE, strict=True))
    assert numbers(line.split("dense twin: tiny")[1].split("(")[0]) == [pytest.approx(ratio[2], abs=6e-4)]


def test_the_first_line_says_what_was_not_measured(tmp_path):
    page, _ = made(tmp_path / "rates", throughput=everything()["throughput"])
    assert page.texts["h1"].startswith("On Some GPU 80GB: not measured whether the MoE beats its dense twin")
    assert "tiny 0.938 (0.919 .. 0.964)" in page.texts["h1"]
    page, _ = made(tmp_path / "runs", quality=everything()["quality"])
    assert "yes for nano" in page.texts["h1"]
    assert "tokens/s was not measured" in page.texts["h1"]
    page, _ = made(tmp_path / "memory", memory=everything()["memory"])
    assert page.texts["h1"].startswith("On Some GPU 80GB: not measured whether")
    page, _ = made(tmp_path / "nothing", throughput=[])
    assert page.texts["h1"].startswith("Without a valid measurement: not measured")


def test_the_first_line_is_of_the_mode_in_which_the_twin_is_fastest(tmp_path):
    """The MoE is ahead of it in eager mode, where nobody would train it."""
    rows = []
    for compiled, moe, dense in ((False, 120.0, 100.0), (True, 110.0, 200.0)):
        way = dict(compiled=compiled, group=f"tiny {compiled}")
        rows += [made_rows.throughput([moe] * 5, **way), made_rows.throughput([dense] * 5, "dense", **way)]
    page, _ = made(tmp_path, throughput=rows)
    assert page.texts["h1"].endswith("tiny 0.550 (0.550 .. 0.550) (bf16, compiled).")


def test_twins_of_two_modes_that_differ_in_the_moes_routing_alone_are_both_kept(tmp_path):
    rows = []
    for routing, moe, dense in (("learned", 80.0, 100.0), ("balanced", 99.0, 101.0)):
        group = f"tiny {routing}"
        rows += [made_rows.throughput([moe] * 5, routing=routing, group=group)]
        rows += [made_rows.throughput([dense] * 5, "dense", group=group)]
    page, _ = made(tmp_path, throughput=rows)
    assert page.texts["h1"].endswith("tiny 0.800 (0.800 .. 0.800) (bf16, compiled).")


def test_the_first_line_prefers_learned_routing_and_the_newest_rows(tmp_path):
    new = {"date": "2026-11-23T10:00:00+00:00"}
    rows = [made_rows.throughput([80.0] * 5, **new), made_rows.throughput([100.0] * 5, "dense", **new)]
    rows += [made_rows.throughput([99.0] * 5, routing="balanced", **new)]
    rows += [made_rows.throughput([130.0] * 5), made_rows.throughput([100.0] * 5, "dense")]
    page, _ = made(tmp_path, throughput=rows)
    assert page.texts["h1"].endswith("dense twin: tiny 0.800 (0.800 .. 0.800) (bf16, compiled).")
    page, _ = made(tmp_path, throughput=rows[1:3])
    assert page.texts["h1"].endswith("tiny 0.990 (0.990 .. 0.990) (bf16, compiled, balanced routing).")


def test_the_answer_comes_from_the_runs_and_counts_a_seed_once(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "quality", importlib.import_module("bench.quality"))
    rows = []
    for seed in range(3):
        rows.append(made_rows.quality("dense", seed, 3.2))
        rows.append(made_rows.quality("moe", seed, 3.3, tokens=1000, seconds=10.0))
        rows.append(made_rows.quality("moe", seed, 3.1))
    # An earlier attempt at a seed, written after it, and a tuning run.
    rows.append(made_rows.quality("moe", 0, 9.9, lr=1.0, date="2026-11-20T10:00:00+00:00"))
    rows.append(made_rows.quality("moe", 1, 9.9, purpose="tuning"))
    page, _ = made(tmp_path, quality=rows)
    # Half-way between the losses of 1000 and 2000 tokens, in their logarithms: at sqrt(1/2) of the twin's 20 seconds.
    assert "yes for nano in fp32" in page.texts["h1"]
    assert "in 0.707 of the twin's wall-clock time (95 % interval 0.707 .. 0.707, 3 seeds)" in page.texts["h1"]
    [line] = page.table("The MoE against its dense twin")
    assert "+0.1000 (+0.1000 .. +0.1000)" in line.values()


BAD = {
    "no check": ({"check": None}, "no correctness check"),
    "no error": ({"check_error": None}, "no correctness check"),
    "a flag for an error": ({"check_error": False}, "no correctness check"),
    "an error too large": ({"check_error": 0.1}, "wrong: gradients against float64: error 0.1, where 0.002 is allowed"),
    "an error that is no number": ({"check_error": float("nan")}, "no correctness check"),
    "all errors allowed": ({"check_allowed": float("inf")}, "no correctness check"),
    "no rounds": ({"rounds": []}, "rounds: expected a list of numbers above 0, but found []"),
    "a text": ({"tokens_per_second": "fast"}, 'tokens_per_second: expected a number above 0, but found "fast"'),
    "a flag for a number": ({"batch_size": True}, "batch_size: expected a whole number, but found true"),
    "a number for a flag": ({"compiled": 1}, "compiled: expected true or false, but found 1"),
    "an unknown model": ({"model": ["moe"]}, 'model: expected moe or dense, but found ["moe"]'),
    "no commit": ({"commit": None}, "commit: expected a text, but found null"),
    "infinite": ({"mfu": float("inf")}, "mfu: expected a finite number, but found Infinity"),
}


@pytest.mark.parametrize(("change", "reason"), BAD.values(), ids=BAD)
def test_a_row_without_a_passed_check_or_a_field_is_refused(change, reason, tmp_path):
    good, dense = made_rows.throughput(MOE), made_rows.throughput(DENSE, "dense")
    bad = made_rows.throughput([987654.0] * 5, "moe", size="doubtful") | change
    page, text = made(tmp_path, throughput=[good, bad, dense])
    assert page.table("In no table and no plot") == [{"file": "throughput.jsonl", "line": "2", "reason": reason}]
    assert [line["size"] for line in page.table("Training steps")] == ["tiny", "tiny"]
    for written in (page.rawdata, text, (tmp_path / "results" / "report.html").read_text()):
        assert "987,654" not in written
        assert "doubtful" not in written


def test_a_row_without_a_field_is_refused(tmp_path):
    row = made_rows.op("triton", 1e-3)
    del row["seconds_p20"]
    page, _ = made(tmp_path, ops=[row])
    [refused] = page.table("In no table and no plot")
    assert refused["reason"] == "seconds_p20: expected a number above 0, but found nothing"
    assert not [caption for caption, _, _ in page.tables if caption == "expert_mlp"]


def test_failed_and_absent_rows_are_listed_with_their_reason(tmp_path):
    failed = {"size": "large", "model": "moe", "kernels": "triton", "failed": "out of memory"}
    absent = {"op": "expert_mlp", "provider": "liger", "absent": "liger-kernel is not installed"}
    page, _ = made(tmp_path, throughput=[made_rows.throughput(MOE), made_rows.ABOUT | failed], ops=[absent])
    first, second = [
        dict(zip(head, *lines, strict=True)) for caption, head, lines in page.tables if caption == "Not measured"
    ]
    assert first == {
        "what": "size large, model moe, kernels triton", "why": "failed: out of memory", "source": "1",
    }  # fmt: skip
    assert (second["what"], second["why"]) == (
        "op expert_mlp, provider liger", "absent: liger-kernel is not installed",
    )  # fmt: skip


def test_what_is_no_json_is_bad_input_with_file_and_line(tmp_path):
    directory = made_rows.write(tmp_path, throughput=[made_rows.throughput(MOE)])
    with (directory / "throughput.jsonl").open("a") as file:
        file.write('{"size": "ti\n')
    with pytest.raises(InputError, match=r"throughput\.jsonl, line 2"):
        fields.read(directory)
    for content in (b"\xff\xfe\x00", b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}"):
        (directory / "throughput.jsonl").write_bytes(content)
        with pytest.raises(InputError, match=r"throughput\.jsonl"):
            fields.read(directory)
    with pytest.raises(InputError, match="no results there"):
        fields.read(tmp_path / "nowhere")


def test_the_same_rows_give_the_same_bytes(tmp_path):
    pytest.importorskip("matplotlib")
    one = made_rows.write(tmp_path / "one", **everything())
    report.write(fields.read(one), one)
    other = made_rows.write(tmp_path / "a" / "copy", **everything())
    code = (
        "import sys, types, bench; from pathlib import Path\n"
        "bench.quality = types.SimpleNamespace(\n"
        "    paired_difference=lambda r: dict(mean=0.031, low=0.022, high=0.041, pairs=5, tokens=2000),\n"
        "    time_to_dense_loss=lambda r: dict(ratio=0.72, low=0.66, high=0.79, seeds=5))\n"
        "from bench import report, rows\n"
        "report.write(rows.read(Path(sys.argv[1])), Path(sys.argv[1]))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    subprocess.run([sys.executable, "-c", code, str(other)], check=True, env=environment)
    for name in ("report.html", "report.md"):
        assert (one / name).read_bytes() == (other / name).read_bytes()


HOSTILE = [
    "<script>alert(1)</script>", "</svg><img src=x onerror=alert(1)>", "a | b \\| c", "![x](http://example.org/x.png)",
    "$\\frac{$ and $x$", "`code` *bold* _it_", "line\nbreak\x00\ud800", "]]> & &lt;", '" onload="alert(1)',
]  # fmt: skip


@pytest.mark.parametrize("text", HOSTILE)
def test_what_a_row_says_is_text_and_nothing_else(text, tmp_path):
    files = {
        "throughput": [
            made_rows.throughput(MOE, size=text, kernels=text, op_shares={text: 0.5}),
            made_rows.throughput(DENSE, "dense", size=text, device=text),
            {"failed": text},
        ],
        "quality": [made_rows.quality("moe", 0, 3.0, size=text, tuning=text)],
        "ops": [made_rows.op(text, 1e-3, op=text, shape=text, check=text), {"absent": text, "provider": text}],
        "kernels": [made_rows.kernel(shape=text)],
        "memory": [made_rows.memory(10**6, part=text, what=text, command=text)],
        "peers": [made_rows.race(text, [1.0]), {"check": text}, made_rows.race("b", [1.0], versions=text)],
        "loader": [made_rows.race("c", [2.0]) | {"rounds": text}],
    }
    page, markdown = made(tmp_path, **files)
    harmless = {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "div", "table", "caption", "thead", "tbody",
        "tr", "th", "td", "figure", "figcaption", "svg", "defs", "g", "path", "text", "use", "clippath", "rect",
    }  # fmt: skip
    harmless |= {"tspan", "pattern"}
    assert {tag for tag, _ in page.tags} <= harmless
    assert not [name for _, attrs in page.tags for name, _ in attrs if name.startswith("on")]
    assert "<script" not in markdown
    assert "](http" not in markdown.replace("\\]", "")
    assert markdown_tables(markdown) == page.tables
    shown = text.replace("\n", " ").replace("\x00", "�").replace("\ud800", "�")
    assert {line["size"] for line in page.table("Training steps")} == {shown}
    assert page.table("Error / allowed error")[0][shown]


def test_the_page_loads_nothing(tmp_path):
    pytest.importorskip("matplotlib")
    page, _ = made(tmp_path, **everything())
    assert sum(tag == "svg" for tag, _ in page.tags) == 4
    text = (tmp_path / "results" / "report.html").read_text()
    assert "http:" not in text
    assert "https:" not in text
    assert "@import" not in text
    assert not {"script", "link", "img", "iframe", "object", "embed", "base", "image"} & {tag for tag, _ in page.tags}
    ids = [value for _, attrs in page.tags for name, value in attrs if name == "id"]
    links = [value for _, attrs in page.tags for name, value in attrs if name in ("href", "xlink:href", "src")]
    assert links
    assert all(link.removeprefix("#") in ids for link in links)
    assert all(place in ids for place in re.findall(r"url\(#([^)]*)\)", text))
    assert len(re.findall(r"url\(", text)) == len(re.findall(r"url\(#", text))
    assert len(ids) == len(set(ids))


def test_bars_are_as_long_as_the_rates_and_curves_as_high_as_the_losses(tmp_path):
    pytest.importorskip("matplotlib")
    from bench import plots

    svg = plots.throughput(everything()["throughput"], lambda row: "mode")
    lengths = []
    for path in re.findall(r'<path d="([^"]*)" clip-path="[^"]*" style="fill: (?:#|url)', svg):
        across = [float(x) for x in re.findall(r"[ML] (\S+) \S+", path)]
        lengths.append(max(across) - min(across))
    assert len(lengths) == 2
    assert lengths[0] / lengths[1] == pytest.approx(610 / 650, rel=1e-3)
    svg = plots.loss([made_rows.quality("moe", 0, 3.0), made_rows.quality("dense", 0, 3.5)])
    heights = {}
    for model, colour in (("moe", "#2f7fd6"), ("dense", "#e07b00")):
        path = re.search(rf'<path d="([^"]*)"[^>]*style="[^"]*stroke: {colour}; stroke-width: 2', svg).group(1)
        heights[model] = [float(y) for y in re.findall(r"[ML] \S+ (\S+)", path)]
    per_nat = heights["moe"][1] - heights["moe"][0]  # a curve falls by 1, and y points down
    assert per_nat > 20
    assert heights["moe"][1] - heights["dense"][1] == pytest.approx(0.5 * per_nat, rel=1e-3)


def test_without_matplotlib_the_tables_remain(tmp_path, monkeypatch):
    page, with_plots = made(tmp_path / "with", **everything())
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    bare, without = made(tmp_path / "without", **everything())
    assert "matplotlib is not installed" in bare.texts["p"]
    assert "svg" not in [tag for tag, _ in bare.tags]
    assert bare.tables == page.tables
    assert "matplotlib is not installed" in without
    assert "matplotlib" not in with_plots


def test_the_command_takes_the_newest_results_and_writes_beside_them(tmp_path, monkeypatch, capsys):
    made_rows.write(tmp_path / "2026-11-01-zz", throughput=[made_rows.throughput(MOE, device="older")])
    newer = made_rows.write(tmp_path / "2026-11-22-aa", throughput=[made_rows.throughput(MOE), {"size": "unchecked"}])
    monkeypatch.setattr(results, "DIRECTORY", tmp_path)
    monkeypatch.setattr(sys, "argv", ["report"])
    assert run_command(report.main) == 0
    assert (newer / "report.html").exists()
    assert (newer / "report.md").read_text().startswith("# On Some GPU 80GB: not measured")
    assert "refused: throughput.jsonl, line 2: no correctness check" in capsys.readouterr().out
    monkeypatch.setattr(sys, "argv", ["report", str(newer), "--output", str(tmp_path / "out")])
    assert run_command(report.main) == 0
    assert (tmp_path / "out" / "report.html").read_bytes() == (newer / "report.html").read_bytes()


def test_mistakes_are_one_line_and_status_2(tmp_path, monkeypatch, capsys):
    newer = made_rows.write(tmp_path / "here", throughput=[made_rows.throughput(MOE)])
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(results, "DIRECTORY", tmp_path / "empty")
    for arguments, names in (
        ([str(tmp_path / "nowhere")], "nowhere"),
        ([str(newer), "--compare", str(tmp_path / "nowhere")], "nowhere"),
        ([str(newer), "--output", str(tmp_path / "file")], "--output"),
        ([], "empty"),
    ):
        monkeypatch.setattr(sys, "argv", ["report", *arguments])
        assert run_command(report.main) == 2
        error = capsys.readouterr().err
        assert names in error
        assert error.count("\n") == 1
