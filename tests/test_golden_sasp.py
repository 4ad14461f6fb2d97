"""SasP against the recordings of the original: points, labels, integer cells, gradients, similarity."""

import json

import numpy as np
import pytest
import torch
from golden_dir import golden_dirs
from tiny import tiny_read

from model import SaspConfig, sam, sasp
from model.sasp import fine_map_matrices, select_points, similarity, similarity_map


def sasp_cases():
    for folder in golden_dirs():
        if (folder / "sasp/cases.json").is_file():
            for case in json.loads((folder / "sasp/cases.json").read_text())["cases"]:
                yield pytest.param(folder, case, id=f"{folder.name}-{case['name']}")


@pytest.mark.parametrize(("folder", "case"), list(sasp_cases()))
def test_points_labels_and_gradient(folder, case):
    arrays = np.load(folder / "sasp/cases.npz")
    key, shape = case["key"], tuple(case["shape_hw"])
    values = torch.from_numpy(arrays[f"{key}_sm"]).requires_grad_()
    config = SaspConfig(**{name: case[name] for name in ("num_points", "t_pos", "t_neg", "down_sample")})
    found = select_points(values[None], shape, config)
    points, labels, cells = (t[0] for t in found)
    expected = torch.from_numpy(arrays[f"{key}_points"])
    assert points.shape == expected.shape
    tolerance = 5e-4 if shape == (1080, 1920) else 3e-4
    if case["name"].startswith("ties_"):
        # Among equal values the original's unstable sort chose arbitrarily: the value under the cell must agree.
        assert sorted(labels.tolist()) == sorted(arrays[f"{key}_labels"].tolist())
        grid = _coarse(values.detach(), case["down_sample"])
        ours, theirs = cells, torch.from_numpy(arrays[f"{key}_int_points"])
        assert torch.equal(_value_under(grid, ours, shape), _value_under(grid, theirs, shape))
        return
    assert torch.equal(labels, torch.from_numpy(arrays[f"{key}_labels"]))
    assert torch.equal(cells, torch.from_numpy(arrays[f"{key}_int_points"]))
    assert (points - expected).abs().max() <= tolerance
    if f"{key}_grad_sm" in arrays:
        coefficient = torch.from_numpy(arrays[f"{key}_grad_coef"])
        (gradient,) = torch.autograd.grad((points * coefficient).sum(), values)
        recorded = torch.from_numpy(arrays[f"{key}_grad_sm"])
        exact = _gradient_of_the_rule(values.detach(), shape, cells, coefficient)
        tolerance = 1e-2 * recorded.abs() + 1e-4 * recorded.abs().max()
        # The recording sums H*W float32 terms that cancel, so a few of its cells are further than the tolerance from the
        # same rule in float64: there ours must meet the latter. Everywhere else ours must meet both.
        rounding = (recorded - exact).abs() > tolerance
        assert rounding.sum() <= 0.005 * rounding.numel()
        assert ((gradient - recorded).abs() <= tolerance)[~rounding].all()
        assert ((gradient - exact).abs() <= tolerance).all()


@pytest.mark.parametrize("cells", [12, 24])
def test_cell_centres_are_those_of_float32_tensors(cells):
    """A centre was a 0-dim float32 tensor times a Python float, cut to an int; float64 gives another pixel for 1.8 % of sizes."""
    sides = np.arange(200, 1101)
    lengths, shortest = np.meshgrid(sides, sides, indexing="ij")
    lengths, shortest = lengths[lengths >= shortest], shortest[lengths >= shortest]
    padded = cells + 2 * (((lengths * (cells / shortest)).astype(int) - cells) // 2)
    pairs = sorted(set(zip(lengths.tolist(), padded.tolist(), strict=True)))
    in_float64_differ = 0
    for number, (length, count) in enumerate(pairs):
        index = np.arange(count, dtype=np.float32) + np.float32(0.5)
        rule = np.minimum(index * np.float32(length / count), length - 1).astype(int).tolist()
        assert sasp._released_centres(length, count) == rule, (length, count)
        if number % 100 == 0:  # the rule as the original writes it, tensor by tensor
            assert rule == [int(min((i + 0.5) * (length / count), length - 1)) for i in torch.arange(count)]
        in_float64_differ += rule != [int(min((i + 0.5) * length / count, length - 1)) for i in range(count)]
    assert in_float64_differ > 0  # else this test would not see the rule


def test_cells_lie_on_the_float32_centres():
    config = SaspConfig(num_points=1000, down_sample=2)
    rows = set(select_points(torch.rand(1, 576), (400, 640), config).cells[0, :, 1].tolist())
    assert 249 in rows and 250 not in rows


def _gradient_of_the_rule(values, shape, cells, coefficient):
    """d sum(points * coefficient) / d map in float64, each point a sum over the whole picture as §4-6 states it."""
    values = values.double().requires_grad_()
    rows, columns = (m.double() for m in fine_map_matrices(shape, 24, 336, "released", values.device))
    normal = (values - values.min(0).values) / (values.max(0).values - values.min(0).values)
    fine = rows @ normal.view(24, 24) @ columns.T
    ys, xs = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) for n in shape), indexing="ij")
    upstream = torch.zeros_like(fine)
    for (x, y), (cx, cy) in zip(cells.tolist(), coefficient.double().tolist(), strict=True):
        weight = torch.exp(fine.detach() - (xs - x) ** 2 - (ys - y) ** 2)
        weight = weight / weight.sum()
        value = cx * xs + cy * ys
        upstream += weight * (value - (weight * value).sum())
    return torch.autograd.grad((fine * upstream).sum(), values)[0].float()


def _coarse(values, down_sample):
    grid = values.view(1, 1, 24, 24)
    size = 24 // down_sample
    return torch.nn.functional.interpolate(grid, size=(size, size), mode="bilinear", align_corners=False)[0, 0]


def _value_under(grid, cells, shape):
    """Coarse value of the cell that holds each integer pixel (the pictures of the ties cases need no padding quirk)."""
    size, (height, width) = len(grid), shape
    shortest = min(shape)
    axes = []
    for place, length in ((cells[:, 1], height), (cells[:, 0], width)):
        padded = size + 2 * ((int(length * size / shortest) - size) // 2)
        axes.append(((place + 0.5) * padded / length).long() - (padded - size) // 2)
    return grid[axes[0], axes[1]]


def similarity_cases():
    for folder in golden_dirs():
        if (folder / "simmap/cases.npz").is_file():
            arrays = np.load(folder / "simmap/cases.npz")
            for key in arrays.files:
                if key.endswith("_text") and arrays[key].shape[0] == 1:
                    yield pytest.param(folder, key.removesuffix("_text"), id=f"{folder.name}-{key}")


@pytest.mark.parametrize(("folder", "key"), list(similarity_cases()))
def test_similarity_is_a_plain_dot_product(folder, key):
    arrays = np.load(folder / "simmap/cases.npz")
    image, text = (torch.from_numpy(arrays[f"{key}_{part}"]).float() for part in ("image", "text"))
    expected = torch.from_numpy(arrays[f"{key}_sim"])[..., 0]
    assert (similarity(image, text) - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("geometry", ["released", "exact"])
@pytest.mark.parametrize("bad", [0.0, float("nan"), float("inf")], ids=["constant", "nan", "infinite"])
def test_a_map_that_says_nothing_gives_neutral_points(geometry, bad):
    """The original raises IndexError here (a constant or NaN map has no cell in any class)."""
    values = torch.zeros(2, 144)
    values[0, 3] = bad
    values[1] = torch.linspace(0, 1, 144)
    found = select_points(values, (120, 160), SaspConfig(down_sample=1, geometry=geometry), clip_image_size=168)
    assert (found.labels[0] == -1).all()
    assert (found.labels[1] == 1).any()
    assert found.points.isfinite().all()


def test_more_points_than_cells_gives_all_cells():
    found = select_points(torch.rand(1, 16), (40, 40), SaspConfig(num_points=30, down_sample=1), clip_image_size=56)
    assert found.points.shape == (1, 16, 2)


def test_no_positive_cell_is_no_error():
    """The released rounding crops the edge columns of this picture away: the only high cells may lie there."""
    values = torch.zeros(1, 24, 24)
    values[..., :2] = 1.0
    values[0, 5, 7] = 0.3
    found = select_points(values.flatten(1), (481, 321))
    assert (found.labels == 1).sum() == 0 and found.points.isfinite().all()


def test_exact_geometry_puts_points_on_their_tokens():
    """A single hot token of a landscape picture: `exact` lands on it, `released` drifts outwards (protocol §8-5)."""
    height, width, clip = 427, 640, 336
    resized = int(clip * width / height)
    x_true = ((0.5 + (resized - clip) // 2 / (clip / 24)) / (resized / (clip / 24))) * width
    values = torch.zeros(1, 576)
    values[0, 24 * 12] = 1.0
    exact, drift = (
        select_points(values, (height, width), SaspConfig(num_points=1, down_sample=1, geometry=geometry)).points[0, 0]
        for geometry in ("exact", "released")
    )
    assert abs(exact[0] - x_true) < 2
    assert x_true - drift[0] > 4


def test_window_equals_the_whole_picture():
    """The refinement sums over a window; over the whole picture the number is the same."""
    values, shape = torch.rand(1, 576, dtype=torch.float32), (60, 80)
    found = select_points(values, shape, SaspConfig(num_points=30))
    fine = similarity_map(values, shape)[0].double()
    ys, xs = torch.meshgrid(torch.arange(60.0).double(), torch.arange(80.0).double(), indexing="ij")
    for point, (x, y) in zip(found.points[0], found.cells[0].tolist(), strict=True):
        weight = torch.softmax(fine.flatten(), 0).view(shape) * torch.exp(-((xs - x) ** 2 + (ys - y) ** 2))
        weight = weight / weight.sum()
        whole = torch.stack([(weight * xs).sum(), (weight * ys).sum()])
        assert (point - whole).abs().max() < 1e-4


def test_sasp_serves_a_model_that_is_not_ours():
    """The recipe of the README: SAM as the package has it, its prompts followed by a projected [SEG]: the same mask."""
    model, size, inside = tiny_read(), (40, 56), (46, 64)
    generator = torch.Generator().manual_seed(3)
    values, seg = torch.randn(3, 16, generator=generator), torch.randn(3, 256, generator=generator)
    embedding = torch.randn(1, 256, 4, 4, generator=generator)
    encoder = model.sam.prompt_encoder

    found = select_points(values, size, SaspConfig(num_points=6, down_sample=1), clip_image_size=56)
    places = found.points * found.points.new_tensor([inside[1] / size[1], inside[0] / size[0]])
    sparse, dense = encoder(points=(places, found.labels), boxes=None, masks=None)
    logits, _ = model.sam.mask_decoder(
        image_embeddings=embedding, image_pe=encoder.get_dense_pe(),
        sparse_prompt_embeddings=torch.cat([sparse, seg[:, None]], dim=1), dense_prompt_embeddings=dense,
        multimask_output=False,
    )  # fmt: skip

    ours, _ = sam.decode_masks(model.sam, embedding[0], places, found.labels, seg[:, None])
    assert found.labels.unique().tolist() == [-1, 0, 1]
    torch.testing.assert_close(logits[:, 0], ours, atol=1e-5, rtol=1e-5)
