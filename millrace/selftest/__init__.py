"""`millrace selftest`: a batch on parts of its own, while they are killed, and what an oracle says of its files."""
