"""Train the MoE and its dense baseline on the same tokens in the same order, with several seeds, and compare both.

Tuning runs select each model's learning rate, with half of the steps and a separate seed. The final runs use it: for
every seed, both models on the full token budget and the MoE on smaller ones, each with a complete schedule. Results:
  - the difference in validation loss at equal tokens, paired by seed, with a 95% confidence interval;
  - the MoE's time to the dense baseline's final loss / the dense baseline's training time. Per seed, the tokens come
    from the MoE runs' losses, interpolated over log(tokens), and the seconds per token from the longest MoE run.
Time is tokens / median tokens/s, which excludes compilation and validation. A CPU trains two runs at a time.
"""

import math
import os
import subprocess
import sys
import tempfile
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.interpolate import make_interp_spline
from scipy.stats import ttest_1samp

from acceleron import Acceleron, ops
from acceleron.checkpoint import assign_weights, load_checkpoint
from acceleron.data import Shards
from acceleron.data.loader import VALIDATION_BATCHES, Chunks
from acceleron.errors import InputError

from .command import parse
from .corpus import write_corpus
from .rows import Results, Row, progress, ranged, say

# flags: of train.py. shares: the MoE's smaller budgets. lr: learning rates to try. at_once: concurrent runs.
PRESETS = {
    "cpu": dict(
        flags=dict(model_size="nano", vocab_size=2048, batch_size=4, seq_len=256, dtype="fp32", no_compile=True),
        characters=20_000_000, steps=600, shares=(0.8,), lr=(1e-3, 2e-3, 4e-3), seeds=5, at_once=2,
    ),
    "cuda": dict(
        flags=dict(model_size="tiny", vocab_size=8192, batch_size=32, seq_len=2048, dtype="bf16"),
        characters=200_000_000, steps=900, shares=(0.6, 0.8), lr=(6e-4, 1.2e-3, 2.4e-3), seeds=5, at_once=1,
    ),
}  # fmt: skip


def train(row: Row, plan: Namespace, data: str, save_dir: str, started: list[subprocess.Popen]):
    """Train and score the model of the row's provider and case. Sets values, check and details, or `failed`.

    Appends the training process to `started`.
    """
    steps = row.case["tokens"] // (plan.flags["batch_size"] * plan.flags["seq_len"])
    flags = plan.flags | {
        "device": plan.device, "data_dir": data, "save_dir": save_dir, "lr": row.case["lr"], "seed": row.case["seed"],
        "num_workers": 1, "max_steps": steps, "save_interval": steps, "eval_interval": max(1, steps // 20),
        "log_interval": max(1, steps // 20), "no_gradient_checkpointing": True, "dense": row.provider == "dense",
    }  # fmt: skip
    words = [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items() if value]
    command = [sys.executable, Path(__file__).parents[1] / "train.py", *words]
    environment = os.environ | {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    with subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment
    ) as process:
        started.append(process)
        errors = process.stderr.read()
    if process.returncode:
        reason = errors.strip().rpartition("\n")[2] if process.returncode > 0 else ""  # a killed process prints none
        row.failed = reason or f"exit status {process.returncode}"
        return
    records = pd.read_json(f"{save_dir}/metrics.jsonl", lines=True)
    rate = records.tokens_per_second.median()
    curve = records.assign(seconds=records.tokens / rate)[["tokens", "seconds", "val_loss"]].dropna()
    row.details = {"seconds": row.case["tokens"] / rate, "tokens_per_second": rate, "curve": curve.values.tolist()}
    loss, again = score(f"{save_dir}/checkpoint_{steps}.pt", data, plan)
    row.values, row.check = [loss], "train.py's val_loss against torch's cross_entropy on fp32 logits"
    row.error = float(abs(curve.val_loss.iloc[-1] / again - 1))
    row.allowed = 1e-4 if row.case["dtype"] == "fp32" else 5e-3  # summation order, or bf16 activations


@torch.no_grad()
def score(checkpoint: str, data: str, plan: Namespace) -> tuple[float, float]:
    """Return the loss on all held-out text and on the part that train.py validates on."""
    contents, batch_size = load_checkpoint(checkpoint), plan.flags["batch_size"]
    model = Acceleron(contents["config"]).to(plan.device)
    assign_weights(model, contents, checkpoint, assign=False)
    chunks = Chunks(Shards(data), plan.flags["seq_len"], plan.flags["vocab_size"], validation=True)
    losses = np.empty(len(chunks))
    for part in np.array_split(np.arange(len(chunks)), len(chunks) // 16 + 1):
        ids = chunks.batch(part).to(plan.device)
        logits = model(ids).logits[:, :-1].float()
        losses[part] = F.cross_entropy(logits.mT, ids[:, 1:], reduction="none").double().mean(1).cpu()
    validated = min(len(chunks) // batch_size, VALIDATION_BATCHES) * batch_size
    return losses.mean(), losses[chunks.stream(0, validated)].mean()


def final_runs(rows: list[Row]) -> list[pd.DataFrame]:
    """Collect the valid final runs, one frame per command."""
    final = [r for r in rows if r.benchmark == "quality" and r.case["purpose"] == "final" and not r.problem()]
    lines = [row.about | row.case | row.details | {"model": row.provider, "loss": row.median} for row in final]
    return [runs for _, runs in pd.DataFrame(lines).groupby(["device", "size", "dtype", "date"])] if lines else []


def interval(values: pd.Series) -> tuple[float, float, float]:
    """Return the mean and 95% confidence interval (Student's t). NaN propagates; one value has a NaN interval."""
    return values.mean(skipna=False), *ttest_1samp(values, 0).confidence_interval()


def tokens_to_reach(loss: float, losses: pd.Series) -> float:
    """Interpolate the tokens to reach `loss` over log(tokens). losses: by tokens. NaN far outside their range."""
    if len(losses) < 2 or not (losses.diff()[1:] < 0).all():
        return math.nan
    found = math.exp(make_interp_spline(losses[::-1], np.log(losses.index[::-1]), k=1)(loss))
    return found if losses.index[0] / 2 <= found <= 2 * losses.index[-1] else math.nan


def summary(runs: pd.DataFrame) -> dict[str, str]:
    """Return the two comparisons for a command's final runs, NaN if unknown. Skips seeds with a missing model."""
    budget = runs.tokens.max()
    full = runs[runs.tokens == budget].pivot_table(["loss", "seconds"], "seed", "model")
    full = full.reindex(
        columns=[(value, model) for value in ("loss", "seconds") for model in ("MoE", "dense")]
    ).dropna()
    moe = runs[runs.model == "MoE"].pivot_table("loss", "tokens", "seed")
    tokens = np.array([tokens_to_reach(full.loss.dense[seed], moe[seed].dropna()) for seed in full.index])
    clock = interval(np.log(tokens / budget * full.seconds.MoE / full.seconds.dense))
    return runs[["device", "size", "dtype", "date"]].iloc[0].to_dict() | {
        "validation loss, dense - MoE (nats)": ranged(interval(full.loss.dense - full.loss.MoE)),
        "wall clock to the dense baseline's loss, MoE / dense": ranged(np.exp(clock)),
    }


def run_all(plan: Namespace, data: str, results: Results, purpose: str, runs: list[tuple]) -> list[Row]:
    """Train and score each (model, seed, lr, share of the budget). Returns the successful rows."""

    def run(model: str, seed: int, lr: float, share: float) -> Row:
        tokens = round(plan.steps * share) * plan.flags["batch_size"] * plan.flags["seq_len"]
        case = {"size": plan.flags["model_size"], "dtype": plan.flags["dtype"], "tokens": tokens}
        row = Row("quality", model, case | {"seed": seed, "lr": lr, "purpose": purpose}, "nats")
        with tempfile.TemporaryDirectory() as save_dir:  # a checkpoint of tiny takes 1 GB
            train(row, plan, data, save_dir, started)
        done = results.write(row)
        say(f"{model} {' '.join(map(str, row.case.values()))}: {f'val_loss {row.median:.4f}' if done else row.failed}")
        return row

    pool, started = ThreadPoolExecutor(plan.at_once), []
    try:
        return [row for row in progress(pool.map(run, *zip(*runs, strict=True)), purpose, len(runs)) if not row.failed]
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
        for process in started:
            process.kill()  # no effect on a process that has exited


def main():
    arguments = parse(__doc__)
    plan = Namespace(**PRESETS[arguments.device.type], **vars(arguments))
    results = Results(plan.output, plan.device)
    ops.set_backend("reference", plan.device)  # the scores check train.py's losses
    torch.set_num_threads(max(1, torch.get_num_threads() // plan.at_once))  # per run, and for the scores
    with tempfile.TemporaryDirectory() as data:
        say("preparing the corpus")
        say(write_corpus(data, plan.flags["vocab_size"], plan.characters, packages=plan.device.type == "cuda"))
        seeds, runs = range(1, plan.seeds + 1), [(model, 1000, lr, 0.5) for lr in plan.lr for model in ("MoE", "dense")]
        tuned = run_all(plan, data, results, "tuning", runs)
        best = {row.provider: row.case["lr"] for row in sorted(tuned, key=lambda row: -row.median)}
        if len(best) < 2:
            raise InputError("every tuning run of a model failed: see the errors above")
        runs = [(model, seed, lr, 1) for seed in seeds for model, lr in best.items()]
        runs += [("MoE", seed, best["MoE"], share) for share in plan.shares for seed in seeds]
        rows = run_all(plan, data, results, "final", runs)
    for final in final_runs(rows):
        print(*(f"{name}: {found}" for name, found in summary(final).items()), sep="\n")
    print(f"wrote {results.path}")
