# SPDX-License-Identifier: Apache-2.0
"""Zero-shot sweep of the paper's four sizes: its figures beside ours, with intervals and plots.

COMMAND   python experiments/zero_shot_sweep.py --data=data --out=runs/zero_shot_sweep
          or a part of it: --model=gpt2 --task=lambada --config.limit=500
HARDWARE  one device that holds gpt2-xl in float32, 6.2 GB of weights, or a mesh
          (--config.mesh.model=4)
EXPECT    nothing yet: nobody has run this with this code. The paper's figures are in
          gpt2_jax/evaluate/sweep/paper.json. A drift within -1 and 1 says that its figure lies in
          our interval. Two are known to be far for a reason. LAMBADA's accuracy is one: others came
          near it with the last token of the word alone (46.67 % for gpt2, in
          huggingface/transformers#13761). Perplexities are the other, since the paper's
          de-tokenizers were not published.

The weights come from the Hugging Face Hub, or from its cache. The datasets are under --data in the
form in which they were published, or are prepared by TFDS. Those that are neither are named before
anything is loaded, and --skip_missing leaves them out. It is `launch/evaluate.py` with
`configs/zero_shot.py`: the same command resumes after a kill.
"""

import os
import pathlib
import sys

ROOT = pathlib.Path(__file__).resolve().parent.parent


def main() -> None:
  flags = sys.argv[1:]
  if not any(flag.lstrip("-").partition("=")[0] == "out" for flag in flags):
    flags.append("--out=runs/zero_shot_sweep")

  script = str(ROOT / "launch" / "evaluate.py")
  config = f"--config={ROOT}/configs/zero_shot.py"
  # in place of this process, so that signals reach the sweep itself
  os.execv(sys.executable, [sys.executable, script, config, *flags])


if __name__ == "__main__":
  main()
