"""AttentionView: the attention rows of a group of layers, recomputed from q and k, shared by all metrics of a run."""

import math
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.row_statistics import key_mass, top_mask
from hooked_mllm.checks import checked
from hooked_mllm.errors import InputError, NumericsError
from hooked_mllm.heads import head_name
from hooked_mllm.heads.counting import Share, share_count
from hooked_mllm.inputs.positions import KindMasks
from hooked_mllm.measuring.attention_rows import LayerRows
from hooked_mllm.measuring.query_selection import QuerySelection, Selections, TokenMask
from hooked_mllm.measuring.view_context import ViewContext

#: scratch memory for attention rows, in bytes
MAX_BYTES = 1 << 30


@checked
class AttentionView:
    """The post-softmax attention of a group of layers in one forward pass, of one sample or a batch.

    Every quantity is computed once, in float32, in chunks of at most `max_bytes`, and kept until the view is released.
    Nothing of size N x N is ever built. `queries` and `keys` are the name of a mask ("question", "answer", "last",
    "target", "visual", "text", ...) or a boolean tensor [batch pos]. Padding is never a query and never a key. Where
    some heads stream (see `HybridAttention`), all values follow the mask of each head.

    On a GPU, profiles come from a Triton kernel that stores no rows, if the mask is causal with padding at the ends;
    otherwise, and for `rows`, torch computes rows in chunks.

    Args:
        layers: Indices of the decoder layers, ascending.
        q: One tensor per layer, [batch head pos d_head], after position encoding. Or, by the name of query tokens, one
            per layer of their rows only, [batch head query d_head]; the view then supports these names only.
        k: One tensor per layer, [batch kv_head pos d_head], after position encoding.
        mask: The keys that are visible to each query of that layer.
        scale: The factor of the scores before the softmax, one per layer.
        masks: Returns the mask of a name, [batch pos], "padding" among them, best on the CPU; or a `Selections` of it,
            which the views of a forward pass share.
        n_layers: Number of decoder layers of the model.
        max_bytes: Bound on the scratch memory for attention rows.
        context: Further facts: token ids, layouts, the residual stream.
        first: Position of the first row of q, where the positions before it are keys only (see `SharedPrefix`).
        implementation: "triton", "torch", or "auto" for the kernel on a GPU where it can run.

    Raises:
        InputError: If the lists differ in length or the tensors in shape; on reading, for queries that were not kept.
        HookValueError: For "triton" where the kernel cannot run.
    """

    def __init__(
        self,
        layers: Sequence[int],
        q: Sequence[Float[Tensor, "batch head pos d_head"]]
        | Mapping[str, Sequence[Float[Tensor, "batch head _ d_head"]]],
        k: Sequence[Float[Tensor, "batch kv_head key_pos d_head"]],
        mask: Sequence[MaskRows],
        scale: Sequence[float],
        masks: KindMasks | Selections,
        n_layers: int,
        max_bytes: int = MAX_BYTES,
        context: ViewContext | None = None,
        first: int = 0,
        implementation: str | None = None,
    ) -> None:
        kept = q if isinstance(q, Mapping) else {"q": q}
        lengths = {"layers": len(layers), "k": len(k), "mask": len(mask), "scale": len(scale)}
        lengths |= {name: len(tensors) for name, tensors in kept.items()}
        if len(set(lengths.values())) != 1 or not layers or not kept:
            raise InputError(f"Expected one q, k, mask and scale for each of one or more layers; got {lengths}.")
        for name, tensors in (*kept.items(), ("k", k)):
            for layer, tensor in zip(layers, tensors, strict=True):
                if tensor.shape != tensors[0].shape or tensor.device != k[0].device:
                    raise InputError(
                        f"Layers of one view share shape and device: {name} of layer {layer} is {list(tensor.shape)} "
                        f"on {tensor.device}, of layer {layers[0]} {list(tensors[0].shape)} on {k[0].device}."
                    )
        if not isinstance(q, Mapping) and (q[0].shape[1] % k[0].shape[1] or q[0].shape[2] + first != k[0].shape[2]):
            since = f", q starting at position {first}" if first else ""
            raise InputError(
                f"Expected q [batch head pos d_head] and k [batch kv_head pos d_head] over the same positions{since}, "
                f"head a multiple of kv_head; got q {list(q[0].shape)} and k {list(k[0].shape)}."
            )
        self.layers = tuple(int(layer) for layer in layers)
        self.n_layers = n_layers
        self.context = context or ViewContext()
        self._rows = LayerRows(q, k, mask, scale, first, max_bytes, implementation)
        self.batch, self.n_heads = self._rows.batch, self._rows.n_heads
        self.n_kv_heads, self.n_keys = self._rows.n_kv_heads, self._rows.n_keys
        self.first = first
        self.device = self._rows.device
        if not isinstance(masks, Selections):
            masks = Selections(masks, (self.batch, self.n_keys), self.device)
        elif (masks.shape, masks.device) != ((self.batch, self.n_keys), self.device):
            raise InputError(
                f"The masks are of shape {list(masks.shape)} on {masks.device}; q is of {self.batch} samples of "
                f"{self.n_keys} positions on {self.device}."
            )
        self._selections = masks
        self._profiles: dict[TokenMask, Tensor] = {}
        self._tops: dict[tuple[TokenMask, float], Tensor] = {}
        self._chances: dict[tuple[TokenMask, TokenMask], Tensor] = {}
        self._sums: list[Tensor] = []
        self._host_sum: tuple[Tensor, torch.cuda.Event] | None = None

    @cached_property
    def layer_index(self) -> Int[Tensor, " layer"]:
        """The indices of the layers, on the device of the view."""
        return torch.tensor(self.layers).to(self.device, non_blocking=True)

    @property
    def is_last(self) -> bool:
        """Whether this view holds the model's last layer, so that the sample is complete with it."""
        return self.layers[-1] == self.n_layers - 1

    def mask(self, name: TokenMask) -> Bool[Tensor, "batch pos"]:
        """The positions of that name, on the device of the view.

        Raises:
            LayoutError: If a sample of the batch has no such position.
            InputError: If a sample was prepared without the target or answer.
        """
        return self._selections.mask(name)

    @property
    def question(self) -> Bool[Tensor, "batch pos"]:
        """The user's question."""
        return self.mask("question")

    @property
    def target(self) -> Bool[Tensor, "batch pos"]:
        """The visual tokens of the target region."""
        return self.mask("target")

    @property
    def visual(self) -> Bool[Tensor, "batch pos"]:
        """All visual tokens."""
        return self.mask("visual")

    @property
    def answer(self) -> Bool[Tensor, "batch pos"]:
        """The answer that the sample was prepared with."""
        return self.mask("answer")

    @property
    def last(self) -> Bool[Tensor, "batch pos"]:
        """The last token of the prompt."""
        return self.mask("last")

    @torch.no_grad()
    def rows(
        self, queries: TokenMask, reduce: Callable[[Tensor], Tensor] | None = None
    ) -> Float[Tensor, "layer batch head query *key"]:
        """The attention rows A[i, :] of the query tokens, in order of position, float32; or their reduced values.

        Args:
            queries: The query tokens. Samples with fewer of them get zero rows at the end.
            reduce: Maps a chunk of rows [layer batch head query key] to one value per row [layer batch head query];
                the rows then never exist all at once.
        """
        selection = self._select(queries)
        shape = (len(self.layers), self.batch, self.n_heads, selection.length)
        out = sums = torch.empty(0)
        for chunk in self._rows.chunks(selection):
            piece = chunk.rows if reduce is None else reduce(chunk.rows)
            if reduce is not None and piece.shape != chunk.rows.shape[:-1]:
                raise InputError(
                    f"reduce must turn rows {list(chunk.rows.shape)} [layer batch head query key] into "
                    f"{list(chunk.rows.shape[:-1])} [layer batch head query]; it returned {list(piece.shape)}."
                )
            if not out.numel():
                out = piece.new_zeros(*shape, *piece.shape[4:])
                sums = chunk.rows.new_zeros(shape[:3])
            if not selection.even:
                unused = ~selection.valid[:, None, chunk.queries]
                piece = piece.masked_fill(unused[..., None] if reduce is None else unused, 0)
            out[chunk.layers, :, chunk.heads, chunk.queries] = piece
            sums[chunk.layers, :, chunk.heads] += chunk.rows.sum((-1, -2))
        self._sums.append(sums)
        return out

    def positions(self, queries: TokenMask) -> tuple[Int[Tensor, "batch query"], Bool[Tensor, "batch query"]]:
        """The positions of `rows(queries)` in the sequence, and whether each is a row of the sample (not filled up)."""
        selection = self._selections.queries(queries)
        return selection.index, selection.valid

    def average(
        self, values: Float[Tensor, "layer batch head query"], queries: TokenMask
    ) -> Float[Tensor, "layer batch head"]:
        """The mean over each sample's query tokens of the values of `rows(queries, reduce=...)`."""
        weight = self._selections.queries(queries).weight
        return (values * weight[:, None]).sum(-1, dtype=torch.float64)

    @torch.no_grad()
    def profile(self, queries: TokenMask) -> Float[Tensor, "layer batch head key"]:
        """The mean attention row over the query tokens: `a[j] = 1/|Q| sum_{i in Q} A[i, j]` (arXiv:2606.05843 eq. 22).

        The tensor is shared: edit a copy of it only.
        """
        selection = self._select(queries)
        if selection.key in self._profiles:
            return self._profiles[selection.key]
        out = self._rows.profile(selection)
        self._profiles[selection.key] = out
        self._sums.append(out.sum(-1))
        return out

    def mass(self, queries: TokenMask, keys: TokenMask) -> Float[Tensor, "layer batch head"]:
        """The attention mass of the query tokens on the keys: `sum_{j in K} a[j]`, in [0, 1], as float64."""
        profile = self.profile(queries)
        span, whole = self._selections.span(keys)
        if whole:
            return profile[..., span].sum(-1, dtype=torch.float64)
        return key_mass(profile[..., span], self.mask(keys)[:, span])

    def top_share(self, queries: TokenMask, keys: TokenMask, share: Share) -> Float[Tensor, "layer batch head"]:
        """The share of the keys that are among the `ceil(share * N)` largest entries of the profile, as float64."""
        top, key_mask = self.top(queries, share), self.mask(keys)
        span, _ = self._selections.span(keys)
        return (top[..., span] & key_mask[:, None, span]).sum(-1) / key_mask.sum(-1)[:, None].double()

    def top(self, queries: TokenMask, share: Share) -> Bool[Tensor, "layer batch head key"]:
        """True at the `ceil(share * N)` largest entries of the profile, 0 < share <= 1 (arXiv:2606.05843 eq. 23).

        N is the sample's own length: padding does not count and is never selected. Ties go to the lower index.
        """
        if not 0.0 < share <= 1.0:
            raise InputError(f"Expected a share of the keys above 0 and at most 1; got {share!r}.")
        key = (queries, share)
        if key not in self._tops:
            profile = self.profile(queries)
            counts = [share_count(share, n) for n in self._selections.lengths]
            if self._selections.padded:
                profile = profile.masked_fill(self.mask("padding")[:, None], -1.0)
            if len(set(counts)) == 1:
                self._tops[key] = top_mask(profile, counts[0])
            else:
                k = torch.tensor(counts).to(self.device, non_blocking=True)[:, None]
                self._tops[key] = top_mask(profile, k, max(counts))
        return self._tops[key]

    @torch.no_grad()
    def chance(self, queries: TokenMask, keys: TokenMask) -> Float[Tensor, "layer batch head"]:
        """The mass of a head that attends evenly to all visible keys: target tokens over visible tokens.

        It is the same for all heads of a layer unless some of them stream.
        """
        selection, key = self._select(queries), (queries, keys)
        if key not in self._chances:
            if self._rows.plain_causal:
                level = self._selections.causal_chance(queries, keys)[:, None]
            else:
                level = self._rows.chance(selection, self.mask(keys))
            self._chances[key] = level.expand(len(self.layers), self.batch, self.n_heads)
        return self._chances[key]

    def release(self) -> None:
        """Free q, k and everything computed from them; `check` still works, and waits only for earlier kernels."""
        if self._sums and self.device.type == "cuda":
            total = torch.empty((), dtype=torch.float32, pin_memory=True)
            with torch.cuda.device(self.device):
                total.copy_(self._sum_of_all(), non_blocking=True)
                self._host_sum = (total, torch.cuda.Event())
                self._host_sum[1].record()
        self._rows.drop()
        self.context = ViewContext()
        self._profiles.clear()
        self._tops.clear()
        self._chances.clear()

    def check(self) -> None:
        """Raise if any profile or row computed so far is not finite; synchronises with the device.

        Raises:
            NumericsError: With the layers and heads of a NaN or an infinity.
        """
        if not self._sums:
            return
        if self._host_sum is not None:
            self._host_sum[1].synchronize()
        if math.isfinite(float(self._sum_of_all() if self._host_sum is None else self._host_sum[0])):
            return
        bad = ~torch.stack(self._sums).isfinite().all(0)
        if bool(bad.any()):
            heads = bad.nonzero().tolist()  # of [layer batch head]
            names = ", ".join(f"{head_name(self.layers[l], head)} (sample {sample})" for l, sample, head in heads[:4])
            raise NumericsError(
                f"The attention of {len(heads)} heads is not finite, first at {names}. The q or k of these layers hold "
                "NaN or infinity: half precision overflowed before the attention (load the model in bfloat16 or "
                "float32), or the inputs are damaged."
            )

    def _sum_of_all(self) -> Tensor:
        # a NaN in a row makes its sum NaN, and so the sum of all sums
        sums = [sums.sum() for sums in self._sums]
        return sums[0] if len(sums) == 1 else torch.stack(sums).sum()

    def _select(self, queries: TokenMask) -> QuerySelection:
        selection = self._selections.queries(queries)
        self._rows.check(selection)
        return selection
