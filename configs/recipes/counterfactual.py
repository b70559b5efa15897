# SPDX-License-Identifier: Apache-2.0
"""Counterfactual data augmentation (CDA): fine-tuning on a text in which genders are as likely.

  python -m gpt2_jax.configs.recipes.counterfactual text.txt counterfactual.txt
  gpt2-jax tokenize --files=counterfactual.txt --characters=:90% \\
    --out=data/counterfactual/train
  gpt2-jax tokenize --files=counterfactual.txt --characters=90%: \\
    --out=data/counterfactual/validation
  gpt2-jax train --config=recipes/counterfactual --workdir=runs/counterfactual \\
    --config.init_from=gpt2
  gpt2-jax evaluate --models=gpt2,runs/counterfactual --tasks=winobias,winogender,crows_pairs \\
    --data=data --download --out=runs/bias

Each paragraph with a gendered word is followed by itself with all such words swapped, both ways
(Lu et al. 2018; Zhao et al. 2018, whose word lists the table follows). Names stay as they are.
"her" is "his" before a noun and "him" elsewhere; what follows decides, by rule. A copy of this file
has a table of one's own: python mine.py, --config=mine.py. No number to expect stands here: GPT-2's
weights have not been trained by it.
"""

import re
import sys
from collections.abc import Iterable, Iterator

from ml_collections import ConfigDict

from gpt2_jax.configs import finetune
from gpt2_jax.files import atomic_write, local_path, progress

# By pairs, in both numbers.
WORDS = """
he she himself herself man woman men women boy girl boys girls guy gal guys gals male female
males females gentleman lady gentlemen ladies sir ma'am mr mrs mister miss father mother
fathers mothers dad mom dads moms daddy mommy daddies mommies papa mama son daughter
sons daughters brother sister brothers sisters uncle aunt uncles aunts nephew niece
nephews nieces grandfather grandmother grandfathers grandmothers grandpa grandma
grandson granddaughter grandsons granddaughters husband wife husbands wives groom bride
grooms brides widower widow widowers widows boyfriend girlfriend boyfriends girlfriends
fatherhood motherhood brotherhood sisterhood king queen kings queens prince princess
princes princesses duke duchess dukes duchesses baron baroness lord dame lords dames
actor actress actors actresses waiter waitress waiters waitresses host hostess hosts hostesses
steward stewardess stewards stewardesses heir heiress heirs heiresses hero heroine heroes heroines
god goddess gods goddesses priest priestess priests priestesses monk nun monks nuns
businessman businesswoman businessmen businesswomen chairman chairwoman chairmen chairwomen
congressman congresswoman congressmen congresswomen policeman policewoman policemen policewomen
spokesman spokeswoman spokesmen spokeswomen salesman saleswoman salesmen saleswomen
schoolboy schoolgirl schoolboys schoolgirls landlord landlady landlords landladies
""".split()
SWAPS = dict(zip(WORDS[::2], WORDS[1::2], strict=True))
SWAPS |= {second: first for first, second in SWAPS.items()}
SWAPS |= {"ms": "mr"}
PRONOUNS = ("him", "her", "his", "hers")

# After "her" or "his" these begin no noun phrase: it is an object, or stands alone.
NO_NOUN = frozenset(
  """
  a about after again alone also always an and any are as at away be because been before but by can
  could did do down during for from had has have he how if in into is it just no not now of off on
  or out over she so some soon than that the their then there they this through to today together
  tomorrow too until up upon was we well were what when where whether which while who why will with
  without would yesterday you
  """.split()
)
_GENDERED = re.compile(rf"\b({'|'.join((*SWAPS, *PRONOUNS))})\b", re.IGNORECASE)
_NEXT_WORD = re.compile(r"[ \t]*\n?[ \t]*([A-Za-z]+)")


def swap(text: str) -> str:
  """The text with each gendered word swapped, in the case in which it is written."""
  return _GENDERED.sub(_swapped, text)


def _swapped(match: re.Match) -> str:
  word = match[0]
  swapped = SWAPS.get(word.lower()) or _swapped_pronoun(word.lower(), match)
  if word.isupper() and len(word) > 1:
    return swapped.upper()
  return swapped.capitalize() if word[0].isupper() else swapped


def _swapped_pronoun(word: str, match: re.Match) -> str:
  if word in ("him", "hers"):
    return {"him": "her", "hers": "his"}[word]
  following = _NEXT_WORD.match(match.string, match.end())
  has_noun = bool(following) and following[1].lower() not in NO_NOUN
  if word == "his":
    return "her" if has_noun else "hers"
  return "his" if has_noun else "him"


def augment(paragraphs: Iterable[str]) -> Iterator[str]:
  """Each paragraph, and after it its counterpart if it has one."""
  for paragraph in paragraphs:
    yield paragraph
    swapped = swap(paragraph)
    if swapped != paragraph:
      yield swapped


def paragraphs_of(lines: Iterable[str]) -> Iterator[str]:
  """The paragraphs of a text, which empty lines part."""
  paragraph = []
  for line in lines:
    if line.strip():
      paragraph.append(line.rstrip("\n"))
    elif paragraph:
      yield "\n".join(paragraph)
      paragraph = []
  if paragraph:
    yield "\n".join(paragraph)


def get_config() -> ConfigDict:
  config = finetune.get_config("full")
  config.data.update(train="data/counterfactual/train", validation="data/counterfactual/validation")
  config.update(steps=500, warmup_steps=50, eval_every=50, save_every=50)
  return config


def main(source: str, out: str) -> None:
  """Writes the augmented text; nothing is overwritten."""
  with (
    open(local_path(source), encoding="utf-8") as lines,
    atomic_write(local_path(out)) as partial,
    open(partial, "w", encoding="utf-8") as file,
  ):
    for paragraph in progress(augment(paragraphs_of(lines)), "paragraphs"):
      file.write(paragraph + "\n\n")


if __name__ == "__main__":
  if len(sys.argv) != 3:
    sys.exit("usage: python -m gpt2_jax.configs.recipes.counterfactual TEXT.txt OUT.txt")
  try:
    main(*sys.argv[1:])
  except (OSError, ValueError) as error:
    sys.exit(f"error: {str(error)[:300]}")
