# SPDX-License-Identifier: Apache-2.0
"""FineWeb's pipeline (arXiv:2406.17557) on any pages: all quality filters, addresses redacted.

  gpt2-jax webtext --config=fineweb_like --input='CC-MAIN-*.warc.gz' --out=data/fineweb_like

FineWeb identifies languages with fastText (--config.language.model=lid.176.bin) and has its own
list of blocked domains (--config.domains.blocked=FILE). It de-duplicates each dump by itself.
"""

from ml_collections import ConfigDict

from gpt2_jax.configs import webtext


def get_config() -> ConfigDict:
  config = webtext.get_config()
  config.update(
    ConfigDict(
      {
        "domains": {"wikipedia": False},
        "quality": {
          "gopher_quality": True,
          "gopher_repetition": True,
          # FineWeb leaves out C4's rule on the ends of lines, which is a rule of its own there
          "c4": False,
          "fineweb": True,
        },
        "redact": {"email": "email@example.com", "ip": "192.0.2.1"},
      }
    )
  )
  return config
