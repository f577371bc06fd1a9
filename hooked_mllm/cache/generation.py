"""The caches of a generation: one for the prefill, one for each decoding step, and the two read as one sequence."""

from collections.abc import Iterator

import torch
from torch import Tensor

from hooked_mllm.cache.activation_cache import ActivationCache, held_bytes
from hooked_mllm.cache.files import PathInput, load_fields, save_fields
from hooked_mllm.cache.keys import Key, key_completions
from hooked_mllm.cache.lazy import LazyPattern, value_of
from hooked_mllm.checks import checked
from hooked_mllm.contracts import Model
from hooked_mllm.display.blocks import html_block
from hooked_mllm.display.text import human_bytes
from hooked_mllm.hooks.table import is_quadratic


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
        first = self.steps[0].entry(key)
        name = self.steps[0].name_of(key)
        parts = [s.entry(key) for s in self.steps if key in s]
        if isinstance(first, LazyPattern) or is_quadratic(name):
            rows = [value_of(p) for p in parts]  # [batch head query key], with more keys in each step
            width = max(r.shape[-1] for r in rows)
            fill = float("-inf") if name.endswith("scores") else 0.0
            return torch.cat([torch.nn.functional.pad(r, (0, width - r.shape[-1]), value=fill) for r in rows], dim=2)
        if name.endswith("hook_rot_k"):
            return value_of(parts[-1])  # each step's keys hold those of the steps before
        return value_of(first) if len(parts) == 1 else torch.cat([value_of(p) for p in parts], dim=1)

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
        return cls([ActivationCache(**fields, model=model) for fields in load_fields(path, generation=True)])
