# SPDX-License-Identifier: Apache-2.0
"""`python -m vqjax.bench`: measurements of the quantizer, apart from what it is used for."""
