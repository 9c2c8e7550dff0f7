"""The zoo: one data file a model, what was measured of it, and the card made from both."""
