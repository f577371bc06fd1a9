"""The check of a wrapped model: every hook point exists, fires, and carries the activation of its name."""

import torch
from PIL import Image
from torch import Tensor

from hooked_mllm.cache.activation_cache import ActivationCache
from hooked_mllm.cache.run import CacheRequest, cached_forward
from hooked_mllm.contracts import Model, Tower
from hooked_mllm.errors import HookedMLLMError, HookValueError, UnsupportedModelError
from hooked_mllm.hooks.point import HookPoint
from hooked_mllm.hooks.table import is_quadratic
from hooked_mllm.inputs.sample import Sample
from hooked_mllm.wiring.results import ADVICE, active_dropout, head_results, value_at_zero

#: positions at the end of the probe whose patterns, head results and logits are compared
ROWS = 64


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
    # square and small: one tile, or as few tokens as the processor makes
    gradient = Image.linear_gradient("L").resize((16, 16)).convert("RGB")
    sample = model.prepare("What is this?", images=gradient)
    return sample.inputs, sample


@torch.no_grad()
def self_check(model: Model) -> None:
    """Verify the wiring; see `HookedMLLM.check`."""
    try:
        _check(model)
    except (HookedMLLMError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # damaged or falsely declared weights raise errors of the libraries that run them
        raise _fail(model, f"a run of the probe raised {type(error).__name__} ({error})") from error


def _check(model: Model) -> None:
    if model.registry.list_hooks():
        raise UnsupportedModelError("`check` compares with the plain model: call `reset_hooks` first.")
    if (dropout := active_dropout(model.hf_model)) is not None:
        raise UnsupportedModelError(
            f"The dropout {dropout!r} is active, so that two runs differ: call `eval()` on the model before it is "
            "wrapped."
        )
    try:
        inputs, sample = probe(model)
    except HookedMLLMError as error:
        raise _fail(model, f"a sample could not be prepared ({error})") from error
    plain = model(inputs, logits_to_keep=ROWS)
    visual = sample is not None
    layers: list[tuple[Tower, int]] = [("text", 0), ("text", model.cfg.n_layers - 1)]
    if visual:
        layers.append(("vision", 0))
    hooked, cache, kept = _hooked_run(model, inputs, visual, layers)
    if not torch.equal(plain, hooked):
        difference = (plain.float() - hooked.float()).abs().max().item()
        raise _fail(model, f"hooked logits differ from plain ones by up to {difference:.3g}")
    for tower, layer in dict.fromkeys(layers):
        _check_pattern(model, cache, kept, tower, layer)
    _check_results(model, kept)
    if sample is not None:
        _check_layout(model, sample)


def _hooked_run(
    model: Model, inputs: dict[str, Tensor], visual: bool, layers: list[tuple[Tower, int]]
) -> tuple[Tensor, ActivationCache, dict[str, Tensor]]:
    """Logits of a run with a hook on every point, its patterns, and z, v and attention outputs by name."""
    names = [n for n in model.hook_dict if visual or not n.startswith(("vision.", "projector."))]
    names = [n for n in names if visual or not n.endswith("hook_deepstack")]
    kept: dict[str, Tensor] = {}

    def keep(x: Tensor, hook: HookPoint) -> None:
        if hook.name.endswith("hook_v") and (hook.tower, hook.block) in layers:
            kept[hook.name] = x
        elif hook.name.endswith(("hook_z", "hook_attn_out")):
            kept[hook.name] = x[:, -ROWS:].clone()

    # head results are computed from z below; patterns are kept as q and k
    plainly = [n for n in names if not is_quadratic(n) and not n.endswith("hook_result")]
    patterns, length = [n for n in names if n.endswith("hook_pattern")], inputs["input_ids"].shape[1]
    queries = slice(max(0, length - ROWS), length)
    request = CacheRequest(patterns, queries=queries, forward={"logits_to_keep": ROWS})
    try:
        with model.registry.attached(plainly, keep, reads_only=True):
            hooked, cache = cached_forward(model, model.resolve(inputs), request)
    except HookValueError as error:
        raise _fail(model, str(error)) from error
    silent = [n for n in patterns if n not in cache]
    if silent:
        raise _fail(model, f"these hook points never fired: {', '.join(silent[:5])}")
    assert hooked is not None
    return hooked, cache, kept


def _check_layout(model: Model, sample: Sample) -> None:
    in_layout, tokens = int(sample.mask("visual").sum()), sample.inputs["input_ids"]
    token_ids = torch.tensor(model.family.visual_token_ids(model.hf_model.config), device=tokens.device)
    in_model = int(torch.isin(tokens, token_ids).sum())
    if in_layout != in_model:
        raise _fail(model, f"the layout counts {in_layout} visual tokens, the model {in_model}")


def _tolerance(model: Model) -> float:
    return {torch.float32: 1e-4, torch.float64: 1e-6}.get(model.dtype, 3e-2)


def _check_pattern(model: Model, cache: ActivationCache, kept: dict[str, Tensor], tower: Tower, layer: int) -> None:
    """The rows of the pattern sum to one, and the pattern times v is z."""
    pattern = cache.pattern(layer, tower=tower)[:, :, -ROWS:]
    if not torch.allclose(pattern.sum(-1), torch.ones_like(pattern[..., 0]), atol=1e-4):
        raise _fail(model, f"the attention patterns of {tower} layer {layer} do not sum to one")
    prefix = f"{'vision.' if tower == 'vision' else ''}blocks.{layer}.attn.hook_"
    z, v = kept[f"{prefix}z"].float(), kept[f"{prefix}v"].float()
    # [batch pos kv_head d_head] -> [batch pos head d_head]
    v = v.repeat_interleave(z.shape[2] // v.shape[2], dim=2)
    rebuilt = torch.einsum("bhqk,bkhd->bqhd", pattern, v)
    if not torch.allclose(z, rebuilt, atol=_tolerance(model) * float(z.abs().max())):
        raise _fail(model, f"the pattern of {tower} layer {layer} times v is not that layer's z")


def _check_results(model: Model, kept: dict[str, Tensor]) -> None:
    """What heads write, and the output projection at zero, sum to the attention output of each layer."""
    for tower, sites in (("text", model.wiring.text), ("vision", model.wiring.vision)):
        parts = getattr(model.family, tower)
        for layer, (site, block) in enumerate(zip(sites, parts.modules(model.hf_model), strict=False)):
            name = site.points["z"].name
            out = kept.get(name.replace("attn.hook_z", "hook_attn_out"))
            gain = 1 if parts.block.attn_gain is None else getattr(block, parts.block.attn_gain)
            if out is None or (isinstance(gain, Tensor) and gain.is_meta):  # text alone; offloaded
                continue
            o_proj, z = model.wiring.output_projection(site), kept[name]
            total = head_results(z, o_proj, dtype=torch.promote_types(z.dtype, torch.float32)).sum(-2)
            if (at_zero := value_at_zero(o_proj, z.flatten(-2))) is not None:
                total = total + at_zero.to(total)
            total = total * gain
            packed = any(not p.is_floating_point() for p in o_proj.parameters())  # z may be quantised, too
            difference = float((total - out).abs().max() / out.abs().max().clamp(min=1e-6))
            if not difference <= (0.1 if packed else _tolerance(model)):
                raise _fail(
                    model,
                    f"the results of the heads of {tower} layer {layer} do not sum to its attention output (they "
                    f"differ by {difference:.1%}): its output projection, a {type(o_proj).__name__}, is not linear. "
                    f"{ADVICE}",
                )
