"""The whole suite on a CPU: every command runs, every row is stamped, nothing fails the oracle."""

import pytest

from bench import record
from bench.__main__ import COMMANDS, main
from bench.everything import QUICK


def test_the_quick_suite(tmp_path, capsys):
    assert main(["all", "--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0, capsys.readouterr().err
    rows = record.read(tmp_path)
    assert {row["bench"] for row in rows} == {name for name in QUICK if name in COMMANDS}
    assert all(row["quick"] and row["note"].startswith(record.NOT_A_NUMBER) for row in rows)
    assert all(row["stamp"]["torch"] and row["stamp"]["revision"] for row in rows) and not any(r["failed"] for r in rows)
    timed = [row for row in rows if row["bench"] == "ops" and row["median_us"] is not None]
    assert {row["peer"] for row in timed} >= {"published", "eager", "compile", "compile-cooperative", "ours"}
    assert all("graphs need a GPU" in row["note"] for row in rows if row["mode"] == "graph" and not row["median_us"])
    accurate = {row["peer"]: row["error"] for row in rows if row["bench"] == "solver" and "digits" in row["case"]}
    assert accurate["fp32 state and network"] < 1e-4 < accurate["published"]
    counted = {(r["case"], r["peer"]): r["launches"] for r in rows if r["bench"] == "launches"}
    assert counted["guided_step", "ours"] == 1 and counted["guided_step", "published"] > 15


def test_a_device_that_is_not_there_is_a_sentence(capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert main(["ops", "--device", "cuda"]) == 2
    assert "--device cpu --quick" in capsys.readouterr().err
