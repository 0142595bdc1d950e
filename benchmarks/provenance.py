"""Where, when and with what a row was measured: its provenance, and the machine."""

import os
import platform
import subprocess
import time
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

CLOCKS = ("clocks.sm", "clocks.mem", "temperature.gpu", "power.draw")


def provenance(device: str) -> dict[str, str | float]:
    driver: dict[str, str | float] = (
        {} if device == "cpu" else {"driver": _nvidia_smi("driver_version").get("driver_version", "unknown")}
    )
    return driver | {
        "device": device,
        "versions": ", ".join(f"{name} {_version(name)}" for name in ("torch", "triton", "numpy", "fused_gp"))
        + f", Python {platform.python_version()}",
        "commit": commit(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
        "load": round(os.getloadavg()[0], 1),  # of the last minute, before the first case
    }


def machine(device: str) -> str:
    if device != "cpu":
        return torch.get_device_module(device).get_device_name()
    cpus = Path("/proc/cpuinfo")
    names = [line.split(":")[1] for line in cpus.read_text().splitlines() if line.startswith("model name")]
    name = names[0].strip() if names else platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def clocks(device: str) -> dict[str, str]:
    """Of a device, now; none where nothing tells them."""
    return {} if device == "cpu" else _nvidia_smi(*CLOCKS)


def recent_clocks(device: str) -> dict[str, str]:
    """Now or some seconds ago: to ask takes tenths of one."""
    return _clocks_at(device, int(time.monotonic() / 5))


@lru_cache(maxsize=1)
def _clocks_at(device: str, moment: int) -> dict[str, str]:
    return clocks(device)


def _nvidia_smi(*fields: str) -> dict[str, str]:
    # torch's first device may be another one of nvidia-smi's.
    uuid = getattr(torch.get_device_module("cuda").get_device_properties(0), "uuid", None)
    which = "0" if uuid is None else f"GPU-{uuid}"
    words = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader", f"--id={which}"]
    try:
        line = subprocess.run(words, check=True, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(fields, (value.strip() for value in line.split(",")), strict=False))


def commit() -> str:
    """Of the checkout; with a plus where files were changed since."""
    here = Path(__file__).parent
    try:
        head, status = (
            subprocess.run(["git", *words], cwd=here, check=True, capture_output=True, text=True).stdout.strip()
            for words in (["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"])
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if status else "")


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "missing"
