"""The decision: which model a request goes to. Knows numbers, no files, models or meters.

sla          what was promised and delivered: queue and account of a plan
exploration  how often more than the served model answers
policy       how a model is chosen: what a policy is, the paper's, and yardsticks
auto         the policy without V: the price of accuracy is found by the program
price        the search of the price
margin       how far above alpha the choices aim
tuning       the numbers that all of these are tuned by
learnt       what is known of prompts, models, answers and loads
deciding     a window's decisions: a pure function of what is known and owed
event        what came of a request
controller   what is remembered between requests; decides and folds in windows
loop         windows of requests: decide, ask, fold in
source       where outcomes come from: live models, or a recorded table
setup        a controller from names and numbers
"""
