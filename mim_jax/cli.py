"""What the commands beside `main` have in common: flags, and one line for what is wrong."""

import contextlib
import dataclasses
import sys
import traceback
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from absl import flags, logging

from mim_jax import compiled, storage
from mim_jax.data.sources import user_cache
from mim_jax.stopping import leave

Flags = TypeVar("Flags")
PACKAGE = Path(__file__).parent
DEFINE: dict[type, Any] = {
    str: flags.DEFINE_string,
    int: flags.DEFINE_integer,
    float: flags.DEFINE_float,
    bool: flags.DEFINE_boolean,
}


def begin(
    kind: type[Flags], argv: list[str], text: str, words: str = "", given: flags.FlagValues | None = None
) -> tuple[Flags, list[str]]:
    """The flags of a command, and its other words.

    Args:
      kind: a dataclass with a field for each flag: str, int, float, bool, one of these or None, or a Literal of texts. A flag
        without a default must be given.
      argv: the command line.
      text: what `--help` prints. The first line that begins with two spaces is the example of messages.
      words: what other words are, such as "FILE": one at least is wanted then. "": there are none. "...": there may be.
      given: flags that are defined already.

    Exits with one line for what is wrong.
    """
    if {"-h", "-help", "--help"} & set(argv):
        print(text)
        sys.exit()
    given, fields = given or flags.FlagValues(), dataclasses.fields(typing.cast(Any, kind))
    given.set_gnu_getopt()  # flags may follow other words
    hints = typing.get_type_hints(kind)
    for field in fields:
        default = None if field.default is dataclasses.MISSING else field.default
        kinds = typing.get_args(hints[field.name]) or (hints[field.name],)
        if isinstance(kinds[0], str):
            flags.DEFINE_enum(field.name, default, kinds, "", flag_values=given)
        else:
            DEFINE[kinds[0]](field.name, default, "", flag_values=given)
    try:
        rest = given(argv)[1:]
    except flags.Error as error:
        sys.exit(f"error: {error}")
    if rest and not words:
        sys.exit(f"error: not understood: {' '.join(rest)}")
    missing = [f"--{field.name}" for field in fields if field.default is dataclasses.MISSING and not given[field.name].value]
    missing += [words] if words not in ("", "...") and not rest else []
    if missing:
        example = next(line for line in text.splitlines() if line.startswith("  ")).strip()
        sys.exit(f"error: {missing[0]} is missing, for example {example}")
    logging.set_verbosity(logging.WARNING)
    compiled.keep(user_cache() / "compiled")
    return kind(**{field.name: given[field.name].value for field in fields}), rest


def of_this_machine(flag: str, value: str, what: str = "file") -> Path:
    """Raises ValueError for an address such as gs://bucket/file."""
    if storage.remote(value):
        raise ValueError(f"--{flag} is {value}, but must be a {what} of this machine")
    return Path(value).expanduser().absolute()


@contextlib.contextmanager
def in_one_line(stopped: str) -> Iterator[None]:
    """Ends the program with one line for an error that is the user's, and for Ctrl-C, after which it says `stopped`."""
    try:
        yield
    except KeyboardInterrupt:
        leave(130, stopped)
    except (OSError, ValueError, flags.Error) as error:
        if not raised_here(error):
            raise
        sys.exit(f"error: {error}")


def raised_here(error: Exception) -> bool:
    """Whether this package raised it, or the system for a file: its message is for the user, without a traceback."""
    *_, (frame, _) = traceback.walk_tb(error.__traceback__)
    here = PACKAGE in Path(frame.f_code.co_filename).parents
    return here or isinstance(error, flags.Error) or (isinstance(error, OSError) and error.filename is not None)
