"""The bundled zoo: three tiny English-to-German models, the data they learn from and the script that trains them.

It lets ``messcli route`` work on a fresh machine without a download. It is a demonstration: the models know the
words of `lexicon` and nothing else. Nothing here knows how requests are routed.
"""
