"""A run again, exactly: the config.json that another run wrote.

python -m scripts.train --workdir=runs/again --config=configs/resolved.py:runs/a/config.json
"""

import json

from ml_collections import ConfigDict

from rope_lm import migrate
from rope_lm.refusal import Refusal


def get_config(path: str) -> ConfigDict:
    """The config in the JSON file at `path`. Raises Refusal when it is not there or is not JSON."""
    try:
        with open(path, encoding="utf-8") as file:
            return ConfigDict(_tuples(migrate.config(json.load(file))))
    except (OSError, ValueError, AttributeError) as error:
        raise Refusal(f"config {path!r} cannot be read ({error}): name the config.json of a run") from error


def _tuples(value: object) -> object:
    """JSON has lists only; a config's sequences are tuples, so that they cannot be changed in place."""
    if isinstance(value, dict):
        return {key: _tuples(each) for key, each in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value
