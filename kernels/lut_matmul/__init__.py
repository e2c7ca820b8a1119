# SPDX-License-Identifier: Apache-2.0
"""Matrix product by lookup tables: fewer operations, counted exactly."""
