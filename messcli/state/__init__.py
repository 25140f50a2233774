"""What a run keeps: one SQLite file that makes it durable and resumable.

database   the schema, commits, and the output as its projection
"""
