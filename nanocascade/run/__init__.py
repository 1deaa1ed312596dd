"""The bookkeeping of one run: settings, rows, checkpoints, evaluation, log."""
