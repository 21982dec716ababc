"""A recipe of seconds on the real digits model, shared by the training tests and the worker they launch."""

from reflow.recipes import reading
from reflow.training import run

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

# Long enough to be killed and signalled on the way.
LONGER = ("stages.0.samples=256", "stages.1.samples=32", "checkpoint.every=32", "log.every=16", "checkpoint.keep=9", "train.zero_stage=2")


def recipe(folder, *overrides):
    """The tiny recipe with overrides, read back from a file in `folder`."""
    path = folder / "tiny.toml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(TINY)
    return reading.load(str(path), list(overrides))


def short(folder, *overrides):
    """Three steps of the first stage."""
    whole = recipe(folder, "stages.0.samples=48", "validate.images=1", "validate.pairs=1", *overrides)
    return whole.model_copy(update={"stages": whole.stages[:1]})


def load_once():
    """Load and encode the digits once a process: the tests train many short runs on the same model, which no run changes but a LoRA."""
    load, encode, bases, data = run.load_base, run.encode_digits, {}, []

    def base_once(recipe, device):
        if recipe.model.lora_rank or (recipe.model.family, recipe.model.base) != ("digits", "builtin"):
            return load(recipe, device)
        if device not in bases:
            bases[device] = load(recipe, device)
        return bases[device]

    def data_once(base):
        if not data:
            data.append(encode(base))
        return data[0]

    run.load_base, run.encode_digits = base_once, data_once
