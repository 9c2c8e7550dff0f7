"""The Hub: model cards made from results."""
