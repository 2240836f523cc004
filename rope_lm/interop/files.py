"""The two files of a model's folder: config.json and model.safetensors."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from rope_lm.refusal import Refusal
from rope_lm.run_directory import write_json

CONFIG, WEIGHTS = "config.json", "model.safetensors"
FLOATS = ("F64", "F32", "F16", "BF16")


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json. Raises Refusal for a file that is missing or is no JSON object."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(f"{str(folder / CONFIG)!r} cannot be read ({error}): give the folder of a model") from error
    if not isinstance(config, dict):
        raise Refusal(f"{str(folder / CONFIG)!r} is no JSON object: give the folder of a model")
    return config


def read_tensors(folder: Path, without: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return the tensors, in float32, whose names do not end in one of `without`.

    Raises Refusal for a file that is missing or torn, and for numbers that are not floating point.
    """
    path = folder / WEIGHTS
    if not path.is_file():
        split = (folder / f"{WEIGHTS}.index.json").exists()
        hint = "is cut into several files: save it as one" if split else "is missing (pickled weights are not read)"
        raise Refusal(f"{str(path)!r} {hint}")
    try:
        with safe_open(path, framework="numpy") as file:
            names = [name for name in file.keys() if not name.endswith(without)]  # noqa: SIM118
            for name in names:
                if (kind := file.get_slice(name).get_dtype()) not in FLOATS:
                    raise Refusal(f"{str(path)!r}: {name} is {kind}, it must be one of {', '.join(FLOATS)}")
            return {name: np.asarray(file.get_tensor(name), np.float32) for name in names}
    except (SafetensorError, OSError) as error:
        raise Refusal(f"{str(path)!r} cannot be read ({error}): it is torn, or no safetensors file") from error


def write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> None:
    """Write the weights, then the config: a folder with a config.json is complete.

    Raises Refusal for a folder that holds a model already.
    """
    if any((folder / name).exists() for name in (CONFIG, WEIGHTS)):
        raise Refusal(f"{str(folder)!r} holds a model already: give a folder that is not there yet")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{WEIGHTS}.part"
    try:
        save_file({name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}, part, {"format": "pt"})
        part.replace(folder / WEIGHTS)
    finally:
        part.unlink(missing_ok=True)
    write_json(folder / CONFIG, config)
