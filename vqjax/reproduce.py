# SPDX-License-Identifier: Apache-2.0
"""Command line of `python -m vqjax.reproduce`."""

import sys

import tyro

from vqjax.settings import ReproduceSettings


def main(argv: list[str] | None = None) -> int:
    """Parses the arguments, runs or prints the table; returns the exit code."""
    settings = tyro.cli(ReproduceSettings, args=argv, prog="python -m vqjax.reproduce")
    from vqjax.pipeline import command

    def work() -> None:
        from vqjax.pipeline import reproduce

        reproduce.main(settings)

    return command.run(work, settings)


if __name__ == "__main__":
    sys.exit(main())
