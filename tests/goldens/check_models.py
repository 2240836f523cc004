"""Folders that `rope_lm.interop.save` wrote, read and run by the implementation that made the goldens.

    goldens/bin/python tests/goldens/check_models.py FOLDER...

(The environment is that of make_models.py.) Each folder holds a logits.npz as well, with tokens [B T] and the logits
that they ought to give [B T V]. Prints the greatest difference of each; exit status 1 where one is above 1e-4, where a
tensor is missing or not used, or where there is no folder.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import transformers

if __name__ == "__main__":
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    bad = not sys.argv[1:]
    for folder in map(Path, sys.argv[1:]):
        config = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, config.architectures[0])
        model, said = kind.from_pretrained(folder, output_loading_info=True)
        faults = {key: sorted(said[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if said[key]}
        with np.load(folder / "logits.npz") as golden:
            logits = model.eval()(torch.from_numpy(golden["tokens"]).long()).logits.numpy()
            off = np.abs(logits - golden["logits"]).max()
        print(f"{folder.name}: {kind.__name__}, {off:.1e} off, {faults or 'every tensor used'}")
        bad |= bool(faults) or not off < 1e-4
    sys.exit(bad)
