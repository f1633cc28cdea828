"""The members: invitation, enrolment, certificates, and the service that sites ask."""
