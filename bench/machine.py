"""What a number needs to be believed: the machine, the versions, the commit."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "transformers", "trl", "peft", "liger_kernel", "accelerate", "tokenizers", "numpy")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_tile", "amx_bf16", "amx_int8")


def machine() -> dict[str, Any]:
    """Processor, the instruction sets that products are made of, cores, memory, system."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    known = dict(
        reversed([(key.strip(), value.strip()) for key, _, value in (x.partition(":") for x in lines)])
    )
    flags = set(known.get("flags", "").split())
    return {
        "cpu": known.get("model name", platform.processor() or platform.machine()),
        "model": f"family {known.get('cpu family', '?')} model {known.get('model', '?')}",
        "flags": [flag for flag in FLAGS if flag in flags],
        "missing_flags": [flag for flag in FLAGS if flag not in flags],
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9),
        "system": platform.platform(),
        "python": platform.python_version(),
    }


def slug(found: dict[str, Any]) -> str:
    """A file name for a machine.

    >>> slug({"cpu": "Intel(R) Xeon(R) Processor @ 2.30GHz", "cores": 2})
    'intel-xeon-processor-2-cores'
    """
    name = re.sub(r"\(.*?\)|@.*", "", found["cpu"]).lower()
    return "-".join(re.findall(r"[a-z0-9]+", name)) + f"-{found['cores']}-cores"


def version(package: str) -> str | None:
    """The installed version, or None."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def versions() -> dict[str, str | None]:
    return {name: version(name) for name in PACKAGES}


def commit() -> str | None:
    """The commit of this checkout, "-dirty" where a file differs from it; None outside one."""

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    try:
        head = git("rev-parse", "HEAD")
        return head + ("-dirty" if git("status", "--porcelain", "-uno") else "") if head else None
    except FileNotFoundError:
        return None
