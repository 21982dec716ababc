"""Several processes, each with its own GPU and copy of the encoders, take shards until there are none left."""

from __future__ import annotations

import multiprocessing
import os
import queue
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from reflow.errors import UserError
from reflow.outputs import of_the_system, sentence

Loader = Callable[[str], Any]  # device -> base


def device_of(worker: int) -> str:
    """GPU `worker`, in turn; the CPU where there is none."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    return f"cuda:{worker % count}" if count else "cpu"


def share(work: Any, tasks: list[Any], workers: int, loader: Loader | None) -> Iterator[Any]:
    """What `work.make(task)` yields for every task, in the order in which it happens. This process is the first worker.

    The others load their base by `loader` and take the next task whenever they are free. Raises the UserError of any of
    them, and one for a worker that dies; the others then end.
    """
    workers = min(workers, len(tasks))
    if workers < 2:
        for task in tasks:
            yield from work.make(task)
        return
    context = multiprocessing.get_context("spawn")  # a forked process cannot use CUDA
    claimed, events = context.Value("q", 0), context.Queue()
    threads = max(1, (os.cpu_count() or 1) // workers)
    others = [
        context.Process(target=other, args=(work, tasks, n, threads, loader, claimed, events), daemon=True)
        for n in range(1, workers)
    ]
    for process in others:
        process.start()
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, threads))
    try:
        for task in claims(tasks, claimed):
            for event in work.make(task):
                yield event
                yield from heard(others, events)
        while any(process.is_alive() for process in others) or not events.empty():
            yield from heard(others, events, wait=0.2)
        yield from heard(others, events)
    finally:
        torch.set_num_threads(before)
        for process in others:
            process.terminate()
            process.join()


def claims(tasks: list[Any], claimed: Any) -> Iterator[Any]:
    """Tasks that no other process took."""
    while True:
        with claimed.get_lock():
            number, claimed.value = claimed.value, claimed.value + 1
        if number >= len(tasks):
            return
        yield tasks[number]


def heard(others: list[Any], events: Any, wait: float = 0.0) -> Iterator[Any]:
    """What the other workers have said since; waits at most `wait` seconds for the first word."""
    while True:
        try:
            kind, content = events.get(timeout=wait) if wait else events.get_nowait()
        except queue.Empty:
            break
        wait = 0.0
        if kind == "error":
            raise UserError(content)
        yield content
    dead = next((n for n, p in enumerate(others, 1) if p.exitcode), None)
    if dead is not None and events.empty():
        raise UserError(
            f"Worker {dead + 1} ended with exit code {others[dead - 1].exitcode} (-9: killed, often for want of "
            f"memory); run the "
            f"same command again, it goes on, or give fewer --workers."
        )


def other(work: Any, tasks: list[Any], number: int, threads: int, loader: Loader, claimed: Any, events: Any) -> None:
    """One more process: everything that it does or suffers goes into `events`."""
    try:
        torch.set_num_threads(min(torch.get_num_threads(), threads))
        work.use(loader(device_of(number)))
        for task in claims(tasks, claimed):
            for event in work.make(task):
                events.put(("event", event))
                if not multiprocessing.parent_process().is_alive():
                    os._exit(1)  # it was killed: the same command, run again, must find nobody at its shards
    except UserError as error:
        events.put(("error", str(error)))
    except KeyboardInterrupt:
        pass
    except Exception as error:  # noqa: BLE001 - whatever it is, the first process must hear of it
        system = of_the_system(error)
        if system is not None:
            events.put(("error", sentence(system)))
            return
        events.put(("error", f"Worker {number + 1} failed: {traceback.format_exc()}"))
