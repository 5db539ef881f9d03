//! Headers from bytes.
