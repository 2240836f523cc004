"""Repeat a run exactly, from the config.json that it wrote.

python -m scripts.train --workdir=runs/again --config=configs/resolved.py:runs/a/config.json
"""

import json

from ml_collections import ConfigDict

from rope_lm import migrate, settings
from rope_lm.refusal import Refusal


def get_config(path: str) -> ConfigDict:
    """Return the config in the JSON file at `path`. Raises Refusal if it is missing or not JSON."""
    try:
        with open(settings.path(path, path), encoding="utf-8") as file:
            return ConfigDict(settings.tuples(migrate.config(json.load(file))))
    except (OSError, ValueError, AttributeError) as error:
        raise Refusal(f"config {path!r} cannot be read ({error}): name the config.json of a run") from error
