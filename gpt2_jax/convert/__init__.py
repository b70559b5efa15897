# SPDX-License-Identifier: Apache-2.0
"""Checkpoint conversion: one module for each format, one name table between them."""
