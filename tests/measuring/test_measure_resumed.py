"""`measure` stopped and resumed from a checkpoint, and its results merged from shards and processes."""

import errno
import json

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from helpers.cache_witness import close, hooked
from helpers.measured import FirstToken, four, no_taps, run
from helpers.tiny import tiny_image
from hooked_mllm import Box
from hooked_mllm.errors import CacheFileError, InputError
from hooked_mllm.measuring.measure import measure
from hooked_mllm.metrics import RetrievalAttentionMass, VisionMass


class InPlace(FirstToken):
    """A user's metric whose state is changed in place."""

    def commit(self, pieces):
        state = self.total
        super().commit(pieces)
        self.total = state.copy_(self.total)


class Stopping(FirstToken):
    """Interrupted at one of its calls."""

    at = 0

    def score(self, view):
        Stopping.at -= 1
        if Stopping.at == 0:
            raise KeyboardInterrupt
        return super().score(view)

    def __repr__(self):
        return "FirstToken()"


# groups of one layer: three calls a sample; within a sample, at its end (another metric has it whole), at the start
@pytest.mark.parametrize("at", [1, 5, 6, 9, 10])
def test_stopped_at_any_point_and_resumed_it_is_as_if_it_ran_through(at, tmp_path):
    family, path = "qwen3_vl", tmp_path / "state"
    options = {"progress": False, "group_bytes": 1}
    expected = measure(hooked(family), four(family), [InPlace(), VisionMass(), FirstToken()], **options)
    Stopping.at = at
    with pytest.raises(KeyboardInterrupt):
        measure(hooked(family), four(family), [InPlace(), VisionMass(), Stopping()], checkpoint=path, **options)
    assert no_taps(family) and [p.name for p in tmp_path.iterdir()] == (["state"] if at > 3 else [])
    resumed = measure(hooked(family), four(family), [InPlace(), VisionMass(), FirstToken()], checkpoint=path, **options)
    for a, b in zip(resumed, expected, strict=True):
        close(a.values, b.values, 1e-12)
        assert torch.equal(a.counts, b.counts)
        assert a.provenance["sample_ids"] == b.provenance["sample_ids"]
    # finished: nothing is measured again
    registry = hooked(family).registry
    watching = registry.attach("hook_embed", lambda x, hook: pytest.fail("it ran again"), reads_only=True)
    again = measure(hooked(family), four(family), [InPlace(), VisionMass(), FirstToken()], checkpoint=path, **options)
    registry.detach(watching)
    assert torch.equal(again[0].values, resumed[0].values)


def test_the_metrics_that_were_stopped_can_resume_themselves(tmp_path):
    metrics = [VisionMass(), Stopping()]
    options = {"progress": False, "group_bytes": 1, "checkpoint": tmp_path / "state"}
    Stopping.at = 6
    with pytest.raises(KeyboardInterrupt):
        measure(hooked("qwen3_vl"), four("qwen3_vl"), metrics, **options)
    resumed = measure(hooked("qwen3_vl"), four("qwen3_vl"), metrics, **options)
    assert all((scores.counts == 4).all() for scores in resumed)


def test_a_checkpoint_of_an_earlier_version_resumes_with_all_ids(tmp_path):
    family, path = "qwen3_vl", tmp_path / "state"
    run(family, four(family)[:2], VisionMass(), checkpoint=path)
    tensors, ((name, text),) = load_file(path), safe_open(path, "pt").metadata().items()
    header = json.loads(text)
    del tensors["0/records"], header["digest"]
    save_file(tensors, path, {name: json.dumps(header)})
    with pytest.warns(UserWarning, match="has no digest"):
        resumed = run(family, four(family), VisionMass(), checkpoint=path)
    assert resumed.provenance["sample_ids"] == [sample.id for sample in four(family)]
    close(resumed.values, run(family, four(family), VisionMass()).values, 1e-12)


def test_more_samples_than_before_resume_where_it_stopped(tmp_path):
    family, path = "internvl", tmp_path / "state"
    first = run(family, four(family)[:2], VisionMass(), checkpoint=path, save_every=1)
    assert (first.counts == 2).all()
    scores = run(family, four(family), VisionMass(), checkpoint=path)
    close(scores.values, run(family, four(family), VisionMass()).values, 1e-12)


def test_a_checkpoint_of_something_else_is_rejected(tmp_path):
    family, path = "qwen3_vl", tmp_path / "state"
    samples = four(family)
    run(family, samples[:3], VisionMass(), checkpoint=path)
    before = path.read_bytes()
    for metrics in (RetrievalAttentionMass(), VisionMass(queries="last"), [VisionMass(), FirstToken()]):
        with pytest.raises(CacheFileError, match="Use another file, or the same metrics"):
            run(family, samples, metrics, checkpoint=path)
    other_target = hooked(family).prepare(
        "What colour is the mug?",
        images=tiny_image(32, 24, seed=0),
        answer="the answer is red",
        target=Box(16, 8, 32, 24),
    )
    for others in ([samples[1], samples[0], samples[2]], [*samples[:2], samples[3]], [other_target, *samples[1:]]):
        with pytest.raises(CacheFileError, match="other contents"):
            run(family, others, VisionMass(), checkpoint=path)
    with pytest.raises(CacheFileError, match="holds 3 samples; this run has 2"):
        run(family, samples[:2], VisionMass(), checkpoint=path)
    assert path.read_bytes() == before
    for damage in (b"", b"\x80\x04junk", before[: len(before) // 2]):
        path.write_bytes(damage)
        with pytest.raises(CacheFileError, match=r"state is (damaged|a pickle).*expected 'hooked_mllm.measure/3'"):
            run(family, samples, VisionMass(), checkpoint=path)
    hooked(family).run_with_cache(samples[0], "hook_embed")[1].save(path)
    with pytest.raises(CacheFileError, match="expected 'hooked_mllm.measure/3'"):
        run(family, samples, VisionMass(), checkpoint=path)


def test_a_state_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "state"
    run("qwen3_vl", four("qwen3_vl")[:1], VisionMass(), checkpoint=path)
    before = path.read_bytes()

    def half(tensors, name, metadata):
        assert name != str(path)
        with open(name, "wb") as file:  # noqa: PTH123
            file.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("hooked_mllm.storage.files.save_file", half)
    with pytest.raises(CacheFileError, match="state cannot be written: the disk is full"):
        run("qwen3_vl", four("qwen3_vl"), VisionMass(), checkpoint=path, save_every=1)
    assert list(tmp_path.iterdir()) == [path] and path.read_bytes() == before


def test_the_checkpoint_can_be_written_or_nothing_is_measured(tmp_path):
    def stop():
        pytest.fail("a sample was prepared")
        yield

    (tmp_path / "file").write_text("kept")
    for path, message in ((tmp_path, "is a folder"), (tmp_path / "file" / "state", "a part of the path is a file")):
        with pytest.raises(CacheFileError, match=f"cannot be written: .*{message}"):
            run("qwen3_vl", stop(), VisionMass(), checkpoint=path)
    run("qwen3_vl", four("qwen3_vl")[:1], VisionMass(), checkpoint=str(tmp_path / "new" / "folder" / "state"))
    assert [p.name for p in (tmp_path / "new" / "folder").iterdir()] == ["state"]


# -- several processes -----------------------------------------------------------------------------------------------


def test_shards_merge(family):
    shards = [RetrievalAttentionMass(), RetrievalAttentionMass()]
    run(family, four(family)[:3], shards[0])
    run(family, four(family)[3:], shards[1])
    shards[0].merge_state(shards[1])
    close(shards[0].compute().values, run(family, four(family), RetrievalAttentionMass()).values, 1e-12)


def _worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    alone = torch.stack([run("qwen3_vl", sample, VisionMass()).values for sample in four("qwen3_vl")])
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    scores = run("qwen3_vl", four("qwen3_vl")[:3] if rank == 0 else four("qwen3_vl")[3:], [VisionMass(), FirstToken()])
    torch.save([s.values for s in scores], f"{folder}/{rank}.pt")
    assert [s.provenance["sample_ids"] for s in scores] == [[sample.id for sample in four("qwen3_vl")]] * 2
    # this process alone has samples, then the other one, then none
    for owner in (0, 1):
        own = four("qwen3_vl")[:3] if rank == owner else []
        scores = run("qwen3_vl", own, VisionMass())
        assert scores.counts.eq(3).all() and len(scores.provenance["sample_ids"]) == 3
        close(scores.values, alone[:3].mean(0), 1e-9)
    metric = VisionMass()
    with pytest.raises(InputError, match="has seen no sample"):
        run("qwen3_vl", [], metric)
    own = four("qwen3_vl")[2 * rank : 2 * rank + 2]  # the metric can be used after the error
    close(run("qwen3_vl", own, metric).values, alone.mean(0), 1e-9)
    assert metric.count.eq(2).all()
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    expected = run("qwen3_vl", four("qwen3_vl"), [VisionMass(), FirstToken()])
    for rank in range(2):
        for values, scores in zip(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected, strict=True):
            close(values, scores.values, 1e-9)
