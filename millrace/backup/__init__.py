"""Backups: the content of Redis and the rows of the ledger in one file, and back again."""
