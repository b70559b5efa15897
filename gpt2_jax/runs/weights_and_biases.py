# SPDX-License-Identifier: Apache-2.0
"""Weights & Biases, through its own library: the numbers, the config and the samples of a run."""

import contextlib
import html
import importlib.util
import pathlib
import secrets
from collections.abc import Callable

from gpt2_jax.files import announce, atomic_write, first_line
from gpt2_jax.runs.tensorboard import by_tag

# The run's name at Weights & Biases, by which it resumes there.
ID_FILE = "wandb_id"


def check_wandb(project: str) -> None:
  """Raises ImportError if a project is given, and the library is missing."""
  if project and importlib.util.find_spec("wandb") is None:
    raise ImportError(
      "wandb_project needs the library of Weights & Biases: pip install wandb (extra [wandb]); "
      "or leave it out with --config.wandb_project="
    )


class WeightsAndBiases:
  """Writes to Weights & Biases, which is a convenience: at the first error it is given up.

  Only at the start an error ends the run: a project that cannot be reached, or nobody logged in.
  A run that resumes goes on under the same id, from the file `wandb_id` of its workdir.

  Its environment variables hold: WANDB_API_KEY, WANDB_MODE=offline and so on. It gets the config,
  the numbers and the samples, and neither source code nor what the terminal shows.
  """

  def __init__(
    self, project: str, folder: str, name: str, step: int, config: dict, say: Callable[[str], None]
  ):
    import wandb

    self.wandb = wandb
    self.say = say
    self.run = None

    # 1. A run from step 0 is a new one, whatever was in this workdir.
    id_file = pathlib.Path(folder) / ID_FILE
    run_id = id_file.read_text().strip() if step and id_file.is_file() else secrets.token_hex(8)
    with atomic_write(id_file, overwrite=True) as partial:
      partial.write_text(f"{run_id}\n")

    # 2. Start. Library and network take seconds.
    settings = wandb.Settings(console="off", disable_git=True, disable_code=True, save_code=False)
    try:
      with announce(f"connecting to Weights & Biases, project {project}"):
        self.run = wandb.init(
          project=project,
          id=run_id,
          resume="allow",
          name=name,
          dir=folder,
          config=config,
          allow_val_change=True,  # a resumed run may change some knobs
          settings=settings,
        )
    except (OSError, wandb.Error) as error:
      raise OSError(
        f"wandb_project {project[:80]}: {first_line(error)}; run `wandb login`, set "
        f"WANDB_MODE=offline, or leave it out with --config.wandb_project="
      ) from error

  @contextlib.contextmanager
  def _giving_up(self):
    try:
      yield
    except (OSError, self.wandb.Error) as error:
      self.run = None
      self.say(f"Weights & Biases is given up ({first_line(error)}); the run goes on")

  def _write(self, step: int, values: dict):
    # Steps that are there already would be dropped with a warning each: they are the same.
    if self.run is not None and step >= self.run.starting_step:
      with self._giving_up():
        self.run.log(values, step=step)

  def write(self, step: int, values: dict):
    """Writes numbers of one step."""
    self._write(step, by_tag(values))

  def write_text(self, step: int, tag: str, text: str):
    """Writes a text, which is shown as it stands."""
    page = f"<pre>{html.escape(text)}</pre>"
    self._write(step, {tag: self.wandb.Html(page, inject=False)})

  def flush(self):
    """Does nothing: the library writes by itself."""

  def close(self):
    if self.run is not None:
      with self._giving_up():
        self.run.finish()
