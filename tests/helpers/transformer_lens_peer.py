"""What TransformerLens computes on a checkpoint of LLaVA-OneVision; a script for a Python that can import it.

Arguments: the folder of the checkpoint, a safetensors file of model inputs, the file to write. It writes the cached
activations as `cache/<name>`, those of a run with `pos_slice` as `<form of pos_slice>/<name>`, and what methods of the
cache return as `tools/<number of the call>`; in the metadata the version and the labels.

The final norm's gain is folded into the unembedding first, as TransformerLens's logit attributions ask for: the
function of the model stays the same.
"""

import json
import os
import sys
from importlib.metadata import version
from typing import Any

#: methods of both caches with arguments that mean the same in both
CALLS: list[tuple[str, dict[str, Any]]] = [
    *(
        (method, {"layer": layer, **options})
        for layer in (None, -1, 0, 3, 6)
        for method, options in (
            ("accumulated_resid", {}),
            ("accumulated_resid", {"incl_mid": True}),
            ("accumulated_resid", {"apply_ln": True}),
            ("decompose_resid", {}),
            ("decompose_resid", {"mode": "attn"}),
            ("decompose_resid", {"mode": "mlp"}),
            ("decompose_resid", {"apply_ln": True}),
        )
    ),
    *(
        ("stack_head_results", {"layer": layer, **options})
        for layer in (None, -1, 3, 6)
        for options in ({}, {"incl_remainder": True}, {"apply_ln": True})
    ),
]
#: names of activations to stack
STACKED = ("z", "resid_post", "pattern")
#: names of activations to keep with `pos_slice`, which TransformerLens would apply to the vision tower, too
SLICED = ["blocks.1.hook_resid_post", "blocks.1.attn.hook_z", "blocks.1.attn.hook_pattern"]
#: forms of `pos_slice`
SLICES: dict[str, Any] = {"range": (3, 8), "negative": (-4, -1), "indices": [3, 8], "one": -2}
TOKENS = (30, 31)


def main(checkpoint: str, inputs_file: str, output_file: str) -> None:
    """Run the model of a checkpoint in TransformerLens, and write what it computes."""
    os.environ["HF_HUB_OFFLINE"] = "1"  # it looks for a tokenizer by name
    import torch
    from safetensors.torch import load_file, save_file
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoModelForImageTextToText, AutoTokenizer

    torch.set_grad_enabled(False)
    model = AutoModelForImageTextToText.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", local_files_only=True
    )
    norm = model.model.language_model.norm
    model.lm_head.weight *= norm.weight
    norm.weight.fill_(1)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    bridge = TransformerBridge.boot_transformers(checkpoint, hf_model=model, tokenizer=tokenizer, device="cpu")
    inputs = load_file(inputs_file)
    ids = inputs.pop("input_ids")
    tensors: dict[str, torch.Tensor] = {}
    logits, cache = bridge.run_with_cache(ids, **inputs)
    tensors["logits"] = logits
    tensors |= {f"cache/{name}": value for name, value in cache.items()}
    for form, pos_slice in SLICES.items():
        _, cut = bridge.run_with_cache(ids, names_filter=SLICED, pos_slice=pos_slice, **inputs)
        tensors |= {f"{form}/{name}": value for name, value in cut.items()}
    labels: list[list[str]] = []
    for number, (method, options) in enumerate(CALLS):
        tensors[f"tools/{number}"], names = getattr(cache, method)(**options, return_labels=True)
        labels.append(names)
    for name in STACKED:
        for layer in (-1, 2):
            tensors[f"stack_activation/{name}/{layer}"] = cache.stack_activation(name, layer)
    components = cache.stack_head_results(-1, incl_remainder=True)
    tensors["logit_attrs"] = cache.logit_attrs(components, TOKENS[0])
    tensors["logit_attrs/difference"] = cache.logit_attrs(components, *TOKENS)
    tensors["logit_lens"] = cache.logit_lens().values
    tensors["sample/z"] = cache.apply_slice_to_batch_dim(0)["z", 1]
    tensors["range/sample/z"] = cache.apply_slice_to_batch_dim((0, 1))["z", 1]
    returned = cache.remove_batch_dim()
    in_place = returned is cache and not cache.has_batch_dim
    tensors["unbatched/z"] = cache["z", 1]
    facts = {"labels": labels, "in_place": in_place, "version": version("transformer-lens")}
    tensors = {name: value.detach().clone().contiguous() for name, value in tensors.items()}
    save_file(tensors, output_file, metadata={"facts": json.dumps(facts)})


if __name__ == "__main__":
    main(*sys.argv[1:])
