"""Variants of a tiny decoder and short benchmarks of them."""

from transformers import AttentionInterface, AttentionMaskInterface

from hooked_mllm import HeadSet
from hooked_mllm.bench import bench_prefill, prefill_variants

SIZE = {"sink": 4, "window": 16}
TWO = HeadSet(["L0H1", "L2H3"], n_layers=3, n_heads=4)


def variants(*backends, heads=None):
    return prefill_variants(backends, heads or {2: TWO}, implementation="naive", **SIZE)


def bench(model, found, contexts, **more):
    return bench_prefill(model, found, contexts, **{"name": "tiny", "runs": 2, "warm_up": 1, "progress": False, **more})


def registered(name, attention):
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, lambda **_: None)
    return name
