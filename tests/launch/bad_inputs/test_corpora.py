# SPDX-License-Identifier: Apache-2.0
"""Bad inputs of tokenizing, of evaluating and of counting overlaps: one line, and nothing lost."""

import pytest

from tests.launch.bad_inputs import fixtures
from tests.launch.bad_inputs.fixtures import FEW, NOBODY
from tests.launch.bad_inputs.runner import check, rows

TOKENIZE = f"{fixtures.TOKENIZE} --files=text.txt"
EXAMPLES = f"{fixtures.TOKENIZE} --out=new --examples"
TOKENS = f"{fixtures.TOKENIZE} --out=new --tokens"
PIECES = "--files=abc.txt --train_tokenizer=sentencepiece --tokenizer=new.model --out=new"
TOKENIZES = rows(
  "tokenize",
  "",
  [
    ("a store", None, f"{TOKENIZE} --out=new"),
    ("a store in a home", None, f"{TOKENIZE} --out=~/new"),
    ("a store that is there", None, f"{TOKENIZE} --out=train"),
    (
      "a tokenizer in a folder that is made",
      None,
      "--files=text.txt --train_tokenizer=characters --tokenizer=new/t.json --out=new2 "
      "--processes=1",
    ),
    ("verifies", None, "--verify=train"),
    ("no flags", "--out", ""),
    ("no corpus", "--files", "--out=new"),
    ("two corpora", "--tfds_name", f"{TOKENIZE} --tfds_name=lm1b --out=new"),
    ("nowhere to write", "--out", TOKENIZE),
    ("an empty place", "--out", f"{TOKENIZE} --out="),
    ("files that are none", "gone", f"{TOKENIZE} --files=gone/*.txt --out=new"),
    ("one of two patterns that is none", "gone", f"{TOKENIZE} --files=text.txt,gone.txt --out=new"),
    ("a folder", "hollow", f"{TOKENIZE} --files=hollow --out=new"),
    ("commas alone", "','", f"{TOKENIZE} --files=, --out=new"),
    ("an empty file", "empty.txt", f"{TOKENIZE} --files=empty.txt --out=new"),
    ("a file that is not UTF-8", "bytes.txt", f"{TOKENIZE} --files=bytes.txt --out=new"),
    ("files of nobody", "nobody_of_this_name", f"{TOKENIZE} --files={NOBODY}/x.txt --out=new"),
    ("a dataset that is none", "wikki", f"{fixtures.TOKENIZE} --tfds_name=wikki --out=new"),
    (
      "a dataset that is not prepared",
      "prepare",
      f"{fixtures.TOKENIZE} --tfds_name=lm1b --out=new",
    ),
    ("an empty split", "split", f"{TOKENIZE} --split= --out=new"),
    ("a split that is none", "test", f"{TOKENIZE} --split=test --out=new"),
    ("a split of nothing", "train[:0%]", f"{TOKENIZE} --split=train[:0%] --out=new"),
    ("a split that is no slice", "train[", f"{TOKENIZE} --split=train[ --out=new"),
    ("no characters", "0:0", f"{TOKENIZE} --characters=0:0 --out=new"),
    ("characters that end before", "90:10", f"{TOKENIZE} --characters=90:10 --out=new"),
    ("characters in words", "half", f"{TOKENIZE} --characters=half --out=new"),
    ("characters past the end", "99999999", f"{TOKENIZE} --characters=99999999: --out=new"),
    ("onto a file", "text.txt", f"{TOKENIZE} --out=text.txt"),
    ("below a file", "text.txt", f"{TOKENIZE} --out=text.txt/new"),
    ("into /proc", "/proc", f"{TOKENIZE} --out=/proc/new"),
    ("to nobody", "nobody_of_this_name", f"{TOKENIZE} --out={NOBODY}/new"),
    ("to s3", "s3://", f"{TOKENIZE} --out=s3://bucket/new"),
    ("without a bucket", "gs://", f"{TOKENIZE} --out=gs://"),
    ("onto another job", "train", f"{TOKENIZE} --split=train[:90%] --files=many/*.txt --out=train"),
    ("onto a deep job", "job.json", f"{TOKENIZE} --out=store-job"),
    ("no processes", "processes", f"{TOKENIZE} --out=new --processes=0"),
    ("no tokenizer", "gone.json", f"{TOKENIZE} --tokenizer=gone.json --out=new"),
    ("an empty tokenizer", "empty", f"{TOKENIZE} --tokenizer= --out=new"),
    ("a tokenizer of a name", "gpt3", f"{TOKENIZE} --tokenizer=gpt3 --out=new"),
    (
      "a tokenizer of nobody",
      "nobody_of_this_name",
      f"{TOKENIZE} --tokenizer={NOBODY}/t.json --out=new",
    ),
    ("a garbage model", "garbage.model", f"{TOKENIZE} --tokenizer=garbage.model --out=new"),
    ("an empty model", "empty.model", f"{TOKENIZE} --tokenizer=empty.model --out=new"),
    (
      "an alphabet of a surrogate",
      "surrogate",
      f"{TOKENIZE} --tokenizer=tokenizer-surrogate.json --out=new",
    ),
    *(
      (f"a tokenizer: {x}", f"{x}.json", f"{TOKENIZE} --tokenizer=tokenizer-{x}.json --out=new")
      for x in fixtures.SHAPES
    ),
    (
      "trains a tokenizer of another kind",
      "words",
      "--files=text.txt --train_tokenizer=words --tokenizer=new.json --out=new",
    ),
    (
      "trains characters into a model",
      ".json",
      "--files=text.txt --train_tokenizer=characters --tokenizer=new.model --out=new",
    ),
    (
      "trains over another tokenizer",
      "abc.json",
      "--files=text.txt --train_tokenizer=characters --tokenizer=abc.json --out=new",
    ),
    (
      "trains more pieces than there are",
      "9,999",
      f"{PIECES} --vocab_size=9999",
    ),
    (
      "trains no pieces",
      "vocab_size",
      f"{PIECES} --vocab_size=0",
    ),
    ("a text that is null", "null.jsonl:2", f"{TOKENIZE} --strict --files=null.jsonl --out=new"),
    (
      "a line that is no JSON",
      "words.jsonl:2",
      f"{TOKENIZE} --strict --files=words.jsonl --out=new",
    ),
    ("a line that is deep", "deep.jsonl:2", f"{TOKENIZE} --strict --files=deep.jsonl --out=new"),
    ("a line that is a list", "list.jsonl:2", f"{TOKENIZE} --strict --files=list.jsonl --out=new"),
    (
      "a line with a surrogate",
      "half.jsonl:2",
      f"{TOKENIZE} --strict --files=half.jsonl --out=new",
    ),
    ("a compressed file", None, f"{TOKENIZE} --files=whole.jsonl.gz --out=new"),
    ("half a compressed file", "cut.jsonl.gz", f"{TOKENIZE} --files=cut.jsonl.gz --out=new"),
    ("half a table", "cut.parquet", f"{TOKENIZE} --files=cut.parquet --out=new"),
    ("half a list", "cut.json", f"{TOKENIZE} --files=cut.json --out=new"),
    ("a separator that is nowhere", "@@@", f"{TOKENIZE} --split_on=@@@ --out=new"),
    ("an empty separator", "--split_on is empty", f"{TOKENIZE} --split_on= --out=new"),
    ("a separator of examples", "--split_on", f"{EXAMPLES}=pairs.jsonl --split_on=@"),
    ("tokens", None, f"{TOKENS}=ids.bin"),
    ("tokens that are a text", "text.txt", f"{TOKENS}=text.txt"),
    ("tokens of an odd file", "odd.bin has 9 bytes", f"{TOKENS}=odd.bin"),
    ("tokens of another model", "Llama 3's", f"{TOKENS}=llama.bin"),
    ("tokens that are gone", "gone", f"{TOKENS}=gone.bin"),
    ("tokens in an empty pattern", "','", f"{TOKENS}=,"),
    ("tokens of a split that is none", "test", f"{TOKENS}=ids.bin --split=test"),
    ("tokens and text", "--tokens", f"{TOKENS}=ids.bin --files=text.txt"),
    ("characters of tokens", "--characters", f"{TOKENS}=ids.bin --characters=:9"),
    ("a template of tokens", "--template", f"{TOKENS}=ids.bin --template=chat"),
    ("no line with a text", "none.jsonl", f"{TOKENIZE} --files=none.jsonl --out=new"),
    ("a key that is none", "title", f"{TOKENIZE} --files=good.jsonl --text_key=title --out=new"),
    ("examples", None, f"{EXAMPLES}=pairs.jsonl"),
    ("verifies examples", None, "--verify=pairs"),
    ("examples without a response", "2 of 3 examples", f"{EXAMPLES}=silent.jsonl"),
    (
      "examples of a role that is none",
      "roles.jsonl:2 has a role 'tool'",
      f"{EXAMPLES}=roles.jsonl",
    ),
    ("examples that are an object", "object.json is no list", f"{EXAMPLES}=object.json"),
    ("half a list of examples", "half.json is no JSON", f"{EXAMPLES}=half.json"),
    ("examples without the fields", "fields.jsonl:2 has no text", f"{EXAMPLES}=fields.jsonl"),
    (
      "a label that is no number",
      "labels.jsonl:1 has the label 'good'",
      f"{EXAMPLES}=labels.jsonl",
    ),
    ("examples that are a text", "text.txt holds no examples", f"{EXAMPLES}=text.txt"),
    (
      "a template that is none",
      "'none' is none of plain",
      f"{EXAMPLES}=pairs.jsonl --template=none",
    ),
    ("a template that is gone", "gone.json", f"{EXAMPLES}=pairs.jsonl --template=gone.json"),
    (
      "a template without a response",
      "mute has no turn of 'assistant'",
      f"{EXAMPLES}=pairs.jsonl --template=mute.json",
    ),
    (
      "a template of another tokenizer",
      "inserts '<|im_start|>'",
      f"{EXAMPLES}=pairs.jsonl --template=chatml",
    ),
    ("examples of a recipe", None, f"{EXAMPLES}=pairs.jsonl --recipe=prompt --out=recipe"),
    (
      "a recipe without its data",
      'has no data; give --examples=FILE.jsonl, with lines like {"plot"',
      f"{fixtures.TOKENIZE} --recipe=story --out=new",
    ),
    ("a recipe of a text", "--files=FILE.txt", f"{EXAMPLES}=pairs.jsonl --recipe=code"),
    ("a text for a recipe", "has no data", f"{TOKENIZE} --recipe=chat --out=new"),
    ("a recipe that is none", "did you mean story?", f"{EXAMPLES}=pairs.jsonl --recipe=stroy"),
    ("a recipe's file that is gone", "gone.py", f"{EXAMPLES}=pairs.jsonl --recipe=gone.py:story"),
    ("two templates", "leave out", f"{EXAMPLES}=pairs.jsonl --recipe=story --template=chat"),
    ("a loss that is none", "loss", f"{EXAMPLES}=pairs.jsonl --loss=some"),
    ("rows of a token", "n_ctx", f"{EXAMPLES}=pairs.jsonl --n_ctx=1"),
    ("rows of too many tokens", "1,048,576", f"{EXAMPLES}=pairs.jsonl --n_ctx=99999999"),
    ("rows without examples", "--n_ctx is for examples", f"{TOKENIZE} --n_ctx=8 --out=new"),
    ("a template of a text", "--template", f"{TOKENIZE} --template=chat --out=new"),
    ("text and examples", "--examples", f"{TOKENIZE} --examples=pairs.jsonl --out=new"),
    ("examples into a store of text", "train", f"{EXAMPLES}=pairs.jsonl --out=train"),
    ("text into a store of examples", "pairs", f"{TOKENIZE} --out=pairs"),
    (
      "characters of examples",
      "--characters is for text",
      f"{EXAMPLES}=pairs.jsonl --characters=:9",
    ),
    ("a flag misspelled", "fils", f"{TOKENIZE} --fils=x --out=new"),
    ("an unquoted pattern", "story.txt", f"{TOKENIZE} --out=new story.txt"),
    ("verifies nothing", "gone", "--verify=gone"),
    ("verifies a file", "text.txt", "--verify=text.txt"),
    ("verifies half a store", "half-written", "--verify=store-half"),
    *((f"verifies a manifest: {x}", f"store-{x}", f"--verify=store-{x}") for x in fixtures.SHAPES),
    *(
      (f"verifies {x}", f"store-{x}", f"--verify=store-{x}")
      for x in "format no-parts parts-empty parts-list outside tokens sum fingerprint".split()
    ),
    ("verifies a chunk that is none", "store-chunk", "--verify=store-chunk"),
    ("verifies without a part", "store-part", "--verify=store-part"),
    ("verifies another array", "store-zarr", "--verify=store-zarr"),
  ],
)

# Found in the middle of a job, which is kept: the same command resumes it.
JOBS = rows(
  "tokenize",
  "",
  [("an alphabet of other characters", "character", f"{TOKENIZE} --tokenizer=abc.json --out=new")],
  may_write=True,
)

EVALUATE = f"{fixtures.SWEEP} --model=hf --out=new"
EVALUATES = rows(
  "evaluate",
  "",
  [
    ("a table", None, f"{EVALUATE} --task=text --data=story.txt"),
    ("a table that is there", None, f"{EVALUATE} --out=sweep --task=text --data=story.txt"),
    ("no flags", "--out", ""),
    ("nowhere to write", "--out", f"{fixtures.SWEEP} --model=hf --task=text --data=story.txt"),
    ("an empty place", "--out", f"{EVALUATE} --out= --task=text --data=story.txt"),
    ("onto a file", "text.txt", f"{EVALUATE} --out=text.txt --task=text --data=story.txt"),
    ("below a file", "text.txt", f"{EVALUATE} --out=text.txt/new --task=text --data=story.txt"),
    ("into /proc", "/proc", f"{EVALUATE} --out=/proc/new --task=text --data=story.txt"),
    (
      "to nobody",
      "nobody_of_this_name",
      f"{EVALUATE} --out={NOBODY}/new --task=text --data=story.txt",
    ),
    ("a task that is none", "lambada", f"{EVALUATE} --task=lambda --data=data"),
    ("a protocol that is none", "whole", f"{EVALUATE} --task=text:half --data=story.txt"),
    ("shots in words", "task:protocol:shots", f"{EVALUATE} --task=text::two --data=story.txt"),
    ("shots below zero", "task:protocol:shots", f"{EVALUATE} --task=text::-1 --data=story.txt"),
    ("an empty task", "task", f"{EVALUATE} --task= --data=story.txt"),
    ("no data", "gone", f"{EVALUATE} --task=ptb --data=gone"),
    ("data of nobody", "nobody_of_this_name", f"{EVALUATE} --task=ptb --data={NOBODY}/data"),
    ("no dataset in the data", "ptb", f"{EVALUATE} --task=ptb --data=hollow"),
    ("a limit below zero", "limit", f"{EVALUATE} --task=text --data=story.txt --config.limit=-1"),
    ("no batch", "batch_size", f"{EVALUATE} --task=text --data=story.txt --config.batch_size=0"),
    (
      "a stride below zero",
      "stride",
      f"{EVALUATE} --task=text --data=story.txt --config.stride=-1",
    ),
    ("no resamples", "resamples", f"{EVALUATE} --task=text --data=story.txt --config.resamples=0"),
    ("a seed below zero", "seed", f"{EVALUATE} --task=text --data=story.txt --config.seed=-1"),
    (
      "a dtype that is none",
      "float8",
      f"{EVALUATE} --task=text --data=story.txt --config.dtype=float8",
    ),
    (
      "a mesh larger than the devices",
      "3",
      f"{EVALUATE} --task=text --data=story.txt --config.mesh.data=3",
    ),
    ("a knob misspelled", "limit", f"{EVALUATE} --task=text --data=story.txt --config.limt=1"),
    ("a config that raises", "raises.py", f"--config=bad/raises.py {EVALUATE} --task=text"),
    ("a config without knobs", "resamples", f"--config=bad/short.py {EVALUATE} --task=text"),
    (
      "an overlap that is none",
      "gone.json",
      f"{EVALUATE} --task=text --data=story.txt --overlap=gone.json",
    ),
    *(
      (
        f"an overlap: {x}",
        f"overlap-{x}.json",
        f"{EVALUATE} --task=text --data=story.txt --overlap=overlap-{x}.json",
      )
      for x in (*fixtures.SHAPES, "words", "short")
    ),
    ("a flag misspelled", "modle", f"{EVALUATE} --task=text --data=story.txt --modle=hf"),
    ("a word", "extra", f"{EVALUATE} --task=text --data=story.txt extra"),
    (
      "a step of what is no run",
      "step",
      f"{fixtures.SWEEP} --model=hf@3 --out=new --task=text --data=story.txt",
    ),
    (
      "a step that was not saved",
      "3",
      f"{fixtures.SWEEP} --model=run@3 --out=new --task=text --data=story.txt",
    ),
  ],
)

# A dataset that cannot be read, or a model that cannot be scored, fails its cells only.
CELLS = rows(
  "evaluate",
  "",
  [
    (
      "a stride past the context",
      "stride",
      f"{EVALUATE} --task=text --data=story.txt --config.stride=99",
    ),
    ("an empty text", "empty.txt", f"{EVALUATE} --task=text --data=empty.txt"),
    ("a text that is not UTF-8", "bytes.txt", f"{EVALUATE} --task=text --data=bytes.txt"),
    ("a text of other characters", "'é'", f"{EVALUATE} --task=text --data=accents.txt"),
    (
      "a line that is no JSON",
      "words.jsonl:2",
      f"{EVALUATE} --task=lambada:last_word --data=words.jsonl",
    ),
    (
      "a line that is deep",
      "deep.jsonl:2",
      f"{EVALUATE} --task=lambada:last_word --data=deep.jsonl",
    ),
    (
      "a line that is a list",
      "list.jsonl:2",
      f"{EVALUATE} --task=lambada:last_word --data=list.jsonl",
    ),
    (
      "a text that is null",
      "null.jsonl:2",
      f"{EVALUATE} --task=lambada:last_word --data=null.jsonl",
    ),
    (
      "a text with a surrogate",
      "surrogate",
      f"{EVALUATE} --task=lambada:last_word --data=half.jsonl",
    ),
    (
      "pairs without a sentence",
      "good.jsonl:1",
      f"{EVALUATE} --task=blimp_wh_island --data=good.jsonl",
    ),
    (
      "a sentence that is a number",
      "malformed",
      f"{EVALUATE} --task=blimp_wh_island --data=numbers.jsonl",
    ),
    ("stories that are a list", "coqa-list.json", f"{EVALUATE} --task=coqa --data=coqa-list.json"),
    ("stories that are deep", "coqa-deep.json", f"{EVALUATE} --task=coqa --data=coqa-deep.json"),
    (
      "stories of another shape",
      "coqa-shape.json",
      f"{EVALUATE} --task=coqa --data=coqa-shape.json",
    ),
    ("a text8 of another length", "story.txt", f"{EVALUATE} --task=text8 --data=story.txt"),
    ("schemas that are no XML", "story.txt", f"{EVALUATE} --task=winograd273 --data=story.txt"),
    ("questions of another shape", "story.txt", f"{EVALUATE} --task=cbt_cn --data=story.txt"),
    (
      "no tokenizer",
      "tokenizer",
      f"{fixtures.SWEEP} --model=hf-no-tokenizer --out=new --task=text --data=story.txt",
    ),
    (
      "a weight of nan",
      "nan",
      f"{fixtures.SWEEP} --model=hf-nan --out=new --task=text --data=story.txt",
    ),
    *(
      (
        name,
        says,
        [
          *fixtures.SWEEP.split(),
          "--out=new",
          "--task=text",
          "--data=story.txt",
          f"--model={path}",
        ],
      )
      for name, says, path in FEW
    ),
    *(
      (f"a cell: {x}", "cell", f"{EVALUATE} --out=sweep-{x} --task=text --data=story.txt")
      for x in fixtures.SHAPES
    ),
  ],
  may_fail_cells=True,
)

CONTAMINATION = "--task=text --data=story.txt --out=new.json"
OVERLAPS = rows(
  "contamination",
  "",
  [
    ("an overlap", None, f"{CONTAMINATION} --corpus=text.txt"),
    ("by a filter", None, f"{CONTAMINATION} --filter=text.bloom"),
    ("no flags", "--task", ""),
    ("no corpus", "--corpus", CONTAMINATION),
    ("two corpora", "--tfds_name", f"{CONTAMINATION} --corpus=text.txt --tfds_name=lm1b"),
    ("a corpus that is none", "gone.txt", f"{CONTAMINATION} --corpus=gone.txt"),
    ("an empty corpus", "empty.txt", f"{CONTAMINATION} --corpus=empty.txt"),
    ("a corpus of nobody", "nobody_of_this_name", f"{CONTAMINATION} --corpus={NOBODY}/x.txt"),
    ("a dataset that is none", "wikki", f"{CONTAMINATION} --tfds_name=wikki"),
    ("a split that is none", "test", f"{CONTAMINATION} --corpus=text.txt --split=test"),
    ("a key that is none", "title", f"{CONTAMINATION} --corpus=good.jsonl --text_key=title"),
    ("a task that is none", "lambada", f"{CONTAMINATION} --corpus=text.txt --task=lambda"),
    ("a protocol that is none", "whole", f"{CONTAMINATION} --corpus=text.txt --task=text:half"),
    ("an empty task", "task", f"{CONTAMINATION} --corpus=text.txt --task="),
    ("no data", "gone", f"{CONTAMINATION} --corpus=text.txt --data=gone"),
    ("data that is empty", "empty.txt", f"{CONTAMINATION} --corpus=text.txt --data=empty.txt"),
    ("data that is not UTF-8", "bytes.txt", f"{CONTAMINATION} --corpus=text.txt --data=bytes.txt"),
    (
      "stories that are a list",
      "coqa-list.json",
      f"{CONTAMINATION} --corpus=text.txt --task=coqa --data=coqa-list.json",
    ),
    (
      "stories that are deep",
      "coqa-deep.json",
      f"{CONTAMINATION} --corpus=text.txt --task=coqa --data=coqa-deep.json",
    ),
    ("a result that is there", "text.txt", f"{CONTAMINATION} --corpus=text.txt --out=text.txt"),
    ("a result below a file", "text.txt", f"{CONTAMINATION} --corpus=text.txt --out=text.txt/x"),
    (
      "a result of nobody",
      "nobody_of_this_name",
      f"{CONTAMINATION} --corpus=text.txt --out={NOBODY}/x",
    ),
    ("a filter below a file", "text.txt", f"{CONTAMINATION} --corpus=text.txt --filter=text.txt/x"),
    (
      "a filter of nobody",
      "nobody_of_this_name",
      f"{CONTAMINATION} --corpus=text.txt --filter={NOBODY}/x",
    ),
    ("a text as filter", "story.txt", f"{CONTAMINATION} --filter=story.txt"),
    ("a folder as filter", "hollow", f"{CONTAMINATION} --filter=hollow"),
    (
      "a filter of another corpus",
      "text.bloom",
      f"{CONTAMINATION} --filter=text.bloom --corpus=abc.txt",
    ),
    ("half a filter", "cut.bloom", f"{CONTAMINATION} --filter=cut.bloom"),
    ("a pickle as filter", "pickle.npz", f"{CONTAMINATION} --filter=pickle.npz"),
    ("a filter without bits", "other.npz", f"{CONTAMINATION} --filter=other.npz"),
    ("a filter of no bits", "nobits.npz", f"{CONTAMINATION} --filter=nobits.npz"),
    ("a filter of floats", "floats.npz", f"{CONTAMINATION} --filter=floats.npz"),
    ("a filter of -1 probes", "probes.npz", f"{CONTAMINATION} --filter=probes.npz"),
    ("a filter of deep metadata", "deep.npz", f"{CONTAMINATION} --filter=deep.npz"),
    ("a flag misspelled", "corpsu", f"{CONTAMINATION} --corpsu=text.txt"),
    ("a word", "extra", f"{CONTAMINATION} --corpus=text.txt extra"),
  ],
)

DETECT = "--tokenizer=characters.json --files=story.txt"
GREEN = f"{DETECT} --watermark=green:7"
SCORE, FAST = "story.txt --model=hf", "--threshold=fast_detectgpt.json"
CALIBRATE, TFIDF = "--model=hf --threshold=new.json", "--criterion=tfidf"
DETECTS = rows(
  "detect",
  "",
  [
    ("a text", None, GREEN),
    ("several texts", None, f"{GREEN} --files=story.txt,many/*.txt"),
    ("no flags", "is missing", ""),
    ("no watermark", "--watermark", DETECT),
    ("no text", "--files", "--tokenizer=characters.json --watermark=7"),
    ("a watermark that is none", "gumbel", f"{DETECT} --watermark=gumble:7"),
    ("a watermark without a key", "no key", f"{DETECT} --watermark=gumbel"),
    ("a key in words", "no key", f"{DETECT} --watermark=gumbel:secret"),
    ("a key below zero", "no key", f"{DETECT} --watermark=gumbel:-1"),
    ("a key past 64 bits", "64 bits", f"{DETECT} --watermark=gumbel:99999999999999999999"),
    ("an empty watermark", "no key", f"{DETECT} --watermark="),
    ("a text that is not there", "gone.txt", f"{GREEN} --files=gone.txt"),
    ("a text that is empty", "none to score", f"{GREEN} --files=empty.txt"),
    ("a text that is bytes", "bytes.txt", f"{GREEN} --files=bytes.txt"),
    ("a text of other characters", "'é'", f"{GREEN} --files=accents.txt"),
    ("a folder as text", "hollow", f"{GREEN} --files=hollow"),
    ("a tokenizer that is gone", "gone.json", f"{GREEN} --tokenizer=gone.json"),
    ("a tokenizer that is none", "tokenizer-cut", f"{GREEN} --tokenizer=tokenizer-cut.json"),
    ("a flag misspelled", "watermrk", f"{GREEN} --watermrk=7"),
    ("a word", "extra", f"{GREEN} extra"),
    ("a score", None, "story.txt short.txt --model=hf --html=new.html"),
    ("a verdict", None, f"{SCORE} {FAST}"),
    ("a threshold", None, f"{fixtures.CALIBRATE} --threshold=new.json"),
    ("a model and a mark", "--watermark", f"{SCORE} --watermark=gumbel:7"),
    ("texts and labels", "one of", f"{SCORE} --calibrate=labelled.jsonl"),
    ("a model alone", "FILE", "--model=hf"),
    ("a model that is gone", "gone", "story.txt --model=gone"),
    ("a criterion that is none", "perplexity", f"{SCORE} --criterion=perplexity"),
    ("one model where two are asked", "--reference", f"{SCORE} --criterion=binoculars"),
    ("two models where one is asked", "--reference", f"{SCORE} --criterion=lrr --reference=hf"),
    ("a model without a head", "no head", f"{SCORE} --criterion=classifier"),
    ("another criterion's threshold", "its criterion", f"{SCORE} --threshold=lrr.json"),
    ("another model's threshold", "its weights", f"story.txt --model=run {FAST}"),
    ("a threshold that is gone", "gone.json", f"{SCORE} --threshold=gone.json"),
    ("a threshold that is none", "no threshold", f"{SCORE} --threshold=characters.json"),
    ("a text of one character", "one.txt", "one.txt --model=hf"),
    ("a page that is there", "text.txt", f"{SCORE} --html=text.txt"),
    ("a page without texts", "--html", f"{fixtures.CALIBRATE} --threshold=new.json --html=a"),
    ("nowhere for a threshold", "--threshold", fixtures.CALIBRATE),
    ("a threshold that is there", "lrr.json", f"{fixtures.CALIBRATE} --threshold=lrr.json"),
    ("too few texts", "calibrate with 100", f"{CALIBRATE} --calibrate=labelled.jsonl"),
    ("a rate above 1", "false_positives", f"{CALIBRATE} --false_positives=1.5"),
    ("labels that are none", "robot", f"{CALIBRATE} --calibrate=robot.jsonl"),
    ("labels that are gone", "gone", f"{CALIBRATE} --calibrate=gone.jsonl"),
    ("labels in deep lines", "deep", f"{CALIBRATE} --calibrate=deep.jsonl"),
    ("TF-IDF by another name", "tfidf", "--fit=labelled.jsonl --model=new.npz"),
    ("TF-IDF of too few", "give more", f"{TFIDF} --fit=one.jsonl --model=new.npz"),
    ("TF-IDF that is none", "characters.json", f"story.txt {TFIDF} --model=characters.json"),
  ],
)

POWER = "--watts=300 --kg_per_kwh=0.37"
CARDS = rows(
  "card",
  "",
  [
    ("a run", None, f"run --out=new.md --overlap=overlap.json --chip_hours=2 {POWER}"),
    ("a store", None, "train"),
    ("nothing", "one workdir", ""),
    ("two places", "these are 2", "run train"),
    ("a place that is gone", "gone", "gone"),
    ("a file", "text.txt", "text.txt"),
    ("a checkpoint of another form", "hf", "hf"),
    ("a step that is none", "step 9", "run --step=9"),
    ("a card that is there", "text.txt", "run --out=text.txt"),
    ("a card of nobody", "nobody_of_this_name", f"run --out={NOBODY}/x"),
    ("results that are gone", "gone/results.jsonl", "run --results=gone"),
    ("results of another model", "no result", "run --results=sweep"),
    ("an overlap that is none", "overlap-words.json", "run --overlap=overlap-words.json"),
    ("a plan that is none", "no plan", "run --plan=overlap.json"),
    ("a plan that is deep", "deep", "run --plan=coqa-deep.json"),
    ("a plan and its hours", "--chip_hours", "run --plan=overlap.json --chip_hours=2"),
    ("watts alone", "--kg_per_kwh", "run --chip_hours=2 --watts=300"),
    ("watts below zero", "watts", "run --chip_hours=2 --watts=-3 --kg_per_kwh=0.37"),
    ("a PUE below 1", "pue", f"run --chip_hours=2 --pue=0.5 {POWER}"),
    ("energy of no hours", "--chip_hours", f"run {POWER}"),
    ("hours that are none", "chip_hours", "run --chip_hours=nan"),
    ("a flag misspelled", "plna", "run --plna=plan.json"),
  ],
)

SEARCH = "--store=train --texts=story.txt"
MEMORIZATIONS = rows(
  "memorization",
  "",
  [
    ("a search", None, f"{SEARCH} --out=new.jsonl"),
    ("an extraction", None, "--model=hf --samples=2 --length=8 --prompt=O --store=train"),
    ("nothing", "--store", ""),
    ("texts alone", "--store", "--texts=story.txt"),
    ("a smaller model alone", "--smaller", f"{SEARCH} --smaller=hf"),
    ("a store that is gone", "gone", f"{SEARCH} --store=gone"),
    ("a store that is none", "hollow", f"{SEARCH} --store=hollow"),
    ("texts that are gone", "gone.txt", f"{SEARCH} --texts=gone.txt"),
    ("no texts", "empty.txt", f"{SEARCH} --texts=empty.txt"),
    ("texts in deep lines", "deep", f"{SEARCH} --texts=deep.jsonl"),
    ("a model that is gone", "gone", "--model=gone"),
    ("a store of another tokenizer", "another tokenizer", "--model=run --store=abc"),
    ("no samples", "samples", "--model=hf --samples=0"),
    ("one choice", "top_k", "--model=hf --top_k=1"),
    ("results that are there", "text.txt", f"{SEARCH} --out=text.txt"),
    ("results of nobody", "nobody_of_this_name", f"{SEARCH} --out={NOBODY}/x.jsonl"),
    ("a flag misspelled", "textts", f"{SEARCH} --textts=story.txt"),
  ],
)

TABLE = [*TOKENIZES, *DETECTS, *JOBS, *EVALUATES, *CELLS, *OVERLAPS, *CARDS, *MEMORIZATIONS]


@pytest.fixture(scope="module")
def ready(make, sandbox):
  """The sandbox with all that the rows name."""
  fixtures.make_stores(make)
  fixtures.make_run(make)
  make.run("convert", "--from=run --to=hf")
  fixtures.damage_stores(make)
  fixtures.damage_folders(make)
  fixtures.write_configs(make)
  fixtures.write_texts(make)
  fixtures.write_examples(make)
  fixtures.write_arrays(make)
  fixtures.make_sweep(make)
  fixtures.make_thresholds(make)
  sandbox.seal()


@pytest.mark.parametrize("row", TABLE, ids=str)
def test_a_bad_input_is_one_line_and_writes_nothing(row, ready, worker, sandbox):
  check(row, worker, sandbox)
