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
  "-m venv "*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && echo venv >>log ;;
  "-m pip install "*) echo "pip ${!#}" >>log && [ ! -e offline ] ;;
  *) echo "$*" >>log ;;
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
        self.environment = {"PATH": str(tools)}

    def launch(self, *args: str, script: str = "local.sh", **environment: str) -> list[str]:
        """What the stand-in was asked to do by one launch, from a folder that is not the checkout."""
        log = self.root / "log"
        log.unlink(missing_ok=True)
        self.result = subprocess.run(
            ["bash", self.root / "launch" / script, *args],
            cwd="/",
            env={**self.environment, **environment},
            capture_output=True,
            text=True,
        )
        return log.read_text().splitlines() if log.exists() else []


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    return Checkout(tmp_path)


def test_first_use_installs_and_second_use_only_runs(checkout: Checkout):
    run = "-m mim_jax.main --config=configs/dino.py:demo --workdir=a b"
    args = ("--config=configs/dino.py:demo", "--workdir=a b")
    assert checkout.launch(*args) == ["venv", "pip .", run]
    assert checkout.launch(*args) == [run]
    assert checkout.result.returncode == 0


def test_checks_share_the_environment(checkout: Checkout):
    checkout.launch()
    checks = checkout.launch("-k", "name", script="test.sh")
    assert checks[0] == "pip .[dev]"
    assert [line.split()[1] for line in checks[1:]] == ["ruff", "mypy", "pytest"]
    assert checks[-1].endswith("-k name")
    assert checkout.launch() == ["-m mim_jax.main"]


def test_changed_requirements_are_installed(checkout: Checkout):
    checkout.launch()
    with open(checkout.root / "requirements.txt", "a") as file:
        file.write("another>=1,<2\n")
    assert checkout.launch() == ["pip .", "-m mim_jax.main"]


def test_failed_install_is_explained_and_begun_again(checkout: Checkout):
    (checkout.root / "offline").touch()
    assert checkout.launch() == ["venv", "pip ."]
    assert checkout.result.returncode == 1 and "If it is the network" in checkout.result.stderr
    (checkout.root / "offline").unlink()
    assert checkout.launch() == ["venv", "pip .", "-m mim_jax.main"]


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
    uv.write_text('#!/bin/bash\necho "uv $1" >>log\n[ "$1" != venv ] || "${@: -2:1}" -m venv "${@: -1}"\n')
    uv.chmod(0o755)
    assert checkout.launch() == ["uv venv", "venv", "uv pip", "-m mim_jax.main"]
