"""The files of a model's folder: config.json, and model.safetensors or the files that its index names."""

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
INDEX = f"{WEIGHTS}.index.json"  # of weights that are cut into several files
FLOATS = ("F64", "F32", "F16", "BF16")


def read_config(folder: Path) -> dict[str, Any]:
    """Return config.json. Raises Refusal if the file is missing or does not hold a JSON object."""
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise Refusal(f"{str(folder / CONFIG)!r} cannot be read ({error}): give the folder of a model") from error
    if not isinstance(config, dict):
        raise Refusal(f"{str(folder / CONFIG)!r} is no JSON object: give the folder of a model")
    return config


def read_tensors(folder: Path, without: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Return the tensors, in float32, whose names do not end in one of `without`.

    Raises Refusal if a file is missing or cut off, and for tensors that are not floating point.
    """
    found: dict[str, np.ndarray] = {}
    for path, listed in _weights(folder).items():
        try:
            with safe_open(path, framework="numpy") as file:
                names = set(file.keys())
                if missing := listed - names:
                    raise Refusal(f"{str(path)!r} lacks {min(missing)}, which {INDEX} places there")
                if twice := names & found.keys():
                    raise Refusal(f"{str(path)!r} holds {min(twice)}, and so does another file of {INDEX}: keep one")
                for name in sorted(name for name in names if not name.endswith(without)):
                    if (kind := file.get_slice(name).get_dtype()) not in FLOATS:
                        raise Refusal(f"{str(path)!r}: {name} is {kind}, it must be one of {', '.join(FLOATS)}")
                    found[name] = np.asarray(file.get_tensor(name), np.float32)
        except (SafetensorError, OSError) as error:
            raise Refusal(f"{str(path)!r} cannot be read ({error}): it is torn, or no safetensors file") from error
    return found


def _weights(folder: Path) -> dict[Path, set[str]]:
    """Return the files of weights, and the names of the tensors that an index places in each."""
    whole, index = folder / WEIGHTS, folder / INDEX
    if not index.exists():
        if not whole.is_file():
            raise Refusal(f"{str(whole)!r} is missing (pickled weights are not read)")
        return {whole: set()}
    if whole.exists():
        raise Refusal(f"{str(folder)!r} holds both {WEIGHTS} and {INDEX}: remove the one that is not of this model")
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Refusal(f"{str(index)!r} cannot be read ({error}): bring the file again") from error
    files: dict[Path, set[str]] = {}
    for file in dict.fromkeys(places.values()):
        if Path(str(file)).name != file or not (folder / file).is_file():
            raise Refusal(f"{str(index)!r} names {str(file)!r}, which is no file beside it: bring all its files")
        files[folder / file] = {name for name, place in places.items() if place == file}
    return files


def write(folder: Path, objects: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, np.ndarray]) -> None:
    """Write the weights, then the JSON objects by file name, and config.json last, so a folder with one is complete.

    Raises Refusal if the folder already holds a model.
    """
    if any((folder / name).exists() for name in {CONFIG, WEIGHTS, INDEX, *objects}):
        raise Refusal(f"{str(folder)!r} holds a model already: give a folder that is not there yet")
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / f"{WEIGHTS}.part"
    try:
        save_file({name: np.ascontiguousarray(x, np.float32) for name, x in tensors.items()}, part, {"format": "pt"})
        part.replace(folder / WEIGHTS)
    finally:
        part.unlink(missing_ok=True)
    for name in sorted(objects, key=CONFIG.__eq__):
        write_json(folder / name, objects[name])
