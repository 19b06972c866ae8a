"""Is it faster for you? The spectral norms of a model, timed and profiled beside others' ways.

``python -m spectral_ext bench MODEL`` and ``python -m spectral_ext profile MODEL``; the scripts in ``bench/``
of the repository define set-ups for the same runner. It wants ``rich``; nothing else imports this package.
"""
