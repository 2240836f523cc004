"""Folders without a readable model: a refusal of one line, and nothing is written."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rope_lm import interop
from rope_lm.refusal import Refusal

FOLDER = Path(__file__).parents[1] / "goldens" / "models"


def refused(folder: Path) -> str:
    before = sorted(folder.rglob("*"))
    with pytest.raises(Refusal) as refusal:
        interop.load(folder)
    assert sorted(folder.rglob("*")) == before and "\n" not in str(refusal.value)
    return str(refusal.value)


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("llama", {"model_type": "lama"}, "unknown model_type in config.json 'lama': did you mean llama?"),
        ("llama", {"model_type": "bloom"}, "allowed: gpt2, gpt_neox, llama, roformer"),
        ("llama", {"architectures": ["LlamaForSequenceClassification"]}, "of llama only LlamaForCausalLM is read"),
        ("llama", {"num_key_value_heads": 2}, "grouped-query attention has no counterpart here"),
        ("llama", {"head_dim": 16}, "head_dim=16: here it is hidden_size / heads = 8"),
        ("llama", {"hidden_act": "relu"}, "unknown hidden_act in config.json 'relu': did you mean silu?"),
        ("llama", {"attention_bias": True}, "attention_bias and mlp_bias differ"),
        ("llama", {"quantization_config": {"bits": 4}}, "quantization_config={'bits': 4} has no counterpart here"),
        ("llama", {"rope_parameters": {"rope_type": "longrope"}}, "unknown rope_type in config.json 'longrope'"),
        ("llama", {"rope_parameters": {"rope_type": "linear"}}, "rope_type 'linear' lacks factor"),
        ("llama", {"rope_parameters": "yarn"}, "rope_parameters is 'yarn', it must be an object"),
        (
            "llama_yarn",
            {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 2.0}},
            "attention_factor has no counterpart here for rope_type 'yarn'",
        ),
        (
            "llama_yarn",
            {"rope_parameters": {"rope_type": "yarn", "factor": "4"}},
            "model.position.factor='4': must be a finite number",
        ),
        ("llama", {"hidden_size": None}, "hidden_size is None, it must be a whole number of at least 1"),
        ("llama", {"num_hidden_layers": 0}, "num_hidden_layers is 0, it must be a whole number"),
        ("llama", {"num_attention_heads": 5, "num_key_value_heads": 5}, "head_dim=8"),
        ("llama", {"hidden_size": 36, "head_dim": 9}, "the head size 9 is odd"),
        ("neox", {"attention_bias": False}, "attention_bias=False has no counterpart here, only True has"),
        (
            "neox",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "partial_rotary_factor": 0.25}},
            "rope_type 'linear' of a part of each head",
        ),
        ("llama", {"rope_scaling": 1}, "rope_scaling is 1, it must be an object"),
        ("llama", {"rope_scaling": False}, "rope_scaling is False, it must be an object"),
        (
            "llama",
            {"rope_scaling": {"type": "linear", "factor": 4.0}},
            "rope_parameters={'rope_theta': 10000.0, 'rope_type': 'default'} and "
            "rope_scaling={'type': 'linear', 'factor': 4.0} differ",
        ),
        ("llama", {"rope_theta": 5e5}, "rope_theta=500000.0 and rope_theta=10000.0 in rope_parameters differ"),
        ("neox", {"rope_theta": 5e5}, "rope_theta=500000.0 and rope_theta=10000.0 in rope_parameters differ"),
        ("neox", {"rotary_emb_base": 5e5}, "rotary_emb_base=500000.0 and rope_theta=10000.0 in rope_parameters differ"),
        ("neox", {"rope_parameters": None, "rope_theta": 5e5}, "rope_theta=500000.0 and rotary_emb_base=10000.0"),
        ("neox", {"rotary_pct": 1.0}, "rotary_pct=1.0 and partial_rotary_factor=0.25 in rope_parameters differ"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "type": "dynamic", "factor": 2.0}},
            "rope_type='linear' and type='dynamic' in rope_parameters differ",
        ),
        ("llama", {"partial_rotary_factor": 0.5}, "(partial_rotary_factor 0.5) has no counterpart here in llama"),
        (
            "llama_yarn",
            {"original_max_position_embeddings": 32},
            "original_max_position_embeddings=32 and original_max_position_embeddings=16 in rope_parameters differ",
        ),
        (
            "llama_dynamic",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "max_position_embeddings": 99}},
            " and max_position_embeddings=99 in rope_parameters differ",
        ),
        ("neox", {"head_dim": 16}, "head_dim=16: here it is hidden_size / heads = 8"),
        ("llama", {"is_causal": False}, "is_causal=False has no counterpart here"),
        ("llama", {"per_layer_config": {"0": {}}}, "per_layer_config={'0': {}} has no counterpart here"),
        ("gpt2", {"num_attention_heads": 8}, "n_head=4 and num_attention_heads=8 differ"),
        ("llama", {"num_hidden_layers": True}, "num_hidden_layers is True, it must be a whole number"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True has no counterpart"),
        ("gpt2", {"n_head": 5}, "model.width=32 is not divisible by model.heads=5"),
        ("roformer", {"rotary_value": True}, "rotary_value=True has no counterpart here"),
        ("roformer", {"embedding_size": 16}, "embedding_size=16: here it is hidden_size"),
    ],
)
def test_an_option_without_counterpart_is_refused_in_one_line(
    name: str, change: dict[str, object], words: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(FOLDER / name, tmp_path / "model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | change))
    assert words in refused(folder)


def lacking(tensors: dict[str, np.ndarray]) -> None:
    for layer in (0, 1):
        del (
            tensors[f"model.layers.{layer}.self_attn.k_proj.weight"],
            tensors[f"model.layers.{layer}.mlp.up_proj.weight"],
        )


def extra(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.2.self_attn.q_proj.weight"] = np.zeros((32, 32), np.float32)


def reshaped(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.layers.1.mlp.up_proj.weight"] = np.zeros((64, 32), np.float32)


def whole_numbers(tensors: dict[str, np.ndarray]) -> None:
    tensors["model.norm.weight"] = np.zeros(32, np.int8)


@pytest.mark.parametrize(
    "change, words",
    [
        (lacking, "model.safetensors lacks model.layers.0.mlp.up_proj.weight, "),
        (lacking, " and 1 more: the two files are not of one model"),
        (extra, "the model of config.json has no place for model.layers.2.self_attn.q_proj.weight"),
        (reshaped, "model.layers.1.mlp.up_proj.weight is [64, 32], config.json makes it [56, 32]"),
        (whole_numbers, "model.norm.weight is I8, it must be one of F64, F32, F16, BF16"),
    ],
)
def test_tensors_of_another_model_are_refused_in_one_line(
    change: dict[str, object], words: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(FOLDER / "llama", tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
    assert words in refused(folder)


def test_positions_other_than_sinusoids_are_refused(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER / "roformer", tmp_path / "model"))
    tensors = load_file(folder / "model.safetensors")
    tensors["roformer.encoder.embed_positions.weight"] *= 2
    save_file(tensors, folder / "model.safetensors")
    assert "does not hold the sinusoids of base 10,000" in refused(folder)


def test_missing_or_torn_files_are_refused_in_one_line(tmp_path: Path) -> None:
    assert "config.json' cannot be read (" in refused(tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "config.json' cannot be read (" in refused(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "is no JSON object" in refused(tmp_path)
    shutil.copy(FOLDER / "llama" / "config.json", tmp_path)
    assert "model.safetensors' is missing (pickled weights are not read)" in refused(tmp_path)
    whole = (FOLDER / "llama" / "model.safetensors").read_bytes()
    for torn in (whole[:1000], whole[:-1], b"", b"\x80\x04" + whole[2:]):
        (tmp_path / "model.safetensors").write_bytes(torn)
        assert "cannot be read (" in refused(tmp_path)


@pytest.mark.parametrize(
    "index, words",
    [
        ("{", "index.json' cannot be read ("),
        ("{}", "index.json' cannot be read ('weight_map')"),
        ({"lm_head.weight": "other.safetensors"}, "names 'other.safetensors', which is no file beside it"),
        ({"lm_head.weight": "../part.safetensors"}, "names '../part.safetensors', which is no file beside it"),
        ({"lm_head.weight": 1}, "names '1', which is no file beside it"),
        ({"lm_head.weigth": "part.safetensors"}, "part.safetensors' lacks lm_head.weigth, which "),
        ({"lm_head.weight": "part.safetensors", "a": "half.safetensors"}, "and so does another file"),
    ],
)
def test_an_index_without_its_tensors_is_refused_in_one_line(
    index: str | dict[str, object], words: str, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(FOLDER / "llama", tmp_path / "model"))
    content = index if isinstance(index, str) else json.dumps({"weight_map": index})
    (folder / "model.safetensors.index.json").write_text(content)
    assert "holds both model.safetensors and model.safetensors.index.json" in refused(folder)
    (folder / "model.safetensors").rename(folder / "part.safetensors")
    save_file({"a": np.zeros(1), "lm_head.weight": np.zeros(1)}, folder / "half.safetensors")
    assert words in refused(folder)


def test_an_existing_model_is_not_overwritten(tmp_path: Path) -> None:
    model = interop.load(FOLDER / "llama")
    for name in ("config.json", "model.safetensors", "model.safetensors.index.json"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / name).write_text("mine")
        with pytest.raises(Refusal, match="holds a model already"):
            interop.save(folder, model)
        assert [path.read_text() for path in folder.iterdir()] == ["mine"]
