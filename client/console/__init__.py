"""The console of a site: what is proposed, what left, what it cost, and what is wrong."""
