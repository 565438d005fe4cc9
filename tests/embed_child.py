"""A process that embeds and may kill itself: the target of a fork server that has imported everything."""

import os
import signal
import threading
import time

import numpy as np

from mim_jax import embed
from mim_jax.pretrained import Model

ROWS = 8  # of a part


class Plain:
    """A network that compiles at once: patches are the means of 4 x 4 pixels."""

    stride, backbone = 4, None

    def features(self, parts, images):
        patch = images.reshape(-1, 4, 4, 4, 4, 3).mean((2, 4)).reshape(-1, 16, 3)
        return {"cls": patch[:, 0] * parts["factor"], "patch": patch}


def run(argv: list[str], files: int = 0, seconds: float = 0) -> None:
    """The command; "--run=plain" is of the plain network. If given, it is killed when so many parts are finished, or so many
    seconds after it begins."""
    embed.ROWS = ROWS
    if "--run=plain" in argv:
        embed.load = lambda _, **told: Model(Plain(), {"factor": np.float32(2)}, 16, "plain")
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
