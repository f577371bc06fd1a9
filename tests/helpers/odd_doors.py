"""The public callables with right arguments: the model, caches, heads and inputs; see `helpers.odd_calls`."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

import hooked_mllm as hm
from helpers.odd_edits import of_edits
from helpers.odd_metrics import of_metrics, of_objectives, of_plots
from helpers.odd_values import DATA, FEW, Door, Fresh, keeping, then
from hooked_mllm import heads, metrics, toys


def doors(folder: Path) -> Iterator[Door]:
    """Every public callable with its right arguments; an argument that must be new in each call is a function."""
    model = hm.HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32")
    task = toys.VisualRetrieval(pages=1)
    sample, other = task.samples(model, 2)
    answered = task.samples(model, 1, answer=True)[0]
    _, cache = model.run_with_cache(sample)
    _, steps = model.run_with_cache(sample, "*hook_pattern", generate={"max_new_tokens": 2})
    scores = model.measure([sample], metrics.RetrievalAttentionMass(), progress=False)
    rows = heads.SampleScores(torch.rand(9, scores.n_layers, scores.n_heads))
    some = scores.top(2)
    layout, picture = sample.layout, Image.new("RGB", (64, 64))
    box, frames = hm.Box(0, 0, 16, 16), np.zeros((4, 64, 64, 3), np.uint8)
    video = toys.VideoRetrieval().samples(model, 1)[0]
    yield from _of_model(model, sample, other, picture, frames, box, folder)
    yield from _of_caches(cache, steps, folder)
    yield from _of_heads(scores, rows, some, folder)
    yield from _of_inputs(sample, other, layout, video, box, frames)
    yield from of_edits(model, sample, other, cache, some)
    yield from of_metrics(model, sample, answered, scores, some)
    yield from of_objectives(model, sample, picture, folder)
    yield from of_plots(sample, scores, some, model)


def _of_model(model, sample, other, picture, frames, box, folder) -> Iterator[Door]:
    hook = ("blocks.0.attn.hook_z", lambda z, hook: z)
    load = hm.HookedMLLM.from_pretrained
    yield Door("from_pretrained", load, 12, path_or_id="toy-qwen3-vl", check=False)
    for name, value in {
        "dtype": "float32",
        "device": "cpu",
        "revision": None,
        "attention": "sdpa",
        "trust_remote_code": False,
        "use_safetensors": True,
        "ignore_mismatched_sizes": False,
        "quantization_config": None,
        "variant": None,
        "subfolder": "",
        "cache_dir": None,
        "device_map": None,
        "attn_implementation": None,
    }.items():
        yield Door("from_pretrained", keeping(load, path_or_id="toy-qwen3-vl", check=False), 4, **{name: value})
    yield Door(
        "HookedMLLM", hm.HookedMLLM, FEW, hf_model=model.hf_model, processor=model.processor, name="x", revision="y"
    )
    yield Door("from_model", hm.HookedMLLM.from_model, FEW, hf_model=model.hf_model, processor=model.processor)
    yield Door(
        "prepare",
        model.prepare,
        question="what color is the star ?",
        images=picture,
        target=box,
        system="red",
        answer="red",
        id="a",
        min_overlap=0.5,
        padding_side="left",
    )
    yield Door("prepare video", model.prepare, 16, question="what color is the star ?", videos=(frames, 2.0), fps=1.0)
    for name in ("num_frames", "max_frames"):
        right = {"question": "what color is the star ?", "videos": DATA / "nasa_13013.mp4"}
        yield Door("prepare video", keeping(model.prepare, **right), 12, **{name: 2})
    yield Door("resolve", model.resolve, inputs=sample)
    yield Door("forward", model, inputs=sample, return_type="logits", stop_at_layer=1)
    yield Door("run", model.run, FEW, inputs=model.resolve(sample), return_type="logits", stop_at_layer=1)
    yield Door("run_trunk", model.run_trunk, FEW, inputs=model.resolve(sample))
    yield Door("run_generate", model.run_generate, FEW, inputs=model.resolve(sample), max_new_tokens=1)
    yield Door(
        "run_with_cache",
        model.run_with_cache,
        8,
        inputs=sample,
        names_filter="*hook_z",
        device="cpu",
        incl_bwd=False,
        stop_at_layer=1,
        return_logits=True,
        pos_slice="last",
        remove_batch_dim=False,
        reset_hooks_end=True,
        clear_contexts=False,
        return_cache_object=True,
    )
    yield Door(
        "run_with_cache",
        keeping(model.run_with_cache, inputs=sample),
        8,
        names_filter="*hook_pattern",
        queries="question",
        keys="visual",
    )
    yield Door(
        "run_with_cache",
        keeping(model.run_with_cache, inputs=sample),
        12,
        generate=Fresh(lambda: {"max_new_tokens": 1}),
    )
    yield Door(
        "run_with_hooks",
        model.run_with_hooks,
        8,
        inputs=sample,
        fwd_hooks=[hook],
        bwd_hooks=(),
        reset_hooks_end=True,
        clear_contexts=False,
    )
    yield Door("hooks", model.hooks, fwd_hooks=[hook], bwd_hooks=(), reset_hooks_end=True, clear_contexts=False)
    for name, value in {
        "max_new_tokens": 1,
        "do_sample": False,
        "temperature": 1.0,
        "top_k": 5,
        "top_p": 0.9,
        "num_beams": 1,
        "eos_token_id": 2,
        "min_new_tokens": 0,
        "repetition_penalty": 1.0,
        "num_return_sequences": 1,
        "use_cache": True,
        "stopping_criteria": None,
        "logits_processor": None,
        "generation_config": None,
        "output_scores": False,
        "return_dict_in_generate": False,
        "no_such_option": None,
        "past_key_values": None,
        "streamer": None,
        "cache_implementation": None,
        "length_penalty": 1.0,
        "bad_words_ids": None,
        "stop_strings": None,
    }.items():
        right = {"inputs": sample} | ({} if name == "max_new_tokens" else {"max_new_tokens": 1})
        yield Door("generate", keeping(model.generate, **right), 9, **{name: value})
    yield Door("generate", model.generate, 12, inputs=sample, max_new_tokens=1)
    for name in ("add_hook", "add_perma_hook"):
        yield Door(name, then(getattr(model, name), model.reset_hooks), name=hook[0], hook=hook[1], dir="fwd")
    yield Door(
        "add_hook",
        then(keeping(model.add_hook, name=hook[0], hook=hook[1]), model.reset_hooks),
        level=1,
        is_permanent=False,
        prepend=False,
    )
    yield Door("reset_hooks", model.reset_hooks, direction="both", including_permanent=True, level=None)
    yield Door(
        "remove_all_hook_fns", model.remove_all_hook_fns, direction="both", including_permanent=False, level=None
    )
    yield Door("list_hooks", model.list_hooks, name_filter=hook[0], dir="both", including_permanent=True)
    yield Door("intervene", lambda it: model.intervene(it), it=hm.HeadAblation("L1H1", mode="zero", phase="both"))
    yield Door("attention", model.attention, implementation="eager", tower="text")
    yield Door("output_projection", model.output_projection, layer=0)
    yield Door("unembed", model.unembed, tokens=3, batch=1)
    yield Door("vision_layout", model.vision_layout, sample=sample)
    yield Door("vision_positions", model.vision_positions, inputs=sample, region=box, min_overlap=0.0)
    for name in ("image", "video", "view", "tile"):
        yield Door("vision_positions", keeping(model.vision_positions, inputs=sample), **{name: None})
    yield Door("to", lambda where: model.to(where) and model.to("cpu", torch.float32), where="cpu")
    yield Door(
        "measure",
        model.measure,
        12,
        samples=[sample, other],
        metrics=Fresh(metrics.RetrievalAttentionMass),
        save_every=20,
        progress=False,
    )
    yield Door(
        "measure",
        keeping(model.measure, samples=[sample], progress=False),
        9,
        metrics=Fresh(metrics.RetrievalAttentionMass),
        checkpoint=folder / "state",
    )


def _of_caches(cache, steps, folder) -> Iterator[Door]:
    yield Door("cache[]", cache.__getitem__, key="blocks.0.attn.hook_z")
    yield Door("cache[,]", lambda name, layer: cache[name, layer], name="z", layer=0)
    yield Door("in cache", cache.__contains__, key="z")
    yield Door("cache.entry", cache.entry, key="blocks.0.attn.hook_z")
    yield Door("cache.name_of", cache.name_of, key="blocks.0.attn.hook_z")
    yield Door(
        "pattern", cache.pattern, layer=2, queries="question", keys="visual", heads=[1], tower="text", scores=False
    )
    yield Door("positions", cache.positions, wanted="question", batch=1, length=99)
    yield Door("sample", cache.sample, index=0)
    yield Door("cache.to", cache.to, device="cpu")
    yield Door("cache.save", cache.save, 12, path=folder / "cache")
    for kind, held in ((hm.ActivationCache, cache), (hm.GenerationCache, steps)):
        held.save(folder / kind.__name__)
        yield Door(f"{kind.__name__}.load", kind.load, 16, path=folder / kind.__name__, model=None)
    yield Door("accumulated_resid", cache.accumulated_resid, layer=1, incl_mid=True, apply_ln=True, return_labels=False)
    yield Door(
        "decompose_resid",
        cache.decompose_resid,
        layer=1,
        mode="attn",
        incl_embeds=True,
        apply_ln=False,
        return_labels=True,
    )
    yield Door("stack_activation", cache.stack_activation, name="z", layer=1)
    yield Door("stack_activation part", keeping(cache.stack_activation, name="z"), part=None)
    yield Door(
        "stack_head_results",
        cache.stack_head_results,
        12,
        layer=1,
        incl_remainder=False,
        apply_ln=False,
        return_labels=False,
    )
    stack = cache.accumulated_resid()
    yield Door("apply_ln_to_stack", cache.apply_ln_to_stack, stack=stack, layer=None)
    yield Door("apply_slice_to_batch_dim", cache.apply_slice_to_batch_dim, batch_slice=0)
    yield Door("logit_attrs", cache.logit_attrs, residual_stack=stack, tokens=3, incorrect_tokens=4, positions="last")
    yield Door("logit_lens", cache.logit_lens, 16, positions="last", layer=1, incl_mid=False, return_labels=False)
    yield Door(
        "ActivationCache",
        hm.ActivationCache,
        entries={},
        n_layers={"text": 6, "vision": 4},
        masks=None,
        model=None,
        has_batch_dim=True,
    )
    yield Door("GenerationCache", hm.GenerationCache, steps=list(steps.steps))
    yield Door("GenerationCache.save", steps.save, FEW, path=folder / "steps")


def _of_heads(scores, rows, some, folder) -> Iterator[Door]:
    yield Door(
        "HeadScores", hm.HeadScores, values=[[0.1, 0.2], [0.3, 0.4]], name="x", provenance={}, counts=[1, 1], missing=()
    )
    yield Door("SampleScores", heads.SampleScores, values=rows.values, name="x", provenance={})
    for name, right in {
        "top": {"k": 3},
        "bottom": {"k": 3},
        "mean": {"heads": some},
        "overlap": {"other": scores, "k": 3},
        "percentile_mask": {"percentile": 95.0},
        "random": {"k": 3, "seed": 0},
        "spearman": {"other": scores},
        "table": {"k": 3},
        "to_kv": {"n_kv_heads": 2, "reduce": "mean"},
        "to_query": {"n_heads": scores.n_heads},
        "__getitem__": {"head": "L1H1"},
        "save": {"path": folder / "scores"},
    }.items():
        yield Door(f"scores.{name}", getattr(scores, name), **right)
    yield Door("scores.random", scores.random, like=some, exclude=some)
    yield Door("scores.plot", scores.plot, title="a", top=3, vmin=0.0, vmax=1.0, cmap="viridis")
    for held in (scores, rows):
        held.save(folder / type(held).__name__)
        yield Door(f"{type(held).__name__}.load", type(held).load, path=folder / type(held).__name__)
    yield Door("HeadSet", hm.HeadSet, heads=[(1, 1)], n_layers=6, n_heads=8)
    yield Door("HeadSet.parse", hm.HeadSet.parse, text="L1H1", n_layers=6, n_heads=8)
    yield Door("HeadSet.from_mask", hm.HeadSet.from_mask, mask=torch.ones(2, 2, dtype=torch.bool))
    for name in ("union", "intersection", "difference"):
        yield Door(f"HeadSet.{name}", getattr(some, name), other=some)
    yield Door("HeadSet.to_mask", some.to_mask, device="cpu")
    yield Door("in HeadSet", some.__contains__, head=(1, 1))
    yield Door("HeadSet[]", some.__getitem__, index=0)
    yield Door("bootstrap", heads.bootstrap, scores=rows, n=10, level=0.95, seed=0)
    yield Door("head_name", heads.head_name, layer=1, head=1)
    yield Door("head_names", heads.head_names, heads=some)
    yield Door("heads_from_gates", heads.heads_from_gates, gates=[[0.1, 0.9]], n_heads=2, threshold=0.5)
    yield Door("heads_from_gates", keeping(heads.heads_from_gates, gates=[[0.1, 0.9]], n_heads=2), sparsity=0.5)
    yield Door("heads_in_layer", heads.heads_in_layer, heads="L1H1", layer=1, shape=(6, 8))
    yield Door("parse_heads", heads.parse_heads, heads=some, shape=(6, 8), allow_empty=True)
    yield Door("overlap_across_seeds", heads.overlap_across_seeds, scores=rows, k=3, n_samples=2, seeds=[0, 1])
    yield Door("pairwise_overlap", heads.pairwise_overlap, rankings=[scores, scores], k=3)
    yield Door("rho_half", heads.rho_half, scores=scores)
    yield Door("stability", metrics.stability, scores_by_task={"a": scores, "b": scores}, percentile=95.0)


def _of_inputs(sample, other, layout, video, box, frames) -> Iterator[Door]:
    yield Door("Box", hm.Box, x0=0, y0=0, x1=16, y1=16, image=0)
    yield Door("Mask", hm.Mask, pixels=np.ones((64, 64), bool), image=0)
    yield Door("Frames", hm.Frames, start_s=0.0, end_s=1.0, video=0, box=box)
    yield Door("Pages", hm.Pages, images=[0])
    yield Door("Tube", hm.Tube, boxes={0.0: box}, video=0)
    yield Door("Tube.at", hm.Tube({0.0: box}).at, time_s=0.0, slack_s=0.001)
    yield Door("Video", hm.Video, frames=frames, times_s=(0.0, 0.5, 1.0, 1.5), fps=2.0, source="x")
    yield Door("Video.from_frames", hm.Video.from_frames, frames=frames, fps=2.0, source="x")
    yield Door("Video.from_frames", keeping(hm.Video.from_frames, frames=frames), times_s=[0.0, 0.5, 1.0, 1.5])
    yield Door("read_video", hm.read_video, path=DATA / "nasa_13013.mp4", fps=1.0, max_frames=2)
    yield Door("read_video", keeping(hm.read_video, path=DATA / "nasa_13013.mp4"), 12, num_frames=2)
    yield Door(
        "Sample",
        hm.Sample,
        inputs=dict(sample.inputs),
        layout=layout,
        question="x",
        answer=None,
        images=(),
        videos=(),
        target=None,
        target_mask=None,
        id=None,
        template=None,
        pad_token_id=0,
    )
    for name in ("mask", "host_mask"):
        yield Door(f"Sample.{name}", getattr(sample, name), name="question")
    yield Door("Sample.to", sample.to, device="cpu", dtype=torch.float32)
    batch = hm.SampleBatch.collate([sample, other])
    yield Door("collate", hm.SampleBatch.collate, samples=[sample, other], padding_side="left")
    yield Door("SampleBatch.mask", batch.mask, name="question")
    yield Door("SampleBatch.to", batch.to, device="cpu", dtype=torch.float32)
    yield Door("layout.mask", layout.mask, name="question")
    yield Door("layout.spans", layout.spans, kind="question")
    yield Door("layout.region", layout.region, region=box, min_overlap=0.0)
    yield Door("layout.region", keeping(layout.region, region=box), image=0)
    yield Door("layout.target", layout.target, region=box, min_overlap=0.0)
    yield Door("layout.pages", layout.pages, images=[0])
    yield Door("layout.padded", layout.padded, left=1, right=1)
    yield Door("layout.tokens", layout.tokens, image=0, view=None)
    yield Door("layout.chance", layout.chance, mask=layout.visual, queries="question")
    values = torch.rand(len(layout.visual))
    yield Door("layout.to_image", layout.to_image, values=values, image=0, frame=0)
    yield Door("layout.frames", video.layout.frames, video=0, start_s=0.0, end_s=1.0)
