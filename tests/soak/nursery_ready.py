"""Imported once by the process that all others are forked from: what every command imports, and the digits model and data in memory."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")

from reflow.quiet import quiet_libraries

quiet_libraries()

import torch
from torch.utils.tensorboard import SummaryWriter  # noqa: F401

import tiny
from reflow.commands import export, prepare, train  # noqa: F401
from reflow.recipes import reading
from reflow.training import engine, run

torch.set_num_threads(1)  # a thread pool does not survive a fork
engine.load_deepspeed()
tiny.load_once()
run.encode_digits(run.load_base(reading.load("digits"), torch.device("cpu")))
