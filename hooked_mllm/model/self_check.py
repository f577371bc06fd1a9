"""The check of a wrapped model: every hook point exists, fires, and carries the activation of its name."""

import torch
from PIL import Image
from torch import Tensor

from hooked_mllm.cache.run import CacheRequest, cached_forward
from hooked_mllm.contracts import Model, Tower
from hooked_mllm.errors import HookedMLLMError, HookValueError, UnsupportedModelError
from hooked_mllm.inputs.sample import Sample


def _fail(model: Model, what: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"{model.cfg.model_class} failed its check on loading: {what}. This version of transformers may run the "
        "model differently from the versions that this package supports; `check=False` loads it without this check."
    )


def probe(model: Model) -> tuple[dict[str, Tensor], Sample | None]:
    """A small input: an image and a question if there is a processor, else a few text tokens."""
    if model.processor is None:
        tokens = torch.arange(8, device=model.device)[None] % model.cfg.d_vocab
        visual = torch.tensor(model.family.visual_token_ids(model.hf_model.config), device=model.device)
        tokens = tokens.masked_fill(torch.isin(tokens, visual), 0)
        return {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}, None
    gradient = Image.linear_gradient("L").resize((64, 48)).convert("RGB")
    sample = model.prepare("What is this?", images=gradient)
    return sample.inputs, sample


@torch.no_grad()
def self_check(model: Model) -> None:
    """Verify the wiring; see `HookedMLLM.check`."""
    if model.registry.list_hooks():
        raise UnsupportedModelError("`check` compares with the plain model: call `reset_hooks` first.")
    try:
        inputs, sample = probe(model)
    except HookedMLLMError as error:
        raise _fail(model, f"a sample could not be prepared ({error})") from error
    plain = model(inputs)
    try:
        hooked, cache = cached_forward(model, model.resolve(inputs), CacheRequest())
    except HookValueError as error:
        raise _fail(model, str(error)) from error
    assert hooked is not None
    if not torch.equal(plain, hooked):
        difference = (plain.float() - hooked.float()).abs().max().item()
        raise _fail(model, f"hooked logits differ from plain ones by up to {difference:.3g}")
    expected = [n for n in model.hook_dict if sample is not None or not n.startswith(("vision.", "projector."))]
    silent = [n for n in expected if n not in cache and not (sample is None and n.endswith("hook_deepstack"))]
    if silent:
        raise _fail(model, f"these hook points never fired: {', '.join(silent[:5])}")
    layers: list[tuple[Tower, int]] = [("text", 0), ("text", model.cfg.n_layers - 1)]
    if sample is not None:
        layers.append(("vision", 0))
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-6}.get(model.dtype, 3e-2)
    for tower, layer in layers:
        pattern = cache.pattern(layer, tower=tower)
        if not torch.allclose(pattern.sum(-1), torch.ones_like(pattern[..., 0]), atol=1e-4):
            raise _fail(model, f"the attention patterns of {tower} layer {layer} do not sum to one")
        prefix = () if tower == "text" else (tower,)
        z, v = (cache[(*prefix, name, layer)].float() for name in ("z", "v"))
        # [batch pos kv_head d_head] -> [batch pos head d_head]
        v = v.repeat_interleave(z.shape[2] // v.shape[2], dim=2)
        rebuilt = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
        if not torch.allclose(z, rebuilt, atol=tolerance * float(z.abs().max())):
            raise _fail(model, f"the pattern of {tower} layer {layer} times v is not that layer's z")
    if sample is not None:
        in_layout, tokens = int(sample.mask("visual").sum()), sample.inputs["input_ids"]
        visual = torch.tensor(model.family.visual_token_ids(model.hf_model.config), device=tokens.device)
        in_model = int(torch.isin(tokens, visual).sum())
        if in_layout != in_model:
            raise _fail(model, f"the layout counts {in_layout} visual tokens, the model {in_model}")
