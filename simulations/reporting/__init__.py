"""A run as a page that a person can read: what was asked, what came out, what it cost."""
