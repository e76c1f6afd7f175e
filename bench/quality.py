"""Is the MoE worth it? Trains it and its dense twin on the same tokens in the same order, with several seeds.

First both are tuned alike: each with the same learning rates, one seed of its own, and a share of the tokens; the
best rate of each serves in its final runs. These are, for every seed, the dense twin and the MoE on the whole budget,
and the MoE on smaller budgets, each a run of train.py with its full schedule. From them come
  - the difference of the validation losses at equal tokens, paired by seed, with its 95 % confidence interval (t);
  - the wall clock after which the MoE reaches the dense twin's final loss, as a share of the dense twin's own. A
    seed's MoE runs give its loss as a line in log(tokens) between neighbouring budgets; that line meets the dense
    twin's loss at a number of tokens, which times the MoE's seconds a token is the time.
A run's seconds are its tokens over the median of its logged tokens/s, which leaves out compilation and validation. On a
CPU two runs at a time have a core each, the MoE beside its dense twin, so that what slows the machine slows both.

The text is the source of Python's library, or for the GPU preset of all installed packages. All of its held-out part
is scored at the end, by torch's cross_entropy on logits in fp32, which has to agree with train.py's own figure on the
batches that this one took.
"""

import argparse
import itertools
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
import torch
import torch.nn.functional as F
from tqdm import tqdm

from acceleron import Acceleron, kernels
from acceleron.data import Shards, validation_batches
from acceleron.data.loader import Chunks
from acceleron.device import resolve_device
from acceleron.errors import InputError
from acceleron.training.checkpoint import assign_weights, load_checkpoint

from .corpus import write_corpus
from .results import Results

ROOT = Path(__file__).resolve().parent.parent


class Preset(NamedTuple):
    """A comparison. `shares` are of the budget, for the MoE's shorter runs; `at_once` runs have a core each."""

    size: str
    vocab_size: int
    characters: int
    packages: bool
    batch_size: int
    seq_len: int
    steps: int
    shares: tuple[float, ...]
    rates: tuple[float, ...]
    tuning_share: float
    seeds: int
    at_once: int
    flags: tuple[str, ...]


PRESETS = {
    "cpu": Preset(
        size="nano",
        vocab_size=2048,
        characters=20_000_000,
        packages=False,
        batch_size=4,
        seq_len=256,
        steps=600,
        shares=(0.8,),
        rates=(1e-3, 2e-3, 4e-3),
        tuning_share=0.5,
        seeds=5,
        at_once=2,
        flags=("--device", "cpu", "--dtype", "fp32", "--no_compile"),
    ),
    "gpu": Preset(
        size="tiny",
        vocab_size=8192,
        characters=200_000_000,
        packages=True,
        batch_size=32,
        seq_len=2048,
        steps=900,
        shares=(0.6, 0.8),
        rates=(6e-4, 1.2e-3, 2.4e-3),
        tuning_share=0.5,
        seeds=5,
        at_once=1,
        flags=("--device", "cuda"),
    ),
}
TUNING_SEED = 1000


class Training(NamedTuple):
    """One run of train.py."""

    model: str  # "moe" or "dense"
    seed: int
    rate: float
    steps: int
    purpose: str  # "tuning" or "final"

    @property
    def name(self) -> str:
        return f"{self.purpose}-{self.model}-seed{self.seed}-{self.rate:g}-{self.steps}"


def command(run: Training, preset: Preset, data: str, save_dir: str) -> list[str]:
    """train.py's command line."""
    words = [sys.executable, str(ROOT / "train.py"), "--data_dir", data, "--save_dir", save_dir]
    words += ["--model_size", preset.size, "--vocab_size", str(preset.vocab_size)]
    words += ["--dense"] * (run.model == "dense")
    words += ["--batch_size", str(preset.batch_size), "--seq_len", str(preset.seq_len), "--max_steps", str(run.steps)]
    words += ["--lr", str(run.rate), "--seed", str(run.seed), "--no_gradient_checkpointing", "--num_workers", "1"]
    words += ["--log_interval", str(max(1, run.steps // 20)), "--eval_interval", str(max(1, run.steps // 4))]
    return [*words, "--save_interval", str(run.steps), *preset.flags]


def train(run: Training, preset: Preset, directory: str) -> dict:
    """Run it on the corpus in <directory>/data; a row of quality.jsonl, which has `failed` if the run did."""
    data, save_dir = f"{directory}/data", f"{directory}/{run.name}"
    row = {"size": preset.size, "model": run.model, "seed": run.seed, "lr": run.rate, "purpose": run.purpose}
    row |= {"tokens": run.steps * preset.batch_size * preset.seq_len}
    row |= {"batch_size": preset.batch_size, "seq_len": preset.seq_len}
    environment = os.environ | {"OMP_NUM_THREADS": "1"} if preset.at_once > 1 else None
    done = subprocess.run(
        command(run, preset, data, save_dir), capture_output=True, text=True, check=False, env=environment
    )
    if done.returncode:
        return row | {"failed": (done.stderr.strip().splitlines() or ["no message"])[-1]}
    records = [json.loads(line) for line in Path(save_dir, "metrics.jsonl").read_text().splitlines()]
    rate = statistics.median(record["tokens_per_second"] for record in records)
    curve = [[r["tokens"], r["tokens"] / rate, r["val_loss"]] for r in records if "val_loss" in r]
    row |= {"tokens_per_second": rate, "seconds": row["tokens"] / rate, "curve": curve}
    row |= score(f"{save_dir}/checkpoint_{run.steps}.pt", data, preset, records[-1]["val_loss"])
    shutil.rmtree(save_dir)  # a checkpoint of tiny is 1 GB
    return row


@torch.no_grad()
def score(checkpoint: str, data: str, preset: Preset, reported: float) -> dict:
    """The loss of all that is held out, and a check of train.py's own figure for its part of that."""
    device = torch.device("cuda" if "cuda" in preset.flags else "cpu")
    contents = load_checkpoint(checkpoint)
    model = Acceleron(contents["config"]).to(device)
    assign_weights(model, contents, checkpoint, assign=False)

    def loss(batches: Iterable[torch.Tensor]) -> float:
        total = count = 0
        for ids in batches:
            logits = model(ids.to(device)).logits[:, :-1].float()
            total += F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten().to(device), reduction="sum").double()
            count += ids[:, 1:].numel()
        return total.item() / count

    settings = dict(seq_len=preset.seq_len, vocab_size=preset.vocab_size)
    chunks = Chunks(Shards(data), validation=True, **settings)
    everything = (chunks.batch(part) for part in np.array_split(np.arange(len(chunks)), max(1, len(chunks) // 16)))
    again = loss(validation_batches(Shards(data), batch_size=preset.batch_size, **settings))
    return {
        "val_loss": loss(everything),
        "val_tokens": len(chunks) * (preset.seq_len - 1),
        "check": "train.py's val_loss against torch's cross_entropy on fp32 logits",
        "check_error": abs(reported - again) / again,
        # bf16's rounding of the activations, or fp32's order of summation.
        "check_allowed": 1e-4 if "fp32" in preset.flags else 5e-3,
        "dtype": "fp32" if "fp32" in preset.flags else "bf16",
    }


def t_interval(values: list[float]) -> tuple[float, float, float]:
    """Mean, and the ends of its 95 % confidence interval by Student's t; of two values or more."""
    mean = statistics.fmean(values)
    # The 97.5 % quantile; between the listed degrees of freedom the next smaller one's, which is larger.
    quantile = next(t for degrees, t in reversed(T_QUANTILES.items()) if degrees <= len(values) - 1)
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    return mean, mean - half, mean + half


T_QUANTILES = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262,
    10: 2.228, 12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.0,
}  # fmt: skip


def by_seed(rows: list[dict]) -> dict[int, tuple[dict, list[dict]]]:
    """Of each seed that has both: the dense twin's final run, and the MoE's by rising budget; of the latest command."""
    final = [row for row in rows if row.get("purpose") == "final" and "failed" not in row]
    latest = max((row.get("date", "") for row in final), default="")
    final = [row for row in final if row.get("date", "") == latest]  # a command's rows have one date
    found = {}
    for dense in (row for row in final if row["model"] == "dense"):
        moe = [row for row in final if row["model"] == "moe" and row["seed"] == dense["seed"]]
        if any(row["tokens"] == dense["tokens"] for row in moe):
            found[dense["seed"]] = dense, sorted(moe, key=lambda row: row["tokens"])
    return found


def paired_difference(rows: list[dict]) -> dict | None:
    """Validation loss of the dense twin less the MoE's at equal tokens, nats; above 0 the MoE is ahead.

    {mean, low, high, pairs, tokens}: the mean over seeds and its 95 % confidence interval. None for fewer than two.
    """
    pairs = by_seed(rows)
    if len(pairs) < 2:
        return None
    budget = max(dense["tokens"] for dense, _ in pairs.values())
    differences = [
        dense["val_loss"] - next(row["val_loss"] for row in moe if row["tokens"] == dense["tokens"])
        for dense, moe in pairs.values()
    ]
    mean, low, high = t_interval(differences)
    return {"mean": mean, "low": low, "high": high, "pairs": len(pairs), "tokens": budget}


def tokens_to_reach(loss: float, runs: list[dict]) -> float:
    """Where the line of loss over log(tokens) through two neighbouring runs, or the outer two, meets this loss.

    runs: by rising tokens, two or more, with a loss that falls. NaN if it does not, or if the lines meet farther than
    half of the least budget or twice the largest.
    """
    points = [(math.log(run["tokens"]), run["val_loss"]) for run in runs]
    pairs = list(itertools.pairwise(points))
    (x0, y0), (x1, y1) = next((pair for pair in pairs if loss >= pair[1][1]), pairs[-1])
    if y1 >= y0:
        return math.nan
    where = x0 + (x1 - x0) * (loss - y0) / (y1 - y0)
    return math.exp(where) if points[0][0] - math.log(2) <= where <= points[-1][0] + math.log(2) else math.nan


def time_to_dense_loss(rows: list[dict]) -> dict | None:
    """The MoE's wall clock to the dense twin's final loss, as a share of the dense twin's own; below 1 it is faster.

    {ratio, low, high, seeds, extrapolated}: the geometric mean over seeds and its 95 % confidence interval, and how
    many seeds lie outside the budgets that were run. None for fewer than two seeds with MoE runs of several budgets, or
    where more tokens did not lower the loss.
    """
    logs, outside = [], 0
    for dense, moe in by_seed(rows).values():
        if len(moe) > 1:
            seconds_a_token = moe[-1]["seconds"] / moe[-1]["tokens"]
            tokens = tokens_to_reach(dense["val_loss"], moe)
            outside += not moe[0]["tokens"] <= tokens <= moe[-1]["tokens"]
            logs.append(math.log(tokens * seconds_a_token / dense["seconds"]))
    if len(logs) < 2 or not all(map(math.isfinite, logs)):
        return None
    ratio, low, high = (math.exp(value) for value in t_interval(logs))
    return {"ratio": ratio, "low": low, "high": high, "seeds": len(logs), "extrapolated": outside}


def run_all(
    trainings: list[Training], preset: Preset, directory: str, results: Results, bar: tqdm, **about: str
) -> list[dict]:
    """The rows of all runs, in their order; each is written as soon as it exists."""

    def one(training: Training) -> dict:
        row = train(training, preset, directory) | about
        results.write(row)
        loss = f"val_loss {row['val_loss']:.4f}" if "val_loss" in row else f"FAILED: {row['failed']}"
        tqdm.write(f"{training.name}: {loss}")
        bar.update(training.steps)
        return row

    if preset.at_once > 1:
        torch.set_num_threads(1)  # for the scores, which are computed beside another run
    with ThreadPoolExecutor(preset.at_once) as pool:
        return list(pool.map(one, trainings))


def best_rate(rows: list[dict], model: str) -> float:
    """The learning rate of the model's tuning run of the lowest loss. Raises InputError if all failed."""
    found = [row for row in rows if row["model"] == model and "failed" not in row]
    if not found:
        raise InputError(f"every tuning run of the {model} model failed: see above")
    return min(found, key=lambda row: row["val_loss"])["lr"]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, help="default: gpu where there is one")
    parser.add_argument("--steps", type=int, help="of the whole budget (default: the preset's)")
    parser.add_argument("--seeds", type=int, help="default: the preset's")
    parser.add_argument("--lr", type=float, nargs="+", help="learning rates to tune with (default: the preset's)")
    parser.add_argument("--output", metavar="DIR", help="for quality.jsonl (default: bench/results/<date>-<device>)")
    arguments = parser.parse_args()
    device = resolve_device("auto")
    name = arguments.preset or ("gpu" if device.type == "cuda" else "cpu")
    if name == "gpu" and device.type != "cuda":
        raise InputError("--preset gpu: there is no GPU here; use --preset cpu")
    given = {"steps": arguments.steps, "seeds": arguments.seeds, "rates": arguments.lr}
    preset = PRESETS[name]._replace(**{key: value for key, value in given.items() if value is not None})
    if preset.steps < 20 or preset.seeds < 2 or not all(0 < rate < math.inf for rate in preset.rates):
        raise InputError("--steps: at least 20; --seeds: at least 2; --lr: above 0")
    results = Results(arguments.output, "quality", torch.device("cuda" if name == "gpu" else "cpu"))
    kernels.select("reference", device)  # of the scores, which are train.py's check
    short = round(preset.steps * preset.tuning_share)
    tuning = [Training(m, TUNING_SEED, rate, short, "tuning") for rate in preset.rates for m in ("moe", "dense")]
    with tempfile.TemporaryDirectory() as directory:
        corpus = write_corpus(f"{directory}/data", preset.vocab_size, preset.characters, preset.packages)
        print(corpus)
        units = len(tuning) * short + preset.seeds * sum(round(preset.steps * s) for s in (1, 1, *preset.shares))
        with tqdm(total=units, unit="step", dynamic_ncols=True, disable=None) as bar:
            rows = run_all(tuning, preset, directory, results, bar, corpus=corpus)
            rates = {model: best_rate(rows, model) for model in ("moe", "dense")}
            effort = (
                f"both models: the best of the learning rates {', '.join(f'{r:g}' for r in preset.rates)} in one run "
                f"each of {short} of {preset.steps} steps; MoE {rates['moe']:g}, dense twin {rates['dense']:g}. "
                "Initialisation and loss coefficients are the defaults; what was tried for them is in bench/LOG.md"
            )
            tqdm.write(effort)
            seeds = range(1, preset.seeds + 1)
            final = [Training(m, seed, rates[m], preset.steps, "final") for seed in seeds for m in ("moe", "dense")]
            final += [
                Training("moe", seed, rates["moe"], round(preset.steps * share), "final")
                for share in preset.shares
                for seed in seeds
            ]
            rows = run_all(final, preset, directory, results, bar, corpus=corpus, tuning=effort)
    difference, reached = paired_difference(rows), time_to_dense_loss(rows)
    if difference:
        print(
            "dense twin's loss less the MoE's at {tokens:,} tokens: {mean:+.4f} nats, 95 % interval {low:+.4f} .. "
            "{high:+.4f}, {pairs} seeds".format(**difference)
        )
    if reached:
        print(
            "wall clock to the dense twin's final loss: {ratio:.2f} of the dense twin's, 95 % interval {low:.2f} .. "
            "{high:.2f}, {seeds} seeds".format(**reached)
        )
    print(f"wrote {results.path}")


if __name__ == "__main__":
    main()
