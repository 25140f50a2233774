"""Makes the bundled zoo (`messcli/bundled`): three tiny English-to-German models, their data, and the samples.

It lets ``messcli route`` work on a fresh machine without a download. It is a demonstration: the models know the
words of `lexicon` and nothing else. Nothing here knows how requests are routed.
"""
