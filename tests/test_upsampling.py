"""Upsampling as matrix products, points that replace pixels, and the intervals that pixels lie in."""

import pytest
import torch
import torch.nn.functional as F
from helpers import close

from otseg.upsampling import axis_bands, axis_matrix, gauss_nodes, make_axis, sample_points


@pytest.mark.parametrize("size_in, size_out", [(4, 16), (5, 35), (3, 7), (1, 4), (6, 6), (8, 3)])
def test_upsampling_matrix(size_in, size_out):
    x = torch.randn(2, 3, size_in, dtype=torch.float64)
    U, weight = axis_matrix(size_in, size_out, None, x.dtype, x.device)
    close(x @ U.T, F.interpolate(x, size=size_out, mode="linear"), 1e-12)
    assert (weight == 1).all()


@pytest.mark.parametrize("nodes", [None, 4])
@pytest.mark.parametrize("size_in, size_out, rows", [(32, 512, 64), (5, 35, 4), (4, 4, 3), (8, 3, 1), (1, 9, 5)])
def test_bands_of_the_upsampling_matrix(size_in, size_out, rows, nodes):
    "Together they are the matrix, and no band has more columns than it needs."
    here = torch.float32, torch.device("cpu")
    matrix, weights = axis_matrix(size_in, size_out, nodes, *here)
    whole, bands = torch.zeros_like(matrix), axis_bands(size_in, size_out, nodes, rows, *here)
    for band in bands:
        whole[band.rows, band.tokens] = band.U
        assert band.U.shape[1] <= len(band.U) * size_in // min(size_out, len(matrix)) + 3
    assert torch.equal(whole, matrix) and torch.equal(torch.cat([band.weights for band in bands]), weights)


@pytest.mark.parametrize("pixels, nodes", [(2, 1), (5, 4), (16, 3), (16, 8), (33, 12), (256, 6)])
def test_gauss_nodes_are_exact_for_polynomials(pixels, nodes):
    where, weight = gauss_nodes(pixels, nodes)
    all_x = (torch.arange(pixels, dtype=torch.float64) - (pixels - 1) / 2) / pixels
    assert len(where) == nodes and (weight > 0).all() and where.abs().max() < pixels / 2
    for degree in range(2 * nodes):
        assert abs((weight * (where / pixels) ** degree).sum() - (all_x**degree).sum()) < 1e-12 * pixels


@pytest.mark.parametrize("nodes", [None, 1, 4, 8])
@pytest.mark.parametrize("size_in, size_out", [(32, 512), (5, 33), (7, 73), (4, 4), (9, 4), (1, 6), (6, 47)])
def test_sample_points(size_in, size_out, nodes):
    "The weights sum to the number of pixels, also for each token, and no interval has too many points."
    at, weight = sample_points(size_in, size_out, nodes)
    assert (at.diff() >= 0).all() and 0 <= at.min() and at.max() <= size_in - 1
    close(weight.sum(), torch.tensor(float(size_out), dtype=torch.float64), 1e-12)
    (U, w), (U_pixels, _) = (axis_matrix(size_in, size_out, n, torch.float64, at.device) for n in (nodes, None))
    close(w @ U, U_pixels.sum(0), 1e-12)
    inner = at[(at > 0) & (at < size_in - 1)]
    if nodes:
        assert all((inner.floor() == token).sum() <= nodes for token in range(size_in))


@pytest.mark.parametrize("size_in, size_out", [(32, 512), (5, 33), (7, 73), (4, 4), (9, 4), (1, 6)])
def test_axis(size_in, size_out):
    "Token and position of each pixel give bilinear interpolation, and each interval holds the pixels of its token."
    starts, token, part = make_axis(size_in, size_out, torch.device("cpu"))
    x = torch.randn(1, 1, size_in)
    after = (token + 1).clamp_max(size_in - 1)
    upsampled = (1 - part) * x[0, 0, token] + part * x[0, 0, after]
    close(upsampled[None, None], F.interpolate(x, size=size_out, mode="linear"), 1e-5)
    assert starts[0] == 0 and starts[-1] == size_out and (starts.diff() >= 0).all()
    for i in range(1, size_in):
        assert (token[starts[i] : starts[i + 1]] == i - 1).all()
