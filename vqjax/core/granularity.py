# SPDX-License-Identifier: Apache-2.0
"""What scales of a layer's input channels are worth.

Dimension key:  C input channels
"""

import jax
import numpy as np

from vqjax.core import grouping

_WORTH = 3.5


def input_scale_gain(kernel: jax.typing.ArrayLike) -> float:
    """Error that is expected with scales of input channels over error without, for the same codes.

    1 / (1 + 3.5 v^2), v the standard deviation of the channels' sizes (root mean square of their
    weights) over their mean. Measured at 2 bits: .98 at v = .13, .97 at .11, .93 at .18, .88 at .16
    and at .21; at 4 bits more is gained (.78 at .16). What the scales store is not counted.

    Args:
      kernel: [I, O] or [H, W, I, O].
    """
    rows_CX = grouping.channel_rows(np.asarray(kernel, np.float64))
    sizes_C = np.sqrt(np.mean(rows_CX**2, axis=1))
    mean = np.mean(sizes_C)
    spread = np.std(sizes_C) / mean if mean > 0 else 0.0
    return float(1 / (1 + _WORTH * spread**2))
