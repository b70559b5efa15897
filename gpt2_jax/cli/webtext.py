# SPDX-License-Identifier: Apache-2.0
"""WebText: links of Reddit, pages to documents, de-duplication, a dataset and its report.

  # 1. outbound links with karma of 3 or more, one a line, for a crawler that writes WARC
  gpt2-jax webtext --reddit='RS_2017-*.zst' --links=links.txt

  # 2. what the crawler wrote, to a dataset; the same command resumes a killed job
  gpt2-jax webtext --input='crawl/*.warc.gz' --out=data/webtext --config.links=links.txt

  # 3. the dataset to a token store
  gpt2-jax tokenize --tfds_name=webtext --data_dir=data/webtext --out=data/webtext_tokens

Inputs are .warc and .wet (Common Crawl's, too), .html, and .jsonl with {"url": ..., "html": ...} or
{"url": ..., "text": ...}; each may be compressed. Nothing is fetched. --out/report.md says what
each stage dropped and why.

--runner=beam runs the same on Apache Beam, with equal output; --beam has its options:

  gpt2-jax webtext --input='crawl/*.warc.gz' --out=data/webtext --runner=beam \\
    --beam=--direct_num_workers=2 --beam=--direct_running_mode=multi_processing

--dry_run measures the stages on a sample of the input, and says what terabytes of it would take:

  gpt2-jax webtext --input='crawl/*.warc.gz' --dry_run --terabytes=5 --machines=20
"""

import math
import pathlib

from absl import flags
from ml_collections import config_flags

from gpt2_jax.cli import shell
from gpt2_jax.files import check_folder, local_path

_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "The pipeline (default: configs/webtext.py): all knobs."
)
_INPUT = flags.DEFINE_string(
  "input", None, "Pages: globs with commas between them; ** crosses folders."
)
_OUT = flags.DEFINE_string("out", None, "Folder of the dataset and its report.")
_RUNNER = flags.DEFINE_enum(
  "runner", "plain", ["plain", "beam"], "A plain loop, or Apache Beam; the output is the same."
)
_PROCESSES = flags.DEFINE_integer(
  "processes", 1, "Processes of the plain loop that read inputs.", lower_bound=1
)
_BEAM = flags.DEFINE_multi_string("beam", [], "An option of Beam, such as --runner=FlinkRunner.")
_DOMAINS = flags.DEFINE_string(
  "published_domains", None, "OpenAI's webtext_domains.txt, for the report to compare with."
)
_REDDIT = flags.DEFINE_string(
  "reddit", None, "Dumps of Reddit submissions (JSON lines, .zst), globs as --input."
)
_LINKS = flags.DEFINE_string("links", None, "With --reddit: the file of links to write.")
_KARMA = flags.DEFINE_integer("karma", 3, "With --reddit: the least karma of a link.")
_OVER_18 = flags.DEFINE_bool("over_18", True, "With --reddit: take links that are marked over 18.")
_CROSSPOSTS = flags.DEFINE_bool("crossposts", True, "With --reddit: take links of crossposts.")
_DRY_RUN = flags.DEFINE_bool(
  "dry_run", False, "Write nothing: estimate machines, hours and price from a sample of --input."
)
_SAMPLE = flags.DEFINE_integer("sample", 200, "With --dry_run: documents to measure.", 1)
_TERABYTES = flags.DEFINE_float("terabytes", 1.0, "With --dry_run: of pages, not compressed.")
_MACHINES = flags.DEFINE_integer("machines", 10, "With --dry_run: how many.", lower_bound=1)
_CORES = flags.DEFINE_integer("cores", 8, "With --dry_run: of a machine.", lower_bound=1)
_PRICE = flags.DEFINE_float("usd_per_core_hour", None, "With --dry_run: for the price.")


def main() -> None:
  if _DRY_RUN.value:
    return print(dry_run())
  if bool(_REDDIT.value) == bool(_INPUT.value):
    raise ValueError("give --reddit and --links, or --input and --out")
  print(write_links() if _REDDIT.value else write_corpus())


def write_links() -> str:
  """Writes the links of the dumps. Returns a line that says how many, and what was left out."""
  from gpt2_jax.data.globs import expand_globs
  from gpt2_jax.data.webtext.links import LinkRules, extract_links

  if not _LINKS.value:
    raise ValueError("--reddit needs --links, the file to write")
  check_folder(local_path(_LINKS.value).parent)
  rules = LinkRules(_KARMA.value, _OVER_18.value, _CROSSPOSTS.value)
  tally = extract_links(expand_globs(_REDDIT.value), rules, _LINKS.value)
  links = tally.stages["distinct"].documents_out if "distinct" in tally.stages else 0
  return f"{_LINKS.value}: {links:,} links; {_reasons(tally.to_json())}"


def write_corpus() -> str:
  """Runs the pipeline over the inputs. Returns a line that describes the dataset."""
  from gpt2_jax.data.webtext.inputs import list_shards
  from gpt2_jax.data.webtext.job import run_job
  from gpt2_jax.data.webtext.report import read_published_domains

  if not _OUT.value:
    raise ValueError("--input needs --out, the folder to write")
  if _LINKS.value:
    raise ValueError("--links is a file that --reddit writes; to use one, give --config.links")
  if _BEAM.value and _RUNNER.value != "beam":
    raise ValueError("--beam has options of Apache Beam; give --runner=beam, too")
  out = local_path(_OUT.value)
  check_folder(out)
  published = read_published_domains(_DOMAINS.value) if _DOMAINS.value else None
  report = run_job(
    _CONFIG.value,
    list_shards(_INPUT.value),
    out,
    _RUNNER.value,
    _PROCESSES.value,
    _BEAM.value,
    published,
  )
  return (
    f"{out}: {report['documents']:,} documents, {report['bytes']:,} bytes, content "
    f"{report['content_sha256'][:16]}; {_reasons(report['stages'])}; see {out / 'report.md'}"
  )


def dry_run() -> str:
  """The table of a dry run."""
  import tempfile

  from gpt2_jax.data.webtext.dry_run import estimate_table, measure_stages
  from gpt2_jax.data.webtext.inputs import list_shards
  from gpt2_jax.data.webtext.pipeline import build_pipeline

  if not _INPUT.value or _OUT.value or _REDDIT.value:
    raise ValueError("--dry_run takes --input, and neither --out nor --reddit")
  for flag in (_TERABYTES, _PRICE):
    if flag.value is not None and not 0 < flag.value < math.inf:
      raise ValueError(f"--{flag.name}={flag.value} is not a finite number above 0")
  shards = list_shards(_INPUT.value)
  with tempfile.TemporaryDirectory() as folder:
    pipeline = build_pipeline(_CONFIG.value, pathlib.Path(folder))
    rates = measure_stages(pipeline, shards, _SAMPLE.value)
  return estimate_table(rates, _TERABYTES.value, _MACHINES.value, _CORES.value, _PRICE.value)


def _reasons(stages: dict) -> str:
  """How many documents were dropped, and the most frequent reasons."""
  counts = {}
  for stage in stages.values():
    for reason, dropped in stage["reasons"].items():
      counts[reason] = counts.get(reason, 0) + dropped["documents"]
  most = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:5]
  names = ", ".join(f"{reason} {count:,}" for reason, count in most)
  return f"dropped {sum(counts.values()):,}" + (f" ({names})" if names else "")


def run() -> None:
  shell.run(main, __doc__, imports=("gpt2_jax.data",), config="webtext")
