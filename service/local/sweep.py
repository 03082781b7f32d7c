"""Finding and ending every process of a stack, however it was started: all carry the stack's id in their environment.

Run as a program, this is the stack's guardian: it waits until the supervisor is gone, by whatever death, and sweeps.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import psutil

STACK_ID = "NCFM_STACK_ID"
STACK_PART = "NCFM_STACK_PART"
TERM_WAIT_S = 2.0
KILL_WAIT_S = 3.0


def find(stack_id: str, part: str | None = None) -> list[psutil.Process]:
    """Live processes of a stack, or of one of its parts, and their descendants; never the caller."""
    found: dict[int, psutil.Process] = {}
    for process in psutil.process_iter():
        try:
            environ = process.environ()
            if environ.get(STACK_ID) != stack_id or part not in (None, environ.get(STACK_PART)):
                continue
            # A descendant that cleared its environment is still ours.
            for each in (process, *process.children(recursive=True)):
                if each.status() != psutil.STATUS_ZOMBIE:
                    found[each.pid] = each
        except (psutil.Error, OSError):
            # Gone meanwhile, or another user's.
            continue
    found.pop(psutil.Process().pid, None)
    return list(found.values())


def sweep(stack_id: str, part: str | None = None, *, term_wait_s: float = TERM_WAIT_S) -> int:
    """End all of them: SIGTERM, a pause, SIGKILL until none is left; returns how many there were.

    Args:
        stack_id: of the stack.
        part: only this process of the stack and what it started.
        term_wait_s: time to end by themselves; 0 for SIGKILL at once.
    """
    first = remaining = find(stack_id, part)
    if remaining and term_wait_s > 0:
        for process in remaining:
            _signal(process, kill=False)
        psutil.wait_procs(remaining, timeout=term_wait_s)
        remaining = find(stack_id, part)
    # One pass may miss what a process started while it was being found.
    for _ in range(5):
        if not remaining:
            break
        for process in remaining:
            _signal(process, kill=True)
        psutil.wait_procs(remaining, timeout=KILL_WAIT_S)
        remaining = find(stack_id, part)
    return len(first)


def _signal(process: psutil.Process, *, kill: bool) -> None:
    try:
        process.kill() if kill else process.terminate()
    except psutil.Error:
        return


def guard(stack_id: str, folder: Path) -> None:
    """Wait for the end of standard input, which the supervisor holds open, then leave nothing behind."""
    while sys.stdin.buffer.read(4096):
        continue
    sweep(stack_id)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    guard(sys.argv[1], Path(sys.argv[2]))
