"""messcli: choose a language model per request, so that the mean accuracy keeps a promise for few joules."""

__version__ = "0.1.0"
