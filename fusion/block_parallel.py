"""Full-block parallelism: windows of whole blocks, attention included, that all read the same input.

Source: FFN Fusion (arXiv 2503.18908), Appendix B. Blocks that attend cannot become one block as FFNs can, but where
they hardly depend on each other they can run side by side. The windows are chosen greedily by the dependency matrix.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from distill.config import require
from fusion.config import ParallelizeConfig, Span
from fusion.grouping import Matrix
from puzzle.model.architecture import Architecture
from puzzle.model.checkpoint import TensorReader, copy_checkpoint


@dataclass(frozen=True, kw_only=True)
class Window:
    """Blocks that run in parallel, and how much they depend on each other; None where nothing was measured."""

    first: int
    last: int
    """Inclusive."""
    largest: float | None = None
    """M_max of the paper: largest cosine distance from any block of the window to a later one of it."""
    total: float | None = None
    """M_sum: the sum of these distances."""

    @property
    def span(self) -> Span:
        """First and last block."""
        return self.first, self.last


def choose_windows(architecture: Architecture, config: ParallelizeConfig, matrix: Matrix | None) -> tuple[Window, ...]:
    """Choose the blocks that will run in parallel.

    The greedy algorithm of the paper: of all windows of ``window_size`` neighbouring blocks that attend, take the one
    whose largest dependency is smallest (at a tie, the one whose dependencies sum up to less), drop those that overlap
    with it, and repeat until there are ``num_windows``. Windows by hand are taken as they are, if the model can run
    them.

    Args:
        architecture: of the model; windows that it has stay, and no new one overlaps with them.
        config: how to choose.
        matrix: ``[num_blocks, num_blocks]``, row = removed block, column = measured block (paper, section 3). Optional
            for windows by hand, which are then taken without figures.

    Returns:
        The new windows in the order of choice.

    Raises:
        ValueError: no matrix to choose by, or that of another model; fewer windows than asked for; windows by hand
            that have blocks without attention, overlap, or are out of range.
    """
    require(
        matrix is None or len(matrix) == architecture.num_blocks,
        f"dependency matrix of {len(matrix or ())} blocks for a model of {architecture.num_blocks} blocks; measure it "
        "on the model that is parallelised",
    )
    if config.windows is not None:
        require(
            len(config.windows) > 0,
            "parallelize.windows is empty; name at least one [first, last], or null to choose greedily",
        )
        windows = tuple(_window(span, matrix) for span in config.windows)
        parallel_architecture(architecture, windows)
        return windows
    assert matrix is not None, "the stage's check of its inputs"
    return _greedy(architecture, config, matrix)


def parallel_architecture(architecture: Architecture, windows: Sequence[Window]) -> Architecture:
    """``architecture`` with ``windows``, in any order, besides those that it has.

    Raises:
        ValueError: a window has a block without attention, is out of range, or overlaps with another.
    """
    spans = sorted((*architecture.parallel_windows, *(window.span for window in windows)))
    return replace(architecture, parallel_windows=tuple(spans))


def parallelize_checkpoint(model_dir: Path, out_dir: Path, architecture: Architecture) -> None:
    """Write the model of ``model_dir`` to ``out_dir`` with the windows of ``architecture``; no tensor changes.

    The code that comes with the checkpoint is today's: what an earlier version has put beside the model may know no
    windows, and would run its blocks one after another.

    Raises:
        ValueError: tensors are missing, unknown, quantised or of another shape, or a shard is damaged; nothing is
            written.
    """
    with TensorReader(model_dir) as reader:
        copy_checkpoint(reader, out_dir, architecture)


def _greedy(architecture: Architecture, config: ParallelizeConfig, matrix: Matrix) -> tuple[Window, ...]:
    candidates = _candidates(architecture, config.window_size, matrix)
    chosen: list[Window] = []
    while candidates and len(chosen) < config.num_windows:
        best = min(candidates, key=lambda window: (window.largest, window.total))
        chosen.append(best)
        candidates = [window for window in candidates if not _overlap(window.span, best.span)]
    require(
        len(chosen) == config.num_windows,
        f"parallelize.num_windows={config.num_windows}: the greedy choice finds {len(chosen)} windows of "
        f"parallelize.window_size={config.window_size} neighbouring blocks with attention that do not overlap; ask for "
        "fewer or shorter ones, or name them with parallelize.windows",
    )
    return tuple(chosen)


def _candidates(architecture: Architecture, window_size: int, matrix: Matrix) -> list[Window]:
    """Every window that could run in parallel and has a measured dependency, in rising order."""
    spans = [(first, first + window_size - 1) for first in range(architecture.num_blocks - window_size + 1)]
    windows = [
        _window((first, last), matrix)
        for first, last in spans
        if not any(block.attention.is_no_op for block in architecture.blocks[first : last + 1])
        and not any(_overlap((first, last), window) for window in architecture.parallel_windows)
    ]
    return [window for window in windows if window.largest is not None]


def _window(span: Span, matrix: Matrix | None) -> Window:
    first, last = span
    if matrix is None or last >= len(matrix):
        return Window(first=first, last=last)
    distances = [matrix[i][j] for i in range(first, last) for j in range(i + 1, last + 1)]
    measured = [distance for distance in distances if distance is not None]
    if not measured:
        return Window(first=first, last=last)
    return Window(first=first, last=last, largest=max(measured), total=sum(measured))


def _overlap(one: Span, other: Span) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]
