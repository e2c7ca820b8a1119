# SPDX-License-Identifier: Apache-2.0
"""Matrix product with a weight stored as additive codes."""
