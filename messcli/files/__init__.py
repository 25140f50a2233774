"""Files of rows: requests in, rows out.

requests   an input's lines as requests, or why they are none
sinks      where rows go: a file, a compressed file, standard output
"""
