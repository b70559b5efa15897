# SPDX-License-Identifier: Apache-2.0
"""WinoGrande, COPA, StoryCloze and BLiMP: which of two is likelier? All as in lm-evaluation-harness (see choice.py)."""

import csv
import pathlib
from collections.abc import Iterator

from gpt2_jax.evaluate.sources import Row, Source, at_place
from gpt2_jax.evaluate.task import Task
from gpt2_jax.evaluate.tasks.choice import ACCURACY, Pair, choice, lines, one_of, with_training

# ---- WinoGrande


def _winogrande_row(record: dict) -> Row:
  return _winogrande_checked(record, int(record["answer"]) - 1)


def _winogrande_checked(record: dict, label: int) -> Row:
  row = {key: record[key] for key in ("sentence", "option1", "option2")}
  if "_" not in row["sentence"]:
    raise ValueError(f"there is no blank _ in {row['sentence']!r}")
  return row | {"label": one_of((row["option1"], row["option2"]), label)}


def _winogrande(row: Row) -> list[Pair]:
  """What follows the blank, after what goes up to it with each option: partial scoring, as of Trinh & Le (2018)."""
  before, _, after = row["sentence"].partition("_")
  return [(before + row[key], after.strip()) for key in ("option1", "option2")]


WINOGRANDE = Source(
  "winogrande",
  ("dev.jsonl",),
  lines(_winogrande_row),
  "https://storage.googleapis.com/ai2-mosaic/public/winogrande/winogrande_1.1.zip",
  "winogrande",
  "validation",
  lambda record: _winogrande_checked(record, record["label"]),
)

# ---- COPA

CONNECTORS = {"cause": "because", "effect": "therefore"}


def _copa_row(record: dict) -> Row:
  row = {key: record[key] for key in ("premise", "choice1", "choice2", "question")}
  if row["question"] not in CONNECTORS:
    raise ValueError(f"it asks for {row['question']!r}, which is neither cause nor effect")
  return row | {"label": one_of((row["choice1"], row["choice2"]), int(record["label"]))}


def _copa(row: Row) -> list[Pair]:
  """The premise without its full stop; the space before each choice makes two, as in the harness."""
  context = f"{row['premise'].strip()[:-1]} {CONNECTORS[row['question']]}"
  return [(context, f" {text[:1].lower()}{text[1:]}") for text in (row["choice1"], row["choice2"])]


COPA = Source(
  "copa",
  ("val.jsonl",),
  lines(_copa_row),
  "https://dl.fbaipublicfiles.com/glue/superglue/data/v2/COPA.zip",
  "super_glue/copa",
  "validation",
  _copa_row,
)

# ---- StoryCloze


def _read_storycloze(path: pathlib.Path) -> Iterator[Row]:
  with open(path, encoding="utf-8", newline="") as file:
    for number, record in enumerate(csv.DictReader(file), 1):
      yield at_place(f"{path}: story {number:,}", lambda record=record: _storycloze_row(record))


def _storycloze_row(record: dict) -> Row:
  context = " ".join(record[f"InputSentence{i}"] for i in range(1, 5))
  endings = [record[f"RandomFifthSentenceQuiz{i}"] for i in (1, 2)]
  return {"context": context, "endings": endings, "label": one_of(endings, int(record["AnswerRightEnding"]) - 1)}


def _storycloze_tfds_row(record: dict) -> Row:
  context, endings = record["context"], record["endings"]
  return {"context": context, "endings": endings, "label": one_of(endings, record["label"] - 1)}


def _storycloze(row: Row) -> list[Pair]:
  return [(row["context"], ending) for ending in row["endings"]]


STORYCLOZE = Source(
  "storycloze",
  ("cloze_test_val__spring2016*.csv",),
  _read_storycloze,
  "https://cs.rochester.edu/nlp/rocstories",
  "story_cloze/2016",
  "validation",
  _storycloze_tfds_row,
)

# ---- BLiMP (Warstadt et al., 2020): the grammatical sentence against the other, each after <|endoftext|> and a space

SETS = """
adjunct_island anaphor_gender_agreement anaphor_number_agreement animate_subject_passive animate_subject_trans causative
complex_NP_island coordinate_structure_constraint_complex_left_branch
coordinate_structure_constraint_object_extraction determiner_noun_agreement_1 determiner_noun_agreement_2
determiner_noun_agreement_irregular_1 determiner_noun_agreement_irregular_2 determiner_noun_agreement_with_adj_2
determiner_noun_agreement_with_adj_irregular_1 determiner_noun_agreement_with_adj_irregular_2
determiner_noun_agreement_with_adjective_1 distractor_agreement_relational_noun distractor_agreement_relative_clause
drop_argument ellipsis_n_bar_1 ellipsis_n_bar_2 existential_there_object_raising existential_there_quantifiers_1
existential_there_quantifiers_2 existential_there_subject_raising expletive_it_object_raising inchoative intransitive
irregular_past_participle_adjectives irregular_past_participle_verbs irregular_plural_subject_verb_agreement_1
irregular_plural_subject_verb_agreement_2 left_branch_island_echo_question left_branch_island_simple_question
matrix_question_npi_licensor_present npi_present_1 npi_present_2 only_npi_licensor_present only_npi_scope passive_1
passive_2 principle_A_c_command principle_A_case_1 principle_A_case_2 principle_A_domain_1 principle_A_domain_2
principle_A_domain_3 principle_A_reconstruction regular_plural_subject_verb_agreement_1
regular_plural_subject_verb_agreement_2 sentential_negation_npi_licensor_present sentential_negation_npi_scope
sentential_subject_island superlative_quantifiers_1 superlative_quantifiers_2 tough_vs_raising_1 tough_vs_raising_2
transitive wh_island wh_questions_object_gap wh_questions_subject_gap wh_questions_subject_gap_long_distance
wh_vs_that_no_gap wh_vs_that_no_gap_long_distance wh_vs_that_with_gap wh_vs_that_with_gap_long_distance
""".split()


def _blimp_row(record: dict) -> Row:
  return {"sentences": [record["sentence_good"], record["sentence_bad"]], "label": 0}


def _blimp(row: Row) -> list[Pair]:
  return [("", sentence) for sentence in row["sentences"]]


def _blimp_task(name: str) -> Task:
  source = Source(
    "blimp",
    (f"{name}.jsonl",),
    lines(_blimp_row),
    "https://github.com/alexwarstadt/blimp/tree/master/data",
    f"blimp/{name}",
    "train",
    _blimp_row,
  )
  about = f"whether the grammatical sentence is the likelier: {name.replace('_', ' ')}"
  return choice(f"blimp_{name}", about, source, _blimp, ACCURACY)


TASKS = (
  choice(
    "winogrande",
    "which of two names fills a blank, by what follows it; development set",
    with_training(WINOGRANDE, "train_xl.jsonl", "train_xl"),
    _winogrande,
    ACCURACY,
  ),
  choice(
    "copa",
    "which of two causes or effects of a premise; validation set",
    with_training(COPA, "train.jsonl"),
    _copa,
    ACCURACY,
  ),
  choice("storycloze", "which of two endings; validation set of 2016", STORYCLOZE, _storycloze, ACCURACY),
  *map(_blimp_task, SETS),
)
