"""Sampling: the diffusers scheduler of a windowed student, guidance schedules, and a plain loop for evaluation."""

# diffusers looks for `SchedulerMixin` in the module that model_index.json names, which is this one.
from diffusers import SchedulerMixin

from reflow.sampling.flow import FlowWindowScheduler
from reflow.sampling.guidance import guidance_callback, guidance_scales
from reflow.sampling.parts import sample_parts
from reflow.sampling.piecewise import PiecewiseFlowScheduler, StepsError, contradiction
from reflow.sampling.sampler import Samples, initial_noise, sample, sample_teacher, scheduler_for, student_scheduler

__all__ = [
    "FlowWindowScheduler",
    "PiecewiseFlowScheduler",
    "Samples",
    "SchedulerMixin",
    "StepsError",
    "contradiction",
    "guidance_callback",
    "guidance_scales",
    "initial_noise",
    "sample",
    "sample_parts",
    "sample_teacher",
    "scheduler_for",
    "student_scheduler",
]
