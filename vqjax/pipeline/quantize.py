# SPDX-License-Identifier: Apache-2.0
"""The main job: fold, calibrate, plan, compress, save, sample, report. Killed, it resumes."""

import contextlib
import dataclasses
import json
import math
import pathlib
import sys
import time
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np
import threadpoolctl

from vqjax import config as config_lib
from vqjax import io, progress, settings
from vqjax.core import folding, grouping, tree
from vqjax.core.compress import LayerStats, compress_layer
from vqjax.core.model import Model
from vqjax.core.moments import Moment, corrected_bias
from vqjax.core.plan import Plan, make_plan
from vqjax.core.scalar import ScalarLayer, scalar_baseline
from vqjax.core.tensor import VQTensor
from vqjax.errors import DoesNotFitError, QualityGateError, VqjaxError
from vqjax.eval import judges
from vqjax.io import leaves, native, orbax_model
from vqjax.pipeline import (
    calibrate,
    environment,
    estimate,
    layer_figures,
    layers,
    memory,
    planning,
    refusals,
    results,
    timesteps,
    tuning,
)
from vqjax.pipeline.gathered import Moments
from vqjax.pipeline.journal import Journal, alone, fingerprint, is_done
from vqjax.pipeline.processes import Team

_PIECES = 5
"""Raised where unfinished work of an earlier version cannot be continued."""

CALIBRATION_SEED = 1_000_003  # added to the seed, so that no report image was calibrated on
SMALL_MODEL_SAMPLES, LARGE_MODEL_SAMPLES = 256, 4
SMALL_MODEL_STEPS = 100


class Report(NamedTuple):
    """What `vqjax.quantize` returns.

    Attributes:
      out: the run folder.
      report: content of its report.json; empty after a dry run.
    """

    out: pathlib.Path
    report: dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Job:
    """Everything that is known before work starts.

    Attributes:
      model: full precision, folded.
      folded: what folding removed.
      plan: one entry per kernel of the U-Net; until layers are measured, made from their shapes.
      sizes: what each layer sees for one image.
      division: how the run divides its memory.
    """

    settings: settings.QuantizeSettings
    model: Model
    folded: folding.Folded
    plan: Plan
    sizes: dict[str, calibrate.LayerInput]
    division: memory.Division

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of all parameters by path."""
        return {path: tuple(leaf.shape) for path, leaf in tree.flatten(self.model.params).items()}

    @property
    def samples(self) -> int:
        """Images per model in the report."""
        return samples_of(self.model.config, self.settings)

    @property
    def tune_steps(self) -> int:
        """Steps of distillation."""
        return tune_steps_of(self.model.config, self.settings)

    @property
    def course(self) -> str:
        """Tells tunings of one compressed model apart, in names of what is kept of them."""
        return fingerprint(settings.plain(self.settings)["tuning"], self.tune_steps)[:8]

    @property
    def bits(self) -> float:
        """Stored bits per quantized weight: the budget, or what a plan that was given stores."""
        if self.settings.plan is not None:
            return self.plan.bits_report(self.shapes).total.per_weight
        return self.settings.bits if self.plan.bits is None else self.plan.bits

    @property
    def scalar_bits(self) -> int:
        """Whole bits of the scalar baseline: the budget, rounded up in its favour."""
        return min(max(math.ceil(self.bits), 1), 8)

    def scalar_bits_of(self, path: str) -> int:
        """Bits of one layer of the scalar baseline: 8 where ours has single weights, too."""
        return 8 if self.plan[path].grouping == "scalar" else self.scalar_bits


class Layers(NamedTuple):
    """What was made of the layers, by path.

    Attributes:
      quantized: kernels.
      stats: of these kernels.
      biases: float16, corrected for what the kernels lose of the mean.
      scalar: the same kernels quantized to scalars, the baseline.
      search: what else compressing them showed.
    """

    quantized: dict[str, VQTensor]
    stats: dict[str, LayerStats]
    biases: dict[str, np.ndarray]
    scalar: dict[str, ScalarLayer]
    search: dict[str, layer_figures.Search]


def samples_of(config: config_lib.LatentDiffusionConfig, wanted: settings.QuantizeSettings) -> int:
    """Images per model in the report of a run."""
    if wanted.samples is not None:
        return wanted.samples
    return SMALL_MODEL_SAMPLES if config.small else LARGE_MODEL_SAMPLES


def tune_steps_of(
    config: config_lib.LatentDiffusionConfig, wanted: settings.QuantizeSettings
) -> int:
    """Steps of distillation of a run."""
    if wanted.tune_steps is not None:
        return wanted.tune_steps
    return SMALL_MODEL_STEPS if config.small else 0


@jax.default_matmul_precision("highest")  # TF32 would cost the third digit of every figure
def run(wanted: settings.QuantizeSettings) -> Report:
    """Runs or resumes a quantization; the same settings give the same model bytes.

    Raises:
      VqjaxError: for anything the user has to fix, before any work where possible.
    """
    job = prepare(wanted)
    known = job.model.config, job.shapes, job.plan, job.sizes
    expected = expected_of(*known, wanted, job.division, folded=job.folded.weights)
    team = Team.current()
    if team.leads:
        estimate.show(expected, job.plan, job.shapes)
        if wanted.plan is None:
            print("The plan above knows shapes alone; the run measures layers and makes its own.")
    if wanted.dry_run:
        return Report(wanted.out, {})
    if not is_done(wanted.out / "run.json"):
        _check_memory(job)
    with alone(wanted.out) if team.leads else contextlib.nullcontext():
        journal = Journal.open(wanted.out, record_of(job), team)
        if journal.done:
            print(f"{wanted.out}: this run is complete", file=sys.stderr)
        elif team.leads:
            with team.beating(wanted.out):
                _finish(journal, *compressed(job, journal))
            journal.finish()
        else:
            with team.beating(wanted.out):
                compressed(job, journal)
            journal.wait_until_done()
    if not team.leads:
        return Report(wanted.out, json.loads((wanted.out / "report.json").read_text()))
    if wanted.export is not None:
        model = orbax_model.load_model_folder(wanted.out / "model")
        plan = json.loads((wanted.out / "plan.json").read_text())
        native.save_model(wanted.export, model, extra_metadata={"plan": plan})
    report = json.loads((wanted.out / "report.json").read_text())
    results.show(report, wanted.out)
    _check_quality(wanted, report)
    return Report(wanted.out, report)


def _check_memory(job: Job) -> None:
    free = estimate.available_memory()
    if free is None or job.division.peak <= free:
        return
    limit = math.floor(free / 1e8) / 10  # GB; rounded up it would be more than there is

    def least(batch: int) -> float:
        """GB that suffice, of calibration in such batches: `limit`, or more."""
        calibration = dataclasses.replace(job.settings.calibration, batch=batch)
        wanted = dataclasses.replace(job.settings, memory=limit, calibration=calibration)
        try:
            division_of(job.model.config, job.shapes, job.plan, job.sizes, wanted)
        except DoesNotFitError as error:
            return math.ceil(error.needed / 1e8) / 10
        return limit

    advice = f"ask for --memory {limit:g}"
    if (needed := least(job.settings.calibration.batch)) > limit:
        advice = f"it needs at least --memory {needed:g}"
        if (smaller := least(1)) < needed:
            advice += f", or --memory {smaller:g} --calibration.batch 1"
    raise DoesNotFitError(
        f"this run takes about {job.division.peak / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB "
        f"can be had; {advice}, or end other programs"
    )


def _check_quality(wanted: settings.QuantizeSettings, report: dict[str, Any]) -> None:
    failures = results.failures(wanted, report["fidelity"])
    if failures:
        raise QualityGateError(
            f"{wanted.out}: {'; '.join(failures)}; give more --bits or --tune-steps. The model and "
            "its report are there"
        )


def prepare(wanted: settings.QuantizeSettings) -> Job:
    """Loads, folds and plans; checks every setting."""
    refusals.check(wanted)
    model = io.load_model(wanted.source, config=wanted.config)
    quantized = [p for p, leaf in tree.flatten(model.params).items() if isinstance(leaf, VQTensor)]
    if quantized:
        raise VqjaxError(
            f"{wanted.source} is quantized already ({len(quantized)} weights); "
            "start from the full-precision model"
        )
    refusals.check_steps(model.config, wanted, tune_steps_of(model.config, wanted))
    judge = judges.of_model(model.config)
    if judge is not None:
        judge.check()
    folded = folding.fold(model.config, model.params)
    model = dataclasses.replace(model, params=folded.params)
    shapes = {path: tuple(leaf.shape) for path, leaf in tree.flatten(folded.params).items()}
    if wanted.plan is None:
        plan = make_plan(shapes, **planning.budget(model.config, shapes, wanted))
    else:
        plan = Plan.from_json(_read(wanted.plan))
        plan.check(shapes)
        if wanted.act_bits < settings.FLOAT_BITS:
            plan.check_integer()
    sizes = calibrate.trace_layers(model.config, model.params)
    division = division_of(model.config, shapes, plan, sizes, wanted)
    return Job(wanted, model, folded, plan, sizes, division)


def division_of(
    config: config_lib.LatentDiffusionConfig,
    shapes: Mapping[str, tuple[int, ...]],
    plan: Plan,
    sizes: Mapping[str, calibrate.LayerInput],
    wanted: settings.QuantizeSettings,
) -> memory.Division:
    """How a run divides its memory.

    Args:
      shapes: of all parameters, by path.
      sizes: from `calibrate.trace_layers`.

    Raises:
      DoesNotFitError: if `wanted.memory` is too little.
    """
    return memory.divide(
        config,
        shapes,
        {path: sizes[path] for path in plan},
        wanted.calibration,
        limit=None if wanted.memory is None else wanted.memory * 1e9,
        workers=layers.side_by_side(),
        tuned=wanted.tuning.batch if tune_steps_of(config, wanted) else 0,
        taught=_taught_together(wanted),
        accelerated=jax.default_backend() != "cpu",
    )


def _taught_together(wanted: settings.QuantizeSettings) -> int:
    """Pairs of a latent and a timestep in one round of the teacher."""
    return wanted.tuning.trajectories * wanted.calibration.steps


def expected_of(
    config: config_lib.LatentDiffusionConfig,
    shapes: Mapping[str, tuple[int, ...]],
    plan: Plan,
    sizes: Mapping[str, calibrate.LayerInput],
    wanted: settings.QuantizeSettings,
    division: memory.Division,
    *,
    folded: int = 0,
) -> estimate.Estimate:
    """What a run takes; arguments as for `division_of`.

    Args:
      folded: weights that folding removed.
    """
    tune_pairs = tune_steps_of(config, wanted) * wanted.tuning.batch
    together = _taught_together(wanted)
    return estimate.estimate(
        config,
        shapes,
        plan,
        sizes,
        wanted.calibration,
        samples_of(config, wanted),
        folded,
        division,
        tune_pairs=tune_pairs,
        taught_pairs=-(-tune_pairs // together) * together,
        ranges=wanted.act_bits < settings.FLOAT_BITS,
    )


def _read(path: pathlib.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise VqjaxError(f"--plan {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise VqjaxError(f"--plan {path}: no text; expected the plan.json of a run") from None


def record_of(job: Job) -> dict[str, Any]:
    """What a run's record starts with; its fingerprint says which pieces belong to the run."""
    arrays, _ = leaves.to_arrays(job.model.params)
    source = leaves.content_hash(job.model.config.to_dict(), arrays)
    shown = settings.plain(job.settings)
    names = ("calibration", "memory", "seed", "act_bits")
    matters: dict[str, Any] = {name: shown[name] for name in names}
    matters["pieces"] = _PIECES
    matters["budget"] = None
    if job.settings.plan is None:
        matters["budget"] = planning.budget(job.model.config, job.shapes, job.settings)
    here = environment.describe()
    # Another kind of device rounds differently: its pieces would not be this run's.
    made_by = [here["device"], here["backend"], environment.versions()]
    return {
        "command": settings.command_line("vqjax.quantize", job.settings),
        "settings": shown,
        "samples": job.samples,
        "source_sha256": source,
        "fingerprint": fingerprint(source, job.plan.to_json(), matters, job.samples, made_by),
        "last_stages": job.course,  # after a tuning that diverged, another one starts where it did
        "environment": here,
    }


def compressed(job: Job, journal: Journal) -> tuple[Job, Layers]:
    """Everything that all processes share; returns the job with the plan of its layers.

    Moments that do not fit into memory together are kept in the journal from the first pass, which
    measures layers, to the second, which compresses them.
    """
    sizes = {path: job.sizes[path] for path in job.plan}
    groups = calibrate.batches(sizes, job.division.moments)
    visited = trajectories(job, journal)
    weights_T = timesteps.weights_of_run(job, journal, visited)
    outlooks: dict[str, planning.Outlook] = {}
    for index, paths in enumerate(groups):
        part = f" {index + 1}/{len(groups)}" if len(groups) > 1 else ""
        moments = _moments(job, journal, visited, weights_T, index, paths, part)
        with journal.stage("calibrate"):
            outlooks |= _outlooks(job, journal, moments, part)
    costs = planning.sensitivities(job, journal, visited, weights_T, outlooks)
    job = planning.planned(job, outlooks, costs)
    if journal.team.leads:
        rows = planning.record(job.plan, job.shapes, outlooks, costs)
        journal.write("plan.json", job.plan.to_json().encode())
        journal.write("sensitivity.json", planning.to_json(rows).encode())
        planning.show(job.plan, rows)
    done = Layers({}, {}, {}, {}, {})
    for index, paths in enumerate(groups):
        part = f" {index + 1}/{len(groups)}" if len(groups) > 1 else ""
        if len(groups) > 1:
            moments = _moments(job, journal, visited, weights_T, index, paths, part)
        with journal.stage("compress"):
            for path, (tensor, stats, biases, search) in _compress(
                job, journal, moments, outlooks, part
            ).items():
                done.quantized[path], done.stats[path] = tensor, stats
                done.search[path] = search
                done.biases.update(biases)
        with journal.stage("scalar baseline"):
            done.scalar.update(_baseline(job, journal, moments, part))
    jax.clear_caches()  # the searches' programs, one set for each shape, are most of the memory
    return job, done


def assembled(job: Job, done: Layers) -> tuple[Model, Model]:
    """The compressed model and its scalar baseline; what is not quantized has 16 bits in both.

    Those of the baseline lie in float32, so that full precision's program samples it, too.
    """
    flat = tree.flatten(job.model.params)
    half = {
        path: np.asarray(leaf, np.float16) for path, leaf in flat.items() if path not in job.plan
    }
    wide = {path: leaf.astype(np.float32) for path, leaf in half.items()}
    dense = {path: layer.kernel for path, layer in done.scalar.items()}
    ours, rival = (half | done.biases | done.quantized), wide | dense
    config = job.model.config
    return Model(config, tree.unflatten(ours)), Model(config, tree.unflatten(rival))


def _finish(journal: Journal, job: Job, done: Layers) -> None:
    """What one process does alone: tunes, saves, samples, reports."""
    model, rival = assembled(job, done)
    model = tuning.tuned(job, journal, model, trajectories(job, journal))
    if job.tune_steps:
        done = _tuned_layers(job, journal, done, model)
    with journal.stage("save"):
        orbax_model.save_model_folder(journal.folder / "model", model)
    twins = {"full_precision": job.model, "quantized": model, "scalar_baseline": rival}
    pictures = {name: _samples(job, journal, name, twin) for name, twin in twins.items()}
    with journal.stage("held-out errors"):
        held_out = layer_figures.held_out(job, journal, done)
    with journal.stage("report"):
        results.write(job, journal, done, held_out, model, pictures)


def _tuned_layers(job: Job, journal: Journal, done: Layers, model: Model) -> Layers:
    """What became of the layers in tuning: their errors are measured again."""
    flat = tree.flatten(model.params)
    biases = {path: np.asarray(leaf) for path, leaf in flat.items() if path.endswith("/bias")}
    done = done._replace(
        quantized={path: flat[path] for path in job.plan},
        biases=biases,
        stats=dict(done.stats),
        search=dict(done.search),
    )
    visited = trajectories(job, journal)
    weights_T = timesteps.weights_of_run(job, journal, visited)
    sizes = {path: job.sizes[path] for path in job.plan}
    for index, paths in enumerate(calibrate.batches(sizes, job.division.moments)):
        moments = _moments(job, journal, visited, weights_T, index, paths, "")
        for path in paths:
            tensor, stats, search = done.quantized[path], done.stats[path], done.search[path]
            entropy = layer_figures.codes_entropy(tensor, job.plan[path].stored(job.shapes[path]))
            done.search[path] = search._replace(codes_entropy=entropy)
            done.stats[path] = stats._replace(
                rel_weight_mse=_weight_error(job, path, tensor),
                rel_output_mse=layer_figures.errors(job, done, path, moments[path]).quantized,
            )
    return done


def _weight_error(job: Job, path: str, tensor: VQTensor) -> float:
    w_ON = grouping.to_matrix(np.asarray(tree.flatten(job.model.params)[path], np.float32))
    change = float(np.sum((w_ON - tensor.host_matrix()) ** 2))
    whole = float(np.sum(w_ON**2))
    return change / whole if whole > 0 else change


def trajectories(job: Job, journal: Journal) -> list[tuple]:
    """The full-precision model's own sampling trajectories, kept across interruptions."""
    found = journal.shared("trajectories")
    wanted = job.settings.calibration
    if found is None:
        arrays = {}
        calls = -(-wanted.images // wanted.batch)
        seed = job.settings.seed + CALIBRATION_SEED
        with journal.stage("calibrate"), progress.stage("trajectories", calls) as advance:
            for i, (x, t, ids) in enumerate(calibrate.trajectories(job.model, wanted, seed)):
                arrays |= {f"{i}.x": x, f"{i}.t": t}
                arrays |= {} if ids is None else {f"{i}.ids": np.asarray(ids)}
                advance()
        journal.store("trajectories", arrays, {})
        found = arrays, {}
    arrays = found[0]
    count = sum(name.endswith(".x") for name in arrays)
    return [(arrays[f"{i}.x"], arrays[f"{i}.t"], arrays.get(f"{i}.ids")) for i in range(count)]


def _moments(job, journal, visited, weights_T, index, paths, part) -> Moments:
    found = journal.shared(f"gathered-{index}")
    kept = Moments({}) if found is None else Moments.from_arrays(found[0])
    if kept.keys() == set(paths):  # else from a machine that divided the layers in another way
        return kept
    calls = sum(len(t) for _, t, _ in visited)
    with journal.stage("calibrate"), progress.stage(f"calibrate{part}", calls) as advance:
        moments = calibrate.second_moments(job.model, visited, paths, advance, weights_T=weights_T)
    journal.store(f"gathered-{index}", moments.to_arrays(), {})
    return moments


def _each_layer(job, journal, title, work, moments, note, piece) -> dict[str, Any]:
    shapes = {path: job.shapes[path] for path in moments}
    # Small products gain nothing from threads of BLAS, which keep cores busy while they wait. It
    # follows from the model alone: sums by other numbers of threads have other last bits.
    with threadpoolctl.threadpool_limits(1 if job.model.config.small else None, "blas"):
        return layers.each_layer(
            title,
            work,
            moments,
            note,
            journal=journal,
            piece=piece,
            costs={
                path: estimate.search_flops(shape, job.plan[path]) for path, shape in shapes.items()
            },
            alike=lambda path: (shapes[path], job.plan[path]),
            workers=job.division.workers,
        )


def _outlooks(job, journal, moments, part) -> dict[str, planning.Outlook]:
    def work(path: str, moment: Moment) -> planning.Outlook:
        return planning.outlook(job, journal, path, moment)

    def note(path: str, result: planning.Outlook) -> str:
        return ""

    return _each_layer(job, journal, f"metrics{part}", work, moments, note, planning.piece)


def _compress(job, journal, moments, outlooks, part) -> dict[str, tuple]:
    """Quantized kernel, its statistics, its layer's bias where corrected, and its search."""
    flat = tree.flatten(job.model.params)
    seed_key = jax.random.key(job.settings.seed)

    def piece(path: str) -> str:
        return f"layers/{path.replace('/', '.')}"

    def work(path: str, moment: Moment) -> tuple:
        found = journal.load(piece(path))
        if found is not None:
            return _restore(path, *found)
        key = jax.random.fold_in(seed_key, zlib.crc32(path.encode()))
        outlook = outlooks[path]
        own_NN, start = outlook.moment(moment), time.monotonic()
        tensor, stats = compress_layer(
            flat[path],
            own_NN,
            job.plan[path],
            key=key,
            metric=outlook.metric(moment, job.sizes[path].window),
        )
        seconds = round(time.monotonic() - start, 3)
        tensors, about = leaves.to_arrays({"kernel": tensor})
        bias = f"{path.removesuffix('kernel')}bias"
        biases, share = {}, 1.0
        if outlook.centred:
            decoded = grouping.from_matrix(tensor.host_matrix(), tensor.shape)
            share = _share_of_output(flat[path], own_NN, moment)
            stats = stats._replace(rel_output_mse=stats.rel_output_mse * share)
            bias_O = corrected_bias(
                np.asarray(flat[bias]), np.asarray(flat[path]), decoded, moment.mean_N
            )
            most = np.finfo(np.float16).max
            biases[bias] = np.clip(bias_O, -most, most).astype(np.float16)
        stored = job.plan[path].stored(job.shapes[path])
        search = layer_figures.of_search(tensor, stored, own_NN, share, seconds)
        notes = {"about": about["kernel"], "stats": stats._asdict(), "search": search._asdict()}
        journal.store(piece(path), tensors | {"bias": biases[bias]} if biases else tensors, notes)
        return tensor, stats, biases, search

    def note(path: str, result: tuple) -> str:
        name = path.removeprefix("unet/").removesuffix("/kernel")
        return f"{name}  error {result[1].rel_output_mse:.4f}"

    return _each_layer(job, journal, f"compress{part}", work, moments, note, piece)


def _share_of_output(kernel, centred_NN: np.ndarray, moment: Moment) -> float:
    """What errors relative to the centred output are relative to the whole output."""
    w_ON = grouping.to_matrix(np.asarray(kernel, np.float32))
    part, whole = (
        float(np.vdot(w_ON @ second_NN, w_ON)) for second_NN in (centred_NN, moment.second_NN)
    )
    return part / whole if whole > 0 else 1.0


def _restore(path: str, arrays, notes) -> tuple:
    tensors = {name.removeprefix("kernel."): a for name, a in arrays.items() if name != "bias"}
    tensor = leaves.tensor_of(tensors, notes["about"])
    biases = {f"{path.removesuffix('kernel')}bias": a for n, a in arrays.items() if n == "bias"}
    search = layer_figures.Search(**notes["search"])
    return tensor, LayerStats(**notes["stats"]), biases, search


def _baseline(job, journal, moments, part) -> dict[str, ScalarLayer]:
    """Scalar quantization in as many bits, rounded up, on the same moments: what ours is measured
    against."""
    flat = tree.flatten(job.model.params)

    def piece(path: str) -> str:
        return f"scalar/{path.replace('/', '.')}"

    def work(path: str, moment: Moment) -> ScalarLayer:
        found = journal.load(piece(path))
        if found is not None:
            return ScalarLayer(kernel=found[0]["kernel"], **found[1])
        bits = job.scalar_bits_of(path)
        layer = scalar_baseline(flat[path], jax.numpy.asarray(moment.second_NN), bits)
        layer = layer._replace(kernel=np.asarray(layer.kernel))  # not in an accelerator's memory
        notes = {name: value for name, value in layer._asdict().items() if name != "kernel"}
        journal.store(piece(path), {"kernel": layer.kernel}, notes)
        return layer

    def note(path: str, layer: ScalarLayer) -> str:
        return ""

    return _each_layer(job, journal, f"baseline{part}", work, moments, note, piece)


def _samples(job: Job, journal: Journal, name: str, model: Model) -> results.Samples:
    """Same-seed samples of one model, kept across interruptions."""
    from vqjax import sampling

    piece = f"samples/{name}-{job.course}" if name == "quantized" else f"samples/{name}"
    found = journal.load(piece)
    if found is None:
        classes = results.class_ids(job.model.config, job.samples)
        title = f"sample {name.replace('_', ' ')}"
        with journal.stage("sample"), progress.stage(title, job.samples) as advance:
            images, latents = sampling.generate_with_latents(
                model,
                classes,
                guidance=model.config.guidance,
                seed=job.settings.seed,
                on_batch=advance,
            )
        found = {"images": images, "latents": latents}, {}
        journal.store(piece, *found)
    return results.Samples(found[0]["images"], found[0]["latents"])
