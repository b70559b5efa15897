# SPDX-License-Identifier: Apache-2.0
import pathlib
import subprocess
import sys

import pytest

from gpt2_jax.evaluate import contamination, sources, tasks
from gpt2_jax.files import file_lock

ROOT = pathlib.Path(__file__).parents[2]
SEEN = "it was the best of times it was the worst of times"  # 12 words, 5 8-grams


def run(*flags: str) -> tuple[int, str, str]:
  command = [sys.executable, str(ROOT / "launch" / "contamination.py"), *flags]
  job = subprocess.run(command, capture_output=True, text=True, timeout=60)
  return job.returncode, job.stdout, job.stderr


@pytest.fixture
def folders(tmp_path) -> pathlib.Path:
  """A corpus of two documents, and three texts: one of its, one that is new, one of two words."""
  for name, texts in (
    ("corpus", [f"So: {SEEN}.", "another document"]),
    ("text", [SEEN.upper(), "a b c d e f g h", "it was"]),
  ):
    (tmp_path / name).mkdir()
    for i, text in enumerate(texts):
      (tmp_path / name / f"{i}.txt").write_text(text)
  return tmp_path


def test_a_filter_serves_again_and_tells_items_apart(folders):
  flags = [f"--filter={folders}/filter", "--task=text", f"--data={folders}"]
  corpus = [f"--corpus={folders}/corpus/*.txt", f"--data_dir={folders}/prepared"]
  code, line, err = run(*flags, *corpus, f"--out={folders}/overlap.json")
  assert code == 0, err
  assert line.startswith("text: 83.33% of 6 8-grams are in the corpus")
  assert "of 3 items 1 have one of them, 1 have none, 1 have fewer than 8 words" in line
  found = contamination.read_overlap(f"{folders}/overlap.json")
  rows = sources.load(tasks.get("text").source, str(folders))
  assert (found["ngrams"], found["found"], found["fingerprint"]) == (
    [5, 1, 0],
    [5, 0, 0],
    rows.fingerprint,
  )
  (folders / "corpus" / "0.txt").unlink()
  assert run(*flags)[:2] == (0, line)  # the corpus is not needed any more
  code, _, err = run(*flags, *corpus)
  assert code == 2 and "is of another corpus" in err and "Traceback" not in err


def test_what_cannot_end_is_refused_before_the_corpus_is_read(folders):
  """No text has eight words; another process builds the filter."""
  (folders / "short").mkdir()
  (folders / "short" / "a.txt").write_text("it was")
  corpus = [f"--corpus={folders}/corpus/*.txt", f"--data_dir={folders}/prepared"]
  code, out, err = run("--task=text", f"--data={folders}/short", *corpus)
  assert (code, out) == (2, "") and "none of its 1 items has 8 words" in err

  flags = ["--task=text", f"--data={folders}/text", f"--filter={folders}/filter", *corpus]
  with file_lock(folders / ".filter.lock", "busy"):
    code, out, err = run(*flags)
  assert (code, out) == (2, "") and "another process is building" in err.splitlines()[-1]
  assert not (folders / "filter").exists()
