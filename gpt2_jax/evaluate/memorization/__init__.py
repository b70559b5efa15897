# SPDX-License-Identifier: Apache-2.0
"""Memorization: exposure of canaries, extraction of training text, exact search of token stores."""
