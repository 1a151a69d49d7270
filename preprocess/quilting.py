"""Texture synthesis from patches: image quilting that keeps all of every patch in use and closes its seams.

Blocks of the patches are laid over the canvas, each chosen among all positions of all patches by how well it continues
its neighbours, and cut where it differs least from them (Efros & Freeman, Image Quilting for Texture Synthesis and
Transfer, SIGGRAPH 2001). Quilting alone drifts into flat regions, which fit everything, and repeats what fits best; so
the choice also counts how often a block's pixels were used before, and no patch may get far ahead of another. Remaining
steps at the cuts are levelled out over some pixels around them (Pérez et al., Poisson Image Editing, SIGGRAPH 2003).
"""

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np

BALANCE = 1.0  # what one earlier use of a block's pixels costs, or of its colours
LEAD = 4  # blocks that a patch may be ahead of another


class Blocks(NamedTuple):
    """Sizes in pixels; the defaults suit patches of 96 px.

    side: of a block, a multiple of cell[0]. overlap: what neighbours share, a multiple of cell[1]. cell: overlaps are
    compared by means over cells, the first along the overlap, the second across it. apart: how far a block keeps from
    merely continuing a neighbour. reach: over which distance a step at a cut is levelled out.
    """

    side: int = 40
    overlap: int = 8
    cell: tuple[int, int] = (4, 2)
    apart: int = 4
    reach: float = 16

    @property
    def step(self) -> int:
        return self.side - self.overlap


DEFAULT = Blocks()


def blocks_for(patch: int) -> Blocks:
    """Sizes in proportion to the side of the patches, px: blocks of 5/12 of it, as the defaults for 96."""
    side = 4 * -(-5 * patch // 48)
    return Blocks(side, 2 * -(-side // 10), (4, 2) if side >= 40 else (2, 1), max(1, side // 10), 0.4 * side)


def quilt(patches: np.ndarray, size: int, rng: np.random.Generator, blocks: Blocks = DEFAULT) -> np.ndarray:
    """Synthesise a texture from patches of one photo.

    patches: (P, H, W, 3) uint8, H and W at least blocks.side; size: side of the texture, px.
    Returns (size, size, 3) uint8. Raises ValueError where the patches are smaller than a block.
    """
    return close_cuts(patches, lay_blocks(patches, size, rng, blocks), blocks.reach)


def lay_blocks(patches: np.ndarray, size: int, rng: np.random.Generator, blocks: Blocks = DEFAULT) -> np.ndarray:
    """Quilt: the index into patches.reshape(-1, 3) of every pixel of the texture, (size, size) int64."""
    height, width = patches.shape[1:3]
    if min(height, width) < blocks.side:
        raise ValueError(f"patches of {width}×{height} px are smaller than a block, {blocks.side} px")
    canvas = Canvas(patches, size, rng, blocks)
    for rows, columns in waves(canvas.places.shape[0]):
        canvas.lay(rows, columns)
    return canvas.sources[:size, :size]


def waves(count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows and columns of the blocks of count×count that can be laid at once, wave by wave.

    Blocks a knight's move apart neither touch nor need each other; neighbours at the left and at the top come before.
    """
    for wave in range(3 * count - 2):
        rows = np.arange(max(0, (wave - count + 2) // 2), min(wave // 2, count - 1) + 1)
        yield rows, wave - 2 * rows


class Canvas:
    """A texture while its blocks are laid.

    sources: the index into the patches' pixels of every pixel laid so far; places: patch, top and left of each block.
    """

    def __init__(self, patches: np.ndarray, size: int, rng: np.random.Generator, blocks: Blocks):
        self.rng, self.blocks, self.patches = rng, blocks, patches
        count, height, width, _ = patches.shape
        colours = patches - patches.mean(axis=(0, 1, 2), dtype=np.float32)  # small numbers: float32 holds their squares
        self.pixels = colours.reshape(-1, 3)
        side, overlap, (long, short) = blocks.side, blocks.overlap, blocks.cell
        self.cells = (long, short), (short, long)  # of the overlaps at the left and at the top
        self.windows = [
            all_windows(colours, window, cell, side)
            for window, cell in zip(((side, overlap), (overlap, side)), self.cells)
        ]
        self.norms = [np.einsum("ij,ij->j", samples, samples) for samples in self.windows]
        self.shape = count, height - side + 1, width - side + 1  # of all positions of a block
        self.used, self.counts = np.zeros(self.shape, np.float32), np.zeros(count, int)
        self.bins = (patches >> 5).astype(int).reshape(-1, 3) @ (64, 8, 1)  # the colour of each pixel, one of 512
        self.bin_sizes, self.bin_uses = np.bincount(self.bins, minlength=512), np.zeros(512)
        along = -(-(size - overlap) // blocks.step)
        self.sources = np.zeros((along * blocks.step + overlap,) * 2, np.int64)
        self.places = np.zeros((along, along, 3), int)

    def lay(self, rows: np.ndarray, columns: np.ndarray) -> None:
        """Lay one wave of N blocks: choose each among all positions of all patches, cut it, and paste it."""
        at = np.arange(self.blocks.side)
        here = self.blocks.step * rows[:, None, None] + at[:, None], self.blocks.step * columns[:, None, None] + at
        before = self.sources[here]  # N×side×side: what neighbours left there
        neighbours = columns > 0, rows > 0  # at the left, at the top
        errors = self.overlap_errors(before, neighbours)
        colour_uses = self.colour_uses()
        for row, column, error in zip(rows, columns, errors):
            self.choose(row, column, error, colour_uses)
        patch, top, left = self.places[rows, columns].T[:, :, None, None]
        height, width = self.patches.shape[1:3]
        block = (patch * height + top + at[:, None]) * width + left + at
        self.bin_uses += np.bincount(self.bins[block].ravel(), minlength=512)
        self.sources[here] = np.where(self.kept(before, block, neighbours), before, block)

    def overlap_errors(self, before: np.ndarray, neighbours: tuple) -> np.ndarray:
        """Squared differences between the overlaps and every position of a block: (N, positions)."""
        overlap = self.blocks.overlap
        strips = before[:, :, :overlap], before[:, :overlap]
        errors = np.zeros((len(before), len(self.norms[0])), np.float32)
        for exists, strip, cell, samples, norm in zip(neighbours, strips, self.cells, self.windows, self.norms):
            wanted = cell_means(self.pixels[strip[exists]], cell).reshape(exists.sum(), len(samples))
            errors[exists] += norm - 2 * (wanted @ samples) + np.square(wanted).sum(1)[:, None]
        return errors

    def colour_uses(self) -> np.ndarray:
        """The mean number of earlier uses of the colours in the block at each position: (P, rows, columns)."""
        uses = (self.bin_uses / np.maximum(self.bin_sizes, 1))[self.bins]
        return block_means(uses.reshape(self.patches.shape[:3]), self.blocks.side)

    def choose(self, row: int, column: int, error: np.ndarray, colour_uses: np.ndarray) -> None:
        """Set the place of one block, the cheapest that is allowed, and count its pixels as used."""
        blocks, samples = self.blocks, len(self.windows[0])
        cost = cost_of_positions(error.reshape(self.shape), samples, self.used + colour_uses, self.rng)
        cost[self.counts - self.counts.min() >= LEAD] = np.inf
        if column:
            forbid_near(cost, self.places[row, column - 1] + (0, 0, blocks.step), blocks.apart)
        if row:
            forbid_near(cost, self.places[row - 1, column] + (0, blocks.step, 0), blocks.apart)
        place = np.unravel_index(cost.argmin(), self.shape)
        self.places[row, column] = place
        self.counts[place[0]] += 1
        count_use(self.used[place[0]], *place[1:], blocks.side)

    def kept(self, before: np.ndarray, block: np.ndarray, neighbours: tuple) -> np.ndarray:
        """Mask (N, side, side) of the earlier pixels that stay: up to the cheapest cut through each overlap."""
        overlap = self.blocks.overlap
        difference = np.square(self.pixels[block] - self.pixels[before]).sum(3)
        strips = difference[:, :, :overlap], difference[:, :overlap].transpose(0, 2, 1)
        keep_left, keep_top = np.split(before_cut(np.concatenate(strips)), 2)
        keep = np.zeros(block.shape, bool)
        keep[:, :, :overlap] = keep_left & neighbours[0][:, None, None]
        keep[:, :overlap] |= keep_top.transpose(0, 2, 1) & neighbours[1][:, None, None]
        return keep


def cell_means(images: np.ndarray, cell: tuple[int, int]) -> np.ndarray:
    """(N, H, W, 3) to (N, H/h, W/w, 3), means of h×w pixels: enough to compare overlaps, at less work."""
    n, height, width, _ = images.shape
    h, w = cell
    return images.reshape(n, height // h, h, width // w, w, 3).mean(axis=(2, 4))


def all_windows(patches: np.ndarray, size: tuple[int, int], cell: tuple[int, int], side: int) -> np.ndarray:
    """cell_means of (height, width) windows at all positions of a block of `side`, as columns (numbers, positions)."""
    (h, w), (height, width) = cell, size
    rows, columns = patches.shape[1] - h + 1, patches.shape[2] - w + 1
    means = sum(patches[:, i : i + rows] for i in range(h))
    means = sum(means[:, :, i : i + columns] for i in range(w)) / (h * w)  # of the cell at every position
    patch, row, column, channel = means.strides
    rows, columns = patches.shape[1] - side + 1, patches.shape[2] - side + 1
    windows = np.lib.stride_tricks.as_strided(
        means,
        (height // h, width // w, 3, len(patches), rows, columns),
        (h * row, w * column, channel, patch, row, column),
    )
    return windows.reshape(height // h * (width // w) * 3, -1)


def block_means(values: np.ndarray, side: int) -> np.ndarray:
    """(P, H, W) to the means over the block at each position, (P, rows, columns) float32."""
    sums = np.pad(values.cumsum(1).cumsum(2), ((0, 0), (1, 0), (1, 0)))
    sums = sums[:, side:, side:] - sums[:, :-side, side:] - sums[:, side:, :-side] + sums[:, :-side, :-side]
    return (sums / side**2).astype(np.float32)


def cost_of_positions(error: np.ndarray, samples: int, uses: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Cost of taking a block from each position (P, rows, columns): overlap error, earlier uses, a little chance.

    error: squared, summed over `samples` numbers. Its unit is what the best twentieth of the positions reach, or one
    level a sample, which nobody sees. Its cost levels off: where flat regions fit a thousand times better than what has
    structure, structure shall still get its turn.
    """
    good = np.partition(error, error.size // 20, axis=None)[error.size // 20]
    error = np.maximum(error, 0) / max(good, samples)
    return 6 * error / (3 + error) + BALANCE * uses + 0.1 * rng.random(error.shape, np.float32)


def forbid_near(cost: np.ndarray, place: np.ndarray, apart: int) -> None:
    patch, top, left = place
    cost[patch, max(top - apart, 0) : top + apart + 1, max(left - apart, 0) : left + apart + 1] = np.inf


def count_use(used: np.ndarray, top: int, left: int, side: int) -> None:
    """Add, to each position of a patch, the share of its block that the block at (top, left) covers."""
    rows, columns = (np.maximum(0, side - np.abs(np.arange(n) - start)) for n, start in zip(used.shape, (top, left)))
    used += rows[:, None] * columns / np.float32(side * side)


def before_cut(difference: np.ndarray) -> np.ndarray:
    """The cheapest cut from top to bottom through each of N strips: (N, length, width) of bool, True left of the cut.

    difference: (N, length, width), what cutting at a pixel costs. A cut moves at most one pixel sideways a row.
    """
    n, length, width = difference.shape
    total = np.full((length, width + 2, n), np.inf, np.float32)  # a border on either side
    total[:, 1:-1] = difference.transpose(1, 2, 0)
    for row in range(1, length):
        above = total[row - 1]
        total[row, 1:-1] += np.minimum(np.minimum(above[:-2], above[1:-1]), above[2:])
    cheapest = np.stack([total[:, :-2], total[:, 1:-1], total[:, 2:]]).argmin(axis=0)
    came_from = cheapest + np.arange(-1, width - 1)[:, None]
    cut = np.empty((length, n), int)
    cut[-1] = total[-1, 1:-1].argmin(axis=0)
    strips = np.arange(n)
    for row in range(length - 2, -1, -1):
        cut[row] = came_from[row, cut[row + 1], strips]
    return np.arange(width) < cut.T[:, :, None]


def close_cuts(patches: np.ndarray, sources: np.ndarray, reach: float = DEFAULT.reach) -> np.ndarray:
    """The texture of lay_blocks' sources, with the steps at its cuts made what they are inside the patches.

    Adds the smooth correction e that solves (1/reach² − Δ) e = −div m, where m is, across a cut, the step that the two
    patches would go on with minus the step that is there, and 0 elsewhere. Returns (size, size, 3) uint8.
    """
    size, width = len(sources), patches.shape[2]
    pixels = patches.reshape(-1, 3).astype(np.float32)
    divergence = np.zeros((size, size, 3), np.float32)
    for axis, stride in enumerate((width, 1)):
        colours = patches.astype(np.float32)
        steps = np.diff(colours, axis=axis + 1, append=colours.take([-1], axis + 1))
        onward, inward = steps.reshape(-1, 3), np.roll(steps, 1, axis=axis + 1).reshape(-1, 3)  # 0 at the patch's edge
        near, far = np.moveaxis(sources, axis, 0)[:-1], np.moveaxis(sources, axis, 0)[1:]
        cuts = np.nonzero(far - near != stride)
        near, far = near[cuts], far[cuts]
        mismatch = (onward[near] + inward[far]) / 2 - (pixels[far] - pixels[near])
        along = np.moveaxis(divergence, axis, 0)
        along[cuts] += mismatch
        along[cuts[0] + 1, cuts[1]] -= mismatch
    basis, decay = cosine_basis(size, reach)
    divergence = np.moveaxis(divergence, 2, 0)
    correction = basis.T @ (basis @ -divergence @ basis.T / decay) @ basis
    return np.rint(np.clip(pixels[sources] + np.moveaxis(correction, 0, 2), 0, 255)).astype(np.uint8)


@lru_cache
def cosine_basis(size: int, reach: float) -> tuple[np.ndarray, np.ndarray]:
    """The cosine transform (size, size), in which 1/reach² − Δ with reflecting borders is diagonal: (size, size)."""
    k = np.arange(size)
    basis = np.sqrt(2 / size) * np.cos(np.pi * k[:, None] * (k + 0.5) / size)
    basis[0] /= np.sqrt(2)
    eigenvalues = 2 - 2 * np.cos(np.pi * k / size)
    return basis.astype(np.float32), (reach**-2 + eigenvalues[:, None] + eigenvalues).astype(np.float32)
