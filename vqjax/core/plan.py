# SPDX-License-Identifier: Apache-2.0
"""Which layer gets how many bits: kinds by rule, sizes under one budget, JSON in and out.

Layers of a diffusion U-Net differ in shape, in use and in what an error in them costs
(layer-heterogeneity-aware quantization, AQUATIC-Diff, arXiv:2506.05960). Rules sort them into
kinds; kinds decide how weights are grouped; `make_plan` spends a budget of stored bits on them.
"""

import dataclasses
import heapq
import json
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

from vqjax.core import bits as bits_lib
from vqjax.core import grouping
from vqjax.core.bits import StoredBits, stored_bits
from vqjax.errors import VqjaxError, gathered

KINDS = ("first_last", "conv3x3", "conv1x1", "attention", "feed_forward", "time")
"""Kinds of layers, in the order that reports list them."""

ENTRIES = 16
"""Entries of a codebook where nobody chose otherwise: 4-bit codes, and little to store."""

MOST_CODEBOOKS = 10

_INT8_OVERHEAD = 0.01
_INT8_CODEBOOKS = 5
_VERSION = 1


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
    """

    kind: str
    grouping: str
    group: int
    codebooks: int
    entries: int
    codebook_bits: int = 16

    def stored(self, shape: tuple[int, ...]) -> StoredBits:
        """Returns the exact stored bits for a kernel of this shape."""
        return stored_bits(
            shape,
            group=self.group,
            books=self.codebooks,
            entries=self.entries,
            codebook_bits=self.codebook_bits,
        )

    def problems(self) -> list[str]:
        """Returns what is wrong with the fields, one line each."""
        if self.kind not in KINDS:
            return [f"kind {self.kind!r}, expected one of {list(KINDS)}"]
        found = []
        if self.grouping not in grouping.GROUPS:
            found.append(f"grouping {self.grouping!r}, expected one of {list(grouping.GROUPS)}")
        ranges = {"group": (1, 64), "codebooks": (1, 16), "entries": (2, 4096)}
        if self.grouping == "scalar":
            ranges = {"group": (1, 1), "codebooks": (1, 1), "entries": (2, 256)}
        for name, (low, high) in ranges.items():
            value = getattr(self, name)
            if not isinstance(value, int) or not low <= value <= high:
                found.append(f"{name} {value!r}, expected a whole number from {low} to {high}")
        if self.codebook_bits not in (8, 16):
            found.append(f"codebook_bits {self.codebook_bits!r}, expected 8 or 16")
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


RULES = (
    Rule("first_last", r"^unet/(input_blocks_0|out)/conv/kernel$"),
    Rule("time", r"/(time_embed/dense\d+|emb)/kernel$"),
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
            raise VqjaxError(f"the plan is no JSON: {error}; see `--dry-run` for one") from None
        if not isinstance(data, dict) or not isinstance(data.get("layers"), dict):
            raise VqjaxError('the plan has no "layers" object; see `--dry-run` for a whole plan')
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


def layer_spec(
    kind: str, shape: tuple[int, ...], *, codebooks: int, entries: int = ENTRIES
) -> LayerSpec:
    """Returns the spec that a kind implies, with M codebooks of K entries.

    Codebooks are int8 where float16 ones would cost over 0.01 bits per weight; above five codebooks
    the errors are so small that the rounding would show.
    """
    if kind == "first_last":
        return LayerSpec("first_last", "scalar", 1, 1, 256, 8)
    name = "conv3x3" if tuple(shape[:-2]) == (3, 3) else "linear"
    spec = LayerSpec(kind, name, grouping.GROUPS[name], codebooks, entries)
    costly = spec.stored(shape).codebooks > _INT8_OVERHEAD * math.prod(shape)
    if costly and codebooks <= _INT8_CODEBOOKS:
        return dataclasses.replace(spec, codebook_bits=8)
    return spec


def make_plan(
    shapes: Mapping[str, tuple[int, ...]],
    *,
    bits: float,
    sensitivity: Mapping[str, float] | None = None,
    rules: tuple[Rule, ...] = RULES,
    entries: int = ENTRIES,
) -> Plan:
    """Spends a budget of stored bits on the layers: the next bit goes where it gains most.

    A layer's loss is taken as sensitivity * 2^(-2 R) with R its code bits per weight, the slope of
    the rate-distortion function of a Gaussian source. Adding codebooks one at a time, best ratio of
    gain to stored bits first, is optimal for such convex losses up to the last step.

    Args:
      shapes: of all parameters, or of the kernels, by path.
      bits: stored bits per quantized weight that must not be exceeded: codes, codebooks, scales and
        padding of all layers, first and last included.
      sensitivity: what a relative output error of 1 in a layer costs; default: the square root
        of its weights. A layer's error enters the residual stream whatever its size: on the
        embedded model at 2 bits, this brings samples 3.1 dB nearer to full precision than costs
        in proportion to the weights; equal costs bring 3.2 dB, but starve the largest layers.
      rules: sort layers into kinds.
      entries: K of every codebook.

    Raises:
      VqjaxError: if even one codebook per layer is over the budget, or no rule fits a layer.
    """
    kernels = kernel_shapes(shapes)
    if not kernels:
        raise VqjaxError("no U-Net kernels found: expected paths like 'unet/out/conv/kernel'")
    kinds = {path: kind_of(path, shape, rules) for path, shape in kernels.items()}
    layers = {
        path: layer_spec(kinds[path], shape, codebooks=1, entries=entries)
        for path, shape in kernels.items()
    }
    least = Plan(layers).bits_report(kernels).total
    left = math.floor(bits * least.weights) - least.total
    if left < 0:
        raise VqjaxError(
            f"{bits} bits per weight is too little: one codebook of {entries} entries per layer "
            f"already takes {least.per_weight:.3f}; ask for at least that"
        )
    weight = {
        path: (sensitivity or {}).get(path, math.sqrt(math.prod(kernels[path]))) for path in kernels
    }
    _spend(layers, kernels, weight, left)
    return Plan(layers, bits)


def _spend(
    layers: dict[str, LayerSpec],
    shapes: dict[str, tuple[int, ...]],
    weight: dict[str, float],
    left: int,
) -> None:
    """Adds codebooks to `layers` in place until nothing more fits into `left` bits."""

    def offer(path: str) -> tuple[float, str, LayerSpec, int] | None:
        spec = layers[path]
        if spec.grouping == "scalar" or spec.codebooks >= MOST_CODEBOOKS:
            return None
        more = layer_spec(
            spec.kind, shapes[path], codebooks=spec.codebooks + 1, entries=spec.entries
        )
        price = more.stored(shapes[path]).total - spec.stored(shapes[path]).total
        gain = weight[path] * (_distortion(spec) - _distortion(more))
        return -gain / price, path, more, price

    offers = [found for path in layers if (found := offer(path)) is not None]
    heapq.heapify(offers)
    while offers:
        _, path, more, price = heapq.heappop(offers)
        if price > left:
            continue
        layers[path], left = more, left - price
        if (found := offer(path)) is not None:
            heapq.heappush(offers, found)


def _distortion(spec: LayerSpec) -> float:
    return 2.0 ** (-2 * spec.codebooks * math.log2(spec.entries) / spec.group)
