"""The model card of an export: README.md with training figures and the loss curve."""

import json
import logging
import math
import re
import shlex
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from .errors import InputError
from .model import Acceleron
from .plot import draw_losses, read_metrics

logger = logging.getLogger(__name__)

TEMPLATE = """---
{{ card_data }}
---

# {{ name }}

{{ kind }}, pretrained with Acceleron. It continues text, and is not tuned to follow instructions.

{{ shape }}
## Training

{{ curve }}
{{ training }}
{{ usage }}
"""
HF_USAGE = """## Use

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({literal})
model = AutoModelForCausalLM.from_pretrained({literal})
ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=100, do_sample=True, temperature=0.8)[0]))
```

To train it further with Acceleron: `python train.py --init_from {quoted} --data_dir data`."""
GGUF_USAGE = """## Use

```bash
llama-completion -m {file} -no-cnv -p "Once upon a time" -n 100
ollama create {model} -f Modelfile && ollama run {model} "Once upon a time"
```"""


def hf_usage(name: str) -> str:
    return HF_USAGE.format(literal=json.dumps(name, ensure_ascii=False), quoted=shlex.quote(name))


def gguf_usage(name: str, file: str) -> str:
    model = re.sub(r"[^a-z0-9_.-]+", "-", name.rpartition("/")[2].lower())
    return GGUF_USAGE.format(file=shlex.quote(file), model=model)


def write_card(
    directory: Path, name: str, architecture: str, model: Acceleron, contents: dict, metrics: Path, usage: str
):
    """Write README.md, and loss.png if `metrics`, the run's metrics.jsonl, and matplotlib are present.

    Args:
        architecture: the one in config.json, GraniteMoeSharedForCausalLM for example.
        contents: the checkpoint.
        usage: the section about using the model, from `hf_usage` or `gguf_usage`.
    """
    records, curve = [], ""
    try:
        records = read_metrics(metrics, contents["step"]) if metrics.is_file() else []
        if records:
            draw_losses(records, directory / "loss.png", name)
            curve = "![Training and validation loss against tokens](loss.png)\n"
    except InputError as error:
        logger.warning(f"the model card has no loss curve: {error}")
    last = {name: value for record in records for name, value in record.items() if math.isfinite(value)}
    results = [
        EvalResult(
            task_type="text-generation", task_name="Language modeling", dataset_type="text",
            dataset_name="held-out rows of the training data", metric_type=metric, metric_name=title,
            metric_value=round(last[metric], 4),
        )
        for metric, title in (("val_loss", "cross-entropy, nats per token"), ("val_bits_per_byte", "bits per byte"))
        if metric in last
    ]  # fmt: skip
    card_data = ModelCardData(
        library_name=None if any(directory.glob("*.gguf")) else "transformers", pipeline_tag="text-generation",
        tags=["acceleron"] + ([] if model.config.dense else ["moe"]), model_name=name,
        eval_results=results or None,
    )  # fmt: skip
    kind = "A dense language model" if model.config.dense else "A Mixture-of-Experts language model"
    ModelCard.from_template(
        card_data, template_str=TEMPLATE, name=name, kind=kind, usage=usage,
        shape=table(shape_rows(model, architecture)), curve=curve, training=table(training_rows(contents, last)),
    ).save(directory / "README.md")  # fmt: skip


def table(rows: dict[str, str]) -> str:
    return "| | |\n| --- | --- |\n" + "".join(f"| {name} | {value} |\n" for name, value in rows.items())


def shape_rows(model: Acceleron, architecture: str) -> dict[str, str]:
    config = model.config
    total, active = model.num_parameters()
    rows = {"architecture": architecture.removesuffix("ForCausalLM")}
    rows["parameters"] = f"{total:,}" if config.dense else f"{total:,}, {active:,} active per token"
    if config.dense:
        rows["feed-forward width"] = f"{config.d_ff_dense:,}"
    else:
        rows["experts"] = f"{config.num_experts} routed of width {config.d_ff}, {config.top_k} per token"
        rows["experts"] += f", and a shared one of width {config.d_ff_shared}" if config.d_ff_shared else ""
    rows["layers"], rows["width"] = f"{config.num_layers}", f"{config.d_model:,}"
    rows["attention heads"] = f"{config.num_heads} for queries, {config.num_kv_heads} for keys and values"
    return rows | {"context": f"{config.max_seq_len:,} tokens", "vocabulary": f"{config.vocab_size:,}"}


def training_rows(contents: dict, last: dict[str, float]) -> dict[str, str]:
    """`last` has the last finite value of each metric."""
    options = contents["options"]
    rows = {"steps": f"{contents['step']:,}", "tokens": f"{contents['tokens']:,}"}
    # A checkpoint is untrusted: its options can lack a field or have another type.
    batch = [options.get(name) for name in ("batch_size", "grad_accum", "seq_len")]
    if all(type(value) is int for value in batch):
        rows["tokens per step"] = f"{math.prod(batch):,}"
    if type(options.get("lr")) is float:
        rows["peak learning rate"] = f"{options['lr']:g}"
    names = {"loss": "training loss", "val_loss": "validation loss", "val_bits_per_byte": "validation bits per byte"}
    units = {"loss": " nats per token", "val_loss": " nats per token", "val_bits_per_byte": ""}
    return rows | {names[name]: f"{last[name]:.4f}{units[name]}" for name in names if name in last}
