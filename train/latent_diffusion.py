# SPDX-License-Identifier: Apache-2.0
"""Trains a small latent diffusion model from pictures: what digits and textures share.

Two stages as in latent diffusion (arXiv 2112.10752): a vector-quantized autoencoder, then a
class-conditional U-Net on its latents.

Dimension key:  N images   B batch   H W image or latent   C channels   V variants of an image
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from typing import Any

import numpy as np

from vqjax.config import LatentDiffusionConfig

BATCH_AUTOENCODER = 24
BATCH_UNET = 64
CLASS_DROPOUT = 0.1  # share of samples trained without class, for classifier-free guidance
EMA_DECAY = 0.9995
LATENT_NOISE = 0.15  # stands in for the codebook's error until there is a codebook
COMMITMENT = 0.25  # weight of the encoder's pull towards the codebook (arXiv 1711.00937, eq. 3)
ZERO_AT_START = ("conv2", "proj_out", "out/conv")  # residual branches begin as the identity


@dataclasses.dataclass(frozen=True, kw_only=True)
class Training:
    """What a training is asked for; each data set has its own defaults."""

    out: pathlib.Path
    """The trained model: float16 weights, configuration and training record."""
    work: pathlib.Path
    """Checkpoints, in a folder for each training; an unfinished one is continued to the same
    result."""
    seed: int = 0
    """Of the initialization, the batches and the noise."""
    autoencoder_steps: int
    """Half of them before and half after the codebook is made."""
    unet_steps: int
    """Steps of the U-Net; it averages its weights over the last thousands."""


def fit(
    config: LatentDiffusionConfig,
    images_VNHWC: np.ndarray,
    labels_N: np.ndarray,
    args: Training,
    command: str,
) -> None:
    """Trains both stages and writes the model.

    Args:
      config: of the model.
      images_VNHWC: float32 in [-1, 1], variants of N images; the first of each is the image
        itself, which half of the U-Net's batches take.
      labels_N: classes of the images, the same for all variants.
      command: for the record.
    """
    import jax

    from vqjax.core.model import Model
    from vqjax.io import native

    args = dataclasses.replace(args, work=args.work / _name(config, images_VNHWC, labels_N, args))
    first_stage = train_autoencoder(config, images_VNHWC, args)
    encode = jax.jit(lambda x: _latents(config, first_stage, x))
    first_stage = rescaled(first_stage, 1 / float(np.std(encode(images_VNHWC[0]))))
    trained = train_unet(config, first_stage, images_VNHWC, labels_N, args)
    record = {"command": command, **dataclasses.asdict(args)}
    record = {name: str(value) for name, value in record.items() if name not in ("out", "work")}
    half = jax.tree.map(
        lambda leaf: np.asarray(leaf, np.float16), {**trained, "first_stage": first_stage}
    )
    native.save_model(args.out, Model(config=config, params=half), extra_metadata=record)
    print(f"{args.out}: {args.out.stat().st_size / 1e6:.2f} MB")


def _name(config: LatentDiffusionConfig, images_VNHWC, labels_N, args: Training) -> str:
    """What tells a training from all others with another result, or other checkpoints."""
    from vqjax.train.loop import LAYOUT

    steps = args.seed, args.autoencoder_steps, args.unet_steps
    digest = hashlib.sha256(json.dumps([LAYOUT, config.to_dict(), *steps]).encode())
    for array in (images_VNHWC, labels_N):
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:12]


def rescaled(params: dict[str, Any], scale: float) -> dict[str, Any]:
    """Multiplies the latent space of a first stage by `scale`; images in and out stay the same."""
    params = {name: dict(part) for name, part in params.items()}
    params["quant_conv"] = {name: leaf * scale for name, leaf in params["quant_conv"].items()}
    params["quantize"]["embedding"] = params["quantize"]["embedding"] * scale
    params["post_quant_conv"]["kernel"] = params["post_quant_conv"]["kernel"] / scale
    return params


def train_autoencoder(config, images_VNHWC: np.ndarray, args: Training) -> dict[str, Any]:
    """The first stage's parameters: continuous latents first, then with a k-means codebook."""
    import jax
    import jax.numpy as jnp
    import optax
    from sklearn.cluster import MiniBatchKMeans

    from vqjax import models
    from vqjax.train.loop import train

    key = jax.random.fold_in(jax.random.key(args.seed), 1)
    images = jnp.asarray(images_VNHWC.reshape(-1, *images_VNHWC.shape[2:]))
    half = args.autoencoder_steps // 2
    schedule = optax.cosine_decay_schedule(1e-3, args.autoencoder_steps, alpha=0.02)
    optimizer = optax.adam(schedule, b2=0.99)

    def loss_fn(first_stage, key_batch, quantized: bool):
        tree = {"first_stage": first_stage}
        key_index, key_noise = jax.random.split(key_batch)
        x = images[jax.random.randint(key_index, (BATCH_AUTOENCODER,), 0, len(images))]
        z = models.encode(config, tree, x)
        if quantized:
            rows, _ = models.nearest_codes(config, tree, z)
            codebook = jnp.mean((jax.lax.stop_gradient(z) - rows) ** 2)
            commitment = jnp.mean((z - jax.lax.stop_gradient(rows)) ** 2)
            extra, z = codebook + COMMITMENT * commitment, z + jax.lax.stop_gradient(rows - z)
        else:
            spread = jax.lax.stop_gradient(jnp.std(z))
            extra = 1e-4 * jnp.mean(z**2)
            z = z + LATENT_NOISE * spread * jax.random.normal(key_noise, z.shape)
        error = models.decode(config, tree, z, quantize=False) - x
        return jnp.mean(jnp.abs(error)) + jnp.mean(error**2) + extra

    def step_with(quantized: bool, offset: int):
        def step(state, index):
            params, opt_state = state
            key_batch = jax.random.fold_in(key, index + offset)
            loss, grads = jax.value_and_grad(loss_fn)(params, key_batch, quantized)
            updates, opt_state = optimizer.update(grads, opt_state, params)
            return (optax.apply_updates(params, updates), opt_state), {"loss": loss}

        return jax.jit(step, donate_argnums=0)

    work = args.work.absolute()
    params = models.init_params(config, key)["first_stage"]
    state = (params, optimizer.init(params))
    state = train("autoencoder", state, step_with(False, 0), half, work / "continuous")
    params, opt_state = state

    encode = jax.jit(lambda x: models.encode(config, {"first_stage": params}, x))
    latents = np.asarray(encode(images[: images_VNHWC.shape[1]]))
    kmeans = MiniBatchKMeans(
        config.first_stage.n_embed,
        random_state=args.seed,
        batch_size=8192,
        n_init=1,  # pyright: ignore[reportArgumentType]
        max_iter=20,
    )
    kmeans.fit(latents.reshape(-1, latents.shape[-1]))
    params["quantize"]["embedding"] = jnp.asarray(kmeans.cluster_centers_, jnp.float32)
    state = train("codebook", (params, opt_state), step_with(True, half), half, work / "quantized")
    return state[0]


def train_unet(
    config, first_stage: dict, images_VNHWC: np.ndarray, labels_N, args: Training
) -> dict:
    """U-Net and class embedding, averaged over steps: the usual noise-prediction objective."""
    import jax
    import jax.numpy as jnp
    import optax

    from vqjax import models
    from vqjax.core.noise import alphas_cumprod
    from vqjax.train.loop import train

    key = jax.random.fold_in(jax.random.key(args.seed), 2)
    encode = jax.jit(lambda x: models.encode(config, {"first_stage": first_stage}, x))
    latents = jnp.stack([encode(jnp.asarray(images)) for images in images_VNHWC])
    labels = jnp.asarray(labels_N, jnp.int32)
    alphas = jnp.asarray(alphas_cumprod(config), jnp.float32)
    rate = optax.warmup_cosine_decay_schedule(0, 6e-4, args.unet_steps // 20, args.unet_steps, 6e-6)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate, b2=0.99))

    def loss_fn(params, key_batch):
        keys = jax.random.split(key_batch, 6)
        index = jax.random.randint(keys[0], (BATCH_UNET,), 0, len(labels))
        # Half of the batch is the images as they are, half their augmented variants.
        variant = jax.random.randint(keys[1], (BATCH_UNET,), 1 - latents.shape[0], latents.shape[0])
        z = latents[jnp.maximum(variant, 0), index]
        t = jax.random.randint(keys[2], (BATCH_UNET,), 0, config.timesteps)
        drop = jax.random.bernoulli(keys[3], CLASS_DROPOUT, (BATCH_UNET,))
        ids = jnp.where(drop, config.null_class, labels[index])
        noise = jax.random.normal(keys[4], z.shape)
        a = alphas[t][:, None, None, None]
        noisy = jnp.sqrt(a) * z + jnp.sqrt(1 - a) * noise
        context = models.embed_classes(config, params, ids)
        return jnp.mean((models.predict_noise(config, params, noisy, t, context) - noise) ** 2)

    @functools.partial(jax.jit, donate_argnums=0)
    def step(state, index):
        params, average, opt_state = state
        loss, grads = jax.value_and_grad(loss_fn)(params, jax.random.fold_in(key, index))
        updates, opt_state = optimizer.update(grads, opt_state, params)
        params = optax.apply_updates(params, updates)
        decay = jnp.minimum(EMA_DECAY, (1.0 + index) / (10.0 + index))
        average = jax.tree.map(lambda a, p: a + (1 - decay) * (p - a), average, params)
        return (params, average, opt_state), {"loss": loss}

    params = models.init_params(config, key)
    params = {"unet": _zero_branches(params["unet"]), "cond_stage": params["cond_stage"]}
    state = (params, jax.tree.map(jnp.copy, params), optimizer.init(params))
    return train("unet", state, step, args.unet_steps, args.work.absolute() / "unet")[1]


def _zero_branches(unet: dict[str, Any]) -> dict[str, Any]:
    from vqjax.core import tree

    flat = tree.flatten(unet)
    zeroed = {
        path: leaf * 0 if path.removesuffix("/kernel").endswith(ZERO_AT_START) else leaf
        for path, leaf in flat.items()
    }
    return tree.unflatten(zeroed)


def _latents(config, first_stage, images_BHWC):
    from vqjax import models

    return models.encode(config, {"first_stage": first_stage}, images_BHWC)
