"""One file per kind of variant; every file of this package is read when `puzzle.variants` is."""
