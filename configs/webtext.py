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
      # a file with a link in each line, which --reddit writes: pages that it lacks are dropped;
      # empty keeps all pages
      "links": "",
      # bytes of a page at most, decompressed
      "max_bytes": 10_000_000,
      "domains": {
        "wikipedia": True,  # Wikipedia out, as in the paper
        "blocked": "",  # a file with a domain or host in each line, out as well
      },
      "extract": {
        "extractor": "precise",  # precise (trafilatura) or fast (resiliparse)
        "seconds": 30.0,  # CPU time of a page at most
        "memory_mib": 4096,  # address space of the process that extracts
      },
      # mojibake, entities and control characters, by ftfy
      "repair": True,
      "language": {
        "keep": ("en",),  # languages that are kept; () keeps all and asks nothing
        "model": "",  # a fastText model, such as lid.176.bin; empty is py3langid
        "min_score": 0.65,  # of a fastText model: less is dropped
      },
      # the rules of Gopher, C4 and FineWeb
      "quality": {
        "gopher_quality": False,
        "gopher_repetition": False,
        "c4": False,
        "fineweb": False,
      },
      # what stands in place of e-mail and public IP addresses; empty leaves them
      "redact": {"email": "", "ip": ""},
      # exact duplicates are always dropped
      "near_duplicates": {
        "enabled": True,
        "ngram": 5,  # words
        "bands": 14,
        "rows": 8,  # hashes of a band
        "jaccard": 0.75,  # so similar are near duplicates
      },
      # documents that share n-grams with evaluation sets
      "contamination": {
        "tasks": (),  # tasks of `gpt2-jax evaluate --list`, whose n-grams are looked for
        "data": "data",  # the folder of their datasets
        "ngram": 13,  # words, as for GPT-3
        "filter": "",  # in place of tasks: a filter of `gpt2-jax contamination`
        "min_ngrams": 1,  # so many are contamination
        "mark": False,  # count them in the record in place of dropping it
      },
      # of the permutations of MinHash
      "seed": 0,
    }
  )
