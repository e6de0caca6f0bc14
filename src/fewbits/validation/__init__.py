"""Compare results with their sources and with the ledger; report every difference."""
