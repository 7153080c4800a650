"""Test tools for distributed code: real ranks in a tenth of a second, twins, faults, tiny models."""
