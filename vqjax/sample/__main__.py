# SPDX-License-Identifier: Apache-2.0
"""Command line of `python -m vqjax.sample`."""

import dataclasses
import sys

import tyro

from vqjax.settings import SampleSettings


def main(argv: list[str] | None = None) -> int:
    """Parses the arguments and samples; returns the exit code."""
    settings = tyro.cli(SampleSettings, args=argv, prog="python -m vqjax.sample")
    from vqjax.pipeline import command

    return command.run(lambda: _work(settings), settings)


def _work(settings: SampleSettings) -> None:
    import numpy as np

    from vqjax import io, progress, sampling
    from vqjax.errors import VqjaxError
    from vqjax.io import places
    from vqjax.pipeline import environment
    from vqjax.sampling import png

    for name in ("count", "batch", "columns"):
        if getattr(settings, name) < 1:
            raise VqjaxError(f"--{name} {getattr(settings, name)}: expected 1 or more")
    places.check_file("--out", settings.out, makes_folders=True)
    model = io.load_model(settings.source, config=settings.config)
    ids = settings.classes or tuple(range(max(model.config.null_class, 1)))
    classes = np.resize(np.asarray(ids), settings.count)
    side = model.config.first_stage.resolution
    png.check_grid(settings.count, settings.columns, side, side)
    guidance = model.config.guidance if settings.guidance is None else settings.guidance
    with progress.stage("sample", settings.count) as advance:
        images = sampling.generate(
            model,
            classes,
            steps=settings.steps,
            guidance=guidance,
            eta=settings.eta,
            seed=settings.seed,
            batch_size=settings.batch,
            integer=settings.integer,
            dtype=settings.dtype,
            weight_memory=settings.weight_memory,
            on_batch=advance,
        )
    parameters = dataclasses.asdict(settings) | {"out": str(settings.out)}
    parameters |= {"classes": classes.tolist(), "guidance": guidance, "model": model.config.name}
    png.save_grid(
        settings.out, images, settings.columns, parameters | {"versions": environment.versions()}
    )
    print(settings.out)


if __name__ == "__main__":
    sys.exit(main())
