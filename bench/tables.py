"""Tables and the list of targets, made from rows alone. A number that no row holds is "not measured"."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from bench import record

ABSENT = "not measured"
SDXL4 = [4, 4, 128, 128]
LAUNCH_PEERS = ("published", "eager", "ours")
SINGLE = ("guided_step", "window_chord", "cfg_combine")
Row = Mapping[str, Any]


class Rows:
    """The newest row of every identity; rows of quick runs are left out unless ``quick``."""

    def __init__(self, rows: Iterable[Row], quick: bool = False):
        newest: dict[tuple, Row] = {}
        for row in rows:
            if quick or not row.get("quick"):
                newest[record.identity(row)] = row
        self.all = list(newest.values())

    def where(self, **wanted: Any) -> Iterator[Row]:
        """Rows whose fields are these; a callable is asked about the value."""
        for row in self.all:
            if all(test(row.get(name)) if callable(test) else row.get(name) == test for name, test in wanted.items()):
                yield row

    def time(self, **wanted: Any) -> float | None:
        """The median in microseconds of the one row that is meant, None where it has none."""
        found = [row["median_us"] for row in self.where(**wanted) if row["median_us"] is not None]
        return found[-1] if found else None

    def devices(self) -> set[str]:
        return {row["device"] for row in self.all}


@dataclasses.dataclass(frozen=True)
class Target:
    """measure: from rows to a number or None. The bound is a least, or with ``most`` a greatest."""

    text: str
    bound: float
    measure: Callable[[Rows], float | None]
    most: bool = False
    unit: str = "x"

    def met(self, rows: Rows) -> bool | None:
        value = self.measure(rows)
        return None if value is None else (value <= self.bound if self.most else value >= self.bound)


def _ratio(rows: Rows, peer: str, cases: Sequence[str], mode: str) -> float | None:
    """The smallest ratio of a peer's time to ours over the cases, SDXL batch 4 in bf16 with a warm cache."""
    ratios = []
    for case in cases:
        cell = {"bench": "ops", "device": "cuda", "case": case, "shape": SDXL4, "dtype": "bf16", "mode": mode}
        theirs, ours = (rows.time(**cell, cache="warm", peer=name) for name in (peer, "ours"))
        if theirs is None or ours is None:
            return None
        ratios.append(theirs / ours)
    return min(ratios)


def _copy_share(rows: Rows) -> float | None:
    """The smallest share of a copy's bandwidth at 1 GiB, in percent, each op by the bytes that it must move itself."""
    shares = []
    for row in rows.where(bench="ops", device="cuda", peer="ours", mode="graph", shape=lambda s: s and s[0] >= 8192):
        if row["median_us"] and row["roofline_us"]:
            shares.append(100 * row["roofline_us"] / row["median_us"])
    return min(shares, default=None)


def _tail(rows: Rows, value: Callable[[Row, Row], float | None]) -> float | None:
    """Of SDXL's whole tail: what ``value`` says of the row of one pass and that of foreach with a loop for the EMA."""
    peers = {row["peer"]: row for row in rows.where(bench="tail", device="cuda", case="sdxl/tail") if row["median_us"]}
    ours, base = peers.get("one pass"), peers.get("foreach + EMA loop")
    return value(ours, base) if ours and base else None


def _tail_share(ours: Row, base: Row) -> float | None:
    return 100 * ours["own_roofline_us"] / ours["median_us"] if ours.get("own_roofline_us") else None


def _launches(rows: Rows, cases: Sequence[str]) -> float | None:
    counts = []
    for case in cases:
        found = [row["launches"] for row in rows.where(bench="launches", case=case, peer="ours")]
        counts.append(max((count for count in found if count is not None), default=None))
    return None if None in counts else float(sum(counts))


def _loop(rows: Rows, ours: str, base: str, case: str, family: str = "sdxl") -> float | None:
    """Samples a second of one peer over another's in a cell of the step benchmark."""
    rates = {}
    for row in rows.where(bench="step", device="cuda", case=lambda text: text.startswith(f"{family} {case}")):
        if row.get("samples_per_second"):
            rates[row["peer"]] = row["samples_per_second"]
    return rates[ours] / rates[base] if ours in rates and base in rates else None


def _host(rows: Rows, case: str) -> float | None:
    """Microseconds of the host for one call of ours."""
    return rows.time(bench="host", case=case, peer="ours")


def _tflops(rows: Rows) -> float | None:
    found = rows.where(bench="step", device="cuda", case=lambda text: text.startswith("sdxl"))
    return max((row["tflop_per_second"] for row in found if row.get("tflop_per_second")), default=None)


LOSS, STEP = "aligned_v_loss/full", "guided_step"
RECIPE, CHAINED = "published recipe", "ours, previous student as teacher, 2 steps"
ROOT = "ours, root teacher, 8 steps, guidance 1"
TARGETS = (
    Target("loss and step in a CUDA graph against fair eager", 3, lambda r: _ratio(r, "eager", (LOSS, STEP), "graph")),
    Target("loss and step as plain calls against eager as published", 2,
           lambda r: _ratio(r, "published", (LOSS, STEP), "plain")),
    Target("loss and step as plain calls against fair eager", 1, lambda r: _ratio(r, "eager", (LOSS, STEP), "plain")),
    Target("loss forward and backward in a graph against torch.compile", 1,
           lambda r: _ratio(r, "compile", ("aligned_v_loss/forward", "aligned_v_loss/backward"), "graph")),
    Target("single-launch ops in a graph against torch.compile", 0.95, lambda r: _ratio(r, "compile", SINGLE, "graph")),
    Target("share of a copy's bandwidth at 1 GiB by an op's own bytes", 80, _copy_share, unit=" %"),
    Target("host time of a guided step (bench host, any CPU)", 15, lambda r: _host(r, STEP), True, " us"),
    Target("host time of the loss and its gradient (bench host, any CPU)", 80,
           lambda r: _host(r, "aligned_v_loss, forward and backward"), True, " us"),
    Target("SDXL tail in one pass against foreach clip, AdamW and a loop of EMA", 2,
           lambda r: _tail(r, lambda ours, base: base["median_us"] / ours["median_us"])),
    Target("share of a copy's bandwidth of the SDXL tail by its own bytes", 80, lambda r: _tail(r, _tail_share), unit=" %"),
    Target("launches of the loss forward", 2, lambda r: _launches(r, ("aligned_v_loss/forward",)), True, ""),
    Target("launches of the loss backward", 1, lambda r: _launches(r, ("aligned_v_loss/backward",)), True, ""),
    Target("launches of the step", 1, lambda r: _launches(r, (STEP,)), True, ""),
    Target("SDXL step at the published recipe against the published-style loop", 1.3,
           lambda r: _loop(r, "ours", "published", RECIPE)),
    Target("SDXL chained stage against the published-style loop", 4, lambda r: _loop(r, CHAINED, "published", RECIPE)),
    Target("SDXL chained stage against a root-teacher stage", 2, lambda r: _loop(r, CHAINED, ROOT, RECIPE)),
    Target("SDXL network arithmetic", 300, _tflops, unit=" TFLOP/s"),
)  # fmt: skip


def targets(rows: Rows) -> str:
    lines = ["| target (H200 class; ops: SDXL batch 4, bf16, warm L2) | wanted | measured | |", "|---|---|---|---|"]
    for target in TARGETS:
        value, met = target.measure(rows), target.met(rows)
        sign = "at most" if target.most else "at least"
        shown = ABSENT if value is None else f"{value:.3g}{target.unit}"
        verdict = {None: "", True: "met", False: "missed"}[met]
        lines.append(f"| {target.text} | {sign} {target.bound:g}{target.unit} | {shown} | {verdict} |")
    return "\n".join(lines)


def ops(rows: Rows, shape: Sequence[int] = SDXL4, dtype: str = "bf16") -> str:
    """Microseconds of every peer, one line a case and mode; "" where nothing was measured on a GPU."""
    found = list(rows.where(bench="ops", device="cuda", shape=list(shape), dtype=dtype))
    names = [name for name in PEERS if any(row["peer"] == name for row in found)]
    lines = ["| case | mode, L2 | " + " | ".join(names) + " | roofline | host, ours |"]
    lines.append("|---|---|" + "---|" * (len(names) + 2))
    cells = dict.fromkeys((row["case"], row["mode"], row["cache"]) for row in found)
    for case, mode, cache in cells:
        here = [row for row in found if (row["case"], row["mode"], row["cache"]) == (case, mode, cache)]
        by_peer = {row["peer"]: row for row in here}
        times = " | ".join(_microseconds(by_peer.get(name)) for name in names)
        roof = here[0]["roofline_us"]
        ours = by_peer.get("ours", {}).get("host_us")
        beside = " | ".join("-" if value is None else f"{value:.2f}" for value in (roof, ours))
        lines.append(f"| {case} | {mode}, {cache} | {times} | {beside} |")
    return "\n".join(lines) if found else ""


PEERS = ("published", "eager", "compile", "compile-cooperative", "row", "ours", "copy", "empty")


def _microseconds(row: Row | None) -> str:
    if row is None or row["median_us"] is None:
        return "failed" if row is not None and row.get("failed") else "-"
    text = f"{row['median_us']:.1f}" if row["median_us"] < 1e4 else f"{row['median_us'] / 1e3:,.0f}k"
    return text + ("*" if row["unstable"] else "")


def launches(rows: Rows) -> str:
    """Launches + host syncs of published, eager and fused code."""
    found = list(rows.where(bench="launches"))
    # Counts of a GPU, where there are any, are the ones that count.
    device = "cuda" if any(row["device"] == "cuda" for row in found) else "cpu"
    found = [row for row in found if row["device"] == device]
    if not found:
        return ""
    lines = ["| launches + host syncs | as published | fair eager | fused |", "|---|---|---|---|"]
    for case in dict.fromkeys(row["case"] for row in found):
        by_peer = {row["peer"]: row for row in found if row["case"] == case}
        able = {name: row for name, row in by_peer.items() if row["launches"] is not None}
        shown = (f"{able[n]['launches']} + {able[n]['syncs']}" if n in able else "-" for n in LAUNCH_PEERS)
        lines.append(f"| {case} | {' | '.join(shown)} |")
    how = "profiled on a GPU" if device == "cuda" else "ATen calls and kernel starts on a CPU"
    return "\n".join([*lines, "", f"Counts: {how}."])


def solver(rows: Rows, steps: Sequence[int] | None = (10, 5, 4, 2)) -> str:
    """Error of the window velocity, as published against fp32 state, per flow, windows and steps."""
    found = [row for row in rows.where(bench="solver") if steps is None or row.get("steps") in steps]
    if not found:
        return ""
    lines = [
        "| flow | windows x steps | as published | its index rule alone | bf16 state | fp32 state | and fp32 network |",
        "|---|---|---|---|---|---|---|",
    ]
    names = ("published", "published, fp64", "bf16 state", "fp32 state", "fp32 state and network")
    for flow, windows, count in dict.fromkeys((row["flow"], row["windows"], row["steps"]) for row in found):
        same = (r for r in found if (r["flow"], r["windows"], r["steps"]) == (flow, windows, count))
        by_peer = {row["peer"]: row for row in same}
        shown = " | ".join(_accuracy(by_peer.get(name)) for name in names)
        lines.append(f"| {flow} | {windows} x {count} | {shown} |")
    return "\n".join(lines)


def _accuracy(row: Row | None) -> str:
    if row is None:
        return "-"
    error = 100 * row["error"]
    if error < 1e-6:
        return "0"
    return f"{f'{error:.2g}' if error >= 0.01 else f'{error:.0e}'} %, {row['one_minus_cosine']:.0e}"


def tail(rows: Rows, device: str = "cuda") -> str:
    found = list(rows.where(bench="tail", device=device, case=lambda case: case != "copy"))
    if not found:
        return ""
    lines = ["| part | peer | ms | roofline ms |", "|---|---|---|---|"]
    for row in found:
        shown = "-" if row["median_us"] is None else f"{row['median_us'] / 1e3:.2f}"
        own = row.get("own_roofline_us") or row["roofline_us"]  # of the bytes that this peer must move
        roof = "-" if own is None else f"{own / 1e3:.2f}"
        lines.append(f"| {row['case']} | {row['peer']} | {shown} | {roof} |")
    return "\n".join(lines)


def host(rows: Rows) -> str:
    """Microseconds of the host a call, with nothing launched."""
    found = [row for row in rows.where(bench="host") if row["median_us"]]
    if not found:
        return ""
    lines = ["| host microseconds a call | as published | fair eager | ours |", "|---|---|---|---|"]
    for case in dict.fromkeys(row["case"] for row in found):
        by_peer = {row["peer"]: row for row in found if row["case"] == case}
        shown = (f"{by_peer[name]['median_us']:.1f}" if name in by_peer else "-" for name in LAUNCH_PEERS)
        lines.append(f"| {case} | {' | '.join(shown)} |")
    said = "Kernels are compiled for sm_90 and start nothing; eager calls run on small tensors of the CPU. Shape 2x4x4x4."
    return "\n".join([*lines, "", said])


def step(rows: Rows, cases: Callable[[str], bool] = bool) -> str:
    """Milliseconds and samples a second of every peer of a step cell, with the ratio to the published-style loop."""
    found = [row for row in rows.where(bench="step") if row["median_us"] and cases(row["case"])]
    if not found:
        return ""
    lines = ["| cell | batch | peer | ms | samples/s | against published |", "|---|---|---|---|---|---|"]
    for row in found:
        same = {"bench": "step", "device": row["device"], "case": row["case"], "shape": row["shape"]}
        base = next((r.get("samples_per_second") for r in rows.where(**same, peer="published")), None)
        rate = row.get("samples_per_second")
        ratio = f"{rate / base:.2f}x" if rate and base else "-"
        shown = f"{rate:.3g}" if rate else "-"
        star = "*" if row["unstable"] else ""
        cell = f"{row['case']} | {row['shape'][0]} | {row['peer']}"
        lines.append(f"| {cell} | {row['median_us'] / 1e3:.3g}{star} | {shown} | {ratio} |")
    return "\n".join(lines)


def machine(rows: Sequence[Row]) -> str:
    """What the rows were measured on, as a sentence."""
    stamps = [row["stamp"] for row in rows if row.get("stamp")]
    if not stamps:
        return ""
    last = max(stamps, key=lambda one: one.get("date") or "")
    where = last["gpu"] and f"{last['gpu']}, driver {last['driver']}, CUDA {last['cuda']}"
    where = where or f"{last['cpu']}, {last['cores']} cores, {last['threads']} thread{'s' * (last['threads'] != 1)}"
    return f"{where}, torch {last['torch']}, triton {last['triton']}, {(last['date'] or '')[:10]}"
