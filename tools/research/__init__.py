"""Evidence on recorded tables: the paper's tables and figures."""
