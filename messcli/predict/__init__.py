"""Estimates before the answer: accuracy and joules of every model, from a prompt.

base        what a predictor is
mean        the mean of each model
linear      the paper's linear models
fasttext    the paper's fastText classifiers
ridge       the default: ridge regressions on accuracies
joules      the same on joules
regression  what these two share
latent      where a prompt lies, in directions learnt from the first prompts
text        a prompt as numbers
tuning      the numbers that all of these are tuned by
"""
