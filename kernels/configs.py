"""Tile sizes of the grouped GEMMs, and whether they load their operands through TMA.

If the tuned table has an entry for the device, dtype and sizes, the configuration comes from it; otherwise from `rule`.
Nothing is tuned during training. Environment variables:
  ACCELERON_TUNED   path of the tuned table (default: tuned.jsonl next to this module, if it exists), written by
                    `python -m bench tune`. A line has arch, device (a name, or "any"), op, dtype, sizes (see below),
                    the fields of `Config` and the median time. It is only used for launches with TMA.
  ACCELERON_NO_TMA  comma-separated list of ops that load through pointers instead of TMA: up, rows, hidden_grad,
                    weight_grad or all

| op | sizes |
| --- | --- |
| up | E, D, F |
| rows | E, input width, output width, 1 if the weight is [E, output, input] else 0 |
| hidden_grad | E, D, F |
| weight_grad | E, output rows, output columns |
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from .launch import Device

OPS = ("up", "rows", "hidden_grad", "weight_grad")
KEY = ("arch", "device", "op", "dtype", "sizes")


class Config(NamedTuple):
    """Tile of block_m x block_n outputs and block_k inner columns. `up` has block_n gate and block_n up columns.

    programs: persistent programs per SM.
    flatten: one pipelined loop over tiles and inner blocks. A tile's first loads overlap the previous tile's stores.
    split: for weight_grad, which ignores `programs` and `flatten`. The last tiles, too few for all SMs, are divided
    into this many shares of rows, and the shares are added.
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
        """Return the keyword arguments shared by all GEMM kernels."""
        blocks = dict(BLOCK_M=self.block_m, BLOCK_N=self.block_n, BLOCK_K=self.block_k)
        return blocks | dict(FLATTEN=self.flatten, num_warps=self.warps, num_stages=self.stages)


def read_table() -> dict[tuple, Config]:
    """Read the table that maps KEY to Config from the file in ACCELERON_TUNED.

    Raises ValueError if the file is missing or a line is not a configuration.
    """
    named = os.environ.get("ACCELERON_TUNED")
    path = Path(named or Path(__file__).parent / "tuned.jsonl")
    if not (named or path.exists()):
        return {}
    try:
        lines = path.read_text().splitlines()
    except OSError as error:
        raise ValueError(f"ACCELERON_TUNED={path}: {error.strerror}; set a different file or unset it") from error
    entries = {}
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            for name, kind in Config.__annotations__.items():
                value = entry[name]
                if type(value) is not kind or (kind is int and value < 1):
                    raise ValueError(f"{name} is {value!r}")
                if name in ("block_m", "block_n", "block_k", "warps") and value & (value - 1):
                    raise ValueError(f"{name} is {value}, not a power of two")
            key = (*(entry[name] for name in KEY[:-1]), tuple(entry["sizes"]))
            entries[key] = Config(*(entry[name] for name in Config._fields))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}, line {number}: {error!r}; remove the line or rerun the tuner") from error
    return entries


table = cache(read_table)


@cache
def find_config(op: str, device: Device, dtype: torch.dtype, sizes: tuple[int, ...], tma: bool) -> Config:
    """With TMA, look up the device name, then \"any\" device of its architecture, in the table. Else use the rule."""
    if tma:
        for device_name in (device.name, "any"):
            key = (device.arch, device_name, op, str(dtype).removeprefix("torch."), sizes)
            if key in table():
                return table()[key]
    return rule(op, device, dtype, sizes, tma)


def without_tma() -> set[str]:
    """Return the ops in ACCELERON_NO_TMA. Raises ValueError for an unknown name."""
    names = os.environ.get("ACCELERON_NO_TMA", "")
    ops = {name.strip() for name in names.split(",") if name.strip()}
    if ops - {*OPS, "all"}:
        raise ValueError(f"ACCELERON_NO_TMA={names}: expected names among {', '.join(OPS)} and all")
    return {*OPS} if "all" in ops else ops


def tma_available(op: str, device: Device, *operands: Tensor) -> bool:
    """Return True if TMA can load these operands and ACCELERON_NO_TMA does not exclude the op.

    TMA needs Hopper or later, a 16-bit dtype, 16-byte-aligned pointers, and rows that are a multiple of 16 bytes long.
    """
    if op in without_tma():
        return False
    if device.arch != "interpreter" and (device.arch.startswith("gfx") or int(device.arch[3:]) < 90):
        return False
    return all(x.element_size() == 2 and x.data_ptr() % 16 == 0 and x.shape[-1] % 8 == 0 for x in operands)


def choose(op: str, device: Device, sizes: tuple[int, ...], inner: int, *operands: Tensor) -> tuple[Config, bool]:
    """Return the configuration of a launch, and whether it uses TMA.

    operands: the tensors that the kernel loads in tiles, all of one dtype. inner: the inner width, which must be a
    multiple of block_k for TMA; 0 if the inner axis is the rows, because TMA handles their end.
    """
    dtype = operands[0].dtype
    if tma_available(op, device, *operands):
        config = find_config(op, device, dtype, sizes, True)
        if inner % config.block_k == 0:
            return config, True
    return find_config(op, device, dtype, sizes, False), False


def rule(op: str, device: Device, dtype: torch.dtype, sizes: tuple[int, ...], tma: bool) -> Config:
    """Return a configuration for sizes not in the table. It compiles without spills and fits in shared memory."""
    if device.arch == "interpreter":
        return Config(32, 32, 32, 4, 1, split=2)  # small: small tests have several tiles and shares
    if dtype == torch.float32:
        # No tensor cores. Swapping 4 and 8 warps spills a few bytes.
        return Config(64, 32, 16, 4, 2) if op == "up" else Config(64, 64, 32, 4 if op == "weight_grad" else 8, 2)
    if device.arch.startswith("gfx"):
        return Config(128, 64 if op == "up" else 128, 32, 8, 2)
    if int(device.arch[3:]) not in (90, 100, 103):  # Ampere, Ada and small Blackwells: 99 KiB of shared memory or more
        return Config(128, 64 if op == "up" else 128, 32, 8, 3)
    # Addresses and masks use the registers a larger tile would need.
    if not tma or any(size % 64 for size in sizes[1:3]):
        return Config(64, 32 if op == "up" else 64, 32, 4, 3)
    if op == "hidden_grad":  # two programs per SM: eight warps, 128 registers per thread
        return Config(128, 128, 64, 8, 3, programs=2)
    if op == "up":
        block_n = 64 if device.arch != "sm_90" and dtype == torch.float16 else 128
        return Config(128, block_n, 64, 8, 4, flatten=device.arch == "sm_90")
    wide = sizes[2] > 128
    if op == "weight_grad":
        _, O, I = sizes[:3]
        tall = wide and -(-O // 256) * -(-I // 128) < -(-O // 128) * -(-I // 256)  # fewer tiles
        config = Config(256, 128, 64, 8, 4) if tall else Config(128, 256 if wide else 128, 64, 8, 3)
        return config._replace(split=_best_split(config, device, *sizes[:3]))
    if device.arch != "sm_90":
        return Config(128, 256 if wide else 128, 64, 8, 4)
    return Config(128, 256, 64, 8, 3, flatten=True) if wide else Config(128, 128, 64, 4, 3, programs=2, flatten=True)


def _best_split(config: Config, device: Device, E: int, O: int, I: int) -> int:
    """Return the fastest number of shares. More shares use more SMs, but it takes time to add them."""
    tail = E * -(-O // config.block_m) * -(-I // config.block_n) % device.processors

    def seconds(split: int) -> float:  # relative to a tile; writing and reading shares takes about 3% per share
        return -(-tail * split // device.processors) / split + 0.03 * split

    return min(range(1, 9), key=seconds)
