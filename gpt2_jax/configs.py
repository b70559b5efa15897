# SPDX-License-Identifier: Apache-2.0
"""The config files, as modules: `from gpt2_jax.configs import gpt2` works in any config file.

They lie in configs/ of a clone, and in gpt2_jax/configs/ of an installed package.
"""

import pathlib

_here = pathlib.Path(__file__).resolve()
_installed = _here.with_suffix("")

FOLDER = _installed if _installed.is_dir() else _here.parents[1] / "configs"

# With a path, this module is a package, and the files of the folder are its modules.
__path__ = [str(FOLDER)]


def shipped_configs() -> dict[str, str]:
  """The files of the configs that come with the package, by their names: "gpt2", "demo"."""
  files = {}
  for file in sorted(FOLDER.rglob("*.py")):
    name = file.relative_to(FOLDER).with_suffix("").as_posix()
    if not name.endswith("__init__"):
      files[name] = str(file)
  return files
