# SPDX-License-Identifier: Apache-2.0
"""`gpt2-jax webtext` from a checkout. Its body is gpt2_jax/cli/webtext.py."""

import os
import sys

if __name__ == "__main__":
  # The root in place of launch/, whose tokenize.py would hide the standard library's.
  sys.path[0] = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
  from gpt2_jax.cli.main import run

  run("webtext")
