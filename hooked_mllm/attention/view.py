"""AttentionView: the attention rows of a group of layers, recomputed from q and k, shared by all metrics of a run."""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from hooked_mllm.attention.context import ViewContext
from hooked_mllm.attention.masks import MaskRows
from hooked_mllm.attention.selection import QuerySelection, Selections
from hooked_mllm.attention.statistics import attention_rows, chance_level, key_mass, top_mask
from hooked_mllm.errors import InputError, NumericsError
from hooked_mllm.heads.counting import share_count

#: scratch memory for attention rows, in bytes
MAX_BYTES = 1 << 30


class _Chunk(NamedTuple):
    """Rows of some layers, heads and queries, always of the whole batch."""

    layers: slice
    heads: slice
    queries: slice
    rows: Tensor


class AttentionView:
    """The post-softmax attention of a group of layers during one forward pass, of one sample or a batch.

    What is asked is computed once, in float32, in pieces of at most `max_bytes`, and kept until the view is dropped:
    every metric that asks for the profile of the question gets the same tensor. Nothing of size N x N is ever built.
    Wherever a method takes `queries` or `keys`, that is the name of a mask ("question", "answer", "last", "target",
    "visual", "text", ...) or a boolean tensor [batch pos]. Padding is never a query and never a key.

    Args:
        layers: Indices of the decoder layers, ascending.
        q: One tensor per layer, [batch head pos d_head], after position encoding.
        k: One tensor per layer, [batch kv_head pos d_head], after position encoding.
        mask: Which keys each query of that layer saw. Rows are built once for layers with the same mask.
        scale: The factor of the scores before the softmax, one per layer.
        masks: Gives the mask of a name, [batch pos]; must know "padding". On the CPU they spare waiting for the device.
            Or one `Selections` made of it, for all views of a forward pass to share.
        n_layers: Number of decoder layers of the model.
        max_bytes: Bound on the scratch memory for attention rows.
        context: What is known beside attention: token ids, layouts, the residual stream.
        first: Position of the first row of q, where the positions before it are keys only (see `SharedPrefix`).

    Raises:
        InputError: if the lists differ in length or the tensors in shape; when asked, for a query before `first`.
    """

    def __init__(
        self,
        layers: Sequence[int],
        q: Sequence[Float[Tensor, "batch head pos d_head"]],
        k: Sequence[Float[Tensor, "batch kv_head key_pos d_head"]],
        mask: Sequence[MaskRows],
        scale: Sequence[float],
        masks: Callable[[str], Bool[Tensor, "batch pos"]] | Selections,
        n_layers: int,
        max_bytes: int = MAX_BYTES,
        context: ViewContext | None = None,
        first: int = 0,
    ) -> None:
        lengths = {"layers": len(layers), "q": len(q), "k": len(k), "mask": len(mask), "scale": len(scale)}
        if len(set(lengths.values())) != 1 or not layers:
            raise InputError(f"Expected one q, k, mask and scale for each of one or more layers; got {lengths}.")
        for name, tensors in (("q", q), ("k", k)):
            for layer, tensor in zip(layers, tensors, strict=True):
                if tensor.shape != tensors[0].shape or tensor.device != q[0].device:
                    raise InputError(
                        f"Layers of one view share shape and device: {name} of layer {layer} is {list(tensor.shape)} "
                        f"on {tensor.device}, of layer {layers[0]} {list(tensors[0].shape)} on {q[0].device}."
                    )
        if q[0].shape[1] % k[0].shape[1] or q[0].shape[2] + first != k[0].shape[2]:
            since = f", q from position {first} on" if first else ""
            raise InputError(
                f"Expected q [batch head pos d_head] and k [batch kv_head pos d_head] over the same positions{since}, "
                f"head a multiple of kv_head; got q {list(q[0].shape)} and k {list(k[0].shape)}."
            )
        self.layers = tuple(int(layer) for layer in layers)
        self.n_layers = n_layers
        self.context = context or ViewContext()
        self.batch, self.n_heads = q[0].shape[:2]
        self.n_kv_heads, self.n_keys = k[0].shape[1:3]
        self.first = first
        self.device = q[0].device
        self._q, self._k, self._mask, self._scale = q, k, mask, scale
        self._max_bytes = max_bytes
        if not isinstance(masks, Selections):
            masks = Selections(masks, (self.batch, self.n_keys), self.device)
        elif (masks.shape, masks.device) != ((self.batch, self.n_keys), self.device):
            raise InputError(
                f"The masks are of shape {list(masks.shape)} on {masks.device}; q is of {self.batch} samples of "
                f"{self.n_keys} positions on {self.device}."
            )
        self._selections = masks
        self._profiles: dict[object, Tensor] = {}
        self._tops: dict[tuple[object, float], Tensor] = {}
        self._chances: dict[tuple[object, object], Tensor] = {}
        self._sums: list[Tensor] = []
        self._plain_causal = all(rows.plain_causal for rows in mask)
        self._layer_index: Tensor | None = None

    @property
    def layer_index(self) -> Int[Tensor, " layer"]:
        """The indices of the layers, on the device of the view."""
        if self._layer_index is None:
            self._layer_index = torch.tensor(self.layers).to(self.device, non_blocking=True)
        return self._layer_index

    @property
    def is_last(self) -> bool:
        """Whether this view holds the model's last layer, so that the sample is complete with it."""
        return self.layers[-1] == self.n_layers - 1

    def mask(self, name: str | Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
        """The positions of that name, on the device of the view.

        Raises:
            InputError: if a sample of the batch has no such position.
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
        """The answer given with the prompt."""
        return self.mask("answer")

    @property
    def last(self) -> Bool[Tensor, "batch pos"]:
        """The last token of the prompt."""
        return self.mask("last")

    @torch.no_grad()
    def rows(
        self,
        queries: str | Bool[Tensor, "batch pos"],
        reduce: Callable[[Tensor], Tensor] | None = None,
    ) -> Float[Tensor, "layer batch head query *key"]:
        """The attention rows A[i, :] of the query tokens, in order of position.

        Args:
            queries: The query tokens. In a batch of unequal numbers, short samples get zero rows at the end.
            reduce: Maps a piece of rows [layer batch head query key] to one value per row [layer batch head query];
                with it, the rows themselves never exist all at once.

        Returns:
            Rows [layer batch head query key] in float32, or what `reduce` made of each, [layer batch head query].
        """
        selection = self._select(queries)
        shape = (len(self.layers), self.batch, self.n_heads, selection.length)
        out = sums = torch.empty(0)
        for chunk in self._chunks(selection):
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

    def positions(
        self, queries: str | Bool[Tensor, "batch pos"]
    ) -> tuple[Int[Tensor, "batch query"], Bool[Tensor, "batch query"]]:
        """Where the rows of `rows(queries)` stand in the sequence, and which of them are there (not filled up)."""
        selection = self._selections.queries(queries)
        return selection.index, selection.valid

    def average(
        self, values: Float[Tensor, "layer batch head query"], queries: str | Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "layer batch head"]:
        """The mean over each sample's own query tokens of what `rows(queries, reduce=...)` made of each row."""
        weight = self._selections.queries(queries).weight
        return (values * weight[:, None]).sum(-1, dtype=torch.float64)

    @torch.no_grad()
    def profile(self, queries: str | Bool[Tensor, "batch pos"]) -> Float[Tensor, "layer batch head key"]:
        """The mean attention row over the query tokens: `a[j] = 1/|Q| sum_{i in Q} A[i, j]` (arXiv:2606.05843 eq. 22).

        The tensor is shared: change a copy of it only.
        """
        selection = self._select(queries)
        if selection.key in self._profiles:
            return self._profiles[selection.key]
        out: Tensor | None = None
        for chunk in self._chunks(selection):
            if selection.even and chunk.rows.shape[3] == selection.length:
                piece = chunk.rows.mean(-2)
            else:
                piece = chunk.rows.mul_(selection.weight[:, None, chunk.queries, None]).sum(-2)
            if piece.shape[0] == len(self.layers) and piece.shape[2] == self.n_heads and out is None:
                out = piece  # all in one piece, or the first queries of all heads
                continue
            if out is None:
                out = piece.new_zeros(len(self.layers), self.batch, self.n_heads, self.n_keys)
            out[chunk.layers, :, chunk.heads] += piece
        assert out is not None
        self._profiles[selection.key] = out
        self._sums.append(out.sum(-1))
        return out

    def mass(
        self, queries: str | Bool[Tensor, "batch pos"], keys: str | Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "layer batch head"]:
        """The attention that the query tokens pay to the keys: `sum_{j in K} a[j]`, in [0, 1], as float64."""
        return key_mass(self.profile(queries), self.mask(keys))

    def top(self, queries: str | Bool[Tensor, "batch pos"], share: float) -> Bool[Tensor, "layer batch head key"]:
        """True at the `ceil(share * N)` largest entries of the profile (arXiv:2606.05843 eq. 23).

        N is the sample's own length: padding does not count and is never chosen. Ties go to the lower index.

        Raises:
            InputError: for a share that is not above 0 and at most 1.
        """
        if not 0.0 < share <= 1.0:
            raise InputError(f"Expected a share of the keys above 0 and at most 1; got {share!r}.")
        key = (self._selections.queries(queries).key, share)
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
    def chance(
        self, queries: str | Bool[Tensor, "batch pos"], keys: str | Bool[Tensor, "batch pos"]
    ) -> Float[Tensor, "layer batch"]:
        """The mass that a head attending evenly to all it sees would have: target tokens over visible tokens."""
        selection = self._select(queries)
        key = (selection.key, keys if isinstance(keys, str) else id(keys))
        if key not in self._chances:
            if self._plain_causal:
                level = self._causal_chance(selection, self._selections.host(keys))
            else:
                wanted = self.mask(keys)
                level = torch.zeros((), device=self.device)
                step = self._query_step()
                for start in range(0, selection.length, step):
                    part = slice(start, min(start + step, selection.length))
                    hidden = self._hidden(selection, part)
                    level = level + chance_level(~hidden, wanted, selection.weight[:, part])
            self._chances[key] = level.expand(len(self.layers), self.batch)
        return self._chances[key]

    def release(self) -> None:
        """Let go of q, k and everything computed from them; `check` still answers."""
        self._q, self._k, self._mask = [], [], []
        self.context = ViewContext()
        self._profiles.clear()
        self._tops.clear()
        self._chances.clear()

    def check(self) -> None:
        """Raise if any profile computed so far is not finite. Waits for the device; call it once per sample.

        Raises:
            NumericsError: naming layers and heads with a NaN or an infinity.
        """
        # a NaN anywhere in a row makes its sum one, and the sum of all sums
        if not self._sums or math.isfinite(float(torch.stack([sums.sum() for sums in self._sums]).sum())):
            return
        bad = ~torch.stack(self._sums).isfinite().all(0)
        if bool(bad.any()):
            found = bad.nonzero().tolist()
            names = ", ".join(f"L{self.layers[layer]}H{head} (sample {sample})" for layer, sample, head in found[:4])
            raise NumericsError(
                f"The attention of {len(found)} heads is not finite, first at {names}. The q or k of these layers hold "
                "NaN or infinity: half precision overflowed before the attention (load the model in bfloat16 or "
                "float32), or the inputs are damaged."
            )

    def _select(self, queries: str | Bool[Tensor, "batch pos"]) -> QuerySelection:
        selection = self._selections.queries(queries)
        if int(selection.positions.min()) < self.first:
            label = repr(queries) if isinstance(queries, str) else "given"
            raise InputError(
                f"Some of the {label} query tokens stand before position {self.first}, and of that shared prefix only "
                "the keys were kept. Let the metric name its query tokens in an attribute `queries`, or measure on "
                "plain batches (for NullQuery, reuse_prefix=False)."
            )
        return selection

    def _row_bytes(self, heads: int) -> int:
        return self.batch * heads * self.n_keys * 4 * 2  # float32; the scores and their softmax live side by side

    def _query_step(self) -> int:
        """How many queries of one group of heads that share a key head fit into the scratch memory."""
        return max(1, self._max_bytes // self._row_bytes(self.n_heads // self.n_kv_heads))

    def _chunks(self, selection: QuerySelection) -> Iterator[_Chunk]:
        """All rows of the selection, in pieces cut over layers first, then heads, then queries."""
        group = self.n_heads // self.n_kv_heads
        query_step = min(selection.length, self._query_step())
        kv_step = min(self.n_kv_heads, max(1, self._max_bytes // (self._row_bytes(group) * query_step)))
        layer_step = 1
        if kv_step == self.n_kv_heads:
            layer_step = max(1, self._max_bytes // (self._row_bytes(self.n_heads) * query_step))
        n = len(self.layers)
        for query in range(0, selection.length, query_step):
            queries = slice(query, min(query + query_step, selection.length))
            hidden = self._hidden(selection, queries)
            for layer in range(0, n, layer_step):
                layers = slice(layer, min(layer + layer_step, n))
                some = hidden if hidden.shape[0] == 1 else hidden[layers]
                for kv_head in range(0, self.n_kv_heads, kv_step):
                    kv_heads = slice(kv_head, min(kv_head + kv_step, self.n_kv_heads))
                    heads = slice(kv_heads.start * group, kv_heads.stop * group)
                    q, k = list(self._q[layers]), list(self._k[layers])
                    if kv_step < self.n_kv_heads:
                        q, k = [t[:, heads] for t in q], [t[:, kv_heads] for t in k]
                    chosen = _stack([selection.take(t, queries, self.first) for t in q])
                    rows = attention_rows(chosen, k, self._scale[layers], some)
                    yield _Chunk(layers, heads, queries, rows)

    def _hidden(self, selection: QuerySelection, part: slice) -> Bool[Tensor, "mask_layer batch query tail"]:
        """Which of the last `tail` keys these queries do not see; they all see the keys before.

        One mask for all layers if they share it, else one per layer.
        """
        index = selection.index[:, part]
        if self._plain_causal:  # all see what precedes the first of them
            first = int(selection.positions[:, part].min()) + 1
            return (torch.arange(first, self.n_keys, device=self.device) > index[..., None])[None]
        kinds = [_identity(mask) for mask in self._mask]
        distinct = dict(zip(kinds, self._mask, strict=True))
        built = {kind: ~mask.rows(index - self.first).to(self.device) for kind, mask in distinct.items()}
        if len(built) == 1:
            return next(iter(built.values()))[None]
        return torch.stack([built[kind] for kind in kinds])

    def _causal_chance(self, selection: QuerySelection, keys: np.ndarray) -> Float[Tensor, " batch"]:
        """`chance` where query i sees keys 0 .. i, counted on the host."""
        hit = np.take_along_axis(keys.cumsum(1), selection.positions, axis=1)
        return torch.from_numpy(selection.average(hit / (selection.positions + 1))).to(self.device, non_blocking=True)


def _identity(mask: MaskRows) -> tuple[object, ...]:
    """Equal for masks that are made from the very same parts: transformers hands one mask tensor to many layers."""
    parts = (mask.recipe, mask.dense, mask.padding)
    return (*map(id, parts), mask.causal, mask.window, mask.segments, mask.q_length, mask.kv_length)


def _stack(tensors: list[Tensor]) -> Tensor:
    """[batch ...] per layer to [layer batch ...] in one launch; a view if there is one layer."""
    if len(tensors) == 1:
        return tensors[0][None]
    # cat copies up to 4 axes in one kernel; stacking to 5 would take one per layer
    return torch.cat(tensors).view(len(tensors), *tensors[0].shape)
