# SPDX-License-Identifier: Apache-2.0
"""Command line of `python -m vqjax.quantize`."""

import sys

import tyro

from vqjax.settings import QuantizeSettings


def main(argv: list[str] | None = None) -> int:
    """Parses the arguments and runs; returns the exit code."""
    settings = tyro.cli(QuantizeSettings, args=argv, prog="python -m vqjax.quantize")
    from vqjax.pipeline import command

    def work() -> None:
        from vqjax.pipeline.quantize import run

        run(settings)

    return command.run(work, settings)


if __name__ == "__main__":
    sys.exit(main())
