# SPDX-License-Identifier: Apache-2.0
"""What surrounds a training run: checkpoint and resume, metrics, the workdir, signals."""
