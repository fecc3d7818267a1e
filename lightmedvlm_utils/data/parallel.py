"""Chunked, parallel work on many texts: on the cores of this machine, or on a cluster through joblib's backends."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sized
from itertools import islice

CHUNK = 2_000  # texts: a third of a second of work, beside which handing a task over costs nothing


def map_chunks(
    function: Callable, texts: Iterable, *arguments, jobs: int | None = None, title: str = "", size: int = CHUNK
) -> Iterator:
    """Yield `function(chunk, *arguments)` for every `size` texts, in their order.

    `jobs` as joblib takes it: -1 for all cores; None for one, unless a `joblib.parallel_config(backend="dask")` (or
    "ray", ...) around the call says otherwise. Chunks are drawn from `texts` and results handed on as they come, so
    that memory does not grow with their number. `title` names a progress bar; "" shows none.
    """
    from joblib import Parallel, delayed
    from tqdm import tqdm

    total = -(-len(texts) // size) if isinstance(texts, Sized) else None
    chunks = _chunks(texts, size)
    if total is not None and total <= 1:  # not worth a pool of processes
        yield from (function(chunk, *arguments) for chunk in chunks)
        return
    results = Parallel(n_jobs=jobs, return_as="generator")(delayed(function)(chunk, *arguments) for chunk in chunks)
    yield from tqdm(results, total=total, desc=title, unit="chunk", disable=not title)


def _chunks(texts: Iterable, size: int) -> Iterator[list]:
    iterator = iter(texts)
    while chunk := list(islice(iterator, size)):
        yield chunk
