//! Tuple to decision.
