"""Every flag of train.py: one field each, with its default and help."""

from dataclasses import dataclass, field, fields

from ..config import PRESETS
from ..errors import InputError
from ..flags import Parser, nonempty

MAX_BATCH_SIZE = 1 << 20


def option(default, help: str, choices: tuple[str, ...] | None = None, least: float | None = None):
    return field(default=default, metadata={"help": help, "choices": choices, "least": least})


@dataclass(frozen=True)
class TrainOptions:
    """The settings of a run. Raises InputError for a value out of range."""

    data_dir: str = option("data", "directory of shard_*.npy, and of tokenizer.json if there is one")
    model_size: str = option("tiny", "named size", choices=tuple(PRESETS))
    dense: bool = option(False, "train the size's dense baseline instead of the MoE")
    batch_size: int = option(8, "sequences a micro-batch", least=1)
    grad_accum: int = option(1, "micro-batches an optimizer step", least=1)
    seq_len: int = option(2048, "tokens a sequence; must divide the shards' row length", least=2)
    lr: float = option(6e-4, "peak learning rate", least=0)
    min_lr: float | None = option(None, "final learning rate (default: a tenth of lr)", least=0)
    schedule: str = option("cosine", "cosine, or wsd: warmup-stable-decay", choices=("cosine", "wsd"))
    warmup_steps: int | None = option(None, "linear warm-up (default: a tenth of max_steps, at most 1000)", least=0)
    max_steps: int = option(100_000, "optimizer steps", least=1)
    weight_decay: float = option(0.1, "AdamW's decay of the matrices; norms have none", least=0)
    grad_clip: float = option(1.0, "largest gradient norm; 0 for no clipping", least=0)
    log_interval: int = option(10, "steps between log lines", least=1)
    eval_interval: int = option(1000, "steps between measurements of the validation loss", least=1)
    save_interval: int = option(5000, "steps between checkpoints", least=1)
    keep_last: int = option(0, "newest checkpoints to keep, one of them followed by a good step; 0 keeps all", least=0)
    save_dir: str = option("checkpoints", "directory for checkpoints, metrics.jsonl and TensorBoard files")
    resume: str | None = option(
        None, "checkpoint to continue from, or auto: the newest whole one in save_dir, if there is any"
    )
    num_workers: int = option(2, "threads that read ahead", least=1)
    bad_data: str = option("fail", "what rows do that can't be read: end the run, or be skipped", ("fail", "skip"))
    max_bad_steps: int = option(
        10, "skipped steps in a row that end the run; every so many steps it waits for the device", least=1
    )
    skip_spikes: bool = option(False, "skip the update where the loss is 6 sigma above its running mean")
    seed: int = option(42, "of the initial weights and of the data's order", least=0)
    tokenizer: str | None = option(
        None, "tokenizer.json (default: the data directory's, else pile_tokenizer.json here)"
    )
    vocab_size: int | None = option(
        None, "rows of the embedding (default: the size's; for nano the tokenizer's)", least=1
    )
    device: str = option("auto", "auto, cpu, cuda, cuda:1; auto is cuda where there is one")
    dtype: str = option(
        "auto", "of GEMMs and activations; auto is bf16 where the device has it", choices=("auto", "bf16", "fp32")
    )
    kernels: str = option(
        "auto",
        "kernel backend; auto is Triton on an NVIDIA GPU if it passes a check, else the reference",
        choices=("auto", "triton", "reference"),
    )
    deterministic: bool = option(False, "the same bits from the same start on a GPU; a CPU's always are")
    no_compile: bool = option(False, "no torch.compile")
    debug_force_load_balance: bool = option(False, "route tokens to the experts in turn, for benchmarks and debugging")
    no_gradient_checkpointing: bool = option(False, "keep all activations for the backward pass")
    memory_test: bool = option(
        False, "run a step as it is once the optimizer has state, print the peak memory, and exit"
    )

    def __post_init__(self):
        for name, meta in ((f.name, f.metadata) for f in fields(self)):
            value = getattr(self, name)
            if meta.get("choices") and value not in meta["choices"]:
                raise InputError(f"--{name} {value}: choose one of {', '.join(meta['choices'])}")
            # Written so that NaN fails too.
            if meta.get("least") is not None and value is not None and not meta["least"] <= value < float("inf"):
                raise InputError(f"--{name} {value}: must be at least {meta['least']}, and finite")
        if self.seed >= 2**64:
            raise InputError(f"--seed {self.seed}: must be below 2**64")
        if self.batch_size > MAX_BATCH_SIZE:
            raise InputError(f"--batch_size {self.batch_size}: must be at most {MAX_BATCH_SIZE}")
        if self.min_lr is not None and self.min_lr > self.lr:
            raise InputError(f"--min_lr {self.min_lr} is above --lr {self.lr}")
        if self.warmup_steps is not None and self.warmup_steps > self.max_steps:
            raise InputError(f"--warmup_steps {self.warmup_steps} is above --max_steps {self.max_steps}")

    @property
    def final_lr(self) -> float:
        return self.lr / 10 if self.min_lr is None else self.min_lr

    @property
    def num_warmup_steps(self) -> int:
        return min(1000, self.max_steps // 10) if self.warmup_steps is None else self.warmup_steps

    @property
    def tokens_per_step(self) -> int:
        return self.batch_size * self.grad_accum * self.seq_len


def parse_options(arguments: list[str] | None = None) -> TrainOptions:
    """TrainOptions from a command line. Raises InputError for an unknown flag or a bad value."""
    parser = Parser(prog="train.py", description="Pretrain a Mixture-of-Experts language model.")
    for f in fields(TrainOptions):
        flag, about = f"--{f.name}", f.metadata["help"]
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=about)
        else:
            kind = next((t for t in (int, float) if t is f.type or f.type == t | None), nonempty)
            shown = about if f.default is None or "default" in about else f"{about} (default: {f.default})"
            parser.add_argument(flag, type=kind, default=f.default, choices=f.metadata["choices"], help=shown)
    return TrainOptions(**vars(parser.parse_args(arguments)))
