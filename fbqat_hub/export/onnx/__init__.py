"""A torch module as a QDQ graph: trace, rewrite, calibrate, insert QDQ, and the exact CPU reference."""
