# SPDX-License-Identifier: Apache-2.0
"""Which layer gets how many bits: kinds by rule, sizes under one budget, JSON in and out.

Layers of a diffusion U-Net differ in shape, in use and in what an error in them costs
(layer-heterogeneity-aware quantization, AQUATIC-Diff, arXiv:2506.05960). Rules sort them into
kinds; kinds decide how weights are grouped; `make_plan` spends a budget of stored bits on them.
"""

import dataclasses
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vqjax.core import bits as bits_lib
from vqjax.core import grouping
from vqjax.core.allocate import Option, allocate
from vqjax.core.bits import StoredBits, stored_bits
from vqjax.core.rate import code_distortion
from vqjax.errors import VqjaxError, gathered

KINDS = ("first_last", "conv3x3", "conv1x1", "attention", "feed_forward", "time")
"""Kinds of layers, in the order that reports list them."""

ENTRIES = 16
"""Entries of a codebook where nobody chose otherwise: 4-bit codes, and little to store."""

MOST_CODEBOOKS = 10

_LONE_ENTRIES = (8, 10, 12, 14, 15, 16, 20, 24, 28, 32, 40, 48, 64, 128, 256)

_VERSION = 1
_WHERE = "take the plan.json of a run folder"  # a dry run writes none


@dataclasses.dataclass(frozen=True)
class LayerSpec:
    """How one kernel is stored.

    Attributes:
      kind: one of `KINDS`.
      grouping: "conv3x3", "linear" or "scalar" (`core.grouping`).
      group: G, weights of one vector.
      codebooks: M.
      entries: K.
      codebook_bits: 16 (float16) or 8 (int8).
      input_scales: whether input channels have scales, beside outputs.
    """

    kind: str
    grouping: str
    group: int
    codebooks: int
    entries: int
    codebook_bits: int = 16
    input_scales: bool = False

    def stored(self, shape: tuple[int, ...]) -> StoredBits:
        """Returns the exact stored bits for a kernel of this shape."""
        return stored_bits(
            shape,
            group=self.group,
            books=self.codebooks,
            entries=self.entries,
            codebook_bits=self.codebook_bits,
            input_scales=self.input_scales,
        )

    @property
    def decodes_to_int8(self) -> bool:
        """Whether a row is a multiple of int8 numbers, as integer products need it: int8 codebooks
        (their sums stay within int8, see `core.coded`) and no scale inside the row."""
        return self.codebook_bits == 8 and not self.input_scales

    def problems(self) -> list[str]:
        """Returns what is wrong with the fields, one line each."""
        if self.kind not in KINDS:
            return [f"kind {self.kind!r}, expected one of {list(KINDS)}"]
        found = []
        if self.grouping not in tuple(grouping.GROUPS):  # what JSON holds may have no hash
            found.append(f"grouping {self.grouping!r}, expected one of {list(grouping.GROUPS)}")
        elif not grouping.fits(self.grouping, self.group):
            found.append(
                f"group {self.group!r} with grouping {self.grouping!r}, expected 3 or a multiple "
                f"of 9 for conv3x3, 1 for scalar, 1 to {grouping.MOST_WEIGHTS} for linear"
            )
        ranges = {"codebooks": (1, 16), "entries": (2, 4096)}
        if self.grouping == "scalar":
            ranges = {"codebooks": (1, 1), "entries": (2, 256)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value <= high:
                found.append(f"{name} {value!r}, expected a whole number from {low} to {high}")
        stored = (8,) if self.grouping == "scalar" else (8, 16)
        if self.codebook_bits not in stored:
            expected = " or ".join(map(str, stored))
            found.append(f"codebook_bits {self.codebook_bits!r}, expected {expected}")
        if self.input_scales not in ((False,) if self.grouping == "scalar" else (False, True)):
            found.append(
                f"input_scales {self.input_scales!r}, expected true or false; false for scalar"
            )
        return found


@dataclasses.dataclass(frozen=True)
class Rule:
    """Sorts layers into a kind: the first rule that matches decides.

    Attributes:
      kind: one of `KINDS`.
      pattern: regular expression, searched in the path.
      window: side of the convolution window; 0 for linear layers; None for any.
    """

    kind: str
    pattern: str
    window: int | None = None

    def matches(self, path: str, shape: tuple[int, ...]) -> bool:
        """Whether the rule holds for a kernel."""
        window = shape[0] if len(shape) == 4 else 0
        return self.window in (None, window) and re.search(self.pattern, path) is not None


TIME = r"/(time_embed/dense\d+|emb)/kernel$"
"""Paths of the layers that see the timestep alone."""

RULES = (
    Rule("first_last", r"^unet/(input_blocks_0|out)/conv/kernel$"),
    Rule("time", TIME),
    Rule("feed_forward", r"/ff/(proj|out)/kernel$"),
    Rule("conv3x3", r"", window=3),
    Rule("conv1x1", r"", window=1),
    Rule("attention", r"/attn[12]?/(to_q|to_k|to_v|to_out|qkv|proj_in|proj_out)/kernel$", window=0),
)
"""Kinds of the layers of every latent diffusion U-Net."""


@dataclasses.dataclass(frozen=True)
class BitsReport:
    """Stored bits of a plan.

    Attributes:
      layers: by path.
      kinds: the same, summed by kind.
      total: over all quantized weights.
    """

    layers: dict[str, StoredBits]
    kinds: dict[str, StoredBits]
    total: StoredBits


@dataclasses.dataclass(frozen=True)
class Plan(Mapping[str, LayerSpec]):
    """An ordered, read-only mapping from kernel path to `LayerSpec`.

    Attributes:
      layers: the mapping.
      bits: budget that it was made for, bits per weight, or None for a plan made by hand.
    """

    layers: dict[str, LayerSpec]
    bits: float | None = None

    def __getitem__(self, path: str) -> LayerSpec:
        return self.layers[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    def bits_report(self, shapes: Mapping[str, tuple[int, ...]]) -> BitsReport:
        """Returns what the plan will store, exactly, without compressing anything."""
        layers = {path: spec.stored(tuple(shapes[path])) for path, spec in self.items()}
        kinds = {
            kind: sum(
                (layers[path] for path, spec in self.items() if spec.kind == kind),
                start=bits_lib.NOTHING,
            )
            for kind in KINDS
            if any(spec.kind == kind for spec in self.values())
        }
        return BitsReport(layers, kinds, sum(layers.values(), start=bits_lib.NOTHING))

    def check(self, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Compares the plan with a model.

        Args:
          shapes: of all parameters (or all kernels), by path.

        Raises:
          VqjaxError: lists every layer that is missing, unknown or does not fit its kernel.
        """
        kernels = kernel_shapes(shapes)
        problems = [f"{path}: missing in the plan" for path in kernels if path not in self]
        for path, spec in self.items():
            if path not in kernels:
                problems.append(f"{path}: the model has no such kernel")
            elif spec.grouping == "conv3x3" and kernels[path][:2] != (3, 3):
                problems.append(f"{path}: grouping conv3x3 for a kernel {kernels[path]}")
        if problems:
            raise gathered(problems, "the plan does not fit the model; edit it or make a new one:")

    def check_integer(self) -> None:
        """Raises VqjaxError unless all layers decode to int8; names those that do not."""
        problems = [
            f"{path}: codebook_bits {spec.codebook_bits}, input_scales {spec.input_scales}"
            for path, spec in self.items()
            if not spec.decodes_to_int8
        ]
        if problems:
            raise gathered(
                problems,
                "quantized activations need weights that decode to int8: set codebook_bits to 8 "
                "and input_scales to false in the plan, or ask for --act-bits 32:",
            )

    def to_json(self) -> str:
        """Returns the plan as JSON, one line per layer, made to be read and edited."""
        lines = [
            f"    {json.dumps(path)}: {json.dumps(dataclasses.asdict(spec))}"
            for path, spec in self.items()
        ]
        layers = ",\n".join(lines)
        head = f'  "version": {_VERSION},\n  "bits": {json.dumps(self.bits)},\n'
        return f'{{\n{head}  "layers": {{\n{layers}\n  }}\n}}\n'

    @classmethod
    def from_json(cls, text: str) -> "Plan":
        """The inverse of `to_json`.

        Raises:
          VqjaxError: lists everything that is wrong with the text.
        """
        try:
            data = json.loads(text)
        except json.JSONDecodeError as error:
            raise VqjaxError(f"the plan is no JSON: {error}; {_WHERE}") from None
        if not isinstance(data, dict) or not isinstance(data.get("layers"), dict):
            raise VqjaxError(f'the plan has no "layers" object; {_WHERE}')
        if data.get("version") != _VERSION:
            raise VqjaxError(f"plan version {data.get('version')!r}, expected {_VERSION}")
        problems: list[str] = []
        layers = {
            path: spec
            for path, fields in data["layers"].items()
            if (spec := _layer(path, fields, problems)) is not None
        }
        unknown = sorted(set(data) - {"version", "bits", "layers"})
        problems += [f"unknown field {name!r} beside layers" for name in unknown]
        if problems:
            raise gathered(problems, "the plan cannot be used:")
        return cls(layers, data.get("bits"))


def _layer(path: str, fields: Any, problems: list[str]) -> LayerSpec | None:
    names = {field.name: field.default for field in dataclasses.fields(LayerSpec)}
    if not isinstance(fields, dict):
        problems.append(f"{path}: {fields!r}, expected an object with {list(names)}")
        return None
    unknown = sorted(set(fields) - set(names))
    required = {name for name, default in names.items() if default is dataclasses.MISSING}
    missing = sorted(required - set(fields))
    if unknown or missing:
        what = [f"unknown field {name!r}" for name in unknown]
        what += [f"missing field {name!r}" for name in missing]
        problems.append(f"{path}: {', '.join(what)}; expected {list(names)}")
        return None
    spec = LayerSpec(**fields)
    problems += [f"{path}: {problem}" for problem in spec.problems()]
    return spec


def kernel_shapes(shapes: Mapping[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that a plan covers: U-Net kernels of two or more axes.

    Norms, biases, embeddings and the first stage stay in floating point.
    """
    return {
        path: tuple(shape)
        for path, shape in shapes.items()
        if path.startswith("unet/") and path.endswith("/kernel") and len(shape) >= 2
    }


def kind_of(path: str, shape: tuple[int, ...], rules: tuple[Rule, ...]) -> str:
    """Returns the kind that the first matching rule gives.

    Raises:
      VqjaxError: if no rule matches.
    """
    for rule in rules:
        if rule.matches(path, shape):
            return rule.kind
    raise VqjaxError(
        f"{path} {tuple(shape)}: no rule says what kind of layer this is; add one to the rules"
    )


_SIZES = {
    "linear": ((8, 1), (8, 2), (8, 3), (8, 4), (6, 4), (4, 3), (4, 4), (4, 5)),
    "conv3x3": ((9, 1), (9, 2), (9, 3), (9, 4), (9, 5), (3, 2), (3, 3), (3, 4)),
}
"""Group and codebooks of 16 entries that plans choose from, up to two bits half a bit apart.

Up to four codebooks all sums are enumerated. More bits therefore come from smaller vectors: at 4
bits on Gaussian weights, four codebooks for 4 weights leave a third less error than eight for 8, in
a third of the time. Larger codebooks reach no less error at the same stored bits.
"""

_SCALAR_BITS = (6, 7, 8)
"""Bits of a single weight that plans choose from: codes of vectors end at five bits."""

_UNIFORM = 2.0
"""Error over 2^(-2 bits) of a uniform grid whose ends are near a row's largest weight, about."""


def candidates(
    kind: str, shape: tuple[int, ...], *, input_scales: bool = False, integer: bool = False
) -> list[LayerSpec]:
    """Returns the ways in which a plan may store a kernel, from about 0.5 to 8 bits per weight.

    Args:
      input_scales: whether scales of input channels are among them.
      integer: only ways that decode to int8, for integer products with quantized inputs.
    """
    if kind == "first_last":
        return [LayerSpec(kind, "scalar", 1, 1, 256, 8)]
    name = "conv3x3" if tuple(shape[:-2]) == (3, 3) else "linear"
    vectors = [
        LayerSpec(kind, name, group, books, ENTRIES, codebook_bits, scaled)
        for group, books in _SIZES[name]
        for codebook_bits in ((8,) if integer else (8, 16))
        for scaled in ((False, True) if input_scales and not integer else (False,))
    ]
    return vectors + [LayerSpec(kind, "scalar", 1, 1, 2**bits, 8) for bits in _SCALAR_BITS]


def best_spec(
    shape: tuple[int, ...], limit_bits: float, kind: str, *, input_gain: float = 1.0
) -> LayerSpec:
    """Returns the code of one kernel by itself that promises the least error within a limit.

    Args:
      shape: of the kernel.
      limit_bits: most stored bits per weight, everything counted.
      kind: as in `LayerSpec`.
      input_gain: error with scales of the input channels over that without; 1 for no such scales.

    Raises:
      VqjaxError: if no code stores so little.
    """
    name = "conv3x3" if tuple(shape[:-2]) == (3, 3) else "linear"
    groups = (3, 9) if name == "conv3x3" else range(2, 13)
    outputs, fan_in = grouping.matrix_shape(shape)
    scalings = (False, True) if input_gain < 1 else (False,)
    fitting = [
        spec
        for group, books, size, codebook_bits, scaled in itertools.product(
            groups, range(1, MOST_CODEBOOKS + 1), _LONE_ENTRIES, (8, 16), scalings
        )
        if size <= outputs * grouping.groups_per_row(fan_in, group)
        for spec in [LayerSpec(kind, name, group, books, size, codebook_bits, scaled)]
        if spec.stored(shape).per_weight <= limit_bits
    ]
    if not fitting:
        raise VqjaxError(
            f"no code of a kernel {tuple(shape)} stores {limit_bits:g} bits per weight or less"
        )
    return min(fitting, key=lambda spec: expected_distortion(spec, input_gain))


def expected_distortion(spec: LayerSpec, input_gain: float = 1.0) -> float:
    """Returns the mean squared error that a layer's code leaves of Gaussian weights of variance 1.

    Beside what the codes leave, int8 codebooks round: their step is 1/127 of the largest entry,
    about four standard deviations of the largest codebook, and the codes make up for half of it.

    Args:
      input_gain: what scales of the input channels, where the spec has them, leave of the error.
    """
    if spec.grouping == "scalar":
        return _UNIFORM * spec.entries**-2.0
    rounding = 0.5 * spec.codebooks * (4 / 127) ** 2 / 12 if spec.codebook_bits == 8 else 0.0
    left = code_distortion(spec.group, spec.codebooks, spec.entries) + rounding
    return left * input_gain if spec.input_scales else left


def expected_error(spec: LayerSpec, gain: float, scalar_gain: float, input_gain: float) -> float:
    """Returns the relative output error that a layer's code is expected to leave, at most 1.

    Args:
      gain, scalar_gain: as in `typical_error.TypicalError`.
      input_gain: as in `expected_distortion`.
    """
    factor = scalar_gain if spec.grouping == "scalar" else gain
    return min(1.0, factor * expected_distortion(spec, input_gain))


def make_plan(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    bits: float | None = None,
    size: int | None = None,
    range_bytes: int = 0,
    sensitivity: Mapping[str, float] | None = None,
    gain: Mapping[str, float] | None = None,
    scalar_gain: Mapping[str, float] | None = None,
    input_gain: Mapping[str, float] | None = None,
    integer: bool = False,
    rules: tuple[Rule, ...] = RULES,
) -> Plan:
    """Spends a budget of stored bits on the layers so that the sum of their costs is least.

    A layer costs sensitivity * min(1, gain * D), with D the `expected_distortion` of its code: all
    layers, groupings, codebooks and their storage compete for the same bits (`core.allocate`).

    Args:
      shapes: of all parameters; of the kernels alone where `size` is not given.
      bits: stored bits per quantized weight that must not be exceeded: codes, codebooks, scales and
        padding of all layers, first and last included.
      size: bytes that the whole stored U-Net must not exceed, the parts in float16 and ranges of
        activations included.
      range_bytes: of these ranges.
      sensitivity: what a relative output error of 1 in a layer costs; default: the square root
        of its weights, a layer's error entering the residual stream whatever its size.
      gain: relative output error of a layer over D; default: 1.
      scalar_gain: the same for single weights; default: `gain`.
      input_gain: error of a layer with scales of its input channels over that without; default: 1,
        no such scales.
      integer: all kernels decode to int8, for integer products (`LayerSpec.decodes_to_int8`).
      rules: sort layers into kinds.

    Raises:
      VqjaxError: if the least possible is over the budget, or no rule fits a layer.
    """
    kernels = kernel_shapes(shapes)
    if not kernels:
        raise VqjaxError("no U-Net kernels found: expected paths like 'unet/out/conv/kernel'")
    weights = sum(math.prod(shape) for shape in kernels.values())
    rest = sum(math.prod(s) for p, s in shapes.items() if p.startswith("unet/")) - weights
    if (bits is None) == (size is None):
        raise VqjaxError("a plan needs a budget: bits per weight or a size, not both")
    budget = (
        math.floor(weights * (bits or 0)) if size is None else 8 * (size - range_bytes) - 16 * rest
    )
    choices: dict[str, list[LayerSpec]] = {}
    options: dict[str, list[Option]] = {}
    for path, shape in kernels.items():
        scaled = (input_gain or {}).get(path, 1.0)
        kind = kind_of(path, shape, rules)
        choices[path] = candidates(kind, shape, input_scales=scaled < 1, integer=integer)
        weight = (sensitivity or {}).get(path, math.sqrt(math.prod(shape)))
        factor = (gain or {}).get(path, 1.0)
        gains = factor, (scalar_gain or {}).get(path, factor)
        options[path] = [
            Option(spec.stored(shape).total, weight * expected_error(spec, *gains, scaled))
            for spec in choices[path]
        ]
    least = sum(min(option.bits for option in found) for found in options.values())
    if least > budget:
        asked = f"{bits} bits per weight" if size is None else f"{size / 1e6} MB"
        raise VqjaxError(
            f"{asked} is too little: the least possible is {_up(least / weights, 3)} bits per "
            f"weight, {_up((least + 16 * rest) / 8e6 + range_bytes / 1e6, 3)} MB with all else"
        )
    chosen = allocate(options, budget)
    layers = {path: choices[path][place] for path, place in chosen.items()}
    return Plan(layers, math.floor(1e4 * budget / weights) / 1e4 if bits is None else bits)


def _up(value: float, digits: int) -> float:
    return math.ceil(value * 10**digits) / 10**digits
