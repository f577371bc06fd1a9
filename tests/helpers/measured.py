"""A metric of a user, samples to measure, and `measure` without progress, for tests of measuring."""

from helpers.cache_witness import hooked, sample
from helpers.tiny import tiny_image
from hooked_mllm import Box
from hooked_mllm.metrics import HeadMetric


class FirstToken(HeadMetric):
    """A user's metric: attention of the question on the first token."""

    def score(self, view):
        return view.profile("question")[..., 0]


def run(family, samples, metrics, **options):
    """Measure without a progress bar."""
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
    """Whether the model has neither taps nor hooks."""
    model = hooked(family)
    return not any(site.taps for site in model.wiring.text) and not model.list_hooks()
