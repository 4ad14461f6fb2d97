"""SAM of the `segment-anything` package: built from a config, its encoder's attention made fast, its decoder prompted READ's way.

READ appends the projected `[SEG]` embedding to the sparse prompt embeddings (protocol §4, step 8 and last paragraph).
Legend: n masks · K points · C = 256 channels · S side of SAM's padded square · hw decoder grid.
"""

from __future__ import annotations

import re
from functools import cache, partial

import torch
import torch.nn.functional as F
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer

from utils.image import SAM_PIXEL_MEAN, SAM_PIXEL_STD

from .config import SamConfig
from .sam_attention import use_fast_attention


def build_sam(config: SamConfig, fast_attention: bool = True) -> Sam:
    """A SAM with random weights. The package's own builders fix the sizes to ViT-B/L/H, hence the parts by hand.

    `fast_attention` False leaves the image encoder as the package has it, for comparison; `use_package_attention` of
    `model.sam_attention` does so later on.
    """
    sam = Sam(
        image_encoder=ImageEncoderViT(
            img_size=config.image_size,
            patch_size=config.patch_size,
            embed_dim=config.embed_dim,
            depth=config.depth,
            num_heads=config.num_heads,
            mlp_ratio=config.mlp_ratio,
            out_chans=config.out_dim,
            qkv_bias=True,
            norm_layer=partial(torch.nn.LayerNorm, eps=1e-6),
            use_rel_pos=True,
            window_size=config.window_size,
            global_attn_indexes=config.global_attn_indexes,
        ),
        prompt_encoder=PromptEncoder(
            embed_dim=config.out_dim,
            image_embedding_size=(config.grid_size, config.grid_size),
            input_image_size=(config.image_size, config.image_size),
            mask_in_chans=16,
        ),
        mask_decoder=MaskDecoder(
            transformer_dim=config.out_dim,
            transformer=TwoWayTransformer(depth=2, embedding_dim=config.out_dim, num_heads=8, mlp_dim=2048),
            num_multimask_outputs=3,
            iou_head_depth=3,
            iou_head_hidden_dim=256,
        ),
        pixel_mean=list(SAM_PIXEL_MEAN),
        pixel_std=list(SAM_PIXEL_STD),
    )
    if fast_attention:
        use_fast_attention(sam.image_encoder)
    return sam


def infer_sam_config(shapes: dict[str, tuple[int, ...]]) -> SamConfig:
    """The sizes of a SAM from the shapes of its tensors, so that no file needs to say which ViT it holds.

    `shapes` is keyed as in a SAM `.pth` (`image_encoder.…`).
    """
    try:
        _, grid, _, embed_dim = shapes["image_encoder.pos_embed"]
        patch_size = shapes["image_encoder.patch_embed.proj.weight"][-1]
        depth = 1 + max(int(m[1]) for k in shapes if (m := re.match(r"image_encoder\.blocks\.(\d+)\.", k)))
        reach = [shapes[f"image_encoder.blocks.{i}.attn.rel_pos_h"] for i in range(depth)]
        mlp = shapes["image_encoder.blocks.0.mlp.lin1.weight"][0]
        out_dim = shapes["image_encoder.neck.0.weight"][0]
    except KeyError as missing:
        raise ValueError(f"these are no SAM weights: {missing} is missing") from missing
    global_blocks = tuple(i for i, shape in enumerate(reach) if shape[0] == 2 * grid - 1)
    windows = {(shape[0] + 1) // 2 for shape in reach if shape[0] != 2 * grid - 1}
    return SamConfig(
        image_size=grid * patch_size,
        patch_size=patch_size,
        embed_dim=embed_dim,
        depth=depth,
        num_heads=embed_dim // reach[0][1],
        global_attn_indexes=global_blocks,
        window_size=windows.pop() if windows else 0,
        mlp_ratio=mlp / embed_dim,
        out_dim=out_dim,
    )


def embed_prompts(
    sam: Sam, points: torch.Tensor | None, labels: torch.Tensor | None, text: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sparse (n, K + 2, C) and dense (n, C, h, w) prompt embeddings; without points sparse is the text alone (n, 1, C).

    points (n, K, 2) in SAM's frame (before its half-pixel shift), labels (n, K), text (n, 1, C) the projected [SEG].
    Coordinates are rounded to the dtype of the positional matrix, as the released weights were trained (§4-8); the
    package's own entry would mix dtypes there, hence its parts are called one by one.
    """
    encoder = sam.prompt_encoder
    pe = encoder.pe_layer
    dtype = pe.positional_encoding_gaussian_matrix.dtype
    dense = _only_row(encoder.no_mask_embed).reshape(1, -1, 1, 1).expand(len(text), -1, *encoder.image_embedding_size)
    if points is None:
        return text, dense
    padding = points.new_zeros(len(points), 1, 2)
    coords = torch.cat([points + 0.5, padding], dim=1)  # pixel centres; the extra point the package appends without a box
    labels = torch.cat([labels, labels.new_full((len(labels), 1), -1)], dim=1)[..., None]
    coords = coords / _square(tuple(encoder.input_image_size), coords.device)
    place = pe._pe_encoding(coords.to(dtype))
    background, foreground = (_only_row(embedding) for embedding in encoder.point_embeddings[:2])
    kind = torch.where(labels == 1, foreground, background)
    embedded = torch.where(labels == -1, _only_row(encoder.not_a_point_embed), place + kind)
    return torch.cat([embedded, text.to(embedded.dtype)], dim=1), dense


@cache  # without end: recordings read it where it is, and there are few sizes
@torch.inference_mode(False)
def _square(size: tuple[int, int], device: torch.device) -> torch.Tensor:
    """(2,) float32, width and height of SAM's square."""
    return torch.tensor(size[::-1], dtype=torch.float32, device=device)


def _only_row(embedding: torch.nn.Embedding) -> torch.Tensor:
    """(1, C): the weight of a one-row embedding, looked up, since ZeRO-3 brings weights together in a module's forward only."""
    return embedding(torch.zeros(1, dtype=torch.long, device=embedding.weight.device))


def dense_position_encoding(sam: Sam) -> torch.Tensor:
    """(1, C, h, w) positional encoding of the image embedding's grid, in the dtype of the prompt encoder."""
    pe = sam.prompt_encoder.pe_layer
    height, width = sam.prompt_encoder.image_embedding_size
    matrix = pe.positional_encoding_gaussian_matrix
    y = (torch.arange(height, device=matrix.device) + 0.5) / height
    x = (torch.arange(width, device=matrix.device) + 0.5) / width
    grid = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)
    return pe._pe_encoding(grid.to(matrix.dtype)).permute(2, 0, 1)[None]


def decode_masks(
    sam: Sam,
    image_embedding: torch.Tensor,
    points: torch.Tensor | None,
    labels: torch.Tensor | None,
    text: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Low-resolution logits (n, 4h, 4w) and predicted IoU (n,) of n masks (first mask token, §4-8).

    `image_embedding` is that of one picture (C, h, w), or of each mask's own picture (n, C, h, w).
    """
    if len(text) == 0:  # the package cannot reshape an empty batch
        side = 4 * image_embedding.shape[-1]
        return text.new_zeros(0, side, side), text.new_zeros(0)
    sparse, dense = embed_prompts(sam, points, labels, text)
    if image_embedding.dim() == 3:
        image_embedding = image_embedding[None]
    else:
        # The package repeats one picture for all masks and adds their dense prompts to it. So pictures go in as such prompts.
        image_embedding, dense = torch.zeros_like(image_embedding[:1]), image_embedding + dense
    low_res, iou = sam.mask_decoder(
        image_embeddings=image_embedding,
        image_pe=dense_position_encoding(sam),
        sparse_prompt_embeddings=sparse,
        dense_prompt_embeddings=dense,
        multimask_output=False,
    )
    return low_res[:, 0], iou[:, 0]


def to_sam_frame(points: torch.Tensor, sam_size: tuple[int, int], original_size: tuple[int, int]) -> torch.Tensor:
    """(x, y) from pixels of the original picture to pixels of its resized copy in SAM's square (§4-7)."""
    scale = points.new_tensor([sam_size[1] / original_size[1], sam_size[0] / original_size[0]])
    return points * scale


def upscale_logits(
    low_res: torch.Tensor, image_size: int, sam_size: tuple[int, int], original_size: tuple[int, int]
) -> torch.Tensor:
    """(n, h, w) low-resolution logits to (n, H, W) float32 in the original picture (§4-9)."""
    if len(low_res) == 0:
        return low_res.new_zeros(0, *original_size, dtype=torch.float32)
    logits = F.interpolate(low_res[:, None].float(), (image_size, image_size), mode="bilinear", align_corners=False)
    logits = logits[..., : sam_size[0], : sam_size[1]]
    return F.interpolate(logits, tuple(original_size), mode="bilinear", align_corners=False)[:, 0]
