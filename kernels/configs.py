"""Tile sizes of the grouped GEMMs: what tuned.jsonl holds for the device, dtype and sizes, else a rule.

A line of tuned.jsonl: arch, device (its name, or "any" of that architecture), op, dtype, sizes (the op's widths and
experts, below), the fields of `Config`, and the median time (null: chosen by compilation and tile counts, never timed).
`python -m bench tune` writes it. Nothing is ever searched while training.

| op | sizes |
| --- | --- |
| up, hidden_grad | E, D, F |
| rows | E, input width, output width, 1 if the weight is [E, output, input] else 0 |
| weight_grad | E, output rows, output columns, and which operand is gathered: 0 none, 1 the left one, 2 the right one |
"""

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

from .launch import Device

TABLE = Path(__file__).parent / "tuned.jsonl"
OPS = ("up", "hidden_grad", "rows", "weight_grad")
KEY = ("arch", "device", "op", "dtype", "sizes")


class Config(NamedTuple):
    """A tile of block_m x block_n outputs and block_k of the inner width; `up` has block_n gate and as many up columns.

    programs: persistent programs a processor. flatten: one pipelined loop over tiles and inner width, so that a tile's
    first loads overlap the last one's stores. split: shares of each expert's rows that weight_grad sums apart.
    """

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    programs: int = 1
    flatten: bool = False
    split: int = 1

    def blocks(self) -> dict:
        """The keyword arguments that every GEMM kernel takes."""
        return dict(
            BLOCK_M=self.block_m,
            BLOCK_N=self.block_n,
            BLOCK_K=self.block_k,
            FLATTEN=self.flatten,
            num_warps=self.warps,
            num_stages=self.stages,
        )


def read_table() -> dict[tuple, dict]:
    """The lines of tuned.jsonl by their KEY. Raises ValueError that names one that is not a configuration."""
    entries = {}
    for number, line in enumerate(TABLE.read_text().splitlines() if TABLE.exists() else (), 1):
        try:
            entry = json.loads(line)
            key = (*(entry[name] for name in KEY[:-1]), tuple(entry["sizes"]))
            for name in Config._fields:
                value = entry[name]
                if not isinstance(value, int) or value < (name != "flatten"):
                    raise ValueError(f"{name} is {value!r}")
                if name in ("block_m", "block_n", "block_k", "warps") and value & (value - 1):
                    raise ValueError(f"{name} is {value}, which is not a power of two")
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{TABLE}, line {number}: {error!r}; remove the line, or tune again without it") from error
        entries[key] = entry
    return entries


@cache
def table() -> dict[tuple, Config]:
    """KEY -> Config, from tuned.jsonl. Raises ValueError that names a broken line."""
    return {key: Config(*(entry[name] for name in Config._fields)) for key, entry in read_table().items()}


@cache
def find_config(op: str, device: Device, dtype: torch.dtype, sizes: tuple[int, ...]) -> Config:
    """The configuration of an op: the table's for this device's name, then for any of its kind, then `rule`'s."""
    name = str(dtype).removeprefix("torch.")
    for device_name in (device.name, "any"):
        key = (device.arch, device_name, op, name, sizes)
        if key in table():
            return table()[key]
    return rule(op, device, dtype, sizes)


def rule(op: str, device: Device, dtype: torch.dtype, sizes: tuple[int, ...]) -> Config:
    """A sane configuration for sizes that nobody has tuned: one that compiles without spills and fits."""
    if device.arch == "interpreter":
        return Config(32, 32, 32, 4, 1, split=2)  # small, so that small tests have several tiles, and a split
    if dtype == torch.float32:
        return Config(64, 32 if op == "up" else 64, 32, 4, 2)  # multiplied as fp32, without tensor cores
    if device.arch.startswith("gfx"):
        return Config(128, 64 if op == "up" else 128, 32, 8, 2)
    if int(device.arch[3:]) not in (90, 100, 103):  # Ampere, Ada and small Blackwells: 99 KiB of shared memory or more
        return Config(128, 64 if op == "up" else 128, 32, 8, 3)
    if any(size % 64 for size in sizes[1:3]):  # by pointers, whose masks take the registers of a larger tile
        return Config(64, 32 if op == "up" else 64, 32, 4, 3)
    if op == "up" and dtype == torch.float16:
        return Config(128, 64, 64, 8, 4, flatten=device.arch == "sm_90")  # wider, ptxas serialises it without h
    if op == "up":
        return Config(128, 128, 64, 8, 3, flatten=device.arch == "sm_90")
    if op == "hidden_grad":
        # Wider spills; 64 x 128 lets two programs share a processor, but loads half as much again for each FLOP.
        return Config(128, 128, 64, 8, 4)
    wide = sizes[2] > 128
    if op == "rows":
        return Config(128, 256 if wide else 128, 64, 8, 3, flatten=device.arch == "sm_90")
    # A gathered operand is loaded two stages after its indices are: five stages give three buffers.
    config = Config(128, 256 if wide else 128, 64, 8, 5 if sizes[3] else 3)
    return config._replace(split=_even_split(config, device, *sizes[:3]))


def _even_split(config: Config, device: Device, E: int, M: int, N: int) -> int:
    """The number of shares that takes the least time: they fill the last wave of tiles, but cost their sum.

    Shares are written and read in fp32: 8 E M N bytes each, where the GEMM has 4 T M N FLOPs. At 65,536 tokens, 500
    TFLOP/s and 2.7 TB/s that is a share of 0.57 % E of its time.
    """
    tiles = E * -(-M // config.block_m) * -(-N // config.block_n)

    def seconds(split: int) -> float:
        waves = tiles * split / (device.processors * config.programs)
        return -(-waves // 1) / waves + 0.0057 * E * split * (split > 1)

    return min(range(1, 5), key=seconds)
