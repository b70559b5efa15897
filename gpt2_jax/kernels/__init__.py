# SPDX-License-Identifier: Apache-2.0
"""Kernels: forms of a computation that one backend asks for. You need not read this."""

KERNELS = ("auto", "chunked", "fused", "splash", "cudnn")
