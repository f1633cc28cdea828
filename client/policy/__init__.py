"""What a site agrees to: the rules, the verdict, and consent to a study."""
