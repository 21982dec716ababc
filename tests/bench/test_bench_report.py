"""Tables, targets and the comparison from fixed rows."""

import pathlib

import pytest

from bench import plots, record, report, tables
from bench.__main__ import main

STAMP = {"gpu": "H200", "driver": "1", "torch": "2.11", "triton": "3.6", "cuda": "13", "revision": "aaa", "cpu": "EPYC",
         "cores": 16, "threads": 8, "date": "2026-01-02T00:00:00"}  # fmt: skip
OPS = {"bench": "ops", "device": "cuda", "shape": [4, 4, 128, 128], "dtype": "bf16", "seed": 0}


def write(path: pathlib.Path, scale: float = 1.0, revision: str = "aaa") -> None:
    """Loss and step with peers of 30, 10, 6 and 2 us in a graph, an SDXL recipe, launches, one line of accuracy."""
    kept = record.Recorder(path, stamp={**STAMP, "revision": revision})
    for case in ("aligned_v_loss/full", "aligned_v_loss/forward", "aligned_v_loss/backward", "guided_step"):
        for mode, factor in (("graph", 1.0), ("plain", 5.0)):
            for peer, time in (("published", 30.0), ("eager", 10.0), ("compile", 6.0), ("ours", 2.0)):
                time *= factor * scale
                fields = {"median_us": time, "p20_us": 0.9 * time, "p80_us": 1.1 * time, "unstable": peer == "eager"}
                kept.add(**OPS, **fields, case=case, peer=peer, mode=mode, roofline_us=1.5, host_us=0.4 if peer == "ours" else 7.0)
    for peer, time in (("eager", 9.0), ("ours", 14.0)):
        kept.add(bench="host", device="cpu", case="guided_step", peer=peer, median_us=time, p20_us=time, p80_us=time, unstable=False)
    for peer, time in (("foreach + EMA loop", 30e3), ("one pass", 10e3)):
        tail = {"case": "sdxl/tail", "peer": peer, "median_us": time, "p20_us": time, "p80_us": time, "unstable": False}
        kept.add(bench="tail", device="cuda", **tail, extra={"own_roofline_us": 8.5e3})
    kept.add(**OPS | {"dtype": "fp16"}, case="guided_step", peer="ours", note="fails the oracle", failed=True)
    for peer, rate in (("published", 1.0), ("ours", 1.2), (tables.CHAINED, 5.0), (tables.ROOT, 2.0)):
        case = "sdxl published recipe: 4 windows x 10 steps, guidance 7.5"
        fields = {"shape": [2, 4, 128, 128], "dtype": "bf16", "case": case, "peer": peer}
        fields |= {"median_us": 2e6 / rate, "p20_us": 1.9e6 / rate, "p80_us": 2.1e6 / rate}
        kept.add(bench="step", device="cuda", **fields, extra={"samples_per_second": rate, "tflop_per_second": 50 * rate})
    kept.add(bench="launches", device="cuda", case="guided_step", peer="ours", launches=2, syncs=0)
    for peer, error in (("published", 0.07), ("bf16 state", 0.05), ("fp32 state", 0.002), ("fp32 state and network", 1e-6)):
        extra = {"flow": "mixture", "windows": 8, "steps": 10, "one_minus_cosine": error**2}
        kept.add(bench="solver", device="cuda", case="mixture/8 windows/10 steps", peer=peer, error=error, extra=extra)


@pytest.fixture
def results(tmp_path):
    write(tmp_path / "h200" / "all.jsonl")
    return tmp_path


def test_targets_are_met_missed_or_not_measured(results):
    rows = report.machines(results)["h200"]
    verdicts = {target.text: target.met(rows) for target in tables.TARGETS}
    assert verdicts["loss and step in a CUDA graph against fair eager"] is True  # 5x
    assert verdicts["loss forward and backward in a graph against torch.compile"] is True
    assert verdicts["single-launch ops in a graph against torch.compile"] is None  # chord and guidance are missing
    assert verdicts["launches of the step"] is False and verdicts["launches of the loss forward"] is None
    assert verdicts["SDXL step at the published recipe against the published-style loop"] is False  # 1.2x
    assert verdicts["SDXL chained stage against a root-teacher stage"] is True
    assert verdicts["SDXL network arithmetic"] is False
    assert verdicts["SDXL tail in one pass against foreach clip, AdamW and a loop of EMA"] is True  # 3x
    assert verdicts["share of a copy's bandwidth of the SDXL tail by its own bytes"] is True  # 85 %
    assert verdicts["host time of a guided step (bench host, any CPU)"] is True
    assert verdicts["host time of the loss and its gradient (bench host, any CPU)"] is None
    table = tables.targets(rows)
    assert "| at least 3x | 5x | met |" in table and "| at least 1.3x | 1.2x | missed |" in table
    assert tables.targets(tables.Rows([])).count(tables.ABSENT) == len(tables.TARGETS)


def test_the_block_and_the_page_hold_the_rows(results):
    readme = results / "README.md"
    readme.write_text("before\n<!-- bench:start -->\nold\n<!-- bench:end -->\nafter\n")
    arguments = ["report", "--blocks", "bench", "--readme", str(readme), "--results", str(results)]
    assert main([*arguments, "--check"]) == 1 and main(arguments) == 0 and main([*arguments, "--check"]) == 0
    text = readme.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| guided_step | graph, warm | 30.0 | 10.0* | 6.0 | 2.0 | 1.50 | 0.40 |" in text
    assert "| mixture | 8 x 10 | 7 %, 5e-03 | - | 5 %, 3e-03 | 0.2 %, 4e-06 | 1e-04 %, 1e-12 |" in text
    assert "H200, driver 1, CUDA 13, torch 2.11" in text
    page = (results / "h200" / "README.md").read_text()
    assert "clocks differed" in page and "![ops](ops.png)" in page and (results / "h200" / "solver.png").stat().st_size
    assert "| guided_step | plain, warm | failed |" in page


def test_a_readme_without_markers_is_a_sentence(results, capsys):
    readme = results / "README.md"
    readme.write_text("nothing here")
    assert main(["report", "--blocks", "bench", "--readme", str(readme), "--results", str(results)]) == 2
    assert "no pair of markers <!-- bench:start -->" in capsys.readouterr().err
    assert readme.read_text() == "nothing here"


def test_quick_rows_reach_no_table(tmp_path):
    kept = record.Recorder(tmp_path / "cpu" / "ops.jsonl", stamp=STAMP)
    kept.add(**OPS, case="guided_step", peer="ours", median_us=1.0, quick=True)
    (tmp_path / "aot").mkdir()
    (tmp_path / "aot" / "kernels.jsonl").write_text('{"kernel": "step", "registers": 32}\n')  # no measurement
    assert report.machines(tmp_path) == {} and plots.draw(tables.Rows(record.read(tmp_path)), tmp_path) == []


def test_two_revisions_side_by_side(tmp_path, capsys):
    write(tmp_path / "x.jsonl")
    write(tmp_path / "x.jsonl", 1.5, "bbb")
    path = str(tmp_path / "x.jsonl")
    assert main(["compare", f"{path}@aaa", f"{path}@bbb", "--only", "guided_step ours"]) == 0
    out = capsys.readouterr().out
    assert "ours | 2.0 us | 3.0 us | 1.500 |  |" in out and "Same machine and versions." in out
    assert main(["compare", f"{path}@aaa", f"{path}@ccc"]) == 2
    assert "no rows of revision ccc; it has aaa, bbb" in capsys.readouterr().err
    write(tmp_path / "y.jsonl", 1.05)
    assert main(["compare", path, str(tmp_path / "y.jsonl")]) == 0
    assert main(["compare", path, str(tmp_path / "absent.jsonl")]) == 2
