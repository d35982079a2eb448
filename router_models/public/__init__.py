"""The map of public models, fitted on public outcomes."""
