"""A process that embeds and may kill itself: the target of a fork server that has imported everything."""

import os
import signal
import threading
import time

from mim_jax import embed

ROWS = 8  # of a part


def run(argv: list[str], files: int = 0, seconds: float = 0) -> None:
    """The command. If given, it is killed when so many parts are finished, or so many seconds after it begins."""
    embed.ROWS = ROWS
    folder, began = next(arg for arg in argv if arg.startswith("--out=")).removeprefix("--out=") + ".parts", time.monotonic()

    def kill() -> None:
        while True:
            names = os.listdir(folder) if os.path.isdir(folder) else []
            if files and sum(name.endswith(".npz") for name in names) >= files:
                break
            if seconds and time.monotonic() - began > seconds:
                break
            time.sleep(0.0005)
        os.kill(os.getpid(), signal.SIGKILL)

    if files or seconds:
        threading.Thread(target=kill, daemon=True).start()
    embed.main(["embed", *argv])
