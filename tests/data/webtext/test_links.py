# SPDX-License-Identifier: Apache-2.0
"""Reddit dumps to links, domains, languages, evaluation sets."""

import importlib.util
import json

import pytest

from configs import webtext
from gpt2_jax.data.webtext.document import Document, Drop
from gpt2_jax.data.webtext.domains import Domains, domain_name, registered_domain
from gpt2_jax.data.webtext.evaluation_overlap import EvaluationOverlap
from gpt2_jax.data.webtext.language import Language
from gpt2_jax.data.webtext.links import Linked, LinkRules, canonical_url, extract_links
from gpt2_jax.data.webtext.pipeline import build_pipeline
from gpt2_jax.data.webtext.report import rank_correlation, read_published_domains
from gpt2_jax.evaluate.contamination import build_filter

pytest.importorskip("trafilatura")  # courlan and tld come with it


def post(url: str, score: int = 3, **fields) -> bytes:
  return json.dumps({"url": url, "score": score, "is_self": False, **fields}).encode()


CROSSPOST = {"crosspost_parent_list": [{"url": "https://b.example.org/parent"}]}


@pytest.mark.parametrize(
  "line, expected",
  [
    (post("https://a.example.org/x#y"), "https://a.example.org/x"),
    (post("https://a.example.org/x", 2), "karma"),
    (post("https://www.reddit.com/r/x/comments/1", is_self=True), "self_post"),
    (post("https://i.redd.it/x"), "reddit"),
    (post("https://bit.ly/x"), "shortener"),
    (post("https://i.imgur.com/x"), "media"),
    (post("https://a.example.org/x.JPG?w=1"), "media"),
    (post("/r/x", **CROSSPOST), "https://b.example.org/parent"),
    (post("magnet:?xt=1"), "no_url"),
    (post("http://[::1"), "no_url"),
    (post("https://a.example.org/" + "x" * 3000), "no_url"),
    (b"{", "malformed"),
    (b"[1]", "malformed"),
    (b'{"url": "https://a.example.org", "score": 1e999}', "malformed"),
    (b"[" * 100_000, "malformed"),
    (b"\xff\xfe", "malformed"),
  ],
)
def test_a_line_gives_a_link_or_a_reason(line, expected):
  link = LinkRules().link(line)
  assert (link.reason if isinstance(link, Drop) else link) == expected


def test_rules_are_knobs():
  assert LinkRules(min_karma=5).link(post("https://a.example.org", 4)).reason == "karma"
  assert LinkRules(allow_over_18=False).link(post("https://a.example.org", over_18=True)).reason
  assert LinkRules(allow_crossposts=False).link(post("/r/x", **CROSSPOST)).reason == "crosspost"


def test_canonical_urls_are_fixed_points():
  for url in (
    "HTTP://www.Example.org:80/a/?utm_source=x&b=2&a=1#frag",
    "https://пример.рф/путь",
    "https://en.wikipedia.org/wiki/C_(x)",
  ):
    link = canonical_url(url)
    assert canonical_url(link) == link and "utm" not in link and "#" not in link


@pytest.mark.parametrize("window_log", [0, 27])
def test_dumps_to_a_list_of_links_and_back(tmp_path, window_log):
  """The window of Reddit's dumps is one that Arrow's decompressor refuses, from 2^28 bytes on."""
  zstandard = pytest.importorskip("zstandard")
  first = [post("https://a.example.org/1"), post("http://www.a.example.org/1/"), b"{"]
  second = [post("https://c.example.org/2", 9), post("https://c.example.org/3", 0)]
  content = b"\n".join(first * 2)
  if window_log:
    parameters = zstandard.ZstdCompressionParameters(window_log=31, enable_ldm=False)
    content = zstandard.ZstdCompressor(compression_params=parameters).compress(content)
  (tmp_path / ("RS_1.zst" if window_log else "RS_1")).write_bytes(content)
  (tmp_path / "RS_2").write_bytes(b"\n".join(second))
  paths = sorted(map(str, tmp_path.glob("RS_*")))
  results = []
  for i, order in enumerate((paths, paths[::-1])):
    tally = extract_links(order, LinkRules(), str(tmp_path / f"links{i}"))
    results.append((tally.to_json(), (tmp_path / f"links{i}").read_text()))
  assert results[0] == results[1]
  links = results[0][1].splitlines()
  assert sorted(links) == ["https://a.example.org/1", "https://c.example.org/2"]
  stages = results[0][0]
  assert stages["links"]["reasons"]["malformed"]["documents"] == 2
  assert stages["distinct"]["reasons"]["repeated"]["documents"] == 3

  keep = Linked.read(str(tmp_path / "links0"))
  assert keep(Document(url="http://a.example.org/1#top")).url
  assert keep(Document(url="https://a.example.org/9")).reason == "not_linked"


def test_a_damaged_dump_ends_with_a_reason(tmp_path):
  zstandard = pytest.importorskip("zstandard")
  lines = [post(f"https://a.example.org/{i}") for i in range(5000)]
  content = zstandard.compress(b"\n".join(lines))
  damages = (content[: len(content) // 2], content + content[:-3], content + b"no frame" * 9)
  for i, damage in enumerate(damages):
    (tmp_path / "RS.zst").write_bytes(damage)
    tally = extract_links([str(tmp_path / "RS.zst")], LinkRules(), str(tmp_path / f"links{i}"))
    assert tally.stages["links"].reasons["truncated"].documents == 1


def test_domains():
  assert registered_domain("https://news.bbc.co.uk/x") == "bbc.co.uk"
  assert domain_name("http://foo.blogspot.com/") == "blogspot"
  assert domain_name("http://192.168.1.1/x") == "192.168.1.1" and domain_name("") == ""
  stage = Domains(blocked=frozenset(["spam.example.org"]))
  assert stage(Document(url="https://de.m.wikipedia.org/wiki/X")).reason == "wikipedia"
  assert stage(Document(url="https://spam.example.org/x")).reason == "blocked_domain"
  assert stage(Document(url="https://example.org/x")).url
  assert Domains(wikipedia=False)(Document(url="https://en.wikipedia.org/")).url


def test_the_published_list_correlates_with_itself(data):
  published = read_published_domains(str(data / "web_pages" / "webtext_domains.txt"))
  assert len(published) == 999 and published["google"] == 1542261
  assert rank_correlation(published, published) == pytest.approx(1)
  opposite = {name: -count for name, count in published.items()}
  assert rank_correlation(opposite, published) == pytest.approx(-1)


def test_languages_by_py3langid():
  pytest.importorskip("py3langid")
  english = "The committee said on Monday that the new law would be passed before the summer."
  german = "Der Ausschuss sagte am Montag, dass das neue Gesetz vor dem Sommer verabschiedet wird."
  assert Language()(Document(text=english)).language == "en"
  assert Language()(Document(text=german)).reason == "language_de"
  assert Language(keep=("de",))(Document(text=german)).language == "de"


def test_a_fasttext_model_is_checked_before_the_first_page(tmp_path):
  path = tmp_path / "broken.bin"
  path.write_bytes(b"no model" * 9)
  config = webtext.get_config()
  config.language.model = str(path)
  # fastText is asked for only by this knob, and comes with nothing.
  installed = importlib.util.find_spec("fasttext")
  expected = "broken.bin is no fastText model" if installed else "pip install fasttext-numpy2-wheel"
  with pytest.raises((ValueError, ImportError), match=expected):
    build_pipeline(config, tmp_path)


def test_documents_with_ngrams_of_an_evaluation_set(tmp_path):
  question = " ".join(f"word{i}" for i in range(20))
  build_filter([question], 10, n=13).save(str(tmp_path / "evaluation"))
  dirty, clean = Document(text=f"Before. {question.upper()}!"), Document(text=question[:60] * 2)
  drop_stage = EvaluationOverlap(str(tmp_path / "evaluation"))
  assert drop_stage(dirty).reason == "contaminated" and drop_stage(clean) is clean
  mark = EvaluationOverlap(str(tmp_path / "evaluation"), mark=True)
  assert mark(dirty).contaminated == 8
