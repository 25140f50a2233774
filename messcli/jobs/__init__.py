"""The commands without a command line: a config in, a summary out, nothing printed.

route      requests in, rows out
record     every model answers everything
simulate   policies on a recorded table
fleet      opens models and meters
resume     how a run goes on from its state
tally      counts what a run does
summary    what a run has done, in lines for people
"""
