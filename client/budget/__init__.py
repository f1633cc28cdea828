"""The privacy budget of a dataset: the ledger, its accounts, and the releases."""
