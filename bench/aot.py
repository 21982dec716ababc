"""Compile every kernel, dtype and specialisation ahead of time for NVIDIA and AMD, and read what the compilers say.

No GPU and no driver is needed: registers, spills and shared memory come from the cubin's resource section and from the
AMD assembly's metadata, access widths from PTX and from the AMD assembly. Exit code 1 on a spill in fp16, bf16 or fp32,
or where the aligned specialisation reads or writes a tensor in pieces below 16 bytes.
"""

from __future__ import annotations

import argparse
import collections
import concurrent.futures
import json
import multiprocessing
import os
import re
import subprocess
import tempfile
import time
from pathlib import Path

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "sm_100": ("cuda", 100, 32),
    "gfx942": ("hip", "gfx942", 64),
}
DTYPES = ("fp16", "bf16", "fp32", "fp64")
SPECIALISATIONS = ("even", "masked", "ragged", "unaligned")
WIDE = 16  # bytes of the widest access

_NVIDIA_ACCESS = re.compile(r"\b(?:ld|st)\.global[.\w]*?(?:\.v(\d))?\.[busf](\d+)\b")
_AMD_ACCESS = re.compile(
    r"\b(?:global|buffer|flat)_(load|store)_(dwordx4|dwordx3|dwordx2|dword|u?short\w*|s?byte\w*|ubyte\w*|b\d+|u16|u8)"
)
_AMD_BYTES = {"dwordx4": 16, "dwordx3": 12, "dwordx2": 8, "dword": 4, "b128": 16, "b96": 12, "b64": 8, "b32": 4}
_BITS = {"i8": 8, "f16": 16, "bf16": 16, "f32": 32, "f64": 64}
_ACCESS = r"(?:tt\.(?:load|store)|amdg?\w*\.buffer_(?:load|store))"

_tasks: list = []


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--specialisations", nargs="+", choices=SPECIALISATIONS, default=list(SPECIALISATIONS))
    parser.add_argument(
        "--pick",
        nargs="+",
        metavar="TARGET:DTYPE:SPECIALISATION",
        help="these combinations alone, e.g. sm_90:bf16:even",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, help="write one JSON line per kernel here")


def main(arguments: argparse.Namespace) -> int:
    os.environ["TRITON_INTERPRET"] = "0"  # kernels are compiled here, whatever the caller's shell says
    started = time.perf_counter()
    combinations = [
        (target, dtype, specialisation)
        for target in arguments.targets
        for specialisation in arguments.specialisations
        for dtype in arguments.dtypes
    ]
    if arguments.pick:
        picked = [tuple(text.split(":")) for text in arguments.pick]
        unknown = [":".join(parts) for parts in picked if parts not in combinations]
        if unknown:
            print(
                f"--pick does not know {', '.join(unknown)}; write TARGET:DTYPE:SPECIALISATION, e.g. sm_90:bf16:even."
            )
            return 2
        combinations = picked
    rows = compile_all(combinations, arguments.jobs)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(table(rows))
    faults = [fault for row in rows for fault in faults_of(row)]
    print("\n".join(faults))
    import triton

    seconds = time.perf_counter() - started
    print(f"{len(rows)} kernels with triton {triton.__version__} in {seconds:.0f} s, {len(faults)} faults")
    return 1 if faults else 0


def compile_all(combinations: list[tuple[str, str, str]], jobs: int = 1) -> list[dict]:
    """One row per kernel of every (target, dtype, specialisation): where it was compiled for and what it needs."""
    from bench import aot_cases

    seen = set()
    _tasks.clear()
    for target, dtype, specialisation in combinations:
        for item in aot_cases.recorded(aot_cases.DTYPES[dtype], specialisation, TARGETS[target][2]):
            if (target, item) not in seen:
                seen.add((target, item))
                _tasks.append((target, dtype, specialisation, item))
    if jobs == 1:
        return [_compile(number) for number in range(len(_tasks))]
    context = multiprocessing.get_context("fork")
    with concurrent.futures.ProcessPoolExecutor(jobs, mp_context=context) as pool:
        return list(pool.map(_compile, range(len(_tasks)), chunksize=4))


def _compile(number: int) -> dict:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    target, dtype, specialisation, item = _tasks[number]
    source = ASTSource(
        item.kernel,
        signature=dict(item.signature),
        constexprs=dict(item.constants),
        attrs={(position,): [["tt.divisibility", 16]] for position in item.divisible},
    )
    options = {"num_warps": item.warps, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget(*TARGETS[target]), options=options)
    row = {
        "kernel": item.name.strip("_"),
        "target": target,
        "dtype": dtype,
        "specialisation": specialisation,
        "variant": _variant(item),
        "block": item.block,
        "warps": item.warps,
        "shared_bytes": compiled.metadata.shared,
    }
    lanes = TARGETS[target][2] * item.warps
    scalar, tensor = _expected(compiled.asm["ttgir"], item.block, lanes)
    scalar *= dict(item.constants).get("POINTS", 1)  # the loop over a chord's points may be unrolled
    row |= (
        _nvidia(compiled.asm["ptx"], compiled.asm["cubin"])
        if target.startswith("sm_")
        else _amd(compiled.asm["amdgcn"])
    )
    row["reads_of_partial_sums"] = dict(item.constants).get("CHUNKS", 1)
    accesses = row.pop("accesses")
    row["access_bytes"] = {str(width): accesses[width] for width in sorted(accesses, reverse=True)}
    row["tensor_accesses_of_16"] = tensor
    row["small_accesses_allowed"] = scalar
    return row


def _variant(item) -> str:
    """Which optional operands are there: absent ones are constants that are None."""
    absent = [name for name, value in item.constants if value is None]
    parts = [f"no {name}" for name in absent if name in ("sample", "weight", "guidance_scale", "rescale", "average")]
    parts += ["8 bits"] if "qmap1" in dict(item.signature) and "qmap1" not in absent else []
    parts += [f"{value} points" for name, value in item.constants if name == "POINTS" and value > 1]
    parts += [f"{value} reads of partial sums" for name, value in item.constants if name == "CHUNKS" and value > 1]
    return ", ".join(parts)


def _expected(ttgir: str, block: int | None, threads: int) -> tuple[int, int]:
    """(small accesses: of scalars, partial sums, tables and codes, 16-byte accesses: of operand tiles) that one thread
    must make."""
    lines = [line for line in ttgir.splitlines() if re.search(rf"\b{_ACCESS}\b", line)]
    small = wide = 0
    tables = _of_tables(ttgir)
    for line in lines:
        match = re.search(r"tensor<([\dx]+)x(?:!tt\.ptr<(\w+)>|(i8|f16|bf16|f32|f64))", line)
        if match is None:
            small += 1
            continue
        elements = 1
        for size in match[1].split("x"):
            elements *= int(size)
        size = _BITS[match[2] or match[3]] // 8
        if line in tables:
            small += elements // threads
        elif elements == block and elements * size // threads < WIDE and size == 1:
            small += 1  # codes of 8 bits: as many as there are of the wider tensors
        elif elements == block:
            wide += max(elements * size // threads // WIDE, 1)
        else:
            small += max(elements // threads, 1)
    return small, wide


def _of_tables(ttgir: str) -> set[str]:
    """The lines that read an entry of a map of 8-bit states for each element: what is derived from such a pointer."""
    derived, found = {"%qmap1", "%qmap2"}, set()
    for line in ttgir.splitlines():
        match = re.match(rf"\s*(%\w+) = (?:{_ACCESS}|tt\.\w+|ttg\.\w+)\s+(%\w+)", line)
        if match and match[2] in derived:
            if re.search(rf"\b{_ACCESS}\b", line):
                found.add(line)
            else:
                derived.add(match[1])
    return found


def _nvidia(ptx: str, cubin: bytes) -> dict:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        dump = subprocess.run([tool, "--dump-resource-usage", file.name], capture_output=True, text=True, check=True)
    found = dict(re.findall(r"\b(REG|STACK|LOCAL):(\d+)", dump.stdout + dump.stderr))
    accesses = collections.Counter(int(count or 1) * int(bits) // 8 for count, bits in _NVIDIA_ACCESS.findall(ptx))
    return {
        "registers": int(found["REG"]),
        "spill_bytes": max(int(found["STACK"]), int(found["LOCAL"])),
        "accesses": accesses,
    }


def _amd(assembly: str) -> dict:
    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", assembly)[1])

    spill = max(number("private_segment_fixed_size"), 4 * number("vgpr_spill_count"))
    accesses = collections.Counter(_AMD_BYTES.get(width, 2) for _, width in _AMD_ACCESS.findall(assembly))
    return {"registers": number("vgpr_count"), "spill_bytes": spill, "accesses": accesses}


def faults_of(row: dict) -> list[str]:
    """What is wrong with a compiled kernel, in words."""
    where = f"{row['kernel']} ({row['variant']}) {row['dtype']} {row['specialisation']} on {row['target']}"
    faults = []
    if row["spill_bytes"] and row["dtype"] != "fp64":
        faults.append(f"{where}: spills {row['spill_bytes']} bytes")
    # Partial sums lie at any address: a kernel that reads them several times is judged where it reads them once, and
    # one that reads nothing else not at all.
    if row["specialisation"] == "even" and row["reads_of_partial_sums"] == 1 and row["tensor_accesses_of_16"]:
        small = sum(count for width, count in row["access_bytes"].items() if int(width) < WIDE)
        if small > row["small_accesses_allowed"]:
            faults.append(f"{where}: {small} accesses below 16 bytes, {row['small_accesses_allowed']} are of scalars")
        if sum(row["access_bytes"].values()) - small < row["tensor_accesses_of_16"]:
            faults.append(f"{where}: fewer 16-byte accesses than the operands need, {row['access_bytes']}")
    return faults


def table(rows: list[dict]) -> str:
    """Registers, spills and shared memory per kernel, targets side by side; widths of the even specialisation."""
    groups = collections.defaultdict(dict)
    for row in rows:
        name = row["kernel"] + (f" ({row['variant']})" if row["variant"] else "")
        groups[name, row["dtype"], row["specialisation"], row["block"] or "-"][row["target"]] = row
    targets = [target for target in TARGETS if any(target in group for group in groups.values())]
    lines = ["registers / spilled bytes / shared bytes / access widths in bytes x count", ""]
    lines.append("| kernel | dtype | specialisation | block | " + " | ".join(targets) + " |")
    lines.append("|" + "---|" * (4 + len(targets)))
    for key, group in groups.items():
        cells = []
        for target in targets:
            row = group.get(target)
            widths = " ".join(f"{width}x{count}" for width, count in row["access_bytes"].items()) if row else ""
            cells.append(f"{row['registers']}/{row['spill_bytes']}/{row['shared_bytes']}/{widths}" if row else "")
        lines.append("| " + " | ".join([*map(str, key), *cells]) + " |")
    return "\n".join(lines)
