"""Tile configurations: the tuned table, the rule for sizes not in it, and when TMA is used."""

import json

import pytest
import torch
from compare import DTYPES

from acceleron.config import PRESETS
from acceleron.kernels import configs
from acceleron.kernels.configs import Config
from acceleron.kernels.launch import Device

H100 = Device("NVIDIA H100 80GB HBM3", "sm_90", 132)
SIZES = (4, 512, 704, 1)
TILE = Config(64, 64, 64, 4, 2)
ENTRY = dict(arch="sm_90", device="any", op="rows", dtype="bfloat16", sizes=list(SIZES), **TILE._asdict())


@pytest.fixture
def write_table(tmp_path, monkeypatch):
    def clear():
        configs.table.cache_clear()
        configs.find_config.cache_clear()

    def write(*lines):
        monkeypatch.setenv("ACCELERON_TUNED", str(tmp_path / "tuned.jsonl"))
        (tmp_path / "tuned.jsonl").write_text("".join(f"{line}\n" for line in lines))
        clear()

    yield write
    clear()


def find(device=H100, dtype=torch.bfloat16, sizes=SIZES, tma=True):
    return configs.find_config("rows", device, dtype, sizes, tma)


def test_lookup_prefers_the_device_then_the_architecture_then_the_rule(write_table):
    named = ENTRY | dict(device=H100.name, block_m=16)
    write_table(*map(json.dumps, (ENTRY | dict(block_m=32), named, ENTRY | dict(arch="sm_80", op="up"))))
    assert find() == TILE._replace(block_m=16)
    assert find(H100._replace(name="NVIDIA H200")) == TILE._replace(block_m=32)
    ampere = Device("NVIDIA A100", "sm_80", 108)
    for other in (dict(device=ampere), dict(dtype=torch.float16), dict(sizes=(4, 512, 704, 0)), dict(tma=False)):
        arguments = dict(device=H100, dtype=torch.bfloat16, sizes=SIZES, tma=True) | other
        assert find(**arguments) == configs.rule("rows", **arguments)


def test_empty_table_falls_back_to_the_rule(write_table):
    write_table()
    assert find() == configs.rule("rows", H100, torch.bfloat16, SIZES, True)


BROKEN = {
    "broken": "{",
    "list": "[]",
    "number": "3",
    "short": '{"arch": "sm_90"}',
    "blank": "",
    "sizes": json.dumps(ENTRY | dict(sizes=3)),
    "text": json.dumps(ENTRY | dict(block_m="128")),
    "not a power of two": json.dumps(ENTRY | dict(block_n=100)),
    "zero": json.dumps(ENTRY | dict(split=0)),
    "not a bool": json.dumps(ENTRY | dict(flatten=1)),
}


@pytest.mark.parametrize("line", BROKEN.values(), ids=BROKEN)
def test_error_names_the_invalid_table_line(line, write_table):
    write_table(json.dumps(ENTRY), line)
    with pytest.raises(ValueError, match=r"tuned\.jsonl, line 2: .*remove the line"):
        find()


def test_error_names_the_missing_table(write_table, monkeypatch):
    write_table()
    monkeypatch.setenv("ACCELERON_TUNED", "nowhere.jsonl")
    with pytest.raises(ValueError, match=r"ACCELERON_TUNED=nowhere\.jsonl: No such file"):
        find()


def test_error_names_the_unknown_op_in_no_tma(monkeypatch):
    monkeypatch.setenv("ACCELERON_NO_TMA", "rows,down")
    with pytest.raises(ValueError, match="ACCELERON_NO_TMA=rows,down: expected names among up, "):
        configs.tma_available("up", H100)


@pytest.mark.parametrize("op", configs.OPS)
def test_operands_without_tma_get_a_small_tile(op):
    """The large tile spills without TMA."""
    x = torch.zeros(8, 64, dtype=torch.float16)

    def choose(x, inner=64, arch="sm_90"):
        device = Device("", arch, 132)
        return configs.choose(op, device, (4, 512, 512, 1), inner, torch.zeros_like(x).contiguous(), x)

    config, tma = choose(x)
    assert tma
    assert config.block_m == 128
    odd_address = x.flatten()[1:449].view(7, 64)
    for config, tma in (choose(x, inner=80), choose(x[:, :60].contiguous()), choose(odd_address)):
        assert config.block_m == 64
        assert not tma
    assert not choose(x.float())[1]
    for arch in ("sm_80", "sm_86", "gfx942"):
        assert not choose(x, arch=arch)[1]


def assert_valid(config):
    for name in ("block_m", "block_n", "block_k", "warps"):
        value = getattr(config, name)
        assert value > 0, name
        assert value & (value - 1) == 0, name
    assert min(config.block_m, config.block_n, config.block_k) >= 16  # tl.dot's minimum
    assert min(config.stages, config.programs, config.split) >= 1
    assert type(config.flatten) is bool


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_90", "sm_100", "sm_120", "gfx942", "interpreter"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rule_gives_valid_tiles_for_every_architecture(arch, dtype):
    device = Device("", arch, 108)
    for E, D, F in [(p.num_experts, p.d_model, p.d_ff) for p in PRESETS.values()] + [(2, 33, 17), (256, 8, 64)]:
        sizes = {"up": [(E, D, F)], "rows": [(E, F, D, 1), (E, 2 * F, D, 0)], "hidden_grad": [(E, D, F)]}
        sizes["weight_grad"] = [(E, 2 * F, D), (E, D, F)]
        assert set(sizes) == set(configs.OPS)
        for op in configs.OPS:
            for size in sizes[op]:
                for tma in (True, False):
                    assert_valid(configs.rule(op, device, dtype, size, tma))
