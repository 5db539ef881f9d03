//! The look-ups and writes that decisions need.
