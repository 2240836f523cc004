"""Published findings, shown beside the measurements."""

from typing import NamedTuple


class Finding(NamedTuple):
    """A finding as its source states it."""

    source: str
    arxiv: str  # "" if there is none
    setting: str
    finding: str


FINDINGS = [
    Finding(
        "RoFormer",
        "2104.09864",
        "BERT-base, masked LM, batch 64, length 512, 100k steps, learning rate 1e-5; a curve, no seeds",
        "rotary converges faster than the baseline's absolute encoding",
    ),
    Finding(
        "RoFormer",
        "2104.09864",
        "Performer, enwik8, 12 layers, width 768, length 1024, learning rate 1e-4, batch 128; a curve, no seeds",
        "“rapid convergence and lower loss” with rotary",
    ),
    Finding(
        "EleutherAI, Rotary Embeddings: A Relative Revolution",
        "",
        "125M GPT-NeoX, OpenWebText2, 55k steps",
        "loss: learned 2.809, T5 bias 2.801, rotary 2.759",
    ),
    Finding(
        "EleutherAI, Rotary Embeddings: A Relative Revolution",
        "",
        "1.4B, Pile, 8k steps",
        "loss: learned 2.240, T5 bias 2.223, rotary 2.173; about 30% faster than learned, 10-20% than T5 bias; "
        "1-3% overhead",
    ),
    Finding(
        "ALiBi",
        "2108.12409",
        "247M, WikiText-103, length 512; seed sd 0.24",
        "perplexity: sinusoidal 20.05, rotary 20.07 (a tie), T5 bias 19.65, ALiBi 19.73",
    ),
    Finding(
        "KERPLE",
        "2205.09921",
        "OpenWebText2, length 512, five seeds",
        "perplexity: sinusoidal 33±1, rotary 24.2±0.6, T5 bias 23.7±0.6, ALiBi 23.9±0.6",
    ),
    Finding(
        "Haviv et al.",
        "2203.16634",
        "causal LM without positions",
        "works: perplexity 20.97 against 20.42 with learned positions",
    ),
]
