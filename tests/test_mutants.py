"""The mutants of the core: what they are, and that a change in one file reaches its tests. `scripts/soak.sh mutants` runs all."""

import ast
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "soak"))

import mutants

SCRIPT = """
import json, pathlib, sys
import mutants
path = "reflow/training/ema.py"
mutants.TARGETS[path] = mutants.TARGETS[path][:1]
chosen = [m for m in mutants.mutants(path) if m.was in ("1.0 - decay", "half_life <= 0", "a.copy_(state[str(i)])")]
assert len(chosen) == 3
print(json.dumps([mutants.tested(path, source, pathlib.Path(sys.argv[1]))[0] for source in (None, *(m.source for m in chosen))]))
"""


def test_a_mutant_is_one_change_and_is_chosen_by_its_index():
    drawn = mutants.chosen()
    assert len(drawn) == len(set(drawn)) == mutants.CASES
    for mutant in drawn[:40]:
        was = ast.unparse(ast.parse((ROOT / mutant.path).read_text())).splitlines()
        now = mutant.source.splitlines()
        assert was != now and mutant.was != mutant.now, mutant.name


def test_every_target_and_every_explained_survivor_is_there():
    assert [path for path in mutants.TARGETS if not (ROOT / path).is_file()] == []
    assert [name for names in mutants.TARGETS.values() for name in names if not (ROOT / name).exists()] == []
    keys = {mutant.key for path in mutants.TARGETS for mutant in mutants.mutants(path)}
    gone = mutants.reasons().keys() - keys
    assert not gone, f"no such change is possible any more; take it out of survivors.json: {gone}"


@pytest.mark.slow
def test_a_change_reaches_the_tests_in_a_fork_and_no_file(tmp_path):
    before = (ROOT / "reflow" / "training" / "ema.py").read_bytes()
    path = [str(ROOT / "tests" / "soak"), str(ROOT), str(ROOT / "kernels")]
    script = f"import sys; sys.path[:0] = {path!r}\n{SCRIPT}"
    done = subprocess.run([sys.executable, "-c", script, tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1]) == ["passed", "failed", "failed", "failed"]
    assert (ROOT / "reflow" / "training" / "ema.py").read_bytes() == before
