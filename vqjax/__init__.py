# SPDX-License-Identifier: Apache-2.0
"""vqjax: additive vector quantization of latent diffusion models in JAX."""

import os as _os

# In a checkout kernels/, train/ and eval/ sit beside this folder; installed, they are inside it.
_root = _os.path.dirname(_os.path.dirname(_os.path.abspath(__file__)))
if _os.path.isfile(_os.path.join(_root, "pyproject.toml")):
    __path__.append(_root)

__version__ = "0.1.0"
