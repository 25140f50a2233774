"""What a run keeps: one SQLite file that makes it durable and resumable.

state      all of it together: what a commit is
database   the file: schema, migrations, transactions, errors
journal    what was decided, answered and finished
output     the output file as the state knows it
lock       one process at a time
"""
