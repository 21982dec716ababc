"""Pictures of the rows: ops against their peers, and the accuracy of a window's velocity."""

from __future__ import annotations

from pathlib import Path

from bench import tables

COLOURS = {
    "published": "#9a9a9a", "eager": "#4c78a8", "compile": "#72b7b2", "compile-cooperative": "#54a24b",
    "row": "#eeca3b", "ours": "#e45756", "empty": "#d8d8d8",
    "bf16 state": "#4c78a8", "fp32 state": "#e45756", "fp32 state and network": "#54a24b",
}  # fmt: skip


def draw(rows: tables.Rows, folder: Path) -> list[Path]:
    """Every picture that the rows allow, as PNG files in the folder."""
    import matplotlib

    matplotlib.use("Agg")
    made = [_solver(rows, folder / "solver.png"), _ops(rows, folder / "ops.png")]
    return [path for path in made if path is not None]


def _solver(rows: tables.Rows, path: Path) -> Path | None:
    """Velocity error over windows at the most solver steps of each flow, one line a peer."""
    import matplotlib.pyplot as plt

    found = list(rows.where(bench="solver"))
    flows = list(dict.fromkeys(row["flow"] for row in found))
    if not found:
        return None
    figure, axes = plt.subplots(1, len(flows), figsize=(5 * len(flows), 3.6), sharey=True, squeeze=False)
    for axis, flow in zip(axes[0], flows, strict=True):
        most = max(row["steps"] for row in found if row["flow"] == flow)
        for peer in ("published", "bf16 state", "fp32 state", "fp32 state and network"):
            meant = (flow, most, peer)
            here = sorted((r["windows"], r["error"]) for r in found if (r["flow"], r["steps"], r["peer"]) == meant)
            label = "as published" if peer == "published" else peer
            if here:
                axis.plot(*zip(*here, strict=True), marker="o", color=COLOURS[peer], label=label)
        axis.set(title=f"{flow}, {most} steps a window", xlabel="windows", xscale="log", yscale="log")
        ticks = sorted({row["windows"] for row in found})
        axis.set_xticks(ticks, [str(tick) for tick in ticks])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0][0].set_ylabel("relative error of the velocity")
    axes[0][0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path


def _ops(rows: tables.Rows, path: Path) -> Path | None:
    """Time of every peer at SDXL batch 4 in bf16, in a CUDA graph and as a plain call."""
    import matplotlib.pyplot as plt

    found = list(rows.where(bench="ops", device="cuda", shape=tables.SDXL4, dtype="bf16", cache="warm"))
    found = [row for row in found if row["median_us"] is not None]
    if not found:
        return None
    cases = list(dict.fromkeys(row["case"] for row in found))
    peers = [name for name in tables.PEERS if any(row["peer"] == name for row in found)]
    figure, axes = plt.subplots(1, 2, figsize=(12, 4.4), sharey=True)
    for axis, mode in zip(axes, ("graph", "plain"), strict=True):
        for number, peer in enumerate(peers):
            times = {row["case"]: row["median_us"] for row in found if (row["mode"], row["peer"]) == (mode, peer)}
            here = [times.get(case) for case in cases]
            places = [place + (number - (len(peers) - 1) / 2) * 0.6 / len(peers) for place in range(len(cases))]
            drawn = [(x, y) for x, y in zip(places, here, strict=True) if y is not None]
            if drawn:
                axis.plot(*zip(*drawn, strict=True), "o", color=COLOURS.get(peer), label=peer)
        axis.set_xticks(range(len(cases)), cases, rotation=30, ha="right", fontsize=8)
        axis.set(title="inside a CUDA graph" if mode == "graph" else "plain call", yscale="log")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("microseconds (log scale)")
    figure.suptitle("SDXL latents, batch 4, bf16, warm L2", fontsize=10)
    figure.tight_layout(rect=(0, 0, 0.87, 1))
    figure.legend(*axes[1].get_legend_handles_labels(), loc="center right", frameon=False, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
    return path
