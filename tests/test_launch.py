"""The launch scripts, with a stand-in for Python that notes what it is asked to do: no environment is really made.

Stand-ins for gcloud, srun and others start the processes of a cluster on this machine.
"""

import contextlib
import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from mim_jax import journal

ROOT = Path(__file__).parent.parent

# `-m venv DIR` copies itself to DIR/bin/python; `-m pip install` fails while a file named `offline` is there. A run whose
# workdir is `long` lasts until SIGTERM; one whose workdir is `bad` fails.
STAND_IN = """#!/bin/bash
case "$*" in
  *version_info\\ \\<*) exit "${UNFIT:-0}" ;;
  *print*) echo 3.12 ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo venv >>"$LOG" ;;
  "-m pip install "*) echo "pip ${!#}" >>"$LOG" && [ ! -e offline ] ;;
  *) echo "$*" >>"$LOG" && echo "$PWD" >>"$LOG.folders"
    case "$*" in
      *--workdir=bad) exit 3 ;;
      *--workdir=long)
        trap 'echo saved; exit 0' TERM
        echo training
        for _ in {1..2000}; do sleep 0.05; done ;; # it ends, also if its test fails
    esac ;;
esac
"""

# gcloud: each folder in $HOSTS is a host, and has a log of its own.
GCLOUD = """#!/bin/bash
[[ "$1 $2 $3" == "compute tpus tpu-vm" ]] || exit 9
echo "gcloud ${*:4:3}" >>"$LOG"
for argument; do
  case $argument in
    --worker=all) worker='*' ;;
    --worker=*) worker=${argument#*=} ;;
    --command=*) command=${argument#*=} ;;
  esac
done
code=0
for host in "$HOSTS"/$worker; do
  case $4 in
    scp) cp "$5" "$host" ;;
    ssh) (cd "$host" && HOME=$host LOG=$host/log exec bash -c "$command") & processes+=($!) ;;
  esac
done
for process in "${processes[@]}"; do wait "$process" || code=$?; done
exit "$code"
"""
UV = """#!/bin/bash
case $1 in venv) echo "uv venv ${*: -3:2}" ;; *) echo "uv $1 ${!#}" ;; esac >>"$LOG"
[ "$1" != venv ] || { mkdir -p "${!#}/bin" && cp "$TOOLS/python3.12" "${!#}/bin/python"; }
"""
# curl brings a script that installs uv, as astral.sh's does.
CURL = """#!/bin/bash
echo "curl ${!#}" >>"$LOG"
echo 'mkdir -p "$HOME/.local/bin" && cp "$TOOLS/../uv" "$HOME/.local/bin/uv"'
"""
# Two tasks, whose numbers are those of Slurm.
SRUN = """#!/bin/bash
echo "srun $1" >>"$LOG"
rm -f "$LOG.tasks"
export SLURM_NTASKS=2 SLURM_STEP_NODELIST=localhost
for task in 0 1; do SLURM_PROCID=$task SLURM_LOCALID=$task LOG=$LOG.$task "${@:2}" & echo $! >>"$LOG.tasks"; done
for process in $(<"$LOG.tasks"); do wait "$process" || code=$?; done
exit "${code:-0}"
"""
SCANCEL = """#!/bin/bash
echo "scancel $*" >>"$LOG"
kill -TERM $(<"$LOG.tasks")
"""
SCONTROL = """#!/bin/bash
echo "scontrol $*" >>"$LOG"
"""


class Checkout:
    """A copy of the launch scripts in an empty folder, next to a PATH with nothing but the system and the stand-in."""

    def __init__(self, root: Path):
        self.root = root / "a checkout"
        shutil.copytree(ROOT / "launch", self.root / "launch")
        for name in ("requirements.txt", "pyproject.toml"):
            shutil.copy(ROOT / name, self.root)
        tools = root / "bin"
        tools.mkdir()
        for tool in ("bash", "cat", "cmp", "cp", "dirname", "flock", "mkdir", "rm", "sleep", "touch"):
            if found := shutil.which(tool):
                (tools / tool).symlink_to(found)
        self.stand_in = self.tool("python3.12", STAND_IN)
        self.log = root / "log"
        self.environment = {"PATH": str(tools), "LOG": str(self.log)}
        self.elsewhere = root / "elsewhere"
        self.elsewhere.mkdir()
        self.hosts: list[Path] = []

    def tool(self, name: str, content: str) -> Path:
        """Puts a stand-in on the PATH."""
        path = self.root.parent / "bin" / name
        path.write_text(content)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return path

    def start(self, *args: str, script: str = "local.sh", **environment: str) -> subprocess.Popen[str]:
        """One launch from the folder `elsewhere`."""
        self.log.unlink(missing_ok=True)
        return subprocess.Popen(
            ["bash", self.root / "launch" / script, *args],
            cwd=self.elsewhere,
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def launch(self, *args: str, script: str = "local.sh", **environment: str) -> list[str]:
        """What the stand-in was asked to do by one launch."""
        process = self.start(*args, script=script, **environment)
        written = process.communicate(timeout=60)
        self.result = subprocess.CompletedProcess(args, process.returncode, *written)
        return self.noted()

    def noted(self, log: Path | None = None) -> list[str]:
        log = log or self.log
        return log.read_text().splitlines() if log.exists() else []

    def ran_in(self) -> Path:
        """The folder of the last thing that ran."""
        return Path(self.log.with_suffix(".folders").read_text().splitlines()[-1])


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_first_use_installs_and_second_use_only_runs(checkout: Checkout):
    run = "-P -m mim_jax.main --config=configs/dino.py:demo --workdir=a b"
    args = ("--config=configs/dino.py:demo", "--workdir=a b")
    assert checkout.launch(*args) == ["venv", "pip .", run]
    assert checkout.launch(*args) == [run]
    assert checkout.result.returncode == 0
    assert checkout.ran_in() == checkout.elsewhere  # relative paths start where the user stood


def test_checks_share_the_environment(checkout: Checkout):
    checkout.launch()
    checks = checkout.launch("-k", "name", script="test.sh")
    assert checks[0] == "pip .[dev]"
    assert [line.split()[1] for line in checks[1:]] == ["ruff", "mypy", "pytest"]
    assert checks[-1].endswith("-k name")
    assert checkout.ran_in() == checkout.root
    assert checkout.launch() == ["-P -m mim_jax.main"]


def test_other_libraries_have_an_environment_of_their_own(checkout: Checkout):
    checks = checkout.launch("-m", "peers", "-k", "name", script="test.sh")
    assert checks[:2] == ["venv", "pip .[dev,peers]"] and checks[-1].endswith("-m peers -k name")
    assert checkout.launch("-m", "slow", script="test.sh")[:2] == ["venv", "pip .[dev]"]
    assert {path.name for path in checkout.root.glob(".venv*/")} == {".venv", ".venv-peers"}


def test_paths_of_tests_are_those_of_the_folder_or_the_checkout(checkout: Checkout):
    (checkout.elsewhere / "mine.py").touch()
    checks = checkout.launch("mine.py::test", "tests/theirs.py", script="test.sh")
    assert checks[-1].endswith(f" {checkout.elsewhere}/mine.py::test tests/theirs.py")


def test_changed_requirements_are_installed(checkout: Checkout):
    checkout.launch()
    with open(checkout.root / "requirements.txt", "a") as file:
        file.write("another>=1,<2\n")
    assert checkout.launch() == ["pip .", "-P -m mim_jax.main"]


def test_failed_install_is_explained_and_begun_again(checkout: Checkout):
    (checkout.root / "offline").touch()
    assert checkout.launch() == ["venv", "pip ."]
    assert checkout.result.returncode == 1 and "If it is the network" in checkout.result.stderr
    (checkout.root / "offline").unlink()
    assert checkout.launch() == ["venv", "pip .", "-P -m mim_jax.main"]


def test_python_and_extras_are_chosen_by_the_environment(checkout: Checkout):
    checkout.launch()
    assert checkout.launch(PYTHON="python3.12", EXTRAS="cuda13,tpu")[:2] == ["venv", "pip .[cuda13,tpu]"]
    assert {path.name for path in checkout.root.glob(".venv*/")} == {".venv", ".venv-3.12"}


@pytest.mark.parametrize("python", ["", "python3.12", "/no/such/python"])
def test_no_suitable_python_is_explained(checkout: Checkout, python: str):
    assert checkout.launch(UNFIT="1", PYTHON=python) == []
    assert checkout.result.returncode == 1 and "needs Python 3.11, 3.12 or 3.13" in checkout.result.stderr
    assert not list(checkout.root.glob(".venv*/"))


def test_uv_is_preferred(checkout: Checkout):
    checkout.tool("uv", UV)
    assert checkout.launch(TOOLS=str(checkout.stand_in.parent)) == [
        "uv venv --python python3.12",
        "uv pip .",
        "-P -m mim_jax.main",
    ]


def test_uv_brings_python_where_none_suits(checkout: Checkout):
    checkout.tool("uv", UV)
    tools = {"TOOLS": str(checkout.stand_in.parent), "UNFIT": "1"}
    assert checkout.launch(**tools) == ["uv venv --python 3.13", "uv pip .", "-P -m mim_jax.main"]
    assert checkout.launch(PYTHON="python3.12", **tools) == [] and checkout.result.returncode == 1


def soon(condition: Callable[[], Any], seconds: float = 60) -> None:
    """Waits until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


@pytest.fixture
def pod(checkout: Checkout) -> Checkout:
    """A checkout beside two hosts, on which there is neither uv nor the code."""
    for tool in ("env", "gzip", "mktemp", "nohup", "rm", "sed", "sh", "tar", "true"):
        if not (link := checkout.stand_in.with_name(tool)).exists():
            link.symlink_to(shutil.which(tool) or tool)
    checkout.tool("gcloud", GCLOUD)
    checkout.tool("curl", CURL)
    checkout.tool("tail", f'#!/bin/bash\nexec {shutil.which("tail")} -s 0.05 "$@"\n')  # looks more often
    checkout.tool("uv", UV).rename(checkout.root.parent / "uv")
    for name in ("LICENSE", "README.md", "configs/dino.py", "mim_jax/main.py", "mim_jax/__pycache__/main.pyc"):
        (checkout.root / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout.root / name).touch()
    checkout.hosts = [checkout.root.parent / "hosts" / str(i) for i in range(2)]
    for host in checkout.hosts:
        host.mkdir(parents=True)
    checkout.environment |= {"HOSTS": str(checkout.hosts[0].parent), "TOOLS": str(checkout.stand_in.parent)}
    return checkout


def test_a_pod_is_installed_and_started_from_nothing(pod: Checkout):
    arguments = ("my-tpu", "us-west4-a", "--config=dino:vits16", "--workdir=gs://b/a run", '--config.total="3 steps"')
    ran = pod.launch(*arguments, script="tpu_pod.sh")
    assert pod.result.returncode == 0, pod.result.stderr
    assert ran[0].startswith("gcloud scp /") and ran[0].endswith("/mim_jax.tgz my-tpu:")
    assert ran[1:] == ["gcloud ssh my-tpu --zone=us-west4-a"] * 3
    run = f"-P -m mim_jax.main {' '.join(arguments[2:])}"
    for host in pod.hosts:
        assert pod.noted(host / "log") == [
            "curl https://astral.sh/uv/install.sh",
            "uv venv --python python3.12",
            "uv pip .[tpu,gcs]",
            "-P -m mim_jax.main --help",
            run,
        ]
        assert not (host / "mim_jax/mim_jax/__pycache__").exists()

    (pod.root / "mim_jax/main.py").rename(pod.root / "mim_jax/other.py")
    pod.launch(*arguments, script="tpu_pod.sh")
    for host in pod.hosts:  # with the code as it is now, and nothing installed again
        assert pod.noted(host / "log")[5:] == ["-P -m mim_jax.main --help", run]
        assert [path.name for path in (host / "mim_jax/mim_jax").iterdir()] == ["other.py"]


def test_a_run_on_a_pod_is_shown_and_stopped(pod: Checkout):
    arguments = ("my-tpu", "us-west4-a", "--config=dino:vits16", "--workdir=long")
    showing = pod.start(*arguments, script="tpu_pod.sh")
    logs = [host / "mim_jax.log" for host in pod.hosts]
    soon(lambda: all(pod.noted(log) == ["training"] for log in logs))
    pod.launch(*arguments, script="tpu_pod.sh")
    assert pod.result.returncode == 1 and "A run is in progress here" in pod.result.stderr
    assert all(pod.noted(log) == ["training"] for log in logs)
    pod.launch("my-tpu", "us-west4-a", "stop", script="tpu_pod.sh")
    assert pod.result.stdout == "training\nsaved\n"
    assert showing.communicate(timeout=60)[0] == "training\nsaved\n"
    assert all(pod.noted(log) == ["training", "saved"] for log in logs)


def test_a_run_on_a_pod_that_failed_is_told(pod: Checkout):
    pod.launch("my-tpu", "us-west4-a", script="tpu_pod.sh")
    assert pod.result.returncode == 1 and pod.result.stderr.startswith("No run was started here.\n")
    for host, line in zip(pod.hosts, ("error: another process of this run has ended", "error: a full disk")):
        (host / "mim_jax.log").write_text(f"training\n{line}\n")
        (host / "mim_jax.pid").write_text(str(2**22 + 1))  # of no process
    pod.launch("my-tpu", "us-west4-a", script="tpu_pod.sh")
    assert pod.result.returncode == 1 and "error: another process" in pod.result.stdout
    assert "error: a full disk" in pod.result.stderr


def test_a_pod_that_cannot_be_installed_does_not_start(pod: Checkout):
    pod.tool("curl", "#!/bin/bash\nexit 7\n")
    pod.launch("my-tpu", "us-west4-a", "--config=dino:vits16", script="tpu_pod.sh", UNFIT="1")
    assert pod.result.returncode != 0 and "needs Python 3.11" in pod.result.stderr
    assert not any(pod.noted(host / "log") for host in pod.hosts)


def test_a_pod_needs_a_name_and_a_zone(pod: Checkout):
    for arguments in (["my-tpu"], ["--config=dino:vits16", "--workdir=gs://bucket/run"]):
        assert pod.launch(*arguments, script="tpu_pod.sh") == []
        assert pod.result.returncode == 1 and "bash launch/tpu_pod.sh NAME ZONE --config=" in pod.result.stderr


@pytest.fixture
def slurm(checkout: Checkout) -> Checkout:
    """Two tasks; sbatch runs a copy of the script, from the folder where it was submitted."""
    for name, content in {"srun": SRUN, "scancel": SCANCEL, "scontrol": SCONTROL}.items():
        checkout.tool(name, content)
    (checkout.root / "launch/slurm.sh").rename(checkout.elsewhere / "slurm_script")
    checkout.environment |= {"SLURM_SUBMIT_DIR": str(checkout.root), "SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "8"}
    return checkout


SLURM = "../../elsewhere/slurm_script"


def test_slurm_starts_a_process_for_each_gpu(slurm: Checkout):
    arguments = ("--config=dino:vits16", "--workdir=a b")
    assert slurm.launch(*arguments, script=SLURM) == ["venv", "pip .[cuda13]", "srun --cpus-per-task=8"]
    assert slurm.result.returncode == 0, slurm.result.stderr
    for task in range(2):
        assert slurm.noted(slurm.log.with_name(f"log.{task}")) == [f"-P -m mim_jax.main {' '.join(arguments)}"]
        assert slurm.noted(slurm.log.with_name(f"log.{task}.folders")) == [str(slurm.root)]


def test_slurm_queues_the_job_again_when_its_time_is_up(slurm: Checkout):
    job = slurm.start("--workdir=long", script=SLURM)
    soon(lambda: all(slurm.noted(slurm.log.with_name(f"log.{task}")) for task in range(2)))
    job.send_signal(signal.SIGUSR1)
    assert job.communicate(timeout=60)[0] == "training\ntraining\nsaved\nsaved\n" and job.returncode == 0
    assert slurm.noted()[-2:] == ["scancel --signal=TERM 42", "scontrol requeue 42"]


def test_slurm_waits_for_a_run_that_is_told_to_stop(slurm: Checkout):
    job = slurm.start("--workdir=long", script=SLURM)
    soon(lambda: all(slurm.noted(slurm.log.with_name(f"log.{task}")) for task in range(2)))
    job.send_signal(signal.SIGTERM)
    time.sleep(0.2)
    assert job.poll() is None
    for process in slurm.noted(slurm.log.with_name("log.tasks")):
        os.kill(int(process), signal.SIGTERM)
    assert job.communicate(timeout=60)[0] == "training\ntraining\nsaved\nsaved\n"
    assert slurm.noted()[-1] == "srun --cpus-per-task=8"  # and not queued again


def test_slurm_reports_a_run_that_fails_and_a_wrong_folder(slurm: Checkout):
    slurm.launch("--workdir=bad", script=SLURM)
    assert slurm.result.returncode == 3 and slurm.noted()[-1] == "srun --cpus-per-task=8"
    slurm.launch(script=SLURM, SLURM_SUBMIT_DIR=str(slurm.elsewhere))
    assert slurm.result.returncode == 1 and "Submit it from the root of the checkout" in slurm.result.stderr


@pytest.mark.slow
def test_slurm_trains_stops_in_time_and_goes_on(slurm: Checkout, tmp_path: Path):
    """The real program, which jax tells its number and the host of process 0 from Slurm's variables."""
    images, run, rng = tmp_path / "images", tmp_path / "run", np.random.default_rng(0)
    for i in range(48):
        path = images / f"class_{i % 2}/{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(path)
    installed = slurm.root / ".venv/bin/python"
    installed.parent.mkdir(parents=True)
    installed.write_text(f'#!/bin/bash\nexec {sys.executable} "$@"\n')
    installed.chmod(0o755)
    wanted = [f"{slurm.root}\n", *((slurm.root / name).read_text() for name in ("requirements.txt", "pyproject.toml"))]
    (slurm.root / ".venv/installed-cuda13").write_text("".join(wanted))
    arguments = [f"--config={ROOT}/tests/tiny.py:mae", f"--config.data.dir={images}", f"--workdir={run}", "--compiled="]
    arguments += ["--config.total=30 steps", "--config.eval.every=never"]
    slurm.environment |= os.environ | slurm.environment | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    slurm.environment["SLURM_JOB_ID"] = str(os.getpid())  # of which jax makes a port

    def steps() -> list[int]:
        return [row["step"] for row in journal.read(run) if "train/loss" in row]

    job = slurm.start(*arguments, script=SLURM)
    try:
        soon(lambda: job.poll() is not None or len(steps()) > 3, seconds=600)
        job.send_signal(signal.SIGUSR1)
        _, told = job.communicate(timeout=300)
    finally:
        for process in map(int, slurm.noted(slurm.log.with_name("log.tasks"))):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    assert job.returncode == 0 and f"scontrol requeue {os.getpid()}" in slurm.noted(), told
    assert steps() == list(range(1, 1 + len(steps()))) and 3 < len(steps()) < 30

    job = slurm.start(*arguments, script=SLURM)
    _, told = job.communicate(timeout=600)
    assert job.returncode == 0 and "resuming after step" in told and "report: " in told, told
    assert slurm.noted() == ["srun --cpus-per-task=8"] and steps() == list(range(1, 31))


# The fields of a JobSet (jobset.x-k8s.io/v1alpha2, as of JobSet 0.9) and of Kubernetes' Job and Pod that gke.yaml has, and what
# they hold. A list stands for items of one kind, and the key `str` for any name.
STRINGS = {str: str}
JOBSET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "annotations": STRINGS},
    "spec": {
        "failurePolicy": {"maxRestarts": int},
        "replicatedJobs": [
            {
                "name": str,
                "template": {
                    "spec": {
                        "parallelism": int,
                        "completions": int,
                        "backoffLimit": int,
                        "template": {
                            "spec": {
                                "nodeSelector": STRINGS,
                                "restartPolicy": str,
                                "terminationGracePeriodSeconds": int,
                                "volumes": [{"name": str, "configMap": {"name": str}, "emptyDir": {"medium": str}}],
                                "containers": [
                                    {
                                        "name": str,
                                        "image": str,
                                        "resources": {"limits": {str: int}},
                                        "securityContext": {"capabilities": {"add": [str]}},
                                        "volumeMounts": [{"name": str, "mountPath": str}],
                                        "command": [str],
                                        "args": [str],
                                    }
                                ],
                            }
                        },
                    }
                },
            }
        ],
    },
}


def wrong(value: Any, fields: Any, path: str = "") -> list[str]:
    """The paths in `value` that are not as `fields` has them."""
    if isinstance(fields, type):
        return [] if type(value) is fields else [path]
    if isinstance(fields, list):
        return [each for i, item in enumerate(value) for each in wrong(item, fields[0], f"{path}[{i}]")]
    known = {key: fields.get(key, fields.get(type(key))) for key in value}
    return [
        each
        for key, item in value.items()
        for each in ([f"{path}.{key}"] if known[key] is None else wrong(item, known[key], f"{path}.{key}"))
    ]


def test_gke_has_the_fields_of_a_jobset():
    jobset = yaml.safe_load((ROOT / "launch/gke.yaml").read_text())
    assert wrong(jobset, JOBSET) == []
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    sides = pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")
    assert math.prod(map(int, sides)) == job["completions"] * container["resources"]["limits"]["google.com/tpu"]
    assert job["completions"] == job["parallelism"] and job["backoffLimit"] == 0 and pod["restartPolicy"] == "Never"
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}


@pytest.mark.parametrize("workdir", ["runs/a b", "bad", "long"])
def test_gke_runs_what_local_does(pod: Checkout, workdir: str):
    text = (ROOT / "launch/gke.yaml").read_text()
    jobset = yaml.safe_load(text)
    container = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"][0]
    packed = re.search(r"tar -cz .*\.txt", text)
    assert packed and packed[0] in (ROOT / "launch/tpu_pod.sh").read_text()
    host, code = pod.hosts[0], pod.root.parent / "code"
    code.mkdir()
    subprocess.run(["bash", "-c", f"{packed[0]} >{code}/tgz"], cwd=pod.root, env=pod.environment, check=True)
    command = [part.replace("/code/", f"{code}/") for part in container["command"]]
    arguments = ["--config=dino:vits16", f"--workdir={workdir}"]
    environment = pod.environment | {"BASH_FUNC_ulimit%%": '() { echo ulimit "$@" >>"$LOG"; }'}
    process = subprocess.Popen([*command, *arguments], cwd=host, env=environment, stdout=subprocess.PIPE, text=True)
    if workdir == "long":
        soon(lambda: pod.noted()[-1:] == [f"-P -m mim_jax.main {' '.join(arguments)}"])
        process.terminate()
    written, _ = process.communicate(timeout=60)
    assert pod.noted() == ["ulimit -l 68719476736", "venv", "pip .[tpu,gcs]", f"-P -m mim_jax.main {' '.join(arguments)}"]
    assert (process.returncode, written) == {"bad": (3, ""), "long": (1, "training\nsaved\n")}.get(workdir, (0, ""))
