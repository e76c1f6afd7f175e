"""Trains the MoE and its dense baseline on the same tokens in the same order, with several seeds, and compares them.

Both are tuned first: the same learning rates, half of the steps, and a seed of its own. The final runs take the best
rate of each: for every seed, both models on the whole budget and the MoE on smaller budgets, each a run of train.py
with its full schedule. They give
  - the difference of the validation losses at equal tokens, paired by seed, with its 95 % confidence interval;
  - the MoE's wall clock to the dense baseline's final loss / the dense baseline's wall clock. A line in log(tokens)
    joins the losses of a seed's MoE runs. It meets the dense baseline's loss at some number of tokens, which times the
    MoE's seconds per token is the wall clock.
A run's seconds are its tokens over its median tokens/s, which excludes compilation and validation. On a CPU two runs
train side by side, one core each, so that noise affects both. The text is the source of Python's standard library, or
on a GPU of all installed packages; its whole held-out part is scored at the end.
"""

import json
import math
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from subprocess import PIPE, STDOUT, Popen

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from scipy.interpolate import make_interp_spline
from scipy.stats import ttest_1samp
from tqdm import tqdm

from acceleron import Acceleron, kernels
from acceleron.data import Shards, validation_batches
from acceleron.data.loader import Chunks
from acceleron.errors import InputError
from acceleron.training.checkpoint import assign_weights, load_checkpoint

from .command import parse
from .corpus import write_corpus
from .rows import Results, Row, progress, say

TRAIN = Path(__file__).resolve().parent.parent / "train.py"
# flags: train.py's. shares: the MoE's smaller budgets. lr: rates to tune with. at_once: runs, one core each if several.
PRESETS = {
    "cpu": dict(
        flags=dict(model_size="nano", vocab_size=2048, batch_size=4, seq_len=256, dtype="fp32"),
        characters=20_000_000, packages=False, steps=600, shares=(0.8,), lr=(1e-3, 2e-3, 4e-3), seeds=5, at_once=2,
    ),
    "cuda": dict(
        flags=dict(model_size="tiny", vocab_size=8192, batch_size=32, seq_len=2048, dtype="bf16"),
        characters=200_000_000, packages=True, steps=900, shares=(0.6, 0.8), lr=(6e-4, 1.2e-3, 2.4e-3), seeds=5,
        at_once=1,
    ),
}  # fmt: skip
TUNING_SEED = 1000


def train(row: Row, plan: Namespace, data: str, save_dir: str, bar: tqdm):
    """Train and score what the row's provider and case describe; set its values, check and details, or `failed`."""
    steps = row.case["tokens"] // (plan.flags["batch_size"] * plan.flags["seq_len"])
    interval = max(1, steps // 20)
    flags = plan.flags | {
        "device": plan.device, "data_dir": data, "save_dir": save_dir, "max_steps": steps, "save_interval": steps,
        "lr": row.case["lr"], "seed": row.case["seed"], "num_workers": 1, "log_interval": interval,
        "eval_interval": max(1, steps // 4),
    }  # fmt: skip
    command = [sys.executable, str(TRAIN), *(f"--{name}={value}" for name, value in flags.items())]
    command += ["--no_gradient_checkpointing"] + ["--dense"] * (row.provider == "dense")
    command += ["--no_compile"] * (plan.device.type == "cpu")
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | ({"OMP_NUM_THREADS": "1"} if plan.at_once > 1 else {})
    line = "no message"
    with Popen(command, stdout=PIPE, stderr=STDOUT, text=True, env=environment) as process:
        for line in process.stdout:
            bar.update(interval * line.startswith("step "))  # a line per logged step
    if process.returncode:
        row.failed = line.strip()
        return
    records = [json.loads(text) for text in Path(save_dir, "metrics.jsonl").read_text().splitlines()]
    rate = float(np.median([record["tokens_per_second"] for record in records]))
    curve = [[r["tokens"], r["tokens"] / rate, r["val_loss"]] for r in records if "val_loss" in r]
    row.details |= {"seconds": row.case["tokens"] / rate, "tokens_per_second": rate, "curve": curve}
    loss, again = score(f"{save_dir}/checkpoint_{steps}.pt", data, plan)
    row.values, row.check = [loss], "train.py's val_loss against torch's cross_entropy on fp32 logits"
    row.error = abs(records[-1]["val_loss"] - again) / again
    row.allowed = 1e-4 if row.case["dtype"] == "fp32" else 5e-3  # the order of summation, or bf16 activations


@torch.no_grad()
def score(checkpoint: str, data: str, plan: Namespace) -> tuple[float, float]:
    """Loss of all held-out text, and of the part of it on which train.py validates."""
    contents = load_checkpoint(checkpoint)
    model = Acceleron(contents["config"]).to(plan.device)
    assign_weights(model, contents, checkpoint, assign=False)

    def loss(batches: Iterable[torch.Tensor]) -> float:
        total = count = 0
        for ids in batches:
            ids = ids.to(plan.device)
            logits, labels = model(ids).logits[:, :-1].float(), ids[:, 1:]
            total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").double()
            count += labels.numel()
        return total.item() / count

    settings = {name: plan.flags[name] for name in ("seq_len", "vocab_size")}
    chunks = Chunks(Shards(data), validation=True, **settings)
    everything = (chunks.batch(part) for part in np.array_split(np.arange(len(chunks)), len(chunks) // 16 + 1))
    return loss(everything), loss(validation_batches(Shards(data), batch_size=plan.flags["batch_size"], **settings))


def final_runs(rows: list[Row]) -> dict[tuple[str, str, str, str], list[Row]]:
    """The valid final runs of each (device, size, dtype) and command, by its date."""
    found: dict[tuple[str, str, str, str], list[Row]] = {}
    for row in rows:
        if row.benchmark == "quality" and row.case["purpose"] == "final" and not row.complaint():
            key = row.about.get("device", ""), row.case["size"], row.case["dtype"], row.about.get("date", "")
            found.setdefault(key, []).append(row)
    return found


def interval(values: pd.Series) -> tuple[float, float, float] | None:
    """Mean and 95 % confidence interval by Student's t. None for fewer than two values, or if one is not finite."""
    if len(values) < 2 or not np.isfinite(values).all():
        return None
    return values.mean(), *ttest_1samp(values, 0).confidence_interval()


def tokens_to_reach(loss: float, losses: pd.Series) -> float:
    """Tokens at which the line of losses (index: tokens, rising) over log(tokens), extended at its ends, meets `loss`.

    NaN for fewer than two, if they do not fall, or at less than half of the least tokens or twice the most.
    """
    if len(losses) < 2 or not (losses.diff()[1:] < 0).all():
        return math.nan
    found = math.exp(make_interp_spline(losses[::-1], np.log(losses.index[::-1]), k=1)(loss))
    return found if losses.index[0] / 2 <= found <= 2 * losses.index[-1] else math.nan


def summary(runs: list[Row]) -> tuple[tuple[float, float, float] | None, tuple[float, float, float] | None]:
    """Loss difference dense - MoE in nats, and wall-clock ratio MoE / dense, each with its interval; None: unknown.

    runs: the final runs of one command, size and dtype. Seeds that lack a model do not count.
    """
    cells = [(row.provider, row.case["seed"], row.case["tokens"], row.median, row.details["seconds"]) for row in runs]
    frame = pd.DataFrame(cells, columns=["model", "seed", "tokens", "loss", "seconds"])
    budget = frame.tokens[frame.model == "dense"].max()
    full = frame[frame.tokens == budget].pivot_table(index="seed", columns="model", values=["loss", "seconds"]).dropna()
    if not {"MoE", "dense"} <= set(full.columns.get_level_values("model")):
        return None, None
    moe = frame[frame.model == "MoE"].pivot_table(index="tokens", columns="seed", values="loss")
    tokens = [tokens_to_reach(full.loss.dense[seed], moe[seed].dropna()) for seed in full.index]
    ratio = interval(np.log(tokens / budget * full.seconds.MoE / full.seconds.dense))
    return interval(full.loss.dense - full.loss.MoE), ratio and tuple(map(math.exp, ratio))


def train_all(plan: Namespace, data: str, results: Results) -> list[Row]:
    """Write the text to `data`, tune both models, and train them with every seed. Returns the final runs' rows."""
    say("preparing the text")
    corpus = write_corpus(data, plan.flags["vocab_size"], plan.characters, plan.packages)
    say(corpus)

    def run(purpose: str, model: str, seed: int, lr: float, share: float) -> Row:
        tokens = round(plan.steps * share) * plan.flags["batch_size"] * plan.flags["seq_len"]
        case = {"size": plan.flags["model_size"], "dtype": plan.flags["dtype"], "tokens": tokens}
        case |= {"seed": seed, "lr": lr, "purpose": purpose}
        return Row("quality", model, case, "nats", details={"corpus": corpus})

    def finish(row: Row) -> Row:
        with tempfile.TemporaryDirectory() as save_dir:  # a checkpoint of tiny takes 1 GB
            train(row, plan, data, save_dir, bar)
        results.write(row)
        what = " ".join(map(str, (row.provider, *row.case.values())))
        say(f"{what}: {f'FAILED: {row.failed}' if row.failed else f'val_loss {row.median:.4f}'}")
        return row

    models, seeds = ("MoE", "dense"), range(1, plan.seeds + 1)
    total = round(plan.steps * (len(plan.lr) + plan.seeds * (2 + sum(plan.shares))))
    with progress(total=total, unit="step") as bar, ThreadPoolExecutor(plan.at_once) as pool:
        tuning = [run("tuning", model, TUNING_SEED, lr, 0.5) for lr in plan.lr for model in models]
        tuned = sorted((row for row in pool.map(finish, tuning) if not row.failed), key=lambda row: -row.median)
        best = {row.provider: row.case["lr"] for row in tuned}
        if set(best) != set(models):
            raise InputError("every tuning run of a model failed: see above")
        final = [run("final", model, seed, best[model], 1) for seed in seeds for model in models]
        final += [run("final", "MoE", seed, best["MoE"], share) for share in plan.shares for seed in seeds]
        return list(pool.map(finish, final))


def main():
    arguments = parse(__doc__, steps=int, seeds=int)
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    plan = Namespace(**PRESETS[arguments.device.type] | given)  # with device and output
    if plan.steps < 20 or plan.seeds < 2:
        raise InputError("--steps: at least 20; --seeds: at least 2")
    results = Results(plan.output, plan.device)
    kernels.select("reference", plan.device)  # for the scores, which check train.py's own
    if plan.at_once > 1:
        torch.set_num_threads(1)  # a score is computed beside another training
    with tempfile.TemporaryDirectory() as data:
        rows = train_all(plan, data, results)
    what = ("validation loss, dense baseline - MoE (nats)", "wall clock to the dense baseline's loss, MoE / dense")
    for name, found in zip(what, summary([row for row in rows if not row.failed]), strict=True):
        print(f"{name}: " + ("{:.4f}, 95 % interval {:.4f} .. {:.4f}".format(*found) if found else "unknown"))
    print(f"wrote {results.path}")


if __name__ == "__main__":
    main()
