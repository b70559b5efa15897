# SPDX-License-Identifier: Apache-2.0
"""`python -m gpt2_jax COMMAND`: the command `gpt2-jax`, where its script is not on the PATH."""

from gpt2_jax.cli.main import main

if __name__ == "__main__":
  main()
