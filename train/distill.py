# SPDX-License-Identifier: Apache-2.0
"""Data-free distillation: the full-precision model teaches a quantized copy.

No images are needed (EfficientDM, arXiv 2310.03270, section 3.2): the teacher samples from fresh
noise, with fresh classes, under guidance. What it predicts on the way, in both branches of
guidance, is the target; nothing of it is computed twice.

Dimension key:  B pairs of a latent and a timestep in one step   P trajectories sampled together
                T timesteps of a trajectory   H W latent   C channels   L layers

A sampler of any number of steps shall find the student prepared: pairs have all timesteps. Each
trajectory visits those of a grid, all but the lowest moved by chance up to half way to the next, or
to where there is none.
(What sees the timestep alone, the time embedding, changes fast with it: what was taught at a few
timesteps says little of those between.)

Loss of a step, with e the prediction of the student, e* that of the teacher, g the guidance and w_t
the weight of a timestep (`pipeline.timesteps`; its mean is 1):

    mean over pairs and pixels of  w_t ((1 - g) (e_u - e*_u) + g (e_c - e*_c))^2

the squared error of the guided prediction, which is what the sampler sees. Models without classes
have one branch.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vqjax import models, sampling
from vqjax.config import LatentDiffusionConfig
from vqjax.core import cores
from vqjax.core.activations import Activations
from vqjax.core.model import Model
from vqjax.core.noise import alphas_cumprod
from vqjax.errors import VqjaxError
from vqjax.sampling import ddim
from vqjax.sampling.schedule import ddim_schedule
from vqjax.train import loop, packing

Order = Literal["mixed", "trajectory"]

Optimizer = Any
"""An `optax.GradientTransformation`, whose own type admits trees of arrays alone."""

ADVICE = (
    "try --tuning.rate 0.3 (less above two bits), or fewer --tune-steps; compressed layers serve "
    "both"
)
PRECISION = "tensorfloat32"
"""Of the networks' products on a GPU, whose tensor cores multiply that seven times as fast as
float32: its rounding, 5e-4 of a number, is nothing beside the noise of gradients. CPUs have one."""
_MOST = 20.0  # times the loss of the first steps: beyond, training is not coming back
_WARM_UP = 0.05  # of the steps


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a distillation looks at.

    Attributes:
      steps: optimizer steps.
      batch: pairs of a latent and a timestep in each.
      at_once: of these, computed together; gradients of the parts of a batch are added. A divisor
        of `batch`; 0 takes all.
      trajectories: sampled by the teacher together; their pairs are used once.
      timesteps: of a trajectory, at least: those of the grid.
      guidance: of the trajectories and of the loss.
      seed: of noise, classes and the order of pairs.
      order: "mixed" draws pairs of all timesteps; "trajectory" visits those of the grid, one after
        the other with all images of a batch, as the training loops of EfficientDM and AQUATIC-Diff
        do.
      remat: gradient checkpointing.
      dtype: which both networks compute in; latents, predictions, the loss and gradients are
        float32 all the same.
    """

    steps: int
    batch: int = 32
    at_once: int = 0
    trajectories: int = 128
    timesteps: int = 25
    guidance: float = 1.5
    seed: int = 0
    order: Order = "mixed"
    remat: bool = False
    dtype: str = "float32"

    def __post_init__(self) -> None:
        """Raises VqjaxError if batches have no such parts."""
        if self.batch % self.together:
            raise VqjaxError(
                f"at_once {self.at_once}: expected a divisor of the batch, {self.batch}, or 0"
            )

    @property
    def together(self) -> int:
        """Pairs that are computed together."""
        return self.at_once or self.batch

    @property
    def parts(self) -> int:
        """Parts of a batch that are computed one after the other."""
        return self.batch // self.together


class Ranges(NamedTuple):
    """The tables of `Activations` that are trained, layers in the order of its paths."""

    log2_steps_LT: jax.Array
    zeros_LT: jax.Array

    @classmethod
    def of(cls, activations: Activations) -> "Ranges":
        """All layers in one array each."""
        tables = (activations.log2_steps, activations.zeros)
        return cls(*(jnp.stack([t[path] for path in activations.log2_steps]) for t in tables))

    def to_activations(self, like: Activations) -> Activations:
        """The inverse of `of`; timesteps and bits are those of `like`."""
        tables = (dict(zip(like.log2_steps, table_LT)) for table_LT in self)
        return dataclasses.replace(like, **dict(zip(("log2_steps", "zeros"), tables)))


class Student(NamedTuple):
    """What is trained.

    Attributes:
      weights: the trees "unet" and, with classes, "cond_stage"; quantized kernels are leaves with a
        `decode()`.
      ranges: of the layers' inputs, or None for inputs in floating point.
    """

    weights: dict[str, Any]
    ranges: Ranges | None


class Taught(NamedTuple):
    """What the teacher saw and said at B pairs. Without classes, `ids_B` and `eps_uncond_BHWC` are
    None."""

    x_BHWC: jax.Array
    t_B: jax.Array
    ids_B: jax.Array | None
    eps_cond_BHWC: jax.Array
    eps_uncond_BHWC: jax.Array | None


def distill(
    teacher: Model,
    student: Student,
    weights_optimizer: Optimizer,
    ranges_optimizer: Optimizer,
    recipe: Recipe,
    folder: pathlib.Path,
    *,
    activations: Activations | None = None,
    weight_of_t: Callable[[np.ndarray], np.ndarray] = np.ones_like,
    compile_ahead: Callable[[Any, Any], None] = lambda weights, state: None,
    metrics: Callable[[Any], loop.Metrics] = lambda state: {},
    on_restart: Callable[[Any], Any] | None = None,
    devices: Sequence[Any] | None = None,
    name: str = "tune",
) -> Student:
    """Trains the student; killed, it continues to the same bits.

    Args:
      teacher: full precision.
      weights_optimizer: takes the gradient of the decoded kernel where the student has a quantized
        one (`pv.semi_pv`).
      ranges_optimizer: of the activation ranges.
      folder: absolute path of the checkpoints.
      activations: what the student's ranges are the tables of.
      weight_of_t: weights of timesteps, up to a factor.
      compile_ahead: compiles programs of the weights optimizer, given weights and its state; called
        beside the teacher's first lesson.
      metrics: of the weights optimizer's state, shown beside the loss.
      on_restart: what becomes of that state where new trajectories begin.
      devices: what is computed together is split over as many of them as divide it; parameters
        are on all.
        Default: this process's accelerators, or one CPU, whose simulated devices share its cores.
      name: of the progress line.

    Raises:
      loop.DivergedError: if the loss grows beyond bounds or is not finite.
    """
    mesh = _mesh(recipe, devices)
    everywhere = NamedSharding(mesh, PartitionSpec())
    lessons = Lessons(teacher, recipe, NamedSharding(mesh, PartitionSpec("batch")))
    weight_T = lessons.weights(weight_of_t)
    state = (
        student,
        weights_optimizer.init(student.weights),
        ranges_optimizer.init(student.ranges),
    )
    state = jax.device_put(state, everywhere)
    if loop.begun(folder):
        state = packing.shapes_of(state)  # or the restored one would be in memory beside it

    constants = {"activations": activations, "weight_T": weight_T}
    constants = jax.device_put(constants, everywhere)
    apply: Any = jax.jit(optax.apply_updates)
    update_ranges, show = jax.jit(ranges_optimizer.update), jax.jit(metrics)

    @functools.cache
    def compiled() -> Callable[[], Any]:
        """What waits for the programs of a step. From the first call on other threads compile."""
        (student, weights_state, _), like = state, lessons.like()
        lowered = functools.partial(
            loss_and_gradients.lower,
            teacher.config,
            guidance=recipe.guidance,
            remat=recipe.remat,
            parts=recipe.parts,
            dtype=recipe.dtype,
        )
        program = cores.beside(lambda: lowered(student, like, **constants).compile())
        others = cores.beside(lambda: compile_ahead(student.weights, weights_state))
        return lambda: (program(), others())[0]

    def lesson(index: int) -> tuple[bool, Taught]:
        compiled()  # while the teacher samples
        return index > 0 and index % lessons.steps_per_round == 0, lessons(index)

    def step(state, lesson: tuple[bool, Taught]):
        # Not one program: the weights' optimizer has programs of its own, shared by their shapes.
        (student, weights_state, ranges_state), (restarted, taught) = state, lesson
        if restarted and on_restart is not None:
            weights_state = on_restart(weights_state)
        loss, gradients = compiled()()(student, taught, **constants)
        updates, weights_state = weights_optimizer.update(
            gradients.weights, weights_state, student.weights
        )
        weights = apply(student.weights, updates)
        updates, ranges_state = update_ranges(gradients.ranges, ranges_state, student.ranges)
        ranges = apply(student.ranges, updates)
        shown = {"loss": loss, **show(weights_state)}
        return (Student(weights, ranges), weights_state, ranges_state), shown

    return loop.train(
        name,
        state,
        step,
        recipe.steps,
        folder,
        inputs=lesson,
        most=_MOST,
        # In order of the trajectory losses rise and fall with it, by as much as in a divergence.
        guard=lessons.steps_per_round if recipe.order == "trajectory" else None,
        advice=ADVICE,
    )[0]


def mean_loss(
    teacher: Model,
    params: models.Params,
    recipe: Recipe,
    *,
    weight_of_t: Callable[[np.ndarray], np.ndarray] = np.ones_like,
) -> float:
    """Returns the loss of a model over the batches of a recipe; nothing is trained.

    With a seed that no training had it says how near the model is to its teacher, to a fraction of
    what scores of samples need to show a difference.

    Args:
      params: of the model, dense; its activations are quantized where it has ranges.
      recipe: its batches; both networks compute in float32 here.
      teacher, weight_of_t: as in `distill`.
    """
    recipe = dataclasses.replace(recipe, dtype="float32")
    sharding = NamedSharding(_mesh(recipe, None), PartitionSpec("batch"))
    lessons = Lessons(teacher, recipe, sharding)
    weight_T, config = lessons.weights(weight_of_t), teacher.config
    loss = jax.jit(weighted_loss, static_argnames=("config", "guidance"))
    losses = [
        float(loss(config, params, lessons(index), guidance=recipe.guidance, weight_T=weight_T))
        for index in range(recipe.steps)
    ]
    return float(np.mean(losses))


def _mesh(recipe: Recipe, devices: Sequence[Any] | None) -> Mesh:
    """As many devices as divide what is computed together; the default is that of `distill`."""
    devices = devices or jax.local_devices()[: 1 if jax.default_backend() == "cpu" else None]
    count = max(n for n in range(1, len(devices) + 1) if recipe.together % n == 0)
    return Mesh(np.array(devices[:count]), ("batch",))


def decoded(weights: Mapping[str, Any]) -> dict[str, Any]:
    """The tree with quantized kernels decoded, differentiable."""

    def coded(leaf: Any) -> bool:
        return hasattr(leaf, "decode")

    return jax.tree.map(
        lambda leaf: leaf.decode() if coded(leaf) else leaf, dict(weights), is_leaf=coded
    )


def parameters(dense: Student, activations: Activations | None) -> models.Params:
    """What the network of a student computes with: its kernels, decoded before, and its ranges."""
    params = dict(dense.weights)
    if dense.ranges is not None and activations is not None:
        params["activations"] = dense.ranges.to_activations(activations)
    return params


@functools.partial(jax.jit, static_argnames=("config", "guidance", "remat", "parts", "dtype"))
def loss_and_gradients(
    config: LatentDiffusionConfig,
    student: Student,
    taught: Taught,
    *,
    activations: Activations | None,
    guidance: float,
    weight_T: jax.Array,
    remat: bool = False,
    parts: int = 1,
    dtype: str = "float32",
) -> tuple[jax.Array, Student]:
    """The loss of this module's head, and its gradients.

    Args:
      activations: as in `distill`.
      weight_T: of every timestep of the model, float32.
      parts: as many equal parts of the batch are computed one after the other.
      dtype: as in `Recipe`.

    Returns:
      The loss, and gradients by the decoded kernels and all else that is trained.
    """

    def loss_of(dense: Student, part: Taught) -> jax.Array:
        return weighted_loss(
            config,
            parameters(dense, activations),
            part,
            guidance=guidance,
            weight_T=weight_T,
            remat=remat,
            dtype=dtype,
        )

    value_and_grad = jax.default_matmul_precision(PRECISION)(jax.value_and_grad(loss_of))
    dense = Student(decoded(student.weights), student.ranges)
    if parts == 1:
        return value_and_grad(dense, taught)

    def add(sums: Any, part: Taught) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, sums, value_and_grad(dense, part)), None

    # Every device keeps the pairs that it has: a part takes some of each.
    dealt = jax.tree.map(
        lambda rows: rows.reshape(-1, parts, *rows.shape[1:]).swapaxes(0, 1), taught
    )
    zeros = jax.tree.map(jnp.zeros_like, (jnp.zeros(()), dense))
    sums, _ = jax.lax.scan(add, zeros, dealt)
    return jax.tree.map(lambda whole: whole / parts, sums)


def weighted_loss(
    config: LatentDiffusionConfig,
    params: models.Params,
    taught: Taught,
    *,
    guidance: float,
    weight_T: jax.Array,
    remat: bool = False,
    dtype: str = "float32",
) -> jax.Array:
    """The loss of this module's head, scalar.

    Args:
      params: dense.
      weight_T: as in `loss_and_gradients`.
    """
    error_BHWC = guided_error(config, params, taught, guidance, remat=remat, dtype=dtype)
    return jnp.mean(weight_T[taught.t_B] * jnp.mean(error_BHWC**2, axis=(1, 2, 3)))


def guided_error(
    config: LatentDiffusionConfig,
    params: models.Params,
    taught: Taught,
    guidance: float,
    *,
    remat: bool = False,
    dtype: str = "float32",
) -> jax.Array:
    """What the guided prediction of `params` differs by from the teacher's, [B, H, W, C]."""

    def predict(x: jax.Array, t: jax.Array, context: jax.Array | None) -> jax.Array:
        found = models.predict_noise(config, params, x.astype(dtype), t, context, remat=remat)
        return found.astype(x.dtype)

    if taught.ids_B is None:
        return predict(taught.x_BHWC, taught.t_B, None) - taught.eps_cond_BHWC
    both = _both(config, taught.ids_B)
    context = models.embed_classes(config, params, both)
    x, t = (jnp.concatenate([part, part]) for part in (taught.x_BHWC, taught.t_B))
    uncond, cond = jnp.split(predict(x, t, context), 2)
    uncond_error = uncond - cast(jax.Array, taught.eps_uncond_BHWC)
    cond_error = cond - taught.eps_cond_BHWC
    return uncond_error + guidance * (cond_error - uncond_error)


def _both(config: LatentDiffusionConfig, ids_B: jax.Array) -> jax.Array:
    """Class ids of the unconditional and the conditional branch."""
    return jnp.concatenate([jnp.full_like(ids_B, config.null_class), ids_B])


class Lessons:
    """Batches by step: `lessons(index)` is a `Taught` that follows from the index alone.

    Attributes:
      grid_T: int32, timesteps that trajectories visit or pass near, descending.
    """

    def __init__(self, teacher: Model, recipe: Recipe, sharding: NamedSharding):
        config = teacher.config
        self.grid_T = grid(config, recipe)
        self._recipe, self._sharding, self._config = recipe, sharding, config
        self._params = jax.device_put(teacher.params, NamedSharding(sharding.mesh, PartitionSpec()))
        self._teach = functools.partial(trajectories, config, recipe.guidance, dtype=recipe.dtype)
        self._round, self._pool = -1, None
        mixed = recipe.order == "mixed"
        self._together = recipe.trajectories if mixed else recipe.batch
        self._pairs = self._together * len(self.grid_T)
        self.steps_per_round = max(1, self._pairs // recipe.batch)

    def __call__(self, index: int) -> Taught:
        """The batch of step `index`, split over the devices."""
        number, place = divmod(index, self.steps_per_round)
        if number != self._round:
            self._pool = None  # or two rounds would be in memory
            self._pool, self._round = self._sample(number), number
        pairs = self._order(number)[place * self._recipe.batch :][: self._recipe.batch]
        batch = jax.tree.map(lambda rows: rows[pairs], self._pool)
        return jax.device_put(batch, self._sharding)

    def weights(self, weight_of_t: Callable[[np.ndarray], np.ndarray]) -> jax.Array:
        """Weights of every timestep of the model, float32; their mean over the grid is 1."""
        weight_T = np.asarray(weight_of_t(np.arange(self._config.timesteps)), np.float32)
        return jnp.asarray(weight_T / weight_T[self.grid_T].mean())

    def like(self) -> Taught:
        """The shapes, types and places of a batch."""
        pairs, ids = self._recipe.batch, bool(self._config.n_classes)

        def array(dtype: Any, *shape: int) -> Any:
            return jax.ShapeDtypeStruct((pairs, *shape), dtype, sharding=self._sharding)

        latent = array(np.float32, *self._config.latent_shape)
        number = array(np.int32)
        return Taught(latent, number, number if ids else None, latent, latent if ids else None)

    def _order(self, number: int) -> np.ndarray:
        if self._recipe.order == "trajectory":
            return np.arange(self._pairs)  # they lie timestep by timestep, the highest first
        return np.random.default_rng((self._recipe.seed, number)).permutation(self._pairs)

    def _sample(self, number: int) -> Taught:
        """All pairs of one round, in host memory."""
        seed, count, config = self._recipe.seed, self._together, self._config
        mesh = self._sharding.mesh
        rng = np.random.default_rng((seed, number, 1))
        ids_P = rng.integers(0, max(config.null_class, 1), count).astype(np.int32)
        index_P = np.arange(number * count, (number + 1) * count, dtype=np.uint32)
        t_TP = np.repeat(self.grid_T[:, None], count, axis=1)
        if self._recipe.order == "mixed":
            t_TP = near_grid(self.grid_T, count, config.timesteps, rng)

        def teach(first: int) -> Taught:
            chosen = slice(first, first + self._recipe.together)
            noise = sampling.image_noise(seed, index_P[chosen], config.latent_shape)
            ids = ids_P[chosen] if config.n_classes else None
            # The last call may have fewer: every device computes all of them then.
            split = len(noise) % mesh.size == 0
            rows = self._sharding.spec if split else PartitionSpec()
            columns = NamedSharding(mesh, PartitionSpec(None, *rows))
            given = jax.device_put((ids, noise), NamedSharding(mesh, rows))
            walk = self._teach(self._params, *given, jax.device_put(t_TP[:, chosen], columns))
            return jax.device_get(walk)

        # No more in a call than a step takes.
        firsts = range(0, count, self._recipe.together)
        parts = cores.in_order(teach, firsts, together=config.small and mesh.size == 1)
        whole = jax.tree.map(lambda *rows: np.concatenate(rows, axis=1), *parts)
        return jax.tree.map(lambda rows: rows.reshape(-1, *rows.shape[2:]), whole)


def grid(config: LatentDiffusionConfig, recipe: Recipe) -> np.ndarray:
    """Timesteps of the trajectories before any is moved, int32 [T], descending."""
    return ddim_schedule(config, recipe.timesteps).timesteps[::-1]


def near_grid(
    grid_T: np.ndarray, count: int, timesteps: int, rng: np.random.Generator
) -> np.ndarray:
    """Timesteps of so many trajectories, int32 [T, P], descending.

    Each is drawn from those nearest to its place in the grid, but for the lowest, at which samplers
    of any number of steps end: the one above it has all in between.

    Args:
      grid_T: at equal distances, descending.
      timesteps: of the model; the highest that may be drawn is the last of them.
    """
    distance = -int(np.diff(grid_T)[0]) if len(grid_T) > 1 else 1
    low_T, high_T = grid_T - (distance - 1) // 2, grid_T + distance // 2
    high_T[0], low_T[-1:] = timesteps - 1, grid_T[-1:]
    high_T[-1:], low_T[-2:-1] = grid_T[-1:], grid_T[-1:] + 1
    shape = len(grid_T), count
    return rng.integers(low_T[:, None], high_T[:, None], shape, np.int32, endpoint=True)


@functools.partial(jax.jit, static_argnames=("config", "guidance", "dtype"))
@jax.default_matmul_precision(PRECISION)
def trajectories(
    config: LatentDiffusionConfig,
    guidance: float,
    params: models.Params,
    ids_P: jax.Array | None,
    x_PHWC: jax.Array,
    t_TP: jax.Array,
    *,
    dtype: str = "float32",
) -> Taught:
    """DDIM by the teacher with everything that it said on the way: `Taught` with axes [T, P].

    Args:
      t_TP: int32, timesteps of each trajectory, descending. The last step goes to timestep 0.
      dtype: which the network computes in; what returns is of the type of x.
    """

    def predict(x: jax.Array, t: jax.Array, context: jax.Array | None) -> jax.Array:
        return models.predict_noise(config, params, x.astype(dtype), t, context).astype(x.dtype)

    alphas = jnp.asarray(alphas_cumprod(config), jnp.float32)
    next_TP = jnp.concatenate([t_TP[1:], jnp.zeros_like(t_TP[:1])])
    alphas_TP, alphas_next_TP = (alphas[t][..., None, None, None] for t in (t_TP, next_TP))
    context = None
    if ids_P is not None:
        context = models.embed_classes(config, params, _both(config, ids_P))

    def step(x, inputs):
        t_P, a_P, a_next_P = inputs
        if ids_P is None:
            cond = eps = predict(x, t_P, None)
            uncond = None
        else:
            doubled = jnp.concatenate([x, x]), jnp.concatenate([t_P, t_P])
            both = predict(*doubled, context)
            uncond, cond = jnp.split(both, 2)
            eps = uncond + guidance * (cond - uncond)
        return ddim.update(x, eps, a_P, a_next_P)[0], Taught(x, t_P, ids_P, cond, uncond)

    return jax.lax.scan(step, x_PHWC, (t_TP, alphas_TP, alphas_next_TP))[1]


def schedule_of(rate: Any, steps: int, factor: float = 1.0) -> optax.Schedule:
    """A short warm-up, then a cosine to a hundredth of factor * rate."""
    peak = factor * float(rate)
    return optax.warmup_cosine_decay_schedule(
        0.1 * peak, peak, max(1, round(_WARM_UP * steps)), max(2, steps), 0.01 * peak
    )
