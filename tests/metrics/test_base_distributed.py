"""Two processes with unequal shares of the samples compute what one process computes."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from helpers.attention_reference import random_layers
from hooked_mllm.contracts import ModelInfo
from hooked_mllm.errors import InputError
from hooked_mllm.metrics import KeyTokenCoverage, KeyTokenRatio, RetrievalAttentionMass, VisionMass

INFO = ModelInfo(n_layers=3, n_heads=4, n_kv_heads=2)


def make():
    scores = RetrievalAttentionMass()
    scores.update(view=random_layers(seed=9).view())
    ranking = scores.compute()
    return [
        RetrievalAttentionMass().keep_samples(),
        KeyTokenRatio(share=0.2),
        KeyTokenCoverage(ranking, share=0.2),
        VisionMass(),
    ]


def results(metrics) -> list[np.ndarray]:
    ram, ktr, ktc, vision = metrics
    after = [ram.compute(), ktr.compute(), ktr.hit_rate(), vision.compute()]
    return [
        *(scores.values.numpy() for scores in after),
        np.array(ktc.compute().coverage),
        ram.compute().counts.numpy(),
        ram.sample_scores().values.numpy(),
    ]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    layers = random_layers(lengths=(23, 17, 20))
    metrics = make()
    for metric in metrics:
        metric.setup(INFO)
        # the last metric sees no sample at all on the second process
        for b in ([0, 1], [2])[rank] if metric is not metrics[-1] or rank == 0 else []:
            metric.update(view=layers.view(samples=slice(b, b + 1)))
    never = RetrievalAttentionMass().keep_samples()  # not even set up on the second process
    if rank == 0:
        never.update(view=layers.view())
        never.note_samples(["a", "b", "c"])
    np.testing.assert_allclose(never.compute().values, metrics[0].compute().values, atol=1e-7)
    assert never.compute().provenance["sample_ids"] == ["a", "b", "c"] and len(never.sample_scores()) == 3
    for empty in (RetrievalAttentionMass(), KeyTokenCoverage(metrics[2].ranking), RetrievalAttentionMass()):
        empty.setup(INFO)
        with pytest.raises(InputError, match="has seen no sample"):
            empty.compute()
    empty.update(view=layers.view(samples=slice(rank, rank + 1)))
    assert empty.compute().counts.eq(2).all()
    found = results(metrics)
    np.savez(Path(folder) / f"{rank}.npz", *found)
    assert int(metrics[0].count.max()) == (2, 1)[rank]  # its own samples again, once the result is out
    dist.destroy_process_group()


@pytest.mark.slow
def test_processes_pool_their_samples(tmp_path):
    layers = random_layers(lengths=(23, 17, 20))
    metrics = make()
    for metric in metrics[:-1]:
        metric.update(view=layers.view())
    metrics[-1].update(view=layers.view(samples=slice(0, 2)))
    reference = results(metrics)
    mp.spawn(worker, args=(str(tmp_path),), nprocs=2)
    for rank in range(2):
        with np.load(tmp_path / f"{rank}.npz") as found:
            for name, expected in zip(found.files, reference, strict=True):
                np.testing.assert_allclose(found[name], expected, atol=1e-7)
