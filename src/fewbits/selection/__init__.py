"""Decide the fate of each tensor and record why: tensor descriptions, name patterns, selectors, the ledger."""
