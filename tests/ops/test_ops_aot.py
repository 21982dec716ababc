"""Every kernel compiles for NVIDIA and AMD without a GPU, spills nothing and moves tensors in 16-byte pieces."""

import json
import os
import subprocess
import sys

import pytest

import op_cases as cases

pytest.importorskip("triton")
KERNELS = {
    "sums_kernel", "finish_kernel", "sum_kernel", "gradient_kernel", "step_kernel", "chord_kernel",
    "combine_kernel", "moments_kernel", "rescale_kernel", "adamw_kernel",
}  # fmt: skip


def compiled(tmp_path, *arguments):
    """Rows of ``python -m bench aot``; a process of its own, because this one may be interpreting."""
    out = tmp_path / "aot.jsonl"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    path = os.pathsep.join([str(cases.ROOT), str(cases.ROOT / "kernels"), environment.get("PYTHONPATH", "")])
    command = [sys.executable, "-m", "bench", "aot", "--out", str(out), *arguments]
    done = subprocess.run(
        command, cwd=cases.ROOT, env=environment | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return done, rows


def check(done, rows, targets, dtypes, specialisations):
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert {row["kernel"] for row in rows} == KERNELS
    assert {row["target"] for row in rows} == set(targets)
    assert {row["dtype"] for row in rows} == set(dtypes)
    assert {row["specialisation"] for row in rows} == set(specialisations)
    for row in rows:
        assert row["registers"] > 0
        if row["dtype"] != "fp64":
            assert row["spill_bytes"] == 0, row
        if row["specialisation"] == "even" and row["reads_of_partial_sums"] == 1 and row["tensor_accesses_of_16"]:
            wide = row["access_bytes"].get("16", 0) + row["access_bytes"].get("32", 0)
            assert wide >= row["tensor_accesses_of_16"], row
            assert sum(row["access_bytes"].values()) - wide <= row["small_accesses_allowed"], row
    # Samples of more partial sums than are read at a time.
    assert {1, 2, 8} <= {row["reads_of_partial_sums"] for row in rows if row["kernel"] == "rescale_kernel"}
    assert {4, 16} == {row["warps"] for row in rows if row["kernel"] == "finish_kernel"}
    tiles = [row for row in rows if row["specialisation"] == "even" and row["kernel"] not in ("finish_kernel", "sum_kernel")]
    assert all(row["tensor_accesses_of_16"] for row in tiles)


def test_kernels_compile_without_spills_and_wide(tmp_path):
    """Each target once, in half and in single precision; ``--all`` takes every combination."""
    picks = ["sm_90:bf16:even", "gfx942:bf16:even", "sm_80:fp32:even", "sm_100:fp16:even", "sm_90:bf16:masked"]
    done, rows = compiled(tmp_path, "--pick", *picks)
    check(done, rows, *(set(column) for column in zip(*(pick.split(":") for pick in picks), strict=True)))


@pytest.mark.slow
def test_every_combination(tmp_path):
    from bench import aot

    check(*compiled(tmp_path), aot.TARGETS, aot.DTYPES, aot.SPECIALISATIONS)


def row(**changes):
    plain = {
        "kernel": "k", "variant": "", "dtype": "bf16", "specialisation": "even", "target": "sm_90", "spill_bytes": 0,
        "access_bytes": {"16": 3, "4": 2}, "small_accesses_allowed": 2, "tensor_accesses_of_16": 3,
        "reads_of_partial_sums": 1,
    }  # fmt: skip
    return plain | changes


@pytest.mark.parametrize("changes, fault", [
    ({}, None),
    ({"spill_bytes": 16}, "spills 16 bytes"),
    ({"spill_bytes": 16, "dtype": "fp64"}, None),
    ({"access_bytes": {"16": 3, "4": 3}}, "3 accesses below 16 bytes, 2 are of scalars"),
    ({"access_bytes": {"16": 2, "8": 2, "4": 0}}, "fewer 16-byte accesses"),
    ({"access_bytes": {"2": 24}, "specialisation": "ragged"}, None),
    ({"access_bytes": {"4": 24}, "reads_of_partial_sums": 2}, None),
    ({"access_bytes": {"4": 24}, "tensor_accesses_of_16": 0}, None),
])  # fmt: skip
def test_faults(changes, fault):
    from bench import aot

    faults = aot.faults_of(row(**changes))
    assert (not faults) if fault is None else any(fault in sentence for sentence in faults)
