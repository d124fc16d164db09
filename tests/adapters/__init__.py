"""A package, so that `adapters` is this folder and never another module of that name."""
