"""Keys and certificates, and the messages of enrolment."""
