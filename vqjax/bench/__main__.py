# SPDX-License-Identifier: Apache-2.0
"""Command line of `python -m vqjax.bench`."""

import sys

import tyro

from vqjax.settings import (
    BenchAblationSettings,
    BenchAqSettings,
    BenchEvaluateSettings,
    BenchGpuSettings,
    BenchKernelsSettings,
    BenchParetoSettings,
    BenchPipelineSettings,
    BenchSampleSettings,
    BenchTuneSettings,
)

Settings = (
    BenchAqSettings
    | BenchKernelsSettings
    | BenchSampleSettings
    | BenchTuneSettings
    | BenchPipelineSettings
    | BenchAblationSettings
    | BenchParetoSettings
    | BenchEvaluateSettings
    | BenchGpuSettings
)


def main(argv: list[str] | None = None) -> int:
    """Parses the arguments and measures; returns the exit code."""
    words = sys.argv[1:] if argv is None else argv
    settings = tyro.extras.subcommand_cli_from_dict(
        {
            "aq": BenchAqSettings,
            "kernels": BenchKernelsSettings,
            "sample": BenchSampleSettings,
            "tune": BenchTuneSettings,
            "pipeline": BenchPipelineSettings,
            "ablation": BenchAblationSettings,
            "pareto": BenchParetoSettings,
            "evaluate": BenchEvaluateSettings,
            "gpu": BenchGpuSettings,
        },
        args=["gpu", *words[1:]] if words[:1] == ["--gpu"] else words,
        prog="python -m vqjax.bench",
    )
    from vqjax.pipeline import command

    return command.run(lambda: _work(settings), settings)


def _work(settings: Settings) -> None:
    from vqjax.errors import VqjaxError
    from vqjax.io import places

    for name in ("json", "figure"):  # the first result may take long, a figure is drawn last
        path = getattr(settings, name, None)
        if path is not None:
            made = path.parent == getattr(settings, "work", None)
            places.check_file(f"--{name}", path, makes_folders=made)
    if isinstance(settings, BenchTuneSettings):
        from vqjax.bench import tune

        tune.run(settings)
    elif isinstance(settings, BenchPipelineSettings):
        from vqjax.bench import pipeline

        pipeline.run(settings)
    elif isinstance(settings, BenchSampleSettings):
        from vqjax.bench import sample

        sample.run(settings)
    elif isinstance(settings, BenchKernelsSettings):
        from vqjax.bench import kernels

        kernels.run(settings)
    elif isinstance(settings, BenchAblationSettings):
        from vqjax.bench import ablation

        ablation.run(settings)
    elif isinstance(settings, BenchParetoSettings):
        from vqjax.bench import pareto

        pareto.run(settings)
    elif isinstance(settings, BenchEvaluateSettings):
        from vqjax.bench import evaluate

        evaluate.run(settings)
    elif isinstance(settings, BenchGpuSettings):
        from vqjax.bench import gpu

        gpu.run(settings)
    elif (settings.inputs is None) == (settings.model is None):
        raise VqjaxError(
            "give either --inputs DIR, a folder of matrix files, or --model NAME, such as cin256-v2"
        )
    elif settings.inputs is not None:
        from vqjax.bench import matrices

        matrices.run(settings)
    else:
        from vqjax.bench import network

        network.run(settings)


if __name__ == "__main__":
    sys.exit(main())
