"""README's "Train SDXL" commands, as they stand there, with small weights in the place of SDXL's."""

import importlib
import os
import pathlib
import shlex
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))
SMALL = ["stages.0.samples=4", "stages.1.samples=4", "train.batch_size=4", "train.micro_batch=2", "train.warmup=0",
         "model.compile=false", "validate.every=0", "checkpoint.minutes=0"]  # fmt: skip


def commands():
    """The five lines of the section's first code block, without their comments."""
    section = (ROOT / "README.md").read_text().split("### Train SDXL")[1]
    lines = section.split("```bash\n")[1].split("```")[0].strip().splitlines()
    return [shlex.split(line, comments=True) for line in lines]


@pytest.mark.slow
@pytest.mark.launch
def test_five_commands_from_images_to_a_four_step_model(tmp_path):
    found = commands()
    assert [c[0] for c in found] == ["bash", "reflow", "deepspeed", "reflow", "reflow"]
    importlib.import_module("tiny_pipelines").sdxl().save_pretrained(tmp_path / "base")
    (tmp_path / "photos").mkdir()
    for i in range(6):
        pixels = np.random.default_rng(i).integers(0, 255, (64 + 20 * i, 100, 3), np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i}.png")
        (tmp_path / "photos" / f"{i}.txt").write_text("a b")
    base = "stabilityai/stable-diffusion-xl-base-1.0"
    python = pathlib.Path(sys.executable).parent
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": f"{python}:{os.environ['PATH']}",
                   "PYTHONPATH": f"{ROOT / 'kernels'}:{ROOT}"}  # fmt: skip
    for words in found[1:]:
        words = [str(tmp_path / "base") if w == base else w for w in words]
        if words[0] == "reflow":
            words = [sys.executable, "-m", "reflow", *words[1:]]
        else:
            words = ["deepspeed", "--num_accelerators", "1", str(ROOT / words[1]), *words[2:]]
            words += [part for key in (f"model.base={tmp_path / 'base'}", *SMALL) for part in ("--set", key)]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    assert (tmp_path / "sdxl-4step.safetensors").stat().st_size > 100_000
    assert list((tmp_path / "samples").glob("*.png"))
