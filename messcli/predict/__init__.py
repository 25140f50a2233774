"""Estimates before the answer: accuracy and joules of every model, from a prompt.

base     the protocol, the table of predictors, and the simple ones
ridge    the default: pooled ridge regressions; joules too
latent   where a prompt lies, in directions learnt from the first prompts
text     a prompt as numbers
"""
