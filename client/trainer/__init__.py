"""The trainer apart from the site's process: what travels between both, how, and what the trainer may do."""
