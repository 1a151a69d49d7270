"""Texture synthesis from patches: image quilting that keeps all of every patch in use and closes its seams.

Blocks of the patches are laid over the canvas, each chosen among all positions of all patches by how well it continues
its neighbours, and cut where it differs least from them (Efros & Freeman, Image Quilting for Texture Synthesis and
Transfer, SIGGRAPH 2001). Quilting alone drifts into flat regions, which fit everything, and repeats what fits best; here
the choice also counts how often a block's pixels were used before, and no patch may get far ahead of another. What steps
remain at the cuts are levelled out over some pixels around them (Pérez et al., Poisson Image Editing, SIGGRAPH 2003).
"""

from functools import lru_cache

import numpy as np

BLOCK, OVERLAP = 40, 8      # px: the side of a block, and what neighbours share of it; both multiples of 4
STEP = BLOCK - OVERLAP
BALANCE = 1.0               # what one earlier use of a block's pixels costs, or of its colours
LEAD = 4                    # blocks that a patch may be ahead of another
APART = 4                   # px that a block keeps from being the mere continuation of a neighbour
REACH = 16                  # px over which a step at a cut is levelled out


def quilt(patches, size, rng):
    """Synthesise a texture from patches of one photo.

    patches: (P, H, W, 3) uint8, H and W at least BLOCK; size: side of the texture, px; rng: numpy Generator.
    Returns (size, size, 3) uint8.
    """
    return close_cuts(patches, lay_blocks(patches, size, rng))


def lay_blocks(patches, size, rng):
    """Quilt: the index into patches.reshape(-1, 3) of every pixel of the texture, (size, size) int64."""
    count, height, width, _ = patches.shape
    if min(height, width) < BLOCK:
        raise ValueError(f"patches of {width}×{height} px are smaller than a block, {BLOCK} px")
    colours = patches - patches.mean(axis=(0, 1, 2), dtype=np.float32)   # small numbers: float32 holds their squares
    pixels = colours.reshape(-1, 3)
    cells = [(4, 2), (2, 4)]                                          # px, longer along the overlap than across it
    windows = [all_windows(colours, (BLOCK, OVERLAP), cells[0]), all_windows(colours, (OVERLAP, BLOCK), cells[1])]
    norms = [np.einsum("ij,ij->j", samples, samples) for samples in windows]
    shape = count, height - BLOCK + 1, width - BLOCK + 1              # of all positions of a block
    used, counts = np.zeros(shape, np.float32), np.zeros(count, int)
    bins = (patches >> 5).astype(int).reshape(-1, 3) @ (64, 8, 1)     # the colour of each pixel, one of 512
    bin_sizes, bin_uses = np.bincount(bins, minlength=512), np.zeros(512)
    blocks = -(-(size - OVERLAP) // STEP)
    sources = np.zeros((blocks * STEP + OVERLAP,) * 2, np.int64)
    places = np.zeros((blocks, blocks, 3), int)                       # patch, top and left of each block
    at = np.arange(BLOCK)

    # Blocks that lie a knight's move apart neither touch nor need each other: each wave is one batch.
    for wave in range(3 * blocks - 2):
        rows = np.arange(max(0, (wave - blocks + 2) // 2), min(wave // 2, blocks - 1) + 1)
        columns = wave - 2 * rows
        here = STEP * rows[:, None, None] + at[:, None], STEP * columns[:, None, None] + at
        before = sources[here]                                        # N×BLOCK×BLOCK: what neighbours left there
        neighbours = columns > 0, rows > 0                            # at the left, at the top
        strips = before[:, :, :OVERLAP], before[:, :OVERLAP]
        error = np.zeros((len(rows), len(norms[0])), np.float32)
        for exists, strip, cell, samples, norm in zip(neighbours, strips, cells, windows, norms):
            wanted = cell_means(pixels[strip[exists]], cell).reshape(exists.sum(), len(samples))
            error[exists] += norm - 2 * (wanted @ samples) + np.square(wanted).sum(1)[:, None]
        colour_uses = block_means((bin_uses / np.maximum(bin_sizes, 1))[bins].reshape(patches.shape[:3]))
        for i, (row, column) in enumerate(zip(rows, columns)):
            cost = cost_of_positions(error[i].reshape(shape), len(samples), used + colour_uses, rng)
            cost[counts - counts.min() >= LEAD] = np.inf
            if column:
                forbid_near(cost, places[row, column - 1] + (0, 0, STEP))
            if row:
                forbid_near(cost, places[row - 1, column] + (0, STEP, 0))
            place = np.unravel_index(cost.argmin(), shape)
            places[row, column] = place
            counts[place[0]] += 1
            count_use(used[place[0]], *place[1:])
        patch, top, left = places[rows, columns].T[:, :, None, None]
        block = (patch * height + top + at[:, None]) * width + left + at
        bin_uses += np.bincount(bins[block].ravel(), minlength=512)
        difference = np.square(pixels[block] - pixels[before]).sum(3)
        keep_left, keep_top = np.split(before_cut(np.concatenate(
            [difference[:, :, :OVERLAP], difference[:, :OVERLAP].transpose(0, 2, 1)])), 2)
        keep = np.zeros(block.shape, bool)
        keep[:, :, :OVERLAP] = keep_left & neighbours[0][:, None, None]
        keep[:, :OVERLAP] |= keep_top.transpose(0, 2, 1) & neighbours[1][:, None, None]
        sources[here] = np.where(keep, before, block)
    return sources[:size, :size]


def cell_means(images, cell):
    """(N, H, W, 3) to (N, H/h, W/w, 3), the means of h×w pixels: enough to compare overlaps by, at an eighth of the work."""
    n, height, width, _ = images.shape
    h, w = cell
    return images.reshape(n, height // h, h, width // w, w, 3).mean(axis=(2, 4))


def all_windows(patches, size, cell):
    """cell_means of the windows of (height, width) at all positions of a block, as columns: (numbers, positions)."""
    (h, w), (height, width) = cell, size
    rows, columns = patches.shape[1] - h + 1, patches.shape[2] - w + 1
    means = sum(patches[:, i:i + rows] for i in range(h))
    means = sum(means[:, :, i:i + columns] for i in range(w)) / (h * w)         # of the cell at every position
    patch, row, column, channel = means.strides
    rows, columns = patches.shape[1] - BLOCK + 1, patches.shape[2] - BLOCK + 1
    windows = np.lib.stride_tricks.as_strided(
        means, (height // h, width // w, 3, len(patches), rows, columns), (h * row, w * column, channel, patch, row, column))
    return windows.reshape(height // h * (width // w) * 3, -1)


def block_means(values):
    """(P, H, W) to the means over the block at each position, (P, rows, columns) float32."""
    sums = np.pad(values.cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))
    sums = sums[:, BLOCK:, BLOCK:] - sums[:, :-BLOCK, BLOCK:] - sums[:, BLOCK:, :-BLOCK] + sums[:, :-BLOCK, :-BLOCK]
    return (sums / BLOCK ** 2).astype(np.float32)


def cost_of_positions(error, samples, uses, rng):
    """What taking a block from each position (P, rows, columns) costs: overlap error, earlier uses, a little chance.

    error: squared, summed over `samples` numbers. Its unit is what the best twentieth of the positions reach, or one
    level a sample, which nobody sees. Its cost levels off: where flat regions fit a thousand times better than what has
    structure, structure shall still get its turn.
    """
    good = np.partition(error, error.size // 20, axis=None)[error.size // 20]
    error = np.maximum(error, 0) / max(good, samples)
    return 6 * error / (3 + error) + BALANCE * uses + 0.1 * rng.random(error.shape, np.float32)


def forbid_near(cost, place):
    patch, top, left = place
    cost[patch, max(top - APART, 0):top + APART + 1, max(left - APART, 0):left + APART + 1] = np.inf


def count_use(used, top, left):
    """Add, to each position of a patch, the share of its block that the block at (top, left) covers."""
    rows, columns = (np.maximum(0, BLOCK - np.abs(np.arange(n) - start)) for n, start in zip(used.shape, (top, left)))
    used += rows[:, None] * columns / np.float32(BLOCK * BLOCK)


def before_cut(difference):
    """The cheapest cut from top to bottom through each of N strips: (N, length, width) of bool, True left of the cut.

    difference: (N, length, width), what cutting at a pixel costs. A cut moves at most one pixel sideways a row.
    """
    n, length, width = difference.shape
    total = np.full((length, width + 2, n), np.inf, np.float32)       # a border on either side
    total[:, 1:-1] = difference.transpose(1, 2, 0)
    for row in range(1, length):
        above = total[row - 1]
        total[row, 1:-1] += np.minimum(np.minimum(above[:-2], above[1:-1]), above[2:])
    came_from = np.stack([total[:, :-2], total[:, 1:-1], total[:, 2:]]).argmin(axis=0) + np.arange(-1, width - 1)[:, None]
    cut = np.empty((length, n), int)
    cut[-1] = total[-1, 1:-1].argmin(axis=0)
    strips = np.arange(n)
    for row in range(length - 2, -1, -1):
        cut[row] = came_from[row, cut[row + 1], strips]
    return np.arange(width) < cut.T[:, :, None]


def close_cuts(patches, sources):
    """The texture of lay_blocks' sources, with the steps at its cuts made what they are inside the patches.

    Adds the smooth correction e that solves (1/REACH² − Δ) e = −div m, where m is, across a cut, the step that the two
    patches would go on with minus the step that is there, and 0 elsewhere. Returns (size, size, 3) uint8.
    """
    size, width = len(sources), patches.shape[2]
    pixels = patches.reshape(-1, 3).astype(np.float32)
    divergence = np.zeros((size, size, 3), np.float32)
    for axis, stride in enumerate((width, 1)):
        steps = np.diff(patches.astype(np.float32), axis=axis + 1, append=patches.take([-1], axis + 1).astype(np.float32))
        onward, inward = steps.reshape(-1, 3), np.roll(steps, 1, axis=axis + 1).reshape(-1, 3)  # 0 at the patch's edge
        near, far = np.moveaxis(sources, axis, 0)[:-1], np.moveaxis(sources, axis, 0)[1:]
        cuts = np.nonzero(far - near != stride)
        near, far = near[cuts], far[cuts]
        mismatch = (onward[near] + inward[far]) / 2 - (pixels[far] - pixels[near])
        along = np.moveaxis(divergence, axis, 0)
        along[cuts] += mismatch
        along[cuts[0] + 1, cuts[1]] -= mismatch
    basis, decay = cosine_basis(size)
    divergence = np.moveaxis(divergence, 2, 0)
    correction = basis.T @ (basis @ -divergence @ basis.T / decay) @ basis
    return np.rint(np.clip(pixels[sources] + np.moveaxis(correction, 0, 2), 0, 255)).astype(np.uint8)


@lru_cache
def cosine_basis(size):
    """The cosine transform (size, size), in which 1/REACH² − Δ with reflecting borders is diagonal: (size, size)."""
    k = np.arange(size)
    basis = np.sqrt(2 / size) * np.cos(np.pi * k[:, None] * (k + 0.5) / size)
    basis[0] /= np.sqrt(2)
    eigenvalues = 2 - 2 * np.cos(np.pi * k / size)
    return basis.astype(np.float32), (REACH ** -2 + eigenvalues[:, None] + eigenvalues).astype(np.float32)
