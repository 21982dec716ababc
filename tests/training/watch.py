"""What a run has when it writes a checkpoint and when it has read one, whole and by name, for tests of resumption. Ranks call together."""

import contextlib

import torch
from bitsandbytes.functional import dequantize_blockwise

from reflow.training import checkpoint, loop


def moment(state, order):
    """The first or second moment of one buffer in fp32, by bitsandbytes' own reader where it is 8 bit."""
    value = state["exp_avg" if order == 1 else "exp_avg_sq"] if "exp_avg" in state else state[f"state{order}"]
    if value.dtype != torch.uint8:
        return value
    return dequantize_blockwise(value, absmax=state[f"absmax{order}"], code=state[f"qmap{order}"], blocksize=256)


@torch.no_grad()
def gathered(engine, ema):
    states = [engine.base.state[m] for m in engine.masters]
    return {"masters": engine.state(engine.masters), "ema": engine.state(ema.average), "first": engine.state([moment(s, 1) for s in states]),
            "second": engine.state([moment(s, 2) for s in states]), "steps": {int(s["step"]) for s in states}}


@contextlib.contextmanager
def watching():
    """Yields a dictionary that fills with what checkpoints held when they were written ('saved') and after they were read ('loaded')."""
    seen, save, load = {}, checkpoint.Checkpoints.save, checkpoint.Checkpoints.load

    def saving(self, engine, ema, *args):
        seen["saved"] = gathered(engine, ema)
        return save(self, engine, ema, *args)

    def loading(self, path, engine, ema, *args):
        result = load(self, path, engine, ema, *args)
        seen["loaded"], seen["how"] = gathered(engine, ema), result[0]["how"]
        return result

    checkpoint.Checkpoints.save, checkpoint.Checkpoints.load = saving, loading
    try:
        yield seen
    finally:
        checkpoint.Checkpoints.save, checkpoint.Checkpoints.load = save, load


def differences(saved, loaded):
    """Per kind the relative distance of two gathered states; exactly 0.0 where all of it is equal."""
    found = {"steps": 0.0 if saved["steps"] == loaded["steps"] and len(saved["steps"]) == 1 else 1.0}
    for kind in ("masters", "ema", "first", "second"):
        assert saved[kind].keys() == loaded[kind].keys() and saved[kind]
        norm = sum(t.double().square().sum() for t in saved[kind].values()).sqrt()
        found[kind] = float(sum((saved[kind][k].double() - loaded[kind][k].double()).square().sum() for k in saved[kind]).sqrt() / norm)
    return found


@contextlib.contextmanager
def leaving_after(steps):
    """The run leaves after so many optimizer steps, as a signal would make it."""
    after_step, count = loop.Signals.after_step, [0]

    def leave_now(self, at_once):
        count[0] += 1
        return (True, False) if count[0] == steps else after_step(self, at_once)

    loop.Signals.after_step = leave_now
    try:
        yield
    finally:
        loop.Signals.after_step = after_step
