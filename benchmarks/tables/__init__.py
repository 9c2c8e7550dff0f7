"""The tables of README.md and docs/: a module a subject, each function the text of one table."""
