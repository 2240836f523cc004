"""A small config, for tests that plan or train a run in this process."""

from pathlib import Path

from configs import lm
from scripts import entry


def small(text: Path, cache: str) -> dict:
    """The config of a run of six steps: two members, evaluated every three steps and saved every four."""
    config = lm.get_config(f"position=rotary,data=text:{text}")
    config.steps, config.seeds = 6, (0, 1)
    config.every.update({"evaluate": 3, "save": 4, "log": 2})
    config.data.update({"length": 16, "batch": 4, "validation_rows": 6, "cache": cache})
    config.model.update({"width": 16, "heads": 2, "layers": 1, "hidden": 32})
    return entry.plain(config)
