# SPDX-License-Identifier: Apache-2.0
"""Command line of `python -m vqjax.evaluate`."""

import sys

import tyro

from vqjax.settings import EvaluateSettings


def main(argv: list[str] | None = None) -> int:
    """Parses the arguments, samples and scores; returns the exit code."""
    settings = tyro.cli(EvaluateSettings, args=argv, prog="python -m vqjax.evaluate")
    from vqjax.pipeline import command

    def work() -> None:
        from vqjax.pipeline.evaluate import run

        run(settings)

    return command.run(work, settings)


if __name__ == "__main__":
    sys.exit(main())
