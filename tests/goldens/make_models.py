"""Whole models with random weights, made and run by an implementation that this project did not write.

    python -m venv goldens
    goldens/bin/pip install torch==2.13.0 transformers==5.24.0 safetensors==0.8.0 "numpy<3"
    goldens/bin/python tests/goldens/make_models.py

Each folder models/NAME holds what `save_pretrained` writes (config.json, model.safetensors) and logits.npz: the tokens
that the model read [B T] and the logits that it gave [B T V], in float32. Every weight, bias and norm scale is random,
so that nothing can hide behind a zero or a one. models/index.json has the versions. This project is not imported.
A model is drawn from its number in MODELS: add at the end.
"""

import json
import sys
from pathlib import Path

import numpy as np
import safetensors
import torch
import transformers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    RoFormerConfig,
    RoFormerForMaskedLM,
)

OUT = Path(__file__).parent / "models"
VOCABULARY, ROWS, LENGTH = 50, 2, 24
LLAMA = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 56,
    "max_position_embeddings": 64,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 8.0,
    "original_max_position_embeddings": 16,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
}
YARN = {"rope_type": "yarn", "rope_theta": 10_000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 3.0}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 3.0}
# Every number acts in heads of 8, none is a default, and the factor is not the ratio of the two lengths, 64 and 32.
YARN_4 = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 32,
    "beta_fast": 1.0,
    "beta_slow": 0.25,
}
NEOX = {**LLAMA, "intermediate_size": 64}
NO_TOKENS = {"bos_token_id": None, "eos_token_id": None}

MODELS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "llama_llama3": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, rope_parameters=LLAMA3, tie_word_embeddings=True)),
    "llama_yarn": lambda: LlamaForCausalLM(
        LlamaConfig(**LLAMA, rope_parameters=YARN, attention_bias=True, mlp_bias=True)
    ),
    "neox": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX, use_parallel_residual=True)),
    "neox_sequential": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX, rotary_pct=0.5, use_parallel_residual=False)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=32, n_layer=2, n_head=4, n_inner=64, **NO_TOKENS)
    ),
    "roformer": lambda: RoFormerForMaskedLM(RoFormerConfig(**NEOX)),
    "roformer_untied": lambda: RoFormerForMaskedLM(RoFormerConfig(**NEOX, tie_word_embeddings=False)),
    "llama_linear": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, rope_parameters=LINEAR)),
    "llama_dynamic": lambda: LlamaForCausalLM(
        LlamaConfig(**{**LLAMA, "max_position_embeddings": 16}, rope_parameters=DYNAMIC)
    ),
    "neox_yarn": lambda: GPTNeoXForCausalLM(GPTNeoXConfig(**NEOX, rotary_pct=1.0, rope_parameters=YARN_4)),
    "gpt2_odd": lambda: GPT2LMHeadModel(  # heads of 9
        GPT2Config(vocab_size=VOCABULARY, n_positions=32, n_embd=27, n_layer=2, n_head=3, n_inner=40, **NO_TOKENS)
    ),
}


def randomise(model: PreTrainedModel, generator: torch.Generator) -> None:
    """Matrices keep the size of what flows through them, biases and the spread of scales are of order one."""
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue  # sinusoids, which the encoding is made of
        drawn = torch.randn(parameter.shape, generator=generator)
        scale = 1 + 0.3 * drawn if parameter.ndim == 1 and name.endswith("weight") else 0.3 * drawn
        parameter.data.copy_(scale)


if __name__ == "__main__":
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    for number, (name, build) in enumerate(MODELS.items()):
        generator = torch.Generator().manual_seed(number)
        model = build().float().eval()
        randomise(model, generator)
        tokens = torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)
        logits = model(tokens).logits
        model.save_pretrained(OUT / name)
        (OUT / name / "generation_config.json").unlink(missing_ok=True)
        (OUT / name / "model.safetensors").chmod(0o644)
        np.savez_compressed(OUT / name / "logits.npz", tokens=tokens.numpy().astype(np.int32), logits=logits.numpy())
        size = (OUT / name / "model.safetensors").stat().st_size
        print(f"{name}: {size:,} bytes, logits of deviation {logits.std():.2f}")
    versions = {"python": sys.version.split()[0], "numpy": np.__version__}
    versions |= {each.__name__: each.__version__ for each in (torch, transformers, safetensors)}
    (OUT / "index.json").write_text(json.dumps({"versions": versions, "models": list(MODELS)}, indent=1) + "\n")
