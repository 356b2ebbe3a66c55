"""Libraries with weights of a test's own choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from torch import Tensor

from puzzle.library import BlockLibrary, LibraryEntry, Replacement, file_of
from puzzle.pool import Outcome, ReplacementPool


def add(
    library: BlockLibrary, item: Replacement, tensors: Mapping[str, Tensor], *, bld_nmse_init: float, bld_nmse: float
) -> None:
    """Put one replacement into ``library``, as BLD does when it is done with it; the index is not written."""
    outcome = Outcome(bld_nmse_init=bld_nmse_init, bld_nmse=bld_nmse, trained=True)
    pool = ReplacementPool(directory=library.directory.with_name(f"{library.directory.name}_pool"), facts={})
    pool.put(pool.key(item, {}), tensors, outcome, library.directory / file_of(item), dtype=library.dtype)
    library.entries[item] = LibraryEntry(replacement=item, file=file_of(item), **asdict(outcome))
