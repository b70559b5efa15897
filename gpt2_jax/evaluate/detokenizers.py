# SPDX-License-Identifier: Apache-2.0
"""Detokenizers: tokenized corpora as natural text and back, exactly or by the usual lossy rules.

GPT-2 was trained on natural text; WikiText, Penn Treebank and One Billion Words are published as
tokens between spaces. The paper scored them through "invertible de-tokenizers" (Radford et al.
2019, section 3.1) that were not released. Those here are exact by construction: tokens are written
together only if splitting the result gives those tokens again.
"""

import collections
import dataclasses
import re
from collections.abc import Callable, Sequence

Tokens = Sequence[str]

# U+2060, a word joiner, which has no width. Before a chunk it says that this is one token,
# verbatim. Alone at the start of a line it says that the line lacks the spaces around it that the
# dataset's lines have.
VERBATIM = "\u2060"


@dataclasses.dataclass(frozen=True)
class Detokenizer:
  """Invertible detokenizer: `retokenize(detokenize(text)) == text` for any text, line by line.

  Natural text is chunks between spaces. A chunk is one token or more.
  """

  # For each token but the first: whether natural text has no space before it.
  attached: Callable[[Tokens], list[bool]]
  write: Callable[[Tokens], str]  # tokens as one chunk
  split: Callable[[str, str], list[str]]  # a chunk, and the token after it, to its tokens
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
    # Not framed as the dataset's lines are: the mark says so.
    return f"{VERBATIM} {self._chunks(line)}"

  def _published(self, line: str) -> str:
    if not self.framed:
      return self._tokens(line)
    if not line:
      return " "
    if line.startswith(f"{VERBATIM} "):
      return self._tokens(line[2:])
    return f" {self._tokens(line)} "

  def _chunks(self, line: str) -> str:
    """Writes the tokens of a line as chunks, each the longest that can be split again.

    From the right, since how a chunk splits may depend on the token after it.
    """
    tokens = line.split(" ")
    attached = [False, *self.attached(tokens)]

    chunks = []
    end = len(tokens)
    while end:
      # 1. All tokens without a space between them, back from the end.
      begin = end - 1
      while attached[begin]:
        begin -= 1

      # 2. As many of the last of them as can be had back.
      following = tokens[end] if end < len(tokens) else ""
      n_tokens, chunk = self._longest_chunk(tokens[begin:end], following)
      chunks.append(chunk)
      end -= n_tokens
    return " ".join(reversed(chunks))

  def _longest_chunk(self, tokens: Tokens, following: str) -> tuple[int, str]:
    """The chunk of the most last tokens that splits into them, and how many they are."""
    for i in range(len(tokens)):
      chunk = self.write(tokens[i:])
      if self._split(chunk, following) == tokens[i:]:
        return len(tokens) - i, chunk
    return 1, VERBATIM + tokens[-1]

  def _split(self, chunk: str, following: str) -> list[str]:
    return [chunk[1:]] if chunk.startswith(VERBATIM) else self.split(chunk, following)

  def _tokens(self, line: str) -> str:
    tokens = collections.deque()
    # From the right, as in `_chunks`: the token after a chunk has to be known.
    for chunk in reversed(line.split(" ")):
      tokens.extendleft(reversed(self._split(chunk, tokens[0] if tokens else "")))
    return " ".join(tokens)


def _by_line(convert: Callable[[str], str], text: str) -> str:
  """Converts each line. What follows the last newline is a line only if it is not blank."""
  *lines, rest = text.split("\n")
  if rest.strip(" "):
    rest = convert(rest)
  return "\n".join([*map(convert, lines), rest])


# ---- WikiText and One Billion Words: Moses' tokenizer

# English abbreviations that keep their dot (with any single capital), as in Moses' list
# nonbreaking_prefix.en.
ABBREVIATIONS = frozenset(
  "Adj Adm Adv Asst Bart Bldg Brig Bros Capt Cmdr Col Comdr Con Corp Cpl DR Dr Drs Ens Gen Gov Hon "
  "Hosp Hr Insp Lt MM MR MRS MS Maj Messrs Mlle Mme Mr Mrs Ms Msgr Nos Nr Op Ord Pfc Ph Prof Pvt "
  "Rep Reps Res Rev Rt Sen Sens Sfc Sgt Sr St Supt Surg rev v vs".split()
)
# Those that keep it before a number only.
NUMBER_ABBREVIATIONS = frozenset("Art No pp".split())

NO_SPACE_BEFORE = frozenset(", . ; : ! ? ) ] } % ” ′ ″".split())
NO_SPACE_AFTER = frozenset("( [ { $ £ € ¥ # “ ‘".split())
NO_SPACE_AROUND = frozenset("@-@ @,@ @.@ — / ⁄ ‑".split())
CLITICS = frozenset("s re ve ll d m t".split())
NO_PLURAL = frozenset("as is was has his its this us 's".split())

# Clitics are those of it's, <unk>'s, 1990's.
MOSES = r"""
  (?P<atom> <\w+> | @[-,.]@ | \.{2,} )
| (?P<clitic> (?<=[^\W\d_])'(?=[^\W\d_]) | (?<=>)'(?=[^\W\d_]) | (?<=\d)'(?=s) )
| (?P<mark> [^\w.,-] | _ | (?<!\d), | ,(?!\d) )
"""
# 1,000 and 0.5 and well-known.
SEPARATORS = r"(?P<separator> (?<=[\d>])[,.](?=[\d<]) | (?<=[^\s-])-(?=[^\s-]) ) |"
SPACED = {"atom": r" {} ", "clitic": " {}", "mark": " {} ", "separator": " @{}@ "}


def _moses(pattern: str) -> Callable[[str, str], list[str]]:
  """Moses' tokenizer.perl: makes the function that splits a chunk into its tokens.

  `pattern` names the kinds of tokens in a chunk; the rest of it is words.
  """
  token_pattern = re.compile(pattern, re.VERBOSE)

  def add_spaces(match: re.Match) -> str:
    return SPACED[match.lastgroup].format(match[0])

  def split(chunk: str, following: str) -> list[str]:
    # Most chunks are one word.
    if not chunk or chunk.isalnum():
      return [chunk]

    words = token_pattern.sub(add_spaces, chunk).split()
    tokens = []
    for word, after in zip(words, [*words[1:], following], strict=False):
      if _ends_sentence(word, after):
        tokens += [word[:-1], "."]
      else:
        tokens.append(word)
    return tokens

  return split


def _ends_sentence(word: str, following: str) -> bool:
  """Whether a word's last character is a full stop, which is a token of its own."""
  stem = word[:-1]
  if not stem or not word.endswith(".") or "." in stem or following[:1].islower():
    return False

  # Abbreviations keep their dot: those of the lists, and initials.
  if stem in ABBREVIATIONS or (len(stem) == 1 and stem.isupper()):
    return False
  before_number = re.match(r"\d|<", following) is not None
  return not (stem in NUMBER_ABBREVIATIONS and before_number)


def _moses_attached(tokens: Tokens) -> list[bool]:
  """Punctuation by its kind and its neighbours, quotation marks by their place in the line."""
  attached = _quote_attached(tokens)
  for i in range(1, len(tokens) - 1):
    if _is_inside(*tokens[i - 1 : i + 2]):
      attached |= {i, i + 1}
  return [i in attached or _is_attached(tokens, i) for i in range(1, len(tokens))]


def _is_attached(tokens: Tokens, i: int) -> bool:
  """Whether token i has no space before it, by its kind and its neighbours."""
  before, token, after = tokens[i - 1], tokens[i], tokens[i + 1 : i + 2]

  # 1. Punctuation marks.
  if token in NO_SPACE_BEFORE or before in NO_SPACE_AFTER:
    return True
  if token in NO_SPACE_AROUND or before in NO_SPACE_AROUND:
    return True

  # 2. Clitics: 's, 'll.
  if token[:1] == "'" and token[1:2].isalnum():
    return True

  # 3. Degrees: 6 °C, but 9° N.
  if before == "°" and token in ("C", "F"):
    return True
  return token == "°" and after not in (["C"], ["F"])


def _is_inside(before: str, token: str, after: str) -> bool:
  """Whether a token has no spaces around it, by its neighbours: 1990–95, 10:30, AT&T, don’t."""
  match token:
    case "–" | ":":
      return before[-1:].isdigit() and after[:1].isdigit()
    case "&":
      initials = re.fullmatch("[A-Z]{1,2}", before) and re.fullmatch("[A-Z]", after)
      return initials is not None
    case "’":
      return after in CLITICS
  return False


def _quote_attached(tokens: Tokens) -> set[int]:
  """The tokens without a space before them because of quotation marks, which open and close in
  turn.

  A ' after a final s is the possessive of a plural, unless one is open or the word has no plural.
  Before a digit it begins a decade: '90s. A last mark without a partner keeps its spaces.
  """
  # 1. Double quotes: the space goes after the opening one, and before the closing one.
  attached = set()
  double = [i for i, token in enumerate(tokens) if token == '"']
  for opening, closing in zip(double[::2], double[1::2], strict=False):
    attached |= {opening + 1, closing}

  # 2. Single quotes, which may be apostrophes.
  opening = None
  for i, token in enumerate(tokens):
    if token != "'":
      continue
    before = tokens[i - 1] if i else ""
    after = tokens[i + 1] if i + 1 < len(tokens) else ""

    if opening is not None:
      attached |= {opening + 1, i}
      opening = None
    elif before.endswith("s") and before not in NO_PLURAL:
      attached.add(i)
    elif after[:1].isdigit():
      attached.add(i + 1)
    else:
      opening = i
  return attached


def _write_separators(tokens: Tokens) -> str:
  """@-@, @,@ and @.@ between other tokens are the sign alone."""
  chunk = ""
  for i, token in enumerate(tokens):
    is_between = 0 < i < len(tokens) - 1
    is_separator = is_between and re.fullmatch("@[-,.]@", token)
    chunk += token[1] if is_separator else token
  return chunk


WIKITEXT = Detokenizer(_moses_attached, _write_separators, _moses(SEPARATORS + MOSES), framed=True)
ONE_BILLION = Detokenizer(_moses_attached, "".join, _moses(MOSES), framed=False)


# ---- Penn Treebank as Mikolov published it
#
# Lower case, no punctuation, N for numbers, <unk> for rare words.

SPLIT_WORDS = {
  "cannot": ("can", "not"),
  "gonna": ("gon", "na"),
  "wanna": ("wan", "na"),
  "gotta": ("got", "ta"),
}
ENDINGS = frozenset(["n't", "'", *(f"'{letters}" for letters in CLITICS)])
CURRENCY = re.compile(r"\w*[$#]")  # $ us$ c$ hk$ #


def _ptb_attached(tokens: Tokens) -> list[bool]:
  attached = []
  for before, token in zip(tokens, tokens[1:], strict=False):
    after_currency = CURRENCY.fullmatch(before) is not None
    in_split_word = (before, token) in SPLIT_WORDS.values()
    attached.append(token in ENDINGS or after_currency or in_split_word)
  return attached


def _write_ptb(tokens: Tokens) -> str:
  """The treebank writes a backslash before / and *."""
  return re.sub(r"\\([/*])", r"\1", "".join(tokens))


def _split_ptb(chunk: str, following: str) -> list[str]:
  if chunk in SPLIT_WORDS:
    return list(SPLIT_WORDS[chunk])

  # 1. An ending: n't, 's, or the apostrophe of a plural.
  ending = re.search(r"(?<=[\w>.])(n't|'(s|re|ve|ll|d|m|t)?)\Z", chunk)
  endings = [ending[0]] if ending else []
  stem = chunk[: ending.start()] if ending else chunk

  # 2. A currency sign at the beginning, if something follows it.
  sign = CURRENCY.match(stem)
  begin = sign.end() if sign else 0
  tokens = [stem[:begin], stem[begin:]] if 0 < begin < len(stem) else [stem]

  # 3. The treebank's backslashes.
  escaped = [re.sub("[/*]", r"\\\g<0>", token) for token in tokens]
  return escaped + endings


PTB = Detokenizer(_ptb_attached, _write_ptb, _split_ptb, framed=True)


# ---- the lossy ones in circulation

WIKITEXT_RULES = (
  (r"s '", "s'"),
  (r"/' [0-9]/", "/'[0-9]/"),  # an error of theirs, kept: it hardly ever matches
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
  """Lossy WikiText detokenizer of lm-evaluation-harness (tasks/wikitext) and Megatron-LM
  (tasks/zeroshot_gpt/detokenizer.py).

  Not invertible: quotes and apostrophes pair across lines, headings lose their spaces, N becomes 1.
  """
  return _replaced(text, WIKITEXT_RULES)


def lossy_ptb(text: str) -> str:
  """Lossy Penn Treebank detokenizer of Megatron-LM (tasks/zeroshot_gpt/detokenizer.py).

  Every N becomes 1 and is attached to the word before it.
  """
  return _replaced(text, PTB_RULES)


def _replaced(text: str, rules: Sequence[tuple[str, str]]) -> str:
  for pattern, replacement in rules:
    text = re.sub(pattern, replacement, text)
  return text


# ---- how much a text changes


def edit_share(published: str, natural: str) -> float:
  """Share of bytes that a detokenizer changes: dropped and inserted ones over the published.

  They are counted by value, without regard to their places.
  """
  counts = collections.Counter(published.encode())
  counts.subtract(natural.encode())
  return sum(map(abs, counts.values())) / len(published.encode())
