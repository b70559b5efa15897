# SPDX-License-Identifier: Apache-2.0
"""Looking inside a model: the loss of each token, the next tokens, attention, and their pictures.

`score`, `next_tokens` and `attention_weights` return NumPy arrays with the tokens' labels.
`plot_surprise`, `plot_next_tokens` and `plot_attention` return matplotlib's figures of them.
`gltr.rank_text` colours a text by the ranks of its tokens, in a notebook or on a page of HTML.
"""
