"""One conversion of one raw dataset, as the tests of conversion run it."""

from __future__ import annotations

from data_tools.collection import collection_of_sources
from data_tools.convert import Settings, convert, existing_splits

QUIET = {"say": lambda text: None}


def run(source, out, *, spacing=None, **settings):
    """Convert a folder into a store, at `spacing` mm on all axes if it is given; returns the report."""
    collection = collection_of_sources([source], known_splits=existing_splits(str(out)))
    if spacing:
        collection.preprocessing = collection.preprocessing.model_copy(update={"spacing_mm_zyx": (spacing,) * 3})
    return convert(collection, str(out), Settings(**settings), **QUIET)
