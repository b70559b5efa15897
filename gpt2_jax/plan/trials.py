# SPDX-License-Identifier: Apache-2.0
"""Compiles the candidates of a search one after the other, and keeps what was found in a file.

With a folder, `search.json` has a line for each candidate. The same search resumes from it.
"""

import dataclasses
import hashlib
import importlib.metadata
import json
import pathlib
import sys
import time
from collections.abc import Callable

import jax
from ml_collections import ConfigDict

from gpt2_jax.chips import GIB, Topology
from gpt2_jax.files import atomic_write, first_line
from gpt2_jax.plan import search
from gpt2_jax.plan.report import Plan
from gpt2_jax.plan.search import Candidate


@dataclasses.dataclass(frozen=True)
class Trial:
  """A compiled candidate: the range of its step and its HBM, or the error in place of them."""

  step: tuple[float, float] | None  # seconds, the fast and the slow end
  hbm: float  # bytes a chip
  error: str = ""

  @property
  def seconds(self) -> float | None:
    """The middle of the range, by which trials are compared."""
    return None if self.step is None else sum(self.step) / 2

  def __str__(self):
    if self.step is None:
      return self.error
    fast, slow = self.step
    return f"{1e3 * fast:,.0f} to {1e3 * slow:,.0f} ms, {self.hbm / GIB:.2f} GiB"


def fastest_plan(
  config: ConfigDict,
  topology: Topology,
  compile_plan: Callable[[ConfigDict], Plan],
  limit: int,
  folder: pathlib.Path | None = None,
) -> Plan:
  """Compiles up to `limit` candidates, the next one chosen by the last; returns the fastest's plan.

  Says on stderr what it compiles. Raises ValueError if nothing fits, or if `folder` holds another
  search.
  """
  # 1. Rank by the roofline; take what an earlier search of the same config has compiled.
  ranked = search.candidates(config, topology)
  path = None if folder is None else folder / "search.json"
  key = _key(config, topology)
  trials = {} if path is None else _read_trials(path, key, ranked)
  earlier = f"; {len(trials)} are in {path}" if trials else ""
  _say(
    f"{len(ranked)} candidates divide and are estimated to fit; compiling {limit}, "
    f"each takes a minute or more{earlier}"
  )

  # 2. Compile, until the limit or until no neighbour of the fastest is left.
  plans, start = {}, time.perf_counter()
  while len(trials) < limit:
    seconds = {candidate: trial.seconds for candidate, trial in trials.items()}
    candidate = search.next_candidate(ranked, seconds)
    if candidate is None:
      break
    _say(f"{len(trials) + 1} of {limit}: {candidate} ...")
    trials[candidate], plan = _compile(config, topology, candidate, compile_plan)

    # Only the fastest is kept: a compiled program is large.
    if _fastest(trials) == candidate:
      plans = {candidate: plan}
    print(f"{candidate}: {trials[candidate]}", flush=True)
    minutes = (time.perf_counter() - start) / 60
    _say(f"  {minutes:.1f} minutes; the best so far: {trials.get(_fastest(trials), 'none fits')}")
    if path is not None:
      _write_trials(path, key, trials)

  # 3. The fastest. An earlier search's is compiled again, for its table.
  fastest = _fastest(trials)
  if fastest is None:
    last = list(trials.values())[-1].error
    raise ValueError(f"none of the {len(trials)} compiled fits {topology}; the last: {last}")
  if fastest not in plans:
    plans[fastest] = compile_plan(fastest.apply(config))
  return plans[fastest]


def _compile(
  config: ConfigDict,
  topology: Topology,
  candidate: Candidate,
  compile_plan: Callable[[ConfigDict], Plan],
) -> tuple[Trial, Plan | None]:
  """Compiles one candidate. What does not fit is a trial, too, or what the compiler gives up on."""
  try:
    plan = compile_plan(candidate.apply(config))
  except ValueError as error:
    return Trial(None, candidate.hbm, first_line(error)), None

  # The compiler takes programs that need a little more than is there, by the sum of its own
  # figures. None has run on a TPU, so no such program is recommended.
  needed = plan.compiled.hbm_needed
  if needed > topology.chip.hbm:
    fast, slow = plan.estimate.step
    return Trial(
      None,
      needed,
      f"{1e3 * fast:,.0f} to {1e3 * slow:,.0f} ms, but it needs {needed / GIB:.2f} GiB of "
      f"{topology.chip.hbm / GIB:.2f}",
    ), None
  return Trial(plan.estimate.step, needed), plan


def _fastest(trials: dict[Candidate, Trial]) -> Candidate | None:
  fitting = [candidate for candidate, trial in trials.items() if trial.step is not None]
  return min(fitting, key=lambda candidate: trials[candidate].seconds, default=None)


def _say(text: str) -> None:
  print(text, file=sys.stderr, flush=True)


# ---- search.json


def _key(config: ConfigDict, topology: Topology) -> str:
  """A hash of what the trials depend on: the config, the slice, the compiler's version."""
  # A nightly libtpu has another name.
  try:
    libtpu = importlib.metadata.version("libtpu")
  except importlib.metadata.PackageNotFoundError:
    libtpu = "unknown"
  facts = [json.loads(config.to_json_best_effort()), str(topology), jax.__version__, libtpu]
  return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()


def _read_trials(path: pathlib.Path, key: str, ranked: list[Candidate]) -> dict[Candidate, Trial]:
  """The trials of an earlier search, none without a file. Raises ValueError if it is another's."""
  if not path.exists():
    return {}

  try:
    found = json.loads(path.read_text())
    trials = {
      tuple(trial["knobs"]): Trial(trial["step"], trial["hbm"], trial["error"])
      for trial in found["trials"]
    }
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ValueError(
      f"{path} is not the file of a search; take another folder for --out"
    ) from error
  if found["key"] != key:
    raise ValueError(
      f"{path} is of another config, topology or compiler; take another folder for --out"
    )
  return {x: trials[_knobs(x)] for x in ranked if _knobs(x) in trials}


def _write_trials(path: pathlib.Path, key: str, trials: dict[Candidate, Trial]) -> None:
  lines = []
  for candidate, trial in trials.items():
    lines.append({"knobs": _knobs(candidate), **dataclasses.asdict(trial)})
  path.parent.mkdir(parents=True, exist_ok=True)
  with atomic_write(path, overwrite=True) as partial:
    partial.write_text(json.dumps({"key": key, "trials": lines}, indent=1) + "\n")


def _knobs(candidate: Candidate) -> tuple:
  """What tells a candidate from others, as JSON can hold it."""
  fields = [field.name for field in dataclasses.fields(candidate) if field.compare]
  return tuple(vars(candidate)[name] for name in fields)
