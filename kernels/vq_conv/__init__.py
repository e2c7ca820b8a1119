# SPDX-License-Identifier: Apache-2.0
"""Convolution with a weight stored as additive codes."""
