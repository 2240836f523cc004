"""Generate text with a trained run, printed as it is drawn."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # also for `python scripts/generate.py`

import codecs
import os

import numpy as np

from rope_lm.refusal import Refusal
from scripts import entry

EXAMPLES = """examples:
  python -m scripts.generate --workdir=runs/a --prompt="def main(" --tokens=200
  python -m scripts.generate --workdir=runs/quick/rotary --member=2 --temperature=0 --prompt="import "

The run may still be training: its newest complete checkpoint is read. The text ends where the model ends its document,
or after --tokens. Beyond the trained length the text may be poor, and learned positions are refused.
exit status: 0, or 2 for a mistake in the command."""


def main() -> int:
    parser = entry.parser("generate", __doc__, EXAMPLES)
    parser.add_argument("--workdir", type=entry.path, required=True, help="the folder of a run")
    parser.add_argument("--prompt", default="", help="the text to continue (a new document)")
    parser.add_argument("--tokens", type=int, default=200, help="the most tokens to generate (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 always takes the likeliest token (0.8)")
    parser.add_argument(
        "--top_p", type=float, default=0.95, help="total probability of the likeliest tokens to draw from (0.95)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the random draws (0)")
    parser.add_argument("--member", type=int, default=0, help="the member to generate with (0)")
    arguments = parser.parse_args()
    from rope_lm import trained
    from rope_lm.generate import generate

    run = trained.load(arguments.workdir)
    if not 0 <= arguments.member < len(run.models):
        raise Refusal(f"--member={arguments.member}: the run has {len(run.models)} members, counted from 0")
    prompt = run.coder.encode(os.fsencode(arguments.prompt)) if arguments.prompt else [run.coder.separator]
    drawn = generate(
        run.models[arguments.member], prompt, arguments.tokens, arguments.temperature, arguments.top_p, arguments.seed
    )
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may be part of a character
    print(os.fsencode(arguments.prompt).decode("utf-8", "replace"), end="", flush=True)
    for token in drawn:
        if token == run.coder.separator:
            break
        print(decoder.decode(run.coder.decode(np.array([token]))), end="", flush=True)
    print(decoder.decode(b"", final=True))
    return 0


if __name__ == "__main__":
    entry.end(main)
