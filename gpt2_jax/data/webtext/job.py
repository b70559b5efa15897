# SPDX-License-Identifier: Apache-2.0
"""A job from inputs to dataset and report, in a folder that says what it is of.

job.json        the config and the inputs; the same command resumes, another one is refused
work/           what is done so far; removed at the end
webtext/1.0.0/  the TFDS dataset in ArrayRecord
report.md, report.json and pictures; report.json comes last: with it the job is done
"""

import json
import os
import pathlib
import shutil
from collections.abc import Sequence

from ml_collections import ConfigDict

from gpt2_jax.data.webtext.inputs import Shard
from gpt2_jax.data.webtext.pipeline import build_pipeline
from gpt2_jax.data.webtext.plain_runner import Result, run_plain
from gpt2_jax.data.webtext.report import Corpus, make_report, write_report
from gpt2_jax.files import atomic_write, file_lock, read_json_object

# The version of what stages do: a newer one does not go on with what an older one made.
FORMAT = 1
RUNNERS = ("plain", "beam")


def run_job(
  config: ConfigDict,
  shards: Sequence[Shard],
  out: pathlib.Path,
  runner: str = "plain",
  processes: int = 1,
  options: Sequence[str] = (),
  published: dict[str, int] | None = None,
) -> dict:
  """Runs a job, or what is left of it, and returns its report.

  Raises ValueError if the folder is another job's, OSError while another process works there.
  """
  # 1. Is it this job's folder? Is it done?
  job = {
    "format": FORMAT,
    "config": config.to_dict(),
    "inputs": [_describe_file(path) for shard in shards for path in shard.paths],
    "files of the config": [_describe_file(path) for path in _files_of(config)],
  }
  job = json.loads(json.dumps(job))
  with file_lock(out / "lock", f"another process works in {out}; wait for it, or take another"):
    _claim(out, job)
    if (out / "report.json").exists():
      return _check_not_empty(read_json_object(out / "report.json"), out)

    # 2. Run it, and write what is left.
    work = out / "work"
    work.mkdir(exist_ok=True)
    pipeline = build_pipeline(config, work)
    if runner == "beam":
      result = _run_beam(pipeline, shards, work, options)
    else:
      result = run_plain(pipeline, shards, work, processes)
    result.tally.check()
    return _publish(result, out, {"files": len(job["inputs"]), "config": job["config"]}, published)


def _publish(
  result: Result, out: pathlib.Path, job: dict, published: dict[str, int] | None
) -> dict:
  """Writes the dataset and the report. Raises ValueError if no document is left."""
  corpus = Corpus.of(result.documents())
  report = make_report(corpus, result.tally, result.clusters, job, published or {})
  if corpus.documents:
    from gpt2_jax.data.webtext.dataset import write_dataset

    report["dataset"] = os.path.relpath(write_dataset(result.documents, out), out)
  write_report(report, out)
  shutil.rmtree(out / "work")
  return _check_not_empty(report, out)


def _check_not_empty(report: dict, out: pathlib.Path) -> dict:
  if not report["documents"]:
    raise ValueError(f"no document is left: {out / 'report.md'} says which stage dropped them")
  return report


def _run_beam(pipeline, shards: Sequence[Shard], work: pathlib.Path, options: Sequence[str]):
  try:
    import apache_beam  # noqa: F401
  except ImportError as error:
    raise ImportError("--runner=beam needs Apache Beam: pip install apache-beam") from error
  from gpt2_jax.data.webtext.beam_runner import run_beam

  return run_beam(pipeline, shards, work, options)


def _files_of(config: ConfigDict) -> list[str]:
  """The files that the config names and stages read."""
  named = (
    config.links,
    config.domains.blocked,
    config.language.model,
    config.contamination.filter,
  )
  return [path for path in named if path]


def _describe_file(path: str) -> list:
  """What tells a file from a changed one, without reading it."""
  status = os.stat(path)
  return [path, status.st_size, status.st_mtime_ns]


def _claim(out: pathlib.Path, job: dict) -> None:
  """Writes job.json, or checks that the one that is there is the same."""
  path = out / "job.json"
  if not path.exists():
    # These would be removed or replaced.
    for name in ("work", "webtext", "report.json", "report.md"):
      if (out / name).exists():
        raise ValueError(
          f"{out} has {name} but no job.json, so it is not a job's; take another --out"
        )
    with atomic_write(path) as partial:
      partial.write_text(json.dumps(job, indent=1) + "\n", encoding="utf-8")
    return
  former = read_json_object(path)
  for part in ("format", "config", "inputs", "files of the config"):
    if former.get(part) != job[part]:
      raise ValueError(
        f"{out} holds another job: its {part} is not this one's ({path} has it); take another --out"
      )
