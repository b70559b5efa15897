# SPDX-License-Identifier: Apache-2.0
"""Winograd schemas: sentences with each candidate in the pronoun's place, and which of the two is
chosen."""

import pytest

from gpt2_jax.evaluate import sources
from gpt2_jax.evaluate.task import Likelihood, Loglikelihood
from gpt2_jax.evaluate.tasks import winograd

TASKS = {(task.name, task.protocol): task for task in winograd.TASKS}

SCHEMA = """<schema>
<text><txt1>\n{before}\n</txt1><pron> {pronoun}  </pron><txt2> \n{after} </txt2></text>
<quote><quote1>no</quote1><pron>nobody</pron><quote2>never</quote2></quote>
<answers><answer> {first} </answer><answer>{second}  </answer></answers>
<correctAnswer> {right}  </correctAnswer><source>Nobody</source>
</schema>"""

# What stands before the pronoun, the pronoun, what follows, the candidates, which is right; and
# what each candidate becomes, as one writes it in that place.
ITEMS = [
  (("The cup broke the jar\n because", "it", "was  hard.", "The cup", "the jar", "A."),
   ("the cup", "the jar")),
  (("The dog saw a cat.", "It", "ran &amp; hid.", "the dog", "cats", "B"), ("The dog", "Cats")),
  (("Ann's aunt left, and", "her", "place was taken.", "Ann", "Ann's aunt", "B."),
   ("Ann's", "Ann's aunt's")),
  (("Bill passed a plate since", "his", '"Stop!" was late.', "Bill", "The boss", "A"),
   ("Bill's", "the boss's")),
  (("We fed the hens, and then we washed", "them", ".", "The hens", "Dr. Adams", "A"),
   ("the hens", "Dr. Adams")),
  (("Carl closed his eyes and opened", "them", "when he had recieved it.",
    "His eyes", "An eye", "A"),
   ("his eyes", "an eye")),
  (("Nan sat by", "her", ", not him.", "Eve", "My sister", "B"), ("Eve", "my sister")),
]  # fmt: skip


def write(path, items=ITEMS):
  keys = ("before", "pronoun", "after", "first", "second", "right")
  schemas = [SCHEMA.format(**dict(zip(keys, item, strict=True))) for item, _ in items]
  text = (
    '<?xml version="1.0" encoding="ISO-8859-1"?>\n<collection>'
    + "\n".join(schemas)
    + "</collection>"
  )
  path.write_text(text, "latin-1")
  return path


@pytest.fixture
def rows(tmp_path):
  return sources.load(winograd.ALL_285, str(write(tmp_path / "WSCollection.xml")))


def likelihoods(*nats: float) -> list[Likelihood]:
  return [Likelihood(each, 1, False, False) for each in nats]


def test_a_schema_is_read_without_the_spaces_of_its_file(rows):
  assert rows[0] == {
    "before": "The cup broke the jar because",
    "pronoun": "it",
    "after": "was hard.",
    "candidates": ["The cup", "the jar"],
    "label": 0,
  }
  assert rows[1]["after"] == "ran & hid." and rows[5]["after"] == "when he had received it."
  assert [row["label"] for row in rows] == [0, 1, 1, 0, 0, 0, 1]


def test_a_candidate_is_written_as_its_place_asks(rows):
  for row, (_, written) in zip(rows, ITEMS, strict=True):
    sentences = [
      winograd.substituted(row, candidate)[0].removeprefix(row["before"] + " ")
      for candidate in row["candidates"]
    ]
    assert tuple(sentences) == written


def test_a_space_follows_the_candidate_unless_closing_punctuation_does(rows):
  ends = [winograd.substituted(row, "X")[1] for row in rows]
  assert (
    ends[0] == " was hard."
    and ends[3] == ' "Stop!" was late.'
    and ends[4] == "."
    and ends[6] == ", not him."
  )


def test_partial_asks_what_follows_and_full_the_whole_sentence(rows):
  assert winograd.partial_requests(rows[2]) == [
    Loglikelihood("Ann's aunt left, and Ann's", " place was taken."),
    Loglikelihood("Ann's aunt left, and Ann's aunt's", " place was taken."),
  ]
  assert winograd.full_requests(rows[2]) == [
    Loglikelihood("", "Ann's aunt left, and Ann's place was taken."),
    Loglikelihood("", "Ann's aunt left, and Ann's aunt's place was taken."),
  ]
  for row in rows:
    for part, whole, candidate in zip(
      winograd.partial_requests(row), winograd.full_requests(row), row["candidates"], strict=True
    ):
      assert part.context + part.continuation == whole.continuation and whole.context == ""
      assert candidate[1:] in whole.continuation and not whole.continuation.startswith(" ")
    assert (
      TASKS["winograd273", "full"].example(row)
      == winograd.full_requests(row)[row["label"]].continuation
    )


def test_the_likelier_candidate_is_chosen_and_of_a_tie_the_first(rows):
  task = TASKS["winograd273", "partial"]
  assert [
    task.sums(rows[0], likelihoods(*nats))["correct"] for nats in ((1, 2), (2, 1), (1, 1))
  ] == [1, 0, 1]
  assert [
    task.sums(rows[1], likelihoods(*nats))["correct"] for nats in ((1, 2), (2, 1), (1, 1))
  ] == [0, 1, 0]


def test_273_are_the_first_of_the_collection(tmp_path):
  write(tmp_path / "WSCollection.xml", ITEMS * 41)
  both = [
    sources.load(TASKS[name, "full"].source, str(tmp_path)).rows
    for name in ("winograd273", "winograd285")
  ]
  assert [len(rows) for rows in both] == [273, 287] and both[0] == both[1][:273]


def test_tfds_has_the_rows_of_the_collection(tmp_path, rows, prepare):
  """Its records of these schemas, written as its `parse_wsc273_xml` does."""

  def examples():
    for i, ((before, pronoun, after, first, second, right), _) in enumerate(ITEMS):
      before, after = (
        text.replace("&amp;", "&").replace("recieved", "received") for text in (before, after)
      )
      before, after = (
        text.strip().replace("\n", " ").replace("  ", " ") for text in (before, after)
      )
      record = {
        "text": f"{before} {pronoun}{'' if len(after) == 1 else ' '}{after}",
        "pronoun_start": len(before) + 1,
      }
      record |= {
        "pronoun_end": len(before) + len(pronoun) + 1,
        "pronoun_text": pronoun,
        "label": "AB".index(right[0]),
      }
      record |= {
        "option1": first,
        "option2": second,
        "option1_normalized": first,
        "option2_normalized": second,
      }
      yield i, record | {"idx": i}

  source = winograd.FIRST_273
  from_tfds = sources.load(source, None, prepare(source.tfds, source.split, examples()))
  assert sorted(map(repr, from_tfds)) == sorted(map(repr, rows))


def test_contexts_of_partial_scoring_are_the_harness_s(rows, harness_task):
  """Where it can tell: it takes every "her" for a possessive, and a full stop before the pronoun
  for a capital."""
  alike = [
    row for row in rows if row["after"][0] not in winograd.CLOSING and row["pronoun"] != "It"
  ]
  records = [
    {
      "text": f"{row['before']} {row['pronoun']} {row['after']}",
      "pronoun": row["pronoun"],
      "pronoun_loc": len(row["before"]) + 1,
      "options": row["candidates"],
      "label": row["label"],
    }
    for row in alike
  ]
  theirs = harness_task("wsc273/default.yaml", records)
  for row, document in zip(alike, theirs.eval_docs, strict=True):
    requests = theirs.construct_requests(
      document, theirs.fewshot_context(document, 0), metadata=("", 0, 1)
    )
    context, continuation = zip(*(request.arguments for request in requests), strict=True)
    assert context == tuple(request.context for request in winograd.partial_requests(row))
    # there with two spaces before it
    assert {text.strip() for text in continuation} == {row["after"]}


@pytest.mark.parametrize(
  ("old", "new", "message"),
  [
    ("</collection>", "", "WSCollection.xml is no XML: "),
    ("txt2>", "txt3>", "schema 1 is malformed: it has no text/txt2"),
    ("<answer>the jar  </answer>", "", "schema 1 is malformed: it has 1 candidates, not 2"),
    (
      "<answer> The cup </answer>",
      "<answer/>",
      "schema 1 is malformed: its pronoun, what follows it, or a cand",
    ),
    ("> A.  <", "> C. <", "schema 1 is malformed: its correct answer is 'C', neither A nor B"),
    ("> A.  <", "><", "schema 1 is malformed: its correct answer is '', neither A nor B"),
  ],
)
def test_a_malformed_schema_is_named(old, new, message, tmp_path):
  path = write(tmp_path / "WSCollection.xml")
  path.write_text(path.read_text("latin-1").replace(old, new), "latin-1")
  with pytest.raises(ValueError, match=message) as error:
    sources.load(winograd.ALL_285, str(tmp_path))
  assert "\n" not in str(error.value)
