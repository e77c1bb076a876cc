"""One module for each name that :func:`mmvmamba.compat.install` provides; the finder shows them under those names."""
