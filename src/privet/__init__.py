"""Fine-tune one pretrained model across sites that keep their records: see README.md."""
