"""Model configuration and the named sizes."""

import json
import reprlib
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

from .errors import InputError, path_error
from .kernels.contract import MAX_EXPERTS, MAX_TOP_K

NAMED_VOCAB_SIZE = 50304
MAX_VOCAB_SIZE = 1 << 24
# Far above any realistic model. A file with larger values is damaged or hostile. Reject it before allocating memory.
LIMITS = {
    "vocab_size": MAX_VOCAB_SIZE,
    "d_model": 1 << 16,
    "num_layers": 1 << 10,
    "num_heads": 1 << 10,
    "num_kv_heads": 1 << 10,
    "d_ff": 1 << 18,
    "d_ff_shared": 1 << 18,
    "num_experts": MAX_EXPERTS,
    "top_k": MAX_TOP_K,
    "max_seq_len": 1 << 20,
    "rope_theta": 1e12,
    "norm_eps": 1.0,
    "z_loss_coef": 1e6,
    "balance_loss_coef": 1e6,
}
MAX_ROPE_ELEMENTS = 1 << 27  # 512 MB per table: a million positions of width 128
SHAPE_FIELDS = ("num_experts", "top_k", "d_ff", "d_ff_shared", "num_dense_layers")  # also flags of train.py


def round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


def read_json(path: Path) -> dict:
    """Read a file with a JSON object. Raises InputError."""
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not a JSON file") from error
    if type(values) is not dict:
        raise InputError(f"{path}: not a JSON object")
    return values


def short_repr(value) -> str:
    """The repr, truncated to 40 characters."""
    try:
        return reprlib.repr(value)[:40]  # the full repr of nested shared lists can grow exponentially
    except ValueError:  # Python does not format an int with thousands of digits
        return f"a {type(value).__name__}"


@dataclass(frozen=True)
class ModelConfig:
    """The architecture and the router loss coefficients. Raises InputError for invalid values.

    Each token uses `top_k` of the `num_experts` routed experts, of width `d_ff`, and a shared expert of width
    `d_ff_shared` (0: no shared expert). The first `num_dense_layers` layers are dense: they replace the MoE with one
    SwiGLU of width top_k * d_ff + d_ff_shared. It has the MoE's active FLOPs, except for those of the router. In the
    dense baseline, `dense`, all layers are dense. `debug_force_load_balance` assigns tokens to experts round-robin in
    training mode.
    """

    vocab_size: int = NAMED_VOCAB_SIZE
    d_model: int = 512
    num_layers: int = 8
    num_heads: int = 16
    num_kv_heads: int = 4
    num_experts: int = 4
    top_k: int = 2
    d_ff: int = 1408
    d_ff_shared: int = 704
    num_dense_layers: int = 0
    max_seq_len: int = 2048
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    z_loss_coef: float = 1e-3
    balance_loss_coef: float = 1e-2
    dense: bool = False
    debug_force_load_balance: bool = False

    def __post_init__(self):
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type is bool:
                if type(value) is not bool:
                    raise InputError(f"config: {field.name} must be true or false, not {short_repr(value)}")
                continue
            minimum = 0 if field.name in ("d_ff_shared", "num_dense_layers") else 1
            if field.type is int and (type(value) is not int or value < minimum):
                raise InputError(
                    f"config: {field.name} must be an integer of at least {minimum}, not {short_repr(value)}"
                )
            if field.type is float and (type(value) not in (int, float) or not 0 <= value < float("inf")):
                raise InputError(f"config: {field.name} must be finite and at least 0, not {short_repr(value)}")
            if value > LIMITS.get(field.name, value):
                raise InputError(f"config: {field.name} {short_repr(value)} is above {LIMITS[field.name]}")
        if self.rope_theta == 0:
            raise InputError("config: rope_theta must be above 0")
        if self.d_model % (2 * self.num_heads):
            raise InputError(f"config: d_model {self.d_model} must be an even multiple of num_heads {self.num_heads}")
        if self.max_seq_len * self.head_dim > MAX_ROPE_ELEMENTS:
            length = f"max_seq_len {self.max_seq_len} times the head width {self.head_dim}"
            raise InputError(f"config: {length} is above {MAX_ROPE_ELEMENTS}")
        if self.num_heads % self.num_kv_heads:
            raise InputError(
                f"config: num_heads {self.num_heads} must be a multiple of num_kv_heads {self.num_kv_heads}"
            )
        if self.num_experts < 2:
            raise InputError(f"config: num_experts {self.num_experts} must be at least 2; --dense has no experts")
        if self.top_k > self.num_experts:
            raise InputError(f"config: top_k {self.top_k} must be at most num_experts {self.num_experts}")
        if self.num_dense_layers >= self.num_layers:
            layers = f"num_dense_layers {self.num_dense_layers} must be below num_layers {self.num_layers}"
            raise InputError(f"config: {layers}; --dense makes all layers dense")

    @property
    def head_dim(self) -> int:
        return self.d_model // self.num_heads

    @property
    def d_ff_dense(self) -> int:
        """Width of the SwiGLU in dense layers."""
        return self.top_k * self.d_ff + self.d_ff_shared

    @classmethod
    def preset(cls, size: str, dense: bool = False, **overrides) -> "ModelConfig":
        """Return a named size or its dense baseline. "nano" has no fixed vocabulary: pass `vocab_size`."""
        if size not in PRESETS:
            raise InputError(f"unknown model size {size!r}: choose one of {', '.join(PRESETS)}")
        return replace(PRESETS[size], dense=dense, **overrides)

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> "ModelConfig":
        """The inverse of `to_dict`. Raises InputError for unknown fields."""
        unknown = sorted(map(short_repr, set(values) - {field.name for field in fields(cls)}))
        if unknown:
            raise InputError(f"config: unknown fields {', '.join(unknown)[:200]}: written by a different version?")
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> "ModelConfig":
        """Read a run's model.json, or the config.json of a Hugging Face model. Raises InputError.

        Fields that model.json lacks have their defaults.
        """
        if not Path(path).is_file():
            raise path_error("--config", path, "file")
        try:
            values = read_json(Path(path))
            if "model_type" not in values:
                return cls.from_dict(values)
            from .hf_config import MULTIPLIERS, from_hf_config  # it imports this module

            config, factors = from_hf_config(values)
            if factors:
                given = ", ".join(f"{name} {values[name]}" for name in MULTIPLIERS if name in values)
                raise InputError(f"a new model has no {given}: use --init_from with the model's directory")
            return config
        except InputError as error:
            reason = str(error).removeprefix(f"{path}: ").removeprefix("config: ")[:200]
            raise InputError(
                f"--config {path}: {reason}; pass a run's model.json or an export's config.json"
            ) from error


PRESETS = {
    "nano": ModelConfig(
        vocab_size=2048,
        d_model=128,
        num_layers=4,
        num_heads=4,
        num_kv_heads=1,
        num_experts=8,
        d_ff=128,
        d_ff_shared=128,
    ),
    "tiny": ModelConfig(),
    "small": ModelConfig(d_model=768, num_layers=16, num_experts=8, d_ff=896, d_ff_shared=640),
    "medium": ModelConfig(d_model=1024, num_layers=20, num_experts=8, d_ff=1664, d_ff_shared=1536),
    "large": ModelConfig(d_model=1536, num_layers=24, num_experts=8, d_ff=1920, d_ff_shared=512),
}
