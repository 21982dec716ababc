"""Which backend runs: precedence, reasons said once, strictness, and life without Triton."""

import logging
import subprocess
import sys

import pytest
import torch

import op_cases as cases
import reflow_kernels
from reflow_kernels import dispatch


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """Each test starts with default settings and nothing said."""
    monkeypatch.setattr(dispatch, "_settings", ("auto", False))
    monkeypatch.setattr(dispatch, "_said", set())
    dispatch._resolve.cache_clear()
    yield
    dispatch._resolve.cache_clear()


@pytest.fixture
def ran(monkeypatch):
    """Names of the kernel modules that were used."""
    used = []
    module = dispatch.triton_module
    monkeypatch.setattr(dispatch, "triton_module", lambda name: used.append(name) or module(name))
    return used


def loss(device, **options):
    rows = torch.ones(2, 8, device=device)
    return reflow_kernels.aligned_v_loss(rows, 2 * rows, direction_weight=1.0, **options).loss


def test_auto_is_triton_on_a_gpu_and_pytorch_elsewhere(device, ran):
    loss(device)
    assert bool(ran) == (device.type == "cuda")


def test_precedence(device, ran, monkeypatch):
    reflow_kernels.configure(backend="triton")
    loss(device)
    assert ran == ["aligned_v"]
    loss(device, backend="torch")  # the argument wins over configure
    assert ran == ["aligned_v"]
    monkeypatch.setenv("REFLOW_KERNELS_BACKEND", "torch")  # the environment wins over the argument
    loss(device, backend="triton")
    assert ran == ["aligned_v"]
    monkeypatch.setenv("REFLOW_KERNELS_BACKEND", "triton")
    loss(device, backend="torch")
    assert ran == ["aligned_v"] * 2


def test_unknown_names_are_refused(device, monkeypatch):
    with pytest.raises(ValueError, match="backend is 'cuda'; expected one of 'auto', 'triton', 'torch'"):
        reflow_kernels.configure(backend="cuda")
    monkeypatch.setenv("REFLOW_KERNELS_BACKEND", "Triton")
    with pytest.raises(ValueError, match="REFLOW_KERNELS_BACKEND is 'Triton'"):
        loss(device)


def test_the_choice_is_said_once_with_its_reason(caplog):
    with caplog.at_level(logging.INFO, logger="reflow_kernels"):
        for _ in range(3):
            loss("cpu", backend="torch")
    assert caplog.messages == ["aligned_v_loss uses the torch backend: the backend argument asks for it"]
    assert caplog.records[0].levelno == logging.INFO


def test_report_covers_every_op(device):
    report = reflow_kernels.backend_report(device)
    assert [op for op, _, _ in report] == ["aligned_v_loss", "guided_step", "window_chord", "cfg_combine", "fused_adamw", "fused_adamw8bit"]
    assert all(backend == ("triton" if device.type == "cuda" else "torch") and reason for _, backend, reason in report)


def test_a_gpu_without_triton_falls_back_aloud_and_not_under_strict(monkeypatch, caplog):
    monkeypatch.setattr(dispatch, "_obstacle", lambda *device: "triton is not installed")
    gpu = torch.device("cuda", 0)
    with caplog.at_level(logging.WARNING, logger="reflow_kernels"):
        assert dispatch.select("guided_step", gpu) == "torch"
    assert caplog.messages == ["guided_step uses the torch backend: triton is not installed"]
    with pytest.raises(RuntimeError, match="guided_step cannot use Triton on cuda:0: triton is not installed"):
        dispatch.select("guided_step", gpu, strict=True)
    reflow_kernels.configure(strict=True)
    with pytest.raises(RuntimeError, match="cannot use Triton"):
        dispatch.select("guided_step", gpu)
    with pytest.raises(RuntimeError, match="asks for the triton backend, but triton is not installed"):
        dispatch.select("guided_step", gpu, backend="triton")
    assert dispatch.select("guided_step", torch.device("cpu"), strict=True) == "torch"  # nothing was lost there
    assert all(backend == "torch" for _, backend, _ in reflow_kernels.backend_report(gpu))


def python(program, **environment):
    import os

    clean = {
        name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", dispatch.ENVIRONMENT)
    }
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=clean | environment)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


IMPORT = f"import sys; sys.path.insert(0, {str(cases.ROOT / 'kernels')!r}); import torch; "


def test_import_and_cpu_use_need_no_triton():
    program = IMPORT + (
        "sys.modules['triton'] = None\n"  # importing it would raise
        "from reflow_kernels import aligned_v_loss\n"
        "rows = torch.ones(2, 8, requires_grad=True)\n"
        "aligned_v_loss(rows, 2 * rows.detach(), direction_weight=1.0).loss.backward()\n"
        "print(rows.grad.ne(0).all().item())"
    )
    assert python(program) == "True"


def test_triton_on_cpu_tensors_needs_the_interpreter():
    program = IMPORT + (
        "from reflow_kernels import cfg_combine\n"
        "try: cfg_combine(torch.ones(2, 8), 2.0, backend='triton')\n"
        "except RuntimeError as error: print(error)"
    )
    assert "the tensors are on the CPU and TRITON_INTERPRET=1 is not set. Use 'auto' or 'torch'" in python(program)


def test_a_report_names_an_impossible_wish():
    program = IMPORT + "import reflow_kernels; print(reflow_kernels.backend_report('cpu')[0])"
    report = python(program, REFLOW_KERNELS_BACKEND="triton")
    assert "none" in report and "TRITON_INTERPRET=1 is not set" in report
