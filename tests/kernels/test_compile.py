"""Offline compilation for several GPU targets. `make test-all` covers more."""

import os
import re
import subprocess
import sys
from io import StringIO
from pathlib import Path

import pandas as pd
import pytest

from bench.compile import BAR, GEMMS, NOP, NVIDIA_TOOLS, TARGETS, opcodes, problems

ROOT = Path(__file__).parents[2]
# The most registers of kernels at K = 2, whose speed depends on it: two programs of _hidden_grad_kernel fit on an SM.
REGISTERS = {"_route_kernel": 104, "_route_backward_kernel": 107, "_hidden_grad_kernel": 128, "_rows_kernel": 184}
OTHERS = {
    *("_logits_kernel", "_input_grad_kernel", "_router_grad_kernel"),
    *("_route_kernel", "_route_sums_kernel", "_route_backward_kernel", "_count_kernel", "_place_kernel"),
    *("_scatter_kernel", "_combine_kernel", "_token_grad_kernel", "_add_shares_kernel"),
    *("_swiglu_kernel", "_swiglu_backward_kernel", "_rope_kernel"),
    *("_rms_norm_kernel", "_rms_norm_backward_kernel", "_cross_entropy_kernel"),
}


def bench(*arguments: str, without_tma: str = "") -> subprocess.CompletedProcess:
    # Use a separate process, because kernels decorated under the interpreter cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["ACCELERON_NO_TMA"] = without_tma
    command = [sys.executable, "-m", "bench", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


# One token is a special case, because Triton compiles an argument of 1 as a constant.
@pytest.mark.parametrize(
    ("arch", "size", "tokens", "without_tma"),
    [
        ("sm_90", "small", None, ""),
        pytest.param("sm_90", "tiny", "1", "rows,up", marks=pytest.mark.slow),
        pytest.param("sm_80", "tiny", "17", "", marks=pytest.mark.slow),
        pytest.param("sm_100", "tiny", "256", "", marks=pytest.mark.slow),
        pytest.param("sm_90", "odd", "17", "", marks=pytest.mark.slow),
        pytest.param("sm_90", "top-k", "65536", "", marks=pytest.mark.slow),
        pytest.param("gfx942", "tiny", "256", "", marks=pytest.mark.slow),
    ],
)
def test_every_kernel_compiles_and_fits(arch, size, tokens, without_tma):
    flags = ["--arch", arch, "--model_size", size] + (["--tokens", tokens] if tokens else [])
    process = bench("compile", "--check", *flags, without_tma=without_tma)
    assert process.returncode == 0, process.stdout + process.stderr
    table = process.stdout.partition("\n")[2].rpartition("no problems found")[0]
    rows = pd.read_csv(StringIO(table), sep=r"\s+").to_dict("records")
    # Not every size has tiles in shares.
    assert {row["kernel"] for row in rows} | {"_add_shares_kernel"} == {*GEMMS, *OTHERS}
    assert all(0 < row["registers"] <= 512 and row["shared_bytes"] <= TARGETS[arch].shared_bytes for row in rows)
    if arch == "sm_90":
        assert not any(row["spilled_bytes"] or row["serialized"] for row in rows)
        for row in (row for row in rows if row["kernel"] in GEMMS):
            assert row["wgmma"] > 0
            if size != "odd":
                disabled = row["kernel"].strip("_").removesuffix("_kernel") in without_tma
                assert (row["tma"] > 0) == (row["aligned"] and not disabled), row
    if arch == "sm_90" and not tokens:
        aligned = [row for row in rows if row["aligned"] and row["tokens"] > 256]
        assert all(row["registers"] <= REGISTERS.get(row["kernel"], 255) for row in aligned)
        variants = {(row["tokens"], row["aligned"]) for row in rows}
        assert variants == {(256, True), (64 * 2048, True), (64 * 2048, False)}


def test_opcode_counts_match_the_disassembler(tmp_path):
    source, cubin = tmp_path / "kernel.ptx", tmp_path / "kernel.cubin"
    source.write_text(".version 8.0\n.target sm_90\n.address_size 64\n.entry kernel() { bar.sync 0; bar.sync 0; ret; }")
    subprocess.run([NVIDIA_TOOLS / "ptxas", "--gpu-name=sm_90", "-o", cubin, source], check=True)
    code = subprocess.check_output([NVIDIA_TOOLS / "cuobjdump", "-sass", cubin], text=True)
    found = opcodes(cubin.read_bytes())
    assert (found == BAR).sum() == code.count(" BAR.") == 2
    assert (found != NOP).sum() == len(re.findall(r"^ +/\*[0-9a-f]{4}\*/ +(?! |NOP)", code, re.MULTILINE)) > 2


GOOD = dict(
    arch="sm_90", size="tiny", dtype="bf16", tokens=256, aligned=True, kernel="_up_kernel", spilled_bytes=0,
    shared_bytes=180248, wgmma=4, tma=3, serialized=False,
)  # fmt: skip


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (dict(spilled_bytes=8), "8 bytes spilled"),
        (dict(shared_bytes=232449), "232449 bytes of shared memory"),
        (dict(wgmma=0), "no wgmma"),
        (dict(tma=0), "no TMA"),
        (dict(serialized=True), "serialized"),
    ],
)
def test_bad_compilation_results_are_reported(change, problem):
    assert problems(GOOD) == []
    assert problems(GOOD | dict(tma=0, aligned=False)) == []
    (text,) = problems(GOOD | change)
    assert problem in text


def test_compile_rejects_the_interpreter():
    command = [sys.executable, "-m", "bench", "compile"]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr.strip().endswith("unset it")
