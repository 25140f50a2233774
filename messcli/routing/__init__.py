"""The decision: which model a request goes to. Knows numbers, no files, models or meters.

policy       how a model is chosen: the paper's equation 3, and yardsticks
price        the policy without tuning flags: what a unit of accuracy is worth
controller   all that is remembered between requests
loop         windows of requests: decide, ask, fold in
source       where outcomes come from: live models, or a recorded table
setup        a controller from names and numbers
"""
