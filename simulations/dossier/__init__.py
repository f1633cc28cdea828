"""The dossier of a run: documents for regulators and review boards, of sentences that each name their source."""
