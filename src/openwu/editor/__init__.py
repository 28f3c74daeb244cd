"""One editor for every base, its adapter cache, and the compatibility of a generator with a base."""
