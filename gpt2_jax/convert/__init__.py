# SPDX-License-Identifier: Apache-2.0
"""Other people's checkpoints: one file a format, one name table between them."""
