"""The caches of a generation: one for the prefill, one for each decoding step, and the two read as one sequence."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import pad

from hooked_mllm.cache.activation_cache import ActivationCache, held_bytes
from hooked_mllm.cache.files import PathInput, load_fields, save_fields
from hooked_mllm.cache.keys import Key, key_completions
from hooked_mllm.cache.lazy import Entry, LazyPattern, LazyResult, LazyRows, Mapped, value_of
from hooked_mllm.cache.logit_tools import Logits
from hooked_mllm.cache.sequence import Span, each_row
from hooked_mllm.checks import as_device, checked
from hooked_mllm.contracts import Model
from hooked_mllm.display.blocks import html_block
from hooked_mllm.display.text import human_bytes
from hooked_mllm.heads.parsing import LayerHeadsLike
from hooked_mllm.hooks.table import is_quadratic
from hooked_mllm.inputs.positions import Positions


@checked
class GenerationCache:
    """Activations of every step of a generation.

    `cache.steps[0]` is the prefill, `cache.steps[n]` the n-th decoding step; each is an ActivationCache. Read whole,
    `cache["z", 3]` joins the steps along positions, and `cache["pattern", 3]` puts their rows under one another (the
    last token generated was never an input, so it has no row).

    Args:
        steps: The caches, prefill first.

    Examples:
        >>> from hooked_mllm import HookedMLLM, toys
        >>> model = HookedMLLM.from_pretrained("toy-qwen3-vl")
        >>> sample = toys.VisualRetrieval(pages=1).samples(model, 1)[0]
        >>> tokens, cache = model.run_with_cache(sample, names_filter="*hook_z", generate={"max_new_tokens": 2})
        >>> len(cache.steps), cache["z", 0].shape[1] == len(sample) + 1
        (2, True)
    """

    def __init__(self, steps: list[ActivationCache]) -> None:
        self.steps = steps

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[ActivationCache]:
        return iter(self.steps)

    def __contains__(self, key: object) -> bool:
        return key in self.steps[0]

    def __getitem__(self, key: object) -> Tensor:
        return self.joined[key]

    @cached_property
    def joined(self) -> ActivationCache:
        """The whole sequence as one cache, for every tool of an ActivationCache; entries are joined when they are read.

        Positions are those of the sequence, and names are of the prompt: "last" is its last position.
        """
        prefill, spans = self.steps[0], [step.span for step in self.steps]
        span = None
        if spans[0] is not None and spans[-1] is not None:
            span = replace(spans[0], stop=spans[-1].stop)
        fields = prefill._fields() | {"entries": _JoinedEntries(self.steps), "span": span}
        for name in ("query_positions", "kept_positions"):
            if fields[name] is not None and span is not None:
                batch = prefill._text_batch()
                new = torch.arange(spans[0].stop if spans[0] else 0, span.stop)
                fields[name] = torch.cat([each_row(fields[name], batch), new.expand(batch, -1)], dim=1)
        return ActivationCache(**fields, model=prefill.model)

    def pattern(
        self,
        layer: int,
        queries: Positions | None = None,
        keys: Positions | None = None,
        heads: LayerHeadsLike | None = None,
        tower: str = "text",
        scores: bool = False,
    ) -> Float[Tensor, "*batch head query key"]:
        """Some rows, columns and heads of one layer's attention pattern over the whole sequence, in float32.

        Rows of all steps are below one another, with zeros (-inf in scores) at keys that came later.

        Args:
            layer: The block.
            queries: Rows, as positions of the sequence: a token kind of the prompt, a region, a mask, indices, a slice.
            keys: Columns, in the same forms.
            heads: As in `ActivationCache.pattern`.
            tower: "text" or "vision".
            scores: Return masked scores before the softmax instead.

        Raises:
            HookNameError: When the run kept no pattern of that layer.
            LayoutError: For positions that are not there.
        """
        return self.joined.pattern(layer, queries, keys, heads, tower, scores)

    def logit_lens(
        self,
        positions: Positions = "last",
        layer: int | None = None,
        incl_mid: bool = False,
        return_labels: bool = False,
    ) -> Logits | tuple[Logits, list[str]]:
        """`ActivationCache.logit_lens` over the whole sequence.

        Args:
            positions: Positions of the sequence. The default is the last one of the prompt.
            layer: The last block; None: all, and the end.
            incl_mid: Include the residual stream between attention and MLP.
            return_labels: Also return the labels.
        """
        if return_labels:
            return self.joined.logit_lens(positions, layer, incl_mid, return_labels=True)
        return self.joined.logit_lens(positions, layer, incl_mid)

    def to(self, device: torch.device | str) -> "GenerationCache":
        """The same cache with its tensors on another device, what steps share once."""
        known: Mapped = {}
        target = as_device(device)
        return GenerationCache([step._moved(target, known) for step in self.steps])

    def sample(self, index: int | slice) -> "GenerationCache":
        """The activations of one sample of a batch, or of some, as `ActivationCache.sample`; of beams, one or some.

        Raises:
            HookValueError: When there is no such sample.
        """
        known: Mapped = {}
        return GenerationCache([step._sample(index, known) for step in self.steps])

    @property
    def nbytes(self) -> int:
        """Bytes held over all steps, each storage counted once."""
        return held_bytes(entry for step in self.steps for entry in step._entries.values())

    def __repr__(self) -> str:
        return f"{self._title()}\nprefill:\n{self.steps[0]!r}"

    def _repr_html_(self) -> str:
        return html_block(self._title(), self.steps[0]._html_table(), note="activations of the prefill:")

    def _title(self) -> str:
        return f"GenerationCache: prefill and {len(self.steps) - 1} decoding steps, {human_bytes(self.nbytes)}"

    def _ipython_key_completions_(self) -> list[Key]:
        return key_completions(self.steps[0])

    def save(self, path: PathInput) -> None:
        """Write all steps to one safetensors file, what they share once.

        Raises:
            CacheFileError: If the file cannot be written.
        """
        steps = [step._fields() | {"vision_rows": step.vision_rows} for step in self.steps]
        save_fields(steps, path, generation=True)

    @classmethod
    def load(cls, path: PathInput, model: Model | None = None) -> "GenerationCache":
        """Read what `save` wrote; as `ActivationCache.load`."""
        steps = load_fields(path, generation=True)
        if steps[0]["span"] is None and steps[0]["masks"] is not None:  # of an earlier version
            length = steps[0]["masks"]("padding").shape[1]
            steps[0]["span"] = Span(0, length)
            for number, step in enumerate(steps[1:]):
                step["span"] = Span(length + number, length + number + 1, generated=True)
        return cls([ActivationCache(**fields, model=model) for fields in steps])


class _JoinedEntries(Mapping[str, Entry]):
    """The entries of the steps of a generation, joined along the sequence when they are read."""

    def __init__(self, steps: list[ActivationCache]) -> None:
        self.steps = steps

    def __iter__(self) -> Iterator[str]:
        return iter(self.steps[0])

    def __len__(self) -> int:
        return len(self.steps[0])

    def __contains__(self, name: object) -> bool:
        return name in self.steps[0]._entries

    def __getitem__(self, name: str) -> Entry:
        present = [(step._entries[name], step.span) for step in self.steps if name in step._entries]
        entries = [entry for entry, _ in present]
        if name.startswith(("vision.", "projector.")):
            return entries[0]
        if name.endswith("hook_rot_k"):
            return entries[-1]  # each step's keys contain those of the steps before
        if is_quadratic(name):
            return self._rows(name, present)
        counts = [_accepted(entry.shape[1], *pair) for entry, pair in zip(entries, self._following(), strict=False)]
        if isinstance(entries[0], LazyResult):
            zs = [entry.z for entry in entries if isinstance(entry, LazyResult)]
            return replace(entries[0], z=_stacked(zs, counts, dim=1))
        joined = _stacked([value_of(entry) for entry in entries], counts, dim=1)
        last = self.steps[-1].span
        if name.endswith("hook_deepstack") and last is not None and self.steps[0].kept_positions is None:
            return pad(joined, (0, 0, 0, last.stop - joined.shape[1]))  # nothing is added to generated tokens
        return joined

    def _following(self) -> list[tuple[Span | None, Span | None]]:
        """The positions of each step, and of the next."""
        spans = [step.span for step in self.steps]
        return list(zip(spans, [*spans[1:], None], strict=True))

    def _rows(self, name: str, present: list[tuple[Entry, Span | None]]) -> Entry:
        entries = [entry for entry, _ in present]
        counts = [_accepted(entry.shape[2], *pair) for entry, pair in zip(entries, self._following(), strict=False)]
        lazy = [entry for entry in entries if isinstance(entry, LazyPattern | LazyRows)]
        if len(lazy) == len(entries):
            return LazyRows.joined(lazy, counts)
        kept = self.steps[0].key_positions is not None
        values = [value_of(entry) for entry in entries]  # [batch head query key], with more keys in each step
        offsets = [
            0 if kept or span is None else max(0, span.stop - value.shape[3])
            for value, (_, span) in zip(values, present, strict=True)
        ]
        width = max(offset + value.shape[3] for offset, value in zip(offsets, values, strict=True))
        fill = float("-inf") if name.endswith("scores") else 0.0
        padded = [
            pad(value, (offset, width - offset - value.shape[3]), value=fill)
            for offset, value in zip(offsets, values, strict=True)
        ]
        return _stacked(padded, counts, dim=2)


def _accepted(rows: int, span: Span | None, following: Span | None) -> int:
    """The rows of a step without those of rejected candidates, which the next step computes again."""
    if span is None or following is None or rows != len(span):
        return rows
    return min(rows, following.first - span.first)


def _stacked(values: list[Tensor], counts: list[int], dim: int) -> Tensor:
    """The first rows of each step, along the sequence."""
    return torch.cat([value.narrow(dim, 0, count) for value, count in zip(values, counts, strict=True)], dim=dim)
