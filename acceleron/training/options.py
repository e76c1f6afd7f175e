"""The flags of train.py."""

from dataclasses import dataclass, field, fields

from ..config import PRESETS, SHAPE_FIELDS
from ..distributed import is_first_of_node
from ..errors import InputError
from ..flags import Parser, nonempty

MAX_BATCH_SIZE = 1 << 20


def option(default, help: str, choices: tuple[str, ...] | None = None, minimum: float | None = None):
    return field(default=default, metadata={"help": help, "choices": choices, "minimum": minimum})


@dataclass(frozen=True)
class TrainOptions:
    """The settings of a run: one field per flag. Raises InputError for a value out of range."""

    data_dir: str = option("data", "directory with shard_*.npy and, optionally, tokenizer.json")
    model_size: str = option("tiny", "model size", choices=tuple(PRESETS))
    config: str | None = option(None, "model.json of a run, or config.json of an export, instead of --model_size")
    init_from: str | None = option(
        None, "model directory, Hub model or checkpoint to start from, with a new optimizer, instead of --model_size"
    )
    num_experts: int | None = option(
        None, "routed experts per layer (default: that of the size or --config)", minimum=2
    )
    top_k: int | None = option(None, "routed experts per token (default: that of the size or --config)", minimum=1)
    d_ff: int | None = option(None, "width of a routed expert (default: that of the size or --config)", minimum=1)
    d_ff_shared: int | None = option(
        None, "width of the shared expert; 0: none (default: that of the size or --config)", minimum=0
    )
    num_dense_layers: int | None = option(
        None, "dense layers before the MoE layers (default: that of the size or --config)", minimum=0
    )
    dense: bool = option(False, "train the dense baseline instead of the MoE")
    batch_size: int = option(8, "sequences per micro-batch and rank", minimum=1)
    grad_accum: int = option(1, "micro-batches per optimizer step", minimum=1)
    seq_len: int = option(2048, "tokens per sequence; must divide the shards' row length", minimum=2)
    lr: float = option(6e-4, "peak learning rate", minimum=0)
    min_lr: float | None = option(None, "final learning rate (default: lr / 10)", minimum=0)
    schedule: str = option("cosine", "learning rate schedule; wsd is warmup-stable-decay", choices=("cosine", "wsd"))
    warmup_steps: int | None = option(None, "linear warmup steps (default: max_steps / 10, at most 1000)", minimum=0)
    max_steps: int = option(100_000, "optimizer steps", minimum=1)
    weight_decay: float = option(0.1, "AdamW weight decay for matrices; norms have none", minimum=0)
    grad_clip: float = option(1.0, "maximum gradient norm; 0 disables clipping", minimum=0)
    log_interval: int = option(10, "steps between log lines", minimum=1)
    eval_interval: int = option(1000, "steps between validation loss evaluations", minimum=1)
    save_interval: int = option(5000, "steps between checkpoints", minimum=1)
    keep_last: int = option(0, "checkpoints to keep; at least one is followed by a good step; 0 keeps all", minimum=0)
    save_dir: str = option("checkpoints", "directory for checkpoints, metrics.jsonl and TensorBoard files")
    resume: str | None = option(None, "checkpoint to continue from; auto: the newest valid one in save_dir, if any")
    num_workers: int = option(2, "data reader threads", minimum=1)
    bad_data: str = option("fail", "on an unreadable row: fail, or skip it", ("fail", "skip"))
    max_bad_steps: int = option(
        10,
        "stop after this many skipped steps in a row; also the number of steps between checks, which sync the GPU",
        minimum=1,
    )
    skip_spikes: bool = option(False, "skip the update if the loss is 6 sigma above its running mean")
    seed: int = option(42, "random seed for the initial weights and the data order", minimum=0)
    tokenizer: str | None = option(
        None, "tokenizer.json (default: the one in data_dir, or else pile_tokenizer.json next to train.py)"
    )
    vocab_size: int | None = option(None, "embedding rows (default: the size's; nano: the tokenizer's)", minimum=1)
    device: str = option("auto", "auto, cpu, cuda or cuda:1; auto is cuda if available")
    data_parallel: str = option(
        "auto",
        "with several ranks: how weights and optimizer state are divided; auto chooses by model size and nodes",
        ("auto", "ddp", "zero2", "fsdp", "hsdp"),
    )
    gather_dtype: str = option(
        "fp32",
        "with several ranks: dtype of gathered weights; bf16 halves the traffic, but rounds them; ddp ignores it",
        ("fp32", "bf16"),
    )
    timeout: int = option(600, "with several ranks: seconds to wait for a rank before the job fails", minimum=1)
    dtype: str = option(
        "auto", "dtype of GEMMs and activations; auto is bf16 where supported natively", ("auto", "bf16", "fp32")
    )
    kernels: str = option(
        "auto",
        "kernel backend; auto is Triton on an NVIDIA GPU if it passes a self-check, else the PyTorch reference",
        ("auto", "triton", "reference"),
    )
    deterministic: bool = option(False, "bitwise reproducible on a GPU (CPU runs always are)")
    no_compile: bool = option(False, "disable torch.compile")
    debug_force_load_balance: bool = option(False, "route tokens round-robin, for benchmarks and debugging")
    no_gradient_checkpointing: bool = option(False, "keep all activations for the backward pass")
    memory_test: bool = option(False, "run two steps, print the peak memory and exit")

    def __post_init__(self):
        for name, meta in ((f.name, f.metadata) for f in fields(self)):
            value = getattr(self, name)
            if meta.get("choices") and value not in meta["choices"]:
                raise InputError(f"--{name} {value}: choose one of {', '.join(meta['choices'])}")
            # This form also rejects NaN.
            if meta.get("minimum") is not None and value is not None and not meta["minimum"] <= value < float("inf"):
                raise InputError(f"--{name} {value}: must be finite and at least {meta['minimum']}")
        given = ["config"] if self.config else [*self.config_overrides.keys() - {"debug_force_load_balance"}]
        if self.init_from and given:
            raise InputError(f"--{min(given)}: not allowed with --init_from, which determines the model: omit it")
        if self.seed >= 2**64:
            raise InputError(f"--seed {self.seed}: must be below 2**64")
        if self.batch_size > MAX_BATCH_SIZE:
            raise InputError(f"--batch_size {self.batch_size}: must be at most {MAX_BATCH_SIZE}")
        if self.min_lr is not None and self.min_lr > self.lr:
            raise InputError(f"--min_lr {self.min_lr} is above --lr {self.lr}")
        if self.warmup_steps is not None and self.warmup_steps > self.max_steps:
            raise InputError(f"--warmup_steps {self.warmup_steps} is above --max_steps {self.max_steps}")

    @property
    def config_overrides(self) -> dict:
        """The fields of the model's config that flags set."""
        names = ("vocab_size", "dense", "debug_force_load_balance", *SHAPE_FIELDS)
        return {name: value for name in names if (value := getattr(self, name)) is not None and value is not False}

    @property
    def final_lr(self) -> float:
        return self.lr / 10 if self.min_lr is None else self.min_lr

    @property
    def num_warmup_steps(self) -> int:
        return min(1000, self.max_steps // 10) if self.warmup_steps is None else self.warmup_steps


def parse_options(arguments: list[str] | None = None) -> TrainOptions:
    """Parse a command line into TrainOptions. Raises InputError for an unknown flag or a bad value."""
    parser = Parser(prog="train.py", description="Pretrain a Mixture-of-Experts language model.")
    model = parser.add_mutually_exclusive_group()
    for f in fields(TrainOptions):
        flag, about = f"--{f.name}", f.metadata["help"]
        if f.type is bool:
            parser.add_argument(flag, action="store_true", help=about)
        else:
            kind = next((t for t in (int, float) if t is f.type or f.type == t | None), nonempty)
            shown = about if f.default is None or "default" in about else f"{about} (default: {f.default})"
            group = model if f.name in ("model_size", "config", "init_from") else parser
            group.add_argument(flag, type=kind, default=f.default, choices=f.metadata["choices"], help=shown)
    try:
        return TrainOptions(**vars(parser.parse_args(arguments)))
    except InputError as error:
        if is_first_of_node():
            raise
        raise SystemExit(error.status) from error
