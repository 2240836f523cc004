"""Export a trained run to Hugging Face transformers: config.json, model.safetensors and the run's tokenizer."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # also for `python scripts/convert.py`

from rope_lm.refusal import Refusal
from scripts import entry

EXAMPLES = """examples:
  python -m scripts.train   --workdir=runs/a --config=configs/lm.py:block=llama,position=rotary
  python -m scripts.convert --workdir=runs/a --out=models/a
  python -m scripts.convert --workdir=runs/a --member=2 --out=models/a2

Then transformers.AutoModelForCausalLM.from_pretrained("models/a") gives the same logits, and
transformers.AutoTokenizer.from_pretrained("models/a") the same tokens (<|endoftext|> is the separator); a SentencePiece
model stays behind. The models that can be exported, and their architectures:

  block   position                                                  architecture
  llama   rotary, rotary_linear, rotary_dynamic, yarn, llama3       LlamaForCausalLM
  neox    the same, and rotary_partial                              GPTNeoXForCausalLM
  gpt2    learned; or one of neox                                   GPT2LMHeadModel; GPTNeoXForCausalLM
  bert    rotary, objective=masked                                  RoFormerForMaskedLM

Any other is refused with the reason. `rope_lm.interop.load` reads such a folder, also one written by transformers.
exit status: 0, or 2 for a mistake in the command."""


def main() -> int:
    parser = entry.parser("convert", __doc__, EXAMPLES)
    parser.add_argument("--workdir", type=entry.path, required=True, help="the folder of a run")
    parser.add_argument("--member", type=int, default=0, help="the member to export (0)")
    parser.add_argument("--out", type=entry.path, required=True, help="the folder to write; must not hold a model yet")
    arguments = parser.parse_args()
    if arguments.out.resolve().is_relative_to(arguments.workdir.resolve()):
        raise Refusal(
            f"--out={str(arguments.out)!r} is inside the run's own folder, where it would be read as a run: "
            "choose another place"
        )
    from rope_lm import interop, trained

    run = trained.load(arguments.workdir)
    if not 0 <= arguments.member < len(run.models):
        raise Refusal(f"--member={arguments.member}: the run has {len(run.models)} members, counted from 0")
    model = interop.Model(
        section=run.config["model"],
        params=interop.params(run.models[arguments.member]),
        vocabulary=run.objective.vocabulary,
        causal=run.objective.causal,
        length=run.config["data"]["length"],
    )
    kind = interop.save(arguments.out, model, run.coder)
    print(f"{arguments.out}: {kind}, {model.vocabulary} tokens, step {run.step}, member {arguments.member}")
    if not (arguments.out / "tokenizer.json").exists():
        print(
            f"{run.config['data']['tokenizer']} stays behind: what transformers makes of a SentencePiece model does "
            "not give every text back",
            file=sys.stderr,
        )
    return 0


if __name__ == "__main__":
    entry.end(main)
