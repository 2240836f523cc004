"""Attention probabilities of every encoding, computed by implementations that this project did not write.

    python -m venv goldens
    goldens/bin/pip install torch==2.13.0 transformers==5.24.0 x-transformers==2.31.10 "numpy<3"
    goldens/bin/python tests/goldens/make.py

Random queries, keys and parameters go through each implementation's own code; what it makes of them is written beside
them: NAME.npz, and index.json with the config row and the source. Nothing of this project is imported. Where no
package has an encoding (KERPLE, FIRE, Sandwich), the paper's formula is computed pair by pair in float64, and the
source says so.
"""

import importlib.metadata
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import transformers
from transformers import GPTNeoXConfig, LlamaConfig, RoFormerConfig, T5Config, XLNetConfig
from transformers.models.bloom.modeling_bloom import build_alibi_tensor
from transformers.models.gpt2.modeling_gpt2 import GPT2Config, GPT2Model
from transformers.models.gpt_neox import modeling_gpt_neox as neox
from transformers.models.llama import modeling_llama as llama
from transformers.models.marian.modeling_marian import MarianSinusoidalPositionalEmbedding
from transformers.models.mpt.modeling_mpt import build_mpt_alibi_tensor
from transformers.models.roformer import modeling_roformer as roformer
from transformers.models.t5.modeling_t5 import T5Attention
from transformers.models.wav2vec2_bert.modeling_wav2vec2_bert import _apply_relative_key_position_encoding
from transformers.models.xlnet.modeling_xlnet import XLNetModel, XLNetRelativeAttention
from x_transformers.x_transformers import CoPE, DynamicPositionBias, RotaryEmbedding
from x_transformers.x_transformers import apply_rotary_pos_emb as x_rotate

OUT = Path(__file__).parent
LENGTH, HEADS, SIZE = 12, 4, 16
WIDTH = HEADS * SIZE
HF, XT = f"transformers {transformers.__version__}", f"x-transformers {importlib.metadata.version('x-transformers')}"
index: dict[str, dict] = {}
torch.set_grad_enabled(False)
torch.manual_seed(0)  # of what a model draws when it is made


def draw(*size: int) -> torch.Tensor:
    return torch.randn(*size, generator=GENERATOR)


GENERATOR = torch.Generator().manual_seed(0)


def softmax(logits: torch.Tensor, causal: bool = True) -> np.ndarray:
    """Probabilities [N T T] of logits [N T T]."""
    ahead = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    return torch.softmax(logits.masked_fill(ahead & torch.tensor(causal), -math.inf), -1).float().numpy()


def dot(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """q k / sqrt(H) of [N T H]."""
    return q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])


def write(
    name: str,
    row: dict,
    source: str,
    pairing: str = "half-split",
    heads: int = HEADS,
    causal: bool = True,
    **arrays,
) -> None:
    arrays = {key: np.asarray(value, np.float32) for key, value in arrays.items()}
    np.savez_compressed(OUT / f"{name}.npz", **arrays)
    index[name] = {"position": row, "source": source, "pairing": pairing, "heads": heads, "causal": causal}


def heads() -> tuple[torch.Tensor, torch.Tensor]:
    return draw(HEADS, LENGTH, SIZE), draw(HEADS, LENGTH, SIZE)


def llama_rotary(name: str, row: dict, original: int = 64, positions: torch.Tensor | None = None, **parameters) -> None:
    q, k = heads()
    config = LlamaConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        max_position_embeddings=original,
        rope_parameters={"rope_theta": row["base"], **parameters},
    )
    positions = torch.arange(LENGTH)[None] if positions is None else positions
    cos, sin = llama.LlamaRotaryEmbedding(config)(q[None], positions)
    turned = llama.apply_rotary_pos_emb(q[None], k[None], cos, sin)
    kind = parameters["rope_type"]
    write(
        name,
        row,
        f"{HF}, models/llama, rope_type {kind}",
        q=q,
        k=k,
        probabilities=softmax(dot(*(x[0] for x in turned))),
    )


def x_rotary(name: str, row: dict, **arguments) -> None:
    q, k = heads()
    frequency, scale = RotaryEmbedding(SIZE, base=row["base"], **arguments)(torch.arange(LENGTH))
    inverse = 1 / scale if isinstance(scale, torch.Tensor) else scale
    turned = dot(x_rotate(q[None], frequency, scale)[0], x_rotate(k[None], frequency, inverse)[0])
    write(name, row, f"{XT}, RotaryEmbedding({arguments})", "interleaved", q=q, k=k, probabilities=softmax(turned))


def rotaries() -> None:
    plain = {"base": 10_000.0}
    llama_rotary("rotary", {"name": "rotary", **plain}, rope_type="default")
    llama_rotary("rotary_linear", {"name": "rotary_linear", **plain, "factor": 4.0}, rope_type="linear", factor=4.0)
    llama_rotary(
        "rotary_dynamic",
        {"name": "rotary_dynamic", **plain, "factor": 2.0, "trained_length": 8},
        8,
        rope_type="dynamic",
        factor=2.0,
    )
    for trained in (64, 2048):
        llama_rotary(
            f"yarn_{trained}",
            {"name": "yarn", **plain, "factor": 4.0, "trained_length": trained, "beta_fast": 32.0, "beta_slow": 1.0},
            trained,
            rope_type="yarn",
            factor=4.0,
            original_max_position_embeddings=trained,
            beta_fast=32.0,
            beta_slow=1.0,
        )
        llama_rotary(
            f"llama3_{trained}",
            {
                "name": "llama3",
                "base": 500_000.0,
                "factor": 8.0,
                "trained_length": trained,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
            },
            trained,
            rope_type="llama3",
            factor=8.0,
            original_max_position_embeddings=trained,
            low_freq_factor=1.0,
            high_freq_factor=4.0,
        )
    llama_rotary(
        "p_rope",
        {"name": "p_rope", **plain, "fraction": 0.75},
        rope_type="proportional",
        partial_rotary_factor=0.75,
    )
    x_rotary("rotary_ntk", {"name": "rotary_ntk", **plain, "factor": 3.0}, base_rescale_factor=3.0)
    x_rotary("xpos", {"name": "xpos", **plain, "fade": 512.0}, use_xpos=True)
    x_rotary("xpos_fast", {"name": "xpos", **plain, "fade": 8.0}, use_xpos=True, scale_base=8)

    q, k = heads()
    config = RoFormerConfig(hidden_size=WIDTH, num_attention_heads=HEADS, max_position_embeddings=LENGTH)
    table = roformer.RoFormerSinusoidalPositionalEmbedding(LENGTH, SIZE)
    table.weight.data.copy_(table.create_weight())
    turn = roformer.RoFormerSelfAttention.apply_rotary_position_embeddings
    turned = turn(table(torch.Size([1, LENGTH]))[None, :, :], q[None], k[None])
    source = f"{HF}, models/roformer ({type(config).__name__})"
    write(
        "rotary_interleaved",
        {"name": "rotary", **plain},
        source,
        "interleaved",
        q=q,
        k=k,
        probabilities=softmax(dot(*(x[0] for x in turned))),
    )

    q, k = heads()
    config = GPTNeoXConfig(
        hidden_size=WIDTH,
        num_attention_heads=HEADS,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, "partial_rotary_factor": 0.5},
    )
    cos, sin = neox.GPTNeoXRotaryEmbedding(config)(q[None], torch.arange(LENGTH)[None])
    turned = neox.apply_rotary_pos_emb(q[None], k[None], cos, sin)
    write(
        "rotary_partial",
        {"name": "rotary_partial", **plain, "fraction": 0.5},
        f"{HF}, models/gpt_neox",
        "first",
        q=q,
        k=k,
        probabilities=softmax(dot(*(x[0] for x in turned))),
    )


def biases() -> None:
    q, k = heads()
    config = T5Config(
        d_model=WIDTH,
        d_kv=SIZE,
        num_heads=HEADS,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=10,
        is_decoder=True,
    )
    attention = T5Attention(config, has_relative_attention_bias=True)
    attention.relative_attention_bias.weight.data.copy_(draw(8, HEADS))
    bias = attention.compute_bias(LENGTH, LENGTH)[0]
    write(
        "relative_bias",
        {"name": "relative_bias", "buckets": 8, "max_distance": 10, "scale": 1.0},
        f"{HF}, models/t5",
        q=q,
        k=k,
        table=attention.relative_attention_bias.weight,
        probabilities=softmax(dot(q, k) + bias),
    )

    q, k = heads()
    bias = build_alibi_tensor(torch.ones(1, LENGTH), HEADS, torch.float32).reshape(HEADS, 1, LENGTH)
    write("alibi", {"name": "alibi"}, f"{HF}, models/bloom", q=q, k=k, probabilities=softmax(dot(q, k) + bias))
    q, k = draw(6, LENGTH, SIZE), draw(6, LENGTH, SIZE)
    bias = build_alibi_tensor(torch.ones(1, LENGTH), 6, torch.float32).reshape(6, 1, LENGTH)
    write(
        "alibi_6_heads",
        {"name": "alibi"},
        f"{HF}, models/bloom, 6 heads",
        heads=6,
        q=q,
        k=k,
        probabilities=softmax(dot(q, k) + bias),
    )
    q, k = heads()
    bias = build_mpt_alibi_tensor(HEADS, LENGTH)
    write("alibi_mpt", {"name": "alibi"}, f"{HF}, models/mpt", q=q, k=k, probabilities=softmax(dot(q, k) + bias))

    formula = "the paper's formula (no package has it), pair by pair in float64"
    pairs = [(i, j) for i in range(LENGTH) for j in range(i + 1)]

    def by_pair(function) -> torch.Tensor:
        bias = torch.zeros(HEADS, LENGTH, LENGTH, dtype=torch.float64)
        for i, j in pairs:
            for head in range(HEADS):
                bias[head, i, j] = function(head, i, j)
        return bias.float()

    r1, r2 = torch.rand(HEADS, generator=GENERATOR) + 0.1, torch.rand(HEADS, generator=GENERATOR) + 0.1
    log = by_pair(lambda h, i, j: -r1[h].item() * math.log(1 + r2[h].item() * abs(i - j)))
    power = by_pair(lambda h, i, j: -r1[h].item() * abs(i - j) ** r2[h].item())
    for name, bias in (("kerple_log", log), ("kerple_power", power)):
        q, k = heads()
        write(
            name,
            {"name": name},
            f"arXiv 2205.09921, {formula}",
            q=q,
            k=k,
            r1=r1,
            r2=r2,
            probabilities=softmax(dot(q, k) + bias),
        )

    q, k = heads()
    bias = by_pair(
        lambda h, i, j: sum(math.cos((i - j) / 10_000 ** (2 * n / 64)) for n in range(32)) / ((h + 1) * 8 / HEADS)
    )
    write(
        "sandwich",
        {"name": "sandwich", "size": 64},
        f"arXiv 2212.10356, {formula}",
        q=q,
        k=k,
        probabilities=softmax(dot(q, k) + bias),
    )

    q, k = heads()
    first, start, second, end, c, reach = draw(8), draw(8), draw(8, HEADS), draw(HEADS), 0.3, 0.7

    def fire(h: int, i: int, j: int) -> float:
        share = math.log(1 + c * (i - j)) / (math.log(1 + c * max(i, 5 * reach)) + 1e-6)
        units = [max(0.0, first[u].item() * share + start[u].item()) for u in range(8)]
        return sum(units[u] * second[u, h].item() for u in range(8)) + end[h].item()

    write(
        "fire",
        {"name": "fire", "hidden": 8, "threshold": 5.0},
        f"arXiv 2310.04418, {formula}",
        q=q,
        k=k,
        first=first,
        start=start,
        second=second,
        end=end,
        c=c,
        reach=reach,
        probabilities=softmax(dot(q, k) + by_pair(fire)),
    )


def shaw(name: str, farthest: int, causal: bool) -> None:
    q, k = heads()
    ahead = 0 if causal else farthest
    table = draw(ahead + 1 + farthest, SIZE)  # of distances -ahead to farthest
    module = SimpleNamespace(
        left_max_position_embeddings=farthest,
        right_max_position_embeddings=ahead,
        scaling=SIZE**-0.5,
        distance_embedding=lambda at: table.flip(0)[at],
    )
    _, bias = _apply_relative_key_position_encoding(module, q[None], k[None])
    write(
        name,
        {"name": "shaw", "max_distance": farthest, "scale": 1.0},
        f"{HF}, models/wav2vec2_bert, relative_key",
        causal=causal,
        q=q,
        k=k,
        table=table[None],
        probabilities=softmax(dot(q, k) + bias[0], causal),
    )


def contents() -> None:
    shaw("shaw", farthest=5, causal=True)

    q, k = heads()
    u, v, weight = draw(HEADS, SIZE), draw(HEADS, SIZE), draw(WIDTH, HEADS, SIZE) / 8
    attention = XLNetRelativeAttention(XLNetConfig(d_model=WIDTH, n_head=HEADS, d_inner=8, dropout=0.0)).eval()
    attention.r_w_bias.data.copy_(u), attention.r_r_bias.data.copy_(v)
    waves = XLNetModel.positional_embedding(
        torch.arange(LENGTH, -LENGTH, -1.0), 1 / 10_000 ** (torch.arange(0, WIDTH, 2.0) / WIDTH), bsz=1
    )
    rows = torch.einsum("ijh,hnd->ijnd", waves, weight)
    lay = lambda x: x.transpose(0, 1)[:, None]  # noqa: E731 ([T 1 N H])
    mask = torch.ones(LENGTH, LENGTH).triu(1)[:, :, None, None]
    _, found = attention.rel_attn_core(lay(q), lay(k), lay(k), rows, attn_mask=mask, output_attentions=True)
    write(
        "transformer_xl",
        {"name": "transformer_xl", "base": 10_000.0, "scale": 1.0},
        f"{HF}, models/xlnet, XLNetRelativeAttention.rel_attn_core",
        q=q,
        k=k,
        u=u,
        v=v,
        weight=weight.permute(1, 2, 0)[None],
        probabilities=found[:, :, 0].permute(2, 0, 1),
    )

    q, k = heads()
    cope = CoPE(SIZE, HEADS, 5)
    cope.pos_emb.data.copy_(draw(5, SIZE) / math.sqrt(SIZE))
    ahead = torch.ones(LENGTH, LENGTH, dtype=torch.bool).triu(1)
    logits = dot(q, k).masked_fill(ahead, -torch.finfo(torch.float32).max)[None]
    write(
        "cope",
        {"name": "cope", "positions": 5, "scale": 1.0},
        f"{XT}, CoPE",
        q=q,
        k=k,
        table=cope.pos_emb[None],
        probabilities=softmax((logits + cope(q[None], logits))[0]),
    )


def embeddings() -> None:
    """These act on the embeddings: what they add to zeros, in the place of probabilities."""
    table = MarianSinusoidalPositionalEmbedding(LENGTH, WIDTH)
    table.weight.data.copy_(table.create_weight())
    write(
        "sinusoidal",
        {"name": "sinusoidal", "base": 10_000.0, "scale": 1.0},
        f"{HF}, models/marian",
        added=table(torch.Size([1, LENGTH])),
    )
    model = GPT2Model(GPT2Config(n_embd=WIDTH, n_head=HEADS, n_layer=1, n_positions=LENGTH, vocab_size=2)).eval()
    model.wte.weight.data.zero_()
    seen = []
    model.h[0].register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0]))
    model(torch.zeros(1, LENGTH, dtype=torch.long))
    write(
        "learned",
        {"name": "learned", "limit": LENGTH, "scale": 1.0},
        f"{HF}, models/gpt2",
        table=model.wpe.weight,
        added=seen[0][0],
    )


def both_ways() -> None:
    """What an encoding does where tokens see what is ahead of them, too."""
    q, k = heads()
    module = DynamicPositionBias(8, heads=HEADS, depth=1, log_distance=True)
    (inner, _), outer = module.mlp
    for causal in (True, False):
        write(
            "continuous_bias" + "_both_ways" * (not causal),
            {"name": "continuous_bias", "hidden": 8},
            f"{XT}, DynamicPositionBias(depth=1, log_distance=True)",
            causal=causal,
            q=q,
            k=k,
            first=inner.weight[:, 0],
            start=inner.bias,
            second=outer.weight.T,
            end=outer.bias,
            probabilities=softmax(dot(q, k) + module(LENGTH, LENGTH), causal=causal),
        )

    q, k = heads()
    config = T5Config(
        d_model=WIDTH,
        d_kv=SIZE,
        num_heads=HEADS,
        relative_attention_num_buckets=12,
        relative_attention_max_distance=9,
        is_decoder=False,
    )
    attention = T5Attention(config, has_relative_attention_bias=True)
    attention.relative_attention_bias.weight.data.copy_(draw(12, HEADS))
    write(
        "relative_bias_both_ways",
        {"name": "relative_bias", "buckets": 12, "max_distance": 9, "scale": 1.0},
        f"{HF}, models/t5, an encoder's",
        causal=False,
        q=q,
        k=k,
        table=attention.relative_attention_bias.weight,
        probabilities=softmax(dot(q, k) + attention.compute_bias(LENGTH, LENGTH)[0], causal=False),
    )

    shaw("shaw_both_ways", farthest=4, causal=False)


if __name__ == "__main__":
    rotaries()
    biases()
    contents()
    embeddings()
    both_ways()
    versions = {"python": sys.version.split()[0], "torch": torch.__version__, "numpy": np.__version__}
    (OUT / "index.json").write_text(json.dumps({"versions": versions, "goldens": index}, indent=1) + "\n")
    print(f"{len(index)} goldens written")
