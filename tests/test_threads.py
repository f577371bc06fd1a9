"""Threads, asyncio tasks, nested runs and contexts closed out of order: every result is that of one thread alone."""

import asyncio
import contextvars
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import pytest
import torch

from hooked_mllm import HeadAblation, HookedMLLM, HybridAttention, corruptions, metrics, objectives, toys
from hooked_mllm.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:hybrid_attention runs its torch definition")

Z, STREAM = "blocks.2.attn.hook_z", "blocks.1.hook_resid_post"
GREEDY = {"max_new_tokens": 3, "do_sample": False}


@cache
def model() -> HookedMLLM:
    return HookedMLLM.from_pretrained("toy-qwen3-vl", dtype="float32", check=False)


@cache
def samples():
    """Three samples of different lengths."""
    tasks = (toys.VisualRetrieval(pages=1), toys.VisualRetrieval(pages=2), toys.VisualRetrieval(pages=1, seed=5))
    return [task.samples(model(), 1, answer=True)[0] for task in tasks]


def zero(x, hook):
    return x * 0


def double(x, hook):
    x.mul_(2)


# -- every entry point: a function of a sample to tensors -------------------------------------------------------------


def forward(sample):
    return model()(sample)


def stopped(sample):
    return model()(sample, stop_at_layer=3)


def generate(sample):
    return model().generate(sample, **GREEDY)


def run_with_cache(sample):
    logits, kept = model().run_with_cache(sample, ["*hook_z", "blocks.*hook_pattern", "blocks.*hook_result"])
    return [logits, *kept.values()]


def cached_generation(sample):
    tokens, kept = model().run_with_cache(sample, "blocks.*", generate=GREEDY)
    return [tokens, kept["pattern", 2], kept["z", 0], kept["rot_k", 1]]


def run_with_hooks(sample):
    return model().run_with_hooks(sample, fwd_hooks=[(Z, zero), ("vision.blocks.0.hook_resid_post", double)])


def hooks(sample):
    with model().hooks([(STREAM, double), (Z, lambda z, hook: z * (1 + hook.step))]):
        output = model().generate(sample, output_logits=True, return_dict_in_generate=True, **GREEDY)
    return list(output.logits)


def intervene(sample):
    with model().intervene(HeadAblation(["L2H4", "L3H1"], mode="zero", phase="decode")) as records:
        output = model().generate(sample, output_logits=True, return_dict_in_generate=True, **GREEDY)
    return [*output.logits, torch.tensor(list(records[0]["applied"].values()))]


def attention(sample):
    with model().attention("eager"):
        eager = model()(sample)
        with model().attention(HybridAttention(["L2H4"], sink=1, window=4)):
            _, kept = model().run_with_cache(sample, "blocks.0.attn.hook_pattern")
            return [eager, model()(sample), kept["pattern", 0]]


def measure(sample):
    ram, mass = metrics.RetrievalAttentionMass(), metrics.VisionMass()
    return [scores.values for scores in model().measure([sample, sample], [ram, mass], progress=False)]


def sweep(sample):
    effect = metrics.AblationEffect(mode="zero", phase="both", layers=[2, 4])
    return effect.run(model(), [sample], objective=objectives.AnswerLogProb(), progress=False).values


def attribution(sample):
    metric = metrics.AttributionPatching("z")
    pairs = [(sample, corruptions.MeanRegion()(model(), sample))]
    return metric.run(model(), pairs, objective=objectives.AnswerLogProb(), progress=False).values


def logit_lens(sample):
    return model().run_with_cache(sample, "*resid*")[1].logit_lens("last")


def gradients(sample):
    _, kept = model().run_with_cache(sample, [Z, STREAM], incl_bwd=lambda logits: logits[:, -1].logsumexp(-1).sum())
    return list(kept.values())


def edited_gradients(sample):
    seen = []
    keep = [(Z, lambda g, hook: seen.append(g.clone()))]
    logits = model().run_with_hooks(sample, fwd_hooks=[(STREAM, double)], bwd_hooks=keep)
    logits[:, -1].logsumexp(-1).sum().backward()
    return seen


def trace(sample):
    with torch.no_grad():
        with model().nnsight.trace(sample, hooks="blocks.1.attn.hook_pattern"):
            pattern = model().nnsight["blocks.1.attn.hook_pattern"].save()
            model().nnsight["blocks.3.attn.hook_z"][:, :, 4] = 0
            logits = model().nnsight["hook_logits"].save()
    return [pattern, logits]


ENTRIES = (
    forward, stopped, generate, run_with_cache, cached_generation, run_with_hooks, hooks, intervene, attention, measure,
    sweep, attribution, logit_lens, gradients, edited_gradients, trace,
)  # fmt: skip


def call(entry, number):
    """The tensors of an entry point, detached; -1 for heads that are not measured."""
    result = entry(samples()[number])
    return [tensor.detach().nan_to_num(-1) for tensor in (result if isinstance(result, list) else [result])]


def in_thread(fn, *args):
    """What a function returns in a thread of its own, which has no context of this one."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(fn, *args).result()


@cache
def expected(entry, number):
    """The result of one thread alone."""
    return in_thread(call, entry, number)


def same(result, reference):
    return len(result) == len(reference) and all(map(torch.equal, result, reference))


def differing(jobs):
    """The entry points whose results differ from those of one thread, and errors."""
    wrong = []
    for entry, number in jobs:
        try:
            if not same(call(entry, number), expected(entry, number)):
                wrong.append(f"{entry.__name__} of sample {number}")
        except Exception as error:
            wrong.append(f"{entry.__name__} of sample {number}: {error!r}")
    return wrong


def jobs_of(worker):
    """Every entry point with a sample, each worker in another order."""
    jobs = [(entry, (index + worker) % 3) for index, entry in enumerate(ENTRIES)]
    generator = torch.Generator().manual_seed(worker)
    return [jobs[i] for i in torch.randperm(len(jobs), generator=generator)]


async def task(worker, turns):
    """Entry points with hooks of the task's own active, across the turns of other tasks."""
    wrong = []
    for entry, number in jobs_of(worker):
        ablation = HeadAblation([f"L3H{worker}"], mode="zero", phase="both")
        with model().hooks([(STREAM, double)]), model().attention("eager"), model().intervene(ablation):
            await asyncio.sleep(0)
            edited = model()(samples()[number])
            turns.append(worker)
            await asyncio.sleep(0)
        if not same([edited], in_thread(edited_alone, worker, number)):
            wrong.append(f"edits of task {worker}")
        await asyncio.sleep(0)
        wrong += differing([(entry, number)])
    return wrong


@cache
def edited_alone(worker, number):
    ablation = HeadAblation([f"L3H{worker}"], mode="zero", phase="both")
    with model().hooks([(STREAM, double)]), model().attention("eager"), model().intervene(ablation):
        return [model()(samples()[number])]


def test_four_threads_and_two_tasks_over_every_entry_point():
    for entry in ENTRIES:
        for number in range(3):
            expected(entry, number)
    plain = [model().hf_model(**sample.inputs, use_cache=False).logits for sample in samples()]

    async def tasks():
        turns = []
        wrong = await asyncio.gather(task(4, turns), task(5, turns))
        assert turns[:4] == [4, 5, 4, 5]  # they took turns
        return [name for names in wrong for name in names]

    with ThreadPoolExecutor(4) as pool:
        working = [pool.submit(differing, jobs_of(worker)) for worker in range(4)]
        wrong = asyncio.run(tasks())
        wrong += [name for job in working for name in job.result()]
    assert wrong == []
    assert model().list_hooks() == {} and not model().wiring.has_hooks
    for sample, logits in zip(samples(), plain, strict=True):
        assert torch.equal(model()(sample), logits)


@pytest.mark.parametrize("outer", [e for e in ENTRIES if e is not trace])
def test_entry_points_nested_in_each_other(outer):
    """Every entry point runs inside of a hook of `outer`; neither is changed by the other."""
    left, wrong, reference = [e for e in ENTRIES if e is not trace], [], expected(outer, 0)
    for entry in left:
        expected(entry, 1)  # now: inside of a run, another thread waits for the run to end

    def nested(x, hook):
        if left and model().registry.context.run.parent is None:
            entry = left.pop()
            with torch.enable_grad():
                result = call(entry, 1)
            # what the outer entry point opened with a `with` is active in the inner one, too
            if outer not in (hooks, intervene, attention) and not same(result, expected(entry, 1)):
                wrong.append(entry.__name__)

    while left:
        remaining = len(left)
        with model().registry.attached("blocks.1.hook_mlp_out", nested):  # in the outer run only
            assert same(call(outer, 0), reference)
        assert len(left) < remaining
    assert wrong == []


def enter(*contexts):
    for context in contexts:
        context.__enter__()


def leave(*contexts):
    for context in contexts:
        context.__exit__(None, None, None)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (3, 2, 1, 0), (1, 3, 0, 2), (2, 0, 3, 1)])
def test_contexts_close_in_any_order(order):
    sample = samples()[0]
    plain = model()(sample)
    make = [
        lambda: model().attention(HybridAttention(["L2H4"], sink=1, window=4)),
        lambda: model().hooks([(STREAM, double)]),
        lambda: model().intervene(HeadAblation(["L3H1"], mode="zero", phase="both")),
        lambda: model().attention("eager"),
    ]
    contexts = [fn() for fn in make]
    enter(*contexts)
    for n, closed in enumerate(order):
        leave(contexts[closed])
        still_open = [make[i] for i in range(4) if i not in order[: n + 1]]
        assert torch.equal(model()(sample), in_thread(run_within, still_open, sample))
    assert torch.equal(model()(sample), plain) and not model().wiring.has_hooks


def run_within(makers, sample):
    contexts = [fn() for fn in makers]
    enter(*contexts)
    try:
        return model()(sample)
    finally:
        leave(*reversed(contexts))


def test_a_metric_in_two_measures_at_once_is_rejected():
    metric, errors = metrics.RetrievalAttentionMass(), []

    def nested(x, hook):
        for fn in (measure_it, lambda: in_thread(measure_it)):
            with pytest.raises(InputError, match="in use by another `measure`"):
                fn()
            errors.append(fn)

    def measure_it():
        return model().measure(samples()[0], metric, progress=False)

    with model().hooks([(STREAM, nested)]):
        result = measure_it()
    assert len(errors) == 2 and torch.equal(result.values, measure_alone())
    metric.reset()
    assert torch.equal(measure_it().values, result.values)  # it is free again


def measure_alone():
    return model().measure(samples()[0], metrics.RetrievalAttentionMass(), progress=False).values


def test_a_thread_that_gets_a_copy_of_the_context_has_its_hooks():
    sample = samples()[0]
    with model().hooks([(STREAM, double)]):
        edited = model()(sample)
        context = contextvars.copy_context()
        assert torch.equal(in_thread(context.run, model(), sample), edited)
        assert not torch.equal(in_thread(model(), sample), edited)
