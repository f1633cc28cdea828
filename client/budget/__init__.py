"""What a dataset has spent: the ledger, its accounts, and what was released."""
