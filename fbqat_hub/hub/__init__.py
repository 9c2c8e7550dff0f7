"""The Hub: model cards made from results; publish, pull, verify, list."""
