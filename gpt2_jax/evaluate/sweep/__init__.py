# SPDX-License-Identifier: Apache-2.0
"""Sweeps of models x tasks that resume after a kill, bootstrap intervals, and the report."""
