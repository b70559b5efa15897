# SPDX-License-Identifier: Apache-2.0
"""Kernels: forms of a computation that one backend asks for. You need not read this."""

# Of attention, and of the head with its cross-entropy.
KERNELS = ("auto", "chunked", "fused", "splash", "cudnn")
CROSS_ENTROPY_KERNELS = ("auto", "plain", "fused")
