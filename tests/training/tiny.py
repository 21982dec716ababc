"""A recipe of seconds on the real digits model, shared by the training tests and the worker they launch."""

from reflow import config

TINY = """
name = "tiny"
[model]
family = "digits"
[train]
batch_size = 16
micro_batch = 4
learning_rate = 1e-3
schedule = "cosine"
warmup = 32
ema_half_life = 64
[validate]
images = 2
pairs = 4
[log]
every = 32
[checkpoint]
minutes = 0
keep = 2
[[stages]]
windows = 4
solver_steps = 1
samples = 64
[[stages]]
windows = 2
solver_steps = 2
samples = 64
teacher = "previous"
"""


def recipe(folder, *overrides):
    """The tiny recipe with overrides, read back from a file in `folder`."""
    path = folder / "tiny.toml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(TINY)
    return config.load(str(path), list(overrides))
