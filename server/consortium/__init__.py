"""The members of the consortium: invitation, enrolment, certificates, and the service for members."""
