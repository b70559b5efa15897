# SPDX-License-Identifier: Apache-2.0
"""Fine-tuning: which parameters are trained, and what they start from."""
