"""What makers and researchers run, from a checkout: no wheel holds it.

golden.py      the commands' outputs, compared between two revisions
bench/         what things cost, as ratios side by side
research/      the paper's evidence
bundled_zoo/   the maker of the bundled models and samples
"""
