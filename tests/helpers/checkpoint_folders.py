"""Folders of tiny checkpoints that tests change: edits of their JSON and weights."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file

KEY = "model.language_model.layers.1.mlp.up_proj.weight"
META = {"format": "pt"}


def edit_json(file: Path, **changes) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def rewrite(folder: Path, change) -> None:
    weights = load_file(folder / "model.safetensors")
    change(weights)
    save_file(weights, folder / "model.safetensors", metadata=META)
