"""SAM's image encoder, faster: the blocks of the `segment-anything` package with the work of their attention arranged otherwise.

    use_fast_attention(encoder)       what `build_sam` does; the results are the package's but for rounding
    use_package_attention(encoder)    back to the package's own
    compile_blocks(encoder)           torch.compile for the blocks, for many pictures on a GPU

The package writes the scores of all queries and keys to memory, adds relative positions to them in two more passes, and a
softmax in another: 16 x 4096 x 4096 scores in a global block of ViT-H at 1024 px. Here

    on a CPU      `tiled` makes them piece by piece, and blocks with windows take some rows of windows at a time: what is needed
                  next is then still in the processor's cache
    elsewhere     `folded` puts the relative positions into longer queries and keys: a fused kernel then needs no scores at all.
                  In windows, whose scores are few, `biased` writes them as a bias for such a kernel, which takes less
    everywhere    the padding of windows that reach over the edge goes through the linear layers as one token

Only the classes of existing modules are exchanged, for ones without parameters and state of their own: names, weights,
gradients, copies, pickles and what DeepSpeed does to modules stay as they are. `benchmarks/sam_encoder.py` measures all this.

Legend: B pictures · H x W tokens of a picture, C wide · n windows, or whole pictures · h x w tokens of one, hw together
· a heads · d width of a head · m = n·a.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT
from segment_anything.modeling.image_encoder import Attention, Block

TILE = 2**22
"""Bytes of scores that `tiled` makes at a time: what a core's share of a usual cache holds, and enough for a quick product."""

FEW = 2**9
"""Tokens of a window up to which `biased` takes less than `folded`: from there on, a bias is more to read than longer keys."""

BAND = 2**10
"""Tokens that go through a block with windows, or through an MLP, together on a CPU: enough for a quick product, and no more."""


def use_fast_attention(encoder: ImageEncoderViT) -> ImageEncoderViT:
    """The same encoder, its blocks made fast in place. Blocks that know no relative positions stay the package's."""
    for block in encoder.blocks:
        if type(block) is Block and type(block.attn) is Attention and block.attn.use_rel_pos:
            block.__class__, block.attn.__class__ = FastBlock, FastAttention
    return encoder


def use_package_attention(encoder: ImageEncoderViT) -> ImageEncoderViT:
    """The same encoder, its blocks made the package's again in place."""
    for block in encoder.blocks:
        if isinstance(block, FastBlock):
            block.__class__, block.attn.__class__ = Block, Attention
    return encoder


def compile_blocks(encoder: ImageEncoderViT) -> ImageEncoderViT:
    """The same encoder, its blocks compiled when first called: one code for those with windows, one for the others.

    `build_sam` leaves this out: the first picture waits for it, and torch needs a compiler on the machine.
    """
    for block in encoder.blocks:
        block.compile()
    return encoder


def arithmetic(encoder: ImageEncoderViT) -> list[str]:
    """Which code computes the blocks of an encoder: another gives other last bits."""
    return sorted(
        {f"{type(block).__name__}{' compiled' * (block._compiled_call_impl is not None)}" for block in encoder.blocks}
    )


# ------------------------------------------------------------------------------------------------ modules


class FastBlock(Block):
    """The package's block, whose attention cuts the windows itself."""

    def forward(self, x_BHWC: torch.Tensor) -> torch.Tensor:
        if x_BHWC.device.type != "cpu":
            # The first block is given channels that lie apart, and what is added to them would lie so in all blocks.
            return self._mlp_half(self._attention_half(x_BHWC.contiguous()))
        # In bands: windows need no other rows than their own, the MLP not even those.
        B, _, W, _ = x_BHWC.shape
        if not self.window_size:
            x_BHWC = self._attention_half(x_BHWC)
        step = self.window_size or 1
        bands = x_BHWC.split(max(BAND // (B * W * step), 1) * step, dim=1)
        return torch.cat([self._mlp_half(self._attention_half(x) if self.window_size else x) for x in bands], dim=1)

    def _attention_half(self, x_BHWC: torch.Tensor) -> torch.Tensor:
        return x_BHWC + self.attn(self.norm1(x_BHWC), self.window_size)

    def _mlp_half(self, x_BHWC: torch.Tensor) -> torch.Tensor:
        return x_BHWC + self.mlp(self.norm2(x_BHWC))


class FastAttention(Attention):
    """The package's attention, over everything or (`window` > 0) within windows of `window` x `window` tokens."""

    def forward(self, x_BHWC: torch.Tensor, window: int = 0) -> torch.Tensor:
        B, H, W, C = x_BHWC.shape
        size = (window, window) if window else (H, W)
        tokens = x_BHWC.flatten(1, 2)
        if window:
            into, back = window_places(H, W, window, x_BHWC.device)
            # The package fills windows up with zeros before this layer: here one zero token goes through it for all.
            qkv = self.qkv(torch.cat([tokens, tokens.new_zeros(B, 1, C)], dim=1)).index_select(1, into)
        else:
            qkv = self.qkv(tokens)
        q, k, v = qkv.view(-1, size[0] * size[1], 3, self.num_heads, C // self.num_heads).permute(2, 0, 3, 1, 4)
        out = self.attend(q, k, v, size).transpose(1, 2).reshape(B, -1, C)
        if window:
            out = out.index_select(1, back)
        return self.proj(out).view(B, H, W, C)

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
        """(n, a, hw, d) from as large q, k, v, in the way that is fastest on their device."""
        way = tiled if q.device.type == "cpu" else biased if size[0] * size[1] <= FEW else folded
        return way(q, k, v, size, self.rel_pos_h, self.rel_pos_w, self.scale)


def _kept(make: Callable) -> Callable:
    """The function, its results kept for the next blocks and pictures, for good: recordings (`model.recording`) read them there.

    Compiled code makes them itself, in passing.
    """
    # Made outside of inference mode, whose tensors could not serve a training step later.
    kept = cache(torch.inference_mode(False)(make))

    @wraps(make)
    def get(*args: Any) -> Any:
        return make(*args) if torch.compiler.is_compiling() else kept(*args)

    return get


@_kept
def window_places(H: int, W: int, window: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The token of each place in all windows, H·W where the padding is, and the place of each of the H·W tokens. int64."""
    columns = -(-W // window)
    y = torch.arange(-(-H // window) * window, device=device)[:, None]
    x = torch.arange(columns * window, device=device)
    token = torch.where((y < H) & (x < W), y * W + x, H * W)
    into = token.view(-1, window, columns, window).transpose(1, 2).flatten()
    y, x = y[:H], x[:W]
    back = ((y // window * columns + x // window) * window + y % window) * window + x % window
    return into, back.flatten()


def relative_terms(
    q_mPd: torch.Tensor, size: tuple[int, int], rel_pos_h: torch.Tensor, rel_pos_w: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """What each query's scores gain by a key's row (m, h, w, h) and by its column (m, h, w, w); P = hw queries.

    A query is multiplied with the embeddings of all 2h - 1 distances, of which it needs h: those from h - 1 - y on if it
    stands in row y. Strides can say that they begin one earlier in each row, so both results are views. The package picks
    embeddings first, by a table made on the CPU, for which a GPU has to wait in every block.
    """
    (h, w), m = size, len(q_mPd)
    by_row = q_mPd @ _distances(rel_pos_h, 2 * h - 1)
    by_column = q_mPd @ _distances(rel_pos_w, 2 * w - 1)
    rows, columns = by_row.shape[-1], by_column.shape[-1]
    # With an offset into the whole product: through a view of the part from there on, autograd would lose what is before it.
    by_row = by_row.as_strided((m, h, w, h), (h * w * rows, w * rows - 1, rows, 1), h - 1)
    by_column = by_column.as_strided((m, h, w, w), (h * w * columns, w * columns, columns - 1, 1), w - 1)
    return by_row, by_column


def _distances(rel_pos: torch.Tensor, count: int) -> torch.Tensor:
    """(d, count or more) the embeddings, the last first, interpolated as in the package where they were made for another size.

    On a GPU zeros fill them up to a multiple of 8, without which products take a slow path.
    """
    if len(rel_pos) != count:
        rel_pos = F.interpolate(rel_pos.T[None], size=count, mode="linear")[0].T
    spare = 0 if rel_pos.device.type == "cpu" else -count % 8
    return F.pad(rel_pos.flip(0), (0, 0, 0, spare)).T


# ------------------------------------------------------------------------------------------------ ways to attend
# From q, k, v (n, a, hw, d), (h, w), the embeddings and the factor of q·k to (n, a, hw, d).


def tiled(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    size: tuple[int, int],
    rel_pos_h: torch.Tensor,
    rel_pos_w: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Some windows at a time, or some heads of one window, or some rows of queries of one head."""
    (n, heads, tokens, d), (h, w) = q.shape, size
    room = TILE // q.element_size() // tokens  # for queries
    windows, some, rows = (max(room // queries, 1) for queries in (heads * tokens, tokens, w))
    out = q.new_empty(n, tokens, heads, d)
    for i in range(0, n, windows):
        q_i, k_i, v_i = (x[i : i + windows].flatten(0, 1) for x in (q, k, v))
        by_row, by_column = relative_terms(q_i, size, rel_pos_h, rel_pos_w)
        out_i = q.new_empty(q_i.shape)
        for j in range(0, len(q_i), some):
            part = slice(j, j + some)
            for y in range(0, h, rows):
                queries = slice(y * w, (y + rows) * w)
                scores = by_row[part, y : y + rows, :, :, None] + by_column[part, y : y + rows, :, None, :]
                scores = scores.flatten(3).flatten(1, 2)
                scores.baddbmm_(q_i[part, queries], k_i[part].transpose(1, 2), alpha=scale)
                out_i[part, queries] = scores.softmax(dim=-1) @ v_i[part]
        out[i : i + windows] = out_i.unflatten(0, (-1, heads)).transpose(1, 2)
    return out.transpose(1, 2)


def biased(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    size: tuple[int, int],
    rel_pos_h: torch.Tensor,
    rel_pos_w: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """A fused kernel adds the relative positions to the scores, which are written out for it: a query's terms times key marks."""
    (n, heads, tokens, _), (h, w) = q.shape, size
    terms = relative_terms(q.flatten(0, 1), size, rel_pos_h, rel_pos_w)
    marks = key_marks(h, w, -(h + w) % 8, q.dtype, q.device)
    spare = q.new_zeros(1).expand(n * heads, h, w, marks.shape[1] - h - w)
    # Rows of the bias are a multiple of 8 long too, of which the kernel sees what there are keys for.
    bias = torch.cat([*terms, spare], dim=-1).flatten(1, 2) @ F.pad(marks, (0, 0, 0, -tokens % 8)).T
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.unflatten(0, (n, heads))[..., :tokens], scale=scale)


def folded(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    size: tuple[int, int],
    rel_pos_h: torch.Tensor,
    rel_pos_w: torch.Tensor,
    scale: float,
) -> torch.Tensor:
    """Longer queries and keys, whose products alone are the scores with their relative positions.

    A query is followed by its h + w terms, a key by zeros with a one for its row and a one for its column. In ViT-H's global
    blocks that makes 80 + 64 + 64 = 208 numbers, and the fused kernels take up to 256.
    """
    (n, heads, _, d), (h, w) = q.shape, size
    terms = (x.unflatten(0, (n, heads)) for x in relative_terms(q.flatten(0, 1), size, rel_pos_h, rel_pos_w))
    marks = key_marks(h, w, -(d + h + w) % 8, q.dtype, q.device)  # the kernels want a multiple of 8
    spare = q.new_zeros(1).expand(n, heads, h, w, marks.shape[1] - h - w)
    q = torch.cat([q.unflatten(2, size) * scale, *terms, spare], dim=-1).flatten(2, 3)
    k = torch.cat([k, marks.expand(n, heads, -1, -1)], dim=-1)
    if q.element_size() == 2:  # flash kernels, for half precision alone, want values as wide as keys
        v = F.pad(v, (0, q.shape[-1] - d))
    return F.scaled_dot_product_attention(q, k, v, scale=1.0)[..., :d]


@_kept
def key_marks(h: int, w: int, spare: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """(hw, h + w + spare): a one at each key's row and at h + its column, else zeros."""
    place = torch.arange(h * w, device=device)[:, None]
    number = torch.arange(h + w + spare, device=device)
    return ((number == place // w) | (number == h + place % w)).to(dtype)
