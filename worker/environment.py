"""Where a result was made: recorded with it, never part of its key. Torch is imported only where it is running anyway."""

from __future__ import annotations

import platform
import resource
import subprocess
import sys
from functools import cache
from importlib import metadata
from pathlib import Path

from pydantic import JsonValue


@cache
def code_version() -> str:
    """Version of this package, with the commit where it runs from a checkout: `0.1.0+g1a2b3c4d5e6f`."""
    try:
        version = metadata.version("ncfm")
    except metadata.PackageNotFoundError:
        version = "0"
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return version
    try:
        command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
        commit = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return version
    return f"{version}+g{commit.replace('-', '.')}"


def describe(device: str, threads: int, code: str) -> dict[str, JsonValue]:
    """Device, threads and versions of the running process."""
    import torch

    name = torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or platform.machine()
    return {
        "device": device,
        "device_name": name,
        "threads": threads,
        "code_version": code,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": sys.platform,
    }


def peak_memory(device: str) -> int:
    """Most bytes held at once: by the device's allocator, or on the CPU by the whole process."""
    import torch

    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
