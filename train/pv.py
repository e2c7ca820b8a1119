# SPDX-License-Identifier: Apache-2.0
"""SeMI-PV: one optax transformation that trains codes, codebooks, scales and everything else.

Sources: PV-Tuning (arXiv:2405.14852) and its reference optimizer, whose traces this code follows to
rounding; selective momentum invalidation of AQUATIC-Diff (arXiv:2506.05960), of which the authors
published the idea alone: when a vector takes other codes, what its moments had gathered belongs to
a place that it left.

Dimension key:  O rows   N fan-in   J vectors of a row   M codebooks   K entries   G weights of a
                vector   V vectors that are searched

A step:
  1. gradients of codebooks and scales from that of the dense weight, and one step of Adam or LAMB;
  2. the target of the codes takes a step, too, along the dense gradient;
  3. V step: vectors far from their target get the codes nearest to it, within limits, codebooks and
     scales as they are after 1 (`v_step`);
  4. the moments of the vectors that moved are invalidated.
"""

import dataclasses
import functools
import importlib.metadata
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.core import Tracer

from vqjax.core import cores, grouping
from vqjax.core.coded import CodedWeight
from vqjax.core.host import to_device
from vqjax.core.scales import LEVELS
from vqjax.errors import VqjaxError
from vqjax.train import adam
from vqjax.train.adam import Moments
from vqjax.train.v_step import Limits, Move, v_step

Rate = float | Callable[[Any], Any]
"""Step size, or an optax schedule: a function of the number of steps done."""

_TWO_EMITTERS = tuple(map(int, importlib.metadata.version("jaxlib").split(".")[:2])) < (0, 11)

# For a CPU. Programs of a hundred small steps take half of the time to compile, and run no slower,
# by the older of two emitters that jaxlib 0.10 can choose from. Networks do not: they are slower.
_QUICK = {"xla_backend_optimization_level": 1} | (
    {"xla_cpu_use_fusion_emitters": False} if _TWO_EMITTERS else {}
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PVConfig:
    """What is trained, and how far a step goes. The defaults are the reference's recipe.

    Attributes:
      lr, betas: of codebooks, row scales, and all leaves that are no `CodedWeight`.
      code_lr, code_betas: of the target of the codes.
      eps: added to the root of the second moment, before bias correction.
      lamb: steps of codebooks, scales and targets are relative to their norms. Other leaves take
        Adam's: biases often start at 0.
      delta_decay: share by which the target returns to the weight after each step. 0 is a
        straight-through buffer, 1 starts each step at the weight: the linearized V step.
      beam: hypotheses of the code search; 0 enumerates where there are up to 262,144 sums.
      max_code_change, trust_ratio, force_change, temperature: limits of a V step, see `Limits`.
      invalidate: which moments vectors lose when they move.
      codebook_moments: "decay" takes from the moments of an entry the share of its vectors that
        left or entered it, "keep" leaves them.
      train_codes, train_codebooks: whether codes, and codebooks and scales, are trained.
    """

    lr: Rate = 3e-4
    betas: tuple[float, float] = (0.9, 0.95)
    code_lr: Rate = 1e-2
    code_betas: tuple[float, float] = (0.0, 0.95)
    eps: float = 1e-6
    lamb: bool = True
    delta_decay: float = 0.0
    beam: int = 0
    max_code_change: float = 1e-2
    trust_ratio: float | None = None
    force_change: bool = False
    temperature: float | None = None
    invalidate: Literal["none", "first", "both"] = "none"
    codebook_moments: Literal["keep", "decay"] = "keep"
    train_codes: bool = True
    train_codebooks: bool = True

    def __post_init__(self) -> None:
        """Raises VqjaxError if a number is out of its range."""
        problems = []
        if not 0 <= self.delta_decay <= 1:
            problems.append(f"delta_decay {self.delta_decay}, expected 0 to 1")
        if not 0 < self.max_code_change <= 1:
            problems.append(f"max_code_change {self.max_code_change}, expected above 0, up to 1")
        if not all(0 <= beta < 1 for beta in (*self.betas, *self.code_betas)):
            problems.append(f"betas {self.betas} and {self.code_betas}, expected 0 to below 1")
        if self.beam < 0 or (self.force_change and not self.beam):
            problems.append(
                f"beam {self.beam}, expected 0 or more, and 1 or more where change is forced"
            )
        if self.temperature is not None and self.temperature <= 0:
            problems.append(f"temperature {self.temperature}, expected above 0 or None")
        if problems:
            raise VqjaxError("PVConfig: " + "; ".join(problems))

    @property
    def limits(self) -> Limits:
        """Those of the V step."""
        return Limits(
            max_code_change=self.max_code_change,
            trust_ratio=self.trust_ratio,
            temperature=self.temperature,
            beam=self.beam,
            force_change=self.force_change,
        )


CODEBOOKS_ONLY = PVConfig(lr=2e-3, train_codes=False)
"""Codebooks, scales and other leaves; codes stay."""

STRAIGHT_THROUGH = PVConfig(lr=2e-3, code_lr=2e-3)
"""Targets that remember all gradients: codes change late, and then many at once."""

PV = dataclasses.replace(STRAIGHT_THROUGH, delta_decay=0.02, code_betas=(0.9, 0.95))
"""PV-Tuning. A steady gradient moves a target by code_lr / delta_decay, a tenth of the weights'
norm, away from its weight: less than half of the way to the next sum at two bits, so that codes of
layers with correlated inputs do not overshoot."""

SEMI_PV = dataclasses.replace(PV, invalidate="both", codebook_moments="decay")
"""PV-Tuning with selective momentum invalidation."""


class CodeState(NamedTuple):
    """What belongs to the codes of one weight.

    Attributes:
      target_OJG: where the codes should be, without input scales, zero-padded; None where
        `delta_decay` is 1: then it is the weight itself.
      moments: of the dense gradient, [O, J, G]; masses [O, J, 1], one age per vector.
      moved: share of the vectors whose codes the last step changed, scalar.
    """

    target_OJG: jax.Array | None
    moments: Moments
    moved: jax.Array


class WeightState(NamedTuple):
    """What belongs to a `CodedWeight`.

    Attributes:
      codebooks: masses [M, K, 1]; None where codebooks are not trained.
      scales: None where codebooks are not trained.
      codes: None where codes are not trained.
    """

    codebooks: Moments | None
    scales: Moments | None
    codes: CodeState | None


class PVState(NamedTuple):
    """State of `semi_pv`.

    Attributes:
      count: steps done, int32.
      leaves: tree of the parameters with a `WeightState` for each `CodedWeight` and `Moments` for
        each other leaf.
      key: random key, or None.
    """

    count: jax.Array
    leaves: Any
    key: jax.Array | None


def semi_pv(
    config: PVConfig, key: jax.Array | None = None, *, donate: bool = False
) -> optax.GradientTransformationExtraArgs:
    """Returns the transformation, for trees of float arrays and `CodedWeight`s.

    `update(updates, state, params)` takes the gradient of the decoded kernel, in its shape, where
    the parameters have a `CodedWeight`. It returns updates in the structure of the parameters;
    `optax.apply_updates` adds codes, too, modulo the range of their type. In a chain it therefore
    comes last.

    `update` is compiled weight by weight, and weights of one shape share a program: call it outside
    of `jit`, where a large network would be one program of minutes.

    Args:
      key: decides which vectors are drawn; needed where `config.temperature` is a number.
      donate: `update` takes the memory of the state that it is given for the one that it returns:
        three numbers less per weight, and the given state is gone. Only outside of `jit`.

    Raises:
      VqjaxError: if a key is needed and missing; by `update`, if params are missing or a gradient
        has another shape than its kernel.
    """
    if config.temperature is not None and key is None:
        raise VqjaxError("semi_pv draws vectors where a temperature is given: pass a key")

    def init(params: Any) -> Any:
        leaves, treedef = _leaves(params)
        fixed = _without_schedules(config)
        states = [
            _weight_state(leaf, fixed) if _is_coded(leaf) else adam.no_moments(leaf)
            for leaf in leaves
        ]
        return PVState(jnp.zeros((), jnp.int32), treedef.unflatten(states), key)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        del extra
        if params is None:
            raise VqjaxError("semi_pv searches codes for the present weights: pass params")
        leaves, treedef = _leaves(params)
        grads, owned = treedef.flatten_up_to(updates), treedef.flatten_up_to(state.leaves)
        now = _now(config, state)
        fixed = _without_schedules(config)
        triples = list(zip(leaves, grads, owned, strict=True))
        plain = [index for index, leaf in enumerate(leaves) if not _is_coded(leaf)]
        of_plain = _of_plain(donate and not isinstance(now.count, Tracer))
        parts = ([triples[index][part] for index in plain] for part in range(3))
        found = dict(zip(plain, of_plain(fixed, now, *parts)))
        coded = [index for index in range(len(leaves)) if index not in found]
        if isinstance(now.count, Tracer):
            step = _Step(fixed, now)
            found |= {index: step.of_weight(*triples[index], index) for index in coded}
        else:
            compiled = _of_weight(donate)
            own = cores.each(lambda index: compiled(fixed, now, index, *triples[index]), coded)
            found |= zip(coded, own)
        pairs = [found[index] for index in range(len(leaves))]
        updates = treedef.unflatten([update for update, _ in pairs])
        owned = treedef.unflatten([own for _, own in pairs])
        return updates, PVState(state.count + 1, owned, state.key)

    return optax.GradientTransformationExtraArgs(init, update)


def compile_ahead(config: PVConfig, params: Any, state: PVState, *, donate: bool = False) -> None:
    """Compiles what `update` of `semi_pv` runs, for one weight of each kind.

    `update` does so by itself; here it can be done beside other work, with little memory.

    Args:
      config, donate: those of the transformation; schedules do not matter.
      params, state: shapes, types and places of what `update` will be given, or that itself.
    """

    def zeros(array: Any) -> jax.Array:
        if jnp.issubdtype(array.dtype, jax.dtypes.prng_key):
            return jax.device_put(jax.random.key(0), array.sharding)
        return jax.device_put(np.zeros(array.shape, array.dtype), array.sharding)

    now = _now(config, jax.tree.map(zeros, state._replace(leaves=None)))
    leaves, treedef = _leaves(params)
    kinds = {}
    for index, (leaf, own) in enumerate(zip(leaves, treedef.flatten_up_to(state.leaves))):
        if _is_coded(leaf):
            shapes = [(array.shape, array.dtype) for array in jax.tree.leaves((leaf, own))]
            kinds.setdefault((leaf.shape, leaf.grouping, tuple(shapes)), (index, leaf, own))
    compiled, fixed = _of_weight(donate), _without_schedules(config)

    def compile_one(kind: tuple) -> None:
        index, *parts = kind
        leaf, own = jax.tree.map(zeros, parts)
        books = leaf.codebooks_MKG
        grad = jax.device_put(np.zeros(leaf.shape, books.dtype), books.sharding)
        jax.block_until_ready(compiled(fixed, now, index, leaf, grad, own))

    cores.each(compile_one, kinds.values())


def forget_programs() -> None:
    """Gives back the memory of what `update` compiled: a program for each kind of weight.

    On a CPU each takes many mappings of memory, of which Linux lets a process have 65,530 by
    default: one that trains by several configurations after each other runs out of them.
    """
    for donate in (False, True):
        compiled: Any = _of_weight(donate)
        compiled.clear_cache()


def moved_fraction(state: PVState) -> jax.Array:
    """Returns the share of all vectors whose codes the last step changed, scalar."""
    codes = _code_states(state)
    sizes = [own.moments.first_mass.size for own in codes]
    moved = sum((own.moved * size for own, size in zip(codes, sizes, strict=True)), jnp.zeros(()))
    return moved / max(1, sum(sizes))


def invalidate_all(state: PVState) -> PVState:
    """Returns the state with the moments of all targets as before the first step.

    For where gradients stop resembling those before, as when a sampling trajectory starts anew.
    Targets, and the moments of everything else, stay.
    """

    def forget(own: Any) -> Any:
        if not isinstance(own, CodeState):
            return own
        return own._replace(moments=adam.forgotten(own.moments, 0.0, 0.0))

    return state._replace(leaves=jax.tree.map(forget, state.leaves, is_leaf=_is_code_state))


def _is_coded(leaf: Any) -> bool:
    return isinstance(leaf, CodedWeight)


def _is_code_state(leaf: Any) -> bool:
    return isinstance(leaf, CodeState)


def _code_states(state: PVState) -> list[CodeState]:
    leaves = jax.tree.leaves(state.leaves, is_leaf=_is_code_state)
    return [own for own in leaves if _is_code_state(own)]


def _leaves(params: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(params, is_leaf=_is_coded)


def _weight_state(weight: CodedWeight, config: PVConfig) -> WeightState:
    codebooks = scales = codes = None
    if config.train_codebooks:
        mass_shape = (*weight.codebooks_MKG.shape[:2], 1)
        codebooks = adam.no_moments(weight.codebooks_MKG, mass_shape)
        scales = adam.no_moments(weight.scales_O)
    if config.train_codes:
        traced = isinstance(weight.codes_OJM, Tracer)
        start_OJG = weight.vectors() if traced else to_device(weight.host_vectors())
        moments = adam.no_moments(start_OJG, (*start_OJG.shape[:2], 1))
        target = None if config.delta_decay == 1 else start_OJG
        codes = CodeState(target, moments, jnp.zeros((), jnp.float32))
    return WeightState(codebooks, scales, codes)


def _without_schedules(config: PVConfig) -> PVConfig:
    """All schedules share programs."""
    return dataclasses.replace(config, lr=0.0, code_lr=0.0)


def _at(rate: Rate, count: jax.Array) -> jax.Array | float:
    return rate(count) if callable(rate) else rate


class _Now(NamedTuple):
    """What a step of the run shares; `count` includes it."""

    lr: jax.Array
    code_lr: jax.Array
    count: jax.Array
    key: jax.Array | None


def _now(config: PVConfig, state: PVState) -> _Now:
    def at(rate: Rate) -> jax.Array:
        # Placed where the state is: programs know places.
        return jnp.asarray(_at(rate, state.count) + 0 * state.count, float)

    return _Now(at(config.lr), at(config.code_lr), state.count + 1, state.key)


@functools.cache
def _of_plain(donate: bool) -> Callable[..., list[tuple]]:
    """Returns the compiled updates and states of all leaves that are arrays."""

    @functools.partial(
        jax.jit, static_argnames="config", donate_argnames="owned" if donate else None
    )
    def of_plain(config: PVConfig, now: _Now, leaves, grads, owned) -> list[tuple]:
        step = _Step(config, now)
        return [step.of_plain(*triple) for triple in zip(leaves, grads, owned, strict=True)]

    return of_plain


@functools.cache
def _of_weight(donate: bool) -> Callable[..., tuple[Any, Any]]:
    """Returns the compiled update and state of a `CodedWeight`."""
    quick = jax.default_backend() == "cpu" and not jax.config.read("jax_disable_most_optimizations")

    @functools.partial(
        jax.jit,
        static_argnames="config",
        compiler_options=_QUICK if quick else None,
        donate_argnames="own" if donate else None,
    )
    def of_weight(config: PVConfig, now: _Now, index, weight, grad, own):
        return _Step(config, now).of_weight(weight, grad, own, index)

    return of_weight


@dataclasses.dataclass(frozen=True)
class _Step:
    """One step of the run."""

    config: PVConfig
    now: _Now

    def _adam(self, moments, param, rate, betas, *, lamb: bool) -> jax.Array:
        count, eps = self.now.count, self.config.eps
        return adam.step(moments, param, count, rate, betas, eps=eps, lamb=lamb)

    def _ordinary(self, param, grad, moments, *, lamb: bool) -> tuple[jax.Array, Moments]:
        """Returns the update of what has ordinary gradients, in its type, and its moments."""
        moments = adam.advanced(moments, grad, self.config.betas)
        update = self._adam(moments, param, self.now.lr, self.config.betas, lamb=lamb)
        return update.astype(param.dtype), moments

    def of_plain(self, param, grad, moments: Moments) -> tuple[jax.Array, Moments]:
        return self._ordinary(param, grad, moments, lamb=False)

    def of_weight(
        self, weight: CodedWeight, grad: jax.Array, own: WeightState, index: Any
    ) -> tuple[CodedWeight, WeightState]:
        if grad.shape != weight.shape:
            raise VqjaxError(
                f"gradient {grad.shape} for a kernel {weight.shape}: expected that of the decoded "
                f"weight"
            )
        grad_ON = grouping.to_matrix(grad).astype(weight.codebooks_MKG.dtype)
        if weight.input_scales_N is not None:
            grad_ON *= weight.input_scales_N[None]
        grad_OJG = grouping.to_vectors(grad_ON, weight.codebooks_MKG.shape[-1])
        updates = jax.tree.map(jnp.zeros_like, weight)
        if own.codebooks is not None and own.scales is not None:
            updates, own = self._p_step(weight, grad_OJG, own, updates)
        if own.codes is None:
            return updates, own
        present = weight
        weight = dataclasses.replace(
            weight,
            codebooks_MKG=weight.codebooks_MKG + updates.codebooks_MKG,
            scales_O=weight.scales_O + updates.scales_O,
        )
        target_OJG, moments = self._target(present, grad_OJG, own.codes)
        key = self.now.key
        if key is not None:
            key = jax.random.fold_in(jax.random.fold_in(key, self.now.count), index)
        move = v_step(weight, target_OJG, self.config.limits, key)
        weight = dataclasses.replace(weight, codes_OJM=move.codes_OJM)
        own = own._replace(codes=self._after_move(target_OJG, moments, move))
        if own.codebooks is not None and self.config.codebook_moments == "decay":
            kept_MK1 = _kept_members(present.codes_OJM, move, weight.codebooks_MKG.shape[1])
            own = own._replace(codebooks=adam.forgotten(own.codebooks, kept_MK1, kept_MK1))
        # Unsigned differences wrap around, and so does the sum that undoes them.
        change_OJM = move.codes_OJM - present.codes_OJM
        return dataclasses.replace(updates, codes_OJM=change_OJM), own

    def _p_step(self, weight: CodedWeight, grad_OJG, own: WeightState, updates: CodedWeight):
        """Returns updates of codebooks and scales, and the state with their moments."""

        def sums(books_MKG):
            return dataclasses.replace(weight, codebooks_MKG=books_MKG).sums()

        sums_OJG, back = jax.vjp(sums, weight.codebooks_MKG)
        (books_grad,) = back(grad_OJG * weight.rounded_scales()[:, None, None])
        scales_grad = jnp.sum(grad_OJG * sums_OJG, axis=(1, 2))
        lamb = self.config.lamb
        books, book_moments = self._ordinary(
            weight.codebooks_MKG, books_grad, own.codebooks, lamb=lamb
        )
        scales, scale_moments = self._ordinary(weight.scales_O, scales_grad, own.scales, lamb=lamb)
        updates = dataclasses.replace(
            updates, codebooks_MKG=books, scales_O=_within_range(weight, scales)
        )
        return updates, own._replace(codebooks=book_moments, scales=scale_moments)

    def _target(self, weight: CodedWeight, grad_OJG, own: CodeState) -> tuple[jax.Array, Moments]:
        """Returns the target after its step, and its moments."""
        grad_OJG = jnp.where(weight.scales_O[:, None, None] > 0, grad_OJG, 0.0)
        moments = adam.advanced(own.moments, grad_OJG, self.config.code_betas)
        target_OJG = weight.vectors() if own.target_OJG is None else own.target_OJG
        target_OJG += self._adam(
            moments, target_OJG, self.now.code_lr, self.config.code_betas, lamb=self.config.lamb
        )
        return target_OJG, moments

    def _after_move(self, target_OJG, moments: Moments, move: Move) -> CodeState:
        """Returns the state of the codes for the next step."""
        decay = self.config.delta_decay
        if decay == 1:
            target_OJG = None
        elif decay > 0:
            target_OJG = decay * move.weights_OJG + (1 - decay) * target_OJG
        if self.config.invalidate != "none":
            kept_OJ1 = jnp.where(move.moved_OJ, 0.0, 1.0)[..., None].astype(moments.first.dtype)
            both = self.config.invalidate == "both"
            moments = adam.forgotten(moments, kept_OJ1, kept_OJ1 if both else 1.0)
        return CodeState(target_OJG, moments, jnp.mean(move.moved_OJ, dtype=jnp.float32))


_LEAST_SHRINK = 2.0**-10


def _within_range(weight: CodedWeight, update_O: jax.Array) -> jax.Array:
    """Returns the update of the scales, shortened so that they stay positive and on their grid."""
    # A step that leaves a thousandth of a scale is not the gradient's to decide.
    low_O = weight.scales_O * _LEAST_SHRINK
    high_O = jnp.full_like(low_O, jnp.inf)
    if weight.scale_range is not None:
        ends = weight.scale_range[0] + jnp.array([0.0, LEVELS - 1]) * weight.scale_range[1]
        least, most = jnp.exp2(ends)
        low_O, high_O = jnp.maximum(low_O, least), jnp.full_like(low_O, most)
    clipped_O = jnp.clip(weight.scales_O + update_O, low_O, high_O) - weight.scales_O
    return jnp.where(weight.scales_O > 0, clipped_O, 0.0)


def _kept_members(codes_OJM: jax.Array, move: Move, entries: int) -> jax.Array:
    """Returns 1 - (vectors that left or entered) / vectors of each entry, at least 0, [M, K, 1]."""
    books = codes_OJM.shape[-1]

    def counts(codes_VM: jax.Array, weights_VM: jax.Array) -> jax.Array:
        book_1M = jnp.arange(books, dtype=jnp.int32)[None]
        return jnp.zeros((books, entries), weights_VM.dtype).at[book_1M, codes_VM].add(weights_VM)

    moved_VM = (move.before_VM != move.after_VM).astype(jnp.float32)
    changes_MK = counts(move.before_VM, moved_VM) + counts(move.after_VM, moved_VM)
    all_XM = codes_OJM.reshape(-1, books).astype(jnp.int32)
    members_MK = counts(all_XM, jnp.ones(all_XM.shape, jnp.float32))
    return jnp.clip(1 - changes_MK / jnp.maximum(members_MK, 1.0), 0.0, 1.0)[..., None]
