"""How much memory there is for a rank: of its GPU, or of the host that it shares with others."""

import os
from pathlib import Path

import torch


def available(device: str) -> int:
    """Bytes for a rank, with what it has taken since it began: of a GPU, or a share of the host or cgroup."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
    free = [_told("/proc/meminfo", "MemAvailable:") + _told("/proc/self/status", "VmRSS:")]
    if not free[0]:  # not Linux: all there is
        free = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for name in ("memory.max", "memory/memory.limit_in_bytes"):  # of version 2, of version 1
        path = Path("/sys/fs/cgroup") / name
        if path.is_file() and (text := path.read_text(encoding="ascii").strip()).isdigit():
            free.append(int(text))
    return min(free) // int(os.environ.get("LOCAL_WORLD_SIZE", "1")) - BEGAN


def _told(path: str, name: str) -> int:
    """Bytes that a line of one of Linux's files tells in kB; 0 where there is no such file."""
    lines = Path(path).read_text(encoding="ascii").splitlines() if Path(path).exists() else []
    return next((int(line.split()[1]) for line in lines if line.startswith(name)), 0) << 10


BEGAN = _told("/proc/self/status", "VmRSS:")  # interpreter and torch, which no term counts
