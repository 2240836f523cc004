"""Whole models against an implementation that this project did not write (tests/goldens/make_models.py), both ways."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from configs.presets import BLOCKS, POSITIONS
from rope_lm import interop
from rope_lm.refusal import Refusal
from tests import models
from tests.interop.saved import FOLDER, GOLDENS, OURS, PLACES, logits, ours

SAVED = json.loads((FOLDER / "saved.json").read_text())["configs"]


def options(folder: Path) -> dict:
    return json.loads((folder / "config.json").read_text())


@pytest.fixture(params=GOLDENS)
def golden(request: pytest.FixtureRequest) -> Path:
    return FOLDER / request.param


def test_logits_are_those_of_the_other_implementation(golden: Path) -> None:
    with np.load(golden / "logits.npz") as wanted:
        found = logits(interop.load(golden), wanted["tokens"])
        np.testing.assert_allclose(found, wanted["logits"], atol=1e-4)


def test_a_loaded_model_is_saved_as_it_was(golden: Path, tmp_path: Path) -> None:
    """The same tensors as those that the goldens' logits were computed from."""
    interop.save(tmp_path / "model", interop.load(golden))
    read, saved = (load_file(folder / "model.safetensors") for folder in (golden, tmp_path / "model"))
    if "roformer" in golden.name:
        # The vector of type 0 has been added to the table, and the table without it is the head.
        words, types = (f"roformer.embeddings.{name}_embeddings.weight" for name in ("word", "token_type"))
        read.setdefault("cls.predictions.decoder.weight", read[words])
        read.setdefault("cls.predictions.decoder.bias", read["cls.predictions.bias"])
        read["cls.predictions.bias"] = read["cls.predictions.decoder.bias"]
        read[words], read[types] = read[words] + read[types][0], np.zeros_like(read[types][:1])
    assert read.keys() == saved.keys()
    for name, tensor in read.items():
        np.testing.assert_allclose(saved[name], tensor, atol=1e-6 if name.endswith("positions.weight") else 0)
    before, after = options(golden), options(tmp_path / "model")
    assert after == SAVED[golden.name]
    silent = {
        "tie_word_embeddings",
        "type_vocab_size",
        "pad_token_id",
        "bos_token_id",
        "eos_token_id",
        "embedding_size",
    }
    same = before.keys() & after.keys() - silent - {"rope_parameters", "head_dim"}
    assert {key: after[key] for key in same} == {key: before[key] for key in same}


def test_a_saved_model_is_loaded_with_the_same_bits(golden: Path, tmp_path: Path) -> None:
    first = interop.load(golden)
    interop.save(tmp_path / "model", first)
    again = interop.load(tmp_path / "model")
    assert again._replace(params=None) == first._replace(params=None)
    jax.tree.map(np.testing.assert_array_equal, again.params, first.params)


def test_a_folder_may_be_text_and_below_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    model = interop.load(str(FOLDER / "llama"))
    interop.save("~/model", model)
    assert interop.load("~/model").section == model.section and (tmp_path / "model").is_dir()
    with pytest.raises(Refusal, match="there is no home folder ~no-one here"):
        interop.load("~no-one/model")


@pytest.mark.parametrize("name", OURS)
def test_a_model_of_ours_gives_the_same_logits_when_it_comes_back(name: str, tmp_path: Path) -> None:
    """config.json is the one that the other implementation read to give these logits (check_models.py)."""
    block, position, tied = OURS[name]
    model = ours(block, position, tied=tied)
    interop.save(tmp_path / "model", model)
    assert options(tmp_path / "model") == SAVED[name]
    again = interop.load(tmp_path / "model")
    assert {key: again.section[key] for key in ("block", "position", "tied")} == {
        key: model.section[key] for key in ("block", "position", "tied")
    }
    found, wanted = (logits(one, models.tokens(2)) for one in (again, model))
    np.testing.assert_allclose(found, wanted, atol=2e-5)


def test_a_model_without_layout_is_refused_by_name_and_nothing_is_written(tmp_path: Path) -> None:
    for block in BLOCKS:
        for position in POSITIONS.keys() - PLACES.get(block, ()):
            with pytest.raises(Refusal) as refusal:
                interop.save(
                    tmp_path / "model", interop.Model(models.section(position, block=BLOCKS[block]), {}, 2, True, 2)
                )
            said = str(refusal.value)
            assert position in said and all(kind in said for kind in interop.LAYOUTS) and "\n" not in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "change, words",
    [
        (
            {"attention": {"name": "performer", "features": 16, "redraw": 9, "block": 8}},
            "attention.name 'performer' would be 'softmax'",
        ),
        ({"block": BLOCKS["llama"] | {"norm": "layer"}}, "in llama block.norm 'layer' would be 'rms'"),
        ({"block": BLOCKS["llama"] | {"residual": "parallel"}}, "block.residual 'parallel' would be 'pre'"),
        ({"head_size": 4}, "in llama head_size 4 would be 8"),
        ({"block": BLOCKS["llama"] | {"mlp": "gelu"}}, "in llama block.mlp 'gelu' would be 'swiglu'"),
    ],
)
def test_a_refusal_names_the_difference(change: dict[str, object], words: str, tmp_path: Path) -> None:
    with pytest.raises(Refusal, match=words):
        interop.save(tmp_path / "model", ours("llama", "rotary", **change))


def test_a_bidirectional_model_does_not_fit_a_causal_layout(tmp_path: Path) -> None:
    with pytest.raises(Refusal, match="in llama causal False would be True"):
        interop.save(tmp_path / "model", ours("llama", "rotary")._replace(causal=False))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("files", [1, 3])
def test_half_precision_in_any_number_of_files_is_read_into_float32(dtype: str, files: int, tmp_path: Path) -> None:
    rough = {name: np.asarray(x, dtype) for name, x in load_file(FOLDER / "llama" / "model.safetensors").items()}
    for folder, tensors in (("rough", rough), ("whole", {name: x.astype(np.float32) for name, x in rough.items()})):
        (tmp_path / folder).mkdir()
        shutil.copy(FOLDER / "llama" / "config.json", tmp_path / folder)
        save_file(tensors, tmp_path / folder / "model.safetensors")
    if files > 1:
        cut(tmp_path / "rough", files)
    found, wanted = (interop.load(tmp_path / folder).params for folder in ("rough", "whole"))
    jax.tree.map(np.testing.assert_array_equal, found, wanted)
    assert found["embedding"].dtype == jnp.float32


def cut(folder: Path, files: int) -> None:
    """Cut the weights into several files with an index, as transformers does."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    places = {name: f"model-{i % files + 1:05d}-of-{files:05d}.safetensors" for i, name in enumerate(tensors)}
    for file in set(places.values()):
        save_file({name: tensors[name] for name in places if places[name] == file}, folder / file)
    index = {"metadata": {"total_size": 1}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    "name, change",
    [
        ("llama", {"rope_scaling": {"type": "default", "rope_theta": 10_000}, "rope_theta": 1e4}),
        ("llama", {"rope_scaling": {}, "partial_rotary_factor": 1.0}),
        ("llama_yarn", {"original_max_position_embeddings": 16, "rope_theta": 1e4}),
        ("neox", {"rope_parameters": None}),
        ("neox", {"rope_parameters": None, "rotary_emb_base": 10_000, "rotary_pct": 0.25}),
        ("gpt2", {"n_head": None, "num_attention_heads": 4, "max_position_embeddings": 32}),
    ],
)
def test_options_given_twice_alike_are_read(name: str, change: dict[str, object], tmp_path: Path) -> None:
    folder = Path(shutil.copytree(FOLDER / name, tmp_path / "model"))
    (folder / "config.json").write_text(json.dumps(options(folder) | change))
    assert interop.load(folder).section == interop.load(FOLDER / name).section


def test_older_spellings_mean_the_same(tmp_path: Path) -> None:
    """transformers before 5 wrote `rope_theta` and `rope_scaling`. The tensors of a model without head have no prefix,
    and may include causal masks and a tied head."""
    shutil.copytree(FOLDER / "llama_yarn", tmp_path / "llama")
    config = json.loads((tmp_path / "llama" / "config.json").read_text())
    new = config.pop("rope_parameters")
    config |= {"rope_theta": new.pop("rope_theta"), "rope_scaling": {"type": new.pop("rope_type"), **new}}
    (tmp_path / "llama" / "config.json").write_text(json.dumps(config))
    assert interop.load(tmp_path / "llama").section == interop.load(FOLDER / "llama_yarn").section

    shutil.copytree(FOLDER / "gpt2", tmp_path / "gpt2")
    tensors = load_file(FOLDER / "gpt2" / "model.safetensors")
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare |= {"h.0.attn.bias": np.tril(np.ones((1, 1, 32, 32), np.uint8)), "lm_head.weight": bare["wte.weight"]}
    save_file(bare, tmp_path / "gpt2" / "model.safetensors")
    jax.tree.map(
        np.testing.assert_array_equal, interop.load(tmp_path / "gpt2").params, interop.load(FOLDER / "gpt2").params
    )
