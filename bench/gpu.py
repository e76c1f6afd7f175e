"""bench/gpu.sh: benchmark one GPU in a few minutes, most important measurements first.

bench/gpu.sh --stage first --output DIR            235 s: kernel checks, tiny's throughput and profile, attention
bench/gpu.sh --stage full --output DIR             330 s: throughput and profiles of all sizes
bench/gpu.sh --stage rest --output DIR             260 s: resume, peers, memory, other modes
bench/gpu.sh --stage tune --output DIR             215 s: tuned GEMM configurations, and throughput with them
bench/gpu.sh --stage first --output DIR --smoke    the same parts on a CPU: small shapes, interpreted kernels

A stage is a list of parts. Each part runs in its own process group with a time limit: the remaining time minus the
planned time of the parts after it. Parts that no longer fit are skipped. Later parts with the same DIR avoid kernels
that failed their check. DIR receives results.jsonl, log.txt, summary.txt (failures first, the headline table last),
report.md with its plots, and the tuned table: at most 8 files. The exit status is 1 if a part fails, 2 on bad input.

The stages need torch, Triton and the project's dependencies, but no network or installation. This module imports
only the standard library, so a broken installation is reported like any other failure.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LOG_BYTES = 8 << 20
SECONDS = {"first": 235.0, "full": 330.0, "rest": 260.0, "tune": 215.0}
GRACE = 5  # seconds between SIGTERM and SIGKILL


class Part(NamedTuple):
    """A Python command: its arguments, planned seconds, and changes to its environment."""

    name: str
    seconds: float
    command: list[str]
    environment: dict[str, str] | None = None


# Arguments for a GPU, and for a CPU. The CPU avoids bf16: the interpreter truncates to bf16, but a GPU rounds.
GPU = {
    "one": "tiny",
    "two": "tiny small",
    "all": "tiny small medium large",
    "published": "sonicmoe-768 sonicmoe-1536",
    "checks": "--tokens 65536 --limit 15",
    "attention": "--tokens 16384 --rounds 5 --limit 40",
    "ops": "--op expert_mlp --rounds 5 --limit 15",
    "train": "--mode compiled --rounds 2 --seconds 1 --limit 100",
    "long": "--mode compiled --rounds 2 --seconds 4 --limit 100",
    "tune": "--seconds 100 --limit 40",
    "memory": "",
    "resume": "tests/training/test_cuda_training.py",
}
SMOKE = dict.fromkeys(("one", "two", "all"), "nano") | {
    "published": "",
    "checks": "--tokens 48 --dtype fp16 --limit 600",
    "attention": "--tokens 48 --dtype fp32 --rounds 2",
    "ops": "--op expert_mlp --tokens 48 --rounds 5 --limit 600",
    "train": "--mode eager --rounds 1 --seconds 0.01 --batch_size 1 --seq_len 32 --dtype fp32",
    "long": "--mode eager --rounds 1 --seconds 0.01 --batch_size 1 --seq_len 32 --dtype fp32",
    "tune": "--tokens 48 --dtype fp16 --seconds 600 --limit 600",
    "memory": "--tokens 32 --dtype fp32",
    "resume": "tests/training/test_resume.py",
}
# No compiled reference: torch.compile takes seconds per op.
PROVIDERS = ("triton", "reference", "liger-kernel", "moe-ops")


def parts(stage: str, smoke: bool, output: Path) -> list[Part]:
    """Return a stage's parts in order. Times assume 16 cores; imports take 8 s and a CUDA context 3 s."""
    arguments, interpreted = SMOKE if smoke else GPU, {"TRITON_INTERPRET": "01"[smoke]}

    def bench(command: str, *flags: str) -> list[str]:
        return ["-m", "bench", *command.format(**arguments).split(), *flags, "--output", str(output)]

    # 15 to 17 s, mostly imports.
    report = Part("report", 18, ["-m", "bench", "report", str(output)])
    compiled = ["-m", "bench", "compile", "--arch", "sm_90"]
    if stage == "first":
        return [
            # A 1.4 ms GEMM and a 0.7 ms copy, 10 rounds of 10 ms each.
            Part("ceilings", 15, bench("ceilings")),
            # 7 s on two cores per size.
            Part("compile", 25, [*compiled, "--model_size", *arguments["two"].split()]),
            # 34 checks at 65,536 tokens, each with fp32 and bf16 references of 50 to 500 ms.
            Part("kernels", 45, bench("ops --check_only --provider triton --model_size {two} {checks}"), interpreted),
            # Per contender: the check, two compilations of 5 to 10 s, a profile of 2 s, 2 rounds of 1 s.
            Part("throughput and profile", 90, bench("throughput --model_size {one} {train} --profile")),
            # 4 head_dims x 5 backends: 10 ms per call, about 20 calls per round, and the plain PyTorch reference.
            Part("attention", 35, bench("ops --op attention --model_size {all} {attention}")),
            report,
        ]
    tuned = {"ACCELERON_TUNED": f"{output}/tuned.jsonl"}
    if stage == "tune":
        return [
            # 100 s of tuning and 15 s to start. A candidate compiles in about 2 s, on 15 cores.
            Part("tune", 115, bench("tune --model_size {all} {tune}"), interpreted),
            Part("throughput, tuned", 75, bench("throughput --model_size {two} {train}"), tuned),
            report,
        ]
    if stage == "full":
        return [
            # 80 s until all processes have compiled and checked their models, then 40 (tiny), 40, 60 and 65 s (large).
            Part("throughput", 290, bench("throughput --model_size {all} {long} --profile")),
            report,
        ]
    return [
        # nano, eager and compiled.
        Part("resume", 40, ["-m", "pytest", "-q", "-x", "-k", "equals", arguments["resume"]]),
        # The experts against their peers.
        Part("ops", 80, bench("ops {ops} --model_size {published} {all} --provider", *PROVIDERS)),
        # Includes the import of transformers.
        Part("memory", 30, bench("memory --model_size {one} {memory}")),
        Part("predecessor's command", 40, bench("throughput --model_size {one} {train} --mode predecessor")),
        Part("deterministic", 45, bench("throughput --model_size {one} {train} --mode deterministic")),
        report,
    ]


class Log:
    """Prints lines and appends them to a file of bounded size."""

    def __init__(self, path: Path):
        self.file = path.open("a", encoding="utf-8")
        self.left = LOG_BYTES
        self.lock = threading.Lock()

    def write(self, line: str):
        with self.lock:
            print(line, flush=True)
            self.left -= len(line) + 1
            if self.left > 0:
                print(line, file=self.file, flush=True)


def run_part(part: Part, limit: float, log: Log) -> str:
    """Run a part. At the limit its process group gets SIGTERM, then SIGKILL after GRACE seconds.

    Returns the reason for a failure, or an empty string.
    """
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | (part.environment or {})
    process = subprocess.Popen(
        [sys.executable, *part.command], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", start_new_session=True,
    )  # fmt: skip

    def copy():
        for line in process.stdout:  # universal newlines: the \r of a progress bar ends a line
            log.write(f"   {line.rstrip()}")

    reader = threading.Thread(target=copy, daemon=True)
    reader.start()
    reason = f"timed out after {limit:.0f} s"
    try:
        with suppress(subprocess.TimeoutExpired):
            status = process.wait(limit)
            reason = f"exit status {status}" if status else ""
    finally:
        for number, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 10)):  # a stuck driver ignores SIGKILL
            with suppress(ProcessLookupError):
                os.killpg(process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                process.wait(patience)
        reader.join(5)
    return reason


def run(planned: list[Part], seconds: float, output: Path, log: Log, old_rows: int = 0) -> list[str]:
    """Run the parts within `seconds`. Returns "name: reason" for each part that failed or was skipped.

    old_rows: the number of leading rows in `output` with fallbacks to ignore.
    """
    deadline, failed = time.monotonic() + seconds, []
    while sum(part.seconds for part in planned) > seconds and len(planned) > 2:
        skipped = planned.pop(-2)  # keep the first part, and the report at the end
        failed.append(f"{skipped.name}: skipped, no time left")
    for number, part in enumerate(planned):
        apply_fallbacks([row for row in read_rows(output)[old_rows:] if row["benchmark"] == "fallbacks"])
        limit = deadline - time.monotonic() - sum(later.seconds for later in planned[number + 1 :]) - GRACE
        log.write(f"== {part.name}: python {' '.join(part.command)} (at most {limit:.0f} s)")
        start = time.monotonic()
        reason = run_part(part, max(limit, 1), log)
        elapsed = time.monotonic() - start
        log.write(f"== {part.name}: {'FAILED, ' + reason if reason else 'done'} in {elapsed:.0f} s")
        row = {"benchmark": "part", "provider": part.name, "case": {}, "details": {"seconds": elapsed, "limit": limit}}
        row |= {"failed": reason} if reason else {"check": "exit status", "error": 0, "allowed": 0}
        row |= {"about": {"command": " ".join(part.command), "date": datetime.now(UTC).isoformat(timespec="seconds")}}
        with (output / "results.jsonl").open("a") as file:
            file.write(("\n" if partial_line(output) else "") + json.dumps(row) + "\n")
        if reason:
            failed.append(f"{part.name}: {reason}")
        (output / "summary.txt").write_text("\n".join(summary(failed, read_rows(output))) + "\n")
    return failed


def apply_fallbacks(rows: list[dict]):
    """Set the environment variables of the latest `fallbacks` row for the remaining parts."""
    for name in ("ACCELERON_NO_TMA", "ACCELERON_REFERENCE_OPS"):
        value = rows[-1].get("details", {}).get(name) if rows else None
        if isinstance(value, str):
            os.environ[name] = value


def partial_line(output: Path) -> bytes:
    """Return the partial line that a killed process left at the end of the results."""
    path = output / "results.jsonl"
    return path.read_bytes().rpartition(b"\n")[2] if path.exists() else b""


def read_rows(output: Path) -> list[dict]:
    """Read the valid rows so far."""
    rows = []
    with suppress(OSError):
        for line in (output / "results.jsonl").read_text(errors="replace").splitlines():
            with suppress(ValueError):
                row = json.loads(line)
                if isinstance(row, dict) and all(isinstance(row.get(key), str) for key in ("benchmark", "provider")):
                    rows.append(row)
    return rows


def summary(failed: list[str], rows: list[dict]) -> list[str]:
    """Return the lines of summary.txt: failures, the most expensive kernels, then the headline table."""
    lines = [f"FAILED {reason}" for reason in failed] or ["all parts succeeded"]
    for row in rows:
        if row.get("failed") and row["benchmark"] != "part":
            lines.append(f"FAILED {row['benchmark']}, {row['provider']}, {row.get('case')}: {str(row['failed'])[:200]}")
    lines += [f"AVOIDED {row.get('details')}" for row in rows if row["benchmark"] == "fallbacks"][-1:]
    trained = [row for row in rows if row["benchmark"] == "throughput" and "median" in row]
    moes = [row for row in trained if row["provider"].startswith("MoE")]
    for row in moes:
        for kernel in row.get("details", {}).get("profile", [])[:15]:
            name = f"{row['provider']}: {kernel['kernel'][:70]}"
            lines.append(f"{name:90} {kernel['calls']:6} calls {1e3 * kernel['seconds']:9.2f} ms")
    columns = "{:10} {:12} {:>12} {:>12} {:>8} {:>6} {:>8}".format
    lines.append(columns("size", "mode", "MoE tok/s", "dense tok/s", "ratio", "MFU", "GiB"))
    for moe in moes:
        case = moe["case"]
        details = moe["details"]
        about = moe["about"]
        key = moe["group"], about["date"]
        dense = [row for row in trained if row not in moes and (row["group"], row["about"]["date"]) == key]
        fastest = max((row["median"] for row in dense), default=None)
        against = (f"{fastest:,.0f}", f"{moe['median'] / fastest:.3f}") if fastest else ("", "")
        memory, mfu = details.get("peak_memory_bytes", 0) / 2**30, details.get("mfu", 0)
        line = columns(case["size"], case["mode"], f"{moe['median']:,.0f}", *against, f"{mfu:.1%}", f"{memory:.1f}")
        lines.append(f"{line}  {about.get('device', '')} {about.get('switches', '')}")
    return lines


def main():
    parser = argparse.ArgumentParser(
        prog="bench/gpu.sh",
        usage=argparse.SUPPRESS,  # the description shows the usage, and errors stay on one line
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--stage", choices=SECONDS)
    parser.add_argument("--seconds", type=float, help="time for all parts; default 215 to 330")
    parser.add_argument("--output", metavar="DIR")
    parser.add_argument("--smoke", action="store_true", help="run on a CPU with small shapes and 10 times the time")
    arguments = parser.parse_args()
    if not (arguments.stage and arguments.output):  # `required=True` would hide an unknown flag's name
        parser.error("--stage and --output are required")
    if arguments.smoke:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not (shutil.which("nvidia-smi") or [*Path("/dev").glob("nvidia[0-9]*")]):
        parser.error("no NVIDIA GPU found; --smoke runs the stage on a CPU")
    # Otherwise torch.compile would move Triton's cache, and kernels from the first parts would compile again.
    os.environ.setdefault("TRITON_CACHE_DIR", str(Path.home() / ".triton" / "cache"))
    default = SECONDS[arguments.stage] * (10 if arguments.smoke else 1)
    seconds = default if arguments.seconds is None else arguments.seconds
    if not 0 < seconds < 1e6:
        parser.error(f"--seconds {seconds}: expected a number above 0")
    output = Path(arguments.output).resolve()
    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "tuned.jsonl").touch()  # an empty table, in case nothing is tuned
        log = Log(output / "log.txt")
    except OSError as error:
        parser.error(f"--output {output}: cannot be written ({error.strerror}): choose another directory")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # run_part then ends its process group
    # The first stage ignores older fallbacks; later stages apply them.
    old_rows = len(read_rows(output)) if arguments.stage == "first" else 0
    failed = run(parts(arguments.stage, arguments.smoke, output), seconds, output, log, old_rows)
    for line in (output / "summary.txt").read_text().splitlines():
        log.write(line)
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
