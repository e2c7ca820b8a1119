# SPDX-License-Identifier: Apache-2.0
"""Trains the three classifiers that judge digits or textures: python -m vqjax.train.extractors

They see the train half alone: digits moved, scaled and noised a little, textures turned, mirrored
and noised. They end in one file with their accuracies in its metadata. The same seeds give the same
file on the same machine and versions.

Dimension key:  N images   H W C picture   B batch
"""

import argparse
import json
import pathlib
import sys
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqjax.io import digits_data, textures_data
from vqjax.models import extractor

SEEDS = (0, 1, 2)
STEPS = 2400
BATCH = 128
CROPS = 1200  # of each texture: overlapping ones, since their places are what varies them
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 1e-3
AVERAGE_DECAY = 0.995  # of the averaged weights, which are the ones kept
NOISE_OF_TEXTURES = 0.02  # of range 2: less, since what it hides is what is to be seen
SHIFT, SCALE, ROTATION, NOISE = 2.5, 0.10, 0.15, 0.05  # pixels, share, radians, of range 2
TOTAL_VARIANCE = 335.0
"""Trace of the covariance of either kind of features on the train half: a convention that gives
the three networks, and later retrainings, one scale of digit-FD."""


def train(
    images_NHWC: np.ndarray,
    labels_N: np.ndarray,
    *,
    seed: int,
    steps: int = STEPS,
    vary: Callable[[jax.Array, jax.Array], jax.Array],
) -> dict:
    """Trains one extractor.

    Args:
      images_NHWC: uint8 [N, 32, 32, 3].
      labels_N: int32 [N].
      seed: decides the weights, the batches and the augmentation.
      steps: optimizer steps of `BATCH` pictures.
      vary: takes a batch and a key and changes pictures a little.

    Returns:
      Parameters as of `extractor.init`, rounded to float16 and scaled to `TOTAL_VARIANCE`.
    """
    images = jnp.asarray(images_NHWC, jnp.float32) / 127.5 - 1
    labels = jnp.asarray(labels_N)
    schedule = optax.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, steps // 20, steps)
    optimizer = optax.adamw(schedule, weight_decay=WEIGHT_DECAY)
    key_init, key_steps = jax.random.split(jax.random.key(seed))

    def loss_fn(params, batch, wanted):
        logits = extractor.apply(params, batch).logits
        return optax.softmax_cross_entropy_with_integer_labels(logits, wanted).mean()

    @jax.jit
    def step(params, average, state, key):
        key_rows, key_augment = jax.random.split(key)
        rows = jax.random.randint(key_rows, (BATCH,), 0, len(labels))
        batch = vary(images[rows], key_augment)
        gradients = jax.grad(loss_fn)(params, batch, labels[rows])
        updates, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, updates)
        return params, optax.incremental_update(params, average, 1 - AVERAGE_DECAY), state

    params = extractor.init(key_init, int(labels_N.max()) + 1)
    average, state = params, optimizer.init(params)
    for index in range(steps):
        params, average, state = step(params, average, state, jax.random.fold_in(key_steps, index))
    return _finish(average, images)


def augment(images_BHWC: jax.Array, key: jax.Array) -> jax.Array:
    """Moves, scales, rotates and noises each picture a little; edges are repeated."""
    count, size = images_BHWC.shape[:2]
    keys = jax.random.split(key, 4)
    shift = jax.random.uniform(keys[0], (count, 2), minval=-SHIFT, maxval=SHIFT)
    zoom = 1 + jax.random.uniform(keys[1], (count,), minval=-SCALE, maxval=SCALE)
    angle = jax.random.uniform(keys[2], (count,), minval=-ROTATION, maxval=ROTATION)
    centre = (size - 1) / 2
    grid = jnp.stack(jnp.meshgrid(*[jnp.arange(size) - centre] * 2, indexing="ij"))

    def move(image, offset, zoom, angle):
        cos, sin = jnp.cos(angle) * zoom, jnp.sin(angle) * zoom
        where = jnp.stack([cos * grid[0] - sin * grid[1], sin * grid[0] + cos * grid[1]])
        where = where + offset[:, None, None] + centre
        sample = jax.scipy.ndimage.map_coordinates
        return jax.vmap(lambda c: sample(c, where, order=1, mode="nearest"), -1, -1)(image)

    moved = jax.vmap(move)(images_BHWC, shift, zoom, angle)
    return moved + NOISE * jax.random.normal(keys[3], moved.shape)


def turn(images_BHWC: jax.Array, key: jax.Array) -> jax.Array:
    """Mirrors and turns each picture by a multiple of 90 degrees, and noises it a little."""
    key_turn, key_noise = jax.random.split(key)
    # Transposed or not, upside down or not, mirrored or not: all eight ways a square lies.
    chosen_3B111 = jax.random.bernoulli(key_turn, shape=(3, len(images_BHWC), 1, 1, 1))
    found = jnp.where(chosen_3B111[0], images_BHWC.swapaxes(1, 2), images_BHWC)
    found = jnp.where(chosen_3B111[1], found[:, ::-1], found)
    found = jnp.where(chosen_3B111[2], found[:, :, ::-1], found)
    return found + NOISE_OF_TEXTURES * jax.random.normal(key_noise, found.shape)


def accuracy(params: dict, images_NHWC: np.ndarray, labels_N: np.ndarray) -> float:
    """Share of uint8 pictures that `params` puts in their class."""
    images = jnp.asarray(images_NHWC, jnp.float32) / 127.5 - 1
    found = jnp.argmax(jax.jit(extractor.apply)(params, images).logits, -1)
    return float(np.mean(np.asarray(found) == labels_N))


def _finish(params: dict, images: jax.Array) -> dict:
    """Fixes the scale of both kinds of features, then rounds to what the file keeps."""
    found = jax.jit(extractor.apply)(params, images)
    variances = [np.asarray(rows, np.float64).var(0, ddof=1).sum() for rows in found[:2]]
    pooled, spatial = (float(np.sqrt(TOTAL_VARIANCE / variance)) for variance in variances)
    scaled = extractor.rescale(params, pooled=pooled, spatial=spatial)
    return {name: np.asarray(array, np.float16) for name, array in scaled.items()}


def main(argv: list[str] | None = None) -> int:
    """Command line: trains all, prints accuracies on both halves, writes one file."""
    from safetensors.numpy import save_file

    parser = argparse.ArgumentParser(description="Trains the extractors of digit- or texture-FD.")
    parser.add_argument("--data", choices=("digits", "textures"), default="digits")
    parser.add_argument(
        "--out", type=pathlib.Path, help="default: the file in the package, which it replaces"
    )
    parser.add_argument("--steps", type=int, default=STEPS, help="optimizer steps per extractor")
    args = parser.parse_args(argv)
    package = pathlib.Path(digits_data.__file__).parents[1]
    out = args.out or package / f"assets/{args.data}_eval.safetensors"
    if args.data == "digits":
        data, vary = digits_data.load(), augment
        seen = data.train_images, data.train_labels
    else:
        data, vary = textures_data.load(), turn
        seen = textures_data.crops("train", CROPS)
    tensors, scores = {}, []
    for seed in SEEDS:
        params = train(*seen, seed=seed, steps=args.steps, vary=vary)
        tensors |= {f"extractor{seed}/{name}": array for name, array in params.items()}
        full = {name: jnp.asarray(array, jnp.float32) for name, array in params.items()}
        score = {
            "seed": seed,
            "train_accuracy": accuracy(full, data.train_images, data.train_labels),
            "held_accuracy": accuracy(full, data.held_images, data.held_labels),
        }
        scores.append(score)
        print(json.dumps(score), flush=True)
    save_file(tensors, out, {"extractors": json.dumps(scores), "steps": str(args.steps)})
    print(f"wrote {out} ({out.stat().st_size:,} bytes)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
