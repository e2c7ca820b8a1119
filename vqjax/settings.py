# SPDX-License-Identifier: Apache-2.0
"""What a user can ask for: one frozen dataclass is command line, Python API and manifest at once.

Imports neither jax nor anything of ours but errors, so that `--help` answers at once.
"""

import dataclasses
import json
import numbers
import os
import pathlib
import shlex
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, TypeVar

import tyro

from vqjax.errors import VqjaxError, gathered

Settings = TypeVar("Settings")

SEEDS = range(2**32)
"""What both NumPy and JAX take."""
_SEEDS = f"0 to {SEEDS[-1]}"

_JSON = {
    str: ((str,), "text"),
    pathlib.Path: ((str,), "a path"),
    bool: ((bool,), "true or false"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
}
"""What JSON holds for the values of a field, and how errors call them."""

FLOAT_BITS = 32
"""`act_bits` that leave activations in floating point."""

Dtype = Literal["float32", "bfloat16", "float16"]

Preset = Literal[
    "cin256-v2", "celebahq", "ffhq", "lsun_bedrooms", "lsun_churches", "digits", "textures"
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Calibration:
    """What the calibration looks at: both guidance branches of every step."""

    images: int = 32
    """Sampling trajectories of the full-precision model; classes go round."""
    steps: int = 25
    """Timesteps of each trajectory; more than a sampler uses, to cover other step counts too."""
    guidance: float = 3.0
    """Classifier-free guidance of the trajectories. More than a model samples with does no harm."""
    batch: int = 16
    """Trajectories in one compiled call."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """How the quantized model is taught by the full-precision one after compression."""

    batch: int = 32
    """Pairs of a latent and a timestep in one step, both guidance branches of each."""
    trajectories: int = 128
    """Sampling trajectories of the full-precision model that steps draw from together."""
    rate: float | None = None
    """Multiplies all learning rates; default: 1 up to two bits per weight, an eighth at four, in
    powers between and beyond."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What both networks compute in, there and back; weights, moments and the loss are float32.
    bfloat16 is for GPUs, where it takes less time; a CPU gains nothing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class QuantizeSettings:
    """Compresses a latent diffusion model's U-Net, and shows what was gained and lost."""

    source: Annotated[str, tyro.conf.Positional] = "digits"
    """A model in full precision: a .ckpt, .pth, .pt, .bin or .safetensors file, a diffusers folder,
    or "digits", which is in the package."""
    bits: float = 2.0
    """Most stored bits per quantized weight: codes, codebooks, scales, first and last layer."""
    size: float | None = None
    """Most MB (10^6 bytes) of the whole stored U-Net, parts in float16 and ranges of activations
    included; replaces --bits."""
    act_bits: int = 8
    """Bits of what goes into each layer, 2 to 8; 32 leaves it in floating point."""
    tune_steps: int | None = None
    """Steps of distillation after compression; default: 100 for models of up to 64
    pixels, 0 for larger ones."""
    plan: pathlib.Path | None = None
    """A plan.json, perhaps edited, in place of the one made for --bits or --size."""
    out: pathlib.Path = pathlib.Path("vqjax-out")
    """Run folder. An unfinished run of the same command there is resumed."""
    export: pathlib.Path | None = None
    """Also write the quantized model as this one .safetensors file."""
    dry_run: bool = False
    """Print the plan, bytes, memory and time; start nothing."""
    samples: int | None = None
    """Images per model in the report; default: 256 for models of up to 64 pixels, else 4."""
    config: str | None = None
    """What the checkpoint was trained as, where its shapes do not tell: the name of a published
    model, or a JSON file (docs/import.md)."""
    calibration: Calibration = Calibration()
    """Inputs that layer errors are measured on."""
    tuning: Tuning = Tuning()
    """What --tune-steps do."""
    least_psnr: float | None = None
    """Quality gate, dB: exit code 4 where the report's PSNR to full precision is below."""
    memory: float | None = None
    """Most GB that the run takes in each process, of an accelerator's memory where there is one:
    moments that do not fit take another pass, fewer layers are searched side by side, and batches
    of tuning are computed in parts. Default: 2.6 GB for moments, and what the rest needs."""
    seed: int = 0
    """Of calibration, search and samples."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """Samples images from a latent diffusion model, quantized or not, into one PNG grid."""

    source: Annotated[str, tyro.conf.Positional] = "digits"
    """A run folder, an exported or original model file, a diffusers folder, or "digits"."""
    classes: tuple[int, ...] | None = None
    """Class ids, gone round until --count images are asked for; default: all classes."""
    count: int = 16
    """Number of images."""
    steps: int = 20
    """DDIM steps."""
    guidance: float | None = None
    """Classifier-free guidance, 1 is none; default: the model's own, 1.5 for digits
    and textures, else 3."""
    eta: float = 0.0
    """Noise of DDIM: 0 is deterministic, 1 as much as DDPM."""
    seed: int = 0
    """Image i depends on the seed and i alone, not on --count or --batch."""
    batch: int = 16
    """Images in one compiled call."""
    integer: bool = False
    """Run int8 x int8 products (models with 8-bit activations)."""
    dtype: Dtype = "float32"
    """What the U-Net computes in."""
    weight_memory: float | None = None
    """Most GB of quantized weights that are decoded at load; the others stay packed and are decoded
    in every step, unless native code was measured to be faster on this CPU. Default: all are
    decoded, but those that kernels read as they are stored."""
    columns: int = 8
    """Images in one row of the grid."""
    config: str | None = None
    """What the checkpoint was trained as, where its shapes do not tell: the name of a published
    model, or a JSON file (docs/import.md)."""
    out: pathlib.Path = pathlib.Path("grid.png")
    """The grid; its text chunk "vqjax" holds the parameters."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """Scores a model's samples, or given pictures, as the literature does.

    Scores whose files are not given are left out, and it is said where people get the files."""

    source: Annotated[str, tyro.conf.Positional] = "digits"
    """A model to sample (a run folder, a model file, a diffusers folder, "digits"), or pictures: a
    folder of 8-bit RGB files or an .npz with arr_0."""
    against: str | None = None
    """What each picture is compared with: the full-precision model, sampled from the same noise and
    classes, or its pictures in the same order."""
    reference: str | None = None
    """Real pictures: an .npz such as VIRTUAL_imagenet256_labeled.npz, a folder, or a dataset that
    tensorflow-datasets has prepared, such as "tfds:imagenet2012?split=train&size=256"."""
    inception: pathlib.Path | None = None
    """The FID network, such as pt_inception-2015-12-05-6726825d.pth: FID, sFID, inception score,
    precision and recall, with --reference; without it, the inception score."""
    lpips: tuple[pathlib.Path, ...] | None = None
    """The weights of LPIPS, such as vgg16-397923af.pth and vgg.pth."""
    count: int | None = None
    """Images per model; compare scores at equal counts only. Default: 10,000 for digits and
    textures, 50,000 for other models; of given pictures, all."""
    steps: int = 20
    """DDIM steps."""
    guidance: float | None = None
    """Classifier-free guidance, 1 is none; default: the model's own, 1.5 for digits
    and textures, else 3."""
    eta: float = 0.0
    """Noise of DDIM: 0 is deterministic, 1 as much as DDPM."""
    seed: int = 0
    """Noise and class of image i depend on the seed and i alone."""
    batch: int | None = None
    """Images in one compiled call, and in one file; default: 100 up to 64 pixels, else 16."""
    config: str | None = None
    """What a checkpoint was trained as, where its shapes do not tell: the name of a published
    model, or a JSON file (docs/import.md)."""
    out: pathlib.Path = pathlib.Path("vqjax-evaluation")
    """Folder of samples, scores and report. The same command continues an unfinished one; samples
    that are there serve again when other scores are asked for."""
    export_npz: pathlib.Path | None = None
    """Also write the source's samples and labels as this one .npz, as the ADM evaluator takes
    them; samples that are there are not made again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReproduceSettings:
    """Repeats a run from its file: quantize, evaluate, and compare with what the file recorded.

    Files that are missing are named, with where people get them and what the run will cost here."""

    run: Annotated[str | None, tyro.conf.Positional] = None
    """A run file, one in the package by name (such as digits_w2a8), the reproduction.json of an
    earlier run, the run.json of a quantization or an evaluation, or the folder of either."""
    table: bool = False
    """Print our results beside the literature's; runs nothing, so RUN is left out. A run prints its
    own part of the table at the end."""
    results: tuple[pathlib.Path, ...] = ()
    """Folders of finished runs, for the table; those in the package and in vqjax-runs/ are shown
    anyway."""
    files: pathlib.Path = pathlib.Path(".")
    """Folder of the files that a run names."""
    out: pathlib.Path | None = None
    """Folder of the run, continued if unfinished; default: vqjax-runs/ and the name of the run."""
    seed: int | None = None
    """In place of the run's own seeds, to see how much they matter; nothing is compared then."""
    memory: float | None = None
    """Most GB that the quantization takes, as --memory of python -m vqjax.quantize, in place of the
    run's own limit. A record's numbers are compared all the same, within their tolerances."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchAqSettings:
    """Measures the quantizer: error, bits and time on given matrices, or time on a whole U-Net.

    With --inputs, every matrix file in a folder (.npz with W and second moments XTX, XTX_test, or
    feature maps maps, maps_test) is quantized at 2 and 4 bits, beside baselines and the bound. With
    --model, the U-Net of a preset is, with random weights and inputs."""

    inputs: pathlib.Path | None = None
    """Folder of matrix files."""
    model: Preset | None = None
    """Preset whose U-Net is quantized, layer by layer."""
    json: pathlib.Path | None = None
    """Results, written after each: the same command continues where an earlier one stopped."""
    effort: Literal["reduced", "complete"] = "complete"
    """How hard to search: as python -m vqjax.quantize does, or with fewer rounds."""
    seed: int = 0
    """Of the search, and of a model's weights and inputs."""


Method = Literal[
    "none",
    "codebooks",
    "straight_through",
    "pv",
    "pv_decay",
    "pv_restart",
    "semi_pv",
    "semi_pv_first",
    "semi_pv_keep",
    "semi_pv_restart",
    "semi_pv_trust",
    "scalar",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchTuneSettings:
    """Times a step of tuning, part by part: teacher, student forward and backward, P step, V step.

    Weights are random, inputs of layers have 8 bits: what a step costs does not depend on the
    weights."""

    model: Preset = "digits"
    """Preset whose U-Net is tuned."""
    bits: float = 2.0
    """Of its weights."""
    tuning: Tuning = Tuning()
    """What a step sees."""
    repeat: int = 5
    """Measurements of each part; the median is shown."""
    json: pathlib.Path | None = None
    """Results."""
    seed: int = 0
    """Of weights and inputs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchPipelineSettings:
    """Times a whole quantization, stage by stage, and predicts one that tunes for longer.

    Weights are random. Every stage runs as python -m vqjax.quantize runs it, with --act-bits 8; of
    tuning one round of the teacher, and the complete course is predicted from its steps."""

    model: Preset = "digits"
    """Preset whose U-Net is quantized."""
    bits: float = 2.0
    """Most stored bits per quantized weight."""
    tune_steps: int | None = None
    """Of the complete course; default: 100 for models of up to 64 pixels, 3,200 for larger ones."""
    samples: int | None = None
    """Images per model in the report; default: 256 for models of up to 64 pixels, else 4."""
    calibration: Calibration = Calibration()
    """Inputs that layer errors are measured on."""
    tuning: Tuning = Tuning()
    """What a step sees; a round of the teacher has as many trajectories as a batch has pairs."""
    memory: float | None = None
    """Most GB that the run takes, as --memory of python -m vqjax.quantize."""
    out: pathlib.Path = pathlib.Path("vqjax-runs/pipeline")
    """Folder of the weights and the run. The same command continues what was interrupted, and shows
    again what was measured; another folder measures again."""
    json: pathlib.Path | None = None
    """Results."""
    seed: int = 0
    """Of weights, calibration and search."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchAblationSettings:
    """Compares ways of tuning the embedded model, on the same noise and classes.

    Every bit width is compressed once and tuned by every method with every seed; samples are
    scored against real digits and against full precision. Cells that the JSON file has are kept."""

    bits: tuple[float, ...] = (4.0, 2.0, 1.5)
    """Stored bits per weight; activations have 8."""
    methods: tuple[Method, ...] = (
        "none",
        "codebooks",
        "straight_through",
        "pv",
        "semi_pv",
        "scalar",
    )
    """Ways of tuning; "scalar" is uniform quantization with learned steps, the bits rounded up.
    Parts of "semi_pv": "pv_decay" decays the moments of codebooks alone, "semi_pv_keep" leaves
    them; "semi_pv_first" invalidates first moments alone. "semi_pv_trust" lets a V step change a
    weight by a hundredth of its norm. "pv_restart" and "semi_pv_restart" forget the moments of all
    codes where new trajectories begin: every 25 steps with --order trajectory, else every 100."""
    seeds: int = 3
    """Of tuning and of the samples, from --seed on."""
    count: int = 10_000
    """Samples of each cell."""
    tune_steps: int = 100
    """Steps of each tuning."""
    order: Literal["mixed", "trajectory"] = "mixed"
    """Batches of all timesteps, or one timestep after the other."""
    code_rate: float = 1.0
    """Multiplies the learning rate of the codes' targets alone: how many codes move."""
    tuning: Tuning = Tuning()
    """What a step sees."""
    work: pathlib.Path = pathlib.Path("vqjax-runs/ablation")
    """Folder of what is compressed once, and of samples of full precision."""
    json: pathlib.Path | None = None
    """Results, written after each cell: the same command continues where an earlier one stopped."""
    figure: pathlib.Path | None = None
    """A PNG of the results."""
    seed: int = 0
    """The first of --seeds."""


ParetoMethod = Literal["tuned", "untuned", "scalar", "scalar_tuned"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchParetoSettings:
    """Compresses the embedded model over bits and methods: what is lost beside what is stored.

    All points sample from the same noise and classes. Every point is made once: models and samples
    stay in --work, scores in the JSON file, and the same command continues there."""

    bits: tuple[float, ...] = (8.0, 6.0, 4.0, 3.0, 2.0, 1.5)
    """Most stored bits per weight; activations have 8."""
    methods: tuple[ParetoMethod, ...] = ("tuned", "untuned", "scalar", "scalar_tuned")
    """vqjax with and without --tune-steps; uniform scalar quantization (GPTQ) as it is and with
    learned steps, measured at whole bits alone, since it has no others."""
    count: int = 10_000
    """Samples of each point; compare digit-FD at equal counts only."""
    seed: int = 0
    """Of tuning and of the samples."""
    tune_steps: int = 100
    """Steps of each tuning."""
    tuning: Tuning = Tuning()
    """What a step sees."""
    work: pathlib.Path = pathlib.Path("vqjax-runs/pareto")
    """Folder of models and samples."""
    json: pathlib.Path | None = None
    """Results, written after each point; default: pareto.json in --work."""
    figure: pathlib.Path | None = None
    """A PNG of the results."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchSampleSettings:
    """Times sampling from one quantized model on every path that runs here, beside dense weights.

    Paths run in turn, round after round, so that they share what else the machine does."""

    source: Annotated[str, tyro.conf.Positional] = "digits"
    """A quantized model (run folder or exported file), or a preset, which gets random codes: what
    is timed does not depend on them."""
    bits: float | None = None
    """Of a preset's weights; default: 2. Quantized models have theirs."""
    act_bits: int | None = None
    """Of what a preset's layers read, up to 8; default: floating point. Quantized models have
    theirs."""
    batch: tuple[int, ...] = (1, 16)
    """Images in one compiled call."""
    steps: int = 20
    """DDIM steps."""
    guidance: float | None = None
    """Classifier-free guidance, 1 is none; default: the model's own."""
    dtype: Dtype = "float32"
    """What the U-Net computes in."""
    paths: tuple[Literal["load", "step", "lut", "native", "auto", "integer"], ...] = ()
    """Only these, beside dense weights: decoded at load, decoded in the step, lookup tables in XLA,
    in native code, what was measured to be fastest, and products of int8; default: all that run
    here."""
    repeat: int = 5
    """Rounds; medians are shown."""
    json: pathlib.Path | None = None
    """Results."""
    seed: int = 0
    """Of a preset's weights, and of the images."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchKernelsSettings:
    """Times every layer shape of a model with packed weights, beside the same dense layer."""

    model: str = "cin256-v2"
    """Whose layers: a preset, or a quantized model (run folder, exported file) as it is stored."""
    bits: float | None = None
    """Store a preset as a plan of so many bits does, like `bench sample`; default: four codebooks
    of 16 entries for every 8 weights or 3x3 kernel."""
    batch: tuple[int, ...] = (2,)
    """Latents that a layer sees; guidance doubles the images of a call."""
    most_rows: int | None = None
    """Only layers of at most so many rows, such as those that see a vector for each image."""
    dtype: Dtype | Literal["int8"] = "float32"
    """Of activations; int8: products of integers, beside weights decoded to int8 at load."""
    path: Literal["auto", "xla", "pallas", "triton", "native", "lut"] = "auto"
    """What multiplies by packed weights; auto is what sampling would take."""
    repeat: int = 5
    """Rounds; medians are shown."""
    tune: bool = False
    """Write what is fastest for each shape to --table instead: of weights that are decoded at load,
    and on a GPU all kernels and schedules, on a CPU native code and decoding in every call. With
    --json an interrupted run continues."""
    table: pathlib.Path | None = None
    """The table of measured choices, of which entries of other devices and shapes stay; default:
    the user's own, which sampling reads."""
    json: pathlib.Path | None = None
    """Results."""
    seed: int = 0
    """Of weights and inputs."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchEvaluateSettings:
    """Times scoring, part by part: the FID network, its statistics, precision and recall.

    Beside the same work in TensorFlow, where it is installed, and in SciPy, on the same arrays."""

    inception: pathlib.Path | None = None
    """The FID network; default: random weights, since what is timed does not depend on them."""
    pictures: int = 64
    """Of 256 pixels that the network sees in a round; a multiple of 64, its batch."""
    samples: int = 5_000
    """Rows of features that stand for samples, in statistics and precision and recall."""
    reference: int = 2_000
    """Rows of features that stand for real pictures."""
    repeat: int = 3
    """Rounds; medians are shown."""
    json: pathlib.Path | None = None
    """Results."""
    seed: int = 0
    """Of weights, pictures and features."""


GpuPart = Literal[
    "kernels",
    "kernels_rows",
    "kernels_tuned",
    "kernels_int8",
    "sample",
    "sample_int8",
    "evaluate",
    "tune",
]


@dataclasses.dataclass(frozen=True, kw_only=True)
class BenchGpuSettings:
    """Times everything on a GPU: single layers, those of few rows, which kernel and schedule is
    fastest for each, then sampling, scoring, and a step of tuning.

    Each part is a command of its own, in a process of its own. What is fastest goes into the user's
    own table, which sampling reads. Also: python -m vqjax.bench --gpu"""

    model: Preset = "cin256-v2"
    """Preset whose layers and U-Net are timed."""
    minutes: float = 9.0
    """For all parts, of which each has its share of what is left: what takes longer is ended, and
    what would begin later is left out."""
    parts: tuple[GpuPart, ...] = typing.get_args(GpuPart)
    """Only these."""
    out: pathlib.Path = pathlib.Path("vqjax-gpu")
    """Folder of the results, one JSON file for each part, and of summary.json."""
    seed: int = 0
    """Of weights and inputs of all parts."""


def check_seed(settings: Any) -> None:
    """Raises VqjaxError unless the seed of these settings, if any, is one of `SEEDS`."""
    seed = getattr(settings, "seed", None)
    if seed is not None and not (isinstance(seed, numbers.Integral) and int(seed) in SEEDS):
        raise VqjaxError(f"--seed {seed}: expected {_SEEDS}")


def command_line(module: str, settings: Any, subcommand: str = "") -> str:
    """The command that repeats a call with these settings, defaults left out."""
    words = [word for word in (subcommand, getattr(settings, "source", "")) if word]
    return shlex.join(["python", "-m", module, *words, *_options(settings, "")])


def plain(settings: Any) -> dict[str, Any]:
    """The same as JSON values: paths as text, tuples as lists, nested settings as dicts."""
    return {name: _plain(value) for name, value in dataclasses.asdict(settings).items()}


def from_plain(settings: type[Settings], values: dict[str, Any], where: str) -> Settings:
    """The inverse of `plain`; fields that are absent keep their defaults.

    Args:
      where: names the file that the values are from, in errors.

    Raises:
      VqjaxError: naming every field that these settings do not have, and every value of another
        kind than its field has.
    """
    return _made(settings, values, f"{where}: settings that do not fit; correct the file:")


def of_call(settings: type[Settings], values: dict[str, Any], where: str) -> Settings:
    """Settings from the arguments of a Python call: numbers of NumPy, text for paths and dicts for
    nested settings will do. Equal calls make equal settings, however they are written.

    Raises:
      VqjaxError: as `from_plain`.
    """
    given = {name: _plain(value) for name, value in values.items()}
    return _made(settings, given, f"{where}: arguments that do not fit:")


def _made(settings: type[Settings], values: dict[str, Any], heading: str) -> Settings:
    problems: list[str] = []
    made = _nested(settings, values, "", problems)
    if problems:
        raise gathered(problems, heading)
    return made


def _nested(kind: Any, values: Any, name: str, problems: list[str]) -> Any:
    """A dataclass from the values of its fields; `name` is of the field that it is in, if any."""
    if not isinstance(values, dict):
        problems.append(_misfit(name, values, "an object of settings"))
        return None
    prefix = f"{name}." if name else ""
    kinds = typing.get_type_hints(kind)
    problems += [
        f"{prefix}{field}: unknown, expected some of {', '.join(kinds)}"
        for field in values
        if field not in kinds
    ]
    made = {
        field: _value(kinds[field], value, f"{prefix}{field}", problems)
        for field, value in values.items()
        if field in kinds
    }
    if type(seed := made.get("seed")) is int and seed not in SEEDS:
        problems.append(_misfit(f"{prefix}seed", seed, _SEEDS))
    return None if problems else kind(**made)


def _value(kind: Any, value: Any, name: str, problems: list[str], also: str = "") -> Any:
    """What a field holds, from JSON; where it does not fit, a line goes to `problems`.

    Args:
      also: what else than `kind` the field takes, for that line.
    """
    parts = typing.get_args(kind)
    if type(None) in parts:
        return None if value is None else _value(parts[0], value, name, problems, " or null")
    if dataclasses.is_dataclass(kind):
        return _nested(kind, value, name, problems)
    if typing.get_origin(kind) is tuple:
        if isinstance(value, list):
            return tuple(
                _value(parts[0], item, f"{name}[{index}]", problems)
                for index, item in enumerate(value)
            )
        problems.append(_misfit(name, value, f"a list{also}"))
    elif typing.get_origin(kind) is Literal:
        if value not in parts:
            problems.append(_misfit(name, value, f"one of {', '.join(parts)}{also}"))
    elif type(value) not in _JSON[kind][0]:  # not isinstance: true is no number
        problems.append(_misfit(name, value, _JSON[kind][1] + also))
    elif kind in (pathlib.Path, float):
        return kind(value)
    return value


def _misfit(name: str, found: Any, expected: str) -> str:
    return f"{name}: found {json.dumps(found, default=repr)[:60]}, expected {expected}"


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(inner) for name, inner in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(inner) for inner in value]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return plain(value)
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        return float(value)
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def _options(settings: Any, prefix: str) -> Iterator[str]:
    for field in dataclasses.fields(settings):
        value, name = getattr(settings, field.name), f"--{prefix}{field.name.replace('_', '-')}"
        if field.name == "source" or value == field.default:
            continue
        if dataclasses.is_dataclass(value):
            yield from _options(value, f"{prefix}{field.name}.")
        elif isinstance(value, bool):
            yield name
        elif isinstance(value, tuple):
            yield from (name, *map(str, value))
        else:
            yield from (name, str(value))
