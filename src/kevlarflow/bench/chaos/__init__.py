"""Chaos on real processes: scenarios as data, faults that are verified, checks that are judged by pure functions."""
