"""Trains the MoE and its dense baseline on the same tokens in the same order, with several seeds, and compares them.

Both are tuned first: the same learning rates, on a share of the steps, with a seed of its own. The final runs take the
best rate of each: for every seed, both models on the whole budget and the MoE on smaller budgets, each a run of
train.py with its full schedule. They give
  - the difference of the validation losses at equal tokens, paired by seed, with its 95 % confidence interval;
  - the MoE's wall clock to the dense baseline's final loss / the dense baseline's wall clock. A line in log(tokens)
    joins the losses of a seed's MoE runs. It meets the dense baseline's loss at some number of tokens, which times the
    MoE's seconds per token is the wall clock.
A run's seconds are its tokens over its median tokens/s, which excludes compilation and validation. On a CPU two runs
train side by side, one core each, so that noise affects both. The text is the source of Python's standard library, or
on a GPU of all installed packages; its whole held-out part is scored at the end.
"""

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

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
from acceleron.device import resolve_device
from acceleron.errors import InputError
from acceleron.training.checkpoint import assign_weights, load_checkpoint

from .corpus import write_corpus
from .rows import Results, Row, progress

ROOT = Path(__file__).resolve().parent.parent
TUNING_SEED = 1000
TUNING_SHARE = 0.5  # of the steps


class Preset(NamedTuple):
    size: str
    vocab_size: int
    characters: int
    packages: bool  # the text: all installed packages, or the standard library
    batch_size: int
    seq_len: int
    steps: int
    shares: tuple[float, ...]  # of the steps, for the MoE's smaller budgets
    rates: tuple[float, ...]  # learning rates to tune with
    seeds: int
    at_once: int  # runs side by side, one core each if there are several
    device: str
    dtype: str


PRESETS = {
    "cpu": Preset("nano", 2048, 20_000_000, False, 4, 256, 600, (0.8,), (1e-3, 2e-3, 4e-3), 5, 2, "cpu", "fp32"),
    "gpu": Preset(
        "tiny", 8192, 200_000_000, True, 32, 2048, 900, (0.6, 0.8), (6e-4, 1.2e-3, 2.4e-3), 5, 1, "cuda", "bf16"
    ),
}


class Training(NamedTuple):
    """One run of train.py. model: "MoE" or "dense"; purpose: "tuning" or "final"."""

    model: str
    seed: int
    rate: float
    steps: int
    purpose: str


def command(run: Training, preset: Preset, data: str, save_dir: str) -> list[str]:
    flags = {
        "data_dir": data, "save_dir": save_dir, "model_size": preset.size, "vocab_size": preset.vocab_size,
        "batch_size": preset.batch_size, "seq_len": preset.seq_len, "max_steps": run.steps, "lr": run.rate,
        "seed": run.seed, "num_workers": 1, "log_interval": max(1, run.steps // 20),
        "eval_interval": max(1, run.steps // 4), "save_interval": run.steps, "device": preset.device,
        "dtype": preset.dtype,
    }  # fmt: skip
    words = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    words += ["--dense"] * (run.model == "dense") + ["--no_compile"] * (preset.device == "cpu")
    return [sys.executable, str(ROOT / "train.py"), "--no_gradient_checkpointing", *words]


def train(run: Training, preset: Preset, directory: str, bar: tqdm) -> Row:
    """Train on the corpus in <directory>/data and score the checkpoint. The row has `failed` if train.py fails."""
    data, save_dir = f"{directory}/data", f"{directory}/{'-'.join(map(str, run))}"
    tokens = run.steps * preset.batch_size * preset.seq_len
    case = {"size": preset.size, "dtype": preset.dtype, "tokens": tokens}
    row = Row("quality", run.model, case | {"seed": run.seed, "lr": run.rate, "purpose": run.purpose}, "nats")
    environment = os.environ | {"PYTHONUNBUFFERED": "1"} | ({"OMP_NUM_THREADS": "1"} if preset.at_once > 1 else {})
    line, done = "no message", 0
    with subprocess.Popen(
        command(run, preset, data, save_dir), env=environment, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    ) as process:  # fmt: skip
        for line in process.stdout:
            if line.startswith("step "):  # "step 30/600 | loss ..."
                step = int(line.split("/")[0].removeprefix("step "))
                bar.update(step - done)
                done = step
    bar.update(run.steps - done)
    if process.returncode:
        row.failed = line.strip()
        return row
    records = [json.loads(text) for text in Path(save_dir, "metrics.jsonl").read_text().splitlines()]
    rate = statistics.median(record["tokens_per_second"] for record in records)
    curve = [[r["tokens"], r["tokens"] / rate, r["val_loss"]] for r in records if "val_loss" in r]
    row.details = {"seconds": tokens / rate, "tokens_per_second": rate, "curve": curve}
    score(row, f"{save_dir}/checkpoint_{run.steps}.pt", data, preset, records[-1]["val_loss"])
    shutil.rmtree(save_dir)  # a checkpoint of tiny takes 1 GB
    return row


@torch.no_grad()
def score(row: Row, checkpoint: str, data: str, preset: Preset, reported: float):
    """Set the row's value, the loss of all held-out text, and its check of the loss that train.py reported."""
    contents = load_checkpoint(checkpoint)
    model = Acceleron(contents["config"]).to(preset.device)
    assign_weights(model, contents, checkpoint, assign=False)

    def loss(batches: Iterable[torch.Tensor]) -> float:
        total = count = 0
        for ids in batches:
            logits, labels = model(ids.to(preset.device)).logits[:, :-1].float(), ids[:, 1:].to(preset.device)
            total += F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").double()
            count += labels.numel()
        return total.item() / count

    settings = dict(seq_len=preset.seq_len, vocab_size=preset.vocab_size)
    chunks = Chunks(Shards(data), validation=True, **settings)
    row.values = [loss(chunks.batch(part) for part in np.array_split(np.arange(len(chunks)), len(chunks) // 16 + 1))]
    again = loss(validation_batches(Shards(data), batch_size=preset.batch_size, **settings))
    row.check = "train.py's val_loss against torch's cross_entropy on fp32 logits"
    row.error = abs(reported - again) / again
    row.allowed = 1e-4 if preset.dtype == "fp32" else 5e-3  # the order of summation, or bf16 activations


def final_runs(rows: list[Row]) -> dict[tuple[str, str, str], list[Row]]:
    """The valid final runs by (device, size, dtype): those of the latest command, whose rows have one date."""
    found: dict[tuple[str, str, str], list[Row]] = {}
    for row in rows:
        if row.benchmark == "quality" and row.case["purpose"] == "final" and not row.complaint():
            found.setdefault((row.about["device"], row.case["size"], row.case["dtype"]), []).append(row)
    for key, runs in found.items():
        latest = max(row.about["date"] for row in runs)
        found[key] = [row for row in runs if row.about["date"] == latest]
    return found


def interval(values: pd.Series) -> tuple[float, float, float] | None:
    """Mean and 95 % confidence interval by Student's t. None for fewer than two values, or if one is not finite."""
    found = (values.mean(), *ttest_1samp(values, 0).confidence_interval()) if len(values) > 1 else (math.nan,)
    return found if np.isfinite(found).all() else None


def tokens_to_reach(loss: float, losses: pd.Series) -> float:
    """Tokens at which the line of losses (index: tokens, rising) over log(tokens), extended at its ends, meets `loss`.

    NaN for fewer than two, if they do not fall, or at less than half of the least tokens or twice the most.
    """
    if len(losses) < 2 or not (losses.diff()[1:] < 0).all():
        return math.nan
    found = math.exp(make_interp_spline(losses[::-1], np.log(losses.index[::-1]), k=1)(loss))
    return found if losses.index[0] / 2 <= found <= 2 * losses.index[-1] else math.nan


def summary(runs: list[Row]) -> tuple[tuple[float, float, float] | None, tuple[float, float, float] | None]:
    """Loss difference dense - MoE in nats, and wall-clock ratio MoE / dense, each with its interval, or None: unknown.

    runs: the final runs of one size, dtype and device. Only seeds of both models count.
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


def train_all(preset: Preset, directory: str, results: Results) -> list[Row]:
    """Tune both models, then train them with every seed. Returns the rows of the final runs."""
    print("preparing the text", flush=True)
    corpus = write_corpus(f"{directory}/data", preset.vocab_size, preset.characters, preset.packages)
    print(corpus, flush=True)
    short, models, seeds = round(preset.steps * TUNING_SHARE), ("MoE", "dense"), range(1, preset.seeds + 1)
    budgets = [round(preset.steps * share) for share in preset.shares]
    total = 2 * len(preset.rates) * short + preset.seeds * (2 * preset.steps + sum(budgets))

    def one(run: Training) -> Row:
        row = train(run, preset, directory, bar)
        row.details["corpus"] = corpus
        results.write(row)
        result = f"FAILED: {row.failed}" if row.failed else f"val_loss {row.median:.4f}"
        tqdm.write(f"{run.purpose} {run.model}, seed {run.seed}, lr {run.rate:g}, {run.steps} steps: {result}")
        return row

    with progress(total=total, unit="step") as bar, ThreadPoolExecutor(preset.at_once) as pool:
        tuning = [Training(model, TUNING_SEED, lr, short, "tuning") for lr in preset.rates for model in models]
        tuned = [row for row in pool.map(one, tuning) if not row.complaint()]
        if {row.provider for row in tuned} != set(models):
            raise InputError("every tuning run of a model failed: see above")
        best = {row.provider: row.case["lr"] for row in sorted(tuned, key=lambda row: -row.median)}
        final = [Training(model, seed, best[model], preset.steps, "final") for seed in seeds for model in models]
        final += [Training("MoE", seed, best["MoE"], steps, "final") for steps in budgets for seed in seeds]
        return list(pool.map(one, final))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="default: gpu if there is one, else cpu")
    parser.add_argument("--steps", type=int, help="the whole budget (default: the preset's)")
    parser.add_argument("--seeds", type=int, help="default: the preset's")
    parser.add_argument("--lr", type=float, nargs="+", help="learning rates to tune with (default: the preset's)")
    parser.add_argument("--output", metavar="DIR", help="directory of results.jsonl (default: in ~/.cache/acceleron)")
    arguments = parser.parse_args()
    here = resolve_device("auto").type
    preset = PRESETS[arguments.preset or ("gpu" if here == "cuda" else "cpu")]
    if preset.device not in (here, "cpu"):
        raise InputError("--preset gpu: there is no GPU here; use --preset cpu")
    given = {"steps": arguments.steps, "seeds": arguments.seeds, "rates": arguments.lr}
    preset = preset._replace(**{name: value for name, value in given.items() if value is not None})
    if preset.steps < 20 or preset.seeds < 2 or not all(0 < rate < math.inf for rate in preset.rates):
        raise InputError("--steps: at least 20; --seeds: at least 2; --lr: above 0")
    device = torch.device(preset.device)
    results = Results(arguments.output, device)
    kernels.select("reference", device)  # scoring checks train.py, so it uses other kernels
    if preset.at_once > 1:
        torch.set_num_threads(1)  # scoring runs beside another training
    with tempfile.TemporaryDirectory() as directory:
        rows = train_all(preset, directory, results)
    found = summary([row for row in rows if not row.complaint()])
    what = ("validation loss, dense baseline - MoE (nats)", "wall clock to the dense baseline's loss, MoE / dense")
    for name, value in zip(what, found, strict=True):
        print(f"{name}: " + ("{:.4f}, 95 % interval {:.4f} .. {:.4f}".format(*value) if value else "unknown"))
    print(f"wrote {results.path}")


if __name__ == "__main__":
    main()
