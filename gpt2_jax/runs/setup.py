# SPDX-License-Identifier: Apache-2.0
"""Opens a run: its data, its workdir, its newest checkpoint; what the training loop then needs."""

import contextlib
import dataclasses
import json
import pathlib
import shlex

import jax
from ml_collections import ConfigDict

import gpt2_jax.distributed as distributed
from gpt2_jax.compat import get_mesh
from gpt2_jax.data.batches import BatchSource
from gpt2_jax.data.examples import ExampleStore
from gpt2_jax.data.stores import RowSource, open_stores
from gpt2_jax.files import announce, atomic_write
from gpt2_jax.finetune.init_from import Origin
from gpt2_jax.finetune.start import trained_names
from gpt2_jax.finetune.trainable import partition, trainable_mask
from gpt2_jax.model import GPT2, ModelConfig
from gpt2_jax.runs.branch import Trunk, check_branch, open_trunk
from gpt2_jax.runs.knobs import data_paths, flatten
from gpt2_jax.runs.limits import check_disk
from gpt2_jax.runs.metadata import run_identity, run_metadata
from gpt2_jax.runs.metrics import Log, Metrics, Profile, best_and_last, plot_losses
from gpt2_jax.runs.origin import load_base, resolve_tokenizer
from gpt2_jax.runs.privacy import open_batches, privacy_line
from gpt2_jax.runs.signals import StopSignal
from gpt2_jax.runs.teacher import load_teacher
from gpt2_jax.runs.weights_and_biases import WeightsAndBiases, check_wandb
from gpt2_jax.runs.workdir import Workdir, exists, is_remote, lock
from gpt2_jax.tokenizer import Tokenizer

# The config of the run as it was last started, for people and scripts; checkpoints have their own.
CONFIG_FILE = "train_config.json"

# A set of fewer batches, seen more often than this, is overfitted easily: the run says so.
FEW_BATCHES = 50
MANY_EPOCHS = 3


@dataclasses.dataclass(frozen=True)
class Setup:
  """All that the loop needs: the first state, what it is trained on, and where it is written."""

  config: ConfigDict
  state: object  # the TrainState that was saved, see start.saved_part; None where nothing was
  base: GPT2 | None  # the model of `init_from`, where the run needs its arrays
  objective: object  # what is trained, with a teacher's arrays
  first_step: int
  batches: BatchSource
  validation: RowSource
  tokenizer: Tokenizer
  metadata: dict  # saved with each checkpoint
  checkpoints: object  # of runs.checkpoint, which is imported late
  workdir: Workdir
  metrics: Metrics
  log: Log
  profile: Profile
  stop: StopSignal
  writers: contextlib.ExitStack  # closes metrics and checkpoints, before the workdir itself


def set_up(
  config: ConfigDict,
  model_config: ModelConfig,
  workdir: str,
  abstract_state,
  resources,
  origin: Origin | None,
  objective,
) -> Setup:
  """Opens the data and the workdir, and resumes from the newest checkpoint if there is one.

  `abstract_state` is what a checkpoint holds, `origin` what the run starts from. The teacher of an
  `objective` is loaded. What is to be closed goes onto `resources`. Raises ValueError or OSError.
  """
  check_wandb(config.wandb_project)

  # 1. All processes must see the same data.
  train, validation, tokenizer = open_data(config, model_config, origin)
  batches = open_batches(config, train)
  metadata = run_metadata(config, train, validation, tokenizer)
  distributed.check_same("config", {"workdir": workdir} | run_identity(metadata))

  # 2. Load what the run starts from and learns from, before anything is written.
  check_disk(workdir, abstract_state)
  base, metadata = load_base(origin, model_config, metadata, workdir)
  objective, teacher = load_teacher(objective, config, model_config, tokenizer)
  metadata |= {"teacher": teacher} if teacher else {}
  trunk = check_branch(open_trunk(config, workdir), config, metadata)

  # 3. Resume, or branch.
  resources.enter_context(lock(workdir))
  checkpoints = open_checkpoints(workdir, config.keep)
  state, first_step = restore_saved(checkpoints, trunk, abstract_state, metadata)

  # 4. Where the run writes.
  setup = Setup(
    config=config,
    state=state,
    base=base,
    objective=objective,
    first_step=first_step,
    batches=batches,
    validation=validation,
    tokenizer=tokenizer,
    metadata=metadata,
    checkpoints=checkpoints,
    **open_outputs(config, model_config, workdir, checkpoints, first_step, trunk, resources),
  )
  log_sources(setup, abstract_state, model_config)
  return setup


def restore_saved(checkpoints, trunk: Trunk | None, abstract_state, metadata: dict):
  """The state that a run goes on from, and its step: the newest in its own workdir, or its trunk's;
  (None, 0) where there is neither. Raises ValueError for what cannot be read, or is another run."""
  with announce(f"reading the newest checkpoint of {checkpoints.path}"):
    saved = checkpoints.restore_latest(abstract_state, metadata)
  if saved is not None or trunk is None:
    return saved or (None, 0)
  with announce(f"reading {trunk.name}"):
    return trunk.saved.restore(abstract_state), trunk.step


def open_outputs(
  config: ConfigDict,
  model_config: ModelConfig,
  workdir: str,
  checkpoints,
  first_step: int,
  trunk: Trunk | None,
  resources,
) -> dict:
  """What a run writes to, as the fields of Setup. From here on SIGTERM asks for a save: before, it
  ends at once."""
  stop = resources.enter_context(StopSignal(get_mesh()))
  folder = resources.enter_context(Workdir(workdir))

  # Metrics are closed before checkpoints.
  writers = resources.enter_context(contextlib.ExitStack())
  writers.callback(checkpoints.close)
  metrics = open_metrics(config, folder, first_step, writers)
  if trunk is not None:
    metrics.say(f"branches from {trunk.name}")
  profile = Profile(folder.path, config.profile_steps, metrics.say)
  writers.callback(profile.end, ())  # where an error ends the loop
  return {
    "stop": stop,
    "workdir": folder,
    "writers": writers,
    "metrics": metrics,
    "log": Log(metrics, config, model_config, checkpoints),
    "profile": profile,
  }


def open_checkpoints(workdir: str, keep: int):
  """The checkpoints of a workdir. Orbax takes seconds to import, so only a run does."""
  with announce("importing Orbax, which writes checkpoints"):
    from gpt2_jax.runs.checkpoint import Checkpoints
  return Checkpoints(workdir, keep)


def open_metrics(config: ConfigDict, folder: Workdir, first_step: int, writers) -> Metrics:
  """The metrics of a run, which show its config and the step from which it goes on."""
  metrics = Metrics(folder.path, first_step, config.steps)
  writers.callback(metrics.close)
  show_config(metrics, folder, first_step, config)
  log_start(metrics, first_step, config)
  return metrics


def open_data(config: ConfigDict, model_config: ModelConfig, origin: Origin | None = None):
  """Opens the training and the validation store, and loads the tokenizer, as `open_stores` does.

  An empty `data.tokenizer` is the checkpoint's. Raises ValueError or OSError where one cannot be,
  or the tokenizer is not the checkpoint's.
  """
  # TensorStore would try for minutes to reach a bucket that is not there.
  paths = data_paths(config)
  for path in paths.values():
    if is_remote(path):
      exists(path)
  if origin is not None:
    paths["tokenizer"] = resolve_tokenizer(origin, paths["tokenizer"])
  train, validation, tokenizer = open_stores(**paths, n_vocab=model_config.n_vocab)

  # Raises where there is no row, or no label, which an evaluation would find after hours.
  for store in (train, validation):
    store.count_rows(model_config.n_ctx)
    check_labels(store, config.classify.classes)
  return train, validation, tokenizer


def check_labels(store: RowSource, classes: int):
  """Raises ValueError unless a store has labels for a head of `classes`, and no label beyond."""
  labels = store.n_classes if isinstance(store, ExampleStore) else 0
  if classes and not labels:
    raise ValueError(
      f"classify.classes is {classes}, and {store.path} has no labels; give examples with a label "
      f"(gpt2-jax tokenize --examples), or set --config.classify.classes=0"
    )
  if labels > classes > 0:
    raise ValueError(
      f"{store.path} has labels up to {labels - 1}, and classify.classes is {classes}; "
      f"set --config.classify.classes={labels}"
    )


def show_config(metrics: Metrics, folder: Workdir, first_step: int, config: ConfigDict):
  """Writes the config where the run is looked at: a file, TensorBoard, Weights & Biases.

  Raises OSError where Weights & Biases, if it is used, cannot be.
  """
  if not metrics.active:
    return
  values = config.to_dict()
  with atomic_write(pathlib.Path(folder.path) / CONFIG_FILE, overwrite=True) as partial:
    partial.write_text(json.dumps(values, indent=2) + "\n")

  lines = [f"{name} = {value}" for name, value in flatten(values).items()]
  metrics.write_text(first_step, "config", "\n".join(lines))

  # Weights & Biases takes the config as it is.
  if config.wandb_project:
    name = pathlib.PurePosixPath(folder.place).name
    board = WeightsAndBiases(
      config.wandb_project, folder.path, name, first_step, values, metrics.say
    )
    metrics.boards.append(board)


def finish(setup: Setup, step: int):
  """Draws the loss curve of a run whose files are closed; says where it is and what comes next."""
  if not setup.metrics.active:
    return
  plot_losses(setup.workdir.path)

  # 1. Where, how far, how good.
  parts = [f"{setup.workdir.place}: {step:,} of {setup.config.steps:,} steps"]
  losses = best_and_last(setup.workdir.path)
  if losses:
    (best_step, best), (_, last) = losses
    parts.append(f"validation loss {last:.4f}, best {best:.4f} at step {best_step:,}")
  parts.append("curve in loss.png")
  setup.metrics.say("; ".join(parts))

  # 2. What next. The words are quoted as a shell wants them.
  if setup.checkpoints.steps():
    model = shlex.quote(f"--model={setup.workdir.place}")
    setup.metrics.say(f"to sample from it: gpt2-jax sample {model} --interactive")


def log_start(metrics: Metrics, first_step: int, config: ConfigDict):
  """Says where the run computes, and from which step it resumes."""
  mesh, processes, devices = get_mesh(), jax.process_count(), jax.local_device_count()
  metrics.say(
    f"{processes} process{'es' * (processes > 1)} x {devices} device{'s' * (devices > 1)} "
    f"({jax.devices()[0].device_kind}), mesh {tuple(mesh.shape.values())}"
  )
  if first_step >= config.steps:
    metrics.say(f"all {first_step} steps were done before")
  elif first_step:
    metrics.say(f"resumed from step {first_step}")

  if config.sample_tokens and processes > 1:
    metrics.say("sample_tokens: a run of several processes shows no samples; gpt2-jax sample does")

  # A trace starts with the third call.
  calls = -(-(config.steps - first_step) // config.steps_per_call)
  if config.profile_steps and calls < 3:
    metrics.say(
      f"profile_steps: no trace will be written, it begins with the third call and {calls} are left"
    )


def log_origin(metrics: Metrics, record: dict, config: ConfigDict, model):
  """Says what the run starts from, and how much of it is trained."""
  trained, _ = partition(model, trainable_mask(model, trained_names(config)))
  parameters = sum(leaf.size for leaf in jax.tree.leaves(trained))
  metrics.say(
    f"starts from {record['name']} (sha256 {record['sha256'][:12]}), "
    f"and trains {parameters:,} parameters"
  )


def log_sources(setup: Setup, abstract_state, model_config: ModelConfig):
  """Says what the run starts from, unless it resumes, what it learns from, and its data."""
  metrics, config, metadata = setup.metrics, setup.config, setup.metadata
  if setup.base is not None and setup.state is None:
    log_origin(metrics, metadata["init_from"], config, abstract_state.model)
  if "teacher" in metadata:
    log_teacher(metrics, metadata["teacher"], config)
  private = privacy_line(config, setup.batches)
  if private:
    metrics.say(private)
  windows = setup.validation.count_rows(model_config.n_ctx)
  log_data(metrics, config, setup.batches.n_rows, windows)


def log_teacher(metrics: Metrics, record: dict, config: ConfigDict):
  """Says what the run learns from, and by which weights."""
  settings = config.distill
  metrics.say(
    f"learns from {record['name']} (sha256 {record['sha256'][:12]}, {settings.dtype}): "
    f"{settings.kl_weight:g} KL at temperature {settings.temperature:g}, "
    f"{settings.lm_weight:g} language model, {settings.cos_weight:g} cosine"
  )


def log_data(metrics: Metrics, config: ConfigDict, windows: int, validation_windows: int):
  """Says how much data there is, and how often it is seen."""
  epochs = config.steps * config.batch_size / windows
  scored = min(config.eval_windows or validation_windows, validation_windows)
  metrics.say(
    f"data: {windows:,} windows, {epochs:,.2f} epochs in {config.steps:,} steps; "
    f"{scored:,} of {validation_windows:,} validation windows are scored"
  )
  if config.batch_size > windows:
    metrics.say(
      f"a batch of {config.batch_size:,} holds every one of {windows:,} windows more than once"
    )
  elif windows < FEW_BATCHES * config.batch_size and epochs > MANY_EPOCHS:
    metrics.say(
      f"the training set is {windows / config.batch_size:,.1f} batches, and each is seen "
      f"{epochs:,.0f} times: it may be learned by heart; loss.png shows whether it is, and "
      f"--config.patience (here {config.patience}) ends a run whose validation loss does not fall"
    )
