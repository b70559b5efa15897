# SPDX-License-Identifier: Apache-2.0
import html
import itertools
import sys
import time

import numpy as np
import pytest
import sacrebleu

from gpt2_jax.evaluate import remote_data, runner, sources
from gpt2_jax.evaluate.sources import decoded
from gpt2_jax.evaluate.sweep.cells import parse_task
from gpt2_jax.evaluate.task import Generated
from gpt2_jax.evaluate.tasks import translation
from gpt2_jax.evaluate.tasks.translation import (
  KEYS,
  TASKS,
  bleu,
  bleu_statistics,
  cut_at_line,
  cut_at_sentence,
  read,
)

EN_FR, EN_FR_LINE, EN_FR_PROMPT, FR_EN, FR_EN_LINE, _ = TASKS
ROW = {"en": "The cat sat.", "fr": "Le chat s'est assis."}
WORDS = ("le", "chat", "noir", "s'est", "assis", "ici,", "3.5", "Où ?", "l'eau.", "&quot;non&quot;")


def totals(pairs) -> dict[str, np.ndarray]:
  sums = [bleu_statistics(*pair) for pair in pairs]
  return {key: np.array([item[key] for item in sums]).sum() for key in KEYS}


def texts(rng, count: int, longest: int) -> list[str]:
  return [" ".join(rng.choice(WORDS, rng.integers(0, longest + 1))) for _ in range(count)]


@pytest.mark.parametrize("longest", [2, 4, 6, 20])
def test_bleu_from_sums_is_sacrebleu_s(longest):
  rng, zeros = np.random.default_rng(longest), 0
  for count in (1, 2, 3, 10, 50) * 8:
    translations, references = texts(rng, count, longest), texts(rng, count, longest)
    expected = sacrebleu.corpus_bleu(translations, [references]).score
    assert float(bleu(totals(zip(translations, references, strict=True)))) == pytest.approx(
      expected, abs=1e-9
    )
    zeros += expected == 0
  assert zeros < 40 or longest == 2  # most cases say something


def test_orders_without_a_match_are_smoothed():
  # 3 of 4 words and 1 of 3 pairs match; of triples and fours none: they count 1/2 and 1/4 of a
  # match; no penalty.
  expected = 100 * (3 / 4 * 1 / 3 * (1 / 2) / 2 * (1 / 4) / 1) ** (1 / 4)
  assert float(bleu(totals([("a b x d", "a b c d")]))) == pytest.approx(expected)


def test_bleu_of_many_resamples_at_once_is_that_of_each():
  rng = np.random.default_rng(0)
  items = [bleu_statistics(a, b) for a, b in zip(texts(rng, 6, 8), texts(rng, 6, 8), strict=True)]
  counts_RN = rng.integers(0, 3, (2, 5, 6))
  sums = {key: counts_RN @ np.array([item[key] for item in items]) for key in KEYS}
  scores = bleu(sums)
  assert scores.shape == (2, 5) and np.isfinite(scores).all()
  for at in itertools.product(range(2), range(5)):
    assert scores[at] == bleu({key: values[at] for key, values in sums.items()})


def test_the_prompt_ends_in_an_equals_sign_and_examples_are_solved():
  for task, prompt, solved in (
    (EN_FR, "The cat sat. =", "The cat sat. = Le chat s'est assis."),
    (FR_EN, "Le chat s'est assis. =", "Le chat s'est assis. = The cat sat."),
  ):
    [request] = task.requests(ROW)
    assert (request.text, request.stop, request.top_k, task.separator) == (prompt, ("\n",), 1, "\n")
    assert task.example(ROW) == solved


def test_the_first_sentence_or_line_is_the_translation():
  text = " M. Dupont vient. Il mange. \n Encore"
  assert cut_at_sentence(text) == "M. Dupont vient."
  assert cut_at_line(text) == "M. Dupont vient. Il mange."
  assert cut_at_sentence(" \n") == cut_at_line("") == ""
  answers = [Generated(" Le chat s'est assis. Le chat dort.", 1.0, 1, False)]
  assert EN_FR.sums(ROW, answers) == bleu_statistics(ROW["fr"], ROW["fr"])
  assert EN_FR_LINE.sums(ROW, answers)["length"] == 9
  assert FR_EN.sums(ROW, [Generated(" The cat sat.", 1.0, 1, False)])["matches4"] == 1
  assert EN_FR.sums(ROW, [Generated("", 0.0, 0, False)])["length"] == 0
  assert FR_EN_LINE.protocol == EN_FR_LINE.protocol == "first_line"


def test_parallel_lines_and_sgm_and_tfds_give_the_same_rows(tmp_path):
  expected = [ROW, {"en": "A & B\u2028x", "fr": "A et B"}]
  for language in ("en", "fr"):
    lines = [row[language] for row in expected]
    (tmp_path / f"newstest2014.{language}").write_text("\n".join(lines) + "\n")
    segments = "\n".join(
      f'<seg id="{i}"> {line.replace("&", "&amp;")}</seg>' for i, line in enumerate(lines, 1)
    )
    name = "src.en" if language == "en" else "ref.fr"
    (tmp_path / f"newstest2014-fren-{name}.sgm").write_text(
      f'<refset>\n<doc docid="1">\n{segments}\n</doc></refset>\n'
    )
  assert list(read(tmp_path / "newstest2014.en")) == expected
  assert list(read(tmp_path / "newstest2014-fren-src.en.sgm")) == expected
  assert (
    EN_FR.source.row(decoded({language: text.encode() for language, text in ROW.items()})) == ROW
  )


def test_files_that_are_not_parallel_are_refused(tmp_path):
  path = tmp_path / "newstest2014.en"
  path.write_text("a\nb\n")
  with pytest.raises(FileNotFoundError, match="newstest2014.fr"):
    list(read(path))
  (tmp_path / "newstest2014.fr").write_text("a\nb\nc\n")
  with pytest.raises(ValueError, match=r"newstest2014.en has 2 segments and newstest2014.fr has 3"):
    list(read(path))
  (tmp_path / "newstest2014.fr").write_text("a\n\n")
  with pytest.raises(ValueError, match=r"segment 2 is empty"):
    list(read(path))
  with pytest.raises(ValueError, match=r"NAME-src.en.sgm"):
    list(read(tmp_path / "newstest2014.de"))


def write_sgm(folder, role: str, language: str, lines):
  """A file of WMT's form: its names, its attributes, and entities."""
  text = f'<{"src" if role == "src" else "ref"}set setid="newstest2014" srclang="any">\n'
  for number, line in enumerate(lines, 1):
    text += '<doc sysid="ref" docid="1012-bbc" genre="news" origlang="en">\n<hl>\n'
    text += f'<seg id="{number}"> {html.escape(line)} </seg>\n</hl></doc>\n'
  path = folder / f"newstest2014-fren-{role}.{language}.sgm"
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text + "</refset>\n", encoding="utf-8")
  return path


@pytest.mark.parametrize("folder", ["wmt14", "wmt14/test-full", ""])
@pytest.mark.parametrize("roles", [("src", "ref"), ("ref", "src")])
def test_the_files_of_wmts_archive_are_found_in_either_direction(tmp_path, folder, roles):
  rows = [{"en": f"A & B {i}", "fr": f"A et <B> {i}"} for i in range(3)]
  paths = []
  for role, language in zip(roles, ("en", "fr"), strict=True):
    paths.append(write_sgm(tmp_path / folder, role, language, [row[language] for row in rows]))
  for task in (EN_FR, FR_EN):
    assert sources.load(task.source, str(tmp_path)).rows == rows
    # either file of the pair may be given
    for path in paths:
      assert sources.load(task.source, str(path)).rows == rows


def test_both_files_of_a_pair_are_read_from_a_bucket(bucket, tmp_path):
  bucket.put("data/wmt14/newstest2014.en", b"a\n")
  bucket.put("data/wmt14/newstest2014.fr", b"b\n")
  assert remote_data.load(EN_FR.source, "gs://bucket/data").rows == [{"en": "a", "fr": "b"}]
  file = "gs://bucket/data/wmt14/newstest2014.fr"
  assert remote_data.load(FR_EN.source, file).rows == [{"en": "a", "fr": "b"}]
  for role, language in (("src", "en"), ("ref", "fr")):
    path = write_sgm(tmp_path, role, language, ["c"])
    bucket.put(f"sgm/test-full/{path.name}", path.read_bytes())
  assert remote_data.load(EN_FR.source, "gs://bucket/sgm").rows == [{"en": "c", "fr": "c"}]


@pytest.mark.parametrize(
  "content, message",
  [
    ('<seg id="1">a', "segment '1' has no end"),
    ('<seg id="1">a<seg id="2">b</seg>', "two <seg> or two </seg> at character 13"),
    ("a</seg>", "two <seg> or two </seg> at character 1"),
    ('<doc docid="x"><seg id="2">a</seg></doc>', "segment 1 is 'x 2' here and '1' in"),
    ("<refset></refset>", "has 0 segments and newstest2014-fren-ref.fr.sgm has 1"),
    ('<!DOCTYPE x [<!ENTITY e SYSTEM "/etc/passwd">]><seg id="1">&e;</seg>', None),
  ],
)
def test_sgml_that_is_not_parallel_is_refused_and_no_entity_is_a_file(tmp_path, content, message):
  (tmp_path / "newstest2014-fren-ref.fr.sgm").write_text('<seg id="1">b</seg>')
  path = tmp_path / "newstest2014-fren-src.en.sgm"
  path.write_text(content)
  if message is None:
    assert list(read(path)) == [{"en": "&e;", "fr": "b"}]
    return
  with pytest.raises(ValueError, match=message) as error:
    list(read(path))
  assert "\n" not in str(error.value)


def test_sgml_is_read_in_one_pass(tmp_path):
  """Of many tags without an end, the second is refused; those that are no tags are passed over."""
  path = tmp_path / "newstest2014-fren-src.en.sgm"
  (tmp_path / "newstest2014-fren-ref.fr.sgm").write_text("<seg " * 300_000)
  begin = time.perf_counter()
  path.write_text("<seg id=1>" * 300_000)
  with pytest.raises(ValueError, match="two <seg>"):
    list(read(path))
  path.write_text("<seg " * 300_000)
  assert list(read(path)) == [] and time.perf_counter() - begin < 5


def test_without_sacrebleu_the_command_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
  with pytest.raises(ImportError, match=r"pip install 'gpt2_jax\[eval\]'"):
    translation._sacrebleu.__wrapped__()


def test_paper_prompt_is_the_first_sentence_after_five_pairs():
  rows = [{"en": f"It is {i}.", "fr": f"C'est {i}."} for i in range(9)]
  pool = [{"en": f"Pair {i}.", "fr": f"Paire {i}."} for i in range(7)]
  asked = {}

  class Scorer:
    def answers(self, requests, contiguous=False):
      asked.setdefault(task.protocol, []).append([request.text for request in requests])
      return [Generated(" C'est 1. Oui.", 1.0, 1, False)] * len(requests)

  items = {}
  for task, shots in ((EN_FR, 5), (EN_FR_PROMPT, None)):
    items[task.protocol] = runner.run(task, rows, Scorer(), shots, pool=pool)
  first, second = asked.values()
  assert first == second and all(text.count("Pair ") == 5 for text in first[0])
  for key, values in items["first_sentence"].items():
    np.testing.assert_array_equal(items["paper_prompt"][key], values)

  # another number of examples would be another protocol
  for shots in (0, 3):
    with pytest.raises(ValueError, match="paper_prompt puts 5 examples before each item, and not"):
      runner.run(EN_FR_PROMPT, rows, Scorer(), shots, pool=pool)
    with pytest.raises(ValueError, match="another protocol"):
      parse_task(f"wmt14_en_fr:paper_prompt:{shots}")
  assert parse_task("wmt14_en_fr:paper_prompt").name == "wmt14_en_fr:paper_prompt:5"
  assert parse_task("wmt14_en_fr").name == "wmt14_en_fr:first_sentence:0"
