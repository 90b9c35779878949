"""This machine and its installed packages, described without importing them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
import subprocess
from pathlib import Path

from attrs import frozen

#: Seconds that nvidia-smi may take; with many GPUs and no persistence daemon it takes some.
NVIDIA_SMI_TIMEOUT = 30.0


@frozen
class GPU:
    """An NVIDIA GPU, as ``nvidia-smi`` reports it.

    Attributes:
        name: Its product name.
        capability: CUDA's compute capability times ten (90 for an H100).
        memory: Its memory in bytes.
        free_memory: The free part of it.
    """

    name: str
    capability: int
    memory: int
    free_memory: int


@frozen
class Machine:
    """The machine that an engine would run on.

    Attributes:
        cpu: The processor's name.
        num_threads: The CPU threads that this process may use.
        memory: The host's memory in bytes, within the control group's limit; ``None`` where it is not known.
        gpus: Its NVIDIA GPUs.
    """

    cpu: str
    num_threads: int
    memory: int | None
    gpus: tuple[GPU, ...]


def this_machine() -> Machine:
    """Return this machine; unknown values are left out."""
    return Machine(_cpu(), _num_threads(), _memory(), _gpus())


def installed_packages() -> dict[str, str]:
    """Return the versions of the installed distributions, by normalized name."""
    found: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        name, version = distribution.metadata["Name"], distribution.metadata["Version"]
        if name and version:
            found.setdefault(name.lower().replace("_", "-"), version)  # the first is the one that is imported
    return found


def _cpu() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _num_threads() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _memory() -> int | None:
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError):
        return None
    with contextlib.suppress(OSError, ValueError):  # no such group, or "max"
        memory = min(memory, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return memory


def _gpus() -> tuple[GPU, ...]:
    query = ["nvidia-smi", "--query-gpu=name,compute_cap,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(query, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ()
    gpus = []
    for line in answer.splitlines():
        with contextlib.suppress(ValueError):
            name, capability, memory, free = line.rsplit(",", 3)
            gpus.append(GPU(name.strip(), round(float(capability) * 10), int(memory) << 20, int(free) << 20))
    return tuple(gpus)
