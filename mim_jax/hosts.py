"""Several processes, on one host or on many, that are one run: how they start, what they tell each other, how they end.

jax connects them and notices when one dies. It has no public way to pass small texts between them, nor to end a process in
another way than by a dump of its C++ stack, so its private `_src.distributed` is used here, and nowhere else.
"""

import contextlib
import ctypes
import functools
import os
import re
import socket
import time
import warnings
import zlib
from typing import Any, NoReturn
from unittest import mock

import jax
import ml_collections
import numpy as np
from jax._src import clusters, distributed
from jax.experimental import multihost_utils

from mim_jax.checkpoint import as_dict, of_any_process
from mim_jax.config import leaves
from mim_jax.stopping import leave

TIME_LIMIT = 120  # s in which all processes must have started
SILENCE = 30  # s without a sign of life after which a process counts as dead
ANSWER = 60  # s that all have for an answer
LOST = "error: another process of this run has ended; the same command for all of them goes on from the last checkpoint"
FLAGS = "--coordinator=HOST:PORT --processes=N --process=I"
# What a call that needs all processes raises when one has died.
OF_ANOTHER = re.compile("gloo|nccl|coordination|heartbeat|barrier|connection (closed|reset)|socket closed", re.IGNORECASE)

Gone = jax.errors.JaxRuntimeError  # of `tell`, `heard` and `exchange`, when another process has died or does not answer

_handlers: list[Any] = []  # that C++ calls, kept alive
_end = 1, LOST  # exit code and last line of this process, should jax end it


def start(coordinator: str | None = None, processes: int | None = None, process: int | None = None) -> bool:
    """Connects this process with the others of its run; call it before anything uses a device.

    Without arguments, jax asks the environment: Cloud TPU, Slurm, Open MPI, or a Job of Kubernetes with an index. A laptop is
    none of these, and nothing is contacted. `processes=1` asks nobody.

    Args:
        coordinator: HOST:PORT at which process 0 listens and the others find it.
        processes: how many there are.
        process: which of them this is, from 0.

    Returns whether there are several. Raises ValueError for arguments that do not fit, and OSError when the environment does
    not say what is needed; the program ends with a line when the others are not there within TIME_LIMIT.
    """
    local = None
    if processes != 1:
        if (coordinator, processes, process) == (None, None, None):
            coordinator, processes, process, local = detected()
        else:
            check(coordinator, processes, process)
    if processes is None or processes == 1:
        return False
    assert coordinator is not None and process is not None
    connect(coordinator, processes, process, local)
    return True


def check(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Raises ValueError, in one line, for the flags of a process."""
    if None in (coordinator, processes, process):
        raise ValueError(f"of {FLAGS} all three are needed, or none where the cluster tells them")
    assert coordinator is not None and processes is not None and process is not None
    match = re.fullmatch(r"(?:[^:\s]+|\[[0-9A-Fa-f:.]+\]):(\d{1,5})", coordinator)
    if match is None or not 0 < int(match[1]) < 2**16:
        raise ValueError(f"coordinator is {coordinator!r}, but must be HOST:PORT, where process 0 listens")
    if processes < 1:
        raise ValueError(f"processes is {processes}, but must be in [1, inf)")
    if not 0 <= process < processes:
        raise ValueError(f"process is {process}, but must be in [0, {processes}), as there are {processes} processes")


def detected() -> tuple[str | None, int | None, int | None, list[int] | None]:
    """(coordinator, processes, process, local devices) of the environment as jax knows it; None for those that it does not."""
    others = dict(os.environ)
    if "JOB_COMPLETION_INDEX" not in others:  # a pod on its own, of which jax would ask the server of Kubernetes
        others.pop("KUBERNETES_SERVICE_HOST", None)
    unset, address = (None,) * 4, os.environ.get("JAX_COORDINATOR_ADDRESS")
    try:
        with mock.patch.dict(os.environ, others, clear=True), warnings.catch_warnings(record=True):
            # of jax, four unknowns, the method, and a time limit in seconds
            found = clusters.ClusterEnv.auto_detect_unset_distributed_params(address, *unset, TIME_LIMIT)
    except Exception as error:  # of any type that the libraries of the clusters raise
        raise OSError(f"the cluster does not tell which process this is: {brief(error)}; {FLAGS} does") from error
    coordinator, processes, process, local = found
    rank = os.environ.get("JOB_COMPLETION_INDEX", os.environ.get("OMPI_COMM_WORLD_RANK"))
    if process is None and rank is not None:  # Kubernetes without its package, Open MPI 5
        how = f"install jax[k8s] on Kubernetes, or give {FLAGS}, or --processes=1"
        raise OSError(f"this is process {rank} of a job in which jax does not find the others: {how}")
    return coordinator, processes, process, None if local is None or one_a_host() else list(local)


def one_a_host() -> bool:
    """Whether Slurm or Open MPI runs one process on each host. It uses all devices there, where jax would give it one."""
    slurm = os.environ.get("SLURM_STEP_TASKS_PER_NODE", os.environ.get("SLURM_TASKS_PER_NODE", ""))
    return bool(re.fullmatch(r"1(\(x\d+\))?", slurm)) or os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE") == "1"


def connect(coordinator: str, processes: int, process: int, local: list[int] | None = None) -> None:
    """`jax.distributed.initialize`, after which the death of another process ends this one with a line."""
    global _end
    port = int(coordinator.rpartition(":")[2])
    try:
        if process == 0:
            socket.create_server(("", port)).close()  # jax dies of a port that is taken
    except OSError as error:
        raise OSError(f"process 0 cannot listen at port {port}, of coordinator {coordinator}: {error.strerror}") from error
    late = f"process {process} of {processes} could not meet the others at {coordinator} within {TIME_LIMIT} s"
    _end = 1, f"error: {late}"
    catch_terminate()
    make = functools.partial(distributed._jax.get_distributed_runtime_client, missed_heartbeat_callback=lambda *_: ended())
    try:
        with mock.patch.object(distributed._jax, "get_distributed_runtime_client", make):
            jax.distributed.initialize(
                coordinator,
                processes,
                process,
                local,
                cluster_detection_method="deactivate",
                initialization_timeout=TIME_LIMIT,
                heartbeat_timeout_seconds=SILENCE,
            )
    except RuntimeError as error:  # `bad_cast`, as below, when the time is over
        raise OSError(late if "bad_cast" in str(error) else f"{late}: {brief(error)}") from error
    _end = 1, LOST
    check_count(processes)


def check_count(processes: int) -> None:
    """Raises ValueError if process 0 and another one were started with different numbers of processes."""
    own = distributed.global_state.process_id
    client().key_value_set(f"processes/{own}", str(processes))
    for other in range(processes) if own == 0 else [0]:
        count = int(client().blocking_key_value_get(f"processes/{other}", 1000 * ANSWER))
        if count != processes:
            (one, its), (two, theirs) = sorted([(own, processes), (other, count)])
            raise ValueError(f"process {one} was started with processes={its}, process {two} with {theirs}")


def ended() -> None:
    leave(*_end)


def catch_terminate() -> None:
    """jaxlib (0.10) cannot call a callback of Python about a process that died: C++ then ends the program by a `bad_cast`."""
    try:
        library = ctypes.CDLL("libstdc++.so.6")
        set_terminate, exception_type = library._ZSt13set_terminatePFvvE, library.__cxa_current_exception_type
    except (AttributeError, OSError):  # another C++ library
        return
    exception_type.restype, set_terminate.restype = ctypes.c_void_p, ctypes.CFUNCTYPE(None)

    def terminate() -> None:
        kind = ctypes.cast(exception_type(), ctypes.POINTER(ctypes.c_char_p))
        if kind and kind[1] == b"St8bad_cast":
            ended()
        before()

    _handlers.append(ctypes.CFUNCTYPE(None)(terminate))
    before = set_terminate(_handlers[-1])


def client() -> Any:
    """Of jax's coordination service; None where this process is the only one."""
    return distributed.global_state.client


def several() -> bool:
    return client() is not None and distributed.global_state.num_processes > 1


def first() -> bool:
    return distributed.global_state.process_id == 0


def check_same(config: ml_collections.ConfigDict) -> None:
    """Raises ValueError in all processes if they do not have one config; data may lie elsewhere on each host."""
    if jax.process_count() == 1:
        return
    items = [f"{key}={value}" for key, value in leaves(as_dict(config)) if key not in ("data.dir", "data.workers")]
    own = np.zeros(1000, np.uint32)
    own[: len(items)] = [zlib.crc32(item.encode()) for item in items]
    want, who = multihost_utils.broadcast_one_to_all(own), f"process {jax.process_index()} on {socket.gethostname()}"
    problem = next((f"{who} has {item}: not as process 0" for item, a, b in zip(items, own, want) if a != b), "")
    if problem := of_any_process(problem):
        raise ValueError(problem)


def tell(name: str) -> None:
    """Tells all processes, see `heard`."""
    client().key_value_set(name, "told", allow_overwrite=True)


def heard(name: str, wait_s: float) -> bool:
    """Whether any process tells this name within some seconds."""
    try:
        client().blocking_key_value_get(name, round(1000 * wait_s))
        return True
    except Gone as error:
        if not overdue(error):
            raise
        return False


def overdue(error: Exception) -> bool:
    """Whether the time for an answer is over; else another process has died, and jax is ending this one, too."""
    return "DEADLINE_EXCEEDED" in str(error)


def exchange(name: str, value: int) -> list[int]:
    """The values of all processes, by their numbers. Needs no device. All must call it, once for each name."""
    client().key_value_set(f"{name}/{distributed.global_state.process_id}", str(value))
    count = distributed.global_state.num_processes
    each = (client().blocking_key_value_get(f"{name}/{i}", 1000 * ANSWER) for i in range(count))
    return [int(value) for value in each]


def fail(error: Exception, line: str) -> NoReturn:
    """Ends this process, with a line, after an error. If it may come of another process that died, jax has the first word."""
    if OF_ANOTHER.search(str(error)):
        time.sleep(2 * SILENCE)
    finish(1, line)


def finish(code: int, line: str = "") -> NoReturn:
    """Ends this process when the others end with the same code; after some seconds, if it is an error and they do not."""
    global _end
    _end = code, ""
    if line:
        os.write(2, f"{line}\n".encode())
    with contextlib.suppress(Gone):
        client().wait_at_barrier(f"end {code}", 1000 * (5 if code else 10 * ANSWER))
    leave(code)


def brief(error: Exception) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)
