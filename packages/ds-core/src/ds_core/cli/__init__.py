"""The `ds` command."""
