# SPDX-License-Identifier: Apache-2.0
"""The commands: one file each, with its flags and its `main`; `launch/` calls them."""
