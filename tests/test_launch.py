"""The launch scripts, with a stand-in for Python that notes what it is asked to do: no environment is really made."""

import shutil
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# `-m venv DIR` copies itself to DIR/bin/python; `-m pip install` fails while a file named `offline` is there.
STAND_IN = """#!/bin/bash
case "$*" in
  *version_info\\ \\<*) exit "${UNFIT:-0}" ;;
  *print*) echo 3.12 ;;
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo venv >>"$LOG" ;;
  "-m pip install "*) echo "pip ${!#}" >>"$LOG" && [ ! -e offline ] ;;
  *) echo "$*" >>"$LOG" && echo "$PWD" >>"$LOG.folders" ;;
esac
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
        for tool in ("bash", "cat", "cmp", "cp", "dirname", "flock", "mkdir", "rm", "touch"):
            if found := shutil.which(tool):
                (tools / tool).symlink_to(found)
        self.stand_in = tools / "python3.12"
        self.stand_in.write_text(STAND_IN)
        self.stand_in.chmod(self.stand_in.stat().st_mode | stat.S_IXUSR)
        self.log = root / "log"
        self.environment = {"PATH": str(tools), "LOG": str(self.log)}
        self.elsewhere = root / "elsewhere"
        self.elsewhere.mkdir()

    def launch(self, *args: str, script: str = "local.sh", **environment: str) -> list[str]:
        """What the stand-in was asked to do by one launch from the folder `elsewhere`."""
        self.log.unlink(missing_ok=True)
        self.result = subprocess.run(
            ["bash", self.root / "launch" / script, *args],
            cwd=self.elsewhere,
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
        )
        return self.log.read_text().splitlines() if self.log.exists() else []

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
    uv = checkout.stand_in.with_name("uv")
    uv.write_text('#!/bin/bash\necho "uv $1" >>"$LOG"\n[ "$1" != venv ] || "${@: -2:1}" -m venv "${@: -1}"\n')
    uv.chmod(0o755)
    assert checkout.launch() == ["uv venv", "venv", "uv pip", "-P -m mim_jax.main"]
