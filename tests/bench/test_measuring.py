"""The bench's own machinery: order of calls, drifting clocks, the gate, rows that resume, what counts as a launch."""

import argparse
import json

import pytest
import torch

from bench import counting, gate, record, session, timing


class FakeWatch:
    """A stopwatch whose times and clocks are given: a peer says its own microseconds, clocks follow a script."""

    def __init__(self, speed):
        self.cuda, self.clock_source, self.speed, self.current = False, "fake", speed, None

    def time(self, call, count, cold):
        microseconds = call()
        return float(microseconds), self.speed(call)

    def wait(self):
        pass


def test_rounds_are_abba_and_quantiles_are_of_all_rounds():
    order, numbers = [], iter(range(1, 100))

    def first():
        order.append("a")
        return next(numbers)

    def second():
        order.append("b")
        return 0

    watch = FakeWatch(lambda call: None)
    result = timing.compare({"a": first, "b": second}, device="cpu", rounds=4, count=1, stopwatch=watch)
    assert order == ["a", "b"] + ["a", "b", "b", "a"] * 2  # a warm-up call each, then two rounds forth, two back
    assert (result["a"].p20_us, result["a"].median_us, result["a"].p80_us) == pytest.approx((2.6, 3.5, 4.4))
    assert result["a"].rounds == 4 and not result["a"].unstable


@pytest.mark.parametrize("steady_from, unstable, attempts", [(99, True, 3), (2, False, 2), (1, False, 1)])
def test_peers_at_different_clocks_are_measured_again(steady_from, unstable, attempts):
    """1000 against 1040 MHz is measured again, three times at most, and never dropped."""
    calls = {"slow": 0, "fast": 0}

    def peer(name):
        def call():
            calls[name] += 1
            return 1.0

        call.name = name
        return call

    def speed(call):
        attempt = (calls[call.name] - 2) // 4 + 1  # one warm-up call, four rounds an attempt
        return 1000.0 if call.name == "slow" or attempt >= steady_from else 1040.0

    peers = {name: peer(name) for name in calls}
    result = timing.compare(peers, device="cpu", rounds=4, count=1, stopwatch=FakeWatch(speed))
    assert result["slow"].unstable == result["fast"].unstable == unstable
    assert result["fast"].clocks["attempts"] == attempts and result["fast"].median_us == 1.0


def test_a_spent_budget_leaves_rounds_out_and_says_so():
    result = timing.compare(
        {"a": lambda: 1.0}, device="cpu", rounds=20, count=1, budget_s=0.0, stopwatch=FakeWatch(lambda call: None)
    )
    assert result["a"].rounds == 2 and "2 of 20 rounds" in result["a"].note


def test_the_gate_sees_one_wrong_element_and_nan():
    oracle = torch.randn(4, 1000, generator=torch.Generator().manual_seed(0))
    wrong = oracle.clone()
    wrong[2, 77] += 0.1
    assert gate.check(oracle + 1e-7, oracle, 1e-5) < 1e-6
    with pytest.raises(gate.GateError, match="allowed 0.01"):
        gate.check(wrong, oracle, 0.01)
    wrong[2, 77] = float("nan")
    with pytest.raises(gate.GateError, match="NaN"):
        gate.check([wrong], [oracle], 1.0)
    state = iter([oracle, oracle + 1e-7])
    assert gate.judge(lambda: next(state), oracle, 1e-5).deterministic is False


def options(folder, *more):
    parser = argparse.ArgumentParser()
    session.add_options(parser)
    return parser.parse_args(["--device", "cpu", "--quick", "--out", str(folder), *more])


def measured(folder, value):
    """A run of one cell with a right peer and one that returns ``value``; (exit code, rows, times peers were made)."""
    run, made = session.Session("demo", options(folder)), []
    x = torch.ones(8)

    def peers():
        made.append(1)
        return {"right": session.Peer(lambda: x + 1, x + 1, 1e-6), "other": session.Peer(lambda: x + value, x + 1, 1e-6)}

    cell = {"case": "add", "dtype": "fp32", "shape": [8]}
    run.measure(cell, peers, ["right", "other"], modes=["plain"], caches=["warm"])
    return run.exit_code(), record.read(folder / "demo.jsonl"), len(made)


def test_a_wrong_peer_has_no_time_and_fails_the_run_until_it_is_right(tmp_path, capsys):
    code, rows, _ = measured(tmp_path, 2.0)
    right, wrong = rows
    assert code == 1 and wrong["failed"] and wrong["median_us"] is None and "fails the oracle" in wrong["note"]
    assert right["median_us"] > 0 and right["error"] == 0 and right["deterministic"] is True
    assert "other: not a performance number; fails the oracle" in capsys.readouterr().out
    assert measured(tmp_path, 2.0)[0] == 1  # a failure is no result: the next run tries again
    code, rows, _ = measured(tmp_path, 1.0)
    assert code == 0 and rows[-1]["median_us"] > 0
    assert measured(tmp_path, 1.0)[2] == 0  # nothing is left to do, nothing is made


def test_rows_are_stamped_and_a_torn_line_is_mended(tmp_path):
    _, rows, _ = measured(tmp_path, 1.0)
    path = tmp_path / "demo.jsonl"
    assert set(record.FIELDS) <= set(rows[0])
    assert rows[0]["note"].startswith(record.NOT_A_NUMBER)
    stamp = rows[0]["stamp"]
    assert stamp["torch"] == torch.__version__ and stamp["cpu"] and stamp["revision"] and stamp["gpu"] is None
    path.write_text(path.read_text() + '{"bench": "demo", "ca')
    kept = record.Recorder(path, stamp=stamp)
    kept.add(bench="demo", case="later")
    assert [json.loads(line)["case"] for line in path.read_text().splitlines()] == ["add", "add", "later"]
    assert kept.done({"bench": "demo", "case": "later"}) and not kept.done({"bench": "demo", "case": "other"})
    assert kept.done(rows[0]) and not record.Recorder(path, stamp={**stamp, "revision": "other"}).done(rows[0])
    with pytest.raises(ValueError, match="no field speed"):
        kept.add(bench="demo", speed=1)


def test_syncs_are_item_nonzero_and_copies_to_the_host():
    x, marked = torch.ones(6), counting.on_device(torch.ones(3))
    counted = counting.count(lambda: (x.view(2, 3) + 1, x.sum().item(), x.nonzero(), marked.cpu()), "cpu")
    assert counted.syncs == 3
    assert counted.names == {"add": 1, "sum": 1, "nonzero": 1, "copy to the host": 1}
