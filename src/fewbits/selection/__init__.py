"""Which tensor meets which fate, and why: tensor descriptions, name patterns, selectors, the ledger."""
