# SPDX-License-Identifier: Apache-2.0
"""`bench tune`: what a step of tuning costs, part by part.

Codes and codebooks are random: neither the networks nor the searches take another path for them.

Dimension key:  O outputs   J vectors of a row   M codebooks   K entries   G weights of a vector
"""

import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.table import Table

from vqjax import config as config_lib
from vqjax import progress
from vqjax.bench import random_weights, work
from vqjax.bench.clock import medians_in_turn, together
from vqjax.core import cores, tree
from vqjax.core.activations import Activations
from vqjax.core.coded import CodedWeight
from vqjax.core.model import Model
from vqjax.io import native
from vqjax.pipeline import environment, memory, tuning
from vqjax.pipeline.journal import peak_memory_bytes
from vqjax.settings import BenchTuneSettings, command_line
from vqjax.train import distill, pv

PARTS = ("teacher", "forward", "backward", "P step", "V step")
_STEPS = 1000  # of the schedules, which do not run
_ACT_BITS = 8  # as by default: ranges of what layers read are trained, too


def run(wanted: BenchTuneSettings) -> None:
    """Measures, prints and writes."""
    config = config_lib.PRESETS[wanted.model]()
    model = random_weights.dense_model(config, wanted.seed)
    quantized = random_weights.quantized_model(config, wanted.bits, wanted.seed)
    quantized = random_weights.with_ranges(quantized, _ACT_BITS)
    student, activations = tuning.student_of(quantized), quantized.params["activations"]
    del quantized
    seconds: dict[str, float] = {}
    found = {
        "command": command_line("vqjax.bench", wanted, "tune"),
        "environment": environment.describe(),
        "model": wanted.model,
        "weights": sum(leaf.size for leaf in jax.tree.leaves(model.params["unet"])),
        "batch": wanted.tuning.batch,
        "seconds": seconds,
    }
    for part, median_seconds in measure(wanted, model, student, activations):
        seconds[part] = median_seconds
        found["peak_memory_bytes"] = work.accelerator_peak_bytes() or peak_memory_bytes()
        if part == PARTS[-1]:
            found["v_step_share"] = share_of_v_step(seconds)
        if wanted.json is not None:  # after each: the last takes longest to compile
            native.write_atomically(wanted.json, (json.dumps(found, indent=2) + "\n").encode())
    show(found)


def measure(
    wanted: BenchTuneSettings, model: Model, student: distill.Student, activations: Activations
) -> Iterator[tuple[str, float]]:
    """Yields each part of a step with its median seconds, compilation apart."""
    shapes = {path: tuple(leaf.shape) for path, leaf in tree.flatten(model.params).items()}
    recipe = distill.Recipe(
        steps=_STEPS,
        batch=wanted.tuning.batch,
        trajectories=wanted.tuning.batch,
        guidance=model.config.guidance,
        remat=memory.needs_remat(shapes),
        dtype=wanted.tuning.dtype,
    )
    teach = jax.jit(
        functools.partial(distill.trajectories, model.config, recipe.guidance, dtype=recipe.dtype)
    )
    t_TP = np.repeat(distill.grid(model.config, recipe)[:, None], recipe.batch, axis=1)
    ids = jnp.zeros(recipe.batch, jnp.int32) if model.config.n_classes else None
    noise = jax.random.normal(jax.random.key(0), (recipe.batch, *model.config.latent_shape))
    lesson = model.params, ids, noise, t_TP
    weight_T = jnp.ones(model.config.timesteps)

    def first(pairs: Any) -> Any:
        return jax.tree.map(lambda rows: rows[0], pairs)

    @jax.jit
    def forward(student, activations, taught):
        dense = distill.Student(distill.decoded(student.weights), student.ranges)
        return distill.weighted_loss(
            model.config,
            distill.parameters(dense, activations),
            taught,
            guidance=recipe.guidance,
            weight_T=weight_T,
            dtype=recipe.dtype,
        )

    both = jax.jit(
        functools.partial(
            distill.loss_and_gradients,
            model.config,
            activations=activations,
            guidance=recipe.guidance,
            weight_T=weight_T,
            remat=recipe.remat,
            dtype=recipe.dtype,
        )
    )
    like = jax.eval_shape(lambda: first(teach(*lesson)))
    calls = (teach, lesson), (forward, (student, activations, like)), (both, (student, like))
    taught_by, loss_of, gradients_of = together(
        lambda call: call[0].lower(*call[1]).compile(), calls
    )
    taught = first(taught_by(*lesson))
    # Every pair that the teacher made is used once.
    yield "teacher", median(taught_by, wanted.repeat, *lesson) / len(t_TP)
    forward_seconds = median(loss_of, wanted.repeat, student, activations, taught)
    yield "forward", forward_seconds
    yield "backward", median(gradients_of, wanted.repeat, student, taught) - forward_seconds
    gradients = gradients_of(student, taught)[1].weights
    variants = {
        "P step": dataclasses.replace(pv.SEMI_PV, train_codes=False),
        "both": pv.SEMI_PV,
    }
    works = {
        name: _update(wanted, variant, gradients, student.weights)
        for name, variant in variants.items()
    }
    # In turn: the V step is a difference of two times, which differ less than a machine does.
    found = medians_in_turn(works, wanted.repeat)
    yield "P step", found["P step"]
    yield "V step", found["both"] - found["P step"]


def _update(
    wanted: BenchTuneSettings, variant: pv.PVConfig, gradients, weights
) -> Callable[[], Any]:
    """What runs an update of the weights, again and again; its programs are compiled."""
    optimizer = tuning.weights_optimizer(
        _STEPS, tuning.rate_of(wanted.tuning, wanted.bits), variant
    )
    place = jax.local_devices()[0]
    arrays = weights, gradients, jax.jit(optimizer.init)(weights)
    weights, gradients, state = jax.device_put(arrays, place)

    def update() -> Any:
        nonlocal state  # an updated one is gone
        updates, state = optimizer.update(gradients, state, weights)
        return updates, state

    with jax.default_device(place):  # as threads have it: other settings are other programs
        _compile(variant, weights, state)
    return cores.as_here(update, place)


def _compile(variant: pv.PVConfig, weights: Any, state: pv.PVState) -> None:
    """Compiles the updates of all kinds of weights side by side; `update` would one by one."""
    leaves, structure = jax.tree.flatten(weights, is_leaf=_is_coded)
    pairs = zip(leaves, structure.flatten_up_to(state.leaves), strict=True)
    coded = [pair for pair in pairs if _is_coded(pair[0])]
    kinds = {repr(jax.tree.map(jax.typeof, pair)): pair for pair in coded}
    ahead = tuning.compile_ahead(variant)
    together(lambda pair: ahead([pair[0]], state._replace(leaves=[pair[1]])), [*kinds.values()])


def _is_coded(leaf: Any) -> bool:
    return isinstance(leaf, CodedWeight)


def median(work: Callable[..., Any], repeat: int, *arguments: Any) -> float:
    """Median seconds of calls, after one that compiles."""
    jax.block_until_ready(work(*arguments))
    seconds = []
    for _ in range(repeat):
        start = time.perf_counter()
        jax.block_until_ready(work(*arguments))
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def share_of_v_step(seconds: Mapping[str, float]) -> float:
    """Seconds of the V step over those of the student's forward and backward."""
    return seconds["V step"] / (seconds["forward"] + seconds["backward"])


def show(found: Mapping[str, Any]) -> None:
    """Prints the parts of a step."""
    whole = sum(found["seconds"].values())
    title = f"One step of tuning {found['model']}, {found['batch']} pairs"
    table = Table(title=title, title_justify="left")
    for name in ("part", "ms", "share"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for part in PARTS:
        seconds = found["seconds"][part]
        table.add_row(part, f"{1e3 * seconds:,.1f}", f"{seconds / whole:.1%}")
    table.add_row("step", f"{1e3 * whole:,.1f}", "", style="bold")
    console = progress.console()
    console.print(table)
    console.print(
        f"V step: {found['v_step_share']:.1%} of the student's forward and backward; "
        f"memory {found['peak_memory_bytes'] / 1e9:.2f} GB"
    )
