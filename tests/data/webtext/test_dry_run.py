# SPDX-License-Identifier: Apache-2.0
"""A dry run counts what the stages do with a sample, and multiplies it."""

import json
import random
import re

import pytest

from gpt2_jax.configs import webtext
from gpt2_jax.data.webtext.dry_run import StageRate, estimate_table, measure_stages
from gpt2_jax.data.webtext.inputs import list_shards
from gpt2_jax.data.webtext.pipeline import READ, build_pipeline
from gpt2_jax.data.webtext.tally import Tally

pytest.importorskip("trafilatura")


def test_a_sample_reaches_the_stages_as_in_a_job(tmp_path):
  rng = random.Random(1)
  words = "the of and to in that it was people said a new law before summer".split()
  lines = []
  for number in range(30):
    text = " ".join(rng.choices(words, k=120 if number % 3 else 20))
    host = "en.wikipedia.org" if number % 5 == 0 else "a.example.org"
    lines.append(json.dumps({"url": f"https://{host}/{number}", "text": text}))
  (tmp_path / "texts.jsonl").write_text("\n".join(lines))
  config = webtext.get_config()
  config.quality.gopher_quality = True
  pipeline = build_pipeline(config, tmp_path)

  # A job counts the same: the first document, which warms all up, is counted once.
  [shard] = list_shards(f"{tmp_path}/texts.jsonl")
  rates, tally = measure_stages(pipeline, [shard], 100), Tally()
  kept = list(pipeline.map_shard(shard, tally))
  for name in [READ, *(stage.name for stage in pipeline.before)]:
    counts = tally.stages[name]
    assert (rates[name].documents, rates[name].kept) == (counts.documents_in, counts.documents_out)
  assert 0 < len(kept) == rates["near_duplicates"].documents < rates[READ].documents == 30

  # Fewer are measured if fewer are asked for.
  assert measure_stages(pipeline, [shard], 4)[READ].documents == 4
  (tmp_path / "none.jsonl").write_text("")
  with pytest.raises(ValueError, match="no document to measure"):
    measure_stages(pipeline, list_shards(f"{tmp_path}/none.jsonl"), 4)


def test_hours_are_those_of_all_documents():
  rates = {"read": StageRate(100, 10**6, 100, 0.5), "extract": StageRate(50, 5 * 10**5, 40, 36.0)}
  table = estimate_table(rates, 2.0, machines=10, cores=4, usd=0.05)

  # 2e12 bytes are 2e6 times the sample: 36 s of it are 20,000 hours.
  assert re.search(r"extract +1 +0\.0 +50\.0% +20,000\.0", table)
  assert "200,000,000 of them" in table and "40.0% are left" in table
  assert "20,278 core hours: 506.9 hours on 10 machines of 4 cores, 1,014 USD" in table
