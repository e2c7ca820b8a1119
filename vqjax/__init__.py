# SPDX-License-Identifier: Apache-2.0
"""vqjax: additive vector quantization of latent diffusion models in JAX."""

import os as _os

# In a checkout kernels/, train/ and eval/ sit beside this folder; installed, they are inside it.
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if _os.path.isfile(_os.path.join(_root, "pyproject.toml")):
    __path__.append(_root)

__version__ = "0.1.0"

from vqjax.quantize import quantize as quantize  # noqa: E402  (needs the path above)
from vqjax.sample import sample as sample  # noqa: E402


def load(source, *, config=None):
    """Loads a model: "digits", a checkpoint, an exported file, a diffusers or a run folder.

    Args:
      source: see `vqjax.io.load_model`.
      config: where the shapes do not tell, a `vqjax.config.LatentDiffusionConfig`, the name of a
        published one, or a JSON file of one.

    Returns:
      A `vqjax.core.model.Model`: configuration and parameters, quantized weights still packed.

    Raises:
      VqjaxError: if there is no such source, or its content does not make the model.
    """
    from vqjax import io

    return io.load_model(source, config=config)


def compress_tree(params, moments, plan, **options):
    """Compresses any nested dict of arrays: see `vqjax.core.compress_tree.compress_tree`.

    Args:
      params: nested dict of arrays, kernels [inputs, outputs] or [height, width, inputs, outputs].
      moments: mean of x x^T over a layer's inputs, by path; None weighs all inputs alike.
      plan: `LayerSpec` by path; `uniform_plan` makes one.
      **options: `seed`, `effort`, `on_layer`.

    Returns:
      The tree with a `VQTensor` at each path of the plan, and errors and bits by path.

    Raises:
      VqjaxError: lists all that does not fit together.
    """
    from vqjax.core import compress_tree as module

    return module.compress_tree(params, moments, plan, **options)


def uniform_plan(params, *, bits, **options):
    """Makes a plan for any nested dict: see `vqjax.core.compress_tree.uniform_plan`."""
    from vqjax.core import compress_tree as module

    return module.uniform_plan(params, bits=bits, **options)


def densify(params, **options):
    """Decodes every quantized leaf of a tree: see `vqjax.core.tensor.densify`."""
    from vqjax.core import tensor as module

    return module.densify(params, **options)
