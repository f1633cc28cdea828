"""The site's policy: its rules, its verdict on a study, and approvals."""
