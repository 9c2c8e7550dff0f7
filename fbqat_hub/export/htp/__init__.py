"""A QDQ graph as a context binary for Qualcomm's HTP: compile, emulate, audit, compare, certify."""
