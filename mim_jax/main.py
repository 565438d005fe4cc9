"""The program: `python -m mim_jax.main`, or `mim_jax`. It listens to signals before it imports what takes seconds."""

from mim_jax import stopping


def cli() -> None:
    with stopping.Stop(program=True) as stop:
        from mim_jax import command

        command.run(stop)


if __name__ == "__main__":
    cli()
