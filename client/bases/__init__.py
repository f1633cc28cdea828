"""Base models on this machine: their names, the files that decide a token, verification, import."""
