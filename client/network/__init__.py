"""Reach the coordinator: the resident process, the fleet protocol, enrolment, renewal, metrics."""
