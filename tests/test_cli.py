"""Flags of commands, and their errors in one line."""

import dataclasses
from typing import Literal

import pytest

from mim_jax import cli

TEXT = """Does something.

  python -m mim_jax.something --run=runs/dino
  python -m mim_jax.something --run=other
"""


@dataclasses.dataclass(frozen=True)
class Flags:
    run: str
    kind: Literal["cls", "mean"] = "cls"
    size: int | None = None
    rate: float = 0.5
    head: bool = False


def test_flags_have_their_types_and_defaults():
    given, words = cli.begin(Flags, ["x", "--run=a", "b", "--size=3", "--head", "c"], TEXT, "...")
    assert given == Flags("a", size=3, head=True) and words == ["b", "c"]


@pytest.mark.parametrize(
    ("argv", "words", "told"),
    [
        ([], "", "error: --run is missing, for example python -m mim_jax.something --run=runs/dino"),
        (["--run=a"], "FILE", "error: FILE is missing, for example python -m mim_jax.something --run=runs/dino"),
        (["--run=a", "b"], "", "error: not understood: b"),
        (["--run=a", "--kind=patch"], "", "error: flag --kind=patch: value should be one of <cls|mean>"),
        (["--run=a", "--size=big"], "", "error: flag --size=big: invalid literal"),
        (["--run=a", "--sise=3"], "", "error: Unknown command line flag 'sise'. Did you mean: size ?"),
    ],
)
def test_what_is_wrong_is_one_line(argv, words, told):
    with pytest.raises(SystemExit) as stop:
        cli.begin(Flags, ["x", *argv], TEXT, words)
    assert str(stop.value).startswith(told) and "\n" not in str(stop.value)


def test_help(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.begin(Flags, ["x", "--help"], TEXT)
    assert not stop.value.code and capsys.readouterr().out.startswith(TEXT)


def test_only_errors_for_the_user_lose_their_traceback(tmp_path):
    with pytest.raises(SystemExit, match="error: --out is gs://b/a, but must be a file of this machine"):
        with cli.in_one_line("stopped"):
            cli.of_this_machine("out", "gs://b/a")
    with pytest.raises(SystemExit, match="error: .*No such file"), cli.in_one_line("stopped"):
        open(tmp_path / "none")
    with pytest.raises(ValueError, match="a fault"), cli.in_one_line("stopped"):
        raise ValueError("a fault of a library")
