# SPDX-License-Identifier: Apache-2.0
"""What an error of the noise prediction at each timestep does to the final latent.

Dimension key:  B batch   H W latent   C channels   T trajectory steps

An error d_t of the guided prediction at step t moves the final latent by J_t d_t, with everything
that later steps make of it. Errors of one wrong kernel are much alike from step to step and add up:
with j_t the size of J_t, |sum_t j_t d_t|^2 <= (sum_t j_t) (sum_t j_t |d_t|^2), equal where all d_t
are. Squared errors therefore count by j_t, not by its square, as independent errors would.

With a random vector v of signs, the expected square of v^T J_t is |J_t|^2 (Hutchinson,
Communications in Statistics 19, 1990): one backward pass through the whole sampler gives it for
every step.
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np

from vqjax import progress, sampling
from vqjax.config import LatentDiffusionConfig
from vqjax.core import cores, draw
from vqjax.core.model import Model
from vqjax.pipeline import sensitivity
from vqjax.pipeline.journal import Journal
from vqjax.sampling import ddim
from vqjax.sampling.schedule import ddim_schedule
from vqjax.settings import Calibration

if TYPE_CHECKING:
    from vqjax.pipeline.quantize import Job

_PIECE = "timesteps"


def weights(
    model: Model,
    visited: Sequence[tuple],
    calibration: Calibration,
    key: jax.Array,
    on_step: Callable[[], None] = lambda: None,
) -> np.ndarray:
    """Root mean square change of the final latent for equal errors of the prediction, by step.

    Args:
      visited: from `calibrate.trajectories`, with this calibration.
      key: of the random signs.
      on_step: called after each backward pass; there are as many as `sensitivity.portions`.

    Returns:
      float64 [T], mean 1, in the order of the trajectories' steps. Where the sampler's derivatives
      are no numbers, or zero, all are 1, and a line on stderr says so.
    """
    how = model.config, calibration.steps, calibration.guidance
    squares_T = np.zeros(len(visited[0][1]))

    def squares(numbered: tuple) -> np.ndarray:
        number, (x_TBHWC, _, ids_B) = numbered
        x_BHWC = jnp.asarray(x_TBHWC[0])
        of_batch = jax.random.fold_in(key, number)
        return np.asarray(_squares(*how, model.params, ids_B, x_BHWC, of_batch))

    portions = enumerate(sensitivity.portions(visited))
    for found_T in cores.in_order(squares, portions, together=model.config.small):
        squares_T += found_T
        on_step()
    return _normalized(squares_T)


def weights_of_run(job: "Job", journal: Journal, visited: list[tuple]) -> np.ndarray:
    """The weights of a run, kept across interruptions; the leading process makes them."""
    found = journal.shared(_PIECE)
    if found is not None:
        return found[0]["weights"]
    # Another draw than those of typical errors and of the search, which fold in numbers of theirs.
    key = jax.random.fold_in(jax.random.key(job.settings.seed), 2)
    count = sum(1 for _ in sensitivity.portions(visited))
    with journal.stage("calibrate"), progress.stage("timesteps", count) as advance:
        weights_T = weights(job.model, visited, job.settings.calibration, key, advance)
    t_T = np.asarray(visited[0][1])
    journal.store(_PIECE, {"weights": weights_T, "timesteps": t_T}, {})
    shown = ", ".join(f"{t} {weight:.2g}" for t, weight in zip(t_T, weights_T))
    print(f"Weight of each timestep in calibration: {shown}")
    return weights_T


def recorded(journal: Journal) -> dict[str, float]:
    """The weights of a run by timestep, as its report shows them."""
    arrays, _ = journal.load(_PIECE) or ({"timesteps": (), "weights": ()}, {})
    return {str(int(t)): float(w) for t, w in zip(arrays["timesteps"], arrays["weights"])}


def at(journal: Journal, t_T: np.ndarray) -> np.ndarray:
    """The weights of a run at other timesteps, between its own by straight lines."""
    known = sorted((int(t), weight) for t, weight in recorded(journal).items())
    known_t, known_weights = zip(*known)
    return np.interp(t_T, known_t, known_weights)


@functools.partial(jax.jit, static_argnames=("config", "steps", "guidance"))
def _squares(
    config: LatentDiffusionConfig,
    steps: int,
    guidance: float,
    params,
    ids_B,
    x_BHWC,
    key,
) -> jax.Array:
    """Sums over images of |v^T J_t|^2, [T]."""
    schedule = ddim_schedule(config, steps)
    t_T = jnp.asarray(schedule.timesteps[::-1].copy())
    # Only the latents of all steps are kept: a step's activations are made again on the way back.
    predict = jax.checkpoint(sampling.predictor(config, params, ids_B, guidance))

    def final(errors_TBHWC: jax.Array) -> jax.Array:
        def disturbed(x, t_B):
            return predict(x, t_B) + errors_TBHWC[jnp.argmax(t_T == t_B[0])]

        return ddim.ddim(disturbed, schedule, x_BHWC)[0]

    latent, back = jax.vjp(final, jnp.zeros((len(t_T), *x_BHWC.shape), jnp.float32))
    (slopes_TBHWC,) = back(draw.signs(key, latent.shape))
    return jnp.sum(slopes_TBHWC**2, axis=(1, 2, 3, 4))


def _normalized(squares_T: np.ndarray) -> np.ndarray:
    sizes_T = np.sqrt(squares_T)
    mean = sizes_T.mean()
    if np.isfinite(mean) and mean > 0:
        return sizes_T / mean
    print(
        f"timesteps: all weigh alike, since the sampler's derivatives have the mean size {mean}",
        file=sys.stderr,
    )
    return np.ones_like(sizes_T)
