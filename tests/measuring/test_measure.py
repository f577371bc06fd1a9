"""`measure` against patterns reduced by hand, in any grouping, stopped and resumed, alone and in two processes."""

import errno
import math

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import hooked_mllm.measuring.attention_rows as rows_module
from helpers.cache_witness import batch, close, film, hooked, sample, text_sample
from helpers.tiny import tiny_image, tiny_model
from hooked_mllm import Box, HookedMLLM
from hooked_mllm.errors import CacheFileError, InputError, LayoutError, NumericsError
from hooked_mllm.measuring.measure import measure, named_queries
from hooked_mllm.metrics import HeadMetric, KeyTokenRatio, RetrievalAttentionMass, VisionMass


class FirstToken(HeadMetric):
    """A user's metric: what the question pays to the first token."""

    def score(self, view):
        return view.profile("question")[..., 0]


class Entropy(HeadMetric):
    """Another, from whole rows."""

    def score(self, view):
        rows = view.rows("question", reduce=lambda rows: -(rows * rows.clamp(min=1e-30).log()).sum(-1))
        return view.average(rows, "question")


class InPlace(FirstToken):
    """Another, whose state is changed in place."""

    def commit(self, pieces):
        state = self.total
        super().commit(pieces)
        self.total = state.copy_(self.total)


def profiles(family, inputs, queries="question") -> torch.Tensor:
    """[layer head key] of one sample, the mean row over its queries, from its cached patterns."""
    _, cache = hooked(family).run_with_cache(inputs, "blocks.*hook_pattern")
    mask = inputs.mask(queries)[0]
    return torch.stack([cache["pattern", i][0][:, mask].double().mean(1) for i in range(3)])


def by_hand(family, samples, queries="question", keys="target") -> torch.Tensor:
    each = [profiles(family, s, queries)[..., s.mask(keys)[0]].sum(-1) for s in samples]
    return torch.stack(each).mean(0)


def run(family, samples, metrics, **options):
    return hooked(family).measure(samples, metrics, progress=False, **options)


def four(family):
    """Four samples: two, and the same questions about other pictures."""
    model = hooked(family)
    more = [
        model.prepare(
            "What colour is the mug?", images=tiny_image(32, 24, seed=i), target=Box(0, 0, 16, 16), id=f"more-{i}"
        )
        for i in (31, 32)
    ]
    return [sample(family, 0), sample(family, 1), *more]


def no_taps(family) -> bool:
    model = hooked(family)
    return not any(site.taps for site in model.wiring.text) and not model.list_hooks()


# -- the numbers -----------------------------------------------------------------------------------------------------


def test_scores_are_those_of_cached_patterns(family):
    samples = four(family)
    ram, mass, last, sink, entropy = run(
        family, samples, [RetrievalAttentionMass(), VisionMass(), VisionMass(queries="last"), FirstToken(), Entropy()]
    )
    close(ram.values, by_hand(family, samples))
    close(mass.values, by_hand(family, samples, keys="visual"))
    close(last.values, by_hand(family, samples, queries="last", keys="visual"))
    close(sink.values, torch.stack([profiles(family, s)[..., 0] for s in samples]).mean(0))
    assert 0 < entropy.values.min() and entropy.values.max() < math.log(max(map(len, samples)))
    assert (ram.counts == 4).all() and sink.name == "FirstToken"


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_batch_counts_as_its_samples(family, side):
    metrics = lambda: [RetrievalAttentionMass(), KeyTokenRatio(share=0.2), Entropy()]  # noqa: E731
    together = run(family, batch(family, side), metrics())
    alone = run(family, list(batch(family, side)), metrics())
    for a, b in zip(together, alone, strict=True):
        close(a.values, b.values)
        assert torch.equal(a.counts, b.counts)


def test_layers_in_groups_of_any_size_give_the_same(family):
    expected = run(family, [film(family), sample(family)], VisionMass())
    for group_bytes in (1, 1 << 14, 1 << 40):
        scores = measure(
            hooked(family), [film(family), sample(family)], VisionMass(), progress=False, group_bytes=group_bytes
        )
        close(scores.values, expected.values, 1e-7)


def test_metrics_share_the_attention_rows(family, monkeypatch):
    calls = []
    own = rows_module.attention_rows

    def counting(*args, **kwargs):
        calls.append(args[0].shape)
        return own(*args, **kwargs)

    monkeypatch.setattr(rows_module, "attention_rows", counting)
    run(family, sample(family), RetrievalAttentionMass())
    one = len(calls)
    run(family, sample(family), [RetrievalAttentionMass(), VisionMass(), KeyTokenRatio(), FirstToken()])
    assert len(calls) == 2 * one and one == 1
    n = int(sample(family).mask("question").sum())
    assert calls[0] == (3, 1, 4, n, 8)


def test_only_the_rows_of_queries_that_all_metrics_name_are_kept(family):
    ram, last = RetrievalAttentionMass(), VisionMass(queries="last")
    assert named_queries([ram, last, ram]) == ("question", "last")
    assert named_queries([ram, FirstToken()]) is None
    found = run(family, [sample(family), batch(family, "left")], [ram, last])
    samples = [sample(family), *batch(family, "left")]
    close(found[0].values, by_hand(family, samples))
    close(found[1].values, by_hand(family, samples, "last", "visual"))
    reads_more = FirstToken()
    reads_more.queries = "last"
    with pytest.raises(InputError, match="rows of the 'question' query tokens were not kept"):
        run(family, sample(family), reads_more)
    reads_more.queries = ("last", "question")
    close(run(family, sample(family), reads_more).values, run(family, sample(family), FirstToken()).values)
    assert no_taps(family)


def test_no_logits_are_computed_and_the_attention_stays_its_own(family):
    def never(x, hook):
        raise AssertionError("logits were computed")

    model = hooked(family)
    expected = run(family, sample(family), VisionMass())
    with model.hooks([("hook_logits", never)]):
        assert torch.equal(run(family, sample(family), VisionMass()).values, expected.values)
    with model.attention("eager"):
        close(run(family, sample(family), VisionMass()).values, expected.values)
    assert no_taps(family)


def test_hooks_that_hang_act_on_what_is_measured(family):
    model = hooked(family)
    before = run(family, sample(family), VisionMass()).values
    with model.hooks([("blocks.1.attn.hook_z", lambda z, hook: z * 0)]):
        after = run(family, sample(family), VisionMass()).values
        _, cache = model.run_with_cache(sample(family), "blocks.*hook_pattern")
    assert torch.equal(before[:2], after[:2]) and not torch.allclose(before[2], after[2], atol=1e-3)
    rows = cache["pattern", 2][0][:, sample(family).mask("question")[0]]
    close(after[2], rows[..., sample(family).mask("visual")[0]].sum(-1).mean(-1))


def test_a_generator_of_samples_is_run_as_it_comes(family):
    model, made = hooked(family), []

    def samples():
        for s in four(family):
            made.append(s)
            yield s

    class Eager(FirstToken):
        def score(self, view):
            assert len(made) == seen[0] + 1
            seen[0] += view.is_last
            return super().score(view)

    seen = [0]
    scores = model.measure(samples(), Eager(), progress=False)
    close(scores.values, run(family, four(family), FirstToken()).values, 1e-12)


def test_bare_model_inputs_tell_the_last_position_and_the_visual_ones(family):
    expected = run(family, [sample(family), film(family)], VisionMass(queries="text"))
    scores = run(family, [dict(sample(family).inputs), dict(film(family).inputs)], VisionMass(queries="text"))
    close(scores.values, expected.values)
    assert "sample_ids" not in scores.provenance
    run(family, dict(sample(family).inputs), VisionMass(queries="last"))
    with pytest.raises(LayoutError, match="model.prepare"):
        run(family, dict(sample(family).inputs), VisionMass())


def test_a_result_says_where_it_comes_from(family):
    scores = run(family, [*four(family)[:2], batch(family)], RetrievalAttentionMass())
    facts = scores.provenance
    assert facts["sample_ids"] == ["sample-0", "sample-1"] and facts["n_samples"] == 4
    assert facts["templates"] == [sample(family).template]
    assert (
        facts["family"] == hooked(family).family.name and facts["attention"] == "sdpa" and facts["dtype"] == "float32"
    )


# -- what cannot be measured -----------------------------------------------------------------------------------------


def test_nothing_to_measure(family):
    for nothing in ([], iter([])):
        with pytest.raises(InputError, match="empty"):
            run(family, nothing, VisionMass())
    for wrong in (iter(["a text"]), iter([sample(family), None])):
        with pytest.raises(InputError, match=r"for sample \d; got (str|NoneType)\. `model\.prepare"):
            run(family, wrong, VisionMass())
    for wrong in ([], [VisionMass], VisionMass):
        with pytest.raises(InputError, match=r"Expected a metric or several"):
            run(family, sample(family), wrong)


def test_a_metric_that_needs_what_a_sample_lacks(family):
    without = hooked(family).prepare("What colour is the mug?", images=tiny_image(), id="bare")
    ram = RetrievalAttentionMass()
    with pytest.raises(InputError, match=r"'bare' has no target"):
        run(family, [sample(family), without], ram)
    with pytest.raises(LayoutError, match="no image"):
        run(family, text_sample(family), VisionMass())
    assert no_taps(family)
    assert (ram.count == 1).all()  # the sample before it is in, no half of this one


def test_attention_that_is_not_finite_is_named_and_leaves_no_tap(family):
    model = hooked(family)

    def spoil(q, hook):
        q[:] = float("nan")

    with model.hooks([("blocks.1.attn.hook_rot_q", spoil)]), pytest.raises(NumericsError, match="L1H0"):
        run(family, sample(family), VisionMass(queries="text"))
    assert no_taps(family)
    run(family, sample(family), VisionMass())


def test_float16_that_overflows_is_named(family):
    hf_model = tiny_model(family, dtype=torch.float16).requires_grad_(False)
    hf_model.model.language_model.layers[0].mlp.down_proj.weight.mul_(3e4)
    model = HookedMLLM.from_model(hf_model, check=False)
    with pytest.raises(NumericsError, match=r"L[12]H.*bfloat16"):
        model.measure(sample(family).to(dtype=torch.float16), VisionMass(), progress=False)
    assert not any(site.taps for site in model.wiring.text)


def test_progress_is_shown_only_when_asked_for(capsys):
    run("qwen3_vl", sample("qwen3_vl"), VisionMass())
    assert capsys.readouterr() == ("", "")
    hooked("qwen3_vl").measure([sample("qwen3_vl")], VisionMass())
    assert "1/1" in capsys.readouterr().err


# -- stopped and resumed ---------------------------------------------------------------------------------------------


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


def test_the_metrics_that_were_stopped_can_go_on_themselves(tmp_path):
    metrics = [VisionMass(), Stopping()]
    options = {"progress": False, "group_bytes": 1, "checkpoint": tmp_path / "state"}
    Stopping.at = 6
    with pytest.raises(KeyboardInterrupt):
        measure(hooked("qwen3_vl"), four("qwen3_vl"), metrics, **options)
    resumed = measure(hooked("qwen3_vl"), four("qwen3_vl"), metrics, **options)
    assert all((scores.counts == 4).all() for scores in resumed)


def test_more_samples_than_before_go_on_where_it_stopped(tmp_path):
    family, path = "internvl", tmp_path / "state"
    first = run(family, four(family)[:2], VisionMass(), checkpoint=path, save_every=1)
    assert (first.counts == 2).all()
    scores = run(family, four(family), VisionMass(), checkpoint=path)
    close(scores.values, run(family, four(family), VisionMass()).values, 1e-12)


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
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
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    scores = run("qwen3_vl", four("qwen3_vl")[:3] if rank == 0 else four("qwen3_vl")[3:], [VisionMass(), FirstToken()])
    torch.save([s.values for s in scores], f"{folder}/{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path):
    mp.spawn(_worker, args=(str(tmp_path),), nprocs=2)
    expected = run("qwen3_vl", four("qwen3_vl"), [VisionMass(), FirstToken()])
    for rank in range(2):
        for values, scores in zip(torch.load(tmp_path / f"{rank}.pt", weights_only=True), expected, strict=True):
            close(values, scores.values, 1e-9)
