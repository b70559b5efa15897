# SPDX-License-Identifier: Apache-2.0
"""Tokenized corpora as natural text, and back: exactly, or as the lossy rules in circulation do it.

GPT-2 has read natural text; WikiText, Penn Treebank and One Billion Words are published as tokens between spaces. The
paper scored them through "invertible de-tokenizers" (Radford et al. 2019, section 3.1) that were not released. Those
here are exact by construction: tokens are written together only where splitting the result gives those tokens again.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence

Tokens = Sequence[str]

# U+2060, a word joiner, which has no width. Before a chunk it says that this is one token, as it stands; alone at the
# start of a line, that the line lacks the spaces around it that the dataset's lines have.
AS_IT_STANDS = "\u2060"


@dataclasses.dataclass(frozen=True)
class Detokenizer:
  """`retokenize(detokenize(text)) == text` for every text whatever; both work line by line.

  Natural text is chunks between spaces. A chunk is a token or more: `split(chunk, token after it)` gives them.
  """

  joined: Callable[[Tokens], list[bool]]  # for each token but the first, whether natural text has no space before it
  write: Callable[[Tokens], str]  # tokens as one chunk
  split: Callable[[str, str], list[str]]
  framed: bool  # whether the published lines begin and end with a space

  def detokenize(self, text: str) -> str:
    return _by_line(self._natural, text)

  def retokenize(self, text: str) -> str:
    return _by_line(self._published, text)

  def _natural(self, line: str) -> str:
    if not self.framed:
      return self._chunks(line)
    if line == " ":
      return ""
    if len(line) > 2 and line[0] == line[-1] == " ":
      return self._chunks(line[1:-1])
    return f"{AS_IT_STANDS} {self._chunks(line)}"

  def _published(self, line: str) -> str:
    if not self.framed:
      return self._tokens(line)
    if not line:
      return " "
    if line.startswith(f"{AS_IT_STANDS} "):
      return self._tokens(line[2:])
    return f" {self._tokens(line)} "

  def _chunks(self, line: str) -> str:
    """From the right, since what a chunk holds may depend on what follows: the longest that can be split again."""
    tokens = line.split(" ")
    joined = [False, *self.joined(tokens)]
    chunks, end = [], len(tokens)
    while end:
      following = tokens[end] if end < len(tokens) else ""
      begin = end - 1
      while joined[begin]:
        begin -= 1
      begin, chunk = self._longest(tokens[begin:end], begin, following)
      chunks.append(chunk)
      end = begin
    return " ".join(reversed(chunks))

  def _longest(self, tokens: Tokens, begin: int, following: str) -> tuple[int, str]:
    """The chunk of the most last tokens, with where it begins."""
    for i in range(len(tokens)):
      chunk = self.write(tokens[i:])
      if self._split(chunk, following) == tokens[i:]:
        return begin + i, chunk
    return begin + i, AS_IT_STANDS + tokens[-1]

  def _split(self, chunk: str, following: str) -> list[str]:
    return [chunk[1:]] if chunk.startswith(AS_IT_STANDS) else self.split(chunk, following)

  def _tokens(self, line: str) -> str:
    tokens = collections.deque()
    for chunk in reversed(line.split(" ")):
      tokens.extendleft(reversed(self._split(chunk, tokens[0] if tokens else "")))
    return " ".join(tokens)


def _by_line(convert: Callable[[str], str], text: str) -> str:
  """What follows the last newline is a line only if there is something."""
  *lines, rest = text.split("\n")
  return "\n".join([*map(convert, lines), convert(rest) if rest.strip(" ") else rest])


# ---- WikiText and One Billion Words: Moses' tokenizer

# English abbreviations that keep their dot (with any single capital), and those that do so before a number, as in
# Moses' list nonbreaking_prefix.en.
ABBREVIATIONS = frozenset(
  "Adj Adm Adv Asst Bart Bldg Brig Bros Capt Cmdr Col Comdr Con Corp Cpl DR Dr Drs Ens Gen Gov Hon Hosp Hr Insp "
  "Lt MM MR MRS MS Maj Messrs Mlle Mme Mr Mrs Ms Msgr Nos Nr Op Ord Pfc Ph Prof Pvt Rep Reps Res Rev Rt Sen Sens "
  "Sfc Sgt Sr St Supt Surg rev v vs".split()
)
NUMBERED = frozenset("Art No pp".split())

BEFORE = frozenset(", . ; : ! ? ) ] } % ” ′ ″".split())  # without a space before them
AFTER = frozenset("( [ { $ £ € ¥ # “ ‘".split())  # without a space after them
BETWEEN = frozenset("@-@ @,@ @.@ — / ⁄ ‑".split())  # without either
CLITICS = frozenset("s re ve ll d m t".split())
NO_PLURAL = frozenset("as is was has his its this us 's".split())

MOSES = r"""
  (?P<whole> <\w+> | @[-,.]@ | \.{2,} )
| (?P<clitic> (?<=[^\W\d_])'(?=[^\W\d_]) | (?<=>)'(?=[^\W\d_]) | (?<=\d)'(?=s) )  # it's, <unk>'s, 1990's
| (?P<mark> [^\w.,-] | _ | (?<!\d), | ,(?!\d) )
"""
SEPARATORS = r"(?P<separator> (?<=[\d>])[,.](?=[\d<]) | (?<=[^\s-])-(?=[^\s-]) ) |"  # 1,000 and 0.5 and well-known
SPACED = {"whole": r" {} ", "clitic": " {}", "mark": " {} ", "separator": " @{}@ "}


def _moses(pattern: str) -> Callable[[str, str], list[str]]:
  """The splitting of a chunk, as Moses' tokenizer.perl does it, into the pieces that `pattern` names."""
  pieces = re.compile(pattern, re.VERBOSE)

  def split(chunk: str, following: str) -> list[str]:
    if not chunk or chunk.isalnum():
      return [chunk]
    tokens = []
    words = pieces.sub(lambda match: SPACED[match.lastgroup].format(match[0]), chunk).split()
    for word, after in zip(words, [*words[1:], following], strict=False):
      tokens += [word[:-1], "."] if _ends_sentence(word, after) else [word]
    return tokens

  return split


def _ends_sentence(word: str, following: str) -> bool:
  """Whether a word's last character is a dot that is a token of its own."""
  stem = word[:-1]
  if not stem or not word.endswith(".") or "." in stem or following[:1].islower():
    return False
  return not (
    stem in ABBREVIATIONS
    or (len(stem) == 1 and stem.isupper())
    or (stem in NUMBERED and re.match(r"\d|<", following) is not None)
  )


def _moses_joined(tokens: Tokens) -> list[bool]:
  """Punctuation by its kind and its neighbours, quotation marks by their position in the line."""
  quotes = _quotes(tokens)
  inside = {j for i in range(1, len(tokens) - 1) if _inside(*tokens[i - 1 : i + 2]) for j in (i, i + 1)}
  return [
    i in quotes
    or i in inside
    or tokens[i] in BEFORE
    or tokens[i - 1] in AFTER
    or tokens[i] in BETWEEN
    or tokens[i - 1] in BETWEEN
    or (tokens[i][:1] == "'" and tokens[i][1:2].isalnum())
    or (tokens[i - 1] == "°" and tokens[i] in ("C", "F"))
    or (tokens[i] == "°" and tokens[i + 1 : i + 2] not in (["C"], ["F"]))
    for i in range(1, len(tokens))
  ]


def _inside(before: str, token: str, after: str) -> bool:
  """Whether a token stands without spaces between these: 1990–95, 10:30, AT&T, don’t."""
  match token:
    case "–" | ":":
      return before[-1:].isdigit() and after[:1].isdigit()
    case "&":
      return re.fullmatch("[A-Z]{1,2}", before) is not None and re.fullmatch("[A-Z]", after) is not None
    case "’":
      return after in CLITICS
  return False


def _quotes(tokens: Tokens) -> set[int]:
  """The tokens that have no space before them because of quotation marks, which open and close in turn.

  A ' after a final s is the possessive of a plural, unless one is open or the word has no plural; before a digit it
  stands for a century. A last one without a partner stays as it is.
  """
  double = [i for i, token in enumerate(tokens) if token == '"']
  joined = {i for opening, closing in zip(double[::2], double[1::2], strict=False) for i in (opening + 1, closing)}
  opening = None
  for i in (i for i, token in enumerate(tokens) if token == "'"):
    before, after = tokens[i - 1] if i else "", tokens[i + 1] if i + 1 < len(tokens) else ""
    if opening is not None:
      joined |= {opening + 1, i}
      opening = None
    elif before.endswith("s") and before not in NO_PLURAL:
      joined.add(i)
    elif after[:1].isdigit():
      joined.add(i + 1)
    else:
      opening = i
  return joined


def _write_separators(tokens: Tokens) -> str:
  """@-@, @,@ and @.@ between other tokens are the sign alone."""
  return "".join(
    token[1] if 0 < i < len(tokens) - 1 and re.fullmatch("@[-,.]@", token) else token for i, token in enumerate(tokens)
  )


WIKITEXT = Detokenizer(_moses_joined, _write_separators, _moses(SEPARATORS + MOSES), framed=True)
ONE_BILLION = Detokenizer(_moses_joined, "".join, _moses(MOSES), framed=False)


# ---- Penn Treebank as Mikolov published it: lower case, no punctuation, N for numbers, <unk> for rare words

PAIRS = {"cannot": ("can", "not"), "gonna": ("gon", "na"), "wanna": ("wan", "na"), "gotta": ("got", "ta")}
ENDINGS = frozenset(["n't", "'", *(f"'{letters}" for letters in CLITICS)])
CURRENCY = re.compile(r"\w*[$#]")  # $ us$ c$ hk$ #


def _ptb_joined(tokens: Tokens) -> list[bool]:
  return [
    after in ENDINGS or CURRENCY.fullmatch(before) is not None or (before, after) in PAIRS.values()
    for before, after in zip(tokens, tokens[1:], strict=False)
  ]


def _write_ptb(tokens: Tokens) -> str:
  """The treebank writes a backslash before / and *."""
  return re.sub(r"\\([/*])", r"\1", "".join(tokens))


def _split_ptb(chunk: str, following: str) -> list[str]:
  if chunk in PAIRS:
    return list(PAIRS[chunk])
  ending = re.search(r"(?<=[\w>.])(n't|'(s|re|ve|ll|d|m|t)?)\Z", chunk)
  stem = chunk[: ending.start()] if ending else chunk
  sign = CURRENCY.match(stem)
  begin = sign.end() if sign else 0
  tokens = [stem[:begin], stem[begin:]] if 0 < begin < len(stem) else [stem]
  return [re.sub("[/*]", r"\\\g<0>", token) for token in tokens] + ([ending[0]] if ending else [])


PTB = Detokenizer(_ptb_joined, _write_ptb, _split_ptb, framed=True)


# ---- the lossy ones in circulation

WIKITEXT_RULES = (
  (r"s '", "s'"),
  (r"/' [0-9]/", "/'[0-9]/"),  # a slip of theirs, which hardly ever matches
  *((f" @{re.escape(sign)}@ ", sign) for sign in "-,."),
  *((f" {re.escape(sign)} ", f"{sign} ") for sign in ":;.!?,"),
  (r"\(\s*([^)]*?)\s*\)", r"(\1)"),
  (r"\[\s*([^]]*?)\s*\]", r"[\1]"),
  (r"\{\s*([^}]*?)\s*\}", r"{\1}"),
  (r'"\s*([^"]*?)\s*"', r'"\1"'),
  (r"'\s*([^']*?)\s*'", r"'\1'"),
  (r"= = = =", "===="),
  (r"= = =", "==="),
  (r"= =", "=="),
  (r" ° ", "°"),
  (r" \n", "\n"),
  (r"\n ", "\n"),
  (r" N ", " 1 "),
  (r" 's", "'s"),
)
PTB_RULES = (
  (r" '", "'"),
  (r" \n", "\n"),
  (r"\n ", "\n"),
  (r" n't", "n't"),
  (r" N ", "1 "),
  (r"([$#]) 1", r"\g<1>1"),
)


def lossy_wikitext(text: str) -> str:
  """What lm-evaluation-harness (tasks/wikitext) and Megatron-LM (tasks/zeroshot_gpt/detokenizer.py) both do.

  Not invertible: quotes and apostrophes pair across lines, headings lose their spaces, N becomes 1.
  """
  return _replaced(text, WIKITEXT_RULES)


def lossy_ptb(text: str) -> str:
  """What Megatron-LM (tasks/zeroshot_gpt/detokenizer.py) does. Every N becomes 1 and joins the word before it."""
  return _replaced(text, PTB_RULES)


def _replaced(text: str, rules: Sequence[tuple[str, str]]) -> str:
  for pattern, replacement in rules:
    text = re.sub(pattern, replacement, text)
  return text


# ---- how much a text changes


def edit_share(published: str, natural: str) -> float:
  """Bytes that a detokenizer drops or puts in, counted by value, over the bytes published."""
  counts = collections.Counter(published.encode())
  counts.subtract(natural.encode())
  return sum(map(abs, counts.values())) / len(published.encode())
