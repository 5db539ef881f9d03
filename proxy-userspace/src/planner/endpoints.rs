//! Endpoint selection: policies, readiness, hints.
