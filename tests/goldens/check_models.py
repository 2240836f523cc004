"""What `rope_lm.interop.save` writes, read and run by the implementation that made the goldens.

    python -m tests.interop.saved FOLDER
    goldens/bin/python tests/goldens/check_models.py FOLDER

(The second environment is that of make_models.py.) Each folder in FOLDER holds a model and logits.npz, the tokens [B T]
and the logits that they ought to give [B T V]. Prints the greatest difference of each; exit status 1 where one is above
1e-4, where a tensor is missing or not used, or where there is no folder. Where there is no fault it writes
models/saved.json, every config.json that was accepted: the tests hold `save` to these.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers

SAVED = Path(__file__).parent / "models" / "saved.json"

if __name__ == "__main__":
    torch.set_grad_enabled(False)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    folders = sorted(Path(sys.argv[1]).iterdir())
    bad = not folders
    for folder in folders:
        config = transformers.AutoConfig.from_pretrained(folder)
        kind = getattr(transformers, config.architectures[0])
        model, said = kind.from_pretrained(folder, output_loading_info=True)
        faults = {key: sorted(said[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys") if said[key]}
        with np.load(folder / "logits.npz") as golden:
            logits = model.eval()(torch.from_numpy(golden["tokens"]).long()).logits.numpy()
            off = np.abs(logits - golden["logits"]).max()
        print(f"{folder.name}: {kind.__name__}, {off:.1e} off, {faults or 'every tensor used'}")
        bad |= bool(faults) or not off < 1e-4
    if not bad:
        configs = {folder.name: json.loads((folder / "config.json").read_text()) for folder in folders}
        SAVED.write_text(json.dumps({"transformers": transformers.__version__, "configs": configs}, indent=1) + "\n")
    sys.exit(bad)
