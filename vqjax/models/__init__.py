# SPDX-License-Identifier: Apache-2.0
"""The only place that knows Flax. Everything outside sees these functions on dicts of arrays.

Dimension key:  B batch   H W image or latent   C channels   N context tokens   X context features
"""

import contextlib
import functools
from collections.abc import Callable
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqjax.config import LatentDiffusionConfig
from vqjax.core import tree
from vqjax.models import ahead
from vqjax.models.autoencoder import Autoencoder
from vqjax.models.layers import Conv, Dense
from vqjax.models.unet import UNet

Params = dict[str, Any]

__all__ = [
    "capture_inputs",
    "decode",
    "embed_classes",
    "encode",
    "init_params",
    "nearest_codes",
    "outputs_ahead",
    "param_shapes",
    "predict_noise",
    "predict_noise_disturbed",
]


def init_params(config: LatentDiffusionConfig, key: jax.Array) -> Params:
    """Random parameters of the whole model, float32: {"unet", "first_stage"[, "cond_stage"]}."""
    key_unet, key_first, key_class = jax.random.split(key, 3)
    c = config.unet
    x_BHWC = jnp.zeros((1, *config.latent_shape))
    context = None if c.context_dim is None else jnp.zeros((1, 1, c.context_dim))
    side = config.first_stage.resolution
    image_BHWC = jnp.zeros((1, side, side, config.first_stage.in_channels))
    t_B = jnp.zeros((1,), jnp.int32)
    params = {
        "unet": UNet(c).init(key_unet, x_BHWC, t_B, context)["params"],
        "first_stage": Autoencoder(config.first_stage).init(key_first, image_BHWC)["params"],
    }
    if config.n_classes:
        shape = (config.n_classes, c.context_dim or 0)
        params["cond_stage"] = {"embedding": jax.random.normal(key_class, shape, jnp.float32)}
    return params


def param_shapes(config: LatentDiffusionConfig) -> Params:
    """The tree of `init_params` as `jax.ShapeDtypeStruct` leaves; nothing is computed."""
    return jax.tree.map(lambda leaf: leaf, _shapes(config))  # in dicts of the caller's own


@functools.cache  # to trace a large model takes seconds
def _shapes(config: LatentDiffusionConfig) -> Params:
    return jax.eval_shape(functools.partial(init_params, config), jax.random.key(0))


def predict_noise(
    config: LatentDiffusionConfig,
    params: Params,
    x_BHWC: jax.Array,
    t_B: jax.Array,
    context_BNX: jax.Array | None,
    *,
    remat: bool = False,
    known: ahead.Known | None = None,
) -> jax.Array:
    """The U-Net's noise prediction, computed in the dtype of `x_BHWC`.

    Args:
      params: the whole model's tree; kernels below "unet" may be `VQTensor`. Where "activations"
        (`core.activations.Activations`, or a `RangeTable` that has t_B) stands beside "unet", every
        layer that it names reads its input in the range of t_B; kernels may then be
        `IntegerKernel`, too.
      x_BHWC: noisy latent.
      t_B: integer timesteps in [0, config.timesteps).
      context_BNX: from `embed_classes`, in any floating type; None for an unconditional model.
      remat: gradient checkpointing, see `UNet`.
      known: outputs at t_B of modules that need not run, from `outputs_ahead`.
    """
    unet = _with_ranges(params, t_B)
    if context_BNX is not None:
        context_BNX = context_BNX.astype(x_BHWC.dtype)
    with nn.intercept_methods(ahead.instead(known)) if known else contextlib.nullcontext():
        eps = UNet(config.unet, remat).apply({"params": unet}, x_BHWC, t_B, context_BNX)
    return cast(jax.Array, eps)  # a tuple only where collections are mutable


def outputs_ahead(
    config: LatentDiffusionConfig,
    params: Params,
    t_T: jax.Array,
    context_BNX: jax.Array | None,
    dtype: str,
) -> Callable[[jax.Array], ahead.Known]:
    """Computes what `predict_noise` would at each of T timesteps without looking at the latent.

    Args:
      params, context_BNX: as in `predict_noise`.
      t_T: integer timesteps.
      dtype: of the latent in `predict_noise`.

    Returns:
      From one of the timesteps, scalar, to its `known`.
    """
    steps = len(t_T)
    by_step = dict(ahead.of_timesteps(config.unet, _with_ranges(params, t_T), t_T, dtype))
    by_class: dict[tuple[str, ...], jax.Array] = {}
    if context_BNX is not None:
        context_BNX = context_BNX.astype(dtype)
        times = steps if "activations" in params else 1  # ranges differ from step to step
        t_R = jnp.repeat(t_T[:times], len(context_BNX))

        def of_classes(context_RNX: jax.Array) -> ahead.Known:
            return ahead.of_classes(_with_ranges(params, t_R), context_RNX)

        context_RNX = jnp.tile(context_BNX, (times, 1, 1))
        if not ahead.too_large(jax.eval_shape(of_classes, context_RNX)):
            by_class = {
                path: y.reshape(times, -1, *y.shape[1:])
                for path, y in of_classes(context_RNX).items()
            }

    def at(t: jax.Array) -> ahead.Known:
        step = jnp.argmax(t_T == t)
        found = {path: y_TC[step][None] for path, y_TC in by_step.items()}
        return found | {path: y[step if len(y) > 1 else 0] for path, y in by_class.items()}

    return at


def _with_ranges(params: Params, t_B: jax.Array) -> Params:
    """The U-Net's tree, with the range of its input beside each kernel that has one."""
    if "activations" not in params:
        return params["unet"]
    flat = tree.flatten({"unet": params["unet"]})
    for path, found in params["activations"].at(t_B).items():
        if path in flat:  # folding removes kernels
            flat[path.removesuffix("kernel") + "input_range"] = found
    return tree.unflatten(flat)["unet"]


def capture_inputs(
    config: LatentDiffusionConfig,
    params: Params,
    x_BHWC: jax.Array,
    t_B: jax.Array,
    context_BNX: jax.Array | None,
    reduce: Callable[[str, jax.Array, dict[str, Any]], Any],
) -> tuple[jax.Array, dict[str, Any]]:
    """`predict_noise`, and what `reduce` makes of the input of every Dense and Conv of the U-Net.

    Args:
      reduce: called as `reduce(path, x, window)` while tracing. `path` is the kernel's path
        ("unet/.../kernel"), `x` the layer's input [..., I] before any rounding, and `window` is
        {"window", "stride", "padding"} of a convolution or {} of a Dense. It may return None to
        skip a layer.

    Returns:
      The prediction, and the reduced values by kernel path.
    """
    captured: dict[str, Any] = {}

    def intercept(call, args, kwargs, context):
        module = context.module
        if isinstance(module, Dense | Conv) and context.method_name == "__call__":
            path = "/".join(("unet", *module.path, "kernel"))
            window = {}
            if isinstance(module, Conv):
                fields = ("window", "stride", "padding")
                window = {name: getattr(module, name) for name in fields}
            value = reduce(path, args[0], window)
            if value is not None:
                captured[path] = value
        return call(*args, **kwargs)

    with nn.intercept_methods(intercept):
        eps_BHWC = predict_noise(config, params, x_BHWC, t_B, context_BNX)
    return eps_BHWC, captured


def predict_noise_disturbed(
    config: LatentDiffusionConfig,
    params: Params,
    x_BHWC: jax.Array,
    t_B: jax.Array,
    context_BNX: jax.Array | None,
    errors: dict[str, jax.Array],
    amounts: dict[str, jax.Array],
) -> jax.Array:
    """`predict_noise` with errors E in its kernels, as much of each as `amounts` says.

    Output o of a layer becomes y_o + a_bo (E x)_o, x as the layer reads it. Its derivative in the
    amounts at zero says what the errors of every row of every kernel do to each image, in one
    backward pass and without a gradient of the size of a kernel.

    Args:
      errors: E by kernel path ("unet/.../kernel"), of the kernels' shapes; other layers are exact.
        What stands under the path of a layer's bias is added to (E x)_o.
      amounts: a [B, O] by kernel path.
    """

    def intercept(call, args, kwargs, context):
        module = context.module
        if not isinstance(module, Dense | Conv) or context.method_name != "__call__":
            return call(*args, **kwargs)
        path = "/".join(("unet", *module.path, "kernel"))
        y = call(*args, **kwargs)
        if path not in errors:
            return y
        change = module.product(module.read(args[0]), errors[path].astype(y.dtype))
        bias_O = errors.get(path.removesuffix("kernel") + "bias")
        if bias_O is not None:
            change += jnp.broadcast_to(bias_O.astype(y.dtype), y.shape)
        amount_BO = amounts[path].astype(y.dtype)
        return y + amount_BO.reshape(len(y), *[1] * (y.ndim - 2), -1) * change

    with nn.intercept_methods(intercept):
        return predict_noise(config, params, x_BHWC, t_B, context_BNX)


def embed_classes(
    config: LatentDiffusionConfig, params: Params, ids_B: jax.Array
) -> jax.Array | None:
    """Class ids to context tokens [B, 1, X], or None for an unconditional model."""
    if not config.n_classes:
        return None
    return jnp.asarray(params["cond_stage"]["embedding"])[ids_B][:, None]


def encode(config: LatentDiffusionConfig, params: Params, images_BHWC: jax.Array) -> jax.Array:
    """Images in [-1, 1] to the latents that the U-Net is trained on, not yet vector-quantized."""
    z_BHWC = _first_stage(config, params, images_BHWC, Autoencoder.encode)
    return z_BHWC * config.scale_factor


def nearest_codes(
    config: LatentDiffusionConfig, params: Params, z_BHWC: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Nearest codebook rows [B, H, W, C] and their numbers [B, H, W] of a "vq" first stage."""
    return _first_stage(config, params, z_BHWC / config.scale_factor, Autoencoder.quantize)


def decode(
    config: LatentDiffusionConfig, params: Params, z_BHWC: jax.Array, *, quantize: bool = True
) -> jax.Array:
    """Latents to images, about [-1, 1] and not clamped.

    Args:
      quantize: vector-quantize first, as the original does; a "kl" model has nothing to quantize.
    """
    z_BHWC = z_BHWC / config.scale_factor
    if quantize and config.first_stage.kind == "vq":
        z_BHWC = _first_stage(config, params, z_BHWC, Autoencoder.quantize)[0]
    return _first_stage(config, params, z_BHWC, Autoencoder.decode)


def _first_stage(config: LatentDiffusionConfig, params: Params, x, method) -> Any:
    return Autoencoder(config.first_stage).apply(
        {"params": params["first_stage"]}, x, method=method
    )
