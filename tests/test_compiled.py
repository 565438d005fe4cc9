"""Compiled programs are kept on disk, and what is damaged there is compiled anew."""

import os
import warnings

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.compilation_cache import compilation_cache

from mim_jax import compiled


@pytest.fixture
def start(tmp_path, monkeypatch):
    """As a program that starts: keeps what it compiles below `tmp_path`, and computes with a new function."""
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    names = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}

    def start() -> float:
        jax.config.update("jax_compilation_cache_dir", None)
        compilation_cache.reset_cache()
        jax.config.update("jax_enable_compilation_cache", True)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
        compiled.keep(tmp_path)
        return float(jax.jit(lambda x: jnp.sin(x @ x).sum())(jnp.ones((3, 3))))

    yield start
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def entries(folder):
    return {file.name: file.read_bytes() for file in folder.glob("*/*") if file.is_file()}


def test_the_second_start_reads_what_the_first_compiled(start, tmp_path):
    first = start()
    kept = entries(tmp_path)
    assert any("lambda" in name for name in kept)
    assert start() == first and entries(tmp_path) == kept


@pytest.mark.parametrize(
    "damage", [lambda content: content[: len(content) // 2], lambda content: b"", lambda content: content[::-1]]
)
def test_a_damaged_entry_is_compiled_anew_and_the_folder_emptied(start, tmp_path, damage, capsys):
    first = start()
    whole = entries(tmp_path)
    for file in tmp_path.glob("*/*"):
        file.write_bytes(damage(file.read_bytes()))
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        assert start() == first
    assert "the folder is emptied" in capsys.readouterr().err
    assert start() == first and entries(tmp_path).keys() == whole.keys()
    assert "emptied" not in capsys.readouterr().err


def test_the_oldest_entries_go(start, tmp_path, monkeypatch):
    for place in range(3):
        file = tmp_path / f"another/{place}"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(bytes(1000))
        os.utime(file, (place, place))
    monkeypatch.setattr(compiled, "KEPT", 2500)
    start()
    assert {file.name for file in tmp_path.glob("another/*")} == {"1", "2"}


def test_where_nothing_can_be_written_a_line_says_so(start, tmp_path, capsys):
    tmp_path.rmdir()
    tmp_path.write_text("a file")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        start()
    told = capsys.readouterr().err
    assert told.startswith("compiled programs: Error") and str(tmp_path) in told and "emptied" not in told


def test_a_cache_that_was_set_is_left(start, tmp_path):
    jax.config.update("jax_compilation_cache_dir", "mine")
    compiled.keep(tmp_path / "not made")
    assert jax.config.jax_compilation_cache_dir == "mine" and not list(tmp_path.iterdir())
