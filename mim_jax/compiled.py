"""Compiled programs are kept on disk: the second start of the same run does not compile again.

This is JAX's persistent compilation cache. An entry is found by a hash of the program, of the versions of JAX and XLA, of their
flags and of the devices, so that of another program is never taken. Entries have a checksum.
"""

import contextlib
import hashlib
import platform
import sys
import warnings
from pathlib import Path
from typing import Any

import jax

KEPT = 2 * 2**30  # bytes


def keep(folder: Path) -> None:
    """Has what takes a second or more to compile kept below `folder`, and removes the oldest entries beyond KEPT bytes.

    Each kind of CPU has a subfolder, as a home may be shared: JAX's hash lacks the instructions that a CPU has. An entry that
    cannot be read, torn by a kill for example, is compiled anew, and the subfolder is emptied, with a line. A line also says
    that nothing can be written. A cache that was set otherwise, by JAX_COMPILATION_CACHE_DIR for example, is left as it is.
    """
    if jax.config.jax_compilation_cache_dir:  # type: ignore[attr-defined]
        return
    ours, size = folder / processor(), 0
    with contextlib.suppress(OSError):
        for file in sorted(folder.glob("*/*"), key=lambda file: -file.stat().st_mtime):
            size += file.stat().st_size
            if size > KEPT:
                file.unlink(missing_ok=True)
    show = warnings.showwarning

    def shown(message: Warning | str, *rest: Any, **options: Any) -> None:
        if "persistent compilation cache" not in str(message):
            return show(message, *rest, **options)
        entries = list(ours.glob("*"))
        print(f"compiled programs: {message}{'; the folder is emptied' if entries else ''}", file=sys.stderr)
        for file in entries:
            file.unlink(missing_ok=True)

    warnings.showwarning = shown
    jax.config.update("jax_compilation_cache_dir", str(ours))


def processor() -> str:
    """A name for the kind of this machine's CPU."""
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        told = sorted({line for line in lines if line.startswith(("model name", "flags", "Features"))})
        return f"{platform.machine()}-{hashlib.sha256(''.join(told).encode()).hexdigest()[:8]}"
    return platform.machine()
