"""Let a trained run write: text after a prompt, as it is drawn."""

import codecs
import os
from pathlib import Path

import numpy as np

from rope_lm.refusal import Refusal
from scripts import entry

EXAMPLES = """examples:
  python -m scripts.generate --workdir=runs/a --prompt="def main(" --tokens=200
  python -m scripts.generate --workdir=runs/quick/rotary --member=2 --temperature=0 --prompt="import "

The run may be training still: its newest whole checkpoint is read. It ends where the model ends its document, or after
--tokens. Beyond the trained length an encoding may know nothing; learned positions refuse.
exit status: 0, or 2 for a mistake in the command."""


def main() -> int:
    parser = entry.parser("generate", __doc__, EXAMPLES)
    parser.add_argument("--workdir", type=Path, required=True, help="the folder of a run")
    parser.add_argument("--prompt", default="", help="the text to go on from (a new document)")
    parser.add_argument("--tokens", type=int, default=200, help="at most so many (200)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 is the likeliest token each time (0.8)")
    parser.add_argument("--top_p", type=float, default=0.95, help="probability of the tokens to draw from (0.95)")
    parser.add_argument("--seed", type=int, default=0, help="another seed, another text (0)")
    parser.add_argument("--member", type=int, default=0, help="which of the run's members writes (0)")
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
    decoder = codecs.getincrementaldecoder("utf-8")("replace")  # a token may be a part of a letter
    print(os.fsencode(arguments.prompt).decode("utf-8", "replace"), end="", flush=True)
    for token in drawn:
        if token == run.coder.separator:
            break
        print(decoder.decode(run.coder.decode(np.array([token]))), end="", flush=True)
    print(decoder.decode(b"", final=True))
    return 0


if __name__ == "__main__":
    entry.end(main)
