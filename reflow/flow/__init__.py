"""The maths of few-step flows: schedules, predictions, windows, chords, the teacher's solve, targets and losses.

Imports torch and reflow_kernels only. Time runs from t=1 (noise) to t=0 (data) in every function.
"""

from .chord import PREDICTION_TYPES, ChordTable
from .merging import Merger
from .objective import (
    chord_loss,
    sample_tau,
    schedule_end_coefficients,
    schedule_loss,
    schedule_point,
    time_weight,
    window_weight,
)
from .schedule import EDM, VE, ContinuousVP, DiscreteVP, Rectified, Schedule, index, network_time, shifted
from .solver import WindowSolver
from .windows import Windows, snap

__all__ = [
    "EDM",
    "PREDICTION_TYPES",
    "VE",
    "ChordTable",
    "ContinuousVP",
    "DiscreteVP",
    "Merger",
    "Rectified",
    "Schedule",
    "WindowSolver",
    "Windows",
    "chord_loss",
    "index",
    "network_time",
    "sample_tau",
    "schedule_end_coefficients",
    "schedule_loss",
    "schedule_point",
    "shifted",
    "snap",
    "time_weight",
    "window_weight",
]
