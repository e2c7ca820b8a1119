# SPDX-License-Identifier: Apache-2.0
"""Layers of real models that run `vq_matmul`."""

from vqjax.kernels.specs import layers

LAYERS = layers("vq_matmul")
