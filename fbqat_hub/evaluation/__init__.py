"""Metrics, pictures and records: a student measured against its teacher."""
