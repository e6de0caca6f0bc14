"""Check results against their ledger and their source."""
