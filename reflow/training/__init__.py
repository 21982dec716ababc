"""The training room: one loop over stages, DeepSpeed behind engine.py, checkpoints, EMA, telemetry and validation."""
