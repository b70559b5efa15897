# SPDX-License-Identifier: Apache-2.0
"""Zero-shot evaluation: tasks under named protocols, scorers, error bars, sweeps."""
