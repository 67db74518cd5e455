"""Secure aggregation: the coordinator learns a sum, and nothing else about what was summed."""
