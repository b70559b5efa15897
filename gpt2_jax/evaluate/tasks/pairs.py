# SPDX-License-Identifier: Apache-2.0
"""Choice of two (WinoGrande, COPA, StoryCloze, BLiMP): the likelier of two texts.

All as in lm-evaluation-harness; choice.py says how.
"""

import csv
import pathlib
from collections.abc import Iterator

from gpt2_jax.evaluate.sources import (
  Download,
  Row,
  Source,
  at_place,
  text_field,
  text_list,
  whole_number,
)
from gpt2_jax.evaluate.task import Task
from gpt2_jax.evaluate.tasks.choice import (
  ACCURACY,
  Pair,
  checked_label,
  choice_task,
  json_lines_reader,
  with_training,
)

# ---- WinoGrande


def _winogrande_row(record: dict) -> Row:
  # the published answer is "1" or "2"
  return _winogrande_checked(record, whole_number(record, "answer") - 1)


def _winogrande_tfds_row(record: dict) -> Row:
  return _winogrande_checked(record, whole_number(record, "label"))


def _winogrande_checked(record: dict, label: int) -> Row:
  row = {key: text_field(record, key) for key in ("sentence", "option1", "option2")}

  # the whole sentence would be the context, with nothing after it to score
  if "_" not in row["sentence"]:
    raise ValueError(f"there is no blank _ in {row['sentence'][:200]!r}")
  return row | {"label": checked_label((row["option1"], row["option2"]), label)}


def _winogrande_pairs(row: Row) -> list[Pair]:
  """Partial scoring (Trinh & Le, 2018): what follows the blank, after each option in its place."""
  before, _, after = row["sentence"].partition("_")
  after = after.strip()
  return [(before + row["option1"], after), (before + row["option2"], after)]


def _winogrande_download(file: str) -> Download:
  return Download(
    "https://storage.googleapis.com/ai2-mosaic/public/winogrande/winogrande_1.1.zip",
    "3619ab104d8be2977b25c90ff420cb42d491707dcc75362a1e5d22bc082b7318",
    (f"winogrande_1.1/{file}",),
  )


WINOGRANDE = Source(
  name="winogrande",
  files=("dev.jsonl",),
  read=json_lines_reader(_winogrande_row),
  url="https://storage.googleapis.com/ai2-mosaic/public/winogrande/winogrande_1.1.zip",
  tfds="winogrande",
  split="validation",
  row=_winogrande_tfds_row,
  downloads=(_winogrande_download("dev.jsonl"),),
)

# ---- COPA

CONNECTORS = {"cause": "because", "effect": "therefore"}


def _copa_row(record: dict) -> Row:
  keys = ("premise", "choice1", "choice2", "question")
  row = {key: text_field(record, key) for key in keys}

  if row["question"] not in CONNECTORS:
    raise ValueError(f"it asks for {row['question'][:80]!r}, which is neither cause nor effect")
  label = checked_label((row["choice1"], row["choice2"]), whole_number(record, "label"))
  return row | {"label": label}


def _copa_pairs(row: Row) -> list[Pair]:
  """Pairs of the premise without its full stop, and each choice.

  The space before a choice makes two with the one that every continuation has, as in the harness.
  """
  premise = row["premise"].strip()[:-1]
  context = f"{premise} {CONNECTORS[row['question']]}"

  # a choice continues the sentence
  pairs = []
  for choice in (row["choice1"], row["choice2"]):
    pairs.append((context, f" {choice[:1].lower()}{choice[1:]}"))
  return pairs


def _copa_download(file: str) -> Download:
  return Download(
    "https://dl.fbaipublicfiles.com/glue/superglue/data/v2/COPA.zip",
    "405906cddac74bc1e1ce8220f1107d1025b66a25ef10149d91b10bb30651125f",
    (f"COPA/{file}",),
  )


COPA = Source(
  name="copa",
  files=("val.jsonl",),
  read=json_lines_reader(_copa_row),
  url="https://dl.fbaipublicfiles.com/glue/superglue/data/v2/COPA.zip",
  tfds="super_glue/copa",
  split="validation",
  row=_copa_row,
  downloads=(_copa_download("val.jsonl"),),
)

# ---- StoryCloze


def _read_storycloze(path: pathlib.Path) -> Iterator[Row]:
  # newline="" is what the csv module asks for: quoted fields may hold line ends
  with open(path, encoding="utf-8", newline="") as file:
    for number, record in enumerate(csv.DictReader(file), 1):
      yield at_place(f"{path}: story {number:,}", lambda record=record: _storycloze_row(record))


def _storycloze_row(record: dict) -> Row:
  context = " ".join(text_field(record, f"InputSentence{i}") for i in range(1, 5))
  endings = [text_field(record, f"RandomFifthSentenceQuiz{i}") for i in (1, 2)]

  # the published label is 1 or 2
  label = checked_label(endings, whole_number(record, "AnswerRightEnding") - 1)
  return {"context": context, "endings": endings, "label": label}


def _storycloze_tfds_row(record: dict) -> Row:
  endings = text_list(record, "endings")
  label = checked_label(endings, whole_number(record, "label") - 1)
  return {"context": text_field(record, "context"), "endings": endings, "label": label}


def _storycloze_pairs(row: Row) -> list[Pair]:
  return [(row["context"], ending) for ending in row["endings"]]


STORYCLOZE = Source(
  name="storycloze",
  files=("cloze_test_val__spring2016*.csv",),
  read=_read_storycloze,
  url="https://cs.rochester.edu/nlp/rocstories",
  tfds="story_cloze/2016",
  split="validation",
  row=_storycloze_tfds_row,
)

# ---- BLiMP (Warstadt et al., 2020): the grammatical sentence against the ungrammatical one.
# Each is scored after <|endoftext|> and a space.

SETS = """
adjunct_island anaphor_gender_agreement anaphor_number_agreement animate_subject_passive
animate_subject_trans causative complex_NP_island
coordinate_structure_constraint_complex_left_branch
coordinate_structure_constraint_object_extraction determiner_noun_agreement_1
determiner_noun_agreement_2 determiner_noun_agreement_irregular_1
determiner_noun_agreement_irregular_2 determiner_noun_agreement_with_adj_2
determiner_noun_agreement_with_adj_irregular_1 determiner_noun_agreement_with_adj_irregular_2
determiner_noun_agreement_with_adjective_1 distractor_agreement_relational_noun
distractor_agreement_relative_clause drop_argument ellipsis_n_bar_1 ellipsis_n_bar_2
existential_there_object_raising existential_there_quantifiers_1 existential_there_quantifiers_2
existential_there_subject_raising expletive_it_object_raising inchoative intransitive
irregular_past_participle_adjectives irregular_past_participle_verbs
irregular_plural_subject_verb_agreement_1 irregular_plural_subject_verb_agreement_2
left_branch_island_echo_question left_branch_island_simple_question
matrix_question_npi_licensor_present npi_present_1 npi_present_2 only_npi_licensor_present
only_npi_scope passive_1 passive_2 principle_A_c_command principle_A_case_1 principle_A_case_2
principle_A_domain_1 principle_A_domain_2 principle_A_domain_3 principle_A_reconstruction
regular_plural_subject_verb_agreement_1 regular_plural_subject_verb_agreement_2
sentential_negation_npi_licensor_present sentential_negation_npi_scope sentential_subject_island
superlative_quantifiers_1 superlative_quantifiers_2 tough_vs_raising_1 tough_vs_raising_2
transitive wh_island wh_questions_object_gap wh_questions_subject_gap
wh_questions_subject_gap_long_distance wh_vs_that_no_gap wh_vs_that_no_gap_long_distance
wh_vs_that_with_gap wh_vs_that_with_gap_long_distance
""".split()


BLIMP_RAW = "https://raw.githubusercontent.com/alexwarstadt/blimp/master/data"


def _blimp_sha256() -> dict[str, str]:
  """SHA-256 of each set's file, from blimp.sha256, which `sha256sum -c` reads; they are TFDS's."""
  lines = pathlib.Path(__file__).with_name("blimp.sha256").read_text(encoding="utf-8").split()
  return {
    file.removesuffix(".jsonl"): digest
    for digest, file in zip(lines[::2], lines[1::2], strict=True)
  }


BLIMP_SHA256 = _blimp_sha256()


def _blimp_row(record: dict) -> Row:
  # the first is the right one in all of them
  sentences = [text_field(record, "sentence_good"), text_field(record, "sentence_bad")]
  return {"sentences": sentences, "label": 0}


def _blimp_pairs(row: Row) -> list[Pair]:
  return [("", sentence) for sentence in row["sentences"]]


def _blimp_task(name: str) -> Task:
  source = Source(
    name="blimp",
    files=(f"{name}.jsonl",),
    read=json_lines_reader(_blimp_row),
    url="https://github.com/alexwarstadt/blimp/tree/master/data",
    tfds=f"blimp/{name}",
    split="train",
    row=_blimp_row,
    downloads=(Download(f"{BLIMP_RAW}/{name}.jsonl", BLIMP_SHA256[name]),),
  )
  description = f"whether the grammatical sentence is the likelier: {name.replace('_', ' ')}"
  return choice_task(f"blimp_{name}", description, source, _blimp_pairs, ACCURACY)


# ---- the tasks

TASKS = (
  choice_task(
    "winogrande",
    "which of two names fills a blank, by what follows it; development set",
    with_training(WINOGRANDE, "train_xl.jsonl", "train_xl", _winogrande_download("train_xl.jsonl")),
    _winogrande_pairs,
    ACCURACY,
  ),
  choice_task(
    "copa",
    "which of two causes or effects of a premise; validation set",
    with_training(COPA, "train.jsonl", download=_copa_download("train.jsonl")),
    _copa_pairs,
    ACCURACY,
  ),
  choice_task(
    "storycloze",
    "which of two endings; validation set of 2016",
    STORYCLOZE,
    _storycloze_pairs,
    ACCURACY,
  ),
  *map(_blimp_task, SETS),
)
