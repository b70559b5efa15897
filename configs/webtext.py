# SPDX-License-Identifier: Apache-2.0
"""WebText's own pipeline: pages that Reddit links to with karma of 3 or more, as GPT-2 had them.

  gpt2-jax webtext --reddit='RS_2017-*.zst' --links=links.txt
  gpt2-jax webtext --input='crawl/*.warc.gz' --out=data/webtext --config.links=links.txt

The paper (section 2.1) names the karma, the extraction of main text, de-duplication, "some
heuristic based cleaning", and Wikipedia out; 8 million documents and 40 GB were left of 45 million
links. Its extractors (dragnet and newspaper) do not install any more.
"""

from ml_collections import ConfigDict


def get_config() -> ConfigDict:
  return ConfigDict(
    {
      "links": "",  # a file of links, as --reddit writes: other pages are dropped; empty keeps all
      "max_bytes": 10_000_000,  # of a page, decompressed
      "domains": {
        "wikipedia": True,  # Wikipedia out, as in the paper
        "blocked": "",  # a file with a domain or host in each line, out as well
      },
      "extract": {
        "extractor": "precise",  # precise (trafilatura) or fast (resiliparse)
        "seconds": 30.0,  # CPU time of a page at most
        "memory_mib": 4096,  # address space of the process that extracts
      },
      "repair": True,  # mojibake, entities and control characters, by ftfy
      "language": {
        "keep": ("en",),  # languages that are kept; () keeps all and asks nothing
        "model": "",  # a fastText model, such as lid.176.bin; empty is py3langid
        "min_score": 0.65,  # of a fastText model: less is dropped
      },
      "quality": {
        "gopher_quality": False,  # Gopher's rules on lengths, symbols, lines and stop words
        "gopher_repetition": False,  # Gopher's rules on repeated lines, paragraphs and n-grams
        "c4": False,  # C4's rules: lines that end a sentence, five of them
        "fineweb": False,  # FineWeb's rules on lines
      },
      "redact": {
        "email": "",  # what stands in place of e-mail addresses; empty leaves them
        "ip": "",  # what stands in place of public IP addresses; empty leaves them
      },
      "near_duplicates": {
        "enabled": True,  # exact duplicates are dropped in any case
        "ngram": 5,  # words of an n-gram
        "bands": 14,  # of MinHash: documents that share one are compared
        "rows": 8,  # hashes of a band
        "jaccard": 0.75,  # the least Jaccard similarity of near duplicates
      },
      "contamination": {
        "tasks": (),  # evaluation sets whose n-grams are looked for; `evaluate --list` shows all
        "data": "data",  # the folder of their datasets
        "ngram": 13,  # words, as for GPT-3
        "filter": "",  # in place of tasks: a filter of `gpt2-jax contamination`
        "min_ngrams": 1,  # so many are contamination
        "mark": False,  # count them in the record in place of dropping it
      },
      "seed": 0,  # of the permutations of MinHash
    }
  )
